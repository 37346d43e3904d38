"""A stand-in for Google Compute Engine: the Compute API, Google's token service, the metadata server.

Each request and each answer is held against Google's own discovery documents (gce_contract.py); what
does not fit is remembered in `violations` and answered with 500.  Each instance sees its metadata
server at an address of its own (`metadata_host(id)`), so that one process can be many instances.
"""
from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import re
import secrets
import selectors
import threading
import time
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import gce_contract
from gce_contract import Violation

PROJECT, NUMBER = "keto-test", "123456789012"
ZONES = ("europe-west1-b", "europe-west1-c", "europe-west1-d")
SERVER_TOKEN = "ya29.token-of-the-server"  # what environment() gives
SERVER_ACCOUNT = f"keto-tokens@{PROJECT}.iam.gserviceaccount.com"
NODE_ACCOUNT = f"node@{PROJECT}.iam.gserviceaccount.com"  # no permission at all
ROLE = frozenset({  # what the server's account may do, by default
    "compute.instances.list", "compute.instances.get", "compute.instances.setMetadata",
    "compute.instances.getGuestAttributes", "compute.zoneOperations.get",
})
ACT_AS = "iam.serviceAccounts.actAs"  # on the account that an instance runs as
PERMISSIONS = {  # what a method asks for
    "compute.instances.aggregatedList": "compute.instances.list",
    "compute.zoneOperations.wait": "compute.zoneOperations.get",
    "compute.instances.testIamPermissions": "",
}
OPERATION_ERRORS = {  # HTTP statuses of how an operation ends, where not 400
    "CONDITION_NOT_MET": (412, "PRECONDITION FAILED"), "RESOURCE_NOT_FOUND": (404, "NOT FOUND"),
}
STALE = "Supplied fingerprint does not match current metadata fingerprint."
LINK = "https://www.googleapis.com/compute/v1"
VALUE_LIMIT, METADATA_LIMIT = 256 << 10, 512 << 10  # bytes of one value, and of all keys and values
STS, IMPERSONATE = "sts.token", "iamcredentials.projects.serviceAccounts.generateAccessToken"
ACCESS_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:access_token"
SUBJECT_TOKEN_TYPES = {f"urn:ietf:params:oauth:token-type:{kind}" for kind in ("jwt", "id_token", "saml2")}
SUBJECT_FIELDS = ("grantType", "requestedTokenType", "subjectToken", "subjectTokenType", "audience", "scope")
WRONG_AUDIENCE = (
    'The target service indicated by the "audience" parameters is invalid. This might either be because '
    "the pool or provider is disabled or deleted or because it doesn't exist."
)

Answer: TypeAlias = Callable[[Any], None]  # writes an answer through a handler


@dataclass
class Instance:
    """A virtual machine."""

    id: str
    name: str
    zone: str
    labels: dict[str, str]
    status: str
    items: list[dict[str, str]]
    account: str | None
    created: str
    attributes: dict[tuple[str, str], str] = field(default_factory=dict)  # guest attributes
    revision: int = 0  # of the metadata

    @property
    def fingerprint(self) -> str:
        """Another one after each change, also after one and its reverse."""
        return _hash([self.revision, self.items])

    @property
    def metadata(self) -> dict[str, str]:
        return {item["key"]: item["value"] for item in self.items}

    @property
    def guest_attributes(self) -> bool:
        return self.metadata.get("enable-guest-attributes", "").upper() == "TRUE"

    def path(self, project: str = PROJECT) -> str:
        return f"projects/{project}/zones/{self.zone}/instances/{self.name}"

    def change(self, items: list[dict[str, str]]) -> None:
        self.items, self.revision = items, self.revision + 1

    def resource(self) -> dict[str, Any]:
        """The instance as the API shows it; what is empty is not there at all."""
        zone = f"{LINK}/projects/{PROJECT}/zones/{self.zone}"
        metadata = {"kind": "compute#metadata", "fingerprint": self.fingerprint}
        made: dict[str, Any] = {
            "kind": "compute#instance", "id": self.id, "name": self.name, "status": self.status,
            "creationTimestamp": self.created, "zone": zone, "selfLink": f"{LINK}/{self.path()}",
            "machineType": f"{zone}/machineTypes/e2-small", "cpuPlatform": "Intel Broadwell",
            "canIpForward": False, "deletionProtection": False, "fingerprint": self.fingerprint,
            "tags": {"fingerprint": "42WmSpB8rSM="}, "labelFingerprint": _hash(self.labels),
            "metadata": {**metadata, "items": self.items} if self.items else metadata,
            "networkInterfaces": [{
                "kind": "compute#networkInterface", "name": "nic0", "networkIP": "10.132.0.2",
                "network": f"{LINK}/projects/{PROJECT}/global/networks/default",
            }],
            "scheduling": {"onHostMaintenance": "MIGRATE", "automaticRestart": True, "preemptible": False},
        }
        if self.labels:
            made["labels"] = self.labels
        if self.account:
            made["serviceAccounts"] = [{"email": self.account, "scopes": [_scope("cloud-platform")]}]
        return made


