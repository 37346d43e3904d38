"""What a server costs with many nodes: calls, seconds and memory, against an AWS that pages and limits."""
from __future__ import annotations

import contextlib
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import keto_tokens
from bench.start import MEMORY, PROGRAM
from clusters import StandinCluster
from standin_fleet import REGION, TAG, Fleet, buckets

SIZES = {10: 1, 100: 5, 1000: 20, 10000: 100}  # groups by the number of instances
NEW = 1000
OWNER = keto_tokens.owner_hash("aws", REGION, TAG, {})


class Site:
    """A fleet of so many instances, a cluster, and a server between them."""

    def __init__(self, fleet: Fleet, cluster: StandinCluster, count: int, groups: int):
        self.fleet, self.cluster, self.groups = fleet, cluster, groups
        self.nodes = fleet.launch(count, groups)
        self.argv = [
            "server", "--all-groups", "--master", cluster.url, "--ca-path", str(cluster.ca_path),
            "--kube-token-file", str(cluster.token_path),
        ]

    def all_joined(self) -> None:
        """Each node has consumed its token and joined, so that its Secret is gone."""
        self.fleet.tags.update(dict.fromkeys(self.nodes, keto_tokens.CONSUMED))

    def all_waiting(self) -> None:
        """Each node has a live token in its tag."""
        for node in self.nodes:
            token = keto_tokens.Token(keto_tokens.token_ids(OWNER, node)[0], keto_tokens.new_secret())
            record = keto_tokens.Node(node, "group-0000", "InService")
            now = self.cluster.api.now()
            body = keto_tokens.secret_body(token, record, OWNER, keto_tokens.DEFAULT_GROUPS, (), now, 1800.0)
            self.cluster.api.put("secrets", "kube-system", body["metadata"]["name"], body)
            self.fleet.tags[node] = token.value

    def forget(self) -> None:
        """Count calls from here on."""
        self.fleet.calls.clear()
        self.cluster.api.asked.clear()

    def calls(self) -> Counter[str]:
        """The calls that were made, by operation."""
        asked = Counter(f"{each.verb} {each.resource}" for each in self.cluster.api.asked)
        return self.fleet.calls + asked

    def budget(self) -> tuple[int, int]:
        """DESIGN's: the calls to AWS and to the cluster of a pass in which nothing is new."""
        secrets = sum(key[0] == "secrets" for key in self.cluster.api.objects)
        return (
            math.ceil(len(self.fleet.groups) / 100) + math.ceil(len(self.fleet.tags) / 1000),
            max(1, math.ceil(secrets / 500)) + 1,
        )


@contextlib.contextmanager
def site(count: int, groups: int) -> Iterator[Site]:
    """A site of that size."""
    with tempfile.TemporaryDirectory(prefix="keto-tokens-bench-") as name:
        with Fleet() as fleet, StandinCluster(Path(name)) as cluster:
            cluster.api.rounds = 60.0
            yield Site(fleet, cluster, count, groups)


def shown(calls: Counter[str]) -> str:
    """Calls in words."""
    return ", ".join(f"{number} {name}" for name, number in sorted(calls.items()))


def passes(made: Site, what: str) -> None:
    """Measure and print what a pass costs in which nothing is new."""
    seconds, peaks = [], []
    for _ in range(3):
        made.forget()
        command = [sys.executable, "-S", "-c", MEMORY.replace("stderr=subprocess.DEVNULL", "stderr=None"),
                   sys.executable, str(PROGRAM), *made.argv, "--once"]
        done = subprocess.run(command, env=made.fleet.environment(), capture_output=True, text=True)
        seconds.append(float(re.findall(r" seconds=([0-9.]+)", done.stderr)[0]))
        peaks.append(int(done.stdout))
    print(f"  {what}: {statistics.median(seconds):.2f} s, peak {statistics.median(peaks)} MB; "
          f"{shown(made.calls())}", flush=True)


def scale_out(made: Site) -> None:
    """Measure and print how long 1,000 new nodes wait for their tags, with AWS's rate limits."""
    made.fleet.limits = buckets()
    made.forget()
    fresh = made.fleet.launch(NEW, made.groups)
    command = [sys.executable, str(PROGRAM), *made.argv]
    started = time.monotonic()
    server = subprocess.Popen(command, env=made.fleet.environment(), stderr=subprocess.DEVNULL)
    try:
        with made.fleet.written:
            made.fleet.written.wait_for(lambda: all(node in made.fleet.tags for node in fresh), 600)
        seconds = time.monotonic() - started
    finally:
        server.terminate()
        server.wait()
    refused = sum(bucket.refused for bucket in made.fleet.limits.values())
    print(f"  {NEW} new: {seconds:.0f} s until every tag is there, {refused} refused by rate limits; "
          f"{shown(made.calls())}", flush=True)


def main(argv: list[str]) -> None:
    """The arguments: numbers of instances, of those in SIZES."""
    print("\nScale: a pass with nothing new (medians of 3), and a scale-out by 1,000")
    for count in map(int, argv or SIZES):
        print(f"{count} instances in {SIZES[count]} groups", flush=True)
        with site(count, SIZES[count]) as made:
            made.all_joined()
            passes(made, "all joined")
            made.all_waiting()
            passes(made, "all waiting")
            made.all_joined()
            for key in [key for key in made.cluster.api.objects if key[0] == "secrets"]:
                del made.cluster.api.objects[key]
            scale_out(made)
