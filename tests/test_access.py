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
from clusters import StandinCluster
from conftest import FILTER, Result, World
from pki import Authority
from standin_kubernetes import Kubernetes

TOKEN, CERTIFICATE, NOBODY = "kubernetes-admin", "by-certificate", "system:anonymous"
NODES = "/api/v1/nodes"
AUTH = "client.authentication.k8s.io"
VERSIONS = [f"{AUTH}/v1", f"{AUTH}/v1beta1"]


@dataclass
class Site:
    """A cluster, and the folder of a kubeconfig that leads to it."""

    world: World
    api: Kubernetes
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.path = self.folder / "admin.conf"
        self.world.program.leaks.add(self.api.admin)
        pair = self.api.authority.pair(CERTIFICATE, "system:masters")
        other = Authority()
        for name, text in {
            "ca.crt": self.api.authority.pem,
            "commented.crt": f"# Autorité de certification\n{self.api.authority.pem}",
            "other.crt": other.pem,
            "admin.crt": pair.certificate,
            "admin.key": pair.key,
            "other.key": other.pair("other").key,
            "token": f"{self.api.admin}\n",
            "empty": "\n",
        }.items():
            (self.folder / name).write_text(text)

    def filled(self, value: Any) -> Any:
        """The value with @NAME for the base64 of a file, $NAME for its text; None is left out."""
        if isinstance(value, dict):
            return {key: self.filled(each) for key, each in value.items() if each is not None}
        if isinstance(value, str) and value[:1] in ("@", "$"):
            content = (self.folder / value[1:]).read_text()
            return base64.b64encode(content.encode()).decode() if value[0] == "@" else content.strip()
        return value

    def kubeconfig(self, user: Any = None, cluster: Any = None, **top: Any) -> str:
        """Write one whose context `here` is of the cluster `c` and the user `u`; its path."""
        if not isinstance(cluster, list):
            trust = {"server": self.api.url, "certificate-authority-data": "@ca.crt"}
            cluster = {**trust, **(cluster or {})}
        user = {"token": "$token"} if user is None else user
        content = {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": self.filled(cluster)}],
            "users": [{"name": "u", "user": self.filled(user)}],
            **{key.replace("_", "-"): value for key, value in top.items()},
        }
        self.path.write_text(yaml.safe_dump(self.filled(content)))
        return str(self.path)

    def plugin(self, *answers: Any, version: str = VERSIONS[0], script: str = "", cluster: Any = None,
               **fields: Any) -> str:
        """A kubeconfig with a plugin that prints these answers in turn, then the last one for ever."""
        for number, answer in enumerate(answers, 1):
            body = {"apiVersion": version, "kind": "ExecCredential", "status": self.filled(answer)}
            text = answer if isinstance(answer, str) else json.dumps(body)
            (self.folder / f"answer{number}").write_text(text)
        path = self.folder / "bin" / "plugin"
        path.parent.mkdir()
        path.write_text(
            f'#!/bin/sh\ncd {self.folder}\necho "$*/$FLAVOUR/${{EMPTY-unset}}" >> runs\n'
            f'printf %s "$KUBERNETES_EXEC_INFO" > info\n{script}\n'
            f'run=$(grep -c "" runs)\ncat answer$((run < {len(answers)} ? run : {len(answers)}))\n'
        )
        path.chmod(0o755)
        spec = {"apiVersion": version, "command": "bin/plugin", **fields}
        return self.kubeconfig({"exec": spec}, cluster)

    def runs(self) -> list[str]:
        """What the plugin was run with, each time."""
        return (self.folder / "runs").read_text().splitlines()

    def run(self, *argv: str, **environ: str) -> Result:
        """A pass of the server, told only this."""
        return self.world.program("server", "--once", *FILTER, *argv, **environ)

    def users(self) -> set[str]:
        """Whom the cluster took us for."""
        return {asked.user for asked in self.api.asked}

    def refuses(self, *argv: str, code: int = 3, says: tuple[str, ...] = (), **environ: str) -> None:
        """The server ends at once, and says all this in one line."""
        result = self.run(*argv, **environ)
        assert (result.code, result.out, len(result.err.splitlines())) == (code, "", 1), result.err
        assert result.err.startswith("keto-tokens: ")
        for text in says:
            assert text in result.err
        assert (self.api.asked, self.world.aws.count()) == ([], {})