@dataclass
class Operation:
    """A change that was accepted; it takes effect when the operation is done."""

    id: str
    name: str
    instance: Instance
    user: str
    items: list[dict[str, str]]
    pending: int  # waits that find it still running
    error: tuple[str, str] | None  # code and message of how it ends
    started: str
    fingerprint: str  # of the metadata that it is to replace
    ended: str = ""

    def resource(self) -> dict[str, Any]:
        """The operation as the API shows it."""
        zone = f"{LINK}/projects/{PROJECT}/zones/{self.instance.zone}"
        made: dict[str, Any] = {
            "kind": "compute#operation", "id": self.id, "name": self.name, "zone": zone,
            "operationType": "setMetadata", "targetId": self.instance.id,
            "targetLink": f"{LINK}/{self.instance.path()}", "user": self.user,
            "status": "DONE" if self.ended else "RUNNING", "progress": 100 if self.ended else 0,
            "insertTime": self.started, "startTime": self.started,
            "selfLink": f"{zone}/operations/{self.name}",
        }
        if self.ended:
            made["endTime"] = self.ended
        if self.ended and self.error:
            code, message = self.error
            made["error"] = {"errors": [{"code": code, "message": message}]}
            status, text = OPERATION_ERRORS.get(code, (400, "BAD REQUEST"))
            made |= {"httpErrorStatusCode": status, "httpErrorMessage": text}
        return made


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, reason: str, message: str, **more: str) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(status, reason, message, **more)


class Denied(Refusal):
    """The same in the newer form of Google's APIs: a status, no list of errors."""

    def __init__(self, status: int, status_text: str, message: str) -> None:
        super().__init__(status, "", message)
        self.body = {"error": {"code": status, "message": message, "status": status_text}}


class Gone(Exception):
    """The instance that asks is no longer there: nobody answers."""


