"""plan(): the protocol table row by row, and what holds for any mix of nodes, tags and Secrets."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keto_tokens import (
    CONSUMED, Action, Csr, Join, Kind, Listing, Node, Policy, Token, TokenSecret, World, aws_node, plan,
    token_ids,
)

NOW = 1_800_000_000.0
POLICY = Policy(ttl=1800, give_up=7200)
OWNER = "owner"


def secret_for(node_id: str, n: int = 0, **changes: object) -> TokenSecret:
    token = Token(token_ids(OWNER, node_id)[n], "0123456789abcdef")
    made = TokenSecret(
        name=f"bootstrap-token-{token.id}", uid="u", version="1", token=token, node_id=node_id,
        pool="pool", created=NOW - 300, expires=NOW + 1500, first_issued=NOW - 300,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def node(tag: str | None = None, state: str = "InService", node_id: str = "i-1") -> Node:
    member = {"InstanceId": node_id, "LifecycleState": state}
    return replace(aws_node(member, "pool"), tag=tag)


def planned(
    nodes: Sequence[Node], secrets: Sequence[TokenSecret] = (), join: Join | None = None,
    policy: Policy = POLICY, certified: Sequence[str] = (), complete: bool = True,
) -> list[Action]:
    joins = {secret.name: join for secret in secrets} if join else {}
    listing = Listing(tuple(nodes), complete)
    csrs = tuple(Csr(f"uid-{each}", each, Join.ISSUED, NOW - 60, "n") for each in certified)
    return plan(World(listing, tuple(secrets), joins, csrs, OWNER, NOW), policy)


LIVE = secret_for("i-1")
NEAR = replace(LIVE, expires=NOW + 599)
OLD = replace(NEAR, first_issued=NOW - 7200)
EXPIRED = replace(LIVE, expires=NOW)
NEW_HALF = replace(LIVE, unpublished=True)
TOKEN = LIVE.token.value
OTHER = "abcdef.0123456789abcdef"
NO_CSR, PENDING, ISSUED, JOINED = Join.NO_CSR, Join.PENDING, Join.ISSUED, Join.JOINED
DENIED, UNKNOWN = Join.DENIED, Join.UNKNOWN

TABLE = {
    # what the row is: (tag, Secret, join) -> kind
    "new": (None, None, None, Kind.ISSUE),
    "an empty tag": ("", None, None, Kind.ISSUE),
    "rubbish": ("x" * 256, None, None, Kind.ISSUE),
    "somebody's token, no Secret": (OTHER, None, None, Kind.ISSUE),
    "its token, Secret lost": (TOKEN, None, None, Kind.ISSUE),
    "its token, expired": (TOKEN, EXPIRED, None, Kind.RENEW),
    "no tag, expired": (None, EXPIRED, None, Kind.RENEW),
    "no tag, live": (None, LIVE, NO_CSR, Kind.PUBLISH),
    "rubbish, live": ("rubbish", LIVE, NO_CSR, Kind.PUBLISH),
    "another token, live": (OTHER, LIVE, NO_CSR, Kind.PUBLISH),
    "its token": (TOKEN, LIVE, NO_CSR, Kind.WAIT),
    "its token, joins unseen": (TOKEN, LIVE, UNKNOWN, Kind.WAIT),
    "its token, near expiry": (TOKEN, NEAR, NO_CSR, Kind.EXTEND),
    "its token, near expiry, long ago": (TOKEN, OLD, NO_CSR, Kind.EXTEND),
    "its token, near expiry, joins unseen": (TOKEN, NEAR, UNKNOWN, Kind.EXTEND),
    "its token, CSR waits": (TOKEN, LIVE, PENDING, Kind.WAIT),
    "its token, joined": (TOKEN, LIVE, JOINED, Kind.FINISH),
    "consumed, CSR waits": (CONSUMED, LIVE, PENDING, Kind.WAIT),
    "consumed, CSR waits, near expiry": (CONSUMED, NEAR, PENDING, Kind.EXTEND),
    "consumed, no Node yet, near expiry": (CONSUMED, NEAR, ISSUED, Kind.EXTEND),
    "consumed, CSR waits, given up": (CONSUMED, OLD, PENDING, Kind.WAIT),
    "consumed, no CSR": (CONSUMED, LIVE, NO_CSR, Kind.WAIT),
    "consumed, no CSR, near expiry": (CONSUMED, NEAR, NO_CSR, Kind.RENEW),
    "consumed, CSR denied, near expiry": (CONSUMED, NEAR, DENIED, Kind.RENEW),
    "consumed, no CSR, given up": (CONSUMED, OLD, NO_CSR, Kind.WAIT),
    "consumed, joins unseen": (CONSUMED, LIVE, UNKNOWN, Kind.WAIT),
    "consumed, joins unseen, near expiry": (CONSUMED, NEAR, UNKNOWN, Kind.WAIT),
    "consumed, joined": (CONSUMED, LIVE, JOINED, Kind.REVOKE),
    "consumed, a new half that may not be published": (CONSUMED, NEW_HALF, NO_CSR, Kind.PUBLISH),
    "its token, the new half's note is left": (TOKEN, NEW_HALF, NO_CSR, Kind.PUBLISH),
    "consumed": (CONSUMED, None, None, Kind.LEAVE),
    "consumed, expired": (CONSUMED, EXPIRED, None, Kind.REVOKE),
    "joined, tag deleted by the operator": (None, LIVE, JOINED, Kind.RENEW),
    "joined, another token in the tag": (OTHER, LIVE, JOINED, Kind.RENEW),
}


@pytest.mark.parametrize(("tag", "secret", "join", "kind"), TABLE.values(), ids=TABLE)
def test_the_table(tag: str | None, secret: TokenSecret | None, join: Join | None, kind: Kind) -> None:
    (action,) = planned([node(tag)], [secret] if secret else [], join)
    assert action.kind is kind, action.reason


WANTED = ["Pending", "Pending:Wait", "Pending:Proceed", "InService", "ReplacingRootVolume",
          "ReplacingRootVolume:Wait", "ReplacingRootVolume:Proceed", "RootVolumeReplaced"]
ENDING = ["Terminating", "Terminating:Wait", "Terminating:Proceed", "Terminating:Retained", "Terminated"]
OTHERS = ["Detaching", "Detached", "EnteringStandby", "Standby", "Quarantined", "Warmed:Pending",
          "Warmed:Pending:Wait", "Warmed:Running", "Warmed:Stopped", "Warmed:Hibernated",
          "Warmed:Terminating", "Warmed:Terminated", "SomethingNew"]


@pytest.mark.parametrize("state", WANTED + ENDING + OTHERS)
def test_only_wanted_lifecycle_states_get_a_token(state: str) -> None:
    (action,) = planned([node(None, state)])
    assert (action.kind is Kind.ISSUE) is (state in WANTED)


@pytest.mark.parametrize("state", WANTED + ENDING + OTHERS)
def test_only_ending_nodes_lose_theirs(state: str) -> None:
    (action,) = planned([node(TOKEN, state)], [LIVE], NO_CSR)
    assert (action.kind is Kind.REVOKE) is (state in ENDING)


@pytest.mark.parametrize("state", WANTED[4:])
def test_a_new_root_volume_needs_a_new_token(state: str) -> None:
    (action,) = planned([node(CONSUMED, state)])
    assert action.kind is Kind.ISSUE
    (action,) = planned([node(CONSUMED, state)], certified=[LIVE.token.id])
    assert action.kind is Kind.LEAVE


def test_a_secret_without_a_node_is_revoked() -> None:
    (action,) = planned([], [LIVE])
    assert (action.kind, action.secret) == (Kind.REVOKE, LIVE)


@pytest.mark.parametrize(("age", "complete", "revoke", "kind"), [
    (59, True, True, Kind.WAIT), (60, True, True, Kind.REVOKE), (300, False, True, Kind.WAIT),
    (300, True, False, Kind.LEAVE),
], ids=["young", "a minute old", "incomplete listing", "--no-revoke"])
def test_a_secret_without_a_node_has_its_time(age: int, complete: bool, revoke: bool, kind: Kind) -> None:
    secret = replace(LIVE, created=NOW - age)
    (action,) = planned([], [secret], policy=replace(POLICY, revoke=revoke), complete=complete)
    assert action.kind is kind


@pytest.mark.parametrize("tag", [CONSUMED, TOKEN])
def test_without_revocation_nothing_is_deleted(tag: str) -> None:
    (action,) = planned([node(tag)], [LIVE], JOINED, replace(POLICY, revoke=False))
    assert action.kind is (Kind.LEAVE if tag == CONSUMED else Kind.FINISH)


def test_an_old_read_of_the_tag_after_a_join_is_no_lost_secret() -> None:
    (action,) = planned([node(TOKEN)], certified=[LIVE.token.id])
    assert action.kind is Kind.LEAVE


def test_a_new_half_is_told_which_csrs_cannot_be_its_own() -> None:
    """What was decided before it belongs to an earlier join; what waits may yet be this one's."""
    mine, other = LIVE.token.id, token_ids(OWNER, "i-2")[0]
    csrs = tuple(Csr(f"{state.name}-{each}", each, state, NOW, "n")
                 for state in (ISSUED, DENIED, PENDING) for each in (mine, other))
    for tag, found, join in ((None, (), NO_CSR), (None, (LIVE,), JOINED)):
        joins = {secret.name: join for secret in found}
        (action,) = plan(World(Listing((node(tag),)), found, joins, csrs, OWNER, NOW), POLICY)
        assert action.kind in (Kind.ISSUE, Kind.RENEW)
        assert action.earlier == {f"ISSUED-{mine}", f"DENIED-{mine}"}


