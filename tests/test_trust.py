"""How a node knows its cluster without a file, and sees its own token without a right."""
from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import keto_tokens
from clusters import CSRS, StandinCluster, kubeconfig_of
from conftest import Result, World, recorded
from pki import Authority
from standin_aws import refusal
from standin_kubernetes import Kubernetes, hang_up, jws, status

INFO = "/configmaps/cluster-info"


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: 0.01)


def api(world: World) -> Kubernetes:
    assert isinstance(world.cluster, StandinCluster)
    return world.cluster.api


def found(world: World, node: str, *argv: str) -> Result:
    """The client without a CA file."""
    return world.program(
        "client", "--master", world.cluster.url, "--kubeconfig", str(world.kubeconfig(node)),
        "--interval", "50ms", "--timeout", "2s", *argv, **world.node_environment(node),
    )


def pin(world: World) -> str:
    return keto_tokens.public_key_hash(world.cluster.ca_path.read_text())


def refused(world: World, node: str, result: Result, code: int, words: str) -> None:
    """Nothing was written, the tag is as it was, and the reason is said."""
    assert (result.code, words in result.err) == (code, True), result.err
    assert not world.kubeconfig(node).exists()
    assert world.aws.tag(node) == world.token_of(node)


@pytest.fixture
def node(faulty: World) -> str:
    (made,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    return made


def test_without_a_file_the_signature_tells_the_cluster(world: World) -> None:
    (node,) = world.aws.group("compute", 1, Role="compute")
    world.server()
    result = found(world, node, "--timeout", "30s")
    assert result.code == 0, result.err
    assert world.aws.tag(node) == "Success"
    written = kubeconfig_of(world.kubeconfig(node))
    ours, theirs = (keto_tokens.certificates(text) for text in
                    (written["ca"], world.cluster.ca_path.read_text()))
    assert [text.strip() for text in ours] == [text.strip() for text in theirs]


def test_a_pin_tells_the_cluster(world: World) -> None:
    (node,) = world.aws.group("compute", 1, Role="compute")
    world.server()
    wrong = "sha256:" + "0" * 64
    assert found(world, node, "--ca-cert-hash", wrong, "--ca-cert-hash", pin(world)).code == 0


def test_pins_by_the_environment(faulty: World, node: str) -> None:
    with faulty.program.monkeypatch.context() as patch:
        patch.setenv("CA_CERT_HASH", f"{pin(faulty)}, sha256:{'0' * 64}")
        assert found(faulty, node).code == 0


def change(world: World, text: str | None = None, **signatures: str) -> None:
    """Let cluster-info say something else from now on."""
    info = api(world).objects["configmaps", "kube-public", "cluster-info"]
    data = {"kubeconfig": text if text is not None else info["data"]["kubeconfig"], **signatures}
    body = json.dumps({"kind": "ConfigMap", "apiVersion": "v1", "data": data})
    api(world).fail("GET", INFO, status(200, body), times=999)


def signed(world: World, node: str) -> str:
    token_id, _, half = world.token_of(node).partition(".")
    content = api(world).objects["configmaps", "kube-public", "cluster-info"]["data"]["kubeconfig"]
    return jws(token_id, half, content)


def forged(text: str) -> str:
    return text[:-1] + ("A" if text[-1] != "A" else "B")


SIGNATURES: dict[str, tuple[Callable[[str], str], str]] = {
    "forged": (forged, "is not made with token id"),
    "truncated": (lambda text: text[:-10], "is not made with token id"),
    "empty": (lambda text: "", "is not made with token id"),
    "not ASCII": (lambda text: "\u00fc" * 8, "is not made with token id"),
    "of another algorithm": (lambda text: text.replace(text.split(".")[0], "eyJhbGciOiJub25lIn0"),
                             "is not made with token id"),
}


@pytest.mark.parametrize(("make", "words"), SIGNATURES.values(), ids=SIGNATURES)
def test_a_signature_that_is_not_right(
    faulty: World, node: str, make: Callable[[str], str], words: str
) -> None:
    name = f"jws-kubeconfig-{faulty.token_of(node)[:6]}"
    change(faulty, **{name: make(signed(faulty, node))})
    refused(faulty, node, found(faulty, node), 5, words)


def test_no_signature_with_this_token(faulty: World, node: str) -> None:
    change(faulty, **{"jws-kubeconfig-abcdef": signed(faulty, node)})
    refused(faulty, node, found(faulty, node), 5, "is not signed with token id")


def test_the_signature_of_another_token(faulty: World, node: str) -> None:
    content = api(faulty).objects["configmaps", "kube-public", "cluster-info"]["data"]["kubeconfig"]
    token_id = faulty.token_of(node)[:6]
    change(faulty, **{f"jws-kubeconfig-{token_id}": jws(token_id, "f" * 16, content)})
    refused(faulty, node, found(faulty, node), 5, "is not made with token id")


def test_a_signature_that_comes_late(faulty: World, node: str) -> None:
    info = api(faulty).objects["configmaps", "kube-public", "cluster-info"]
    body = json.dumps({"kind": "ConfigMap", "data": {"kubeconfig": info["data"]["kubeconfig"]}})
    api(faulty).fail("GET", INFO, status(200, body), times=3)
    assert found(faulty, node).code == 0


def test_an_impostor_with_a_ca_of_its_own(faulty: World, node: str) -> None:
    """Who answers shows another CA: neither the pin nor the signature fits."""
    text = api(faulty).objects["configmaps", "kube-public", "cluster-info"]["data"]["kubeconfig"]
    ca = base64.b64encode(Authority().pem.encode()).decode()
    own = text.split("certificate-authority-data: ")[1].split("\n")[0]
    change(faulty, text.replace(own, ca))
    result = found(faulty, node, "--ca-cert-hash", pin(faulty))
    refused(faulty, node, result, 3, "is not --ca-cert-hash")
    assert "sha256:" in result.err


def test_only_the_pinned_ca_of_a_bundle_is_believed(faulty: World, node: str, tmp_path: Path) -> None:
    text = api(faulty).objects["configmaps", "kube-public", "cluster-info"]["data"]["kubeconfig"]
    own = text.split("certificate-authority-data: ")[1].split("\n")[0]
    both = Authority().pem + faulty.cluster.ca_path.read_text() + Authority().pem
    change(faulty, text.replace(own, base64.b64encode(both.encode()).decode()))
    assert found(faulty, node, "--ca-cert-hash", pin(faulty)).code == 0
    assert kubeconfig_of(faulty.kubeconfig(node))["ca"] == faulty.cluster.ca_path.read_text()


def test_a_cluster_info_that_changes_between_the_two_reads(faulty: World, node: str) -> None:
    info = api(faulty).objects["configmaps", "kube-public", "cluster-info"]["data"]
    name = f"jws-kubeconfig-{faulty.token_of(node)[:6]}"
    first = {"kubeconfig": info["kubeconfig"], name: signed(faulty, node)}
    second = {"kubeconfig": info["kubeconfig"] + "\n", name: first[name]}
    for _ in range(100):
        for data in (first, second):
            body = json.dumps({"kind": "ConfigMap", "data": data})
            api(faulty).fail("GET", INFO, status(200, body))
    refused(faulty, node, found(faulty, node), 5, "was another when read again")


def test_a_server_whose_certificate_the_ca_did_not_sign(faulty: World, node: str) -> None:
    """cluster-info is signed by the token and all, but who answers has no certificate of its CA."""
    text = api(faulty).objects["configmaps", "kube-public", "cluster-info"]["data"]["kubeconfig"]
    own = text.split("certificate-authority-data: ")[1].split("\n")[0]
    other = text.replace(own, base64.b64encode(Authority().pem.encode()).decode())
    token_id, _, half = faulty.token_of(node).partition(".")
    change(faulty, other, **{f"jws-kubeconfig-{token_id}": jws(token_id, half, other)})
    refused(faulty, node, found(faulty, node), 3, "certificate is not trusted")


@pytest.mark.parametrize("way", ["ca-path", "discovery"])
def test_a_name_that_is_not_in_the_certificate(
    faulty: World, node: str, way: str, tmp_path: Path
) -> None:
    with Kubernetes(names=("api.example.com", "10.0.0.1")) as other:
        body = api(faulty).objects["secrets", "kube-system", faulty.secret_name(node)]
        other.put("secrets", "kube-system", faulty.secret_name(node), body)
        ca = tmp_path / "other.crt"
        ca.write_text(other.authority.pem)
        flags = ["--ca-path", str(ca)] if way == "ca-path" else []
        result = found(faulty, node, *flags, "--master", other.url)
        assert not any(asked.user.startswith("system:bootstrap") for asked in other.asked)
    refused(faulty, node, result, 3, "it is for api.example.com, 10.0.0.1")


RUBBISH = {
    "404": (status(404), 3, "pass --ca-path"),
    "403": (status(403), 3, "pass --ca-path"),
    "401": (status(401), 3, "pass --ca-path"),
    "500": (status(500), 5, "500"),
    "no data": (status(200, '{"kind": "ConfigMap"}'), 3, "holds no kubeconfig"),
    "no text": (status(200, '{"data": {"kubeconfig": 5}}'), 3, "holds no kubeconfig"),
    "a redirect": (status(302, Location="https://127.0.0.1:1/"), 5, "302"),
    "nothing": (hang_up, 5, "connection broke"),
}


@pytest.mark.parametrize(("answer", "code", "words"), RUBBISH.values(), ids=RUBBISH)
def test_a_cluster_info_that_is_none(
    faulty: World, node: str, answer: Callable[[Any], None], code: int, words: str
) -> None:
    api(faulty).fail("GET", INFO, answer, times=999)
    refused(faulty, node, found(faulty, node), code, words)


@pytest.mark.parametrize("text", ["", "5", "[]", "clusters: []", "clusters: [{cluster: {}}]", "a: [",
                                  "clusters: [{cluster: {certificate-authority-data: '%%'}}]",
                                  "clusters: [{cluster: {certificate-authority-data: eA==}}]",
                                  "[" * 5000, "x" * (1 << 19)],
                         ids=lambda text: text[:50] or "empty")
def test_a_kubeconfig_in_cluster_info_that_is_none(faulty: World, node: str, text: str) -> None:
    change(faulty, text)
    result = found(faulty, node, "--ca-cert-hash", pin(faulty))
    refused(faulty, node, result, 3, "cluster-info holds no")


def test_no_token_is_sent_before_the_cluster_is_known(faulty: World, node: str) -> None:
    api(faulty).asked.clear()
    change(faulty)
    assert found(faulty, node).code == 5
    users = {asked.user for asked in api(faulty).asked}
    assert users <= {"system:anonymous", "kubernetes-admin"}


@pytest.mark.parametrize(("token_id", "half", "content", "expected"), [
    ("joshua", "my voice is my passcode",
     "Hello from the other side. I must have called a thousand times.",
     "VShe2taLd-YTrmWuRkcL_8QTNDHYxQIEBsAYYiIj1_8"),
    ("joshua", "my voice is my passcode", "", "7Ui1ALizW4jXphVUB7xUqC9vLYLL9RZeOFfVLoB7Tgk"),
], ids=["text", "empty"])
def test_the_documented_signatures(token_id: str, half: str, content: str, expected: str) -> None:
    assert keto_tokens.signature(keto_tokens.Token(token_id, half), content).split("..")[1] == expected


@pytest.mark.parametrize("token_id", ["rec001", "rec002"])
def test_the_recorded_signatures(token_id: str) -> None:
    data = recorded(22)["response"]["body"]["data"]
    token = keto_tokens.Token(token_id, "0123456789abcdef")
    assert keto_tokens.signature(token, data["kubeconfig"]) == data[f"jws-kubeconfig-{token_id}"]
    keto_tokens.check_signature(data, token)
    assert keto_tokens.certificates(keto_tokens.cluster_info_ca(data["kubeconfig"]))


@pytest.mark.parametrize("kind", ["EC", "RSA"])
def test_a_pin_is_the_hash_of_the_public_key(kind: str) -> None:
    import datetime
    import hashlib

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    key: Any = ec.generate_private_key(ec.SECP384R1())
    if kind == "RSA":
        key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ca")])
    start = datetime.datetime(2026, 1, 1)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(2**150).not_valid_before(start).not_valid_after(start).sign(key, hashes.SHA256())
    )
    spki = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    assert keto_tokens.public_key_hash(pem) == f"sha256:{hashlib.sha256(spki).hexdigest()}"