class Gce:
    """A project of Google's on free ports of the loopback; use it as a context manager."""

    def __init__(self) -> None:
        self.project, self.number = PROJECT, NUMBER
        self._ids = itertools.count(4000000000000000001)  # 19 digits, none of them used twice
        self._changed = threading.Condition()  # guards all state; told about each change of metadata
        self._doors: dict[str, _Server] = {}  # metadata servers by instance id
        self._closing = False
        self._clear()

    def _clear(self) -> None:
        self.instances: dict[str, Instance] = {}
        self._names: dict[tuple[str, str], Instance] = {}  # by zone and name
        self.operations: dict[str, Operation] = {}  # by name, and by id
        self._running: dict[str, Operation] = {}  # by instance id
        self.requests: dict[str, Operation] = {}  # by requestId
        self.calls: list[tuple[str, dict[str, str]]] = []
        self.asked: list[tuple[str, str]] = []  # instance id, and "GET /computeMetadata/..."
        self.violations: list[str] = []
        self.faults: list[list[Any]] = []  # [method id, answer, times, after]
        self.metadata_faults: list[int] = []  # statuses to answer with first
        self.unreachables: list[str] = []  # scopes that a listing says it could not reach
        self.warning: dict[str, Any] | None = None  # of a listing
        self.scope_warnings: dict[str, dict[str, Any]] = {}  # by scope, such as zones/europe-west1-b
        self.page_sizes: list[int] = []  # of the next pages, where shorter than asked for
        self.next_operations: list[tuple[int, tuple[str, str] | None]] = []  # see operation()
        self.token_seconds = 3599
        self.accounts: dict[str, set[str]] = {SERVER_ACCOUNT: set(ROLE), NODE_ACCOUNT: set()}
        self.tokens: dict[str, str] = {SERVER_TOKEN: SERVER_ACCOUNT}  # account by access token
        self.subject_tokens: dict[str, str] = {}  # account by an outside identity's token
        self.impersonators: dict[str, set[str]] = {}  # whom an account may make tokens for

    def __enter__(self) -> Gce:
        self._selector = selectors.DefaultSelector()
        self._api = self._listen(_ApiHandler, "")
        self.url = f"http://127.0.0.1:{self._api.server_address[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        with self._changed:
            self._changed.notify_all()
        self._thread.join()
        for server in [self._api, *self._doors.values()]:
            server.server_close()
        self._selector.close()

    def _listen(self, handler: type[_Handler], instance_id: str) -> _Server:
        server = _Server(("127.0.0.1", 0), handler, self, instance_id)
        self._selector.register(server, selectors.EVENT_READ)
        return server

    def _accept(self) -> None:
        """One thread takes the connections of all listeners; each connection then has its own."""
        while not self._closing:
            for key, _ in self._selector.select(0.05):
                assert isinstance(key.fileobj, _Server)
                with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
                    key.fileobj.handle_request()

    def reset(self) -> None:
        """A project with nothing in it, and no faults."""
        with self._changed:
            doors, self._doors = self._doors, {}
            self._clear()
            self._changed.notify_all()
        for server in doors.values():
            self._selector.unregister(server)
            server.server_close()

    # What a test or an operator does

    def environment(self) -> dict[str, str]:
        """What a server process needs to find this project."""
        return {
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{self.url}/compute/v1/",
            "GCE_PROJECT": self.project, "GOOGLE_OAUTH_ACCESS_TOKEN": SERVER_TOKEN,
        }

    def node_environment(self, instance_id: str) -> dict[str, str]:
        """What makes a process run as this instance."""
        return {"GCE_METADATA_HOST": self.metadata_host(instance_id)}

    def metadata_host(self, instance_id: str) -> str:
        """Where the metadata server of an instance is, for it alone: host:port."""
        with self._changed:
            if instance_id not in self._doors:
                self._doors[instance_id] = self._listen(_MetadataHandler, instance_id)
            return f"127.0.0.1:{self._doors[instance_id].server_address[1]}"

    def instance(
        self, name: str, zone: str = ZONES[0], labels: dict[str, str] | None = None,
        group: str | None = None, status: str = "RUNNING", items: dict[str, str] | None = None,
        guest_attributes: bool = True, account: str | None = None,
    ) -> str:
        """Make an instance, with metadata items of its own and those of its group; its id."""
        found = dict(items or {})
        if group:
            manager = f"projects/{self.number}/zones/{zone}/instanceGroupManagers/{group}"
            found = {"created-by": manager, **found}
        if guest_attributes:
            found.setdefault("enable-guest-attributes", "TRUE")
        listed = [{"key": key, "value": value} for key, value in found.items()]
        with self._changed:
            made = Instance(
                str(next(self._ids)), name, zone, dict(labels or {}), status, listed, account, _stamp()
            )
            assert (zone, name) not in self._names, f"{name} is taken"
            self.instances[made.id] = self._names[zone, name] = made
        return made.id

    def group(
        self, name: str, size: int, zone: str = ZONES[0], account: str | None = None, **labels: str
    ) -> list[str]:
        """Make a managed instance group; the ids of its instances."""
        names = [f"{name}-{secrets.token_hex(4)}" for _ in range(size)]
        return [self.instance(each, zone, labels, group=name, account=account) for each in names]

    def metadata(self, instance_id: str) -> dict[str, str]:
        """The metadata items of an instance."""
        with self._changed:
            return self.instances[instance_id].metadata

    def set_metadata(self, instance_id: str, key: str, value: str) -> None:
        """Set one item, as an operator does."""
        with self._changed:
            instance = self.instances[instance_id]
            items = [item for item in instance.items if item["key"] != key]
            self._change(instance, [*items, {"key": key, "value": value}])

    def delete_metadata(self, instance_id: str, key: str) -> None:
        """Take one item away, as an operator does."""
        with self._changed:
            instance = self.instances[instance_id]
            self._change(instance, [item for item in instance.items if item["key"] != key])

    def _change(self, instance: Instance, items: list[dict[str, str]]) -> None:
        instance.change(items)
        self._changed.notify_all()

    def guest_attribute(self, instance_id: str, namespace: str, key: str) -> str | None:
        """The value of a guest attribute."""
        with self._changed:
            return self.instances[instance_id].attributes.get((namespace, key))

    def set_guest_attribute(self, instance_id: str, namespace: str, key: str, value: str) -> None:
        """Set a guest attribute, as a process on the instance does."""
        with self._changed:
            self.instances[instance_id].attributes[namespace, key] = value
            self._changed.notify_all()

    def set_status(self, instance_id: str, status: str) -> None:
        """Bring an instance to RUNNING, STOPPING, TERMINATED, ..."""
        with self._changed:
            self.instances[instance_id].status = status

    def delete(self, instance_id: str) -> Instance:
        """End an instance: its metadata server answers no more."""
        with self._changed:
            gone = self.instances.pop(instance_id)
            del self._names[gone.zone, gone.name]
            self._changed.notify_all()
        return gone

    def recreate(self, instance_id: str) -> str:
        """Replace an instance as a group does: the name stays, the id does not, nor what was set on it."""
        old = self.delete(instance_id)
        kept = ("created-by", "enable-guest-attributes")
        items = {key: value for key, value in old.metadata.items() if key in kept}
        return self.instance(
            old.name, old.zone, old.labels, items=items, guest_attributes=False, account=old.account
        )

    def operation(self, pending: int = 0, error: tuple[str, str] | None = None, times: int = 1) -> None:
        """How the next operations go: waits that find it running, code and message of how it fails."""
        self.next_operations += [(pending, error)] * times

    def settle(self) -> None:
        """Let the operations that are still running end, without anybody waiting for them."""
        with self._changed:
            for operation in list(self._running.values()):
                self._finish(operation)

    def deny(self, permission: str, account: str = SERVER_ACCOUNT) -> None:
        """Take a permission away."""
        self.accounts[account].discard(permission)

    def allow(self, permission: str, account: str = SERVER_ACCOUNT) -> None:
        """Give a permission."""
        self.accounts.setdefault(account, set()).add(permission)

    def issue(self, account: str = SERVER_ACCOUNT) -> str:
        """A new access token of an account."""
        token = f"ya29.{secrets.token_urlsafe(48)}"
        with self._changed:
            self.tokens[token] = account
        return token

    def expire_tokens(self) -> None:
        """No access token that there is is good any more."""
        with self._changed:
            self.tokens.clear()

    def external_account(self, folder: Path, impersonate: bool = False) -> Path:
        """Write credentials of workload identity federation and their subject token; where they are."""
        subject, account = secrets.token_urlsafe(24), SERVER_ACCOUNT
        if impersonate:
            account = f"principal://iam.googleapis.com/projects/{self.number}/subject/outside"
            self.accounts[account] = set()
            self.impersonators[account] = {SERVER_ACCOUNT}
        self.subject_tokens[subject] = account
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "subject-token").write_text(subject)
        config = {
            "type": "external_account", "audience": self.audience,
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt", "token_url": f"{self.url}/v1/token",
            "credential_source": {"file": str(folder / "subject-token"), "format": {"type": "text"}},
        }
        if impersonate:
            path = f"/v1/projects/-/serviceAccounts/{SERVER_ACCOUNT}:generateAccessToken"
            config["service_account_impersonation_url"] = self.url + path
        made = folder / "credentials.json"
        made.write_text(json.dumps(config))
        return made

    @property
    def audience(self) -> str:
        """The workload identity provider that the token service knows."""
        pool = f"projects/{self.number}/locations/global/workloadIdentityPools/pool"
        return f"//iam.googleapis.com/{pool}/providers/provider"

    def fail(self, method_id: str, answer: Answer, times: int = 1, after: bool = False) -> None:
        """Answer so to calls of the method ("" for any); `after`: the call has its effect all the same."""
        self.faults.append([method_id, answer, times, after])

    def count(self) -> Counter[str]:
        """Calls of the API, by method id."""
        return Counter(method_id for method_id, _ in self.calls)

    def arrived(self, method_id: str, params: dict[str, str]) -> list[Any] | None:
        """Note a call; the fault that it is to meet."""
        with self._changed:
            self.calls.append((method_id, params))
            for fault in self.faults:
                if fault[2] > 0 and fault[0] in ("", method_id):
                    fault[2] -= 1
                    return fault
        return None

    # The Compute API

    def answer(self, call: gce_contract.Call, body: Any, account: str) -> dict[str, Any]:
        """The answer to a call of the Compute API; raises Refusal."""
        method = {
            "compute.instances.aggregatedList": self._list,
            "compute.instances.get": self._get,
            "compute.instances.setMetadata": self._set_metadata,
            "compute.instances.getGuestAttributes": self._get_guest_attributes,
            "compute.instances.testIamPermissions": self._test_permissions,
            "compute.zoneOperations.get": self._get_operation,
            "compute.zoneOperations.wait": self._wait_operation,
        }.get(call.method_id)
        if method is None:
            raise Violation(f"the stand-in does not have {call.method_id}")
        with self._changed:
            self._check_place(call.path)
            return method(call, body, account)

    def _check_place(self, path: dict[str, str]) -> None:
        if path["project"] not in (self.project, self.number):
            raise not_found(f"projects/{path['project']}")
        zone = path.get("zone")
        if zone and zone not in self._zones():
            raise Refusal(400, "invalid", f"Invalid value for field 'zone': '{zone}'. Unknown zone.")

    def _zones(self) -> list[str]:
        return sorted({*ZONES, *(each.zone for each in self.instances.values())})

    def _demand(self, account: str, call: gce_contract.Call, resource: str) -> None:
        permission = PERMISSIONS.get(call.method_id, call.method_id)
        if permission not in self.accounts[account]:
            raise Refusal(403, "forbidden", f"Required '{permission}' permission for '{resource}'")

    def _find(self, call: gce_contract.Call, account: str, parameter: str = "instance") -> Instance:
        """The instance that a path names, by its name or id, if the account may call this method."""
        wanted, zone = call.path[parameter], call.path["zone"]
        resource = f"projects/{call.path['project']}/zones/{zone}/instances/{wanted}"
        if PERMISSIONS.get(call.method_id) != "":
            self._demand(account, call, resource)
        found = self.instances.get(wanted) or self._names.get((zone, wanted))
        if found is None or found.zone != zone:
            raise not_found(resource)
        return found

    def _list(self, call: gce_contract.Call, body: Any, account: str) -> dict[str, Any]:
        self._demand(account, call, f"projects/{call.path['project']}")
        for name in ("includeAllScopes", "orderBy", "serviceProjectNumber"):
            if name in call.query:
                raise Violation(f"the stand-in does not have {name}")
        matches = parse_filter(call.query.get("filter", ""))
        limit = int(call.query.get("maxResults", "500")) or 500
        if limit > 500:
            raise invalid("maxResults", str(limit), "Must be less than or equal to '500'")
        if self.page_sizes:
            limit = min(limit, self.page_sizes.pop(0))
        after = self._read_page_token(call.query)
        lost = {scope.removeprefix("zones/") for scope in self.unreachables}
        rest = sorted(
            (place, each) for each in self.instances.values()
            if (place := (each.zone, each.name, each.id)) > after
            and each.zone not in lost and matches(each.labels)
        )
        page = [each for _, each in rest[:limit]]
        answer: dict[str, Any] = {
            "kind": "compute#instanceAggregatedList", "items": self._scopes(page, lost),
            "id": f"projects/{self.project}/aggregated/instances",
            "selfLink": f"{LINK}/projects/{self.project}/aggregated/instances",
        }
        if len(rest) > limit:
            answer["nextPageToken"] = self._page_token(call.query, rest[limit - 1][0] if page else after)
        if self.unreachables:
            answer["unreachables"] = list(self.unreachables)
        if self.warning:
            answer["warning"] = self.warning
        return answer

    def _scopes(self, page: list[Instance], lost: set[str]) -> dict[str, Any]:
        """The instances of a page by zone; all zones are there, on each page."""
        made: dict[str, Any] = {}
        for zone in self._zones():
            scope = f"zones/{zone}"
            found = [each.resource() for each in page if each.zone == zone]
            text = f"There are no results for scope '{scope}' on this page."
            made[scope] = {"instances": found} if found else {"warning": warning(
                "NO_RESULTS_ON_PAGE", text, scope=scope
            )}
            if scope in self.scope_warnings:
                made[scope]["warning"] = self.scope_warnings[scope]
        return made

    def _page_token(self, query: dict[str, str], place: tuple[str, ...]) -> str:
        content = json.dumps([query.get("filter", ""), *place])
        return base64.urlsafe_b64encode(content.encode()).decode()

    def _read_page_token(self, query: dict[str, str]) -> tuple[str, ...]:
        """The place after which a page begins; the token is good for the same filter alone."""
        token = query.get("pageToken", "")
        if not token:
            return ("", "", "")
        try:
            condition, *place = json.loads(base64.urlsafe_b64decode(token))
        except ValueError:
            condition, place = None, []
        if condition != query.get("filter", "") or len(place) != 3:
            raise invalid("pageToken", token, "The page token is invalid.")
        return tuple(place)

    def _get(self, call: gce_contract.Call, body: Any, account: str) -> dict[str, Any]:
        return self._find(call, account).resource()

    def _set_metadata(self, call: gce_contract.Call, body: Any, account: str) -> dict[str, Any]:
        instance = self._find(call, account)
        request_id = call.query.get("requestId", "")
        if request_id and not _is_uuid(request_id):
            raise invalid("requestId", request_id, "Must be a valid UUID.")
        if request_id in self.requests:
            return self.requests[request_id].resource()
        items = _checked_items(body.get("items", []))
        if instance.id in self._running:
            raise Refusal(400, "resourceNotReady", f"The resource '{instance.path()}' is not ready")
        if body.get("fingerprint") != instance.fingerprint:
            raise Refusal(412, "conditionNotMet", STALE, location="If-Match", locationType="header")
        operation = self._start(instance, items, account)
        if request_id:
            self.requests[request_id] = operation
        answer = operation.resource()
        if not operation.pending:
            self._finish(operation)  # as soon as the answer is out
        return answer

    def _start(self, instance: Instance, items: list[dict[str, str]], account: str) -> Operation:
        pending, error = self.next_operations.pop(0) if self.next_operations else (0, None)
        if instance.account and ACT_AS not in self.accounts[account]:
            error = (
                "SERVICE_ACCOUNT_ACCESS_DENIED",
                f"The user does not have access to service account '{instance.account}'.  User: "
                f"'{account}'.  Ask a project owner to grant you the iam.serviceAccountUser role on the "
                "service account",
            )
        name = f"operation-{int(time.time() * 1000)}-{secrets.token_hex(6)}"
        made = Operation(
            str(next(self._ids)), name, instance, account, items, pending, error, _stamp(),
            instance.fingerprint,
        )
        self.operations[name] = self.operations[made.id] = self._running[instance.id] = made
        return made

    def _finish(self, operation: Operation) -> None:
        """The operation ends: from now on its change can be seen."""
        if operation.ended:
            return
        operation.ended = _stamp()
        del self._running[operation.instance.id]
        if operation.instance.id not in self.instances:
            path = operation.instance.path()
            operation.error = ("RESOURCE_NOT_FOUND", f"The resource '{path}' was not found")
        elif operation.fingerprint != operation.instance.fingerprint:
            operation.error = ("CONDITION_NOT_MET", STALE)
        if not operation.error:
            self._change(operation.instance, operation.items)

    def _find_operation(self, call: gce_contract.Call, account: str) -> Operation:
        name, zone = call.path["operation"], call.path["zone"]
        resource = f"projects/{call.path['project']}/zones/{zone}/operations/{name}"
        self._demand(account, call, resource)
        found = self.operations.get(name)
        if found is None or found.instance.zone != zone:
            raise not_found(resource)
        return found

    def _get_operation(self, call: gce_contract.Call, body: Any, account: str) -> dict[str, Any]:
        return self._find_operation(call, account).resource()

    def _wait_operation(self, call: gce_contract.Call, body: Any, account: str) -> dict[str, Any]:
        """It may answer before the operation is done, as Google says of itself: then ask again."""
        operation = self._find_operation(call, account)
        if operation.pending:
            operation.pending -= 1
        else:
            self._finish(operation)
        return operation.resource()

    def _get_guest_attributes(self, call: gce_contract.Call, body: Any, account: str) -> dict[str, Any]:
        instance = self._find(call, account)
        if not instance.guest_attributes:
            raise Refusal(403, "forbidden", "Guest attributes endpoint access is disabled.")
        asked = call.query.get("queryPath") or call.query.get("variableKey", "")
        namespace, _, key = asked.partition("/")
        found = [
            {"namespace": space, "key": name, "value": value}
            for (space, name), value in sorted(instance.attributes.items())
            if namespace in ("", space) and key in ("", name)
        ]
        if not found:
            text = f"The resource '{asked}' of type 'Guest Attribute' was not found."
            raise Refusal(404, "notFound", text)
        return {
            "kind": "compute#guestAttributes", "queryPath": asked, "queryValue": {"items": found},
            "selfLink": f"{LINK}/{instance.path()}/guestAttributes/{asked}",
        }

    def _test_permissions(self, call: gce_contract.Call, body: Any, account: str) -> dict[str, Any]:
        self._find(call, account, "resource")
        held = [each for each in body.get("permissions", []) if each in self.accounts[account]]
        return {"permissions": held} if held else {}

    # The token service

    def exchange(self, body: dict[str, str]) -> dict[str, Any]:
        """The access token for an outside identity's token; raises OAuthError."""
        for name in SUBJECT_FIELDS:
            if not body.get(name):
                raise OAuthError("invalid_request", f"Missing required field: {name}.")
        if body["grantType"] != "urn:ietf:params:oauth:grant-type:token-exchange":
            raise OAuthError("unsupported_grant_type", f"Invalid grant type: {body['grantType']}")
        if body["requestedTokenType"] != ACCESS_TOKEN_TYPE:
            raise OAuthError("invalid_request", "Invalid value for requestedTokenType.")
        if body["subjectTokenType"] not in SUBJECT_TOKEN_TYPES:
            raise OAuthError("invalid_request", "Invalid value for subjectTokenType.")
        if body["audience"] != self.audience:
            raise OAuthError("invalid_target", WRONG_AUDIENCE)
        account = self.subject_tokens.get(body["subjectToken"])
        if account is None:
            raise OAuthError("invalid_grant", "The credential's token is invalid or has expired.")
        return {
            "access_token": self.issue(account), "issued_token_type": ACCESS_TOKEN_TYPE,
            "token_type": "Bearer", "expires_in": self.token_seconds,
        }

    def impersonate(self, name: str, body: dict[str, Any], account: str) -> dict[str, Any]:
        """An access token of a service account, for one who may have it; raises Refusal."""
        wanted = name.rpartition("/")[2]
        if wanted not in self.impersonators.get(account, ()):
            text = "Permission 'iam.serviceAccounts.getAccessToken' denied on resource (or it may not exist)."
            raise Denied(403, "PERMISSION_DENIED", text)
        lifetime = float((body.get("lifetime") or "3600s").removesuffix("s"))
        if not body.get("scope") or not 0 < lifetime <= 3600:
            raise Denied(400, "INVALID_ARGUMENT", "Request contains an invalid argument.")
        end = datetime.now(timezone.utc) + timedelta(seconds=lifetime)
        return {"accessToken": self.issue(wanted), "expireTime": end.strftime("%Y-%m-%dT%H:%M:%SZ")}

    # The metadata server

    def look(self, instance_id: str) -> dict[str, Any]:
        """All that the metadata server has for an instance, as folders of values; raises Gone."""
        instance = self.instances.get(instance_id)
        if instance is None:
            raise Gone
        found: dict[str, Any] = {
            "attributes": instance.metadata, "id": instance.id, "name": instance.name,
            "zone": f"projects/{self.number}/zones/{instance.zone}", "service-accounts": {},
            "hostname": f"{instance.name}.{instance.zone}.c.{self.project}.internal",
        }
        if instance.guest_attributes:
            spaces: dict[str, dict[str, str]] = {}
            for (namespace, key), value in instance.attributes.items():
                spaces.setdefault(namespace, {})[key] = value
            found["guest-attributes"] = spaces
        if instance.account:
            account = {
                "aliases": ["default"], "email": instance.account, "scopes": [_scope("cloud-platform")]
            }
            found["service-accounts"] = {"default": account, instance.account: account}
        project = {"attributes": {}, "numeric-project-id": self.number, "project-id": self.project}
        return {"instance": found, "project": project}

    def read(self, instance_id: str, path: str, query: dict[str, str]) -> Found:
        """What is at a path below computeMetadata/v1/, when it is time to say; raises MetadataError, Gone."""
        with self._changed:
            found = self._at(instance_id, path, query)
            if query.get("wait_for_change", "").lower() != "true":
                return found
            if not found.waitable or not query.get("timeout_sec", "0").isdigit():
                raise MetadataError(400, "Invalid Request")
            known = query.get("last_etag", found.etag)

            def different() -> bool:
                return self._closing or self._at(instance_id, path, query).etag != known

            seconds = float(query["timeout_sec"]) if "timeout_sec" in query else None
            self._changed.wait_for(different, seconds)
            return self._at(instance_id, path, query)

    def _at(self, instance_id: str, path: str, query: dict[str, str]) -> Found:
        """A value, what a folder has in it, or with recursive=true a folder and all below it as JSON."""
        place: Any = self.look(instance_id)
        names = [name for name in path.split("/") if name]
        if names[:2] == ["instance", "guest-attributes"] and "guest-attributes" not in place["instance"]:
            raise MetadataError(403, "Guest attributes endpoint access is disabled.")
        if re.fullmatch("instance/service-accounts/[^/]+/token", path):
            if names[2] in place["instance"]["service-accounts"]:
                return Found(self._token_of(instance_id), "application/json", waitable=False)
        for name in names:
            if not isinstance(place, dict) or name not in place:
                raise MetadataError(404, "Not Found")
            place = place[name]
        if not isinstance(place, dict):
            return self._value(place, path, query)
        if query.get("recursive", "").lower() == "true":
            return Found(json.dumps(_camel(place, names[-1:] != ["attributes"])), "application/json")
        if "alt" in query:
            raise MetadataError(400, "Bad Request")
        if path and not path.endswith("/"):
            raise MetadataError(301, "Moved Permanently")
        listing = [f"{name}/" if isinstance(inner, dict) else name for name, inner in sorted(place.items())]
        return Found("".join(f"{line}\n" for line in listing), "application/text", waitable=False)

    def _value(self, value: str | list[str], path: str, query: dict[str, str]) -> Found:
        if path.endswith("/"):
            raise MetadataError(404, "Not Found")
        if query.get("alt") == "json":
            return Found(json.dumps(value), "application/json")
        return Found("\n".join(value) if isinstance(value, list) else value, "application/text")

    def _token_of(self, instance_id: str) -> str:
        account = self.instances[instance_id].account or ""
        self.accounts.setdefault(account, set())
        token = self.issue(account)
        return json.dumps(
            {"access_token": token, "expires_in": self.token_seconds, "token_type": "Bearer"}
        )

    def write(self, instance_id: str, path: str, value: str | None) -> None:
        """PUT, or with None DELETE, of a guest attribute; raises MetadataError, Gone."""
        match = re.fullmatch(r"instance/guest-attributes/([\w.-]{1,256})/([\w.-]{1,256})", path, re.ASCII)
        with self._changed:
            if instance_id not in self.instances:
                raise Gone
            instance = self.instances[instance_id]
            if not path.startswith("instance/guest-attributes/"):
                raise MetadataError(405, "Method Not Allowed")
            if not instance.guest_attributes:
                raise MetadataError(403, "Guest attributes endpoint access is disabled.")
            if match is None:
                raise MetadataError(400, "Bad Request")
            if value is not None:
                instance.attributes[match[1], match[2]] = value
            elif instance.attributes.pop((match[1], match[2]), None) is None:
                raise MetadataError(404, "Not Found")
            self._changed.notify_all()


