"""keto-tokens generate: what is printed says what was asked for, to those who read it, and works."""
from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import keto_tokens
from clusters import StandinCluster, kubeconfig_of
from conftest import BUILT, FILTER, World, run_built
from keto_tokens import GENERATES, UsageError, parse_options
from test_readme import granted

CLUSTER = ["--kubeconfig", "/etc/kubernetes/admin.conf"]
URL = ["--url", "https://example.com/keto-tokens", "--sha256", "0f" * 32]
USUAL = {
    "systemd-server": [*FILTER, *CLUSTER], "systemd-timer": [*FILTER, *CLUSTER],
    "cron": [*FILTER, *CLUSTER], "deployment": FILTER, "userdata": URL,
}


def generated(what: str, *argv: str) -> str:
    """What is printed, in which nothing but text of one line each may be."""
    options = parse_options(["generate", what, *argv], {"KUBECONFIG": "/of/this/machine"})
    assert options is not None
    run = GENERATES[what].run
    assert isinstance(run, functools.partial)
    text: str = run.args[0](options)
    assert text.endswith("\n") and not re.search("@[A-Z]+@", text)
    assert "/of/this/machine" not in text
    return text


def parsed(*argv: str) -> dict[str, Any]:
    options = parse_options(argv, {})
    assert options is not None
    return vars(options)


# --- readers of what is generated, by the rules of those who read it --------------------------------


def settings_of(unit: str) -> dict[str, list[str]]:
    """The settings of a unit: systemd.syntax(7)."""
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n", " ", "\n".join(
        line for line in unit.splitlines() if not line.startswith("#")
    )).splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("["):
            found.setdefault(name, []).append(value.strip())
    return found


def unit_words(line: str, variables: dict[str, str]) -> list[str]:
    """A command line: systemd.service(5), with `%` as in systemd.unit(5)."""
    words, at = [], 0
    while at < len(line):
        if line[at] == " ":
            at += 1
        elif line[at] == '"':
            match = re.match(r'"((?:[^"\\]|\\["\\])*)"(?= |$)', line[at:])
            assert match, line
            words.append(re.sub(r"\\(.)", r"\1", match[1]))
            at += match.end()
        else:
            match = re.match(r"[^ '\"\\]+(?= |$)", line[at:])
            assert match, line
            words.append(match[0])
            at += match.end()
    return [expanded(word, variables) for word in words]


def expanded(word: str, variables: dict[str, str]) -> str:
    """A word after specifiers, of which there is none but `%%`, and variables."""
    assert not re.search("%", word.replace("%%", "")), word
    word = word.replace("%%", "%")
    return re.sub(r"\$\{(\w+)\}|\$\$|\$", lambda m: variables[m[1]] if m[1] else "$" * (m[0] == "$$"), word)


def exec_words(unit: str) -> list[str]:
    """The words of a unit's program, with credentials as the paths that they are copies of."""
    found = settings_of(unit)
    (line,) = found["ExecStart"]
    words = unit_words(line, {"CREDENTIALS_DIRECTORY": "\0"})
    for credential in found.get("LoadCredential", ()):
        name, _, path = credential.partition(":")
        assert f"\0/{name}" in words
        assert "%" not in path.replace("%%", ""), "a specifier"
        words = [path.replace("%%", "%") if word == f"\0/{name}" else word for word in words]
    assert not any("\0" in word for word in words)
    return words


def cron_words(text: str) -> list[str]:
    """The words of a crontab's program: cron's own reading of `%`, then the shell's."""
    line = text.splitlines()[-1]
    assert line.startswith("* * * * * root ")
    command, escaped = "", False
    for character in line.removeprefix("* * * * * root "):
        assert character != "%" or escaped, "the command ends here"
        command = command[:-1] + "%" if character == "%" else command + character
        escaped = character == "\\" and not escaped
    flock, option, lock, *words = shlex.split(command)
    assert (flock, option, lock) == ("flock", "-n", "/run/keto-tokens.lock")
    assert words[-5:] == ["2>&1", "|", "logger", "-t", "keto-tokens"]
    return words[:-5]


