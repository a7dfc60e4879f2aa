"""How items are asked: examples in front of them, several replies to each, thoughts, and scores that are required."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import typer

import sftflow as sf
from helpers.outside import outside
from sftflow import api
from sftflow.chat.format import ChatFormat
from sftflow.chat.schema import parse_row
from sftflow.cli.eval import _bar, eval_
from sftflow.evaluation.evaluate import evaluate
from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.options import EvalTask, How, open_tasks
from sftflow.evaluation.prompts_for import in_mode, prompts_for
from sftflow.evaluation.results import EvalResult, Evaluation, ModelScores
from sftflow.evaluation.statistics import pass_at_k
from sftflow.foundation.errors import SftflowError
from sftflow.tasks import Item, Task, TaskSource, ask, make_item, make_task

SUM = {"question": "What is 1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}


@pytest.fixture(scope="module")
def assistant(tiny_base: Path) -> Any:
    return sf.load(str(tiny_base))


def error_of(call: Any) -> str:
    with pytest.raises(SftflowError) as told:
        call()
    return str(told.value)


def write(file: Path, *rows: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# ---- shots


def test_examples_are_earlier_turns_and_blocks_of_text(assistant: Any) -> None:
    (bare,), (shown,) = open_tasks(["spelling"], 3), open_tasks(["spelling"], 3, how=How(shots=2))
    assert bare.items == shown.items
    for arm in ("chat", "plain"):
        ids = prompts_for(assistant, shown, arm)  # type: ignore[arg-type]
        for item, shots, prompt in zip(shown.items, shown.shots, ids, strict=True):
            turns = [m for example in shots for m in example.messages]
            assert len(turns) == 4
            if arm == "chat":
                conversation = {"messages": [{"role": m.role, "content": m.text} for m in (*turns, *item.messages)]}
                assert prompt.ids == assistant.request(parse_row(conversation, "x")).prompt_ids
            else:
                (q1, a1), (q2, a2) = ((s.messages[0].text, s.messages[1].text) for s in shots)
                text = f"Question: {q1}\nAnswer: {a1}\n\nQuestion: {q2}\nAnswer: {a2}\n\n{item.plain}"
                assert prompt.ids == assistant.plain_ids(text)


def test_examples_come_from_the_split_for_them_and_are_never_the_item(tmp_path: Path) -> None:
    test = [SUM | {"question": f"What is {n}+1?"} for n in range(4)]
    path = write(tmp_path / "test.jsonl", *test)
    assert error_of(lambda: open_tasks([f"gsm8k={path}"], None, how=How(shots=2))) == (
        f"gsm8k: it has no examples for --shots (no file beside {path} is called as it is with train or dev or"
        " validation or val in place of test); put its examples there, or ask it in a run without --shots"
    )
    write(tmp_path / "train.jsonl", *test[:3], SUM | {"question": "What  is 3+1?"})
    (task,) = open_tasks([f"gsm8k={path}"], None, how=How(shots=3))
    for item, shots in zip(task.items, task.shots, strict=True):
        assert item.messages[0].text not in {" ".join(s.messages[0].text.split()) for s in shots} and len(shots) == 3
    assert open_tasks([f"gsm8k={path}"], None, how=How(shots=3))[0].shots == task.shots
    assert error_of(lambda: open_tasks([f"gsm8k={path}"], None, how=How(shots=4))) == (
        "gsm8k: it has 3 examples for --shots 4; lower --shots"
    )
    told = error_of(lambda: open_tasks(["dialogue"], 2, how=How(shots=1)))
    assert told.startswith("dialogue: it has no examples for --shots (a dialogue in front of it would tell other facts")


def test_examples_of_a_set_are_of_its_train_split(tmp_path: Path) -> None:
    for path, kept in {
        "hub:openai/gsm8k@main:socratic:test": "hub:openai/gsm8k@main:socratic:train",
        "hub:openai/gsm8k:test": "hub:openai/gsm8k:train",
        "hub:openai/gsm8k": "hub:openai/gsm8k",
    }.items():
        assert make_task("gsm8k", TaskSource(path=path)).examples_path() == kept
    assert make_task("mmlu_pro", TaskSource(path="hub:a/b:test")).examples_path() == "hub:a/b:validation"
    for split, question in (("test", "What is 5+1?"), ("train", "What is 6+1?")):
        write(tmp_path / f"{split}.jsonl", SUM | {"question": question})
    (task,) = open_tasks([f"gsm8k=hub:{tmp_path}:test"], None, how=How(shots=1))
    assert (task.items[0].messages[0].text, task.shots[0][0].messages[0].text) == ("What is 5+1?", "What is 6+1?")


def test_examples_of_the_item_s_own_subject(tmp_path: Path) -> None:
    for split in ("dev", "test"):
        for subject in ("birds", "fish"):
            file = tmp_path / split / f"{subject}_{split}.csv"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(f"{split} {subject} {n}?,a,b,c,d,A\n" for n in range(2)))
    for path in (tmp_path, tmp_path / "test" / "*", tmp_path / "test" / "fish_test.csv"):
        (task,) = open_tasks([f"mmlu={path}"], None, how=How(shots=2))
        for item, shots in zip(task.items, task.shots, strict=True):
            subject = item.messages[0].text.split()[1]
            assert [s.messages[0].text.split()[:2] for s in shots] == [["dev", subject]] * 2


def test_examples_in_front_of_real_sets() -> None:
    for name, n in (("gsm8k={}/test.jsonl", 5), ("mmlu={}", 5)):
        spec = name.format(outside(name.partition("=")[0]))
        (task,) = open_tasks([spec], 20, how=How(shots=n))
        assert all(len(s) == n for s in task.shots)


# ---- samples


class Coin(Task):
    """A reply is right where its first letter is of the alphabet's first half; another task gives halves."""

    name = "coin"
    max_new_tokens = 2

    def items(self, split: str = "test") -> list[Item]:
        return [make_item(f"c{n}", f"Say {n}.", "") for n in range(4)]

    def conversations(self, split: str = "train") -> list[Any]:
        return [ask("Say 0.", "0"), ask("Say 9.", "9")]

    def grade(self, item: Item, reply: str) -> float:
        return float(len(reply) % 2)


