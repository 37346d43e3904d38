"""What only GCE has: metadata that is shared with others, receipts, operations, credentials, long polls."""
from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import keto_tokens
import standin_gce
from clouds import GceCloud, kubelet_name, number_of
from clusters import StandinCluster, wait_for
from conftest import Result, World
from standin_gce import ROLE, SERVER_TOKEN
from standin_imds import Imds

pytestmark = pytest.mark.parametrize("cloud_name", ["gce"], indirect=True)
LIST, GET, SET = (f"compute.instances.{name}" for name in ("aggregatedList", "get", "setMetadata"))
WAIT, RECEIPT = "compute.zoneOperations.wait", "compute.instances.getGuestAttributes"
OTHERS = {
    "ssh-keys": "me:ssh-ed25519 AAAA\u00e9\u4e16\U0001f511 me\nyou:ssh-rsa BBBB\r\n",
    "startup-script": "#!/bin/sh\necho \"$HOME\" '\\x00' \t\n\n",
    "empty": "",
}


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries at once: what is tested is that they come, not when."""
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)


def one(world: World, **options: Any) -> str:
    """An instance of a group; its node id."""
    labels = options.pop("labels", {"role": "compute"})
    number = world.gce.instance("compute-1", labels=labels, group="compute", **options)
    assert isinstance(world.cloud, GceCloud)
    return world.cloud.node_id(number)


def clock(world: World, seconds: float) -> None:
    assert isinstance(world.cluster, StandinCluster)
    world.cluster.api.clock += seconds


# --- metadata --------------------------------------------------------------------------------------


def test_all_other_metadata_survives_byte_for_byte(world: World) -> None:
    node = one(world, items=OTHERS)
    before = world.gce.metadata(number_of(node))
    world.server()
    world.take(node)
    after = world.gce.metadata(number_of(node))
    assert after.pop("KubeletToken") == "Success"
    assert after == before


def test_a_write_of_somebody_else_in_between_is_kept(world: World) -> None:
    node = one(world)

    def meanwhile(handler: Any) -> None:
        world.gce.set_metadata(number_of(node), "ssh-keys", "new")
        standin_gce.refusal(412, "conditionNotMet")(handler)

    world.gce.fail(SET, meanwhile)
    assert world.server().code == 0
    assert world.gce.metadata(number_of(node))["ssh-keys"] == "new"
    assert world.cloud.tag(node) == world.token_of(node)
    assert (world.gce.count()[GET], world.gce.count()[SET]) == (2, 2)


def test_metadata_that_never_rests_fails_one_action(world: World) -> None:
    node = one(world)
    world.gce.fail(SET, standin_gce.refusal(412, "conditionNotMet"), times=99)
    result = world.server()
    assert (result.code, "others keep changing its metadata" in result.err) == (4, True)
    world.cloud.recover()
    assert world.server().code == 0
    assert world.cloud.tag(node) == world.token_of(node)


def test_an_answer_that_was_lost_is_no_second_write(world: World) -> None:
    node = one(world)
    world.gce.fail(SET, standin_gce.dropped, after=True)
    assert world.server().code == 0
    assert world.cloud.tag(node) == world.token_of(node)


def test_an_operation_is_waited_for(world: World) -> None:
    node = one(world)
    world.gce.operation(pending=2)
    assert world.server().code == 0
    assert world.gce.count()[WAIT] == 3
    assert world.cloud.tag(node) == world.token_of(node)


def test_an_operation_that_does_not_end_fails_one_action(world: World) -> None:
    node = one(world)
    world.gce.operation(pending=99)
    result = world.server()
    assert (result.code, "not done after" in result.err) == (4, True)
    world.gce.settle()
    assert world.server().code == 0
    assert world.cloud.tag(node) == world.token_of(node)


def test_a_write_of_somebody_else_while_the_operation_runs_is_kept(world: World) -> None:
    node = one(world)
    world.gce.operation(pending=1)

    def meanwhile(handler: Any) -> None:
        world.gce.set_metadata(number_of(node), "ssh-keys", "new")
        standin_gce.unavailable()(handler)

    world.gce.fail(WAIT, meanwhile)
    assert world.server().code == 0
    assert world.gce.metadata(number_of(node))["ssh-keys"] == "new"
    assert world.cloud.tag(node) == world.token_of(node)
    assert world.gce.count()[SET] == 2


def test_the_error_of_an_operation_is_reported(world: World) -> None:
    node = one(world)
    world.gce.operation(error=("QUOTA_EXCEEDED", "Quota 'WRITES' exceeded."))
    result = world.server()
    assert result.code == 4
    assert f"compute.instances.setMetadata {node}: QUOTA_EXCEEDED: Quota 'WRITES' exceeded." in result.err
    assert world.server().code == 0
    assert world.cloud.tag(node) == world.token_of(node)


# --- receipts --------------------------------------------------------------------------------------


def test_the_server_marks_what_the_client_has_a_receipt_for(world: World) -> None:
    node = one(world)
    world.server()
    token = world.token_of(node)
    assert world.client(node).code == 0
    assert world.cloud.tag(node) == token
    left = world.gce.guest_attribute(number_of(node), "keto-tokens", "KubeletToken")
    assert left and token.partition(".")[2] not in left
    result = world.server()
    assert (result.pass_line["marked"], world.cloud.tag(node)) == ("1", "Success")
    assert world.server().pass_line["marked"] == "0"


def test_the_client_runs_again_before_it_is_marked(world: World) -> None:
    node = one(world)
    world.server()
    assert world.client(node).code == 0
    again = world.client(node)
    assert (again.code, "unchanged kubeconfig=" in again.err) == (0, True)


def test_a_receipt_is_for_one_half_of_the_token_alone(faulty: World) -> None:
    """The id stays, the half does not: an old receipt must not take the new token away unread."""
    node = one(faulty)
    faulty.server()
    faulty.take(node)
    clock(faulty, 1500)
    assert faulty.server().pass_line["issued"] == "1"
    renewed = faulty.cloud.tag(node)
    assert renewed == faulty.token_of(node)
    assert faulty.server().pass_line["marked"] == "0"
    assert faulty.cloud.tag(node) == renewed
    faulty.take(node)


def test_without_guest_attributes_the_join_tells(world: World) -> None:
    node = one(world, guest_attributes=False)
    world.server()
    token = world.token_of(node)
    result = world.client(node)
    assert (result.code, "guest attributes are off" in result.err) == (0, True)
    quiet = world.server()
    assert (quiet.code, quiet.pass_line["marked"], "WARNING" in quiet.err) == (0, "0", False)
    world.cluster.join(token, kubelet_name(node))
    assert world.server().pass_line["revoked"] == "1"
    assert world.cloud.tag(node) == "Success"


def test_without_the_right_to_read_receipts_the_join_tells(world: World) -> None:
    node = one(world)
    world.gce.deny(RECEIPT)
    world.server()
    result = world.server()
    assert (result.code, result.err.count("only seen by the join")) == (0, 1)
    assert RECEIPT in result.err
    world.cluster.join(world.token_of(node), kubelet_name(node))
    assert world.server().pass_line["revoked"] == "1"


def test_receipts_are_asked_for_within_bounds(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keto_tokens, "GCE_RECEIPTS", 3)
    nodes = world.cloud.group("compute", 7, Role="compute")
    world.server()
    for node in nodes:
        assert world.client(node).code == 0
    marked: list[int] = []
    while sum(marked) < len(nodes):
        world.cloud.recover()
        marked.append(int(world.server().pass_line["marked"]))
        assert world.gce.count()[RECEIPT] <= 3
    assert marked == [3, 3, 1]


# --- listings --------------------------------------------------------------------------------------


def test_a_rejoin_before_the_token_was_revoked_gets_another_half(faulty: World) -> None:
    """The receipt for the old half is still there: the same half again would be marked unread."""
    node = one(faulty)
    faulty.server()
    faulty.take(node)
    first = faulty.token_of(node)
    faulty.cloud.delete_tag(node)
    assert faulty.server().pass_line["waiting"] == "1"  # in the half's first minute
    clock(faulty, 61)
    assert faulty.server().pass_line["issued"] == "1"
    assert faulty.cloud.tag(node) == faulty.token_of(node) != first
    assert faulty.server().pass_line["marked"] == "0"
    faulty.take(node)


@pytest.mark.parametrize("part", ["unreachables", "warning", "scope"])
def test_a_partial_listing_takes_nobody_for_gone(faulty: World, part: str) -> None:
    stays = one(faulty)
    lost = number_of(faulty.cloud.group("other", 1, Role="compute")[0])
    faulty.server()
    clock(faulty, 100)
    faulty.gce.delete(lost)
    warning = standin_gce.warning("UNREACHABLE", "zone europe-west1-c did not answer")
    if part == "unreachables":
        faulty.gce.unreachables = ["projects/keto-test/zones/europe-west1-c"]
    elif part == "warning":
        faulty.gce.warning = warning
    else:
        faulty.gce.scope_warnings["zones/europe-west1-c"] = warning
    result = faulty.server()
    assert (result.code, result.pass_line["revoked"]) == (0, "0")
    assert "not all instances were listed" in result.err and "europe-west1-c" in result.err
    faulty.gce.unreachables, faulty.gce.warning, faulty.gce.scope_warnings = [], None, {}
    assert faulty.server().pass_line["revoked"] == "1"
    assert faulty.secret_of(stays) is not None


def test_an_instance_that_is_made_anew_under_its_name_is_another_node(faulty: World) -> None:
    old = one(faulty)
    faulty.server()
    faulty.take(old)
    number = faulty.gce.recreate(number_of(old))
    clock(faulty, 61)
    result = faulty.server()
    assert (result.pass_line["issued"], result.pass_line["revoked"]) == ("1", "1")
    assert faulty.secret_of(old) is None
    new = f"{old.rpartition('/')[0]}/{number}"
    assert faulty.cloud.tag(new) == faulty.token_of(new)


@pytest.mark.parametrize(("status", "issued"), [
    ("PROVISIONING", "1"), ("STAGING", "1"), ("RUNNING", "1"), ("STOPPING", "0"), ("TERMINATED", "0"),
    ("SUSPENDED", "0"), ("REPAIRING", "0"),
])
def test_who_gets_a_token(world: World, status: str, issued: str) -> None:
    one(world, status=status)
    assert world.server().pass_line["issued"] == issued


def test_all_groups_are_managed_groups(world: World) -> None:
    """A bastion or a master is in no group: without labels that name it, it gets nothing."""
    node = one(world)
    alone = world.gce.instance("bastion", labels={"role": "bastion"})
    assert world.server("--all-groups", filters=["--cloud", "gce"]).pass_line["issued"] == "1"
    assert world.cloud.tag(node) and "KubeletToken" not in world.gce.metadata(alone)
    assert world.server(filters=world.cloud.filters("role=bastion")).pass_line["issued"] == "1"
    assert "KubeletToken" in world.gce.metadata(alone)


def test_instances_of_all_zones_and_their_pools(world: World) -> None:
    for zone in standin_gce.ZONES:
        world.gce.group(f"in-{zone}", 1, zone, role="compute")
    result = world.server("--dry-run")
    assert {line.split()[2] for line in result.out.splitlines()} == {
        f"in-{zone}" for zone in standin_gce.ZONES
    }


@pytest.mark.parametrize("pair", ["Role=compute", "role=Compute", "role=a b", "1=x", "role=x)"])
def test_a_filter_that_is_no_label_is_refused(world: World, pair: str) -> None:
    result = world.server(filters=["--cloud", "gce", "--filter", pair])
    assert (result.code, world.gce.count()) == (2, {})


def test_status_of_one_node_by_its_name(world: World) -> None:
    node = one(world)
    for name in (node, "compute-1", number_of(node)):
        result = world.program("status", *world.filters, *world.cluster.server_flags(), "--node", name)
        assert (result.code, node in result.out) == (0, True)


def test_status_of_a_node_whose_kubelet_is_ahead_of_its_receipt(faulty: World) -> None:
    node = one(faulty, guest_attributes=False)
    faulty.server()
    faulty.cluster.request_certificate(faulty.token_of(node), kubelet_name(node))
    clock(faulty, 660)
    result = faulty.program("status", *faulty.filters, *faulty.cluster.server_flags())
    assert (result.code, "CSR waits for approval" in result.out) == (1, True)


# --- rights ----------------------------------------------------------------------------------------


def test_the_role_is_what_a_whole_life_uses_and_no_more(faulty: World) -> None:
    node = one(faulty)
    faulty.server()
    faulty.take(node)
    faulty.cluster.join(faulty.token_of(node), kubelet_name(node))
    assert faulty.server().pass_line["revoked"] == "1"
    used = {standin_gce.PERMISSIONS.get(method, method) for method in faulty.gce.count()}
    assert used == set(keto_tokens.GCE_PERMISSIONS) == ROLE


def test_a_node_needs_no_right_and_calls_no_api(world: World) -> None:
    node = one(world, account=standin_gce.NODE_ACCOUNT)
    world.gce.allow(standin_gce.ACT_AS)
    world.server()
    world.cloud.recover()
    assert world.client(node).code == 0
    assert world.gce.count() == {}
    assert not any("service-accounts" in path for _, path in world.gce.asked)


def test_a_node_with_an_account_takes_the_right_to_act_as_it(world: World) -> None:
    one(world, account=standin_gce.NODE_ACCOUNT)
    result = world.server()
    assert result.code == 4
    assert "SERVICE_ACCOUNT_ACCESS_DENIED" in result.err and "iam.serviceAccountUser" in result.err


# --- credentials -----------------------------------------------------------------------------------


@pytest.fixture
def no_token(gce: standin_gce.Gce, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("GOOGLE_OAUTH_ACCESS_TOKEN")
    yield


def master(world: World) -> dict[str, str]:
    """What makes a process run on an instance with the server's account."""
    number = world.gce.instance("master", account=standin_gce.SERVER_ACCOUNT)
    return world.gce.node_environment(number)


