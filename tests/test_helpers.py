"""The tests' own order: what several of them use is in `helpers`, and none is imported by another."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).parent


def test_no_test_module_imports_another() -> None:
    tests = {path.stem for path in FOLDER.glob("*.py")}
    wrong = []
    for path in [*FOLDER.glob("*.py"), *FOLDER.glob("helpers/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{path.name} imports {name}" for name in names if name.split(".")[0] in tests]
    assert not wrong
