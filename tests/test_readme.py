"""What README prints to be applied: it parses, and it is exactly what the program needs."""
from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import keto_tokens
from clusters import StandinCluster
from conftest import BUILT, FILTER, REPOSITORY, World
from standin_aws import Aws

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


POLICIES = dict(zip(["server", "client", "client with metadata tags"], map(json.loads, blocks("json"))))


def allowed(policy: Any) -> set[str]:
    """The actions that an IAM policy allows."""
    actions: set[str] = set()
    for statement in policy["Statement"]:
        listed = statement["Action"]
        actions |= {listed} if isinstance(listed, str) else set(listed)
    return actions


def iam(operation: str) -> str:
    """The IAM action of an operation of this program's."""
    return f"{'autoscaling' if 'AutoScaling' in operation else 'ec2'}:{operation}"


def used(world: World) -> set[str]:
    """The IAM actions of the calls that were made since last asked."""
    actions = {iam(operation) for operation in world.aws.count()}
    world.aws.calls.clear()
    return actions


@pytest.mark.parametrize("name", POLICIES)
def test_the_policies_are_iam_policies(aws: Aws, name: str) -> None:
    client = aws.client("iam")
    made = client.create_policy(PolicyName=name.replace(" ", "-"), PolicyDocument=json.dumps(POLICIES[name]))
    assert made["Policy"]["Arn"]


def test_the_policies_allow_what_a_whole_life_uses_and_no_more(faulty: World) -> None:
    from test_trust import with_tags

    first, second = faulty.aws.group("compute", 2, Role="compute")
    faulty.server()
    assert used(faulty) == allowed(POLICIES["server"])
    assert faulty.client(first).code == 0
    assert used(faulty) == allowed(POLICIES["client"])
    with_tags(faulty)
    assert faulty.client(second).code == 0
    assert used(faulty) == allowed(POLICIES["client with metadata tags"])
    faulty.server()
    assert used(faulty) <= allowed(POLICIES["server"])


@pytest.mark.parametrize("name", ["client", "client with metadata tags"])
def test_a_node_may_mark_itself_alone(name: str) -> None:
    (mark,) = (each for each in POLICIES[name]["Statement"] if each["Action"] == "ec2:CreateTags")
    assert mark["Condition"] == {
        "ArnLike": {"ec2:SourceInstanceARN": "arn:aws:ec2:*:111122223333:instance/${ec2:InstanceID}"},
        "StringEquals": {"aws:RequestTag/KubeletToken": "Success"},
        "ForAllValues:StringEquals": {"aws:TagKeys": ["KubeletToken"]},
        "Null": {"aws:TagKeys": "false"},
    }


def granted(text: str) -> set[tuple[str, ...]]:
    """The rules of roles as (verb, group, resource, namespace) and perhaps a name."""
    rules: set[tuple[str, ...]] = set()
    for body in yaml.safe_load_all(text):
        for rule in body.get("rules", ()):
            namespace = body["metadata"].get("namespace", "")
            rules |= {
                (verb, group, resource, namespace, *rule.get("resourceNames", ()))
                for verb in rule["verbs"] for group in rule["apiGroups"] for resource in rule["resources"]
            }
    return rules


def test_the_rbac_allows_what_a_whole_life_uses_and_no_more(faulty: World) -> None:
    """Issue, a name that is taken, extension, join, revocation, and a leader: every right is used."""
    assert isinstance(faulty.cluster, StandinCluster)
    api = faulty.cluster.api
    rules = granted(next(block for block in blocks("yaml") if "ClusterRole" in block))
    token = api.account(sorted(rules))
    user = api.users[token].name
    flags = [*FILTER, "--master", faulty.cluster.url, "--ca-path", str(faulty.cluster.ca_path)]
    environ = {"KUBE_SERVICE_TOKEN": token}

    def server() -> None:
        assert faulty.program("server", "--once", *flags, **environ).code == 0

    (node,) = faulty.aws.group("compute", 1, Role="compute")
    server()
    name = faulty.secret_name(node)
    found = api.objects.pop(("secrets", "kube-system", name))
    api.put("secrets", "kube-system", name, {**found, "metadata": {}})  # somebody else's now
    server()
    api.clock += 1500
    server()
    assert faulty.client(node).code == 0
    faulty.cluster.join(faulty.token_of(node), f"node-{node}")
    server()
    access = keto_tokens.Access(faulty.cluster.url, "test", faulty.cluster.ca_path.read_text(),
                                credential=keto_tokens.static_token(token))
    with keto_tokens.Leader(keto_tokens.Cluster(access, keto_tokens.Calls()), "kube-system", "x") as leader:
        leader._step()
        assert leader.leads()
    used = {
        (asked.verb, asked.group, asked.resource, asked.namespace)
        for asked in api.asked if asked.user == user
    }
    assert used == rules


def commands() -> list[list[str]]:
    """The commands that README has generate something."""
    lines = [*"".join(blocks("sh")).splitlines(), *re.findall(r"`(keto-tokens generate [a-z][^`]+)`", README)]
    split = [shlex.split(re.sub(r" [>|].*", "", line)) for line in lines if " generate " in line]
    return [words[1:] for words in split]


def test_readme_shows_how_to_generate_everything() -> None:
    assert {words[1] for words in commands()} == set(keto_tokens.GENERATES)


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_what_readme_generates_is_generated(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [str(BUILT)])
    assert keto_tokens.main(argv) == 0
    printed = capsys.readouterr().out
    if argv[1] in ("iam-server", "iam-client", "rbac", "gce-role"):
        assert printed in blocks("json") + blocks("yaml"), "README prints another one"


