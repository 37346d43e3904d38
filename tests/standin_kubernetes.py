"""A stand-in for the Kubernetes API server: what keto-tokens meets of one, over TLS.

It answers as kube-apiserver 1.36 did when tests/kubernetes-api was recorded; test_standins.py holds
it against every one of those exchanges.  kmock was looked at first: it serves objects, but has
neither TLS with bearer authentication, nor bootstrap tokens, nor authorization, nor the API server's
own refusals, and those are what the program has to get right.
"""
from __future__ import annotations

import base64
import binascii
import email.utils
import hashlib
import hmac
import json
import re
import secrets
import socket
import ssl
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pki import Authority

NAMESPACES = ("default", "kube-system", "kube-public")
SIGNER = "kubernetes.io/kube-apiserver-client-kubelet"
AUTH_CACHE = 10.0  # seconds for which a token that was good is taken without a look at its Secret
MASTERS = "system:masters"

# resource: (group, version, kind, namespaced)
RESOURCES = {
    "secrets": ("", "v1", "Secret", True),
    "configmaps": ("", "v1", "ConfigMap", True),
    "nodes": ("", "v1", "Node", False),
    "leases": ("coordination.k8s.io", "v1", "Lease", True),
    "certificatesigningrequests": (
        "certificates.k8s.io", "v1", "CertificateSigningRequest", False,
    ),
    "selfsubjectreviews": ("authentication.k8s.io", "v1", "SelfSubjectReview", False),
    "selfsubjectaccessreviews": ("authorization.k8s.io", "v1", "SelfSubjectAccessReview", False),
}
PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[a-z0-9.]+)/v1)"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<resource>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>approval|status))?"
)
MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


class Refusal(Exception):
    """An answer of kind Status that is a failure."""

    def __init__(self, code: int, reason: str, message: str, details: Any = None):
        self.code = code
        self.body = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason, **({"details": details} if details else {}),
            "code": code,
        }


@dataclass
class User:
    """Who asks."""

    name: str
    groups: tuple[str, ...]


@dataclass
class Target:
    """What is asked for."""

    group: str
    namespace: str
    resource: str
    name: str
    sub: str
    query: dict[str, str]

    @property
    def plural(self) -> str:
        return f"{self.resource}.{self.group}" if self.group else self.resource

    def details(self, kind: str = "") -> dict[str, str]:
        named = {"name": self.name} if self.name else {}
        grouped = {"group": self.group} if self.group else {}
        return {**named, **grouped, "kind": kind or self.resource}


@dataclass
class Fault:
    """What to answer instead: to requests that match, `times` times."""

    matches: Callable[[str, str], bool]
    answer: Callable[[BaseHTTPRequestHandler], None]
    times: int = 1
    after: bool = False  # do the work first, then lose the answer


@dataclass
class Asked:
    """A request that was made."""

    user: str
    verb: str
    group: str
    resource: str
    namespace: str
    name: str
    status: int = 0