@dataclass(frozen=True)
class Found:
    """What the metadata server has at a path."""

    text: str
    kind: str
    waitable: bool = True  # for wait_for_change: neither the list of a folder nor a token

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


class MetadataError(Exception):
    """An answer of the metadata server that is an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class OAuthError(Exception):
    """An error of the token service, in its own form."""

    def __init__(self, code: str, description: str) -> None:
        super().__init__(description)
        self.body = {"error": code, "error_description": description}


# ---------------------------------------------------------------------------------------------
# Answers that are errors
# ---------------------------------------------------------------------------------------------

def error_body(status: int, reason: str, message: str, **more: str) -> dict[str, Any]:
    """An error as Compute gives it; Google's front end adds a status, such as UNAVAILABLE (`state`)."""
    outer = {"status": more.pop("state")} if "state" in more else {}
    detail = {"message": message, "domain": "global", "reason": reason, **more}
    return {"error": {"code": status, "message": message, "errors": [detail], **outer}}


def refusal(status: int, reason: str, message: str = "injected", **more: str) -> Answer:
    """A ready answer for Gce.fail: an error in Google's form."""
    body = error_body(status, reason, message, **more)

    def answer(handler: _Handler) -> None:
        handler.reply(status, body)
    return answer


RATE = (
    "Quota exceeded for quota metric 'Queries' and limit 'Queries per minute' of service "
    f"'compute.googleapis.com' for consumer 'project_number:{NUMBER}'."
)


