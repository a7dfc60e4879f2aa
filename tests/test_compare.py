"""A trained run beside its base: compare.json holds the whole evidence, and the command line says what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import Quiet, digest, write_recipe
from helpers.runs import run as command
from helpers.several import forked, results_in
from sftflow import api
from sftflow.checkpoint import base_format, load_assistant
from sftflow.comparison.compare import compare_models
from sftflow.comparison.losses import held_out_comparison
from sftflow.comparison.paired import change_of
from sftflow.comparison.prompt_replies import PROMPT_TOKENS
from sftflow.comparison.prompts import load_prompts
from sftflow.comparison.results import to_json
from sftflow.evaluation.evaluate import EvalDuringTraining
from sftflow.evaluation.options import open_tasks
from sftflow.recipe import load_recipe
from sftflow.report.comparison_page import comparison_page
from sftflow.training.run import run_training

PROMPTS = ["What is 1+1?", {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]}]


def trained(folder: Path, base: Path, sampling: Any = None, **more: Any) -> Path:
    path = write_recipe(folder, base, steps=3, save_every=3, tokens_per_step=256, optimizer="adamw", **more)
    recipe = load_recipe(path, ["eval.every=2", "eval.tasks=[arithmetic]"] if sampling else [])
    run_training(recipe, Quiet(), callback=sampling)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return trained(tmp_path_factory.mktemp("trained"), tiny_base)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the comparison of `document` says while it goes on."""
    return []


@pytest.fixture(scope="module")
def document(run: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, said: list[str]) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("compared")
    own = out / "own.jsonl"
    # the first question is one that the run was trained on or held out; the second one is nobody's
    rows = [
        {"question": "What is 3+4?", "answer": 7},
        {"question": "What is a sparrow to you?", "answer": "bird"},
    ]
    own.write_text("".join(json.dumps(r) + "\n" for r in rows))
    prompts = out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    sft = load_assistant(str(run))
    base = load_assistant(str(tiny_base), fallback=base_format(sft))
    runs = open_tasks([f"jsonl={own}", "arithmetic"], 6)
    found = compare_models(base, sft, runs, load_prompts(str(prompts)), out, run_directory=run, say=said.append)
    assert "<h1" in comparison_page(found)
    written = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(found.to_json()))
    return written


def test_every_task_has_its_statistics(document: dict[str, Any]) -> None:
    assert set(document["tasks"]) == {"jsonl", "arithmetic"}
    for task in document["tasks"].values():
        low, high = task["ci95"]
        assert low <= task["delta"] <= high
        assert task["p_value"] <= task["p_holm"] <= 1
        assert 0 < task["detectable"] <= 1
        assert task["verdict"] == f"cannot tell at n={task['n']}"
        assert task["base"] == max(task["base_chat"], task["base_plain"])
        assert set(task["wilson"]) == set(task["near_ties"]) == set(task["too_long"]) == {"base", "sft"}


def test_what_it_costs_is_said_before_and_after(document: dict[str, Any], said: list[str]) -> None:
    cost = document["cost"]
    assert cost["replies"] == 3 * (2 + 2 + 6)  # two prompts, two jsonl items, six sums, in three arms
    most = 3 * (2 * PROMPT_TOKENS + 2 * 256 + 6 * 64)
    told = f"comparison: 3 arms, 30 replies to come; {cost['read']:,} tokens to read, at most {most:,} to generate; "
    assert said[0].startswith(told) and "min" in said[0]
    assert cost["read"] > 0 and 0 < cost["generated"] <= most
    assert cost["asking_seconds"] <= document["seconds"]
    assert cost["of_training"] == pytest.approx(document["seconds"] / cost["train_seconds"], rel=0.05)


def test_the_overlap_with_the_training_rows_is_found(document: dict[str, Any]) -> None:
    overlap = document["tasks"]["jsonl"]["contamination"]
    assert overlap["ngram"] == 13 and overlap["items"] == 2
    # "what is 3 4" is four words and "7" one: the row that holds both parts whole is found
    assert overlap["contaminated"] + overlap["unchecked"] >= 1


def test_losses_are_those_of_the_run(document: dict[str, Any], run: Path) -> None:
    told = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])["loss"]
    losses = document["held_out_loss"]
    assert losses["sft"]["all"] == pytest.approx(told, abs=2e-3)  # the checkpoint is saved in the base's dtype
    assert losses["rows"] == 4 and losses["base"]["all"] > losses["sft"]["all"]
    assert losses["sft"]["end_of_turn"] is not None and losses["sft"]["roles"]["user"] > 0
    assert document["forgetting"]["bytes"] > 3000 and document["forgetting"]["sft"] > 0


def test_manners_and_prompts(document: dict[str, Any]) -> None:
    for side in ("base", "sft"):
        found = document["hygiene"][side]
        assert found["n"] == 2 + 2 + 6  # two prompts, two jsonl items, six sums
        assert 0 <= found["stop_rate"] <= 1 and len(found["replies"]["stop_rate"]) == round(
            10 * (1 - found["stop_rate"])
        )
    for prompt in document["prompts"]:
        assert {"base", "base_plain", "sft"} <= set(prompt)
        assert (prompt["sft_finish"] == "length") == any("stop" in x for x in prompt["hygiene"]["sft"])
    assert document["prompts"][1]["messages"][0]["role"] == "system"


