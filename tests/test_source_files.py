"""A source of several files, and held-out rows from files of one's own: what is trained on, kept, and told of them."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from helpers.tiny import make_renderer
from sftflow.chat.render import Renderer
from sftflow.data import prepare
from sftflow.data.mixture import Mixture, build_mixture
from sftflow.data.run_rows import read_held_out, read_training_rows, write_run_rows
from sftflow.foundation.errors import RecipeError, SchemaError
from sftflow.recipe import Recipe, load_recipe, parse_recipe, to_yaml
from sftflow.tasks import TaskSource, make_task

ROWS = [{"prompt": f"ask {i}", "completion": f"tell {i} é"} for i in range(60)]


@pytest.fixture(scope="module")
def renderer(tokenizer_dir: Path) -> Renderer:
    return make_renderer(tokenizer_dir, "sftflow")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare, "BLOCK_ROWS", 16)
    monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / "cache"))


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def in_files(folder: Path) -> Path:
    """ROWS in three files of other kinds, written last first."""
    folder.mkdir()
    with (folder / "c.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS[45:])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[20:45])))
    (folder / "a.jsonl").write_bytes(b"\n" + lines(ROWS[:20]))
    return folder


def place_in(folder: Path, i: int) -> str:
    """Where row `i` stands there."""
    file, line = ("a.jsonl", i + 2) if i < 20 else ("b.jsonl.gz", i - 19) if i < 45 else ("c.csv", i - 43)
    return f"{folder}/{file}:{line}"


def recipe_of(*entries: Any, **keys: Any) -> Recipe:
    mixture = [{"source": str(e)} if isinstance(e, Path) else e for e in entries]
    return parse_recipe({"mixture": mixture, "train": {"max_length": 64, "tokens_per_step": 64}, **keys}, "test")


def places(mixture: Mixture, source: int = 0) -> list[str]:
    return [mixture.rows[source].place(i) for i in range(len(mixture.rows[source]))]


def test_rows_of_several_files_are_those_of_one(renderer: Renderer, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(lines(ROWS))
    folder = in_files(tmp_path / "several")
    for keys in ({}, {"limit": 37}):
        found = [
            build_mixture(recipe_of({"source": str(name), "name": "rows", **keys}, validation=0.2), renderer)
            for name in (tmp_path / "one.jsonl", folder, folder / "*")
        ]
        assert len({mixture.digest() for mixture in found}) == 1
        assert places(found[1]) == places(found[2])
        numbers = [int(place.rpartition(":")[2]) - 1 for place in places(found[0])]
        assert places(found[1]) == [place_in(folder, i) for i in numbers] and len(numbers) == keys.get("limit", 60)


def test_what_is_kept_of_a_run_has_each_row_s_own_file(renderer: Renderer, tmp_path: Path) -> None:
    folder = in_files(tmp_path / "several")
    recipe = recipe_of(folder, validation=0.2)
    mixture = build_mixture(recipe, renderer)
    write_run_rows(tmp_path, mixture, recipe)
    assert {row.conversation.source for row in read_held_out(tmp_path)} < set(places(mixture))
    (kept,) = read_training_rows(tmp_path).sources
    assert [kept.place(i) for i in range(len(kept))] == places(mixture) == [place_in(folder, i) for i in range(60)]


def test_a_bad_row_is_told_by_its_own_file(renderer: Renderer, tmp_path: Path) -> None:
    folder = in_files(tmp_path / "several")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines([*ROWS[20:44], {"prompt": 7}])))
    with pytest.raises(SchemaError, match=r"several/b\.jsonl\.gz:25"):
        build_mixture(recipe_of(folder), renderer)
    mixture = build_mixture(recipe_of(folder, on_bad_row="skip"), renderer)
    assert [row["source"] for row in mixture.bad] == [f"{folder}/b.jsonl.gz:25"]


def test_rows_are_kept_under_all_files_and_their_names(renderer: Renderer, tmp_path: Path) -> None:
    folder = in_files(tmp_path / "several")

    def new() -> bool:
        return build_mixture(recipe_of(folder), renderer).rows[0].new

    assert [new(), new()] == [True, False]
    (folder / "c2.jsonl").write_bytes(lines(ROWS[:1]))
    assert [new(), new()] == [True, False]
    (folder / "c2.jsonl").rename(folder / "a2.jsonl")
    assert [new(), new()] == [True, False]


# ---- validation: {files: [...]}


def test_rows_of_files_of_one_s_own_are_held_out_by_source(renderer: Renderer, tmp_path: Path) -> None:
    for name, rows in {"train": ROWS[:30], "held": ROWS[25:40], "more": ROWS[40:50]}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(lines(rows))
    held, more = str(tmp_path / "held.jsonl"), {"source": str(tmp_path / "more*"), "name": "others", "limit": 7}
    recipe = recipe_of(tmp_path / "train.jsonl", validation={"files": [held, more]})
    mixture = build_mixture(recipe, renderer)
    assert mixture.names == ["train", "held", "others"]
    assert np.bincount(mixture.examples.chosen[:, 0]).tolist() == [30]  # all of the mixture is trained on
    assert np.bincount(mixture.held_out.chosen[:, 0]).tolist() == [0, 10, 7]
    taught = {row["prompt"] for row in ROWS[:30]}
    write_run_rows(tmp_path, mixture, recipe)
    rows = read_held_out(tmp_path)
    assert [row.source for row in rows] == ["held"] * 10 + ["others"] * 7
    assert not taught & {row.conversation.messages[0].text for row in rows}
    assert [kept.sum() for kept in read_training_rows(tmp_path).held_out] == [0, 10, 7]
    ledger = {source["name"]: source for source in mixture.ledger["sources"]}
    assert [ledger[n]["validation_rows"] for n in mixture.names] == [0, 10, 7]
    assert [ledger[n]["rows"] for n in mixture.names] == [30, 0, 0] and ledger["held"]["taught_elsewhere"] == 5
    assert "held: 5 of 15 rows are trained on, too: not held out" in mixture.notes()
    both = build_mixture(recipe_of(tmp_path / "train.jsonl", validation={"files": held, "share": 0.1}), renderer)
    counts = np.bincount(both.held_out.chosen[:, 0]).tolist()
    assert counts[0] == 3 and counts[1] >= 10 and len(both.examples) == 27


def test_budget_and_shares_are_those_of_what_is_trained_on(renderer: Renderer, tmp_path: Path) -> None:
    for name, rows in {"a": ROWS[:30], "b": ROWS[30:50], "held": ROWS[50:]}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(lines(rows))
    entries = [{"source": str(tmp_path / "a.jsonl"), "share": 0.5}, {"source": str(tmp_path / "b.jsonl")}]
    mixture = build_mixture(recipe_of(*entries, validation={"files": str(tmp_path / "held.jsonl")}), renderer)
    a, b, held = mixture.ledger["sources"]
    assert abs(a["share"] - 0.5) < 0.05 and abs(a["share"] + b["share"] - 1) < 1e-5
    assert (held["rows"], held["validation_rows"], "share" in held) == (0, 10, False)


def test_files_of_one_s_own_in_a_recipe(tmp_path: Path) -> None:
    held = '["held/*.jsonl", {source: gsm8k, path: t.jsonl}, hub:o/n]'
    text = f"mixture: [{{source: a.jsonl}}]\nvalidation:\n  files: {held}\n"
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "r.yaml")
    named = [(entry.source, entry.path) for entry in recipe.sources[1:]]
    assert named == [(f"{tmp_path}/held/*.jsonl", None), ("gsm8k", f"{tmp_path}/t.jsonl"), ("hub:o/n", None)]
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        ({"files": []}, "validation.files: "),
        ({"files": [{"source": "a.jsonl", "repeat": 2}]}, "repeat is of rows that are trained on; leave it out"),
        ({"files": 7}, "validation"),
        ({"file": ["a.jsonl"]}, "validation.file: unknown key"),
        ("a.jsonl", "it should be a share below 1, a number of rows, or {files: [...]}"),
        ("a" * 5000, "it should be a share below 1, a number of rows, or {files: [...]} (given: "),
        (["a" * 5000], "; write {files: [...]}"),
        (-1, "validation"),
        (1.5, "1.5 is neither a share below 1 nor a whole number of rows; write one of them"),
        ({"files": ["a.jsonl"], "share": 2.5}, "2.5 is neither a share below 1 nor a whole number of rows"),
        (True, "validation"),
    ],
)
def test_a_wrong_validation_is_named(validation: Any, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_of(Path("a.jsonl"), validation=validation)
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200, str(error.value)


def test_items_of_a_task_over_several_files_have_ids_of_their_own(tmp_path: Path) -> None:
    row = {"question": "2+3?", "answer": "It is 5.\n#### 5"}
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([row, row]))
    for path in (f"{tmp_path}/*.jsonl", str(tmp_path)):
        items = make_task("gsm8k", TaskSource(path=path)).items("test")
        ids = [item.id.rpartition("/")[2].removeprefix("gsm8k:") for item in items]
        assert ids == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"] and items[0].id.startswith("gsm8k:")
    assert make_task("gsm8k", TaskSource(path=f"{tmp_path}/a.jsonl")).items("test")[1].id == "gsm8k:2"
    written = datasets.Dataset.from_list([row])
    datasets.DatasetDict(train=written, test=datasets.Dataset.from_list([row, row])).save_to_disk(tmp_path / "set")
    task = make_task("gsm8k", TaskSource(path=str(tmp_path / "set")))
    assert (len(task.items("test")), len(task.conversations("train"))) == (2, 1)
