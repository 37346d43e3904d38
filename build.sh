#!/usr/bin/env bash
# Build, test and try keto-tokens.  Needs CPython 3.10 or newer and the package index, nothing else.
#
#   ./build.sh         make dist/keto-tokens, one executable file
#   ./build.sh demo    build, then see it work on this machine (demo gce: on a stand-in for Google's cloud)
#   ./build.sh test    lint, types and tests; further arguments go to pytest
#   ./build.sh bench   build, then measure: start, scale, herd or soak, or all of them
#   ./build.sh clean   remove what the others made
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
umask 022

die() { echo "build.sh: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no CPython 3.10 or newer is here (tried ${PYTHON:-python3, python3.10 to python3.14})"
}

# pins SECTION OPTION: the requirements listed in setup.cfg
pins() {
    "$python" -c 'import configparser, sys
config = configparser.ConfigParser()
config.read("setup.cfg")
print(*config[sys.argv[1]][sys.argv[2]].split())' "$1" "$2"
}

# pinned_by_hash: what is packaged, a requirement a line, with the hash of the file to take
pinned_by_hash() {
    "$python" -c 'import configparser
config = configparser.ConfigParser()
config.read("setup.cfg")
hashes = dict(line.split() for line in config["packaged"]["sha256"].split("\n") if line)
for pin in config["options"]["install_requires"].split():
    print(pin, "--hash=sha256:" + hashes[pin.partition("==")[0]])'
}

pip_install() {
    local log
    log=$(mktemp)
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
        "$@" >"$log" 2>&1; then
        grep -E '^ERROR' "$log" >&2 || cat "$log" >&2
        rm -f "$log"
        die "pip could not install; is a package index reachable from this machine?"
    fi
    rm -f "$log"
}

