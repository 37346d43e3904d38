"""How the server reaches a cluster: kubeconfigs, exec plugins, a pod's service account, and flags."""
from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import keto_tokens
from conftest import FILTER, Program, Result
from pki import Authority
from standin_aws import Aws
from standin_kubernetes import Kubernetes

TOKEN, PAIR, NOBODY = "kubernetes-admin", "by-certificate", "system:anonymous"  # whom we are taken for
AUTH = "client.authentication.k8s.io"
V1, V1BETA1 = VERSIONS = f"{AUTH}/v1", f"{AUTH}/v1beta1"
Fields = dict[str, Any]
Texts = dict[str, str]


@dataclass
class Site:
    """A cluster, and the folder of a kubeconfig that leads to it."""

    program: Program
    aws: Aws
    api: Kubernetes
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.path = self.folder / "admin.conf"
        self.program.leaks |= {self.api.admin, "hunter2"}
        self.api.asked.clear()
        self.api.connections = 0
        for key in [key for key in self.api.objects if key[0] == "secrets"]:
            del self.api.objects[key]
        pair, other = self.api.authority.pair(PAIR, "system:masters"), Authority()
        for name, text in {
            "ca.crt": self.api.authority.pem, "other.crt": other.pem, "other.key": other.pair("x").key,
            "commented.crt": f"# Autorité de certification\n{self.api.authority.pem}",
            "admin.crt": pair.certificate, "admin.key": pair.key,
            "token": f"{self.api.admin}\n", "empty": "\n",
        }.items():
            (self.folder / name).write_text(text)

    def filled(self, value: Any) -> Any:
        """With $NAME for the text of a file and @NAME for its base64; fields that are None are left out."""
        if isinstance(value, dict):
            return {key: self.filled(each) for key, each in value.items() if each is not None}
        if isinstance(value, str) and value[:1] in ("@", "$"):
            text = (self.folder / value[1:]).read_text()
            return base64.b64encode(text.encode()).decode() if value[0] == "@" else text.strip()
        return value

    def kubeconfig(self, user: Fields | None = None, cluster: Fields | None = None, **top: Any) -> str:
        """Write one whose context `here` is of the cluster `c` and the user `u`; its path."""
        trust = {"server": self.api.url, "certificate-authority-data": "@ca.crt", **(cluster or {})}
        user = {"token": "$token"} if user is None else user
        content = {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": self.filled(trust)}],
            "users": [{"name": "u", "user": self.filled(user)}],
        }
        self.path.write_text(yaml.safe_dump(self.filled({**content, **top})))
        return str(self.path)

    def plugin(self, *answers: Any, version: str = V1, script: str = "", cluster: Fields | None = None,
               **fields: Any) -> str:
        """A kubeconfig with a plugin that prints these answers in turn, then the last one for ever."""
        for number, answer in enumerate(answers, 1):
            body = {"apiVersion": version, "kind": "ExecCredential", "status": self.filled(answer)}
            text = answer if isinstance(answer, str) else json.dumps(body)
            (self.folder / f"answer{number}").write_text(text)
        path, last = self.folder / "bin" / "plugin", len(answers)
        path.parent.mkdir()
        path.write_text(
            f'#!/bin/sh\ncd {self.folder}\necho "$*/$FLAVOUR/${{EMPTY-unset}}" >> runs\n'
            f'printf %s "$KUBERNETES_EXEC_INFO" > info\n{script}\n'
            f'run=$(grep -c "" runs)\ncat answer$((run < {last} ? run : {last}))\n'
        )
        path.chmod(0o755)
        spec = {"apiVersion": version, "command": "bin/plugin", **fields}
        return self.kubeconfig({"exec": spec}, cluster)

    def runs(self) -> list[str]:
        """What the plugin was run with, each time."""
        return (self.folder / "runs").read_text().splitlines()

    def run(self, *argv: str, **environ: str) -> Result:
        """A pass of the server, told only this."""
        return self.program("server", "--once", *FILTER, *argv, **environ)

    def is_reached(self, name: str, *argv: str, **environ: str) -> Result:
        """A pass goes through, and the cluster takes us for this user."""
        result = self.run(*argv, **environ)
        assert result.code == (4 if name == NOBODY else 0), result.err
        assert {asked.user for asked in self.api.asked} == {name}
        return result

    def refuses(
        self, *argv: str, code: int = 3, says: tuple[str, ...] = (), environ: Texts | None = None
    ) -> None:
        """The server ends before it asked anybody anything, and says all this in one line."""
        result = self.run(*argv, **(environ or {}))
        assert (result.code, result.out, len(result.err.splitlines())) == (code, "", 1), result.err
        assert result.err.startswith("keto-tokens: ") and not result.err.rstrip().endswith(":")
        assert ": :" not in result.err, "a field without a name"
        for text in says:
            assert text in result.err
        assert (self.api.asked, self.aws.count()) == ([], {})


