"""What a run says when it begins and when it ends, and the log that keeps all of it."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import Result, error_line, run, write_recipe
from sftflow import SftflowError, train
from sftflow.recipe import Eval
from sftflow.report.log_file import Heard
from sftflow.report.progress import ProgressDisplay
from sftflow.report.run_blocks import end_block
from sftflow.training.run import FineTuning

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")
NUMBERS = {"lr_scale": {"embeddings": 0, "rest": 0.5}, "steps": 6, "save_every": 2}


def said(text: str, first: str, last: str) -> dict[str, str]:
    """The block from one word to another: {word: what it is}, folded lines joined."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{first:<12}"))
    found: dict[str, str] = {}
    for line in lines[start:]:
        word = line[:12].strip()
        if word and last in found:
            break
        word = word or next(reversed(found))
        assert word == "next" or len(line) <= 80 or " " not in line[12:], line
        found[word] = f"{found.get(word, '')} {line[12:]}".strip()
    return found


def logged(folder: Path) -> list[str]:
    lines = (folder / "log.txt").read_text().splitlines()
    assert all(STAMP.match(line) for line in lines), lines
    return [line[21:] for line in lines]


@pytest.fixture(scope="module")
def begun(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run in a folder whose name has a blank, ended by a fault in its fifth step."""
    folder = tmp_path_factory.mktemp("a run")
    recipe = write_recipe(folder, tiny_base, out="my run", **NUMBERS)
    real = FineTuning.after_step

    def faulty(self: FineTuning, log: Any) -> None:
        if log.step == 5:
            raise ZeroDivisionError("our own mistake")
        real(self, log)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(FineTuning, "after_step", faulty)
        run("train", str(recipe), cwd=folder)
    return recipe, run("train", str(recipe), "--resume", cwd=folder)


def test_a_run_begins_with_one_block(begun: tuple[Path, Result], tiny_base: Path) -> None:
    recipe, _ = begun
    first = said("\n".join(logged(recipe.parent / "my run")), "run", "time")
    assert (first["run"], first["base"]) == ("my run", str(tiny_base))
    assert re.fullmatch(r"77, in \d+ packed rows of 64 tokens; 4 held out", first["rows"])
    assert re.fullmatch(r"[\d,]+, of which [\d,]+ are supervised", first["tokens"])
    assert re.fullmatch(r"6 of 512 tokens, 256 at once; [\d.]+ epochs", first["steps"])
    assert first["rate"].startswith("matrices 0.012 (Muon), embeddings frozen, norms and biases 0.0015 (AdamW); linear")
    counted = re.fullmatch(r"(\d+) \(.+%\) of (\d+) parameters", first["trained"].replace(",", ""))
    assert counted is not None
    trained, of = map(int, counted.groups())
    assert 0 < trained < of
    assert first["precision"] == "fp32 on cpu (asked for)" and first["compiled"].startswith("no (auto: ")
    assert first["time"].startswith("known after the first steps")


def test_a_resumed_run_says_what_is_left(begun: tuple[Path, Result]) -> None:
    again = said(begun[1].stderr, "run", "time")
    assert re.fullmatch(r"resumed at step 4 of 6; about \d+ s for 2 more steps, as the last ones took", again["time"])
    assert "time        about" not in begun[1].stderr and "\x1b" not in begun[1].stderr


def test_a_run_ends_with_one_block_whose_commands_run(begun: tuple[Path, Result], tiny_base: Path) -> None:
    recipe, done = begun
    folder = recipe.parent
    for result in (done, run("train", str(recipe), "--resume", cwd=folder)):  # a finished one says it again
        assert result.returncode == 0, result.stderr
        last = said(result.stderr, "kept", "next")
        assert re.fullmatch(r"step [246] of 6, of the lowest held-out loss \(\d\.\d{3}\)", last["kept"])
        assert re.fullmatch(r"loss \d\.\d{3} before the first step, \d\.\d{3} at the kept one", last["held out"])
        assert re.fullmatch(r"\d\.\d{3} in training, the mean of the last 6 steps", last["loss"])
        assert re.fullmatch(r"trained for \d+ s; this command took \d+ s", last["time"])
        assert (last["checkpoint"], last["log"]) == ("my run/checkpoint", "my run/log.txt")
        commands = [line[12:] for line in result.stderr.splitlines()[-3:]]
        assert [shlex.split(c) for c in commands] == [
            ["sftflow", "chat", "my run"],
            ["sftflow", "compare", str(tiny_base), "my run", "--out", "my run"],
            ["sftflow", "serve", "my run", "--base", str(tiny_base)],
        ]
    chat = run(*shlex.split(commands[0])[1:], "--prompt", "hi", "--max-tokens", "2", cwd=folder)
    assert chat.returncode == 0, chat.stderr


@pytest.mark.parametrize(
    "asked, options",
    [
        (None, []),
        (
            Eval(tasks=("gsm8k=my file.jsonl", "spelling")),
            ["--tasks", "gsm8k=my file.jsonl,spelling", "--limit", "200"],
        ),
        (Eval(tasks=("spelling",), limit=None), ["--tasks", "spelling"]),
        (
            Eval(tasks=("humaneval",), limit=3, allow_code=True),
            ["--tasks", "humaneval", "--limit", "3", "--allow-code"],
        ),
    ],
)
def test_the_next_command_compares_on_what_the_recipe_asks(
    asked: Eval | None, options: list[str], tmp_path: Path
) -> None:
    last = end_block(tmp_path, "a base", asked, {}, 3.0).plain.splitlines()[-2]
    whole = ["compare", "a base", str(tmp_path), *options, "--out", str(tmp_path)]
    assert shlex.split(last)[-len(whole) :] == whole
    (tmp_path / "compare.json").touch()
    assert "compare" not in end_block(tmp_path, "base", asked, {}, 3.0).plain.split()


def test_the_log_keeps_what_was_said(begun: tuple[Path, Result]) -> None:
    recipe, done = begun
    lines = logged(recipe.parent / "my run")
    assert sum(line.startswith("---- python 3") for line in lines) == 2, "one a command"
    for line in ("loading ", "rendering the mixture", "validation, step 0: ", "train: 1/6", "validation, step 4: "):
        assert sum(x.startswith(line) for x in lines) == (2 if line in ("loading ", "rendering the mixture") else 1)
    assert "Traceback (most recent call last):" in lines and "ZeroDivisionError: our own mistake" in lines
    at = lines.index("ZeroDivisionError: our own mistake")
    told = [line.rstrip() for line in done.stderr.splitlines() if line and not line.startswith("train: ")]
    assert [line for line in lines[at + 2 :] if line and not line.startswith("train: ")] == told


def test_the_log_of_another_run_is_left_or_replaced(tiny_base: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base, steps=1), tmp_path / "run"
    out.mkdir()
    (out / "log.txt").write_text("somebody's own\n")
    assert run("train", str(recipe), "--set", "validation=0").returncode == 0
    first = (out / "log.txt").read_bytes()
    assert first.startswith(b"somebody's own\n")
    assert "a finished run is in it" in error_line(run("train", str(recipe)))
    assert "no such file" in error_line(
        run("train", str(recipe), "--overwrite", "--set", "mixture.0.source=gone.jsonl")
    )
    assert (out / "log.txt").read_bytes() == first
    diverging = ["--set", "train.lr=1e30", "--set", "train.steps=5", "--overwrite"]
    line = error_line(run("train", str(recipe), *diverging), 3)
    lines = logged(out)
    assert line in lines and lines[0].startswith("---- ") and sum("----" in x for x in lines) == 1


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "recipe.yaml", "report.html", "DONE"])
def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_done(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / name
    folder.mkdir(parents=True)
    with pytest.raises(SftflowError) as refused:
        train(recipe={"mixture": [{"source": "spelling"}]}, out=folder.parent)
    assert str(refused.value).startswith(f"{folder}: a folder is where the run writes a file; move it, or ")
    assert {path.name for path in folder.parent.iterdir()} <= {name, ".lock"}


def test_warnings_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("sftflow"), "propagate", False)  # pytest-xdist cannot send half a pair home
    with ProgressDisplay() as shown, Heard(shown.warned):
        shown.say("early")
        assert not (tmp_path / "log.txt").exists()
        shown.log.open(tmp_path, anew=True)
        logging.getLogger("sftflow.checkpoint").warning("note: %s", "half \ud83d a pair")
    logging.getLogger("sftflow.checkpoint").warning("later")
    assert logged(tmp_path)[1:] == ["early", "note: half \\ud83d a pair"]
