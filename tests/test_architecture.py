"""Imports run one way, down the floors of the house, and in no circle inside a folder."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import sftflow

ROOT = Path(sftflow.__file__).parent
# From the ground up: the package's folders and the files beside them. Each may import only from floors below its own.
FLOORS = (
    "foundation",
    "sandbox",
    "packing",
    "chat",
    "other_trainers",
    "recipe_words",
    "recipe_keys",
    "recipe",
    "generation",
    "tasks",
    "gguf",
    "nanochat",
    "fingerprint",
    "checkpoint",
    "data",
    "training",
    "pretraining",
    "evaluation",
    "comparison",
    "exporting",
    "serving",
    "terminal",
    "replies",
    "report",
    "api",
    "cli",
    "__main__",
)


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `sftflow`; the package itself is ""."""
    files = sorted(ROOT.rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): p for p in files}


def imports_of(tree: ast.AST, names: set[str]) -> set[str]:
    """The modules among `names` that a file imports, however it says so.

    >>> tree = ast.parse("from sftflow import api\\nfrom sftflow.chat import render\\nimport sftflow.foundation.errors")
    >>> sorted(imports_of(tree, {"", "api", "chat", "chat.render", "foundation.errors"}))
    ['api', 'chat.render', 'foundation.errors']
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sftflow":
            module = (node.module or "").removeprefix("sftflow").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                found.add(inner if inner in names else module)
        elif isinstance(node, ast.Import):
            found.update(a.name.removeprefix("sftflow").lstrip(".") for a in node.names if a.name.startswith("sftflow"))
    return found & names


def graph() -> dict[str, set[str]]:
    files = modules()
    return {name: imports_of(ast.parse(path.read_text("utf-8")), set(files)) for name, path in files.items()}


def test_imports_run_down() -> None:
    wrong = []
    for module, targets in graph().items():
        here = module.split(".")[0]
        for target in targets:
            there = target.split(".")[0]
            # The package's face (its version, and the lazy door) is nobody's floor.
            if module and target and here != there and FLOORS.index(there) >= FLOORS.index(here):
                wrong.append(f"{module} imports {target}")
    assert not wrong, sorted(wrong)


def test_every_folder_has_a_floor() -> None:
    there = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()} - {"__init__"}
    assert there - {"recipes"} == set(FLOORS)


def test_no_circle_of_imports() -> None:
    imports = {module: targets - {""} for module, targets in graph().items() if module}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for target in sorted(imports[module]):
                walk(target, (*path, module))
            done.add(module)

    for module in imports:
        walk(module, ())


def test_no_package_bears_the_name_of_a_verb() -> None:
    """An imported submodule `sftflow.train` would take the place of the function."""
    assert not set(FLOORS) & set(getattr(sftflow, "__all__", ()))


def test_help_imports_neither_torch_nor_transformers() -> None:
    heavy = {"torch", "transformers", "datasets", "numpy", "fastapi", "jinja2"}
    top = set()
    for path in (ROOT / "cli").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top |= {n.names[0].name.split(".")[0] for n in tree.body if isinstance(n, ast.Import)}
        top |= {(n.module or "").split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert not top & heavy


def test_what_is_imported_is_declared() -> None:
    """Every third-party package that the source imports is in pyproject.toml: required, or in an extra."""
    import tomllib
    from importlib.metadata import packages_distributions

    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {line.split(">")[0].split("=")[0].lower() for line in [*project["dependencies"], *extras]}
    declared = {name.replace("_", "-") for name in declared}
    homes = packages_distributions()
    missing = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for top in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"sftflow", ""}:
                if not {d.lower().replace("_", "-") for d in homes.get(top, [top])} & declared:
                    missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert not missing, sorted(missing)