@pytest.fixture(scope="module")
def api() -> Iterator[Kubernetes]:
    with Kubernetes() as server:
        yield server


@pytest.fixture(scope="module")
def named_api() -> Iterator[Kubernetes]:
    with Kubernetes(names=("kubernetes.default",)) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kubeconfig goes, which is not the current folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)  # retries at once
    return tmp_path / "etc"


@pytest.fixture
def site(program: Program, aws: Aws, api: Kubernetes, folder: Path) -> Site:
    return Site(program, aws, api, folder)


@pytest.fixture
def named(program: Program, aws: Aws, named_api: Kubernetes, folder: Path) -> Site:
    """A site whose certificate is for kubernetes.default alone."""
    return Site(program, aws, named_api, folder)


def table(names: str, rows: dict[str, Any]) -> pytest.MarkDecorator:
    """`parametrize` with rows by their ids."""
    return pytest.mark.parametrize(names, rows.values(), ids=rows)


# --- kubeconfig ------------------------------------------------------------------------------------

CA, CERT, KEY = "certificate-authority", "client-certificate", "client-key"
EMBEDDED = {f"{CERT}-data": "@admin.crt", f"{KEY}-data": "@admin.key"}
REFERENCED = {CERT: "admin.crt", KEY: "admin.key"}
GIVEN, NO_CA, SKIP = {"token": "$token"}, {f"{CA}-data": None}, "--insecure-skip-tls-verify"
NO_CHECK = {**NO_CA, "insecure-skip-tls-verify": True}


@table("cluster, user, name", {
    "embedded CA": ({}, GIVEN, TOKEN),
    "referenced CA": ({**NO_CA, CA: "ca.crt"}, GIVEN, TOKEN),
    "CA above": ({**NO_CA, CA: "../etc/ca.crt"}, GIVEN, TOKEN),
    "CA with a comment": ({f"{CA}-data": "@commented.crt"}, GIVEN, TOKEN),
    "embedded CA first": ({CA: "missing.crt"}, GIVEN, TOKEN),
    "tokenFile": ({}, {"tokenFile": "token"}, TOKEN),
    "tokenFile first": ({}, {"tokenFile": "token", "token": "wrong"}, TOKEN),
    "embedded pair": ({}, EMBEDDED, PAIR),
    "referenced pair": ({**NO_CA, CA: "ca.crt"}, REFERENCED, PAIR),
    "embedded pair first": ({}, {**EMBEDDED, KEY: "missing.key"}, PAIR),
    "mixed pair": ({}, {f"{CERT}-data": "@admin.crt", KEY: "admin.key"}, PAIR),
    "no credential": ({}, {}, NOBODY),
})
def test_a_kubeconfig(site: Site, cluster: Fields, user: Texts, name: str) -> None:
    site.is_reached(name, "--kubeconfig", site.kubeconfig(user, cluster))


@pytest.mark.parametrize(("current", "argv", "name"), [
    ("here", [], TOKEN), ("there", [], PAIR), ("here", ["--context", "there"], PAIR),
    (None, ["--context", "there"], PAIR), ("here", ["--context", "nobody"], NOBODY), ("here", None, ""),
])
def test_contexts(site: Site, current: str | None, argv: list[str] | None, name: str) -> None:
    contexts = [
        {"name": "nobody", "context": {"cluster": "c"}},
        {"name": "here", "context": {"cluster": "c", "user": "u"}},
        {"name": "there", "context": {"cluster": "c", "user": "v"}},
    ]
    users = [{"name": "v", "user": REFERENCED}, {"name": "u", "user": {"tokenFile": "token"}}]
    top: Fields = {"contexts": contexts, "users": users, "current-context": current}
    path = site.kubeconfig(**top)
    if argv is None:
        site.refuses("--kubeconfig", path, "--context", "x", says=(path, "contexts: there is no 'x'"))
    else:
        site.is_reached(name, "--kubeconfig", path, *argv)


def rotate_token(site: Site) -> None:
    (site.folder / "token").write_text(site.api.account([("list", "", "nodes", "")], "second"))


def rotate_pair(site: Site) -> None:
    pair = site.api.authority.pair("second", "system:masters")
    (site.folder / "admin.crt").write_text(pair.certificate)
    (site.folder / "admin.key").write_text(pair.key)


