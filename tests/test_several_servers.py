"""Several servers at once: by the protocol alone, and with --leader-elect.

The servers that race here do so over real HTTP; where a test is about who was first, the stand-in
holds up one request while the others make theirs.
"""
from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import keto_tokens
from clusters import StandinCluster, wait_for
from conftest import BUILT, FILTER, Program, World, recorded, run_built
from standin_aws import REGION
from standin_kubernetes import MASTERS, MICRO_TIME, Kubernetes, User, hang_up, status

OWNER = keto_tokens.owner_hash("aws", REGION, "KubeletToken", {"Role": "compute"})
LEASE = f"keto-tokens-{OWNER}"
LEASES = "/leases"
NODE, TOKEN_SECRET = "keto-tokens/node", "bootstrap.kubernetes.io/token"


def api_of(world: World) -> Kubernetes:
    assert isinstance(world.cluster, StandinCluster)
    return world.cluster.api


def count(api: Kubernetes, verb: str, resource: str, status: int = 0, user: str = "") -> int:
    """How many such requests were made."""
    return sum(
        (asked.verb, asked.resource) == (verb, resource)
        and status in (0, asked.status) and user in ("", asked.user)
        for asked in list(api.asked)
    )


def tokens(api: Kubernetes) -> dict[str, list[str]]:
    """The tokens of all our Secrets, by node."""
    found: dict[str, list[str]] = {}
    with api.lock:
        bodies = [body for body in api.objects.values() if body.get("type") == TOKEN_SECRET]
    for body in bodies:
        parts = [keto_tokens._decode(body["data"][key]) for key in ("token-id", "token-secret")]
        found.setdefault(body["metadata"]["annotations"][NODE], []).append(".".join(parts))
    return found


def agree(world: World, nodes: list[str]) -> bool:
    """Whether each node, and nothing else, has one Secret, and its token as its tag."""
    found = tokens(api_of(world))
    return sorted(found) == sorted(nodes) and all(found[node] == [world.aws.tag(node)] for node in nodes)


