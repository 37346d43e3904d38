"""What goes wrong around the program: none of it stops the loop, loses a token or prints one."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import keto_tokens
from clusters import StandinCluster, kubeconfig_of, wait_for
from conftest import BUILT, FILTER, World
from pki import Authority
from standin_aws import refusal
from standin_kubernetes import cut_json, hang_up, html, status, truncated

SECRETS = "/secrets"
BAD_ANSWERS: dict[str, Callable[[Any], None]] = {
    "500": status(500),
    "503": status(503),
    "429": status(429, Retry_After="0"),
    "429 without a body": status(429, " "),
    "truncated": truncated,
    "JSON cut off": cut_json,
    "HTML": html(),
    "HTML 502": html(502),
    "a list": status(200, "[]"),
    "null": status(200, "null"),
    "nothing": hang_up,
}


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries at once: what is tested is that they come, not when."""
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
@pytest.mark.parametrize("call", ["GET", "POST"])
def test_the_cluster_answers_badly_once(faulty: World, call: str, answer: Callable[[Any], None]) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    standin(faulty).fail(call, SECRETS, answer)
    result = faulty.server()
    assert result.code == 0, result.err
    assert faulty.aws.tag(node) == faulty.token_of(node)


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
@pytest.mark.parametrize("call", ["GET", "POST"])
def test_the_cluster_goes_on_answering_badly(
    faulty: World, call: str, answer: Callable[[Any], None]
) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    standin(faulty).fail(call, SECRETS, answer, times=keto_tokens.ATTEMPTS)
    result = faulty.server()
    assert result.code == 4
    assert result.err.splitlines()[-1].startswith("keto-tokens: ")
    assert "Traceback" not in result.err
    assert faulty.server().code == 0
    assert faulty.aws.tag(node) == faulty.token_of(node)


@pytest.mark.parametrize("call", ["POST", "PUT"])
def test_an_answer_that_was_lost_is_no_second_token(faulty: World, call: str) -> None:
    """The Secret is stored, the answer never comes: the retry finds what the first try made."""
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    if call == "PUT":
        faulty.server()
        standin(faulty).clock += 1500
    standin(faulty).fail(call, SECRETS, hang_up, after=True)
    assert faulty.server().code == 0
    assert faulty.aws.tag(node) == faulty.token_of(node)