@table("user, rotate", {
    "tokenFile": ({"tokenFile": "token"}, rotate_token), "pair": (REFERENCED, rotate_pair),
    "pod": (None, rotate_token),
})
def test_files_that_change_under_us(site: Site, user: Texts | None, rotate: Callable[[Site], None]) -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(site.api.port)}
    access = (keto_tokens.Kubeconfig(site.kubeconfig(user)).access() if user else
              keto_tokens.in_cluster(pod, str(site.folder)))
    cluster = keto_tokens.Cluster(access, keto_tokens.Calls())
    cluster.request("GET", "/api/v1/nodes")
    rotate(site)
    cluster.request("GET", "/api/v1/nodes")
    first, second = (asked.user for asked in site.api.asked)
    assert first in (TOKEN, PAIR) and second.rpartition(":")[2] == "second"


DEFAULT = {"tls-server-name": "kubernetes.default"}


@table("fields, argv, environ, says", {
    "its name": (DEFAULT, [], {}, ""),
    "no name": ({}, [], {}, "not trusted"),
    "another name": ({"tls-server-name": "localhost"}, [], {}, "not trusted"),
    "another CA": ({**DEFAULT, f"{CA}-data": "@other.crt"}, [], {}, "not trusted"),
    "the system's CAs": ({**DEFAULT, **NO_CA}, [], {}, "not trusted"),
    "in the system's CAs": ({**DEFAULT, **NO_CA}, [], {"SSL_CERT_FILE": "../etc/ca.crt"}, ""),
    "unverified": (NO_CHECK, [], {}, "NOT verified"),
    "unverified name": ({**NO_CHECK, "tls-server-name": "x"}, [], {}, "NOT verified"),
    "unverified by the flag": ({}, [SKIP], {}, "NOT verified"),
    "unverified by the variable": ({}, [], {"INSECURE_SKIP_TLS_VERIFY": "1"}, "NOT verified"),
})
def test_the_clusters_certificate(
    named: Site, fields: Fields, argv: list[str], environ: Texts, says: str
) -> None:
    argv = ["--kubeconfig", named.kubeconfig(None, fields), *argv]
    if says == "not trusted":
        named.refuses(*argv, says=(says,), environ=environ)
    else:
        result = named.is_reached(TOKEN, *argv, **environ)
        assert says in result.err
        assert (f"WARNING the certificate of {named.api.url} is NOT" in result.err) == bool(says)


@pytest.mark.parametrize("by_master", [True, False], ids=["--master", "kubeconfig"])
def test_secrets_are_not_sent_in_the_clear(site: Site, by_master: bool) -> None:
    url = site.api.url.replace("https:", "http:")
    argv = ["--kubeconfig", site.kubeconfig(None, {} if by_master else {"server": url})]
    argv += ["--master", url] if by_master else []
    site.refuses(*argv, code=2, says=(f"{url} is not encrypted", SKIP))
    assert site.api.connections == 0
    accepted = site.run(*argv, SKIP)
    assert (accepted.code, "NOT verified" in accepted.err) == (4, True)  # the stand-in speaks TLS only
    assert site.api.connections > 0


# --- proxies ---------------------------------------------------------------------------------------


class Tunnel(socketserver.StreamRequestHandler):
    """One CONNECT."""

    server: Proxy

    def handle(self) -> None:
        target = self.rfile.readline().split()[1].decode()
        headers = http.client.parse_headers(self.rfile)
        self.server.tunnels.append((target, headers.get("Proxy-Authorization", "")))
        with socket.create_connection(("127.0.0.1", self.server.port)) as upstream:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=self.pump, args=(upstream, self.connection), daemon=True)
            back.start()
            self.pump(self.connection, upstream)
            back.join()

    @staticmethod
    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(65536):
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)


class Proxy(socketserver.ThreadingTCPServer):
    """Leads to one cluster, whatever it is asked for: kubernetes.default then needs no DNS."""

    daemon_threads = True

    def __init__(self, port: int):
        self.port = port
        self.tunnels: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), Tunnel)


@pytest.fixture
def proxy(named_api: Kubernetes) -> Iterator[Proxy]:
    with Proxy(named_api.port) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


BASIC = "Basic " + base64.b64encode(b"me:hunter2@").decode()


@table("fields, environ, authorization", {
    "proxy-url": ({"proxy-url": "http://{}"}, {}, ""),
    "proxy-url first": ({"proxy-url": "http://{}"}, {"HTTPS_PROXY": "http://b:9", "NO_PROXY": "*"}, ""),
    "proxy-url, password": ({"proxy-url": "http://me:hunter2%40@{}"}, {}, BASIC),
    "HTTPS_PROXY": ({}, {"HTTPS_PROXY": "http://{}"}, ""),
    "HTTPS_PROXY, no scheme": ({}, {"HTTPS_PROXY": "{}"}, ""),
    "HTTPS_PROXY, password": ({}, {"HTTPS_PROXY": "http://me:hunter2%40@{}"}, BASIC),
})
def test_a_proxy(named: Site, proxy: Proxy, fields: Texts, environ: Texts, authorization: str) -> None:
    def real(values: Texts) -> Texts:
        return {key: text.replace("{}", address) for key, text in values.items()}
    address = f"127.0.0.1:{proxy.server_address[1]}"
    path = named.kubeconfig(None, {"server": "https://kubernetes.default:6443", **real(fields)})
    named.is_reached(TOKEN, "--kubeconfig", path, **real(environ))
    assert proxy.tunnels == [("kubernetes.default:6443", authorization)]