@pytest.fixture
def site(faulty: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The cluster of `faulty`; the current folder is none of the kubeconfig's."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    assert isinstance(faulty.cluster, StandinCluster)
    return Site(faulty, faulty.cluster.api, tmp_path / "etc")


@pytest.fixture
def named(site: Site, tmp_path: Path) -> Iterator[Site]:
    """A cluster whose certificate is for kubernetes.default alone."""
    with Kubernetes(names=("kubernetes.default",)) as api:
        yield Site(site.world, api, tmp_path / "named")


# --- kubeconfig ------------------------------------------------------------------------------------

AUTHORITIES = {
    "embedded CA": {},
    "referenced CA": {"certificate-authority-data": None, "certificate-authority": "ca.crt"},
    "CA above": {"certificate-authority-data": None, "certificate-authority": "../etc/ca.crt"},
    "CA with a comment": {"certificate-authority-data": "@commented.crt"},
    "embedded CA first": {"certificate-authority": "missing.crt"},
}
EMBEDDED = {"client-certificate-data": "@admin.crt", "client-key-data": "@admin.key"}
REFERENCED = {"client-certificate": "admin.crt", "client-key": "admin.key"}
USERS: dict[str, tuple[dict[str, str], str]] = {
    "token": ({"token": "$token"}, TOKEN),
    "tokenFile": ({"tokenFile": "token"}, TOKEN),
    "tokenFile first": ({"tokenFile": "token", "token": "wrong"}, TOKEN),
    "embedded pair": (EMBEDDED, CERTIFICATE),
    "referenced pair": (REFERENCED, CERTIFICATE),
    "embedded pair first": ({**EMBEDDED, "client-key": "missing.key"}, CERTIFICATE),
    "mixed pair": ({"client-certificate-data": "@admin.crt", "client-key": "admin.key"}, CERTIFICATE),
    "no credential": ({}, NOBODY),
}


@pytest.mark.parametrize("authority", AUTHORITIES.values(), ids=AUTHORITIES)
@pytest.mark.parametrize(("user", "name"), USERS.values(), ids=USERS)
def test_a_kubeconfig(site: Site, authority: dict[str, Any], user: dict[str, str], name: str) -> None:
    result = site.run("--kubeconfig", site.kubeconfig(user, authority))
    assert result.code == (4 if name == NOBODY else 0), result.err
    assert site.users() == {name}


def test_a_kubeconfig_by_its_variable(site: Site) -> None:
    assert site.run(KUBECONFIG=site.kubeconfig()).code == 0
    assert site.users() == {TOKEN}


@pytest.mark.parametrize(("current", "argv", "name"), [
    ("here", [], TOKEN),
    ("there", [], CERTIFICATE),
    ("here", ["--context", "there"], CERTIFICATE),
    (None, ["--context", "there"], CERTIFICATE),
    ("here", ["--context", "nobody"], NOBODY),
])
def test_contexts(site: Site, current: str | None, argv: list[str], name: str) -> None:
    contexts = [
        {"name": "here", "context": {"cluster": "c", "user": "u"}},
        {"name": "there", "context": {"cluster": "c", "user": "v"}},
        {"name": "nobody", "context": {"cluster": "c"}},
    ]
    users = [{"name": "v", "user": REFERENCED}, {"name": "u", "user": {"tokenFile": "token"}}]
    path = site.kubeconfig(contexts=contexts, users=users, current_context=current)
    site.run("--kubeconfig", path, *argv)
    assert site.users() == {name}


def test_an_unknown_context_is_named(site: Site) -> None:
    path = site.kubeconfig()
    site.refuses("--kubeconfig", path, "--context", "away", says=(path, "contexts", "'away'"))


def rotate_token(site: Site) -> None:
    (site.folder / "token").write_text(site.api.account([("list", "", "nodes", "")], "second"))


def rotate_pair(site: Site) -> None:
    pair = site.api.authority.pair("second", "system:masters")
    (site.folder / "admin.crt").write_text(pair.certificate)
    (site.folder / "admin.key").write_text(pair.key)


@pytest.mark.parametrize(("user", "rotate"), [
    pytest.param({"tokenFile": "token"}, rotate_token, id="token"),
    pytest.param(REFERENCED, rotate_pair, id="pair"),
])
def test_files_that_change_under_us(
    site: Site, user: dict[str, str], rotate: Callable[[Site], None]
) -> None:
    access = keto_tokens.Kubeconfig(site.kubeconfig(user)).access()
    cluster = keto_tokens.Cluster(access, keto_tokens.Calls())
    cluster.request("GET", NODES)
    rotate(site)
    cluster.request("GET", NODES)
    assert len(site.users()) == 2 and site.api.asked[-1].user.endswith("second")


NO_CA = {"certificate-authority-data": None}
NO_CHECK = {**NO_CA, "insecure-skip-tls-verify": True}
SKIP = "--insecure-skip-tls-verify"


@pytest.mark.parametrize(("fields", "argv", "environ", "says"), [
    pytest.param({"tls-server-name": "kubernetes.default"}, [], {}, "", id="its name"),
    pytest.param({}, [], {}, "is not trusted", id="no name"),
    pytest.param({"tls-server-name": "localhost"}, [], {}, "is not trusted", id="another name"),
    pytest.param({"certificate-authority-data": "@other.crt", "tls-server-name": "kubernetes.default"},
                 [], {}, "is not trusted", id="another CA"),
    pytest.param({**NO_CA, "tls-server-name": "kubernetes.default"}, [], {}, "is not trusted",
                 id="the system's CAs"),
    pytest.param({**NO_CA, "tls-server-name": "kubernetes.default"}, [], {"SSL_CERT_FILE": "ca.crt"},
                 "", id="in the system's CAs"),
    pytest.param(NO_CHECK, [], {}, "WARNING", id="unverified"),
    pytest.param({**NO_CHECK, "tls-server-name": "x"}, [], {}, "WARNING", id="unverified name"),
    pytest.param({}, [SKIP], {}, "WARNING", id="unverified by the flag"),
    pytest.param({}, [], {"INSECURE_SKIP_TLS_VERIFY": "1"}, "WARNING", id="by the variable"),
])
def test_the_clusters_certificate(
    named: Site, fields: dict[str, Any], argv: list[str], environ: dict[str, str], says: str
) -> None:
    if "SSL_CERT_FILE" in environ:
        environ = {"SSL_CERT_FILE": str(named.folder / environ["SSL_CERT_FILE"])}
    result = named.run("--kubeconfig", named.kubeconfig(None, fields), *argv, **environ)
    refused = says == "is not trusted"
    assert (result.code, named.users()) == ((3, set()) if refused else (0, {TOKEN})), result.err
    assert says in result.err
    assert ("WARNING" in result.err and "NOT verified" in result.err) == (says == "WARNING")


@pytest.mark.parametrize("by_master", [True, False], ids=["--master", "kubeconfig"])
def test_secrets_are_not_sent_in_the_clear(site: Site, by_master: bool) -> None:
    url = site.api.url.replace("https:", "http:")
    argv = ["--kubeconfig", site.kubeconfig(None, {} if by_master else {"server": url})]
    argv += ["--master", url] if by_master else []
    site.refuses(*argv, code=2, says=(f"{url} is not encrypted", SKIP))
    assert site.api.connections == 0
    asked_for = site.run(*argv, SKIP)
    assert (asked_for.code, "NOT verified" in asked_for.err) == (4, True)  # it speaks TLS only
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
    """Leads to one cluster, whatever it is asked for: names like kubernetes.default need no DNS."""

    daemon_threads = True

    def __init__(self, port: int):
        self.port = port
        self.tunnels: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), Tunnel)


