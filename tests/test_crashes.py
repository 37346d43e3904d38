"""A process that is killed after any single external effect leaves something the next run finishes.

For each row of the protocol table the program runs once to list its effects; then it is killed after
the first of them, after the second, and so on, each time from the same start, and run again.
"""
from __future__ import annotations

import base64
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from clouds import kubelet_name
from clusters import SECRETS, StandinCluster
from conftest import BOTH, REPOSITORY, World

pytestmark = BOTH
Row = Callable[[World, str], None]


def api(world: World) -> Any:
    assert isinstance(world.cluster, StandinCluster)
    return world.cluster.api


def consumed(world: World, node: str) -> str:
    world.server()
    token = world.cloud.tag(node)
    assert token is not None
    world.take(node)
    return token


def new(world: World, node: str) -> None:
    """Nothing was done yet."""


def rubbish(world: World, node: str) -> None:
    world.cloud.set_tag(node, "rubbish")


def publish(world: World, node: str) -> None:
    world.server()
    world.cloud.delete_tag(node)


def extend(world: World, node: str) -> None:
    world.server()
    api(world).clock += 1500


def lost(world: World, node: str) -> None:
    world.server()
    world.cluster.request("DELETE", f"{SECRETS}/bootstrap-token-{world.token_of(node)[:6]}")


def expired(world: World, node: str) -> None:
    world.server()
    api(world).cleaner = False
    api(world).clock += 1900


def finish(world: World, node: str) -> None:
    world.server()
    world.cluster.join(world.token_of(node), kubelet_name(node))


def revoke(world: World, node: str) -> None:
    world.cluster.join(consumed(world, node), kubelet_name(node))


def csr_waits(world: World, node: str) -> None:
    world.cluster.request_certificate(consumed(world, node), kubelet_name(node))
    api(world).clock += 1500


def in_vain(world: World, node: str) -> None:
    consumed(world, node)
    api(world).clock += 1500


def rejoin(world: World, node: str) -> None:
    world.cluster.join(consumed(world, node), kubelet_name(node))
    api(world).clock += 5
    world.cloud.delete_tag(node)


def gone(world: World, node: str) -> None:
    world.server()
    world.cloud.terminate(node)
    api(world).clock += 70


def new_disk(world: World, node: str) -> None:
    world.cloud.set_tag(node, "Success")
    world.cloud.set_state(node, "ReplacingRootVolume")


def receipt(world: World, node: str) -> None:
    world.server()
    assert world.client(node).code == 0


SERVER_ROWS: list[Row] = [new, rubbish, publish, extend, lost, expired, finish, revoke, csr_waits,
                          in_vain, rejoin, gone, new_disk, receipt]


def first_time(world: World, node: str) -> None:
    world.server()


def old_file(world: World, node: str) -> None:
    world.server()
    path = world.kubeconfig(node)
    path.parent.mkdir(parents=True)
    path.write_text("older")


def unmarked(world: World, node: str) -> None:
    token = consumed(world, node)
    world.cloud.set_tag(node, token)


def kubeadm(world: World, node: str) -> None:
    world.server()


CLIENT_ROWS: list[Row] = [first_time, old_file, unmarked, kubeadm]
FORMAT: dict[Row, list[str]] = {kubeadm: ["--format", "kubeadm"]}


def start(world: World, row: Row) -> str:
    """The world as the row begins: one group of one node, and somebody else's token."""
    world.cloud.reset()
    api(world).objects.clear()
    api(world).clock, api(world).cleaner = 0.0, True
    api(world).put("configmaps", "kube-public", "cluster-info", {"data": {"kubeconfig": ""}})
    data = {"token-id": "abcdef", "token-secret": "f" * 16, "usage-bootstrap-authentication": "true"}
    api(world).put("secrets", "kube-system", "bootstrap-token-abcdef", {
        "type": "bootstrap.kubernetes.io/token",
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
    })
    (node,) = world.cloud.group("compute", 1, Role="compute")
    row(world, node)
    return node