def test_every_policy_of_readme_is_generated() -> None:
    policies = "iam-server", "iam-client", "rbac", "gce-role"
    printed = {tuple(words) for words in commands() if words[1] in policies}
    assert len(printed) == len(blocks("json")) + 2 == 5


def test_the_alerts_are_of_metrics_that_there_are() -> None:
    (group,) = yaml.safe_load(next(block for block in blocks("yaml") if "alert:" in block))["groups"]
    there = keto_tokens.Metrics(keto_tokens.Calls()).text().decode()
    for rule in group["rules"]:
        names = set(re.findall(r"keto_tokens_[a-z_]+", rule["expr"]))
        assert names and all(f"# TYPE {name} " in there for name in names)
        assert set(rule) == {"alert", "expr", "for", "annotations"}
    states = re.findall(r'state="(\w+)"', str(group))
    assert set(states) <= set(keto_tokens.STATES)


def test_the_table_of_metrics_is_all_of_them() -> None:
    there = keto_tokens.Metrics(keto_tokens.Calls()).text().decode()
    listed = {f"keto_tokens_{name}" for name in re.findall(r"^\| `([a-z_]+)` \|", README, re.MULTILINE)}
    assert listed == set(re.findall(r"^# TYPE (\S+) ", there, re.MULTILINE))


@pytest.mark.parametrize("line", blocks("sh"))
def test_the_shell_lines_parse(line: str) -> None:
    assert subprocess.run(["sh", "-n"], input=line, text=True).returncode == 0


def test_every_flag_in_readme_is_one() -> None:
    flags = [*keto_tokens.GLOBAL_FLAGS]
    for command in keto_tokens.COMMANDS.values():
        flags += command.flags
    for command in keto_tokens.GENERATES.values():
        flags += command.flags
    others = {"--enable-bootstrap-token-auth", "--bootstrap-kubeconfig", "--print-join-command",
              "--resources", "--tags", "--config", "--help", "--file", "--keys", "--metadata",
              "--register-node"}
    used = set(re.findall(r"(?<![-\w])--[a-z][a-z-]+", README))
    assert used <= {f"--{flag.name}" for flag in flags} | others


def test_the_exit_codes_of_readme_are_those_of_the_program() -> None:
    in_doc = set(re.findall(r"^  (\d+\+?N?)  ", keto_tokens.__doc__ or "", re.MULTILINE))
    assert in_doc == set(re.findall(r"^\| (\d+\+?N?) \|", README, re.MULTILINE))


def test_the_role_for_gce_is_what_the_program_needs() -> None:
    (role,) = [yaml.safe_load(block) for block in blocks("yaml") if "includedPermissions" in block]
    assert sorted(role["includedPermissions"]) == list(keto_tokens.GCE_PERMISSIONS)


def flag_rows() -> list[str]:
    """README's table of flags: each once, with the commands that take it."""
    found: dict[tuple[str, str], tuple[keto_tokens.Flag, list[str]]] = {}
    for name, command in keto_tokens.COMMANDS.items():
        for flag in command.flags:
            found.setdefault((flag.name, f"{flag.help}{flag.default}"), (flag, []))[1].append(name)
    everywhere = [(flag, ["all"]) for flag in keto_tokens.GLOBAL_FLAGS]
    return [
        f"| `--{flag.name}`{f', `{flag.short}`' if flag.short else ''} | {', '.join(takers)} | "
        f"{', '.join(f'`{name}`' for name in flag.env)} | {f'`{flag.default}`' if flag.default else ''} | "
        f"{flag.help} |"
        for flag, takers in [*everywhere, *found.values()]
    ]


def test_readme_lists_every_flag_as_it_is() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| `--") and line.count("|") == 6]
    assert rows == flag_rows()


def runnable() -> list[str]:
    """The commands of the chapter that one starts with, but for those of the system."""
    chapter = README.partition("## Start in five minutes")[2].partition("\n## ")[0]
    return re.findall(r"^ +(keto-tokens .*)$", chapter, re.MULTILINE)


@pytest.mark.parametrize("line", runnable())
def test_what_one_starts_with_runs(faulty: World, tmp_path: Path, line: str) -> None:
    """Each command of it in a world in which the ones before it were run, with that world's addresses."""
    assert isinstance(faulty.cluster, StandinCluster)
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    if " client " in line or " status " in line:
        faulty.server(filters=["--filter", "Role=compute"])
    admin = tmp_path / "admin.conf"
    user = {"name": "me", "user": {"token": faulty.cluster.api.admin}}
    cluster = {"server": faulty.cluster.url, "certificate-authority": str(faulty.cluster.ca_path)}
    admin.write_text(json.dumps({
        "clusters": [{"name": "c", "cluster": cluster}], "users": [user],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "me"}}], "current-context": "x",
    }))
    places = {
        "/etc/kubernetes/admin.conf": str(admin), "https://api.example.com:6443": faulty.cluster.url,
        "/etc/kubernetes/bootstrap-kubelet.conf": str(faulty.kubeconfig(node)),
        "sha256:HEX": keto_tokens.public_key_hash(faulty.cluster.api.authority.pem),
    }
    words = [places.get(word, word) for word in shlex.split(line)[1:]]
    environ = {**faulty.node_environment(node), "GCE_METADATA_HOST": "127.0.0.1:1"}
    result = faulty.program(*words, **environ)
    assert result.code == 0, result.err + result.out
