"""The stand-in for Compute Engine, and the checker that holds it and the program to Google's contract."""
from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import urllib3

import standin_gce
from clusters import wait_for
from gce_contract import Violation, check_answer, check_mask, check_request, masked, methods, parse_mask
from standin_gce import ACT_AS, NODE_ACCOUNT, ROLE, SERVER_ACCOUNT, SERVER_TOKEN, ZONES, Gce, parse_filter

BASE = "/compute/v1/projects/keto-test"
LIST = f"{BASE}/aggregated/instances"
ONE = f"{BASE}/zones/{ZONES[0]}/instances/node-1"
WAIT = f"{BASE}/zones/{ZONES[0]}/operations/operation-1/wait"
LISTING = {"$ref": "InstanceAggregatedList"}


# ---------------------------------------------------------------------------------------------
# The contract
# ---------------------------------------------------------------------------------------------


def test_a_request_is_the_method_that_it_is() -> None:
    call = check_request("POST", f"{ONE}/setMetadata", "", {"fingerprint": "AbCdEfGhIjk=", "items": []})
    assert call.method_id == "compute.instances.setMetadata"
    assert call.path == {"project": "keto-test", "zone": ZONES[0], "instance": "node-1"}
    call = check_request("GET", LIST, "filter=%28labels.role%3Dnode%29&maxResults=500&prettyPrint=false")
    assert call == ("compute.instances.aggregatedList", {"project": "keto-test"}, {
        "filter": "(labels.role=node)", "maxResults": "500", "prettyPrint": "false",
    })


IN_ORDER = [
    ("GET", ONE, "", None),
    ("GET", ONE.replace("node-1", "4000000000000000001"), "fields=id,metadata(fingerprint,items)", None),
    ("GET", LIST.replace("keto-test", "example.com:my-project"), "alt=json&maxResults=0", None),
    ("GET", LIST, "fields=items/*/instances(id,labels/role),items/*/warning/code,nextPageToken", None),
    ("GET", f"{ONE}/getGuestAttributes", "queryPath=keto%2Ftoken", None),
    ("POST", f"{ONE}/testIamPermissions", "", {"permissions": ["compute.instances.get"]}),
    ("POST", f"{ONE}/setMetadata", "", {"kind": "compute#metadata", "items": [{"key": "a_B-9"}]}),
    ("POST", WAIT, "", None),
    ("POST", WAIT, "", {}),
]


@pytest.mark.parametrize(("method", "path", "query", "body"), IN_ORDER)
def test_what_is_in_order_passes(method: str, path: str, query: str, body: Any) -> None:
    check_request(method, path, query, body)


OUT_OF_ORDER: dict[str, tuple[str, str, str, Any, str]] = {
    "a path that is none": ("GET", f"{ONE}/metadata", "", None, "0 methods"),
    "another API's path": ("GET", LIST.replace("/v1/", "/beta/"), "", None, "0 methods"),
    "an HTTP method that is none there": ("PUT", f"{ONE}/setMetadata", "", {}, "0 methods"),
    "a wait with GET": ("GET", WAIT, "", None, "0 methods"),
    "a project's name": ("GET", LIST.replace("keto-test", "Keto_Test"), "", None, "project"),
    "an instance's name": ("GET", ONE.replace("node-1", "Node-1"), "", None, "instance"),
    "an id that begins with 0": ("GET", ONE.replace("node-1", "0123"), "", None, "instance"),
    "a zone": ("GET", ONE.replace(ZONES[0], "europe west"), "", None, "zone"),
    "a slash that is hidden in a name": ("GET", ONE.replace("node-1", "a%2Fb"), "", None, "instance"),
    "a parameter that is none": ("GET", LIST, "pageSize=500", None, "pageSize"),
    "a parameter of another method": ("GET", ONE, "maxResults=5", None, "maxResults"),
    "a parameter twice": ("GET", LIST, "maxResults=5&maxResults=6", None, "twice"),
    "a number that is none": ("GET", LIST, "maxResults=all", None, "uint32"),
    "a number below its least": ("GET", LIST, "maxResults=-1", None, "uint32"),
    "a number above what fits": ("GET", LIST, "maxResults=4294967296", None, "uint32"),
    "a number below a least of its own": ("GET", f"{ONE}/serialPort", "port=0", None, "from 1 to 4"),
    "a number above a most of its own": ("GET", f"{ONE}/serialPort", "port=5", None, "from 1 to 4"),
    "a number with a zero before it": ("GET", LIST, "maxResults=050", None, "uint32"),
    "a boolean that is none": ("GET", LIST, "prettyPrint=False", None, "boolean"),
    "a required parameter that is missing": ("POST", f"{ONE}/detachDisk", "", None, "deviceName is missing"),
    "an enum": ("GET", LIST, "alt=xml", None, "json, media, proto"),
    "a query that is malformed": ("GET", LIST, "filter", None, "malformed"),
    "a body where there is none": ("POST", WAIT, "", {"timeout": 5}, "no body"),
    "a GET with a body": ("GET", ONE, "", {"a": 1}, "no body"),
    "no body where there is one": ("POST", f"{ONE}/setMetadata", "", None, "JSON object"),
    "a list for a body": ("POST", f"{ONE}/setMetadata", "", [], "JSON object"),
    "a property that is none": ("POST", f"{ONE}/setMetadata", "", {"metadata": {}}, "'metadata'"),
    "a property that is none, below": (
        "POST", f"{ONE}/setMetadata", "", {"items": [{"name": "a"}]}, "items[0] has no property 'name'"),
    "an object for a list": ("POST", f"{ONE}/setMetadata", "", {"items": {}}, "no array"),
    "a string for an object": ("POST", f"{ONE}/setMetadata", "", {"items": ["a"]}, "no object"),
    "a number for a string": (
        "POST", f"{ONE}/setMetadata", "", {"items": [{"value": 1}]}, "items[0].value: 1 is no string"),
    "null for a string": ("POST", f"{ONE}/setMetadata", "", {"fingerprint": None}, "null is no string"),
    "a key with a slash": ("POST", f"{ONE}/setMetadata", "", {"items": [{"key": "a/b"}]}, "items[0].key"),
    "a key that is too long": ("POST", f"{ONE}/setMetadata", "", {"items": [{"key": "a" * 129}]}, "key"),
    "a fingerprint that is no base64": (
        "POST", f"{ONE}/setMetadata", "", {"fingerprint": "not base64!"}, "base64"),
    "what another method needs": (
        "POST", f"{BASE}/setCommonInstanceMetadata", "", {"items": [{"key": "a"}]}, "value is missing"),
    "a mask that names nothing": ("GET", LIST, "fields=items/*/instances/metaData", None, "no metaData"),
}


