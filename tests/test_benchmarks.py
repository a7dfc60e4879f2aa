"""The benchmarks are run by hand; that they still fit the package, and that the docs say what they measured, is tested
here."""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
sys.path[:0] = [str(FOLDER), str(ROOT / "scripts")]

import benchmark_tables  # noqa: E402
import figures  # noqa: E402
import record  # noqa: E402


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.stem)
def test_what_a_benchmark_imports_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sftflow":
            module = import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name) or import_module(f"{node.module}.{alias.name}")


def measured(folder: Path) -> dict[str, Any]:
    """Two rounds: ours at 90 and 110 tokens a second, theirs at 45 and 44, and ours alone in a second case."""
    arguments, made = record.begin(argparse.ArgumentParser(), "generate", argv=["--out", str(folder), "--rounds", "2"])
    assert arguments.rounds == 2
    for turn in made.turns():
        for way in made.turned(["sftflow", "theirs"]):
            rate = {"sftflow": (90, 110), "theirs": (45, 44)}[way][turn]
            made.add(way, {"tokens_per_second": rate, "gap_p99_ms": 3.21}, clients=1)
        made.add("sftflow", {"tokens_per_second": 500.0}, clients=8)
    made.skip("others", "not installed")
    made.facts["replies equal"] = "8 of 8"
    made.finish()
    (path,) = folder.iterdir()
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == figures.file_name(data)
    return data


def test_a_file_of_figures_and_its_table(tmp_path: Path) -> None:
    data = measured(tmp_path)
    assert figures.problems(data) == []
    assert [(r["round"], r["way"]) for r in data["rounds"] if r["case"] == {"clients": 1}] == [
        (0, "sftflow"), (0, "theirs"), (1, "theirs"), (1, "sftflow"),
    ]  # fmt: skip
    assert figures.table(data).splitlines() == [
        "| way | clients | tokens/s | p99 ms | sftflow is |",
        "|---|--:|--:|--:|--:|",
        "| **sftflow** | 1 | 100.0 | 3.2 |  |",
        "| theirs | 1 | 44.5 | 3.2 | 2.25 times (2.00 to 2.50) |",  # the median of 90/45 and 110/44
        "| **sftflow** | 8 | 500.0 |  |  |",
    ]
    page = f"a\n<!-- figures: generate.{data['subject']} -->\nold\n<!-- end of figures -->\nb\n"
    made = benchmark_tables.rewritten(page, tmp_path)
    assert figures.table(data) in made and figures.described(data) in made and "old" not in made
    assert "- replies equal: 8 of 8" in made and "Not measured: others (not installed)." in made
    assert benchmark_tables.rewritten(made, tmp_path) == made
    other = page.replace(data["subject"], "x")
    assert benchmark_tables.rewritten(other, tmp_path) == other  # nothing of that name was measured yet
    data["rounds"] = [r for r in data["rounds"] if r["case"]["clients"] == 1]
    assert benchmark_tables.summary(data).splitlines()[2:] == [
        "| tokens/s | 44.5 (theirs) | 100.0 | 2.25 times |",
    ]


def test_what_is_not_of_the_form_is_named(tmp_path: Path) -> None:
    data = measured(tmp_path)
    assert figures.problems({k: v for k, v in data.items() if k != "machine"}) == ["machine: missing"]
    data["rounds"][0]["values"] |= {"tokens_per_fortnight": 1.0, "seconds": "3"}
    data["settings"] |= {"model": "/home/someone/model"}
    assert figures.problems(data) == [
        "a path of a machine: /home/someone/model",
        "rounds[0].values: tokens_per_fortnight 1.0",
        "rounds[0].values: seconds '3'",
    ]


def test_the_files_of_figures_are_of_the_form() -> None:
    for path in benchmark_tables.RESULTS.glob("*"):
        data = json.loads(path.read_text(encoding="utf-8"))
        assert figures.problems(data) == [] and figures.file_name(data) == path.name, path.name


def test_the_pages_say_what_was_measured() -> None:
    """After a benchmark: python scripts/benchmark_tables.py"""
    for path in benchmark_tables.PAGES:
        page = path.read_text(encoding="utf-8")
        assert benchmark_tables.rewritten(page) == page, path.name
        assert (
            page.count("<!-- figures: ")
            == page.count("<!-- end of figures -->")
            == len(benchmark_tables.MARKED.findall(page))
        )


SMALLEST = {
    "loop": "--steps 2",
    "generate": "--clients 1 2 --single 1 --tokens 4",
    "serve": "--clients 2 --tokens 4 --skip transformers continuous",
    "structured": "--rows 1 --tokens 4",
    "train": "--steps 2 --rows-per-step 4 --no-reference --only sftflow,_not_compiled",
    "flow": "--small --set train.steps=2 --set eval.limit=2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_run_of_a_benchmark(name: str, tmp_path: Path) -> None:
    words = [w.replace("_", " ") for w in SMALLEST[name].split()]
    command = [sys.executable, str(FOLDER / f"{name}.py"), *words, "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text(encoding="utf-8"))
    assert figures.problems(data) == [] and figures.file_name(data) == path.name
    assert data["benchmark"] == name and any(r["way"].startswith("sftflow") for r in data["rounds"])
    assert all(x > 0 for r in data["rounds"] for n, x in r["values"].items() if n not in ("score", "gap_p50_ms"))