def test_a_certificate_that_only_looks_pinned_has_no_hash() -> None:
    """OpenSSL reads indefinite lengths: a forged certificate could show another key to a lax reader."""
    import ssl

    der = ssl.PEM_cert_to_DER_cert(Authority().pem)
    spki = keto_tokens.der_path(der, 0, 0, 6)[2]
    oid = keto_tokens.der_path(der, 0, 0, 2)[1]
    fields = [item[2] for item in keto_tokens.der_items(keto_tokens.der_path(der, 0, 0)[1])]

    def sequence(content: bytes) -> bytes:
        octets = len(content).to_bytes(2, "big").lstrip(b"\0")
        start = b"" if len(content) < 0x80 else bytes([0x80 | len(octets)])
        return b"\x30" + start + octets + content

    def certificate(*body: bytes) -> str:
        return ssl.DER_cert_to_PEM_cert(sequence(sequence(b"".join(body))))

    assert keto_tokens.public_key_hash(certificate(*fields)).startswith("sha256:")
    lax = b"\xa0\x80\x02\x01\x02\x00\x00", fields[1], b"\x30\x80" + oid + spki + b"\x00\x00"
    for body in ([*lax, *fields[3:]], [fields[0], *lax[1:], *fields[3:]], [lax[0], *fields[1:]], fields[:6]):
        with pytest.raises(ValueError):
            keto_tokens.public_key_hash(certificate(*body))


