"""Several processes evaluate as one does: the same rows to the letter, whoever asks which item, and after a kill."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.runs import Quiet, write_recipe
from helpers.several import forked, launch, results_in
from helpers.training import FP32
from sftflow import api
from sftflow.checkpoint import load_assistant
from sftflow.evaluation.evaluate import Asked, EvalDuringTraining, evaluate_together
from sftflow.evaluation.grading import whole_batches
from sftflow.evaluation.options import EvalTask, open_tasks
from sftflow.evaluation.side_by_side import ROUNDS, batches_of
from sftflow.foundation.errors import RecipeError, RunError
from sftflow.foundation.ranks import ranks, shared_out
from sftflow.generation.engine import Engine
from sftflow.generation.request import GenerationRequest
from sftflow.recipe import load_recipe
from sftflow.training.run import run_training
from sftflow.training.settings import resolve_recipe


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[EvalTask]:
    """Free text, of which one item comes twice and one is too long; letters; code."""
    folder = tmp_path_factory.mktemp("items")
    asked = [{"question": f"How much is {n} and {n}?" + " Tell me." * (n % 5), "answer": 2 * n} for n in range(70)]
    text = lines(folder / "text.jsonl", [*asked, asked[0], {"question": "word " * 400, "answer": 1}])
    letters = [{"question": f"Which is {n}?", "answer": str(n), "choices": [str(n), str(n + 1)]} for n in range(70)]
    head = {"canonical_solution": "    return 1\n", "entry_point": "f"}
    code = [
        {**head, "prompt": f"def f():\n    # {n}\n", "test": "def check(f):\n    assert f() == 1\n"} for n in range(5)
    ]
    specs = [f"jsonl={text}", f"jsonl={lines(folder / 'letters.jsonl', letters)}"]
    opened = open_tasks([*specs, f"humaneval={lines(folder / 'code.jsonl', code)}"], None, allow_code=True)
    for each in opened:
        each.task.max_new_tokens = 8
    return opened


def evaluated(base: Path, tasks: list[EvalTask], out: Path, kill: int = -1) -> None:
    """kill: this rank ends itself by SIGKILL behind its seventh row."""
    assistant = load_assistant(str(base))
    assistant.engine = Engine(assistant.model, assistant.renderer, assistant.engine.runtime, max_running=4)
    done = 0

    def told(k: int) -> None:
        nonlocal done
        done += k
        if ranks().rank == kill and done >= 7:
            os.kill(os.getpid(), signal.SIGKILL)

    evaluate_together([Asked(assistant=assistant, task=t, arm="chat", model="m", progress=told) for t in tasks], out)


@pytest.fixture(scope="module")
def alone(tasks: list[EvalTask], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("alone")
    assert forked(1, lambda: evaluated(tiny_base, tasks, out)) == [0]
    return results_in(out)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_are_those_of_one_process(
    world: int, tasks: list[EvalTask], tiny_base: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    assert forked(world, lambda: evaluated(tiny_base, tasks, tmp_path)) == [0] * world
    assert results_in(tmp_path) == alone
    assert len(alone) == 2 * len(tasks) and '"too_long"' in str(alone)


@pytest.mark.slow
def test_more_ranks_than_items(tasks: list[EvalTask], tiny_base: Path, tmp_path: Path) -> None:
    few = [EvalTask(name=t.name, task=t.task, items=t.items[:1]) for t in tasks[:2]]
    assert forked(1, lambda: evaluated(tiny_base, few, tmp_path / "one")) == [0]
    assert forked(4, lambda: evaluated(tiny_base, few, tmp_path / "four")) == [0] * 4
    assert results_in(tmp_path / "one") == results_in(tmp_path / "four")


@pytest.mark.slow
@pytest.mark.parametrize("kill", [0, 1])
@pytest.mark.parametrize("world", [1, 3])
def test_a_killed_rank_loses_no_finished_row(
    world: int, kill: int, tasks: list[EvalTask], tiny_base: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    codes = forked(2, lambda: evaluated(tiny_base, tasks, tmp_path, kill))
    assert codes[kill] == -signal.SIGKILL and codes[1 - kill] == 1
    finished = [
        json.loads(line)
        for file in (tmp_path / "eval").rglob("*.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert len(finished) >= 14 and (tmp_path / "eval" / "ranks" / "1").is_dir()
    assert forked(world, lambda: evaluated(tiny_base, tasks, tmp_path)) == [0] * world
    again = results_in(tmp_path)
    assert again == alone
    rows = [json.loads(line) for file in (tmp_path / "eval").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert all(row in rows for row in finished)  # seconds and all: they were not asked again


@pytest.mark.slow
def test_ranks_that_do_not_ask_the_same_are_refused(tasks: list[EvalTask], tiny_base: Path, tmp_path: Path) -> None:
    def unlike() -> None:
        mine = tasks[0]
        if ranks().rank == 1:
            mine = EvalTask(name=mine.name, task=mine.task, items=mine.items[:3])
        with pytest.raises(RunError, match=r"rank 1: it does not ask what rank 0 asks \(data differ\)"):
            evaluated(tiny_base, [mine], tmp_path)

    assert forked(2, unlike) == [0, 0]
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.slow
def test_a_sample_in_training_is_that_of_one_process(tiny_base: Path, tmp_path: Path) -> None:
    def samples(world: int) -> list[dict[str, Any]]:
        folder = tmp_path / str(world)
        folder.mkdir()
        sets = ["eval.every=2", "eval.tasks=[arithmetic]", "train.shard=no"]
        recipe = load_recipe(write_recipe(folder, tiny_base, steps=2, optimizer="adamw", lr=1e-4), sets)
        sampled = EvalDuringTraining(open_tasks(["arithmetic", "spelling"], 9))
        assert forked(world, lambda: run_training(recipe, Quiet(), callback=sampled)) == [0] * world
        rows = [json.loads(line) for line in (folder / "run" / "evals.jsonl").read_text().splitlines()]
        return [{**row, "seconds": 0} for row in rows]

    one = samples(1)
    assert [row["step"] for row in one] == [0, 2]
    assert samples(2) == one


def test_a_sharded_model_is_not_asked_while_it_trains(tiny_base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny_base, shard="full"), ["eval.every=2", "eval.tasks=[arithmetic]"])

    def refused() -> None:
        with pytest.raises(RecipeError, match=r"eval.every: no rank has the whole of a sharded model"):
            resolve_recipe(recipe, FP32, 100_000)

    assert forked(2, refused) == [0, 0]
    assert resolve_recipe(recipe, FP32, 100_000)[0].eval == recipe.eval  # one process has all of it


@pytest.mark.slow
def test_the_command_line_in_several_processes(tiny_base: Path, tmp_path: Path) -> None:
    """`--nproc`, and torchrun: one table, one line of what is wrong."""
    command = ["-m", "sftflow", "eval", str(tiny_base), "--tasks", "spelling,arithmetic", "--limit", "3"]
    one = launch(2, *command, "--out", str(tmp_path / "torchrun"))
    assert one.returncode == 0, one.stderr[-3000:]
    assert one.stdout.count("centred mean") == 1 and one.stderr.count("rows and eval.json are in") == 1
    api.evaluate(str(tiny_base), ["spelling", "arithmetic"], limit=3, out=tmp_path / "here")
    files = results_in(tmp_path / "here")
    assert files.keys() == results_in(tmp_path / "torchrun").keys()
    wrong = launch(2, "-m", "sftflow", "eval", str(tiny_base), "--tasks", "nothing", "--out", str(tmp_path / "wrong"))
    assert wrong.returncode != 0 and wrong.stderr.count("error: ") == 1


def test_what_all_agree_on_is_raised_on_all() -> None:
    def work() -> None:
        def compute(number: int) -> int:
            if number == 1:
                raise RunError("here", "it fails")
            return number

        with pytest.raises(RunError, match="here: it fails"):
            shared_out([1, 1, 1], compute, agree=(RunError,))
        assert shared_out([1, 2, 3], lambda n: 10 * n) == [0, 10, 20]

    assert forked(2, work) == [0, 0]


@given(st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=60), st.integers(1, 5))
def test_batches_hold_each_prompt_once_and_are_even(prompts: list[list[int]], running: int) -> None:
    batches = whole_batches(prompts, Sized(running))  # type: ignore[arg-type]
    assert sorted(number for batch in batches for number in batch) == list(range(len(prompts)))
    sizes = [len(batch) for batch in batches]
    assert not sizes or (max(sizes) <= 2 * running and max(sizes) - min(sizes) <= 1)


class Sized:
    """An engine as the batches see it."""

    def __init__(self, max_running: int, length_limit: int = 1 << 20) -> None:
        shape = SimpleNamespace(hidden_size=512, num_hidden_layers=8)
        self.model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: shape))
        self.max_running, self.length_limit = max_running, length_limit


@given(st.lists(st.lists(st.integers(1, 99), max_size=40), max_size=5), st.integers(1, 4), st.data())
def test_what_is_asked_of_one_model_is_in_batches_that_hang_on_nothing_else(
    asked: list[list[int]], running: int, data: st.DataObject
) -> None:
    """asked: of each asker the lengths of its prompts. Two models of different size; the even askers ask the first."""
    engines = [SimpleNamespace(engine=Sized(running)), SimpleNamespace(engine=Sized(running + 1, length_limit=60))]
    requests = [
        {n: GenerationRequest(prompt_ids=(1,) * length, max_new_tokens=length % 7 + 1) for n, length in enumerate(one)}
        for one in asked
    ]
    known = [data.draw(st.sets(st.sampled_from(sorted(one)))) if one else set() for one in requests]
    all_ = [SimpleNamespace(assistant=engines[k % 2], requests=one, known=()) for k, one in enumerate(requests)]
    some = [SimpleNamespace(**{**vars(one), "known": k}) for one, k in zip(all_, known, strict=True)]
    batches = batches_of(all_)  # type: ignore[arg-type]
    assert sorted(key for batch in batches for key in batch) == [
        (k, n) for k, one in enumerate(asked) for n in range(len(one))
    ]
    left = [[(k, n) for k, n in batch if n not in known[k]] for batch in batches]
    assert batches_of(some) == [batch for batch in left if batch]  # type: ignore[arg-type]
    for batch in batches:
        assert len({k % 2 for k, _ in batch}) == 1
        assert len(batch) <= ROUNDS * engines[batch[0][0] % 2].engine.max_running
        dear = [requests[k][n] for k, n in batch]
        assert len({len(r.prompt_ids) + r.max_new_tokens <= 60 for r in dear}) == 1 or batch[0][0] % 2 == 0
        limits = [r.max_new_tokens for r in dear]
        assert limits == sorted(limits, reverse=True)
