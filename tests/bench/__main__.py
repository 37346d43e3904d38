"""python -m bench [start|scale|herd|soak] [ARGUMENTS]: one of the benchmarks, or all of them."""
from __future__ import annotations

import os
import sys

from bench import herd, scale, soak, start

BENCHES = {"start": start.main, "scale": scale.main, "herd": herd.main, "soak": soak.main}


def main(argv: list[str]) -> None:
    """Run what was asked for, without whatever Python or AWS settings this shell has."""
    for name in [name for name in os.environ if name.startswith(("PYTHON", "AWS_"))]:
        del os.environ[name]
    if argv and argv[0] not in BENCHES:
        sys.exit(f"bench: one of {', '.join(BENCHES)}")
    for name in argv[:1] or BENCHES:
        BENCHES[name](argv[1:])


main(sys.argv[1:])
