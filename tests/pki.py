"""Certificates for the stand-ins: a CA, what it signs, and the CSR that a kubelet would make."""
from __future__ import annotations

import base64
import datetime
import ipaddress
import ssl
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


def _name(common: str, organization: str = "") -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)] if organization else []
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


@dataclass
class Pair:
    """A certificate and its key, in PEM."""

    certificate: str
    key: str


class Authority:
    """A CA as a cluster has one: self-signed, and without the key identifiers of newer ones."""

    def __init__(self, name: str = "kubernetes") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        built = self._builder(self._name, self._key.public_key())
        signed = built.add_extension(constraints, critical=True).sign(self._key, hashes.SHA256())
        self.pem = signed.public_bytes(serialization.Encoding.PEM).decode()

    def _builder(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + 365 * DAY)
        )

    def pair(self, common: str, organization: str = "", names: tuple[str, ...] = ()) -> Pair:
        """A signed certificate with these host names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_name(common, organization), key.public_key())
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
            )
        signed = builder.sign(self._key, hashes.SHA256())
        return Pair(signed.public_bytes(serialization.Encoding.PEM).decode(), _pem(key))

    def sign_request(self, request: str) -> str:
        """The certificate for a CSR, both base64 of PEM as the Kubernetes API carries them."""
        csr = x509.load_pem_x509_csr(base64.b64decode(request))
        public_key = csr.public_key()
        assert isinstance(public_key, ec.EllipticCurvePublicKey)
        signed = self._builder(csr.subject, public_key).sign(self._key, hashes.SHA256())
        return base64.b64encode(signed.public_bytes(serialization.Encoding.PEM)).decode()


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def kubelet_request(node_name: str) -> str:
    """The CSR of a kubelet: base64 of PEM, O=system:nodes, CN=system:node:NAME."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder()
    named = builder.subject_name(_name(f"system:node:{node_name}", "system:nodes"))
    pem = named.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return base64.b64encode(pem).decode()


def trusting(pem: str) -> ssl.SSLContext:
    """TLS that trusts a CA.  ssl.create_default_context refuses CAs like ours from Python 3.13 on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=pem)
    return context
