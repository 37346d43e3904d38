"""The two clouds with one face, so that one suite runs on both."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import standin_aws
import standin_gce
from standin_aws import Aws
from standin_gce import Gce
from standin_imds import Imds


@dataclass(frozen=True)
class Words:
    """What tests that run on both clouds have to know of each."""

    permissions: dict[str, str]  # what refuses a read, a write: the permission that must be named
    reads: dict[str, int]  # the calls of a pass in which nothing is new
    writes: dict[str, int]  # and what each new node adds
    running: str
    ending: str
    no_node: str  # the id of no node


class AwsCloud:
    """moto's AWS, with the metadata service of its instances."""

    name = "aws"
    words = Words(
        {"list": "autoscaling:DescribeAutoScalingGroups", "read": "ec2:DescribeTags",
         "write": "ec2:CreateTags"},
        {"DescribeAutoScalingGroups": 1, "DescribeTags": 1}, {"CreateTags": 1},
        "InService", "Terminating:Wait", "i-0123456789abcdef0",
    )
    operations = {"list": "DescribeAutoScalingGroups", "read": "DescribeTags", "write": "CreateTags"}

    def __init__(self, aws: Aws, imds: Imds):
        self.aws, self.imds = aws, imds
        self.reset, self.group, self.members = aws.reset, aws.group, aws.members
        self.tag, self.set_tag, self.delete_tag = aws.tag, aws.set_tag, aws.delete_tag
        self.terminate, self.environment, self.count = aws.terminate, aws.environment, aws.count

    def node_environment(self, node: str) -> dict[str, str]:
        """What makes a process run as this instance."""
        return {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.imds.url(node),
            "AWS_EC2_METADATA_DISABLED": "false",
        }

    def filters(self, *pairs: str) -> list[str]:
        """The flags that name these tags."""
        return [word for pair in pairs for word in ("--filter", pair)]

    def set_state(self, node: str, state: str) -> None:
        """Bring a node to a lifecycle state."""
        self.aws.states[node] = state

    def throttle(self, call: str, times: int = 1) -> None:
        """Answer a read or a write that there are too many."""
        answer = standin_aws.refusal("RequestLimitExceeded", 503)
        self.aws.fail(self.operations[call], answer, times)

    def break_down(self, call: str, times: int = 1) -> None:
        """Answer that something is broken on their side."""
        self.aws.fail(self.operations[call], standin_aws.refusal("Unavailable", 503), times)

    def refuse(self, call: str) -> None:
        """Take a permission away, for one call."""
        self.aws.fail(self.operations[call], standin_aws.refusal("UnauthorizedOperation", 403))

    def vanish(self) -> None:
        """The instance of the next write is there no more."""
        self.aws.fail("CreateTags", standin_aws.refusal("InvalidInstanceID.NotFound", 400))

    def recover(self) -> None:
        """No faults, and no calls counted."""
        self.aws.faults.clear()
        self.aws.calls.clear()

    def secrets(self) -> set[str]:
        """What no output may hold."""
        return {standin_aws.ACCESS["AWS_SECRET_ACCESS_KEY"]}

    def close(self) -> None:
        """Nothing is held against it at the end."""


class GceCloud:
    """The stand-in for Google's, which speaks of instances by number; the program by ZONE/NAME/NUMBER."""

    name = "gce"
    words = Words(
        {"list": "compute.instances.list", "read": "compute.instances.list",
         "write": "compute.instances.setMetadata"},
        {"compute.instances.aggregatedList": 1},
        {"compute.instances.get": 1, "compute.instances.setMetadata": 1, "compute.zoneOperations.wait": 1},
        "RUNNING", "STOPPING", "europe-west1-b/none/1",
    )
    operations = {"list": "compute.instances.aggregatedList", "read": "compute.instances.aggregatedList",
                  "write": "compute.instances.setMetadata"}

    def __init__(self, gce: Gce):
        self.gce = gce
        self.environment, self.count = gce.environment, gce.count

    def reset(self) -> None:
        """A project with nothing in it."""
        self.gce.reset()

    def node_id(self, number: str) -> str:
        """The id that the program gives an instance."""
        instance = self.gce.instances[number]
        return f"{instance.zone}/{instance.name}/{number}"

    def group(self, name: str, size: int, **labels: str) -> list[str]:
        """Make a managed instance group; the ids of its instances.  Labels are in lower case."""
        lower = {key.lower(): value for key, value in labels.items()}
        return [self.node_id(number) for number in self.gce.group(name, size, **lower)]

    def members(self, group: str) -> list[str]:
        """The ids of a group's instances."""
        return [self.node_id(number) for number in self.gce.instances
                if self.gce.metadata(number).get("created-by", "").endswith(f"/{group}")]

    def terminate(self, node: str) -> None:
        """End an instance."""
        self.gce.delete(number_of(node))

    def tag(self, node: str, name: str = "KubeletToken") -> str | None:
        """The value of a metadata item."""
        alive = number_of(node) in self.gce.instances
        return self.gce.metadata(number_of(node)).get(name) if alive else None

    def set_tag(self, node: str, value: str, name: str = "KubeletToken") -> None:
        """Set a metadata item."""
        self.gce.set_metadata(number_of(node), name, value)

    def delete_tag(self, node: str, name: str = "KubeletToken") -> None:
        """Take a metadata item away."""
        self.gce.delete_metadata(number_of(node), name)

    def node_environment(self, node: str) -> dict[str, str]:
        """What makes a process run as this instance."""
        return {**self.gce.node_environment(number_of(node)), "AWS_EC2_METADATA_DISABLED": "true"}

    def filters(self, *pairs: str) -> list[str]:
        """The flags that name these labels."""
        lower = [f"{pair.partition('=')[0].lower()}={pair.partition('=')[2]}" for pair in pairs]
        return ["--cloud", "gce", *(word for pair in lower for word in ("--filter", pair))]

    def set_state(self, node: str, state: str) -> None:
        """Bring an instance to a status."""
        self.gce.set_status(number_of(node), state)

    def throttle(self, call: str, times: int = 1) -> None:
        """Answer that there are too many, in both of Google's ways."""
        answers: list[Callable[[Any], None]] = [standin_gce.rate_limited(), standin_gce.too_many_requests()]
        for number in range(times):
            self.gce.fail(self.operations[call], answers[number % 2])

    def break_down(self, call: str, times: int = 1) -> None:
        """Answer that something is broken on their side."""
        self.gce.fail(self.operations[call], standin_gce.unavailable(), times)

    def refuse(self, call: str) -> None:
        """Take a permission away."""
        self.gce.deny(self.words.permissions[call])

    def vanish(self) -> None:
        """The instance of the next write is there no more."""
        self.gce.fail("compute.instances.get", standin_gce.refusal(404, "notFound"))

    def recover(self) -> None:
        """No faults, all permissions, and no calls counted."""
        self.gce.faults.clear()
        self.gce.calls.clear()
        for permission in standin_gce.ROLE:
            self.gce.allow(permission)

    def secrets(self) -> set[str]:
        """What no output may hold."""
        return {*self.gce.tokens, *self.gce.subject_tokens}

    def close(self) -> None:
        """Every request and answer was one that Google's discovery document knows."""
        assert self.gce.violations == []


def number_of(node: str) -> str:
    """Google's number of a node."""
    return re.sub(r".*/", "", node)


def kubelet_name(node: str) -> str:
    """The name under which a node's kubelet registers."""
    return f"node-{number_of(node)}"


Cloud = AwsCloud | GceCloud