def test_the_loopback_needs_no_proxy(site: Site) -> None:
    site.is_reached(TOKEN, "--kubeconfig", site.kubeconfig(), HTTPS_PROXY="http://127.0.0.1:9")


@pytest.mark.parametrize(("url", "says"), [
    ("http://127.0.0.1:9", "cannot connect: "), ("socks5://me:hunter2@a", "no proxy of type http or https"),
])
def test_a_proxy_that_is_none(site: Site, url: str, says: str) -> None:
    site.refuses("--kubeconfig", site.kubeconfig(None, {"proxy-url": url}), says=(says,))


H, A, B = "api.example.com", "http://a:3128", "http://b:3128"


@pytest.mark.parametrize(("environ", "expected"), [
    ({}, ""), ({"HTTPS_PROXY": A}, A), ({"https_proxy": A}, A), ({"HTTP_PROXY": A}, ""),
    ({"https_proxy": A, "HTTPS_PROXY": B}, A), ({"https_proxy": "", "HTTPS_PROXY": B}, B),
    ({"HTTPS_PROXY": A, "NO_PROXY": H, "no_proxy": "example.org"}, A),
    ({"HTTPS_PROXY": A, "no_proxy": H, "NO_PROXY": "example.org"}, ""),
])
def test_the_variables_of_a_proxy(environ: Texts, expected: str) -> None:
    assert keto_tokens.proxy_for(f"https://{H}:6443", environ) == expected


@pytest.mark.parametrize(("host", "skip", "direct"), [
    (H, "", False), (H, "*", True), (H, H, True), (H, "API.Example.Com", True), (H, "x, example.com", True),
    (H, ".example.com", True), (H, "ample.com,pi.example.com", False), (H, "10.0.0.0/8", False),
    ("10.1.2.3", "192.168.0.0/16", False), ("10.1.2.3", "192.168.0.0/16, 10.0.0.0/8", True),
    ("10.1.2.3", "10.1.2.3", True), ("10.1.2.3", "10.1.2.30,10.1.2", False), ("[fd00::1]", "fd00::/8", True),
    ("[fd00::1]", "fd01::/16,10.0.0.0/8", False), ("127.0.0.1", "", True), ("127.8.9.1", "", True),
    ("[::1]", "", True), ("localhost", "", True), ("localhost.example.com", "", False),
])
def test_hosts_that_need_no_proxy(host: str, skip: str, direct: bool) -> None:
    found = keto_tokens.proxy_for(f"https://{host}:6443", {"HTTPS_PROXY": A, "NO_PROXY": skip})
    assert found == ("" if direct else A)


# --- exec plugins ----------------------------------------------------------------------------------

CERTIFIED = {"clientCertificateData": "$admin.crt", "clientKeyData": "$admin.key"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("answer", "name"), [(GIVEN, TOKEN), (CERTIFIED, PAIR)], ids=["token", "pair"])
def test_a_plugin(site: Site, version: str, answer: Texts, name: str) -> None:
    pairs = [{"name": "FLAVOUR", "value": "ours"}, {"name": "EMPTY", "value": ""}]
    path = site.plugin(answer, version=version, args=["get", "a token", "5"], env=pairs)
    site.is_reached(name, "--kubeconfig", path, FLAVOUR="theirs", EMPTY="theirs")
    assert site.runs() == ["get a token 5/ours/"]
    told = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}}
    assert json.loads((site.folder / "info").read_text()) == told


CONFIG = {"extensions": [{"name": f"{AUTH}/exec", "extension": {"audience": "us"}}]}


@table("version, fields, expected", {
    "embedded CA": (V1, {}, {f"{CA}-data": "@ca.crt"}),
    "embedded CA, v1beta1": (V1BETA1, {}, {f"{CA}-data": "@ca.crt"}),
    "referenced CA": (V1, {**NO_CA, CA: "ca.crt"}, {f"{CA}-data": "@ca.crt"}),
    "unverified": (V1, NO_CHECK, {"insecure-skip-tls-verify": True}),
    "name": (V1, {"tls-server-name": "localhost"},
             {f"{CA}-data": "@ca.crt", "tls-server-name": "localhost"}),
    "config": (V1, CONFIG, {f"{CA}-data": "@ca.crt", "config": {"audience": "us"}}),
})
def test_a_plugin_is_told_of_the_cluster(site: Site, version: str, fields: Fields, expected: Fields) -> None:
    """As client-go tells it: what is referenced comes embedded."""
    path = site.plugin(GIVEN, version=version, provideClusterInfo=True, cluster=fields)
    site.is_reached(TOKEN, "--kubeconfig", path)
    spec = json.loads((site.folder / "info").read_text())["spec"]
    assert spec == {"interactive": False, "cluster": site.filled({"server": site.api.url, **expected})}


