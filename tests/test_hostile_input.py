"""Whatever comes from outside: a documented error or a retry; never a bug, a hang or a wrong file.

The wire is replaced in memory, so that there can be thousands of answers; test_failures.py and
test_trust.py have the likely ones over real HTTP.
"""
from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keto_tokens
from conftest import recorded
from keto_tokens import Access, Calls, Cluster, KetoError, Node, Reply, Stop, Token, TokenStore
from pki import Authority

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
CA = Authority().pem
HALF = "hush0hush1hush2x"
TOKEN = Token("abcdef", HALF)
NODE = Node("i-0123456789abcdef0", "pool", "InService")

KEYS = st.sampled_from([
    "kind", "apiVersion", "metadata", "items", "data", "status", "spec", "name", "uid", "continue",
    "resourceVersion", "creationTimestamp", "labels", "annotations", "token-id", "token-secret",
    "expiration", "userInfo", "username", "allowed", "message", "conditions", "certificate", "request",
    "signerName", "holderIdentity", "leaseDurationSeconds", "kubeconfig", "jws-kubeconfig-abcdef",
    "lastHeartbeatTime", "gitVersion", "type", "reason", "leaseTransitions",
])
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from([TOKEN.value, "system:bootstrap:abcdef", "abcdef", HALF, "Approved", "Ready", "eA==",
                     base64.b64encode(HALF.encode()).decode(), "2026-11-23T20:24:37Z", "-1", "x" * 300]),
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
JSON = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.one_of(KEYS, TEXTS), inner, max_size=5),
), max_leaves=15)


def mutated(value: Any) -> st.SearchStrategy[Any]:
    """A true answer with something else in one place or several."""
    inner: st.SearchStrategy[Any]
    if isinstance(value, dict):
        inner = st.fixed_dictionaries({key: mutated(each) for key, each in value.items()})
    elif isinstance(value, list):
        inner = st.tuples(*map(mutated, value)).map(lambda items: list(items))
    else:
        inner = st.just(value)
    return st.integers(0, 9).flatmap(lambda n: JSON if n == 0 else inner)


BODIES = st.one_of(JSON, *(mutated(recorded(number)["response"]["body"])
                           for number in (2, 9, 18, 22, 27, 31, 34, 38)))
CONTENTS = st.one_of(BODIES.map(lambda body: json.dumps(body).encode()), st.binary(max_size=50))
HEADERS = st.fixed_dictionaries({}, optional={
    "Date": st.one_of(TEXTS, st.just("Mon, 23 Nov 2026 20:24:37 GMT")), "Retry-After": TEXTS,
    "Content-Type": TEXTS,
})
REPLIES = st.builds(Reply, st.sampled_from([200, 200, 200, 201, 301, 401, 403, 404, 409, 429, 500, 99]),
                    HEADERS, CONTENTS)


@contextmanager
def wire(replies: list[Reply]) -> Iterator[None]:
    """Every request gets the next of the answers, and the last one for ever."""
    left = list(replies)

    def send(*args: Any, **kwargs: Any) -> Reply:
        return left.pop(0) if len(left) > 1 else left[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keto_tokens, "send", send)
        patch.setattr("random.uniform", lambda low, high: 0.0)
        patch.setattr(keto_tokens, "PAGES", 3)
        yield


def cluster() -> Cluster:
    access = Access("https://127.0.0.1:1", "a test", CA, credential=keto_tokens.static_token("bearer"))
    return Cluster(access, Calls(), lambda seconds: None)


def store() -> TokenStore:
    return TokenStore(cluster(), "owner", namespace="kube-system", groups="g", ttl=60)


def secret() -> keto_tokens.TokenSecret:
    body = keto_tokens.secret_body(TOKEN, NODE, "owner", "g", [], 1e9, 60)
    body["metadata"] |= {"uid": "u", "resourceVersion": "1"}
    return keto_tokens.TokenSecret("bootstrap-token-abcdef", "u", "1", TOKEN, NODE.id, "pool", 0, 9e9, 0,
                                   body=body)


