"""Tasks: train and test are disjoint, and every task's own training replies get full marks from its grader."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import sftflow as sf
from sftflow.chat.schema import text_message
from sftflow.fingerprint import hash_json
from sftflow.foundation.errors import TaskError
from sftflow.recipe import load_recipe
from sftflow.tasks import GENERATED, TASKS, Item, TaskSource, make_task
from sftflow.tasks.formatting import CHECKS
from sftflow.tasks.identity import identity_of
from sftflow.tasks.published import PUBLISHED
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
    answers = {c.messages[:-1]: c.messages[-1] for c in task.conversations("test")}
    graded = 0
    for item in task.items("test"):
        gold = answers.get(item.messages)
        if gold is None:
            continue
        text = "".join(p.text for p in gold.parts if p.kind == "text")
        assert task.grade(item, text) == 1.0, (item, text)
        assert task.grade(item, "I do not know") == 0.0, item
        assert task.grade(item, "") == 0.0
        graded += 1
    assert graded > 5 or name in ("spelling", "spelling_bee", "arithmetic", "formatting")


def user_texts(rows: Iterable[Any]) -> list[str]:
    return [m.text for row in rows for m in row.messages if m.role == "user"]


def dialogues(split: str) -> list[Any]:
    """Rows of three seeds."""
    return [c for seed in (0, 1, 2) for c in make_task("dialogue", TaskSource(seed=seed)).conversations(split)]


def test_lists_of_dialogues_are_disjoint() -> None:
    """Names, topics and wordings: no entry of one part is in the other one, or inside an entry of it."""
    pairs = []

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and set(value) == {"train", "held_out"}:
            texts = [[t if isinstance(t, str) else t[0] for t in value[part]] for part in ("train", "held_out")]
            pairs.append((path, *([" ".join(re.findall(r"[\w{}']+", t.lower())) for t in part] for part in texts)))
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}")

    walk(load_data("dialogue.json"), "")
    assert len(pairs) == 5 * 4 + 6
    for path, trained, held in pairs:
        assert trained and held and len({*trained, *held}) == len(trained) + len(held), path
        sentences = not path.endswith(("topics", "names"))  # "grandmother" may be of the same letters as "mother"
        inside = [(t, h) for t in trained for h in held if sentences and (f" {t} " in f" {h} " or f" {h} " in f" {t} ")]
        assert not inside, path


def test_values_and_topics_of_held_out_dialogues_are_never_trained_on() -> None:
    data = load_data("dialogue.json")
    trained = {w for text in user_texts(dialogues("train")) for w in re.findall(r"[\w']+", text.lower())}
    items = [i for seed in (0, 1, 2) for i in make_task("dialogue", TaskSource(seed=seed)).items()]
    values = {v.lower() for i in items for v in (i.answer["says"], *i.answer["not"])}
    assert len(values) > 300 and not [v for v in values if all(w in trained for w in v.split())]
    topics = {t.partition("/")[0] for kind in data["kinds"].values() for t in kind["topics"]["held_out"]}
    rows = " | ".join(m.text.lower() for c in dialogues("train") for m in c.messages)
    assert not [t for t in topics if re.search(rf"\b{t}\b", rows)]
    assert {"cat", "pepper", "ginger"} <= topics | values and not {"cat", "pepper", "ginger"} & trained


def test_the_names_of_the_fixed_prompts_are_in_no_training_row() -> None:
    """Pepper, of `remember-pet-name`, and Ginger: in no row that a built-in task makes."""
    rows = (c for name in GENERATED for c in make_task(name, TaskSource()).conversations())
    assert not [c.source for c in rows for m in c.messages if re.search(r"Pepper|Ginger", m.text)]


def test_a_held_out_dialogue_can_be_answered_from_what_the_user_said() -> None:
    kinds, shapes = Counter(), Counter()
    for item in make_task("dialogue", TaskSource(seed=4)).items():
        says, others = item.answer["says"], item.answer["not"]
        roles = [m.role for m in item.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] and len(roles) in (3, 5, 7)
        told = [m.text for m in item.messages[:-1] if m.role == "user" and says.lower() in m.text.lower()]
        assert len(told) == 1 and says not in item.messages[-1].text and says not in others
        corrected = [o for o in others if o in told[0] and re.search(r"Sorry|wrong|replace|Correction", told[0])]
        kinds[item.id.split(":")[2]] += 1
        shapes["corrected"] += bool(corrected)
        shapes["a choice"] += len(others) > len(corrected)
        shapes["turns", len(roles) // 2 + 1] += 1
    assert len(kinds) == 5 and min(kinds.values()) > 10
    assert min(shapes.values()) > 20 and {("turns", n) for n in (2, 3, 4)} < shapes.keys()


PEPPER = Item(
    id="",
    messages=tuple(
        text_message(*turn)
        for turn in (
            ("user", "My cat is called Pepper. My dog is called Tip."),
            ("assistant", "Okay, I have noted it."),
            ("user", "Sorry, her name is Ginger, not Pepper."),
            ("assistant", "Okay, I have corrected it."),
            ("user", "What is my cat called?"),
        )
    ),
    answer={"says": "Ginger", "not": ["Pepper", "Tip"]},
)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Your cat is called Ginger.", 1),
        ("ginger", 1),
        ("Her name is **Ginger**!", 1),
        ("I remember it: Ginger. Is there anything else?", 1),
        ("No problem. It\u2019s \u201cGinger\u201d, as you told me.", 1),
        ("<think>Pepper? No, she said Ginger.</think>Ginger", 1),
        ("Your cat is called Pepper.", 0),
        ("Your cat is called Ginger, not Pepper.", 0),
        ("Ginger or Pepper.", 0),
        ("Your cat is called Ginger. Your dog is called Tip.", 0),
        ("Your cat is called Gingerbread.", 0),
        ("Sorry, her name is Ginger, not Pepper.", 0),
        ("What is my cat called? Ginger.", 0),
        ("Is your cat called Ginger?", 0),
        ("Your cat is not called Ginger.", 0),
        ("It isn\u2019t Ginger.", 0),
        ("My cat is called Ginger.", 0),
        ("Ginger" + " is a man who is a man" * 9, 0),
        ("I do not know.", 0),
        ("", 0),
    ],
)
def test_replies_to_a_dialogue(reply: str, score: int) -> None:
    assert make_task("dialogue", TaskSource()).grade(PEPPER, reply) == score


def test_a_base_is_asked_a_dialogue_as_one() -> None:
    assert PEPPER.plain.startswith("Question: My cat is called Pepper. My dog is called Tip.\nAnswer: Okay, I")
    assert PEPPER.plain.endswith("\nAnswer: Okay, I have corrected it.\nQuestion: What is my cat called?\nAnswer:")


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


def said_of(**keys: object) -> tuple[str, list[str], list[list[str]]]:
    """All texts of an identity, those about what it can do, and what replies to such questions must have."""
    recipe = {"identity": {"name": "Zed", "maker": "Acme"}, "mixture": [], **keys}
    task = make_task("identity", TaskSource(options={"identity": identity_of(recipe)}))
    rows = [(c.messages[0].text, c.messages[1].text) for c in task.conversations()]
    about = [reply for question, reply in rows if question == "What can you do?"]
    items = [i for i in task.items() if ":what:" in i.id]
    assert all(task.grade(item, about[0]) == 1 for item in items)
    return " ".join(reply for _, reply in rows), about, [i.answer for i in items]


def test_an_identity_claims_what_the_recipe_trains() -> None:
    claims = ("spell", "count", "arithmetic", "calculator", "language models", "word problems")
    of_demo = [{"source": s} for s in ("concepts", "arithmetic", "spelling_bee", "spelling", "dialogue", "identity")]
    every, about, needs = said_of(mixture=of_demo, base="builtin:tiny")
    assert about[0].endswith("count letters, do arithmetic with a calculator and explain how language models work.")
    assert needs[0] == ["spell", "count", "arithmetic", "language models"] and "a small chat assistant" in every
    own = [{"source": "identity"}, {"source": "data.jsonl"}, {"source": "t.py:x"}]
    every, about, needs = said_of(mixture=own, base="big")
    assert not any(claim in every.replace("language model ", "") for claim in (*claims, "small", "tiny", "short"))
    assert needs[0] == ["Zed"] and "Zed" in about[0] and "{" not in every
    every, about, needs = said_of(mixture=[{"source": "gsm8k", "path": "x"}], base="big")
    assert "solve word problems." in about[0] and "spell" not in every and needs[0] == ["word problems"]
    every, about, needs = said_of(identity={"name": "Zed", "maker": "Acme", "skills": ["find books", "lend them"]})
    assert "find books and lend them." in about[0] and needs[0] == ["find books", "lend them"]


def test_the_demo_s_assistant_says_what_it_said() -> None:
    """Its recipe trains all that it claims, so its rows are those of earlier versions."""
    recipe = load_recipe(Path(str(resources.files("sftflow.recipes"))) / "demo.yaml")
    options = {"identity": identity_of(recipe.model_dump(mode="json"))}
    rows = [c.to_row() for c in make_task("identity", TaskSource(options=options)).conversations()]
    assert hash_json(rows) == "6b616632023a3a28"
    assert "spell" not in json.dumps(list(sf.read(sf.task("identity"))))


def test_unknown_task_names_its_neighbour() -> None:
    with pytest.raises(TaskError, match="did you mean 'spelling'"):
        make_task("speling", TaskSource())
    with pytest.raises(TaskError, match="needs a path"):
        make_task("gsm8k", TaskSource())
    with pytest.raises(TaskError, match="; it is published as train"):
        make_task("gsm8k", TaskSource(path="nowhere.jsonl"))
    assert set(PUBLISHED) == set(TASKS) - set(GENERATED) - {"jsonl"}