def cut(
    world: World, folder: Path, after: int, node: str, role: str, *flags: str
) -> tuple[int, list[str]]:
    """Run until after that effect; how it ended and the effects there were."""
    report = folder / "effects"
    report.write_text("")
    argv = ["server", "--once", *world.filters, *world.cluster.server_flags()]
    if role == "client":
        argv = ["client", "--master", world.cluster.url, "--ca-path", str(world.cluster.ca_path),
                "--kubeconfig", str(world.kubeconfig(node)), "--interval", "50ms", "--timeout", "20s",
                *flags]
    environ = {**world.cloud.environment(), **world.node_environment(node)}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "cut.py"), str(after), str(report), *argv],
        env={**environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, report.read_text().splitlines()


def check(world: World, node: str, others: Any) -> str:
    """What must be true after the next run, whatever was cut off; the outcome in a word."""
    secret, tag = world.secret_of(node), world.cloud.tag(node)
    if node in world.cloud.members("compute"):
        assert tag == "Success" or (secret and tag == world.token_of(node)), tag
        if secret and tag != "Success":
            assert world.cluster.whoami(str(tag)) == f"system:bootstrap:{str(tag)[:6]}"
    else:
        assert secret is None, "a Secret that no node needs"
    path = world.kubeconfig(node)
    if path.exists() and path.read_text() != "older":
        content = yaml.safe_load(path.read_text())
        assert content["current-context"] == "bootstrap-context"
        assert path.stat().st_mode & 0o777 == 0o600
    found = {body["metadata"]["name"]: body for body in world.cluster.admin.list(SECRETS, {})}
    assert found.pop("bootstrap-token-abcdef") == others
    assert set(found) <= {secret["metadata"]["name"]} if secret else not found
    return "consumed" if tag == "Success" else "token" if secret else "gone"


@pytest.mark.parametrize("row", SERVER_ROWS, ids=lambda row: row.__name__)
def test_a_server_killed_after_any_effect(faulty: World, tmp_path: Path, row: Row) -> None:
    if row is new_disk and faulty.cloud.name != "aws":
        return  # no other cloud replaces a root volume under an instance
    if row is receipt and faulty.cloud.name != "gce":
        return  # nor leaves a receipt
    node = start(faulty, row)
    code, effects = cut(faulty, tmp_path, 0, node, "server")
    assert code == 0 and effects
    plain = check_after(faulty, node)
    for number in range(1, len(effects) + 1):
        node = start(faulty, row)
        code, seen = cut(faulty, tmp_path, number, node, "server")
        assert (code, seen) == (-signal.SIGKILL, effects[:number])
        assert faulty.server().code == 0
        outcome = check_after(faulty, node)
        assert outcome == plain, f"cut after {effects[number - 1]}: {outcome} instead of {plain}"
        settled = faulty.server()
        assert {settled.pass_line[key] for key in ("issued", "published", "extended", "revoked")} == {"0"}


@pytest.mark.parametrize("row", CLIENT_ROWS, ids=lambda row: row.__name__)
def test_a_client_killed_after_any_effect(faulty: World, tmp_path: Path, row: Row) -> None:
    node, flags = start(faulty, row), FORMAT.get(row, [])
    code, effects = cut(faulty, tmp_path, 0, node, "client", *flags)
    assert code == 0 and effects[-1] in ("tag Success", "PUT KubeletToken")
    assert effects.count("rename") == (2 if flags else 0 if row is unmarked else 1)
    for number in range(1, len(effects) + 1):
        faulty.folder = tmp_path / str(number)
        node = start(faulty, row)
        token = faulty.token_of(node)
        code, seen = cut(faulty, tmp_path, number, node, "client", *flags)
        assert (code, seen) == (-signal.SIGKILL, effects[:number])
        path = faulty.kubeconfig(node)
        assert not path.exists() or path.read_text() == "older" or token in path.read_text()
        faulty.take(node, *flags)
        assert check_after(faulty, node) == "consumed"
        assert token in path.read_text()
        names = {path.name, "kubeadm-join.yaml"} if flags else {path.name}
        assert {each.name for each in path.parent.iterdir()} == names, "something is left over"


def check_after(world: World, node: str) -> str:
    """`check` with the foreign Secret as it was made."""
    others = api(world).objects["secrets", "kube-system", "bootstrap-token-abcdef"]
    assert others["metadata"]["resourceVersion"] == str(first_version(world)), "a foreign Secret changed"
    return check(world, node, {k: v for k, v in others.items() if k not in ("kind", "apiVersion")})


def first_version(world: World) -> int:
    """The version that the foreign Secret was stored with: it is the second object of a start."""
    versions = [int(body["metadata"]["resourceVersion"]) for body in api(world).objects.values()]
    return min(versions) + 1
