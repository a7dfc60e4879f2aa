"""The fixed prompts: which of them stand in training rows, what is right, what a comparison of them alone says."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.runs import Quiet, write_recipe
from helpers.runs import run as command
from helpers.tiny import make_renderer
from sftflow import api
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.comparison.in_training import seen_in_training, wording
from sftflow.comparison.prompt_results import PromptComparison, PromptReply, prompt_groups
from sftflow.comparison.prompts import FixedPrompt, load_prompts
from sftflow.data.run_rows import TrainingRows, read_training_rows
from sftflow.data.store import ROW, Rows
from sftflow.foundation.errors import DataError, SftflowError
from sftflow.recipe import load_recipe
from sftflow.report.comparison_page import comparison_page
from sftflow.training.run import run_training


def chat(*said: str, system: str | None = None) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant") * len(said)
    return {"messages": [*messages, *({"role": r, "content": t} for r, t in zip(roles, said, strict=False))]}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Who are you?", "  who\nARE you !", True),
        ("“It’s late” — isn't it?", "its late, isnt it", True),
        ("Ｗｈｏ are you？", "who are you", True),  # NFKC: full width
        ("ﬁne café", "FINE cafe\u0301", True),
        ("self-attention", "self attention", True),
        ("self-attention", "selfattention", False),
        ("What is 47 + 38?", "what is 47+38", True),
        ("What is 47 + 38?", "What is 47 - 38?", False),
        ("What is 6 * 2?", "What is 6 / 2?", False),
        ("What is 6 \u2212 2?", "what is 6-2", True),
        ("(18 - 5) * 3", "18 - (5 * 3)", False),
        ("Add 3.5 and 2.", "Add 35 and 2.", False),
        ("Add -5 and 2.", "Add 5 and 2.", False),
        ("What is 15% of 80?", "What is 15 of 80?", False),
        ("Is 3 < 4?", "Is 3 > 4?", False),
        ("कि", "क", False),  # a vowel sign is no punctuation
        ("Nice 😀", "Nice", False),
        ("a\u200bb", "ab", True),
        ("1 \U000f0041 2", "1 2", False),  # private use, between digits
    ],
)
def test_prompts_are_compared_by_their_words(one: str, other: str, same: bool) -> None:
    assert (wording(one) == wording(other)) is same


# ---- which prompts stand in training rows

TRAINED = [
    chat("Who are you?", "I am Pico."),
    chat("What is 7 * 2?", "14."),
    chat("Hello there!", "Hi!", "What is a token?", "A piece.", "Name a bird.", "A wren."),
    chat("Where do you live?", "Here.", system="You are kind."),
    chat("I ask: is it late", "No."),
    chat("Some text.\n\nThe moon is far", "Yes."),
    chat("12 + 9?", "21", "Now double it", "42"),
]
HELD_OUT = [chat("Which colour is snow?", "White.")]
PROMPTS: list[tuple[dict[str, Any], str]] = [
    (chat("who are YOU"), "whole"),
    (chat("“Who—are you”…"), "whole"),
    (chat("What is 7*2"), "whole"),
    (chat("What is 7 - 2?"), "no"),
    (chat("what is a token"), "whole"),  # asked later in a conversation
    (chat("name a bird!"), "whole"),
    (chat("where do you live"), "whole"),  # asked behind a system message
    (chat("is it late"), "no"),  # the end of a longer question
    (chat("which colour is snow?"), "no"),  # held out
    (chat("A wren."), "no"),  # a reply
    (chat("you"), "no"),
    (chat("?!"), "no"),
    (chat(""), "no"),
    (chat("12 + 9", "21.", "now double it!"), "whole"),
    (chat("12 + 8?", "20", "Now double it"), "last question"),
    (chat("hello there", "Hi.", "What is a token?"), "whole"),
    (chat("Now double it", "?", "12 + 9?", "21", "Double"), "no"),
    (chat("Where do you live", system="You are KIND"), "whole"),
    (chat("Where do you live", system="You are cruel"), "last question"),
    (chat("where do you", system="You are kind"), "no"),
]


def rows_of(rendered: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]) -> Rows:
    table = np.zeros(len(rendered), ROW)
    table["length"] = [len(ids) for ids in rendered]
    table["start"] = np.cumsum(table["length"]) - table["length"]
    table["digest"] = [zlib.crc32(np.asarray(ids).tobytes()) for ids in rendered]
    ids = np.concatenate([np.asarray(ids, np.int32) for ids in rendered])
    mask = np.concatenate([np.asarray(mask, np.int8) for mask in masks])
    return Rows(table, ids, mask, name="train", number=0, prefix="train")


def rendered(renderer: Renderer, conversations: Sequence[dict[str, Any]]) -> Rows:
    rows = [row for c in conversations for row in renderer.render_rows(parse_row(c, "train"))]
    return rows_of([r.ids.tolist() for r in rows], [r.mask.tolist() for r in rows])


def fixed(conversation: dict[str, Any]) -> FixedPrompt:
    return FixedPrompt(id="p", kind="own", conversation=parse_row(conversation, "prompt"))


@pytest.mark.parametrize("name", ["sftflow", "chatml", "llama2", "llama3", "alpaca", "phi3"])
def test_prompts_are_found_in_training_rows(tokenizer_dir: Path, name: str) -> None:
    """In every format: with and without control tokens, system messages in turns of their own or in the user's."""
    renderer = make_renderer(tokenizer_dir, name)
    rows = [rendered(renderer, some) for some in (TRAINED, HELD_OUT)]
    held_out = [np.zeros(len(rows[0]), bool), np.ones(len(rows[1]), bool)]
    found = seen_in_training([fixed(c) for c, _ in PROMPTS], TrainingRows(sources=rows, held_out=held_out), renderer)
    wrong = [(c, got, right) for (c, right), got in zip(PROMPTS, found, strict=True) if got != right]
    assert not wrong