def too_many_requests() -> Answer:
    """429, above a rate of requests."""
    return refusal(429, "rateLimitExceeded", RATE, domain="usageLimits", state="RESOURCE_EXHAUSTED")


def rate_limited() -> Answer:
    """The same as 403: the reason tells it from a permission that is missing."""
    return refusal(403, "rateLimitExceeded", RATE, domain="usageLimits")


def quota_exceeded() -> Answer:
    """403 for a quota that is used up."""
    return refusal(403, "quotaExceeded", "Quota exceeded", domain="usageLimits")


def internal_error() -> Answer:
    """500."""
    return refusal(500, "backendError", "Internal error. Please try again or contact Google Support.")


def unavailable() -> Answer:
    """503."""
    text = "The service is currently unavailable."
    return refusal(503, "backendError", text, state="UNAVAILABLE")


def insufficient_scopes() -> Answer:
    """403 for a token whose access scopes are too narrow."""
    text = "Request had insufficient authentication scopes."
    return refusal(403, "insufficientPermissions", text, state="PERMISSION_DENIED")


def dropped(handler: _Handler) -> None:
    """The connection ends without an answer."""
    handler.close_connection = True


def junk(handler: _Handler) -> None:
    """200 with something that is no JSON, as a proxy may answer."""
    handler.reply(200, "<html>It works!</html>", "text/html")


