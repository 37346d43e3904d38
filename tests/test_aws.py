"""What only AWS has: replaced root volumes, tags by two ways."""
from __future__ import annotations

import keto_tokens
from conftest import World
from test_life_of_a_token import api, joined


def test_a_new_root_volume_gets_a_new_token(faulty: World) -> None:
    world = faulty
    (node,) = world.cloud.group("compute", 1, Role="compute")
    world.server()
    joined(world, node)
    world.server()
    api(world).clock += 4000
    world.cloud.set_state(node, "ReplacingRootVolume")
    assert world.server().pass_line["issued"] == "1"
    joined(world, node)
    assert world.server().pass_line["revoked"] == "1"
    assert world.server().pass_line["issued"] == "0"


def test_the_client_asks_for_its_own_tag_alone(faulty: World) -> None:
    nodes = faulty.aws.group("compute", 2, Role="compute")
    faulty.server()
    faulty.aws.calls.clear()
    assert faulty.client(nodes[0]).code == 0
    assert {operation for operation, _ in faulty.aws.calls} == {"DescribeTags", "CreateTags"}
    for _, fields in faulty.aws.calls:
        assert nodes[0] in fields.values()
        assert nodes[1] not in fields.values()


def test_metadata_is_asked_every_second_and_the_api_every_interval() -> None:
    slept: list[float] = []
    parts = keto_tokens.Imds({}), keto_tokens.Calls(), slept.append
    fast = keto_tokens.AwsInstance("KubeletToken", "imds", *parts)
    slow = keto_tokens.AwsInstance("KubeletToken", "api", *parts)
    for instance, seconds in ((fast, 5.0), (slow, 5.0), (fast, 0.1)):
        instance.wait_for_change(seconds)
    assert slept == [1.0, 5.0, 0.1]
