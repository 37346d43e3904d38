"""The pure functions by tables and by properties; the small parts that touch files or wait, with fakes."""
from __future__ import annotations

import base64
import contextlib
import copy
import fcntl
import itertools
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from botocore.parsers import ResponseParserError
from hypothesis import assume, given
from hypothesis import strategies as st

from conftest import recorded
from keto_tokens import (
    Access, Action, CallFailed, Credential, Csr, Join, Kind, Listing, Node, RateLimit, Reply, SetupError,
    Token, TokenSecret, World, aws_errors, base36, format_duration, format_time, latest_csr, owner_hash,
    parse_csr, parse_duration, parse_retry_after, parse_secret, parse_time, parse_token, redact,
    requested_node, retrying, secret_body, static_token, token_ids, write_whole,
)
from pki import kubelet_request

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
OWNER, NODE_ID, HALF = "owner", "i-0123456789abcdef0", "hush0hush1hush2x"
HALVES = st.text(ALPHABET, min_size=16, max_size=16)
TOKENS = st.builds(Token, st.text(ALPHABET, min_size=6, max_size=6), HALVES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, body: Any) -> Any:
    """The body with one of its parts missing, or replaced by some other JSON."""
    body = copy.deepcopy(body)
    place = body
    while True:
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.booleans()):
            break
        place = place[key]
    if draw(st.booleans()):
        place[key] = draw(JSON)
    else:
        del place[key]
    return body


# --- durations and times ---------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [
    ("0", 0), ("0s", 0), ("5s", 5), ("1h30m", 5400), ("1m1s", 61), ("1h1h", 7200), ("500ms", 0.5),
    ("1.5h", 5400), (".5s", 0.5), ("1.s", 1), ("007s", 7), ("250us", 250e-6), ("1\u00b5s", 1e-6),
    ("1\u03bcs", 1e-6), ("3ns", 3e-9), ("1s1m", 61), ("2562047h47m16s", 9223372036),
])
def test_durations_are_go_s(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, abs=1e-12)


