"""What systemd, Prometheus and probes are told: the notify socket, the metrics, the three URLs."""
from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import urllib3
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import keto_tokens
from clusters import SECRETS, StandinCluster, wait_for
from conftest import FILTER, REPOSITORY, World
from keto_tokens import Monitor, Notify
from standin_aws import refusal
from standin_kubernetes import Kubernetes, hang_up, status
from test_several_servers import new_server

LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"


def api_of(world: World) -> Kubernetes:
    assert isinstance(world.cluster, StandinCluster)
    return world.cluster.api


@contextmanager
def running(world: World, *argv: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """A server that stays, of the sources."""
    flags = ["server", *FILTER, *world.cluster.server_flags(), "--interval", "50ms", *argv]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "keto_tokens.py"), *flags], stderr=subprocess.PIPE, text=True,
        env={**world.aws.environment(), **environ},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


# --- systemd ---------------------------------------------------------------------------------------


class Socket:
    """What systemd has at the other end of NOTIFY_SOCKET."""

    def __init__(self, address: str):
        self.address, self.got = address, list[str]()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.settimeout(20.0)

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def until(self, wanted: str) -> list[str]:
        """The messages up to the one that begins so."""
        seen: list[str] = []
        while not seen or not seen[-1].startswith(wanted):
            seen.append(self._socket.recv(4096).decode())
        self.got += seen
        return seen


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_a_server_under_systemd(faulty: World, tmp_path: Path, abstract: bool) -> None:
    faulty.aws.group("compute", 2, Role="compute")
    address = f"@keto-tokens-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with Socket(address) as manager, running(faulty, NOTIFY_SOCKET=address) as server:
        *beats, line = manager.until("STATUS=")
        assert set(beats) == {"WATCHDOG=1\nEXTEND_TIMEOUT_USEC=300000000"}
        assert re.fullmatch(r"STATUS=pass nodes=2 .*issued=2 .*seconds=\S+", line)
        manager.until("READY=1")
        *beats, line = manager.until("STATUS=")
        assert set(beats) == {"WATCHDOG=1"} and "waiting=2" in line
        server.send_signal(signal.SIGTERM)
        assert manager.until("STOPPING=1")
        assert server.wait(30) == 0
    for token in faulty.secrets():
        assert token not in "".join(manager.got)


def test_a_pass_that_failed_is_told(faulty: World, tmp_path: Path) -> None:
    api_of(faulty).fail("GET", SECRETS, status(503), times=keto_tokens.ATTEMPTS)
    with Socket(str(tmp_path / "notify")) as manager, running(faulty, NOTIFY_SOCKET=manager.address):
        failed = manager.until("STATUS=")[-1]
        assert failed.startswith("STATUS=pass failed: GET") and failed.count("\n") == 0
        manager.until("READY=1")
        assert manager.until("STATUS=")[-1].startswith("STATUS=pass nodes=0")


def test_a_server_that_cannot_work_is_never_ready(faulty: World, tmp_path: Path) -> None:
    api_of(faulty).fail("GET", SECRETS, status(401))
    with Socket(str(tmp_path / "notify")) as manager:
        with running(faulty, NOTIFY_SOCKET=manager.address) as server:
            assert server.wait(30) == 3
        assert "READY=1" not in manager.until("STOPPING=1")


def test_the_waiting_between_passes_is_watched_over(faulty: World, tmp_path: Path) -> None:
    with Socket(str(tmp_path / "notify")) as manager:
        environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "20000"}
        with running(faulty, "--interval", "1h", **environ):
            manager.until("READY=1")
            for _ in range(5):
                assert manager.until("WATCHDOG=1") == ["WATCHDOG=1"]


