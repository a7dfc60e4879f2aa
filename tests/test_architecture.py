"""Imports run one way, down the floors of the house."""

from __future__ import annotations

import ast
from pathlib import Path

import sftflow

ROOT = Path(sftflow.__file__).parent
# From the ground up. A module's floor is that of its longest matching prefix; it may import only from floors below
# its own, or from its own folder.
FLOORS = (
    "errors",
    "files",
    "runtime",
    "sandbox",
    "rounding",
    "packed",
    "chat",
    "generate",
    "mixture.tasks",
    "recipe",
    "mixture",
    "export.layout",
    "export.vocab",
    "export.write",
    "export.read",
    "checkpoint",
    "train",
    "base",
    "evals",
    "compare",
    "serve",
    "export",
    "doctor",
    "console",
    "cli",
    "__main__",
)


def floor(module: str) -> int:
    best = max((f for f in FLOORS if module == f or module.startswith(f + ".")), key=len, default=None)
    assert best is not None, f"{module} has no floor; give it one"
    return FLOORS.index(best)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sftflow."):
            found.add((node.module or "").removeprefix("sftflow."))
        elif isinstance(node, ast.Import):
            found.update(a.name.removeprefix("sftflow.") for a in node.names if a.name.startswith("sftflow."))
    return found


def test_imports_run_down() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module in ("__init__", "recipes"):
            continue
        for target in imports_of(path):
            if floor(target) > floor(module):
                wrong.append(f"{module} imports {target}")
    assert not wrong, wrong


def test_help_imports_neither_torch_nor_transformers() -> None:
    heavy = {"torch", "transformers", "datasets", "matplotlib", "numpy", "fastapi"}
    top = set()
    for path in (ROOT / "cli").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top |= {n.names[0].name.split(".")[0] for n in tree.body if isinstance(n, ast.Import)}
        top |= {(n.module or "").split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert not top & heavy
