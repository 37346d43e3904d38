"""What every cloud has to do: one suite for all of them."""
from __future__ import annotations

import pytest

from clouds import kubelet_name
from conftest import BOTH, World

pytestmark = BOTH


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries at once: what is tested is that they come, not when."""
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)


def test_a_pass_over_2000_nodes_is_a_few_calls(world: World) -> None:
    nodes = [node for name in "abcd" for node in world.cloud.group(name, 500, Role="compute")]
    result = world.server("--dry-run")
    assert result.code == 0
    assert sorted(line.split()[1] for line in result.out.splitlines()) == sorted(nodes)
    pages = {"compute.instances.aggregatedList": 4} if world.cloud.name == "gce" else {}
    assert world.cloud.count() == {**world.cloud.words.reads, **pages}


def test_each_new_node_costs_one_write(world: World) -> None:
    world.cloud.group("compute", 20, Role="compute")
    assert world.server().pass_line["issued"] == "20"
    writes = {name: 20 * number for name, number in world.cloud.words.writes.items()}
    assert world.cloud.count() == {**world.cloud.words.reads, **writes}


def test_a_tag_is_read_written_and_marked(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.cloud.set_tag(node, "keep me", "Other")
    world.server()
    token = world.cloud.tag(node)
    assert token == world.token_of(node)
    world.take(node)
    assert (world.cloud.tag(node), world.cloud.tag(node, "Other")) == ("Success", "keep me")
    world.cluster.join(token, kubelet_name(node))
    assert world.server().pass_line["revoked"] == "1"
    assert (world.cloud.tag(node), world.cloud.tag(node, "Other")) == ("Success", "keep me")


def test_two_nodes_are_two_nodes(world: World) -> None:
    first, second = world.cloud.group("compute", 2, Role="compute")
    world.server()
    world.take(first)
    assert world.cloud.tag(first) == "Success"
    assert world.cloud.tag(second) == world.token_of(second)
    assert not world.kubeconfig(second).exists()


@pytest.mark.parametrize("call", ["list", "read", "write"])
def test_a_missing_permission_is_named(world: World, call: str) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.cloud.refuse(call)
    result = world.server()
    assert result.code == 4
    assert world.cloud.words.permissions[call] in result.err
    assert "README" in result.err or "IAM policy must allow" in result.err
    assert "Traceback" not in result.err
    world.cloud.recover()
    assert world.server().code == 0
    assert world.cloud.tag(node) == world.token_of(node)


@pytest.mark.parametrize("call", ["list", "read", "write"])
@pytest.mark.parametrize("fault", ["throttle", "break_down"])
def test_a_call_that_fails_twice_is_made_a_third_time(world: World, fault: str, call: str) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    getattr(world.cloud, fault)(call, times=2)
    result = world.server()
    assert (result.code, result.pass_line["issued"]) == (0, "1"), result.err
    assert world.cloud.tag(node) == world.token_of(node)


@pytest.mark.parametrize("call", ["list", "read", "write"])
@pytest.mark.parametrize("fault", ["throttle", "break_down"])
def test_what_goes_on_failing_is_left_to_the_next_pass(world: World, fault: str, call: str) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    getattr(world.cloud, fault)(call, times=30)
    result = world.server()
    assert result.code == 4
    assert result.err.splitlines()[-1].startswith("keto-tokens: ")
    world.cloud.recover()
    assert world.server().code == 0
    assert world.cloud.tag(node) == world.token_of(node)


def test_an_instance_that_vanished_touches_no_other(world: World) -> None:
    nodes = world.cloud.group("compute", 3, Role="compute")
    world.cloud.vanish()
    result = world.server()
    assert (result.code, result.pass_line["issued"], result.pass_line["failed"]) == (4, "2", "1")
    assert sum(world.cloud.tag(node) == world.token_of(node) for node in nodes) == 2


@pytest.mark.parametrize("rubbish", ["x" * 256, "", "abcdef.0123456789ABCDEF"])
def test_rubbish_in_a_tag_is_not_there_for_the_client(world: World, rubbish: str) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.cloud.set_tag(node, rubbish)
    result = world.client(node, "--timeout", "100ms")
    assert result.code == 5
    assert not world.kubeconfig(node).exists()


def test_check_finds_nothing_wrong_and_changes_nothing(world: World) -> None:
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    token = world.cloud.tag(node)
    server = world.program("check", "server", *world.filters, *world.cluster.server_flags())
    assert server.code == 0, server.out
    assert world.cloud.words.permissions["write"] in server.out
    client = world.program(
        "check", "client", "--master", world.cluster.url, "--ca-path", str(world.cluster.ca_path),
        "--kubeconfig", str(world.kubeconfig(node)), **world.node_environment(node),
    )
    assert client.code == 0, client.out
    assert node in client.out and "holds token id" in client.out
    assert world.cloud.tag(node) == token
    assert not world.kubeconfig(node).parent.exists()


def test_check_names_what_is_missing(world: World) -> None:
    world.cloud.group("compute", 1, Role="compute")
    world.cloud.refuse("write")
    result = world.program("check", "server", *world.filters, *world.cluster.server_flags())
    assert result.code == 1
    (line,) = [line for line in result.out.splitlines() if line.startswith("FAIL")]
    assert world.cloud.words.permissions["write"] in line
