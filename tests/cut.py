"""Run keto-tokens and die by SIGKILL right after its N-th external effect.

    python cut.py N REPORT ARGUMENTS...

An effect is anything that is seen from outside: a request that changes the cluster, a tag that is
written, a file or folder that is made, renamed, synced or removed.  With N = 0 nothing dies.  The
effects that happened are listed in the file REPORT, a line each.
"""
from __future__ import annotations

import os
import pathlib
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import keto_tokens

last, report = int(sys.argv[1]), open(sys.argv[2], "a", buffering=1)
lock = threading.Lock()
count = 0


def after(name: str) -> None:
    """Note an effect; die after the one that was asked for."""
    global count
    with lock:
        count += 1
        report.write(f"{name}\n")
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)


def wrap(holder: Any, name: str, label: Callable[..., str]) -> None:
    """Make calls of a function effects; an empty label is none."""
    original = getattr(holder, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        text = label(*args, **kwargs)
        if text:
            after(text)
        return result

    setattr(holder, name, wrapped)


def request(pool: Any, what: str, method: str, url: str, **_: Any) -> str:
    """A request that changes something."""
    quiet = method == "GET" or "selfsubjectreviews" in url or "/latest/api/token" in url
    return "" if quiet else f"{method} {url.split('/')[-1].split('-token-')[0]}"


wrap(keto_tokens, "send", request)


def tagged(ec2: Any, node: str, tag: str, value: str) -> str:
    """A tag that was written."""
    return "tag Success" if value == "Success" else "tag token"


wrap(keto_tokens, "aws_write_tag", tagged)
wrap(os, "rename", lambda *_: "rename")
wrap(os, "fsync", lambda *_: "fsync")
wrap(tempfile, "mkstemp", lambda *_, **__: "temporary file")
wrap(pathlib.Path, "mkdir", lambda *_, **__: "folder")
wrap(pathlib.Path, "unlink", lambda *_, **__: "unlink")
sys.exit(keto_tokens.main(sys.argv[3:]))