def lead() -> None:
    keto_tokens.Leader(cluster(), "kube-system", "x")._step()


def preflight() -> None:
    look = keto_tokens.Preflight()
    look.cluster(cluster())
    look.rights(cluster(), "kube-system", True)
    look.step("cluster-info", lambda: keto_tokens.info_finding(cluster().access, TOKEN, print))
    look.step("token", lambda: keto_tokens.live_finding(cluster().access, TOKEN, lambda seconds: None))


CALLS: dict[str, Callable[[], Any]] = {
    "list": lambda: store().list(),
    "issue": lambda: store().issue(NODE, frozenset()),
    "renew": lambda: store().renew(secret(), NODE, frozenset()),
    "extend": lambda: store().extend(secret()),
    "revoke": lambda: store().revoke(secret()),
    "joins": lambda: keto_tokens.Joins(cluster()).observe([secret()]),
    "review": lambda: keto_tokens.token_refusal(cluster().access, TOKEN, lambda seconds: None),
    "discovery": lambda: keto_tokens.discover("https://h", TOKEN, [], lambda seconds: None),
    "lease": lead,
    "check": preflight,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@MANY
@given(replies=st.lists(REPLIES, min_size=1, max_size=4))
def test_any_answer_of_a_cluster(call: Callable[[], Any], replies: list[Reply]) -> None:
    with wire(replies), suppress(KetoError):
        call()


@MANY
@given(st.lists(REPLIES, min_size=1, max_size=3))
def test_no_message_repeats_a_secret_of_the_request(replies: list[Reply]) -> None:
    """An error that quotes the Secret it was sent is quoted without it."""
    encoded = base64.b64encode(HALF.encode()).decode()
    quoting = [Reply(422, {}, json.dumps({"message": f"invalid: {encoded} {HALF} bearer"}).encode())]
    with wire(quoting + replies), pytest.MonkeyPatch.context() as patch:
        patch.setattr(keto_tokens, "new_secret", lambda: HALF)
        with pytest.raises(KetoError) as failure:
            store().issue(NODE, frozenset())
    assert HALF not in str(failure.value) and encoded not in str(failure.value)
    assert "bearer" not in str(failure.value)


IMDS_REPLIES = st.builds(Reply, st.sampled_from([200, 200, 200, 401, 404, 500, 302]), HEADERS, st.one_of(
    st.binary(max_size=30), TEXTS.map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from([b"i-0123456789abcdef0", b"eu-west-2", TOKEN.value.encode(), b"Success", b""]),
))


@MANY
@given(st.lists(IMDS_REPLIES, min_size=1, max_size=8))
def test_any_answer_of_the_metadata_service(replies: list[Reply]) -> None:
    imds = keto_tokens.Imds({}, lambda seconds: None)
    instance = keto_tokens.AwsInstance("KubeletToken", "imds", imds, Calls(), lambda seconds: None)
    with wire(replies):
        with suppress(KetoError):
            assert instance.identify().startswith("i-")
            value = instance.read_tag()
            assert value is None or isinstance(value, str)
        with suppress(KetoError):
            assert "-" in keto_tokens.aws_region_of(imds)


GCE_KEYS = st.sampled_from([
    "items", "instances", "metadata", "fingerprint", "key", "value", "status", "zone", "name", "id", "error",
    "errors", "code", "message", "reason", "warning", "unreachables", "nextPageToken", "queryValue",
    "access_token", "expires_in", "permissions", "accessToken", "expireTime", "created-by", "KubeletToken",
])
GCE_JSON = st.recursive(st.one_of(LEAVES, st.sampled_from(["DONE", "RUNNING", "zones/z-1"])), lambda inner: (
    st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(GCE_KEYS, TEXTS), inner, max_size=5))
), max_leaves=15)
GCE_BODIES: list[Any] = [
    {"items": {"zones/z-1": {"instances": [{
        "id": "1", "name": "n", "zone": "https://g/zones/z-1", "status": "RUNNING",
        "metadata": {"items": [{"key": "KubeletToken", "value": TOKEN.value}]},
    }], "warning": {"code": "NO_RESULTS_ON_PAGE", "message": "m"}}}, "unreachables": []},
    {"metadata": {"fingerprint": "f", "items": [{"key": "k", "value": "v"}]}},
    {"name": "operation-1", "status": "DONE", "error": {"errors": [{"code": "C", "message": "m"}]}},
    {"error": {"code": 403, "message": "m", "errors": [{"reason": "rateLimitExceeded"}]}},
    {"queryValue": {"items": [{"value": "v"}]}}, {"permissions": ["compute.instances.get"]},
    {"access_token": "a", "expires_in": 3599, "accessToken": "a", "expireTime": "2026-11-23T20:24:37Z"},
]
GCE_REPLIES = st.builds(
    Reply, st.sampled_from([200, 200, 200, 401, 403, 404, 412, 429, 503, 302]),
    st.fixed_dictionaries({"Metadata-Flavor": st.just("Google")}, optional={"ETag": TEXTS}),
    st.one_of(
        st.one_of(GCE_JSON, *map(mutated, GCE_BODIES)).map(lambda body: json.dumps(body).encode()),
        st.binary(max_size=50), st.sampled_from([b"1", b"z-1", b"projects/1/zones/z-1", b"null"]),
    ),
)
GCE_ID = "z-1/n/1"


