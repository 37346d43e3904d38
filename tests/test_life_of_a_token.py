"""From issue to revocation: joins, rejoins, nodes that go, and Secrets that are not ours.

Those that need no clock run against a real cluster too, when KETO_TEST_KUBECONFIG names one.
"""
from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from clouds import kubelet_name
from clusters import SECRETS, StandinCluster
from conftest import BOTH, Result, World

pytestmark = BOTH


def joined(world: World, node: str, name: str = "") -> str:
    """Bring a node all the way in; its token."""
    token = world.cloud.tag(node)
    assert token is not None
    world.take(node)
    world.cluster.join(token, name or kubelet_name(node))
    return token


def api(world: World) -> Any:
    assert isinstance(world.cluster, StandinCluster)
    return world.cluster.api


def test_a_token_is_revoked_once_its_node_has_joined(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    joined(world, node)
    result = world.server()
    assert (result.code, result.pass_line["revoked"]) == (0, "1")
    assert world.secret_of(node) is None
    assert world.cloud.tag(node) == "Success"
    assert world.server().pass_line["issued"] == "0"


def test_a_certificate_without_a_node_is_no_join(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    token = world.cloud.tag(node)
    assert token is not None
    world.take(node)
    csr = world.cluster.request_certificate(token, kubelet_name(node))
    assert world.server().pass_line["revoked"] == "0"
    world.cluster.decide(csr)
    assert world.server().pass_line["revoked"] == "0"
    world.cluster.add_node(kubelet_name(node))
    assert world.server().pass_line["revoked"] == "1"


def test_a_join_without_a_mark_is_finished_by_the_server(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    token = world.cloud.tag(node)
    assert token is not None
    world.cluster.join(token, kubelet_name(node))
    assert world.server().pass_line["revoked"] == "1"
    assert world.cloud.tag(node) == "Success"
    assert world.secret_of(node) is None


def test_a_node_whose_tag_is_deleted_gets_a_new_token_in_the_next_pass(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    first = joined(world, node)
    world.server()
    world.cloud.delete_tag(node)
    assert world.server().pass_line["issued"] == "1"
    second = joined(world, node)
    assert second != first
    assert world.server().pass_line["revoked"] == "1"
    assert world.cloud.tag(node) == "Success"


def test_an_old_token_that_is_still_live_is_replaced_on_a_rejoin(faulty: World) -> None:
    world = faulty
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    first = joined(world, node)
    api(world).clock += 5
    world.cloud.delete_tag(node)
    assert world.server().pass_line["issued"] == "1"
    second = world.cloud.tag(node)
    assert second == world.token_of(node) != first
    api(world).clock += 5
    assert world.server().pass_line["revoked"] == "0"  # the earlier join is not this one's
    joined(world, node)
    assert world.server().pass_line["revoked"] == "1"


def test_without_revocation_the_secret_stays(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    joined(world, node)
    assert world.server("--no-revoke").pass_line["revoked"] == "0"
    assert world.secret_of(node) is not None


def test_the_token_of_a_node_that_is_gone_is_revoked_after_a_minute(faulty: World) -> None:
    world = faulty
    first, second = world.cloud.group("compute", 2, Role="compute")
    world.server()
    world.cloud.terminate(first)
    assert world.server().pass_line["revoked"] == "0"
    api(world).clock += 61
    assert world.server().pass_line["revoked"] == "1"
    assert world.secret_of(first) is None
    assert world.secret_of(second) is not None


def test_a_listing_that_fails_revokes_nothing(faulty: World) -> None:
    world = faulty
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    api(world).clock += 61
    world.cloud.refuse("list")
    assert world.server().code == 4
    assert world.secret_of(node) is not None


def test_a_terminating_node_loses_its_token(faulty: World) -> None:
    world = faulty
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    world.cloud.set_state(node, world.cloud.words.ending)
    api(world).clock += 61
    assert world.server().pass_line["revoked"] == "1"
    assert world.secret_of(node) is None


def test_a_kubelet_that_waits_for_its_certificate_keeps_its_token_until_give_up(faulty: World) -> None:
    world = faulty
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    token = world.cloud.tag(node)
    assert token is not None
    world.take(node)
    world.cluster.request_certificate(token, kubelet_name(node))
    for _ in range(5):
        api(world).clock += 21 * 60
        assert world.server().pass_line["extended"] == "1"
        assert world.cluster.whoami(token) == f"system:bootstrap:{token[:6]}"
    api(world).clock += 21 * 60  # 2h06m after the first issue
    assert world.server().pass_line["extended"] == "0"
    api(world).clock += 21 * 60
    assert world.cluster.whoami(token) is None


@pytest.mark.parametrize("denied", [False, True], ids=["no CSR", "CSR denied"])
def test_a_token_that_was_consumed_in_vain_is_given_anew_until_give_up(
    faulty: World, denied: bool
) -> None:
    world = faulty
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    tokens = {world.cloud.tag(node)}
    world.take(node)
    if denied:
        token = world.token_of(node)
        world.cluster.decide(world.cluster.request_certificate(token, kubelet_name(node)), "Denied")
    for _ in range(5):
        api(world).clock += 21 * 60
        assert world.server().pass_line["issued"] == "1"
        tokens.add(world.cloud.tag(node))
        world.take(node)
    assert len(tokens) == 6
    api(world).clock += 21 * 60
    assert world.server("--give-up", "2h").pass_line["issued"] == "0"


# --- rights ------------------------------------------------------------------------------------------

BASE = [(verb, "", "secrets", "kube-system") for verb in ("list", "get", "create", "update", "delete")]
CSRS = ("list", "certificates.k8s.io", "certificatesigningrequests", "")
NODES = ("get", "", "nodes", "")


@pytest.mark.parametrize("missing", [CSRS, NODES], ids=["CSRs", "Nodes"])
def test_without_the_right_to_see_joins_tokens_expire(faulty: World, missing: Any) -> None:
    world = faulty
    (node,) = world.cloud.group("compute", 1, Role="compute")
    token = api(world).account([*BASE, *({CSRS, NODES} - {missing})])

    def limited(*argv: str) -> Result:
        return world.program("server", "--once", *world.filters, "--master", world.cluster.url, "--ca-path",
                             str(world.cluster.ca_path), KUBE_SERVICE_TOKEN=token)

    assert limited().code == 0
    joined(world, node)
    result = limited()
    assert (result.code, result.pass_line["revoked"]) == (0, "0")
    assert result.err.count("joins cannot be seen") == 1
    assert f'resource "{missing[2]}"' in result.err
    assert world.secret_of(node) is not None


def test_the_rights_of_the_readme_are_enough(faulty: World) -> None:
    world = faulty
    (node,) = world.cloud.group("compute", 1, Role="compute")
    token = api(world).account([*BASE, CSRS, NODES])
    flags = ["server", "--once", *world.filters, "--master", world.cluster.url, "--ca-path",
             str(world.cluster.ca_path)]
    assert world.program(*flags, KUBE_SERVICE_TOKEN=token).code == 0
    joined(world, node)
    assert world.program(*flags, KUBE_SERVICE_TOKEN=token).pass_line["revoked"] == "1"


# --- Secrets that are not ours ------------------------------------------------------------------------


def foreign(token_id: str, **metadata: Any) -> dict[str, Any]:
    """A live bootstrap token that somebody else made."""
    data = {"token-id": token_id, "token-secret": "f" * 16, "expiration": "2099-01-01T00:00:00Z",
            "usage-bootstrap-authentication": "true"}
    return {
        "apiVersion": "v1", "kind": "Secret", "type": "bootstrap.kubernetes.io/token",
        "metadata": {"name": f"bootstrap-token-{token_id}", **metadata},
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
    }


@pytest.mark.parametrize("kind", ["kubeadm", "other owner", "no annotation", "another node's"])
def test_what_only_looks_like_ours_is_never_touched(world: World, kind: str) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    ours = world.secret_of(node)
    assert ours is not None
    labels, notes = ours["metadata"]["labels"], ours["metadata"]["annotations"]
    metadata: dict[str, Any] = {
        "kubeadm": {},
        "other owner": {"labels": {**labels, "keto-tokens/owner": "other"}, "annotations": notes},
        "no annotation": {"labels": labels},
        "another node's": {"labels": labels, "annotations": {**notes, "keto-tokens/node": "i-0ther"}},
    }[kind]
    name = ours["metadata"]["name"]
    world.cluster.request("DELETE", f"{SECRETS}/{name}")
    body = world.cluster.request("POST", SECRETS, foreign(name[-6:], **metadata))
    world.cloud.delete_tag(node)
    assert world.server().pass_line["issued"] == "1"
    assert world.server().code == 0
    world.cloud.terminate(node)
    world.server()
    assert world.cluster.request("GET", f"{SECRETS}/{name}") == body


def test_a_name_that_is_taken_is_walked_around(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    taken = world.token_of(node)[:6]
    world.cluster.request("DELETE", f"{SECRETS}/bootstrap-token-{taken}")
    world.cloud.delete_tag(node)
    world.cluster.request("POST", SECRETS, foreign(taken))
    world.server()
    assert world.token_of(node)[:6] != taken
    assert world.cloud.tag(node) == world.token_of(node)
    joined(world, node)
    assert world.server().pass_line["revoked"] == "1"


# --- status -------------------------------------------------------------------------------------------


def status(world: World, *argv: str) -> Result:
    return world.program("status", *world.filters, *world.cluster.server_flags(), *argv)


def rows(world: World) -> dict[str, dict[str, Any]]:
    """What status says, by node."""
    return {row["node"]: row for row in json.loads(status(world, "-o", "json").out)}


def test_status_follows_a_node(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    assert (rows(world)[node]["state"], rows(world)[node]["tag"]) == ("new", "none")
    world.server()
    token = world.token_of(node)
    row = rows(world)[node]
    assert (row["state"], row["tag"], row["token_id"]) == ("waiting", "waiting", token[:6])
    assert 1700 < row["expires_in"] <= 1800
    world.take(node)
    assert (rows(world)[node]["state"], rows(world)[node]["tag"]) == ("joining", "consumed")
    world.cluster.join(token, kubelet_name(node))
    assert rows(world)[node]["state"] == "joined"
    world.server()
    result = status(world)
    assert result.code == 0
    header, line = result.out.splitlines()
    assert header.split() == [
        "NODE", "POOL", "LIFECYCLE", "TAG", "TOKEN", "AGE", "EXPIRES", "STATE", "REASON",
    ]
    assert line.split() == [node, "compute", world.cloud.words.running, "consumed", "-", "-", "-", "joined"]


@pytest.mark.parametrize(("consumed", "csr", "words"), [
    (False, "", "tag not read in 11m"),
    (True, "", "no CSR 11m"),
    (True, "waits", "CSR waits for approval"),
    (True, "Denied", "CSR denied"),
    (True, "Approved", "no Node yet"),
])
def test_status_says_where_a_node_is_stuck(
    faulty: World, consumed: bool, csr: str, words: str
) -> None:
    world = faulty
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    token = world.token_of(node)
    if consumed:
        world.take(node)
    if csr:
        name = world.cluster.request_certificate(token, kubelet_name(node))
        if csr != "waits":
            world.cluster.decide(name, csr)
    api(world).clock += 660
    result = status(world)
    assert result.code == 1
    assert words in result.out
    assert "stuck" in result.out
    assert token.partition(".")[2] not in result.out


def test_status_of_one_node_and_of_none(world: World) -> None:
    first, second = world.cloud.group("compute", 2, Role="compute")
    result = status(world, "--node", first, "-o", "wide")
    assert (result.code, first in result.out, second in result.out) == (0, True, False)
    assert "SECRET" in result.out and "is the server running" in result.out
    unknown = status(world, "--node", world.cloud.words.no_node)
    assert (unknown.code, unknown.out) == (3, "")


def test_status_changes_nothing(world: World) -> None:
    world.cloud.group("compute", 1, Role="compute")
    status(world)
    assert world.cloud.count() == world.cloud.words.reads
    assert world.cluster.token_secrets() == []
