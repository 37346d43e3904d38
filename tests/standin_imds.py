"""A stand-in for the EC2 instance metadata service, version 2.

Each instance has a base URL of its own (`url(id)`), so that one process can be asked as many.
moto's metadata service knows one fixed instance, asks for no session token and has no identity
document: that is why this one is here.
"""
from __future__ import annotations

import json
import re
import secrets
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Imds:
    """The service on a free port of the loopback; use it as a context manager."""

    def __init__(self, region: str = "eu-west-2", account: str = "123456789012") -> None:
        self.region, self.account = region, account
        self.sessions: set[str] = set()
        self.asked: list[str] = []
        self.faults: list[int] = []  # statuses to answer with first
        self.tags: Callable[[str], dict[str, str]] | None = None  # where tags are enabled, by id

    def __enter__(self) -> Imds:
        self._server = _Server(("127.0.0.1", 0), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, instance_id: str) -> str:
        """The endpoint as this instance sees it."""
        return f"http://127.0.0.1:{self.port}/as/{instance_id}"

    def text(self, instance_id: str, path: str) -> str | None:
        """What is at a path for an instance."""
        if path.rstrip("/").startswith("meta-data/tags/instance"):
            return self._tag(instance_id, path.rstrip("/"))
        document = {"instanceId": instance_id, "region": self.region, "accountId": self.account}
        return {
            "meta-data/instance-id": instance_id,
            "meta-data/placement/region": self.region,
            "dynamic/instance-identity/document": json.dumps(document),
        }.get(path)

    def _tag(self, instance_id: str, path: str) -> str | None:
        """The names of the tags, or the value of one; nothing where tags are not enabled."""
        found = self.tags(instance_id) if self.tags else {}
        name = urllib.parse.unquote(path.removeprefix("meta-data/tags/instance").lstrip("/"))
        return found.get(name) if name else "\n".join(sorted(found)) or None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], imds: Imds):
        self.imds = imds
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read the program's output, not ours."""

    def _reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def _fault(self) -> bool:
        self.server.imds.asked.append(f"{self.command} {self.path}")
        if not self.server.imds.faults:
            return False
        self._reply(self.server.imds.faults.pop(0), "fault")
        return True

    def do_PUT(self) -> None:
        if self._fault():
            return
        ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if not self.path.endswith("/latest/api/token") or not ttl.isdigit():
            return self._reply(400, "Bad Request")
        if self.headers.get("X-Forwarded-For"):
            return self._reply(403, "Forbidden")
        session = secrets.token_urlsafe(32)
        self.server.imds.sessions.add(session)
        self._reply(200, session)

    def do_GET(self) -> None:
        if self._fault():
            return
        match = re.fullmatch(r"/as/([^/]+)/latest/(.*)", self.path)
        if self.headers.get("X-aws-ec2-metadata-token", "") not in self.server.imds.sessions:
            return self._reply(401, "Unauthorized")
        text = self.server.imds.text(match[1], match[2]) if match else None
        self._reply(404, "Not Found") if text is None else self._reply(200, text)