@pytest.mark.parametrize("case", OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
def test_what_is_out_of_order_is_refused(case: tuple[str, str, str, Any, str]) -> None:
    method, path, query, body, why = case
    with pytest.raises(Violation) as caught:
        check_request(method, path, query, body)
    assert why in str(caught.value)


@pytest.mark.parametrize(("method_id", "answer", "why"), [
    ("compute.instances.get", {"id": 4000000000000000001}, "no string"),
    ("compute.instances.get", {"id": "-1"}, "uint64"),
    ("compute.instances.get", {"status": "RUNNIN"}, "RUNNING"),
    ("compute.instances.get", {"labels": {"a": ["b"]}}, "Instance.labels.a"),
    ("compute.instances.get", {"networkInterfaces": [{"networkIp": "10.0.0.1"}]}, "networkIp"),
    ("compute.instances.get", {"canIpForward": "false"}, "no boolean"),
    ("compute.instances.get", [], "no object"),
    ("compute.instances.aggregatedList", {"items": []}, "no object"),
    ("compute.instances.aggregatedList", {"items": {"zones/z": {"instances": [{"nam": "a"}]}}}, "'nam'"),
    ("compute.instances.aggregatedList", {"warning": {"code": "NONE"}}, "PARTIAL_SUCCESS"),
    ("compute.zoneOperations.wait", {"progress": "100"}, "no integer"),
    ("compute.zoneOperations.wait", {"progress": True}, "no integer"),
    ("compute.zoneOperations.wait", {"progress": 2**31}, "int32"),
    ("compute.zoneOperations.wait", {"status": "FINISHED"}, "DONE"),
    ("compute.zoneOperations.wait", {"error": {"errors": [{"reason": "x"}]}}, "'reason'"),
])
def test_an_answer_that_is_not_googles_is_refused(method_id: str, answer: Any, why: str) -> None:
    with pytest.raises(Violation) as caught:
        check_answer(method_id, answer)
    assert why in str(caught.value)


@pytest.mark.parametrize("mask", [
    "items", "items/*", "items/*/instances(id,name,zone),nextPageToken", "*", "kind,items(*(instances/id))",
    "items/*/instances(metadata(fingerprint,items(key,value)),labels/a-b),unreachables,warning/code",
    "items/*/warning,warning(code,data/key)",
])
def test_a_mask_of_names_that_there_are(mask: str) -> None:
    check_mask(parse_mask(mask), LISTING)


@pytest.mark.parametrize("mask", [
    "item", "items/*/instance", "items/*/instances/metadata/item", "nextPageToken/x", "unreachables(a)",
    "", ",", "a,", "items(", "items)", "items/", "items//id", "items/*/instances(id,name", "items()",
    "items/*/instances(id))", "items/*/instances (id)", "kind;id", "warning/codes", "items/*/instances/id/x",
    "items/instances", "items/instances/id",
])
def test_a_mask_that_is_none(mask: str) -> None:
    with pytest.raises(Violation, match="fields"):
        check_mask(parse_mask(mask), LISTING)


def test_a_mask_selects() -> None:
    answer = {
        "kind": "k", "nextPageToken": "t", "items": {
            "zones/a": {"instances": [{"id": "1", "name": "n", "labels": {"a": "b", "c": "d"}}]},
            "zones/b": {"warning": {"code": "NO_RESULTS_ON_PAGE", "message": "m"}},
        },
    }
    assert masked(answer, parse_mask("nextPageToken,unreachables")) == {"nextPageToken": "t"}
    assert masked(answer, parse_mask("items/*/instances/id")) == {
        "items": {"zones/a": {"instances": [{"id": "1"}]}, "zones/b": {}},
    }
    assert masked(answer, parse_mask("items/*(warning/code,instances(labels/c)),kind")) == {
        "kind": "k", "items": {
            "zones/a": {"instances": [{"labels": {"c": "d"}}]},
            "zones/b": {"warning": {"code": "NO_RESULTS_ON_PAGE"}},
        },
    }
    for mask in ("items/*/instances/id,items", "items,items/*/instances/id"):
        assert masked(answer, parse_mask(mask)) == {"items": answer["items"]}
    assert masked(answer, parse_mask("*")) == answer


def test_the_other_documents_are_googles_too() -> None:
    path = f"/v1/projects/-/serviceAccounts/{SERVER_ACCOUNT}:generateAccessToken"
    call = check_request("POST", path, "", {"scope": ["a"], "lifetime": "300s"}, "iamcredentials.v1")
    assert call.method_id == standin_gce.IMPERSONATE and call.method_id in methods("iamcredentials.v1")
    for lifetime in ("300", "5m", 300):
        with pytest.raises(Violation, match="lifetime"):
            check_request("POST", path, "", {"scope": ["a"], "lifetime": lifetime}, "iamcredentials.v1")
    check_answer(call.method_id, {"expireTime": "2026-11-24T12:00:00Z"}, "iamcredentials.v1")
    for moment in ("2026-11-24 12:00:00", "2026-13-24T12:00:00Z", "soon"):
        with pytest.raises(Violation, match="RFC 3339"):
            check_answer(call.method_id, {"expireTime": moment}, "iamcredentials.v1")


# ---------------------------------------------------------------------------------------------
# The Compute API
# ---------------------------------------------------------------------------------------------


class Reply(NamedTuple):
    status: int
    body: Any
    headers: Any

    @property
    def reason(self) -> str:
        """The reason of an error, in the form that Compute has for it."""
        error = self.body["error"]
        assert error["code"] == self.status and error["message"] == error["errors"][0]["message"]
        return str(error["errors"][0]["reason"])

    @property
    def message(self) -> str:
        return str(self.body["error"]["message"])


@pytest.fixture(scope="module")
def shared() -> Iterator[Gce]:
    with Gce() as made:
        yield made


@pytest.fixture
def gce(shared: Gce) -> Iterator[Gce]:
    shared.reset()
    yield shared
    assert shared.violations == []


def ask(gce: Gce, method: str, path: str, body: Any = None, token: str = SERVER_TOKEN, **query: str) -> Reply:
    """A request to the API, below the project or at a path that begins with a slash."""
    url = gce.url + (path if path.startswith("/") else f"{BASE}/{path}")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if query:
        url += "?" + urllib.parse.urlencode(query)
    reply = urllib3.request(method, url, json=body, headers=headers, retries=False)
    kind = reply.headers["Content-Type"]
    return Reply(reply.status, reply.json() if "json" in kind else reply.data.decode(), reply.headers)


def at(gce: Gce, node: str) -> str:
    """Where an instance is, below the project."""
    found = gce.instances[node]
    return f"zones/{found.zone}/instances/{found.name}"


def set_item(gce: Gce, node: str, key: str, value: str, **query: str) -> Reply:
    """Read, modify, write, as the API wants it."""
    read = ask(gce, "GET", at(gce, node)).body["metadata"]
    items = [item for item in read.get("items", []) if item["key"] != key]
    body = {"fingerprint": read["fingerprint"], "items": [*items, {"key": key, "value": value}]}
    return ask(gce, "POST", f"{at(gce, node)}/setMetadata", body, **query)


def wait(gce: Gce, operation: Reply) -> Reply:
    zone, name = operation.body["zone"].rpartition("/")[2], operation.body["name"]
    return ask(gce, "POST", f"zones/{zone}/operations/{name}/wait")


def names(reply: Reply) -> list[str]:
    """The instances of a page."""
    assert reply.status == 200
    return [each["name"] for scope in reply.body["items"].values() for each in scope.get("instances", [])]


def test_an_instance_as_the_api_shows_it(gce: Gce) -> None:
    (node,) = gce.group("workers", 1, role="node")
    found = ask(gce, "GET", at(gce, node)).body
    assert found["id"] == node and node.isdigit() and len(node) == 19
    assert found["zone"] == f"https://www.googleapis.com/compute/v1/projects/keto-test/zones/{ZONES[0]}"
    assert found["labels"] == {"role": "node"} and found["status"] == "RUNNING"
    assert {"key": "created-by", "value": (
        f"projects/123456789012/zones/{ZONES[0]}/instanceGroupManagers/workers"
    )} in found["metadata"]["items"]
    by_id = f"zones/{ZONES[0]}/instances/{node}"
    assert ask(gce, "GET", by_id).body == found
    assert ask(gce, "GET", by_id, fields="id,status").body == {"id": node, "status": "RUNNING"}
    numbered = f"/compute/v1/projects/{gce.number}/{by_id}"
    assert ask(gce, "GET", numbered).body == found


def test_what_is_empty_is_left_out(gce: Gce) -> None:
    node = gce.instance("bare", guest_attributes=False)
    found = ask(gce, "GET", at(gce, node)).body
    assert "labels" not in found and "serviceAccounts" not in found
    assert set(found["metadata"]) == {"kind", "fingerprint"}


def test_what_is_not_there(gce: Gce) -> None:
    node = gce.instance("node-1")
    for path in (
        f"zones/{ZONES[0]}/instances/node-2", f"zones/{ZONES[1]}/instances/node-1",
        f"zones/{ZONES[1]}/instances/{node}", f"zones/{ZONES[0]}/operations/operation-1",
        "/compute/v1/projects/another/aggregated/instances",
    ):
        reply = ask(gce, "GET", path)
        assert (reply.status, reply.reason) == (404, "notFound")
        assert reply.message.startswith("The resource 'projects/")
        assert reply.message.endswith("' was not found")
    unknown = ask(gce, "GET", "zones/mars-north1-a/instances/node-1")
    assert (unknown.status, unknown.reason) == (400, "invalid")


def test_a_listing_has_all_zones_and_the_instances_of_the_filter(gce: Gce) -> None:
    gce.group("compute", 2, role="compute", env="prod")
    gce.group("storage", 2, zone=ZONES[1], role="storage", env="prod")
    gce.instance("alone")
    listing = ask(gce, "GET", LIST)
    assert len(names(listing)) == 5 and set(listing.body["items"]) == {f"zones/{zone}" for zone in ZONES}
    assert "nextPageToken" not in listing.body and "unreachables" not in listing.body
    empty = f"zones/{ZONES[2]}"
    assert listing.body["items"][empty] == {"warning": {
        "code": "NO_RESULTS_ON_PAGE", "data": [{"key": "scope", "value": empty}],
        "message": f"There are no results for scope '{empty}' on this page.",
    }}
    found = names(ask(gce, "GET", LIST, filter="(labels.env=prod) (labels.role=storage)"))
    assert len(found) == 2 and all(name.startswith("storage-") for name in found)


@pytest.mark.parametrize(("text", "matches"), [
    ("", True), ("labels.role=node", True), ("(labels.role=node)", True), ('labels.role="node"', True),
    ("(labels.role=node) (labels.env=prod)", True), ("(labels.role = node)(labels.env = prod)", True),
    ("(labels.role=node) AND (labels.env=prod)", True), ("(labels.role=node) (labels.env=test)", False),
    ("labels.role=nod", False), ("labels.other=node", False), ("(labels.role=node) (labels.role=x)", False),
])
def test_a_filter(text: str, matches: bool) -> None:
    assert parse_filter(text)({"role": "node", "env": "prod"}) is matches


@pytest.mark.parametrize("text", [
    "not-a-filter", "labels.role", "labels.role=", "labels.role=node labels.env=prod", "(labels.role=node",
    "labels.role=a b", "(labels.role=node) OR (labels.env=prod)", "role=node", 'labels.role="node',
    "metadata.x=y", "labels.role=-x",
])
def test_a_filter_that_is_none(gce: Gce, text: str) -> None:
    reply = ask(gce, "GET", LIST, filter=text)
    assert (reply.status, reply.reason) == (400, "invalid")
    assert reply.message == f"Invalid value for field 'filter': '{text}'. Invalid list filter expression."


def test_pages(gce: Gce) -> None:
    for number in range(7):
        gce.instance(f"node-{number}", ZONES[number % 3], {"role": "node"})
    query = {"filter": "labels.role=node", "maxResults": "3"}
    found: list[str] = []
    pages, token = 0, ""
    while True:
        reply = ask(gce, "GET", LIST, **query, **({"pageToken": token} if token else {}))
        found, pages, token = found + names(reply), pages + 1, reply.body.get("nextPageToken", "")
        assert set(reply.body["items"]) == {f"zones/{zone}" for zone in ZONES}
        if not token:
            break
    assert pages == 3 and sorted(found) == [f"node-{number}" for number in range(7)]
    assert gce.count() == {"compute.instances.aggregatedList": 3}


def test_a_page_may_be_short_or_empty_while_there_are_more(gce: Gce) -> None:
    gce.group("workers", 3)
    gce.page_sizes = [1, 0]
    first = ask(gce, "GET", LIST)
    second = ask(gce, "GET", LIST, pageToken=first.body["nextPageToken"])
    third = ask(gce, "GET", LIST, pageToken=second.body["nextPageToken"])
    assert [len(names(page)) for page in (first, second, third)] == [1, 0, 2]
    assert "nextPageToken" not in third.body


def test_an_instance_that_goes_between_two_pages_moves_no_other(gce: Gce) -> None:
    for number in range(4):
        gce.instance(f"node-{number}")
    first = ask(gce, "GET", LIST, maxResults="2")
    gone = next(node for node, each in gce.instances.items() if each.name == "node-0")
    gce.delete(gone)
    assert names(ask(gce, "GET", LIST, pageToken=first.body["nextPageToken"])) == ["node-2", "node-3"]


def test_a_page_token_is_for_its_own_listing(gce: Gce) -> None:
    gce.group("workers", 2, role="node")
    first = ask(gce, "GET", LIST, filter="labels.role=node", maxResults="1")
    token = first.body["nextPageToken"]
    for query in ({"pageToken": token}, {"pageToken": "junk"}):
        reply = ask(gce, "GET", LIST, **query)
        assert (reply.status, reply.reason) == (400, "invalid") and "'pageToken'" in reply.message
    reply = ask(gce, "GET", LIST, maxResults="501")
    assert (reply.status, reply.reason) == (400, "invalid") and "'500'" in reply.message


def test_a_mask_hides_the_warnings_that_it_does_not_name(gce: Gce) -> None:
    gce.group("workers", 1)
    gce.unreachables = [f"zones/{ZONES[2]}"]
    gce.warning = standin_gce.warning("PARTIAL_SUCCESS", "Some results are missing.")
    gce.scope_warnings = {f"zones/{ZONES[1]}": standin_gce.warning("UNREACHABLE", "Not now.")}
    seen = ask(gce, "GET", LIST, fields="items/*(instances/name,warning/code),unreachables,warning/code").body
    assert seen["unreachables"] == [f"zones/{ZONES[2]}"] and seen["warning"] == {"code": "PARTIAL_SUCCESS"}
    assert seen["items"][f"zones/{ZONES[1]}"] == {"warning": {"code": "UNREACHABLE"}}
    blind = ask(gce, "GET", LIST, fields="items/*/instances/name,nextPageToken").body
    assert set(blind) == {"items"} and blind["items"][f"zones/{ZONES[1]}"] == {}


def test_the_instances_of_an_unreachable_zone_are_not_listed(gce: Gce) -> None:
    gce.instance("seen")
    gce.instance("lost", ZONES[1])
    gce.unreachables = [f"zones/{ZONES[1]}"]
    assert names(ask(gce, "GET", LIST)) == ["seen"]
    gce.unreachables = []
    assert sorted(names(ask(gce, "GET", LIST))) == ["lost", "seen"]


def test_thousands_of_instances(gce: Gce) -> None:
    for number in range(4):
        gce.group(f"workers-{number}", 500, zone=ZONES[number % 3], role="node")
    found: set[str] = set()
    token = ""
    fields = "items/*/instances(id,name,zone,status,metadata),nextPageToken,unreachables,warning"
    for _ in range(4):
        query = {"pageToken": token} if token else {}
        reply = ask(gce, "GET", LIST, fields=fields, filter="labels.role=node", **query)
        found |= set(names(reply))
        token = reply.body.get("nextPageToken", "")
    assert len(found) == 2000 and token == ""


def test_metadata_is_replaced_as_a_whole(gce: Gce) -> None:
    node = gce.instance("node-1", items={"ssh-keys": "me:ssh-rsa AAAA me\n", "startup-script": "#!/bin/sh"})
    read = ask(gce, "GET", at(gce, node)).body["metadata"]
    body = {"fingerprint": read["fingerprint"], "items": [{"key": "only", "value": "this"}]}
    operation = ask(gce, "POST", f"{at(gce, node)}/setMetadata", body)
    assert operation.status == 200 and operation.body["status"] == "RUNNING"
    assert operation.body["operationType"] == "setMetadata" and operation.body["targetId"] == node
    assert wait(gce, operation).body["status"] == "DONE"
    assert gce.metadata(node) == {"only": "this"}
    assert ask(gce, "GET", at(gce, node)).body["metadata"]["fingerprint"] != read["fingerprint"]


@pytest.mark.parametrize("fingerprint", ["AAAAAAAAAAA=", None])
def test_a_fingerprint_that_is_stale_or_missing(gce: Gce, fingerprint: str | None) -> None:
    node = gce.instance("node-1")
    body: dict[str, Any] = {"items": [], **({"fingerprint": fingerprint} if fingerprint else {})}
    reply = ask(gce, "POST", f"{at(gce, node)}/setMetadata", body)
    assert (reply.status, reply.reason) == (412, "conditionNotMet")
    assert reply.message == "Supplied fingerprint does not match current metadata fingerprint."
    assert gce.metadata(node) == {"enable-guest-attributes": "TRUE"} and not gce.operations


def test_an_operators_change_makes_a_fingerprint_stale_even_when_it_is_undone(gce: Gce) -> None:
    node = gce.instance("node-1")
    read = ask(gce, "GET", at(gce, node)).body["metadata"]
    gce.set_metadata(node, "a", "b")
    gce.delete_metadata(node, "a")
    again = ask(gce, "GET", at(gce, node)).body["metadata"]
    assert again["items"] == read["items"] and again["fingerprint"] != read["fingerprint"]


@pytest.mark.parametrize("items", [
    [{"key": "a", "value": "1"}, {"key": "a", "value": "2"}], [{"value": "no key"}],
    [{"key": "a", "value": "x" * (256 * 1024 + 1)}],
    [{"key": f"k{n}", "value": "x" * 200_000} for n in range(3)],
], ids=["twice", "no key", "a value too large", "too large together"])
def test_items_that_cannot_be(gce: Gce, items: list[dict[str, str]]) -> None:
    node = gce.instance("node-1")
    fingerprint = ask(gce, "GET", at(gce, node)).body["metadata"]["fingerprint"]
    body = {"fingerprint": fingerprint, "items": items}
    reply = ask(gce, "POST", f"{at(gce, node)}/setMetadata", body)
    assert (reply.status, reply.reason) == (400, "invalid")


def test_a_change_is_seen_when_its_operation_is_done(gce: Gce) -> None:
    node = gce.instance("node-1")
    gce.operation(pending=2)
    operation = set_item(gce, node, "a", "b")
    assert "a" not in gce.metadata(node)
    busy = set_item(gce, node, "c", "d")
    assert (busy.status, busy.reason) == (400, "resourceNotReady")
    assert [wait(gce, operation).body["status"] for _ in range(2)] == ["RUNNING", "RUNNING"]
    assert "a" not in gce.metadata(node)
    done = wait(gce, operation).body
    assert done["status"] == "DONE" and "endTime" in done and gce.metadata(node)["a"] == "b"
    path = f"zones/{ZONES[0]}/operations/"
    assert ask(gce, "GET", path + done["name"]).body == ask(gce, "GET", path + done["id"]).body == done
    assert ask(gce, "GET", f"zones/{ZONES[1]}/operations/{done['name']}").status == 404


def test_a_change_comes_without_anybody_waiting_for_it(gce: Gce) -> None:
    node, other = gce.instance("node-1"), gce.instance("node-2")
    assert set_item(gce, node, "a", "b").body["status"] == "RUNNING"
    assert gce.metadata(node)["a"] == "b"
    gce.operation(pending=1)
    set_item(gce, other, "a", "b")
    gce.settle()
    assert gce.metadata(other)["a"] == "b"


def test_an_operation_that_fails_changes_nothing(gce: Gce) -> None:
    node = gce.instance("node-1")
    gce.operation(error=("RESOURCE_OPERATION_RATE_EXCEEDED", "Too fast."))
    done = wait(gce, set_item(gce, node, "a", "b")).body
    assert done["status"] == "DONE" and done["httpErrorStatusCode"] == 400
    assert done["error"] == {"errors": [{"code": "RESOURCE_OPERATION_RATE_EXCEEDED", "message": "Too fast."}]}
    assert "a" not in gce.metadata(node)
    assert "error" not in wait(gce, set_item(gce, node, "a", "b")).body and gce.metadata(node)["a"] == "b"


def test_an_operators_change_while_an_operation_runs_is_not_lost(gce: Gce) -> None:
    node = gce.instance("node-1")
    gce.operation(pending=1)
    operation = set_item(gce, node, "a", "b")
    gce.set_metadata(node, "ssh-keys", "me:ssh-rsa AAAA me")
    wait(gce, operation)
    done = wait(gce, operation).body
    assert done["error"]["errors"][0]["code"] == "CONDITION_NOT_MET" and done["httpErrorStatusCode"] == 412
    assert set(gce.metadata(node)) == {"enable-guest-attributes", "ssh-keys"}


def test_an_instance_that_goes_before_its_operation_is_done(gce: Gce) -> None:
    node = gce.instance("node-1")
    gce.operation(pending=1)
    operation = set_item(gce, node, "a", "b")
    gce.delete(node)
    wait(gce, operation)
    assert wait(gce, operation).body["error"]["errors"][0]["code"] == "RESOURCE_NOT_FOUND"


def test_one_may_act_only_for_instances_whose_account_one_may_act_as(gce: Gce) -> None:
    node = gce.instance("node-1", account=NODE_ACCOUNT)
    (error,) = wait(gce, set_item(gce, node, "a", "b")).body["error"]["errors"]
    assert error["code"] == "SERVICE_ACCOUNT_ACCESS_DENIED" and "a" not in gce.metadata(node)
    gce.allow(ACT_AS)
    assert "error" not in wait(gce, set_item(gce, node, "a", "b")).body and gce.metadata(node)["a"] == "b"


def test_the_same_request_id_is_the_same_request(gce: Gce) -> None:
    node = gce.instance("node-1")
    key = "7e1bd6f2-8d1c-4b5e-9a57-5b2f8c3d4e5f"
    first = set_item(gce, node, "a", "1", requestId=key)
    again = set_item(gce, node, "a", "2", requestId=key)
    assert again.body["name"] == first.body["name"] and gce.metadata(node)["a"] == "1"
    for wrong in ("1", "00000000-0000-0000-0000-000000000000"):
        reply = set_item(gce, node, "a", "2", requestId=wrong)
        assert (reply.status, reply.reason) == (400, "invalid") and "UUID" in reply.message


def test_guest_attributes_through_the_api(gce: Gce) -> None:
    node = gce.instance("node-1")
    path = f"{at(gce, node)}/getGuestAttributes"
    none = ask(gce, "GET", path, queryPath="keto/token")
    assert (none.status, none.reason) == (404, "notFound")
    assert none.message == "The resource 'keto/token' of type 'Guest Attribute' was not found."
    gce.set_guest_attribute(node, "keto", "token", "Success")
    gce.set_guest_attribute(node, "keto", "when", "now")
    gce.set_guest_attribute(node, "hostkeys", "ssh-rsa", "AAAA")
    found = ask(gce, "GET", path, queryPath="keto/token").body
    entry = {"namespace": "keto", "key": "token", "value": "Success"}
    assert found["queryPath"] == "keto/token" and found["queryValue"] == {"items": [entry]}
    whole = ask(gce, "GET", path, queryPath="keto/").body["queryValue"]["items"]
    assert [item["key"] for item in whole] == ["token", "when"]
    assert ask(gce, "GET", path, queryPath="other/").status == 404
    gce.set_metadata(node, "enable-guest-attributes", "FALSE")
    assert ask(gce, "GET", path, queryPath="keto/token").status == 403


def test_permissions_of_ones_own(gce: Gce) -> None:
    node = gce.instance("node-1")
    asked = {"permissions": [*sorted(ROLE), ACT_AS]}
    path = f"{at(gce, node)}/testIamPermissions"
    assert ask(gce, "POST", path, asked).body == {"permissions": sorted(ROLE)}
    assert ask(gce, "POST", path, asked, token=gce.issue(NODE_ACCOUNT)).body == {}
    assert ask(gce, "POST", f"zones/{ZONES[0]}/instances/none/testIamPermissions", asked).status == 404


@pytest.mark.parametrize(("permission", "method", "path", "resource"), [
    ("compute.instances.list", "GET", "aggregated/instances", ""),
    ("compute.instances.get", "GET", "zones/{zone}/instances/node-1", "/zones/{zone}/instances/node-1"),
    ("compute.instances.setMetadata", "POST", "zones/{zone}/instances/node-1/setMetadata",
     "/zones/{zone}/instances/node-1"),
    ("compute.instances.getGuestAttributes", "GET", "zones/{zone}/instances/node-1/getGuestAttributes",
     "/zones/{zone}/instances/node-1"),
    ("compute.zoneOperations.get", "POST", "zones/{zone}/operations/operation-1/wait",
     "/zones/{zone}/operations/operation-1"),
])
def test_a_permission_that_is_missing(
    gce: Gce, permission: str, method: str, path: str, resource: str
) -> None:
    gce.instance("node-1")
    gce.deny(permission)
    body: dict[str, Any] | None = {"items": []} if path.endswith("setMetadata") else None
    reply = ask(gce, method, path.format(zone=ZONES[0]), body)
    assert (reply.status, reply.reason) == (403, "forbidden")
    wanted = f"projects/keto-test{resource.format(zone=ZONES[0])}"
    assert reply.message == f"Required '{permission}' permission for '{wanted}'"


def test_a_token_is_needed(gce: Gce) -> None:
    missing, wrong = ask(gce, "GET", LIST, token=""), ask(gce, "GET", LIST, token="ya29.other")
    assert (missing.status, missing.reason, wrong.status, wrong.reason) == (401, "required", 401, "authError")
    assert missing.body["error"]["status"] == "UNAUTHENTICATED"
    assert "Bearer" in wrong.headers["WWW-Authenticate"]
    gce.expire_tokens()
    assert ask(gce, "GET", LIST).status == 401


@pytest.mark.parametrize(("answer", "status", "reason"), [
    (standin_gce.too_many_requests(), 429, "rateLimitExceeded"),
    (standin_gce.rate_limited(), 403, "rateLimitExceeded"),
    (standin_gce.quota_exceeded(), 403, "quotaExceeded"),
    (standin_gce.insufficient_scopes(), 403, "insufficientPermissions"),
    (standin_gce.internal_error(), 500, "backendError"),
    (standin_gce.unavailable(), 503, "backendError"),
    (standin_gce.refusal(403, "accessNotConfigured", "not used before"), 403, "accessNotConfigured"),
])
def test_faults(gce: Gce, answer: standin_gce.Answer, status: int, reason: str) -> None:
    node = gce.instance("node-1")
    gce.fail("compute.instances.get", answer, times=2)
    for _ in range(2):
        reply = ask(gce, "GET", at(gce, node))
        assert (reply.status, reply.reason) == (status, reason)
    assert ask(gce, "GET", at(gce, node)).status == 200
    assert gce.count() == {"compute.instances.get": 3}


def test_a_fault_before_has_no_effect_and_one_after_has_it(gce: Gce) -> None:
    node = gce.instance("node-1")
    gce.fail("compute.instances.setMetadata", standin_gce.unavailable())
    assert set_item(gce, node, "a", "b").status == 503 and "a" not in gce.metadata(node)
    gce.fail("compute.instances.setMetadata", standin_gce.unavailable(), after=True)
    assert set_item(gce, node, "a", "b").status == 503 and gce.metadata(node)["a"] == "b"


def test_a_connection_that_drops_and_an_answer_that_is_junk(gce: Gce) -> None:
    gce.fail("", standin_gce.dropped, after=True)
    with pytest.raises(urllib3.exceptions.ProtocolError):
        ask(gce, "GET", LIST)
    gce.fail("", standin_gce.junk)
    assert ask(gce, "GET", LIST).body == "<html>It works!</html>"


@pytest.mark.parametrize(("method", "path", "body", "query", "why"), [
    ("GET", "aggregated/instances", None, {"returnPartialSuccess": "true"}, "returnPartialSuccess"),
    ("GET", "aggregated/instances", None, {"orderBy": "name"}, "does not have orderBy"),
    ("GET", "aggregated/instances", None, {"fields": "items/instances"}, "fields"),
    ("GET", "zones/europe-west1-b/instances", None, {}, "does not have compute.instances.list"),
    ("POST", "zones/europe-west1-b/instances/node-1/setMetadata", {"item": []}, {}, "'item'"),
    ("GET", "/nothing", None, {}, "0 methods"),
])
def test_what_the_contract_does_not_allow_is_remembered(
    gce: Gce, method: str, path: str, body: Any, query: dict[str, str], why: str
) -> None:
    reply = ask(gce, method, path, body, **query)
    assert reply.status == 500 and reply.reason == "violation"
    (violation,) = gce.violations
    assert why in violation and why in reply.message
    gce.violations.clear()


@pytest.mark.parametrize(("lines", "why"), [
    ([f"POST {WAIT} HTTP/1.1"], "411"),
    ([f"POST {ONE}/setMetadata HTTP/1.1", "Content-Length: 2", "Content-Type: text/plain"], "text/plain"),
    ([f"POST {ONE}/setMetadata HTTP/1.1", "Content-Length: 2"], "Content-Type is missing"),
    (["POST /v1/token?scope=a HTTP/1.1", "Content-Length: 0"], "scope"),
])
def test_requests_that_google_would_not_understand(gce: Gce, lines: list[str], why: str) -> None:
    host, port = gce.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        sent = [*lines, f"Host: {host}", f"Authorization: Bearer {SERVER_TOKEN}", "Connection: close"]
        connection.sendall("\r\n".join([*sent, "", "{}"]).encode())
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 500 ") and why in gce.violations.pop()


def test_an_answer_that_google_would_not_give_is_remembered(gce: Gce) -> None:
    node = gce.instance("node-1", status="RUNNIN")
    assert ask(gce, "GET", at(gce, node)).status == 500
    assert "RUNNIN" in gce.violations[0]
    gce.violations.clear()


# ---------------------------------------------------------------------------------------------
# The metadata server
# ---------------------------------------------------------------------------------------------

FLAVOR = {"Metadata-Flavor": "Google"}


def look(
    gce: Gce, node: str, path: str, method: str = "GET", body: str | None = None,
    headers: dict[str, str] | None = None,
) -> urllib3.BaseHTTPResponse:
    """A request to the metadata server, as an instance makes it."""
    url = f"http://{gce.metadata_host(node)}{path if path.startswith('/') else '/computeMetadata/v1/' + path}"
    sent = FLAVOR if headers is None else headers
    return urllib3.request(method, url, body=body, headers=sent, retries=False, redirect=False)


def text(gce: Gce, node: str, path: str) -> str:
    reply = look(gce, node, path)
    assert reply.status == 200 and reply.headers["Metadata-Flavor"] == "Google" and reply.headers["ETag"]
    return reply.data.decode()


def test_each_instance_sees_itself(gce: Gce) -> None:
    one, two = gce.group("workers", 2, zone=ZONES[1])
    for node in (one, two):
        assert text(gce, node, "instance/id") == node
        assert text(gce, node, "instance/name") == gce.instances[node].name
        assert text(gce, node, "instance/zone") == f"projects/123456789012/zones/{ZONES[1]}"
        assert text(gce, node, "project/project-id") == "keto-test"
        assert text(gce, node, "project/numeric-project-id") == "123456789012"
    assert gce.metadata_host(one) == gce.metadata_host(one) != gce.metadata_host(two)
    assert gce.node_environment(one) == {"GCE_METADATA_HOST": gce.metadata_host(one)}
    assert (one, "GET /computeMetadata/v1/instance/id") in gce.asked


def test_folders(gce: Gce) -> None:
    node = gce.instance("node-1", items={"b": "2", "a": "1"}, account=NODE_ACCOUNT)
    assert text(gce, node, "/") == "computeMetadata/\n"
    assert text(gce, node, "") == "instance/\nproject/\n"
    assert text(gce, node, "instance/attributes/") == "a\nb\nenable-guest-attributes\n"
    assert "service-accounts/\n" in text(gce, node, "instance/")
    attributes = {"a": "1", "b": "2", "enable-guest-attributes": "TRUE"}
    for path in ("instance/attributes/?recursive=true", "instance/attributes?recursive=True&alt=json"):
        assert json.loads(text(gce, node, path)) == attributes
    whole = json.loads(text(gce, node, "instance/?recursive=true"))
    assert whole["id"] == int(node) and whole["attributes"] == attributes
    assert whole["serviceAccounts"]["default"]["email"] == NODE_ACCOUNT
    assert json.loads(text(gce, node, "instance/attributes/a?alt=json")) == "1"


@pytest.mark.parametrize(("path", "status"), [
    ("instance/attributes/none", 404), ("instance/nothing", 404), ("instance/id/", 404), ("elsewhere/", 404),
    ("/computeMetadata/v2/instance/id", 404), ("instance/attributes/enable%2Dguest%2Dattributes", 404),
    ("instance", 301), ("instance/attributes", 301), ("instance/attributes/?alt=json", 400),
    ("instance/attributes/?wait_for_change=true", 400),
    ("instance/service-accounts/default/token?wait_for_change=true", 400),
    ("instance/id?wait_for_change=true&timeout_sec=0.5", 400),
    ("instance/attributes/none?wait_for_change=true", 404),
])
def test_what_the_metadata_server_refuses(gce: Gce, path: str, status: int) -> None:
    node = gce.instance("node-1", account=NODE_ACCOUNT)
    reply = look(gce, node, path)
    assert reply.status == status and reply.headers["Metadata-Flavor"] == "Google"
    if status == 301:
        assert reply.headers["Location"].endswith("/")


@pytest.mark.parametrize("headers", [
    {}, {"Metadata-Flavor": "google"}, {**FLAVOR, "X-Forwarded-For": "10.0.0.1"}
])
def test_a_request_has_the_flavor_and_came_through_no_proxy(gce: Gce, headers: dict[str, str]) -> None:
    node = gce.instance("node-1")
    assert look(gce, node, "instance/id", headers=headers).status == 403
    put = look(gce, node, "instance/guest-attributes/a/b", "PUT", "c", headers=headers)
    assert put.status == 403 and gce.guest_attribute(node, "a", "b") is None


def test_faults_of_the_metadata_server(gce: Gce) -> None:
    node = gce.instance("node-1")
    gce.metadata_faults = [503, 500]
    assert [look(gce, node, "instance/id").status for _ in range(3)] == [503, 500, 200]


def test_the_metadata_server_of_an_instance_that_is_gone(gce: Gce) -> None:
    node = gce.instance("node-1", group="workers", items={"token": "a"}, guest_attributes=False)
    gce.metadata_host(node)
    new = gce.recreate(node)
    assert new != node and gce.instances[new].name == "node-1" and text(gce, new, "instance/id") == new
    assert gce.metadata(new) == {"created-by": gce.metadata(new)["created-by"]}
    with pytest.raises(urllib3.exceptions.ProtocolError):
        look(gce, node, "instance/id")


class Waiting(threading.Thread):
    """A request that waits for a change, in a thread of its own."""

    def __init__(self, gce: Gce, node: str, path: str) -> None:
        super().__init__(daemon=True)
        self.gce, self.node, self.path = gce, node, path
        before = len(gce.asked)
        self.start()
        wait_for(lambda: len(gce.asked) > before)

    def run(self) -> None:
        with contextlib.suppress(urllib3.exceptions.ProtocolError):  # nobody answers: there is no reply
            self.reply = look(self.gce, self.node, self.path)

    def result(self) -> tuple[int, str]:
        """What it was answered, when it was."""
        self.join(20.0)
        assert not self.is_alive()
        return self.reply.status, self.reply.data.decode()


FOREVER = "wait_for_change=true&timeout_sec=3600"  # a test that waits this long has failed


def test_a_wait_ends_with_the_change(gce: Gce) -> None:
    node = gce.instance("node-1", items={"token": "old", "other": "x"})
    etag = look(gce, node, "instance/attributes/token").headers["ETag"]
    waiting = Waiting(gce, node, f"instance/attributes/token?{FOREVER}&last_etag={etag}")
    gce.set_metadata(node, "other", "y")
    assert waiting.is_alive()
    gce.set_metadata(node, "token", "new")
    assert waiting.result() == (200, "new")
    assert waiting.reply.headers["ETag"] not in ("", "0", etag)


def test_a_wait_on_a_folder_ends_with_a_change_through_the_api(gce: Gce) -> None:
    node = gce.instance("node-1", guest_attributes=False)
    folder = "instance/attributes/?recursive=true"
    etag = look(gce, node, folder).headers["ETag"]
    waiting = Waiting(gce, node, f"{folder}&{FOREVER}&last_etag={etag}")
    gce.operation(pending=1)
    operation = set_item(gce, node, "token", "new")
    wait(gce, operation)
    assert waiting.is_alive()
    wait(gce, operation)
    status, content = waiting.result()
    assert (status, json.loads(content)) == (200, {"token": "new"})


def test_a_wait_for_a_value_that_differs_already_is_none(gce: Gce) -> None:
    node = gce.instance("node-1", items={"token": "new"})
    etag = look(gce, node, "instance/attributes/token").headers["ETag"]
    for last in ("0", "0123456789abcdef"):
        assert text(gce, node, f"instance/attributes/token?{FOREVER}&last_etag={last}") == "new"
    for seconds in (0, 1):
        path = f"instance/attributes/token?wait_for_change=true&timeout_sec={seconds}&last_etag={etag}"
        waited = look(gce, node, path)
        assert (waited.status, waited.data, waited.headers["ETag"]) == (200, b"new", etag)


def test_an_etag_comes_back_with_its_value(gce: Gce) -> None:
    node = gce.instance("node-1", items={"token": "a"})
    etags = []
    for value in ("b", "a"):
        etags.append(look(gce, node, "instance/attributes/token").headers["ETag"])
        gce.set_metadata(node, "token", value)
    etags.append(look(gce, node, "instance/attributes/token").headers["ETag"])
    assert etags[0] == etags[2] != etags[1]


def test_a_wait_for_a_value_that_is_deleted_and_on_an_instance_that_is(gce: Gce) -> None:
    node = gce.instance("node-1", items={"token": "a"})
    waiting = Waiting(gce, node, f"instance/attributes/token?{FOREVER}")
    gce.delete_metadata(node, "token")
    assert waiting.result()[0] == 404
    waiting = Waiting(gce, node, f"instance/attributes/?recursive=true&{FOREVER}")
    gce.reset()
    waiting.join(20.0)
    assert not waiting.is_alive() and not hasattr(waiting, "reply")


def test_guest_attributes_on_the_instance(gce: Gce) -> None:
    node = gce.instance("node-1")
    path = "instance/guest-attributes/keto/token"
    assert look(gce, node, path).status == 404
    put = look(gce, node, path, "PUT", "Success")
    assert (put.status, put.data) == (200, b"") and text(gce, node, path) == "Success"
    assert gce.guest_attribute(node, "keto", "token") == "Success"
    assert text(gce, node, "instance/guest-attributes/") == "keto/\n"
    assert look(gce, node, path, "DELETE").status == 200
    assert gce.guest_attribute(node, "keto", "token") is None
    assert look(gce, node, path, "DELETE").status == 404
    assert look(gce, node, "instance/guest-attributes/keto", "PUT", "x").status == 400
    assert look(gce, node, "instance/attributes/token", "PUT", "x").status == 405
    assert look(gce, node, path, "POST", "x").status == 405


def test_guest_attributes_where_they_are_off(gce: Gce) -> None:
    node = gce.instance("node-1", guest_attributes=False)
    for method, body in (("GET", None), ("PUT", "Success"), ("DELETE", None)):
        reply = look(gce, node, "instance/guest-attributes/keto/token", method, body)
        assert (reply.status, reply.data) == (403, b"Guest attributes endpoint access is disabled.")
    assert gce.guest_attribute(node, "keto", "token") is None


def test_the_token_of_an_instance_is_good_for_the_api(gce: Gce) -> None:
    master, node = gce.instance("master", account=SERVER_ACCOUNT), gce.instance("node", account=NODE_ACCOUNT)
    found = json.loads(text(gce, master, "instance/service-accounts/default/token"))
    assert found["token_type"] == "Bearer" and found["expires_in"] == 3599
    assert text(gce, master, "instance/service-accounts/default/email") == SERVER_ACCOUNT
    assert ask(gce, "GET", LIST, token=found["access_token"]).status == 200
    poor = json.loads(text(gce, node, "instance/service-accounts/default/token"))["access_token"]
    assert ask(gce, "GET", LIST, token=poor).status == 403
    bare = gce.instance("bare")
    assert look(gce, bare, "instance/service-accounts/default/token").status == 404


# ---------------------------------------------------------------------------------------------
# The token service
# ---------------------------------------------------------------------------------------------


def form(gce: Gce, folder: Path, **changes: str) -> dict[str, str]:
    """The exchange of a subject token, as RFC 8693 has it."""
    config = json.loads((folder / "credentials.json").read_text())
    fields = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange", "audience": config["audience"],
        "scope": "https://www.googleapis.com/auth/cloud-platform",
        "requested_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "subject_token": Path(config["credential_source"]["file"]).read_text(),
        "subject_token_type": config["subject_token_type"],
    }
    return {**fields, **changes}