def coin(how: How) -> EvalTask:
    (task,) = open_tasks([Coin], None, how=how)
    return task


def test_samples_are_drawn_by_item_and_scored_by_item(assistant: Any, tmp_path: Path) -> None:
    task = coin(How(samples=3, temperature=1.0, max_tokens=5))
    result = evaluate(assistant, task, "chat", tmp_path)
    assert [(r.id, r.sample) for r in result.rows] == [(f"c{n}", s) for n in range(4) for s in range(3)]
    assert len({r.ids for r in result.rows}) > 6 and all(r.n_generated <= 5 for r in result.rows)
    means = [sum(r.score for r in result.rows[3 * n :][:3]) / 3 for n in range(4)]
    assert (result.n, result.scores) == (4, means) and result.score == pytest.approx(sum(means) / 4)
    variance = sum((m - result.score) ** 2 for m in means) / 3
    assert result.stderr == pytest.approx(math.sqrt(variance / 4))
    assert result.pass_at["pass@1"] == pytest.approx(result.score) and set(result.pass_at) == {
        f"pass@{k}" for k in (1, 2, 3)
    }
    found = result.to_json()
    assert found["samples"] == 3 and found["rests_on"]["decoding"].startswith("temperature 1,")
    assert found["rests_on"]["max_new_tokens"] == 5
    # A rerun with more samples takes over those that are there, whatever is beside them.
    asked: list[int] = []
    four = replace(task, how=replace(task.how, samples=4))
    more = evaluate(assistant, four, "chat", tmp_path, progress=asked.append)
    assert asked[0] == 12 and sum(asked) == 16
    assert [r.ids for r in more.rows if r.sample < 3] == [r.ids for r in result.rows]
    other = evaluate(assistant, replace(task, how=replace(task.how, temperature=0.5)), "chat", tmp_path)
    assert {r.provenance for r in other.rows}.isdisjoint(r.provenance for r in result.rows)


