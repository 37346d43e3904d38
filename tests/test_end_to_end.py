"""The main job, end to end: server and client over real HTTP, against moto and a cluster.

These run against a real cluster when KETO_TEST_KUBECONFIG names its admin kubeconfig.
"""
from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import yaml

import keto_tokens
from clusters import StandinCluster, kubeconfig_of
from conftest import BOTH, World
from standin_kubernetes import status

pytestmark = BOTH


def test_three_nodes_get_a_token_each_and_consume_it(world: World) -> None:
    nodes = world.cloud.group("compute", 3, Role="compute")
    first = world.server()
    assert first.code == 0, first.err
    assert first.pass_line["issued"] == "3"
    tokens = {node: world.cloud.tag(node) for node in nodes}
    assert len(set(tokens.values())) == 3
    for node in nodes:
        assert tokens[node] == world.token_of(node)
        world.take(node)
        assert world.cloud.tag(node) == "Success"
        written = kubeconfig_of(world.kubeconfig(node))
        assert written == {
            "server": world.cluster.url,
            "ca": world.cluster.ca_path.read_text(),
            "token": tokens[node],
        }
        user = world.cluster.whoami(written["token"])
        assert user == f"system:bootstrap:{written['token'][:6]}"


def test_the_kubeconfig_is_private_and_its_folders_are_not(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    before = os.umask(0o077)
    try:
        assert world.client(node).code == 0
    finally:
        os.umask(before)
    path = world.kubeconfig(node)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_kubeadm_is_told_where_the_kubeconfig_is(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    path = world.kubeconfig(node)
    beside = path.parent / "kubeadm-join.yaml"
    token = world.token_of(node)
    result = world.client(node, "--format", "kubeadm")
    assert result.code == 0 and f"written join_config={beside}" in result.err
    assert kubeconfig_of(path)["token"] == token
    assert yaml.safe_load(beside.read_text()) == {
        "apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "JoinConfiguration",
        "discovery": {"file": {"kubeConfigPath": str(path)}},
    }
    assert (stat.S_IMODE(beside.stat().st_mode), token[7:] in beside.read_text()) == (0o600, False)


def test_kubeadms_file_can_be_elsewhere(world: World, tmp_path: Path) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    elsewhere = tmp_path / "kubeadm" / "join.yaml"
    assert world.client(node, "--format=kubeadm", "--join-config", str(elsewhere)).code == 0
    assert str(world.kubeconfig(node)) in elsewhere.read_text()


def test_a_second_pass_has_nothing_to_do(world: World) -> None:
    world.cloud.group("compute", 2, Role="compute")
    world.server()
    world.cloud.recover()
    second = world.server()
    assert second.code == 0
    assert second.pass_line["issued"] == "0"
    assert second.pass_line["waiting"] == "2"
    asked = {"compute.instances.getGuestAttributes": 2} if world.cloud.name == "gce" else {}
    assert world.cloud.count() == {**world.cloud.words.reads, **asked}


def test_the_secret_is_what_kubeadm_would_make(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    body = world.secret_of(node)
    assert body is not None
    assert body["type"] == "bootstrap.kubernetes.io/token"
    assert body["metadata"]["name"] == f"bootstrap-token-{world.token_of(node)[:6]}"
    assert body["metadata"]["annotations"]["keto-tokens/pool"] == "compute"
    assert set(body["data"]) == {
        "token-id", "token-secret", "expiration", "description", "auth-extra-groups",
        "usage-bootstrap-authentication", "usage-bootstrap-signing",
    }


def test_groups_that_do_not_match_all_filters_get_nothing(world: World) -> None:
    (wanted,) = world.cloud.group("prod", 1, Role="compute", Env="prod")
    (other,) = world.cloud.group("test", 1, Role="compute", Env="test")
    result = world.server(filters=world.cloud.filters("Role=compute", "Env=prod"))
    assert result.code == 0
    assert world.cloud.tag(wanted) is not None
    assert world.cloud.tag(other) is None


def test_all_groups_takes_its_flag(world: World) -> None:
    nodes = world.cloud.group("a", 1, Role="compute") + world.cloud.group("b", 1, Role="other")
    refused = world.server(filters=world.cloud.filters())
    assert (refused.code, world.cloud.count()) == (2, {})
    assert "--all-groups" in refused.err
    assert world.server("--all-groups", filters=world.cloud.filters()).code == 0
    assert all(world.cloud.tag(node) for node in nodes)


def test_rubbish_in_a_tag_is_replaced(world: World) -> None:
    first, second = world.cloud.group("compute", 2, Role="compute")
    world.cloud.set_tag(first, "x" * 256)
    world.cloud.set_tag(second, "")
    assert world.server().code == 0
    assert world.cloud.tag(first) == world.token_of(first)
    assert world.cloud.tag(second) == world.token_of(second)


def test_a_tag_that_was_lost_is_published_again(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    token = world.cloud.tag(node)
    world.cloud.delete_tag(node)
    result = world.server()
    assert (result.pass_line["issued"], result.pass_line["published"]) == ("0", "1")
    assert world.cloud.tag(node) == token


def test_a_token_of_somebody_else_is_replaced(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.cloud.set_tag(node, "abcdef.0123456789abcdef")
    assert world.server().pass_line["issued"] == "1"
    assert world.cloud.tag(node) == world.token_of(node)


def test_a_lost_secret_is_issued_again(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    old = world.cloud.tag(node)
    secret = world.secret_of(node)
    assert secret is not None
    world.cluster.request("DELETE", f"/api/v1/namespaces/kube-system/secrets/{secret['metadata']['name']}")
    assert world.server().pass_line["issued"] == "1"
    assert world.cloud.tag(node) == world.token_of(node) != old


def test_a_dry_run_says_what_it_would_do_and_does_nothing(world: World) -> None:
    nodes = world.cloud.group("compute", 2, Role="compute")
    result = world.server("--dry-run")
    assert result.code == 0
    lines = result.out.splitlines()
    assert sorted(line.split()[:3] for line in lines) == sorted(
        ["issue", node, "compute"] for node in nodes
    )
    assert all(line.endswith("no token yet") for line in lines)
    assert world.cloud.count() == world.cloud.words.reads
    assert world.cluster.token_secrets() == []


def test_a_consumed_tag_is_a_success(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.cloud.set_tag(node, "Success")
    result = world.client(node)
    assert result.code == 0
    assert not world.kubeconfig(node).exists()
    assert "delete the tag" in result.err


def test_a_token_that_is_not_live_is_not_consumed(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.cloud.set_tag(node, "abcdef.0123456789abcdef")
    result = world.client(node, "--timeout", "300ms")
    assert result.code == 5
    assert "abcdef" in result.err and "does not accept" in result.err
    assert "0123456789abcdef" not in result.err
    assert world.cloud.tag(node) == "abcdef.0123456789abcdef"
    assert not world.kubeconfig(node).exists()


def test_without_a_tag_the_timeout_says_so(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    result = world.client(node, "--timeout", "200ms")
    assert result.code == 5
    assert result.err.splitlines()[-1].startswith("keto-tokens: no token after")
    assert f"tag KubeletToken of {node} is not there yet" in result.err


def test_another_tag_name_is_another_protocol(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    assert world.server("--tag-name", "Join").code == 0
    assert world.cloud.tag(node) is None
    world.take(node, both=["--tag-name", "Join"])
    assert world.cloud.tag(node, "Join") == "Success"


def test_servers_of_other_filters_keep_out_of_each_others_way(world: World) -> None:
    (compute,) = world.cloud.group("compute", 1, Role="compute")
    (storage,) = world.cloud.group("storage", 1, Role="storage")
    world.server()
    world.server(filters=world.cloud.filters("Role=storage"))
    owners = {body["metadata"]["labels"]["keto-tokens/owner"] for body in world.cluster.token_secrets()}
    assert len(owners) == 2
    assert world.cloud.tag(compute) == world.token_of(compute)
    assert world.cloud.tag(storage) == world.token_of(storage)


OTHERS = {
    "a certificate": "users:\n- name: a\n  user:\n    client-certificate-data: eA==\n",
    "JSON": '{"users": [{"name": "a", "user": {\n"client-certificate": "x"}}]}',
    "a plugin": "users:\n- name: a\n  user:\n    exec:\n      command: x\n",
    "a token": "users:\n- name: a\n  user:\n    token: eyJhbGciOiJSUzI1NiJ9.e30.x\n",
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_a_kubeconfig_with_another_credential_is_not_replaced(world: World, content: str) -> None:
    """$KUBECONFIG may name an admin's, as kubeadm says to set it."""
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    path = world.kubeconfig(node)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    result = world.client(node)
    assert (result.code, path.read_text()) == (3, content)
    assert "holds another credential" in result.err
    assert world.cloud.tag(node) == world.token_of(node)


def test_a_kubeconfig_of_an_earlier_bootstrap_is_replaced(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    path = world.kubeconfig(node)
    path.parent.mkdir(parents=True)
    path.write_text("users:\n- name: a\n  user:\n    token: abcdef.0123456789abcdef\n")
    assert world.client(node).code == 0
    assert world.token_of(node) in path.read_text()


def test_a_watch_goes_on_when_the_cluster_is_away_for_a_moment(faulty: World) -> None:
    """The first look must succeed; one that fails later is told, and the next one comes."""
    assert isinstance(faulty.cluster, StandinCluster)
    faulty.cloud.group("compute", 1, Role="compute")
    api, looks = faulty.cluster.api, []
    stop = keto_tokens.Stop()

    def wait(seconds: float) -> bool:
        looks.append(seconds)
        if len(looks) == 1:
            api.fail("GET", "/secrets", status(403))
        return len(looks) == 3

    stop.wait = wait  # type: ignore[method-assign]
    options = keto_tokens.parse_options(
        ["status", "--watch", *faulty.filters, *faulty.cluster.server_flags()], os.environ)
    assert options is not None
    keto_tokens.set_up_logging(False)
    assert keto_tokens.run_status(options, stop) == 0
    assert len(looks) == 3