def exchange(gce: Gce, fields: dict[str, str]) -> Reply:
    url, kind = f"{gce.url}/v1/token", {"Content-Type": "application/x-www-form-urlencoded"}
    reply = urllib3.request("POST", url, body=urllib.parse.urlencode(fields), headers=kind, retries=False)
    return Reply(reply.status, reply.json(), reply.headers)


def test_an_outside_identity_gets_a_token(gce: Gce, tmp_path: Path) -> None:
    config = json.loads(gce.external_account(tmp_path).read_text())
    assert config["type"] == "external_account" and config["token_url"] == f"{gce.url}/v1/token"
    reply = exchange(gce, form(gce, tmp_path))
    assert reply.status == 200 and reply.body["token_type"] == "Bearer" and reply.body["expires_in"] == 3599
    assert ask(gce, "GET", LIST, token=reply.body["access_token"]).status == 200
    fields = {k.split("_")[0] + "".join(w.title() for w in k.split("_")[1:]): v
              for k, v in form(gce, tmp_path).items()}
    assert ask(gce, "POST", "/v1/token", fields, token="").status == 200
    assert gce.count()[standin_gce.STS] == 2


def test_an_outside_identity_that_acts_for_an_account(gce: Gce, tmp_path: Path) -> None:
    config = json.loads(gce.external_account(tmp_path, impersonate=True).read_text())
    federated = exchange(gce, form(gce, tmp_path)).body["access_token"]
    assert ask(gce, "GET", LIST, token=federated).status == 403
    path = config["service_account_impersonation_url"].removeprefix(gce.url)
    body = {"scope": ["https://www.googleapis.com/auth/compute"], "lifetime": "3600s"}
    made = ask(gce, "POST", path, body, token=federated)
    assert made.status == 200 and made.body["expireTime"].endswith("Z")
    assert ask(gce, "GET", LIST, token=made.body["accessToken"]).status == 200
    refused = ask(gce, "POST", path, body, token=gce.issue(NODE_ACCOUNT))
    assert refused.status == 403 and refused.body["error"]["status"] == "PERMISSION_DENIED"
    assert "errors" not in refused.body["error"]
    assert ask(gce, "POST", path, {**body, "lifetime": "7200s"}, token=federated).status == 400
    assert ask(gce, "POST", path, body, token="ya29.other").status == 401