@pytest.mark.parametrize(("command", "config"), [
    ("bin/plugin", ""), ("./bin/plugin", ""), ("../etc/bin/plugin", ""), ("{}/plugin", ""), ("plugin", ""),
    ("./plugin", "admin.conf"), ("./plugin", "../bin/admin.conf"),
])
def test_where_a_plugin_is(
    site: Site, command: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is relative to the kubeconfig, wherever that is; a mere name is looked up."""
    bin_folder = site.folder / "bin"
    path = site.plugin(GIVEN, command=command.format(bin_folder))
    environ = {"PATH": f"{bin_folder}:{os.environ['PATH']}"} if command == "plugin" else {}
    if config:
        site.path.rename(bin_folder / "admin.conf")
        monkeypatch.chdir(bin_folder)
    site.is_reached(TOKEN, "--kubeconfig", config or path, **environ)


UNKNOWN = {"token": "hunter2"}
PAST = {"expirationTimestamp": "2001-01-01T00:00:00Z"}
FUTURE = {"expirationTimestamp": "2999-01-01T00:00:00+02:00"}


@table("version, answers, code, runs", {
    "without end": (V1, [GIVEN, UNKNOWN], 0, 1),
    "not expired": (V1, [{**GIVEN, **FUTURE}, UNKNOWN], 0, 1),
    "not expired, v1beta1": (V1BETA1, [{**GIVEN, **FUTURE}, UNKNOWN], 0, 1),
    "expired": (V1, [{**GIVEN, **PAST}], 0, None),
    "expired, v1beta1": (V1BETA1, [{**GIVEN, **PAST}], 0, None),
    "expired pair": (V1, [{**CERTIFIED, **PAST}], 0, None),
    "refused, then known": (V1, [UNKNOWN, GIVEN, UNKNOWN], 0, 2),
    "refused, then a pair": (V1, [{**UNKNOWN, **FUTURE}, CERTIFIED, UNKNOWN], 0, 2),
    "refused for ever": (V1, [UNKNOWN], 3, 2),
})
def test_when_a_plugin_is_run(
    site: Site, version: str, answers: list[Any], code: int, runs: int | None
) -> None:
    """Without `runs` it is run at the start and for each request."""
    site.aws.group("compute", 1, Role="compute")
    path = site.plugin(*answers, version=version)
    result = site.run("--kubeconfig", path)
    assert (result.code, len(site.api.asked) > 1) == (code, code == 0), result.err
    assert len(site.runs()) == (runs or 1 + len(site.api.asked))
    assert (f"401: the cluster does not know the credential of kubeconfig {path}" in result.err) == bool(code)


HINT, NO_ANSWER = "Get it from https://example.com/plugin", f"printed no ExecCredential of {V1} with"
SWITCHED = json.dumps({"apiVersion": V1BETA1, "kind": "ExecCredential", "status": UNKNOWN})


@table("answer, fields, says", {
    "not found": (GIVEN, {"command": "no-such-plugin", "installHint": HINT},
                  f"no-such-plugin: No such file or directory. {HINT}"),
    "not found there": (GIVEN, {"command": "./plugin"}, "etc/plugin: No such file"),
    "long hint": (GIVEN, {"command": "no-such-plugin", "installHint": f"Two lines:\n{HINT}\n"}, HINT),
    "no program": (GIVEN, {"command": "./token"}, "etc/token: Permission denied"),
    "exit status": (GIVEN, {"script": "echo early >&2; echo too bad >&2; exit 1"}, "exit status 1: too bad"),
    "silent exit status": (GIVEN, {"script": "exit 7"}, "exit status 7"),
    "prints nothing": ("", {}, NO_ANSWER),
    "bad JSON": ('{"status": {"token": "hunter2"', {}, NO_ANSWER),
    "a list": ("[]", {}, NO_ANSWER),
    "binary": ({}, {"script": r"printf '\377\376'"}, "not text"),
    "another version": (SWITCHED, {}, NO_ANSWER),
    "no status": (None, {}, NO_ANSWER),
    "neither": ({}, {}, NO_ANSWER),
    "no key": ({**CERTIFIED, "clientKeyData": None}, {}, ""),
    "no certificate": ({**CERTIFIED, "clientCertificateData": None}, {}, ""),
    "a token of two lines": ({"token": "hunter2\nhunter2"}, {}, ""),
    "a token beyond ASCII": ({"token": "hunter2€"}, {}, ""),
    "v1alpha1": (GIVEN, {"apiVersion": f"{AUTH}/v1alpha1"}, f".apiVersion: {AUTH}/v1alpha1"),
    "no version": (GIVEN, {"apiVersion": None}, ".apiVersion: is missing"),
    "no command": (GIVEN, {"command": None}, ".command: is missing"),
    "interactive": (GIVEN, {"interactiveMode": "Always"}, ".interactiveMode: "),
    "env": (GIVEN, {"env": {"A": "b"}}, ".env: is not a list"),
    "env without a name": (GIVEN, {"env": [{"value": "b"}]}, ".env.name: is missing"),
})
def test_a_plugin_that_fails(site: Site, answer: Any, fields: Fields, says: str) -> None:
    path = site.plugin(answer, **fields)
    site.refuses("--kubeconfig", path, says=(f"{path}: users[u].user.exec", says))


# --- files that are bad ------------------------------------------------------------------------------


@table("content, name, says", {
    "not YAML": (b"clusters: [\nusers: {", "", "is not YAML (line 2)"),
    "a tab": (b"clusters:\n\t- name: c\n", "", "is not YAML (line 2)"),
    "two documents": (b"a: 1\n---\nb: 2\n", "", "is not YAML"),
    "a date that is none": (b"current-context: 2024-13-45\n", "", "is not YAML"),
    "a tag that lies": (b"current-context: !!bool x\n", "", "is not YAML"),
    "nested": (b"[" * 5000, "", "is not YAML"),
    "binary": (bytes(range(256)), "", "cannot read"),
    "zeros": (bytes(16), "", "is not YAML"),
    "empty": (b"", "", "current-context: is missing"),
    "a list": (b"- clusters\n", "", "is not a mapping"),
    "missing": (b"", "missing", "No such file or directory"),
    "a folder": (b"", ".", "Is a directory"),
    "of nobody": (b"", "~nosuchuser/config", ""),
})
def test_a_file_that_is_no_kubeconfig(site: Site, content: bytes, name: str, says: str) -> None:
    site.path.write_bytes(content)
    path = name if name.startswith("~") else str(site.folder / (name or site.path))
    site.refuses("--kubeconfig", path, says=(path, says))


def context(**fields: Any) -> Fields:
    return {"contexts": [{"name": "here", "context": fields}]}


C, U = "clusters[c].cluster", "users[u].user"
TOGETHER = f"{U}: client-certificate and client-key go together"
BAD: dict[str, tuple[Fields, str]] = {  # fields of the cluster, of the user or of the file, by their name
    "no current-context": ({"current-context": None}, "current-context: is missing"),
    "unknown context": ({"current-context": "x"}, "contexts: there is no 'x'"),
    "unknown cluster": (context(cluster="x", user="u"), "clusters: there is no 'x'"),
    "unknown user": (context(cluster="c", user="x"), "users: there is no 'x'"),
    "context without cluster": (context(user="u"), "contexts[here].context.cluster: is missing"),
    "context: []": ({"contexts": [{"name": "here", "context": []}]},
                    "contexts[here].context: is not a mapping"),
    "clusters: {}": ({"clusters": {}}, "clusters: is not a list"),
    "users: text": ({"users": "u"}, "users: is not a list"),
    "no server": ({"server": None}, f"{C}.server: is missing"),
    "server: 5": ({"server": 5}, f"{C}.server: is not a string"),
    "server: host": ({"server": "api.example.com"}, "server: 'api.example.com' is not a URL"),
    "server: ftp": ({"server": "ftp://a"}, "server: 'ftp://a' is not a URL"),
    "server: port": ({"server": "https://a:b"}, "server: "),
    "CA: no base64": ({f"{CA}-data": "%%%"}, f"{C}.{CA}-data: is not base64"),
    "CA: no text": ({f"{CA}-data": "//79"}, f"{C}.{CA}-data: is not base64"),
    "certificate: no base64": ({**EMBEDDED, f"{CERT}-data": "%%%"}, f"{U}.{CERT}-data: is not base64"),
    "key: no base64": ({**EMBEDDED, f"{KEY}-data": "%%%"}, f"{U}.{KEY}-data: is not base64"),
    "CA: gone": ({**NO_CA, CA: "gone"}, f"{C}.{CA} from FOLDER/gone: No such file"),
    "certificate: gone": ({**REFERENCED, CERT: "gone"}, f"{U}.{CERT} from FOLDER/gone: No such file"),
    "key: gone": ({**REFERENCED, KEY: "gone"}, f"{U}.{KEY} from FOLDER/gone: No such file"),
    "key: a folder": ({**REFERENCED, KEY: "."}, f"{U}.{KEY} from FOLDER: Is a directory"),
    "tokenFile: gone": ({"tokenFile": "gone"}, f"{U}.tokenFile from FOLDER/gone: No such file"),
    "tokenFile: empty": ({"tokenFile": "empty"}, f"{U}.tokenFile: empty"),
    "CA: no PEM": ({f"{CA}-data": "@token"}, f"{C}.{CA} holds no certificate"),
    "CA: empty": ({f"{CA}-data": "@empty"}, f"{C}.{CA} holds no certificate"),
    "CA: a key": ({**NO_CA, CA: "admin.key"}, f"{C}.{CA} holds no certificate"),
    "no key": ({CERT: "admin.crt"}, TOGETHER),
    "no certificate": ({f"{KEY}-data": "@admin.key"}, TOGETHER),
    "another's key": ({**REFERENCED, KEY: "other.key"}, "client certificate and key are no usable pair"),
    "key: no PEM": ({**REFERENCED, KEY: "token"}, "client certificate and key are no usable pair"),
    "certificate: no PEM": ({**REFERENCED, CERT: "token"}, "client certificate and key are no usable pair"),
    "auth-provider": ({"auth-provider": {"name": "gcp"}}, f"{U}.auth-provider: not supported"),
    "username": ({"username": "me"}, f"{U}.username: not supported"),
    "password": ({"password": "hunter2"}, f"{U}.password: not supported"),
    "as": ({"as": "root"}, f"{U}.as: not supported"),
    "token: 5": ({"token": 5}, f"{U}.token: is not a string"),
    "token: two lines": ({"token": "hunter2\nhunter2"}, ""),
    "token: beyond ASCII": ({"token": "hunter2€"}, ""),
    "tokenFile: 5": ({"tokenFile": 5}, f"{U}.tokenFile: is not a string"),
    "exec: text": ({"exec": "plugin"}, f"{U}.exec: is not a mapping"),
    "insecure: 'yes'": ({"insecure-skip-tls-verify": "yes"},
                        f"{C}.insecure-skip-tls-verify: is not a true or false"),
    "proxy-url: 5": ({"proxy-url": 5}, f"{C}.proxy-url: is not a string"),
}
OF_CLUSTER = {"server", CA, f"{CA}-data", "insecure-skip-tls-verify", "proxy-url", "tls-server-name"}
OF_FILE = {"current-context", "contexts", "clusters", "users"}


@table("fields, says", BAD)
def test_a_bad_field_is_named(site: Site, fields: Fields, says: str) -> None:
    cluster, top = ({key: fields[key] for key in fields if key in of} for of in (OF_CLUSTER, OF_FILE))
    user = {key: value for key, value in fields.items() if key not in OF_CLUSTER | OF_FILE}
    path = site.kubeconfig(user or None, cluster, **top)
    file = "" if "FOLDER" in says else f"kubeconfig {path}"  # there the bad file is the one referred to
    site.refuses("--kubeconfig", path, says=(file, says.replace("FOLDER", str(site.folder))))


# --- in a pod ----------------------------------------------------------------------------------------


@pytest.fixture
def pod(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose folder is the service account's."""
    monkeypatch.setattr(keto_tokens, "SERVICE_ACCOUNT", str(site.folder))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(site.api.port))
    return site