def test_tasks_are_named_as_in_a_mixture_too(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", SUM, SUM | {"question": "What is 3+3?"})
    few, of_file = open_tasks([sf.task("spelling", limit=2), sf.task("gsm8k", path)], 5)
    assert (len(few.items), of_file.name, len(of_file.items)) == (2, "gsm8k", 2)


@pytest.mark.parametrize(("n", "right"), [(4, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, right: int) -> None:
    replies = [1] * right + [0] * (n - right)
    for k in range(1, n + 1):
        draws = list(combinations(replies, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            How(samples=2),
            "--samples: at temperature 0 all replies to an item are the same; give --temperature, for example 0.7",
        ),
        (How(samples=0), "--samples: it should be a whole number, 1 or more (given: 0)"),
        (How(shots=-1), "--shots: it should be a whole number, 0 or more (given: -1)"),
        (How(max_tokens=0), "--max-tokens: it should be a whole number, 1 or more (given: 0)"),
        (How(temperature=-1), "--temperature: it should be 0, which is greedy, or a number from 0.0001 to 100"),
        (How(temperature=math.nan), "--temperature: it should be 0, which is greedy"),
    ],
)
def test_what_cannot_be_asked_so(how: How, said: str) -> None:
    assert error_of(lambda: open_tasks(["spelling"], 1, how=how)).startswith(said)


def test_letters_are_not_drawn(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"question": "?", "answer": "a", "choices": ["a", "b"]})
    for how, option in ((How(temperature=1), "--temperature"), (How(thinking=True), "--thinking on")):
        said = "jsonl: it is answered by the probabilities of its letters, behind the prompt; ask it in a run without "
        assert error_of(lambda: open_tasks([f"jsonl={path}"], None, how=how)) == said + option  # noqa: B023


def test_compare_pairs_items(tiny_base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": 2, "temperature": 1.0, "max_tokens": 3, "shots": 1}
    found = sf.compare(
        str(tiny_base), str(tiny_base), [Coin], prompts=write(tmp_path / "p.jsonl", "Hi"), out=tmp_path, **options
    )
    task = found.tasks["coin"]
    assert (task.n, len(task.items), task.max_new_tokens, task.delta) == (4, 4, 3, task.sft - task.base)
    assert found.tasks["coin"].sft == pytest.approx(sum(i.sft.score for i in task.items) / 4)
    told = "1 example in front, 2 replies to an item, temperature 1, at most 3 tokens"
    assert found.settings["tasks are asked with"] == told
    assert "tasks are asked with" in (tmp_path / "report.html").read_text()


# ---- thinking

THINKS = (
    "{%- for m in messages %}<|bos|>{{ m.role }}: {{ m.content }}\n{% endfor -%}"
    "{%- if add_generation_prompt %}assistant: {% if SWITCH %}<think>\n\n</think>\n\n{% endif %}{% endif -%}"
)


@pytest.mark.parametrize("switch", ["enable_thinking is defined and not enable_thinking", "not (thinking or false)"])
def test_thinking_is_switched_by_the_template_s_own_argument(assistant: Any, switch: str) -> None:
    renderer = assistant.renderer.with_format(ChatFormat(name="own", template=THINKS.replace("SWITCH", switch)))
    thinker = replace(assistant, renderer=renderer)
    prompts = {}
    for on in (True, False):
        (task,) = open_tasks(["spelling"], 1, how=How(thinking=on))
        (prompt,) = prompts_for(in_mode(thinker, task), task, "chat")
        prompts[on] = renderer.decode(list(prompt.ids))
    assert prompts[False].endswith("</think>\n\n") and prompts[True].endswith("assistant: ")


def test_a_template_without_a_switch_is_refused_before_anything_is_asked(assistant: Any, tmp_path: Path) -> None:
    said = error_of(lambda: sf.evaluate(assistant, ["spelling"], thinking=False, out=tmp_path))
    fact = "its template has no argument that switches thinking on or off, such as enable_thinking"
    assert said == f"sftflow: {fact}; leave thinking out"
    assert not (tmp_path / "eval").exists()


# ---- required scores


def test_a_missed_bar_is_told_when_all_is_written(tiny_base: Path, tmp_path: Path) -> None:
    name, bars = str(tiny_base), {"spelling": 0.5, "arithmetic": 0}
    with pytest.raises(api.BarMissed) as told:
        api.evaluate(name, [*bars], limit=2, max_tokens=2, require=bars, out=tmp_path)
    assert told.value.exit_code == 1 and (tmp_path / "eval.json").is_file()
    (line,) = told.value.missed
    assert line == f"{name}: spelling 0.000 (95% interval 0.000 to 0.658, n=2) is below the required 0.5"
    assert told.value.evaluation.models[name].tasks["arithmetic"].n == 2


@pytest.mark.parametrize(
    ("bars", "said"),
    [
        ({"speling": 0.5}, "require: 'speling' is not asked; did you mean 'spelling'?"),
        ({"gsm8k": 0.5}, "require: 'gsm8k' is not asked; asked are spelling"),
        ({"spelling": 50}, "require: the score 50 for spelling is no number in 0..1; write for example 0.3"),
        ({"spelling": math.nan}, "require: the score nan for spelling is no number in 0..1; write for example 0.3"),
    ],
)
def test_what_cannot_be_required(bars: dict[str, float], said: str, tiny_base: Path) -> None:
    assert error_of(lambda: sf.evaluate(str(tiny_base), ["spelling"], require=bars)) == said


def test_a_score_on_the_bar_is_enough() -> None:
    def scored(*scores: float) -> EvalResult:
        rest = {"answer": "", "reply": "", "finish_reason": "stop", "n_prompt": 1, "n_generated": 1, "seconds": 0.0}
        rows = tuple(EvalRow(id=str(n), question="", score=s, prompt_sha256="", **rest) for n, s in enumerate(scores))
        return EvalResult(task="t", arm="chat", chance=0.0, rows=rows, metrics={}, provenance={})

    found = Evaluation({"m": ModelScores((scored(0.1, 0.2, 0.6, 0.3),)), "n": ModelScores((scored(0, 0, 1, 0),))})
    assert found.missed({"t": 0.3}) == ["n: t 0.250 (95% interval 0.046 to 0.699, n=4) is below the required 0.3"]


def test_the_command_exits_with_1_where_a_bar_is_missed(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    options: dict[str, Any] = {"tasks": "spelling", "limit": 2, "max_tokens": 2, "out": tmp_path, "shots": 1}
    eval_(models=[str(tiny_base)], require=["spelling=0"], **options)
    with pytest.raises(typer.Exit) as left:
        eval_(models=[str(tiny_base)], require=["spelling=0.5"], **options)
    told = capsys.readouterr()
    assert left.value.exit_code == 1 and (tmp_path / "eval.json").is_file()
    assert "asked with 1 example in front, at most 2 tokens" in " ".join(told.out.split())
    assert "missed: " in told.err and "spelling 0.000 (95% interval 0.000 to 0.658, n=2) is below" in told.err


def test_a_recipe_s_models_are_asked_so(tiny_base: Path, tmp_path: Path) -> None:
    asked = {
        "tasks": ["spelling"],
        "limit": 2,
        "shots": 1,
        "samples": 2,
        "temperature": 1.0,
        "max_tokens": 2,
        "every": 1,
    }
    train = {"out": str(tmp_path / "run"), "steps": 1, "max_length": 64, "tokens_per_step": 64}
    recipe = {"base": str(tiny_base), "mixture": [{"source": "spelling", "limit": 20}], "train": train, "eval": asked}
    done = sf.train(recipe=recipe)
    assert done.evaluation is not None
    (scores,) = done.evaluation.models.values()
    assert (scores.tasks["spelling"].n, len(scores.tasks["spelling"].rows)) == (2, 4)
    thinking = {**recipe, "train": {**train, "out": str(tmp_path / "thinks")}, "eval": {**asked, "thinking": True}}
    assert "no argument that switches thinking on or off" in error_of(lambda: sf.train(recipe=thinking))
    assert not (tmp_path / "thinks" / "metrics.jsonl").exists()
    samples = {**recipe, "eval": {"tasks": ["spelling"], "samples": 2}}
    said = "eval.samples: at temperature 0 all replies to an item are the same; give eval.temperature, for example 0.7"
    assert error_of(lambda: sf.train(recipe=samples, overwrite=True)).endswith(said)


def test_bars_of_the_command_line() -> None:
    assert _bar("gsm8k=0.3") == ("gsm8k", 0.3) and _bar("a=b=1") == ("a=b", 1.0)
    for wrong in ("gsm8k", "=0.3", "gsm8k=high", "gsm8k>0.3"):
        assert error_of(lambda: _bar(wrong)).startswith("--require: ")  # noqa: B023
    assert error_of(lambda: _bar("gsm8k>=0.3")).endswith("which asks for X or more; write --require gsm8k=0.3")
