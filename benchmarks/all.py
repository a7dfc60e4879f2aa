"""All benchmarks at their small setting, one after another: what `make bench` runs.

    python benchmarks/all.py [--out benchmarks/results] [--only NAME ...] [--model DIR] [--peer-python PY] [--threads N]
                             [--isa avx2] [--small]

Each part is a process of its own, whose command is printed; what it needs and is not here is said, and the part left
out. --model: a chat checkpoint (or .gguf file) for what compares with other programs, in place of the shipped base.
--peer-python: an interpreter that has TRL. Exits with 1 where a part failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from record import IMITATIONS, RESULTS

FOLDER = Path(__file__).resolve().parent
DATA = "SFTFLOW_TEST_DATA"
PARTS: dict[str, list[str]] = {
    "loop": [],
    "train": ["--model", "MODEL", "--peer-python", "PEER"],
    "generate": ["--model", "MODEL"],
    "serve": ["--model", "MODEL"],
    "flow": [],
    "prepare": ["--peer-python", "PEER"],
    "structured": [],
    "soak": [],
    "strangers": [],
}
NEEDS_DATA = ("prepare",)
"""parts that read public data sets"""


def missing(part: str) -> str | None:
    """Why a part cannot run here at all; what of it cannot, it says itself."""
    if part in NEEDS_DATA and DATA not in os.environ:
        return f"{DATA} is not set (CONTRIBUTING.md says which data it names)"
    if part in ("soak", "strangers") and not sys.platform.startswith("linux"):
        return "it reads /proc"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa", choices=tuple(IMITATIONS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--small", action="store_true", help="is always so")
    asked = parser.parse_args()
    common = ["--small", "--out", str(asked.out.resolve())]
    for name in ("threads", "isa", "rounds"):
        if getattr(asked, name):
            common += [f"--{name}", str(getattr(asked, name))]
    failed, began = [], time.monotonic()
    for part in asked.only:
        if why := missing(part):
            print(f"== {part}: skipped: {why}\n", flush=True)
            continue
        words = [{"MODEL": asked.model, "PEER": asked.peer_python}.get(w, w) for w in PARTS[part]]
        print(f"== {part}: {shlex.join([*words, *common])}", flush=True)
        started = time.monotonic()
        done = subprocess.run([sys.executable, str(FOLDER / f"{part}.py"), *words, *common])
        failed += [part] if done.returncode else []
        print(f"== {part}: {time.monotonic() - started:.0f} s\n", flush=True)
    minutes = (time.monotonic() - began) / 60
    told = f"failed: {', '.join(failed)}" if failed else f"tables: python {Path('scripts', 'benchmark_tables.py')}"
    print(f"{minutes:.1f} minutes; {told}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