def test_a_pod(pod: Site) -> None:
    pod.is_reached(TOKEN)


@pytest.mark.parametrize("name", ["token", "ca.crt"])
@pytest.mark.parametrize("content", [None, "", "\n"], ids=["missing", "nothing in it", "an empty line"])
def test_a_pod_without_a_service_account(pod: Site, name: str, content: str | None) -> None:
    path = pod.folder / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    pod.refuses(says=(str(path),))


@pytest.mark.parametrize(("host", "port", "server"), [
    ("10.96.0.1", {"KUBERNETES_SERVICE_PORT": "6443"}, "https://10.96.0.1:6443"),
    ("10.96.0.1", {}, "https://10.96.0.1:443"),
    ("fd00::1", {"KUBERNETES_SERVICE_PORT": "443"}, "https://[fd00::1]:443"),
])
def test_where_a_pods_cluster_is(site: Site, host: str, port: Texts, server: str) -> None:
    access = keto_tokens.in_cluster({"KUBERNETES_SERVICE_HOST": host, **port}, str(site.folder))
    assert access.server == server


# --- flags and variables ------------------------------------------------------------------------------

CONF, MASTER = ["--kubeconfig", "CONF"], ["--master", "URL", "--ca-path", "DIR/ca.crt"]
BY_TOKEN, BY_FILE = [*MASTER, "--kube-token", "TOKEN"], [*MASTER, "--kube-token-file", "DIR/token"]
NOWHERE, WRONG, POD = "https://127.0.0.1:9", {"token": "wrong"}, {"KUBERNETES_SERVICE_HOST": "127.0.0.2"}


