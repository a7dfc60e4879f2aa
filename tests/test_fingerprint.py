"""What cached rows and graded rows depend on: all code that makes them, and none that draws or serves."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from sftflow.fingerprint import GRADED_ROWS, PACKAGE, RENDERED_ROWS, MadeBy, code_hash

# Where the making of rows begins.
ENTRIES = {RENDERED_ROWS: "data.prepare", GRADED_ROWS: "evaluation.grading"}
LEFT_OUT = {
    "foundation.atomic_io": "how files are written",
    "checkpoint": "what it loads has fingerprints of its own: weights, tokenizer, template",
    "data.row_cache": "where rows are kept; its key is compared",
    "foundation.cache": "where what can be asked again is kept",
    "foundation.errors": "what refusals look like",
    "foundation.ranks": "who computes which part; what is computed at once is decided elsewhere",
    "foundation.missing": "what the refusal of a missing file looks like",
    "fingerprint": "its hashes are compared",
    "recipe": "what it asks for is in the key",
    "sandbox": "of rendered rows only: it grades",
}
"""modules that the listed ones import and that are in neither list, or in one only: why they change no row"""
DRAWING = ("report", "serving", "terminal", "cli", "comparison", "exporting", "data/audit")


def module_path(module: str) -> Path | None:
    place = PACKAGE.joinpath(*module.split("."))
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports when it runs, at the top or in a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }  # fmt: skip
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sftflow.") and node not in for_types:
            module = str(node.module).removeprefix("sftflow.")
            inner = [f"{module}.{alias.name}" for alias in node.names]
            found.update([module, *(name for name in inner if module_path(name))])
        elif isinstance(node, ast.Import) and node not in for_types:
            found.update(a.name.removeprefix("sftflow.") for a in node.names if a.name.startswith("sftflow."))
    return found


def closure(entry: str) -> set[str]:
    """The modules that one imports, and those that these import; what is left out by name is not looked into."""
    seen: set[str] = set()
    todo = [entry]
    while todo:
        module = todo.pop()
        path = module_path(module)
        if module not in seen and path is not None:
            seen.add(module)
            if not left_out(module):
                todo += imported(path)
    return seen


def makers(entry: str) -> set[str]:
    """The entry's closure, and that of every task: these are looked up by name, in a table."""
    tasks = [f"tasks.{p.stem}" for p in (PACKAGE / "tasks").glob("*.py") if p.stem != "__init__"]
    return closure(entry).union(*map(closure, tasks))


def left_out(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in LEFT_OUT)


def listed(module: str, made_by: MadeBy) -> bool:
    path = module_path(module)
    assert path is not None
    places = [PACKAGE / name for name in made_by.code]
    return any(path == place or place in path.parents for place in places)


@pytest.mark.parametrize("made_by", ENTRIES, ids=["rendered", "graded"])
def test_every_module_that_makes_rows_is_in_the_list(made_by: MadeBy) -> None:
    everything = makers(ENTRIES[made_by])
    assert {"chat.render", "tasks.task", "foundation.calculator", ENTRIES[made_by]} <= everything
    missing = sorted(m for m in everything if not listed(m, made_by) and not left_out(m))
    assert not missing
    for name in made_by.code:
        assert (PACKAGE / name).exists(), name


def test_each_left_out_module_is_imported_by_one_that_is_listed() -> None:
    found = {m for entry in ENTRIES.values() for m in makers(entry)}
    assert {name for name in LEFT_OUT if not any(m == name or m.startswith(f"{name}.") for m in found)} == set()


def hashes(package: Path) -> tuple[str, str]:
    code_hash.cache_clear()
    return code_hash(RENDERED_ROWS, package), code_hash(GRADED_ROWS, package)


def test_what_draws_and_serves_changes_neither_and_the_calculator_both(tmp_path: Path) -> None:
    package = tmp_path / "sftflow"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    rendered, graded = hashes(package)
    assert (rendered, graded) == hashes(PACKAGE)

    def touch(name: str) -> tuple[str, str]:
        path = package / name
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        found = hashes(package)
        path.write_bytes(before)
        return found

    drawing = [p for name in DRAWING for p in (package / name).rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in drawing}
    for path, text in before.items():
        path.write_bytes(text + b"\n")
    assert len(drawing) > 30 and hashes(package) == (rendered, graded)
    for path, text in before.items():
        path.write_bytes(text)
    for name in ("foundation/calculator.py", "chat/render.py", "chat/formats/chatml.jinja", "tasks/data/words.txt"):
        both = touch(name)
        assert both[0] != rendered and both[1] != graded, name
    only_grades = touch("generation/engine.py")
    assert only_grades[0] == rendered and only_grades[1] != graded
    only_rows = touch("data/prepare.py")
    assert only_rows[0] != rendered and only_rows[1] == graded
    (package / "chat" / "more.py").write_text("")
    assert all(a != b for a, b in zip(hashes(package), (rendered, graded), strict=True))
    code_hash.cache_clear()
