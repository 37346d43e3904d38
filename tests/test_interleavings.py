"""Servers, clients, kubelets, an approver and an operator in any order, with faults and old reads.

The decisions, the store, the paging and the retries are the program's own; the wire, the cloud and the
clock are in memory.  What must hold at every step and after things have calmed down is in the
invariants and in `_check_end`.
"""
from __future__ import annotations

import base64
import functools
import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

import keto_tokens
from keto_tokens import (
    CONSUMED, Action, CallFailed, Listing, Node, Policy, Reply, TokenSecret, aws_node, plan, receipt,
)
from pki import kubelet_request
from standin_kubernetes import SIGNER, Kubernetes, Refusal, User

T = TypeVar("T")

START = 1_800_000_000.0
POLICY = Policy(ttl=1800.0, give_up=3600.0)
PASSES = 3  # with writes, until everything is settled
LAG = 60  # seconds by which reads of the cloud may be old: what YOUNG and JUST_JOINED are made for
CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
NODES = 4  # of our group; few, so that things happen to the same one
RIGHTS = [
    *[(verb, "", "secrets", "kube-system") for verb in ("list", "get", "create", "update", "delete")],
    ("list", "certificates.k8s.io", "certificatesigningrequests", ""),
    ("get", "", "nodes", ""),
]
OWNERS = {group: keto_tokens.owner_hash("aws", "here", "KubeletToken", {"Role": group})
          for group in ("ours", "theirs")}

# How a write fails, and which write of the pass does.
FAULTS = st.one_of(
    st.just(("", 0)),
    st.tuples(st.sampled_from(["cut", "lost", "repeated", "refused"]), st.integers(1, 5)),
)
LAGS = st.sampled_from([0, 1, 10, 30, LAG])

request_of = functools.cache(kubelet_request)  # making a key is slow


class Api(Kubernetes):
    """The API server at a time of its own; it has no cache of tokens, so live is live."""

    def now(self) -> float:
        return START + self.clock

    def accepts(self, token: str) -> User | None:
        """Whom it takes the bearer for."""
        try:
            return self.user_of(f"Bearer {token}", None)
        except Refusal:
            return None


class Cut(BaseException):
    """The process ends here."""


@dataclass
class Line:
    """A server's way to the world, and what goes wrong on it in this pass."""

    fault: str = ""
    at: int = 0  # the number of the write that it hits
    writes: int = 0
    dead: bool = False

    def read(self, do: Callable[[], T]) -> T:
        """The dead read nothing: other threads end with the one that was cut off."""
        if self.dead:
            raise Cut
        return do()

    def write(self, do: Callable[[], T]) -> T:
        """Do it, unless the fault says otherwise."""
        self.writes += 1
        fault = self.fault if self.writes == self.at else ""
        if fault == "refused":
            raise CallFailed("refused by the test")
        result = self.read(do)
        if fault == "cut":
            self.dead = True
            raise Cut
        if fault:  # the program tries again what may go through later
            raise CallFailed("the answer was lost by the test", again=fault == "repeated")
        return result


class Wired(keto_tokens.Cluster):
    """The program's own client of the cluster, without HTTP."""

    def __init__(self, api: Api, line: Line):
        self._api, self._line, self._bearer = api, line, api.account(RIGHTS)
        access = keto_tokens.Access("https://cluster", "the test")
        super().__init__(access, keto_tokens.Calls(), lambda _: None)

    def now(self) -> float:
        return self._api.now()

    def skew(self) -> float:
        return 0.0

    def _send(
        self, what: str, method: str, path: str, content: bytes | None, limit: int,
        refused: bool = False,
    ) -> tuple[Reply, str]:
        def send() -> Reply:
            user = self._api.accepts(self._bearer)
            assert user
            try:
                status, answer = self._api.answer(user, method, path, json.loads(content or b"null"))
            except Refusal as refusal:
                status, answer = refusal.code, refusal.body
            return Reply(status, {"Content-Type": "application/json"}, json.dumps(answer).encode())

        return (self._line.read if method == "GET" else self._line.write)(send), self._bearer