@table("cluster, user, argv, environ, name", {  # fields of the cluster and the user in CONF, flags, variables
    "KUBECONFIG": ({}, GIVEN, [], {"KUBECONFIG": "CONF"}, TOKEN),
    "a kubeconfig at home": ({}, GIVEN, ["--kubeconfig", "~/admin.conf"], {"HOME": "DIR"}, TOKEN),
    "--master over it": ({"server": NOWHERE}, GIVEN, [*CONF, "--master", "URL"], {}, TOKEN),
    "KUBE_SERVICE_URL over it": ({"server": NOWHERE}, GIVEN, CONF, {"KUBE_SERVICE_URL": "URL"}, TOKEN),
    "--master over its variable": ({}, {}, BY_FILE, {"KUBE_SERVICE_URL": NOWHERE}, TOKEN),
    "--kube-token": ({}, {}, BY_TOKEN, {}, TOKEN),
    "KUBE_SERVICE_TOKEN": ({}, {}, MASTER, {"KUBE_SERVICE_TOKEN": "TOKEN"}, TOKEN),
    "--kube-token-file": ({}, {}, BY_FILE, {}, TOKEN),
    "KUBE_SERVICE_TOKEN_FILE": ({}, {}, MASTER, {"KUBE_SERVICE_TOKEN_FILE": "DIR/token"}, TOKEN),
    "--kube-token over its variable": ({}, {}, BY_TOKEN, {"KUBE_SERVICE_TOKEN": "wrong"}, TOKEN),
    "the file over the token": ({}, {}, BY_FILE, {"KUBE_SERVICE_TOKEN": "wrong"}, TOKEN),
    "--kube-token over kubeconfig": ({}, WRONG, [*CONF, "--kube-token", "TOKEN"], {}, TOKEN),
    "--kube-token-file over a pair": ({}, REFERENCED, [*CONF, "--kube-token-file", "DIR/token"], {}, TOKEN),
    "--ca-path over kubeconfig": ({f"{CA}-data": "@other.crt"}, GIVEN, [*CONF, "--ca-path", "DIR/ca.crt"],
                                  {}, TOKEN),
    "CA_PATH over kubeconfig": (NO_CA, GIVEN, CONF, {"CA_PATH": "DIR/ca.crt"}, TOKEN),
    "kubeconfig over the pod": ({}, REFERENCED, CONF, POD, PAIR),
    "--master over the pod": ({}, {}, BY_TOKEN, POD, TOKEN),
})
def test_what_comes_first(
    site: Site, cluster: Fields, user: Texts, argv: list[str], environ: Texts, name: str
) -> None:
    def real(text: str) -> str:
        return values.get(text) or text.replace("DIR", str(site.folder))
    values = {"CONF": site.kubeconfig(user, cluster), "URL": site.api.url, "TOKEN": site.api.admin}
    site.is_reached(name, *map(real, argv), **{key: real(text) for key, text in environ.items()})