@pytest.mark.parametrize("taught", ["reply", "all"])
def test_rows_of_tokens_from_elsewhere_are_searched(renderer: Renderer, taught: str) -> None:
    """In a format that is not the checkpoint's, and where every token is supervised."""
    ids = renderer.encode_plain("User: Who are you?\nAssistant: I am Pico.")
    row = rows_of([ids], [[0, *[1] * (len(ids) - 1)] if taught == "all" else [*[0] * (len(ids) - 5), *[1] * 5]])
    rows = TrainingRows(sources=[row], held_out=[np.zeros(1, bool)])
    prompts = [chat("Who are YOU"), chat("Who is she?"), chat("Hi", "Hello", "Who are you?")]
    assert seen_in_training(list(map(fixed, prompts)), rows, renderer) == ["whole", "no", "last question"]


# ---- right answers, and what the prompts say together


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("It is Paris, in France.", True),
        ("PARIS and france", True),
        ("Paris", False),  # one of each group
        ("Parisians, France", False),  # whole words
        ("<think>Paris, France</think>No idea.", False),
    ],
)
def test_an_answer_holds_a_wording_of_each_group(reply: str, right: bool) -> None:
    prompt = FixedPrompt(
        id="p", kind="own", conversation=parse_row(chat("Where?"), "p"), expects=(("Paris", "Paname"), ("France",))
    )
    assert prompt.right(reply) is right
    number = FixedPrompt(id="p", kind="own", conversation=prompt.conversation, expects=(("85",),))
    assert number.right("It is 85.") and not number.right("It is 185.") and not number.right("8 5")
    assert FixedPrompt(id="p", kind="own", conversation=prompt.conversation).right(reply) is None