@pytest.fixture
def proxy(named: Site) -> Iterator[Proxy]:
    with Proxy(named.api.port) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


BASIC = "Basic " + base64.b64encode(b"me:p@ss").decode()


@pytest.mark.parametrize(("fields", "environ", "tunnels"), [
    pytest.param({"proxy-url": "http://{}"}, {}, [""], id="proxy-url"),
    pytest.param({"proxy-url": "http://{}"}, {"NO_PROXY": "*"}, [""], id="proxy-url first"),
    pytest.param({"proxy-url": "http://me:p%40ss@{}"}, {}, [BASIC], id="proxy-url with a password"),
    pytest.param({}, {"HTTPS_PROXY": "http://{}"}, [""], id="HTTPS_PROXY"),
    pytest.param({}, {"https_proxy": "http://{}"}, [""], id="https_proxy"),
    pytest.param({}, {"HTTPS_PROXY": "{}"}, [""], id="no scheme"),
    pytest.param({}, {"HTTPS_PROXY": "http://me:p%40ss@{}"}, [BASIC], id="with a password"),
])
def test_a_proxy(
    named: Site, proxy: Proxy, fields: dict[str, str], environ: dict[str, str], tunnels: list[str]
) -> None:
    def at(values: dict[str, str]) -> dict[str, str]:
        return {key: text.replace("{}", f"127.0.0.1:{port}") for key, text in values.items()}
    port = proxy.server_address[1]
    path = named.kubeconfig(None, {"server": "https://kubernetes.default:6443", **at(fields)})
    result = named.run("--kubeconfig", path, **at(environ))
    assert result.code == 0, result.err
    assert proxy.tunnels == [("kubernetes.default:6443", each) for each in tunnels]
    assert named.users() == {TOKEN}


def test_the_loopback_needs_no_proxy(site: Site) -> None:
    assert site.run("--kubeconfig", site.kubeconfig(), HTTPS_PROXY="http://127.0.0.1:9").code == 0


def test_a_proxy_that_is_not_there(site: Site) -> None:
    result = site.run("--kubeconfig", site.kubeconfig(None, {"proxy-url": "http://127.0.0.1:9"}))
    assert (result.code, "cannot connect" in result.err) == (3, True)


def test_a_proxy_of_no_type_we_know(site: Site) -> None:
    site.world.program.leaks.add("hunter2")
    path = site.kubeconfig(None, {"proxy-url": "socks5://me:hunter2@127.0.0.1:9"})
    result = site.run("--kubeconfig", path)
    assert result.code == 3
    assert path in result.err and "is no proxy of type http or https" in result.err


H, A, B = "https://api.example.com:6443", "http://a:3128", "http://b:3128"


