"""The cluster of the end-to-end tests: the stand-in, or a real one that KETO_TEST_KUBECONFIG names.

Both are driven over HTTP alone, so that one suite runs on both.
"""
from __future__ import annotations

import base64
import contextlib
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import urllib3
import yaml

import keto_tokens
from pki import kubelet_request, trusting
from standin_kubernetes import SIGNER, Kubernetes

SECRETS = "/api/v1/namespaces/kube-system/secrets"
CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"


class TestCluster:
    """What a test may ask of a cluster."""

    __test__ = False
    url: str
    ca_path: Path
    admin: keto_tokens.Cluster

    def __enter__(self) -> TestCluster:
        raise TypeError("one of its subclasses")

    def __exit__(self, *_: object) -> None:
        raise TypeError("one of its subclasses")

    def server_flags(self) -> list[str]:
        """How the server reaches it."""
        raise TypeError("one of its subclasses")

    def secrets(self) -> set[str]:
        """Secrets of it that no output may hold."""
        return set()

    def request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Ask it something as its admin."""
        return self.admin.request(method, path, body)

    def token_secrets(self) -> list[dict[str, Any]]:
        """All Secrets that are of keto-tokens."""
        query = {"labelSelector": "app.kubernetes.io/managed-by=keto-tokens"}
        return list(self.admin.list(SECRETS, query))

    def whoami(self, token: str) -> str | None:
        """Whom the API server takes the bearer of a token for, None when for nobody."""
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        reply = self._as(token, "POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review)
        if reply.status == 401:
            return None
        return str(json.loads(reply.data)["status"]["userInfo"]["username"])

    def _as(self, token: str, method: str, path: str, body: Any) -> urllib3.BaseHTTPResponse:
        pool = urllib3.PoolManager(ssl_context=trusting(self.ca_path.read_text()))
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        with pool:
            return pool.request(method, self.url + path, body=json.dumps(body), headers=headers)

    def request_certificate(self, token: str, node: str) -> str:
        """What a kubelet does with its bootstrap token; the name of the CSR."""
        name = f"node-csr-{uuid.uuid4().hex[:12]}"
        body = {
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"name": name},
            "spec": {
                "request": kubelet_request(node),
                "signerName": SIGNER,
                "usages": ["digital signature", "client auth"],
            },
        }
        reply = self._as(token, "POST", CSRS, body)
        assert reply.status == 201, reply.data
        return name

    def decide(self, csr: str, kind: str = "Approved") -> None:
        """Approve or deny a CSR, and wait for the certificate of an approved one."""
        body = self.request("GET", f"{CSRS}/{csr}")
        condition = {"type": kind, "status": "True", "reason": "Test", "message": "by a test"}
        if not body.get("status", {}).get("conditions"):
            body["status"] = {"conditions": [condition]}
            with contextlib.suppress(keto_tokens.Superseded):  # a real cluster may approve by itself
                self.request("PUT", f"{CSRS}/{csr}/approval", body)
        if kind == "Approved":
            wait_for(lambda: self.request("GET", f"{CSRS}/{csr}")["status"].get("certificate"))

    def add_node(self, name: str) -> None:
        """What the kubelet does with its certificate: it makes its Node, or reports for the old one."""
        try:
            self.request("POST", "/api/v1/nodes", {
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            })
        except keto_tokens.Superseded:
            body = self.request("GET", f"/api/v1/nodes/{name}")
            now = keto_tokens.format_time(self.admin.now())
            body["status"]["conditions"] = [{
                "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "ready",
                "lastHeartbeatTime": now, "lastTransitionTime": now,
            }]
            self.request("PUT", f"/api/v1/nodes/{name}/status", body)

    def join(self, token: str, node: str) -> None:
        """All of a kubelet's TLS bootstrap."""
        self.decide(self.request_certificate(token, node))
        self.add_node(node)


class StandinCluster(TestCluster):
    """The stand-in."""

    __test__ = False

    def __init__(self, folder: Path):
        self.api = Kubernetes()
        self._folder = folder

    def __enter__(self) -> StandinCluster:
        self.api.__enter__()
        self.url = self.api.url
        self.ca_path = self._folder / "ca.crt"
        self.ca_path.write_text(self.api.authority.pem)
        self.token_path = self._folder / "admin-token"
        self.token_path.write_text(self.api.admin)
        access = keto_tokens.Access(
            self.url, "the test's admin", self.api.authority.pem,
            credential=keto_tokens.static_token(self.api.admin),
        )
        self.admin = keto_tokens.Cluster(access, keto_tokens.Calls())
        return self

    def __exit__(self, *_: object) -> None:
        self.api.__exit__()

    def secrets(self) -> set[str]:
        return self.api.halves | {token for token in self.api.users if len(token) > 20}

    def server_flags(self) -> list[str]:
        return ["--master", self.url, "--ca-path", str(self.ca_path), "--kube-token-file",
                str(self.token_path)]


class RealCluster(TestCluster):
    """The cluster of an admin kubeconfig; what a test leaves in it is removed at its end."""

    __test__ = False

    def __init__(self, kubeconfig: str, folder: Path):
        self._kubeconfig, self._folder = kubeconfig, folder

    def __enter__(self) -> RealCluster:
        access = keto_tokens.Kubeconfig(self._kubeconfig).access()
        self.url = access.server
        self.ca_path = self._folder / "ca.crt"
        self.ca_path.write_text(access.ca)
        self.admin = keto_tokens.Cluster(access, keto_tokens.Calls())
        self._before = self._names()
        return self

    def _names(self) -> set[str]:
        paths = [SECRETS, CSRS, "/api/v1/nodes"]
        return {
            f"{path}/{body['metadata']['name']}" for path in paths for body in self.admin.list(path, {})
        }

    def __exit__(self, *_: object) -> None:
        for path in self._names() - self._before:
            try:
                self.request("DELETE", path)
            except keto_tokens.CallFailed as error:
                if error.status != 404:
                    raise

    def server_flags(self) -> list[str]:
        return ["--kubeconfig", self._kubeconfig]


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true value of the condition, polled; fails after so many seconds without one."""
    deadline = time.monotonic() + seconds
    pause = 0.01
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(pause)
        pause = min(0.25, pause * 1.5)


def kubeconfig_of(path: Path) -> dict[str, Any]:
    """A bootstrap kubeconfig in parts: server, ca, token."""
    content = yaml.safe_load(path.read_text())
    cluster = content["clusters"][0]["cluster"]
    ca = base64.b64decode(cluster.get("certificate-authority-data", "")).decode()
    return {"server": cluster["server"], "ca": ca, "token": content["users"][0]["user"]["token"]}