@pytest.mark.parametrize(("changes", "code"), [
    ({"subject_token": "expired"}, "invalid_grant"),
    ({"audience": "//iam.googleapis.com/x"}, "invalid_target"),
    ({"grant_type": "password"}, "unsupported_grant_type"),
    ({"scope": ""}, "invalid_request"),
    ({"subject_token_type": "urn:x"}, "invalid_request"),
    ({"requested_token_type": "urn:x"}, "invalid_request"),
])
def test_an_exchange_that_is_refused(gce: Gce, tmp_path: Path, changes: dict[str, str], code: str) -> None:
    gce.external_account(tmp_path)
    reply = exchange(gce, form(gce, tmp_path, **changes))
    assert reply.status == 400 and reply.body["error"] == code and reply.body["error_description"]


def test_an_exchange_that_the_contract_does_not_allow(gce: Gce, tmp_path: Path) -> None:
    gce.external_account(tmp_path)
    assert exchange(gce, form(gce, tmp_path, token="x")).status == 500
    assert ask(gce, "POST", "/v1/token", {}).status == 500  # with an Authorization header
    assert "'token'" in gce.violations[0] and "Authorization" in gce.violations[1]
    gce.violations.clear()


def test_the_environment_of_a_server(gce: Gce) -> None:
    environ = gce.environment()
    base = environ["CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE"].removeprefix(gce.url)
    path = f"{base}projects/{environ['GCE_PROJECT']}/aggregated/instances"
    assert ask(gce, "GET", path, token=environ["GOOGLE_OAUTH_ACCESS_TOKEN"]).status == 200