# --- the tag through the instance metadata service ---------------------------------------------------


def with_tags(world: World) -> None:
    """Switch instance metadata tags on."""
    def tags(instance: str) -> dict[str, str]:
        filters = [{"Name": "resource-id", "Values": [instance]}]
        return {tag["Key"]: tag["Value"] for tag in world.aws.ec2.describe_tags(Filters=filters)["Tags"]}
    world.imds.tags = tags


@pytest.mark.parametrize("source", ["auto", "imds"])
def test_the_tag_is_read_without_any_right(faulty: World, node: str, source: str) -> None:
    with_tags(faulty)
    faulty.aws.fail("DescribeTags", refusal("UnauthorizedOperation", 403), times=999)
    faulty.aws.calls.clear()
    assert faulty.client(node, "--read-from", source).code == 0
    assert faulty.aws.count() == {"CreateTags": 1}


def test_where_metadata_tags_are_off_the_api_is_asked(faulty: World, node: str) -> None:
    faulty.aws.calls.clear()
    assert faulty.client(node).code == 0
    assert faulty.aws.count() == {"DescribeTags": 1, "CreateTags": 1}


def test_a_client_told_to_use_the_api_asks_no_metadata_for_tags(faulty: World, node: str) -> None:
    with_tags(faulty)
    assert faulty.client(node, "--read-from", "api").code == 0
    assert not any("/tags/" in asked for asked in faulty.imds.asked)