def test_a_node_in_two_groups_gets_one_token() -> None:
    twice = [node(), replace(node(), pool="other")]
    (action,) = planned(twice)
    assert (action.kind, action.node.pool) == (Kind.ISSUE, "pool")


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_secrets_the_one_in_the_tag_counts(order: int) -> None:
    second = secret_for("i-1", n=1, created=NOW - 10)
    (action,) = planned([node(second.token.value)], [LIVE, second][::order])
    assert (action.kind, action.secret) == (Kind.WAIT, second)


# --- any mix ---------------------------------------------------------------------------------------

IDS = [f"i-{number}" for number in range(6)]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Any mix of nodes, tags and Secrets, joined or not."""
    nodes, found, joins = [], [], {}
    for node_id in draw(st.lists(st.sampled_from(IDS), unique=True)):
        own = secret_for(node_id).token.value
        tag = draw(st.sampled_from([None, "", "rubbish", CONSUMED, own, OTHER]))
        nodes.append(node(tag, draw(st.sampled_from(["InService", "Pending:Wait", "Terminating",
                                                     "Warmed:Stopped"])), node_id))
    for node_id in draw(st.lists(st.sampled_from(IDS), unique=True)):
        age = draw(st.integers(0, 10_000))
        secret = secret_for(
            node_id,
            expires=NOW + draw(st.integers(-2000, 1800)),
            created=NOW - age, first_issued=NOW - age,
            unpublished=draw(st.booleans()),
        )
        found.append(secret)
        joins[secret.name] = draw(st.sampled_from(list(Join)))
    return World(Listing(tuple(nodes)), tuple(found), joins, (), OWNER, NOW)


def carried_out(world: World, actions: Sequence[Action], policy: Policy) -> World:
    """The world after the actions, each done as the server does it."""
    nodes = {each.id: each for each in world.listing.nodes}
    found = {each.name: each for each in world.secrets}
    joins = dict(world.joins)
    for action in actions:
        secret, at = action.secret, action.node
        if action.kind is Kind.ISSUE:
            secret = secret_for(at.id, created=NOW, first_issued=NOW, expires=NOW + policy.ttl)
            assert secret.name not in found, "issued twice"
        elif action.kind is Kind.RENEW and secret:
            first = secret.first_issued if at.consumed else NOW
            half = Token(secret.token.id, "fedcba9876543210")
            secret = replace(secret, token=half, first_issued=first, expires=NOW + policy.ttl)
            joins[secret.name] = Join.NO_CSR
        elif action.kind in (Kind.EXTEND, Kind.PUBLISH) and secret:
            secret = replace(secret, expires=NOW + policy.ttl)
        if secret and action.kind in (Kind.ISSUE, Kind.RENEW, Kind.PUBLISH):
            nodes[at.id] = replace(at, tag=secret.token.value)
            secret = replace(secret, unpublished=False)
        if action.kind is Kind.FINISH:
            nodes[at.id] = replace(at, tag=CONSUMED)
        if secret and action.kind in (Kind.FINISH, Kind.REVOKE):
            del found[secret.name]
        elif secret:
            found[secret.name] = secret
    return World(Listing(tuple(nodes.values())), tuple(found.values()), joins, (), OWNER, NOW)


WRITES = {Kind.ISSUE, Kind.RENEW, Kind.PUBLISH, Kind.EXTEND, Kind.FINISH, Kind.REVOKE}


@settings(max_examples=500, deadline=None)
@given(worlds())
def test_one_pass_settles_everything(world: World) -> None:
    after = carried_out(world, plan(world, POLICY), POLICY)
    assert [action for action in plan(after, POLICY) if action.kind in WRITES] == []


@settings(max_examples=500, deadline=None)
@given(worlds())
def test_every_wanted_node_ends_with_a_live_token_or_has_consumed_one(world: World) -> None:
    after = carried_out(world, plan(world, POLICY), POLICY)
    by_token = {secret.token: secret for secret in after.secrets}
    for each in after.listing.nodes:
        if each.wanted and not each.consumed:
            assert each.token is not None
            assert by_token[each.token].live(NOW)
            assert by_token[each.token].node_id == each.id


@settings(max_examples=500, deadline=None)
@given(worlds())
def test_there_is_one_action_for_each_node_and_nothing_is_issued_twice(world: World) -> None:
    actions = plan(world, POLICY)
    ids = [action.node.id for action in actions]
    assert len(ids) == len(set(ids))
    assert set(ids) == {n.id for n in world.listing.nodes} | {s.node_id for s in world.secrets}
    with_live = {secret.node_id for secret in world.secrets if secret.live(NOW)}
    assert not any(a.kind is Kind.ISSUE and a.node.id in with_live for a in actions)


@settings(max_examples=500, deadline=None)
@given(worlds())
def test_what_a_kubelet_may_still_need_is_never_taken(world: World) -> None:
    """A live half that is consumed, or with which a CSR waits, changes only after the join."""
    ids = {each.id for each in world.listing.nodes if not each.gone}
    for action in plan(world, POLICY):
        secret = action.secret
        if secret is None or not secret.live(NOW) or action.node.id not in ids:
            continue
        join = world.joins[secret.name]
        if action.kind in (Kind.REVOKE, Kind.FINISH):
            assert join is Join.JOINED
        if action.kind is Kind.RENEW:
            assert join in (Join.JOINED, Join.NO_CSR, Join.DENIED)
            assert join is Join.JOINED or secret.expires - NOW < POLICY.ttl / 3