@pytest.mark.parametrize("text", [
    "", " ", "s", ".s", "10", "1", "-5s", "5 s", "1h 5m", " 5s", "5s ", "5s\n", "5s5", "1.5.5s", "5d", "5S",
    "1e3s", "0x5s", "1_0s", "abc", "5s,", "\u0661s", "\uff15s", "2562048h", "9" * 400 + "s",
], ids=lambda text: ascii(text)[:20])
def test_what_is_no_duration_in_go(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0s"), (0.4, "0s"), (-5, "0s"), (1, "1s"), (59.6, "1m"), (61, "1m1s"), (3600, "1h"),
    (1799, "29m59s"), (5400, "1h30m"), (90061, "25h1m1s"),
])
def test_durations_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 2**33))
def test_durations_and_times_come_back(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == parse_time(format_time(seconds)) == seconds


@pytest.mark.parametrize(("text", "seconds"), [
    ("2026-11-23T20:24:41Z", 1795465481), ("2026-11-23T20:24:41.123456Z", 1795465481),
    ("2026-11-23T21:24:41+01:00", 1795465481), ("1970-01-01T00:00:00Z", 0),
])
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("rubbish", [
    None, "", "soon", 5, 5.5, True, [], {}, b"2026-11-23T20:24:41Z", "2026-11-23", "2026-11-23T20:24:41",
    "2026-11-23T20:24:41Z\n", "2026-11-31T00:00:00Z", "99999-01-01T00:00:00Z", "Z", ".5Z",
], ids=repr)
def test_what_is_no_time_is_long_ago(rubbish: Any) -> None:
    assert parse_time(rubbish) == 0.0


@given(JSON)
def test_any_json_has_a_time(value: Any) -> None:
    assert isinstance(parse_time(value), float)


# --- tokens, ids and owners ------------------------------------------------------------------------


@given(TOKENS)
def test_tokens_come_back(token: Token) -> None:
    assert parse_token(token.value) == token


@pytest.mark.parametrize("text", [
    None, "", "Success", "abcdef", f"abcdef.{HALF}x", f"abcdef.{HALF[1:]}", f"xabcdef.{HALF}",
    f"bcdef.{HALF}", f"ABCDEF.{HALF}", f"abcdef.{HALF}\n", f" abcdef.{HALF}", f"abcdef:{HALF}",
    f"abcde\u0661.{HALF}",
], ids=ascii)
def test_what_is_no_token(text: str | None) -> None:
    assert parse_token(text) is None


@given(st.text(), TOKENS, st.text())
def test_no_secret_half_is_left(before: str, token: Token, after: str) -> None:
    assume(not {before[-1:], after[:1]} & set(ALPHABET))
    assume(token.secret not in before and token.secret not in after)
    text = redact(before + token.value + after)
    assert token.secret not in text
    assert f"{token.id}.<redacted>" in text


@given(st.lists(TOKENS, min_size=1, max_size=4), st.sampled_from([" ", "\n", ".", ",", '"', "X", "_"]))
def test_every_secret_half_is_redacted(tokens: list[Token], between: str) -> None:
    text = redact(between.join(token.value for token in tokens))
    assert text == between.join(str(token) for token in tokens)


@pytest.mark.parametrize("text", [
    f"tag=abcdef.{HALF}", f"'abcdef.{HALF}'", repr(f"a\nabcdef.{HALF}\n"), repr(f"\tabcdef.{HALF}".encode()),
    f"value%3dabcdef.{HALF}&x", f"a%20abcdef.{HALF}", f"Bearer abcdef.{HALF}", f'"\\u003dabcdef.{HALF}"',
])
def test_a_token_is_found_behind_an_escape(text: str) -> None:
    assert redact(text) == text.replace(HALF, "<redacted>")


def test_values_that_are_known_are_redacted_and_all_else_is_kept() -> None:
    text = "POST /api/v1/namespaces/kube-system/secrets at 10-0-0-1.eu-west-2.compute.internal: a value"
    assert redact(text) == redact(text, "") == text
    assert redact(text, "a value", "") == text.replace("a value", "<redacted>")


@pytest.mark.parametrize("length", [100, 180, 187, 190])
def test_a_message_is_redacted_before_it_is_cut(length: int) -> None:
    with pytest.raises(CallFailed) as failure, aws_errors("ec2:DescribeTags"):
        raise ResponseParserError("x" * length + f" abcdef.{HALF}")
    assert HALF[:3] not in str(failure.value)


@given(st.integers(1, 2**256))
def test_base36_is_the_number_backwards(number: int) -> None:
    assert int(base36(number)[::-1], 36) == number
    assert set(base36(number)) <= set(ALPHABET)


def test_ids_and_owners_stay_what_they_were() -> None:
    """Another value would make running servers lose sight of the tokens that are out."""
    owner = owner_hash("aws", "eu-west-2", "KubeletToken", {"Role": "compute", "Env": "prod"})
    assert owner == "8574d7df3041a31db7e33482c60cf364"
    ids = "zob5p7 86qr82 kt59mp irc5uc 8enytk eu1mbk v8cnjr sjf2hf"
    assert token_ids(OWNER, NODE_ID) == ids.split()


def test_ids_are_uniform() -> None:
    ids = [token_id for n in range(2000) for token_id in token_ids(OWNER, f"i-{n:017x}")]
    assert len(set(ids)) == len(ids) == 16000
    for position in range(6):
        counts = [sum(token_id[position] == letter for token_id in ids) for letter in ALPHABET]
        assert sum(counts) == 16000
        assert 340 < min(counts) and max(counts) < 550  # 444 each, give or take five deviations


@given(st.text(), st.text())
def test_a_node_has_eight_ids_of_six(owner: str, node_id: str) -> None:
    ids = token_ids(owner, node_id)
    assert len(set(ids)) == 8
    assert all(len(token_id) == 6 and set(token_id) <= set(ALPHABET) for token_id in ids)
    assert not set(ids) & set(token_ids(owner + "x", node_id) + token_ids(owner, node_id + "x"))


@given(st.dictionaries(st.text(), st.text(), max_size=4), st.randoms())
def test_the_order_of_filters_is_no_matter(filters: dict[str, str], chance: Any) -> None:
    items = list(filters.items())
    chance.shuffle(items)
    assert owner_hash("a", "b", "c", filters) == owner_hash("a", "b", "c", dict(items))


def test_all_but_the_order_matters() -> None:
    owners = [
        ("aws", "a", "T", {"x": "y"}), ("gce", "a", "T", {"x": "y"}), ("aws", "b", "T", {"x": "y"}),
        ("aws", "a", "U", {"x": "y"}), ("aws", "T", "a", {"x": "y"}), ("aws", "a", "T", {"x": "z"}),
        ("aws", "a", "T", {"y": "x"}), ("aws", "a", "T", {}), ("aws", "a", "T", {"x": "y", "z": ""}),
        ("aws", "aT", "", {"x": "y"}), ("aws", "a", "T", {"x": 'y", "z'}),
    ]
    hashes = {owner_hash(*owner) for owner in owners}
    assert len(hashes) == len(owners) and {len(each) for each in hashes} == {32}


# --- Secrets ---------------------------------------------------------------------------------------

NODE = Node(NODE_ID, "pool", "InService")
OURS = Token(token_ids(OWNER, NODE_ID)[0], HALF)
SERVERS_PART = {"uid": "u1", "resourceVersion": "7", "creationTimestamp": "2026-11-23T20:24:40Z"}


def stored(node: Node = NODE, token: Token = OURS, now: float = 1e9, ttl: float = 60) -> dict[str, Any]:
    """A Secret as the API server returns it."""
    body = secret_body(token, node, OWNER, "system:bootstrappers:a", ["u9", "u8"], now, ttl)
    body["metadata"] |= SERVERS_PART
    return body


@given(
    st.integers(0, 2**32), st.integers(60, 10**8), st.sampled_from(["Success", None, "rubbish"]), st.text(),
    st.sampled_from(range(8)), HALVES,
)
def test_a_secret_comes_back(now: int, ttl: int, tag: str | None, pool: str, n: int, half: str) -> None:
    token = Token(token_ids(OWNER, NODE_ID)[n], half)
    body = stored(replace(NODE, tag=tag, pool=pool), token, now, ttl)
    created = 1795465480.0
    expected = TokenSecret(
        f"bootstrap-token-{token.id}", "u1", "7", token, NODE_ID, pool, created, now + ttl,
        now or created, frozenset({"u8", "u9"}), tag == "Success",
    )
    secret = parse_secret(body, OWNER)
    assert secret == expected
    assert secret and secret.body == body


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


OTHERS: list[tuple[str, Any]] = [
    # a path into the Secret, and what is there instead; ... for nothing
    *((path, ...) for path in (
        "type", "data", "metadata", "data token-id", "data token-secret", "metadata name", "metadata uid",
        "metadata resourceVersion", "metadata creationTimestamp", "metadata labels",
        "metadata labels keto-tokens/owner", "metadata labels app.kubernetes.io/managed-by",
        "metadata annotations", "metadata annotations keto-tokens/node",
    )),
    *((path, None) for path in ("data", "metadata", "metadata labels", "metadata annotations")),
    ("type", "Opaque"),
    ("metadata name", "bootstrap-token-abcdef"),
    ("metadata labels keto-tokens/owner", "other"),
    ("metadata labels app.kubernetes.io/managed-by", "Helm"),
    ("metadata annotations keto-tokens/node", "i-1"),
    ("data token-id", encoded("abcdef")),
    ("data token-secret", encoded("SHORT")),
    ("data token-secret", HALF + "!"),
    ("data token-secret", base64.b64encode(b"\xff" * 16).decode()),
    ("data expiration", "soon"),
]


@pytest.mark.parametrize(("path", "value"), OTHERS)
def test_secrets_that_are_not_ours(path: str, value: Any) -> None:
    body: dict[str, Any] = stored()
    assert parse_secret(body, OWNER)
    *parents, last = path.split()
    holder = body
    for key in parents:
        holder = holder[key]
    holder.pop(last)
    if value is not ...:
        holder[last] = value
    assert parse_secret(body, OWNER) is None


def test_an_id_that_is_not_the_node_s_is_not_ours() -> None:
    assert parse_secret(stored(token=Token("abcdef", HALF)), OWNER) is None
    assert parse_secret(stored(), "other") is None


@pytest.mark.parametrize("expiration", ["", "soon", "2026-11-23"])
def test_an_unreadable_expiration_is_expired(expiration: str) -> None:
    body = stored()
    body["data"]["expiration"] = encoded(expiration)
    secret = parse_secret(body, OWNER)
    assert secret and not secret.live(1.0)


@given(JSON | damaged(stored()))
def test_any_json_is_a_secret_of_ours_or_none(body: Any) -> None:
    secret = parse_secret(body, OWNER)
    assert secret is None or (secret.token.id, secret.node_id) == (OURS.id, NODE_ID)


# --- CSRs ------------------------------------------------------------------------------------------

NEW_CSR = recorded(34)["response"]["body"]
CSRS = recorded(35)["response"]["body"]["items"]
REQUEST = NEW_CSR["spec"]["request"]
OID = b"\x06\x03\x55\x04\x03"


def pem(content: bytes) -> str:
    text = f"-----BEGIN CERTIFICATE REQUEST-----\n{base64.b64encode(content).decode()}\n-----END -----\n"
    return encoded(text)


def test_recorded_csrs() -> None:
    made = 1795465481.0
    name = "ip-10-0-0-7.eu-west-2.compute.internal"
    uid, other = (body["metadata"]["uid"] for body in CSRS)
    assert parse_csr(NEW_CSR) == Csr(uid, "rec001", Join.PENDING, made, name)
    assert list(map(parse_csr, CSRS)) == [
        Csr(uid, "rec001", Join.ISSUED, made, name),
        Csr(other, "abcdef", Join.ISSUED, made - 241, "ip-10-0-0-9"),
    ]


@pytest.mark.parametrize(("status", "state", "later"), [
    ({}, Join.PENDING, 0),
    ({"conditions": None}, Join.PENDING, 0),
    ({"conditions": ["Approved"]}, Join.PENDING, 60),
    ({"conditions": ["Approved"], "certificate": "eA=="}, Join.ISSUED, 60),
    ({"conditions": ["Denied"]}, Join.DENIED, 60),
    ({"conditions": ["Approved", "Failed"]}, Join.DENIED, 60),
], ids=["new", "null", "approved", "issued", "denied", "failed"])
def test_the_states_of_a_csr(status: dict[str, Any], state: Join, later: int) -> None:
    times = {"lastUpdateTime": "2026-11-23T20:25:41Z"}
    conditions = [{"type": kind, **times} for kind in status.get("conditions") or []]
    if "conditions" in status:
        status = {**status, "conditions": conditions or None}
    csr = parse_csr({**NEW_CSR, "status": status})
    assert csr and (csr.state, csr.decided) == (state, 1795465481 + later)


@pytest.mark.parametrize("changes", [
    {"username": "system:node:ip-10-0-0-7"}, {"username": "system:bootstrap:abcdefg"},
    {"username": "system:bootstrap:ABCDEF"}, {"username": "x:system:bootstrap:abcdef"}, {"username": []},
    {"signerName": "kubernetes.io/kubelet-serving"}, {"request": "?"}, {"request": None},
], ids=str)
def test_csrs_of_others(changes: dict[str, Any]) -> None:
    assert parse_csr({**NEW_CSR, "spec": {**NEW_CSR["spec"], **changes}}) is None


@given(JSON | damaged(NEW_CSR) | damaged(CSRS[0]))
def test_any_json_is_a_csr_or_none(body: Any) -> None:
    csr = parse_csr(body)
    assert csr is None or csr.token_id == "rec001"


@pytest.mark.parametrize("name", ["n", "ip-10-0-0-1.eu-west-2.compute.internal", "x" * 52])
def test_the_name_that_a_kubelet_asks_for(name: str) -> None:
    assert requested_node(kubelet_request(name)) == name


def der(tag: int, *content: bytes) -> bytes:
    """An element in DER, with each form of its length that there is."""
    joined = b"".join(content)
    size = len(joined).to_bytes(2, "big").lstrip(b"\0")
    return bytes([tag, *([0x80 + len(size)] if len(joined) > 127 else []), *size]) + joined


@pytest.mark.parametrize("size", [1, 115, 116, 240, 300])
@pytest.mark.parametrize("tag", [0x0C, 0x13], ids=["UTF8String", "PrintableString"])
def test_a_name_of_any_length(size: int, tag: int) -> None:
    group = der(0x31, der(0x30, b"\x06\x03\x55\x04\x0a", der(tag, b"system:nodes")))
    common = der(0x31, der(0x30, OID, der(tag, b"system:node:" + b"n" * size)))
    request = der(0x30, der(0x30, b"\x02\x01\x00", der(0x30, group, common)))
    assert requested_node(pem(request)) == "n" * size


ODD = [
    "", "eA==", "?", "\u00e4", encoded("-----"), encoded("----------"), encoded("-----A-----?-----"),
    pem(b""), pem(OID), pem(OID + b"\x0c"), pem(OID + b"\x0c\x81"), pem(OID[:-1]),
    pem(OID + b"\x0c\x02\xff\xff"),
]


@pytest.mark.parametrize("request_text", ODD, ids=range(len(ODD)))
def test_a_request_without_a_name(request_text: str) -> None:
    with pytest.raises(ValueError):
        requested_node(request_text)
    assert parse_csr({**NEW_CSR, "spec": {**NEW_CSR["spec"], "request": request_text}}) is None


@given(st.text() | st.builds(encoded, st.text()) | st.builds(pem, st.binary())
       | st.builds(lambda a, b: pem(a + OID + b), st.binary(), st.binary()))
def test_odd_requests_have_a_name_or_are_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(requested_node(text), str)


def test_cut_requests_have_a_name_or_are_refused() -> None:
    text = base64.b64decode(REQUEST).decode()
    whole = base64.b64decode("".join(text.split("-----")[2].split()))
    cut = [REQUEST[:n] for n in range(len(REQUEST))] + [encoded(text[:n]) for n in range(len(text))]
    for request_text in cut + [pem(whole[:n]) for n in range(len(whole))]:
        with contextlib.suppress(ValueError):
            assert requested_node(request_text) in "system:node:ip-10-0-0-7.eu-west-2.compute.internal"


SECRET = TokenSecret(
    "name", "u1", "7", Token("rec001", HALF), NODE_ID, "pool", 0, 9000, 500, frozenset({"before"})
)


def csr(state: Join, uid: str = "since", token_id: str = "rec001") -> Csr:
    return Csr(uid, token_id, state, 0.0, "node")


@pytest.mark.parametrize(("csrs", "expected"), [
    ([], None),
    ([csr(Join.ISSUED, token_id="abcdef"), csr(Join.PENDING, token_id="abcdef")], None),
    ([csr(Join.ISSUED, "before"), csr(Join.DENIED, "before")], None),
    ([csr(Join.ISSUED)], Join.ISSUED),
    ([csr(Join.ISSUED, "before"), csr(Join.PENDING)], Join.PENDING),
    ([csr(Join.ISSUED, "before"), csr(Join.DENIED)], Join.DENIED),
    ([csr(Join.DENIED), csr(Join.PENDING, "other")], Join.PENDING),
    ([csr(Join.DENIED), csr(Join.PENDING, "other"), csr(Join.ISSUED, "third")], Join.ISSUED),
], ids=["none", "other tokens", "decided before", "issued", "asks again", "denied since",
        "denied, asks again", "issued at last"])
def test_the_csr_that_tells(csrs: list[Csr], expected: Join | None) -> None:
    for order in itertools.permutations(csrs):
        found = latest_csr(SECRET, order)
        assert (found and found.state) == expected


# --- waiting ---------------------------------------------------------------------------------------


def test_the_rate_limit() -> None:
    now: list[float] = [100.0]
    slept: list[float] = []
    limit = RateLimit(2.0, 3.0, slept.append, lambda: now[0])

    def waits(times: int) -> list[float]:
        slept.clear()
        for _ in range(times):
            limit.wait()
        return slept[:]

    assert waits(3) == []  # the burst
    assert waits(3) == [0.5, 1.0, 1.5]  # who comes at the same moment is served in turn
    now[0] += 1.5  # the third of them is served at this moment
    assert waits(1) == [0.5]
    now[0] += 0.5 + 0.25
    assert waits(1) == [0.25]
    now[0] += 0.25 + 1.0
    assert waits(3) == [0.5]  # two are there again
    now[0] += 3600
    assert waits(4) == [0.5]  # never more than the burst


@pytest.mark.parametrize(("failures", "attempts", "after", "sleeps"), [
    (0, 3, 0.0, []), (1, 3, 0.0, [1.0]), (2, 3, 0.0, [1.0, 2.0]), (3, 3, 0.0, [1.0, 2.0]),
    (1, 1, 0.0, []), (1, 3, 7.0, [7.0]), (1, 3, 0.5, [1.0]), (2, 3, 3600.0, [10.0, 10.0]),
    (6, 7, 0.0, [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]),
])
def test_retries(
    failures: int, attempts: int, after: float, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    slept: list[float] = []
    error = CallFailed("not yet", again=True, after=after)
    call = Mock(side_effect=[error] * failures + ["done"])
    with pytest.raises(CallFailed) if failures >= attempts else contextlib.nullcontext():
        assert retrying(call, slept.append, attempts) == "done"
    assert (slept, call.call_count) == (sleeps, min(failures + 1, attempts))


@given(st.integers(1, 8), st.floats(0, 1e9))
def test_backoff_has_bounds(failures: int, after: float) -> None:
    slept: list[float] = []
    call = Mock(side_effect=[CallFailed("x", again=True, after=after)] * failures + [5])
    assert retrying(call, slept.append, 9) == 5
    for n, seconds in enumerate(slept, 1):
        assert min(10.0, max(after, 0.25 * 2**n)) <= seconds <= min(10.0, max(after, 0.5 * 2**n))


@pytest.mark.parametrize("error", [CallFailed("x", after=5.0), SetupError("x"), ValueError("x")], ids=repr)
def test_what_will_not_go_better_is_not_tried_again(error: Exception) -> None:
    call, sleep = Mock(side_effect=error), Mock()
    with pytest.raises(type(error)):
        retrying(call, sleep, 3)
    assert (call.call_count, sleep.call_count) == (1, 0)


@pytest.mark.parametrize(("text", "seconds"), [
    (None, 0), ("", 0), ("0", 0), ("7", 7), ("120", 120), ("-1", 0), ("1.5", 0), ("soon", 0), ("1e3", 0),
    ("Wed, 21 Oct 2026 07:28:00 GMT", 0), ("\u0667", 0), ("\u00b2", 0), (" 7", 0),
], ids=ascii)
def test_retry_after(text: str | None, seconds: float) -> None:
    assert parse_retry_after(text) == seconds


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kubeconfig", "a[b]*.conf", "\u00fc"])
def test_a_file_is_written_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "etc" / "kubernetes" / name
    before = os.umask(0o077)
    try:
        assert write_whole(path, "new\u00e9\n") is True
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent, path.parent.parent)]
    assert modes == [0o600, 0o755, 0o755]
    inode = path.stat().st_ino
    leftover = path.with_name(f".{name}.keto-tokens-abc123")
    leftover.write_text("half")
    assert write_whole(path, "new\u00e9\n") is False
    assert (path.read_text(), path.stat().st_ino) == ("new\u00e9\n", inode)
    assert os.listdir(path.parent) == [name]


