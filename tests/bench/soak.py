"""A server over many passes, with nodes that come, join and go: does it hold on to anything?

Each pass a tenth of the fleet is replaced.  A new node is given its token in one pass, takes it and
joins, is revoked in the next, and is terminated some passes later.
"""
from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import keto_tokens
from bench.scale import Site, site
from bench.start import PROGRAM
from pki import kubelet_request

UNPACKED = PROGRAM.parent.parent / "build" / "site"  # what is packed into PROGRAM
UNLIMITED = (  # tags as fast as they come: it is not AWS that is measured
    f"import sys; sys.path.insert(0, {str(UNPACKED)!r})\nimport keto_tokens\n"
    "keto_tokens.TAGS_PER_SECOND = 1e9\nsys.exit(keto_tokens.main())"
)
REQUEST = kubelet_request("node-soak")


@dataclass(frozen=True)
class Sample:
    """What a server holds, and had done, after so many passes."""

    passes: int
    memory: int  # resident, in KB
    descriptors: int
    threads: int
    connections: int  # ever made, to AWS and to the cluster
    requests: int
    revoked: int

    def __str__(self) -> str:
        return (
            f"{self.passes:5} passes: {self.memory / 1024:.1f} MB, {self.descriptors} descriptors, "
            f"{self.threads} threads; {self.requests} requests over {self.connections} connections; "
            f"{self.revoked} tokens revoked"
        )


class Churn:
    """The changes between two passes."""

    def __init__(self, made: Site, seed: int = 1):
        self.made, self.random, self.requests, self.revoked = made, random.Random(seed), 0, 0
        made.cluster.api.put("nodes", "", "node-soak", {"status": {}})

    def step(self) -> None:
        """Clients take what is in their tags, kubelets join, a tenth of the fleet is replaced."""
        fleet, api = self.made.fleet, self.made.cluster.api
        with api.lock, fleet.written:
            self.requests += sum(fleet.calls.values()) + len(api.asked)
            self.revoked += sum(each.verb == "delete" for each in api.asked)
            self.made.forget()
            for key in [key for key in api.objects if key[0] == "certificatesigningrequests"]:
                del api.objects[key]  # decided an hour ago
            for node, value in fleet.tags.items():
                token = keto_tokens.parse_token(value)
                if token:
                    self._join(token)
                    fleet.tags[node] = keto_tokens.CONSUMED
            living = [node for members in fleet.groups.values() for node in members]
            fleet.terminate(self.random.sample(living, len(living) // 10))
            fleet.launch(len(living) // 10, self.made.groups)

    def _join(self, token: keto_tokens.Token) -> None:
        api = self.made.cluster.api
        spec = {
            "request": REQUEST, "signerName": keto_tokens.SIGNER, "username": f"system:bootstrap:{token.id}",
        }
        status = {"certificate": "eA==", "conditions": [{"type": "Approved", "lastUpdateTime": api.stamp()}]}
        api.put("certificatesigningrequests", "", f"csr-{token.id}", {"spec": spec, "status": status})
        api.objects.pop(("nodes", "", "node-soak"), None)
        api.put("nodes", "", "node-soak", {"status": {}})  # made now, so after its certificate


def sample(pid: int, passes: int, churn: Churn) -> Sample:
    """Look at the server from outside."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    made = churn.made
    return Sample(
        passes=passes,
        memory=int(fields["VmRSS"].split()[0]),
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        threads=int(fields["Threads"]),
        connections=made.fleet.connections + made.cluster.api.connections,
        requests=churn.requests,
        revoked=churn.revoked,
    )


def run(passes: int, nodes: int, samples: Sequence[int]) -> list[Sample]:
    """So many passes over a fleet of so many nodes; what the server held after some of them."""
    found = []
    with site(nodes, 4) as made:
        made.cluster.api.rounds = 0.0
        churn = Churn(made)
        environ = {**made.fleet.environment(), "PATH": os.environ["PATH"]}
        command = [sys.executable, "-I", "-S", "-c", UNLIMITED, *made.argv, "--interval", "10ms"]
        server = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            done = 0
            for line in server.stderr:
                if " pass nodes=" not in line:
                    continue
                done += 1
                churn.step()
                if done in samples:
                    found.append(sample(server.pid, done, churn))
                if done == passes:
                    break
        finally:
            server.terminate()
            server.communicate()
    return found


def main(argv: list[str]) -> None:
    """The argument: the number of passes."""
    passes = int(argv[0]) if argv else 2000
    marks = sorted({10, 50, 100, *range(200, passes + 1, 200), passes})
    print(f"\nSoak: {passes} passes, a tenth of 100 nodes replaced in each", flush=True)
    started = time.monotonic()
    for each in run(passes, 100, marks):
        print(each, flush=True)
    print(f"{time.monotonic() - started:.0f} s")
