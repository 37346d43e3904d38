"""Google's own contract of its APIs: requests, answers and field masks held against discovery documents.

google-api-python-client brings the documents; nothing else of it is used.  A check raises Violation,
which says what is wrong and where.
"""
from __future__ import annotations

import functools
import importlib.util
import json
import re
import urllib.parse
from base64 import urlsafe_b64decode
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

COMPUTE = "compute.v1"
Schema: TypeAlias = dict[str, Any]
Mask: TypeAlias = dict[str, Any]  # name -> what is selected below it: a Mask, or None for all of it

INTEGERS = {"int32": (-2**31, 2**31 - 1), "uint32": (0, 2**32 - 1), "int64": (-2**63, 2**63 - 1),
            "uint64": (0, 2**64 - 1)}


class Violation(Exception):
    """Something that is not as the discovery document has it."""


class Call(NamedTuple):
    """A request that is in order."""

    method_id: str  # such as compute.instances.get
    path: dict[str, str]
    query: dict[str, str]


@functools.lru_cache(maxsize=None)
def document(name: str) -> dict[str, Any]:
    """A discovery document, such as compute.v1."""
    found = importlib.util.find_spec("googleapiclient")  # found, not imported: that would take long
    assert found is not None and found.submodule_search_locations, "google-api-python-client is missing"
    folder = Path(found.submodule_search_locations[0]) / "discovery_cache" / "documents"
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _walk(resource: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from resource.get("methods", {}).values()
    for inner in resource.get("resources", {}).values():
        yield from _walk(inner)


@functools.lru_cache(maxsize=None)
def methods(name: str = COMPUTE) -> dict[str, dict[str, Any]]:
    """All methods of a document by their ids."""
    return {method["id"]: method for method in _walk(document(name))}


@functools.lru_cache(maxsize=None)
def _routes(name: str) -> dict[str, list[tuple[re.Pattern[str], dict[str, Any]]]]:
    """For each HTTP method the paths that there are."""
    made: dict[str, list[tuple[re.Pattern[str], dict[str, Any]]]] = {}
    base = "/" + document(name)["servicePath"]
    for method in methods(name).values():
        parts = re.split(r"(\{\+?\w+\})", base + method["path"])
        pattern = "".join(map(_part, parts))
        made.setdefault(method["httpMethod"], []).append((re.compile(pattern), method))
    return made


def _part(part: str) -> str:
    if not part.startswith("{"):
        return re.escape(part)
    return f"(?P<{part[2:-1]}>.+)" if part[1] == "+" else f"(?P<{part[1:-1]}>[^/]+)"


def check_request(
    http_method: str, path: str, query: str = "", body: Any = None, name: str = COMPUTE
) -> Call:
    """The call that a request is: path as it is sent, query without the question mark, body from JSON."""
    method, parts = _method(http_method, path, name)
    arguments = {key: urllib.parse.unquote(value) for key, value in parts.items()}
    for key, value in arguments.items():
        _check_parameter(f"path parameter {key}", value, method["parameters"][key])
    asked = _check_query(query, method, name)
    _check_body(body, method, name)
    return Call(method["id"], arguments, asked)


def _method(http_method: str, path: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    found = [
        (method, match.groupdict())
        for pattern, method in _routes(name).get(http_method, [])
        if (match := pattern.fullmatch(path))
    ]
    if len(found) != 1:
        raise Violation(f"{http_method} {path}: {len(found)} methods of {name} are so")
    return found[0]


def _check_query(query: str, method: dict[str, Any], name: str) -> dict[str, str]:
    own = {k: v for k, v in method.get("parameters", {}).items() if v["location"] == "query"}
    known = {**document(name)["parameters"], **own}
    asked: dict[str, str] = {}
    try:
        pairs = urllib.parse.parse_qsl(query, True, strict_parsing=bool(query), errors="strict")
    except ValueError as error:
        raise Violation(f"{method['id']}: the query is malformed: {error}") from None
    for key, value in pairs:
        if key not in known:
            raise Violation(f"{method['id']} has no query parameter {key}")
        if key in asked and not known[key].get("repeated"):
            raise Violation(f"{method['id']}: query parameter {key} is there twice")
        _check_parameter(f"query parameter {key}", value, known[key])
        asked[key] = value
    for key in own:
        if own[key].get("required") and key not in asked:
            raise Violation(f"{method['id']}: query parameter {key} is missing")
    if "fields" in asked:
        check_mask(parse_mask(asked["fields"]), method["response"], name)
    return asked


def _check_body(body: Any, method: dict[str, Any], name: str) -> None:
    if "request" not in method:
        if body not in (None, {}):
            raise Violation(f"{method['id']} takes no body")
    elif not isinstance(body, dict):
        raise Violation(f"{method['id']} takes a JSON object as its body")
    else:
        check_value(body, method["request"], name, method["request"]["$ref"], method["id"])


def check_answer(method_id: str, body: Any, name: str = COMPUTE) -> None:
    """Whether a successful answer is one that the method may give."""
    method = methods(name)[method_id]
    check_value(body, method["response"], name, method["response"]["$ref"])


def _check_parameter(where: str, text: str, schema: Schema) -> None:
    """A parameter is text in the URL, whatever its type."""
    kind = schema["type"]
    if kind == "boolean":
        if text not in ("true", "false"):
            raise Violation(f"{where}: {text!r} is no boolean")
    elif kind == "integer":
        _check_integer(where, text, schema)
    elif kind == "number":
        if not re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", text):
            raise Violation(f"{where}: {text!r} is no number")
    else:
        _check_text(where, text, schema)


def _check_integer(where: str, text: str, schema: Schema) -> None:
    low, high = INTEGERS[schema["format"]]
    low, high = max(low, int(schema.get("minimum", low))), min(high, int(schema.get("maximum", high)))
    if not re.fullmatch(r"0|-?[1-9]\d*", text, re.ASCII) or not low <= int(text) <= high:
        raise Violation(f"{where}: {text!r} is no {schema['format']} from {low} to {high}")


def _check_text(where: str, text: str, schema: Schema) -> None:
    form = schema.get("format", "")
    if "enum" in schema and text not in schema["enum"]:
        raise Violation(f"{where}: {text!r} is none of {', '.join(schema['enum'])}")
    if "pattern" in schema and not re.fullmatch(schema["pattern"], text):
        raise Violation(f"{where}: {text!r} is not as {schema['pattern']}")
    if form in INTEGERS:
        _check_integer(where, text, schema)
    elif form == "byte" and not _is_base64(text):
        raise Violation(f"{where}: {text!r} is no base64")
    elif form == "google-datetime" and not _is_time(text):
        raise Violation(f"{where}: {text!r} is no RFC 3339 time")
    elif form == "google-duration" and not re.fullmatch(r"-?\d+(\.\d{1,9})?s", text):
        raise Violation(f"{where}: {text!r} is no duration")


def _is_base64(text: str) -> bool:
    try:
        urlsafe_b64decode(text.replace("+", "-").replace("/", "_").encode("ascii"))
    except ValueError:
        return False
    return bool(re.fullmatch(r"[\w+/-]*={0,2}", text, re.ASCII))


def _is_time(text: str) -> bool:
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", text):
        return False
    try:
        datetime.fromisoformat(text[:19])
    except ValueError:
        return False
    return True


def check_value(value: Any, schema: Schema, name: str, where: str, request_of: str = "") -> None:
    """Whether a JSON value is as a schema has it; in a request, also whether what it needs is there."""
    if "$ref" in schema:
        schema = document(name)["schemas"][schema["$ref"]]
    kind = schema["type"]
    if kind == "object":
        _check_object(value, schema, name, where, request_of)
    elif kind == "array":
        if not isinstance(value, list):
            raise Violation(f"{where}: {_shown(value)} is no array")
        for number, item in enumerate(value):
            check_value(item, schema["items"], name, f"{where}[{number}]", request_of)
    elif kind != "any":
        _check_scalar(value, schema, where)


def _check_object(value: Any, schema: Schema, name: str, where: str, request_of: str) -> None:
    if not isinstance(value, dict):
        raise Violation(f"{where}: {_shown(value)} is no object")
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key, item in value.items():
        inner = known.get(key, others)
        if inner is None:
            raise Violation(f"{where} has no property {key!r}")
        if item is None and request_of and name != COMPUTE:
            continue  # as if it were not there; Google's own client sends this to the newer APIs
        check_value(item, inner, name, f"{where}.{key}", request_of)
    for key, inner in known.items() if request_of else ():
        if request_of in inner.get("annotations", {}).get("required", ()) and key not in value:
            raise Violation(f"{where}: {key} is missing")


def _check_scalar(value: Any, schema: Schema, where: str) -> None:
    kind = schema["type"]
    python: tuple[type, ...] = {
        "string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float),
    }[kind]
    if not isinstance(value, python) or (isinstance(value, bool) and kind != "boolean"):
        raise Violation(f"{where}: {_shown(value)} is no {kind}")
    if isinstance(value, str):
        _check_text(where, value, schema)
    elif kind == "integer":
        _check_integer(where, str(value), schema)


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


def parse_mask(text: str) -> Mask:
    """A `fields` parameter: names with commas between, a/b for b in a, a(b,c) for several there."""
    tokens = re.findall(r"[A-Za-z0-9_$-]+|\*|.", text, re.S)
    mask = _selection(tokens, text)
    if tokens:
        raise Violation(f"fields: unexpected {tokens[0]!r} in {text!r}")
    return mask


def _selection(tokens: list[str], text: str) -> Mask:
    """Take one selection from the front of the tokens."""
    mask: Mask = {}
    while True:
        names, inner = _path(tokens, text), None
        if tokens[:1] == ["("]:
            del tokens[0]
            inner = _selection(tokens, text)
            if tokens[:1] != [")"]:
                raise Violation(f"fields: a bracket is not closed in {text!r}")
            del tokens[0]
        for each in reversed(names):
            inner = {each: inner}
        assert inner is not None
        mask = _united(mask, inner)
        if tokens[:1] != [","]:
            return mask
        del tokens[0]


def _path(tokens: list[str], text: str) -> list[str]:
    names: list[str] = []
    while True:
        if not tokens or not re.fullmatch(r"[A-Za-z0-9_$-]+|\*", tokens[0]):
            raise Violation(f"fields: a name is missing in {text!r}")
        names.append(tokens.pop(0))
        if tokens[:1] != ["/"]:
            return names
        del tokens[0]


def _united(one: Mask, other: Mask) -> Mask:
    """What either selects."""
    made = dict(one)
    for key, inner in other.items():
        if key in made:
            made[key] = None if inner is None or made[key] is None else _united(made[key], inner)
        else:
            made[key] = inner
    return made


def check_mask(mask: Mask, schema: Schema, name: str = COMPUTE) -> None:
    """Whether each name of a mask is in the schema of the answer."""
    if "$ref" in schema:
        where: str = schema["$ref"]
        schema = document(name)["schemas"][where]
    else:
        where = schema.get("id", "the answer")
    if schema["type"] == "array":  # a name below an array means that of each item
        return check_mask(mask, schema["items"], name)
    if schema["type"] != "object":
        raise Violation(f"fields: there is nothing below a {schema['type']}: {', '.join(mask)}")
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key, inner in mask.items():
        found = known.get(key, others)
        if key == "*" and found is None and inner is None:
            continue
        # The keys of a map of objects are such as zones/europe-west1-b, which a mask cannot name.
        if found is None or (key != "*" and key not in known and "$ref" in found):
            raise Violation(f"fields: {where} has no {key}")
        if inner is not None:
            check_mask(inner, found, name)
    return None


def masked(value: Any, mask: Mask | None) -> Any:
    """What a mask selects of an answer."""
    if mask is None:
        return value
    if isinstance(value, list):
        return [masked(item, mask) for item in value]
    if not isinstance(value, Mapping):
        return value
    others = mask.get("*", ...)
    chosen = {key: mask.get(key, others) for key in value}
    return {key: masked(value[key], inner) for key, inner in chosen.items() if inner is not ...}