def gce_pools() -> keto_tokens.GcePools:
    credential = keto_tokens.GoogleCredential("a test", lambda: ("ya29.a", 3600.0))
    api = keto_tokens.GoogleApi("https://h/v1", "a test", credential, Calls(), lambda seconds: None)
    return keto_tokens.GcePools("project", "a test", "KubeletToken", api)


def gce_instance() -> keto_tokens.GceInstance:
    metadata = keto_tokens.GoogleMetadata({}, lambda seconds: None)
    return keto_tokens.GceInstance("KubeletToken", metadata, lambda seconds: None)


def gce_checks() -> None:
    look = keto_tokens.Preflight()
    for subject, call in (*gce_pools().checks({"role": "compute"}), *gce_instance().checks()):
        look.step(subject, call)


def federated() -> None:
    source = {"file": "token", "format": {"type": "json", "subject_token_field_name": "x"}}
    config = {
        "type": "external_account", "audience": "a", "subject_token_type": "t", "credential_source": source,
        "token_url": "https://h/t", "service_account_impersonation_url": "https://h/i",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keto_tokens, "read_text", lambda path, what: json.dumps({**config, "x": "subject"}))
        keto_tokens.FederatedIdentity("credentials.json", Calls(), lambda seconds: None)()


GCE_CALLS: dict[str, Callable[[], Any]] = {
    "list": lambda: gce_pools().list_nodes({"role": "compute"}),
    "write": lambda: gce_pools().write_tag(GCE_ID, "value"),
    "identify": lambda: gce_instance().identify(),
    "read": lambda: gce_instance().read_tag(),
    "wait": lambda: gce_instance().wait_for_change(5.0),
    "mark": lambda: gce_instance().mark_consumed(TOKEN),
    "credential": lambda: keto_tokens.google_credential(
        {}, keto_tokens.GoogleMetadata({}, lambda seconds: None), Calls(), lambda seconds: None)(),
    "federation": federated,
    "checks": gce_checks,
}


@pytest.mark.parametrize("call", GCE_CALLS.values(), ids=GCE_CALLS)
@MANY
@given(replies=st.lists(GCE_REPLIES, min_size=1, max_size=5))
def test_any_answer_of_google(call: Callable[[], Any], replies: list[Reply]) -> None:
    with wire(replies), suppress(KetoError):
        call()


