"""Flags, variables, help, refusals, logs and the built file: what a user meets before any token does."""
from __future__ import annotations

import argparse
import functools
import logging
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import keto_tokens
from conftest import BUILT, FILTER, REPOSITORY, Program, Result, World, run_built
from keto_tokens import COMMANDS, GLOBAL_FLAGS, Node, TokenSecret, TokenStore, UsageError, parse_options
from pki import Authority
from standin_aws import Aws

SECRET = "0123456789abcdef"
TOKEN = f"abcdef.{SECRET}"
YES, NO = ("true", True), ("false", False)
URLS = ("https://one:6443", "https://one:6443"), ("http://two/", "http://two")
TEXTS = ("one", "one"), ("two", "two")
PINS = [f"sha256:{'ab' * 32}", f"sha256:{'0f' * 32}"]

FLAGS: dict[str, tuple[tuple[str, ...], tuple[str, Any], tuple[str, Any], str]] = {
    # the flag: its variables, two texts with their values, and a text that is refused
    "cloud": (("CLOUD_PROVIDER",), ("aws", "aws"), ("auto", "auto"), "nonsense"),
    "verbose": (("VERBOSE",), YES, NO, "maybe"),
    "filter": (("NODE_FILTER",), ("A=1", {"A": "1"}), ("B=2,C=3", {"B": "2", "C": "3"}), "A"),
    "all-groups": ((), YES, NO, ""),
    "master": (("KUBE_SERVICE_URL",), *URLS, "ftp://x"),
    "kube-token": (("KUBE_SERVICE_TOKEN",), *TEXTS, ""),
    "kube-token-file": (("KUBE_SERVICE_TOKEN_FILE",), *TEXTS, ""),
    "ca-path": (("CA_PATH",), *TEXTS, ""),
    "ca-cert-hash": (("CA_CERT_HASH",), (PINS[0], PINS[:1]), (", ".join(PINS), PINS), "sha256:ab"),
    "kubeconfig": (("KUBECONFIG",), *TEXTS, ""),
    "context": ((), *TEXTS, ""),
    "insecure-skip-tls-verify": (("INSECURE_SKIP_TLS_VERIFY",), YES, NO, "2"),
    "region": (("AWS_REGION", "AWS_DEFAULT_REGION"), *TEXTS, ""),
    "project": (("GCE_PROJECT", "CLOUDSDK_CORE_PROJECT"), *TEXTS, "One"),
    "tag-name": (("TAG_NAME",), *TEXTS, "aws:one"),
    "token-ttl": (("TOKEN_TTL",), ("1h", 3600.0), ("1m", 60.0), "59s"),
    "token-namespace": (("TOKEN_NAMESPACE",), *TEXTS, "Two"),
    "auth-extra-groups": (
        ("AUTH_EXTRA_GROUPS",), ("system:bootstrappers:a", "system:bootstrappers:a"),
        ("system:bootstrappers:b,system:bootstrappers:c:d",) * 2, "system:masters",
    ),
    "give-up": (("GIVE_UP",), ("1h", 3600.0), ("1ms", 0.001), "0"),
    "no-revoke": (("NO_REVOKE",), YES, NO, "maybe"),
    "leader-elect": (("LEADER_ELECT",), YES, NO, "maybe"),
    "interval": (("INTERVAL",), ("1h", 3600.0), ("1ms", 0.001), "0s"),
    "once": ((), YES, NO, ""),
    "dry-run": ((), YES, NO, ""),
    "metrics-file": (("METRICS_FILE",), *TEXTS, ""),
    "metrics-listen": (("METRICS_LISTEN",), (":91", ("", 91)), ("[::1]:0", ("::1", 0)), "91"),
    "format": ((), ("kubeadm", "kubeadm"), ("kubeconfig", "kubeconfig"), "nonsense"),
    "join-config": ((), *TEXTS, ""),
    "read-from": (("READ_FROM",), ("imds", "imds"), ("api", "api"), "nonsense"),
    "timeout": (("TIMEOUT",), ("1h", 3600.0), ("1ms", 0.001), "10"),
    "node": ((), *TEXTS, ""),
    "output": ((), ("json", "json"), ("wide", "wide"), ""),
    "watch": ((), YES, NO, ""),
}
ALL = {
    f"{command} {flag.name}": (command, flag)
    for command in COMMANDS for flag in [*GLOBAL_FLAGS, *COMMANDS[command].flags]
}
VIEW = {
    "cloud": "aws", "verbose": False, "all_groups": True, "filter": {}, "master": "", "kube_token": "",
    "kube_token_file": "", "ca_path": "", "kubeconfig": "", "context": "", "region": "", "project": "",
    "insecure_skip_tls_verify": False, "tag_name": "KubeletToken", "token_ttl": 1800.0,
    "token_namespace": "kube-system", "interval": 10.0,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "server": {
        **VIEW, "command": "server", "once": False, "dry_run": False, "give_up": 7200.0,
        "no_revoke": False, "leader_elect": False, "metrics_file": "", "metrics_listen": "",
        "auth_extra_groups": "system:bootstrappers:kubeadm:default-node-token",
    },
    "status": {**VIEW, "command": "status", "node": "", "output": "", "watch": False},
    "client": {
        "command": "client", "cloud": "auto", "verbose": False, "master": "https://127.0.0.1:6443",
        "ca_path": "", "insecure_skip_tls_verify": False, "kubeconfig": "kubeconfig-bootstrap",
        "tag_name": "KubeletToken", "interval": 5.0, "timeout": 0.0, "ca_cert_hash": [],
        "read_from": "auto", "format": "kubeconfig", "join_config": "",
    },
}


