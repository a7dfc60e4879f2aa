"""Evaluation items in training rows: known copies are found, near misses are not, and it is what `sftflow mix` says."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.outside import outside
from sftflow.checkpoint import open_renderer, resolve
from sftflow.data.audit import audit, item_parts
from sftflow.data.mixture import Mixture, build_mixture
from sftflow.data.run_rows import write_run_rows
from sftflow.evaluation.contamination import contamination, contamination_of_run
from sftflow.evaluation.options import EvalTask, open_tasks
from sftflow.foundation.errors import DataError
from sftflow.recipe import Recipe, parse_recipe

NOUNS = ["apples", "pears", "books", "cups", "lamps", "chairs", "stones", "shells", "boats", "coins", "kites", "drums"]


def question(rng: random.Random, words: int = 24) -> str:
    return " ".join(rng.choice(NOUNS) + str(rng.randint(100, 999)) for _ in range(words)) + "?"


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def shares(a: str, b: str, n: int = 13) -> bool:
    """The oracle: n words in a row of one text stand in the other."""
    x, y = words_of(a), words_of(b)
    runs = {tuple(x[i : i + n]) for i in range(len(x) - n + 1)}
    return any(tuple(y[i : i + n]) in runs for i in range(len(y) - n + 1))


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Recipe:
    """30 training questions, and a test set of 12: a copy, a copy in another dress, 13 words of one, 12 words of one,
    a short one, and new ones."""
    rng = random.Random(1)
    train = [question(rng) for _ in range(30)]
    rest = [question(rng) for _ in range(7)]
    test = [
        train[3],
        train[4].upper().replace(" ", ", "),
        question(rng, 6) + " " + " ".join(words_of(train[5])[2:15]) + " " + question(rng, 4),
        question(rng, 6) + " " + " ".join(words_of(train[6])[2:14]) + " " + question(rng, 4),
        "Why?",
        *rest,
    ]
    lines(tmp_path / "train.jsonl", [{"prompt": q, "completion": f"{n}."} for n, q in enumerate(train)])
    lines(
        tmp_path / "other.jsonl",
        [{"prompt": question(rng), "completion": "Yes."}, {"prompt": train[3], "completion": "No."}],
    )
    lines(tmp_path / "test.jsonl", [{"question": q, "answer": f"It is so.\n#### {n}"} for n, q in enumerate(test)])
    sources = [{"source": str(tmp_path / name)} for name in ("train.jsonl", "other.jsonl")]
    return parse_recipe({"base": str(tiny_base), "mixture": sources, "train": {"max_length": 256}}, "test")


@pytest.fixture
def runs(recipe: Recipe, tmp_path: Path) -> list[EvalTask]:
    return open_tasks([f"gsm8k={tmp_path / 'test.jsonl'}", "spelling"], 12)


@pytest.fixture
def mixture(recipe: Recipe) -> Mixture:
    return build_mixture(recipe, open_renderer(resolve(recipe.base), recipe.format))


def test_copies_are_found_and_near_misses_are_not(runs: list[EvalTask], mixture: Mixture, tmp_path: Path) -> None:
    got = contamination(runs, mixture.rows, mixture.renderer)
    items = runs[0].items
    train = [json.loads(x)["prompt"] for x in (tmp_path / "train.jsonl").read_text().splitlines()]
    wanted = {i.id for i in items if any(shares(i.messages[0].text, t) for t in train)}
    assert len(wanted) == 3
    found = got["gsm8k"]
    assert (found.ngram, found.items, found.contaminated, found.share) == (13, 12, 3, 0.25)
    assert found.unchecked == 1  # the question of one word
    assert {e.item for e in found.examples} == wanted
    for e in found.examples:
        (item,) = [i for i in items if i.id == e.item]
        line = int(e.place.rpartition(":")[2])
        row = (tmp_path / f"{e.source}.jsonl").read_text().splitlines()[line - 1]
        assert e.words in " ".join(words_of(item.messages[0].text))
        assert e.words in " ".join(words_of(json.loads(row)["prompt"]))
    assert {e.source for e in found.examples} == {"train", "other"}
    assert got["spelling"].contaminated == 0 and got["spelling"].items == 12


def test_it_is_what_the_audit_says(runs: list[EvalTask], mixture: Mixture) -> None:
    backend = mixture.renderer.tokenizer.backend_tokenizer
    whole = audit(
        mixture.rows,
        lambda ids: backend.decode_batch(ids, skip_special_tokens=True),
        eval_sets={run.name: [item_parts(item) for item in run.items] for run in runs},
        control=mixture.renderer.special,
    ).to_json()["overlap"]
    got = contamination(runs, mixture.rows, mixture.renderer)
    for task, entry in got.items():
        for key in ("ngram", "items", "contaminated", "share", "unchecked"):
            assert getattr(entry, key) == whole[task][key]
        assert [e.words for e in entry.examples] == [e["words"] for e in whole[task]["examples"]]


def test_a_run_is_checked_by_the_rows_that_it_holds(
    runs: list[EvalTask], mixture: Mixture, recipe: Recipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_run_rows(run, mixture, recipe)
    (tmp_path / "other.jsonl").unlink()
    assert contamination_of_run(runs, run, mixture.renderer) == contamination(runs, mixture.rows, mixture.renderer)
    (run / "training_rows.npz").unlink()
    with pytest.raises(DataError, match=r"training_rows\.npz: missing: deleted, or of a run of an older version"):
        contamination_of_run(runs, run, mixture.renderer)


def test_a_run_of_too_many_rows_to_keep_says_so(
    runs: list[EvalTask], mixture: Mixture, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftflow.data.run_rows.MAX_TOKENS", 100)
    write_run_rows(tmp_path, mixture, recipe)
    with pytest.raises(DataError, match=r"training_rows\.npz: more than the 100 tokens that are kept"):
        contamination_of_run(runs, tmp_path, mixture.renderer)


def test_no_tasks_is_no_work(mixture: Mixture) -> None:
    assert contamination([], mixture.rows, mixture.renderer) == {}


def test_the_real_test_questions_stand_in_their_own_set(tiny_base: Path, tmp_path: Path) -> None:
    test = outside("gsm8k", "test.jsonl")
    rows = test.read_text().splitlines()[:40]
    data = tmp_path / "leak.jsonl"
    data.write_text("\n".join(rows) + "\n")
    recipe = parse_recipe(
        {
            "base": str(tiny_base),
            "mixture": [{"source": "gsm8k", "path": str(data)}],
            "train": {"max_length": 2048, "tokens_per_step": 2048},
        },
        "test",
    )
    mixture = build_mixture(recipe, open_renderer(resolve(recipe.base), recipe.format))
    (run,) = open_tasks([f"gsm8k={data}"], None)
    found = contamination([run], mixture.rows, mixture.renderer)["gsm8k"]
    assert found.items == 40 and found.contaminated + found.unchecked == 40
    assert found.contaminated >= 39