def test_a_standby_is_ready_and_watched_over(faulty: World, tmp_path: Path) -> None:
    with running(faulty, "--leader-elect"):
        wait_for(lambda: [key for key in api_of(faulty).objects if key[0] == "leases"])
        with Socket(str(tmp_path / "notify")) as manager:
            with running(faulty, "--leader-elect", NOTIFY_SOCKET=manager.address):
                assert manager.until("STATUS=")[-1] == "STATUS=standing by"
                manager.until("READY=1")
                for _ in range(3):
                    manager.until("WATCHDOG=1")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """What is sent to systemd, and by which thread."""
    messages: list[tuple[int, tuple[str, ...]]] = []
    monkeypatch.setattr(Notify, "send", lambda self, *lines: messages.append(
        (threading.get_ident(), lines)))
    return messages


def test_a_pass_that_hangs_gives_no_sign_of_life(
    faulty: World, monkeypatch: pytest.MonkeyPatch, sent: list[Any]
) -> None:
    """Not even from the thread that renews the Lease, which goes on."""
    monkeypatch.setattr(keto_tokens, "RENEW_EVERY", 0.01)
    entered, released, stop = threading.Event(), threading.Event(), threading.Event()

    def hang(pools: Any, filters: Any) -> keto_tokens.Listing:
        entered.set()
        released.wait(20)
        stop.set()
        return keto_tokens.Listing(())

    monkeypatch.setattr(keto_tokens.AwsPools, "list_nodes", hang)
    server, api = new_server(faulty), api_of(faulty)
    server._stop = stop
    with keto_tokens.Leader(faulty.cluster.admin, "kube-system", "x") as leader:
        server._may_work = leader.leads
        loop = threading.Thread(target=server.run, args=(0.01,))
        loop.start()
        assert entered.wait(20)
        before, renewed = list(sent), len(api.asked)
        wait_for(lambda: len(api.asked) > renewed + 10)
        assert sent == before
        released.set()
        loop.join(20)
    assert {thread for thread, _ in sent} == {loop.ident}
    assert len(sent) > len(before)


def test_each_action_is_a_sign_of_life(faulty: World, sent: list[Any]) -> None:
    faulty.aws.group("compute", 20, Role="compute")
    new_server(faulty).run_pass()
    assert len(sent) >= 20
    assert {thread for thread, _ in sent} == {threading.get_ident()}


def test_a_socket_that_nobody_reads_is_no_failure(tmp_path: Path) -> None:
    Notify({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).send("READY=1")


@pytest.mark.parametrize(("environ", "seconds"), [
    ({}, 300.0), ({"WATCHDOG_USEC": "30000000"}, 30.0), ({"WATCHDOG_USEC": "0"}, 300.0),
    ({"WATCHDOG_USEC": "nonsense"}, 300.0), ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 300.0),
    ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
], ids=str)
def test_the_watchdog_of_another_process_is_not_ours(environ: dict[str, str], seconds: float) -> None:
    assert Notify(environ).watchdog == seconds
    assert Monitor(Notify(environ)).period == seconds / 2


# --- metrics ---------------------------------------------------------------------------------------