@dataclass
class Kubernetes:
    """The API server, on a free port of the loopback; use it as a context manager.

    `clock` is added to this machine's time.  `admin` is the bearer token of a cluster admin;
    `account(rules)` makes one that may do just that.
    """

    clock: float = 0.0
    auth_cache: float = AUTH_CACHE
    cleaner: bool = True  # the token cleaner
    rounds: float = 0.0  # seconds between the rounds of the cleaners; with 0, each request sees them done
    reviews: bool = True  # False: an API server older than 1.28
    names: tuple[str, ...] = ("127.0.0.1", "localhost")
    admin: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    objects: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.authority = Authority()
        self.users = {self.admin: User("kubernetes-admin", (MASTERS, "system:authenticated"))}
        self.rules: dict[str, Sequence[tuple[str, ...]]] = {}
        self._version = 500
        self._cleaned = float("-inf")
        self._lists: dict[str, list[dict[str, Any]]] = {}  # those that are being read page by page
        self._cache: dict[str, tuple[float, User]] = {}
        self.connections = 0
        self.halves: set[str] = set()  # the secret halves of all tokens that there ever were

    def __enter__(self) -> Kubernetes:
        self._server = _Server(("127.0.0.1", 0), self)
        pair = self.authority.pair("kube-apiserver", names=self.names)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(pair.certificate + pair.key)
            file.flush()
            context.load_cert_chain(file.name)
        context.load_verify_locations(cadata=self.authority.pem)
        context.verify_mode = ssl.CERT_OPTIONAL
        self._server.tls = context
        self.port = self._server.server_address[1]
        self.url = f"https://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.put("configmaps", "kube-public", "cluster-info", {"data": {"kubeconfig": self._info()}})
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _info(self) -> str:
        ca = base64.b64encode(self.authority.pem.encode()).decode()
        return (
            'apiVersion: v1\nkind: Config\nclusters:\n- name: ""\n  cluster:\n'
            f"    certificate-authority-data: {ca}\n    server: {self.url}\n"
        )

    # --- what tests do -----------------------------------------------------------------------

    def account(self, rules: Sequence[tuple[str, ...]], name: str = "keto-tokens") -> str:
        """The token of a service account with rules (verb, group, resource, namespace or "", and
        perhaps the one name)."""
        token = secrets.token_urlsafe(24)
        user = f"system:serviceaccount:kube-system:{name}"
        self.users[token] = User(user, ("system:serviceaccounts", "system:authenticated"))
        self.rules[user] = rules
        return token

    def fail(self, method: str, path: str, answer: Callable[[BaseHTTPRequestHandler], None],
             times: int = 1, after: bool = False) -> None:
        """Answer so to requests of the method ("" for any) whose path holds `path`."""
        def matches(asked_method: str, asked_path: str) -> bool:
            return method in ("", asked_method) and path in asked_path
        self.faults.append(Fault(matches, answer, times, after))

    def now(self) -> float:
        return time.time() + self.clock

    def stamp(self) -> str:
        return datetime.fromtimestamp(self.now(), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

    def put(self, resource: str, namespace: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Store an object, as the API does."""
        with self.lock:
            self._version += 1
            group, version, kind, _ = RESOURCES[resource]
            old = self.objects.get((resource, namespace, name), {}).get("metadata", {})
            fixed = {
                "name": name,
                **({"namespace": namespace} if namespace else {}),
                "uid": old.get("uid") or str(uuid.uuid4()),
                "resourceVersion": str(self._version),
                "creationTimestamp": old.get("creationTimestamp") or self.stamp(),
            }
            given = {k: v for k, v in body.get("metadata", {}).items() if k not in fixed}
            rest = {k: v for k, v in body.items() if k not in ("kind", "apiVersion", "metadata")}
            stored = {
                "kind": kind,
                "apiVersion": f"{group}/{version}" if group else version,
                "metadata": {**fixed, **given},
                **rest,
            }
            self.objects[resource, namespace, name] = stored
            half = stored.get("data", {}).get("token-secret") if resource == "secrets" else None
            self.halves |= {base64.b64decode(half).decode(), half} if half else set()
            return stored

    # --- authentication and authorization ------------------------------------------------------

    def user_of(self, authorization: str, certificate: Any) -> User:
        if certificate:
            subject = {key: value for part in certificate["subject"] for key, value in part}
            groups = (subject.get("organizationName", ""), "system:authenticated")
            return User(subject["commonName"], groups)
        if not authorization:
            return User("system:anonymous", ("system:unauthenticated",))
        token = authorization.removeprefix("Bearer ")
        found = self.users.get(token) or self._bootstrap_user(token)
        if found is None:
            raise Refusal(401, "Unauthorized", "Unauthorized")
        return found

    def _bootstrap_user(self, token: str) -> User | None:
        kept = self._cache.get(token)
        if kept and self.now() < kept[0]:
            return kept[1]
        match = re.fullmatch(r"([a-z0-9]{6})\.([a-z0-9]{16})", token)
        body = self.objects.get(("secrets", "kube-system", f"bootstrap-token-{match[1]}")) if match else None
        if not match or not body or body.get("type") != "bootstrap.kubernetes.io/token":
            return None
        data = {k: base64.b64decode(v).decode() for k, v in body.get("data", {}).items()}
        good = (
            data.get("token-id") == match[1]
            and hmac.compare_digest(data.get("token-secret", ""), match[2])
            and data.get("usage-bootstrap-authentication") == "true"
            and not self._expired(data)
        )
        extra = [group for group in data.get("auth-extra-groups", "").split(",") if group]
        pattern = r"system:bootstrappers:[a-z0-9:-]{0,255}[a-z0-9]"
        if not good or not all(re.fullmatch(pattern, group) for group in extra):
            return None
        groups = ("system:bootstrappers", *extra, "system:authenticated")
        user = User(f"system:bootstrap:{match[1]}", groups)
        self._cache[token] = self.now() + self.auth_cache, user
        return user

    def _expired(self, data: dict[str, str]) -> bool:
        if "expiration" not in data:
            return False
        try:
            moment = datetime.fromisoformat(data["expiration"].replace("Z", "+00:00"))
        except ValueError:
            return True
        return self.now() >= moment.timestamp()

    def clean(self) -> None:
        """What the cleaners of tokens and CSRs do, and the signer of cluster-info."""
        with self.lock:
            self._cleaned = self.now()
            self._clean_requests()
            info = self.objects["configmaps", "kube-public", "cluster-info"]
            signatures = {}
            for key, body in list(self.objects.items()):
                if key[0] != "secrets" or body.get("type") != "bootstrap.kubernetes.io/token":
                    continue
                data = {k: base64.b64decode(v).decode() for k, v in body.get("data", {}).items()}
                if self._expired(data):
                    if self.cleaner:
                        del self.objects[key]
                elif data.get("usage-bootstrap-signing") == "true" and key[1] == "kube-system":
                    name = f"jws-kubeconfig-{data['token-id']}"
                    signatures[name] = jws(data["token-id"], data["token-secret"], info["data"]["kubeconfig"])
            info["data"] = {"kubeconfig": info["data"]["kubeconfig"], **signatures}

    def _clean_requests(self) -> None:
        """A CSR is deleted an hour after it was decided."""
        for key, body in list(self.objects.items()):
            conditions = body.get("status", {}).get("conditions", [])
            if key[0] == "certificatesigningrequests" and conditions:
                decided = datetime.fromisoformat(conditions[0]["lastUpdateTime"].replace("Z", "+00:00"))
                if self.now() > decided.timestamp() + 3600:
                    del self.objects[key]

    def may(self, user: User, verb: str, target: Target) -> bool:
        if MASTERS in user.groups or target.resource == "selfsubjectreviews":
            return True
        if target.resource == "selfsubjectaccessreviews":
            return "system:authenticated" in user.groups
        if (verb, target.resource, target.name) == ("get", "configmaps", "cluster-info"):
            if user.name == "system:anonymous":
                return True
        if target.resource == "certificatesigningrequests" and user.name.startswith("system:bootstrap:"):
            return verb in ("create", "get", "list", "watch")
        ask = (verb, target.group, target.resource, target.namespace)
        rules = self.rules.get(user.name, ())
        return ask in rules or (*ask, target.name) in rules

    # --- requests --------------------------------------------------------------------------------

    def answer(self, user: User, method: str, path: str, body: Any) -> tuple[int, Any]:
        """The status and body for a request that is authenticated."""
        url = urllib.parse.urlsplit(path)
        if url.path == "/version":
            return 200, {"major": "1", "minor": "36", "gitVersion": "v1.36.2", "platform": "linux/amd64"}
        match = PATH.fullmatch(url.path)
        if not match or match["resource"] not in RESOURCES:
            raise Refusal(404, "NotFound", "the server could not find the requested resource", {})
        parts = {key: urllib.parse.unquote(value or "") for key, value in match.groupdict().items()}
        query = dict(urllib.parse.parse_qsl(url.query))
        target = Target(**parts, query=query)
        verb = self._verb(method, target)
        asked = Asked(user.name, verb, target.group, target.resource, target.namespace, target.name)
        self.asked.append(asked)
        if not self.may(user, verb, target):
            asked.status = 403
            raise self._forbidden(user, verb, target)
        try:
            with self.lock:
                if self.now() - self._cleaned >= self.rounds:
                    self.clean()
                status, answer = self._do(user, verb, target, body)
        except Refusal as refusal:
            asked.status = refusal.code
            raise
        asked.status = status
        return status, answer

    def _verb(self, method: str, target: Target) -> str:
        if method == "GET":
            return "get" if target.name else "list"
        return {"POST": "create", "PUT": "update", "DELETE": "delete"}[method]

    def _forbidden(self, user: User, verb: str, target: Target) -> Refusal:
        named = f'{target.plural} "{target.name}"' if target.name else target.plural
        scope = f'in the namespace "{target.namespace}"' if target.namespace else "at the cluster scope"
        message = (
            f'{named} is forbidden: User "{user.name}" cannot {verb} resource "{target.resource}" '
            f'in API group "{target.group}" {scope}'
        )
        return Refusal(403, "Forbidden", message, target.details())

    def _do(self, user: User, verb: str, target: Target, body: Any) -> tuple[int, Any]:
        if target.resource == "selfsubjectreviews":
            if not self.reviews:
                raise Refusal(404, "NotFound", "the server could not find the requested resource", {})
            return 201, {
                "kind": "SelfSubjectReview", "apiVersion": "authentication.k8s.io/v1",
                "metadata": {"creationTimestamp": self.stamp()},
                "status": {"userInfo": {"username": user.name, "groups": list(user.groups)}},
            }
        if target.resource == "selfsubjectaccessreviews":
            wish = body["spec"]["resourceAttributes"]
            about = Target(wish.get("group", ""), wish.get("namespace", ""), wish["resource"],
                           wish.get("name", ""), "", {})
            return 201, {
                "kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1",
                "metadata": {}, "spec": body["spec"],
                "status": {"allowed": self.may(user, wish["verb"], about)},
            }
        return getattr(self, f"_{verb}")(user, target, body)  # type: ignore[no-any-return]

    def _found(self, target: Target) -> dict[str, Any]:
        found = self.objects.get((target.resource, target.namespace, target.name))
        if found is None:
            message = f'{target.plural} "{target.name}" not found'
            raise Refusal(404, "NotFound", message, target.details())
        return found

    def _get(self, user: User, target: Target, body: Any) -> tuple[int, Any]:
        return 200, self._found(target)

    def _list(self, user: User, target: Target, body: Any) -> tuple[int, Any]:
        group, version, kind, _ = RESOURCES[target.resource]
        start = self._continued(target.query.get("continue", ""))
        which = json.dumps([target.resource, target.namespace, target.query.get("labelSelector"),
                            target.query.get("fieldSelector")])
        if not start or which not in self._lists:  # later pages are of the moment of the first
            self._lists[which] = self._items(target)
        rest = [item for item in self._lists[which] if item["metadata"]["name"] > start]
        limit = int(target.query.get("limit", "0")) or len(rest)
        metadata = {"resourceVersion": str(self._version)}
        if len(rest) > limit:
            text = json.dumps({"start": rest[limit - 1]["metadata"]["name"]})
            metadata["continue"] = base64.b64encode(text.encode()).decode()
        return 200, {
            "kind": f"{kind}List", "apiVersion": f"{group}/{version}" if group else version,
            "metadata": metadata, "items": rest[:limit],
        }

    def _items(self, target: Target) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in found.items() if k not in ("kind", "apiVersion")}
            for (resource, namespace, _), found in sorted(self.objects.items())
            if resource == target.resource and target.namespace in ("", namespace)
            and _selected(found, target.query)
        ]

    def _continued(self, token: str) -> str:
        try:
            return str(json.loads(base64.b64decode(token))["start"]) if token else ""
        except (ValueError, KeyError):
            message = (
                "invalid continue token: continue key is not valid: "
                "invalid character '\\x81' looking for beginning of value"
            )
            raise Refusal(400, "BadRequest", message) from None

    def _create(self, user: User, target: Target, body: Any) -> tuple[int, Any]:
        _, _, kind, namespaced = RESOURCES[target.resource]
        _check_body(kind, body)
        name = body["metadata"]["name"]
        if namespaced and target.namespace not in NAMESPACES:
            message = f'namespaces "{target.namespace}" not found'
            raise Refusal(404, "NotFound", message, {"name": target.namespace, "kind": "namespaces"})
        _check_name(kind, name)
        target.name = name
        if (target.resource, target.namespace, name) in self.objects:
            message = f'{target.plural} "{name}" already exists'
            raise Refusal(409, "AlreadyExists", message, target.details())
        if target.resource == "certificatesigningrequests":
            spec = {**body["spec"], "username": user.name, "groups": list(user.groups)}
            body = {**body, "spec": spec, "status": {}}
        if target.resource == "nodes":
            body = {"status": {}, **body}
        return 201, self.put(target.resource, target.namespace, name, _with_string_data(body))

    def _update(self, user: User, target: Target, body: Any) -> tuple[int, Any]:
        found = self._found(target)
        _, _, kind, _ = RESOURCES[target.resource]
        _check_body(kind, body)
        version = body["metadata"].get("resourceVersion")
        if version and version != found["metadata"]["resourceVersion"]:
            message = (
                f'Operation cannot be fulfilled on {target.plural} "{target.name}": the object has '
                "been modified; please apply your changes to the latest version and try again"
            )
            raise Refusal(409, "Conflict", message, target.details())
        if target.sub == "approval":
            body = self._decided(found, body)
        return 200, self.put(target.resource, target.namespace, target.name, _with_string_data(body))

    def _decided(self, found: dict[str, Any], body: Any) -> dict[str, Any]:
        """The CSR after its approval, and what the signer makes of it."""
        conditions = [{**c, "lastUpdateTime": self.stamp()} for c in body["status"]["conditions"]]
        status: dict[str, Any] = {"conditions": conditions}
        if any(condition["type"] == "Approved" for condition in conditions):
            status["certificate"] = self.authority.sign_request(found["spec"]["request"])
        return {**found, "status": status}

    def _delete(self, user: User, target: Target, body: Any) -> tuple[int, Any]:
        found = self._found(target)
        conditions = (body or {}).get("preconditions", {})
        kind = RESOURCES[target.resource][2]
        for field_name, label in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
            stored = found["metadata"][field_name]
            if conditions.get(field_name, stored) != stored:
                hint = ". The object might have been deleted and then recreated"
                message = (
                    f'Operation cannot be fulfilled on {kind} "{target.name}": the {label} in the '
                    f"precondition ({conditions[field_name]}) does not match the {label} in record "
                    f"({stored}){hint if label == 'UID' else ''}"
                )
                raise Refusal(409, "Conflict", message, {"name": target.name, "kind": kind})
        del self.objects[target.resource, target.namespace, target.name]
        return 200, {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
            "details": {**target.details(), "uid": found["metadata"]["uid"]},
        }


def jws(token_id: str, secret: str, content: str) -> str:
    """The signature of cluster-info by a token, as the bootstrapsigner makes it."""
    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")
    header = encode(f'{{"alg":"HS256","kid":"{token_id}"}}'.encode())
    text = f"{header}.{encode(content.encode())}".encode()
    return f"{header}..{encode(hmac.new(secret.encode(), text, hashlib.sha256).digest())}"


def _selected(found: dict[str, Any], query: dict[str, str]) -> bool:
    labels = found["metadata"].get("labels", {})
    for term in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = term.partition("=")
        if labels.get(key) != value:
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = term.partition("=")
        where: Any = found
        for part in key.split("."):
            where = where.get(part, {})
        if where != value:
            return False
    return True


def _with_string_data(body: dict[str, Any]) -> dict[str, Any]:
    text = body.pop("stringData", None) if "stringData" in body else None
    if text is not None:
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in text.items()}
        body = {**body, "data": {**body.get("data", {}), **encoded}}
    return body


def _check_name(kind: str, name: str) -> None:
    if re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", name):
        return
    problem = (
        f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case '
        "alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character "
        "(e.g. 'example.com', regex used for validation is "
        "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
    )
    cause = {"reason": "FieldValueInvalid", "message": problem, "field": "metadata.name"}
    details = {"name": name, "kind": kind, "causes": [cause]}
    message = f'{kind} "{name}" is invalid: metadata.name: {problem}'
    raise Refusal(422, "Invalid", message, details)


def _check_body(kind: str, body: Any) -> None:
    """What the decoder refuses before anything is looked up."""
    start = f'{kind} in version "v1" cannot be handled as a {kind}: '
    for value in (body.get("data") or {}).values():
        try:
            base64.b64decode(value, validate=True)
        except binascii.Error:
            message = f"{start}illegal base64 data at input byte 0"
            raise Refusal(400, "BadRequest", message) from None
    if kind == "Lease":
        for key in ("acquireTime", "renewTime"):
            text = body["spec"].get(key)
            if text and not MICRO_TIME.fullmatch(text):
                message = (
                    f'{start}parsing time "{text}" as "2006-01-02T15:04:05.000000Z07:00": cannot '
                    f'parse "{text}" as "2006"'
                )
                raise Refusal(400, "BadRequest", message)


class _Server(ThreadingHTTPServer):
    """Shakes hands in the connection's own thread, so that a client that stalls holds up nobody."""

    daemon_threads = True
    request_queue_size = 128
    tls: ssl.SSLContext

    def __init__(self, address: tuple[str, int], api: Kubernetes):
        self.api = api
        super().__init__(address, _Handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.api.connections += 1
        try:
            request.settimeout(60)
            wrapped = self.tls.wrap_socket(request, server_side=True)
        except (OSError, ssl.SSLError):
            return
        with wrapped:
            _Handler(wrapped, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read the program's output, not ours."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        return email.utils.formatdate(self.server.api.now(), usegmt=True)

    def _handle(self) -> None:
        api = self.server.api
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        fault = self._fault()
        if fault and not fault.after:
            fault.answer(self)
            return
        try:
            connection = self.connection
            assert isinstance(connection, ssl.SSLSocket)
            user = api.user_of(self.headers.get("Authorization", ""), connection.getpeercert())
            body = json.loads(content) if content else None
            status, answer = api.answer(user, self.command, self.path, body)
        except Refusal as refusal:
            status, answer = refusal.code, refusal.body
        if fault:
            fault.answer(self)
            return
        self.reply(status, json.dumps(answer).encode())

    def _fault(self) -> Fault | None:
        with self.server.api.lock:
            for fault in self.server.api.faults:
                if fault.times > 0 and fault.matches(self.command, self.path):
                    fault.times -= 1
                    return fault
        return None

    def reply(self, status: int, content: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _handle


# --- ways in which a server can fail, for any of the stand-ins -----------------------------------


def status(
    code: int, text: str = "", kind: str = "application/json", **headers: str
) -> Callable[[Any], None]:
    """An answer with this status, and a body of kind Status unless another text is given."""
    body = text or json.dumps({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
        "message": f"injected {code}", "reason": "Injected",
    })

    def answer(handler: Any) -> None:
        handler.reply(code, body.encode(), kind, **headers)
    return answer


def html(code: int = 200) -> Callable[[Any], None]:
    """What a proxy in between likes to answer."""
    return status(code, "<html><body><h1>It works!</h1></body></html>", "text/html")


def truncated(handler: Any) -> None:
    """Half of an answer, then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"kind": "SecretList", "items": [{"metadata": {"na')
    handler.close_connection = True


def cut_json(handler: Any) -> None:
    """A whole answer whose JSON is not."""
    handler.reply(200, b'{"kind": "SecretList", "items": [{"metadata": {"na')


def hang_up(handler: Any) -> None:
    """The connection ends without an answer."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)
