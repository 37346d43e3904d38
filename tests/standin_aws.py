"""AWS for the tests: moto's server, behind a door that counts the calls and can fail them."""
from __future__ import annotations

import logging
import re
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import urllib3
from moto.server import ThreadedMotoServer

REGION = "eu-west-2"
ACCESS = {"AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST", "AWS_SECRET_ACCESS_KEY": "test-secret-key"}

logging.getLogger("werkzeug").setLevel(logging.ERROR)


class Aws:
    """moto on a free port of the loopback; `url` is the door, `ec2` and `autoscaling` go around it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, str]]] = []
        self.faults: list[list[Any]] = []  # [operation, answer, times, after]
        self.states: dict[str, str] = {}  # lifecycle states by instance id, where not moto's
        self._lock = threading.Lock()

    def __enter__(self) -> Aws:
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        host, port = self._moto.get_host_and_port()
        self.inner = f"http://{host}:{port}"
        self._door = _Server(("127.0.0.1", 0), self)
        self.url = f"http://127.0.0.1:{self._door.server_address[1]}"
        threading.Thread(target=self._door.serve_forever, args=(0.05,), daemon=True).start()
        self.ec2 = self.client("ec2")
        self.autoscaling = self.client("autoscaling")
        return self

    def __exit__(self, *_: object) -> None:
        self._door.shutdown()
        self._door.server_close()
        self._moto.stop()

    def client(self, service: str) -> Any:
        """A boto3 client of moto itself."""
        return boto3.client(
            service, endpoint_url=self.inner, region_name=REGION,
            aws_access_key_id="test", aws_secret_access_key="test",
        )

    def environment(self) -> dict[str, str]:
        """What a process needs to find this AWS."""
        return {**ACCESS, "AWS_ENDPOINT_URL": self.url, "AWS_DEFAULT_REGION": REGION}

    def reset(self) -> None:
        """An account with nothing in it."""
        urllib3.request("POST", f"{self.inner}/moto-api/reset", timeout=60.0)
        self.calls.clear()
        self.faults.clear()
        self.states.clear()

    def group(self, name: str, size: int, **tags: str) -> list[str]:
        """Make an auto-scaling group; the ids of its instances."""
        if not self.autoscaling.describe_launch_configurations()["LaunchConfigurations"]:
            self.autoscaling.create_launch_configuration(
                LaunchConfigurationName="lc", ImageId="ami-12c6146b", InstanceType="t3.micro"
            )
        listed = [{"Key": k, "Value": v, "PropagateAtLaunch": True} for k, v in tags.items()]
        self.autoscaling.create_auto_scaling_group(
            AutoScalingGroupName=name, LaunchConfigurationName="lc", MinSize=0, MaxSize=10000,
            DesiredCapacity=size, AvailabilityZones=[f"{REGION}a"], Tags=listed,
        )
        return self.members(name)

    def members(self, group: str) -> list[str]:
        """The ids of a group's instances."""
        found = self.autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[group])
        return [member["InstanceId"] for member in found["AutoScalingGroups"][0]["Instances"]]

    def terminate(self, instance_id: str) -> None:
        """End an instance and take it out of its group."""
        self.autoscaling.terminate_instance_in_auto_scaling_group(
            InstanceId=instance_id, ShouldDecrementDesiredCapacity=True
        )

    def tag(self, instance_id: str, name: str = "KubeletToken") -> str | None:
        """The value of a tag."""
        filters = [{"Name": "resource-id", "Values": [instance_id]}, {"Name": "key", "Values": [name]}]
        found = self.ec2.describe_tags(Filters=filters)["Tags"]
        return str(found[0]["Value"]) if found else None

    def set_tag(self, instance_id: str, value: str, name: str = "KubeletToken") -> None:
        """Set a tag."""
        self.ec2.create_tags(Resources=[instance_id], Tags=[{"Key": name, "Value": value}])

    def delete_tag(self, instance_id: str, name: str = "KubeletToken") -> None:
        """Take a tag away."""
        self.ec2.delete_tags(Resources=[instance_id], Tags=[{"Key": name}])

    def fail(
        self, operation: str, answer: Callable[[Any], None], times: int = 1, after: bool = False
    ) -> None:
        """Answer so to calls of the operation ("" for any)."""
        self.faults.append([operation, answer, times, after])

    def count(self) -> Counter[str]:
        """Calls that came through the door, by operation."""
        return Counter(operation for operation, _ in self.calls)

    def arrived(self, operation: str, fields: dict[str, str]) -> Any:
        """Note a call; the fault that it is to meet."""
        with self._lock:
            self.calls.append((operation, fields))
            for fault in self.faults:
                if fault[2] > 0 and fault[0] in ("", operation):
                    fault[2] -= 1
                    return fault
        return None


def refusal(code: str, status: int = 400, message: str = "injected") -> Callable[[Any], None]:
    """An error as EC2's and the auto-scaling API's parsers both understand it."""
    text = (
        f"<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
        f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
        "<RequestID>0</RequestID></Response>"
    )

    def answer(handler: Any) -> None:
        handler.reply(status, text.encode(), "text/xml")
    return answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], aws: Aws):
        self.aws, self.pool = aws, urllib3.PoolManager(maxsize=32)
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read the program's output, not ours."""

    def do_POST(self) -> None:
        aws = self.server.aws
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fields = dict(urllib.parse.parse_qsl(body.decode(), keep_blank_values=True))
        operation = fields.get("Action", "")
        fault = aws.arrived(operation, fields)
        if fault and not fault[3]:
            return fault[1](self)  # type: ignore[no-any-return]
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        headers["Host"] = urllib.parse.urlsplit(aws.inner).netloc
        reply = self.server.pool.request("POST", aws.inner + self.path, body=body, headers=headers)
        if fault:
            return fault[1](self)  # type: ignore[no-any-return]
        kind = reply.headers.get("Content-Type", "text/xml")
        self.reply(reply.status, self._with_states(reply.data), kind)

    def _with_states(self, content: bytes) -> bytes:
        """moto knows only InService: put in the states that a test wants."""
        text = content.decode()
        for instance_id, state in self.server.aws.states.items():
            member = re.search(rf"<member>(?:(?!<member>).)*{instance_id}.*?</member>", text, re.S)
            if member and "<LifecycleState>" in member[0]:
                changed = re.sub(r"(<LifecycleState>)\w+", rf"\g<1>{state}", member[0])
                text = text.replace(member[0], changed)
        return text.encode()

    def reply(self, status: int, content: bytes, kind: str = "text/xml", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
