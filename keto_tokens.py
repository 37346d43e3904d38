#!/usr/bin/env python3
"""Give each new cloud instance the token with which its kubelet joins a Kubernetes cluster.

Two roles in one file.  The *server* lists the auto-scaling groups that match its filters, makes a
bootstrap token (a Secret in the cluster) for each instance that needs one, and leaves the token in
a tag of the instance.  The *client*, on the instance, takes the token from the tag, checks that the
cluster accepts it, writes the kubelet's bootstrap kubeconfig and marks the tag consumed.

The tag is the whole protocol between the two.  It is absent, then a token `[a-z0-9]{6}.[a-z0-9]{16}`,
then the word `Success`.  On GCE it is an item of the instance's metadata, which a node cannot write:
there the client leaves a receipt, and the server writes the word.  The cluster's own Secrets are the only
database: the name of a node's Secret is derived from the node, so creating it is the lock, and whatever a
crash leaves half done is found again by looking.  Nothing is remembered from one pass to the next.

Exit codes:
  0  done; the server was told to stop; the tag says that the token was consumed
  1  status: a node is stuck; check: something fails
  2  a flag, an environment variable or a command is wrong; nothing was touched
  3  cannot work as set up: a file, a credential, the cluster or the cloud is
     missing or refused
  4  server --once: a part of the pass failed; the next pass finishes it
  5  client: --timeout passed before there was a live token
  6  client: the kubeconfig is written, but the tag is not marked; run it again
  70  a bug in this program: the one case that shows a traceback
  128+N  client: ended by signal N before it was done
"""
from __future__ import annotations

import sys

if sys.version_info < (3, 10):
    sys.exit("keto-tokens: needs Python 3.10 or newer; this is Python %d.%d" % sys.version_info[:2])

import argparse
import base64
import collections
import contextlib
import enum
import errno
import fcntl
import functools
import hashlib
import hmac
import json
import logging
import math
import os
import random
import re
import secrets
import shlex
import signal
import textwrap
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

# What only some commands need is imported where it is used: help and version should answer at once.
if TYPE_CHECKING:
    import ssl

__version__ = "0.1.0"

log = logging.getLogger("keto-tokens")


# ---------------------------------------------------------------------------------------------
# Constants: what others have fixed, and thresholds with their reasons
# ---------------------------------------------------------------------------------------------

CONSUMED = "Success"  # the tag's last state, as the Go program of this name wrote it
SECRET_TYPE = "bootstrap.kubernetes.io/token"
SECRET_PREFIX = "bootstrap-token-"
READ_NAMESPACE = "kube-system"  # the only namespace in which the API server looks for tokens
DEFAULT_GROUPS = "system:bootstrappers:kubeadm:default-node-token"  # as `kubeadm token create`
SIGNER = "kubernetes.io/kube-apiserver-client-kubelet"

LABEL_MANAGED = "app.kubernetes.io/managed-by"
LABEL_OWNER = "keto-tokens/owner"
NOTE_NODE = "keto-tokens/node"  # the instance id
NOTE_POOL = "keto-tokens/pool"  # the auto-scaling group
NOTE_FIRST = "keto-tokens/first-issued"  # RFC 3339; since when the node has been asked to join
NOTE_EARLIER = "keto-tokens/earlier-csrs"  # uids of CSRs that were decided before this secret half
NOTE_UNPUBLISHED = "keto-tokens/unpublished"  # a new half that the tag may not show yet

TOKEN_NAMES = 8  # how many ids a node tries when others have taken the ones derived from it
YOUNG = 60.0  # seconds; cloud APIs are eventually consistent, so a young Secret is never "gone"
JUST_JOINED = 120.0  # seconds after its join in which a tag that still shows a token is an old read
SKEW = 30.0  # seconds between our clock and the cluster's that are worth a warning

LEASE, RENEW_DEADLINE, RENEW_EVERY = 15, 10.0, 2.0  # seconds, as Kubernetes' own components
STUCK = 600.0  # seconds after which a node that has not joined is worth a look: booting takes less
HUNG = 300.0  # seconds without a sign of life: one AWS call with all its retries may take 200

CONNECTIONS = 32  # kept open to one server: as many as there are workers at the most
TAGS_PER_SECOND, TAGS_BURST = 5.0, 50.0  # half of EC2's CreateTags bucket (100, refilled 10/s): the
# other half is for the clients' marks; a server that took more would make them fail
PAGE, PAGES = 500, 1000  # objects a page, as kubectl asks for, and pages that are believable
TIMEOUTS = 5.0, 20.0  # seconds to connect, and to wait for more of an answer
LIST_LIMIT, OBJECT_LIMIT = 64 << 20, 4 << 20  # bytes of an answer that are still believable
ATTEMPTS = 3  # tries of one call; the next pass is the real retry
KUBEADM_FILES = ("/etc/kubernetes/bootstrap-kubelet.conf", "/etc/kubernetes/kubelet.conf")  # its own
MARK_ATTEMPTS = 5  # tries of the mark: about 15 s, since the kubelet may be waiting for our exit


# ---------------------------------------------------------------------------------------------
# Errors: one root, each class owns its exit code; caught in main, anything else is a bug
# ---------------------------------------------------------------------------------------------


class KetoError(Exception):
    """An expected failure, as opposed to a bug: what was done, to what, what came back."""

    exit_code = 3
    again = False  # whether the same call may go through later
    after = 0.0  # seconds that the other side asked us to wait before


class UsageError(KetoError):
    """A flag, environment variable or command that cannot be meant; nothing was touched."""

    exit_code = 2


class SetupError(KetoError):
    """Nothing will work until somebody changes something: no credentials, no cluster, a bad file."""


class Refused(SetupError):
    """The cluster does not know the credential (401)."""


class Untrusted(SetupError):
    """The server's certificate is not signed by the CA, or not for the name we called it by."""


class Unreachable(SetupError):
    """Nobody answers where the cluster or the metadata service should be."""

    again = True


class NoCredentials(SetupError):
    """No credential for the cloud is found; a new instance's role can take some seconds to appear."""

    again = True


class CallFailed(KetoError):
    """One call to the cloud or the cluster failed; `status` is the HTTP status, 0 for none."""

    exit_code = 4

    def __init__(self, message: str, *, status: int = 0, again: bool = False, after: float = 0.0):
        super().__init__(message)
        self.status, self.again, self.after = status, again, after


class Throttled(CallFailed):
    """The cloud is asked too often, by us or by others of the account."""


class Superseded(CallFailed):
    """Another server was quicker; what it did is seen in the next pass."""


class PassFailed(KetoError):
    """A pass in which an action failed."""

    exit_code = 4


class Doubt(KetoError):
    """A finding of check that is no failure."""


class TimedOut(KetoError):
    """The client's --timeout passed."""

    exit_code = 5


class NotMarked(KetoError):
    """The kubeconfig is in place, but the tag does not say so."""

    exit_code = 6


class Interrupted(KetoError):
    """The client was told to stop before it was done."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} before a token was consumed")
        self.exit_code = 128 + signum


# ---------------------------------------------------------------------------------------------
# Records: frozen, compared by value; no repr shows a secret
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """A bootstrap token.  The id is public; the secret half is shown by `value` alone."""

    id: str
    secret: str = field(repr=False)

    @property
    def value(self) -> str:
        """The token as the tag and the kubelet carry it: `id.secret`."""
        return f"{self.id}.{self.secret}"

    def __str__(self) -> str:
        return f"{self.id}.<redacted>"


@dataclass(frozen=True)
class Node:
    """An instance as the cloud lists it.  `tag` is the raw value of our tag, None when absent."""

    id: str
    pool: str
    state: str
    tag: str | None = field(default=None, repr=False)
    wanted: bool = True  # it should have a token
    gone: bool = False  # it is ending; it will never need one again
    new_disk: bool = False  # its root volume is being replaced: the kubelet's credentials are lost
    receipt: str = ""  # what its client left, where it cannot write the tag: see `receipt`

    @property
    def token(self) -> Token | None:
        """The token in the tag, None when there is none or the value is something else."""
        return parse_token(self.tag)

    @property
    def consumed(self) -> bool:
        """Whether the tag says that a client has taken the token."""
        return self.tag == CONSUMED

    @property
    def received(self) -> bool:
        """Whether its client says that it has taken the token in the tag."""
        return self.token is not None and self.receipt == receipt(self.token)


@dataclass(frozen=True)
class Listing:
    """The nodes of one pass.  Only a `complete` listing says that what is missing is gone."""

    nodes: tuple[Node, ...]
    complete: bool = True


@dataclass(frozen=True)
class TokenSecret:
    """A bootstrap-token Secret of ours.  Times are seconds since the epoch by the cluster's clock."""

    name: str
    uid: str
    version: str
    token: Token
    node_id: str
    pool: str
    created: float
    expires: float  # 0 when unparseable: the API server calls that expired
    first_issued: float
    earlier: frozenset[str] = frozenset()  # uids of CSRs that were not made with this secret half
    unpublished: bool = False
    body: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def live(self, now: float) -> bool:
        """Whether the API server still accepts the token."""
        return now < self.expires


class Join(enum.Enum):
    """How far a node has come with the token of its Secret."""

    NO_CSR = "no CSR"
    DENIED = "CSR denied"
    PENDING = "CSR waits for approval"
    ISSUED = "certificate issued, no Node yet"
    JOINED = "joined"
    UNKNOWN = "unknown"


class Kind(enum.Enum):
    """What a pass does with one node or Secret."""

    ISSUE = "issue"  # create the Secret, then tag the node
    RENEW = "renew"  # a new secret half in the Secret that is there, then tag the node
    PUBLISH = "publish"  # tag the node with the token of its Secret, good for a full TTL
    MARK = "mark"  # mark the tag consumed, since the client said that it has the token
    EXTEND = "extend"  # a later expiration
    FINISH = "finish"  # mark the tag consumed, then delete the Secret
    REVOKE = "revoke"  # delete the Secret
    WAIT = "wait"  # something is under way
    LEAVE = "leave"  # nothing to do


WRITES = frozenset(Kind) - {Kind.WAIT, Kind.LEAVE}


@dataclass(frozen=True)
class Action:
    """One decision of `plan`, with its reason in words."""

    kind: Kind
    node: Node
    secret: TokenSecret | None
    reason: str
    earlier: frozenset[str] = frozenset()  # for a new secret half: see `with_earlier`


@dataclass(frozen=True)
class Policy:
    """The times `plan` decides by, in seconds, and whether it may revoke."""

    ttl: float = 1800.0
    give_up: float = 7200.0
    revoke: bool = True


@dataclass(frozen=True)
class Csr:
    """A kubelet's certificate signing request that was made with a bootstrap token."""

    uid: str
    token_id: str
    state: Join  # PENDING, DENIED or ISSUED
    decided: float  # when it was approved or denied, else when it was made
    node_name: str


@dataclass(frozen=True)
class World:
    """All that one pass has seen.  `joins` is by Secret name; a missing name is `NO_CSR`.

    `csrs` are those of kubelets, for as long as the cluster keeps them (an hour after the decision);
    None when they cannot be seen.
    """

    listing: Listing
    secrets: tuple[TokenSecret, ...]
    joins: Mapping[str, Join]
    csrs: tuple[Csr, ...] | None
    owner: str
    now: float

    @functools.cached_property
    def csrs_of(self) -> Mapping[str, list[Csr]]:
        """The CSRs by token id, so that thousands of nodes do not each look at all of them."""
        return by_token_id(self.csrs or ())


# ---------------------------------------------------------------------------------------------
# Decisions: pure functions, no I/O, no clock, no randomness
# ---------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"([a-z0-9]{6})\.([a-z0-9]{16})")
_TOKEN_ANYWHERE = re.compile(r"([a-z0-9]{6})\.[a-z0-9]{16}")  # also behind an escape: \nabcdef.
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


def parse_token(value: str | None) -> Token | None:
    """A bootstrap token in Kubernetes' format `[a-z0-9]{6}.[a-z0-9]{16}`, or None."""
    match = _TOKEN.fullmatch(value or "")
    return Token(match[1], match[2]) if match else None


def redact(text: str, *known: str) -> str:
    """The text without the secret half of any token in it, and without the values `known`."""
    for value in known:
        text = text.replace(value, "<redacted>") if value else text
    return _TOKEN_ANYWHERE.sub(r"\1.<redacted>", text)


def base36(number: int) -> str:
    """The number in base 36, least significant digit first, so that any prefix is uniform."""
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits += _ALPHABET[digit]
    return digits