@dataclass(eq=False)
class Machine:
    """An instance with its client and its kubelet, as they are: the cloud shows some of it, later."""

    id: str
    group: str
    states: list[tuple[float, str]]  # since when, ""  for not there
    tags: list[tuple[float, str | None]] = field(default_factory=list)
    receipts: list[tuple[float, str]] = field(default_factory=list)  # where its client cannot mark
    kubeconfig: str = ""  # the token in it
    taken: set[str | None] = field(default_factory=set)  # all that were ever in it
    marking: bool = False  # the client is about to mark the tag
    key: int = 0  # the kubelet's; a reset makes a new one, and the CSR's name comes from it
    asked_with: str = ""  # the token with which the kubelet made its CSR
    certified: bool = False  # the kubelet has fetched its certificate
    joined: bool = False
    reset: float = 0.0
    expired: bool = False  # a token of it has expired

    @property
    def state(self) -> str:
        return self.states[-1][1]

    @property
    def wanted(self) -> bool:
        return self.state == "InService"

    @property
    def tag(self) -> str | None:
        return seen(self.tags, float("inf"))

    @property
    def name(self) -> str:
        return f"node-{self.id}"

    @property
    def csr(self) -> str:
        return f"node-csr-{self.id}-{self.key}"


def seen(history: list[tuple[float, T]], moment: float) -> T | None:
    """What a history held at a moment."""
    return next((value for since, value in reversed(history) if since <= moment), None)


class Pools:
    """The cloud as one server sees it: members and tags as they were some seconds ago."""

    scope, workers = "here", 1

    def __init__(self, api: Api, machines: dict[str, Machine], line: Line):
        self._api, self._machines, self._line = api, machines, line
        self.member_lag = self.tag_lag = 0

    def list_nodes(self, filters: Mapping[str, str]) -> Listing:
        now, nodes = self._api.now(), []
        for each in self._machines.values():
            state = seen(each.states, now - self.member_lag)
            if state and each.group == filters["Role"]:
                node = aws_node({"InstanceId": each.id, "LifecycleState": state}, each.group)
                nodes.append(replace(node, tag=seen(each.tags, now - self.tag_lag)))
        return self._line.read(lambda: Listing(tuple(nodes)))

    def receipts(self, nodes: Sequence[Node]) -> dict[str, str]:
        now = self._api.now()
        left = {node.id: seen(self._machines[node.id].receipts, now - self.tag_lag) for node in nodes}
        return {node_id: value for node_id, value in left.items() if value}

    def write_tag(self, node_id: str, value: str) -> None:
        def write() -> None:
            each = self._machines[node_id]
            if not each.state:
                raise CallFailed(f"{node_id} does not exist")
            each.tags.append((self._api.now(), value))

        keto_tokens.retrying(lambda: self._line.write(write), lambda _: None, 3)

    def checks(self, filters: Mapping[str, str]) -> list[tuple[str, Callable[[], str]]]:
        return []


@dataclass(frozen=True)
class Need:
    """A kubelet that has to fetch its certificate, and so needs its token to stay as it is."""

    node: str
    token: str = field(repr=False)
    csr: str


class Party:
    """A server, and what it has planned but not carried out yet."""

    def __init__(self, api: Api, machines: dict[str, Machine], group: str):
        self.owner, self.group = OWNERS[group], group
        self.line = Line()
        self.pools = Pools(api, machines, self.line)
        self.store = keto_tokens.TokenStore(
            Wired(api, self.line), self.owner, namespace="kube-system",
            groups=keto_tokens.DEFAULT_GROUPS, ttl=POLICY.ttl,
        )
        self.server = keto_tokens.Server(
            self.pools, self.store, {"Role": group}, POLICY, keto_tokens.Calls(), threading.Event(),
        )
        self.planned: list[Action] | None = None
        self.needed: frozenset[Need] = frozenset()  # as it looked

    def connect(self, fault: str = "", at: int = 0) -> None:
        """Start anew, as a process does."""
        self.line.fault, self.line.at, self.line.writes, self.line.dead = fault, at, 0, False


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def foreign(token_id: str, kind: str = "bootstrap.kubernetes.io/token", **metadata: Any) -> dict[str, Any]:
    """A token that somebody else made."""
    data = {"token-id": token_id, "token-secret": "f" * 16, "expiration": "2099-01-01T00:00:00Z",
            "usage-bootstrap-authentication": "true"}
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return {"type": kind, "metadata": metadata, "data": encoded}


