"""./build.sh demo [aws|gce]: the whole way of a token, from nothing to three kubeconfigs, on this machine.

It starts stand-ins for the cloud (moto's server for AWS) and the cluster on free ports of the loopback,
runs the built file as an operator would, and shows the commands with their real output.
"""
from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from clouds import AwsCloud, Cloud, GceCloud
from clusters import StandinCluster
from standin_aws import Aws
from standin_gce import Gce
from standin_imds import Imds

PROGRAM = Path(__file__).resolve().parent.parent / "dist" / "keto-tokens"
MASK = re.compile(r"\b([a-z0-9]{6})\.[a-z0-9]{16}\b")


def masked(text: str) -> str:
    """The text with the secret half of tokens hidden: what is shown may be pasted anywhere."""
    return MASK.sub(r"\1.****************", text)


def title(text: str) -> None:
    """A line that says what comes."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def run(folder: Path, environ: dict[str, str], *argv: str) -> None:
    """Show a command as a user would type it, run it, show what it says."""
    words = [word.replace(f"{folder}/", "") for word in argv]
    print(f"$ keto-tokens {shlex.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *argv], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**environ, "SHIV_ROOT": str(folder / "unpacked")},
    )
    print(masked(done.stdout).replace(f"{folder}/", ""), end="", flush=True)
    if done.returncode:
        sys.exit(f"demo: that ended with exit code {done.returncode}")


def show_tags(cloud: Cloud, nodes: list[str]) -> None:
    """The tag of each instance."""
    for node in nodes:
        print(f"  {node}  KubeletToken={masked(cloud.tag(node) or '(none)')}", flush=True)


def demo(folder: Path, cloud: Cloud, cluster: StandinCluster) -> None:
    """A pass of the server, the client on each node, and what is there afterwards."""
    nodes = cloud.group("compute", 3, Role="compute", Env="demo")
    environ = cloud.environment()
    where = ["--master", cluster.url, "--ca-path", "ca.crt"]
    filters = cloud.filters("Role=compute", "Env=demo")
    server = ["server", *filters, *where, "--kube-token-file", "admin-token"]
    title("A group of three instances, none of them with a token:")
    show_tags(cloud, nodes)
    title("What would the server do?")
    run(folder, environ, *server, "--dry-run")
    title("One pass of the server: a Secret in the cluster and a tag on the instance, for each")
    run(folder, environ, *server, "--once")
    show_tags(cloud, nodes)
    title("The client, on each of the three instances:")
    for number, node in enumerate(nodes, 1):
        here = {**environ, **cloud.node_environment(node)}
        path = f"node{number}/bootstrap-kubelet.conf"
        run(folder, here, "client", *where, "--kubeconfig", path)
    if cloud.name == "gce":
        title("A node cannot write its metadata, so the server marks what the clients left receipts for:")
        run(folder, environ, *server, "--once")
    title("The tags afterwards:")
    show_tags(cloud, nodes)
    title("And how far is each?")
    run(folder, environ, "status", *server[1:])
    written = folder / "node1" / "bootstrap-kubelet.conf"
    title("The kubeconfig of the first (mode %o):" % (written.stat().st_mode & 0o777))
    print(masked(re.sub(r"(data: .{24})\S+", r"\1...", written.read_text())), end="")


def main() -> None:
    """Set up, show, take away."""
    name = sys.argv[1] if len(sys.argv) > 1 else "aws"
    if name not in ("aws", "gce"):
        sys.exit(f"demo: {name!r} is neither aws nor gce")
    for variable in [each for each in os.environ if each.startswith(("AWS_", "GCE_", "GOOGLE_"))]:
        del os.environ[variable]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keto-tokens-demo-")))
        cluster = stack.enter_context(StandinCluster(folder))
        if name == "gce":
            demo(folder, GceCloud(stack.enter_context(Gce())), cluster)
        else:
            demo(folder, AwsCloud(stack.enter_context(Aws()), stack.enter_context(Imds())), cluster)


if __name__ == "__main__":
    main()
