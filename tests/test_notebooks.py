"""The notebooks keep their form: nothing that a run leaves behind, and what a reader may rely on in each.

`make notebooks` runs them; this only reads them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STANDARD = {"importlib.util", "json", "math", "os", "pathlib", "tempfile"}
IMPORTED = {*STANDARD, "IPython.display", "httpx", "sftflow", "torch", "transformers"}
"""all that a cell may import: what a step does is the package's, and nothing is copied out of it"""
MACHINE = re.compile(r"/(home|Users|root|tmp|work|content)/|[A-Z]:\\|\.venv\b")


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Any:
    return nbformat.read(request.param, as_version=nbformat.NO_CONVERT)


def code(cell: Any) -> str:
    """Python of a cell: the one magic that we use is no Python."""
    return re.sub(r"(?m)^(\s*)%pip .*", r"\1pass", cell.source)


def sections(notebook: Any) -> list[list[Any]]:
    """The cells before the first heading of a section, then those of each section."""
    found: list[list[Any]] = [[]]
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            found.append([])
        found[-1].append(cell)
    return found


def is_answer(cell: Any) -> bool:
    return "answer" in cell.metadata.get("tags", [])


def test_the_walkthrough_is_three_notebooks() -> None:
    assert {"sft_flow", "chat_format_and_sft", "bring_your_own"} <= {path.stem for path in NOTEBOOKS}


def test_it_is_a_notebook_without_what_a_run_leaves_behind(notebook: Any) -> None:
    assert notebook.nbformat == 4 and notebook.nbformat_minor >= 5
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "colab"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
        assert set(cell.metadata) <= {"jupyter", "tags"} and cell.source.strip() and not MACHINE.search(cell.source)


def test_it_begins_with_its_title_what_pip_installs_and_the_settings(notebook: Any) -> None:
    first, *_ = opening = sections(notebook)[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    install, settings = (cell.source for cell in opening if cell.cell_type == "code")
    assert re.search(r'(?m)^PACKAGE = "', install) and 'find_spec("sftflow") is None' in install
    assert "%pip install" in install and "{PACKAGE}" in install
    assert 'SMALL = os.environ.get("SFTFLOW_NOTEBOOK") == "small"' in settings and "import sftflow as sf" in settings


def test_its_cells_are_python_that_imports_little(notebook: Any) -> None:
    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        assert not re.search(r"(?m)^\s*(!|%(?!pip install))", cell.source)
        for node in ast.walk(ast.parse(code(cell))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert set(names) <= IMPORTED, names


def test_every_section_says_what_to_look_at_and_ends_with_an_exercise_and_its_answer(notebook: Any) -> None:
    with_code = [s for s in sections(notebook)[1:] if any(c.cell_type == "code" for c in s)]
    assert with_code
    for section in with_code:
        heading, title = section[0].source, section[0].source.splitlines()[0]
        assert len(heading.splitlines()) > 1 or section[1].cell_type == "markdown", title
        answer, asked = section[-1], next(c for c in reversed(section) if c.cell_type == "markdown")
        assert "**Exercise.**" in asked.source and is_answer(answer), title
        assert answer.metadata.jupyter == {"source_hidden": True, "outputs_hidden": True}, title
        assert answer.source.startswith('# @title Answer { display-mode: "form" }\n'), title
        assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code(answer)))), title
        shown = [c for c in section if c.cell_type == "code" and not is_answer(c)]
        assert shown and all(len(c.source.splitlines()) <= 30 for c in shown), title