class Interleavings(RuleBasedStateMachine):
    """Two servers of one owner, one of another, and the nodes of both."""

    nodes: Bundle[Machine] = Bundle("nodes")

    def __init__(self) -> None:
        super().__init__()
        self.halves = 0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(keto_tokens, "PAGE", 2)
        self.patch.setattr(keto_tokens, "new_secret", self._new_secret)
        self.patch.setattr(keto_tokens.log, "propagate", False)
        self.heard = Heard()
        self.level = keto_tokens.log.level
        keto_tokens.log.addHandler(self.heard)
        keto_tokens.log.setLevel(logging.DEBUG)
        self.api = Api(auth_cache=0.0)
        self.api.put("configmaps", "kube-public", "cluster-info", {"data": {"kubeconfig": ""}})
        self.machines: dict[str, Machine] = {}
        self.parties = [Party(self.api, self.machines, group) for group in ("ours", "ours", "theirs")]
        self.foreign: set[str] = set()
        self.together = self.marks = True

    def _new_secret(self) -> str:
        """Halves that can be told from all else."""
        self.halves += 1
        return f"half{self.halves:012}"

    @initialize(calm=st.booleans(), cleaner=st.booleans(), together=st.booleans(), marks=st.booleans())
    def begin(self, calm: bool, cleaner: bool, together: bool, marks: bool) -> None:
        """`calm` is without old reads; `together`: in the end the nodes do all to join; clients write
        their tag (`marks`), or leave a receipt by which a server does."""
        self.calm, self.api.cleaner, self.together, self.marks = calm, cleaner, together, marks
        labels = {keto_tokens.LABEL_MANAGED: "keto-tokens", keto_tokens.LABEL_OWNER: OWNERS["ours"]}
        first, second, third = (keto_tokens.token_ids(OWNERS["ours"], f"i-{n}")[0] for n in range(3))
        notes = {keto_tokens.NOTE_NODE: "i-9"}
        made = {
            "abcdef": foreign("abcdef"),  # as kubeadm makes them
            first: foreign(first),
            second: foreign(second, labels=labels, annotations=notes),  # not the node's that it says
            third: foreign(third, "Opaque", labels=labels, annotations={keto_tokens.NOTE_NODE: "i-2"}),
            "zzzzzz": foreign("zzzzzz", labels=labels),
        }
        for token_id, body in made.items():
            self.api.put("secrets", "kube-system", f"bootstrap-token-{token_id}", body)
        self.foreign = {f"bootstrap-token-{token_id}" for token_id in made}
        self.theirs = self._foreign()

    # --- the cloud and the clock ------------------------------------------------------------------

    @precondition(lambda self: len(self.machines) < NODES)
    @rule(target=nodes)
    def a_node_starts(self) -> Machine:
        return self._start(f"i-{len(self.machines)}", "ours")

    @precondition(lambda self: "j-0" not in self.machines)
    @rule(target=nodes)
    def a_node_of_the_others_starts(self) -> Machine:
        return self._start("j-0", "theirs")

    def _start(self, node_id: str, group: str) -> Machine:
        made = Machine(node_id, group, [(self.api.now(), "InService")])
        self.machines[node_id] = made
        return made

    @rule(node=nodes)
    def a_node_ends(self, node: Machine) -> None:
        if node.state:
            after = {"InService": "Terminating", "Terminating": ""}[node.state]
            node.states.append((self.api.now(), after))

    @rule(seconds=st.integers(1, 70))
    def a_moment_passes(self, seconds: int) -> None:
        self._pass_time(seconds)

    @rule(minutes=st.integers(5, 25))
    def time_passes(self, minutes: int) -> None:
        self._pass_time(60 * minutes)

    def _pass_time(self, seconds: float) -> None:
        live = {secret.node_id for party in self.parties for secret in self._live(party.owner)}
        self.api.clock += seconds
        left = {secret.node_id for party in self.parties for secret in self._live(party.owner)}
        for node_id in live - left:
            self.machines[node_id].expired = True

    # --- the servers ------------------------------------------------------------------------------

    @precondition(lambda self: not self.calm)
    @rule(number=st.integers(0, 2), members=LAGS, tags=LAGS)
    def a_server_reads_what_was(self, number: int, members: int, tags: int) -> None:
        pools = self.parties[number].pools
        pools.member_lag, pools.tag_lag = members, tags

    @rule(number=st.integers(0, 2), fault=FAULTS)
    def a_server_passes(self, number: int, fault: tuple[str, int]) -> None:
        party = self.parties[number]
        party.planned = None
        party.connect(*fault)
        before = {node.id: node.tag for node in self.machines.values()}
        self._watched(party, party.server.run_pass, self._needs())
        if not fault[0]:
            self._check_extended(party)
        for node in self.machines.values():
            marked = node.tag == CONSUMED != before[node.id]
            assert not (self.calm and marked) or before[node.id] in node.taken, "marked, and never taken"

    @precondition(lambda self: not self.calm)
    @rule(number=st.integers(0, 2))
    def a_server_looks(self, number: int) -> None:
        """What it sees now it acts on later: a slow pass, or one that stood still."""
        party = self.parties[number]
        party.connect()
        party.planned = plan(party.server.observe(), POLICY)
        party.needed = self._needs()

    @precondition(lambda self: any(party.planned for party in self.parties))
    @rule(fault=FAULTS)
    def a_server_acts_on_what_it_saw(self, fault: tuple[str, int]) -> None:
        party = next(party for party in self.parties if party.planned)
        actions, party.planned = party.planned or [], None
        party.connect(*fault)
        # Nothing makes a Secret and a CSR change together: a kubelet that asks only after the server
        # has looked is not seen, whatever the server does.  So it is about those that it could see.
        self._watched(party, lambda: party.server.apply(actions), party.needed & self._needs())

    def _watched(self, party: Party, run: Callable[[], Any], needs: frozenset[Need]) -> None:
        """Let a server write, and see that it leaves alone what it must."""
        self.api.clean()  # what the cleaner takes is not the server's doing
        others = self._not_of(party)
        try:
            run()
        except (keto_tokens.CallFailed, keto_tokens.PassFailed, Cut):
            pass
        assert self._not_of(party) == others, "what belongs to others was changed"
        for need in needs:
            assert self.api.accepts(need.token), f"{need} and the server took its token away"

    def _not_of(self, party: Party) -> str:
        """All that a server has no business with: Secrets and tags."""
        label = keto_tokens.LABEL_OWNER
        secrets = [
            body for (resource, _, name), body in sorted(self.api.objects.items())
            if resource == "secrets"
            and (name in self.foreign or body["metadata"]["labels"][label] != party.owner)
        ]
        tags = [each.tags for each in self.machines.values() if each.group != party.group]
        return json.dumps([secrets, tags])

    def _needs(self) -> frozenset[Need]:
        """Whose token must not be touched: of whoever has asked for a certificate and not fetched it."""
        found = set()
        for each in self.machines.values():
            conditions, certificate = self._decision(each)
            waits = certificate or not conditions
            is_joined = certificate and each.joined
            asked = each.asked_with and each.asked_with == each.kubeconfig and not each.certified
            if each.wanted and asked and waits and not is_joined and self.api.accepts(each.kubeconfig):
                found.add(Need(each.id, each.kubeconfig, each.csr))
        return frozenset(found)

    def _check_extended(self, party: Party) -> None:
        """After a whole pass a kubelet that waits has a third of the TTL, until we give up."""
        ids = {need.node for need in self._needs()}
        for secret in self._live(party.owner):
            left, age = secret.expires - self.api.now(), self.api.now() - secret.first_issued
            if secret.node_id in ids:
                assert left >= POLICY.ttl / 3 or age >= POLICY.give_up, f"{secret.node_id}: {left} s left"

    # --- the nodes --------------------------------------------------------------------------------

    @rule(node=nodes, lag=LAGS, end=st.sampled_from(["marks", "marks", "crashes", "is slow"]))
    def a_client_runs(self, node: Machine, lag: int, end: str) -> None:
        """One look of the client; it may crash before it marks the tag, or mark it later."""
        # An operator resets a node when the node itself no longer sees the tag that was deleted.
        moment = max(self.api.now() - (0 if self.calm else lag), node.reset)
        token = keto_tokens.parse_token(seen(node.tags, moment))
        if node.state and token and self.api.accepts(token.value):
            node.kubeconfig = token.value
            node.taken.add(token.value)
            node.marking = end == "is slow" and not self.calm
            if end == "marks":
                self._mark(node)

    @rule(node=nodes)
    def a_slow_client_marks(self, node: Machine) -> None:
        if node.state and node.marking:
            self._mark(node)
        node.marking = False

    def _mark(self, node: Machine) -> None:
        token = keto_tokens.parse_token(node.kubeconfig)
        if self.marks:
            node.tags.append((self.api.now(), CONSUMED))
        elif token:
            node.receipts.append((self.api.now(), receipt(token)))

    @rule(node=nodes)
    def a_kubelet_goes_on(self, node: Machine) -> None:
        self._kubelet(node)

    def _kubelet(self, node: Machine) -> None:
        """One step: ask for a certificate, fetch it, or register the Node."""
        if not node.state or node.joined:
            return
        if node.certified:
            ready = {"type": "Ready", "status": "True", "lastHeartbeatTime": self.api.stamp()}
            self.api.put("nodes", "", node.name, {"status": {"conditions": [ready]}})
            node.joined = True
            return
        user = self.api.accepts(node.kubeconfig)
        if user is None:
            return
        self.api.clean()
        if ("certificatesigningrequests", "", node.csr) in self.api.objects:
            # One with the kubelet's own key that is there already is taken up again.
            _, body = self.api.answer(user, "GET", f"{CSRS}/{node.csr}", None)
            node.certified = bool(body["status"].get("certificate"))
            return
        usages = ["digital signature", "client auth"]
        self.api.answer(user, "POST", CSRS, {
            "metadata": {"name": node.csr},
            "spec": {"request": request_of(node.name), "signerName": SIGNER, "usages": usages},
        })
        node.asked_with = node.kubeconfig

    @rule(number=st.integers(0, 5), kind=st.sampled_from(["Approved", "Approved", "Denied"]))
    def an_approver_decides(self, number: int, kind: str) -> None:
        waiting = [
            name for (resource, _, name), body in sorted(self.api.objects.items())
            if resource == "certificatesigningrequests" and not body["status"].get("conditions")
        ]
        if waiting:
            self._decide(waiting[number % len(waiting)], kind)

    def _decide(self, csr: str, kind: str) -> None:
        admin = self.api.users[self.api.admin]
        conditions = [{"type": kind, "status": "True"}]
        body = {"metadata": {"name": csr}, "status": {"conditions": conditions}}
        self.api.answer(admin, "PUT", f"{CSRS}/{csr}/approval", body)

    @rule(node=nodes)
    def a_node_joins_at_once(self, node: Machine) -> None:
        """What mostly happens, in one step, so that what comes after a join is met often."""
        number = 0 if node.group == "ours" else 2
        self.a_server_passes(number, ("", 0))
        self._join(node)

    def _join(self, node: Machine) -> None:
        self.a_client_runs(node, 0, "marks")
        self._kubelet(node)
        conditions, _ = self._decision(node)
        if conditions == []:
            self._decide(node.csr, "Approved")
        self._kubelet(node)
        self._kubelet(node)

    @rule(node=nodes, its_node_too=st.booleans())
    def an_operator_takes_a_tag_away(self, node: Machine, its_node_too: bool) -> None:
        """The node is to join again: it is reset, with a new key for the kubelet."""
        if not node.state:
            return
        self.api.clock += 1  # CSRs know only whole seconds; no operator is as quick as an approver
        node.tags.append((self.api.now(), None))
        node.reset, node.key = self.api.now(), node.key + 1
        node.kubeconfig = node.asked_with = ""
        node.certified = node.joined = node.marking = False
        if its_node_too:
            self.api.objects.pop(("nodes", "", node.name), None)

    # --- what must be true ------------------------------------------------------------------------

    def _decision(self, node: Machine) -> tuple[list[Any] | None, bool]:
        """The conditions of the kubelet's CSR, None when there is none, and whether it is issued."""
        body = self.api.objects.get(("certificatesigningrequests", "", node.csr))
        if body is None:
            return None, False
        return body["status"].get("conditions", []), bool(body["status"].get("certificate"))

    def _foreign(self) -> str:
        names = sorted(self.foreign)
        return json.dumps([self.api.objects.get(("secrets", "kube-system", name)) for name in names])

    def _secrets(self, owner: str) -> list[TokenSecret]:
        bodies = [body for (resource, *_), body in self.api.objects.items() if resource == "secrets"]
        found = [keto_tokens.parse_secret(body, owner) for body in bodies]
        return [secret for secret in found if secret]

    def _live(self, owner: str) -> list[TokenSecret]:
        """Those that the API server takes."""
        return [each for each in self._secrets(owner) if self.api.accepts(each.token.value)]

    @invariant()
    def a_node_has_one_live_token(self) -> None:
        for owner in OWNERS.values():
            ids = [secret.node_id for secret in self._live(owner)]
            assert len(ids) == len(set(ids)), f"two live tokens: {ids}"

    @invariant()
    def foreign_secrets_are_as_they_were(self) -> None:
        if self.foreign:
            assert self._foreign() == self.theirs

    @invariant()
    def the_log_holds_no_secret(self) -> None:
        for line in self.heard.lines:
            assert not re.search("half0|aGFsZj|ffff|ZmZm", line), line
            assert "by a bug in" not in line, line
        self.heard.lines.clear()

    @rule(together=st.booleans())
    def everything_calms_down(self, together: bool) -> None:
        self._settle(together)

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self._settle(self.together)
        finally:
            keto_tokens.log.removeHandler(self.heard)
            keto_tokens.log.setLevel(self.level)
            self.patch.undo()

    def _settle(self, together: bool) -> None:
        """No more faults, reads are up to date: a few passes, and all is as it should be."""
        self._pass_time(keto_tokens.JUST_JOINED + 1)  # more than YOUNG
        for party in self.parties:
            party.pools.member_lag = party.pools.tag_lag = 0
            party.planned = None
        for party in self.parties[1:]:
            passes, mine = 0, [node for node in self.machines.values() if node.group == party.group]
            while self._goes_on(mine, together) and self._has_to_write(party):
                passes += 1
                assert passes <= PASSES, "it does not settle"
                self._watched(party, party.server.run_pass, self._needs())
                self._check_extended(party)
                self._pass_time(10)
            self._check_end(party, together)

    def _goes_on(self, nodes: list[Machine], together: bool) -> bool:
        for node in nodes:
            if together:
                self._join(node)
        return True

    def _has_to_write(self, party: Party) -> bool:
        party.connect()
        return any(action.kind in keto_tokens.WRITES for action in plan(party.server.observe(), POLICY))

    def _check_end(self, party: Party, together: bool) -> None:
        live = {secret.node_id: secret.token.value for secret in self._live(party.owner)}
        for secret in self._secrets(party.owner):
            assert self.machines[secret.node_id].wanted, f"a Secret of {secret.node_id}, which is gone"
        for node in self.machines.values():
            if node.group != party.group or not node.wanted:
                continue
            token = live.get(node.id)
            assert node.tag in (CONSUMED, token), f"{node.id} has no token that works"
            assert node.tag, f"{node.id} has no token"
            conditions, _ = self._decision(node)
            if node.joined and node.tag == CONSUMED and conditions:
                assert token != node.asked_with, f"the token of {node.id} was not for one time"
            if self.calm and not node.expired:
                self._check_calm_end(node, token, together)

    def _check_calm_end(self, node: Machine, token: str | None, together: bool) -> None:
        """Without old reads, and without a token that expired, more is true."""
        conditions, certificate = self._decision(node)
        if node.joined:
            assert (node.tag, token) == (CONSUMED, None), f"{node.id} has joined"
        else:
            assert token, f"{node.id} waits for a token"
            assert not together or (conditions and not certificate), f"{node.id} could have joined"


Interleavings.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestInterleavings = Interleavings.TestCase
