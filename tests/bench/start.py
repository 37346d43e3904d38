"""How long a start takes, and how much memory it needs, against `python3 -c pass` of the same Python.

Whole processes are measured, the figures are medians.  The stand-ins run beside them, on the same
processors, so that what a node sees is rather less.
"""
from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from clusters import StandinCluster
from standin_fleet import TAG, Fleet
from standin_imds import Imds

PROGRAM = Path(__file__).resolve().parent.parent.parent / "dist" / "keto-tokens"
RUNS = 15
# Forked off something small: else what is reported is the memory of this process.
MEMORY = (
    "import resource, subprocess, sys\n"
    "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
)


class Asked(list[str]):
    """The requests that the metadata service got, and when it got the first one for the tag."""

    first_look = 0.0

    def append(self, request: str) -> None:
        """Note a request."""
        if not self.first_look and "tags/instance" in request:
            self.first_look = time.perf_counter()
        super().append(request)


class Bench:
    """A fleet, a cluster and a metadata service, and the program as each of its users runs it."""

    def __init__(self, python: str, folder: Path, fleet: Fleet, cluster: StandinCluster, imds: Imds):
        self.python, self.folder, self.fleet, self.cluster, self.imds = python, folder, fleet, cluster, imds
        self.cache, self.kubeconfig = folder / "cache", folder / "node" / "bootstrap.conf"
        self.node = fleet.launch(10, 1)[0]
        imds.tags = lambda instance: {"Name": "x", TAG: fleet.tags.get(instance, "")}
        self.environ = {
            **fleet.environment(), "PATH": "/usr/bin:/bin", "SHIV_ROOT": str(self.cache),
            "AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": imds.url(self.node),
        }
        ca = ["--master", cluster.url, "--ca-path", str(cluster.ca_path)]
        self.client = ["client", *ca, "--kubeconfig", str(self.kubeconfig)]
        self.server = ["server", "--once", "--all-groups", *ca, "--kube-token-file", str(cluster.token_path)]

    def run(self, *argv: str) -> float:
        """Seconds of a whole process."""
        started = time.perf_counter()
        subprocess.run([self.python, *argv], env=self.environ, check=True, capture_output=True)
        return time.perf_counter() - started

    def to_look(self) -> float:
        """Seconds from the client's start to its first look at the tag, which is not there yet."""
        self.fleet.tags.clear()
        self.imds.asked = asked = Asked()
        started = time.perf_counter()
        process = subprocess.Popen([self.python, str(PROGRAM), *self.client], env=self.environ, stderr=-3)
        while not asked.first_look:
            time.sleep(0.001)
        process.kill()
        process.wait()
        return asked.first_look - started

    def first_ever(self) -> float:
        """The same when nothing is unpacked yet."""
        shutil.rmtree(self.cache)
        return self.to_look()

    def with_token(self) -> None:
        """Give the node its token, as if it were new."""
        self.fleet.tags.clear()
        self.run(str(PROGRAM), *self.server)
        shutil.rmtree(self.kubeconfig.parent, ignore_errors=True)

    def to_kubeconfig(self) -> float:
        """Seconds from the client's start until its kubeconfig is there."""
        self.with_token()
        started = time.perf_counter()
        process = subprocess.Popen([self.python, str(PROGRAM), *self.client], env=self.environ, stderr=-3)
        while not self.kubeconfig.exists():
            time.sleep(0.001)
        seconds = time.perf_counter() - started
        process.wait()
        return seconds

    def to_exit(self) -> float:
        """Seconds of the client's whole life, with the mark in the tag."""
        self.with_token()
        return self.run(str(PROGRAM), *self.client)

    def first_pass(self) -> float:
        """Seconds of a server that makes one pass, in which ten nodes get their tokens."""
        self.fleet.tags.clear()
        return self.run(str(PROGRAM), *self.server)

    def memory(self, *argv: str) -> int:
        """The peak of a process in MB."""
        command = [sys.executable, "-S", "-c", MEMORY, self.python, *argv]
        return int(subprocess.run(command, env=self.environ, check=True, stdout=-1).stdout)


def report(bench: Bench) -> None:
    """Measure and print everything: rounds of all, so that a busy moment hits all alike."""
    rows: dict[str, tuple[Callable[[], float], str]] = {
        "--version": (lambda: bench.run(str(PROGRAM), "--version"), "+60 ms"),
        "help client": (lambda: bench.run(str(PROGRAM), "help", "client"), "+60 ms"),
        "client to its first look": (bench.to_look, "+200 ms"),
        "client to its kubeconfig": (bench.to_kubeconfig, "+500 ms"),
        "client to its end": (bench.to_exit, ""),
        "client, first start ever": (bench.first_ever, "1500 ms in all"),
        "server --once, ten new nodes": (bench.first_pass, ""),
    }
    bench.run(str(PROGRAM), "--version")
    for call, _ in rows.values():
        call()
    figures: dict[str, list[float]] = {name: [] for name in ["python3 -c pass", *rows]}
    for _ in range(RUNS):
        figures["python3 -c pass"].append(bench.run("-c", "pass"))
        for name, (call, _) in rows.items():
            figures[name].append(call())
    bare = statistics.median(figures["python3 -c pass"])
    for name, seconds in figures.items():
        middle, goal = statistics.median(seconds), rows[name][1] if name in rows else ""
        print(f"{name:30} {middle * 1000:5.0f} ms  {(middle - bare) * 1000:+5.0f} ms  {goal}")
    memory(bench)


def memory(bench: Bench) -> None:
    """Measure and print the peaks."""
    print(f"{'peak of python3 -c pass':30} {bench.memory('-c', 'pass'):5} MB")
    print(f"{'peak of --version':30} {bench.memory(str(PROGRAM), '--version'):5} MB")
    bench.with_token()
    print(f"{'peak of client':30} {bench.memory(str(PROGRAM), *bench.client):5} MB         50 MB")
    print(f"{'peak of server --once':30} {bench.memory(str(PROGRAM), *bench.server):5} MB")


def main(argv: list[str]) -> None:
    """The argument: the Python to measure with."""
    python = argv[0] if argv else sys.executable
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout
    print(f"\nStart, {version.strip()}, medians of {RUNS}")
    with tempfile.TemporaryDirectory(prefix="keto-tokens-bench-") as name:
        folder = Path(name)
        with Fleet() as fleet, StandinCluster(folder) as cluster, Imds() as imds:
            report(Bench(python, folder, fleet, cluster, imds))