def not_found(resource: str) -> Refusal:
    return Refusal(404, "notFound", f"The resource '{resource}' was not found")


def invalid(name: str, value: str, why: str) -> Refusal:
    return Refusal(400, "invalid", f"Invalid value for field '{name}': '{value}'. {why}")


def warning(code: str, message: str, **data: str) -> dict[str, Any]:
    """A warning as a listing has it."""
    listed = [{"key": key, "value": value} for key, value in data.items()]
    return {"code": code, "message": message, "data": listed}


# ---------------------------------------------------------------------------------------------
# Small parts
# ---------------------------------------------------------------------------------------------


def parse_filter(text: str) -> Callable[[dict[str, str]], bool]:
    """Which labels a filter matches: `(labels.key=value) (labels.key=value)`; raises Refusal."""
    one = r"labels\.(?P<key>[\w-]+)\s*=\s*(?:\"(?P<quoted>[^\"\\]*)\"|(?P<bare>\w[\w-]*))"
    wanted: dict[str, set[str]] = {}
    rest = text.strip()
    while rest:
        match = re.match(rf"\(\s*{one}\s*\)(\s+AND\s+|\s*$|\s+|(?=\())", rest)
        match = match or (None if wanted else re.fullmatch(one, rest))
        if match is None:
            raise invalid("filter", text, "Invalid list filter expression.")
        value = match["bare"] if match["quoted"] is None else match["quoted"]
        wanted.setdefault(match["key"], set()).add(value)
        rest = rest[match.end():].strip()
    return lambda labels: all({labels.get(key)} == values for key, values in wanted.items())


