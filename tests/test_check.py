"""keto-tokens check: what it finds, that it changes nothing, and that it can be a check."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import keto_tokens
from clusters import StandinCluster
from conftest import FILTER, Result, World
from pki import Authority
from standin_aws import refusal
from standin_kubernetes import Kubernetes, status
from test_life_of_a_token import BASE, CSRS, NODES
from test_trust import pin, with_tags


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)


def api(world: World) -> Kubernetes:
    assert isinstance(world.cluster, StandinCluster)
    return world.cluster.api


def server(world: World, *argv: str, **environ: str) -> Result:
    return world.program(
        "check", "server", *FILTER, *world.cluster.server_flags(), *argv, **environ
    )


def client(world: World, node: str, *argv: str) -> Result:
    return world.program(
        "check", "client", "--master", world.cluster.url, "--kubeconfig", str(world.kubeconfig(node)),
        *argv, **world.node_environment(node),
    )


def levels(result: Result) -> dict[str, str]:
    """Each subject's level, of the lines."""
    return {line[6:].split("  ")[0].strip(): line[:5].strip() for line in result.out.splitlines()}


def text(result: Result, subject: str) -> str:
    """What is said of a subject."""
    (line,) = (line for line in result.out.splitlines() if line[6:].startswith(subject))
    return line


def test_all_is_well_for_the_server(world: World) -> None:
    nodes = world.aws.group("compute", 2, Role="compute")
    world.server()
    result = server(world)
    assert result.code == 0, result.out
    assert set(levels(result).values()) == {"ok"}
    assert set(levels(result)) == {
        "access", "token namespace", "cloud", "cluster", "clock", "list secrets", "get secrets",
        "create secrets", "update secrets", "delete secrets", "list certificatesigningrequests",
        "get nodes", "cluster-info", "bootstrap tokens", "AWS region", "AWS credentials",
        "autoscaling:DescribeAutoScalingGroups", "ec2:DescribeTags", "ec2:CreateTags",
    }
    assert "2 instances in 1 groups" in result.out and "found by env" in result.out
    assert all(world.aws.tag(node) == world.token_of(node) for node in nodes)