def test_a_file_that_others_can_read_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text("same")
    path.chmod(0o644)
    assert write_whole(path, "same") is True
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("same", 0o600)


def test_a_file_that_another_run_is_writing_is_kept(tmp_path: Path) -> None:
    names = [".kubeconfig.keto-tokens-locked", ".kubeconfig.keto-tokens-free", ".other.keto-tokens-free", "x"]
    for name in names:
        (tmp_path / name).write_text("half")
    with open(tmp_path / names[0]) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert write_whole(tmp_path / "kubeconfig", "new")
        assert sorted(os.listdir(tmp_path)) == sorted({*names, "kubeconfig"} - {names[1]})
    assert not write_whole(tmp_path / "kubeconfig", "new")
    assert sorted(os.listdir(tmp_path)) == sorted(["kubeconfig", *names[2:]])


@pytest.mark.parametrize("call", ["rename", "fsync"])
@pytest.mark.parametrize("old", ["old", None], ids=["over an old file", "a new file"])
def test_a_write_that_fails_changes_nothing(
    tmp_path: Path, call: str, old: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kubeconfig"
    if old:
        path.write_text(old)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, call, Mock(side_effect=OSError(28, "No space left on device")))
        write_whole(path, "new")
    assert [each.read_text() for each in tmp_path.iterdir()] == [old] * bool(old)
    assert write_whole(path, "new")


