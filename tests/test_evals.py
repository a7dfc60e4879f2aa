"""Evaluation keeps every row, goes on from finished ones, and says what a score rests on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from helpers.bigrams import bigrams, write_checkpoint
from helpers.generation import text_of
from helpers.tokenizers import byte_level
from sftflow.chat.schema import text_message
from sftflow.checkpoint import load_assistant
from sftflow.evaluation.evaluate import evaluate, evaluate_models
from sftflow.evaluation.journal import safe_name
from sftflow.evaluation.options import EvalTask, open_tasks
from sftflow.evaluation.results import CHATCORE, ModelScores
from sftflow.fingerprint import prompt_hash, weights_hash
from sftflow.foundation.atomic_io import write_json
from sftflow.foundation.errors import ContextError, TaskError
from sftflow.generation.engine import Engine
from sftflow.tasks import Item
from sftflow.tasks.spelling import words


@pytest.fixture(scope="module")
def assistant(tiny_base: Path) -> Any:
    from sftflow.checkpoint import load_assistant

    return load_assistant(str(tiny_base))


@pytest.fixture
def run() -> EvalTask:
    (opened,) = open_tasks(["arithmetic"], 7)
    return opened


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Killed(Exception):
    pass


def test_rows_hold_their_evidence(assistant: Any, run: EvalTask, tmp_path: Path) -> None:
    steps: list[int] = []
    result = evaluate(assistant, run, "chat", tmp_path, model="runs/a b", progress=steps.append)
    name = f"{safe_name('runs/a b')}-arithmetic"
    rows = rows_of(tmp_path / "eval" / f"{name}.jsonl")
    assert sum(steps) == len(rows) == result.n == 7
    for item, row in zip(run.items, rows, strict=True):
        from sftflow.evaluation.prompts_for import chat_prompt

        ids = chat_prompt(assistant.renderer, item)
        assert row["id"] == item.id and row["prompt_sha256"] == prompt_hash(ids) and row["n_prompt"] == len(ids)
        assert row["score"] == run.task.grade(item, row["reply"])
        assert row["finish_reason"] in ("stop", "length") and len(row["ids"]) >= row["n_generated"] > 0
        assert text_of(assistant.engine.reply_decoder, row["ids"]) == row["reply"]
    meta = json.loads((tmp_path / "eval" / f"{name}.meta.json").read_text())
    assert {**meta, "data": result.provenance["data"]} == result.provenance
    assert meta["checkpoint"] == weights_hash(assistant.model) and meta["decoding"] == "greedy"


def test_a_rerun_goes_on_from_finished_rows(
    assistant: Any, run: EvalTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = evaluate(assistant, run, "chat", tmp_path / "whole")

    def dies(k: int) -> None:
        seen.append(k)
        if len(seen) == 4:
            raise Killed

    seen: list[int] = []
    small = Engine(assistant.model, assistant.renderer, assistant.engine.runtime, max_running=2)
    monkeypatch.setattr(assistant, "engine", small)
    with pytest.raises(Killed):
        evaluate(assistant, run, "chat", tmp_path, progress=dies)
    path = next((tmp_path / "eval").glob("*-arithmetic.jsonl"))
    assert len(rows_of(path)) == 3  # the first step counted what was there already: nothing
    with path.open("a", encoding="utf-8") as f:
        f.write('{"id": "cut off by the ki')
    asked: list[int] = []
    generate = small.generate
    monkeypatch.setattr(
        small,
        "generate",
        lambda requests, done, **more: asked.append(len(requests)) or generate(requests, done, **more),
    )
    again = evaluate(assistant, run, "chat", tmp_path)
    assert sum(asked) == 4
    assert [(r.id, r.ids, r.score) for r in again.rows] == [(r.id, r.ids, r.score) for r in wanted.rows]
    assert [r["id"] for r in rows_of(path)] == [i.id for i in run.items]


def test_a_prompt_that_does_not_fit_scores_nothing_and_is_counted(
    assistant: Any, run: EvalTask, tmp_path: Path
) -> None:
    long = Item(id="long", messages=(text_message("user", "why? " * 400),), answer="1")
    mixed = EvalTask(name="arithmetic", task=run.task, items=(*run.items[:2], long))
    result = evaluate(assistant, mixed, "chat", tmp_path)
    assert [r.finish_reason == "too_long" for r in result.rows] == [False, False, True]
    assert result.rows[2].score == 0 and result.to_json()["too_long"] == 1
    alone = EvalTask(name="arithmetic", task=run.task, items=(long,))
    with pytest.raises(ContextError, match="arithmetic: no prompt fits a context of 256 tokens"):
        evaluate(assistant, alone, "chat", tmp_path / "alone")


def test_eval_writes_its_documents(assistant: Any, tmp_path: Path) -> None:
    runs = open_tasks(["spelling", "arithmetic"], 3)
    document = evaluate_models([(assistant, runs)], tmp_path).to_json()
    assert json.loads((tmp_path / "eval.json").read_text()) == document
    (entry,) = document["models"].values()
    for name in ("spelling", "arithmetic"):
        task = entry["tasks"][name]
        assert {"n", "score", "stderr", "chance", "wilson95", "rests_on"} <= set(task)
        low, high = task["wilson95"]
        assert 0 <= low <= task["score"] <= high <= 1
    (path,) = (tmp_path / "eval").glob("*-results.json")
    harness = json.loads(path.read_text())
    assert harness["results"]["spelling"]["exact_match,none"] == entry["tasks"]["spelling"]["score"]
    assert harness["n-samples"]["arithmetic"] == {"original": 200, "effective": 3}
    assert harness["n-samples"]["spelling"] == {"original": len(words("test")), "effective": 3}
    assert harness["config"]["limit"] == 3
    assert "chatcore" not in entry


def test_how_many_items_there_are_without_the_limit(tmp_path: Path) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps({"question": f"{n}?", "answer": n}) + "\n" for n in range(9)))
    found = [
        (r.limit, r.available, len(r.items))
        for limit in (2, 9, 20, None)
        for r in open_tasks([f"jsonl={source}"], limit)
    ]
    assert found == [(2, 9, 2), (9, 9, 9), (20, 9, 9), (None, 9, 9)]
    assert [(r.available, len(r.items)) for r in open_tasks(["identity", "arithmetic"], 300)][1] == (300, 300)


def test_no_tasks_have_no_mean_and_documents_are_strict_json(tmp_path: Path) -> None:
    assert ModelScores(()).centred_mean is None
    write_json(tmp_path / "x.json", {"a": [math.nan, (math.inf, 0.5)], "b": None})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": [None, [None, 0.5]],
        "b": None,
    }


def test_chatcore_is_the_mean_over_its_six_tasks(assistant: Any, run: EvalTask, tmp_path: Path) -> None:
    from dataclasses import replace

    one = evaluate(assistant, run, "chat", tmp_path)
    six = [replace(one, task=name, chance=0.25 if "arc" in name or name == "mmlu" else 0.0) for name in CHATCORE]
    wanted = sum((r.score - r.chance) / (1 - r.chance) for r in six) / 6
    assert ModelScores(tuple(six)).to_json()["chatcore"] == pytest.approx(wanted)
    assert "chatcore" not in ModelScores(tuple(six[:5])).to_json()


def test_tasks_by_name(tmp_path: Path) -> None:
    row = {
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f): pass",
        "entry_point": "f",
    }
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(TaskError, match=r"humaneval: it runs code that the model wrote; allow that with --allow-code"):
        open_tasks([f"humaneval={path}"], None)
    assert open_tasks([f"humaneval={path}"], None, allow_code=True)[0].name == "humaneval"
    with pytest.raises(TaskError, match="named twice"):
        open_tasks(["spelling", "spelling"], 2)
    with pytest.raises(TaskError, match="unknown task 'gsm8'; did you mean 'gsm8k'"):
        open_tasks(["gsm8"], 2)


@pytest.mark.parametrize(
    ("said", "graded", "score"),
    [
        (("so", "\n\n", "7"), "so\n\n7", 1.0),  # the answer comes behind a blank line
        (("7", "\n\n", "3"), "7", 1.0),  # something else does
        (("\n\n", "7"), "7", 1.0),
        (("5", "\n\n", "3"), "5", 0.0),
        (("7", "\nQuestion:", "3"), "7", 1.0),
    ],
)
def test_no_stop_lowers_the_score_of_a_base(tmp_path: Path, said: tuple[str, ...], graded: str, score: float) -> None:
    tokenizer = byte_level(special=("<s>",), plain=("\n\n", "\nQuestion:"))
    ids = [i for piece in (":", *said) for i in tokenizer(piece, add_special_tokens=False).input_ids]
    base = write_checkpoint(tmp_path, bigrams(len(tokenizer), [*ids, tokenizer.eos_token_id]), tokenizer)
    sums = tmp_path / "sums.jsonl"
    sums.write_text('{"question": "How many?", "answer": "#### 7"}\n')
    (task,) = open_tasks([f"gsm8k={sums}"], None)
    (row,) = evaluate(load_assistant(str(base)), task, "plain", tmp_path).rows
    assert (row.reply, row.score, task.task.grade(task.items[0], row.reply)) == (graded, score, score)


THINKS = (
    "{% for m in messages %}<|head|>{{ m.role }}:{% if m.role == 'assistant' and m.reasoning_content %}"
    "<|open|>thoughts\n{{ m.reasoning_content }}<|close|>{% endif %}{{ m.content }}<|halt|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("said", "graded", "score"),
    [
        (("<|open|>", "thoughts\n", "3", "<|close|>", "7"), "7", 1.0),
        (("<|open|>", "thoughts\n", "7", "<|close|>", "3"), "3", 0.0),
        (("<|open|>", "thoughts\n", "7"), "", 0.0),  # not finished
        (("7",), "7", 1.0),
    ],
)
def test_thoughts_between_control_tokens_are_not_the_answer(
    tmp_path: Path, said: tuple[str, ...], graded: str, score: float
) -> None:
    special = ("<|head|>", "<|open|>", "<|close|>", "<|halt|>")
    tokenizer = byte_level(special=special, plain=("thoughts\n",))
    tokenizer.chat_template = THINKS
    ids = [i for piece in (":", *said, "<|halt|>") for i in tokenizer(piece, add_special_tokens=False).input_ids]
    base = write_checkpoint(tmp_path, bigrams(len(tokenizer), ids), tokenizer)
    sums = tmp_path / "sums.jsonl"
    sums.write_text('{"question": "How many?", "answer": "#### 7"}\n')
    (task,) = open_tasks([f"gsm8k={sums}"], None)
    (row,) = evaluate(load_assistant(str(base)), task, "chat", tmp_path).rows
    assert (row.reply, row.score) == (graded, score)
