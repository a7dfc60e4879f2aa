"""Tasks: train and test are disjoint, and every task's own training replies get full marks from its grader."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from sftflow.foundation.errors import TaskError
from sftflow.tasks import GENERATED, TaskSource, make_task
from sftflow.tasks.formatting import CHECKS
from sftflow.tasks.task import load_data


@pytest.mark.parametrize("name", GENERATED)
def test_train_and_test_questions_are_disjoint(name: str) -> None:
    task = make_task(name, TaskSource(seed=3))
    asked = {c.messages[0].text.lower() for c in task.conversations("train")}
    held = [i.messages[0].text.lower() for i in task.items("test")]
    assert held and not asked & set(held)


@pytest.mark.parametrize("name", GENERATED)
def test_no_question_stands_inside_one_of_the_other_split(name: str) -> None:
    """By lower-case words, whatever the seeds: "What is an MLP?" is part of "I am new to this. What is an MLP?"."""

    def words(text: str) -> list[str]:
        return re.findall(r"[^\W_]+|[+*/-]", text.lower())  # 84 - 3 is not 84 / 3

    def runs(question: list[str]) -> set[str]:
        n = len(question)
        return {" ".join(question[i:j]) for i in range(n) for j in range(i + 1, n + 1)}

    rows = [c for seed in (0, 1, 2) for c in make_task(name, TaskSource(seed=seed)).conversations("train")]
    trained = {" ".join(words(c.messages[0].text)): words(c.messages[0].text) for c in rows}
    inside_trained = set().union(*map(runs, trained.values()))
    for seed in (0, 5):
        held = [words(i.messages[0].text) for i in make_task(name, TaskSource(seed=seed)).items("test")]
        assert not [q for q in held if " ".join(q) in inside_trained]
        assert not [q for q in held if len(q) >= 4 and runs(q) & trained.keys()]


def test_as_many_held_out_items_as_asked_for() -> None:
    limits = {"identity": 40, "concepts": 452, "formatting": 100}
    for name, limit in limits.items():
        assert len(make_task(name, TaskSource(limit=limit)).items()) == limit
    kinds = Counter(i.answer["kind"] for i in make_task("formatting", TaskSource(limit=100)).items())
    assert len(kinds) == len(CHECKS) and min(kinds.values()) >= 10


@pytest.mark.parametrize("name", GENERATED)
def test_deterministic_and_limited(name: str) -> None:
    one, two = (make_task(name, TaskSource(seed=1, limit=20)) for _ in range(2))
    assert one.conversations() == two.conversations() and len(one.conversations()) == 20
    assert one.items() == two.items() and 0 < len(one.items()) <= 20
    assert make_task(name, TaskSource(seed=2, limit=20)).conversations() != one.conversations()


@pytest.mark.parametrize("name", GENERATED)
def test_the_right_reply_scores_and_a_wrong_one_does_not(name: str) -> None:
    """Held-out items graded with the reply their own maker writes for them (text parts only, as the engine shows)."""
    task = make_task(name, TaskSource(seed=1))
    answers = {c.messages[0].text: c.messages[1] for c in task.conversations("test")}
    graded = 0
    for item in task.items("test"):
        gold = answers.get(item.messages[0].text)
        if gold is None:
            continue
        text = "".join(p.text for p in gold.parts if p.kind == "text")
        assert task.grade(item, text) == 1.0, (item, text)
        assert task.grade(item, "I do not know") == 0.0, item
        assert task.grade(item, "") == 0.0
        graded += 1
    assert graded > 5 or name in ("spelling", "spelling_bee", "arithmetic", "formatting")


def test_spelling_words_are_disjoint_and_letters_are_right() -> None:
    spelling = make_task("spelling", TaskSource(seed=0))
    trained = {"".join(c.messages[1].text.split()) for c in spelling.conversations()}
    for item in spelling.items():
        word = "".join(item.answer.split())
        assert word not in trained and word in item.messages[0].text
        assert spelling.grade(item, item.answer) == 1 == spelling.grade(item, "-".join(word))
        assert spelling.grade(item, word) == 0  # not spelled out


def test_arithmetic_is_right() -> None:
    for conversation in make_task("arithmetic", TaskSource(limit=300)).conversations():
        call, output, text = conversation.messages[1].parts
        assert str(eval(call.text)).removesuffix(".0") == output.text
        assert text.text == f"The answer is {output.text}."


def test_concepts_meet_the_contract() -> None:
    entries = load_data("concepts.jsonl")
    assert len(entries) >= 150
    questions = {q for e in entries for q in e["train"] + e["held_out"]}
    assert {
        "Explain tokenization for a first-year student",
        "What is self-attention?",
        "What is a KV cache?",
        "Why is the sky blue?",
        "What is the difference between a base model and a chat-SFT model?",
    } <= questions
    for e in entries:
        for group in e["keys"]:
            assert group[0] in e["answer"].lower()


@pytest.mark.parametrize(
    ("kind", "need", "good", "bad"),
    [
        ("bullets", {"n": 2}, "- a\n- b", "- a\n- b\n- c"),
        ("bullets", {"n": 2}, "* a\n\n* b", "a\nb"),
        ("commas", {"n": 3}, "a, b, c", "a, b, b"),
        ("json", {"keys": ["a", "b"]}, '{"b": 1, "a": 2}', '{"a": 1}'),
        ("json", {"keys": ["a"]}, '{"a": 1}', "a: 1"),
        ("one_word", {"answer": "green"}, "Green.", "It is green"),
        ("capitals", {}, "BLUE SKY", "Blue"),
        ("ends_with", {"word": "done"}, "Cats sleep. Done.", "done"),
    ],
)
def test_checkers(kind: str, need: dict[str, object], good: str, bad: str) -> None:
    assert CHECKS[kind](need, good) and not CHECKS[kind](need, bad)


def test_identity_follows_the_recipe() -> None:
    task = make_task("identity", TaskSource(options={"identity": {"name": "Zed", "maker": "Acme"}}))
    texts = [c.messages[1].text for c in task.conversations()]
    assert any("Zed" in t for t in texts) and any("Acme" in t for t in texts)
    assert not any("Pico" in t or "{" in t for t in texts)


def test_unknown_task_names_its_neighbour() -> None:
    with pytest.raises(TaskError, match="did you mean 'spelling'"):
        make_task("speling", TaskSource())
    with pytest.raises(TaskError, match="needs a path"):
        make_task("gsm8k", TaskSource())
    with pytest.raises(TaskError, match="no such file"):
        make_task("gsm8k", TaskSource(path="nowhere.jsonl"))