@table("argv, code, says, environ", {
    "nothing": ([], 2, ("--kubeconfig", "--master", "in a pod"), {}),
    "a token alone": (["--kube-token", "x"], 2, ("--kubeconfig", "--master"), {}),
    "a URL alone": (["--master", NOWHERE], 2, ("--kube-token", "--kubeconfig"), {}),
    "no URL": (["--master", "a:6443", "--kube-token", "x"], 2, ("--master", "a:6443"), {}),
    "no URL in the variable": ([], 2, ("KUBE_SERVICE_URL", "a:6443"), {"KUBE_SERVICE_URL": "a:6443"}),
    "no token file": (["--master", NOWHERE, "--kube-token-file", "gone"], 3, ("gone",), {}),
    "no CA file": (["--master", NOWHERE, "--ca-path", "gone"], 3, ("the cluster's CA from gone",),
                   {"KUBE_SERVICE_TOKEN": "x"}),
    "two lines": (["--master", NOWHERE], 3, (), {"KUBE_SERVICE_TOKEN": "hunter2\nX-Remote-User: root"}),
    "beyond ASCII": (["--master", NOWHERE], 3, (), {"KUBE_SERVICE_TOKEN": "hunter2€"}),
})
def test_no_way_to_a_cluster(
    site: Site, argv: list[str], code: int, says: tuple[str, ...], environ: Texts
) -> None:
    site.refuses(*argv, code=code, says=says, environ=environ)