@pytest.mark.parametrize("expects", ["Paris", ["Paris"], [[]], [[""]], [[7]], {"a": 1}, [["a"], None]])
def test_a_malformed_answer_is_refused(tmp_path: Path, expects: Any) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('"fine"\n' + json.dumps({"prompt": "Where?", "expects": expects}) + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl:2: expects should be groups of wordings"):
        load_prompts(str(path))


def test_every_answer_of_the_default_set_is_right_and_not_in_its_question() -> None:
    """Wordings are met by themselves; a reply that says the question again is wrong."""
    found = [p for p in load_prompts().prompts if p.expects]
    assert len(found) >= 20
    for prompt in found:
        asked = prompt.conversation.messages[-1].text
        assert prompt.right(", ".join(group[0] for group in prompt.expects)), prompt.id
        assert not prompt.right(asked), prompt.id


def compared(right: tuple[bool, bool], *, stops: bool = True, seen: Any = "no") -> PromptComparison:
    sft = PromptReply(text="r", finish_reason="stop" if stops else "length", right=right[1])
    base = PromptReply(text="b", finish_reason="length", faults=("did not stop",), right=False)
    plain = PromptReply(text="b", finish_reason="stop", right=right[0])
    return PromptComparison(
        id="p", kind="own", messages=(), base=base, base_plain=plain, sft=sft, expects=(("x",),), seen=seen
    )


def test_groups_count_healthy_and_right_replies() -> None:
    trained = [compared((False, True), seen="whole")] * 9
    new = [compared((True, False))] * 2 + [compared((False, True), stops=False)] * 2 + [compared((False, False))] * 16
    failed = PromptComparison(
        id="p", kind="own", messages=(), base=trained[0].base, base_plain=trained[0].base_plain,
        sft=PromptReply(text="[not asked]", finish_reason="error"), seen="no",
    )  # fmt: skip
    groups = prompt_groups([*trained, *new, failed])
    assert list(groups) == ["all", "in_training", "not_in_training"]
    healthy, right = groups["not_in_training"].healthy, groups["not_in_training"].right
    assert (healthy.n, healthy.base, healthy.sft, healthy.verdict) == (20, 0, 18 / 20, "better")
    assert right is not None and (right.n, right.base_arm, right.base, right.sft) == (20, "plain", 0.1, 0.1)
    assert right.verdict == "cannot tell at n=20" and right.ci95[0] < 0 < right.ci95[1]
    assert groups["in_training"].healthy.sft == 1 and groups["all"].healthy.n == 29
    unknown = [compared((False, True), seen=None)]
    assert list(prompt_groups(unknown)) == ["all"] and prompt_groups([]) == {}


# ---- prompts alone, through both doors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    path = write_recipe(folder, tiny_base, steps=2, tokens_per_step=256, optimizer="adamw")
    run_training(load_recipe(path), Quiet())
    return folder / "run"


def asked_file(folder: Path, run: Path) -> Path:
    """Three prompts: one that the run was trained on, one that it held out, one that is nobody's."""
    held_out = json.loads((run / "held_out.jsonl").read_text().splitlines()[0])["messages"][0]["content"]
    rows = read_training_rows(run)
    kept = [int(n) - 1 for n in rows.sources[0].table["number"][~rows.held_out[0]]]
    trained = f"what is {kept[0] // 9} + {kept[0] % 9}"
    prompts = [
        {"id": "mine", "prompt": trained, "expects": [["1000"]]},
        {"prompt": held_out},
        "A question that is nobody's",
    ]
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return path


def test_prompts_alone_are_compared(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    path = asked_file(tmp_path, run)
    arguments = ["compare", str(tiny_base), str(run), "--prompts", str(path), "--tasks", "none"]
    done = command(*arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written["tasks"] == {} and written["centred_mean"] == {"base": None, "sft": None}
    assert [p["in_training"] for p in written["prompts"]] == [True, False, False]
    assert written["prompts_in_training"] == {
        "all": 3, "in_training": 1, "only_last_question": 0, "not_in_training": 2
    }  # fmt: skip
    assert {name: g["healthy"]["n"] for name, g in written["prompt_groups"].items()} == {
        "all": 3, "in_training": 1, "not_in_training": 2
    }  # fmt: skip
    assert written["prompts"][0]["expects"] == [["1000"]]
    assert written["prompts"][0]["right"] == {"base": False, "base_plain": False, "sft": False}
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "fixed prompts that stand in the training rows: mine\n" in done.stderr
    for said in ("A question that is", "(in training)", "healthy replies", "not in the training rows", "right answers"):
        assert said in done.stdout, said
    assert "chance" not in done.stdout, "no empty table of tasks"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No task was asked. On fixed prompts that are not in the training rows: healthy replies" in page
    assert 'id="scores"' not in page and 'id="contamination"' not in page and "1 of the 3 prompts stand" in page


@pytest.mark.parametrize("tasks", ["none", []])
def test_both_doors_mean_the_same_by_no_task(run: Path, tmp_path: Path, tasks: Any) -> None:
    (tmp_path / "one.jsonl").write_text('"Say yes."\n')
    found = api.compare(str(run), str(run), tasks, prompts=str(tmp_path / "one.jsonl"))
    assert not found.tasks and len(found.prompts) == 1 and "Say yes." in str(found)
    with pytest.raises(SftflowError, match="--tasks: no task is named, and eval asks nothing else"):
        api.evaluate(str(run), tasks)


def test_no_run_directory_no_marks(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    """What is not known is not denied: of checkpoints that lie elsewhere, and of runs of older versions."""
    (tmp_path / "one.jsonl").write_text('"Say yes."\n')
    found = api.compare(str(tiny_base), str(tiny_base), "none", prompts=str(tmp_path / "one.jsonl"))
    why = "the SFT checkpoint does not lie in a run directory"
    assert found.to_json()["prompts_in_training"] == {"not_checked": why}
    [prompt] = found.to_json()["prompts"]
    assert prompt["in_training"] is None and prompt["last_question_in_training"] is None
    assert list(found.prompt_groups) == ["all"] and any(why in line for line in found.remarks())
    assert f"not known which of them stand in the training rows: {why}" in comparison_page(found)


@pytest.mark.parametrize(
    ("command_line", "said"),
    [
        ("compare BASE RUN --tasks none,spelling", "--tasks: 'none' stands beside other tasks: none, spelling; "),
        ("compare BASE RUN --tasks ,", "--tasks: no task is named in ','; "),
        ("compare BASE RUN --tasks=", "--tasks: no task is named in ''; "),
        ("eval RUN --tasks none", "--tasks: no task is named, and eval asks nothing else; "),
        ("eval RUN --tasks spelling,none", "--tasks: 'none' stands beside other tasks: spelling, none; "),
    ],
)
def test_none_is_refused_where_it_means_nothing(
    run: Path, tiny_base: Path, tmp_path: Path, command_line: str, said: str
) -> None:
    arguments = command_line.replace("BASE", str(tiny_base)).replace("RUN", str(run)).split()
    done = command(*arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and f"error: {said}" in done.stderr, done.stderr
    assert not list(tmp_path.glob("out/*.json"))


def test_a_recipe_compares_without_tasks_and_does_not_evaluate_without(tmp_path: Path, tiny_base: Path) -> None:
    path = write_recipe(tmp_path, tiny_base, steps=1, tokens_per_step=256, optimizer="adamw")
    recipe = json.loads(path.read_text())
    (tmp_path / "one.jsonl").write_text('"Say yes."\n')
    path.write_text(json.dumps({**recipe, "eval": {"tasks": []}}))
    for name in ("doctor", "train"):
        done = command(name, str(path))
        assert done.returncode == 2 and "eval.tasks: no task is named, and nothing is compared" in done.stderr
    assert not (tmp_path / "run").exists()
    path.write_text(json.dumps({**recipe, "compare": {"prompts": "one.jsonl"}}))
    done = command("train", str(path))
    assert done.returncode == 0, done.stderr
    assert "Say yes." in done.stdout and "Say yes." in (tmp_path / "run" / "log.txt").read_text()