def test_all_is_well_for_the_client(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    with_tags(faulty)
    for ways in (["--ca-path", str(faulty.cluster.ca_path)], ["--ca-cert-hash", pin(faulty)], []):
        result = client(faulty, node, *ways)
        assert result.code == 0, result.out
        assert set(levels(result).values()) == {"ok"}
    assert not faulty.kubeconfig(node).exists()
    assert faulty.aws.tag(node) == faulty.token_of(node)


def test_kubeadms_file_is_looked_at_as_well(faulty: World, tmp_path: Path) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    (tmp_path / "file").write_text("no folder")
    flags = ["--ca-path", str(faulty.cluster.ca_path), "--format", "kubeadm"]
    assert levels(client(faulty, node, *flags))["join config"] == "ok"
    bad = client(faulty, node, *flags, "--join-config", str(tmp_path / "file" / "x"))
    assert (bad.code, levels(bad)["join config"]) == (1, "FAIL")


def test_a_check_changes_nothing(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    api(faulty).asked.clear()
    server(faulty)
    client(faulty, node)
    writes = {(asked.verb, asked.resource) for asked in api(faulty).asked
              if asked.verb not in ("get", "list")}
    assert writes <= {("create", "selfsubjectaccessreviews"), ("create", "selfsubjectreviews")}
    assert all("DryRun" in fields for name, fields in faulty.aws.calls if name == "CreateTags")
    assert (faulty.aws.tag(node), faulty.cluster.token_secrets()) == (None, [])
    assert not faulty.kubeconfig(node).parent.exists()


def test_the_findings_as_json(world: World) -> None:
    world.aws.group("compute", 1, Role="compute")
    findings = json.loads(server(world, "-o", "json").out)
    assert {tuple(sorted(finding)) for finding in findings} == {("level", "subject", "text")}
    assert {finding["level"] for finding in findings} <= {"ok", "warn"}


@pytest.mark.parametrize(("operation", "code"), [
    ("DescribeAutoScalingGroups", "AccessDenied"), ("DescribeTags", "UnauthorizedOperation"),
    ("CreateTags", "UnauthorizedOperation"),
])
def test_a_missing_aws_permission_fails(faulty: World, operation: str, code: str) -> None:
    faulty.aws.group("compute", 1, Role="compute")
    faulty.aws.fail(operation, refusal(code, 403), times=9)
    result = server(faulty)
    assert result.code == 1
    (failed,) = [subject for subject, level in levels(result).items() if level == "FAIL"]
    assert failed.endswith(f":{operation}")
    assert "the IAM policy must allow" in text(result, failed)


@pytest.mark.parametrize("missing", [*BASE, CSRS, NODES], ids=lambda rule: f"{rule[0]} {rule[2]}")
def test_a_missing_right_in_the_cluster_is_found(faulty: World, missing: Any) -> None:
    faulty.aws.group("compute", 1, Role="compute")
    token = api(faulty).account([rule for rule in [*BASE, CSRS, NODES] if rule != missing])
    result = faulty.program(
        "check", "server", *FILTER, "--master", faulty.cluster.url, "--ca-path",
        str(faulty.cluster.ca_path), KUBE_SERVICE_TOKEN=token,
    )
    optional = missing in (CSRS, NODES)
    found = levels(result)
    assert found[f"{missing[0]} {missing[2]}"] == ("warn" if optional else "FAIL")
    assert result.code == (0 if optional else 1)
    assert "README, Rights" in result.out or optional


def test_leases_are_needed_for_leader_election_alone(faulty: World) -> None:
    token = api(faulty).account([*BASE, CSRS, NODES])
    flags = ["check", "server", *FILTER, "--master", faulty.cluster.url, "--ca-path",
             str(faulty.cluster.ca_path)]
    assert faulty.program(*flags, KUBE_SERVICE_TOKEN=token).code == 0
    result = faulty.program(*flags, "--leader-elect", KUBE_SERVICE_TOKEN=token)
    assert result.code == 1
    assert [levels(result)[f"{verb} leases"] for verb in ("get", "create", "update")] == ["FAIL"] * 3


def test_another_namespace_fails(faulty: World) -> None:
    result = server(faulty, "--token-namespace", "default")
    assert (result.code, levels(result)["token namespace"]) == (1, "FAIL")


def test_a_clock_that_is_off_is_a_warning(faulty: World) -> None:
    api(faulty).clock = 600
    result = server(faulty)
    assert (result.code, levels(result)["clock"]) == (0, "warn")


def test_no_matching_group_is_a_warning(faulty: World) -> None:
    result = server(faulty)
    assert result.code == 0
    assert levels(result)["autoscaling:DescribeAutoScalingGroups"] == "warn"


def test_a_cluster_that_is_not_there_fails_and_the_rest_is_looked_at(faulty: World) -> None:
    faulty.aws.group("compute", 1, Role="compute")
    result = faulty.program("check", "server", *FILTER, "--master", "https://127.0.0.1:9",
                            "--kube-token", "x")
    assert result.code == 1
    assert levels(result)["cluster"] == "FAIL"
    assert levels(result)["ec2:CreateTags"] == "ok"


def test_a_bootstrap_token_that_is_not_taken_fails(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    api(faulty).fail("POST", "/selfsubjectreviews", status(401), times=9)
    assert levels(server(faulty))["bootstrap tokens"] == "FAIL"
    result = client(faulty, node, "--ca-path", str(faulty.cluster.ca_path))
    assert (result.code, levels(result)["bootstrap token"]) == (1, "FAIL")


def test_a_cluster_info_that_is_missing_is_a_warning_for_the_server(faulty: World) -> None:
    api(faulty).fail("GET", "cluster-info", status(404), times=99)
    result = server(faulty)
    assert (result.code, levels(result)["cluster-info"]) == (0, "warn")
    assert "--ca-path" in text(result, "cluster-info")


def test_the_client_without_metadata_or_permission(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.aws.fail("DescribeTags", refusal("UnauthorizedOperation", 403), times=99)
    result = client(faulty, node)
    assert result.code == 1
    found = levels(result)
    assert (found["instance metadata tags"], found["ec2:DescribeTags"]) == ("warn", "FAIL")
    assert found["tag"] == "FAIL"


def test_the_client_before_the_server_ran(faulty: World) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    result = client(faulty, node)
    assert (result.code, levels(result)["tag"]) == (0, "warn")
    assert "does the server run" in text(result, "tag")


def test_the_client_of_the_wrong_cluster(faulty: World, tmp_path: Path) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.server()
    other = tmp_path / "other.crt"
    other.write_text(Authority().pem)
    result = client(faulty, node, "--ca-path", str(other))
    assert (result.code, levels(result)["cluster"]) == (1, "FAIL")


@pytest.mark.parametrize(("named", "subject"), [
    ("auto", "cloud"), ("aws", "instance metadata"), ("gce", "instance metadata"),
])
def test_the_client_where_there_is_no_instance(
    faulty: World, monkeypatch: pytest.MonkeyPatch, named: str, subject: str
) -> None:
    monkeypatch.setattr(keto_tokens, "retrying", lambda call, sleep, attempts: call())
    result = faulty.program("check", "client", "--cloud", named, "--ca-path", str(faulty.cluster.ca_path),
                            AWS_EC2_METADATA_SERVICE_ENDPOINT="http://127.0.0.1:9",
                            AWS_EC2_METADATA_DISABLED="false")
    assert (result.code, levels(result)[subject]) == (1, "FAIL")


def test_a_kubeconfig_that_could_not_be_written(faulty: World, tmp_path: Path) -> None:
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    (tmp_path / "file").write_text("no folder")
    result = client(faulty, node, "--kubeconfig", str(tmp_path / "file" / "kubeconfig"))
    assert (result.code, levels(result)["kubeconfig"]) == (1, "FAIL")


@pytest.mark.parametrize("argv", [["check"], ["check", "nonsense"], ["check", "server"],
                                  ["check", "server", "--filter", "x"],
                                  ["check", "client", "-o", "wide"]], ids=" ".join)
def test_a_check_that_cannot_be_meant(faulty: World, argv: list[str]) -> None:
    result = faulty.program(*argv)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