@pytest.fixture
def broken(faulty: World, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was wrong at any moment: a node with two Secrets, a tag that no Secret backs."""
    api, problems = api_of(faulty), list[str]()
    put, arrived = api.put, faulty.aws.arrived

    def watched_put(*args: Any) -> dict[str, Any]:
        with api.lock:
            stored = put(*args)
            problems.extend(f"{node}: two Secrets" for node, held in tokens(api).items() if held[1:])
            return stored

    def watched_call(operation: str, fields: dict[str, str]) -> Any:
        if operation == "CreateTags":
            held = tokens(api).get(fields["ResourceId.1"], [])
            if fields["Tag.1.Value"] not in held:
                problems.append(f"{fields['ResourceId.1']}: a tag without a Secret")
        return arrived(operation, fields)

    monkeypatch.setattr(api, "put", watched_put)
    monkeypatch.setattr(faulty.aws, "arrived", watched_call)
    return problems


class Fleet:
    """Server processes, each with a name by which the stand-in knows it."""

    def __init__(self, world: World, folder: Path, *flags: str):
        self.world, self.folder, self.flags = world, folder, flags
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def start(self, name: str) -> None:
        """Start a server, for the first time or again."""
        api_of(self.world).users[f"token-of-{name}"] = User(name, (MASTERS, "system:authenticated"))
        path = self.folder / f"{name}.token"
        path.write_text(f"token-of-{name}")
        flags = ["--master", self.world.cluster.url, "--ca-path", str(self.world.cluster.ca_path),
                 "--kube-token-file", str(path)]
        environ = {**self.world.aws.environment(), "HOME": os.environ["HOME"]}
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, str(BUILT), "server", *FILTER, *flags, *self.flags],
                stderr=log, env=environ,
            )

    def kill(self, name: str) -> None:
        """What no server can prepare for."""
        self.running[name].send_signal(signal.SIGKILL)

    def ended(self, name: str) -> bool:
        """Whether it has ended."""
        return self.running[name].poll() is not None

    def stop(self, *names: str) -> list[int]:
        """Tell servers to stop; their exit codes."""
        for name in names:
            self.running[name].send_signal(signal.SIGTERM)
        return [self.running[name].wait(20) for name in names]

    def log(self, name: str) -> str:
        """What it has written in all its runs."""
        return (self.folder / f"{name}.log").read_text()


# --- by the protocol alone -----------------------------------------------------------------------


class Fuse:
    """Kills a server at a request of its, before or after the work is done."""

    def __init__(self, fleet: Fleet, api: Kubernetes, monkeypatch: pytest.MonkeyPatch):
        self._fleet, self._answer, self._lock = fleet, api.answer, threading.Lock()
        self._left, self._name, self._creates, self._after = 0, "", False, False
        self.killed: list[str] = []
        monkeypatch.setattr(api, "answer", self._watched)

    def light(self, left: int, name: str, creates: bool, after: bool) -> None:
        """Go off at the so-maniest request of this server, or create of anybody."""
        with self._lock:
            self._name, self._creates, self._after, self._left = name, creates, after, left

    def victim(self, number: int) -> str:
        """The server that dies as the so-maniest, once it has."""
        wait_for(lambda: len(self.killed) == number and self._fleet.ended(self.killed[-1]))
        name = self.killed[-1]
        assert self._fleet.running[name].returncode == -signal.SIGKILL
        return name

    def _burns(self, user: str, method: str, path: str) -> bool:
        with self._lock:
            counts = method == "POST" and "/secrets" in path if self._creates else user == self._name
            self._left -= counts
            return counts and self._left == 0

    def _watched(self, user: User, method: str, path: str, body: Any) -> tuple[int, Any]:
        off = self._burns(user.name, method, path)
        if off and not self._after:
            self._go_off(user.name)
        try:
            return self._answer(user, method, path, body)
        finally:
            if off and self._after:
                self._go_off(user.name)

    def _go_off(self, name: str) -> None:
        self._fleet.kill(name)
        self.killed.append(name)


def test_servers_killed_at_any_moment_make_one_secret_for_each_node(
    faulty: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: list[str]
) -> None:
    chance, names, api = random.Random(3), ["a", "b", "c"], api_of(faulty)
    nodes = faulty.aws.group("compute", 12, Role="compute")
    with Fleet(faulty, tmp_path, "--interval", "100ms") as fleet:
        fuse = Fuse(fleet, api, monkeypatch)
        fuse.light(chance.randint(1, 12), "", creates=True, after=True)
        for name in names:
            fleet.start(name)
        for deaths in range(1, 9):
            fleet.start(fuse.victim(deaths))
            if deaths < 8:
                left, creates = chance.randint(1, 9), deaths % 2 == 0
                fuse.light(1 if creates else left, chance.choice(names), creates, chance.random() < 0.7)
                faulty.aws.autoscaling.set_desired_capacity(
                    AutoScalingGroupName="compute", DesiredCapacity=12 + deaths
                )
        nodes = faulty.aws.members("compute")
        assert len(nodes) == 19
        wait_for(lambda: agree(faulty, nodes))
        passes(api, names)  # those that were under way when they began to agree
        before = written(faulty)
        passes(api, names)
        assert written(faulty) == before
        assert fleet.stop(*names) == [0, 0, 0]
    assert broken == []
    assert agree(faulty, nodes)
    assert count(api, "create", "secrets", 201) == len(nodes)
    for name in names:
        assert fleet.log(name).splitlines()[-1].endswith(" INFO stopped")
        assert not re.search("Traceback|ERROR|WARNING", fleet.log(name)), fleet.log(name)


def passes(api: Kubernetes, names: list[str]) -> None:
    """Wait until each server has begun two more passes, and so ended one that saw all there was."""
    wanted = {name: count(api, "list", "secrets", user=name) + 2 for name in names}
    wait_for(lambda: all(count(api, "list", "secrets", user=name) >= wanted[name] for name in names))


def written(world: World) -> tuple[int, ...]:
    """How much was written so far."""
    verbs = ("create", "update", "delete")
    return world.aws.count()["CreateTags"], *(count(api_of(world), verb, "secrets") for verb in verbs)


def new_server(world: World, **options: Any) -> keto_tokens.Server:
    """A server of this process."""
    argv = ["server", *FILTER, *world.cluster.server_flags()]
    parsed, calls, stop = keto_tokens.parse_options(argv, os.environ), keto_tokens.Calls(), keto_tokens.Stop()
    assert parsed is not None
    pools, store = keto_tokens.server_parts(parsed, calls, stop)
    return keto_tokens.Server(
        pools, store, parsed.filter, keto_tokens.Policy(), calls, stop.event, **options
    )


def unseen(world: World, nodes: list[str]) -> None:
    """Nothing was done for these nodes yet."""


def untagged(world: World, nodes: list[str]) -> None:
    """Their tags are gone, their tokens live."""
    assert world.server().code == 0
    for node in nodes:
        world.aws.delete_tag(node)


def expired(world: World, nodes: list[str]) -> None:
    """Their tokens have expired, and nobody has cleaned them away."""
    assert world.server().code == 0
    api_of(world).cleaner = False
    api_of(world).clock += 31 * 60


EACH: dict[Callable[[World, list[str]], None], dict[str, list[int]]] = {
    unseen: {"create": [201] * 30 + [409] * 60, "get": [200] * 60, "update": []},
    untagged: {"create": [], "get": [], "update": [200] * 30 + [409] * 60},
    expired: {"create": [], "get": [], "update": [200] * 30 + [409] * 60},
}


@pytest.mark.parametrize("before", EACH)
def test_three_servers_that_see_the_same_act_once(
    faulty: World, monkeypatch: pytest.MonkeyPatch, broken: list[str],
    before: Callable[[World, list[str]], None],
) -> None:
    nodes, api = faulty.aws.group("compute", 30, Role="compute"), api_of(faulty)
    before(faulty, nodes)
    api.asked.clear()
    together = threading.Barrier(3, timeout=20)
    servers = [new_server(faulty) for _ in range(3)]
    for server in servers:
        monkeypatch.setattr(server, "observe", in_step(server.observe, together))
    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(server.run_pass) for server in servers]:
            done.result()  # PassFailed, when an action failed
    assert agree(faulty, nodes)
    assert broken == []
    for verb, statuses in {**EACH[before], "delete": []}.items():
        asked = [each.status for each in api.asked if (each.verb, each.resource) == (verb, "secrets")]
        assert sorted(asked) == statuses, verb


def in_step(
    observe: Callable[[], keto_tokens.World], together: threading.Barrier
) -> Callable[[], keto_tokens.World]:
    """The same, once all are there, and not back before all have seen."""
    def observed() -> keto_tokens.World:
        together.wait()
        world = observe()
        together.wait()
        return world
    return observed


def test_a_server_that_leads_no_more_leaves_the_rest(faulty: World) -> None:
    faulty.aws.group("compute", 40, Role="compute")
    api = api_of(faulty)
    new_server(faulty, may_work=lambda: count(api, "create", "secrets") < 5).run_pass()
    assert 5 <= len(tokens(api)) < 5 + keto_tokens.AwsPools.workers
    assert all(faulty.aws.tag(node) == held[0] for node, held in tokens(api).items())


# --- the Lease -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the stderr of a test that has ended."""
    monkeypatch.setattr(keto_tokens.log, "handlers", [])


class Clock:
    """The module `time` with a monotonic clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The time by our clock."""
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes only when a test lets it."""
    made = Clock()
    monkeypatch.setattr(keto_tokens, "time", made)
    return made


def candidate(standin: StandinCluster) -> keto_tokens.Leader:
    """One that would lead, with connections of its own."""
    access = keto_tokens.Access(
        standin.url, "a test", standin.api.authority.pem,
        credential=keto_tokens.static_token(standin.api.admin),
    )
    cluster = keto_tokens.Cluster(access, keto_tokens.Calls())
    return keto_tokens.Leader(cluster, "kube-system", LEASE)


def lease_of(api: Kubernetes) -> dict[str, Any]:
    """The Lease as it is stored."""
    return api.objects["leases", "kube-system", LEASE]


def put_lease(api: Kubernetes, spec: Any) -> None:
    """Somebody else writes the Lease."""
    api.put("leases", "kube-system", LEASE, {"spec": spec})


def around(
    api: Kubernetes, monkeypatch: pytest.MonkeyPatch,
    before: Callable[[str], None], after: Callable[[str], None],
) -> None:
    """Do something before and after the stand-in does the work of each request about Leases."""
    answer = api.answer

    def watched(user: User, method: str, path: str, body: Any) -> tuple[int, Any]:
        if LEASES not in path:
            return answer(user, method, path, body)
        before(method)
        try:
            return answer(user, method, path, body)
        finally:
            after(method)

    monkeypatch.setattr(api, "answer", watched)


def once(method: str, action: Callable[[], None]) -> Callable[[str], None]:
    """The action at the first request with this method."""
    done: list[bool] = []

    def hook(asked: str) -> None:
        if asked == method and not done:
            done.append(True)
            action()
    return hook


def nothing(method: str) -> None:
    """Leave it at the work."""


def test_the_first_one_leads(standin: StandinCluster, clock: Clock) -> None:
    first, second = candidate(standin), candidate(standin)
    assert (first.leads(), second.leads()) == (False, False)
    first._step()
    second._step()
    assert (first.leads(), second.leads()) == (True, False)
    assert lease_of(standin.api)["spec"]["holderIdentity"] == first._identity != second._identity


def test_a_lease_given_back_is_taken_at_once(standin: StandinCluster, clock: Clock) -> None:
    second = candidate(standin)
    with candidate(standin) as first:
        second._step()
        assert (first.leads(), second.leads()) == (True, False)
    second._step()
    assert (first.leads(), second.leads()) == (False, True)


def test_threads_hand_over_and_back(
    standin: StandinCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With clocks that run: the standby looks on by itself, and takes what is given back."""
    monkeypatch.setattr(keto_tokens, "RENEW_EVERY", 0.01)
    both: list[bool] = []
    with ExitStack() as standby:
        first = candidate(standin)
        second = candidate(standin)
        with first:
            assert first.leads()
            standby.enter_context(second)
            looks = count(standin.api, "get", "leases")

            def looked_on() -> bool:
                both.append(first.leads() and second.leads())
                return count(standin.api, "get", "leases") > looks + 20

            wait_for(looked_on)
            assert (first.leads(), second.leads()) == (True, False)
        wait_for(second.leads)
        with candidate(standin) as third:
            assert not third.leads()
            standby.close()
            wait_for(third.leads)
    assert not any(both)
    assert lease_of(standin.api)["spec"]["holderIdentity"] == ""


def test_a_killed_holder_is_replaced_when_its_lease_has_run_out(
    standin: StandinCluster, clock: Clock
) -> None:
    first, second = candidate(standin), candidate(standin)
    with ExitStack() as killed:
        killed.enter_context(first)
        killed.pop_all()
    first._done.set()
    first._thread.join()
    start = clock.now
    while clock.now < start + keto_tokens.LEASE - 0.5:
        second._step()
        assert not second.leads()
        assert first.leads() == (clock.now < start + keto_tokens.RENEW_DEADLINE)
        clock.now += 0.5
    clock.now = start + keto_tokens.LEASE - 0.01
    second._step()
    assert not second.leads()
    clock.now = start + keto_tokens.LEASE
    second._step()
    assert (first.leads(), second.leads()) == (False, True)


def test_a_lease_that_is_renewed_never_runs_out(standin: StandinCluster, clock: Clock) -> None:
    first, second = candidate(standin), candidate(standin)
    for _ in range(30):
        first._step()
        second._step()
        assert (first.leads(), second.leads()) == (True, False)
        clock.now += keto_tokens.RENEW_EVERY
        assert (first.leads(), second.leads()) == (True, False)


def test_only_the_own_clock_counts(standin: StandinCluster, clock: Clock) -> None:
    """The times in a Lease are the holder's, which may be years off."""
    second = candidate(standin)
    for year, holder in [("1970", "early_1"), ("2199", "late_1")]:
        moment = f"{year}-01-01T00:00:00.000000Z"
        put_lease(standin.api, {
            "holderIdentity": holder, "leaseDurationSeconds": 15, "acquireTime": moment,
            "renewTime": moment, "leaseTransitions": 3,
        })
        second._step()
        clock.now += 14.9
        second._step()
        assert not second.leads()
        clock.now += 0.1
        second._step()
        assert second.leads()


def test_time_before_the_first_look_does_not_count(standin: StandinCluster, clock: Clock) -> None:
    """A server that starts long after the holder's last renewal knows nothing of that."""
    first, second = candidate(standin), candidate(standin)
    first._step()
    clock.now += 3600
    second._step()
    clock.now += 14.9
    second._step()
    assert not second.leads()
    clock.now += 0.1
    second._step()
    assert second.leads()


def test_a_look_that_took_long_is_as_old_as_its_answer(
    standin: StandinCluster, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Lease was renewed while the request for it was held up: it is that young, not older."""
    first, second = candidate(standin), candidate(standin)
    first._step()

    def held_up() -> None:
        clock.now += 8
        first._step()

    around(standin.api, monkeypatch, once("GET", held_up), nothing)
    second._step()
    renewed = clock.now
    clock.now = renewed + keto_tokens.LEASE - 8
    second._step()
    assert (first.leads(), second.leads()) == (True, False)
    clock.now = renewed + keto_tokens.LEASE - 0.1
    second._step()
    assert not second.leads()
    clock.now = renewed + keto_tokens.LEASE
    second._step()
    assert second.leads()


def test_a_renewal_that_took_long_is_as_old_as_its_request(
    standin: StandinCluster, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have seen it as soon as it was sent."""
    first = candidate(standin)
    sent = clock.now

    def held_up() -> None:
        clock.now += keto_tokens.RENEW_DEADLINE - 1

    around(standin.api, monkeypatch, nothing, once("POST", held_up))
    first._step()
    assert first.leads()
    clock.now = sent + keto_tokens.RENEW_DEADLINE
    assert not first.leads()


@pytest.mark.parametrize("answer", [status(503), status(500), status(429), hang_up],
                         ids=["503", "500", "429", "nothing"])
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_holder_whose_renewals_fail_counts_itself_out(
    standin: StandinCluster, clock: Clock, method: str, answer: Callable[[Any], None]
) -> None:
    first, second = candidate(standin), candidate(standin)
    first._step()
    second._step()
    start = clock.now
    standin.api.fail(method, LEASES, answer, times=4)
    for _ in range(4):
        clock.now += keto_tokens.RENEW_EVERY
        with pytest.raises(keto_tokens.CallFailed):
            first._step()
    clock.now = start + keto_tokens.RENEW_DEADLINE - 0.1
    assert first.leads()
    clock.now = start + keto_tokens.RENEW_DEADLINE
    assert not first.leads()
    second._step()
    assert not second.leads()
    first._step()  # once it may write again, it is still its own
    assert first.leads()


def test_a_renewal_whose_answer_was_lost_is_no_second_holder(
    standin: StandinCluster, clock: Clock
) -> None:
    first, second = candidate(standin), candidate(standin)
    standin.api.fail("POST", LEASES, hang_up, after=True)
    with pytest.raises(keto_tokens.CallFailed):
        first._step()
    second._step()
    assert (first.leads(), second.leads()) == (False, False)
    first._step()
    assert first.leads()


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_race_that_is_lost_is_no_failure(
    standin: StandinCluster, clock: Clock, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    first, second = candidate(standin), candidate(standin)
    if method == "PUT":
        with candidate(standin):
            pass
    around(standin.api, monkeypatch, once(method, second._step), nothing)
    first._step()
    assert (first.leads(), second.leads()) == (False, True)
    verb = {"POST": "create", "PUT": "update"}[method]
    assert count(standin.api, verb, "leases", 409) == 1
    first._step()
    assert (first.leads(), second.leads()) == (False, True)


@pytest.mark.parametrize("seconds", [1, 5, 40])
def test_the_holder_says_for_how_long_it_holds(
    standin: StandinCluster, clock: Clock, seconds: int
) -> None:
    put_lease(standin.api, {"holderIdentity": "other_1", "leaseDurationSeconds": seconds})
    second = candidate(standin)
    second._step()
    clock.now += seconds - 0.1
    second._step()
    assert not second.leads()
    clock.now += 0.1
    second._step()
    assert second.leads()


NOTHING_SET = dict.fromkeys(
    ["holderIdentity", "leaseDurationSeconds", "acquireTime", "renewTime", "leaseTransitions"]
)


@pytest.mark.parametrize(("spec", "after"), [
    (None, 0),
    ({}, 0),
    (NOTHING_SET, 0),
    ({"holderIdentity": ""}, 0),
    ({"leaseDurationSeconds": 40}, 0),
    ({"holderIdentity": "other_1"}, 15),
    ({**NOTHING_SET, "holderIdentity": "other_1"}, 15),
    ({"holderIdentity": "other_1", "renewTime": "2026-01-01T00:00:00.000000Z"}, 15),
])
def test_a_lease_with_parts_missing_is_taken(
    standin: StandinCluster, clock: Clock, spec: Any, after: int
) -> None:
    put_lease(standin.api, spec)
    leader = candidate(standin)
    leader._step()
    assert leader.leads() == (after == 0)
    clock.now += after
    leader._step()
    assert leader.leads()
    written = lease_of(standin.api)["spec"]
    assert set(written) == set(NOTHING_SET)
    assert MICRO_TIME.fullmatch(written["acquireTime"])
    assert type(written["leaseTransitions"]) is int


@pytest.mark.parametrize("text", ["{}", '{"kind": "Lease", "metadata": {}}', '{"metadata": null}'])
def test_an_answer_that_is_no_lease_fails_one_renewal_only(
    standin: StandinCluster, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """What a proxy in between answers must not end the thread that renews."""
    monkeypatch.setattr(keto_tokens, "RENEW_EVERY", 0.01)
    standin.api.fail("GET", LEASES, status(200, text), times=3)
    with candidate(standin) as leader:
        wait_for(leader.leads, 5)


def test_a_lease_that_was_deleted_has_one_holder_again(standin: StandinCluster, clock: Clock) -> None:
    """Whoever makes it anew leads; the one before sees that at its next look, not at its deadline."""
    first, second = candidate(standin), candidate(standin)
    first._step()
    del standin.api.objects["leases", "kube-system", LEASE]
    second._step()
    first._step()
    assert (first.leads(), second.leads()) == (False, True)


def test_what_another_holds_is_not_given_back(standin: StandinCluster, clock: Clock) -> None:
    with candidate(standin):
        put_lease(standin.api, {"holderIdentity": "other_1", "leaseDurationSeconds": 15})
        before = lease_of(standin.api)
    assert lease_of(standin.api) == before
    with candidate(standin) as standby:
        assert not standby.leads()
    assert lease_of(standin.api) == before


def test_a_lease_that_cannot_be_given_back_is_no_failure(standin: StandinCluster, clock: Clock) -> None:
    with candidate(standin):
        standin.api.fail("", LEASES, status(503), times=9)
    standin.api.faults.clear()
    second = candidate(standin)
    second._step()
    clock.now += keto_tokens.LEASE
    second._step()
    assert second.leads()


def test_a_cluster_that_fails_at_the_start_does_not_end_it(
    standin: StandinCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keto_tokens, "RENEW_EVERY", 0.01)
    standin.api.fail("GET", LEASES, status(503), times=3)
    with candidate(standin) as leader:
        wait_for(leader.leads)


@pytest.mark.parametrize("seed", [0, 1, 2, 6, 15, 19])
def test_one_leads_at_a_time_whatever_happens(
    standin: StandinCluster, clock: Clock, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Steps in any order and inside one another, with time that passes anywhere, and with failures."""
    chance, api = random.Random(seed), standin.api
    leaders = [candidate(standin) for _ in range(3)]
    inside: list[keto_tokens.Leader] = []
    led: set[keto_tokens.Leader] = set()
    problems: list[str] = []

    def sample() -> None:
        leading = [leader for leader in leaders if leader.leads()]
        led.update(leading)
        if len(leading) > 1:
            problems.append(f"{len(leading)} lead at {clock.now}")

    def let_pass(longest: float) -> None:
        sample()
        clock.now += chance.uniform(0, longest)
        sample()

    def step(leader: keto_tokens.Leader) -> None:
        inside.append(leader)
        try:
            leader._step()
        except keto_tokens.CallFailed:
            pass
        finally:
            inside.remove(leader)
        sample()

    def meanwhile(_: str) -> None:
        let_pass(chance.choice([0.01, 0.01, 0.01, 1.0, 12.0]))
        idle = [leader for leader in leaders if leader not in inside]
        if idle and chance.random() < 0.2:
            step(chance.choice(idle))
            let_pass(0.1)

    around(api, monkeypatch, meanwhile, meanwhile)
    for _ in range(150):
        if chance.random() < 0.1:
            api.fail("", LEASES, chance.choice([hang_up, status(503)]), after=chance.random() < 0.5)
        favourite = leaders[int(clock.now / 100) % 3]
        step(chance.choice([favourite] * 6 + leaders))
        let_pass(chance.choice([0.1, 0.5, 2.0, 2.0, 20.0]))
    assert problems == []
    assert len(led) > 1


def test_the_lease_is_written_as_the_api_takes_it(standin: StandinCluster, clock: Clock) -> None:
    """Held against the recorded exchanges, whose refusals the stand-in shares."""
    as_recorded = recorded(29)["request"]["body"]
    first, second = candidate(standin), candidate(standin)
    specs = []
    for leader in (first, first, second):
        leader._step()
        body = lease_of(standin.api)
        assert (body["apiVersion"], body["kind"]) == (as_recorded["apiVersion"], as_recorded["kind"])
        assert {k: type(v) for k, v in body["spec"].items()} == {
            k: type(v) for k, v in as_recorded["spec"].items()
        }
        assert MICRO_TIME.fullmatch(body["spec"]["acquireTime"])
        assert MICRO_TIME.fullmatch(body["spec"]["renewTime"])
        specs.append(body["spec"])
        clock.now += 2
        standin.api.clock += 2
    taken, renewed, seen = specs
    assert taken["leaseDurationSeconds"] == renewed["leaseDurationSeconds"] == keto_tokens.LEASE
    assert (taken["leaseTransitions"], renewed["leaseTransitions"]) == (0, 0)
    assert taken["acquireTime"] == taken["renewTime"] == renewed["acquireTime"] < renewed["renewTime"]
    assert seen == renewed
    clock.now += keto_tokens.LEASE
    standin.api.clock += keto_tokens.LEASE
    second._step()
    followed = lease_of(standin.api)["spec"]
    assert (followed["holderIdentity"], followed["leaseTransitions"]) == (second._identity, 1)
    assert followed["acquireTime"] == followed["renewTime"] > renewed["renewTime"]
    assert {asked.status for asked in standin.api.asked if asked.resource == "leases"} == {200, 201, 404}


def test_a_lease_that_changes_hands_counts_it_once(standin: StandinCluster, clock: Clock) -> None:
    """As client-go does: whoever takes it counts, whoever gives it back does not."""
    for transitions in range(3):
        with candidate(standin) as leader:
            assert leader.leads()
            assert lease_of(standin.api)["spec"]["leaseTransitions"] == transitions
        given_back = lease_of(standin.api)["spec"]
        assert (given_back["holderIdentity"], given_back["leaseTransitions"]) == ("", transitions)
        assert given_back["leaseDurationSeconds"] > 0, "the API takes no 0"


# --- the pure functions --------------------------------------------------------------------------

FREE: list[tuple[Any, float, bool]] = [
    (None, 0, True),
    ({}, 0, True),
    ({"spec": None}, 0, True),
    ({"spec": {}}, 0, True),
    ({"spec": {"holderIdentity": "", "leaseDurationSeconds": 1}}, 0, True),
    ({"spec": {"holderIdentity": None, "leaseDurationSeconds": 15}}, 0, True),
    ({"spec": {"holderIdentity": "me", "leaseDurationSeconds": 15}}, 0, True),
    ({"spec": {"holderIdentity": "me", "leaseDurationSeconds": 15}}, 3600, True),
    ({"spec": {"holderIdentity": "me2", "leaseDurationSeconds": 15}}, 0, False),
    ({"spec": {"holderIdentity": "ME", "leaseDurationSeconds": 15}}, 0, False),
    ({"spec": {"holderIdentity": "other", "leaseDurationSeconds": 15}}, 0, False),
    ({"spec": {"holderIdentity": "other", "leaseDurationSeconds": 15}}, 14.99, False),
    ({"spec": {"holderIdentity": "other", "leaseDurationSeconds": 15}}, 15, True),
    ({"spec": {"holderIdentity": "other", "leaseDurationSeconds": 1}}, 0.99, False),
    ({"spec": {"holderIdentity": "other", "leaseDurationSeconds": 1}}, 1, True),
    ({"spec": {"holderIdentity": "other", "leaseDurationSeconds": 60}}, 59.9, False),
    ({"spec": {"holderIdentity": "other", "leaseDurationSeconds": 60}}, 60, True),
    ({"spec": {"holderIdentity": "other"}}, 14.99, False),
    ({"spec": {"holderIdentity": "other"}}, 15, True),
    ({"spec": {"holderIdentity": "other", "leaseDurationSeconds": None}}, 14.99, False),
    ({"spec": {"holderIdentity": "other", "leaseDurationSeconds": None}}, 15, True),
    ({"spec": {"holderIdentity": "other", "renewTime": "1970-01-01T00:00:00.000000Z"}}, 0, False),
    ({"spec": {"holderIdentity": "other", "renewTime": "2199-01-01T00:00:00.000000Z"}}, 15, True),
]


@pytest.mark.parametrize(("lease", "unchanged_for", "free"), FREE)
def test_lease_is_free(lease: Any, unchanged_for: float, free: bool) -> None:
    assert keto_tokens.lease_is_free(lease, "me", unchanged_for) is free


OLD, NOW = "2025-12-31T23:00:00.000000Z", "2026-01-01T00:00:00.250000Z"
BODIES: dict[str, tuple[Any, str, int, Any]] = {
    # what there is, who writes, for how long: since when and the count in what is written
    "none yet": (None, "me", 15, (NOW, 0)),
    "no spec": ({}, "me", 15, (NOW, 1)),
    "null spec": (None, "me", 15, (NOW, 1)),
    "renewed": ({"holderIdentity": "me", "acquireTime": OLD, "leaseTransitions": 4}, "me", 15, (OLD, 4)),
    "renewed, no times": ({"holderIdentity": "me"}, "me", 15, (NOW, 0)),
    "renewed, nulls": ({**NOTHING_SET, "holderIdentity": "me"}, "me", 15, (NOW, 0)),
    "taken over": ({"holderIdentity": "other", "acquireTime": OLD, "leaseTransitions": 4}, "me", 15,
                   (NOW, 5)),
    "taken over, no count": ({"holderIdentity": "other"}, "me", 15, (NOW, 1)),
    "taken over, nulls": ({**NOTHING_SET, "holderIdentity": "other"}, "me", 15, (NOW, 1)),
    "taken up": ({"holderIdentity": "", "acquireTime": OLD, "leaseTransitions": 4}, "me", 15, (NOW, 5)),
    "given back": ({"holderIdentity": "me", "acquireTime": OLD, "leaseTransitions": 4}, "", 1, (NOW, 4)),
}


@pytest.mark.parametrize("case", BODIES)
def test_lease_body(case: str) -> None:
    spec, holder, seconds, (acquired, transitions) = BODIES[case]
    metadata = {"name": "the-lease", "resourceVersion": "7", "labels": {"a": "b"}}
    lease = None if case == "none yet" else {"metadata": metadata, "spec": spec}
    assert keto_tokens.lease_body(lease, "the-lease", holder, seconds, 1767225600.25) == {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata if lease else {"name": "the-lease"},
        "spec": {
            "holderIdentity": holder, "leaseDurationSeconds": seconds, "acquireTime": acquired,
            "renewTime": NOW, "leaseTransitions": transitions,
        },
    }


def test_whole_seconds_have_six_digits_too() -> None:
    spec = keto_tokens.lease_body(None, "the-lease", "me", 15, 1767225600.0)["spec"]
    assert spec["renewTime"] == spec["acquireTime"] == "2026-01-01T00:00:00.000000Z"


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--once", "--dry-run"])
def test_one_pass_needs_no_leader(program: Program, flag: str) -> None:
    result = program("server", *FILTER, "--master", "https://127.0.0.1:9", "--kube-token", "x",
                     "--leader-elect", flag)
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1)
    assert result.err.startswith("keto-tokens: --leader-elect ")
    assert flag in result.err


@pytest.mark.parametrize("verb", ["get", "create", "update"])
def test_a_start_without_the_right_to_leases_names_it(faulty: World, verb: str) -> None:
    api = api_of(faulty)
    faulty.aws.group("compute", 1, Role="compute")
    if verb == "update":
        put_lease(api, {"holderIdentity": "", "leaseDurationSeconds": 1})
    every = ("get", "list", "create", "update", "delete")
    rules = [(each, "", "secrets", "kube-system") for each in every]
    rules += [(each, "coordination.k8s.io", "leases", "kube-system") for each in every if each != verb]
    token = api.account(rules)
    result = run_built(
        "server", *FILTER, "--leader-elect", "--master", faulty.cluster.url, "--ca-path",
        str(faulty.cluster.ca_path),
        environ={**faulty.aws.environment(), "HOME": os.environ["HOME"], "KUBE_SERVICE_TOKEN": token},
    )
    assert result.code == 3
    (line,) = (line for line in result.err.splitlines() if " INFO started " not in line)
    assert line.startswith("keto-tokens: ")
    assert f'cannot {verb} resource "leases" in API group "coordination.k8s.io"' in line
    assert "Rights" in line
    assert token not in result.err
    assert (faulty.aws.count(), tokens(api)) == ({}, {})


@pytest.fixture
def elected(faulty: World, tmp_path: Path) -> Iterator[Fleet]:
    """Servers of which one works at a time, with the times that everybody gets."""
    with Fleet(faulty, tmp_path, "--leader-elect", "--interval", "100ms") as fleet:
        yield fleet


def test_of_two_servers_one_works_and_the_other_takes_over(
    faulty: World, elected: Fleet, broken: list[str]
) -> None:
    api = api_of(faulty)

    def served_by(name: str, pool: str, seconds: float) -> None:
        (node,) = faulty.aws.group(pool, 1, Role="compute")
        wait_for(lambda: faulty.aws.tag(node), seconds)
        made = [asked.user for asked in api.asked if (asked.verb, asked.resource) == ("create", "secrets")]
        assert made.pop() == name
        assert faulty.aws.tag(node) == faulty.token_of(node)

    def stands_by(name: str) -> None:
        before = count(api, "get", "leases", user=name)
        wait_for(lambda: count(api, "get", "leases", user=name) > before)

    def done_by(name: str) -> set[tuple[str, str]]:
        return {(asked.verb, asked.resource) for asked in list(api.asked) if asked.user == name}

    api.fail("GET", LEASES, status(503))  # which the next look makes good
    elected.start("a")
    served_by("a", "first", 20)
    elected.start("b")
    stands_by("b")
    served_by("a", "second", 10)
    assert done_by("b") == {("get", "leases")}

    assert elected.stop("a") == [0]
    served_by("b", "after SIGTERM", 10)
    api.asked.clear()
    elected.start("a")
    stands_by("a")
    elected.kill("b")
    wait_for(lambda: elected.ended("b"))
    assert done_by("a") == {("get", "leases")}
    served_by("a", "after SIGKILL", keto_tokens.LEASE + 10)

    assert elected.stop("a") == [0]
    assert lease_of(api)["spec"]["holderIdentity"] == ""
    assert broken == []
    assert "lease given back" in elected.log("a")
    assert "Traceback" not in elected.log("a") + elected.log("b")


def test_a_standby_asks_nothing_of_aws(faulty: World, elected: Fleet) -> None:
    api = api_of(faulty)
    (node,) = faulty.aws.group("compute", 1, Role="compute")

    def renewed() -> bool:
        put_lease(api, {"holderIdentity": "foreign_1", "leaseDurationSeconds": 3})
        return count(api, "get", "leases", user="a") >= 4  # in longer than the Lease lasts

    renewed()
    elected.start("a")
    wait_for(renewed)
    assert faulty.aws.count() == {}
    assert {asked.resource for asked in list(api.asked)} == {"leases"}
    wait_for(lambda: faulty.aws.tag(node))
    assert faulty.aws.tag(node) == faulty.token_of(node)
    assert elected.stop("a") == [0]