def shell_line(text: str) -> str:
    """The line of userdata, as cloud-init hands it to the shell."""
    body = yaml.safe_load(text)
    assert text.startswith("#cloud-config\n") and list(body) == ["runcmd"]
    (line,) = body["runcmd"]
    return str(line)


def userdata_words(text: str) -> list[str]:
    """The words of the client in userdata."""
    words = shlex.split(shell_line(text))
    start = max(n for n, word in enumerate(words) if word == "client") - 1
    return words[start:words.index("&&", start)]


def pod_words(text: str) -> list[str]:
    """The words of a container, after the kubelet has put in the variables, of which there are none."""
    (container,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
    args = [re.sub(r"\$(\$|\(\w+\))", lambda m: "$" if m[1] == "$" else "VARIABLE", each)
            for each in container["args"]]
    assert container["command"][0] == "python3"
    return [container["command"][1], *args]


WORDS = {"systemd-server": exec_words, "systemd-client": exec_words, "cron": cron_words,
         "userdata": userdata_words, "deployment": pod_words}
SPECIAL = "%$\"'\\ #;|&<>(){}[]*?!~`=:,-@\u00e9\U0001f600ab1"
texts = st.text(st.one_of(st.sampled_from(SPECIAL), st.characters(codec="utf-8")), max_size=12).filter(
    lambda text: text.isprintable())
filled = texts.filter(bool)
keys = filled.filter(lambda text: "=" not in text)
tags = filled.filter(lambda text: not text.lower().startswith("aws:"))
paths = texts.map(lambda text: f"/etc/{text}x")
plain_paths = paths.filter(lambda text: not re.search(r"[\\'\"]|/$|//|/\.", text))


@st.composite
def asked(draw: st.DrawFn, what: str) -> list[str]:
    """Flags of any value that is legal for the role, as argparse takes them."""
    argv = [f"--tag-name={draw(tags)}"] * draw(st.booleans())
    if GENERATES[what].role == "client":
        argv += [f"--ca-path={draw(paths)}"] * draw(st.booleans())
        argv += [f"--kubeconfig={draw(plain_paths if what == 'systemd-client' else paths)}"]
        return argv + URL * (what == "userdata")
    found = draw(st.dictionaries(keys, filled, min_size=1, max_size=3))
    argv += [f"--filter={key}={value}" for key, value in found.items()]
    argv += [f"--region={draw(filled)}"] * draw(st.booleans())
    if what == "deployment":
        return [*argv, "--metrics-listen=:9115"]
    argv += [f"--context={draw(filled)}"] * draw(st.booleans())
    inside = plain_paths if what == "systemd-server" else paths
    return [*argv, f"--kubeconfig={draw(inside)}", *["--once"] * (what == "cron")]


@pytest.mark.parametrize("what", WORDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_read_is_what_was_asked_for(what: str, data: st.DataObject) -> None:
    argv = data.draw(asked(what))
    try:
        text = generated(what, *argv)
    except UsageError as error:
        assume("998 bytes" not in str(error))
        raise
    program, role, *words = WORDS[what](text)
    assert (program, role) == ("/usr/local/bin/keto-tokens", GENERATES[what].role)
    own = [word for word in argv if word not in URL]
    assert parsed(role, *words) == parsed(role, *own)


@given(st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_words_survive_their_readers(words: list[str]) -> None:
    line = " ".join(map(keto_tokens.unit_word, words))
    assert "" in words or unit_words(line, {}) == words
    assert [re.sub(r"\$(.)", r"\1", yaml.safe_load(keto_tokens.pod_word(word))) for word in words] == words


def test_a_shell_reads_a_crontab_as_we_do(tmp_path: Path) -> None:
    """And a real one at that."""
    text = generated("cron", "--filter", "a b=$HOME 100% 'x' \"y\" \\% `z`", *CLUSTER)
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    program.chmod(0o755)
    line = text.splitlines()[-1].partition("keto-tokens.lock ")[2].partition(" 2>&1")[0]
    line = line.replace("/usr/local/bin/keto-tokens", str(program), 1).replace("\\%", "%")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == cron_words(text)[1:]


# --- systemd ---------------------------------------------------------------------------------------

UNITS = {
    "server": ["systemd-server", *FILTER, *CLUSTER, "--leader-elect"],
    "server with all": ["systemd-server", "--filter", "a b=100% $x", "--master", "https://api:6443",
                        "--kube-token-file", "/etc/k/token", "--ca-path", "/etc/k/ca 1%.crt"],
    "server for a timer": ["systemd-server", *FILTER, *CLUSTER, "--once",
                           "--metrics-file", "/var/lib/node exporter/x.prom"],
    "client": ["systemd-client", "--master", "https://api:6443", "--ca-path", "/etc/kubernetes/ca.crt"],
    "client for kubeadm": ["systemd-client", "--format", "kubeadm", "--kubeconfig", "/etc/a b/100%.conf"],
    "timer": ["systemd-timer", *FILTER, *CLUSTER, "--interval", "90s"],
}


@pytest.mark.parametrize("argv", UNITS.values(), ids=UNITS)
def test_systemd_has_no_complaint(tmp_path: Path, argv: list[str]) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not on this machine")
    kind = "timer" if argv[0] == "systemd-timer" else "service"
    name = "keto-tokens-client" if argv[0] == "systemd-client" else "keto-tokens"
    other = tmp_path / "keto-tokens.service"
    other.write_text(generated("systemd-server", *FILTER, *CLUSTER, "--path", "/bin/true"))
    unit = tmp_path / f"{name}.{kind}"
    unit.write_text(generated(*argv, "--path", "/bin/true"))
    done = subprocess.run([program, "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if "keto-tokens" in line] == []
    if kind == "service":
        done = subprocess.run([program, "security", "--offline=true", "--threshold=22", str(unit)],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_settings_of_the_server() -> None:
    found = settings_of(generated(*UNITS["server"]))
    assert found["Type"] == ["notify"]
    assert found["WatchdogSec"] == found["TimeoutStartSec"] == [f"{keto_tokens.HUNG / 60:g}min"]
    assert found["LoadCredential"] == ["kubeconfig:/etc/kubernetes/admin.conf"]
    assert found["DynamicUser"] == ["yes"] and found["CapabilityBoundingSet"] == [""]
    assert found["ProtectSystem"] == ["strict"] and found["CacheDirectory"] == ["keto-tokens"]
    assert found["WantedBy"] == ["multi-user.target"]
    for pass_ in (settings_of(generated(*UNITS["server for a timer"])),):
        assert pass_["Type"] == ["oneshot"] and "WatchdogSec" not in pass_ and "WantedBy" not in pass_
        assert pass_["ReadWritePaths"] == ['"/var/lib/node exporter"'] and "DynamicUser" not in pass_


def test_the_settings_of_the_client() -> None:
    found = settings_of(generated(*UNITS["client"]))
    assert (found["Type"], found["Before"]) == (["oneshot"], ["kubelet.service"])
    assert found["Restart"] == ["on-failure"] and found["StartLimitIntervalSec"] == ["0"]
    assert found["ReadWritePaths"] == ['"/etc/kubernetes"'] and "ExecStartPost" not in found
    kubeadm = settings_of(generated(*UNITS["client for kubeadm"]))
    assert "Before" not in kubeadm, "kubeadm starts the kubelet, and would wait for it for ever"
    (joins,) = kubeadm["ExecStartPost"]
    assert unit_words(joins, {})[1:] == ["kubeadm", "join", "--config", "/etc/a b/kubeadm-join.yaml"]


def test_a_timer_says_what_makes_its_service() -> None:
    text = generated("systemd-timer", "--filter", "a b=c", *CLUSTER, "--interval", "1m30s", "--path", "/x")
    (line,) = re.findall(r"^#   keto-tokens generate (.*) > keto-tokens\.service$", text, re.MULTILINE)
    service = generated(*shlex.split(line))
    assert exec_words(service)[:4] == ["/x", "server", "--filter", "a b=c"]
    assert settings_of(service)["Type"] == ["oneshot"]
    assert settings_of(text)["OnUnitInactiveSec"] == ["90s"]


# --- userdata --------------------------------------------------------------------------------------


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves the built file."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, directory=str(BUILT.parent), **options)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.mark.parametrize("right", [True, False], ids=["the file", "another file"])
def test_userdata_from_nothing_to_a_kubelet(faulty: World, tmp_path: Path, right: bool) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not on this machine")
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    (tmp_path / "bin").mkdir()
    systemctl, program = tmp_path / "bin" / "systemctl", tmp_path / "bin" / "keto-tokens"
    systemctl.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/systemctl\n')
    systemctl.chmod(0o755)
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        sha = hashlib.sha256(BUILT.read_bytes()).hexdigest() if right else "0" * 64
        text = generated(
            "userdata", "--master", faulty.cluster.url, "--ca-path", str(faulty.cluster.ca_path),
            "--kubeconfig", str(faulty.kubeconfig(node)), "--interval", "50ms", "--timeout", "20s",
            "--url", f"http://127.0.0.1:{server.server_address[1]}/keto-tokens", "--sha256", sha,
            "--path", str(program), "--shell",
        )
        environ = {**faulty.aws.environment(), **faulty.node_environment(node),
                   "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = subprocess.run(["sh"], input=text, env=environ, capture_output=True, text=True, timeout=120)
        server.shutdown()
    assert (done.returncode == 0, program.exists()) == (right, right), done.stderr
    assert faulty.aws.tag(node) == ("Success" if right else faulty.token_of(node))
    assert (tmp_path / "systemctl").exists() == right
    if right:
        assert (tmp_path / "systemctl").read_text() == "start kubelet\n"
        assert kubeconfig_of(faulty.kubeconfig(node))["token"] == faulty.token_of(node)


def test_userdata_for_cloud_init_is_the_same_line() -> None:
    argv = ["userdata", *URL, "--ca-path", "/a b/'c'.crt", "--format", "kubeadm"]
    line = shell_line(generated(*argv))
    assert generated(*argv, "--shell") == f"#!/bin/sh\n{line}\n"
    assert subprocess.run(["sh", "-n"], input=line, text=True).returncode == 0
    assert line.endswith(" && kubeadm join --config /etc/kubernetes/kubeadm-join.yaml")


def test_the_built_file_knows_its_own_hash() -> None:
    result = run_built("generate", "userdata", *URL[:2])
    assert (result.code, result.err) == (0, "")
    assert hashlib.sha256(BUILT.read_bytes()).hexdigest() in result.out


# --- policies and manifests ------------------------------------------------------------------------


def test_policies_name_the_tag_and_the_account() -> None:
    text = generated("iam-client", "--tag-name", "${aws:x} \"y\"", "--account", "123456789012")
    read, mark = json.loads(text)["Statement"]
    assert mark["Resource"] == "arn:aws:ec2:*:123456789012:instance/*"
    assert mark["Condition"]["ForAllValues:StringEquals"] == {"aws:TagKeys": ["${$}{aws:x} \"y\""]}
    assert mark["Condition"]["StringEquals"] == {"aws:RequestTag/${aws:x} \"y\"": "Success"}
    assert json.loads(generated("iam-server", "--tag-name", "x"))["Statement"][1]["Condition"] == {
        "ForAllValues:StringEquals": {"aws:TagKeys": ["x"]}, "Null": {"aws:TagKeys": "false"},
    }


def test_the_lease_is_named_when_its_owner_is_known(faulty: World) -> None:
    assert isinstance(faulty.cluster, StandinCluster)
    api = faulty.cluster.api
    flags = [*FILTER, "--region", "eu-west-2", "--leader-elect"]
    rules = granted(generated("rbac", *flags))
    names = {rule[4] for rule in rules if rule[2] == "leases" and rule[0] != "create"}
    parsed_ = parse_options(["server", *flags], {})
    assert parsed_ is not None
    owner = keto_tokens.owner_hash("aws", "eu-west-2", "KubeletToken", parsed_.filter)
    assert names == {f"keto-tokens-{owner}"}
    access = keto_tokens.Access(
        faulty.cluster.url, "test", faulty.cluster.ca_path.read_text(),
        credential=keto_tokens.static_token(api.account(sorted(rules))),
    )
    cluster = keto_tokens.Cluster(access, keto_tokens.Calls())
    with keto_tokens.Leader(cluster, "kube-system", *names) as leader:
        leader._step()
        assert leader.leads()
    with pytest.raises(keto_tokens.SetupError, match="403"):
        keto_tokens.Leader(cluster, "kube-system", "another").__enter__()


@pytest.mark.parametrize(("argv", "leases"), [
    ([], 0), (["--region=x", *FILTER], 0), (["--leader-elect"], 3), (["--leader-elect", *FILTER], 3),
    (["--leader-elect", "--region=x"], 3), (["--leader-elect", "--region=x", "--all-groups"], 3),
], ids=str)
def test_leases_are_for_leader_election_alone(argv: list[str], leases: int) -> None:
    rules = granted(generated("rbac", *argv))
    assert len([rule for rule in rules if rule[2] == "leases"]) == leases
    assert any(rule[4:] for rule in rules) == (argv[1:] == ["--region=x", "--all-groups"] or
                                               argv == ["--leader-elect", "--region=x", *FILTER])


@pytest.mark.parametrize("namespace", ["kube-system", "1e3", "on", "123", "null"])
def test_namespaces_are_names(namespace: str) -> None:
    for what in ("rbac", "deployment"):
        for body in yaml.safe_load_all(generated(what, *FILTER, "--token-namespace", namespace)):
            assert body["metadata"].get("namespace", namespace) == namespace
            for subject in body.get("subjects", ()):
                assert subject["namespace"] == namespace


@pytest.mark.parametrize("argv", [[], ["--leader-elect"], ["--metrics-listen", ":1234"]], ids=str)
def test_the_parts_of_the_deployment_fit_together(argv: list[str]) -> None:
    text = generated("deployment", *FILTER, *argv)
    body = yaml.safe_load(text)
    spec, pod = body["spec"], body["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    accounts = [each["metadata"]["name"] for each in yaml.safe_load_all(generated("rbac"))
                if each["kind"] == "ServiceAccount"]
    assert [pod["serviceAccountName"]] == accounts
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert mounts[container["command"][1]] == "program"
    assert mounts[os.path.dirname(container["env"][0]["value"])] == "cache"
    (port,) = container["ports"]
    options = parsed(*pod_words(text)[1:])
    assert options["metrics_listen"] == ("", port["containerPort"])
    for probe, path in ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz"):
        assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
    assert spec["replicas"] == (2 if options["leader_elect"] else 1)
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]


def test_the_role_for_google_cloud() -> None:
    body = yaml.safe_load(generated("gce-role"))
    assert body["includedPermissions"] == list(keto_tokens.GCE_PERMISSIONS)
    assert set(body) == {"title", "description", "stage", "includedPermissions"}


# --- refusals --------------------------------------------------------------------------------------

REFUSED = {
    "a token": (["systemd-server", *FILTER, *CLUSTER, "--kube-token", "hunter2"], "--kube-token-file"),
    "no groups": (["systemd-server", *CLUSTER], "which groups"),
    "no groups in a pod": (["deployment"], "which groups"),
    "no cluster": (["cron", *FILTER], "which cluster"),
    "no token for the cluster": (["systemd-timer", *FILTER, "--master", "https://h"], "which cluster"),
    "a relative path": (["systemd-server", *FILTER, "--kubeconfig", "admin.conf"], "'admin.conf' is rel"),
    "a line break": (["cron", "--filter", "a=b\nc", *CLUSTER], "--filter"),
    "a bad value": (["systemd-client", "--interval", "soon"], "--interval"),
    "two filters on a key": (["rbac", *FILTER, "--filter", "Role=x"], "--filter"),
    "a leader for a pass": (["cron", *FILTER, *CLUSTER, "--leader-elect"], "--leader-elect"),
    "a long line": (["cron", "--filter", f"a={'b' * 900}", *CLUSTER], "998 bytes"),
    "a path for no unit": (["systemd-server", *FILTER, "--kubeconfig", "/a'b"], "cannot stand in a unit"),
    "a program in quotes": (["systemd-client", "--path", "/opt/a b"], "--path"),
    "a file in a pod": (["deployment", *FILTER, *CLUSTER], "--kubeconfig"),
    "a loopback in a pod": (["deployment", *FILTER, "--metrics-listen", "127.0.0.1:9115"], "probes"),
    "no account": (["iam-server", "--account", "1"], "--account"),
    "no URL": (["userdata", "--sha256", "0" * 64], "--url"),
    "no hash": (["userdata", *URL[:2]], "--sha256"),
    "kubeadm's own file": (
        ["systemd-client", "--format", "kubeadm", "--kubeconfig", "/etc/kubernetes/kubelet.conf"],
        "kubeadm does not join",
    ),
    "nothing": ([], "generate what? systemd-server"),
    "something else": (["nonsense"], "nonsense"),
}


@pytest.mark.parametrize(("argv", "says"), REFUSED.values(), ids=REFUSED)
def test_refusals(world: World, argv: list[str], says: str) -> None:
    result = world.program("generate", *argv)
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1), result.err
    assert says in result.err and "hunter2" not in result.err


@pytest.mark.parametrize("what", GENERATES)
def test_each_prints_a_file_and_touches_nothing(world: World, what: str) -> None:
    result = world.program("generate", what, *USUAL.get(what, []))
    assert (result.code, result.err, world.aws.count()) == (0, "", {})
    assert result.out == generated(what, *USUAL.get(what, []))


@pytest.mark.parametrize(("interval", "field"), [("", "*"), ("60s", "*"), ("5m", "*/5"), ("30m", "*/30")])
def test_cron_passes_as_often_as_was_asked(interval: str, field: str) -> None:
    given = ["--interval", interval] if interval else []
    line = generated("cron", "--filter", "a=b", "--kubeconfig", "/k", *given).splitlines()[-1]
    assert line.split()[:5] == [field, "*", "*", "*", "*"]


@pytest.mark.parametrize("interval", ["90s", "7m", "1h", "10s"])
def test_what_cron_cannot_do_is_refused(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "cron", "--filter", "a=b", "--kubeconfig", "/k", "--interval", interval]
    assert keto_tokens.main(argv) == 2
    assert "--interval" in capsys.readouterr().err


def test_a_presigned_url_is_a_url() -> None:
    url = "https://b.s3.amazonaws.com/keto-tokens?X-Amz-Signature=a%2Fb&X-Amz-Date=1"
    text = generated("userdata", "--master", "https://api:6443", "--ca-path", "/ca", "--url", url,
                     "--sha256", "ab" * 32, "--shell")
    assert url in shlex.split(text.replace("\n", " "), comments=False)