def owner_hash(cloud: str, scope: str, tag_name: str, filters: Mapping[str, str]) -> str:
    """The label that sets servers of other clouds, regions, tags or filters apart from this one."""
    text = json.dumps([cloud, scope, tag_name, sorted(filters.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def token_ids(owner: str, node_id: str) -> list[str]:
    """The ids that a node's token may have, the first one first (the others are for collisions)."""
    return [token_id(owner, node_id, n) for n in range(TOKEN_NAMES)]


def token_id(owner: str, node_id: str, n: int) -> str:
    """The n-th of them: six digits in base 36 of a hash."""
    digest = hashlib.sha256(json.dumps([owner, node_id, n]).encode()).digest()
    return base36(int.from_bytes(digest, "big") % 36**6).ljust(6, "0")


def format_time(seconds: float) -> str:
    """RFC 3339 in UTC with whole seconds, the form that Kubernetes writes."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: Any) -> float:
    """Seconds since the epoch of an RFC 3339 time; 0.0, long ago, when it is none."""
    try:
        moment = datetime.fromisoformat(re.sub(r"(\.\d+)?Z$", "+00:00", text))
        return moment.timestamp() if moment.tzinfo else 0.0
    except (TypeError, ValueError, OverflowError):
        return 0.0


_UNITS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3}  # both Unicode mus
_UNITS |= {"s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile("([0-9]+\\.?[0-9]*|\\.[0-9]+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)")


def parse_duration(text: str) -> float:
    """Seconds of a duration as Go writes it: `10s`, `1h30m`, `500ms`.  Raises ValueError."""
    if text == "0":
        return 0.0
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration such as 10s, 1h30m or 500ms")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds >= 2**63 / 1e9:
        raise ValueError(f"{text!r} is longer than Go's durations can be")
    return seconds


def format_duration(seconds: float) -> str:
    """A duration for people, to the second: `1h30m`, `29m59s`, `0s`."""
    whole = max(0, round(seconds))
    parts = [(whole // 3600, "h"), (whole % 3600 // 60, "m"), (whole % 60, "s")]
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"


def plan(world: World, policy: Policy) -> list[Action]:
    """What to do with each node, and with each Secret whose node is gone.

    One action for each node of the listing (the first entry counts when an id comes twice) and one
    for each Secret without one.  The rows are those of the protocol table in README.
    """
    nodes: dict[str, Node] = {}
    for node in world.listing.nodes:
        nodes.setdefault(node.id, node)
    owned = secrets_by_node(world, nodes)
    decided = [decide(node, owned.get(node.id), world, policy) for node in nodes.values()]
    return [with_earlier(action, world) for action in decided] + [
        orphan(secret, world, policy) for node_id, secret in owned.items() if node_id not in nodes
    ]


def with_earlier(action: Action, world: World) -> Action:
    """An action that makes a new secret half, with the CSRs that cannot have been made with it.

    A node's token id stays the same for its life, so when it joins again its CSR is told from those of
    earlier joins by their uids.  One that is not decided yet is no earlier one: a kubelet that starts
    again with the same key goes on waiting for it.
    """
    if action.kind not in (Kind.ISSUE, Kind.RENEW) or not world.csrs:
        return action
    ids = token_ids(world.owner, action.node.id)
    mine = [csr for token_id in ids for csr in world.csrs_of.get(token_id, ())]
    return replace(action, earlier=frozenset(c.uid for c in mine if c.state is not Join.PENDING))


def secrets_by_node(world: World, nodes: Mapping[str, Node]) -> dict[str, TokenSecret]:
    """The Secret that counts for each node.

    There can be two only after another owner's Secret held the first name for a while.  The one in
    use counts: live, in the tag, with a CSR, and last the older one; the other one expires.
    """

    def rank(secret: TokenSecret) -> tuple[bool, bool, bool, float, str]:
        node = nodes.get(secret.node_id)
        join = world.joins.get(secret.name, Join.NO_CSR)
        in_tag = node is not None and node.token == secret.token
        return secret.live(world.now), in_tag, join != Join.NO_CSR, -secret.created, secret.name

    return {secret.node_id: secret for secret in sorted(world.secrets, key=rank)}


def decide(node: Node, secret: TokenSecret | None, world: World, policy: Policy) -> Action:
    """The row of the protocol table that this node is in."""
    if node.gone and secret:
        return orphan(secret, world, policy, node)
    if not node.wanted:
        return Action(Kind.LEAVE, node, secret, f"lifecycle state {node.state}")
    if secret is None or not secret.live(world.now):
        return without_live_secret(node, secret, world, policy)
    join = world.joins.get(secret.name, Join.NO_CSR)
    if join is Join.JOINED:
        return after_join(node, secret, policy)
    if node.consumed and not secret.unpublished:
        return after_consumption(node, secret, join, world.now, policy)
    return before_consumption(node, secret, world.now, policy)


def without_live_secret(
    node: Node, secret: TokenSecret | None, world: World, policy: Policy
) -> Action:
    """No token that works: give one, unless the node has taken one already."""
    in_tag, kind = node.token, Kind.RENEW if secret else Kind.ISSUE
    if in_tag and any(world.now - csr.decided < JUST_JOINED for csr in certified(world, in_tag.id)):
        return Action(Kind.LEAVE, node, secret, "joined just now; its tag may be an old read")
    if node.consumed and node.new_disk and needs_rejoin(node, world):
        return Action(kind, node, secret, "its root volume is being replaced")
    if node.consumed and secret and policy.revoke:
        return Action(Kind.REVOKE, node, secret, "consumed, and expired")
    if node.consumed:
        return Action(Kind.LEAVE, node, secret, "token consumed")
    if in_tag:
        return Action(kind, node, secret, "the token in its tag is no longer live")
    return Action(kind, node, secret, "its tag holds no token" if node.tag else "no token yet")


def needs_rejoin(node: Node, world: World) -> bool:
    """Whether a node with a new disk has yet to join with it.

    Neither its tag nor its state tells a join before the replacement from one after it; a certificate
    within the hour for which CSRs are kept may be either, and giving a token each pass would be worse.
    """
    ids = token_ids(world.owner, node.id)
    return world.csrs is not None and not any(certified(world, token_id) for token_id in ids)


def certified(world: World, token_id: str) -> list[Csr]:
    """The CSRs that were made with a token id and have got their certificate."""
    return [csr for csr in world.csrs_of.get(token_id, ()) if csr.state is Join.ISSUED]


def before_consumption(node: Node, secret: TokenSecret, now: float, policy: Policy) -> Action:
    """The token is live and not yet consumed: see that the node can find it."""
    if secret.unpublished:
        return Action(Kind.PUBLISH, node, secret, "its new token may not be in its tag yet")
    if node.token != secret.token and node.receipt == receipt(secret.token):
        return taken_away(node, secret, now, policy)
    if node.token != secret.token:
        why = "its tag holds another token" if node.token else "its tag lacks the token"
        return Action(Kind.PUBLISH, node, secret, why)
    if node.received:
        return Action(Kind.MARK, node, secret, "its client has taken the token")
    if near_expiry(secret, now, policy):
        return Action(Kind.EXTEND, node, secret, "not consumed, and about to expire")
    return Action(Kind.WAIT, node, secret, "not consumed yet")


def taken_away(node: Node, secret: TokenSecret, now: float, policy: Policy) -> Action:
    """An operator wants a node to join again whose client had taken the token.

    The receipt is still there, and would mark the same half as taken again before it is read.  In the
    half's first minute a client may just have been quicker than the two reads of tag and receipt.
    """
    if now - (secret.expires - policy.ttl) < YOUNG:
        return Action(Kind.WAIT, node, secret, "taken just now; its tag may be an old read")
    return Action(Kind.RENEW, node, secret, "taken before, and its tag was taken away since")


def after_consumption(
    node: Node, secret: TokenSecret, join: Join, now: float, policy: Policy
) -> Action:
    """The client has the token, the kubelet has not joined: keep it alive, within reason."""
    why = f"consumed, {join.value}"
    if join is Join.UNKNOWN:
        return Action(Kind.WAIT, node, secret, "consumed; its join cannot be seen, so it expires")
    if not near_expiry(secret, now, policy):
        return Action(Kind.WAIT, node, secret, why)
    if now - secret.first_issued >= policy.give_up:
        return Action(Kind.WAIT, node, secret, f"{why}; given up, it expires")
    # A kubelet that waits for its certificate does so with this very half: it must not change.
    kind = Kind.EXTEND if join in (Join.PENDING, Join.ISSUED) else Kind.RENEW
    return Action(kind, node, secret, f"{why}, and about to expire")


def after_join(node: Node, secret: TokenSecret, policy: Policy) -> Action:
    """The token has done its work."""
    if node.consumed and policy.revoke:
        return Action(Kind.REVOKE, node, secret, "joined")
    if node.consumed:
        return Action(Kind.LEAVE, node, secret, "joined; its token expires")
    if node.token == secret.token:
        return Action(Kind.FINISH, node, secret, "joined, but not marked as consumed")
    return Action(Kind.RENEW, node, secret, "joined before, and its tag was taken away since")


def orphan(
    secret: TokenSecret, world: World, policy: Policy, node: Node | None = None
) -> Action:
    """A Secret whose node is ending or no longer listed."""
    node = node or Node(secret.node_id, secret.pool, "gone", wanted=False, gone=True)
    if not world.listing.complete:
        return Action(Kind.WAIT, node, secret, "perhaps gone: the listing was not complete")
    if world.now - secret.created < YOUNG:
        return Action(Kind.WAIT, node, secret, "perhaps gone: its Secret is under a minute old")
    if not policy.revoke:
        return Action(Kind.LEAVE, node, secret, "its node is gone; its token expires")
    return Action(Kind.REVOKE, node, secret, "its node is gone")


def near_expiry(secret: TokenSecret, now: float, policy: Policy) -> bool:
    """Under a third of the TTL is left: with passes every few seconds there are many more tries."""
    return secret.expires - now < policy.ttl / 3


def secret_body(
    token: Token, node: Node, owner: str, groups: str, earlier: Iterable[str], now: float, ttl: float
) -> dict[str, Any]:
    """The Secret of a new token, as `kubeadm token create` would make it, and ours by its labels."""
    notes = {NOTE_NODE: node.id, NOTE_POOL: node.pool}
    notes |= {NOTE_FIRST: format_time(now), NOTE_EARLIER: ",".join(sorted(earlier))}
    if node.consumed:
        notes[NOTE_UNPUBLISHED] = "true"
    data = {
        "token-id": token.id,
        "token-secret": token.secret,
        "expiration": format_time(now + ttl),
        "description": f"keto-tokens: {node.id} of {node.pool}",
        "usage-bootstrap-authentication": "true",
        "usage-bootstrap-signing": "true",
        "auth-extra-groups": groups,
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": SECRET_TYPE,
        "metadata": {
            "name": SECRET_PREFIX + token.id,
            "labels": {LABEL_MANAGED: "keto-tokens", LABEL_OWNER: owner},
            "annotations": notes,
        },
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
    }


def changed_body(
    secret: TokenSecret, data: Mapping[str, str], notes: Mapping[str, str | None]
) -> dict[str, Any]:
    """The Secret with some of its data and annotations changed, and all else as it was read.

    A note of None is taken away.  The resourceVersion goes along, so that the update is refused
    when somebody else has written in between.
    """
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    metadata = dict(secret.body["metadata"])
    merged = {**metadata.get("annotations", {}), **notes}
    metadata["annotations"] = {key: value for key, value in merged.items() if value is not None}
    metadata.pop("managedFields", None)
    changed = {**secret.body, "apiVersion": "v1", "kind": "Secret", "metadata": metadata}
    return {**changed, "data": {**secret.body["data"], **encoded}}


def parse_secret(body: Mapping[str, Any], owner: str) -> TokenSecret | None:
    """The record of a Secret, or None when it is not one of ours, whatever its labels say."""
    try:
        metadata, data = body["metadata"], body["data"]
        labels, notes = metadata.get("labels", {}), metadata.get("annotations", {})
        token = parse_token(f"{_decode(data['token-id'])}.{_decode(data['token-secret'])}")
        if token is None:
            return None
        node_id = notes[NOTE_NODE]
        created = parse_time(metadata["creationTimestamp"])
        ours = (
            body.get("type") == SECRET_TYPE
            and (labels.get(LABEL_MANAGED), labels.get(LABEL_OWNER)) == ("keto-tokens", owner)
            and metadata["name"] == SECRET_PREFIX + token.id
            and any(token.id == token_id(owner, node_id, n) for n in range(TOKEN_NAMES))
        )
        return TokenSecret(
            name=metadata["name"],
            uid=metadata["uid"],
            version=metadata["resourceVersion"],
            token=token,
            node_id=node_id,
            pool=notes.get(NOTE_POOL, ""),
            created=created,
            expires=parse_time(_decode(data.get("expiration", ""))),
            first_issued=parse_time(notes.get(NOTE_FIRST)) or created,
            earlier=frozenset(filter(None, notes.get(NOTE_EARLIER, "").split(","))),
            unpublished=NOTE_UNPUBLISHED in notes,
            body=body,
        ) if ours else None
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _decode(text: str) -> str:
    return base64.b64decode(text, validate=True).decode()


def parse_csr(body: Mapping[str, Any]) -> Csr | None:
    """The record of a CSR, or None when no bootstrap token made it."""
    try:
        spec, status = body["spec"], body.get("status", {})
        user = re.fullmatch(r"system:bootstrap:([a-z0-9]{6})", spec["username"])
        if spec["signerName"] != SIGNER or not user:
            return None
        conditions = status.get("conditions") or []
        times = [parse_time(condition.get("lastUpdateTime")) for condition in conditions]
        types = {condition.get("type") for condition in conditions}
        state = Join.DENIED if types & {"Denied", "Failed"} else Join.PENDING
        return Csr(
            uid=str(body["metadata"]["uid"]),
            token_id=user[1],
            state=Join.ISSUED if status.get("certificate") else state,
            decided=max([*times, parse_time(body["metadata"]["creationTimestamp"])]),
            node_name=requested_node(spec["request"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def der_items(data: bytes) -> list[tuple[int, bytes, bytes]]:
    """The elements of a DER content in order: (tag, content, whole).  Raises ValueError.

    Enough of X.690 for certificates and their requests, and strict: OpenSSL also reads BER, and a
    certificate that the two of us take apart differently could pass for another one.  So tags are of
    one byte, and lengths are definite and of the shortest form.
    """
    items, at = [], 0
    while at < len(data):
        head, length = at + 2, int.from_bytes(data[at + 1 : at + 2], "big")
        if length > 0x7F:
            head += length & 0x7F
            octets, length = data[at + 2 : head], int.from_bytes(data[at + 2 : head], "big")
            if length < 0x80 or octets[0] == 0 or len(octets) > 4:
                raise ValueError("a length that is not DER")
        if head + length > len(data) or data[at] & 0x1F == 0x1F:
            raise ValueError("DER that ends early, or has a long tag")
        items.append((data[at], data[head : head + length], data[at : head + length]))
        at = head + length
    return items


def der_path(data: bytes, *path: int) -> tuple[int, bytes, bytes]:
    """The element that is reached by taking the n-th of each level.  Raises ValueError."""
    item = (0, data, data)
    for index in path:
        items = der_items(item[1])
        if index >= len(items):
            raise ValueError("DER of another structure")
        item = items[index]
    return item


def seen_since(node: Mapping[str, Any], moment: float) -> bool:
    """Whether a Node was made, or its kubelet reported its status, at a moment or after it.

    A Node of the same name may be left from an earlier join, or from an instance that had the same
    address: that it is there says nothing of a certificate that is newer.
    """
    try:
        conditions = node.get("status", {}).get("conditions") or []
        times = [condition.get("lastHeartbeatTime") for condition in conditions]
        return any(parse_time(t) >= moment for t in [node["metadata"]["creationTimestamp"], *times])
    except (KeyError, TypeError, AttributeError):
        return False


def requested_node(request: str) -> str:
    """The node name in a CSR (base64 of PEM of PKCS#10): its subject's CN is `system:node:NAME`.

    RFC 2986: CertificationRequest > CertificationRequestInfo > (version, subject, ...).  Raises
    ValueError when there is none.
    """
    pem = base64.b64decode(request).decode()
    der = base64.b64decode("".join(pem.partition("REQUEST-----")[2].partition("-----")[0].split()))
    for _, rdn, _ in der_items(der_path(der, 0, 0, 1)[1]):
        (_, name, _), (_, value, _) = der_items(der_path(rdn, 0)[1])
        if name == b"\x55\x04\x03":  # 2.5.4.3, commonName
            return value.decode().removeprefix("system:node:")
    raise ValueError("a subject without a CN")


def certificates(pem: str) -> list[str]:
    """The certificates in a PEM text, each as PEM."""
    return re.findall(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", pem, re.DOTALL)


def public_key_hash(certificate: str) -> str:
    """kubeadm's pin of a certificate (PEM): `sha256:` and the hex of SHA-256 over the DER of its
    SubjectPublicKeyInfo.  Raises ValueError.

    RFC 5280: Certificate > TBSCertificate > ([0] version), serial, signature, issuer, validity,
    subject, subjectPublicKeyInfo.
    """
    import ssl

    top = der_items(ssl.PEM_cert_to_DER_cert(certificate))
    fields = der_items(der_path(top[0][1], 0)[1]) if len(top) == 1 else []
    body = fields[1:] if fields and fields[0][2] == b"\xa0\x03\x02\x01\x02" else fields  # version 3
    if [tag for tag, _, _ in body[:6]] != [0x02, 0x30, 0x30, 0x30, 0x30, 0x30]:
        raise ValueError("not the structure of a certificate")
    return "sha256:" + hashlib.sha256(body[5][2]).hexdigest()


def signature(token: Token, content: str) -> str:
    """The JWS that the cluster's bootstrapsigner makes of cluster-info with a token, content detached.

    Kubernetes' bootstrap token design; RFC 7515, HS256 with the unencoded id as `kid`.
    """
    header = _b64url(json.dumps({"alg": "HS256", "kid": token.id}, separators=(",", ":")).encode())
    text = f"{header}.{_b64url(content.encode())}".encode()
    return f"{header}..{_b64url(hmac.new(token.secret.encode(), text, hashlib.sha256).digest())}"


def receipt(token: Token) -> str:
    """What a client leaves where it cannot write the tag: it tells which token it took, and only that.

    A token's id outlives its secret half, so the id alone would also be a receipt for the next half.
    """
    return hmac.new(token.secret.encode(), f"{token.id} consumed".encode(), hashlib.sha256).hexdigest()


def _b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def by_token_id(csrs: Iterable[Csr]) -> dict[str, list[Csr]]:
    """The CSRs by the id of the token that made them."""
    found: dict[str, list[Csr]] = {}
    for csr in csrs:
        found.setdefault(csr.token_id, []).append(csr)
    return found


def latest_csr(secret: TokenSecret, csrs: Iterable[Csr]) -> Csr | None:
    """The CSR that tells how far the node came with *this* half of its token, None when none does."""
    order = [Join.DENIED, Join.PENDING, Join.ISSUED]
    mine = [
        csr
        for csr in csrs
        if csr.token_id == secret.token.id
        and csr.uid not in secret.earlier
        # A plan that is carried out late knows no CSR that was decided since.
        and (csr.state is Join.PENDING or csr.decided >= secret.created)
    ]
    return max(mine, key=lambda csr: order.index(csr.state), default=None)


# ---------------------------------------------------------------------------------------------
# HTTP: one funnel, with timeouts, a size limit and no redirects
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An HTTP answer, read whole."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


class Calls:
    """Counts the calls made, by service, operation and code, from any thread.

    A code is an HTTP status or the error code of an API, "none" when no answer came.  `observer` is
    told of each call as well.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.observer: Callable[[str, str, str], None] = lambda service, operation, code: None

    def add(self, service: str, operation: str, code: str) -> None:
        """Count one call."""
        with self._lock:
            self._counts[service, operation, code] += 1
        self.observer(service, operation, code)

    def take(self) -> collections.Counter[tuple[str, str, str]]:
        """The counts since the last `take`."""
        with self._lock:
            counts, self._counts = self._counts, collections.Counter()
        return counts


def send(
    pool: Any,
    what: str,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    body: bytes | None = None,
    timeouts: tuple[float, float],
    limit: int = OBJECT_LIMIT,
) -> Reply:
    """One HTTP request.  `pool` is a urllib3 pool manager, `timeouts` are (connect, read) seconds.

    Raises CallFailed (`again` set) for whatever keeps an answer from arriving whole, SetupError when
    there is nobody to answer or it is somebody else.
    """
    import urllib3

    try:
        response = pool.request(
            method, url, headers=dict(headers), body=body, retries=False, redirect=False,
            timeout=urllib3.Timeout(connect=timeouts[0], read=timeouts[1]), preload_content=False,
        )
        with contextlib.closing(response):
            content = read_limited(response, what, limit, timeouts[1])
            response.release_conn()
        return Reply(response.status, response.headers, content)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise transport_error(what, error) from None


def read_limited(response: Any, what: str, limit: int, seconds: float) -> bytes:
    """The body, unless it is larger than `limit` bytes or trickles in for longer than `seconds`."""
    content, deadline = bytearray(), time.monotonic() + seconds
    while chunk := response.read1(65536):
        content += chunk
        if len(content) > limit:
            raise CallFailed(f"{what}: the answer is larger than {limit} bytes", again=False)
        if time.monotonic() > deadline:
            raise CallFailed(f"{what}: the answer took longer than {seconds:g} s", again=True)
    return bytes(content)


def transport_error(what: str, error: Exception) -> KetoError:
    """The sentence for a request that got no whole answer."""
    from urllib3 import exceptions

    text = re.sub(r"^HTTPS?Connection\w*\(.*?\): |\s*\(_ssl\.c:\d+\)", "", redact(str(error)))
    if isinstance(error, exceptions.SSLError) and "CERTIFICATE_VERIFY_FAILED" in text:
        return Untrusted(f"{what}: the server's certificate is not trusted: {text}")
    if isinstance(error, exceptions.ReadTimeoutError):
        return CallFailed(f"{what}: no answer in time", again=True)
    nobody = (exceptions.ConnectTimeoutError, exceptions.NewConnectionError, exceptions.ProxyError)
    if isinstance(error, nobody):
        return Unreachable(f"{what}: cannot connect: {text}")
    return CallFailed(f"{what}: the connection broke: {text}", again=True)


def retrying(call: Callable[[], Any], sleep: Callable[[float], Any], attempts: int) -> Any:
    """What `call` returns, tried again while it fails with `again`, with backoff and jitter."""
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except KetoError as error:
            if not error.again or attempt == attempts:
                raise
            sleep(backoff(attempt, error.after, random.uniform(0.5, 1.0)))
    raise AssertionError("unreachable")


def backoff(attempt: int, after: float, jitter: float) -> float:
    """Seconds to wait after the n-th failure, `after` at least when the other side asked for that."""
    return min(10.0, max(after, jitter * 0.5 * 2.0**attempt))


# ---------------------------------------------------------------------------------------------
# Kubernetes: how to reach a cluster.  A credential is asked for at every request and never kept:
# files are rotated under us, exec plugins hand out tokens that expire.
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Credential:
    """What proves who we are: a bearer token, or a client certificate with its key (PEM), or both."""

    token: str = field(default="", repr=False)
    certificate: str = field(default="", repr=False)
    key: str = field(default="", repr=False)


CredentialSource = Callable[[bool], Credential]  # the argument: the last one was refused


@dataclass(frozen=True)
class Access:
    """Where a cluster is and how to be trusted by it.  `ca` is PEM text, "" for the system's."""

    server: str
    origin: str  # where all this was found, for messages
    ca: str = field(default="", repr=False)
    insecure: bool = False
    server_name: str = ""  # the name in its certificate, when it is not the one in `server`
    proxy: str = ""
    credential: CredentialSource = field(default=lambda refused: Credential(), repr=False)


def read_text(path: str | Path, what: str) -> str:
    """The text of a file; SetupError names `what` it was to hold."""
    try:
        return Path(path).read_text()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SetupError(f"cannot read {what} from {path}: {reason}") from None


def read_ca(path: str) -> str:
    """The PEM certificates in a file, checked to be some."""
    return checked_ca(read_text(path, "the cluster's CA"), path)


def checked_ca(pem: str, origin: str) -> str:
    """The certificates in the text, without what else is in it, when OpenSSL can read them."""
    import ssl

    found = "".join(certificates(pem))
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found)
        return found
    except (ssl.SSLError, ValueError, TypeError):
        raise SetupError(f"{origin} holds no certificate in PEM form") from None


def bearer(text: str, origin: str) -> str:
    """A bearer token without white space around it; SetupError when it cannot be one."""
    token = text.strip()
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise SetupError(f"{origin}: {'no bearer token' if token else 'empty'}")
    return token


def static_token(token: str) -> CredentialSource:
    """A token that was given as such."""
    checked = bearer(token, "the bearer token that was given")
    return lambda refused: Credential(token=checked)


def token_file(path: str | Path) -> CredentialSource:
    """A token in a file that may change at any time, as a pod's service account token does."""
    return lambda refused: Credential(token=bearer(read_text(path, "a bearer token"), str(path)))


def in_cluster(environ: Mapping[str, str], folder: str) -> Access:
    """Access for a pod, from its environment and the service account mounted at `folder`."""
    host, port = environ["KUBERNETES_SERVICE_HOST"], environ.get("KUBERNETES_SERVICE_PORT", "443")
    host = f"[{host}]" if ":" in host else host
    return Access(
        server=f"https://{host}:{port}",
        origin=f"the pod's service account in {folder}",
        ca=read_ca(f"{folder}/ca.crt"),
        credential=token_file(f"{folder}/token"),
    )


_REQUIRED: Any = object()
_YAML_NAMES = {str: "string", dict: "mapping", list: "list", bool: "true or false"}


class Kubeconfig:
    """A kubeconfig file.  Whatever is wrong in it is a SetupError that names the file and the field."""

    def __init__(self, path: str):
        import yaml

        self.path = Path(os.path.expanduser(path)).absolute()
        try:
            self.content = yaml.safe_load(read_text(self.path, "a kubeconfig")) or {}
        except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f" (line {mark.line + 1})" if mark else ""
            raise SetupError(f"kubeconfig {path} is not YAML{where}") from None

    def wrong(self, where: str, problem: str) -> NoReturn:
        """Raise the error for one field."""
        raise SetupError(f"kubeconfig {self.path}: {where}: {problem}")

    def get(self, holder: Any, where: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The last field of the dotted `where` in `holder`; without a default it has to be there."""
        if not isinstance(holder, dict):
            self.wrong(where.rpartition(".")[0] or "its content", "is not a mapping")
        value = holder.get(where.rpartition(".")[2])
        if value in (None, "") and default is not _REQUIRED:
            return default
        if value in (None, ""):
            self.wrong(where, "is missing")
        if not isinstance(value, kind):
            self.wrong(where, f"is not a {_YAML_NAMES[kind]}")
        return value

    def named(self, kind: str, name: str) -> tuple[Any, str]:
        """The entry `name` of clusters, users or contexts, and its place for messages."""
        for entry in self.get(self.content, kind, list, []):
            if isinstance(entry, dict) and entry.get("name") == name:
                where = f"{kind}[{name}].{kind[:-1]}"
                return self.get(entry, where, dict, {}), where
        return self.wrong(kind, f"there is no {name!r}")

    def text(self, holder: Any, where: str, key: str) -> str:
        """PEM text that stands in the file as `KEY-data` or in another file named by `KEY`."""
        embedded = self.get(holder, f"{where}.{key}-data", str, "")
        path = self.get(holder, f"{where}.{key}", str, "")
        if not embedded:
            return read_text(self.path.parent / path, f"{where}.{key}") if path else ""
        try:
            return _decode(embedded)
        except ValueError:
            return self.wrong(f"{where}.{key}-data", "is not base64")

    def access(self, context: str = "") -> Access:
        """Access by the named context, or by the current one."""
        name = context or self.get(self.content, "current-context", str)
        entry, where = self.named("contexts", name)
        cluster, at = self.named("clusters", self.get(entry, f"{where}.cluster", str))
        user = self.get(entry, f"{where}.user", str, "")
        ca = self.text(cluster, at, "certificate-authority")
        return Access(
            server=self.get(cluster, f"{at}.server", str),
            origin=f"kubeconfig {self.path}, context {name}",
            ca=checked_ca(ca, f"kubeconfig {self.path}: {at}.certificate-authority") if ca else "",
            insecure=self.get(cluster, f"{at}.insecure-skip-tls-verify", bool, False),
            server_name=self.get(cluster, f"{at}.tls-server-name", str, ""),
            proxy=self.get(cluster, f"{at}.proxy-url", str, ""),
            credential=self.credential(user, cluster, at) if user else Access.credential,
        )

    def credential(self, name: str, cluster: Mapping[str, Any], at: str) -> CredentialSource:
        """The source of the named user's credential, tried once so that a bad file is told now."""
        user, where = self.named("users", name)
        for key in ("auth-provider", "username", "password", "as"):
            if user.get(key):
                self.wrong(f"{where}.{key}", "not supported; use a token, a certificate or exec")
        if user.get("exec"):
            return ExecPlugin(self, user, f"{where}.exec", self.exec_cluster(cluster, at))
        path = self.get(user, f"{where}.tokenFile", str, "")
        token = self.get(user, f"{where}.token", str, "")

        def source(refused: bool) -> Credential:
            place = f"{where}.tokenFile"
            from_file = path and bearer(
                read_text(self.path.parent / path, place), f"kubeconfig {self.path}: {place}"
            )
            certificate = self.text(user, where, "client-certificate")
            key = self.text(user, where, "client-key")
            if bool(certificate) != bool(key):
                self.wrong(where, "client-certificate and client-key go together")
            given = token and bearer(token, f"kubeconfig {self.path}: {where}.token")
            return Credential(from_file or given, certificate, key)

        source(False)
        return source

    def exec_cluster(self, cluster: Mapping[str, Any], at: str) -> dict[str, Any]:
        """What a plugin is told of the cluster, as client-go tells it."""
        names = ("server", "tls-server-name", "insecure-skip-tls-verify", "proxy-url")
        told = {name: cluster[name] for name in names if cluster.get(name)}
        ca = self.text(cluster, at, "certificate-authority")
        if ca:
            told["certificate-authority-data"] = base64.b64encode(ca.encode()).decode()
        for extension in self.get(cluster, f"{at}.extensions", list, []):
            if isinstance(extension, dict) and extension.get("name") == EXEC_EXTENSION:
                told["config"] = extension.get("extension")
        return told


EXEC_EXTENSION = "client.authentication.k8s.io/exec"


class ExecPlugin:
    """A credential from a command: client.authentication.k8s.io/v1 and v1beta1.

    What the command printed is kept until its expirationTimestamp, or until it was refused.
    """

    def __init__(self, config: Kubeconfig, user: Any, where: str, cluster: Mapping[str, Any]):
        spec = config.get(user, where, dict)
        self.version = config.get(spec, f"{where}.apiVersion", str)
        if self.version not in (f"client.authentication.k8s.io/{v}" for v in ("v1", "v1beta1")):
            config.wrong(f"{where}.apiVersion", f"{self.version} is neither v1 nor v1beta1")
        if config.get(spec, f"{where}.interactiveMode", str, "IfAvailable") == "Always":
            config.wrong(f"{where}.interactiveMode", "nobody is here to answer")
        command = config.get(spec, f"{where}.command", str)
        self.path = str(config.path.parent / command) if "/" in command else command
        self.argv = [self.path, *map(str, config.get(spec, f"{where}.args", list, []))]
        self.hint = config.get(spec, f"{where}.installHint", str, "")
        self.where = f"kubeconfig {config.path}: {where}"
        pairs = config.get(spec, f"{where}.env", list, [])
        self.env = {
            config.get(pair, f"{where}.env.name", str): config.get(pair, f"{where}.env.value", str, "")
            for pair in pairs
        }
        told: dict[str, Any] = {"interactive": False}
        if spec.get("provideClusterInfo"):
            told["cluster"] = cluster
        self.info = json.dumps({"apiVersion": self.version, "kind": "ExecCredential", "spec": told})
        self._lock = threading.Lock()
        self._kept: tuple[float, Credential] | None = None

    def __call__(self, refused: bool) -> Credential:
        """The credential, from the command when the kept one is out of date or was refused."""
        with self._lock:
            if refused or self._kept is None or self._kept[0] <= time.time():
                self._kept = self._parse(self._run())
            return self._kept[1]

    def _run(self) -> str:
        import subprocess

        env = {**os.environ, **self.env, "KUBERNETES_EXEC_INFO": self.info}
        try:
            done = subprocess.run(
                self.argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=60, check=True,
            )
            return done.stdout
        except subprocess.CalledProcessError as error:
            last = redact((error.stderr or "").strip().rpartition("\n")[2])[:300]
            problem = f"exit status {error.returncode}: {last}".rstrip(": ")
        except subprocess.TimeoutExpired:
            problem = "no answer in 60 s"
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "its output is not text"
            problem = f"{reason}. {self.hint}".rstrip(". ")
        raise SetupError(f"{self.where}: running {self.path}: {problem}")

    def _parse(self, output: str) -> tuple[float, Credential]:
        try:
            body = json.loads(output)
            status = body["status"]
            token, certificate, key = (
                status.get(name) or "" for name in ("token", "clientCertificateData", "clientKeyData")
            )
            usable = (token or certificate) and bool(certificate) == bool(key)
            if body["apiVersion"] != self.version or not usable:
                raise ValueError
            credential = Credential(token and bearer(token, self.where), certificate, key)
            expiry = status.get("expirationTimestamp")
            return (parse_time(expiry) if expiry else float("inf")), credential
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise SetupError(
                f"{self.where}: {self.path} printed no ExecCredential of {self.version} "
                "with a token, or a certificate and its key"
            ) from None


def tls_context(access: Access, credential: Credential) -> ssl.SSLContext:
    """TLS as `access` asks for it.

    Not ssl.create_default_context: from Python 3.13 on it refuses CAs without a key identifier, as
    many clusters have them.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if access.insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif access.ca:
        context.load_verify_locations(cadata=access.ca)
    else:
        context.load_default_certs()
    if credential.certificate:
        load_client_certificate(context, credential, access.origin)
    return context


def load_client_certificate(context: ssl.SSLContext, credential: Credential, origin: str) -> None:
    """Give the context a certificate that is not in a file: the ssl module reads only files."""
    import ssl
    import tempfile

    if hasattr(os, "memfd_create"):  # memory that has a path: the key never comes near a disk
        descriptor = os.memfd_create("client-certificate")
        path = f"/proc/self/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp()
    try:
        with open(descriptor, "w") as file:
            file.write(f"{credential.certificate}\n{credential.key}\n")
            file.flush()
            context.load_cert_chain(path, password="")
    except (ssl.SSLError, OSError):
        raise SetupError(f"{origin}: the client certificate and key are no usable pair") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def proxy_for(server: str, environ: Mapping[str, str]) -> str:
    """The proxy that the environment names for a server, "" for none.

    As curl and kubectl do it: HTTPS_PROXY and NO_PROXY in either case; names, domains, addresses
    and CIDR blocks in NO_PROXY; never for the loopback.
    """
    import ipaddress
    import urllib.request

    url = urllib.parse.urlsplit(server)
    variable = f"{url.scheme}_proxy"
    proxy = environ.get(variable) or environ.get(variable.upper()) or ""
    host = url.hostname or ""
    skip = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        blocks = [part.strip() for part in skip.split(",")]
        if address.is_loopback or any(_in_block(address, block) for block in blocks):
            return ""
    bypass = urllib.request.proxy_bypass_environment(host, {"no": skip})  # type: ignore[attr-defined]
    return "" if host == "localhost" or bypass else proxy


def _in_block(address: Any, block: str) -> bool:
    import ipaddress

    try:
        return address in ipaddress.ip_network(block, strict=False)
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    import ipaddress

    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_pool(access: Access, certificate: Credential) -> Any:
    """A urllib3 pool manager for a server, through a proxy where there is one."""
    import urllib3

    if access.insecure:
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    options: dict[str, Any] = {"maxsize": CONNECTIONS}
    if access.server.startswith("https:"):
        options["ssl_context"] = tls_context(access, certificate)
    if access.server_name and not access.insecure:
        options |= {"server_hostname": access.server_name}
    proxy = access.proxy or proxy_for(access.server, os.environ)
    if not proxy:
        return urllib3.PoolManager(**options)
    try:
        url = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
        user = urllib.parse.unquote(url.auth or "")
        headers = urllib3.make_headers(proxy_basic_auth=user) if user else None
        return urllib3.ProxyManager(url._replace(auth=None).url, proxy_headers=headers, **options)
    except (urllib3.exceptions.HTTPError, ValueError):
        shown = proxy.rpartition("@")[2]
        raise SetupError(f"{access.origin}: {shown!r} is no proxy of type http or https") from None


class Cluster:
    """A thin client of the Kubernetes API: what it sends is JSON, what it returns is JSON.

    It keeps the cluster's clock: every answer has a Date, and `now` counts on from the last one, so
    that our own clock may be wrong, or be set, without a token being born expired.
    """

    def __init__(self, access: Access, calls: Calls, sleep: Callable[[float], Any] = time.sleep):
        self.access, self._calls, self._sleep = access, calls, sleep
        url = urllib.parse.urlsplit(access.server)
        self._base = access.server.rstrip("/")
        self._where = f"{url.hostname}:{url.port or 443}"
        self._lock = threading.Lock()
        self._pool: tuple[Credential, Any] | None = None
        self._clock: float | None = None  # cluster time minus time.monotonic()

    def now(self) -> float:
        """Seconds since the epoch by the cluster's clock; by ours before its first answer."""
        return time.time() if self._clock is None else self._clock + time.monotonic()

    def skew(self) -> float:
        """Seconds by which our clock is ahead of the cluster's."""
        return time.time() - self.now()

    def request(
        self, method: str, path: str, body: Any = None, *, limit: int = OBJECT_LIMIT,
        attempts: int = ATTEMPTS, hide: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The JSON object that a request returns.

        `path` carries the query; `hide` are secrets in the body that no message may repeat.  Raises
        CallFailed with the status for any answer that is not 2xx or not JSON, SetupError for 401.
        """
        what = f"{method} {path.partition('?')[0]} at {self._where}"
        content = None if body is None else json.dumps(body).encode()

        def once() -> dict[str, Any]:
            reply, bearer = self._send(what, method, path, content, limit)
            return checked(what, reply, self.access.origin, [*hide, bearer])

        result: dict[str, Any] = retrying(once, self._sleep, attempts)
        return result

    def _send(
        self, what: str, method: str, path: str, content: bytes | None, limit: int,
        refused: bool = False,
    ) -> tuple[Reply, str]:
        """The answer and the bearer token; a plugin whose token is refused is asked for another."""
        credential = self.access.credential(refused)
        headers = {"Accept": "application/json", "User-Agent": f"keto-tokens/{__version__}"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        if credential.token:
            headers["Authorization"] = f"Bearer {credential.token}"
        pool, code = self._pool_for(replace(credential, token="")), "none"
        try:
            reply = send(
                pool, what, method, self._base + path, headers=headers, body=content,
                timeouts=TIMEOUTS, limit=limit,
            )
            code = str(reply.status)
        except Untrusted as error:
            if "mismatch" not in str(error):
                raise
            raise Untrusted(f"{error}; it is for {certificate_names(self.access)}") from None
        finally:
            self._calls.add("kubernetes", f"{method} {resource_of(path)}", code)
        self._set_clock(reply.headers.get("Date"))
        if reply.status == 401 and isinstance(self.access.credential, ExecPlugin) and not refused:
            return self._send(what, method, path, content, limit, refused=True)
        return reply, credential.token

    def _set_clock(self, date: str | None) -> None:
        import email.utils

        with contextlib.suppress(ValueError, TypeError, OverflowError):
            moment = email.utils.parsedate_to_datetime(date or "").timestamp()
            self._clock = moment - time.monotonic()

    def _pool_for(self, certificate: Credential) -> Any:
        """The connections for a client certificate; new ones when it has changed."""
        with self._lock:
            if self._pool is None or self._pool[0] != certificate:
                self._pool = certificate, new_pool(self.access, certificate)
            return self._pool[1]

    def list(self, path: str, query: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Every object of a collection, page by page."""
        more = ""
        for _ in range(PAGES):
            token = {"continue": more} if more else {}
            text = urllib.parse.urlencode({**query, "limit": str(PAGE), **token})
            page = self.request("GET", f"{path}?{text}", limit=LIST_LIMIT)
            items, metadata = page.get("items"), page.get("metadata")
            whole = isinstance(items, list) and all(isinstance(item, dict) for item in items)
            if not whole or not isinstance(metadata, dict):
                raise CallFailed(f"GET {path} at {self._where}: the answer is no list")
            yield from items or ()
            more = metadata.get("continue") or ""
            if not more:
                return
        raise CallFailed(f"GET {path} at {self._where}: the list has no end after {PAGES} pages")


def checked(what: str, reply: Reply, origin: str, hide: Sequence[str]) -> dict[str, Any]:
    """The JSON object in an answer of the API server, or the error that it stands for."""
    body = json_of(reply)
    if isinstance(body, dict) and 200 <= reply.status < 300:
        return body
    if 200 <= reply.status < 300:
        raise CallFailed(f"{what}: the answer ({len(reply.body)} bytes) is not JSON", again=True)
    kind = str(reply.headers.get("Content-Type", "no type")).partition(";")[0]
    text = body.get("message") if isinstance(body, dict) else None
    message = redact(str(text or f"{len(reply.body)} bytes of {kind}"), *hide)[:500]
    if reply.status == 401:
        raise Refused(f"{what}: 401: the cluster does not know the credential of {origin}")
    if reply.status == 403:
        message += " (the rules that are needed are in README, under Rights)"
    if reply.status == 409:
        raise Superseded(f"{what}: 409: {message}", status=409)
    again = reply.status == 429 or reply.status >= 500
    after = parse_retry_after(reply.headers.get("Retry-After"))
    raise CallFailed(
        f"{what}: {reply.status}: {message}", status=reply.status, again=again, after=after
    )


def json_of(reply: Reply) -> Any:
    """The JSON in an answer, None when there is none."""
    try:
        return json.loads(reply.body)
    except (ValueError, RecursionError):
        return None


def resource_of(path: str) -> str:
    """The kind of thing that a path of the API is about: `secrets`, `leases`, `version`."""
    rest = re.sub(r"^/(api/[^/]+|apis/[^/]+/[^/]+)(/namespaces/[^/]+)?", "", path.partition("?")[0])
    return rest.split("/")[1]


def dig(body: Any, *keys: str) -> Any:
    """What is at a place in nested mappings, None when there is no such place."""
    for key in keys:
        body = body.get(key) if isinstance(body, dict) else None
    return body


def dig_list(body: Any, *keys: str) -> list[Any]:
    """The list at a place in nested mappings, [] when there is none."""
    found = dig(body, *keys)
    return found if isinstance(found, list) else []


def parse_retry_after(text: str | None) -> float:
    """Seconds of a Retry-After header; 0 for none, or for one that is a date."""
    return float(text) if text and text.isascii() and text.isdigit() else 0.0


class TokenStore:
    """The bootstrap tokens of one owner: Secrets in a namespace of the cluster.

    Every write is safe to lose and to repeat.  A create that finds the name taken looks whose it
    is; an update carries the resourceVersion that was read, a delete that and the uid.
    """

    def __init__(self, cluster: Cluster, owner: str, *, namespace: str, groups: str, ttl: float):
        self.cluster, self.owner, self.groups, self.ttl = cluster, owner, groups, ttl
        self._path = f"/api/v1/namespaces/{namespace}/secrets"

    def list(self) -> tuple[TokenSecret, ...]:
        """Our Secrets, in a page or more."""
        labels = f"{LABEL_MANAGED}=keto-tokens,{LABEL_OWNER}={self.owner}"
        query = {"labelSelector": labels, "fieldSelector": f"type={SECRET_TYPE}"}
        bodies = self.cluster.list(self._path, query)
        records = (parse_secret({"type": SECRET_TYPE, **body}, self.owner) for body in bodies)
        return tuple(record for record in records if record)

    def issue(self, node: Node, earlier: frozenset[str]) -> TokenSecret:
        """The live Secret of a node, made now unless another server has just made it."""
        for token_id in token_ids(self.owner, node.id):
            token = Token(token_id, new_secret())
            secret = self._create(token, node, earlier) or self._get(token_id)
            if secret and secret.node_id == node.id:
                live = secret.live(self.cluster.now())
                return secret if live else self.renew(secret, node, earlier)
        raise CallFailed(f"all {TOKEN_NAMES} names for the token of {node.id} belong to others")

    def renew(self, secret: TokenSecret, node: Node, earlier: frozenset[str]) -> TokenSecret:
        """The Secret with a new half and a full TTL.

        A node that has consumed the old half keeps its first-issued time, by which we give up some
        day.  Its tag says `Success` whether or not it was overwritten since, so the Secret says that
        the new half is not published yet.
        """
        token, now = Token(secret.token.id, new_secret()), self.cluster.now()
        notes = {NOTE_EARLIER: ",".join(sorted(earlier))}
        if node.consumed:
            notes[NOTE_UNPUBLISHED] = "true"
        else:
            notes[NOTE_FIRST] = format_time(now)
        data = {"token-secret": token.secret, "expiration": format_time(now + self.ttl)}
        return self._put(secret, data, notes)

    def extend(self, secret: TokenSecret) -> TokenSecret:
        """The Secret with a full TTL from now."""
        return self._put(secret, {"expiration": format_time(self.cluster.now() + self.ttl)}, {})

    def published(self, secret: TokenSecret) -> None:
        """Note that the tag shows this half of the token."""
        if secret.unpublished:
            self._put(secret, {}, {NOTE_UNPUBLISHED: None})

    def revoke(self, secret: TokenSecret) -> None:
        """Delete the Secret as it was read; its being gone already is as good."""
        conditions = {"uid": secret.uid, "resourceVersion": secret.version}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": conditions}
        with contextlib.suppress(_Missing):
            self._call("DELETE", f"{self._path}/{secret.name}", body)

    def _create(self, token: Token, node: Node, earlier: frozenset[str]) -> TokenSecret | None:
        now = self.cluster.now()
        body = secret_body(token, node, self.owner, self.groups, earlier, now, self.ttl)
        with contextlib.suppress(Superseded):
            return self._record(self._call("POST", self._path, body))
        return None

    def _get(self, token_id: str) -> TokenSecret | None:
        try:
            body = self._call("GET", f"{self._path}/{SECRET_PREFIX}{token_id}")
        except _Missing:
            raise Superseded(f"the Secret of token id {token_id} was deleted meanwhile") from None
        return parse_secret(body, self.owner)

    def _put(
        self, secret: TokenSecret, data: Mapping[str, str], notes: Mapping[str, str | None]
    ) -> TokenSecret:
        body = changed_body(secret, data, notes)
        try:
            return self._record(self._call("PUT", f"{self._path}/{secret.name}", body))
        except _Missing:
            raise Superseded(f"the Secret {secret.name} was deleted meanwhile") from None

    def _record(self, body: Mapping[str, Any]) -> TokenSecret:
        record = parse_secret(body, self.owner)
        if record is None:
            raise CallFailed("the cluster did not store a Secret as it was sent; see admission")
        return record

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """A request in which no message repeats the token's secret half, encoded or not."""
        encoded = body.get("data", {}).get("token-secret", "") if body else ""
        try:
            hide = (encoded, _decode(encoded))
            return self.cluster.request(method, path, body, hide=hide)
        except CallFailed as error:
            if error.status == 404 and method != "POST":
                raise _Missing(str(error), status=404) from None
            raise


class _Missing(CallFailed):
    """The object that was asked for is not there."""


def new_secret() -> str:
    """A secret half: 16 characters, uniform over [a-z0-9], from the system's generator."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(16))


class Joins:
    """How far nodes have come, by the CSRs that their tokens made and the Nodes these name."""

    def __init__(self, cluster: Cluster):
        self._cluster, self._told = cluster, False

    def observe(
        self, secrets: Iterable[TokenSecret]
    ) -> tuple[dict[str, Join], tuple[Csr, ...] | None]:
        """`joins` and `csrs` of a World.

        Without the right to look, every Secret's join is UNKNOWN; that is said once.
        """
        try:
            csrs = self._csrs()
            of = by_token_id(csrs)
            latest = {each.name: latest_csr(each, of.get(each.token.id, ())) for each in secrets}
            joins = {name: self._join(csr) for name, csr in latest.items()}
        except CallFailed as error:
            if error.status != 403:
                raise
            self._tell(error)
            return {secret.name: Join.UNKNOWN for secret in secrets}, None
        return joins, csrs

    def _csrs(self) -> tuple[Csr, ...]:
        path = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
        bodies = self._cluster.list(path, {"fieldSelector": f"spec.signerName={SIGNER}"})
        return tuple(csr for csr in map(parse_csr, bodies) if csr)

    def _join(self, csr: Csr | None) -> Join:
        if csr is None or csr.state is not Join.ISSUED:
            return csr.state if csr else Join.NO_CSR
        try:
            body = self._cluster.request("GET", f"/api/v1/nodes/{urllib.parse.quote(csr.node_name)}")
        except CallFailed as error:
            if error.status != 404:
                raise
            return Join.ISSUED
        return Join.JOINED if seen_since(body, csr.decided) else Join.ISSUED

    def _tell(self, error: CallFailed) -> None:
        if not self._told:
            log.warning("joins cannot be seen, so tokens are left to expire: %s", error)
        self._told = True


# ---------------------------------------------------------------------------------------------
# Clouds: a class for each, an entry in CLOUDS.  `Pools` is what the server needs of one, `Instance`
# what the client needs.
# ---------------------------------------------------------------------------------------------


class Pools(Protocol):
    """The server's side of a cloud."""

    scope: str  # the region or project, a part of the owner
    workers: int  # how many writes go on at a time

    def list_nodes(self, filters: Mapping[str, str]) -> Listing:
        """The members of all groups that match every filter, with the value of our tag."""

    def receipts(self, nodes: Sequence[Node]) -> Mapping[str, str]:
        """By node id what the clients of some of these have left where they cannot write the tag."""

    def write_tag(self, node_id: str, value: str) -> None:
        """Set our tag of one instance, and nothing else; what was there before does not matter."""

    def checks(self, filters: Mapping[str, str]) -> Iterable[tuple[str, Callable[[], str]]]:
        """What has to be right for that, each a subject and a call: see `Preflight.step`."""


class Instance(Protocol):
    """The client's side of a cloud: the instance that it runs on."""

    def identify(self) -> str:
        """The instance's id."""

    def read_tag(self) -> str | None:
        """The value of our tag, None when it is absent."""

    def wait_for_change(self, seconds: float) -> None:
        """Return when our tag may have changed, after these seconds at the latest."""

    def mark_consumed(self, token: Token) -> None:
        """Set our tag to CONSUMED, or leave a receipt by which the server does it."""

    def checks(self) -> Iterable[tuple[str, Callable[[], str]]]:
        """What has to be right for that, each a subject and a call: see `Preflight.step`."""


class Cloud(Protocol):
    """What the program asks of a cloud: an entry in CLOUDS."""

    def check(self, options: argparse.Namespace) -> None:
        """Raise UsageError for flags that cannot be meant on this cloud; touches nothing."""

    def here(self, sleep: Callable[[float], Any]) -> str:
        """The id of this instance by the cloud's metadata service; raises when it does not answer."""

    def pools(self, options: argparse.Namespace, calls: Calls, sleep: Callable[[float], Any]) -> Pools:
        """The server's side."""

    def instance(
        self, options: argparse.Namespace, calls: Calls, sleep: Callable[[float], Any]
    ) -> Instance:
        """The client's side."""


class RateLimit:
    """A token bucket: `burst` at once, `rate` a second from then on.

    `wait` sleeps by the function it was given, so that a server that is told to stop can cut the
    waiting short.
    """

    def __init__(
        self, rate: float, burst: float, sleep: Callable[[float], Any],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._rate, self._burst, self._sleep, self._clock = rate, burst, sleep, clock
        self._lock = threading.Lock()
        self._level, self._since = burst, clock()

    def wait(self) -> None:
        """Take one, once there is one; those who wait are served in turn."""
        with self._lock:
            now = self._clock()
            self._level = min(self._burst, self._level + (now - self._since) * self._rate) - 1
            self._since, short = now, -self._level
        if short > 0:
            self._sleep(short / self._rate)


_AWS_NO_ACCESS = {"UnauthorizedOperation", "AccessDenied", "AccessDeniedException"}
_AWS_NO_CREDENTIAL = {
    "AuthFailure", "InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch",
    "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "OptInRequired",
    "MissingAuthenticationToken", "IncompleteSignature", "InvalidToken",
}


# What is called of AWS, by service.  The packaged file has botocore's models of just that (build.sh).
AWS_OPERATIONS = {
    "autoscaling": ("DescribeAutoScalingGroups",),
    "ec2": ("CreateTags", "DescribeTags"),
    # botocore's own, for credentials by role, by web identity (EKS), and by SSO
    "sso": ("GetRoleCredentials",),
    "sso-oidc": ("CreateToken",),
    "sts": ("AssumeRole", "AssumeRoleWithWebIdentity"),
}


@contextlib.contextmanager
def aws_errors(action: str, target: str = "") -> Iterator[None]:
    """Turn what botocore raises into our errors.  `action` is the IAM action, as in a policy."""
    import botocore.exceptions as failures
    import botocore.parsers

    what = f"{action} {target}".rstrip()
    try:
        yield
    except failures.ClientError as error:
        raise aws_refusal(action, what, error.response) from None
    except (failures.NoCredentialsError, failures.CredentialRetrievalError) as error:
        raise NoCredentials(
            f"{what}: no AWS credentials: {error}; give the instance a role, or set AWS_PROFILE"
        ) from None
    except (failures.UnknownServiceError, failures.MissingDependencyException) as error:
        raise aws_cut(error.kwargs.get("service_name", "the AWS CRT")) from None
    except failures.BotoCoreError as error:
        raise CallFailed(f"{what}: {redact(str(error))}", again=True) from None
    except (botocore.parsers.ResponseParserError, KeyError) as error:
        text = redact(str(error)).partition("invalid XML")[0][:200]
        raise CallFailed(f"{what}: the answer makes no sense: {text}", again=True) from None


def aws_refusal(action: str, what: str, response: Mapping[str, Any]) -> KetoError:
    """The sentence for an answer that is an error."""
    error = response.get("Error", {})
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code, message = error.get("Code", "no code"), redact(error.get("Message", "no message"))[:400]
    if code in _AWS_NO_ACCESS:
        return CallFailed(f"{what}: not allowed: the IAM policy must allow {action}: {message}")
    if code in _AWS_NO_CREDENTIAL:
        return SetupError(f"{what}: AWS refused the credentials: {code}: {message}")
    if "Throttl" in code or code == "RequestLimitExceeded":
        return Throttled(f"{what}: {code}: {message}", status=status, again=True)
    return CallFailed(f"{what}: {code}: {message}", status=status, again=status >= 500 or status == 429)


def aws_session() -> Any:
    """A botocore session; SetupError when the profile or its file is wrong.

    boto3 on top of it would add nothing that is used here, and 30 ms.
    """
    import botocore.exceptions
    import botocore.session

    try:
        session = botocore.session.get_session()
        session.get_scoped_config()
    except botocore.exceptions.BotoCoreError as error:
        raise SetupError(f"AWS configuration: {error}") from None
    session.register("getattr", aws_not_packaged)
    return session


def aws_not_packaged(event_name: str, **_: Any) -> None:
    """Say why an AWS client lacks a method: `event_name` is `getattr.SERVICE.METHOD`."""
    raise aws_cut(event_name.partition(".")[2])


def aws_cut(wish: str) -> SetupError:
    """The error for what there is in AWS, but not in the packaged file."""
    return SetupError(
        f"AWS: {wish} is not in this file, which has only what it calls itself; if your credentials need "
        "that, use a role, a web identity, SSO, a credential process or keys instead"
    )


def aws_client(session: Any, service: str, region: str, calls: Calls, attempts: int = 5) -> Any:
    """A client that retries throttling in botocore's standard mode, and counts its calls."""
    import botocore.config
    import botocore.exceptions

    config = botocore.config.Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=TIMEOUTS[0],
        read_timeout=TIMEOUTS[1],
        max_pool_connections=AwsPools.workers,
        user_agent_extra=f"keto-tokens/{__version__}",
    )
    with aws_errors("finding credentials"):
        session.get_credentials()
    try:
        client = session.create_client(service, region_name=region, config=config)
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise SetupError(f"AWS {service} in region {region}: {error}") from None

    def count(parsed_response: Any, event_name: str, **_: Any) -> None:
        status = dig(parsed_response, "ResponseMetadata", "HTTPStatusCode") or "none"
        code = dig(parsed_response, "Error", "Code") or status
        calls.add("aws", event_name.rpartition(".")[2], str(code))

    client.meta.events.register("response-received", count)  # once for each attempt
    return client


class AwsPools:
    """Auto-scaling groups of a region, and the tags of their instances."""

    workers = 8  # enough to fill the tagging rate at 0.5 s an action

    def __init__(
        self, region: str, origin: str, tag_name: str, calls: Calls, sleep: Callable[[float], Any]
    ):
        self.scope, self._origin, self._tag_name = region, origin, tag_name
        self._session = aws_session()
        self._groups = aws_client(self._session, "autoscaling", region, calls)
        self._ec2 = aws_client(self._session, "ec2", region, calls)
        self._limit = RateLimit(TAGS_PER_SECOND, TAGS_BURST, sleep)

    def list_nodes(self, filters: Mapping[str, str]) -> Listing:
        """The instances of all matching groups: a call for 100 groups, one for 1,000 tags."""
        members = list(self._members(filters))
        tags = self._tags() if members else {}
        return Listing(tuple(replace(node, tag=tags.get(node.id)) for node in members))

    def _members(self, filters: Mapping[str, str]) -> Iterator[Node]:
        wanted = [{"Name": f"tag:{key}", "Values": [value]} for key, value in filters.items()]
        pages = self._groups.get_paginator("describe_auto_scaling_groups")
        with aws_errors("autoscaling:DescribeAutoScalingGroups"):
            for page in pages.paginate(Filters=wanted, PaginationConfig={"PageSize": 100}):
                for group in page["AutoScalingGroups"]:
                    for member in group["Instances"]:
                        yield aws_node(member, group["AutoScalingGroupName"])

    def _tags(self) -> dict[str, str]:
        """Our tag's value by instance id, for all instances of the region that have it."""
        wanted = [
            {"Name": "resource-type", "Values": ["instance"]},
            {"Name": "key", "Values": [self._tag_name]},
        ]
        pages = self._ec2.get_paginator("describe_tags")
        with aws_errors("ec2:DescribeTags"):
            answers = pages.paginate(Filters=wanted, PaginationConfig={"PageSize": 1000})
            return {tag["ResourceId"]: tag["Value"] for page in answers for tag in page["Tags"]}

    def receipts(self, nodes: Sequence[Node]) -> dict[str, str]:
        """None: clients write their tag."""
        return {}

    def write_tag(self, node_id: str, value: str) -> None:
        """One CreateTags call, at the pace that AWS allows."""
        self._limit.wait()
        aws_write_tag(self._ec2, node_id, self._tag_name, value)

    def checks(self, filters: Mapping[str, str]) -> Iterable[tuple[str, Callable[[], str]]]:
        """Credentials, and the three permissions of the server's policy."""
        members: list[Node] = []

        def list_members() -> str:
            members.extend(self._members(filters))
            if not members:
                raise Doubt("allowed, but no instance is in any group that matches the filters")
            return f"{len(members)} instances in {len({node.pool for node in members})} groups match"

        yield "AWS region", lambda: f"{self.scope} by {self._origin}"
        yield "AWS credentials", lambda: aws_credentials(self._session)
        yield "autoscaling:DescribeAutoScalingGroups", list_members
        yield "ec2:DescribeTags", lambda: aws_may_read(self._ec2)
        if members:
            yield "ec2:CreateTags", lambda: aws_may_tag(
                self._ec2, members[0].id, self._tag_name, "abcdef.check")


def aws_write_tag(ec2: Any, node_id: str, tag_name: str, value: str) -> None:
    """Set one tag of one instance."""
    with aws_errors("ec2:CreateTags", node_id):
        ec2.create_tags(Resources=[node_id], Tags=[{"Key": tag_name, "Value": value}])


def aws_credentials(session: Any) -> str:
    """Where the credentials come from."""
    with aws_errors("finding credentials"):
        found = session.get_credentials()
    if found is None:
        raise NoCredentials("none: give the instance a role, or set AWS_PROFILE")
    return f"found by {found.method}"


def aws_may_read(ec2: Any) -> str:
    """Ask EC2 whether tags may be described."""
    return aws_dry_run("ec2:DescribeTags", lambda: ec2.describe_tags(DryRun=True))


def aws_may_tag(ec2: Any, node_id: str, tag_name: str, value: str) -> str:
    """Ask EC2 whether the tag of an instance may be set to this value."""
    tags = [{"Key": tag_name, "Value": value}]
    call = functools.partial(ec2.create_tags, Resources=[node_id], Tags=tags, DryRun=True)
    return aws_dry_run("ec2:CreateTags", call)


def aws_dry_run(action: str, call: Callable[[], Any]) -> str:
    """Make a call with DryRun, which EC2 answers with the error DryRunOperation where it is allowed."""
    try:
        with aws_errors(action):
            call()
    except CallFailed as error:
        if "DryRunOperation" not in str(error):
            raise
    return "allowed"


def aws_node(member: Mapping[str, Any], pool: str) -> Node:
    """A member of a group, with its state as the auto-scaling user guide lists them ("lifecycle").

    A token for an instance of a warm pool would expire while it sleeps; one in Standby or being
    detached has joined long ago or is not ours to join.
    """
    state = member["LifecycleState"]
    new_disk = state.startswith(("ReplacingRootVolume", "RootVolumeReplaced"))
    return Node(
        id=member["InstanceId"],
        pool=pool,
        state=state,
        wanted=new_disk or state in ("Pending", "Pending:Wait", "Pending:Proceed", "InService"),
        gone=state.startswith("Terminat"),
        new_disk=new_disk,
    )


class Imds:
    """The EC2 instance metadata service, version 2 only, never through a proxy.

    Honours the environment variables that botocore honours for it.
    """

    def __init__(self, environ: Mapping[str, str], sleep: Callable[[float], Any] = time.sleep):
        import urllib3

        ipv6 = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower() == "ipv6"
        default = "http://[fd00:ec2::254]" if ipv6 else "http://169.254.169.254"
        endpoint = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or default
        self._base, self._sleep = endpoint.rstrip("/"), sleep
        self._disabled = environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
        seconds = _number(environ, "AWS_METADATA_SERVICE_TIMEOUT", 1.0)
        self._timeouts = seconds, seconds
        self._attempts = int(_number(environ, "AWS_METADATA_SERVICE_NUM_ATTEMPTS", 4))
        self._pool, self._session = urllib3.PoolManager(), ""

    def get(self, path: str) -> str | None:
        """The text at a path below /latest/, None when there is none (404)."""
        if self._disabled:
            raise SetupError("AWS_EC2_METADATA_DISABLED is set, so the instance's id is unknown")
        result: str | None = retrying(lambda: self._get(path), self._sleep, self._attempts)
        return result

    def _get(self, path: str) -> str | None:
        self._session = self._session or self._new_session()
        reply = self._send("GET", path, {"X-aws-ec2-metadata-token": self._session})
        if reply.status == 401:
            self._session = ""
        return self._text("GET", path, reply)

    def _new_session(self) -> str:
        reply = self._send("PUT", "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "300"})
        return self._text("PUT", "api/token", reply) or ""

    def _send(self, method: str, path: str, headers: Mapping[str, str]) -> Reply:
        what = f"instance metadata: {method} {self._base}/latest/{path}"
        url = f"{self._base}/latest/{path}"
        try:
            return send(self._pool, what, method, url, headers=headers, timeouts=self._timeouts)
        except KetoError as error:
            hint = "is this an EC2 instance? In a container, its hop limit must be 2"
            raise Unreachable(f"{error} ({hint})") from None

    def _text(self, method: str, path: str, reply: Reply) -> str | None:
        if reply.status == 404 and method == "GET":
            return None
        if reply.status != 200:
            again = reply.status == 401 or reply.status == 429 or reply.status >= 500
            what = f"instance metadata: {method} {self._base}/latest/{path}"
            raise CallFailed(f"{what}: status {reply.status}", status=reply.status, again=again)
        return reply.body.decode("utf-8", "replace").strip()


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name) or str(default)
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", text) or float(text) <= 0:
        raise UsageError(f"environment variable {name}: {text!r} is not a number above 0")
    return float(text)


class AwsInstance:
    """This EC2 instance: who it is by its metadata service, its tag by that or by the EC2 API.

    The metadata service shows an instance its own tags and no other's, without any right, when it is
    switched on for the instance (InstanceMetadataTags).  `source` is auto, imds or api.
    """

    def __init__(
        self, tag_name: str, source: str, imds: Imds, calls: Calls, sleep: Callable[[float], Any]
    ):
        self._tag_name, self._source, self._imds, self._calls = tag_name, source, imds, calls
        self._sleep = sleep
        self._id = ""
        self._ec2_client: Any = None
        if source == "auto" and not imds_can_carry(tag_name):
            log.info("tag %s is read by the EC2 API: its name is none for instance metadata", tag_name)
            self._source = "api"

    def identify(self) -> str:
        """The instance id; raises SetupError when the metadata service gives none."""
        self._id = self._id or aws_instance_id(self._imds)
        return self._id

    def wait_for_change(self, seconds: float) -> None:
        """Sleep.  Metadata costs no API call, so it is asked every second at least."""
        self._sleep(min(1.0, seconds) if self._source == "imds" else seconds)

    def read_tag(self) -> str | None:
        """The tag's value; asks for this instance's alone."""
        self.identify()
        if self._source == "api":
            return self._tag_by_api()
        value = self._imds.get(f"meta-data/tags/instance/{urllib.parse.quote(self._tag_name)}")
        if value or self._imds.get("meta-data/tags/instance") is not None:
            self._source = "imds"
            return value or None
        enable = f"instance metadata tags are not enabled on {self._id} (InstanceMetadataTags=enabled)"
        if self._source == "imds":
            raise CallFailed(enable, again=True)
        try:
            return self._tag_by_api()
        except Throttled:
            raise
        except (CallFailed, NoCredentials) as error:
            raise CallFailed(f"{enable}, and the other way fails: {error}", again=True) from None

    def _tag_by_api(self) -> str | None:
        wanted = {"resource-id": self._id, "key": self._tag_name}
        filters = [{"Name": name, "Values": [value]} for name, value in wanted.items()]
        with aws_errors("ec2:DescribeTags", self._id):
            for tag in self._ec2().describe_tags(Filters=filters)["Tags"]:
                if (tag["ResourceId"], tag["Key"]) == (self._id, self._tag_name):
                    return str(tag["Value"])
        return None

    def mark_consumed(self, token: Token) -> None:
        """Overwrite the tag: that right, unlike deleting it, can be limited to the instance itself."""
        aws_write_tag(self._ec2(), self.identify(), self._tag_name, CONSUMED)

    def _ec2(self) -> Any:
        """The API's client, made when it is first needed: importing botocore takes a while."""
        if self._ec2_client is None:
            region = aws_region_of(self._imds)
            # One attempt: `Client` comes back by itself, and a thousand of it should not insist.
            self._ec2_client = aws_client(aws_session(), "ec2", region, self._calls, attempts=1)
        return self._ec2_client

    def checks(self) -> Iterable[tuple[str, Callable[[], str]]]:
        """The metadata service, and the permissions that are needed beside it."""
        enabled: list[bool] = []

        def metadata_tags() -> str:
            if self._imds.get("meta-data/tags/instance") is None:
                words = "not enabled (InstanceMetadataTags=enabled); the tag is read by the EC2 API"
                raise SetupError(words) if self._source == "imds" else Doubt(words)
            enabled.append(True)
            return "enabled: the tag is read without any right"

        yield "instance metadata", lambda: f"this is {self.identify()} in {aws_region_of(self._imds)}"
        if not self._id:
            return
        if self._source != "api":
            yield "instance metadata tags", metadata_tags
        yield "AWS credentials", lambda: aws_credentials(aws_session())
        if not enabled:
            yield "ec2:DescribeTags", lambda: aws_may_read(self._ec2())
        yield "ec2:CreateTags", lambda: aws_may_tag(self._ec2(), self._id, self._tag_name, CONSUMED)


def imds_can_carry(tag_name: str) -> bool:
    """Whether instance metadata shows a tag of this name (EC2 user guide, "tags in IMDS")."""
    return bool(re.fullmatch(r"[a-zA-Z0-9+\-=.,_:@]+", tag_name)) and tag_name not in (
        ".", "..", "_index",
    )


def aws_instance_id(imds: Imds) -> str:
    """The id that the metadata service names."""
    node_id = imds.get("meta-data/instance-id") or ""
    if not re.fullmatch(r"i-[0-9a-f]{8,32}", node_id):
        raise CallFailed("instance metadata: no instance id", again=True)
    return node_id


def aws_region_of(imds: Imds) -> str:
    """The region that the metadata service names."""
    region = imds.get("meta-data/placement/region") or ""
    if not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-[0-9]+", region):
        raise CallFailed("instance metadata: no region", again=True)
    return region


class Aws:
    """Amazon EC2 with its auto-scaling groups."""

    @staticmethod
    def check(options: argparse.Namespace) -> None:
        """A tag name that EC2 takes, and that can be read where it is to be read from.

        https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/Using_Tags.html#tag-restrictions
        """
        name = options.tag_name
        if not 1 <= len(name) <= 128 or name.lower().startswith("aws:") or not name.isprintable():
            raise UsageError(f"--tag-name [TAG_NAME]: {name!r} is no tag name for EC2: "
                             "1 to 128 printable characters, not beginning with aws:")
        if vars(options).get("read_from") == "imds" and not imds_can_carry(name):
            raise UsageError(f"--read-from imds: {name!r} is no name for a tag in instance metadata: "
                             "letters, digits and + - = . , _ : @")

    @staticmethod
    def here(sleep: Callable[[float], Any]) -> str:
        """This instance's id, by one try."""
        return aws_instance_id(Imds({**os.environ, "AWS_METADATA_SERVICE_NUM_ATTEMPTS": "1"}, sleep))

    @staticmethod
    def pools(options: argparse.Namespace, calls: Calls, sleep: Callable[[float], Any]) -> AwsPools:
        """The region by flag or environment, else the profile's, else this instance's."""
        region, origin = options.region, "--region or AWS_REGION"
        if not region:
            region, origin = aws_session().get_config_variable("region"), "the AWS profile"
        if not region:
            try:
                region, origin = aws_region_of(Imds(os.environ, sleep)), "the instance's metadata"
            except KetoError as error:
                raise SetupError(f"no AWS region: pass --region or set AWS_REGION; {error}") from None
        return AwsPools(region, origin, options.tag_name, calls, sleep)

    @staticmethod
    def instance(options: argparse.Namespace, calls: Calls, sleep: Callable[[float], Any]) -> AwsInstance:
        """The client's side."""
        return AwsInstance(options.tag_name, options.read_from, Imds(os.environ, sleep), calls, sleep)


class GoogleMetadata:
    """The metadata server of a GCE instance, never through a proxy.  GCE_METADATA_HOST names another."""

    def __init__(self, environ: Mapping[str, str], sleep: Callable[[float], Any] = time.sleep):
        import urllib3

        host = environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
        self._base, self._sleep = f"http://{host}/computeMetadata/v1", sleep
        self._pool = urllib3.PoolManager()

    def get(self, path: str) -> str:
        """The text at a path; CallFailed (404) when there is none."""
        return self.request("GET", path).body.decode("utf-8", "replace").strip()

    def request(
        self, method: str, path: str, body: str | None = None, *, patience: float = 2.0,
        attempts: int = ATTEMPTS,
    ) -> Reply:
        """An answer that is a success, within `patience` seconds."""
        what = f"instance metadata: {method} {self._base}/{path.partition('?')[0]}"

        def once() -> Reply:
            try:
                reply = send(
                    self._pool, what, method, f"{self._base}/{path}", timeouts=(2.0, patience),
                    headers={"Metadata-Flavor": "Google"}, body=body.encode() if body else None,
                )
            except KetoError as error:
                raise Unreachable(f"{error} (is this a GCE instance?)") from None
            if reply.headers.get("Metadata-Flavor") != "Google":
                raise Unreachable(f"{what}: who answers is not Google's metadata server")
            if reply.status != 200:
                again = reply.status == 429 or reply.status >= 500
                raise CallFailed(f"{what}: status {reply.status}", status=reply.status, again=again)
            return reply

        result: Reply = retrying(once, self._sleep, attempts)
        return result

    def node_id(self) -> str:
        """The node id of this instance, as `gce_node` makes it."""
        zone, name, number = (self.get(f"instance/{key}") for key in ("zone", "name", "id"))
        node_id = f"{zone.rpartition('/')[2]}/{name}/{number}"
        if not GCE_NODE_ID.fullmatch(node_id):
            raise CallFailed("instance metadata: no zone, name and id of an instance", again=True)
        return node_id


GoogleToken = tuple[str, float]  # an access token, and the seconds for which it is good
GOOGLE_SCOPE = "https://www.googleapis.com/auth/cloud-platform"  # rights are limited by the role


class GoogleCredential:
    """An access token of Google's, fetched again before it is due.  `origin` is for messages."""

    def __init__(self, origin: str, fetch: Callable[[], GoogleToken]):
        self.origin, self._fetch, self._lock = origin, fetch, threading.Lock()
        self._kept: GoogleToken = "", 0.0

    def __call__(self, refused: str = "") -> str:
        """The token; a new one when the kept one is due, or is the one that was refused."""
        with self._lock:
            if self._kept[0] in ("", refused) or self._kept[1] < time.monotonic():
                token, seconds = self._fetch()
                self._kept = token, time.monotonic() + seconds - 60  # a call takes its time
            return self._kept[0]


class GoogleApi:
    """A thin client of a REST API of Google's: what it returns is JSON."""

    def __init__(
        self, base: str, origin: str, credential: GoogleCredential | None, calls: Calls,
        sleep: Callable[[float], Any],
    ):
        self.base, self.credential, self._calls, self.sleep = base, credential, calls, sleep
        access = Access(google_url(base, origin), origin)
        self._where = urllib.parse.urlsplit(base).netloc
        self._pool = new_pool(access, Credential())

    def request(
        self, operation: str, method: str, path: str = "", *, query: Mapping[str, str] | None = None,
        body: Any = None, form: Mapping[str, str] | None = None, token: str = "",
        patience: float = TIMEOUTS[1], limit: int = OBJECT_LIMIT,
    ) -> dict[str, Any]:
        """The JSON object in the answer.  `operation` is its name in messages and counts.

        Raises CallFailed with the status and SetupError for a credential that is refused.
        """
        url = f"{self.base}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        what = f"{operation} {path.rpartition('/instances/')[2]}".rstrip() + f" at {self._where}"
        kind = "application/x-www-form-urlencoded" if form else "application/json"
        content = urllib.parse.urlencode(form) if form else "" if body is None else json.dumps(body)
        headers = {"Content-Type": kind} if content else {}
        headers |= {"Accept": "application/json", "User-Agent": f"keto-tokens/{__version__}"}

        def ask(bearer: str) -> Reply:
            if bearer:
                headers["Authorization"] = f"Bearer {bearer}"
            code = "none"
            try:
                reply = send(
                    self._pool, what, method, url, headers=headers, timeouts=(TIMEOUTS[0], patience),
                    body=content.encode() if content else None, limit=limit,
                )
                code = str(reply.status)
                return reply
            finally:
                self._calls.add("gce", operation, code)

        def once() -> dict[str, Any]:
            used = token or (self.credential() if self.credential else "")
            reply = ask(used)
            if reply.status == 401 and self.credential:
                used = self.credential(refused=used)
                reply = ask(used)
            return google_answer(what, reply, [used, *(form or {}).values()])

        result: dict[str, Any] = retrying(once, self.sleep, ATTEMPTS)
        return result

    def who(self) -> str:
        """Where the credential comes from, once it has been got."""
        return f"by {self.credential.origin}" if self.credential and self.credential() else "none"


def google_answer(what: str, reply: Reply, hide: Sequence[str]) -> dict[str, Any]:
    """The JSON object in an answer of Google's, or the error that it stands for.

    https://cloud.google.com/apis/design/errors; RFC 6749 for those of a token exchange.
    """
    body = json_of(reply)
    if isinstance(body, dict) and 200 <= reply.status < 300:
        return body
    if 200 <= reply.status < 300:
        raise CallFailed(f"{what}: the answer ({len(reply.body)} bytes) is not JSON", again=True)
    text = dig(body, "error", "message") or dig(body, "error_description") or dig(body, "error")
    message = redact(str(text or f"{len(reply.body)} bytes of no JSON"), *hide)[:500]
    if reply.status == 401:
        raise Refused(f"{what}: 401: Google does not accept the credential: {message}")
    reasons = {str(dig(each, "reason")) for each in dig_list(body, "error", "errors")}
    throttled = reply.status == 429 or bool(reasons & {"rateLimitExceeded", "userRateLimitExceeded"})
    if reply.status == 403 and not throttled:
        message += " (the role that is needed is in README, under Rights)"
    raise CallFailed(
        f"{what}: {reply.status}: {message}", status=reply.status,
        again=throttled or reply.status >= 500,
        after=parse_retry_after(reply.headers.get("Retry-After")),
    )


def google_url(text: str, origin: str) -> str:
    """A URL that credentials may be sent to: https, or this very machine.  Raises SetupError."""
    try:
        url = urllib.parse.urlsplit(text)
        parse_url(f"{url.scheme}://{url.netloc}")  # the path may hold the address of an account
    except ValueError as error:
        raise SetupError(f"{origin}: {error}") from None
    if url.scheme == "http" and not is_loopback(url.hostname or ""):
        raise SetupError(f"{origin}: {text} is not encrypted")
    return text


def google_credential(
    environ: Mapping[str, str], metadata: GoogleMetadata, calls: Calls, sleep: Callable[[float], Any]
) -> GoogleCredential:
    """A ready token of the environment, else workload identity federation, else this instance's."""
    names = "GOOGLE_OAUTH_ACCESS_TOKEN", "CLOUDSDK_AUTH_ACCESS_TOKEN"
    name = next((name for name in names if environ.get(name)), "")
    if name:
        ready = bearer(environ[name], name), float("inf")
        return GoogleCredential(name, lambda: ready)
    path = environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if path:
        return GoogleCredential(path, FederatedIdentity(path, calls, sleep))

    def of_instance() -> GoogleToken:
        try:
            answer = json.loads(metadata.get("instance/service-accounts/default/token"))
            return bearer(answer["access_token"], "its access token"), float(answer["expires_in"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CallFailed("instance metadata: the answer is no access token", again=True) from None
        except (CallFailed, Unreachable) as error:
            raise NoCredentials(
                f"no Google credentials: {error}; give this instance a service account, or set "
                "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_OAUTH_ACCESS_TOKEN"
            ) from None

    return GoogleCredential("this instance's service account", of_instance)


class FederatedIdentity:
    """Workload identity federation: a token in a file, such as a pod's, is exchanged for Google's.

    A configuration of type external_account with a file as its source (https://google.aip.dev/auth/4117,
    RFC 8693).  What other types need, RSA signatures and refresh tokens, is no pure Python or no machine's.
    """

    def __init__(self, path: str, calls: Calls, sleep: Callable[[float], Any]):
        self._path, text = path, read_text(path, "GOOGLE_APPLICATION_CREDENTIALS")
        try:
            config = json.loads(text)
            if config["type"] != "external_account" or "file" not in config["credential_source"]:
                raise ValueError
            self._source = dict(config["credential_source"])
            self._form = {name: str(config[name]) for name in ("audience", "subject_token_type")}
            exchange = str(config["token_url"])
            impersonate = str(config.get("service_account_impersonation_url") or "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise SetupError(
                f"{path}: only credentials of type external_account with a file as their source are "
                "supported, as this program is pure Python; or set GOOGLE_OAUTH_ACCESS_TOKEN"
            ) from None
        self._exchange = GoogleApi(exchange, path, None, calls, sleep)
        self._impersonate = GoogleApi(impersonate, path, None, calls, sleep) if impersonate else None

    def __call__(self) -> GoogleToken:
        """A new access token: the exchanged one, or that of the service account to impersonate."""
        oauth = "urn:ietf:params:oauth"
        form = {
            **self._form, "subject_token": self._subject(), "scope": GOOGLE_SCOPE,
            "grant_type": f"{oauth}:grant-type:token-exchange",
            "requested_token_type": f"{oauth}:token-type:access_token",
        }
        try:
            answer = self._exchange.request("token exchange", "POST", form=form)
            token, seconds = bearer(answer["access_token"], self._path), float(answer["expires_in"])
            if self._impersonate:
                answer = self._impersonate.request(
                    "impersonation", "POST", body={"scope": [GOOGLE_SCOPE]}, token=token)
                token = bearer(answer["accessToken"], self._path)
                seconds = parse_time(answer["expireTime"]) - time.time()
            return token, seconds
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CallFailed(f"{self._path}: the answer is no access token", again=True) from None
        except CallFailed as error:
            if error.again:
                raise
            raise SetupError(f"{self._path}: {error}") from None

    def _subject(self) -> str:
        """The token in the file as it is now: whoever put it there renews it."""
        path, shape = str(self._source["file"]), self._source.get("format")
        text = read_text(path, "the token to exchange")
        if dig(shape, "type") == "json":
            try:
                text = str(json.loads(text)[dig(shape, "subject_token_field_name")])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise SetupError(f"{path}: no field {dig(shape, 'subject_token_field_name')}") from None
        return bearer(text, path)


GCE_API = "https://compute.googleapis.com/compute/v1"
GCE_PAGE = 500  # instances a page, the most there is
GCE_NODE_ID = re.compile(r"[a-z0-9-]+/[a-z0-9-]+/[0-9]+")  # ZONE/NAME/NUMBER
GCE_OPERATION = 130.0  # seconds to wait for an operation, which Google answers within two minutes
GCE_POLL = 5  # seconds that a long poll takes, during which nothing stops the client
GCE_RECEIPTS = 50  # guest attributes read a pass: a tenth of the read quota at a pass every ten seconds
GCE_NAMESPACE = "keto-tokens"  # of the guest attribute that is the client's receipt
GCE_PERMISSIONS = (
    "compute.instances.get",
    "compute.instances.getGuestAttributes",
    "compute.instances.list",
    "compute.instances.setMetadata",
    "compute.zoneOperations.get",
)


class _Stale(CallFailed):
    """The metadata was changed by somebody else since it was read."""


class GcePools:
    """The instances of a project, and our item in their metadata.

    A node's id is ZONE/NAME/NUMBER: all that calls need, and never the same for a recreated instance.
    """

    workers = 32  # a write waits some seconds for its operation

    def __init__(self, project: str, origin: str, tag_name: str, api: GoogleApi):
        self.scope, self._origin, self._tag_name, self._api = project, origin, tag_name, api
        self._limit = RateLimit(TAGS_PER_SECOND, TAGS_BURST, api.sleep)
        self._told: set[str] = set()

    def list_nodes(self, filters: Mapping[str, str]) -> Listing:
        """The instances with all these labels, 500 a call; without labels those of managed groups."""
        nodes: list[Node] = []
        missing: list[str] = []
        for page in self._pages(filters):
            missing += gce_missing(page)
            found = [gce_node(body, self._tag_name) for body in gce_instances(page)]
            nodes += [node for node in found if node and (filters or node.pool != UNMANAGED)]
        if missing:
            self._warn_once(f"not all instances were listed, so none is taken for gone: {missing[0]}")
        return Listing(tuple(nodes), complete=not missing)

    def _pages(self, filters: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        query = {
            "maxResults": str(GCE_PAGE),
            "fields": "nextPageToken,unreachables,warning(code,message),items/*/warning(code,message),"
                      "items/*/instances(id,name,zone,status,metadata/items)",
        }
        if filters:
            query["filter"] = " ".join(f"(labels.{key}={value})" for key, value in filters.items())
        path = f"/projects/{self.scope}/aggregated/instances"
        for _ in range(PAGES):
            page = self._api.request(
                "compute.instances.list", "GET", path, query=query, limit=LIST_LIMIT)
            yield page
            if not page.get("nextPageToken"):
                return
            query["pageToken"] = str(page["nextPageToken"])
        raise CallFailed(f"compute.instances.list: the list has no end after {PAGES} pages")

    def receipts(self, nodes: Sequence[Node]) -> dict[str, str]:
        """Those of as many as a pass may ask; first of those that have lost their tag."""
        from concurrent.futures import ThreadPoolExecutor

        order = sorted(nodes, key=lambda node: (node.token is not None, random.random()))
        asked = [node.id for node in order[:GCE_RECEIPTS]]
        with ThreadPoolExecutor(self.workers) as workers:
            return dict(zip(asked, workers.map(self._receipt, asked)))

    def _receipt(self, node_id: str) -> str:
        """The guest attribute, "" for none; what keeps us from seeing it is no failure of the pass."""
        query = {"queryPath": f"{GCE_NAMESPACE}/{self._tag_name}", "fields": "queryValue/items/value"}
        try:
            answer = self._api.request("compute.instances.getGuestAttributes", "GET",
                                       f"{self._path(node_id)}/getGuestAttributes", query=query)
        except CallFailed as error:
            if error.status == 403 and "permission" in str(error):
                self._warn_once(f"that a token was taken is only seen by the join: {error}")
            log.debug("no receipt node=%s: %s", node_id, error)
            return ""
        return "".join(str(dig(item, "value")) for item in dig_list(answer, "queryValue", "items"))

    def _warn_once(self, message: str) -> None:
        if message not in self._told:
            log.warning("%s", message)
        self._told.add(message)

    def _path(self, node_id: str) -> str:
        zone, _, number = node_id.split("/")
        return f"/projects/{self.scope}/zones/{zone}/instances/{number}"

    def write_tag(self, node_id: str, value: str) -> None:
        """Read, modify and write the metadata; again when somebody else has written in between."""
        self._limit.wait()
        for _ in range(2 * ATTEMPTS):
            with contextlib.suppress(_Stale):
                return self._write(node_id, value)
        raise CallFailed(f"compute.instances.setMetadata {node_id}: others keep changing its metadata")

    def _write(self, node_id: str, value: str) -> None:
        path = self._path(node_id)
        found = self._api.request("compute.instances.get", "GET", path, query={"fields": "metadata"})
        before = dig_list(found, "metadata", "items")
        items = with_item(before, self._tag_name, value)
        if items == before:
            return  # an answer that was lost
        body = {"fingerprint": dig(found, "metadata", "fingerprint"), "items": items}
        try:
            operation = self._api.request(
                "compute.instances.setMetadata", "POST", f"{path}/setMetadata", body=body)
        except CallFailed as error:
            if error.status == 412:
                raise _Stale(str(error)) from None
            raise
        self._wait_for(operation, node_id)

    def _wait_for(self, operation: Mapping[str, Any], node_id: str) -> None:
        """Return when an operation has succeeded: only then the metadata is there."""
        zone, what = node_id.partition("/")[0], f"compute.instances.setMetadata {node_id}"
        path = f"/projects/{self.scope}/zones/{zone}/operations/{operation.get('name')}/wait"
        for _ in range(ATTEMPTS):
            if operation.get("status") != "DONE":
                operation = self._api.request(
                    "compute.zoneOperations.wait", "POST", path, patience=GCE_OPERATION)
        if operation.get("status") != "DONE":
            raise CallFailed(f"{what}: not done after {ATTEMPTS * 2} minutes")
        first = next(iter(dig_list(operation, "error", "errors")), operation.get("error"))
        if operation.get("httpErrorStatusCode") == 412 or dig(first, "code") == "CONDITION_NOT_MET":
            raise _Stale(what)
        if first:
            raise CallFailed(f"{what}: {dig(first, 'code')}: {redact(str(dig(first, 'message')))}")

    def checks(self, filters: Mapping[str, str]) -> Iterable[tuple[str, Callable[[], str]]]:
        """Credentials, and the permissions of the server's role, as far as Google tells."""
        members: list[Node] = []

        def list_members() -> str:
            listing = self.list_nodes(filters)
            members.extend(listing.nodes)
            if not members or not listing.complete:
                raise Doubt("allowed, but " + ("not all zones answer" if members else
                            "no instance has all the labels that the filters name"))
            return f"{len(members)} instances in {len({node.pool for node in members})} groups match"

        yield "GCE project", lambda: f"{self.scope} by {self._origin}"
        yield "Google credentials", self._api.who
        yield "compute.instances.list", list_members
        for permission in GCE_PERMISSIONS if members else ():
            if permission.startswith("compute.instances.") and permission != "compute.instances.list":
                yield permission, functools.partial(self._allowed, members[0], permission)

    def _allowed(self, node: Node, permission: str) -> str:
        """Ask Google whether we may do that with an instance."""
        path, body = f"{self._path(node.id)}/testIamPermissions", {"permissions": [permission]}
        answer = self._api.request("compute.instances.testIamPermissions", "POST", path, body=body)
        if permission not in dig_list(answer, "permissions"):
            raise SetupError("not allowed (the role that is needed is in README, under Rights)")
        acts = "; where nodes have a service account, iam.serviceAccounts.actAs on that is needed too"
        return "allowed" + (acts if permission.endswith("setMetadata") else "")


UNMANAGED = "unmanaged"  # the pool of instances that no managed instance group has made


def gce_instances(page: Mapping[str, Any]) -> Iterator[Any]:
    """The instances of all zones in a page of an aggregated list."""
    for scope in gce_scopes(page):
        yield from dig_list(scope, "instances")


def gce_scopes(page: Mapping[str, Any]) -> list[Any]:
    """The parts of an aggregated list, one for each zone."""
    scopes = page.get("items")
    return list(scopes.values()) if isinstance(scopes, dict) else []


def gce_missing(page: Mapping[str, Any]) -> list[str]:
    """What a page of an aggregated list says is missing from it.  That a zone is empty is no warning."""
    warnings = [each for scope in [page, *gce_scopes(page)] if (each := dig(scope, "warning"))]
    return [str(name) for name in dig_list(page, "unreachables")] + [
        f"{dig(each, 'code')} {dig(each, 'message')}" for each in warnings
        if dig(each, "code") != "NO_RESULTS_ON_PAGE"
    ]


def gce_node(body: Any, tag_name: str) -> Node | None:
    """An instance of a list; its states are those of the Compute API's `Instance.status`.

    One that was stopped may start again: if its token was revoked meanwhile, it then gets another.
    """
    listed = dig_list(body, "metadata", "items")
    items = {str(dig(item, "key")): str(dig(item, "value") or "") for item in listed}
    zone, state = str(dig(body, "zone")).rpartition("/")[2], str(dig(body, "status"))
    node_id = f"{zone}/{dig(body, 'name')}/{dig(body, 'id')}"
    if not GCE_NODE_ID.fullmatch(node_id):
        return None
    return Node(
        id=node_id,
        pool=items.get("created-by", "").rpartition("/")[2] or UNMANAGED,
        state=state,
        tag=items.get(tag_name),
        wanted=state in ("PROVISIONING", "STAGING", "RUNNING"),
        gone=state in ("PENDING_STOP", "STOPPING", "DEPROVISIONING", "TERMINATED"),
    )


def with_item(items: Sequence[Any], key: str, value: str) -> list[Any]:
    """Metadata items with one set, and the others as they are."""
    if not any(dig(item, "key") == key for item in items):
        return [*items, {"key": key, "value": value}]
    return [{**item, "value": value} if dig(item, "key") == key else item for item in items]


class GceInstance:
    """This GCE instance: who it is, its token and its receipt, all by its metadata server, no rights."""

    def __init__(self, tag_name: str, metadata: GoogleMetadata, sleep: Callable[[float], Any]):
        self._tag_name, self._metadata, self._sleep = tag_name, metadata, sleep
        self._id, self._etag = "", "0"

    def identify(self) -> str:
        """The node id."""
        self._id = self._id or self._metadata.node_id()
        return self._id

    def read_tag(self) -> str | None:
        """The value of our item.  All items are read, as one that is not there cannot be waited for."""
        reply = self._metadata.request("GET", "instance/attributes/?recursive=true&alt=json")
        self._etag = reply.headers.get("ETag", "0")
        value = dig(json_of(reply), self._tag_name)
        return value if isinstance(value, str) else None

    def wait_for_change(self, seconds: float) -> None:
        """A long poll, which ends when any item has changed since `read_tag`."""
        limit = max(1, min(GCE_POLL, math.ceil(seconds)))
        query = {"recursive": "true", "wait_for_change": "true", "last_etag": self._etag,
                 "timeout_sec": str(limit)}
        try:
            self._metadata.request(
                "GET", f"instance/attributes/?{urllib.parse.urlencode(query)}", patience=limit + 2.0,
                attempts=1)
        except KetoError as error:
            log.debug("%s", error)
            self._sleep(seconds)

    def mark_consumed(self, token: Token) -> None:
        """Leave a receipt in a guest attribute, for the server to mark the tag by.

        A node cannot write its metadata: whoever may, may also write `startup-script`, which is root's.
        """
        try:
            self._metadata.request(
                "PUT", f"instance/guest-attributes/{GCE_NAMESPACE}/{self._tag_name}", receipt(token))
        except CallFailed as error:
            if error.status not in (403, 404):
                raise
            log.info("guest attributes are off (enable-guest-attributes=TRUE switches them on): "
                     "the server marks the tag when the node has joined")

    def checks(self) -> Iterable[tuple[str, Callable[[], str]]]:
        """The metadata server, and whether it takes a receipt."""

        def guest_attributes() -> str:
            try:
                self._metadata.get("instance/guest-attributes/")
            except CallFailed as error:
                if error.status == 403:
                    raise Doubt("off (enable-guest-attributes=TRUE switches them on): the server only "
                                "knows by the join that the token was taken") from None
                if error.status != 404:
                    raise
            return "on: the server is told when the token was taken"

        yield "instance metadata", lambda: f"this is {self.identify()}"
        if self._id:
            yield "guest attributes", guest_attributes


class Gce:
    """Google Compute Engine."""

    @staticmethod
    def check(options: argparse.Namespace) -> None:
        """A metadata key, labels, and no other way to read than metadata."""
        if not re.fullmatch(r"[a-zA-Z0-9_-]{1,128}", options.tag_name):
            raise UsageError(f"--tag-name [TAG_NAME]: {options.tag_name!r} is no key of instance metadata: "
                             "1 to 128 letters, digits, - and _")
        for key, value in dict(vars(options).get("filter") or ()).items():
            if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{1,63}", f"{key}={value}"):
                raise UsageError(f"--filter: {key}={value} is no label of GCE: lower case, digits, - and _")
        if vars(options).get("read_from") == "api":
            raise UsageError("--read-from: on GCE a node has no right to read by the API, and needs none")

    @staticmethod
    def here(sleep: Callable[[float], Any]) -> str:
        """This instance's id, by one try."""
        metadata = GoogleMetadata(os.environ, sleep)
        return metadata.request("GET", "instance/id", attempts=1).body.decode("utf-8", "replace")

    @staticmethod
    def pools(options: argparse.Namespace, calls: Calls, sleep: Callable[[float], Any]) -> GcePools:
        """The project by flag or environment, else this instance's."""
        metadata, variable = GoogleMetadata(os.environ, sleep), "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE"
        project, origin = options.project, "--project, GCE_PROJECT or CLOUDSDK_CORE_PROJECT"
        if not project:
            try:
                project, origin = metadata.get("project/project-id"), "the instance's metadata"
                parse_project(project)
            except (KetoError, ValueError) as error:
                raise SetupError(f"no GCE project: pass --project; {error}") from None
        credential = google_credential(os.environ, metadata, calls, sleep)
        base = (os.environ.get(variable) or GCE_API).rstrip("/")
        api = GoogleApi(base, variable, credential, calls, sleep)
        return GcePools(project, origin, options.tag_name, api)

    @staticmethod
    def instance(options: argparse.Namespace, calls: Calls, sleep: Callable[[float], Any]) -> GceInstance:
        """The client's side."""
        return GceInstance(options.tag_name, GoogleMetadata(os.environ, sleep), sleep)


class AutoInstance:
    """The instance of whichever cloud answers, found out when it is first asked who it is."""

    def __init__(
        self, options: argparse.Namespace, calls: Calls, sleep: Callable[[float], Any]
    ):
        self._parts, self._sleep, self._cloud = (options, calls, sleep), sleep, ""
        self._found: Instance | None = None

    def _instance(self) -> Instance:
        if self._found is None:
            options, calls, sleep = self._parts
            self._cloud = detect_cloud(sleep)
            CLOUDS[self._cloud].check(options)
            self._found = CLOUDS[self._cloud].instance(options, calls, sleep)
        return self._found

    def identify(self) -> str:
        """The id that the cloud gives it."""
        return self._instance().identify()

    def read_tag(self) -> str | None:
        """The cloud's."""
        return self._instance().read_tag()

    def wait_for_change(self, seconds: float) -> None:
        """The cloud's, or a sleep as long as it is not known."""
        self._found.wait_for_change(seconds) if self._found else self._sleep(seconds)

    def mark_consumed(self, token: Token) -> None:
        """The cloud's."""
        self._instance().mark_consumed(token)

    def checks(self) -> Iterable[tuple[str, Callable[[], str]]]:
        """That a cloud answers, and what it has to check."""
        yield "cloud", lambda: f"{self._instance() and self._cloud}, by its metadata"
        yield from self._found.checks() if self._found else ()


def detect_cloud(sleep: Callable[[float], Any]) -> str:
    """The cloud whose metadata service answers here; CallFailed when none does, as at an early boot."""
    failures = []
    for name, cloud in CLOUDS.items():
        try:
            cloud.here(sleep)
            return name
        except KetoError as error:
            failures.append(f"{name}: {error}")
    raise CallFailed(f"no cloud's metadata answers: {'; '.join(failures)}", again=True)


CLOUDS: dict[str, Cloud] = {"aws": Aws(), "gce": Gce()}


# ---------------------------------------------------------------------------------------------
# Server: observe, plan, apply, report.  A pass knows nothing of the one before it.
# ---------------------------------------------------------------------------------------------


class Server:
    """Passes over the groups that match `filters`, until `stop` is set."""

    def __init__(
        self, pools: Pools, store: TokenStore, filters: Mapping[str, str], policy: Policy,
        calls: Calls, stop: threading.Event, may_work: Callable[[], bool] = lambda: True,
        monitor: Monitor | None = None,
    ):
        self._pools, self._store, self._filters, self._policy = pools, store, filters, policy
        self._calls, self._stop, self._may_work = calls, stop, may_work
        self._monitor = monitor or Monitor(Notify({}))
        self._joins = Joins(store.cluster)
        self._warned: set[str] = set()

    def run(self, interval: float) -> None:
        """A pass every `interval` seconds, from start to start.

        A pass that fails is logged and the next one comes; only a first one that cannot work as
        things are set up raises its SetupError.
        """
        first = True
        while not self._stop.is_set():
            if not self._may_work():
                self._monitor.stands_by()
                self._stop.wait(RENEW_EVERY / 4)
                continue
            started = time.monotonic()
            try:
                self.run_pass()
            except KetoError as error:
                if first and isinstance(error, SetupError):
                    raise
                log.error("pass failed: %s", error)
            first = False
            self._monitor.started()
            while (left := started + interval - time.monotonic()) > 0 and not self._stop.is_set():
                self._stop.wait(min(left, self._monitor.period))
                self._monitor.beat()

    def run_pass(self) -> None:
        """One pass; PassFailed when an action failed, what `observe` raises when it could not see."""
        started = time.monotonic()
        self._calls.take()
        try:
            world = self.observe()
            actions = plan(world, self._policy)
            self._monitor.saw(world, actions)
            counts = self.apply(actions)
        except KetoError as error:
            self._monitor.passed(f"pass failed: {error}", time.monotonic() - started, good=False)
            raise
        seconds, failed = time.monotonic() - started, counts["failed"]
        line = pass_line(actions, counts, self._calls.take(), seconds)
        log.info("%s", line)
        self._monitor.passed(line, seconds, good=not failed)
        if failed:
            raise PassFailed(f"{failed} of {sum(counts.values())} actions failed, see above")

    def observe(self) -> World:
        """All there is to know, in a handful of batched calls.

        Secrets are read before nodes: one that another server makes while we look is not seen, and
        so is not taken for one whose node is gone.
        """
        self._monitor.beat()
        found = self._store.list()
        self._check_clock()
        self._monitor.beat()
        listing = self._pools.list_nodes(self._filters)
        self._monitor.beat()
        now = self._store.cluster.now()
        if not listing.nodes:
            self._warn_once("no instance is in any group that matches the filters")
        live = [secret for secret in found if secret.live(now)]
        joins: dict[str, Join] = {}
        csrs: tuple[Csr, ...] | None = ()
        if live or any(node.wanted and (node.new_disk or not node.consumed) for node in listing.nodes):
            joins, csrs = self._joins.observe(live)
        return World(self._with_receipts(listing, live), found, joins, csrs, self._store.owner, now)

    def _with_receipts(self, listing: Listing, live: Iterable[TokenSecret]) -> Listing:
        """The listing with the receipts of nodes that are in the middle of joining."""
        ids = {secret.node_id for secret in live}
        joining = [node for node in listing.nodes if node.id in ids and node.wanted and not node.consumed]
        found = self._pools.receipts(joining) if joining else {}
        nodes = (replace(node, receipt=found.get(node.id, "")) for node in listing.nodes)
        return replace(listing, nodes=tuple(nodes)) if found else listing

    def _check_clock(self) -> None:
        skew = self._store.cluster.skew()
        if abs(skew) > SKEW:
            side = "ahead of" if skew > 0 else "behind"
            self._warn_once(
                f"this machine's clock is {format_duration(abs(skew))} {side} the cluster's, "
                "which decides expirations; is NTP running?"
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            log.warning("%s", message)
        self._warned.add(message)

    def apply(self, actions: Iterable[Action]) -> collections.Counter[str]:
        """Carry out what is to be written, several at a time; counts by kind, and the failed ones.

        When the server is told to stop, what is under way is finished and the rest is left.
        """
        from concurrent.futures import ThreadPoolExecutor, as_completed

        todo = [action for action in actions if action.kind in WRITES]
        for action in actions:
            if action.kind not in WRITES:
                log.debug("%s", action_line(action))
        counts: collections.Counter[str] = collections.Counter()
        with ThreadPoolExecutor(self._pools.workers) as workers:
            tasks = {workers.submit(self._guarded, action): action for action in todo}
            for task in as_completed(tasks):
                action, result = tasks[task], task.result()
                counts[action.kind.value if result == "done" else result] += 1
                self._monitor.acted(action, result)
        return counts

    def _guarded(self, action: Action) -> str:
        """Carry out one action, its result in a word; whatever happens to it, the others go on."""
        if self._stop.is_set() or not self._may_work():
            return "left"
        try:
            secret = self._carry_out(action)
        except Superseded as error:
            log.debug("%s superseded: %s", action_line(action), error)
            return "superseded"
        except KetoError as error:
            log.error("%s failed: %s", action_line(action), error)
            return "failed"
        except Exception:
            log.exception("%s failed by a bug in keto-tokens", action_line(action))
            return "failed"
        log.info("%s", action_line(replace(action, secret=secret)))
        return "done"

    def _carry_out(self, action: Action) -> TokenSecret:
        """Do it; the Secret as it is afterwards, or was last."""
        node, secret = action.node, action.secret
        if action.kind is Kind.ISSUE:
            return self._publish(node, self._store.issue(node, action.earlier))
        if secret is None:
            raise AssertionError(f"{action.kind} without a Secret")
        if action.kind is Kind.RENEW:
            return self._publish(node, self._store.renew(secret, node, action.earlier))
        if action.kind is Kind.PUBLISH:
            return self._publish(node, self._store.extend(secret))
        if action.kind is Kind.EXTEND:
            return self._store.extend(secret)
        if action.kind in (Kind.MARK, Kind.FINISH):
            self._pools.write_tag(node.id, CONSUMED)
        if self._policy.revoke and action.kind is not Kind.MARK:
            self._store.revoke(secret)
        return secret

    def _publish(self, node: Node, secret: TokenSecret) -> TokenSecret:
        """The Secret is there first, so that no tag ever holds a token that the cluster lacks."""
        self._pools.write_tag(node.id, secret.token.value)
        self._store.published(secret)
        return secret


def action_line(action: Action) -> str:
    """The action for the log, as key=value."""
    node, secret = action.node, action.secret
    about = f"{action.kind.value} node={node.id} pool={node.pool}"
    token = f" token_id={secret.token.id} expires={format_time(secret.expires)}" if secret else ""
    return f'{about}{token} reason="{action.reason}"'


def pass_line(
    actions: Sequence[Action], counts: Mapping[str, int],
    calls: Mapping[tuple[str, str, str], int], seconds: float,
) -> str:
    """The one line at the end of a pass: what was seen, what was done, what it cost."""
    by_service: collections.Counter[str] = collections.Counter()
    for (service, _, _), number in calls.items():
        by_service[service] += number
    fields = {
        "nodes": sum(not action.node.gone for action in actions),
        "waiting": sum(action.kind is Kind.WAIT for action in actions),
        "issued": counts.get("issue", 0) + counts.get("renew", 0),
        "published": counts.get("publish", 0),
        "marked": counts.get("mark", 0),
        "extended": counts.get("extend", 0),
        "revoked": counts.get("finish", 0) + counts.get("revoke", 0),
        "failed": counts.get("failed", 0),
        "calls": ",".join(f"{name}:{number}" for name, number in sorted(by_service.items())),
        "seconds": f"{seconds:.2f}",
    }
    return "pass " + " ".join(f"{key}={value}" for key, value in fields.items())


def plan_lines(actions: Sequence[Action]) -> Iterator[str]:
    """The plan for --dry-run: a line for each node, aligned."""
    rows = [(a.kind.value, a.node.id, a.node.pool, a.reason) for a in actions]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for *cells, reason in rows:
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths)]
        yield "  ".join([*padded, reason])


class Leader:
    """One of several servers works at a time: the one that holds a Lease (coordination.k8s.io/v1).

    A thread renews it while the `with` block lasts, and gives it back at its end.  Others take it when
    it has not changed for LEASE seconds of their own clock, so clocks need not agree; by then the old
    holder has counted itself out, RENEW_DEADLINE seconds after its last renewal.
    """

    def __init__(self, cluster: Cluster, namespace: str, name: str):
        import socket

        self._cluster, self._name, self._done = cluster, name, threading.Event()
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._identity = f"{socket.gethostname()}_{secrets.token_hex(4)}"
        self._until = float("-inf")  # until when, by time.monotonic(), we may count on leading
        self._seen: tuple[str, float] = ("", 0.0)  # the Lease's version, and since when
        self._told = ""

    def leads(self) -> bool:
        """Whether we hold the Lease."""
        return time.monotonic() < self._until

    def __enter__(self) -> Leader:
        try:
            self._step()
        except CallFailed as error:
            if error.status == 403:  # no time will mend that
                raise SetupError(str(error)) from None
            log.warning("lease not taken yet lease=%s: %s", self._name, error)
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        leads, self._until = self.leads(), float("-inf")
        with contextlib.suppress(KetoError):
            lease = self._get() if leads else None
            if lease and lease_spec(lease).get("holderIdentity") == self._identity:
                self._write(lease, "", 1)
                log.info("lease given back lease=%s", self._name)

    def _keep(self) -> None:
        while not self._done.wait(RENEW_EVERY):
            try:
                self._step()
            except KetoError as error:
                log.warning("lease not renewed lease=%s: %s", self._name, error)

    def _step(self) -> None:
        """Take the Lease, or renew it, or see who has it."""
        started = time.monotonic()
        lease = self._get()
        try:
            if lease_is_free(lease, self._identity, self._unchanged_for(lease)):
                self._write(lease, self._identity, LEASE)
                self._until = started + RENEW_DEADLINE
            else:
                self._until = float("-inf")
        except Superseded:
            self._until = float("-inf")
            log.debug("another server was quicker lease=%s", self._name)
        state = "leading" if self.leads() else "standing by"
        if state != self._told:
            log.info("%s lease=%s identity=%s", state, self._name, self._identity)
        self._told = state

    def _unchanged_for(self, lease: Mapping[str, Any] | None) -> float:
        version, now = lease["metadata"]["resourceVersion"] if lease else "", time.monotonic()
        if version != self._seen[0]:
            self._seen = version, now
        return now - self._seen[1]

    def _get(self) -> dict[str, Any] | None:
        try:
            lease = self._cluster.request("GET", f"{self._path}/{self._name}", attempts=1)
        except CallFailed as error:
            if error.status != 404:
                raise
            return None
        metadata = lease.get("metadata")
        if not isinstance(metadata, dict) or not metadata.get("resourceVersion"):
            raise CallFailed(f"GET {self._path}/{self._name}: the answer is no Lease")
        return lease

    def _write(self, lease: Mapping[str, Any] | None, holder: str, seconds: int) -> None:
        body = lease_body(lease, self._name, holder, seconds, self._cluster.now())
        method, path = ("PUT", f"{self._path}/{self._name}") if lease else ("POST", self._path)
        self._cluster.request(method, path, body, attempts=1)


def lease_spec(lease: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is set in the spec of a Lease, as far as it is of the right type."""
    spec, numbers = dig(lease, "spec"), ("leaseDurationSeconds", "leaseTransitions")
    if not isinstance(spec, dict):
        return {}
    return {k: v for k, v in spec.items() if isinstance(v, int if k in numbers else str)}


def lease_is_free(lease: Mapping[str, Any] | None, identity: str, unchanged_for: float) -> bool:
    """Whether `identity` may take or renew the Lease, which it has seen unchanged for so long."""
    spec = lease_spec(lease)
    holder, seconds = spec.get("holderIdentity"), spec.get("leaseDurationSeconds", LEASE)
    return not holder or holder == identity or unchanged_for >= seconds


def lease_body(
    lease: Mapping[str, Any] | None, name: str, holder: str, seconds: int, now: float
) -> dict[str, Any]:
    """The Lease with this holder ("" for none), renewed now.  Taking it counts as a transition."""
    moment = datetime.fromtimestamp(now, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    old = lease_spec(lease)
    renewed = bool(holder) and old.get("holderIdentity") == holder
    spec = {
        "holderIdentity": holder,
        "leaseDurationSeconds": seconds,
        "acquireTime": old.get("acquireTime", moment) if renewed else moment,
        "renewTime": moment,
        "leaseTransitions": old.get("leaseTransitions", 0) + bool(lease and holder and not renewed),
    }
    metadata = (lease or {}).get("metadata") or {"name": name}
    return {
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec,
    }


def server_parts(
    options: argparse.Namespace, calls: Calls, stop: Stop
) -> tuple[Pools, TokenStore]:
    """The cloud and the cluster that the flags of server and status name."""
    access = cluster_access(options, os.environ)
    pools = cloud_pools(options, calls, stop)
    store = TokenStore(
        Cluster(access, calls, stop.wait),
        owner_hash(options.cloud, pools.scope, options.tag_name, options.filter),
        namespace=options.token_namespace,
        groups=vars(options).get("auth_extra_groups", DEFAULT_GROUPS),
        ttl=options.token_ttl,
    )
    return pools, store


def cloud_pools(options: argparse.Namespace, calls: Calls, stop: Stop) -> Pools:
    """The server's side of the cloud that was named, or of the one we are in."""
    if options.cloud == "auto":
        try:
            options.cloud = detect_cloud(stop.wait)
        except CallFailed as error:
            raise SetupError(f"--cloud auto: {error}; pass --cloud {' or '.join(CLOUDS)}") from None
        CLOUDS[options.cloud].check(options)
    return CLOUDS[options.cloud].pools(options, calls, stop.wait)


def run_server(options: argparse.Namespace, stop: Stop) -> int:
    """The server command; the exit code."""
    calls = Calls()
    with monitored(options, calls) as monitor:
        pools, store = server_parts(options, calls, stop)
        policy = Policy(options.token_ttl, options.give_up, not options.no_revoke)
        server = functools.partial(
            Server, pools, store, options.filter, policy, calls, stop.event, monitor=monitor
        )
        if options.dry_run:
            for line in plan_lines(plan(server().observe(), policy)):
                print(line)
        elif options.once:
            server().run_pass()
        else:
            where = store.cluster.access.server
            log.info("started version=%s cluster=%s owner=%s", __version__, where, store.owner)
            if options.leader_elect:
                name = lease_name(store.owner)
                with Leader(store.cluster, options.token_namespace, name) as leader:
                    server(may_work=leader.leads).run(options.interval)
            else:
                server().run(options.interval)
            log.info("stopped")
    return 0


def lease_name(owner: str) -> str:
    """The Lease for which the servers of one owner compete."""
    return f"keto-tokens-{owner}"


# ---------------------------------------------------------------------------------------------
# Observers: what systemd, Prometheus and probes are told.  By none of it is anything ever decided.
# ---------------------------------------------------------------------------------------------

STATES = ("new", "waiting", "joining", "joined", "stuck", "gone", "idle")  # see node_state
JOIN_BUCKETS = (15, 30, 60, 120, 180, 300, 600, 1200, 1800, 3600, 7200)  # seconds, up to --give-up
PASS_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1200)  # seconds


class Notify:
    """systemd's notification socket, if the environment names one: sd_notify(3), sd_watchdog_enabled(3)."""

    def __init__(self, environ: Mapping[str, str]):
        path = environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{path[1:]}" if path.startswith("@") else path
        usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID") or str(os.getpid())
        watched = re.fullmatch("[0-9]+", usec) and int(usec) and pid == str(os.getpid())
        self.watchdog = int(usec) / 1e6 if watched else HUNG  # seconds

    def send(self, *assignments: str) -> None:
        """Send assignments such as READY=1; that nobody takes them is no failure of ours."""
        import socket

        if self._address:
            with contextlib.suppress(OSError):
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                    channel.settimeout(1.0)
                    channel.connect(self._address)
                    channel.send("\n".join(assignments).encode())


class Metrics:
    """The server's metrics in a registry of their own; names and units as Prometheus wants them."""

    def __init__(self, calls: Calls):
        import prometheus_client as prometheus

        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]  # of no use here
        self._registry, self._lock = prometheus.CollectorRegistry(), threading.Lock()
        self._text = prometheus.generate_latest

        def made(kind: Any, name: str, about: str, *labels: str, **options: Any) -> Any:
            return kind(f"keto_tokens_{name}", about, labels, registry=self._registry, **options)

        gauge, counter, histogram = prometheus.Gauge, prometheus.Counter, prometheus.Histogram
        info = {"version": __version__, "python": sys.version.partition(" ")[0]}
        made(prometheus.Info, "build", "The version that runs.").info(info)
        self._nodes = made(gauge, "nodes", "Nodes as the last pass found them.", "pool", "state")
        self._actions = made(counter, "actions", "Actions by what became of them.", "kind", "result")
        self._passes = made(counter, "passes", "Passes; one is good when all of it went well.", "result")
        self._seconds = made(histogram, "pass_duration_seconds", "Time a pass took.", buckets=PASS_BUCKETS)
        self._joins = made(histogram, "join_duration_seconds", "Time from a node's first token to the "
                           "pass that saw it joined.", buckets=JOIN_BUCKETS)
        self._expiry = made(gauge, "oldest_waiting_expiration_timestamp_seconds",
                            "When the token expires that has been waiting longest; 0 when none is.")
        self._success = made(gauge, "last_success_timestamp_seconds", "End of the last good pass; 0 "
                             "before the first.")
        called = made(counter, "api_calls", "Calls of APIs, each attempt; code none: no answer came.",
                      "service", "operation", "code")
        calls.observer = lambda *labels: called.labels(*labels).inc()
        for result in ("done", "failed", "superseded", "left"):
            for kind in WRITES:
                self._actions.labels(kind.value, result)
        for result in ("good", "failed"):
            self._passes.labels(result)

    def saw(self, found: Sequence[tuple[Row, TokenSecret | None]]) -> None:
        """The nodes as a pass finds them, with their Secrets."""
        waiting = [secret for row, secret in found
                   if secret and row.secret and row.state in ("waiting", "joining", "stuck")]
        oldest = min(waiting, key=lambda secret: secret.first_issued, default=None)
        with self._lock:
            self._nodes.clear()
            for pool, state in [(row.pool, state) for row, _ in found for state in STATES]:
                self._nodes.labels(pool, state)
            for row, _ in found:
                self._nodes.labels(row.pool, row.state).inc()
            self._expiry.set(oldest.expires if oldest else 0)

    def acted(self, action: Action, result: str, joined_after: float | None) -> None:
        """An action, and how long its node took to join when that is what it is about."""
        self._actions.labels(action.kind.value, result).inc()
        if joined_after is not None:
            self._joins.observe(joined_after)

    def passed(self, seconds: float, good: bool) -> None:
        """The end of a pass."""
        self._passes.labels("good" if good else "failed").inc()
        self._seconds.observe(seconds)
        if good:
            self._success.set(time.time())

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        with self._lock:
            content: bytes = self._text(self._registry)
            return content


class Monitor:
    """Tells how the server does: to systemd, to Prometheus by a file or over HTTP, and to probes.

    Only the loop of passes gives signs of life, so that one that hangs is found out.  It is `healthy`
    as long as it gives them, which a restart could mend; `ready` needs a good pass as well, or that
    another server leads.
    """

    def __init__(
        self, notify: Notify, metrics: Metrics | None = None, file: Path | None = None,
        interval: float = 10.0,
    ):
        self._notify, self._metrics, self._file = notify, metrics, file
        self.period = min(HUNG, notify.watchdog) / 2  # seconds to wait at most between two beats
        self._fresh = max(60.0, 3 * interval)  # seconds for which a good pass counts
        self._beaten, self._good = time.monotonic(), float("-inf")
        self._started, self._status = False, ""
        self._world: World | None = None

    def beat(self) -> None:
        """A sign of life; as long as the server starts it also puts off systemd's timeout for that."""
        self._beaten = time.monotonic()
        more = () if self._started else (f"EXTEND_TIMEOUT_USEC={HUNG * 1e6:.0f}",)
        self._notify.send("WATCHDOG=1", *more)

    def started(self) -> None:
        """The server is up: it has made a pass, or found that another one leads."""
        if not self._started:
            self._notify.send("READY=1")
        self._started = True

    def saw(self, world: World, actions: Iterable[Action]) -> None:
        """What a pass has found, before it acts."""
        self._world = world
        if self._metrics:
            self._metrics.saw([(row_of(action, world), action.secret) for action in actions])

    def acted(self, action: Action, result: str) -> None:
        """What became of an action of that pass."""
        self.beat()
        secret, world = action.secret, self._world
        if self._metrics and world:
            over = result == "done" and action.kind in (Kind.FINISH, Kind.REVOKE) and secret
            joined = over and world.joins.get(over.name) is Join.JOINED
            after = world.now - over.first_issued if over and joined else None
            self._metrics.acted(action, result, after)

    def passed(self, status: str, seconds: float, good: bool) -> None:
        """The end of a pass, with the line that sums it up."""
        self._tell(status)
        if good:
            self._good = time.monotonic()
        if self._metrics:
            self._metrics.passed(seconds, good)
            self._write(self._metrics)

    def stands_by(self) -> None:
        """Another server leads, so that is all right; what we saw before is no longer ours to tell."""
        self._good = time.monotonic()
        if self._metrics and self._status != "standing by":
            self._metrics.saw(())
            self._write(self._metrics)
        self._tell("standing by")
        self.started()

    def stopping(self) -> None:
        """The server ends."""
        self._notify.send("STOPPING=1")

    def _tell(self, status: str) -> None:
        if status != self._status:
            self._notify.send(f"STATUS={redact(' '.join(status.split()))}")
        self._status = status
        self.beat()

    def _write(self, metrics: Metrics) -> None:
        if self._file:
            try:
                write_whole(self._file, metrics.text().decode(), mode=0o644)
            except OSError as error:
                log.error("metrics not written file=%s: %s", self._file, error.strerror)

    def answer(self, path: str) -> tuple[int, bytes]:
        """Status and text for a GET of a path."""
        now = time.monotonic()
        if path == "/metrics" and self._metrics:
            return 200, self._metrics.text()
        if path == "/healthz":
            healthy = now - self._beaten < HUNG
            return (200, b"ok\n") if healthy else (503, b"the loop of passes hangs\n")
        if path == "/readyz":
            ready = now - self._good < self._fresh
            return (200, b"ok\n") if ready else (503, b"the last good pass is too long ago\n")
        return 404, b"/metrics, /healthz, /readyz\n"


@contextlib.contextmanager
def monitored(options: argparse.Namespace, calls: Calls) -> Iterator[Monitor]:
    """The monitor that the flags ask for, listening while the block lasts."""
    file = Path(options.metrics_file).absolute() if options.metrics_file else None
    if file and os.path.isdir(file):
        raise UsageError(f"--metrics-file: {file} is a folder")
    if file and not os.path.isdir(file.parent):
        raise SetupError(f"--metrics-file: {file}: there is no folder {file.parent}")
    if file:
        path_finding(file)
    metrics = Metrics(calls) if file or options.metrics_listen else None
    monitor = Monitor(Notify(os.environ), metrics, file, options.interval)
    with listening(options.metrics_listen, monitor) if options.metrics_listen else contextlib.nullcontext():
        try:
            yield monitor
        finally:
            monitor.stopping()


@contextlib.contextmanager
def listening(address: tuple[str, int], monitor: Monitor) -> Iterator[None]:
    """Answer HTTP at an address, "" for all of this machine's, in a thread of its own."""
    import socket
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        """Answers as the monitor says."""

        timeout, server_version, sys_version = 5.0, "keto-tokens", ""

        def do_GET(self) -> None:
            """Any path."""
            status, content = monitor.answer(self.path.partition("?")[0])
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Our log is about nodes."""

    host, port = address
    shown = f"[{host}]" if ":" in host else host
    dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
    server = ThreadingHTTPServer(address, Handler, bind_and_activate=False)
    server.socket.close()
    try:
        server.socket = socket.create_server(address, family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise SetupError(f"--metrics-listen: cannot listen at {shown}:{port}: {error.strerror}") from None
    log.info("metrics listen=%s:%s", shown, server.socket.getsockname()[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def cluster_access(options: argparse.Namespace, environ: Mapping[str, str]) -> Access:
    """Access by --kubeconfig, else --master, else the pod's service account; the flags override."""
    token = static_token(options.kube_token) if options.kube_token else None
    if options.kube_token_file:
        token = token_file(options.kube_token_file)
    if options.kubeconfig:
        access = Kubeconfig(options.kubeconfig).access(options.context)
    elif options.master:
        access = Access(options.master, "--master and --kube-token")
        if token is None and options.master.startswith("https:"):
            raise UsageError("--master needs --kube-token, --kube-token-file or --kubeconfig")
    elif environ.get("KUBERNETES_SERVICE_HOST"):
        access = in_cluster(environ, SERVICE_ACCOUNT)
    else:
        raise UsageError("no cluster: pass --kubeconfig, or --master with a token, or run in a pod")
    access = replace(
        access,
        server=checked_server(options.master or access.server, access, options),
        ca=read_ca(options.ca_path) if options.ca_path else access.ca,
        insecure=access.insecure or options.insecure_skip_tls_verify,
        credential=token or access.credential,
    )
    access.credential(False)  # a file that is missing, a plugin that fails: say so now
    return warned(access)


def checked_server(server: str, access: Access, options: argparse.Namespace) -> str:
    """The URL, unless it would send secrets in the clear without --insecure-skip-tls-verify."""
    try:
        parse_url(server)
    except ValueError as error:
        raise SetupError(f"{access.origin}: server: {error}") from None
    if server.startswith("http:") and not (access.insecure or options.insecure_skip_tls_verify):
        raise UsageError(f"{server} is not encrypted; --insecure-skip-tls-verify accepts that")
    return server


def warned(access: Access) -> Access:
    """The same, after a warning where the cluster is not verified."""
    if access.insecure:
        log.warning("the certificate of %s is NOT verified, as was asked", access.server)
    return access


# ---------------------------------------------------------------------------------------------
# Status: the same view of the world as the server's, in words
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What status says of a node; times in seconds, None where there is no Secret."""

    node: str
    pool: str
    lifecycle: str
    tag: str
    token_id: str
    age: float | None
    expires_in: float | None
    state: str
    reason: str
    secret: str = ""


def status_row(action: Action, join: Join, now: float) -> Row:
    """The state of the node of an action of `plan`."""
    node, secret = action.node, action.secret
    live = secret if secret and secret.live(now) else None
    state, reason = node_state(node, live, join, now)
    if node.gone or not node.wanted:
        state, reason = "gone" if node.gone else "idle", action.reason
    token = live.token if live else node.token
    return Row(
        node=node.id,
        pool=node.pool,
        lifecycle=node.state,
        tag="consumed" if node.consumed or node.received else "waiting" if node.token else "none",
        token_id=token.id if token else "",
        age=now - live.first_issued if live else None,
        expires_in=live.expires - now if live else None,
        state=state,
        reason=reason,
        secret=live.name if live else "",
    )


def row_of(action: Action, world: World) -> Row:
    """The state of the node of an action that was planned for this world."""
    name = action.secret.name if action.secret else ""
    return status_row(action, world.joins.get(name, Join.NO_CSR), world.now)


def node_state(node: Node, secret: TokenSecret | None, join: Join, now: float) -> tuple[str, str]:
    """The state of a node that is served, and what is likely to be behind it.

    `secret` is its live Secret.  A node is stuck when it takes longer than STUCK.
    """
    if secret is None and node.consumed:
        return "joined", "consumed, and its token is gone"
    if secret is None:
        return "new", "no token yet: is the server running?"
    if join is Join.JOINED:
        return "joined", "its token is revoked in the next pass"
    age = format_duration(now - secret.first_issued)
    slow = now - secret.first_issued >= STUCK
    taken = node.consumed or node.received or join not in (Join.NO_CSR, Join.UNKNOWN)
    if not taken and node.token != secret.token:
        return "stuck" if slow else "waiting", "token not in its tag: is the server running, may it tag?"
    if not taken:
        words = f"tag not read in {age}: is the client running?" if slow else "tag not read yet"
        return "stuck" if slow else "waiting", words
    hints = {
        Join.NO_CSR: "is the kubelet running, can it reach the API?",
        Join.PENDING: "is anything there to approve it?",
        Join.DENIED: "see kubectl describe csr",
        Join.ISSUED: "does the kubelet register itself?",
        Join.UNKNOWN: "the right to list CSRs or get Nodes is missing",
    }
    words = f"consumed, {join.value} {age} after the token was issued"
    slow = (slow or join is Join.DENIED) and join is not Join.UNKNOWN
    return "stuck" if slow else "joining", f"{words}: {hints[join]}" if slow else words


_COLUMNS = {
    "NODE": lambda row: row.node,
    "POOL": lambda row: row.pool,
    "LIFECYCLE": lambda row: row.lifecycle,
    "TAG": lambda row: row.tag,
    "TOKEN": lambda row: row.token_id or "-",
    "AGE": lambda row: "-" if row.age is None else format_duration(row.age),
    "EXPIRES": lambda row: "-" if row.expires_in is None else format_duration(row.expires_in),
    "STATE": lambda row: row.state,
    "SECRET": lambda row: row.secret or "-",
    "REASON": lambda row: row.reason,
}  # type: dict[str, Callable[[Row], str]]
_COLOURS = {"stuck": "31", "joined": "32", "joining": "33", "waiting": "33", "gone": "2", "idle": "2"}


def table(rows: Sequence[Row], wide: bool, colour: bool) -> Iterator[str]:
    """The lines of the table; reasons of nodes that are not stuck are only in the wide one."""
    columns = [name for name in _COLUMNS if wide or name != "SECRET"]
    cells = [[_COLUMNS[name](row) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    for row, line in zip([None, *rows], [columns, *cells]):
        if row and row.state != "stuck" and not wide:
            line = [*line[:-1], ""]
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        yield f"\033[{_COLOURS.get(row.state, 0)}m{text}\033[0m" if row and colour else text


def status_rows(server: Server, policy: Policy, node_id: str) -> list[Row]:
    """The rows of all nodes, by pool and id, or of the one."""
    world = server.observe()
    rows = [row_of(action, world) for action in plan(world, policy)]
    return sorted(
        (row for row in rows if node_id in ("", row.node, *row.node.split("/"))),
        key=lambda row: (row.pool, row.node),
    )


def run_status(options: argparse.Namespace, stop: Stop) -> int:
    """The status command; 1 when a node is stuck."""
    calls = Calls()
    pools, store = server_parts(options, calls, stop)
    policy = Policy(options.token_ttl)
    server = Server(pools, store, options.filter, policy, calls, stop.event)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    seen = False
    while True:
        try:
            rows = status_rows(server, policy, options.node)
        except KetoError as error:
            if not (seen and options.watch):
                raise
            log.error("%s", error)
            if stop.wait(options.interval):
                return 0
            continue
        seen = True
        if options.node and not rows:
            raise SetupError(f"{options.node} is in no group that matches the filters")
        if options.watch and colour:
            print("\033[H\033[J", end="")
        if options.output == "json":
            print(json.dumps([vars(row) for row in rows], indent=2))
        else:
            print(*table(rows, options.output == "wide", colour), sep="\n")
        sys.stdout.flush()
        if not options.watch or stop.wait(options.interval):
            return int(any(row.state == "stuck" for row in rows))


# ---------------------------------------------------------------------------------------------
# Discovery: which cluster is the right one, when no file says so.  No token is sent to a server that
# is not verified.
# ---------------------------------------------------------------------------------------------

CLUSTER_INFO = "/api/v1/namespaces/kube-public/configmaps/cluster-info"


def discover(
    server: str, token: Token, pins: Sequence[str], sleep: Callable[[float], Any]
) -> Access:
    """Access to the cluster at `server`, verified by the CA that its cluster-info holds.

    The CA is believed when its public key is pinned; without pins, when cluster-info is signed with
    this very token.  Then the same must be read again over TLS that the CA verifies.  Raises
    SetupError for what no time will mend, CallFailed for what may come right.
    """
    unverified = Access(server, "nobody", insecure=True)
    data = cluster_info(Cluster(unverified, Calls(), sleep))
    ca = cluster_info_ca(data["kubeconfig"])
    if pins:
        ca = pinned_ca(ca, pins)
    else:
        check_signature(data, token)
    access = Access(server, "nobody", ca=ca)
    again = cluster_info(Cluster(access, Calls(), sleep))
    if again["kubeconfig"] != data["kubeconfig"]:
        raise CallFailed("cluster-info was another when read again over verified TLS")
    return access


def cluster_info(cluster: Cluster) -> dict[str, str]:
    """The data of the ConfigMap, which anybody may read where it is set up."""
    instead = "so the cluster's CA cannot be found out; pass --ca-path"
    try:
        data = cluster.request("GET", CLUSTER_INFO).get("data")
    except Refused:
        raise SetupError(f"{cluster.access.server} answers nobody without a token, {instead}") from None
    except CallFailed as error:
        if error.status not in (403, 404):
            raise
        raise SetupError(f"{error}: {instead}") from None
    if not isinstance(data, dict) or not isinstance(data.get("kubeconfig"), str):
        raise SetupError(f"cluster-info of {cluster.access.server} holds no kubeconfig, {instead}")
    return data


def cluster_info_ca(text: str) -> str:
    """The CA certificates (PEM) in cluster-info's kubeconfig."""
    import yaml

    try:
        if len(text) > 1 << 18:
            raise ValueError
        cluster = yaml.safe_load(text)["clusters"][0]["cluster"]
        ca = _decode(cluster["certificate-authority-data"])
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        raise SetupError("the kubeconfig in cluster-info holds no CA; pass --ca-path") from None
    return checked_ca(ca, "the kubeconfig in cluster-info")


def pinned_ca(ca: str, pins: Sequence[str]) -> str:
    """The certificates whose public key is pinned, and no other: who answers may have added any."""
    try:
        hashes = {public_key_hash(certificate): certificate for certificate in certificates(ca)}
    except ValueError as error:
        raise SetupError(f"a certificate in cluster-info is malformed: {error}") from None
    found = [text for value, text in hashes.items() if any(same(value, pin) for pin in pins)]
    if not found:
        raise SetupError(
            f"the CA in cluster-info has {', '.join(hashes)}, which is not --ca-cert-hash: "
            "this is not the cluster that was meant, or its CA has changed"
        )
    return "".join(found)


def check_signature(data: Mapping[str, str], token: Token) -> None:
    """Raise unless cluster-info is signed with the token.  A new one is signed after some seconds."""
    found = data.get(f"jws-kubeconfig-{token.id}")
    if not isinstance(found, str):
        raise CallFailed(f"cluster-info is not signed with token id {token.id} yet")
    if not same(found, signature(token, data["kubeconfig"])):
        raise CallFailed(
            f"cluster-info's signature is not made with token id {token.id}: it is being replaced, "
            "or this is not the cluster that the token is for"
        )


def same(one: str, other: str) -> bool:
    """Whether two texts are equal, found out in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())


def certificate_names(access: Access) -> str:
    """The names in the certificate of a server whose CA is right, for a message."""
    import socket

    context = tls_context(access, Credential())
    context.check_hostname = False
    url = urllib.parse.urlsplit(access.server)
    try:
        address = url.hostname or "", url.port or 443
        with socket.create_connection(address, TIMEOUTS[0]) as plain:
            with context.wrap_socket(plain, server_hostname=url.hostname) as connection:
                certificate = connection.getpeercert() or {}
    except (OSError, ValueError):
        return "unknown names"
    pairs: Any = certificate.get("subjectAltName", ())
    return ", ".join(str(value) for _, value in pairs) or "no names"


# ---------------------------------------------------------------------------------------------
# Client: identify, wait, verify, write, mark.  Run again at any point it goes on from what it finds.
# ---------------------------------------------------------------------------------------------


class Client:
    """Waits for this instance's token and turns it into a kubeconfig at `path`.

    With `join_config` it also writes what `kubeadm join --config` takes there.
    """

    def __init__(
        self, instance: Instance, trust: Callable[[Token], Access], path: Path,
        join_config: Path | None = None, *, tag_name: str, interval: float, timeout: float, stop: Stop,
    ):
        self._instance, self._trust, self._path, self._stop = instance, trust, path, stop
        self._join_config = join_config
        self._tag_name, self._interval, self._timeout = tag_name, interval, timeout
        self._deadline = time.monotonic() + timeout if timeout else float("inf")
        self._told, self._looks, self._refused = "", 0, False

    def run(self) -> None:
        """Return when the token is consumed; TimedOut, Interrupted or NotMarked when it is not."""
        while why := self._why_not_yet():
            # What goes on unchanged is worth one line, not one for each look.
            log.log(logging.DEBUG if why == self._told else logging.INFO, "waiting: %s", why)
            self._looks = self._looks + 1 if self._refused or why == self._told else 0
            self._told = self._told if self._refused else why
            self._pause(why)

    def _why_not_yet(self) -> str:
        """One look: what we still wait for, "" when all is done."""
        self._refused = False
        try:
            return self._look()
        except CallFailed as error:
            self._refused = isinstance(error, Throttled)
            return str(error)
        except SetupError as error:
            if not error.again:
                raise
            return str(error)

    def _look(self) -> str:
        node_id = self._instance.identify()
        value = self._instance.read_tag()
        where = f"tag {self._tag_name} of {node_id}"
        if value == CONSUMED:
            self._already(where)
            return ""
        token = parse_token(value)
        if token is None:
            return f"{where} holds no token" if value else f"{where} is not there yet"
        access = self._trust(token)
        refusal = token_refusal(access, token, self._stop.wait)
        if refusal:
            return f"{where}: {refusal}"
        self._consume(access, token, node_id)
        return ""

    def _already(self, where: str) -> None:
        log.info("%s says that its token was consumed already: nothing to do", where)
        if not self._path.exists():
            log.warning("%s is not there; to get a new token, delete the tag", self._path)

    def _consume(self, access: Access, token: Token, node_id: str) -> None:
        self._write("kubeconfig", self._path, bootstrap_kubeconfig(access, token), node_id, token)
        if self._join_config:
            text = join_configuration(self._path)
            self._write("join_config", self._join_config, text, node_id, token)
        self._mark(node_id, token)
        log.info("consumed node=%s tag=%s token_id=%s", node_id, self._tag_name, token.id)

    def _write(self, what: str, path: Path, text: str, node_id: str, token: Token) -> None:
        try:
            said = "written" if write_whole(path, text) else "unchanged"
        except OSError as error:
            why = f"{error.filename}: {error.strerror}"
            raise SetupError(f"cannot write {path}: {why}; run again") from None
        log.info("%s %s=%s node=%s token_id=%s", said, what, path, node_id, token.id)

    def _mark(self, node_id: str, token: Token) -> None:
        """Mark the tag, with patience: a new role's rights can take a while to be known."""

        def mark() -> None:
            try:
                self._instance.mark_consumed(token)
            except KetoError as error:
                log.warning("the tag is not marked yet: %s", error)
                raise CallFailed(str(error), again=True) from None

        try:
            retrying(mark, self._stop.wait, MARK_ATTEMPTS)
        except CallFailed as error:
            raise NotMarked(
                f"{self._path} is written, but tag {self._tag_name} of {node_id} is not marked: "
                f"{error}; run again to mark it"
            ) from None

    def _pause(self, why: str) -> None:
        """Wait for the next look."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimedOut(f"no token after {format_duration(self._timeout)}: {why}")
        pause = pause_after(self._looks, self._refused, self._interval, random.uniform(0.0, 1.0))
        self._instance.wait_for_change(min(left, pause))
        if self._stop.signum:
            raise Interrupted(self._stop.signum)


def pause_after(looks: int, refused: bool, interval: float, chance: float) -> float:
    """Seconds to the next look, after so many that found nothing new; `chance` is from [0, 1).

    Nodes that booted together should not ask together, and EC2 lets all of an account describe 20 times
    a second.  Doubled up to 12 intervals, 1,000 nodes that wait ask 17 times a second.  A node that was
    `refused` for the rate is one of too many, and comes back at any time within 25 intervals.
    """
    if refused:
        return interval * (1 + 24 * chance)
    return interval * min(12.0, 2.0 ** min(looks, 4)) * (0.75 + 0.5 * chance)


def token_refusal(access: Access, token: Token, sleep: Callable[[float], Any]) -> str:
    """Why the cluster does not take the token, "" when it does.

    The API server says who it takes us for since 1.28.  An older one answers 404: there, any
    request tells, as a token that is not live gets 401 before all else.
    """
    cluster = Cluster(replace(access, credential=static_token(token.value)), Calls(), sleep)
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    path = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
    try:
        try:
            user = dig(cluster.request("POST", path, review), "status", "userInfo", "username")
        except CallFailed as error:
            if error.status not in (403, 404):
                raise
            return authenticated(cluster)
    except Refused:
        return f"the cluster does not accept token id {token.id}: expired, or not this cluster's"
    taken = user == f"system:bootstrap:{token.id}"
    return "" if taken else f"the cluster takes token id {token.id} for {str(user)[:80]!r}"


def authenticated(cluster: Cluster) -> str:
    """"" when the cluster knows the credential, whatever it allows; else raises Refused."""
    try:
        cluster.request("GET", "/version")
    except CallFailed as error:
        if error.status != 403:
            raise
    return ""


def bootstrap_kubeconfig(access: Access, token: Token) -> str:
    """The kubeconfig for the kubelet's --bootstrap-kubeconfig, with the CA inside.

    The names are those that the Go program of this name gave.
    """
    import yaml

    cluster: dict[str, Any] = {"server": access.server}
    if access.insecure:
        cluster["insecure-skip-tls-verify"] = True
    else:
        ca = access.ca.encode()
        cluster["certificate-authority-data"] = base64.b64encode(ca).decode()
    name = "bootstrap-context"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "cluster", "cluster": cluster}],
        "users": [{"name": name, "user": {"token": token.value}}],
        "contexts": [{"name": name, "context": {"cluster": "cluster", "user": name}}],
        "current-context": name,
    }
    text: str = yaml.safe_dump(content, sort_keys=False, width=1 << 20)
    return text


def join_configuration(kubeconfig: Path) -> str:
    """What `kubeadm join --config` takes: discovery by the bootstrap kubeconfig.

    kubeadm joins with the credential in that file, so the token does not have to stand here as well
    (cmd/kubeadm/app/discovery, since 1.15).  How the node registers is left to kubeadm's defaults.
    """
    import yaml

    text: str = yaml.safe_dump(
        {
            "apiVersion": "kubeadm.k8s.io/v1beta4",
            "kind": "JoinConfiguration",
            "discovery": {"file": {"kubeConfigPath": str(kubeconfig)}},
        },
        sort_keys=False, width=1 << 20,
    )
    return text


def write_whole(path: Path, text: str, mode: int = 0o600) -> bool:
    """Replace a file in one step; False when it holds just that already.

    Whoever reads it sees the old file or the new one, also after a power cut.  A file that a killed
    run left behind is cleared: it is nobody's when nobody holds its lock.
    """
    import tempfile

    make_parents(path)
    prefix = f".{path.name}.keto-tokens-"
    for leftover in [each for each in path.parent.iterdir() if each.name.startswith(prefix)]:
        with contextlib.suppress(OSError), open(leftover) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
    with contextlib.suppress(OSError, ValueError):
        if path.read_text() == text and path.stat().st_mode & 0o777 == mode:
            return False
    descriptor, temporary = tempfile.mkstemp(prefix=prefix, dir=path.parent)  # mode 0600
    with open(descriptor, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if mode != 0o600:
                os.fchmod(descriptor, mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    sync_folder(path.parent)
    return True


def make_parents(path: Path) -> None:
    """Make the folders above `path` that are missing, 0755 whatever the umask."""
    before = os.umask(0o022)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(before)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def client_paths(options: argparse.Namespace) -> list[Path]:
    """Where the kubeconfig is to be written, and kubeadm's JoinConfiguration if it is wanted."""
    path = Path(options.kubeconfig).absolute()
    beside = Path(options.join_config or path.parent / "kubeadm-join.yaml").absolute()
    paths = {"--kubeconfig": path, "--join-config": beside}
    if options.format != "kubeadm":
        del paths["--join-config"]
    elif path == beside:
        raise UsageError("--kubeconfig and --join-config are two files")
    for name, each in paths.items():
        if os.path.isdir(each):
            raise UsageError(f"{name}: {each} is a folder")
    if holds_more_than_a_token(path):
        raise SetupError(f"--kubeconfig [KUBECONFIG]: {path} holds another credential than a bootstrap "
                         "token, and would be replaced; name another file")
    return [*paths.values()]


def holds_more_than_a_token(path: Path) -> bool:
    """Whether a file is a kubeconfig with a certificate, a plugin, or a token that is no bootstrap token."""
    try:
        text = path.read_text()
    except (OSError, ValueError):
        return False
    other = r"(?m)^[\s\-{]*\"?(client-(certificate|key)(-data)?|exec|auth-provider|tokenFile|password)\"?:"
    tokens = re.findall(r"(?m)^\s*token:\s*[\"']?([^\s\"']+)", text)
    return bool(re.search(other, text)) or not all(map(parse_token, tokens))


def client_trust(options: argparse.Namespace, stop: Stop) -> Callable[[Token], Access]:
    """How the client comes to the access that it writes: by a file, or by cluster-info."""
    ways = {
        "--ca-path": options.ca_path, "--ca-cert-hash": options.ca_cert_hash,
        "--insecure-skip-tls-verify": options.insecure_skip_tls_verify,
    }
    given = [name for name, value in ways.items() if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} contradict each other: pass one")
    access = Access(options.master, "the tag", insecure=options.insecure_skip_tls_verify)
    checked_server(options.master, access, options)
    if options.ca_path:
        access = replace(access, ca=read_ca(options.ca_path))
    if options.ca_path or warned(access).insecure:
        return lambda token: access
    return lambda token: discover(options.master, token, options.ca_cert_hash, stop.wait)


def this_instance(options: argparse.Namespace, stop: Stop) -> Instance:
    """The client's side of the cloud that was named, or of the one that it finds itself in."""
    make = AutoInstance if options.cloud == "auto" else CLOUDS[options.cloud].instance
    return make(options, Calls(), stop.wait)


def run_client(options: argparse.Namespace, stop: Stop) -> int:
    """The client command; the exit code."""
    paths, trust = client_paths(options), client_trust(options, stop)
    for path in paths:
        path_finding(path)  # to be told now, and not when the token is there
    client = Client(
        this_instance(options, stop),
        trust,
        *paths,
        tag_name=options.tag_name,
        interval=options.interval,
        timeout=options.timeout,
        stop=stop,
    )
    client.run()
    return 0


# ---------------------------------------------------------------------------------------------
# Check: would server or client work here?  Nothing is changed.
# ---------------------------------------------------------------------------------------------

Found = TypeVar("Found")


class Preflight:
    """Findings, a line for each step: ok, warn or FAIL."""

    def __init__(self) -> None:
        self.findings: list[dict[str, str]] = []

    def step(self, subject: str, call: Callable[[], str]) -> bool:
        """Note what `call` says of a subject: it returns, raises Doubt, or another KetoError."""
        try:
            level, text = "ok", call()
        except KetoError as error:
            level, text = "warn" if isinstance(error, Doubt) else "FAIL", redact(str(error))
        self.findings.append({"level": level, "subject": subject, "text": text})
        return level != "FAIL"

    def find(self, subject: str, call: Callable[[], tuple[Found, str]]) -> Found | None:
        """Like `step`, for a call that also returns what later steps need; None when it failed."""
        result: list[Found] = []

        def text() -> str:
            found, words = call()
            result.append(found)
            return words

        self.step(subject, text)
        return result[0] if result else None

    def cluster(self, cluster: Cluster) -> bool:
        """That it answers, how it is known to be the right one, and its clock."""

        def version() -> str:
            answer = cluster.request("GET", "/version", attempts=1)
            text = f"{cluster.access.server} answers, version {answer.get('gitVersion', 'unknown')}"
            if cluster.access.insecure:
                raise Doubt(f"{text}; its certificate is NOT verified")
            by = "its CA" if cluster.access.ca else "the system's CAs"
            return f"{text}; its certificate is verified by {by}"

        def clock() -> str:
            skew = cluster.skew()
            text = f"{format_duration(abs(skew))} {'ahead of' if skew > 0 else 'behind'} the cluster's"
            if abs(skew) > SKEW:
                raise Doubt(f"{text}; is NTP running?")
            return "agrees with the cluster's"

        return self.step("cluster", version) and self.step("clock", clock)

    def rights(self, cluster: Cluster, namespace: str, leases: bool) -> None:
        """What the RBAC of README grants."""
        secrets_, csrs = ("", "secrets", namespace), ("certificates.k8s.io", "certificatesigningrequests", "")
        wanted = [(verb, *secrets_, False) for verb in ("list", "get", "create", "update", "delete")]
        wanted += [("list", *csrs, True), ("get", "", "nodes", "", True)]
        if leases:
            lease = "coordination.k8s.io", "leases", namespace
            wanted += [(verb, *lease, False) for verb in ("get", "create", "update")]
        for verb, group, resource, where, optional in wanted:
            call = functools.partial(may, cluster, verb, group, resource, where, optional)
            if not self.step(f"{verb} {resource}", call):
                self.findings[-1]["text"] += " (README, Rights)"


def may(cluster: Cluster, verb: str, group: str, resource: str, where: str, optional: bool) -> str:
    """Ask the cluster whether we may."""
    wish = {"verb": verb, "group": group, "resource": resource, "namespace": where}
    body = {
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {key: value for key, value in wish.items() if value}},
    }
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    answer = cluster.request("POST", path, body, attempts=1)
    if dig(answer, "status", "allowed") is True:
        return "allowed"
    if optional:
        raise Doubt("not allowed, so joins cannot be seen, and tokens are left to expire")
    raise SetupError("not allowed")


def namespace_finding(namespace: str) -> str:
    """Whether the API server looks for tokens there."""
    if namespace != READ_NAMESPACE:
        raise SetupError(f"{namespace}: the API server reads tokens from {READ_NAMESPACE} alone")
    return f"{namespace}, where the API server reads them"


def info_finding(access: Access, token: Token | None, sleep: Callable[[float], Any]) -> str:
    """Whether clients without a CA file can find the cluster."""
    try:
        data = cluster_info(Cluster(replace(access, credential=Access.credential), Calls(), sleep))
        cluster_info_ca(data["kubeconfig"])
        if token:
            check_signature(data, token)
    except (SetupError, CallFailed) as error:
        raise Doubt(f"{error}; clients need --ca-path") from None
    signed = any(key.startswith("jws-kubeconfig-") for key in data)
    if not signed:
        raise Doubt("present, not signed: no token is live, or the bootstrapsigner does not run")
    return "present and signed" + (" with our token" if token else "")


def live_finding(access: Access, token: Token, sleep: Callable[[float], Any]) -> str:
    """Whether bootstrap authentication works, by a token that should be live."""
    refusal = token_refusal(access, token, sleep)
    if refusal:
        raise SetupError(f"{refusal}; does the API server run with --enable-bootstrap-token-auth?")
    return f"works: the cluster takes token id {token.id}"


def check_server(look: Preflight, options: argparse.Namespace, stop: Stop) -> None:
    """All that the server needs."""
    access = look.find("access", lambda: _with_origin(cluster_access(options, os.environ)))
    cluster = Cluster(access, Calls(), stop.wait) if access else None
    look.step("token namespace", lambda: namespace_finding(options.token_namespace))
    pools = look.find("cloud", lambda: (
        cloud_pools(options, Calls(), stop), options.cloud))
    if access and cluster and look.cluster(cluster):
        look.rights(cluster, options.token_namespace, options.leader_elect)
        live = _live_token(cluster, options, pools.scope) if pools else None
        look.step("cluster-info", lambda: info_finding(access, live, stop.wait))
        if live:
            look.step("bootstrap tokens", lambda: live_finding(access, live, stop.wait))
    for subject, call in pools.checks(options.filter) if pools else ():
        look.step(subject, call)


def _with_origin(access: Access) -> tuple[Access, str]:
    return access, f"{access.server} by {access.origin}"


def _live_token(cluster: Cluster, options: argparse.Namespace, scope: str) -> Token | None:
    """A token of ours to try, if there is one: making one would change something."""
    owner = owner_hash(options.cloud, scope, options.tag_name, options.filter)
    store = TokenStore(
        cluster, owner, namespace=options.token_namespace, groups="", ttl=options.token_ttl
    )
    with contextlib.suppress(KetoError):
        return next((each.token for each in store.list() if each.live(cluster.now())), None)
    return None


def check_client(look: Preflight, options: argparse.Namespace, stop: Stop) -> None:
    """All that the client needs."""
    (path, *others), trust = client_paths(options), client_trust(options, stop)
    look.step("kubeconfig", lambda: path_finding(path))
    for other in others:
        look.step("join config", functools.partial(path_finding, other))
    instance = this_instance(options, stop)
    for subject, call in instance.checks():
        look.step(subject, call)
    token = look.find("tag", lambda: tag_finding(instance, options.tag_name))
    known = options.ca_path or options.insecure_skip_tls_verify
    if not token and not known:
        unverified = Access(options.master, "nobody", insecure=True)
        look.step("cluster-info", lambda: info_finding(unverified, None, stop.wait))
        return
    some = token or Token("", "")
    way = "by --ca-path" if options.ca_path else "none: nothing is verified, as was asked" if known else (
        "by cluster-info, and the same over verified TLS")
    access = look.find("trust", lambda: (trust(some), way))
    if access and look.cluster(Cluster(access, Calls(), stop.wait)) and token:
        look.step("bootstrap token", lambda: live_finding(access, token, stop.wait))


def path_finding(path: Path) -> str:
    """Whether the kubeconfig can be written; the nearest folder that is there decides."""
    folder = next(folder for folder in path.parents if os.path.lexists(folder))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise SetupError(f"{path} cannot be written: {folder} is no folder that we may write in")
    return f"{path} {'is there' if os.path.exists(path) else 'can be written'}"


def tag_finding(instance: Instance, tag_name: str) -> tuple[Token | None, str]:
    """What the tag says; the token that waits in it."""
    value = instance.read_tag()
    token = parse_token(value)
    if token:
        return token, f"{tag_name} holds token id {token.id}"
    if value == CONSUMED:
        return None, f"{tag_name} says that the token was consumed"
    state = "holds no token" if value else "is not there"
    raise Doubt(f"{tag_name} {state}: does the server run, with filters that match this node's group?")


def run_check(options: argparse.Namespace, stop: Stop) -> int:
    """The check commands; 1 when something fails."""
    look = Preflight()
    check_server(look, options, stop) if options.role == "server" else check_client(look, options, stop)
    if options.output == "json":
        print(json.dumps(look.findings, indent=2))
    width = max(len(finding["subject"]) for finding in look.findings)
    for finding in look.findings if options.output != "json" else ():
        print(f"{finding['level']:<5} {finding['subject']:<{width}}  {finding['text']}")
    return int(any(finding["level"] == "FAIL" for finding in look.findings))


# ---------------------------------------------------------------------------------------------
# Generate: ready files for those who run it, from the flags that they are to run with
# ---------------------------------------------------------------------------------------------

SCOPE_FLAGS = {"aws": "region", "gce": "project"}  # the flag that says what Pools.scope will be
METRICS_PORT = 9115

SANDBOX = """\
# The file unpacks itself there.
CacheDirectory=keto-tokens
CacheDirectoryMode=0700
NoNewPrivileges=yes
ProtectSystem=strict
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProcSubset=pid
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
"""

SYSTEMD_SERVER = f"""\
# /etc/systemd/system/keto-tokens.service
[Unit]
Description=Bootstrap tokens for new Kubernetes nodes
Wants=network-online.target
After=network-online.target

[Service]
ExecStart=@COMMAND@
@KIND@
# A wrong flag is not mended by a restart.
RestartPreventExitStatus=2
@CREDENTIALS@
@USER@
ProtectHome=yes
UMask=0077
{SANDBOX}
@INSTALL@
"""
STAYING = """\
# Up after its first pass; `systemctl status` shows what the last one did.  The loop of passes itself
# gives signs of life, before each step and after each action, so one that hangs is restarted: a call
# to AWS with all its retries may take 200 s.
Type=notify
WatchdogSec=5min
TimeoutStartSec=5min
Restart=always
RestartSec=5
# Threads come and go with each pass; without this glibc keeps some MB for each it has seen.
Environment=MALLOC_ARENA_MAX=1"""
ONE_PASS = """\
# A pass each time keto-tokens.timer says so; as long as it runs, no other one is started.
Type=oneshot
TimeoutStartSec=1h"""
NOBODY = """\
# A user that is there only while it runs, with no power at all.
DynamicUser=yes
PrivateUsers=yes
CapabilityBoundingSet="""
ROOT_ALONE = """\
# root, since the metrics go where others may not write, but with none of its other powers.
CapabilityBoundingSet=CAP_DAC_OVERRIDE
ReadWritePaths="""

SYSTEMD_CLIENT = f"""\
# /etc/systemd/system/keto-tokens-client.service
[Unit]
Description=Bootstrap credential for the kubelet
# Nothing is to be done where the kubelet has a credential of its own.
ConditionPathExists=!/etc/kubernetes/kubelet.conf
Wants=network-online.target
After=network-online.target
@BEFORE@
# It is tried until it succeeds.
StartLimitIntervalSec=0

[Service]
Type=oneshot
RemainAfterExit=yes
@FOLDERS@
ExecStart=@COMMAND@
@JOIN@
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2
# root, since the kubelet reads what is written as root, but with none of its other powers.
CapabilityBoundingSet=CAP_DAC_OVERRIDE
ReadWritePaths=@WRITES@
ProtectHome=read-only
{SANDBOX}
[Install]
WantedBy=@WANTED@
"""

SYSTEMD_TIMER = """\
# /etc/systemd/system/keto-tokens.timer, for the service that this makes:
#   @SERVICE@
[Unit]
Description=Passes of keto-tokens

[Timer]
OnActiveSec=0
# From the end of a pass to the start of the next one.
OnUnitInactiveSec=@INTERVAL@
AccuracySec=1s

[Install]
WantedBy=timers.target
"""

CRON = """\
# /etc/cron.d/keto-tokens: passes, none while the last one still runs.  What they say goes to
# syslog; what a pass could not do is done by the next.
SHELL=/bin/sh
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
@EVERY@ * * * * root flock -n /run/keto-tokens.lock @COMMAND@ 2>&1 | logger -t keto-tokens
"""

RBAC = """\
apiVersion: v1
kind: ServiceAccount
metadata: {name: keto-tokens, namespace: @NS@}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: keto-tokens, namespace: @NS@}
rules:
- apiGroups: [""]
  resources: [secrets]
  verbs: [list, get, create, update, delete]
@LEASES@
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: keto-tokens, namespace: @NS@}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: keto-tokens}
subjects:
- {kind: ServiceAccount, name: keto-tokens, namespace: @NS@}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: keto-tokens}
rules:  # to see that a node has joined; without them tokens are left to expire
- apiGroups: [certificates.k8s.io]
  resources: [certificatesigningrequests]
  verbs: [list]
- apiGroups: [""]
  resources: [nodes]
  verbs: [get]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: keto-tokens}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: keto-tokens}
subjects:
- {kind: ServiceAccount, name: keto-tokens, namespace: @NS@}
"""
LEASES = """\
- apiGroups: [coordination.k8s.io]  # for --leader-elect
  resources: [leases]
  verbs: [get, create, update]"""
NAMED_LEASES = """\
- apiGroups: [coordination.k8s.io]  # for --leader-elect: the Lease of servers with these flags
  resources: [leases]
  resourceNames: [@NAME@]
  verbs: [get, update]
- apiGroups: [coordination.k8s.io]  # what is created has no name yet that could be asked for
  resources: [leases]
  verbs: [create]"""

DEPLOYMENT = """\
# What this may do in the cluster comes from `keto-tokens generate rbac`.
apiVersion: apps/v1
kind: Deployment
metadata: {name: keto-tokens, namespace: @NS@, labels: {app: keto-tokens}}
spec:
  replicas: @REPLICAS@
  selector: {matchLabels: {app: keto-tokens}}
  template:
    metadata: {labels: {app: keto-tokens}}
    spec:
      serviceAccountName: keto-tokens
      priorityClassName: system-cluster-critical
      # The file is mounted from the host, so it has to be on the hosts of the control plane.  Where the
      # cloud's credentials are the host's role, its metadata service needs a hop limit of 2.
      nodeSelector: {node-role.kubernetes.io/control-plane: ""}
      tolerations:
      - {key: node-role.kubernetes.io/control-plane, effect: NoSchedule}
      securityContext:
        {runAsNonRoot: true, runAsUser: 65534, runAsGroup: 65534, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: keto-tokens
        image: @IMAGE@  # any with a python3 of 3.10 or newer
        command: [python3, @PATH@]
        args:
        @ARGS@
        env:
        - {name: SHIV_ROOT, value: /cache/keto-tokens}  # where the file unpacks itself, for us alone
        - {name: MALLOC_ARENA_MAX, value: "1"}  # else glibc keeps memory for threads that are gone
        ports:
        - {name: metrics, containerPort: @PORT@}
        # A loop of passes that hangs is restarted; one whose passes fail is not ready.
        livenessProbe: {httpGet: {path: /healthz, port: metrics}, periodSeconds: 30, timeoutSeconds: 5}
        readinessProbe: {httpGet: {path: /readyz, port: metrics}, timeoutSeconds: 5}
        resources: {requests: {cpu: 20m, memory: 64Mi}, limits: {memory: 256Mi}}
        securityContext:
          {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
        volumeMounts:
        - {name: program, mountPath: @PATH@, readOnly: true}
        - {name: cache, mountPath: /cache}
      volumes:
      - {name: program, hostPath: {path: @PATH@, type: File}}
      - {name: cache, emptyDir: {}}
"""

GCE_ROLE = """\
# gcloud iam roles create ketoTokens --project PROJECT --file FILE
# setMetadata on a node that runs as a service account also takes iam.serviceAccounts.actAs on that
# account: grant roles/iam.serviceAccountUser on the nodes' accounts, not in the project.
title: keto-tokens server
description: Finds instances, leaves bootstrap tokens in their metadata, reads their guest attributes
stage: GA
includedPermissions:
@PERMISSIONS@
"""


class Verbatim(str):
    """A word in which systemd is to put in a variable."""


def fill(template: str, **values: str) -> str:
    """The template with each @NAME@ replaced by its value; a line with an empty one is left out."""
    lines = []
    for line in template.splitlines():
        if all(values[name] for name in re.findall("@([A-Z]+)@", line)):
            lines.append(re.sub("@([A-Z]+)@", lambda match: values[match[1]], line))
    return "\n".join(lines).rstrip() + "\n"


def invocation(options: argparse.Namespace, **instead: Any) -> list[list[str]]:
    """The flags that were given, each as its words; `instead` are values in place of theirs.

    They are parsed as they will be, so that nothing is generated that is refused when it runs.
    """
    role = GENERATES[options.role].role
    values = {**vars(options), **instead}
    words: list[list[str]] = []
    for flag in [*GLOBAL_FLAGS, *COMMANDS[role].flags]:
        value = values[flag.dest]
        if flag.boolean:
            words += [[f"--{flag.name}"]] * value
        elif value and not (flag in GLOBAL_FLAGS and value == flag.default):
            words += [flag_words(flag, text) for text in (value if flag.repeat else [value])]
    parse_options([role, *(word for each in words for word in each)], {})
    return words


def flag_words(flag: Flag, text: str) -> list[str]:
    """A flag with its value, as words of a command; UsageError where it cannot stand in a file."""
    if flag.name == "kube-token":
        raise UsageError("--kube-token: nothing secret is generated; pass --kube-token-file")
    if not text.isprintable():
        raise UsageError(f"--{flag.name}: {text!r} has characters that cannot stand in a file")
    if flag.metavar == "FILE" and not text.startswith(("/", "${")):
        raise UsageError(f"--{flag.name}: {text!r} is relative, but to what? Pass an absolute path")
    if text.startswith("-"):
        return [f"--{flag.name}={text}"]
    return [f"--{flag.name}", text]


def server_invocation(options: argparse.Namespace, **instead: Any) -> list[list[str]]:
    """The server's flags, for a host, where a cluster has to be named."""
    if not options.kubeconfig and not (options.master and options.kube_token_file):
        invocation(options, **instead)  # what else is wrong comes first
        raise UsageError("which cluster? Pass --kubeconfig, or --master and --kube-token-file")
    return invocation(options, **instead)


def unit_word(text: str) -> str:
    """A word of a command in a unit: systemd.service(5), "Command lines"."""
    if isinstance(text, Verbatim) or re.fullmatch(r"[\w@+=:,./-]+", text, re.ASCII):
        return text
    for special, escaped in ("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$"):
        text = text.replace(special, escaped)
    return f'"{text}"'


def unit_path(text: str) -> str:
    """A path as the value of a setting, where systemd knows no escapes but that of `%`."""
    if re.search(r"[\\\"']", text) or text != text.strip():
        raise UsageError(f"{text!r} cannot stand in a unit: no quotes, backslashes, spaces at its ends")
    return os.path.normpath(text).replace("%", "%%")


def unit_command(options: argparse.Namespace, words: Iterable[Iterable[str]]) -> str:
    """An ExecStart= of the program, a flag on each line."""
    role = GENERATES[options.role].role
    lines = [f"{options.path} {role}", *(" ".join(map(unit_word, each)) for each in words)]
    return " \\\n    ".join(lines)


def cron_word(text: str) -> str:
    """A word for a crontab's shell: crontab(5), where `%` ends the command unless it is escaped."""
    return "\\%".join(part and shlex.quote(part) for part in text.split("%"))


def pod_word(text: str) -> str:
    """An argument of a container as YAML; `$(NAME)` would be replaced by a variable."""
    return json.dumps(text.replace("$", "$$"), ensure_ascii=False)


def systemd_server(options: argparse.Namespace) -> str:
    """The server as a service, or a pass of it for a timer to start."""
    files = {name: vars(options)[name] for name in ("kubeconfig", "ca_path", "kube_token_file")}
    server_invocation(options)
    copies = {name: Verbatim(f"${{CREDENTIALS_DIRECTORY}}/{name}") for name in files if files[name]}
    credentials = [f"LoadCredential={name}:{unit_path(files[name])}" for name in copies]
    if credentials:
        credentials.insert(0, "# Read by root and handed to the service, so restart it when they change.")
    written = options.metrics_file and unit_path(os.path.dirname(options.metrics_file))
    return fill(
        SYSTEMD_SERVER,
        COMMAND=unit_command(options, server_invocation(options, **copies)),
        KIND=ONE_PASS if options.once else STAYING,
        CREDENTIALS="\n".join(credentials),
        USER=f'{ROOT_ALONE}"{written}"' if written else NOBODY,
        INSTALL="" if options.once else "[Install]\nWantedBy=multi-user.target",
    )


def systemd_timer(options: argparse.Namespace) -> str:
    """The timer of a service that makes one pass."""
    words = server_invocation(options, once=True, interval="")
    flags = [word for each in words for word in each]
    if options.path != _PATH.default:
        flags += ["--path", options.path]
    seconds = max(1, round(parse_duration(options.interval or "1m")))
    return fill(
        SYSTEMD_TIMER,
        INTERVAL=f"{seconds}s",
        SERVICE=f"keto-tokens generate systemd-server {shlex.join(flags)} > keto-tokens.service",
    )


def cron(options: argparse.Namespace) -> str:
    """A pass a minute, or every so many minutes of an hour."""
    minutes = parse_duration(options.interval or "1m") / 60
    if minutes not in (*range(1, 31),) or 60 % minutes:
        raise UsageError("--interval: cron can do 1m, 2m, 3m, 4m, 5m, 6m, 10m, 12m, 15m, 20m and 30m")
    words = [word for each in server_invocation(options, once=True, interval="") for word in each]
    every = "*" if minutes == 1 else f"*/{minutes:.0f}"
    line = fill(CRON, EVERY=every, COMMAND=" ".join([options.path, "server", *map(cron_word, words)]))
    if len(line.splitlines()[-1].encode()) > 998:  # Debian's cron
        raise UsageError("that does not fit into a crontab's line of 998 bytes")
    return line


def client_files(options: argparse.Namespace) -> tuple[dict[str, str], str]:
    """The files that the client is to write, by their options; the command that follows it."""
    if options.format != "kubeadm":
        path = options.kubeconfig or KUBEADM_FILES[0]
        return {"kubeconfig": path}, "systemctl start kubelet"
    path = options.kubeconfig or "/etc/kubernetes/bootstrap-keto-tokens.conf"
    joins = options.join_config or f"{os.path.dirname(path)}/kubeadm-join.yaml"
    return {"kubeconfig": path, "join_config": joins}, f"kubeadm join --config {shlex.quote(joins)}"


def systemd_client(options: argparse.Namespace) -> str:
    """The client as a service that is through before the kubelet starts.

    Not so for kubeadm, which starts the kubelet itself, and would wait for us who wait for it.
    """
    files, _ = client_files(options)
    command = unit_command(options, invocation(options, **files))
    folders = list(dict.fromkeys(unit_path(os.path.dirname(path)) for path in files.values()))
    joins = files.get("join_config")
    return fill(
        SYSTEMD_CLIENT,
        BEFORE="" if joins else "Before=kubelet.service",
        FOLDERS="\n".join(f'ExecStartPre=+/bin/mkdir -p "{folder.replace("$", "$$")}"' for folder in folders),
        COMMAND=command,
        JOIN=f"ExecStartPost=+/usr/bin/env kubeadm join --config {unit_word(joins)}" if joins else "",
        WRITES=" ".join(f'"{folder}"' for folder in folders),
        WANTED="multi-user.target" if joins else "multi-user.target kubelet.service",
    )


def userdata(options: argparse.Namespace) -> str:
    """What cloud-init runs on a new node: it fetches the file, checks it, and uses it."""
    files, after = client_files(options)
    words = [word for each in invocation(options, **files) for word in each]
    if not options.url:
        raise UsageError("--url: from where are nodes to download the file?")
    new = f"{options.path}.new"
    line = " && ".join([
        f"curl -fsSL --retry 10 --retry-connrefused -o {new} {shlex.quote(options.url)}",
        f"echo '{options.sha256 or own_sha256()}  {new}' | sha256sum -c -",
        f"chmod 755 {new}",
        f"mv {new} {options.path}",
        shlex.join([options.path, "client", *words]),
        after,
    ])
    if options.shell:
        return f"#!/bin/sh\n{line}\n"
    return f"#cloud-config\nruncmd:\n- {json.dumps(line, ensure_ascii=False)}\n"


def own_sha256() -> str:
    """The SHA-256 of the file that this program was started from."""
    import zipfile

    if not zipfile.is_zipfile(sys.argv[0]):
        raise UsageError("--sha256: of the file at --url; it is known only when that file generates")
    return hashlib.sha256(Path(sys.argv[0]).read_bytes()).hexdigest()


def iam_policy(*statements: Mapping[str, Any]) -> str:
    """A policy of these statements."""
    return json.dumps({"Version": "2012-10-17", "Statement": statements}, indent=2) + "\n"


def iam_literal(text: str) -> str:
    """A text for the value of a condition, in which `${` begins a policy variable."""
    return text.replace("$", "${$}")


def iam_tagging(options: argparse.Namespace, sid: str, **conditions: Any) -> dict[str, Any]:
    """A statement that allows to set our tag, and no other, on instances."""
    tag = iam_literal(options.tag_name or _TAG.default)
    return {
        "Sid": sid,
        "Effect": "Allow",
        "Action": "ec2:CreateTags",
        "Resource": f"arn:aws:ec2:*:{options.account}:instance/*",
        "Condition": {
            **conditions,
            "ForAllValues:StringEquals": {"aws:TagKeys": [tag]},
            "Null": {"aws:TagKeys": "false"},
        },
    }


def iam_server(options: argparse.Namespace) -> str:
    """The policy for the role of the machines that the server runs on."""
    checked_anywhere(options)
    actions = ["autoscaling:DescribeAutoScalingGroups", "ec2:DescribeTags"]
    find = {"Sid": "FindNodes", "Effect": "Allow", "Action": actions, "Resource": "*"}
    return iam_policy(find, iam_tagging(options, "LeaveTokens"))


def iam_client(options: argparse.Namespace) -> str:
    """The policy for the role of the nodes: `Success` into our tag of themselves, and to read it."""
    checked_anywhere(options)
    read = {"Sid": "ReadTag", "Effect": "Allow", "Action": "ec2:DescribeTags", "Resource": "*"}
    itself = f"arn:aws:ec2:*:{options.account}:instance/${{ec2:InstanceID}}"
    mark = iam_tagging(
        options, "MarkOwnTag", ArnLike={"ec2:SourceInstanceARN": itself},
        StringEquals={f"aws:RequestTag/{options.tag_name or _TAG.default}": CONSUMED},
    )
    return iam_policy(mark) if options.read_from == "imds" else iam_policy(read, mark)


def gce_role(options: argparse.Namespace) -> str:
    """The role for the service account that the server runs as."""
    return fill(GCE_ROLE, PERMISSIONS="\n".join(f"- {name}" for name in GCE_PERMISSIONS))


def checked_anywhere(options: argparse.Namespace) -> argparse.Namespace:
    """The flags as the role parses them, for what is the same whichever groups it serves."""
    role = GENERATES[options.role].role
    everything = role == "server" and not (options.filter or options.all_groups)
    words = invocation(options, **{"all_groups": True} if everything else {})
    parsed = parse_options([role, *(word for each in words for word in each)], {})
    if parsed is None:
        raise AssertionError("help was asked for")
    return parsed


def rbac(options: argparse.Namespace) -> str:
    """What the server may do in the cluster, for a service account.

    With --leader-elect it needs a Lease, whose name is known when the owner is: see `owner_hash`.
    """
    parsed = checked_anywhere(options)
    scope = vars(options).get(SCOPE_FLAGS.get(parsed.cloud, ""), "")
    known = scope and (options.filter or options.all_groups)
    name = lease_name(owner_hash(parsed.cloud, scope, parsed.tag_name, parsed.filter))
    leases = NAMED_LEASES.replace("@NAME@", name) if known else LEASES
    return fill(RBAC, NS=yaml_name(parsed.token_namespace), LEASES=leases if options.leader_elect else "")


def yaml_name(namespace: str) -> str:
    """A namespace for YAML, where some names mean something else: `on`, `1e3`."""
    return namespace if namespace == READ_NAMESPACE else json.dumps(namespace)


def deployment(options: argparse.Namespace) -> str:
    """The server as a pod, with its service account; any number of them may run."""
    for name in ("master", "kubeconfig", "ca_path", "kube_token_file", "context", "metrics_file"):
        if vars(options)[name]:
            raise UsageError(f"--{name.replace('_', '-')}: a pod has its service account, and no such file")
    listen = options.metrics_listen or f":{METRICS_PORT}"
    host, port = parse_listen(listen)
    if host not in ("", "0.0.0.0", "::") or not port:
        raise UsageError("--metrics-listen: the probes of a pod need :PORT")
    words = [word for each in invocation(options, metrics_listen=listen) for word in each]
    namespace = options.token_namespace or READ_NAMESPACE
    return fill(
        DEPLOYMENT, NS=yaml_name(namespace), REPLICAS="2" if options.leader_elect else "1",
        IMAGE=json.dumps(options.image), PATH=options.path, PORT=str(port),
        ARGS="\n        ".join(f"- {pod_word(word)}" for word in ["server", *words]),
    )


def run_generate(
    make: Callable[[argparse.Namespace], str], options: argparse.Namespace, stop: Stop
) -> int:
    """A generate command: print what was made."""
    print(make(options), end="")
    return 0


# ---------------------------------------------------------------------------------------------
# Command line: every flag stands once, in FLAGS; a flag beats its variable, that beats the default
# ---------------------------------------------------------------------------------------------

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


class Stop:
    """The wish to stop, from a signal; `wait` is a sleep that it cuts short."""

    def __init__(self) -> None:
        self.event, self.signum = threading.Event(), 0

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds`; True when told to stop."""
        return self.event.wait(seconds)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listen to SIGTERM and SIGINT (which only the main thread can)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(signum: int, _: Any) -> None:
            self.signum = signum
            self.event.set()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def positive_duration(text: str) -> float:
    """A duration above zero."""
    seconds = parse_duration(text)
    if seconds <= 0:
        raise ValueError("must be more than 0")
    return seconds


def ttl_duration(text: str) -> float:
    """A token's lifetime: a node has to boot in it, and the cluster's clock to tick."""
    seconds = parse_duration(text)
    if not 60 <= seconds <= 10 * 365 * 86400:
        raise ValueError("must be a minute at least")
    return seconds


def parse_filter(text: str) -> tuple[str, str]:
    """`key=value`, neither of them empty."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError(f"{text!r} is not key=value")
    return key, value


def parse_pin(text: str) -> str:
    """A pin of a public key, as kubeadm prints it."""
    if not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", text):
        raise ValueError(f"{text!r} is not sha256: and 64 hex digits")
    return text.lower()


def parse_url(text: str) -> str:
    """An http or https URL of a server, else ValueError."""
    parts = urllib.parse.urlsplit(text)
    valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    plain = text.isprintable() and " " not in text and "@" not in text
    if not (valid and plain) or parts.query or parts.fragment:
        shown = re.sub(r".*@", "...@", redact(text), flags=re.DOTALL)  # it may be a password
        raise ValueError(f"{shown!r} is not a URL such as https://api.example.com:6443")
    return text.rstrip("/")


def parse_listen(text: str) -> tuple[str, int]:
    """`ADDR:PORT`, `:PORT` or `[IPv6]:PORT` as (address, port)."""
    match = re.fullmatch(r"(\[([0-9a-fA-F:.]+)\]|[A-Za-z0-9.-]*):([0-9]{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise ValueError(f"{text!r} is not ADDR:PORT, such as 127.0.0.1:9115, :9115 or [::1]:9115")
    return match[2] or match[1], int(match[3])


def parse_program(text: str) -> str:
    """A path that needs no quotes anywhere."""
    if not re.fullmatch(r"(/[A-Za-z0-9._+-]+)+", text):
        raise ValueError(f"{text!r} is not an absolute path of letters, digits and . _ + -")
    return text


def parse_account(text: str) -> str:
    """The number of an AWS account."""
    if not re.fullmatch("[0-9]{12}", text):
        raise ValueError(f"{text!r} is not the 12 digits of an account")
    return text


def parse_sha256(text: str) -> str:
    """A SHA-256 in hex."""
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise ValueError(f"{text!r} is not 64 hex digits")
    return text.lower()


def parse_download(text: str) -> str:
    """The URL of a file, which unlike a server's may have a query, as presigned ones have."""
    parse_url(text.partition("?")[0])
    if not text.isprintable() or " " in text or "#" in text:
        raise ValueError("not a URL such as https://example.com/keto-tokens")
    return text


def parse_groups(text: str) -> str:
    """Groups for the token's user, comma separated, as the API server wants them.

    One that does not match refuses the whole login: kubernetes/kubernetes, bootstrap token util.
    """
    for group in text.split(","):
        if not re.fullmatch(r"system:bootstrappers:[a-z0-9:-]{0,255}[a-z0-9]", group):
            raise ValueError(f"{group!r} is not of the form system:bootstrappers:NAME")
    return text


def parse_namespace(text: str) -> str:
    """The name of a namespace (RFC 1123 label)."""
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", text):
        raise ValueError(f"{text!r} is not the name of a namespace")
    return text


def parse_bool(text: str) -> bool:
    """A truth value as Go writes it."""
    if text.lower() in ("1", "t", "true"):
        return True
    if text.lower() in ("0", "f", "false"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def one_of(*words: str) -> Callable[[str], str]:
    """A parser that takes just these words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is not {' or '.join(words)}")
        return text

    return parse


def parse_cloud(text: str) -> str:
    """The name of a cloud that there is, or auto."""
    return one_of(*CLOUDS, "auto")(text)


def parse_project(text: str) -> str:
    """The id or number of a Google project, as the Compute API's discovery document has it."""
    if not re.fullmatch(r"([a-z0-9.-]{1,253}:)?[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", text):
        raise ValueError(f"{text!r} is not the id of a project")
    return text


@dataclass(frozen=True)
class Flag:
    """A flag, its variables and its default, which is parsed as if it had been given."""

    name: str
    help: str
    env: tuple[str, ...] = ()
    parse: Callable[[str], Any] = str
    default: str = ""
    metavar: str = ""
    short: str = ""
    repeat: bool = False

    @property
    def dest(self) -> str:
        """The attribute of the parsed options."""
        return self.name.replace("-", "_")

    @property
    def boolean(self) -> bool:
        """Whether it stands alone."""
        return self.parse is parse_bool

    def describe(self) -> str:
        """The help text with the variable and the default."""
        env = f" [{', '.join(f'${name}' for name in self.env)}]" if self.env else ""
        default = f" (default: {self.default})" if self.default else ""
        return f"{self.help}{env}{default}"

    def literal(self) -> Flag:
        """The same for generate: its value is the text that was given, "" for none."""

        def text_of(text: str) -> str:
            self.parse(text)
            return text

        kept = parse_bool if self.boolean else text_of
        return replace(self, help=replace(self, env=()).describe(), env=(), parse=kept, default="")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flag; its value is only there when it was given."""
        names = [self.short] * bool(self.short) + [f"--{self.name}"]
        options: dict[str, Any] = {"dest": self.dest, "default": argparse.SUPPRESS}
        if self.boolean:
            options |= {"action": "store_true"}
            hidden = {**options, "action": "store_false", "help": argparse.SUPPRESS}
            parser.add_argument(f"--{self.name}:false", **hidden)  # `--name=false`, see normalized
        else:
            options |= {"type": self.from_argument, "metavar": self.metavar}
            options |= {"action": "append"} if self.repeat else {}
        parser.add_argument(*names, help=self.describe().replace("%", "%%"), **options)

    def from_argument(self, text: str) -> Any:
        """The value of an argument, with our words in argparse's message."""
        try:
            return self.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    def from_environment(self, environ: Mapping[str, str]) -> Any:
        """The value of the first variable that is set, else the default (None: there is none)."""
        for name in self.env:
            if environ.get(name):
                try:
                    if not self.repeat:
                        return self.parse(environ[name])
                    return [self.parse(part.strip()) for part in environ[name].split(",") if part.strip()]
                except ValueError as error:
                    raise UsageError(f"environment variable {name}: {error}") from None
        if self.repeat:
            return []
        return False if self.boolean else self.parse(self.default) if self.default else ""


GLOBAL_FLAGS = [
    Flag("cloud", "cloud of the nodes: aws, gce, or auto: the one whose metadata answers here "
         "(default: aws; of the client: auto)", ("CLOUD_PROVIDER",), parse_cloud, "", "NAME", "-c"),
    Flag("verbose", "log each decision, not only changes", ("VERBOSE",), parse_bool),
]
_TAG = Flag("tag-name", "tag that carries the token", ("TAG_NAME",), str, "KubeletToken", "NAME")
_INSECURE = Flag("insecure-skip-tls-verify", "do not verify the cluster: anybody in between can "
                 "take the token", ("INSECURE_SKIP_TLS_VERIFY",), parse_bool)

VIEW_FLAGS = [
    Flag("filter", "only groups with this tag (GCE: instances with this label); all of several must "
         "match", ("NODE_FILTER",), parse_filter, metavar="KEY=VALUE", repeat=True),
    Flag("all-groups", "serve every group of the region or project, when no filter is given", (),
         parse_bool),
    Flag("master", "URL of the Kubernetes API", ("KUBE_SERVICE_URL",), parse_url, metavar="URL"),
    Flag("kube-token", "bearer token for it; others can read arguments, so better by the variable",
         ("KUBE_SERVICE_TOKEN",), metavar="TOKEN"),
    Flag("kube-token-file", "file with the bearer token, read again as it changes",
         ("KUBE_SERVICE_TOKEN_FILE",), metavar="FILE"),
    Flag("ca-path", "file with the cluster's CA", ("CA_PATH",), metavar="FILE"),
    Flag("kubeconfig", "kubeconfig to reach the cluster with", ("KUBECONFIG",), metavar="FILE"),
    Flag("context", "context of the kubeconfig, instead of its current one", (), metavar="NAME"),
    _INSECURE,
    Flag("region", "AWS region; else the profile's, else this instance's",
         ("AWS_REGION", "AWS_DEFAULT_REGION"), metavar="NAME"),
    Flag("project", "GCE project; else this instance's", ("GCE_PROJECT", "CLOUDSDK_CORE_PROJECT"),
         parse_project, metavar="ID"),
    _TAG,
    Flag("token-ttl", "lifetime of a token", ("TOKEN_TTL",), ttl_duration, "30m", "DURATION"),
    Flag("token-namespace", "namespace of the token Secrets", ("TOKEN_NAMESPACE",),
         parse_namespace, READ_NAMESPACE, "NAME"),
]

SERVER_FLAGS = [
    *VIEW_FLAGS,
    Flag("auth-extra-groups", "groups of a token's user", ("AUTH_EXTRA_GROUPS",), parse_groups,
         DEFAULT_GROUPS, "GROUPS"),
    Flag("give-up", "how long after its first token a node that does not join gets new ones",
         ("GIVE_UP",), positive_duration, "2h", "DURATION"),
    Flag("no-revoke", "leave tokens to their expiration", ("NO_REVOKE",), parse_bool),
    Flag("leader-elect", "of several servers let one work at a time", ("LEADER_ELECT",), parse_bool),
    Flag("interval", "time from pass to pass", ("INTERVAL",), positive_duration, "10s", "DURATION"),
    Flag("once", "make one pass and exit, 4 when a part of it failed", (), parse_bool),
    Flag("dry-run", "print what a pass would do, and do nothing", (), parse_bool),
    Flag("metrics-file", "write metrics there after each pass, for node_exporter's textfile collector",
         ("METRICS_FILE",), metavar="FILE"),
    Flag("metrics-listen", "answer /metrics, /healthz and /readyz there; nothing listens without it",
         ("METRICS_LISTEN",), parse_listen, metavar="ADDR:PORT"),
]

STATUS_FLAGS = [
    *VIEW_FLAGS,
    Flag("node", "only this instance", metavar="ID"),
    Flag("output", "json, or wide: every reason, and the Secrets",
         parse=one_of("json", "wide"), metavar="FORMAT", short="-o"),
    Flag("watch", "again and again, until stopped", parse=parse_bool),
    Flag("interval", "time from look to look", ("INTERVAL",), positive_duration, "10s", "DURATION"),
]

CLIENT_FLAGS = [
    Flag("master", "URL of the Kubernetes API", ("KUBE_SERVICE_URL",), parse_url,
         "https://127.0.0.1:6443", "URL"),
    Flag("ca-path", "file with the cluster's CA; else it is found by cluster-info", ("CA_PATH",),
         metavar="FILE"),
    Flag("ca-cert-hash", "the CA in cluster-info must have this public key; else cluster-info must "
         "be signed with the token", ("CA_CERT_HASH",), parse_pin, metavar="sha256:HEX", repeat=True),
    _INSECURE,
    Flag("kubeconfig", "bootstrap kubeconfig to write", ("KUBECONFIG",), str,
         "kubeconfig-bootstrap", "FILE"),
    _TAG,
    Flag("format", "kubeconfig; or kubeadm: with what `kubeadm join` takes as its config beside it",
         (), one_of("kubeconfig", "kubeadm"), "kubeconfig", "FORMAT"),
    Flag("join-config", "where that is written; else kubeadm-join.yaml beside the kubeconfig",
         metavar="FILE"),
    Flag("read-from", "where to read the tag: imds (instance metadata, no right needed), api, or auto",
         ("READ_FROM",), one_of("auto", "imds", "api"), "auto", "SOURCE"),
    Flag("interval", "time to the second look; it grows up to 12 times that", ("INTERVAL",),
         positive_duration, "5s", "DURATION"),
    Flag("timeout", "give up after this time; 0 waits for ever", ("TIMEOUT",), parse_duration,
         "0", "DURATION"),
]


@dataclass(frozen=True)
class Command:
    """A command of the program.  `role` is the one that a check or generate is about."""

    run: Callable[[argparse.Namespace, Stop], int]
    flags: list[Flag]
    help: str
    example: str
    role: str = ""


COMMANDS = {
    "server": Command(
        run_server, SERVER_FLAGS, "give tokens to the nodes that need one",
        "keto-tokens server --filter Role=compute --filter Env=prod --kubeconfig admin.conf",
    ),
    "status": Command(
        run_status, STATUS_FLAGS, "show how far each node is; exit 1 when one is stuck",
        "keto-tokens status --filter Role=compute --kubeconfig admin.conf --watch",
    ),
    "client": Command(
        run_client, CLIENT_FLAGS, "take this node's token and write the bootstrap kubeconfig",
        "keto-tokens client --master https://api:6443 --ca-path /etc/kubernetes/ca.crt "
        "--kubeconfig /etc/kubernetes/bootstrap-kubelet.conf",
    ),
}
_OUTPUT = Flag("output", "json", parse=one_of("json"), metavar="FORMAT", short="-o")
CHECKS = {
    role: Command(
        run_check, [*COMMANDS[role].flags, _OUTPUT],
        f"would the {role} work here? Takes its flags, changes nothing; exit 1 on a FAIL",
        f"keto-tokens check {COMMANDS[role].example.removeprefix('keto-tokens ')}", role,
    )
    for role in ("server", "client")
}


_PATH = Flag("path", "where the file is installed", parse=parse_program, metavar="FILE",
             default="/usr/local/bin/keto-tokens")
_ACCOUNT = Flag("account", "AWS account of the instances", parse=parse_account, metavar="ID",
                default="111122223333")
_USERDATA = [
    Flag("url", "where nodes download the file", parse=parse_download, metavar="URL"),
    Flag("sha256", "what it must be; else that of the file that generates", parse=parse_sha256,
         metavar="HEX"),
    Flag("shell", "a shell script instead of cloud-init's YAML", parse=parse_bool),
]
_IMAGE = Flag("image", "any image with Python", default="python:3.14-slim", metavar="NAME")


def _generated(
    make: Callable[[argparse.Namespace], str], role: str, help: str, given: str, *own: Flag
) -> Command:
    """A generate command: it takes the flags of its role, and its own."""
    what = make.__name__.replace("_", "-")
    flags = [*(flag.literal() for flag in COMMANDS[role].flags), *own]
    example = f"keto-tokens generate {what} {given}".rstrip()
    return Command(functools.partial(run_generate, make), flags, help, example, role)


_HOST = "--filter Role=compute --kubeconfig /etc/kubernetes/admin.conf"
_NODE = "--master https://api:6443 --ca-path /etc/kubernetes/ca.crt"
GENERATES = {
    command.example.split()[2]: command
    for command in [
        _generated(systemd_server, "server", "a unit for the server; with --once, for a timer",
                   f"{_HOST} > /etc/systemd/system/keto-tokens.service", _PATH),
        _generated(systemd_client, "client", "a unit for the client, before the kubelet's",
                   f"{_NODE} > /etc/systemd/system/keto-tokens-client.service", _PATH),
        _generated(systemd_timer, "server", "a timer for systemd-server --once",
                   f"{_HOST} > /etc/systemd/system/keto-tokens.timer", _PATH),
        _generated(cron, "server", "a file for /etc/cron.d", f"{_HOST} > /etc/cron.d/keto-tokens", _PATH),
        _generated(userdata, "client", "userdata for new nodes, by cloud-init or the shell",
                   f"{_NODE} --url https://example.com/keto-tokens", _PATH, *_USERDATA),
        _generated(iam_server, "server", "the IAM policy for the server (AWS)", "> policy.json", _ACCOUNT),
        _generated(iam_client, "client", "the IAM policy for nodes (AWS)",
                   "--read-from imds > policy.json", _ACCOUNT),
        _generated(gce_role, "server", "the IAM role for the server (Google Cloud)", "> role.yaml"),
        _generated(rbac, "server", "the server's rights in the cluster", "| kubectl apply -f -"),
        _generated(deployment, "server", "the server as a pod on the control plane",
                   "--filter Role=compute | kubectl apply -f -", _PATH, _IMAGE),
    ]
}
GROUPS = {
    "check": ("ROLE", "would server or client work here?", CHECKS),
    "generate": ("WHAT", "print units, policies, manifests, ready to be used", GENERATES),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours: one line, raised."""

    def error(self, message: str) -> NoReturn:
        """Raise the UsageError instead of printing the usage.

        Of arguments that are not known only the names are said: the values may be secrets.
        """
        _, unknown, words = message.partition("unrecognized arguments: ")
        if unknown:
            names = [word.partition("=")[0] for word in words.split() if word.startswith("-")]
            message = f"{unknown}{' '.join(names) or words}"
        raise UsageError(f"{message} (see {self.prog} --help)")


def example(command: Command) -> str:
    """How a command is used, for its help, folded as a shell takes it."""
    lines = textwrap.wrap(command.example, 72, break_long_words=False, break_on_hyphens=False)
    return "example:\n  " + " \\\n      ".join(lines)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of its commands by name.  Global flags are taken by all of them."""
    about, _, exit_codes = (__doc__ or "").partition("Exit codes:")
    shared: dict[str, Any] = {
        "allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = Parser(
        prog="keto-tokens", description=textwrap.fill(about.partition("\n")[0], 78),
        epilog=f"exit codes:{exit_codes}\n{example(COMMANDS['server'])}", **shared,
    )
    parser.add_argument("-v", "--version", action="version", version=f"keto-tokens {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    parsers = {}

    def declare(where: Any, name: str, command: Command) -> Parser:
        made: Parser = where.add_parser(
            name, help=command.help, description=command.help, epilog=example(command), **shared
        )
        for flag in command.flags:
            flag.add_to(made)
        return made

    for name, command in COMMANDS.items():
        parsers[name] = declare(commands, name, command)
    for group, (metavar, about, members) in GROUPS.items():
        parsers[group] = commands.add_parser(group, help=about, description=about, **shared)
        inside = parsers[group].add_subparsers(dest="role", metavar=metavar, parser_class=Parser)
        for name, command in members.items():
            parsers[f"{group} {name}"] = declare(inside, name, command)
        parsers[group].epilog = example(next(iter(members.values())))
    sub = commands.add_parser("help", aliases=["h"], help="help for a command", **shared)
    sub.add_argument("topic", nargs="*", metavar="COMMAND")
    for each in (parser, *parsers.values()):
        for flag in GLOBAL_FLAGS:
            flag.add_to(each)
    return parser, parsers


def normalized(argv: Sequence[str]) -> list[str]:
    """The arguments as argparse takes them: Go also allows `-name` and `--flag=true`."""
    commands = [*COMMANDS.values(), *CHECKS.values(), *GENERATES.values()]
    flags = [*GLOBAL_FLAGS, *(flag for command in commands for flag in command.flags)]
    names = {"help", "version", *(flag.name for flag in flags)}
    booleans = {flag.name for flag in flags if flag.boolean}
    result = []
    for argument in argv:
        name, equals, value = argument.lstrip("-").partition("=")
        if not re.match("--?[a-z]{2}", argument) or name not in names:
            result.append(argument)
        elif not equals or name not in booleans:
            result.append(f"--{name}{equals}{value}")
        else:
            result.append(f"--{name}" if _go_bool(name, value) else f"--{name}:false")
    return result


def _go_bool(name: str, text: str) -> bool:
    try:
        return parse_bool(text)
    except ValueError as error:
        raise UsageError(f"argument --{name}: {error}") from None


def parse_options(argv: Sequence[str], environ: Mapping[str, str]) -> argparse.Namespace | None:
    """The options of a run with every flag set; None when help was asked for, and printed."""
    parser, parsers = build_parser()
    options = parser.parse_args(normalized(argv))
    if options.command in ("help", "h"):
        topic = " ".join(options.topic)
        if topic and topic not in parsers:
            raise UsageError(f"there is no command {topic!r}: {', '.join(parsers)}")
        print(parsers.get(topic, parser).format_help(), end="")
        return None
    if options.command is None:
        names = ", ".join([*COMMANDS, *GROUPS])
        raise UsageError(f"name a command: {names} (see keto-tokens --help)")
    if options.command in GROUPS and options.role is None:
        names = ", ".join(GROUPS[options.command][2])
        raise UsageError(f"{options.command} what? {names} (see keto-tokens {options.command} --help)")
    if options.command == "generate":
        environ = {}  # what it prints is for another machine
    for flag in [*GLOBAL_FLAGS, *command_of(options).flags]:
        if not hasattr(options, flag.dest):
            setattr(options, flag.dest, flag.from_environment(environ))
    if options.command != "generate":  # which has its flags checked as those of the command it is for
        check_options(options)
    return options


def command_of(options: argparse.Namespace) -> Command:
    """The command that was asked for."""
    if options.command in GROUPS:
        return GROUPS[options.command][2][options.role]
    return COMMANDS[options.command]


def check_options(options: argparse.Namespace) -> None:
    """What only shows when all flags are known."""
    options.cloud = options.cloud or ("aws" if "filter" in options else "auto")
    check_cloud(options)
    if "format" in options and options.join_config and options.format != "kubeadm":
        raise UsageError("--join-config is for --format kubeadm")
    if "format" in options and options.format == "kubeadm" and options.kubeconfig in KUBEADM_FILES:
        raise UsageError(f"--kubeconfig: kubeadm does not join where {options.kubeconfig} is; name another")
    if "filter" not in options:
        return
    if options.command == "server" and options.leader_elect and (options.once or options.dry_run):
        raise UsageError("--leader-elect is for a server that stays, without --once and --dry-run")
    if options.command == "server" and options.metrics_listen and (options.once or options.dry_run):
        raise UsageError("--metrics-listen is for a server that stays; --once takes --metrics-file")
    if options.command == "server" and options.metrics_file and options.dry_run:
        raise UsageError("--metrics-file is for passes, and --dry-run makes none")
    filters = dict(options.filter)
    if len(filters) < len(set(options.filter)):
        raise UsageError("--filter: a tag has one value, so two filters on one key never match")
    if bool(filters) == options.all_groups:
        raise UsageError(
            "--filter and --all-groups exclude each other" if filters else
            "which groups? Pass --filter KEY=VALUE, or --all-groups for every group there is"
        )
    options.filter = filters


def check_cloud(options: argparse.Namespace) -> None:
    """Flags that the cloud, or none of those that it may turn out to be, can take."""
    problems = []
    for name in CLOUDS if options.cloud == "auto" else (options.cloud,):
        try:
            return CLOUDS[name].check(options)
        except UsageError as error:
            problems.append(error)
    raise problems[0]


class LogFormatter(logging.Formatter):
    """Lines without secrets; with a time, unless the journal adds its own, and takes priorities."""

    def __init__(self, journal: bool):
        super().__init__("%(levelname)s %(message)s" if journal else
                         "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self.converter, self._journal = time.gmtime, journal

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback is redacted as well."""
        text = redact(super().format(record))
        return with_priority(text, record.levelno) if self._journal else text


def with_priority(text: str, level: int) -> str:
    """Each line with its priority before it, as the journal reads it: sd-daemon(3)."""
    priority = 7 if level < logging.INFO else 6 if level < logging.WARNING else 4
    priority = 3 if level >= logging.ERROR else priority
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


def complain(text: str) -> None:
    """Write to stderr why the program ends."""
    ours = redact(text)
    line = with_priority(ours, logging.ERROR) if to_journal(os.environ) else ours
    print(line, file=sys.stderr)


def to_journal(environ: Mapping[str, str]) -> bool:
    """Whether stderr is the journal: systemd.exec(5), JOURNAL_STREAM."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up_logging(verbose: bool) -> None:
    """Our own log to stderr.  botocore's and urllib3's stay off: they write bodies."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(to_journal(os.environ)))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with these arguments; the exit code."""
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv, os.environ)
        if options is None:
            return 0
        set_up_logging(options.verbose)
        stop = Stop()
        with stop.on_signals():
            return command_of(options).run(options, stop)
    except KetoError as error:
        complain(f"keto-tokens: {' '.join(str(error).split())}")
        return error.exit_code


def run() -> NoReturn:
    """The entry point: a bug's traceback is printed without secrets."""
    try:
        try:
            code = main()
        finally:  # --help ends in a SystemExit
            if sys.stdout:  # which is None when it was closed
                sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        import traceback

        full = getattr(error, "errno", 0) == errno.ENOSPC  # of files that we write, the callers tell
        complain("keto-tokens: the output cannot be written: no space left" if full else
                 traceback.format_exc().rstrip())
        code = 3 if full else 70
    sys.exit(code)


if __name__ == "__main__":
    run()
