"""Fixtures: the clouds, a cluster (a stand-in, or a real one), and ways to run the program."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import keto_tokens
from clouds import AwsCloud, Cloud, GceCloud
from clusters import RealCluster, StandinCluster, TestCluster
from standin_aws import Aws
from standin_gce import Gce
from standin_imds import Imds

# The same examples in each run of a continuous integration: what it says is about the change alone.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

REPOSITORY = Path(__file__).resolve().parent.parent
BUILT = REPOSITORY / "dist" / "keto-tokens"
FILTER = ["--filter", "Role=compute"]


@pytest.fixture(scope="session", autouse=True)
def one_loader() -> Iterator[None]:
    """Read botocore's service models once for all tests, not once for each run of the program."""
    import botocore.session

    loader = botocore.loaders.create_loader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", lambda *_: loader)
        yield


@pytest.fixture(scope="session")
def shared_aws() -> Iterator[Aws]:
    with Aws() as aws:
        yield aws


@pytest.fixture
def aws(shared_aws: Aws, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    """An empty AWS account, which this process finds by its environment."""
    shared_aws.reset()
    for name, value in shared_aws.environment().items():
        monkeypatch.setenv(name, value)
    yield shared_aws


@pytest.fixture(scope="session")
def shared_gce() -> Iterator[Gce]:
    with Gce() as gce:
        yield gce


@pytest.fixture
def gce(shared_gce: Gce, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gce]:
    """An empty project of Google's, which this process finds by its environment."""
    shared_gce.reset()
    for name, value in shared_gce.environment().items():
        monkeypatch.setenv(name, value)
    yield shared_gce


@pytest.fixture
def cloud_name(request: pytest.FixtureRequest) -> str:
    """The cloud that a test runs on; suites for all of them set it by `BOTH`."""
    return str(getattr(request, "param", "aws"))


BOTH = pytest.mark.parametrize("cloud_name", ["aws", "gce"], indirect=True)


@pytest.fixture
def cloud(cloud_name: str, request: pytest.FixtureRequest) -> Iterator[Cloud]:
    """The cloud, empty."""
    made: Cloud
    if cloud_name == "gce":
        made = GceCloud(request.getfixturevalue("gce"))
    else:
        made = AwsCloud(request.getfixturevalue("aws"), request.getfixturevalue("imds"))
    yield made
    made.close()


@pytest.fixture
def imds() -> Iterator[Imds]:
    with Imds() as service:
        yield service


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of whoever runs the tests reaches the program."""
    flags = keto_tokens.GLOBAL_FLAGS + keto_tokens.SERVER_FLAGS + keto_tokens.CLIENT_FLAGS
    for variable in {name for flag in flags for name in flag.env}:
        monkeypatch.delenv(variable, raising=False)
    for name in sorted(os.environ):
        if name.startswith(("AWS_", "GCE_", "GOOGLE_", "CLOUDSDK_")) or "proxy" in name.lower():
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # of this machine, if it has one
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[TestCluster]:
    """The cluster that the end-to-end tests run against: real when KETO_TEST_KUBECONFIG says so."""
    kubeconfig = os.environ.get("KETO_TEST_KUBECONFIG")
    made: TestCluster = RealCluster(kubeconfig, tmp_path) if kubeconfig else StandinCluster(tmp_path)
    with made:
        yield made


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[StandinCluster]:
    """A cluster that can be made to fail, and whose clock can be set."""
    with StandinCluster(tmp_path) as made:
        yield made


@dataclass
class Result:
    """How a run of the program ended."""

    code: int
    out: str
    err: str

    @property
    def pass_line(self) -> dict[str, str]:
        """The fields of the last pass's line."""
        lines = [line for line in self.err.splitlines() if " pass nodes=" in f" {line}"]
        return dict(part.split("=", 1) for part in lines[-1].split() if "=" in part)


@dataclass
class Program:
    """Runs the program in this process, through main(argv)."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    verbose: bool = False
    leaks: set[str] = field(default_factory=set)  # secrets of a test's own
    said: list[str] = field(default_factory=list)  # all it ever wrote, for what must not be in it

    def __call__(self, *argv: str, **environ: str) -> Result:
        with self.monkeypatch.context() as patch:
            patch.setenv("VERBOSE", str(self.verbose).lower())
            for name, value in environ.items():
                patch.setenv(name, value)
            self.capsys.readouterr()
            code = keto_tokens.main(argv)
        captured = self.capsys.readouterr()
        self.said += [captured.out, captured.err]
        return Result(code, captured.out, captured.err)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(capsys, monkeypatch)


@dataclass
class World:
    """A cloud and a cluster, with the program between them."""

    cloud: Cloud
    cluster: TestCluster
    program: Program
    folder: Path
    known: set[str] = field(default_factory=set)  # secrets that were seen to exist

    @property
    def aws(self) -> Aws:
        """AWS, in tests of it alone."""
        assert isinstance(self.cloud, AwsCloud)
        return self.cloud.aws

    @property
    def imds(self) -> Imds:
        """Its metadata service."""
        assert isinstance(self.cloud, AwsCloud)
        return self.cloud.imds

    @property
    def gce(self) -> Gce:
        """Google's, in tests of it alone."""
        assert isinstance(self.cloud, GceCloud)
        return self.cloud.gce

    @property
    def filters(self) -> list[str]:
        """The flags that every server of these tests has."""
        return self.cloud.filters("Role=compute")

    def __enter__(self) -> World:
        self.program.verbose = True
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever the test did, and however it failed: nothing secret was written for others to see."""
        said = "".join(self.program.said)
        secrets = self.known | self.program.leaks | self.cluster.secrets()
        for secret in secrets | self.cloud.secrets() | {"PRIVATE KEY"}:
            assert secret not in said, "a secret is in the output"
        for path in self.folder.rglob("*"):
            if path.is_file() and any(half in path.read_text() for half in self.known):
                assert path.stat().st_mode & 0o077 == 0, f"others can read {path}"

    def server(
        self, *argv: str, filters: list[str] | None = None, environ: dict[str, str] | None = None,
        **more: str,
    ) -> Result:
        """A pass of the server."""
        base = ["server", "--once", *(self.filters if filters is None else filters)]
        result = self.program(*base, *self.cluster.server_flags(), *argv, **(environ or {}), **more)
        self.known |= self.secrets()
        return result

    def client(self, node: str, *argv: str, **environ: str) -> Result:
        """A run of the client as this instance."""
        base = ["client", "--master", self.cluster.url, "--ca-path", str(self.cluster.ca_path)]
        return self.program(
            *base, "--kubeconfig", str(self.kubeconfig(node)), "--interval", "50ms",
            "--timeout", "20s", *argv, **{**self.node_environment(node), **environ},
        )

    def take(self, node: str, *argv: str, both: Sequence[str] = ()) -> None:
        """The client takes the token, and the tag says so; on GCE it is the server that writes it."""
        done = self.client(node, *argv, *both)
        assert done.code == 0, done.err
        if self.cloud.name == "gce":
            assert self.server(*both).pass_line["marked"] == "1"

    def node_environment(self, node: str) -> dict[str, str]:
        """What makes a process run as this instance."""
        return self.cloud.node_environment(node)

    def kubeconfig(self, node: str) -> Path:
        """Where the client of an instance writes."""
        return self.folder / node / "etc" / "bootstrap.conf"

    def secrets(self) -> set[str]:
        """The secret halves of all tokens that there are."""
        bodies = self.cluster.token_secrets()
        return {keto_tokens._decode(body["data"]["token-secret"]) for body in bodies}

    def secret_of(self, node: str) -> dict[str, Any] | None:
        """The Secret of a node, None when it has none."""
        found = [
            body for body in self.cluster.token_secrets()
            if body["metadata"].get("annotations", {}).get("keto-tokens/node") == node
        ]
        assert len(found) <= 1, "two Secrets for one node"
        return found[0] if found else None

    def secret_name(self, node: str) -> str:
        """The name of a node's Secret."""
        return f"bootstrap-token-{self.token_of(node)[:6]}"

    def token_of(self, node: str) -> str:
        """The token in a node's Secret."""
        body = self.secret_of(node)
        assert body is not None, f"no Secret for {node}"
        data = {key: keto_tokens._decode(value) for key, value in body["data"].items()}
        return f"{data['token-id']}.{data['token-secret']}"


@pytest.fixture
def world(cloud: Cloud, cluster: TestCluster, program: Program, tmp_path: Path) -> Iterator[World]:
    with World(cloud, cluster, program, tmp_path / "nodes") as made:
        yield made


@pytest.fixture
def faulty(
    cloud: Cloud, standin: StandinCluster, program: Program, tmp_path: Path
) -> Iterator[World]:
    """The same with a cluster that can be made to fail, or to be at another time."""
    with World(cloud, standin, program, tmp_path / "nodes") as made:
        yield made


def run_built(*argv: str, environ: dict[str, str] | None = None, **options: Any) -> Result:
    """Run dist/keto-tokens with just this environment."""
    done = subprocess.run(
        [sys.executable, str(BUILT), *argv], env=environ or {}, capture_output=True, text=True,
        timeout=120, **options,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def recorded(number: int) -> dict[str, Any]:
    """An exchange recorded with a real API server."""
    (path,) = (REPOSITORY / "tests" / "kubernetes-api").glob(f"{number:02}-*.json")
    exchange: dict[str, Any] = json.loads(path.read_text())
    return exchange
