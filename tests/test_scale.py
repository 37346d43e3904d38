"""What it costs with many nodes: counts, never seconds.  `./build.sh bench` has the seconds."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

import keto_tokens
from bench import herd, scale, soak
from conftest import Program, World
from keto_tokens import Csr, Join, Listing, Node, Policy
from pki import kubelet_request
from standin_aws import refusal

NODES, GROUPS = 1000, 120


@pytest.fixture
def site() -> Iterator[scale.Site]:
    with scale.site(NODES, GROUPS) as made:
        yield made


def one_pass(site: scale.Site, program: Program) -> tuple[int, Counter[str]]:
    """The number of actions of a pass, and its calls by operation."""
    site.forget()
    result = program(*site.argv, "--once", **site.fleet.environment())
    assert result.code == 0, result.err
    assert result.pass_line["nodes"] == str(NODES)
    done = [int(result.pass_line[name]) for name in ("issued", "published", "extended", "revoked")]
    return sum(done), site.calls()


@pytest.mark.parametrize("state", ["all_joined", "all_waiting"])
def test_a_pass_with_nothing_new_keeps_to_the_budget(state: str, site: scale.Site, program: Program) -> None:
    getattr(site, state)()
    done, calls = one_pass(site, program)
    assert done == 0
    assert calls == {
        "DescribeAutoScalingGroups": 2, "DescribeTags": 1,
        **({"list secrets": 1} if state == "all_joined" else
           {"list secrets": 2, "list certificatesigningrequests": 1}),
    }
    aws, cluster = site.budget()
    assert sum(number for name, number in calls.items() if name.startswith("Describe")) <= aws
    assert sum(number for name, number in calls.items() if name.startswith("list")) <= cluster


def test_nodes_in_the_middle_of_joining_cost_one_call_each(site: scale.Site, program: Program) -> None:
    site.all_waiting()
    request = kubelet_request("not-there-yet")
    for number, node in enumerate(site.nodes[:600]):
        spec = {"request": request, "signerName": keto_tokens.SIGNER,
                "username": f"system:bootstrap:{keto_tokens.token_ids(scale.OWNER, node)[0]}"}
        status: dict[str, Any] = {"certificate": "eA=="} if number < 30 else {}
        site.cluster.api.put("certificatesigningrequests", "", f"csr-{number:03}", {
            "spec": spec, "status": status,
        })
    done, calls = one_pass(site, program)
    assert done == 0
    assert calls == {
        "DescribeAutoScalingGroups": 2, "DescribeTags": 1, "list secrets": 2,
        "list certificatesigningrequests": 2, "get nodes": 30,
    }


def test_a_new_node_costs_one_secret_and_one_tag(site: scale.Site, program: Program) -> None:
    site.all_joined()
    for node in site.nodes[:20]:
        del site.fleet.tags[node]
    done, calls = one_pass(site, program)
    assert done == 20
    assert (calls["create secrets"], calls["CreateTags"]) == (20, 20)
    assert sum(calls.values()) == 40 + 5


class Looked(Csr):
    """A CSR that counts how often it is looked at."""

    looks: ClassVar[int] = 0

    def __getattribute__(self, name: str) -> Any:
        Looked.looks += name == "token_id"
        return super().__getattribute__(name)


def looks_of(count: int) -> int:
    """How often a pass over so many nodes looks at their CSRs, from listing to plan."""
    nodes = tuple(Node(f"i-{n:017x}", "pool", "InService", tag=f"{n:06}.{'x' * 16}") for n in range(count))
    csrs = tuple(Looked(str(n), f"{n:06}", Join.ISSUED, 0.0, "node") for n in range(count))

    class Cluster:
        """One that knows these CSRs, and no Node."""

        def list(self, path: str, query: Any) -> Any:
            return iter(csrs)

        def request(self, method: str, path: str) -> Any:
            raise keto_tokens.CallFailed("no such Node", status=404)

    secrets = tuple(
        keto_tokens.TokenSecret(f"s-{n}", "u", "1", keto_tokens.Token(f"{n:06}", "x" * 16), node.id, "pool",
                                0.0, 9e9, 0.0)
        for n, node in enumerate(nodes[: count // 2])
    )
    Looked.looks = 0
    cluster: Any = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keto_tokens, "parse_csr", lambda body: body)
        joins, seen = keto_tokens.Joins(cluster).observe(secrets)
    assert len(joins) == count // 2
    world = keto_tokens.World(Listing(nodes), secrets, joins, seen, "owner", 1e6)
    assert len(keto_tokens.plan(world, Policy())) == count
    return Looked.looks


def test_the_work_of_a_pass_grows_no_faster_than_the_cluster() -> None:
    assert 0 < looks_of(400) <= 2 * looks_of(200)


# --- many clients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_clients_stay_inside_the_describe_bucket(seed: int) -> None:
    """The first looks fill it, as nobody knows yet; from then on what is asked is what is refilled."""
    crowd = herd.Herd(1000, seed=seed).run()
    assert crowd.refused[0] <= 900
    assert max(crowd.rate(start, start + 30) for start in range(1, 300)) <= 24
    assert sum(number for second, number in crowd.refused.items() if second) <= 100
    assert (crowd.gave_up, len(crowd.marked)) == (0, 1000)
    assert max(crowd.found.values()) - max(crowd.tagged.values()) <= 12 * 1.25 * herd.INTERVAL


def test_a_constant_interval_would_not() -> None:
    crowd = herd.Herd(1000, herd.constant).run()
    assert crowd.rate(10, 60) > 100


@pytest.mark.parametrize("refused", [False, True], ids=["nothing new", "refused"])
@pytest.mark.parametrize("chance", [0.0, 0.5, 0.999])
def test_pauses_grow_to_a_bound(refused: bool, chance: float) -> None:
    pauses = [keto_tokens.pause_after(looks, refused, 5.0, chance) for looks in (0, 1, 2, 3, 4, 5, 9999)]
    assert pauses == sorted(pauses)
    assert 3.75 <= pauses[0] and pauses[-1] <= (125 if refused else 75)
    if not refused:
        assert pauses[0] <= 6.25 and pauses[1] == 2 * pauses[0] and pauses[4] == pauses[-1]


def test_a_client_that_is_refused_asks_once_a_look(faulty: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    def pause_after(looks: int, refused: bool, interval: float, chance: float) -> float:
        asked.append((looks, refused))
        if len(asked) == 6:
            raise keto_tokens.TimedOut("enough seen")
        return 0.01

    monkeypatch.setattr(keto_tokens, "pause_after", pause_after)
    (node,) = faulty.aws.group("compute", 1, Role="compute")
    faulty.aws.calls.clear()
    faulty.aws.fail("DescribeTags", refusal("RequestLimitExceeded", 503), times=3)
    assert faulty.client(node).code == 5
    assert asked == [(1, True), (2, True), (3, True), (0, False), (1, False), (2, False)]
    assert faulty.aws.count()["DescribeTags"] == len(asked)


# --- a long life -------------------------------------------------------------------------------------


def test_a_server_holds_no_more_after_a_hundred_passes() -> None:
    """Descriptors, threads and connections are counted after 20 passes and after 100; nodes come and go."""
    early, late = soak.run(passes=100, nodes=40, samples=[20, 100])
    assert late.descriptors <= early.descriptors
    assert late.threads <= early.threads
    # for each of two AWS services and the cluster
    assert late.connections <= 3 * keto_tokens.AwsPools.workers
    assert late.requests > 10 * late.connections
    assert late.revoked > early.revoked > 0