def test_when_neither_works_both_ways_are_named(faulty: World, node: str) -> None:
    faulty.aws.fail("DescribeTags", refusal("UnauthorizedOperation", 403), times=999)
    result = faulty.client(node, "--timeout", "300ms")
    assert result.code == 5
    last = result.err.splitlines()[-1]
    assert "InstanceMetadataTags=enabled" in last
    assert "the IAM policy must allow ec2:DescribeTags" in last


def test_metadata_that_is_off_is_no_absent_tag(faulty: World, node: str) -> None:
    result = faulty.client(node, "--timeout", "300ms", "--read-from", "imds")
    assert (result.code, "InstanceMetadataTags=enabled" in result.err) == (5, True)


@pytest.mark.parametrize("value", [None, ""], ids=["absent", "empty"])
def test_a_tag_that_is_not_there_yet(faulty: World, value: str | None) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    with_tags(faulty)
    if value is not None:
        faulty.aws.set_tag(node, value)
    result = faulty.client(node, "--timeout", "300ms")
    assert (result.code, "is not there yet" in result.err) == (5, True)
    assert faulty.aws.count() == {}


@pytest.mark.parametrize("name", ["kubelet/token", "a tag", "_index"])
def test_a_name_that_metadata_cannot_carry(faulty: World, name: str) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    with_tags(faulty)
    assert faulty.server("--tag-name", name).code == 0
    refused_result = faulty.client(node, "--tag-name", name, "--read-from", "imds")
    assert (refused_result.code, "no name for a tag" in refused_result.err) == (2, True)
    result = faulty.client(node, "--tag-name", name)
    assert (result.code, faulty.aws.tag(node, name)) == (0, "Success")
    assert "is read by the EC2 API" in result.err


def test_csrs_of_a_real_server_name_their_nodes() -> None:
    bodies = recorded(35)["response"]["body"]["items"]
    names = {csr.node_name for csr in map(keto_tokens.parse_csr, bodies) if csr}
    assert "ip-10-0-0-7.eu-west-2.compute.internal" in names
    assert CSRS.endswith("certificatesigningrequests")