@pytest.mark.parametrize(("server", "environ", "expected"), [
    (H, {}, ""),
    (H, {"HTTPS_PROXY": A}, A),
    (H, {"https_proxy": A}, A),
    (H, {"https_proxy": A, "HTTPS_PROXY": B}, A),
    (H, {"https_proxy": "", "HTTPS_PROXY": B}, B),
    (H, {"HTTP_PROXY": A}, ""),
    ("http://api.example.com", {"http_proxy": A, "HTTPS_PROXY": B}, A),
    (H, {"HTTPS_PROXY": A, "NO_PROXY": "*"}, ""),
    (H, {"HTTPS_PROXY": A, "NO_PROXY": "api.example.com"}, ""),
    (H, {"HTTPS_PROXY": A, "NO_PROXY": "API.Example.Com"}, ""),
    (H, {"HTTPS_PROXY": A, "NO_PROXY": "other, example.com"}, ""),
    (H, {"HTTPS_PROXY": A, "NO_PROXY": ".example.com"}, ""),
    (H, {"HTTPS_PROXY": A, "NO_PROXY": "ample.com,pi.example.com"}, A),
    (H, {"HTTPS_PROXY": A, "NO_PROXY": "example.com", "no_proxy": "example.org"}, A),
    (H, {"HTTPS_PROXY": A, "NO_PROXY": "10.0.0.0/8"}, A),
    ("https://10.1.2.3", {"HTTPS_PROXY": A, "NO_PROXY": "192.168.0.0/16"}, A),
    ("https://10.1.2.3", {"HTTPS_PROXY": A, "NO_PROXY": "192.168.0.0/16, 10.0.0.0/8"}, ""),
    ("https://10.1.2.3", {"HTTPS_PROXY": A, "NO_PROXY": "10.1.2.3"}, ""),
    ("https://[fd00::1]:443", {"HTTPS_PROXY": A, "NO_PROXY": "fd00::/8"}, ""),
    ("https://[fd00::1]:443", {"HTTPS_PROXY": A, "NO_PROXY": "fd01::/16,10.0.0.0/8"}, A),
    ("https://127.0.0.1:6443", {"HTTPS_PROXY": A}, ""),
    ("https://127.8.9.1:6443", {"https_proxy": A}, ""),
    ("https://[::1]:6443", {"HTTPS_PROXY": A}, ""),
    ("https://localhost:6443", {"HTTPS_PROXY": A}, ""),
    ("https://localhost.example.com", {"HTTPS_PROXY": A}, A),
])
def test_the_proxy_of_the_environment(server: str, environ: dict[str, str], expected: str) -> None:
    assert keto_tokens.proxy_for(server, environ) == expected


# --- exec plugins ----------------------------------------------------------------------------------

GIVEN = {"token": "$token"}
PAIR = {"clientCertificateData": "$admin.crt", "clientKeyData": "$admin.key"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("answer", "name"), [(GIVEN, TOKEN), (PAIR, CERTIFICATE)], ids=["token", "pair"])
def test_a_plugin(site: Site, version: str, answer: dict[str, str], name: str) -> None:
    result = site.run("--kubeconfig", site.plugin(answer, version=version))
    assert (result.code, site.users()) == (0, {name}), result.err
    told = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}}
    assert json.loads((site.folder / "info").read_text()) == told
    assert site.runs() == ["//unset"]


def test_a_plugins_arguments_and_environment(site: Site) -> None:
    pairs = [{"name": "FLAVOUR", "value": "ours"}, {"name": "EMPTY", "value": ""}]
    path = site.plugin(GIVEN, args=["get", "a token", "5"], env=pairs)
    assert site.run("--kubeconfig", path, FLAVOUR="theirs", EMPTY="theirs").code == 0
    assert site.runs() == ["get a token 5/ours/"]