# What Google's own libraries make of it: an independent judge of the answers, and of the checker.
GOOGLES = """
import json, sys
from google.auth import compute_engine, identity_pool
from google.auth.transport.requests import Request
from googleapiclient.discovery import build
from googleapiclient.errors import HttpError

base, project, *files = sys.argv[1:]
scopes = ["https://www.googleapis.com/auth/compute"]
outside = [identity_pool.Credentials.from_file(file, scopes=scopes) for file in files]
for credentials in [compute_engine.Credentials(), *outside]:
    credentials.refresh(Request())
    options = {"api_endpoint": base}
    compute = build("compute", "v1", credentials=credentials, client_options=options, static_discovery=True)
    instances, found = compute.instances(), []
    request = instances.aggregatedList(project=project, filter="(labels.role=node)", maxResults=2)
    while request is not None:
        page = request.execute()
        found += [each for scope in page["items"].values() for each in scope.get("instances", [])]
        request = instances.aggregatedList_next(request, page)
    where = {"project": project, "zone": found[0]["zone"].rpartition("/")[2]}
    name, metadata = found[0]["name"], found[0]["metadata"]
    body = {**metadata, "items": [*metadata["items"], {"key": f"k{len(metadata['items'])}", "value": "v"}]}
    operation = instances.setMetadata(**where, instance=name, body=body).execute()
    done = compute.zoneOperations().wait(**where, operation=operation["name"]).execute()
    statuses = []
    for call in (
        instances.setMetadata(**where, instance=name, body=body),
        instances.getGuestAttributes(**where, instance=name, queryPath="keto/token"),
    ):
        try:
            call.execute()
        except HttpError as error:
            statuses.append([error.resp.status, error.error_details[0]["reason"]])
    print(json.dumps([len(found), done["status"], statuses]))
"""


def test_googles_own_client_works_with_it(gce: Gce, tmp_path: Path) -> None:
    master = gce.instance("master", account=SERVER_ACCOUNT)
    for zone in ZONES:
        gce.group("workers", 1, zone, role="node")
    files = [str(gce.external_account(tmp_path / name, name == "acting")) for name in ("direct", "acting")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GOOGLES, f"{gce.url}/compute/v1/", gce.project, *files],
        capture_output=True, text=True, timeout=120, env=gce.node_environment(master),
    )
    expected = [3, "DONE", [[412, "conditionNotMet"], [404, "notFound"]]]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected] * 3, done.stderr
    assert gce.count()[standin_gce.STS] == 2 and gce.count()[standin_gce.IMPERSONATE] == 1
    changed = [name for node in gce.instances for name in gce.metadata(node) if name.startswith("k")]
    assert sorted(changed) == ["k2", "k3", "k4"]
