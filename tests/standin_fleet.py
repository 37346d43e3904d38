"""An AWS account with any number of instances: it pages and limits as AWS does, and answers at once.

moto has neither pages of DescribeTags nor rate limits, and takes a second for thousands of instances.
What this one knows is what a server asks: DescribeAutoScalingGroups, DescribeTags, CreateTags.
"""
from __future__ import annotations

import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

TAG = "KubeletToken"
REGION = "eu-west-2"
GROUPS_A_PAGE, TAGS_A_PAGE = 100, 1000  # the most that AWS gives


@dataclass
class Bucket:
    """A token bucket as EC2's: `size` at once, then `rate` a second; `now` is its clock."""

    size: float
    rate: float
    now: Callable[[], float] = time.monotonic
    refused: int = 0

    def __post_init__(self) -> None:
        self._level, self._since = self.size, self.now()

    def take(self) -> bool:
        """Whether there was one to take."""
        now = self.now()
        self._level = min(self.size, self._level + (now - self._since) * self.rate)
        self._since = now
        if self._level < 1:
            self.refused += 1
            return False
        self._level -= 1
        return True


def buckets(now: Callable[[], float] = time.monotonic) -> dict[str, Bucket]:
    """EC2's and the auto-scaling API's limits for an account and region."""
    return {"Describe": Bucket(100, 20, now), "CreateTags": Bucket(100, 10, now)}


@dataclass
class Fleet:
    """The account, on a free port of the loopback; use it as a context manager."""

    groups: dict[str, list[str]] = field(default_factory=dict)  # ids of instances by group
    tags: dict[str, str] = field(default_factory=dict)  # values of our tag by instance
    limits: dict[str, Bucket] = field(default_factory=dict)  # none without
    calls: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    made: int = 0
    written: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> Fleet:
        self._server = _Server(("127.0.0.1", 0), self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """What a process needs to find this AWS."""
        return {
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST", "AWS_SECRET_ACCESS_KEY": "test-secret-key",
            "AWS_ENDPOINT_URL": self.url, "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true",
        }

    def launch(self, count: int, groups: int) -> list[str]:
        """Add instances, spread evenly over so many groups; their ids."""
        ids = [f"i-{self.made + n:017x}" for n in range(count)]
        self.made += count
        for number, instance in enumerate(ids):
            self.groups.setdefault(f"group-{number % groups:04}", []).append(instance)
        return ids

    def terminate(self, ids: Iterable[str]) -> None:
        """Take instances out of their groups."""
        ending = set(ids)
        for name, members in self.groups.items():
            self.groups[name] = [member for member in members if member not in ending]
        for instance in ending:
            self.tags.pop(instance, None)

    def answer(self, fields: dict[str, str]) -> tuple[int, str]:
        """The status and text for a call of the query protocol."""
        operation = fields["Action"]
        with self.written:
            self.calls[operation] += 1
            bucket = self.limits.get("Describe" if operation.startswith("Describe") else operation)
            if bucket and not bucket.take():
                return 503, (
                    "<Response><Errors><Error><Code>RequestLimitExceeded</Code><Message>Request limit "
                    "exceeded.</Message></Error></Errors><RequestID>0</RequestID></Response>"
                )
            return 200, getattr(self, f"_{operation}")(fields)

    def _DescribeAutoScalingGroups(self, fields: dict[str, str]) -> str:
        most = min(int(fields.get("MaxRecords", "50")), GROUPS_A_PAGE)
        start = int(fields.get("NextToken", "0"))
        names = sorted(self.groups)
        page = "".join(self._group(name) for name in names[start : start + most])
        more = f"<NextToken>{start + most}</NextToken>" if start + most < len(names) else ""
        return (
            f'<DescribeAutoScalingGroupsResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/">'
            f"<DescribeAutoScalingGroupsResult><AutoScalingGroups>{page}</AutoScalingGroups>{more}"
            "</DescribeAutoScalingGroupsResult></DescribeAutoScalingGroupsResponse>"
        )

    def _group(self, name: str) -> str:
        members = "".join(
            f"<member><InstanceId>{instance}</InstanceId><AvailabilityZone>{REGION}a</AvailabilityZone>"
            "<LifecycleState>InService</LifecycleState><HealthStatus>Healthy</HealthStatus>"
            "<ProtectedFromScaleIn>false</ProtectedFromScaleIn></member>"
            for instance in self.groups[name]
        )
        return (
            f"<member><AutoScalingGroupName>{name}</AutoScalingGroupName><MinSize>0</MinSize>"
            f"<MaxSize>9999</MaxSize><Instances>{members}</Instances></member>"
        )

    def _DescribeTags(self, fields: dict[str, str]) -> str:
        most = min(int(fields.get("MaxResults", str(TAGS_A_PAGE))), TAGS_A_PAGE)
        start = int(fields.get("NextToken", "0"))
        found = sorted(self.tags.items())
        page = "".join(
            f"<item><resourceId>{instance}</resourceId><resourceType>instance</resourceType>"
            f"<key>{TAG}</key><value>{escape(value)}</value></item>"
            for instance, value in found[start : start + most]
        )
        more = f"<nextToken>{start + most}</nextToken>" if start + most < len(found) else ""
        return (
            '<DescribeTagsResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>0</requestId>'
            f"<tagSet>{page}</tagSet>{more}</DescribeTagsResponse>"
        )

    def _CreateTags(self, fields: dict[str, str]) -> str:
        self.tags[fields["ResourceId.1"]] = fields["Tag.1.Value"]
        self.written.notify_all()
        return (
            '<CreateTagsResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>0</requestId>'
            "<return>true</return></CreateTagsResponse>"
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], fleet: Fleet):
        self.fleet = fleet
        super().__init__(address, _Handler)

    def process_request_thread(self, request: object, client_address: object) -> None:
        """A connection, which may carry many calls."""
        self.fleet.connections += 1
        super().process_request_thread(request, client_address)  # type: ignore[arg-type]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Whoever runs this reads the program's output, not ours."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fields = dict(urllib.parse.parse_qsl(body.decode(), keep_blank_values=True))
        status, text = self.server.fleet.answer(fields)
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