def parsed(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


def value(text: str, name: str, **labels: str) -> float:
    """The value of the one sample of this name with these labels."""
    found = [sample.value for family in parsed(text) for sample in family.samples
             if sample.name == f"keto_tokens_{name}" and labels.items() <= sample.labels.items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


@pytest.fixture
def measured(faulty: World, tmp_path: Path) -> Callable[..., str]:
    """Makes a pass; what it wrote for Prometheus."""
    path = tmp_path / "textfile" / "keto-tokens.prom"

    def run(*argv: str, code: int = 0) -> str:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        assert faulty.server("--metrics-file", str(path), *argv).code == code
        text = path.read_text()
        faulty.program.said.append(text)  # in which no secret may be
        assert path.stat().st_mode & 0o777 == 0o644
        assert [each.name for each in path.parent.iterdir()] == [path.name]
        return text

    return run


def test_the_metrics_of_a_nodes_life(faulty: World, measured: Callable[..., str]) -> None:
    node, other = faulty.aws.group("compute", 2, Role="compute")
    text = measured()
    assert value(text, "nodes", pool="compute", state="new") == 2
    assert value(text, "nodes", pool="compute", state="stuck") == 0
    assert value(text, "actions_total", kind="issue", result="done") == 2
    assert value(text, "actions_total", kind="revoke", result="done") == 0
    assert value(text, "passes_total", result="good") == 1
    assert value(text, "passes_total", result="failed") == 0
    assert value(text, "pass_duration_seconds_count") == 1
    assert value(text, "oldest_waiting_expiration_timestamp_seconds") == 0
    assert value(text, "last_success_timestamp_seconds") > 1e9
    assert value(text, "build_info", version=keto_tokens.__version__) == 1
    assert value(text, "api_calls_total", service="kubernetes", operation="POST secrets", code="201") == 2
    assert value(text, "api_calls_total", service="aws", operation="CreateTags", code="200") == 2

    text = measured()
    secret = faulty.secret_of(node)
    assert secret is not None
    expires = keto_tokens.parse_time(keto_tokens._decode(secret["data"]["expiration"]))
    assert value(text, "nodes", state="waiting") == 2
    assert abs(value(text, "oldest_waiting_expiration_timestamp_seconds") - expires) <= 2

    api_of(faulty).clock += 100
    faulty.cluster.join(faulty.token_of(node), "joined")  # its tag is still to be marked
    assert faulty.client(other).code == 0
    faulty.cluster.join(faulty.token_of(other), "joined-too")
    text = measured()
    assert value(text, "nodes", state="joined") == 2
    assert value(text, "actions_total", kind="finish", result="done") == 1
    assert value(text, "actions_total", kind="revoke", result="done") == 1
    assert value(text, "join_duration_seconds_count") == 2
    assert 200 <= value(text, "join_duration_seconds_sum") < 260
    assert value(text, "join_duration_seconds_bucket", le="60.0") == 0


def test_a_node_that_is_gone_has_not_joined(faulty: World, measured: Callable[..., str]) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    faulty.aws.terminate(node)
    api_of(faulty).clock += 70
    text = measured()
    assert value(text, "actions_total", kind="revoke", result="done") == 1
    assert value(text, "nodes", state="gone") == 1
    assert value(text, "join_duration_seconds_count") == 0


def test_the_metrics_of_passes_that_fail(faulty: World, measured: Callable[..., str]) -> None:
    faulty.aws.group("compute", 1, Role="compute")
    faulty.aws.fail("CreateTags", refusal("UnauthorizedOperation", 403), times=9)
    text = measured(code=4)
    assert value(text, "actions_total", kind="issue", result="failed") == 1
    assert value(text, "passes_total", result="failed") == 1
    assert value(text, "last_success_timestamp_seconds") == 0
    refused = {"service": "aws", "operation": "CreateTags", "code": "UnauthorizedOperation"}
    assert value(text, "api_calls_total", **refused) == 1

    faulty.aws.fail("DescribeAutoScalingGroups", refusal("AccessDenied", 403))
    text = measured(code=4)
    assert value(text, "passes_total", result="failed") == 1
    assert value(text, "pass_duration_seconds_count") == 1


def test_each_attempt_of_a_call_counts(
    faulty: World, measured: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    faulty.aws.fail("DescribeAutoScalingGroups", refusal("RequestLimitExceeded", 503), times=2)
    api_of(faulty).fail("GET", SECRETS, hang_up)
    api_of(faulty).fail("GET", SECRETS, status(429))
    text = measured()
    listed = {"service": "aws", "operation": "DescribeAutoScalingGroups"}
    assert value(text, "api_calls_total", code="RequestLimitExceeded", **listed) == 2
    assert value(text, "api_calls_total", code="200", **listed) == 1
    for code in ("none", "429", "200"):
        assert value(text, "api_calls_total", operation="GET secrets", code=code) == 1


@pytest.mark.parametrize(("path", "resource"), [
    ("/version", "version"), ("/api/v1/nodes/secrets", "nodes"), ("/api/v1/nodes?limit=1", "nodes"),
    ("/api/v1/namespaces/kube-system/secrets/bootstrap-token-abcdef", "secrets"),
    (f"{LEASES}/x", "leases"), ("/apis/certificates.k8s.io/v1/certificatesigningrequests?a=/b/c",
                                "certificatesigningrequests"),
])
def test_operations_are_few(path: str, resource: str) -> None:
    assert keto_tokens.resource_of(path) == resource


def test_the_metrics_are_as_prometheus_wants_them(faulty: World, measured: Callable[..., str]) -> None:
    """The rules of `promtool check metrics`, and of Prometheus' page on naming."""
    faulty.aws.group("compute", 1, Role="compute")
    families = parsed(measured())
    assert len({family.name for family in families}) == len(families) == 9
    for family in families:
        name, kind = family.name, family.type
        assert re.fullmatch(r"keto_tokens(_[a-z]+)+", name)
        assert family.documentation.endswith(".") and len(family.documentation) > 10
        assert not re.search(r"_(count|sum|bucket|created|gauge|counter|total)$", name)
        assert not re.search(r"(milli|micro|minutes|hours|days|percent|kilo|mega|bytes_)", name)
        if "_duration" in name or "_timestamp" in name:
            assert name.endswith(("_duration_seconds", "_timestamp_seconds"))
        for sample in family.samples:
            assert sample.name.endswith("_total") == (kind == "counter"), sample
            assert not sample.name.endswith("_created")
            assert all(re.fullmatch(r"[a-z]+", label) for label in sample.labels)
            assert "le" not in sample.labels or kind == "histogram"


def test_metrics_that_cannot_be_written_are_told_before_anything_is_done(
    faulty: World, tmp_path: Path
) -> None:
    faulty.aws.group("compute", 1, Role="compute")
    (tmp_path / "file").write_text("no folder")
    result = faulty.server("--metrics-file", str(tmp_path / "file" / "x.prom"))
    assert (result.code, len(result.err.splitlines())) == (3, 1)
    assert str(tmp_path / "file" / "x.prom") in result.err
    assert faulty.server("--metrics-file", str(tmp_path)).code == 2
    assert faulty.server("--metrics-file", str(tmp_path / "typo" / "x.prom")).code == 3
    assert not (tmp_path / "typo").exists()
    assert (faulty.aws.count(), faulty.cluster.token_secrets()) == ({}, [])


def test_metrics_decide_nothing(
    faulty: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full after the start is worth a line, and no more."""
    (node,) = faulty.aws.group("compute", 1, Role="compute")

    def full(*_: Any, **__: Any) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keto_tokens, "write_whole", full)
    result = faulty.server("--metrics-file", str(tmp_path / "x.prom"))
    assert result.code == 0
    assert "ERROR metrics not written" in result.err and "No space left" in result.err
    assert faulty.aws.tag(node) == faulty.token_of(node)


def test_nobody_pays_for_metrics_that_are_not_wanted(faulty: World) -> None:
    argv = ["server", "--once", *FILTER, *faulty.cluster.server_flags()]
    code = (f"import sys, keto_tokens; assert keto_tokens.main({argv!r}) == 0\n"
            "assert not {'prometheus_client', 'http.server'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=faulty.aws.environment(), check=True,
                   capture_output=True)


# --- over HTTP -------------------------------------------------------------------------------------


def port_of(server: subprocess.Popen[str]) -> int:
    """Where it listens, as its log says."""
    assert server.stderr is not None
    for line in server.stderr:
        if match := re.search(r" INFO metrics listen=\S*:(\d+)$", line):
            return int(match[1])
    raise AssertionError("it does not listen")


def get(url: str, method: str = "GET") -> tuple[int, str]:
    reply = urllib3.request(method, url, retries=False, timeout=10.0)
    return reply.status, reply.data.decode()


@pytest.mark.parametrize(("address", "url"), [
    ("127.0.0.1", "http://127.0.0.1"), ("[::1]", "http://[::1]"), ("", "http://127.0.0.1"),
    ("localhost", "http://127.0.0.1"),
])
def test_metrics_and_probes_over_http(faulty: World, address: str, url: str) -> None:
    if address == "[::1]" and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    faulty.aws.group("compute", 2, Role="compute")
    api_of(faulty).fail("GET", SECRETS, status(403), times=1)
    with running(faulty, "--metrics-listen", f"{address}:0") as server:
        where = f"{url}:{port_of(server)}"
        wait_for(lambda: get(f"{where}/readyz") == (200, "ok\n"))
        assert get(f"{where}/healthz") == (200, "ok\n")
        wait_for(lambda: value(get(f"{where}/metrics")[1], "nodes", state="waiting") == 2)
        text = get(f"{where}/metrics?x=1")[1]
        assert value(text, "passes_total", result="failed") == 1
        assert not any(half in text for half in faulty.secrets())
        assert get(f"{where}/")[0] == get(f"{where}/metrics/")[0] == 404
        assert get(f"{where}/metrics", "POST")[0] == 501
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def test_a_standby_is_healthy_and_counts_no_nodes(faulty: World) -> None:
    faulty.aws.group("compute", 2, Role="compute")
    with running(faulty, "--leader-elect"):
        wait_for(lambda: len(faulty.cluster.token_secrets()) == 2)
        with running(faulty, "--leader-elect", "--metrics-listen", "127.0.0.1:0") as standby:
            where = f"http://127.0.0.1:{port_of(standby)}"
            wait_for(lambda: get(f"{where}/readyz")[0] == 200)
            assert get(f"{where}/healthz")[0] == 200
            assert "keto_tokens_nodes{" not in get(f"{where}/metrics")[1]


def test_a_leader_that_leads_no_more_counts_no_nodes(faulty: World) -> None:
    faulty.aws.group("compute", 2, Role="compute")
    calls = keto_tokens.Calls()
    metrics = keto_tokens.Metrics(calls)
    monitor = Monitor(Notify({}), metrics)
    new_server(faulty, monitor=monitor).run_pass()
    assert value(metrics.text().decode(), "nodes", state="new") == 2
    monitor.stands_by()
    assert "keto_tokens_nodes{" not in metrics.text().decode()


def test_health_by_signs_of_life_and_readiness_by_good_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monitor = Monitor(Notify({}), interval=30.0)

    def answers() -> tuple[int, int]:
        return monitor.answer("/healthz")[0], monitor.answer("/readyz")[0]

    assert answers() == (200, 503)  # it has made no pass yet
    monitor.passed("pass failed", 1.0, good=False)
    assert answers() == (200, 503)
    monitor.passed("pass", 1.0, good=True)
    assert answers() == (200, 200)
    now += 89
    assert answers() == (200, 200)
    now += 1
    assert answers() == (200, 503)
    now += 209
    assert answers() == (200, 503)
    now += 1
    assert answers() == (503, 503)
    monitor.beat()
    assert answers() == (200, 503)
    monitor.stands_by()
    assert answers() == (200, 200)


def test_an_address_that_is_taken(faulty: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = [*FILTER, *faulty.cluster.server_flags()]
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        result = faulty.program("server", *flags, "--metrics-listen", where)
    assert (result.code, len(result.err.splitlines())) == (3, 1)
    assert f"--metrics-listen: cannot listen at {where}: Address already in use" in result.err
    assert faulty.aws.count() == {}


@pytest.mark.parametrize("text", ["", "9115", "127.0.0.1", "127.0.0.1:", ":65536", "::1:9115", "[::1]",
                                  "a b:1", "http://127.0.0.1:1", ":-1", ":\u0661"])
def test_an_address_that_is_none(faulty: World, text: str) -> None:
    result = faulty.program("server", *FILTER, *faulty.cluster.server_flags(), f"--metrics-listen={text}")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "--metrics-listen" in result.err


@pytest.mark.parametrize("argv", [["--once", "--metrics-listen=:0"], ["--dry-run", "--metrics-listen=:0"],
                                  ["--dry-run", "--metrics-file=x"]], ids=" ".join)
def test_metrics_of_a_server_that_does_not_make_them(faulty: World, argv: list[str]) -> None:
    result = faulty.program("server", *FILTER, *faulty.cluster.server_flags(), *argv)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
