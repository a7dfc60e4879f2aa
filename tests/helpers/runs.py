"""Small training runs that tests start: their recipe, the command line, a listener that says nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MEASURED = ("seconds", "memory")  # of the machine, not of the training


def write_recipe(folder: Path, base: Path, **train: Any) -> Path:
    """A recipe of 24 steps, a save every 4, on 81 questions; its run goes to `folder/run`."""
    rows = [{"prompt": f"What is {a}+{b}?", "completion": f"It is {a + b}."} for a in range(9) for b in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {
        "out": str(folder / "run"),
        "max_length": 64,
        "tokens_per_step": 512,
        "micro_tokens": 256,
        "steps": 24,
        "save_every": 4,
        "precision": "fp32",
        "optimizer": "muon",
        "lr": 0.003,
    }
    recipe = {"base": str(base), "mixture": [{"source": "rows.jsonl"}], "validation": 4, "train": settings | train}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def taught(base: Path, rows: list[dict[str, Any]], out: Path) -> Path:
    """The base, trained through the command line on these rows and nothing else, until it knows them by heart."""
    folder = out.parent
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train = {"out": str(out), "max_length": 512, "tokens_per_step": 512, "steps": 150, "lr": 0.01}
    recipe = {
        "base": str(base),
        "mixture": [{"source": "rows.jsonl", "repeat": 150}],
        "validation": 0,
        "train": {**train, "epochs": 100, "precision": "fp32", "optimizer": "adamw", "compile": False},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    done = run("train", str(folder / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-2000:]
    return out


class Quiet:
    """A listener that says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(out: Path) -> dict[str, Any]:
    """All that must not depend on whether a run was interrupted: weights, optimizer, random state, logs."""
    found: dict[str, Any] = {}
    for name in ("metrics.jsonl", "validation.jsonl"):
        rows = [json.loads(line) for line in (out / name).read_text().splitlines()]
        found[name] = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
    record = json.loads((out / "checkpoint" / "sftflow.json").read_text())
    found["checkpoint"] = (record["step"], record["sha256"])
    for path in sorted((out / "checkpoint").iterdir()):
        if path.name != "sftflow.json":  # it names train.out
            found[path.name] = digest(path)
    for path in sorted((out / "resume" / "step-00000020").glob("*.safetensors")):
        found[f"resume/{path.name}"] = digest(path)
    return found


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in [*out.glob(".*"), *out.glob("resume/.*")] if p.name not in (".lock", "resume"))


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(*args: str, cwd: Path | None = None) -> Result:
    """The real entry point, in this process: a fresh interpreter would spend seconds on importing torch each time."""
    from sftflow.cli import main

    out, err = io.StringIO(), io.StringIO()
    before, argv = os.getcwd(), sys.argv
    try:
        os.chdir(cwd or before)
        sys.argv = ["sftflow", *args]
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left:
            main()
    finally:
        os.chdir(before)
        sys.argv = argv
    return Result(int(left.value.code or 0), out.getvalue(), err.getvalue())


def error_line(result: Result, code: int = 2) -> str:
    assert result.returncode == code, result.stderr
    lines = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]