def _checked_items(items: list[dict[str, str]]) -> list[dict[str, str]]:
    """The items of a request, as they are then there; raises Refusal."""
    keys = [item.get("key", "") for item in items]
    for number, key in enumerate(keys):
        name = f"metadata.items[{number}].key"
        if not key:
            raise invalid(name, key, "Must be a match of regex '[a-zA-Z0-9-_]{1,128}'")
        if keys.count(key) > 1:
            raise invalid(name, key, f"Duplicate metadata key '{key}'.")
    for number, item in enumerate(items):
        if len(item.get("value", "").encode()) > VALUE_LIMIT:
            raise invalid(f"metadata.items[{number}].value", "...", "Value is too large.")
    if sum(len(text.encode()) for item in items for text in item.values()) > METADATA_LIMIT:
        raise invalid("metadata", "...", "Metadata is too large.")
    return [{"key": item["key"], "value": item.get("value", "")} for item in items]


def _camel(value: Any, rename: bool = True) -> Any:
    """A folder as recursive JSON: the server's own names in camel case, ids as numbers."""
    if not isinstance(value, dict):
        return value
    made = {}
    for key, inner in value.items():
        name = re.sub(r"-(\w)", lambda match: match[1].upper(), key) if rename else key
        free = key in ("attributes", "guest-attributes")
        number = rename and key in ("id", "numeric-project-id")
        made[name] = int(inner) if number else _camel(inner, rename and not free)
    return made