class Tagged:
    """An instance whose tag says something."""

    def __init__(self, value: str | None):
        self.value, self.marked = value, False

    def identify(self) -> str:
        return NODE.id

    def read_tag(self) -> str | None:
        return self.value

    def wait_for_change(self, seconds: float) -> None:
        """At once."""

    def mark_consumed(self, token: Token) -> None:
        self.marked = True

    def checks(self) -> list[tuple[str, Callable[[], str]]]:
        return []


@MANY
@given(value=st.one_of(st.none(), TEXTS, st.text(min_size=200, max_size=256)),
       replies=st.lists(REPLIES, min_size=1, max_size=3))
def test_a_file_is_only_written_for_a_token_that_is_live(
    tmp_path: Path, value: str | None, replies: list[Reply]
) -> None:
    path, instance = tmp_path / "kubeconfig", Tagged(value)
    path.unlink(missing_ok=True)
    access = Access("https://h:1", "a test", CA)
    client = keto_tokens.Client(instance, lambda token: access, path, tag_name="KubeletToken",
                                interval=0.001, timeout=0.001, stop=Stop())
    with wire(replies), suppress(KetoError):
        client.run()
    if path.exists():
        user = json.loads(replies[-1].body)
        content = yaml.safe_load(path.read_text())
        assert keto_tokens.parse_token(value) is not None and instance.marked and user is not None
        assert content["users"][0]["user"]["token"] == value
        assert content["clusters"][0]["cluster"]["server"] == "https://h:1"
    else:
        assert not instance.marked


KUBECONFIG = {
    "apiVersion": "v1", "kind": "Config", "current-context": "x",
    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    "clusters": [{"name": "c", "cluster": {"server": "https://h", "certificate-authority-data":
                                           base64.b64encode(CA.encode()).decode()}}],
    "users": [{"name": "u", "user": {"token": HALF, "exec": None}}],
}


@MANY
@given(st.one_of(mutated(KUBECONFIG), JSON).map(lambda body: yaml.safe_dump(body).encode())
       | st.binary(max_size=100) | st.text(alphabet="{}[]:,&*!|>%@#-'\" \n\tax", max_size=60).map(str.encode))
def test_any_kubeconfig(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kubeconfig"
    path.write_bytes(content)
    with suppress(KetoError):
        access = keto_tokens.Kubeconfig(str(path)).access()
        assert isinstance(access.server, str)
        access.credential(False)


@MANY
@given(st.one_of(mutated({"apiVersion": "v", "kind": "ExecCredential", "status": {
    "token": HALF, "expirationTimestamp": "2026-11-23T20:24:37Z"}}).map(json.dumps), st.text()))
def test_any_output_of_a_plugin(output: str) -> None:
    plugin = keto_tokens.ExecPlugin.__new__(keto_tokens.ExecPlugin)
    plugin.version, plugin.where, plugin.path = "v", "kubeconfig x: exec", "plugin"
    with suppress(KetoError):
        expires, credential = plugin._parse(output)
        assert isinstance(expires, float) and isinstance(credential.token, str)


@MANY
@given(st.one_of(TEXTS, JSON.map(yaml.safe_dump), mutated(yaml.safe_load(
    recorded(22)["response"]["body"]["data"]["kubeconfig"])).map(yaml.safe_dump)))
def test_any_cluster_info(text: str) -> None:
    with suppress(KetoError):
        ca = keto_tokens.cluster_info_ca(text)
        assert keto_tokens.certificates(ca)
        keto_tokens.pinned_ca(ca, ["sha256:" + "0" * 64])


@MANY
@given(st.binary(max_size=60) | st.binary(max_size=8).map(lambda tail: b"\x30\x06\x30\x04" + tail))
def test_any_certificate(der: bytes) -> None:
    pem = f"-----BEGIN CERTIFICATE-----\n{base64.b64encode(der).decode()}\n-----END CERTIFICATE-----\n"
    with suppress(ValueError):
        keto_tokens.public_key_hash(pem)
    with suppress(KetoError):
        keto_tokens.checked_ca(pem, "a test")
