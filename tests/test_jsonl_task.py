"""The user's own question files: graders, choices, errors word for word; then BoolQ and OpenBookQA as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.outside import each, outside
from sftflow.foundation.errors import SchemaError, SftflowError
from sftflow.tasks import Item, TaskSource, chance_of, make_task
from sftflow.tasks.answers import holds_text, same_number, same_text
from sftflow.tasks.questions import GRADERS, Jsonl, parse


def task_of(path: Path, *rows: Any) -> Jsonl:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = make_task("jsonl", TaskSource(path=str(path)))
    assert isinstance(task, Jsonl)
    return task


def one(path: Path, row: Any) -> tuple[Jsonl, Item]:
    task = task_of(path, row)
    return task, task.items()[0]


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        ({"answer": "a wren"}, ["a wren", "A  Wren.", '"a wren"', "**a wren**"], ["wren", "it is a wren", ""]),
        ({"answer": ["a wren", "Wren"]}, ["a wren", "wren!"], ["a mole"]),
        ({"answer": "."}, ["."], ["", "wren"]),
        ({"answer": 1080}, ["1080", "$1,080.00.", "first 7, so 1,080 m"], ["1080 of 7", "80", "-1080", "ten"]),
        ({"answer": "1,080"}, ["1080"], ["1, 080", ""]),
        ({"answer": -0.5}, ["-.5", "-0.50", "so -$0.5"], ["0.5", "3-0.5"]),
        ({"answer": "20%"}, ["20", "20 %"], ["0.2"]),
        ({"answer": [3, "4"]}, ["3", "it is 4"], ["34"]),
        ({"answer": 1e-07}, ["0.0000001"], ["1", "7"]),
        ({"answer": "No", "grader": "contains"}, ["no", "well: NO, sir"], ["I know", ""]),
        ({"answer": "C++", "grader": "contains"}, ["I like C++."], ["I like C+"]),
        ({"answer": "18", "grader": "exact"}, ["18", "18."], ["18.0", "it is 18"]),
        ({"answer": "has 18 legs", "grader": "number"}, ["18", "of 3, 18.0"], ["18 of 3"]),
        ({"answer": r"\b(wren|owl)s?\b", "grader": "regex"}, ["two owls", "a wren"], ["Owl", "wrench"]),
        ({"answer": True, "grader": "exact"}, ["Yes."], ["no", "True"]),
        ({"answer": "word " * 21 + "end", "grader": "contains"}, ["So: " + "Word " * 21 + "END"], ["word"]),
    ],
)
def test_free_text(tmp_path: Path, row: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    task, item = one(tmp_path / "own.jsonl", {"question": "Well?"} | row)
    assert (item.id, item.choices, item.plain) == ("jsonl:1", (), "Question: Well?\nAnswer:")
    assert json.loads(json.dumps(item.answer)) == item.answer
    assert [task.grade(item, reply) for reply in right] == [1.0] * len(right)
    assert [task.grade(item, reply) for reply in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("row", "letter", "texts"),
    [
        ({"answer": "a wren", "choices": ["a mole", "a wren"]}, "B", ["a mole", "a wren"]),
        ({"answer": "A Wren.", "choices": ["a mole", "a wren"], "grader": "choice"}, "B", ["a mole", "a wren"]),
        ({"answer": "C", "choices": ["x", "y", "z"]}, "C", ["x", "y", "z"]),
        ({"answer": "A", "choices": ["B", "A"]}, "B", ["B", "A"]),  # its text goes before its letter
        ({"answer": 2, "choices": ["1", "2", "3"]}, "B", ["1", "2", "3"]),
        ({"answer": True}, "A", ["yes", "no"]),
        ({"answer": False, "grader": "choice"}, "B", ["yes", "no"]),
        ({"answer": False, "choices": ["no", "yes", "perhaps"]}, "A", ["no", "yes", "perhaps"]),
    ],
)
def test_choices(tmp_path: Path, row: dict[str, Any], letter: str, texts: list[str]) -> None:
    task, item = one(tmp_path / "own.jsonl", {"question": "Well?"} | row)
    lines = [f"{'ABC'[n]}. {text}" for n, text in enumerate(texts)]
    asked = "\n".join(["Well?", *lines, "Answer with the letter only."])
    assert (item.messages[0].text, item.answer, item.choices) == (asked, letter, tuple("ABC"[: len(texts)]))
    assert item.plain == f"Question: {asked}\nAnswer:"
    assert [task.grade(item, r) for r in (letter, f"({letter})", "Z", "")] == [1, 1, 0, 0]
    assert chance_of([item]) == 1 / len(texts)
    (conversation,) = task.conversations()
    assert [m.text for m in conversation.messages] == [asked, letter]


def test_one_file_may_mix_graders_and_trains(tmp_path: Path) -> None:
    rows = [
        {"question": "Which bird?", "answer": ["a wren", "wren"], "id": "kept out"},
        {"question": "How many?", "answer": 18.5},
        {"question": "Flies it?", "answer": True},
        {"question": "Why?", "answer": "so " * 30},  # long: to learn from, though no reply can equal it
    ]
    task = task_of(tmp_path / "own.jsonl", *rows)
    replies = [(c.source, c.messages[-1].text) for c in task.conversations()]
    assert replies == [(f"{tmp_path}/own.jsonl:{n}", t) for n, t in enumerate(("a wren", "18.5", "A", "so " * 30), 1)]
    mixed = task_of(tmp_path / "own.jsonl", *rows[:3])
    assert [mixed.grade(i, r) for i, r in zip(mixed.items(), ("wren", "18.50", "A"), strict=True)] == [1, 1, 1]


SHAPE = 'write {"question": ..., "answer": ...}'
NAMES = "exact, number, contains, regex"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, f"no answer; {SHAPE}"),
        ({"answer": None}, f"no answer; {SHAPE}"),
        ({"answer": ""}, f"no answer; {SHAPE}"),
        ({"answer": []}, f"no answer; {SHAPE}"),
        ({"answer": "a wren"}, f"no text under 'question'; {SHAPE}"),
        (["Well?", "a wren"], f"no text under 'question'; {SHAPE}"),
        ({"answer": " "}, "the answer is blank; write it"),
        ({"answer": {"a": 1}}, "the answer {'a': 1} is no text, number, true or false; correct it"),
        ({"answer": ["a", None]}, "the answer None is no text, number, true or false; correct it"),
        ({"answer": float("inf")}, "the answer inf is no text, number, true or false; correct it"),
        (
            {"answer": "(", "grader": "regex"},
            "the answer '(' is no regular expression (missing ), unterminated subpattern at position 0); correct it",
        ),
        ({"answer": "a", "grader": "fuzzy"}, f"unknown grader 'fuzzy'; write one of {NAMES}, choice"),
        ({"answer": "a", "grader": ["exact"]}, f"unknown grader ['exact']; write one of {NAMES}, choice"),
        ({"answer": "a", "grader": "number"}, "the grader is number, and an answer has no number; correct one of them"),
        ({"answer": "a", "grader": "choice"}, 'the grader choice without choices; add "choices": [...]'),
        (
            {"answer": "a", "grader": "exact", "choices": ["a", "b"]},
            "choices with the grader exact; leave one of them out",
        ),
        (
            {"answer": "c", "choices": ["a", "b"]},
            "the answer 'c' is not one of the choices; write its text or its letter",
        ),
        ({"answer": ["a", "b"], "choices": ["a", "b"]}, "2 answers to one choice; give one"),
        ({"answer": "a", "choices": ["a"]}, "the number of choices is 1; give 2 to 26"),
        ({"answer": "a", "choices": list("abcdefghijklmnopqrstuvwxyz.")}, "the number of choices is 27; give 2 to 26"),
        ({"answer": "a", "choices": ["a", "A."]}, "two choices are the same; give every choice its own text"),
        ({"answer": "a", "choices": "ab"}, 'choices that are not a list of texts; write "choices": ["...", "..."]'),
        (
            {"answer": "so " * 21},
            f'an answer of more than 20 words and no grader; add "grader": one of {NAMES}, or shorten it',
        ),
    ],
)
def test_a_bad_row_names_its_line(tmp_path: Path, row: Any, said: str) -> None:
    if isinstance(row, dict) and not said.startswith("no text"):
        row = {"question": "Well?"} | row
    path = tmp_path / "own.jsonl"
    task = task_of(path, {"question": "Fine?", "answer": "yes"}, row)
    with pytest.raises(SchemaError) as caught:
        task.items()
    assert str(caught.value) == f"{path}:2: {said}"


def test_a_pattern_is_not_learned(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    task = task_of(path, {"question": "Well?", "answer": "^a", "grader": "regex"})
    with pytest.raises(SftflowError) as caught:
        task.conversations()
    said = "its answer is a pattern, not a reply to learn; leave the row out of training"
    assert str(caught.value) == f"{path}:1: {said}"


TEXT = st.text(max_size=80)


@given(TEXT, TEXT.filter(str.strip))
def test_graders_never_raise_and_know_their_own_answer(reply: str, answer: str) -> None:
    for name in ("exact", "number", "contains"):
        assert GRADERS[name](reply, answer) in (True, False)
    assert same_text(f"  {answer.upper().lower()} \n", answer.upper().lower())
    assert not same_text(reply, answer) or holds_text(reply, answer)


@given(st.integers(-(10**9), 10**9))
def test_any_number_is_read_in_its_usual_writings(value: int) -> None:
    sign = "-" if value < 0 else ""
    for text in (f"{value}", f"{value:,}", f"{value}.00", f"{sign}${abs(value):,}", f"so {value:,}.", f"{value}%"):
        assert same_number(text, str(value)), text
    assert not same_number(f"{value + 1}", str(value))
    assert parse({"question": "?", "answer": f"{value:,}"}, "x:1").grader == "number"


@pytest.mark.parametrize(("split", "rows"), each([("train", 9427), ("test", 3270)]))
def test_real_boolq(split: str, rows: int) -> None:
    path = outside("multiple_choice", "boolq", f"{split}.jsonl")
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    task = make_task("boolq", TaskSource(path=str(path)))
    items = task.items()
    assert len(items) == len(raw) == rows and task.name == "boolq"
    assert [i.answer for i in items] == ["A" if row["answer"] else "B" for row in raw]
    assert items[0].id == "boolq:1" and chance_of(items) == 0.5
    assert items[0].plain.endswith("\nA. yes\nB. no\nAnswer with the letter only.\nAnswer:")
    for item, conversation in zip(items[:100], task.conversations()[:100], strict=True):
        assert task.grade(item, conversation.messages[1].text) == 1


def test_real_openbookqa() -> None:
    task = make_task("openbookqa", TaskSource(path=str(outside("multiple_choice", "openbookqa", "test.jsonl"))))
    items = task.items()
    assert (len(items), task.name, items[0].id) == (500, "openbookqa", "openbookqa:1")
    assert {i.choices for i in items} == {("A", "B", "C", "D")} and items[0].answer == "B"