EXTENSION = {"name": f"{AUTH}/exec", "extension": {"audience": "us"}}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("fields", "expected"), [
    pytest.param({}, {"certificate-authority-data": "@ca.crt"}, id="embedded CA"),
    pytest.param(AUTHORITIES["referenced CA"], {"certificate-authority-data": "@ca.crt"},
                 id="referenced CA"),
    pytest.param(NO_CHECK, {"insecure-skip-tls-verify": True}, id="unverified"),
    pytest.param({"tls-server-name": "localhost"},
                 {"certificate-authority-data": "@ca.crt", "tls-server-name": "localhost"}, id="name"),
    pytest.param({"extensions": [EXTENSION]},
                 {"certificate-authority-data": "@ca.crt", "config": {"audience": "us"}}, id="config"),
])
def test_a_plugin_is_told_of_the_cluster(
    site: Site, version: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    """As client-go tells it: what is referenced comes embedded."""
    path = site.plugin(GIVEN, version=version, provideClusterInfo=True, cluster=fields)
    assert site.run("--kubeconfig", path).code == 0
    spec = json.loads((site.folder / "info").read_text())["spec"]
    assert spec == {"interactive": False, "cluster": site.filled({"server": site.api.url, **expected})}


@pytest.mark.parametrize(("command", "relative"), [
    ("bin/plugin", False), ("./bin/plugin", False), ("../etc/bin/plugin", False), ("plugin", False),
    ("{}/plugin", False), ("bin/plugin", True), ("./plugin", True),
])
def test_where_a_plugin_is(
    site: Site, command: str, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is relative to the kubeconfig, a mere name is looked up."""
    folder = site.folder / "bin"
    path = Path(site.plugin(GIVEN, command=command.format(folder)))
    environ = {"PATH": f"{folder}:{os.environ['PATH']}"} if command == "plugin" else {}
    if relative:
        monkeypatch.chdir(folder if command == "./plugin" else site.folder)
        path = path.rename(path.name)
    result = site.run("--kubeconfig", str(path), **environ)
    assert (result.code, site.users()) == (0, {TOKEN}), result.err


UNKNOWN = {"token": "nobody-knows-this-one"}
PAST, FUTURE = "2001-01-01T00:00:00Z", "2999-01-01T00:00:00+02:00"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("answers", "code", "requests"), [
    pytest.param([GIVEN, UNKNOWN], 0, 0, id="without end"),
    pytest.param([{**GIVEN, "expirationTimestamp": FUTURE}, UNKNOWN], 0, 0, id="not expired"),
    pytest.param([{**GIVEN, "expirationTimestamp": PAST}], 0, 1, id="expired"),
    pytest.param([{**PAIR, "expirationTimestamp": PAST}], 0, 1, id="expired pair"),
])
def test_a_plugin_is_run_again_when_its_answer_is_out_of_date(
    site: Site, version: str, answers: list[Any], code: int, requests: int
) -> None:
    site.world.aws.group("compute", 1, Role="compute")
    result = site.run("--kubeconfig", site.plugin(*answers, version=version))
    assert (result.code, len(site.api.asked) > 1) == (code, True), result.err
    assert len(site.runs()) == 1 + requests * len(site.api.asked)


@pytest.mark.parametrize(("answers", "code"), [
    pytest.param([UNKNOWN, GIVEN, UNKNOWN], 0, id="then known"),
    pytest.param([UNKNOWN, PAIR, UNKNOWN], 0, id="then a pair"),
    pytest.param([UNKNOWN], 3, id="for ever"),
])
def test_a_plugin_is_run_again_once_when_its_answer_is_refused(
    site: Site, answers: list[Any], code: int
) -> None:
    site.world.aws.group("compute", 1, Role="compute")
    site.world.program.leaks.add(UNKNOWN["token"])
    path = site.plugin(*answers)
    result = site.run("--kubeconfig", path)
    assert (result.code, len(site.runs())) == (code, 2), result.err
    assert (path in result.err) == (code == 3)


HINT = "Get it from https://example.com/plugin"


@pytest.mark.parametrize(("answer", "fields", "says"), [
    pytest.param(GIVEN, {"command": "no-such-plugin", "installHint": HINT},
                 f"no-such-plugin: No such file or directory. {HINT}", id="not found"),
    pytest.param(GIVEN, {"command": "./plugin"}, "etc/plugin: No such file", id="not found there"),
    pytest.param(GIVEN, {"command": "x-y-z", "installHint": f"Two lines:\n{HINT}\n"}, HINT, id="long hint"),
    pytest.param(GIVEN, {"command": "./token"}, "Permission denied", id="no program"),
    pytest.param(GIVEN, {"script": "echo early >&2; echo too bad >&2; exit 1"},
                 "plugin: exit status 1: too bad", id="exit status"),
    pytest.param(GIVEN, {"script": "exit 7"}, "plugin: exit status 7", id="silent exit status"),
    pytest.param("", {}, "printed no ExecCredential", id="prints nothing"),
    pytest.param("{", {}, "printed no ExecCredential", id="bad JSON"),
    pytest.param("[]", {}, "printed no ExecCredential", id="a list"),
    pytest.param('{"status": 5}', {}, "printed no ExecCredential", id="a number"),
    pytest.param({}, {"script": r"printf '\377\376'"}, "not text", id="binary"),
    pytest.param("SWITCHED", {}, f"printed no ExecCredential of {VERSIONS[0]}", id="another version"),
    pytest.param(None, {}, "printed no ExecCredential", id="no status"),
    pytest.param({}, {}, "with a token or a certificate", id="neither"),
    pytest.param({**PAIR, "clientKeyData": None}, {}, "", id="a certificate without a key"),
    pytest.param({**PAIR, "clientCertificateData": None}, {}, "", id="a key without a certificate"),
    pytest.param({"token": "two\nlines"}, {}, "", id="a token of two lines"),
    pytest.param({"token": "t€ken"}, {}, "", id="a token that is not ASCII"),
    pytest.param(GIVEN, {"apiVersion": f"{AUTH}/v1alpha1"}, ".apiVersion: ", id="v1alpha1"),
    pytest.param(GIVEN, {"apiVersion": None}, ".apiVersion: is missing", id="no version"),
    pytest.param(GIVEN, {"command": None}, ".command: is missing", id="no command"),
    pytest.param(GIVEN, {"interactiveMode": "Always"}, ".interactiveMode: ", id="interactive"),
    pytest.param(GIVEN, {"args": "get"}, ".args: is not a list", id="args"),
    pytest.param(GIVEN, {"env": {"A": "b"}}, ".env: is not a list", id="env"),
    pytest.param(GIVEN, {"env": [{"value": "b"}]}, ".env.name: is missing", id="env without a name"),
])
def test_a_plugin_that_fails(site: Site, answer: Any, fields: dict[str, Any], says: str) -> None:
    site.world.program.leaks |= {"two\nlines", "lines", "t€ken", "early"} - {HINT}
    if answer == "SWITCHED":
        answer = json.dumps({"apiVersion": VERSIONS[1], "status": site.filled(GIVEN)})
    path = site.plugin(answer, **fields)
    site.refuses("--kubeconfig", path, says=(f"{path}: users[u].user.exec", says))


# --- files that are bad ------------------------------------------------------------------------------

FILES: dict[str, tuple[bytes, str]] = {
    "not YAML": (b"clusters: [\nusers: {", "is not YAML (line 2)"),
    "a tab": (b"clusters:\n\t- name: c\n", "is not YAML"),
    "two documents": (b"a: 1\n---\nb: 2\n", "is not YAML"),
    "a date that is none": (b"current-context: 2024-13-45\n", "is not YAML"),
    "nested": (b"[" * 5000, "is not YAML"),
    "binary": (bytes(range(256)), "cannot read"),
    "zeros": (bytes(16), "is not YAML"),
    "empty": (b"", "current-context: is missing"),
    "comments": (b"# nothing\n", "current-context: is missing"),
    "a list": (b"- clusters\n", "is not a mapping"),
    "a string": (b"hello\n", "is not a mapping"),
}


@pytest.mark.parametrize(("content", "says"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_kubeconfig(site: Site, content: bytes, says: str) -> None:
    site.path.write_bytes(content)
    site.refuses("--kubeconfig", str(site.path), says=(str(site.path), says))


@pytest.mark.parametrize(("name", "reason"), [
    ("missing", "No such file or directory"), (".", "Is a directory"), ("token/x", "Not a directory"),
    ("~nosuchuser/config", "~nosuchuser"),
])
def test_a_kubeconfig_that_is_not_there(site: Site, name: str, reason: str) -> None:
    path = name if name.startswith("~") else str(site.folder / name)
    site.refuses("--kubeconfig", path, says=(path, reason))


def context(**fields: Any) -> dict[str, Any]:
    return {"contexts": [{"name": "here", "context": fields}]}


C, U = "clusters[c].cluster", "users[u].user"
CA, CERT, KEY = "certificate-authority", "client-certificate", "client-key"
Fields = dict[str, Any]
BAD: dict[str, tuple[Fields, Fields, Fields, str]] = {  # fields of the cluster, the user, the file
    "no current-context": ({}, {}, {"current_context": None}, "current-context: is missing"),
    "unknown context": ({}, {}, {"current_context": "x"}, "contexts: there is no 'x'"),
    "unknown cluster": ({}, {}, context(cluster="x", user="u"), "clusters: there is no 'x'"),
    "unknown user": ({}, {}, context(cluster="c", user="x"), "users: there is no 'x'"),
    "context without cluster": ({}, {}, context(user="u"), "contexts[here].context.cluster: is missing"),
    "context: []": ({}, {}, {"contexts": [{"name": "here", "context": []}]},
                    "contexts[here].context: is not a mapping"),
    "clusters: {}": ({}, {}, {"clusters": {}}, "clusters: is not a list"),
    "users: text": ({}, {}, {"users": "u"}, "users: is not a list"),
    "contexts: [5]": ({}, {}, {"contexts": [5]}, "contexts: there is no 'here'"),
    "current-context: 5": ({}, {}, {"current_context": 5}, "current-context: is not a string"),
    "no server": ({"server": None}, {}, {}, f"{C}.server: is missing"),
    "server: 5": ({"server": 5}, {}, {}, f"{C}.server: is not a string"),
    "server: a host": ({"server": "api.example.com"}, {}, {}, "server: 'api.example.com' is not a URL"),
    "server: ftp": ({"server": "ftp://a"}, {}, {}, "server: 'ftp://a' is not a URL"),
    "server: a port": ({"server": "https://a:b"}, {}, {}, "server: "),
    "server: brackets": ({"server": "https://[a"}, {}, {}, "server: "),
    **{f"{key}-data: no base64": (
        {f"{key}-data": "%%%"} if key == CA else {}, {f"{key}-data": "%%%"} if key != CA else {}, {},
        f"{C if key == CA else U}.{key}-data: is not base64",
    ) for key in (CA, CERT, KEY)},
    f"{CA}-data: binary": ({f"{CA}-data": "//79"}, {}, {}, f"{C}.{CA}-data: is not base64"),
    f"{CA}: missing": ({f"{CA}-data": None, CA: "gone"}, {}, {}, f"{C}.{CA} from FOLDER/gone: No such"),
    f"{CERT}: missing": ({}, {**REFERENCED, CERT: "gone"}, {}, f"{U}.{CERT} from FOLDER/gone: No such"),
    f"{KEY}: missing": ({}, {**REFERENCED, KEY: "gone"}, {}, f"{U}.{KEY} from FOLDER/gone: No such"),
    f"{KEY}: a folder": ({}, {**REFERENCED, KEY: "."}, {}, f"{U}.{KEY} from FOLDER: Is a dir"),
    "tokenFile: missing": ({}, {"tokenFile": "gone"}, {}, f"{U}.tokenFile from FOLDER/gone: No such"),
    "tokenFile: empty": ({}, {"tokenFile": "empty"}, {}, "FOLDER/empty"),
    f"{CA}-data: no PEM": ({f"{CA}-data": "@token"}, {}, {}, f"{C}.{CA} holds no certificate"),
    f"{CA}-data: empty PEM": ({f"{CA}-data": "@empty"}, {}, {}, f"{C}.{CA} holds no certificate"),
    f"{CA}: no PEM": ({f"{CA}-data": None, CA: "token"}, {}, {}, f"{C}.{CA} holds no certificate"),
    f"{CA}: a key": ({f"{CA}-data": "@admin.key"}, {}, {}, f"{C}.{CA} holds no certificate"),
    "no key": ({}, {CERT: "admin.crt"}, {}, f"{U}: client-certificate and client-key go together"),
    "no certificate": ({}, {f"{KEY}-data": "@admin.key"}, {}, f"{U}: client-certificate and client-key"),
    "auth-provider": ({}, {"auth-provider": {"name": "gcp"}}, {}, f"{U}.auth-provider: not supported"),
    "username": ({}, {"username": "me"}, {}, f"{U}.username: not supported"),
    "password": ({}, {"password": "hunter2"}, {}, f"{U}.password: not supported"),
    "as": ({}, {"as": "root", "token": "$token"}, {}, f"{U}.as: not supported"),
    "token: 5": ({}, {"token": 5}, {}, f"{U}.token: is not a string"),
    "token: two lines": ({}, {"token": "hunter2\nhunter2"}, {}, U),
    "token: not ASCII": ({}, {"token": "hunter2€"}, {}, U),
    "tokenFile: 5": ({}, {"tokenFile": 5}, {}, f"{U}.tokenFile: is not a string"),
    "exec: text": ({}, {"exec": "plugin"}, {}, f"{U}.exec: is not a mapping"),
    "insecure: yes": ({"insecure-skip-tls-verify": "yes"}, {}, {},
                      f"{C}.insecure-skip-tls-verify: is not a true or false"),
    "proxy-url: 5": ({"proxy-url": 5}, {}, {}, f"{C}.proxy-url: is not a string"),
    "tls-server-name: []": ({"tls-server-name": []}, {}, {}, f"{C}.tls-server-name: is not a string"),
}


@pytest.mark.parametrize(("cluster", "user", "top", "says"), BAD.values(), ids=BAD)
def test_a_bad_field_is_named(site: Site, cluster: Fields, user: Fields, top: Fields, says: str) -> None:
    site.world.program.leaks.add("hunter2")
    path = site.kubeconfig(user or None, cluster, **top)
    file = "" if "FOLDER" in says else path  # there the bad file is the one that is referred to
    site.refuses("--kubeconfig", path, says=(file, says.replace("FOLDER", str(site.folder))))


@pytest.mark.parametrize("fields", [{KEY: "other.key"}, {KEY: "token"}, {CERT: "token"}],
                         ids=["another's key", "no key", "no certificate"])
def test_a_pair_that_is_none(site: Site, fields: Fields) -> None:
    path = site.kubeconfig({**REFERENCED, **fields})
    result = site.run("--kubeconfig", path)
    assert (result.code, site.api.asked) == (3, [])
    (line,) = result.err.splitlines()
    assert line.startswith("keto-tokens: ") and path in line and "client certificate and key" in line


# --- in a pod ----------------------------------------------------------------------------------------


@pytest.fixture
def pod(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose folder is the service account's."""
    monkeypatch.setattr(keto_tokens, "SERVICE_ACCOUNT", str(site.folder))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(site.api.port))
    return site


def test_a_pod(pod: Site) -> None:
    assert (pod.run().code, pod.users()) == (0, {TOKEN})


def test_a_pods_token_changes(pod: Site) -> None:
    access = keto_tokens.in_cluster(os.environ, str(pod.folder))
    cluster = keto_tokens.Cluster(access, keto_tokens.Calls())
    cluster.request("GET", NODES)
    rotate_token(pod)
    cluster.request("GET", NODES)
    users = [asked.user for asked in pod.api.asked]
    assert users == [TOKEN, "system:serviceaccount:kube-system:second"]


@pytest.mark.parametrize("name", ["token", "ca.crt"])
@pytest.mark.parametrize("content", [None, "", "\n"], ids=["missing", "nothing in it", "an empty line"])
def test_a_pod_without_a_service_account(pod: Site, name: str, content: str | None) -> None:
    (pod.folder / name).unlink()
    if content is not None:
        (pod.folder / name).write_text(content)
    pod.refuses(says=(str(pod.folder / name),))


@pytest.mark.parametrize(("host", "port", "server"), [
    ("10.96.0.1", "6443", "https://10.96.0.1:6443"),
    ("10.96.0.1", None, "https://10.96.0.1:443"),
    ("fd00::1", "443", "https://[fd00::1]:443"),
    ("kubernetes.default", "443", "https://kubernetes.default:443"),
])
def test_where_a_pods_cluster_is(site: Site, host: str, port: str | None, server: str) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": host, **({"KUBERNETES_SERVICE_PORT": port} if port else {})}
    assert keto_tokens.in_cluster(environ, str(site.folder)).server == server


# --- flags and variables ------------------------------------------------------------------------------

# NAME is the value of Site.filled, CONF a kubeconfig with the user's fields beside it.
NOWHERE = {"server": "https://127.0.0.1:9"}
WRONG = {"token": "wrong"}
MASTER = ["--master", "URL", "--ca-path", "DIR/ca.crt"]
CONF = ["--kubeconfig", "CONF"]
FLAGS: dict[str, tuple[Fields, Fields, list[str], dict[str, str], str]] = {
    "--master over kubeconfig": (NOWHERE, GIVEN, [*CONF, "--master", "URL"], {}, TOKEN),
    "KUBE_SERVICE_URL over kubeconfig": (NOWHERE, GIVEN, CONF, {"KUBE_SERVICE_URL": "URL"}, TOKEN),
    "--master over its variable": ({}, GIVEN, [*MASTER, "--kube-token-file", "DIR/token"],
                                   {"KUBE_SERVICE_URL": "https://127.0.0.1:9"}, TOKEN),
    "--kube-token": ({}, {}, [*MASTER, "--kube-token", "TOKEN"], {}, TOKEN),
    "KUBE_SERVICE_TOKEN": ({}, {}, MASTER, {"KUBE_SERVICE_TOKEN": "TOKEN"}, TOKEN),
    "--kube-token-file": ({}, {}, [*MASTER, "--kube-token-file", "DIR/token"], {}, TOKEN),
    "KUBE_SERVICE_TOKEN_FILE": ({}, {}, MASTER, {"KUBE_SERVICE_TOKEN_FILE": "DIR/token"}, TOKEN),
    "--kube-token over its variable": ({}, {}, [*MASTER, "--kube-token", "TOKEN"],
                                       {"KUBE_SERVICE_TOKEN": "wrong"}, TOKEN),
    "the file over the token": ({}, {}, [*MASTER, "--kube-token-file", "DIR/token"],
                                {"KUBE_SERVICE_TOKEN": "wrong"}, TOKEN),
    "--kube-token over kubeconfig": ({}, WRONG, [*CONF, "--kube-token", "TOKEN"], {}, TOKEN),
    "KUBE_SERVICE_TOKEN over kubeconfig": ({}, WRONG, CONF, {"KUBE_SERVICE_TOKEN": "TOKEN"}, TOKEN),
    "--kube-token-file over a pair": ({}, REFERENCED, [*CONF, "--kube-token-file", "DIR/token"], {}, TOKEN),
    "--ca-path over kubeconfig": ({f"{CA}-data": "@other.crt"}, GIVEN, [*CONF, "--ca-path", "DIR/ca.crt"],
                                  {}, TOKEN),
    "CA_PATH over kubeconfig": (NO_CA, GIVEN, CONF, {"CA_PATH": "DIR/ca.crt"}, TOKEN),
    "kubeconfig over the pod": ({}, REFERENCED, CONF, {"KUBERNETES_SERVICE_HOST": "127.0.0.2"}, CERTIFICATE),
    "--master over the pod": ({}, {}, [*MASTER, "--kube-token", "TOKEN"],
                              {"KUBERNETES_SERVICE_HOST": "127.0.0.2"}, TOKEN),
}


@pytest.mark.parametrize(("cluster", "user", "argv", "environ", "name"), FLAGS.values(), ids=FLAGS)
def test_what_comes_first(
    site: Site, cluster: Fields, user: Fields, argv: list[str], environ: dict[str, str], name: str
) -> None:
    values = {"CONF": site.kubeconfig(user, cluster), "URL": site.api.url, "TOKEN": site.api.admin}

    def real(text: str) -> str:
        return values.get(text) or text.replace("DIR", str(site.folder))
    result = site.run(*map(real, argv), **{key: real(text) for key, text in environ.items()})
    assert (result.code, site.users()) == (0, {name}), result.err


def test_a_token_that_is_no_header(site: Site) -> None:
    site.world.program.leaks.add("hunter2")
    for token in ("hunter2\nX-Remote-User: root", "hunter2€"):
        site.refuses("--master", site.api.url, SKIP[:0] or "--ca-path", str(site.folder / "ca.crt"),
                     KUBE_SERVICE_TOKEN=token)


@pytest.mark.parametrize(("argv", "code", "says"), [
    pytest.param([], 2, ("--kubeconfig", "--master", "in a pod"), id="nothing"),
    pytest.param(["--kube-token", "x"], 2, ("--kubeconfig", "--master"), id="a token alone"),
    pytest.param(["--master", "https://a"], 2, ("--kube-token", "--kubeconfig"), id="a URL alone"),
    pytest.param(["--master", "a:6443", "--kube-token", "x"], 2, ("--master", "a:6443"), id="no URL"),
    pytest.param(["--master", "https://a", "--kube-token-file", "gone"], 3, ("gone",), id="token file"),
    pytest.param(["--master", "https://a", "--kube-token", "x", "--ca-path", "gone"], 3,
                 ("the cluster's CA from gone",), id="CA file"),
])
def test_no_way_to_a_cluster(site: Site, argv: list[str], code: int, says: tuple[str, ...]) -> None:
    site.refuses(*argv, code=code, says=says)
