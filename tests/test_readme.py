"""What README and docs tell people to type: each command exists. Those of README and docs/teaching.md are run, in the
order in which they stand there, in a folder with what a fresh clone has."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.runs import run
from helpers.serving import served

ROOT = Path(__file__).resolve().parents[1]
RUN = [path for path in (ROOT / "README.md", ROOT / "docs" / "teaching.md") if path.is_file()]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
QUICK = ("render", "mix", "doctor")
"""commands that take a second or two; the others load a model and let it talk, or train one"""


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page's shell blocks, as words: comments out, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.+?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def sftflow(page: Path) -> list[list[str]]:
    """The arguments of those that are ours."""
    return [words[1:] for words in commands(page) if words[0].rpartition("/")[2] == "sftflow"]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands read of a checkout, which is the current one. Standard input is at its end."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", (tmp_path / "nothing").open("w+"))
    return tmp_path


def typed(words: list[str]) -> Any:
    """Run one of ours as it stands there. A server is asked how it is, and stopped."""
    if words[0] == "serve":
        with served(*words[1:]) as address:
            assert httpx.get(f"{address}/health").status_code == 200
            assert "<html" in httpx.get(address).text
        return
    done = run(*words)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.stem)
def test_every_command_exists(page: Path) -> None:
    """A command and options that --help knows; targets of the Makefile; extras of the package."""
    from typer.main import get_command

    from sftflow.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    for command, *rest in sftflow(page):
        if command.startswith("-"):
            continue
        assert command in known, command
        options = {o for p in known[command].params for o in (*p.opts, *p.secondary_opts)}
        assert {word for word in rest if word.startswith("--")} <= options, rest
    for program, *rest in commands(page):
        if program == "make":
            subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, capture_output=True, check=True)
        for named in re.findall(r"(?:^|\s)(?:\.|sftflow)\[([\w,]+)\]", " ".join(rest)):
            assert set(named.split(",")) <= set(EXTRAS), named


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_nothing_else_is_to_be_typed(page: Path) -> None:
    """What is no command of ours is make (above), pip in the clone's own environment, or opens the notebooks."""
    others = [words for words in commands(page) if words[0].rpartition("/")[2] not in ("sftflow", "make")]
    for words in others:
        assert words[:2] in ([".", ".venv/bin/activate"], ["pip", "install"], ["jupyter", "lab"]), words
        for name in words[2:]:
            assert name.startswith("-") or name.startswith(".[") or (ROOT / name).exists(), words


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_quick_commands(page: Path, clone: Path) -> None:
    for words in sftflow(page):
        if words[0] in QUICK:
            typed(words)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_all_commands_in_order(page: Path, clone: Path) -> None:
    """As they stand there. runs/demo is a run of recipes/tiny.yaml: CI makes the demo itself."""
    typed(["train", "recipes/tiny.yaml", "--set", "train.out=runs/demo"])
    for words in sftflow(page):
        typed(words)


def test_the_ids_that_readme_shows(clone: Path) -> None:
    """Those that the program prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {key: values.split() for key, values in re.findall(r"^    (tokens|ids|mask) +(\S.+)$", text, re.M)}
    (clone / "row.jsonl").write_text('{"prompt": "hi", "completion": "yo"}\n')
    (row,) = json.loads(run("render", "row.jsonl", "--model", "builtin:tiny", "--json").stdout)["rows"]
    assert {key: list(map(str, row[key])) for key in ("tokens", "ids", "mask")} == shown


def test_a_page_s_links_lead_somewhere() -> None:
    def links() -> Iterator[tuple[Path, str]]:
        for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
            for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
                yield page, target

    lost = [(page.name, to) for page, to in links() if "://" not in to and not (page.parent / to).exists()]
    assert not lost
