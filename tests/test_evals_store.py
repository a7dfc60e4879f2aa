"""Rows on disk: what they rest on, whose they are, and that no finished one is thrown away."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.runs import run as command
from sftflow.evaluation.evaluate import evaluate
from sftflow.evaluation.journal import EvalRow, Journal, key_of, safe_name
from sftflow.evaluation.options import EvalTask, open_tasks
from sftflow.fingerprint import weights_hash
from sftflow.foundation.errors import RunError
from sftflow.generation.engine import Engine
from sftflow.tasks import TaskSource
from sftflow.tasks.humaneval import HumanEval
from sftflow.tasks.ifeval import IFEval


@pytest.fixture(scope="module")
def assistant(tiny_base: Path) -> Any:
    from sftflow.checkpoint import load_assistant

    return load_assistant(str(tiny_base))


def opened(limit: int) -> EvalTask:
    (run,) = open_tasks(["arithmetic"], limit)
    return run


def row_of(number: int, **kwargs: Any) -> EvalRow:
    given = {
        "id": f"t:{number}", "question": "?", "answer": "1", "reply": "1", "score": 1.0, "finish_reason": "stop",
        "n_prompt": 3, "n_generated": 1, "seconds": 0.1, "prompt_sha256": "p", "item_sha256": "i",
    }  # fmt: skip
    return EvalRow(**{**given, **kwargs})


def test_a_row_keeps_the_dialogue_in_front_of_its_question() -> None:
    told = ({"role": "user", "content": "I am Ada."}, {"role": "assistant", "content": "Hi!"})
    row = row_of(1, ids=(3,), earlier=told)
    written = json.loads(json.dumps(row.to_json()))
    assert EvalRow.from_json(written) == row
    del written["earlier"]  # of an earlier version
    assert EvalRow.from_json(written) == replace(row, earlier=())


def names(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]


def label_positions_of(assistant: Any, patch: pytest.MonkeyPatch) -> list[int]:
    """How many replies each call of the engine is asked for, from now on."""
    asked: list[int] = []
    generate = assistant.engine.generate
    patch.setattr(
        assistant.engine,
        "generate",
        lambda requests, done, **more: asked.append(len(requests)) or generate(requests, done, **more),
    )
    return asked


# ---- weights


def test_the_weights_hash_is_of_their_bytes(assistant: Any) -> None:
    model = assistant.model
    wanted, threads = weights_hash(model), torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert weights_hash(model) == wanted
    finally:
        torch.set_num_threads(threads)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]  # the sums stay as they are
    assert weights_hash(model) != wanted
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]
    assert weights_hash(model) == wanted


class Weights(torch.nn.Module):
    def __init__(self, names: list[str], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name in names:
            value = torch.arange(6, dtype=dtype).reshape(2, 3) + len(name)
            self.register_parameter(name, torch.nn.Parameter(value))


def test_weights_hash_of_dtypes_names_and_tied_weights() -> None:
    one = Weights(["a", "bb"])
    assert weights_hash(one) == weights_hash(Weights(["bb", "a"]))  # the order of loading
    assert weights_hash(one) != weights_hash(Weights(["a", "cc"]))
    assert weights_hash(one) != weights_hash(Weights(["a", "bb"], torch.bfloat16))
    tied, apart = Weights(["a", "bb"]), Weights(["a", "bb"])
    tied.bb = tied.a
    apart.bb = torch.nn.Parameter(apart.a.detach().clone())
    assert weights_hash(tied) == weights_hash(apart)
    turned = Weights(["a", "bb"])
    turned.a = torch.nn.Parameter(turned.a.detach().t().contiguous().t())  # other strides, the same weight
    assert weights_hash(turned) == weights_hash(one)
    empty = Weights([])
    empty.register_buffer("scalar", torch.tensor(2.0))
    empty.register_buffer("none", torch.zeros(0, 4))
    assert weights_hash(empty) == weights_hash(empty)


# ---- what rows rest on


def test_evidence_names_what_graders_rest_on(assistant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import version

    result = evaluate(assistant, opened(2), "chat", tmp_path)
    assert result.provenance["versions"] == {p: version(p) for p in ("sftflow", "torch", "transformers")}
    assert result.provenance["grading"] == {}
    assert IFEval(TaskSource()).provenance() == {"langdetect": version("langdetect")}
    monkeypatch.setattr("sftflow.tasks.ifeval.language_package", lambda: None)
    assert IFEval(TaskSource()).provenance() == {"langdetect": "absent"}
    from sftflow.sandbox import isolation_available

    assert HumanEval(TaskSource()).provenance()["sandbox"] == isolation_available()[0]
    monkeypatch.setattr("sftflow.tasks.humaneval.isolation_available", lambda: ("process",))
    assert HumanEval(TaskSource()).provenance()["sandbox"] == "process"


def test_rows_graded_elsewhere_are_asked_again(assistant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(3)
    evaluate(assistant, run, "chat", tmp_path)
    asked = label_positions_of(assistant, monkeypatch)
    evaluate(assistant, run, "chat", tmp_path)
    monkeypatch.setattr(run.task, "provenance", lambda: {"sandbox": "process"}, raising=False)
    evaluate(assistant, run, "chat", tmp_path)
    monkeypatch.undo()
    asked_again = label_positions_of(assistant, monkeypatch)
    evaluate(assistant, opened(3), "chat", tmp_path)  # the first ones were set aside, not thrown away
    assert (asked, asked_again) == ([3], [])


@pytest.mark.parametrize("key", ["checkpoint", "code", "versions", "grading", "max_new_tokens", "precision"])
def test_rows_that_rest_on_something_else_are_set_aside(key: str, tmp_path: Path) -> None:
    provenance = {
        "checkpoint": "x",
        "code": "y",
        "versions": {},
        "grading": {},
        "max_new_tokens": 9,
        "precision": "fp32",
    }
    path = tmp_path / "m-t.jsonl"
    journal = Journal(path, provenance)
    journal.add(row_of(1))
    journal.close()
    assert len(Journal(path, provenance).rows) == 1
    other = Journal(path, {**provenance, key: "another"})
    assert other.rows == {} and names(path) == [] and names(tmp_path / "kept" / "m-t.jsonl") == ["t:1"]
    other.add(row_of(1, score=0.0))
    other.close([other.rows[row_of(1).key]])
    again = Journal(path, provenance)
    assert [row.score for row in again.rows.values()] == [1.0]
    again.close([again.rows[row_of(1).key]])
    assert Journal(path, {**provenance, key: "another"}).rows[row_of(1).key].score == 0.0


def test_an_item_whose_answer_changed_is_asked_again() -> None:
    item = opened(1).items[0]
    changed = [replace(item, answer="no number"), replace(item, choices=("A", "B")), replace(item, id="else")]
    assert len({key_of(i, (1, 2)) for i in [item, *changed]}) == 4 and key_of(item, (1, 2)) != key_of(item, (1, 3))


# ---- limits and models


def test_a_smaller_limit_loses_no_rows(assistant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps({"question": f"{n} and 1?", "answer": n + 1}) + "\n" for n in range(12)))

    def limited(limit: int) -> Any:
        (run,) = open_tasks([f"jsonl={source}"], limit)
        return evaluate(assistant, replace(run, task=_short(run.task)), "chat", tmp_path, model="m")

    asked = label_positions_of(assistant, monkeypatch)
    path = tmp_path / "eval" / "m-jsonl.jsonl"
    eight = limited(8)
    three = limited(3)
    assert names(path) == [r.id for r in three.rows] and three.n == 3
    again, ten = limited(8), limited(10)
    assert names(path) == [r.id for r in ten.rows] and not (tmp_path / "eval" / "kept" / "m-jsonl.jsonl").exists()
    assert asked == [8, 2]
    assert again.rows == eight.rows
    assert {r.key for r in three.rows} < {r.key for r in eight.rows} < {r.key for r in ten.rows}


def _short(task: Any) -> Any:
    task.max_new_tokens = 4
    return task


def test_another_model_under_the_same_name_loses_no_rows(
    assistant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftflow.checkpoint import Assistant

    model = copy.deepcopy(assistant.model)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    engine = Engine(model, assistant.renderer, assistant.engine.runtime)
    other = Assistant("other", model, assistant.tokenizer, assistant.renderer, engine, {})
    run = opened(3)
    first = evaluate(assistant, run, "chat", tmp_path, model="base")
    second = evaluate(other, run, "chat", tmp_path, model="base")
    assert [r.ids for r in first.rows] != [r.ids for r in second.rows]
    asked = [label_positions_of(assistant, monkeypatch), label_positions_of(other, monkeypatch)]
    assert evaluate(assistant, run, "chat", tmp_path, model="base").rows == first.rows
    assert evaluate(other, run, "chat", tmp_path, model="base").rows == second.rows
    assert asked == [[], []]


def test_models_never_share_a_file() -> None:
    models = ["a/b", "a-b", "a b", "a//b", "-a-b", "a-b.", "a:b", "/", "model", "x" * 300, "x" * 301]
    assert len({safe_name(m) for m in models}) == len(models)
    assert safe_name("a-b") == "a-b" and safe_name("SmolLM2_135M.v1") == "SmolLM2_135M.v1"
    assert all(len(safe_name(m)) < 120 and not {*"/: "} & {*safe_name(m)} for m in models)


# ---- killed, and full disks


def test_what_a_kill_cut_off_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "m-t.jsonl"
    journal = Journal(path, {"a": 1})
    journal.add(row_of(1))
    journal.add(row_of(2))
    with path.open("rb+") as f:
        f.truncate(path.stat().st_size - 20)
    again = Journal(path, {"a": 1})
    assert names(path) == ["t:1"] and len(again.rows) == 1
    again.add(row_of(2))
    assert names(path) == ["t:1", "t:2"]
    with path.open("rb+") as f:
        f.truncate(path.stat().st_size - 1)  # only the end of the line is missing
    assert len(Journal(path, {"a": 1}).rows) == 2 and names(path) == ["t:1", "t:2"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; a skip where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here (needs root)")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill_up(place: Path, leave: int = 0) -> None:
    """A file that takes all of the space but `leave` bytes."""
    free = os.statvfs(place)
    with (place / "ballast").open("ab") as f:
        f.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))


@pytest.mark.parametrize("task", ["arithmetic", "humaneval"])
def test_a_full_disk_ends_with_one_line_and_keeps_the_rows(
    task: str, assistant: Any, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fills up behind the third row, with less than a row's room left: what was begun is taken back."""
    spec = task
    if task == "humaneval":
        row = {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f"}
        rows = [{**row, "test": f"def check(f):\n    assert f() == {n}\n"} for n in range(40)]
        (tmp_path / "code.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        spec = f"humaneval={tmp_path / 'code.jsonl'}"
    (run,) = open_tasks([spec], 40, allow_code=True)
    run.task.max_new_tokens = 4
    whole = evaluate(assistant, run, "chat", tmp_path / "whole", model="m")
    out = small_disk / "out"
    done = 0

    def fills(k: int) -> None:
        nonlocal done
        done += k
        if done == 3:
            fill_up(small_disk)

    monkeypatch.setattr(
        assistant, "engine", Engine(assistant.model, assistant.renderer, assistant.engine.runtime, max_running=2)
    )
    with pytest.raises(RunError) as error:
        evaluate(assistant, run, "chat", out, model="m", progress=fills)
    line = f"{out}: cannot write (No space left on device); free space; a rerun goes on from the finished rows"
    assert str(error.value) == line and error.value.exit_code == 3
    path = out / "eval" / f"m-{task}.jsonl"
    text = path.read_text()
    n_kept = len(names(path))
    assert 3 <= n_kept < 40 and text.endswith("\n")
    with pytest.raises(RunError, match="No space left"):  # still full
        evaluate(assistant, run, "chat", out, model="m")
    assert path.read_text() == text
    (small_disk / "ballast").unlink()
    asked = label_positions_of(assistant, monkeypatch)
    again = evaluate(assistant, run, "chat", out, model="m")
    assert sum(asked) == 40 - n_kept
    assert [(r.id, r.ids, r.score) for r in again.rows] == [(r.id, r.ids, r.score) for r in whole.rows]


def test_the_command_on_a_full_disk(small_disk: Path, tiny_base: Path) -> None:
    out = small_disk / "out"
    arguments = ("eval", str(tiny_base), "--tasks", "spelling", "--limit", "40", "--out", str(out))
    out.mkdir()
    fill_up(small_disk, leave=24 << 10)
    failed = command(*arguments)
    assert failed.returncode == 3 and "Traceback" not in failed.stderr, failed.stderr
    assert failed.stderr.splitlines()[-1] == (
        f"error: {out}: cannot write (No space left on device); free space; a rerun goes on from the finished rows"
    )
    (path,) = (out / "eval").glob("*-spelling.jsonl")
    kept = names(path)
    assert 0 < len(kept) < 40
    seconds = [json.loads(line)["seconds"] for line in path.read_text().splitlines()]
    (small_disk / "ballast").unlink()
    assert command(*arguments).returncode == 0
    rows = {r["id"]: r["seconds"] for r in map(json.loads, path.read_text().splitlines())}
    assert len(rows) == 40 and [rows[name] for name in kept] == seconds
    assert json.loads((out / "eval.json").read_text())["models"][str(tiny_base)]["tasks"]["spelling"]["n"] == 40