def test_the_account_of_the_instance_and_its_project(
    world: World, no_token: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GCE_PROJECT")
    node = one(world)
    assert world.server(environ=master(world)).code == 0
    assert world.cloud.tag(node) == world.token_of(node)
    asked = [path for _, path in world.gce.asked if "token" in path]
    assert len(asked) == 1 and world.gce.count()[LIST] == 1


def test_a_token_is_fetched_again_when_it_is_due(world: World, no_token: None) -> None:
    world.gce.token_seconds = 60  # which leaves nothing to count on
    one(world)
    assert world.server(environ=master(world)).code == 0
    assert len([path for _, path in world.gce.asked if "token" in path]) == sum(world.gce.count().values())


def test_a_token_that_is_refused_is_fetched_again(world: World, no_token: None) -> None:
    node = one(world)
    environ = master(world)

    def expire(handler: Any) -> None:
        world.gce.expire_tokens()
        standin_gce.refusal(401, "authError", "Invalid Credentials")(handler)

    world.gce.fail(SET, expire)
    assert world.server(environ=environ).code == 0
    assert world.cloud.tag(node) == world.token_of(node)


@pytest.mark.parametrize("variable", ["GOOGLE_OAUTH_ACCESS_TOKEN", "CLOUDSDK_AUTH_ACCESS_TOKEN"])
def test_a_ready_token(world: World, no_token: None, variable: str) -> None:
    node = one(world)
    assert world.server(environ={variable: SERVER_TOKEN}).code == 0
    assert world.cloud.tag(node) == world.token_of(node)
    refused = world.server(environ={variable: "ya29.no-such-token"})
    assert (refused.code, "Google does not accept the credential" in refused.err) == (3, True)
    assert "no-such-token" not in refused.err


@pytest.mark.parametrize("impersonate", [False, True], ids=["direct", "impersonated"])
@pytest.mark.parametrize("shape", ["text", "json"])
def test_workload_identity_federation(
    world: World, no_token: None, tmp_path: Path, impersonate: bool, shape: str
) -> None:
    node = one(world)
    path = world.gce.external_account(tmp_path / "federated", impersonate)
    if shape == "json":
        subject = tmp_path / "federated" / "subject-token"
        subject.write_text(json.dumps({"access": {}, "id_token": subject.read_text()}))
        config = json.loads(path.read_text())
        config["credential_source"]["format"] = {"type": "json", "subject_token_field_name": "id_token"}
        path.write_text(json.dumps(config))
    assert world.server(GOOGLE_APPLICATION_CREDENTIALS=str(path)).code == 0
    assert world.cloud.tag(node) == world.token_of(node)


def broken(kind: str, config: dict[str, Any]) -> Any:
    """Credentials that do not work, each in its way."""
    source = config["credential_source"]
    return {
        "a key": {"type": "service_account", "private_key": "-----BEGIN PRIVATE " + "KEY-----"},
        "a user": {"type": "authorized_user", "refresh_token": "1//refresh"},
        "a url": {**config, "credential_source": {"url": "http://169.254.169.254/"}},
        "no JSON": "nonsense",
        "a list": [],
        "no audience": {k: v for k, v in config.items() if k != "audience"},
        "wrong audience": {**config, "audience": "//iam.googleapis.com/elsewhere"},
        "in the clear": {**config, "token_url": "http://sts.example.com/v1/token"},
        "no subject": {**config, "credential_source": {**source, "file": "/nonexistent"}},
    }[kind]


@pytest.mark.parametrize(("kind", "words"), [
    ("a key", "only credentials of type external_account"), ("a user", "external_account"),
    ("a url", "external_account"), ("no JSON", "external_account"), ("a list", "external_account"),
    ("no audience", "external_account"), ("wrong audience", "audience"),
    ("in the clear", "is not encrypted"), ("no subject", "cannot read the token to exchange"),
])
def test_credentials_that_cannot_work_are_told_in_a_line(
    world: World, no_token: None, tmp_path: Path, kind: str, words: str
) -> None:
    path = world.gce.external_account(tmp_path / "federated")
    content = broken(kind, json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    result = world.server(GOOGLE_APPLICATION_CREDENTIALS=str(path))
    assert (result.code, words in result.err.splitlines()[-1]) == (3, True), result.err
    assert world.gce.count()[LIST] == 0


def test_no_credentials_at_all(world: World, no_token: None) -> None:
    node = world.gce.instance("master")  # without an account
    result = world.server(environ=world.gce.node_environment(node))
    assert (result.code, "no Google credentials" in result.err) == (3, True)
    nowhere = world.server()
    assert (nowhere.code, "no Google credentials" in nowhere.err) == (3, True)


def test_no_project(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GCE_PROJECT")
    result = world.server()
    assert (result.code, "no GCE project: pass --project" in result.err) == (3, True)
    assert world.server("--project", standin_gce.PROJECT).code == 0


def test_no_token_is_sent_in_the_clear(world: World) -> None:
    result = world.server(CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE="http://compute.example.com/v1/")
    assert (result.code, "is not encrypted" in result.err) == (3, True)


@pytest.mark.parametrize("answer", [standin_gce.junk, standin_gce.dropped], ids=["junk", "dropped"])
@pytest.mark.parametrize("method", [LIST, GET, SET, WAIT, RECEIPT])
def test_answers_that_make_no_sense(world: World, method: str, answer: Any) -> None:
    node = one(world)
    world.gce.fail(method, answer, times=20)
    result = world.server()
    assert (result.code, "Traceback" in result.err) == (0 if method == RECEIPT else 4, False)
    world.cloud.recover()
    world.gce.settle()
    assert world.server().code == 0
    assert world.cloud.tag(node) == world.token_of(node)


def test_a_vm_without_scopes(world: World) -> None:
    world.gce.fail(LIST, standin_gce.insufficient_scopes())
    result = world.server()
    assert (result.code, "insufficient authentication scopes" in result.err.lower()) == (4, True)


# --- the client ------------------------------------------------------------------------------------


def waiting_client(world: World, node: str, *argv: str) -> tuple[threading.Thread, list[int]]:
    """A client that runs in a thread, and where its exit code goes."""
    codes: list[int] = []
    base = ["client", "--cloud", "gce", "--master", world.cluster.url, "--ca-path",
            str(world.cluster.ca_path), "--kubeconfig", str(world.kubeconfig(node)), *argv]
    os.environ.update(world.node_environment(node))
    thread = threading.Thread(target=lambda: codes.append(keto_tokens.main(base)))
    thread.start()
    return thread, codes


def polls(world: World) -> list[str]:
    return [path for _, path in world.gce.asked if "wait_for_change" in path]


def test_a_client_that_waits_is_told_by_a_long_poll(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GCE_METADATA_HOST", "")
    monkeypatch.setattr(keto_tokens, "GCE_POLL", 600)
    node = one(world)
    thread, codes = waiting_client(world, node, "--interval", "10m", "--timeout", "20m")
    wait_for(lambda: polls(world))
    world.server(GCE_METADATA_HOST="127.0.0.1:1")
    thread.join(30)
    assert (codes, len(polls(world))) == ([0], 1)


def test_a_token_that_was_set_before_the_poll_is_not_missed(world: World) -> None:
    """The poll names what was read, so a change between the two answers it at once."""
    node = one(world)
    sleep: list[float] = []
    metadata = keto_tokens.GoogleMetadata(world.node_environment(node), sleep.append)
    instance = keto_tokens.GceInstance("KubeletToken", metadata, sleep.append)
    assert instance.read_tag() is None
    world.cloud.set_tag(node, "abcdef.0123456789abcdef")
    instance.wait_for_change(600.0)
    assert (instance.read_tag(), sleep) == ("abcdef.0123456789abcdef", [])


@pytest.mark.parametrize("faults", [[503], [503, 503], [429, 500]])
def test_the_metadata_server_is_unavailable_for_a_moment(world: World, faults: list[int]) -> None:
    node = one(world)
    world.server()
    world.gce.metadata_faults += faults
    assert world.client(node, "--cloud", "gce").code == 0


def test_a_poll_that_fails_is_a_sleep(world: World) -> None:
    node = one(world)
    slept: list[float] = []
    metadata = keto_tokens.GoogleMetadata(world.node_environment(node), slept.append)
    instance = keto_tokens.GceInstance("KubeletToken", metadata, slept.append)
    world.gce.metadata_faults.append(503)
    instance.wait_for_change(5.0)
    assert slept == [5.0]


def test_whoever_answers_is_google_or_nobody(world: World, imds: Imds) -> None:
    """A captive portal, or another cloud's metadata, is not taken for an instance of GCE."""
    node = one(world)
    host = imds.url("i-0123456789abcdef0").removeprefix("http://").partition("/")[0]
    result = world.client(node, "--cloud", "gce", "--timeout", "100ms", GCE_METADATA_HOST=host)
    assert (result.code, "not Google's metadata server" in result.err) == (5, True)


# --- auto ------------------------------------------------------------------------------------------


def auto(world: World, node: str, *argv: str, **environ: str) -> Result:
    return world.client(node, "--cloud", "auto", *argv, **environ)


def test_auto_is_gce_where_its_metadata_answers(world: World) -> None:
    node = one(world)
    world.server()
    assert auto(world, node).code == 0


def test_auto_is_aws_where_that_answers(world: World, imds: Imds) -> None:
    node = one(world)
    environ = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": imds.url("i-0123456789abcdef0"),
               "AWS_EC2_METADATA_DISABLED": "false"}
    imds.tags = lambda _: {"KubeletToken": "Success"}
    result = auto(world, node, **environ)
    assert (result.code, "i-0123456789abcdef0" in result.err) == (0, True)


def test_auto_waits_where_nothing_answers_yet(world: World) -> None:
    node = one(world)
    result = auto(world, node, "--timeout", "100ms", GCE_METADATA_HOST="127.0.0.1:1")
    assert result.code == 5
    assert "no cloud's metadata answers: aws: " in result.err and "; gce: " in result.err


def test_a_server_can_be_told_to_find_out(world: World) -> None:
    node = one(world)
    filters = ["--cloud", "auto", "--filter", "role=compute"]
    here = {**master(world), "AWS_EC2_METADATA_DISABLED": "true"}
    assert world.server(filters=filters, environ=here).code == 0
    assert world.cloud.tag(node) == world.token_of(node)
    nowhere = world.server(filters=filters)
    assert (nowhere.code, "pass --cloud aws or gce" in nowhere.err) == (3, True)


def test_flags_that_gce_cannot_take(world: World) -> None:
    node = one(world)
    wrong = [["--tag-name", "a/b"], ["--read-from", "api"]]
    for argv in wrong:
        assert world.client(node, "--cloud", "gce", *argv).code == 2
    assert world.gce.asked == []
    for argv in wrong:
        assert auto(world, node, *argv).code == 2  # found out at the first look