def test_a_cluster_that_says_nothing(faulty: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    monkeypatch.setattr(keto_tokens, "TIMEOUTS", (1.0, 0.2))
    released: list[Any] = []

    def silent(handler: Any) -> None:
        wait_for(lambda: released)
        handler.close_connection = True

    standin(faulty).fail("GET", SECRETS, silent, times=3)
    result = faulty.server()
    released.append(True)
    assert (result.code, "no answer in time" in result.err) == (4, True)


def test_an_answer_that_trickles(faulty: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keto_tokens, "TIMEOUTS", (1.0, 0.3))

    def trickle(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        handler.close_connection = True
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                handler.wfile.write(b" ")
            except OSError:
                return

    standin(faulty).fail("GET", SECRETS, trickle, times=3)
    result = faulty.server()
    assert (result.code, "the answer took longer than" in result.err) == (4, True)


def test_an_answer_without_end(faulty: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keto_tokens, "LIST_LIMIT", 1 << 20)
    standin(faulty).fail("GET", SECRETS, status(200, "x" * (2 << 20)))
    result = faulty.server()
    assert (result.code, "larger than" in result.err) == (4, True)


def test_a_redirect_is_not_followed(faulty: World) -> None:
    elsewhere = status(302, Location="https://attacker.example/")
    standin(faulty).fail("GET", SECRETS, elsewhere)
    result = faulty.server()
    assert result.code == 4
    assert ": 302: " in result.err


AWS_ERRORS = {
    "503": refusal("Unavailable", 503),
    "throttled": refusal("RequestLimitExceeded", 503),
    "HTML": html(),
    "HTML 502": html(502),
    "empty": status(200, " ", "text/xml"),
    "cut off": status(200, "<DescribeTagsResponse><tagSet><item>", "text/xml"),
    "nothing": hang_up,
}


@pytest.mark.parametrize("operation", ["DescribeAutoScalingGroups", "DescribeTags", "CreateTags"])
@pytest.mark.parametrize("answer", AWS_ERRORS.values(), ids=AWS_ERRORS)
def test_aws_answers_badly(
    faulty: World, operation: str, answer: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether botocore's retries cover it or the pass fails, the next one finishes the job."""
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    nodes = faulty.aws.group("compute", 2, Role="compute")
    faulty.aws.fail(operation, answer, times=5)
    result = faulty.server()
    assert result.code in (0, 4)
    assert "Traceback" not in result.err
    faulty.aws.faults.clear()
    assert faulty.server().code == 0
    for node in nodes:
        assert faulty.aws.tag(node) == faulty.token_of(node)


def test_a_page_of_another_kind_is_not_an_empty_listing(faulty: World) -> None:
    """Well-formed XML without groups would mean that every node is gone."""
    faulty.aws.fail("DescribeAutoScalingGroups", html(), times=5)
    result = faulty.server()
    assert result.code == 4
    assert "autoscaling:DescribeAutoScalingGroups: the answer makes no sense" in result.err


def test_throttled_tagging_is_retried_by_botocore(
    faulty: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.aws.fail("CreateTags", refusal("RequestLimitExceeded", 503), times=3)
    assert faulty.server().code == 0
    assert faulty.aws.count()["CreateTags"] == 4
    assert faulty.aws.tag(node) == faulty.token_of(node)


def test_one_instance_that_vanished_touches_no_other(faulty: World) -> None:
    nodes = faulty.aws.group("compute", 3, Role="compute")
    faulty.aws.fail("CreateTags", refusal("InvalidInstanceID.NotFound", 400))
    result = faulty.server()
    assert result.code == 4
    assert (result.pass_line["issued"], result.pass_line["failed"]) == ("2", "1")
    assert "InvalidInstanceID.NotFound" in result.err
    again = faulty.server()
    assert (again.pass_line["published"], again.pass_line["failed"]) == ("1", "0")
    assert {faulty.aws.tag(node) for node in nodes} == {faulty.token_of(node) for node in nodes}


@pytest.mark.parametrize(("operation", "permission"), [
    ("DescribeAutoScalingGroups", "autoscaling:DescribeAutoScalingGroups"),
    ("DescribeTags", "ec2:DescribeTags"),
    ("CreateTags", "ec2:CreateTags"),
])
@pytest.mark.parametrize("code", ["UnauthorizedOperation", "AccessDenied"])
def test_a_missing_aws_permission_is_named(
    faulty: World, operation: str, permission: str, code: str
) -> None:
    faulty.aws.group("compute", 1, Role="compute")
    faulty.aws.fail(operation, refusal(code, 403))
    result = faulty.server()
    assert result.code == 4
    assert f"the IAM policy must allow {permission}" in result.err
    assert faulty.server().code == 0


@pytest.mark.parametrize(("verb", "missing"), [("list", "list"), ("create", "create")])
def test_a_missing_right_in_the_cluster_is_named(faulty: World, verb: str, missing: str) -> None:
    faulty.aws.group("compute", 1, Role="compute")
    rules = [("list", "", "secrets", "kube-system"), ("create", "", "secrets", "kube-system")]
    token = standin(faulty).account([rule for rule in rules if rule[0] != verb])
    result = faulty.program(
        "server", "--once", *FILTER, "--master", faulty.cluster.url, "--ca-path",
        str(faulty.cluster.ca_path), KUBE_SERVICE_TOKEN=token,
    )
    assert result.code == 4
    assert f'cannot {missing} resource "secrets" in API group "" in the namespace "kube-system"' in result.err
    assert token not in result.err


# --- starts that cannot work ---------------------------------------------------------------------


def test_no_aws_credentials(faulty: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", "/nonexistent")
    result = faulty.server()
    assert result.code == 3
    assert "no AWS credentials" in result.err.splitlines()[-1]


def test_no_aws_region(faulty: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("HOME", "/nonexistent")
    result = faulty.server()
    assert result.code == 3
    assert result.err.startswith("keto-tokens: no AWS region: pass --region or set AWS_REGION")
    assert faulty.server(AWS_REGION="eu-west-2").code == 0
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    environ = faulty.node_environment(node)
    assert faulty.server(environ=environ).code == 0


def test_an_aws_profile_that_is_not_there(faulty: World) -> None:
    result = faulty.server(filters=None, AWS_PROFILE="nope")
    assert (result.code, "AWS configuration" in result.err) == (3, True)


def test_aws_refuses_the_credentials(faulty: World) -> None:
    faulty.aws.fail("", refusal("AuthFailure", 401), times=99)
    assert faulty.server().code == 3


def test_nobody_where_the_cluster_should_be(faulty: World) -> None:
    flags = ["--master", "https://127.0.0.1:9", "--kube-token", "x"]
    result = faulty.program("server", *FILTER, *flags)
    assert result.code == 3
    assert "cannot connect: " in result.err and "Connection refused" in result.err
    assert "127.0.0.1:9" in result.err
    assert faulty.aws.count() == {}


def test_a_cluster_with_another_ca(faulty: World, tmp_path: Path) -> None:
    other = tmp_path / "other.crt"
    other.write_text(Authority().pem)
    flags = ["--master", faulty.cluster.url, "--ca-path", str(other), "--kube-token", "x"]
    result = faulty.program("server", *FILTER, *flags)
    assert result.code == 3
    assert "certificate is not trusted" in result.err
    assert standin(faulty).asked == []


def test_a_cluster_that_does_not_know_us(faulty: World) -> None:
    result = faulty.program(
        "server", *FILTER, "--master", faulty.cluster.url, "--ca-path",
        str(faulty.cluster.ca_path), "--kube-token", "wrong-token",
    )
    assert result.code == 3
    assert "401: the cluster does not know the credential of --master and --kube-token" in result.err
    assert "wrong-token" not in result.err


# --- clocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [600, -600, 86400 * 400], ids=["ahead", "behind", "far ahead"])
def test_the_cluster_decides_what_time_it_is(faulty: World, skew: int) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    standin(faulty).clock = skew
    result = faulty.server("--token-ttl", "5m")
    assert result.code == 0
    assert result.err.count("this machine's clock is ") == 1
    assert "behind the cluster's" in result.err if skew > 0 else "ahead of" in result.err
    body = faulty.secret_of(node)
    assert body is not None
    expires = keto_tokens.parse_time(keto_tokens._decode(body["data"]["expiration"]))
    assert 290 <= expires - standin(faulty).now() <= 301
    assert faulty.client(node).code == 0


def test_a_token_nobody_took_is_extended_in_time(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server("--token-ttl", "30m")
    token = faulty.token_of(node)
    standin(faulty).clock += 19 * 60
    assert faulty.server().pass_line["extended"] == "0"
    standin(faulty).clock += 2 * 60
    assert faulty.server().pass_line["extended"] == "1"
    standin(faulty).clock += 20 * 60
    assert (faulty.token_of(node), faulty.aws.tag(node)) == (token, token)


@pytest.mark.parametrize("cleaner", [True, False], ids=["cleaned", "left behind"])
def test_an_expired_token_is_issued_again(faulty: World, cleaner: bool) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    old = faulty.token_of(node)
    standin(faulty).cleaner = cleaner
    standin(faulty).clock += 31 * 60
    assert faulty.server().pass_line["issued"] == "1"
    assert faulty.token_of(node) == faulty.aws.tag(node) != old
    assert faulty.token_of(node)[:6] == old[:6]
    assert faulty.cluster.whoami(old) is None


# --- the client ------------------------------------------------------------------------------------


def test_a_mark_that_fails_is_tried_again(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    faulty.aws.fail("CreateTags", refusal("UnauthorizedOperation", 403), times=2)
    assert faulty.client(node).code == 0
    assert faulty.aws.tag(node) == "Success"


def test_a_mark_that_goes_on_failing_is_finished_by_a_second_run(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    token = faulty.aws.tag(node)
    faulty.aws.fail("CreateTags", refusal("UnauthorizedOperation", 403), times=99)
    result = faulty.client(node)
    assert result.code == 6
    assert "the IAM policy must allow ec2:CreateTags" in result.err
    path = faulty.kubeconfig(node)
    before = path.read_text(), path.stat().st_mtime_ns
    assert kubeconfig_of(path)["token"] == token
    faulty.aws.faults.clear()
    assert faulty.client(node).code == 0
    assert (path.read_text(), path.stat().st_mtime_ns) == before
    assert faulty.aws.tag(node) == "Success"


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_the_client_waits_for_a_cluster_that_answers_badly(
    faulty: World, answer: Callable[[Any], None]
) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    standin(faulty).fail("POST", "selfsubjectreviews", answer, times=5)
    assert faulty.client(node).code == 0
    assert faulty.aws.tag(node) == "Success"


@pytest.mark.parametrize("answer", AWS_ERRORS.values(), ids=AWS_ERRORS)
def test_the_client_waits_for_an_aws_that_answers_badly(
    faulty: World, answer: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    faulty.aws.fail("DescribeTags", answer, times=6)
    assert faulty.client(node).code == 0


def test_the_client_waits_for_the_metadata_service(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    faulty.imds.faults += [503, 500, 503, 429, 503, 401]
    assert faulty.client(node).code == 0


def test_a_session_that_ended_is_begun_again(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    service = keto_tokens.Imds(faulty.node_environment(node))
    assert service.get("meta-data/instance-id") == node
    faulty.imds.sessions.clear()
    assert service.get("meta-data/instance-id") == node


def test_an_older_api_server_cannot_say_who_we_are(faulty: World) -> None:
    first, second = faulty.aws.group("compute", 2, Role="compute")
    faulty.server()
    standin(faulty).reviews = False
    assert faulty.client(first).code == 0
    faulty.aws.set_tag(second, "abcdef.0123456789abcdef")
    assert faulty.client(second, "--timeout", "200ms").code == 5


def test_a_cluster_that_takes_the_token_for_somebody_else(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    token = faulty.token_of(node)
    other = '{"kind": "SelfSubjectReview", "status": {"userInfo": {"username": "system:anonymous"}}}'
    standin(faulty).fail("POST", "selfsubjectreviews", status(201, other), times=999)
    result = faulty.client(node, "--timeout", "300ms")
    assert (result.code, faulty.aws.tag(node)) == (5, token)
    assert "for 'system:anonymous'" in result.err
    assert not faulty.kubeconfig(node).exists()


def test_the_client_refuses_a_cluster_with_another_ca(faulty: World, tmp_path: Path) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    other = tmp_path / "other.crt"
    other.write_text(Authority().pem)
    result = faulty.client(node, "--ca-path", str(other))
    assert result.code == 3
    assert "certificate is not trusted" in result.err
    assert faulty.aws.tag(node) == faulty.token_of(node)
    assert not faulty.kubeconfig(node).exists()


def test_an_insecure_client_says_so_and_writes_so(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    path = faulty.kubeconfig(node)
    result = faulty.program(
        "client", "--master", faulty.cluster.url, "--insecure-skip-tls-verify", "--kubeconfig",
        str(path), **faulty.node_environment(node),
    )
    assert result.code == 0
    assert "WARNING" in result.err and "NOT verified" in result.err
    assert "insecure-skip-tls-verify: true" in path.read_text()


def test_an_existing_kubeconfig_is_replaced_whole(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    path = faulty.kubeconfig(node)
    path.parent.mkdir(parents=True)
    path.write_text("something older and longer\n" * 1000)
    path.chmod(0o644)
    with open(path) as reader:
        assert faulty.client(node).code == 0
        assert reader.read().startswith("something older")  # whoever has it open keeps it whole
    assert kubeconfig_of(path)["token"] == faulty.token_of(node)
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_a_killed_client_left_behind_is_cleared(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    path = faulty.kubeconfig(node)
    path.parent.mkdir(parents=True)
    leftover = path.parent / f".{path.name}.keto-tokens-abc123"
    leftover.write_text("half a kubeconfig")
    assert faulty.client(node).code == 0
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_kubeconfig_that_cannot_be_written(faulty: World, tmp_path: Path) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    result = faulty.client(node, "--kubeconfig", str(blocked / "kubeconfig"))
    assert result.code == 3
    assert f"{blocked}/kubeconfig cannot be written: {blocked} is no folder" in result.err
    assert faulty.aws.tag(node) == faulty.token_of(node)


# --- processes and signals -------------------------------------------------------------------------


@contextmanager
def process(faulty: World, *argv: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """The built file, running."""
    started = subprocess.Popen(
        [sys.executable, str(BUILT), *argv], stderr=subprocess.PIPE, text=True,
        env={**faulty.aws.environment(), "HOME": os.environ["HOME"], **environ},
    )
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        assert started.stderr is not None
        started.stderr.close()
        started.wait()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_server_runs_on_through_failures_until_told_to_stop(faulty: World, signum: int) -> None:
    standin(faulty).fail("GET", SECRETS, status(503), times=2 * keto_tokens.ATTEMPTS)
    faulty.aws.fail("DescribeAutoScalingGroups", refusal("UnauthorizedOperation", 403), times=2)
    flags = ["server", *FILTER, *faulty.cluster.server_flags(), "--interval", "50ms"]
    with process(faulty, *flags) as server:
        (early,) = faulty.aws.group("compute", 1, Role="compute")
        wait_for(lambda: faulty.aws.tag(early))
        (late,) = faulty.aws.group("later", 1, Role="compute")
        wait_for(lambda: faulty.aws.tag(late))
        server.send_signal(signum)
        _, err = server.communicate(timeout=30)
    assert server.returncode == 0
    assert "ERROR pass failed" in err
    assert err.splitlines()[-1].endswith("INFO stopped")
    assert faulty.token_of(early) not in err


def test_a_stop_finishes_the_action_under_way(faulty: World) -> None:
    """Told to stop after the Secret is made, the server still tags the node."""
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    arrived: list[bool] = []
    released: list[bool] = []

    def slowly(handler: Any) -> None:
        arrived.append(True)
        wait_for(lambda: released)
        status(500)(handler)

    standin(faulty).fail("POST", SECRETS, slowly, after=True)
    flags = ["server", *FILTER, *faulty.cluster.server_flags(), "--interval", "1h"]
    with process(faulty, *flags) as server:
        wait_for(lambda: arrived)
        server.send_signal(signal.SIGTERM)
        released.append(True)
        server.communicate(timeout=30)
    assert server.returncode == 0
    assert faulty.aws.tag(node) == faulty.token_of(node)


def test_a_client_that_is_stopped_says_so(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    flags = ["client", "--master", faulty.cluster.url, "--ca-path", str(faulty.cluster.ca_path),
             "--kubeconfig", str(faulty.kubeconfig(node)), "--interval", "1h"]
    with process(faulty, *flags, **faulty.node_environment(node)) as client:
        wait_for(lambda: faulty.aws.count()["DescribeTags"])
        client.send_signal(signal.SIGTERM)
        _, err = client.communicate(timeout=30)
    assert client.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in err.splitlines()[-1]


def standin(world: World) -> Any:
    """The stand-in behind a world whose cluster can be made to fail."""
    assert isinstance(world.cluster, StandinCluster)
    return world.cluster.api