def test_what_cannot_be_checked_says_why(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    sft = load_assistant(str(run))
    base = load_assistant(str(tiny_base), fallback=base_format(sft))
    prompts = load_prompts(str(_file(tmp_path / "p.jsonl", PROMPTS[:1])))
    (task,) = open_tasks(["arithmetic"], 2)
    done = compare_models(base, sft, [task], prompts, tmp_path / "no run").to_json()
    assert done["held_out_loss"] is None
    assert done["tasks"]["arithmetic"]["contamination"] == {
        "not_checked": "the SFT checkpoint does not lie in a run directory"
    }
    older = tmp_path / "older"
    shutil.copytree(run, older)
    for name in ("held_out.jsonl", "training_rows.npz"):
        (older / name).unlink()
    done = compare_models(base, sft, [task], prompts, tmp_path / "changed", run_directory=older).to_json()
    for name, found in (
        ("held_out.jsonl", done["held_out_loss"]),
        ("training_rows.npz", done["tasks"]["arithmetic"]["contamination"]),
    ):
        assert found == {"not_checked": f"{older / name}: missing: deleted, or of a run of an older version"}


def test_a_comparison_needs_no_data_but_the_run_s(
    run: Path, tiny_base: Path, tmp_path: Path, document: dict[str, Any]
) -> None:
    """The recipe's files may be gone."""
    sft = load_assistant(str(run))
    base = load_assistant(str(tiny_base), fallback=base_format(sft))
    rows = run.parent / "rows.jsonl"
    rows.rename(tmp_path / "gone.jsonl")
    try:
        found = held_out_comparison(base, sft, run)
    finally:
        (tmp_path / "gone.jsonl").rename(rows)
    assert to_json(found) == document["held_out_loss"]


def _file(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_evaluating_during_training_changes_nothing_of_it(tmp_path: Path, tiny_base: Path, run: Path) -> None:
    sampled = EvalDuringTraining(open_tasks(["arithmetic", "spelling"], 2))
    other = trained(tmp_path, tiny_base, sampled)
    assert digest(other / "checkpoint" / "model.safetensors") == digest(run / "checkpoint" / "model.safetensors")
    rows = [json.loads(line) for line in (other / "evals.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 2]
    assert all(set(r["tasks"]) == {"arithmetic", "spelling"} and "stop_rate" in r["hygiene"] for r in rows)


def test_evaluating_during_training_on_working_copies(tmp_path: Path, tiny_base: Path) -> None:
    """bf16 with compiled layers: the live model is asked, not a copy, and goes on as it was."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = trained(tmp_path / "a", tiny_base, precision="bf16", dropout=0.1)
    sampling = EvalDuringTraining(open_tasks(["arithmetic"], 2))
    sampled = trained(tmp_path / "b", tiny_base, sampling, precision="bf16", dropout=0.1)
    assert digest(plain / "checkpoint" / "model.safetensors") == digest(sampled / "checkpoint" / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "gsm8k"], "--tasks: the task gsm8k needs a path; write gsm8k=PATH"),
        (["--tasks", "spelin"], "--tasks: unknown task 'spelin'; did you mean 'spelling'?"),
        (["--tasks", "jsonl=QUESTIONS"], "QUESTIONS:1: "),
        (["--judge", "http://127.0.0.1:9"], "--judge: it needs --judge-model, and that needs --judge; give both"),
        (["--judge", "http://127.0.0.1:9", "--judge-model", "m"], "http://127.0.0.1:9"),
    ],
)
def test_wrong_input_is_one_line(run: Path, tiny_base: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    questions = _file(tmp_path / "questions.jsonl", [{"question": "why?"}])
    arguments = [a.replace("QUESTIONS", str(questions)) for a in arguments]
    if "--tasks" not in arguments:
        arguments += ["--tasks", "arithmetic", "--limit", "1"]
    out = tmp_path / "out"
    done = command("compare", str(tiny_base), str(run), "--out", str(out), *arguments)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and line.startswith("error: "), done.stderr
    assert said.replace("QUESTIONS", str(questions)) in line
    assert not (out / "compare.json").exists()


def test_rows_survive_a_kill_and_a_rerun_goes_on(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The whole command twice: the second time nothing is generated again."""
    arguments = ["eval", str(run), "--tasks", "arithmetic", "--limit", "5", "--out", str(tmp_path)]
    assert command(*arguments).returncode == 0
    (path,) = (tmp_path / "eval").glob("*arithmetic.jsonl")
    first = path.read_text()
    lines = first.splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])  # as a kill leaves it
    (tmp_path / "eval.json").unlink()
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    again = [json.loads(x) for x in path.read_text().splitlines()]
    assert [r["ids"] for r in again] == [json.loads(x)["ids"] for x in lines]
    assert [r["seconds"] for r in again[:3]] == [json.loads(x)["seconds"] for x in lines[:3]]
    assert (tmp_path / "eval.json").is_file()


def test_changes_in_words() -> None:
    assert [change_of(0, 1), change_of(1, 0.5), change_of(1, 1), change_of(0.5, 0.5)] == [
        "improved",
        "regressed",
        "same right",
        "same wrong",
    ]


def test_two_ranks_compare_as_one_process_does(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    """To the last bit: what is computed at once is the same, and so is what is added up."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))

    def compared(out: str) -> None:
        tasks = ["spelling"]
        api.compare(str(tiny_base), str(run), tasks, limit=65, prompts=str(prompts), out=tmp_path / out)

    assert forked(1, lambda: compared("one")) == [0]  # in one thread, too
    assert forked(2, lambda: compared("two")) == [0, 0]
    one, two = results_in(tmp_path / "one"), results_in(tmp_path / "two")
    assert one == two and len(one) == 2 + 6
    assert (tmp_path / "two" / "report.html").is_file() and json.loads(two["compare.json"])["held_out_loss"][
        "rows"
    ] == 4
