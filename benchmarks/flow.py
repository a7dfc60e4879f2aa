"""A whole run as its user waits for it: set-up, training, comparison, and what came out.

    python benchmarks/flow.py [--recipe FILE] [--set KEY=VALUE ...] [--rounds 1] [--setup]

One round is one `sftflow train` of the recipe (the demo's; under --small recipes/tiny.yaml, cut to 20 steps) in a
process of its own. s: all that the command took; training s: the sum of its steps; comparison s: as compare.json says;
CPU s and memory are the process's. --setup also times what `make demo` installs before, in a fresh clone with the wheel
cache that is there. The scores, and what was forgotten, are facts of the last round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ROOT, Record, begin, precision_of

RECIPES = ROOT / "src" / "sftflow" / "recipes"


def run(command: list[str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of a command. Raises SystemExit, with the end of what it said, where it
    fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        took = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)} left with {process.returncode}:\n{said.read()[-3000:]}")
    return {"seconds": took, "cpu_seconds": used.ru_utime + used.ru_stime, "memory_mib": used.ru_maxrss / 1024}


def trained(recipe: Path, settings: list[str], out: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The figures of one run, and its compare.json."""
    words = [w for s in [*settings, f"train.out={out}"] for w in ("--set", s)]
    values = run([sys.executable, "-m", "sftflow", "train", str(recipe), *words])
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values["train_seconds"] = sum(s["seconds"] for s in steps if "seconds" in s)
    compared = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    return {**values, "compare_seconds": compared["seconds"], "score": compared["centred_mean"]["sft"]}, compared


def set_up() -> float:
    """Seconds that `make demo` installs for, in a fresh clone."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        return run(["make", "--quiet", "-C", str(clone), ".venv/.ready"])["seconds"]


def tell(record: Record, compared: dict[str, Any], values: dict[str, float]) -> None:
    for name, task in compared["tasks"].items():
        record.facts[name] = f"{task['base']:.2f} -> {task['sft']:.2f} (n {task['n']})"
    forgetting = compared.get("forgetting")
    if forgetting:
        before, after = forgetting["base"], forgetting["sft"]
        record.facts["plain text, bits per byte"] = f"{before:.3f} -> {after:.3f} ({after / before - 1:+.1%})"
    record.facts["the comparison, of the training"] = f"{values['compare_seconds'] / values['train_seconds']:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", dest="model", type=Path, default=RECIPES / "demo.yaml")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--setup", action="store_true", help="time the installation, too")
    small = {"model": ROOT / "recipes" / "tiny.yaml", "settings": ["train.steps=20", "eval.limit=20"]}
    args, record = begin(parser, "flow", rounds=1, small=small, compared="seconds")
    settings = [f"train.precision={precision_of('auto')}", *args.settings]
    for _ in record.turns():
        with tempfile.TemporaryDirectory() as folder:
            values, compared = trained(args.model, settings, Path(folder) / "run")
        if args.setup:
            values["setup_seconds"] = set_up()
        record.add("sftflow", values)
    tell(record, compared, values)
    record.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