def test_a_write_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is on the disk before the name is, and the name before we say so."""
    path = tmp_path / "kubeconfig"
    path.write_text("old")
    effects: list[Any] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        status = os.fstat(descriptor)
        folder = stat.S_ISDIR(status.st_mode)
        effects.append(("sync folder", status.st_ino) if folder else ("sync file", status.st_size))
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        assert path.read_text() == "old"
        effects.append(("rename", Path(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    assert write_whole(path, "newer")
    assert effects == [("sync file", 5), ("rename", path), ("sync folder", tmp_path.stat().st_ino)]


# --- records ---------------------------------------------------------------------------------------

TAGGED = replace(NODE, tag=OURS.value)
HELD = TokenSecret("name", "u1", "7", OURS, NODE_ID, "pool", 0, 0, 0, body=stored())
RECORDS = [
    OURS, TAGGED, HELD, Listing((TAGGED,)), Action(Kind.WAIT, TAGGED, HELD, "a reason"),
    World(Listing((TAGGED,)), (HELD,), {}, (), OWNER, 0.0),
    Credential(OURS.value, f"certificate {HALF}", f"key {HALF}"),
    Access("https://h", "a test", f"ca {HALF}", credential=static_token(OURS.value)),
    Reply(200, {"X": OURS.value}, OURS.value.encode()),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_no_repr_shows_a_secret(record: object) -> None:
    for text in (repr(record), str(record), f"{record}", repr([record])):
        assert text and HALF not in text and encoded(HALF) not in text