def parsed(*argv: str, environ: Mapping[str, str] | None = None) -> argparse.Namespace:
    options = parse_options(argv, environ or {})
    assert options is not None
    return options


@pytest.mark.parametrize("command", COMMANDS)
def test_the_defaults(command: str) -> None:
    everything = [] if command == "client" else ["--all-groups"]
    assert vars(parsed(command, *everything)) == DEFAULTS[command]


@pytest.mark.parametrize(("command", "flag"), ALL.values(), ids=ALL)
def test_a_flag_beats_its_variable_which_beats_the_default(
    command: str, flag: keto_tokens.Flag, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, (text, value), (other_text, other), bad = FLAGS[flag.name]
    assert flag.env == variables
    filtered = command == "client" or flag.name in ("filter", "all-groups")
    base = [command, *([] if filtered else FILTER), *["--format=kubeadm"] * (flag.name == "join-config")]

    def got(*argv: str, **environ: str) -> Any:
        return getattr(parsed(*base, *argv, environ=environ), flag.dest)

    assert got(f"--{flag.name}={text}") == value
    for variable in variables:
        assert got(**{variable: other_text}) == other
        assert got(f"--{flag.name}={text}", **{variable: other_text}) == value
        if flag.name != "filter":  # which has no default: the server wants one
            assert got(**{variable: ""}) == DEFAULTS[command][flag.dest]
        if bad:
            with pytest.raises(UsageError, match=variable) as refusal:
                got(**{variable: bad})
            assert refusal.value.exit_code == 2
    if len(variables) == 2:
        assert got(**{variables[0]: text, variables[1]: other_text}) == value
        assert got(**{variables[0]: "", variables[1]: other_text}) == other


# --- help and version ------------------------------------------------------------------------------


def printed(program: Program, capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> str:
    """What a run prints that ends well, by argparse's exit or not."""
    try:
        result = program(*argv, **environ)
    except SystemExit as ended:
        result = Result(int(ended.code or 0), *capsys.readouterr())
    assert (result.code, result.err) == (0, "")
    return result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_each_flag_with_its_variable_and_default(
    program: Program, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = printed(program, capsys, "help", command, COLUMNS="1000")
    options = " ".join(text.partition("options:")[2].partition("example:")[0].split())
    entries = re.split(r" (?=(?:-\w, |-\w [A-Z]+, )?--\w)", options)
    for flag in [*GLOBAL_FLAGS, *COMMANDS[command].flags]:
        (entry,) = (each for each in entries if re.search(rf"--{flag.name}\s", each))
        variables = ", ".join(f"${variable}" for variable in FLAGS[flag.name][0])
        assert not variables or f"[{variables}]" in entry
        assert not flag.default or f"(default: {flag.default})" in entry


TOPICS = ["", *keto_tokens.build_parser()[1]]


@pytest.mark.parametrize("topic", TOPICS)
def test_help_fits_a_terminal_and_shows_how(
    program: Program, capsys: pytest.CaptureFixture[str], topic: str
) -> None:
    text = printed(program, capsys, "help", *topic.split(), COLUMNS="80")
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith(f"usage: keto-tokens {topic}".rstrip())
    _, example, command = text.partition("example:\n  ")
    assert example and command.startswith(f"keto-tokens {topic}".rstrip())


@pytest.mark.parametrize("topic", [topic for topic in TOPICS if topic not in ("", *keto_tokens.GROUPS)])
def test_the_examples_are_commands(topic: str) -> None:
    command = keto_tokens.build_parser()[1][topic].epilog
    assert command is not None
    words = shlex.split(command.partition("example:")[2].replace("\\\n", " "))
    end = min(words.index(word) if word in words else 99 for word in (">", "|"))
    options = parsed(*words[1:end])
    assert " ".join(filter(None, [options.command, getattr(options, "role", "")])) == topic
    if options.command == "generate":
        run = keto_tokens.GENERATES[options.role].run
        assert isinstance(run, functools.partial)
        if options.role == "userdata":
            options.sha256 = "0" * 64
        assert run.args[0](options)


@pytest.mark.parametrize("same", [
    [["help"], ["h"], ["--help"], ["-h"], ["-help"]],
    [["help", "server"], ["h", "server"], ["server", "--help"], ["server", "-h"]],
    [["help", "status"], ["h", "status"], ["status", "--help"]],
    [["help", "client"], ["h", "client"], ["client", "--help"]],
    [["--version"], ["-v"], ["-version"]],
], ids=lambda same: " ".join(same[0]))
def test_the_ways_to_ask_are_the_same(
    program: Program, capsys: pytest.CaptureFixture[str], same: list[list[str]]
) -> None:
    texts = {printed(program, capsys, *argv) for argv in same}
    (text,) = texts
    assert text.startswith(("usage: keto-tokens", f"keto-tokens {keto_tokens.__version__}\n"))
    if same[0] == ["help"]:
        assert all(f" {name} " in text for name in COMMANDS) and "exit codes:" in text


@pytest.mark.parametrize("argv", [["help"], ["--help"], ["--version"]], ids=" ".join)
def test_nobody_who_reads_the_help_is_no_failure(argv: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    module = str(REPOSITORY / "keto_tokens.py")
    with open(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, module, *argv], stdout=closed, stderr=subprocess.PIPE, env={}
        )
    assert (done.returncode, done.stderr) == (0, b"")


# --- what the Go program took ----------------------------------------------------------------------

GO: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "one dash": ("client -master=https://h:1", {}, {"master": "https://h:1"}),
    "one dash, apart": ("client -master https://h:1", {}, {"master": "https://h:1"}),
    "one dash, boolean": ("server -verbose -all-groups", {}, {"verbose": True, "all_groups": True}),
    "one dash, false": ("client -verbose=false", {}, {"verbose": False}),
    "true": ("client --verbose=true", {}, {"verbose": True}),
    "T": ("client --verbose=T", {}, {"verbose": True}),
    "1": ("client --verbose=1", {}, {"verbose": True}),
    "false": ("client --verbose=false", {}, {"verbose": False}),
    "0": ("client --verbose=0", {}, {"verbose": False}),
    "dry-run": ("server --all-groups --dry-run=true", {}, {"dry_run": True}),
    "false beats the variable": ("client --verbose=false", {"VERBOSE": "true"}, {"verbose": False}),
    "the last counts": ("client --verbose=false --verbose", {}, {"verbose": True}),
    "-c apart": ("-c aws client", {"CLOUD_PROVIDER": "nonsense"}, {"cloud": "aws"}),
    "-c=": ("-c=aws client", {"CLOUD_PROVIDER": "nonsense"}, {"cloud": "aws"}),
    "--cloud after": ("client --cloud=aws", {"CLOUD_PROVIDER": "nonsense"}, {"cloud": "aws"}),
    "global before": ("--verbose server --all-groups", {}, {"verbose": True}),
    "global after": ("server --all-groups --verbose", {}, {"verbose": True}),
    "filters": ("server --filter A=1 -filter=B=2", {}, {"filter": {"A": "1", "B": "2"}}),
    "the same filter twice": ("server --filter A=1 --filter A=1", {}, {"filter": {"A": "1"}}),
    "a filter with =": ("server --filter k8s.io/c=a=b=", {}, {"filter": {"k8s.io/c": "a=b="}}),
    "a filter with ,": ("server --filter A=1,2", {}, {"filter": {"A": "1,2"}}),
    "NODE_FILTER": ("server", {"NODE_FILTER": "A=1, B=x=y"}, {"filter": {"A": "1", "B": "x=y"}}),
    "filter for NODE_FILTER": ("server --filter A=1", {"NODE_FILTER": "B=2"}, {"filter": {"A": "1"}}),
}


@pytest.mark.parametrize(("argv", "environ", "expected"), GO.values(), ids=GO)
def test_go_style(argv: str, environ: dict[str, str], expected: dict[str, Any]) -> None:
    assert vars(parsed(*argv.split(), environ=environ)).items() >= expected.items()


# --- refusals --------------------------------------------------------------------------------------

MASTER = ["--master", "https://127.0.0.1:9", "--kube-token", "x"]
SERVER = ["server", "--once", *FILTER, *MASTER]
CLIENT = ["client", "--insecure-skip-tls-verify", "--kubeconfig", "/nonexistent/kubeconfig"]
PASSWORD = "hunter2"
DURATIONS = ["", "10", "10x", "-5s", "1h 5m", "abc", "5s5", "1.5.5s", ".s", "\u0661s", "2562048h"]
MASTERS = ["ftp://x", "https://", "127.0.0.1:6443", "", f"https://user:{PASSWORD}@host", "https://h/?q=1",
           "https://h:99999", "https://h:0", "https://h:x", "https://h/#f", "https://[::1", "https://a b",
           "https://h\nx"]

REFUSED: dict[str, tuple[list[str], str]] = {
    # what is wrong: the arguments, and what the line must say
    "no command": ([], "name a command: server, "),
    "only global flags": (["--verbose"], "name a command"),
    "an unknown command": (["nonsense"], "'nonsense'"),
    "help for an unknown command": (["help", "nonsense"], "'nonsense'"),
    "an unknown flag": ([*SERVER, "--nonsense"], "--nonsense"),
    "an unknown flag, one dash": ([*SERVER, "-nonsense=1"], "arguments: -nonsense (see"),
    "an unknown flag with a secret": ([*SERVER, "--kube-tokn", "hunter2"], "arguments: --kube-tokn (see"),
    "an unknown global flag": (["--nonsense", "client"], "--nonsense"),
    "another command's flag": ([*CLIENT, "--once"], "--once"),
    "another command's flag, false": ([*CLIENT, "--once=false"], "--once"),
    "an abbreviation": ([*SERVER, "--filt", "A=1"], "--filt"),
    "an argument too many": ([*SERVER, "nonsense"], "nonsense"),
    "an argument of two lines": ([*SERVER, "non\nsense"], "sense"),
    "no value": ([*SERVER, "--interval"], "--interval"),
    "verbose": ([*CLIENT, "--verbose=nonsense"], "--verbose: 'nonsense'"),
    "verbose, empty": ([*CLIENT, "--verbose="], "--verbose"),
    "a filter without value": ([*SERVER, "--filter", "novalue"], "--filter: 'novalue'"),
    "a filter without key": ([*SERVER, "--filter", "=x"], "--filter: '=x'"),
    "a filter with an empty value": ([*SERVER, "--filter", "x="], "--filter: 'x='"),
    "an empty filter": ([*SERVER, "--filter="], "--filter"),
    "one key, two values": ([*SERVER, "--filter", "Role=infra"], "--filter"),
    "a filter and all groups": ([*SERVER, "--all-groups"], "--all-groups"),
    "neither filter nor all groups": (["server", *MASTER], "--filter KEY=VALUE, or --all-groups"),
    "an empty tag name": ([*SERVER, "--tag-name="], "--tag-name"),
    "a tag name too long": ([*SERVER, "--tag-name", "x" * 129], "--tag-name"),
    "a reserved tag name": ([*CLIENT, "--tag-name", "AWS:x"], "'AWS:x'"),
    "a tag name with a tab": ([*CLIENT, "--tag-name", "a\tb"], r"'a\tb'"),
    "a tag name of two lines": ([*CLIENT, "--tag-name", "a\nb"], r"'a\nb'"),
    "no time between passes": ([*SERVER, "--interval", "0"], "--interval"),
    "no time between looks": ([*CLIENT, "--interval", "0s"], "--interval"),
    "a short life": ([*SERVER, "--token-ttl", "59s"], "--token-ttl"),
    "no life": ([*SERVER, "--token-ttl", "0"], "--token-ttl"),
    "no cloud": ([*SERVER, "--cloud", "nonsense"], "--cloud: 'nonsense'"),
    "another cloud": (["--cloud=azure", *CLIENT], "--cloud: 'azure'"),
    "no groups": ([*SERVER, "--auth-extra-groups="], "--auth-extra-groups"),
    "another group": ([*SERVER, "--auth-extra-groups", "system:masters"], "system:masters"),
    "a group that ends badly": ([*SERVER, "--auth-extra-groups", "system:bootstrappers:a:"], "groups"),
    "a group too few": ([*SERVER, "--auth-extra-groups", "system:bootstrappers:a,"], "groups"),
    "no namespace": ([*SERVER, "--token-namespace", "-a"], "--token-namespace"),
    "a long namespace": ([*SERVER, "--token-namespace", "a" * 64], "--token-namespace"),
    "capitals in the namespace": ([*SERVER, "--token-namespace", "Kube"], "--token-namespace: 'Kube'"),
    "no cluster": (["server", *FILTER], "no cluster"),
    "no token": (["server", *FILTER, "--master", "https://127.0.0.1:9"], "--kube-token"),
    "a server that sends in the clear": ([*SERVER, "--master", "http://127.0.0.1:9"], "not encrypted"),
    "a client that sends in the clear": (
        ["client", "--ca-path", "/nonexistent", "--master", "http://h"], "not encrypted",
    ),
    "a CA that is not used": ([*CLIENT, "--ca-path", "x"], "--ca-path and --insecure-skip-tls-verify"),
    "a pin that is not used": ([*CLIENT, "--ca-cert-hash", PINS[0]], "--ca-cert-hash and --insecure-skip"),
    "a pin for a CA": (["client", "--ca-path=x", f"--ca-cert-hash={PINS[0]}"], "--ca-path and --ca-cert"),
    "a pin that is none": (["client", "--ca-cert-hash", PINS[0][7:]], "--ca-cert-hash: 'abab"),
    "a source that is none": ([*CLIENT, "--read-from", "nonsense"], "--read-from: 'nonsense'"),
    "a tag that metadata cannot show": (["client", "--read-from=imds", "--tag-name=a b"], "'a b'"),
    "a folder for a kubeconfig": ([*CLIENT, "--kubeconfig", "/"], "--kubeconfig: / is a folder"),
    "an empty kubeconfig": ([*CLIENT, "--kubeconfig="], "--kubeconfig"),
    "a choice of output": (["status", *FILTER, *MASTER, "--output", "xml"], "--output: 'xml'"),
    "a join config for nobody": ([*CLIENT, "--join-config=x"], "--join-config"),
    "one file for two": ([*CLIENT, "--format=kubeadm", "--kubeconfig=x", "--join-config=x"], "two files"),
    "a folder for a join config": ([*CLIENT, "--format=kubeadm", "--join-config=/"], "/ is a folder"),
    "kubeadm's own file": (
        [*CLIENT, "--format=kubeadm", "--kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf"], "kubeadm does",
    ),
    "a leader for one pass": ([*SERVER, "--leader-elect"], "--leader-elect"),
    **{f"{command[0]} --master={text}": ([*command, f"--master={text}"], "--master")
       for command in (SERVER, CLIENT) for text in MASTERS},
    **{f"--{flag}={text}": ([*command, f"--{flag}={text}"], f"--{flag}")
       for command, flag in ((SERVER, "interval"), (SERVER, "token-ttl"), (CLIENT, "timeout"))
       for text in DURATIONS},
}


@pytest.fixture
def refused(program: Program, aws: Aws, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs what must be refused, before anybody is asked anything; the line that it prints."""
    connected: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        connected.append(address)
        raise ConnectionRefusedError

    def run(*argv: str, **environ: str) -> str:
        result = program(*argv, **environ)
        assert (result.code, result.out) == (2, ""), result.err
        assert result.err.startswith("keto-tokens: ") and result.err.endswith("\n")
        assert len(result.err.splitlines()) == 1
        assert (aws.count(), connected) == ({}, [])
        return result.err

    monkeypatch.setattr(socket.socket, "connect", connect)
    return run


@pytest.mark.parametrize(("argv", "says"), REFUSED.values(), ids=list(map(ascii, REFUSED)))
def test_refusals(refused: Callable[..., str], argv: list[str], says: str) -> None:
    line = refused(*argv)
    assert says in line
    assert PASSWORD not in line


def test_what_the_refused_arguments_are_added_to_is_not_refused() -> None:
    assert parsed(*SERVER).master == parsed(*CLIENT, "--master=https://127.0.0.1:9").master


def test_a_folder_in_the_way_of_the_kubeconfig(refused: Callable[..., str], tmp_path: Path) -> None:
    assert str(tmp_path) in refused(*CLIENT, "--kubeconfig", str(tmp_path))
    assert str(tmp_path) in refused(*CLIENT[:2], KUBECONFIG=str(tmp_path))


@pytest.mark.parametrize("token", ["not\nours", "not\u0142ours"], ids=ascii)
def test_a_bearer_token_that_is_none_is_not_shown(faulty: World, token: str) -> None:
    flags = faulty.cluster.server_flags()[:4]
    result = faulty.program("server", "--once", *FILTER, *flags, KUBE_SERVICE_TOKEN=token)
    assert (result.code in (2, 3), len(result.err.splitlines()), "ours" in result.err) == (True, 1, False)


def test_the_line_break_after_a_bearer_token_is_no_part_of_it(faulty: World) -> None:
    path = Path(faulty.cluster.server_flags()[-1])
    flags = faulty.cluster.server_flags()[:4]
    token = path.read_text() + "\n"
    assert faulty.program("server", "--once", *FILTER, *flags, KUBE_SERVICE_TOKEN=token).code == 0
    path.write_text(token)
    assert faulty.server().code == 0


BAD_CAS = {
    "missing": None, "empty": "", "no PEM": "nonsense", "not ASCII": "\u00e4",
    "no certificate": "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n",
}


@pytest.mark.parametrize("text", BAD_CAS.values(), ids=BAD_CAS)
def test_a_ca_that_is_none(program: Program, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "ca.crt"
    if text is not None:
        path.write_text(text)
    result = program("client", "--ca-path", str(path), "--kubeconfig", str(tmp_path / "kubeconfig"))
    assert (result.code, result.out) == (3, "")
    assert result.err.startswith("keto-tokens: ") and str(path) in result.err
    assert len(result.err.splitlines()) == 1


def test_a_ca_with_words_around_it(tmp_path: Path) -> None:
    path = tmp_path / "ca.crt"
    path.write_text(f"# Autorit\u00e9 de certification\n{Authority().pem}", encoding="utf-8")
    access = keto_tokens.Access("https://h", "a test", keto_tokens.read_ca(str(path)))
    context = keto_tokens.tls_context(access, keto_tokens.Credential())
    assert len(context.get_ca_certs()) == 1


# --- logs ------------------------------------------------------------------------------------------

TIMED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING|ERROR) [a-z]")


@pytest.mark.parametrize("verbose", [True, False], ids=["verbose", "not verbose"])
def test_decisions_are_logged_when_asked_for(faulty: World, verbose: bool) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.program.verbose = False
    issued = faulty.server(*["--verbose"] * verbose).err.splitlines()
    waited = faulty.server(*["--verbose"] * verbose).err.splitlines()
    assert all(TIMED.match(line) for line in issued + waited), "somebody else's line"
    assert any(f" INFO issue node={node}" in line for line in issued)
    assert any(f" DEBUG wait node={node}" in line for line in waited) == verbose
    assert any(" DEBUG " in line for line in issued + waited) == verbose


def test_libraries_stay_silent() -> None:
    """Also without pytest's handlers around: Python prints warnings that nobody handles."""
    code = (
        "import logging, boto3, botocore, urllib3, keto_tokens; keto_tokens.set_up_logging(True)\n"
        "for name in ('botocore.credentials', 'urllib3.connectionpool', 'boto3', 's3transfer'):\n"
        "    logging.getLogger(name).error('not ours')\n"
        "keto_tokens.log.debug('ours')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\S+Z DEBUG ours\n", done.stderr)


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "another file"])
def test_the_journal_adds_its_own_times(tmp_path: Path, home: Path, journal: bool) -> None:
    with open(tmp_path / "log", "w+") as file:
        status = os.fstat(file.fileno())
        environ = {
            "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + (not journal)}",
            "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(home),
        }
        argv = [*CLIENT[:2], "--cloud", "aws", "--kubeconfig", str(tmp_path / "kubeconfig")]
        command = [sys.executable, str(BUILT), *argv]
        assert subprocess.run(command, env=environ, stderr=file, timeout=120).returncode == 3
        file.seek(0)
        line, last = file.read().splitlines()
    assert "WARNING the certificate of https://127.0.0.1:6443 is NOT verified" in line
    assert (line.startswith("<4>WARNING "), bool(TIMED.match(line))) == (journal, not journal)
    assert last.startswith("<3>keto-tokens: " if journal else "keto-tokens: ")


@pytest.mark.parametrize(("level", "priority"), [(10, 7), (20, 6), (30, 4), (40, 3), (50, 3)])
def test_the_journal_is_told_the_priority_of_each_line(level: int, priority: int) -> None:
    record = logging.LogRecord("x", level, "", 0, "one\ntwo %s", (TOKEN,), None)
    first, second = keto_tokens.LogFormatter(True).format(record).splitlines()
    assert first == f"<{priority}>{logging.getLevelName(level)} one"
    assert second == f"<{priority}>two abcdef.<redacted>"


# --- bugs ------------------------------------------------------------------------------------------


def test_a_bug_shows_a_traceback_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(options: argparse.Namespace, stop: keto_tokens.Stop) -> int:
        try:
            raise KeyError(TOKEN)
        except KeyError:
            raise ValueError(f"the tag is {TOKEN}") from None

    monkeypatch.setitem(COMMANDS, "server", replace(COMMANDS["server"], run=broken))
    monkeypatch.setattr(sys, "argv", ["keto-tokens", *SERVER])
    with pytest.raises(SystemExit) as ended:
        keto_tokens.run()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (70, "")
    assert err.startswith("Traceback") and err.endswith("ValueError: the tag is abcdef.<redacted>\n")
    assert SECRET not in err


def test_a_bug_in_one_action_leaves_the_others(faulty: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = faulty.aws.group("compute", 3, Role="compute")
    issue = TokenStore.issue

    def broken(self: TokenStore, node: Node, earlier: frozenset[str]) -> TokenSecret:
        if node.id == second:
            raise ValueError(f"made {TOKEN}")
        return issue(self, node, earlier)

    with monkeypatch.context() as patch:
        patch.setattr(TokenStore, "issue", broken)
        result = faulty.server()
    assert (result.code, result.pass_line["issued"], result.pass_line["failed"]) == (4, "2", "1")
    assert "ValueError: made abcdef.<redacted>" in result.err and SECRET not in result.err
    assert faulty.aws.tag(second) is None
    assert {n: faulty.aws.tag(n) for n in (first, third)} == {n: faulty.token_of(n) for n in (first, third)}
    assert faulty.server().code == 0
    assert faulty.aws.tag(second) == faulty.token_of(second)


# --- the built file --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, in which the file unpacks itself once."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("environ", [{}, {"HOME": "/nonexistent"}, {"HOME": ""}], ids=str)
@pytest.mark.parametrize(("argv", "says"), [
    (["--help"], "usage: keto-tokens"),
    (["--version"], f"keto-tokens {keto_tokens.__version__}\n"),
    (["help", "client"], "usage: keto-tokens client"),
], ids=lambda argv: " ".join(argv) if isinstance(argv, list) else "")
def test_the_built_file_needs_no_environment(
    environ: dict[str, str], argv: list[str], says: str, tmp_path: Path
) -> None:
    result = run_built(*argv, environ=environ, cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(says)
    assert list(tmp_path.iterdir()) == []


def test_the_built_file_unpacks_where_it_is_told(tmp_path: Path) -> None:
    assert run_built("--version", environ={"SHIV_ROOT": str(tmp_path)}).code == 0
    assert [each for each in tmp_path.iterdir() if each.is_dir()]


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "CACHE_DIRECTORY"])
@pytest.mark.parametrize("kind", ["fine", "writable by all", "writable by the group", "a symlink"])
def test_the_built_file_unpacks_only_where_nobody_else_writes(
    tmp_path: Path, home: Path, variable: str, kind: str
) -> None:
    folder, cache = tmp_path / "folder", tmp_path / "cache" / "keto-tokens"
    folder.mkdir(mode=0o700)
    cache.parent.mkdir()
    if kind == "a symlink":
        cache.symlink_to(folder)
    else:
        cache.mkdir()
        cache.chmod({"fine": 0o755, "writable by all": 0o777, "writable by the group": 0o775}[kind])
    environ = {variable: str(cache.parent), "HOME": str(home)}
    if kind == "fine":
        environ["HOME"] = "/nonexistent"
    result = run_built("--version", environ=environ)
    assert (result.code, result.err) == (0, "")
    assert bool(list(cache.iterdir())) == (kind == "fine")
    if kind != "fine":
        used = home / ".cache" / "keto-tokens"
        assert list(used.iterdir()) and stat.S_IMODE(used.stat().st_mode) == 0o700


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8", "3.9"])
def test_the_built_file_tells_an_old_python(version: str) -> None:
    pythons = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    if not pythons:
        pytest.skip(f"no Python {version} is here")
    done = subprocess.run([str(pythons[0]), str(BUILT), "--version"], capture_output=True, text=True, env={})
    sentence = f"keto-tokens: needs Python 3.10 or newer; this is Python {version}\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, "", sentence)
