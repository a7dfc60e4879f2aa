"""What a run keeps of its data when training starts: enough to compare without the recipe's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.runs import Quiet, digest, write_recipe
from sftflow.checkpoint import prepare, resolve
from sftflow.data import run_rows
from sftflow.data.mixture import Mixture, build_mixture
from sftflow.data.run_rows import HELD_OUT, TRAINING_ROWS, read_held_out, read_training_rows, write_run_rows
from sftflow.foundation.errors import DataError
from sftflow.recipe import Recipe, load_recipe, parse_recipe
from sftflow.training.run import run_training


def mixture_of(base: Path) -> tuple[Recipe, Mixture]:
    """Spelling, and arithmetic, whose replies hold calculator calls; a fifth of each held out."""
    sources = [{"source": "spelling", "limit": 60}, {"source": "arithmetic", "limit": 40, "repeat": 2}]
    settings = {"max_length": 128, "tokens_per_step": 256}
    recipe = parse_recipe({"base": str(base), "mixture": sources, "validation": 0.2, "train": settings}, "test")
    _, _, renderer, _ = prepare(resolve(str(base)))
    return recipe, build_mixture(recipe, renderer)


def test_rows_are_read_back_as_they_were(tiny_base: Path, tmp_path: Path) -> None:
    recipe, mixture = mixture_of(tiny_base)
    write_run_rows(tmp_path, mixture, recipe)
    kept = read_training_rows(tmp_path)
    assert kept.without_ids is None
    for ours, theirs in zip(kept.sources, mixture.rows, strict=True):
        assert (ours.name, ours.number, len(ours)) == (theirs.name, theirs.number, len(theirs))
        for name in ("number", "length", "supervised", "digest"):
            assert np.array_equal(ours.table[name], theirs.table[name])
        for i in range(len(ours)):
            assert np.array_equal(ours.ids(i), theirs.ids(i)) and np.array_equal(ours.mask(i), theirs.mask(i))
            assert ours.place(i) == theirs.place(i)
    marked = [(s, int(row)) for s, held in enumerate(kept.held_out) for row in np.flatnonzero(held)]
    assert marked == [tuple(pair) for pair in mixture.held_out.chosen.tolist()]


def test_held_out_rows_are_conversations_that_render_the_same(tiny_base: Path, tmp_path: Path) -> None:
    recipe, mixture = mixture_of(tiny_base)
    write_run_rows(tmp_path, mixture, recipe)
    rows = read_held_out(tmp_path)
    assert [row.index for row in rows] == [tuple(pair) for pair in mixture.held_out.chosen.tolist()] and len(rows) == 20
    assert any(message.uses_python for row in rows for message in row.conversation.messages)
    for row in rows:
        [(_, rendered)] = mixture.renderer.render_pairs(row.conversation)
        assert np.array_equal(rendered.ids, row.ids) and np.array_equal(rendered.mask, row.mask)
        assert row.conversation.source == mixture.rows[row.index[0]].place(row.index[1])
        assert row.source == mixture.names[row.index[0]]


def test_a_part_of_the_held_out_rows_is_drawn_in_turn_from_each_source(tiny_base: Path, tmp_path: Path) -> None:
    recipe, mixture = mixture_of(tiny_base)
    write_run_rows(tmp_path, mixture, recipe)
    some = read_held_out(tmp_path, 6)
    assert [row.source for row in some] == ["spelling"] * 3 + ["arithmetic"] * 3
    assert {row.index for row in some} < {row.index for row in read_held_out(tmp_path)}


def test_large_mixtures_keep_their_digests_only(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_rows, "MAX_TOKENS", 100)
    recipe, mixture = mixture_of(tiny_base)
    write_run_rows(tmp_path, mixture, recipe)
    kept = read_training_rows(tmp_path)
    assert kept.without_ids is not None and "more than the 100" in kept.without_ids
    assert np.array_equal(kept.sources[1].table["digest"], mixture.rows[1].table["digest"])


def test_training_writes_them_and_the_same_bytes_again(tiny_base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny_base, steps=2))
    found = []
    for _ in range(2):
        run = run_training(recipe, Quiet(), overwrite=True)
        found.append([digest(run.directory / name) for name in (HELD_OUT, TRAINING_ROWS)])
    assert found[0] == found[1] and len(run.losses) == 2
    (tmp_path / "rows.jsonl").unlink()  # the recipe's file is not needed any more
    assert len(read_held_out(run.directory)) == 4 and len(read_training_rows(run.directory).sources[0]) == 81


def test_a_run_of_an_older_version_says_so(tmp_path: Path) -> None:
    for read in (read_held_out, read_training_rows):
        with pytest.raises(DataError, match="missing: deleted, or of a run of an older version"):
            read(tmp_path)
