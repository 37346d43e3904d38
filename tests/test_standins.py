"""The stand-in for the API server, held against exchanges recorded with a real one."""
from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3

from pki import trusting
from standin_imds import Imds
from standin_kubernetes import Kubernetes, User, jws

EXCHANGES = sorted((Path(__file__).parent / "kubernetes-api").glob("*.json"))
VOLATILE = {"uid": "UID", "resourceVersion": "VERSION", "certificate": "PEM", "continue": "TOKEN"}


@pytest.fixture(scope="module")
def api() -> Iterator[Kubernetes]:
    with Kubernetes(names=("127.0.0.1",)) as made:
        made.users["service-account"] = User(
            "system:serviceaccount:kube-system:rec-sa", ("system:authenticated",)
        )
        # What the recording found in its cluster.
        recorded_info = json.loads(next(p for p in EXCHANGES if p.name.startswith("22")).read_text())
        info = recorded_info["response"]["body"]
        made.put("configmaps", "kube-public", "cluster-info", {
            "metadata": {"annotations": info["metadata"]["annotations"]},
            "data": {"kubeconfig": info["data"]["kubeconfig"]},
        })
        yield made


def prepare(api: Kubernetes, name: str) -> None:
    """Bring the stand-in to where the real cluster was when this exchange was recorded."""
    number = int(name[:2])
    api.clean()
    have = {key[2] for key in api.objects if key[0] == "secrets"}
    wanted = {"bootstrap-token-rec001", "bootstrap-token-rec002", "bootstrap-token-rec003"}
    if number in (2, 41):
        wanted = set()
    elif number < 9 or number >= 40:
        wanted = {"bootstrap-token-rec001"}
    elif number in (15, 22):
        wanted -= {"bootstrap-token-rec003"}
    if number == 41:  # the revoked token was used just before
        api.answer(api.user_of("Bearer rec001.0123456789abcdef", None), "GET", "/version", None)
    if number == 22:
        add_secret(api, "abcdef", {})
        wanted.add("bootstrap-token-abcdef")
    for secret in have - wanted:
        del api.objects["secrets", "kube-system", secret]
    for secret in wanted - have:
        add_secret(api, secret[-6:], {"app.kubernetes.io/managed-by": "keto-tokens"})
    leases = [key for key in api.objects if key[0] == "leases"]
    if number in (28, 29):
        for key in leases:
            del api.objects[key]
    elif 30 <= number <= 33 and not leases:
        ask(api, exchange_of("29"))
    if number in (31, 32):
        lease = api.objects["leases", "kube-system", "rec-lease"]
        lease["metadata"]["resourceVersion"] = "555" if number == 31 else "556"
    add_requests(api, number)


def add_secret(api: Kubernetes, token_id: str, labels: dict[str, str]) -> None:
    made = exchange_of("02")["response"]["body"]
    data = {**made["data"], "token-id": encode(token_id), "expiration": encode("2099-01-01T00:00:00Z")}
    body = {**made, "metadata": {"labels": labels}, "data": data}
    api.put("secrets", "kube-system", f"bootstrap-token-{token_id}", body)


def add_requests(api: Kubernetes, number: int) -> None:
    for key in [key for key in api.objects if key[0] in ("certificatesigningrequests", "nodes")]:
        del api.objects[key]
    if number in (35, 36):
        for body in exchange_of("35")["response"]["body"]["items"]:
            body["status"]["conditions"][0]["lastUpdateTime"] = api.stamp()
            api.put("certificatesigningrequests", "", body["metadata"]["name"], body)
    if number >= 38:
        body = exchange_of("38")["response"]["body"]
        api.put("nodes", "", body["metadata"]["name"], body)


def encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def exchange_of(number: str) -> Any:
    (path,) = (path for path in EXCHANGES if path.name.startswith(number))
    return json.loads(path.read_text())


def ask(api: Kubernetes, exchange: Any) -> urllib3.BaseHTTPResponse:
    request, who = exchange["request"], exchange["as"]
    bearer = {"cluster admin": api.admin, "a service account": "service-account"}.get(who, who)
    headers = {} if who.startswith("nobody") else {"Authorization": f"Bearer {bearer}"}
    body, path = request["body"], request["path"]
    if "continue=ey" in path:  # the token of a page is the server's own affair
        first = api.answer(api.users[api.admin], "GET", path.partition("&continue")[0], None)[1]
        path = f"{path.partition('&continue')[0]}&continue={first['metadata']['continue']}"
    with urllib3.PoolManager(ssl_context=trusting(api.authority.pem)) as pool:
        content = None if body is None else json.dumps(body)
        return pool.request(request["method"], api.url + path, body=content, headers=headers)


def settled(value: Any, key: str = "") -> Any:
    """The value with what differs from run to run made equal."""
    if isinstance(value, dict):
        return {k: settled(v, k) for k, v in value.items() if k not in ("managedFields",)}
    if isinstance(value, list):
        return [settled(item) for item in value]
    if key in VOLATILE:
        return VOLATILE[key]
    if isinstance(value, str):
        if key == "data" or key == "expiration":
            return "DATA"
        value = re.sub(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", "UID", value)
        return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", value)
    return value


@pytest.mark.parametrize("path", EXCHANGES, ids=lambda path: path.stem)
def test_answers_as_the_recorded_api_server(api: Kubernetes, path: Path) -> None:
    prepare(api, path.name)
    exchange = json.loads(path.read_text())
    reply = ask(api, exchange)
    expected = exchange["response"]
    assert reply.status == expected["status"]
    assert reply.headers["Content-Type"] == expected["content-type"]
    assert "Date" in reply.headers
    got, wanted = settled(json.loads(reply.data)), settled(expected["body"])
    if path.name.startswith("01"):  # a version says what it is of
        got, wanted = set(got) & {"major", "minor"}, {"major", "minor"}
    assert got == wanted


def test_the_signature_is_the_one_of_the_documented_vectors() -> None:
    text = "Hello from the other side. I must have called a thousand times."
    made = jws("joshua", "my voice is my passcode", text)
    assert made.split("..")[1] == "VShe2taLd-YTrmWuRkcL_8QTNDHYxQIEBsAYYiIj1_8"
    empty = jws("joshua", "my voice is my passcode", "")
    assert empty.split("..")[1] == "7Ui1ALizW4jXphVUB7xUqC9vLYLL9RZeOFfVLoB7Tgk"


def test_the_metadata_service_wants_a_session_token(imds: Imds) -> None:
    base = imds.url("i-0123456789abcdef0")
    where = f"{base}/latest/meta-data/instance-id"
    assert urllib3.request("GET", where).status == 401
    assert urllib3.request("PUT", f"{base}/latest/api/token").status == 400
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    session = urllib3.request("PUT", f"{base}/latest/api/token", headers=ttl).data.decode()
    reply = urllib3.request("GET", where, headers={"X-aws-ec2-metadata-token": session})
    assert (reply.status, reply.data) == (200, b"i-0123456789abcdef0")