def _hash(value: Any) -> str:
    """Eight bytes in base64, as the API's fingerprints are."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    return base64.urlsafe_b64encode(digest[:8]).decode()


def _scope(name: str) -> str:
    return f"https://www.googleapis.com/auth/{name}"


def _stamp() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "+00:00"


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower() and uuid.UUID(text).int != 0
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    timeout = 0  # handle_request takes what is there, and waits for nothing

    def __init__(self, address: tuple[str, int], handler: type[_Handler], gce: Gce, instance_id: str):
        self.gce, self.instance_id = gce, instance_id
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    server: _Server
    headers_always: ClassVar[dict[str, str]] = {}

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read the program's output, not ours."""

    def reply(
        self, status: int, body: Any, kind: str = "application/json; charset=UTF-8", **headers: str
    ) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in {**self.headers_always, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def content(self) -> str:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()


class _ApiHandler(_Handler):
    """The Compute API and the token service."""

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    do_PUT = do_PATCH = do_DELETE = do_GET

    def _respond(self) -> None:
        gce, text = self.server.gce, self.content()
        path, _, query = self.path.partition("?")
        try:
            if self.command != "GET" and "Content-Length" not in self.headers:
                raise Violation(f"{self.command} {path}: without a Content-Length Google answers 411")
            name, body = self._document(path), self._body(path, text)
            call = gce_contract.check_request(self.command, path, query, body, name)
            fault = gce.arrived(call.method_id, {**call.path, **call.query})
            if fault and not fault[3]:
                return fault[1](self)  # type: ignore[no-any-return]
            status, answer = self._answer(call, body)
            if status == 200:
                gce_contract.check_answer(call.method_id, answer, name)
        except Violation as error:
            gce.violations.append(str(error))
            return self.reply(500, error_body(500, "violation", str(error)))
        if fault:
            return fault[1](self)  # type: ignore[no-any-return]
        more = {"WWW-Authenticate": 'Bearer realm="https://accounts.google.com/"'} if status == 401 else {}
        return self.reply(status, answer, **more)

    def _document(self, path: str) -> str:
        if path.startswith("/compute/"):
            return gce_contract.COMPUTE
        return "sts.v1" if path == "/v1/token" else "iamcredentials.v1"

    def _body(self, path: str, text: str) -> Any:
        """The body as JSON has it; the token service takes a form, too."""
        kind = self.headers.get_content_type() if self.headers.get("Content-Type") else ""
        if not text:
            return None
        if path == "/v1/token" and kind == "application/x-www-form-urlencoded":
            pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, strict_parsing=True)
            return {re.sub("_(.)", lambda match: match[1].upper(), key): value for key, value in pairs}
        if kind != "application/json":
            raise Violation(f"{self.command} {path}: the body's Content-Type is {kind or 'missing'}")
        try:
            return json.loads(text)
        except ValueError as error:
            raise Violation(f"{self.command} {path}: the body is no JSON: {error}") from None

    def _answer(self, call: gce_contract.Call, body: Any) -> tuple[int, Any]:
        gce = self.server.gce
        try:
            if call.method_id == STS:
                if self.headers.get("Authorization"):
                    raise Violation("sts.token: a request must not have an Authorization header")
                return 200, gce.exchange(body)
            account = self._account()
            if call.method_id == IMPERSONATE:
                return 200, gce.impersonate(call.path["name"], body, account)
            mask = gce_contract.parse_mask(call.query["fields"]) if "fields" in call.query else None
            return 200, gce_contract.masked(gce.answer(call, body, account), mask)
        except Refusal as error:
            return error.status, error.body
        except OAuthError as error:
            return 400, error.body

    def _account(self) -> str:
        """Whose bearer token it is; raises Refusal."""
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind != "Bearer" or not token:
            raise _unauthenticated("Request is missing required authentication credential.", "required")
        account = self.server.gce.tokens.get(token)
        if account is None:
            raise _unauthenticated("Request had invalid authentication credentials.", "authError")
        return account


def _unauthenticated(text: str, reason: str) -> Refusal:
    more = (
        " Expected OAuth 2 access token, login cookie or other valid authentication credential."
        " See https://developers.google.com/identity/sign-in/web/devconsole-project."
    )
    place = {"location": "Authorization", "locationType": "header"}
    return Refusal(401, reason, text + more, state="UNAUTHENTICATED", **place)


class _MetadataHandler(_Handler):
    """The metadata server of one instance."""

    headers_always: ClassVar[dict[str, str]] = {"Metadata-Flavor": "Google"}

    def version_string(self) -> str:
        return "Metadata Server for VM"

    def do_GET(self) -> None:
        self._respond(self._read)

    def do_PUT(self) -> None:
        self._respond(self._write)

    do_DELETE = do_PUT

    def do_POST(self) -> None:
        self._respond(lambda path, query: self.reply(405, "Method Not Allowed", "text/html"))

    def _respond(self, what: Callable[[str, dict[str, str]], None]) -> None:
        gce, text = self.server.gce, self.content()
        gce.asked.append((self.server.instance_id, f"{self.command} {self.path}"))
        self._sent = text
        path, _, query = self.path.partition("?")
        try:
            if gce.metadata_faults:
                raise MetadataError(gce.metadata_faults.pop(0), "fault")
            if self.headers.get("Metadata-Flavor") != "Google" or "X-Forwarded-For" in self.headers:
                raise MetadataError(403, "Missing required header: Metadata-Flavor")
            what(path, dict(urllib.parse.parse_qsl(query, keep_blank_values=True)))
        except Gone:
            self.close_connection = True
        except MetadataError as error:
            more = {"Location": f"{path}/"} if error.status == 301 else {}
            self.reply(error.status, error.text, "text/html; charset=UTF-8", **more)

    def _read(self, path: str, query: dict[str, str]) -> None:
        above = {"/": "computeMetadata/\n", "/computeMetadata/": "v1/\n"}
        if path in above:
            found = Found(above[path], "application/text")
        else:
            found = self.server.gce.read(self.server.instance_id, self._below(path), query)
        self.reply(200, found.text, found.kind, ETag=found.etag)

    def _write(self, path: str, query: dict[str, str]) -> None:
        value = self._sent if self.command == "PUT" else None
        self.server.gce.write(self.server.instance_id, self._below(path), value)
        self.reply(200, "", "application/text")

    def _below(self, path: str) -> str:
        prefix = "/computeMetadata/v1/"
        if not path.startswith(prefix):
            raise MetadataError(404, "Not Found")
        return path[len(prefix):]
