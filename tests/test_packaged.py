"""The packaged file: what is in it, that it is the same from any build, and that it runs anywhere."""
from __future__ import annotations

import ast
import configparser
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import botocore.loaders
import pytest
from botocore import xform_name

import keto_tokens
from clusters import kubeconfig_of
from conftest import BUILT, FILTER, REPOSITORY, Result, World, run_built

LIMIT = 2_000_000  # bytes
SITE = "site-packages"


@functools.cache
def packaged() -> dict[str, bytes]:
    """What is unpacked, by path."""
    with zipfile.ZipFile(BUILT) as archive:
        return {
            name.partition("/")[2]: archive.read(name)
            for name in archive.namelist() if name.startswith(f"{SITE}/")
        }


def requirements() -> list[str]:
    """The packages that are packaged, as setup.cfg pins them."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    return config["options"]["install_requires"].split()


# --- what is in it ---------------------------------------------------------------------------------


def test_it_is_small() -> None:
    assert BUILT.stat().st_size <= LIMIT


def test_its_hash_stands_beside_it() -> None:
    digest = hashlib.sha256(BUILT.read_bytes()).hexdigest()
    assert BUILT.with_suffix(".sha256").read_text() == f"{digest}  {BUILT.name}\n"


def test_nothing_in_it_is_compiled_and_nothing_is_for_reading_alone() -> None:
    for name in packaged():
        assert name.endswith((".py", ".json", ".pem")) or ".dist-info/" in name
    assert not [name for name in packaged() if re.search("waiters|examples|(^|/)tests?/", name)]


def test_the_licence_of_each_package_is_in_it() -> None:
    for pin in requirements():
        name = re.sub(r"[-.]+", "_", pin.replace("==", "-", 1)).lower()
        found = [
            path for path in packaged()
            if re.sub(r"[-.]+", "_", path.lower()).startswith(re.sub(r"[-.]+", "_", name) + "_dist_info/")
            and "licen" in path.lower()
        ]
        assert found, pin


def test_each_package_is_pinned_by_hash() -> None:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    lines = [line.split() for line in config["packaged"]["sha256"].splitlines() if line]
    assert {name for name, _ in lines} == {pin.partition("==")[0] for pin in requirements()}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for _, digest in lines)


# --- the cut of AWS --------------------------------------------------------------------------------


def model(service: str) -> Any:
    """The model of a service in the file."""
    (path,) = (p for p in packaged() if p.startswith(f"botocore/data/{service}/") and "/service-2" in p)
    return json.loads(packaged()[path])


@pytest.mark.parametrize("service", keto_tokens.AWS_OPERATIONS)
def test_the_models_have_the_operations_and_all_that_these_reach(service: str) -> None:
    cut = model(service)
    assert set(cut["operations"]) == set(keto_tokens.AWS_OPERATIONS[service])
    used = set(re.findall('"shape":"([^"]+)"', json.dumps(cut, separators=(",", ":"))))
    assert used == set(cut["shapes"])


def methods(service: str) -> set[str]:
    """The methods of a client of the whole of a service."""
    whole = botocore.loaders.create_loader().load_service_model(service, "service-2")
    return {xform_name(operation) for operation in whole["operations"]}


def test_the_program_calls_just_what_the_cut_leaves() -> None:
    """An operation that is called but cut would only be missed on somebody's master."""
    text = (REPOSITORY / "keto_tokens.py").read_text()
    tree = list(ast.walk(ast.parse(text)))
    names = {node.attr for node in tree if isinstance(node, ast.Attribute)}  # client.describe_tags(...)
    names |= {  # get_paginator("describe_tags")
        node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    services = set(re.findall(r'aws_client\([^,]+, "([a-z0-9-]+)"', text))
    assert services == {"autoscaling", "ec2"}
    left = {xform_name(each) for service in services for each in keto_tokens.AWS_OPERATIONS[service]}
    assert names & (methods("autoscaling") | methods("ec2")) == left


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, in which the file unpacks itself once."""
    return tmp_path_factory.mktemp("home")


def in_the_file(code: str, home: Path) -> Result:
    """Run Python with what the file unpacks, and nothing else."""
    run_built("--version", environ={"SHIV_ROOT": str(home)})
    (folder,) = home.glob("keto-tokens-*")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"],
        capture_output=True, text=True, timeout=60, env={"AWS_EC2_METADATA_DISABLED": "true"},
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_an_operation_that_was_cut_is_told_in_words(home: Path) -> None:
    result = in_the_file(
        "from keto_tokens import *\n"
        "client = aws_client(aws_session(), 'ec2', 'eu-west-2', Calls())\n"
        "try:\n    client.describe_instances()\nexcept SetupError as error:\n    print(error)", home,
    )
    assert result.err == ""
    assert result.out.startswith("AWS: ec2.describe_instances is not in this file"), result.out


BOTOCORE = [  # which is asked for credentials before the cluster is called
    "server", "--once", "--all-groups", "--master", "http://127.0.0.1:9", "--region", "eu-west-2",
    "--insecure-skip-tls-verify",
]


@pytest.mark.parametrize(("profile", "says"), [
    ("[default]\nlogin_session = arn:aws:iam::1:user/x\n", "AWS CRT is not in this file"),
    ("[default]\nsource_profile = other\nrole_arn = arn:aws:iam::111122223333:role/x\n[profile other]\n"
     "credential_process = /bin/false\n", "finding credentials: no AWS credentials"),
], ids=["login", "process"])
def test_credentials_that_need_more_say_so(profile: str, says: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(profile)
    environ = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_EC2_METADATA_DISABLED": "true"}
    result = run_built(*BOTOCORE, environ={**environ, "SHIV_ROOT": str(home)})
    assert result.code == 3
    assert says in result.err.splitlines()[-1], result.err


# --- any build makes it ----------------------------------------------------------------------------


def test_a_build_elsewhere_makes_the_same_bytes(tmp_path: Path) -> None:
    """In another folder, with another umask, home, language and time zone."""
    copy = tmp_path / "a folder" / "copy"
    (copy / "tests").mkdir(parents=True)
    for name in ("build.sh", "setup.cfg", "keto_tokens.py", "tests/constraints.txt"):
        shutil.copy(REPOSITORY / name, copy / name)
    (copy / ".venv").symlink_to(REPOSITORY / ".venv")
    environ = {
        **os.environ, "HOME": str(tmp_path), "TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "7",
        "PYTHON": sys.executable, "PYTHONPATH": "",
    }
    done = subprocess.run(
        ["./build.sh"], cwd=copy, umask=0o077, env=environ, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256((copy / "dist" / "keto-tokens").read_bytes()).hexdigest()
    assert digest in done.stdout
    assert digest == hashlib.sha256(BUILT.read_bytes()).hexdigest()


# --- it runs anywhere ------------------------------------------------------------------------------

VERSION = f"keto-tokens {keto_tokens.__version__}\n"


@functools.cache
def interpreters() -> dict[str, str]:
    """CPython 3.10 to 3.14, as far as they are on this machine: paths by version."""
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    places = [*map(Path, os.environ["PATH"].split(":")), *Path.home().glob(".pyenv/versions/*/bin")]
    code = "import sys; print(sys.executable, sys.implementation.name)"
    for minor in range(10, 15):
        for path in (place / f"python3.{minor}" for place in places if "shims" not in place.parts):
            if path.exists() and f"3.{minor}" not in found:
                done = subprocess.run([path, "-c", code], capture_output=True, text=True)
                if done.stdout.endswith(" cpython\n"):
                    found[f"3.{minor}"] = str(path)
    return found


@pytest.mark.parametrize("version", interpreters())
def test_a_whole_life(version: str, world: World, tmp_path: Path) -> None:
    """Each operation that the program calls, by the file as it is shipped, on each Python."""
    python, cache = interpreters()[version], tmp_path / "cache"
    (node,) = world.aws.group("compute", 1, Role="compute")
    environ = {**world.aws.environment(), "SHIV_ROOT": str(cache)}

    def run(*argv: str, **more: str) -> str:
        result = subprocess.run(
            [python, str(BUILT), *argv], env={**environ, **more}, capture_output=True, text=True, timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stderr

    server = ["server", "--once", *FILTER, *world.cluster.server_flags()]
    assert "issued=1" in run(*server)
    path = world.kubeconfig(node)
    run("client", "--master", world.cluster.url, "--kubeconfig", str(path), "--ca-path",
        str(world.cluster.ca_path), **world.node_environment(node))
    token = kubeconfig_of(path)["token"]
    assert (token, world.aws.tag(node)) == (world.token_of(node), "Success")
    world.cluster.join(token, "node-1")
    assert "revoked=1" in run(*server)
    assert list(cache.glob("keto-tokens-*/__pycache__/keto_tokens.*.pyc"))


def start(*argv: str, **options: Any) -> Result:
    """A start of the file that has to end in one line, good or bad, and in no traceback."""
    options = {"env": {}, "capture_output": True, "text": True, "timeout": 120, **options}
    done = subprocess.run([*argv, sys.executable, str(BUILT), "--version"], **options)
    assert (done.stdout + done.stderr).count("\n") == 1, done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def whole(folder: Path) -> bool:
    """Whether all is unpacked there, and nothing else is."""
    (target,) = folder.glob("keto-tokens-*")
    return all((target / name).read_bytes() == content for name, content in packaged().items())


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], ids=oct)
def test_nobody_else_can_write_what_is_unpacked(umask: int, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    assert start(env={"SHIV_ROOT": str(root)}, umask=umask).out == VERSION
    assert whole(root)
    made = [root, *root.rglob("*")]
    assert [path for path in made if path.suffix == ".pyc"]
    assert not [path for path in made if path.stat().st_mode & 0o022]


def test_several_first_starts_at_once(tmp_path: Path) -> None:
    argv = [sys.executable, str(BUILT), "--version"]
    environ = {"SHIV_ROOT": str(tmp_path)}
    started = [subprocess.Popen(argv, env=environ, stdout=-1, stderr=-1, text=True) for _ in range(6)]
    assert [each.communicate() for each in started] == [(VERSION, "")] * 6
    assert whole(tmp_path)


@pytest.mark.parametrize("moment", ["zipfile.ZipFile.extract, 100", "os.sync, 1", "os.rename, 1"])
def test_a_first_start_that_was_killed_is_made_good(moment: str, tmp_path: Path) -> None:
    name, _, count = moment.partition(", ")
    code = (
        f"import os, runpy, zipfile\nleft, real = [None] * {count}, {name}\n"
        "def dying(*arguments):\n"
        "    left.pop()\n"
        "    return real(*arguments) if left else os.kill(os.getpid(), 9)\n"
        f"{name} = dying\nrunpy.run_path({str(BUILT)!r})"
    )
    killed = subprocess.run([sys.executable, "-c", code], env={"SHIV_ROOT": str(tmp_path)})
    assert killed.returncode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.glob("keto-tokens-*")] == [".half"]
    assert start(env={"SHIV_ROOT": str(tmp_path)}).out == VERSION
    assert whole(tmp_path)


@pytest.mark.parametrize("lost", ["keto_tokens.py", "botocore/data/endpoints.json", ""], ids=str)
def test_what_somebody_cleared_is_unpacked_again(tmp_path: Path, lost: str) -> None:
    """As cleaners do to caches and /tmp, by age and file by file."""
    assert start(env={"SHIV_ROOT": str(tmp_path)}).out == VERSION
    (unpacked,) = tmp_path.glob("keto-tokens-*")
    for path in [path for path in unpacked.rglob(lost or "*") if path.is_file()]:
        path.unlink()
    assert start(env={"SHIV_ROOT": str(tmp_path)}).out == VERSION
    assert whole(tmp_path)


def test_a_file_that_cannot_be_written_whole_is_no_start(tmp_path: Path) -> None:
    """As on a full disk, which takes root to have."""
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = start(env={"SHIV_ROOT": str(tmp_path)}, preexec_fn=limit)
    assert result.code == 3
    assert f"cannot unpack ({tmp_path}: File too large); set SHIV_ROOT" in result.err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("what", ["writable by others", "a symlink", "a file", "another user's"])
def test_what_others_could_have_put_there_is_not_run(what: str, tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    start(env={"SHIV_ROOT": str(root)})
    (target,) = root.glob("keto-tokens-*")
    if what == "writable by others":
        target.chmod(0o777)
    elif what == "another user's":
        if os.geteuid():
            pytest.skip("only root can give a folder away")
        os.chown(target, 12345, 12345)
    else:
        target.rename(elsewhere)
        target.symlink_to(elsewhere) if what == "a symlink" else target.write_text("")
    result = start(env={"SHIV_ROOT": str(root)})
    assert (result.code, result.out) == (3, "")
    assert f"cannot unpack ({root}: others could change what is in it); set SHIV_ROOT" in result.err


def test_what_was_unpacked_once_needs_no_writable_folder(tmp_path: Path) -> None:
    """An image may be baked so: unpacked by root, run by anybody from a read-only disk."""
    root = tmp_path / "cache"
    start(env={"SHIV_ROOT": str(root)})
    for path in [root, *root.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        assert start(env={"SHIV_ROOT": str(root)}).out == VERSION
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_nothing_outside_the_file_is_imported(tmp_path: Path, home: Path) -> None:
    """What else is installed for this Python, or stands in PYTHONPATH, is not what was tested."""
    for name in ("keto_tokens", "urllib3", "awscrt"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of elsewhere')")
    (tmp_path / "config").write_text("[default]\ncredential_process = /bin/false\n")
    environ = {"PYTHONPATH": str(tmp_path), "SHIV_ROOT": str(home)}
    assert start(env=environ).out == VERSION
    result = run_built(*BOTOCORE, environ={**environ, "AWS_CONFIG_FILE": str(tmp_path / "config")})
    assert result.code == 3
    assert "no AWS credentials" in result.err and "elsewhere" not in result.err


# Where only root can make the circumstances: in a mount namespace of its own.

MOUNTS = {
    "a full disk": ("mount -t tmpfs -o size=1m,mode=700 none $D", "No space left on device"),
    "noexec": ("mount -t tmpfs -o noexec,mode=700 none $D", ""),
    "a read-only root with one writable folder": (
        "mount --bind $D $D; mount -o remount,bind,ro /; ! touch $D/../x 2>/dev/null", ""),
    "a read-only folder": ("mount --bind $D $D; mount -o remount,bind,ro $D", "Read-only file system"),
}


@functools.cache
def may_mount() -> bool:
    """Whether this machine lets us make mounts of our own."""
    probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", MOUNTS)
def test_mounts(name: str, tmp_path: Path) -> None:
    if not may_mount():
        pytest.skip("no mounts here")
    folder = tmp_path / "mounted"
    folder.mkdir(mode=0o700)
    mount, problem = MOUNTS[name]
    result = start("unshare", "-m", "sh", "-ec", f'D={folder}; {mount}; exec "$@"', "sh",
                   env={"SHIV_ROOT": str(folder), "PATH": os.environ["PATH"]})
    if problem:
        assert result.code == 3
        assert f"cannot unpack ({folder}: {problem}); set SHIV_ROOT" in result.err
    else:
        assert result.out == VERSION


@pytest.mark.parametrize("home", ["", "/nonexistent", "/", "/root"], ids=lambda home: home or "none")
def test_a_user_without_a_home_of_its_own(home: str, tmp_path: Path) -> None:
    """As systemd's DynamicUser has it; with ProtectSystem=strict only CacheDirectory is writable."""
    python = Path("/usr/bin/python3")  # one that every user may run
    if not may_mount() or not shutil.which("setpriv") or not python.exists():
        pytest.skip("no mounts, users or Python for all here")
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    os.chown(cache, 61184, 61184)
    script = (
        f"mount -t tmpfs none /mnt; mkdir /mnt/cache; mount --bind {cache} /mnt/cache\n"
        f"cp {BUILT} /mnt/program; mount -o remount,bind,ro /; mount -o remount,ro /mnt\n"
        "exec setpriv --reuid 61184 --regid 61184 --clear-groups --no-new-privs "
        f"{python} /mnt/program --version"
    )
    environ = {"CACHE_DIRECTORY": "/mnt/cache", "PATH": os.environ["PATH"]} | ({"HOME": home} if home else {})
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", script], env=environ, capture_output=True, text=True, cwd="/",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, VERSION, "")
    assert whole(cache / "keto-tokens")
