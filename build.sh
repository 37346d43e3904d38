#!/usr/bin/env bash
# Build, test and try keto-tokens.  Needs CPython 3.10 or newer and the package index, nothing else.
#
#   ./build.sh         make dist/keto-tokens, one executable file
#   ./build.sh demo    build, then see it work on this machine (demo gce: on a stand-in for Google's cloud)
#   ./build.sh test    lint, types and tests; further arguments go to pytest
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

pip_install() {
    local log
    log=$(mktemp)
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
        --constraint tests/constraints.txt "$@" >"$log" 2>&1; then
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
    pip_install $(pins options install_requires) $(pins options.extras_require test)
    echo "$wanted" >.venv/made-from
}

# A prepared site-packages first, so that it can be trimmed; then one file of it.
build() {
    prepare
    rm -rf build dist
    mkdir -p build dist
    # shellcheck disable=SC2046
    pip_install --target build/site --no-compile --no-deps $(pins options install_requires)
    rm -rf build/site/bin
    find build/site -name '*.so' -delete  # PyYAML's C half: the same file runs everywhere
    cp keto_tokens.py build/site/
    SOURCE_DATE_EPOCH=315532800 .venv/bin/shiv --site-packages build/site --compressed \
        --entry-point keto_tokens:run --python '/usr/bin/env python3' \
        --output-file build/keto-tokens 2>/dev/null
    add_start build/keto-tokens dist/keto-tokens
    echo "dist/keto-tokens $(wc -c <dist/keto-tokens) bytes"
}

# add_start FROM TO: put our own first steps before shiv's, in words that any Python understands.
add_start() {
    .venv/bin/python - "$1" "$2" <<'PYTHON'
import io, os, sys, zipfile

START = '''\
import sys

if sys.version_info < (3, 10):
    sys.exit("keto-tokens needs Python 3.10 or newer; this is Python %d.%d" % sys.version_info[:2])

import os


def usable(folder):
    """Whether we can unpack there, and nobody else can write there."""
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        status = os.lstat(folder)
        ours = status.st_uid == os.geteuid() and not status.st_mode & 0o022
        return ours and os.access(folder, os.W_OK | os.X_OK) and not os.path.islink(folder)
    except OSError:
        return False


def folders():
    """Where to unpack, best first: systemd's CacheDirectory, the user's cache, the system's, /tmp."""
    for variable in ("CACHE_DIRECTORY", "XDG_CACHE_HOME"):
        if os.environ.get(variable, "").startswith("/"):
            yield os.path.join(os.environ[variable].split(":")[0], "keto-tokens")
    home = os.path.expanduser("~")
    if home.startswith("/") and home != "/" and os.path.isdir(home):
        yield os.path.join(home, ".cache", "keto-tokens")
    yield "/var/cache/keto-tokens"
    yield "/tmp/keto-tokens-%d" % os.geteuid()


if not os.environ.get("SHIV_ROOT"):
    root = next(filter(usable, folders()), None)
    if root is None:
        sys.exit("keto-tokens: no folder to unpack in; set SHIV_ROOT to one that only this user can write")
    os.environ["SHIV_ROOT"] = root

'''

source, target = sys.argv[1:]
content = open(source, "rb").read()
shebang = content[: content.index(b"\n") + 1]
packed = io.BytesIO()
with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
    for entry in old.infolist():
        data = old.read(entry)
        if entry.filename == "__main__.py":
            data = START.encode() + data
        new.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)
with open(target, "wb") as file:
    file.write(shebang + packed.getvalue())
os.chmod(target, 0o755)
PYTHON
}

run_tests() {
    build
    .venv/bin/flake8 keto_tokens.py tests
    .venv/bin/mypy
    .venv/bin/python -m pytest "$@"
}

case "${1:-build}" in
build) build ;;
demo) build >&2 && shift && PYTHONPATH=. exec .venv/bin/python tests/demo.py "$@" ;;
test) shift && run_tests "$@" ;;
clean) rm -rf .venv build dist .pytest_cache .mypy_cache .hypothesis ./*.egg-info && find . -name __pycache__ -prune -exec rm -rf {} + ;;
*) die "unknown: $1; one of build, demo, test, clean" ;;
esac