# The project's own .venv, made again when the pins or the interpreter change.
prepare() {
    python=$(find_python)
    local wanted
    wanted=$("$python" -c 'import hashlib, sys
text = open("setup.cfg").read() + open("tests/constraints.txt").read() + sys.version
print(hashlib.sha256(text.encode()).hexdigest())')
    [ "$(cat .venv/made-from 2>/dev/null)" = "$wanted" ] && return
    echo "build.sh: making .venv with $("$python" --version)" >&2
    rm -rf .venv
    "$python" -m venv .venv >/dev/null 2>&1 ||
        die "$python cannot make a virtual environment; install it (Debian: apt install python3-venv)"
    # shellcheck disable=SC2046
    pip_install --constraint tests/constraints.txt $(pins options install_requires) $(pins options.extras_require test)
    echo "$wanted" >.venv/made-from
}

# One file of the program and what it imports.  The same bytes come out on any machine: each package is
# taken from one file that is pinned by its hash, whatever runs here.
build() {
    prepare
    rm -rf build dist
    mkdir -p build dist
    pinned_by_hash >build/requirements.txt
    pip_install --target build/site --no-compile --no-deps --require-hashes --only-binary :all: \
        --implementation cp --python-version 3.10 --platform manylinux2014_x86_64 \
        --requirement build/requirements.txt
    cp keto_tokens.py build/site/
    trim build/site
    SOURCE_DATE_EPOCH=315532800 .venv/bin/shiv --site-packages build/site --compressed \
        --entry-point keto_tokens:run --python '/usr/bin/env python3' \
        --output-file build/keto-tokens 2>/dev/null
    pack build/keto-tokens dist/keto-tokens
}

# trim SITE: leave only what the program can come to use, and the licences of it.
trim() {
    PYTHONPATH=. .venv/bin/python - "$1" <<'PYTHON'
import json, pathlib, re, shutil, sys

from botocore.loaders import Loader

from keto_tokens import AWS_OPERATIONS

site = pathlib.Path(sys.argv[1])
data = site / "botocore" / "data"
COMPILED = ("*.so", "*.pyd", "*.pyc")  # PyYAML's C half is one: the same file runs everywhere
UNUSED = (
    "bin", "_yaml", "**/py.typed", "**/*.pyi", "**/tests",
    "dateutil/zoneinfo/*.tar.gz", "urllib3/contrib/emscripten",
    *(f"prometheus_client/{name}" for name in ("aiohttp", "bridge", "django", "twisted")),
)
LICENCES = re.compile("(LICEN[CS]E|NOTICE|COPYING|AUTHORS)", re.IGNORECASE)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(model, operations):
    """A service's model with these operations and the shapes they reach, without documentation."""
    kept = {name: model["operations"][name] for name in operations}
    shapes, reached = {}, re.compile('"shape": ?"([^"]+)"').findall(json.dumps(kept))
    while reached:
        name = reached.pop()
        if name not in shapes:
            shapes[name] = model["shapes"][name]
            reached += re.findall('"shape": ?"([^"]+)"', json.dumps(shapes[name]))
    return undocumented({**model, "operations": kept, "shapes": shapes})


def undocumented(part):
    """The part of a model without its documentation, in an order of its own."""
    if isinstance(part, list):
        return [undocumented(each) for each in part]
    if not isinstance(part, dict):
        return part
    return {key: undocumented(value) for key, value in part.items() if not (
        key.startswith("documentation") and isinstance(value, str))}


def service(loader, name, operations):
    """The files of a service that botocore reads, by path."""
    version = loader.determine_latest_version(name, "service-2")

    def load(kind):
        return loader.load_service_model(name, kind, version)

    pages = {key: value for key, value in load("paginators-1")["pagination"].items() if key in operations}
    yield f"{name}/{version}/service-2.json", cut(load("service-2"), operations)
    yield f"{name}/{version}/paginators-1.json", {"pagination": pages}
    yield f"{name}/{version}/endpoint-rule-set-1.json", undocumented(load("endpoint-rule-set-1"))


def models(loader):
    """All of botocore's data that is left, by path."""
    for name in ("partitions", "sdk-default-configuration", "_retry"):
        yield f"{name}.json", undocumented(loader.load_data(name))
    endpoints = loader.load_data("endpoints")
    for partition in endpoints["partitions"]:
        kept = {key: value for key, value in partition["services"].items() if key in AWS_OPERATIONS}
        partition["services"] = kept
    yield "endpoints.json", endpoints
    for name, operations in AWS_OPERATIONS.items():
        yield from service(loader, name, operations)


left = dict(models(Loader(extra_search_paths=[str(data)], include_default_search_paths=False)))
shutil.rmtree(data)
for path, content in left.items():
    (data / path).parent.mkdir(parents=True, exist_ok=True)
    (data / path).write_text(json.dumps(content, separators=(",", ":")))
for pattern in [*COMPILED, *UNUSED]:
    for path in list(site.glob(pattern if "/" in pattern else f"**/{pattern}")):
        remove(path)
for path in list(site.glob("*.dist-info/**/*")):
    if path.is_file() and not LICENCES.match(path.name):
        remove(path)
PYTHON
}

# pack FROM TO: shiv's file with our own start in place of its.
pack() {
    cat >build/start.py <<'PYTHON'
"""Unpack what is in this file once, into a folder that nobody else can write, and run it from there.

In words that any Python understands, so that an old one is told what is wrong.
"""
import os
import sys


def stop(reason):
    """End with a line, and the exit code for what cannot work as it is set up."""
    sys.stderr.write("keto-tokens: %s\n" % reason)
    sys.exit(3)


if sys.version_info < (3, 10):
    stop("needs Python 3.10 or newer; this is Python %d.%d" % sys.version_info[:2])

ARCHIVE = os.path.dirname(os.path.abspath(__file__))
NAME = "keto-tokens-@BUILD@"  # what is unpacked; another version has another name
FILES = int("@FILES@")


def safe(folder):
    """Whether it is a folder that nobody but us, and root, can change."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    ours = status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022
    return ours and status.st_mode & 0o170000 == 0o040000


def whole(folder):
    """Whether no file is missing, as they are when somebody clears a cache or /tmp by age."""
    found = (name for _, _, names in os.walk(folder) for name in names)
    return sum(not name.endswith(".pyc") for name in found) == FILES


def folders():
    """Where to unpack, best first: systemd's CacheDirectory, the user's cache, the system's, /tmp."""
    if os.environ.get("SHIV_ROOT"):
        return [os.path.abspath(os.environ["SHIV_ROOT"])]
    names = [os.environ.get(each, "") for each in ("CACHE_DIRECTORY", "XDG_CACHE_HOME")]
    found = [os.path.join(each.split(":")[0], "keto-tokens") for each in names if each.startswith("/")]
    home = os.path.expanduser("~")
    if home.startswith("/") and home != "/" and os.path.isdir(home):
        found.append(os.path.join(home, ".cache", "keto-tokens"))
    return found + ["/var/cache/keto-tokens", "/tmp/keto-tokens-%d" % os.geteuid()]


def unpack(folder):
    """Unpack there, all or nothing; one of several that start together does it, the others wait."""
    import fcntl
    import shutil
    import zipfile

    target = os.path.join(folder, NAME)
    half = target + ".half"
    with open(os.path.join(folder, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if whole(target):
            return
        shutil.rmtree(target, ignore_errors=True)  # what a cleaner has left of it
        try:  # over what a first start that was killed may have left
            with zipfile.ZipFile(ARCHIVE) as archive:
                for name in archive.namelist():
                    if name.startswith("site-packages/"):
                        archive.extract(name, half)
            os.sync()  # else a power cut could leave empty files behind the new name
            os.rename(os.path.join(half, "site-packages"), target)
        finally:
            shutil.rmtree(half, ignore_errors=True)


def unpacked():
    """The folder with what is packed here; the first that is there already or can be made."""
    problems = []
    for folder in folders():
        target = os.path.join(folder, NAME)
        if safe(folder) and safe(target) and whole(target):
            return target
        try:
            os.makedirs(folder, 0o700, exist_ok=True)
            if not safe(folder) or os.path.lexists(target) and not safe(target):
                raise OSError(0, "others could change what is in it")
            unpack(folder)
            return target
        except OSError as error:
            problems.append("%s: %s" % (folder, error.strerror))
    stop("cannot unpack (%s); set SHIV_ROOT to a folder that only this user can write"
         " and that has 10 MB free" % "; ".join(problems))


os.umask(os.umask(0o022) | 0o022)  # nobody else is to write what Python compiles there
outside = os.environ.get("PYTHONPATH", "").split(os.pathsep)
sys.path[:] = [unpacked()] + [
    path for path in sys.path[1:]
    if path not in outside and os.path.basename(path) not in ("site-packages", "dist-packages")
]

import keto_tokens  # noqa: E402

try:
    keto_tokens.run()
except SystemExit as end:
    sys.stderr.flush()  # stdout is flushed already
    os._exit(end.code or 0)  # taking modules apart one by one takes Python 10 ms and more
PYTHON
    .venv/bin/python - "$1" "$2" <<'PYTHON'
import hashlib, io, json, os, pathlib, sys, zipfile

source, target = map(pathlib.Path, sys.argv[1:])
content = source.read_bytes()
start = pathlib.Path("build/start.py").read_text()
packed = io.BytesIO()
with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
    build = json.loads(old.read("environment.json"))["build_id"][:16]

    def add(name, data):
        entry = zipfile.ZipInfo(name)  # of 1980, and of no machine's permissions
        entry.external_attr = 0o100644 << 16
        new.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)

    names = [each for each in old.namelist() if each.startswith("site-packages/")]
    files = sum(not each.endswith("/") for each in names)
    add("__main__.py", start.replace("@BUILD@", build).replace("@FILES@", str(files)))
    for name in names:
        add(name, old.read(name))
target.write_bytes(content[: content.index(b"\n") + 1] + packed.getvalue())
target.chmod(0o755)
digest = hashlib.sha256(target.read_bytes()).hexdigest()
target.with_suffix(".sha256").write_text(f"{digest}  {target.name}\n")
print(f"{target} {target.stat().st_size} bytes, sha256 {digest}")
PYTHON
}

run_tests() {
    build
    .venv/bin/flake8 keto_tokens.py tests
    .venv/bin/flake8 --isolated --max-line-length 110 build/start.py
    .venv/bin/mypy
    .venv/bin/python -m pytest "$@"
}

case "${1:-build}" in
build) build ;;
demo) build >&2 && shift && PYTHONPATH=. exec .venv/bin/python tests/demo.py "$@" ;;
test) shift && run_tests "$@" ;;
bench) build && shift && PYTHONPATH=.:tests exec .venv/bin/python -m bench "$@" ;;
clean) rm -rf .venv build dist .pytest_cache .mypy_cache .hypothesis ./*.egg-info && find . -name __pycache__ -prune -exec rm -rf {} + ;;
*) die "unknown: $1; one of build, demo, test, bench, clean" ;;
esac
