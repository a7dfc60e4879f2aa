"""Held out means held out: no row, nor an equal one, is on both sides. What is lost is said, or is an error."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.templates import STRIPS, open_with
from sftflow.chat.render import Renderer
from sftflow.data.held_out import split_held_out
from sftflow.data.mixture import build_mixture
from sftflow.foundation.errors import DataError
from sftflow.recipe import parse_recipe


def before(digests: np.ndarray, validation: float, seed: str) -> np.ndarray:
    """The choice as runs made it that held no expanded rows."""
    n = len(digests)
    held = np.zeros(n, bool)
    if validation <= 0 or n < 2:
        return held
    wanted = min(int(validation) if validation >= 1 else max(1, round(n * validation)), n // 2)
    order = list(range(n))
    random.Random(seed).shuffle(order)
    for i in order:
        same = digests == digests[i]
        if held.sum() < wanted and not held[i] and held.sum() + same.sum() <= n // 2:
            held |= same
    return held


SHARES = st.one_of(st.floats(0, 0.9), st.integers(1, 20))


@settings(max_examples=100, deadline=None)
@given(digests=st.lists(st.integers(0, 30), max_size=40), validation=SHARES, seed=st.text(max_size=3))
def test_rows_that_do_not_expand_are_chosen_as_before(digests: list[int], validation: float, seed: str) -> None:
    known = np.array(digests, np.uint64)
    numbers = np.arange(1, len(digests) + 1, dtype=np.int32)
    assert split_held_out(known, numbers, validation, seed).tolist() == before(known, validation, seed).tolist()


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4), min_size=1, max_size=20),
    validation=SHARES,
    seed=st.text(max_size=3),
)
def test_all_of_a_row_and_of_equal_rows_is_on_one_side(rows: list[list[int]], validation: float, seed: str) -> None:
    digests = np.array([d for row in rows for d in row], np.uint64)
    numbers = np.array([n for n, row in enumerate(rows, 1) for _ in row], np.int32)
    held = split_held_out(digests, numbers, validation, seed)
    sides: dict[tuple[int, ...], set[bool]] = {}
    for number, row in enumerate(rows, 1):
        sides.setdefault(tuple(row), set()).update(held[numbers == number].tolist())
    assert all(len(side) == 1 for side in sides.values())
    assert held.sum() <= len(held) // 2
    if validation and any(2 * sum(o == r for o in rows) * len(r) <= len(digests) for r in rows):
        assert held.any()


def mixture_of(path: Path, rows: list[Any], renderer: Renderer, **keys: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"max_length": 48, "tokens_per_step": 64, **keys.pop("train", {})}
    return build_mixture(parse_recipe({"mixture": [{"source": str(path)}], "train": train, **keys}, "test"), renderer)


def test_a_conversation_of_several_examples_is_held_out_whole(tmp_path: Path, tokenizer_dir: Path) -> None:
    texts = ["a{}", "<think>hm</think>b{}", "c{}", "<think>so</think>d{}", "e{}", "f{}"]
    rows = [
        {"messages": [{"role": ("user", "assistant")[k % 2], "content": t.format(i)} for k, t in enumerate(texts)]}
        for i in range(12)
    ]
    renderer = open_with(tokenizer_dir, STRIPS.replace("not keep_thoughts", "true"))  # no argument to keep them by
    mixture = mixture_of(
        tmp_path / "d.jsonl", rows, renderer, validation=0.3, train={"max_length": 256, "tokens_per_step": 256}
    )
    numbers = mixture.rows[0].table["number"]
    held, kept = (set(numbers[x.chosen[:, 1]].tolist()) for x in (mixture.held_out, mixture.examples))
    assert mixture.sources[0]["expanded"] == 12 and held and kept and not held & kept


def digests_of(examples: Any, mixture: Any) -> list[int]:
    return [int(mixture.rows[source].table["digest"][row]) for source, row in examples.chosen]


def test_conversations_that_begin_alike_are_held_out_apart(tmp_path: Path, tokenizer_dir: Path) -> None:
    """What they share is trained on, and so is not among the held-out examples."""
    texts = ["hi", "<think>greet</think>hello", "q{}", "<think>so</think>r{}"]
    rows = [
        {"messages": [{"role": ("user", "assistant")[k % 2], "content": t.format(i)} for k, t in enumerate(texts)]}
        for i in range(30)
    ]
    renderer = open_with(tokenizer_dir, STRIPS.replace("not keep_thoughts", "true"))
    mixture = mixture_of(
        tmp_path / "d.jsonl", rows, renderer, validation=0.1, train={"max_length": 256, "tokens_per_step": 256}
    )
    held, taught = digests_of(mixture.held_out, mixture), digests_of(mixture.examples, mixture)
    assert mixture.sources[0]["expanded"] == 30 and len(held) == len(set(held)) == 3 and not set(held) & set(taught)
    assert len(taught) == 60 - 2 * 3 and not mixture.notes()
    numbers = mixture.rows[0].table["number"]
    assert not set(numbers[mixture.held_out.chosen[:, 1]]) & set(numbers[mixture.examples.chosen[:, 1]])


def test_what_another_source_teaches_is_not_held_out(tmp_path: Path, renderer: Renderer) -> None:
    rows = [exchange(i) for i in range(40)]
    for name, some in (("a", rows), ("b", rows[::-1]), ("c", [exchange(i) for i in range(40, 60)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    data = {"mixture": [{"source": str(tmp_path / f"{name}.jsonl")} for name in "abc"], "validation": 0.25}
    mixture = build_mixture(parse_recipe(data, "test"), renderer)
    held = digests_of(mixture.held_out, mixture)
    assert not set(held) & set(digests_of(mixture.examples, mixture))
    assert [source["validation_rows"] for source in mixture.sources] == [2, 2, 5] and len(held) == 9
    assert [source["taught_elsewhere"] for source in mixture.sources] == [8, 8, 0]
    said = "2 of the 10 rows asked for are held out: the others are trained on in other rows, too"
    assert mixture.notes() == [f"a: {said}", f"b: {said}"]


@pytest.mark.parametrize(
    ("n", "kinds", "validation", "said"),
    [
        (1, 1, 0.5, "d: 0 of the 1 row asked for is held out: "),
        (20, 1, 0.1, "d: 0 of the 2 rows asked for are held out: "),
        (20, 20, 100, "d: 10 of the 100 rows asked for are held out: "),
        (20, 20, 12, None),
        (1, 1, 0, None),
    ],
)
def test_far_fewer_held_out_than_asked_is_said(
    n: int, kinds: int, validation: float, said: str | None, tmp_path: Path, renderer: Renderer
) -> None:
    rows = [exchange(i % kinds) for i in range(n)]
    notes = mixture_of(tmp_path / "d.jsonl", rows, renderer, validation=validation).notes()
    why = "equal rows stay on one side, and no more than half of a source is taken"
    assert notes == ([said + why] if said else [])


def exchange(i: int, words: int = 1) -> dict[str, Any]:
    return {"prompt": f"ask {i} " + "tell me " * words, "completion": f"so {i}"}


def test_what_is_lost_is_said_by_source(tmp_path: Path, tokenizer_dir: Path) -> None:
    renderer = open_with(tokenizer_dir, STRIPS)
    turns = [
        m for i in range(9) for m in ({"role": "user", "content": f"a {i}"}, {"role": "assistant", "content": "b"})
    ]
    rows = [*(exchange(i) for i in range(30)), exchange(30, 60), {"messages": turns}, {"messages": 7}]
    mixture = mixture_of(tmp_path / "d.jsonl", rows, renderer, on_bad_row="skip")
    assert mixture.notes() == [
        "d: 1 of 33 rows is longer than max_length 48 and was dropped",
        "d: 1 of 33 rows is longer than max_length 48 and was cut",
        "d: 1 of 33 rows is bad and was skipped",
    ]
    assert mixture_of(tmp_path / "d.jsonl", rows[:30], renderer).notes() == []


def test_more_lost_than_may_be_is_an_error(tmp_path: Path, tokenizer_dir: Path) -> None:
    renderer, rows = open_with(tokenizer_dir, STRIPS), [exchange(0), *(exchange(i, 60) for i in range(1, 4))]
    path = tmp_path / "d.jsonl"
    with pytest.raises(DataError) as caught:
        mixture_of(path, rows, renderer)
    said = f"{path}: 3 of 4 rows are longer than max_length 48 and were dropped, more than max_dropped 0.5 allows; "
    assert str(caught.value).startswith(said) and caught.value.exit_code == 2
    assert mixture_of(path, rows, renderer, max_dropped=0.75).sources[0]["dropped"] == 3
    with pytest.raises(DataError, match="max_dropped 0 allows"):
        mixture_of(path, [*(exchange(i) for i in range(9)), exchange(9, 60)], renderer, max_dropped=0)


def test_rows_that_are_not_to_be_taught_are_counted_and_not_lost(tmp_path: Path, renderer: Renderer) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    muted = [{"messages": turns, "weight": 0}, {"messages": [turns[0], {**turns[1], "weight": 0}]}, exchange(9)]
    rows = [exchange(0), exchange(1), *muted[:2] * 5, {**muted[2], "train": False}]
    mixture = mixture_of(tmp_path / "d.jsonl", rows, renderer, max_dropped=0)
    (source,) = mixture.sources
    assert len(mixture.examples) + len(mixture.held_out) == 2 and (source["dropped"], source["bad"]) == (11, 0)
    assert source["dropped_why"] == {"not taught: weight 0": 11}
    assert mixture.notes() == ["d: 11 of 13 rows are not taught: weight 0"]
    with pytest.raises(DataError, match="1 of 2 rows are longer than max_length 48 and were dropped"):
        mixture_of(tmp_path / "d.jsonl", [*rows[1:], exchange(7, 60)], renderer, max_dropped=0.4)


def test_no_remedy_is_one_that_is_taken_already(tmp_path: Path, renderer: Renderer) -> None:
    path, few = tmp_path / "d.jsonl", [exchange(i) for i in range(39)]

    def remedy(rows: list[Any], **keys: Any) -> str:
        with pytest.raises(DataError) as caught:
            mixture_of(path, rows, renderer, on_bad_row="skip", max_dropped=0, **keys)
        return caught.value.remedy

    long, bad, longer = exchange(39, 60), {"messages": 7}, "raise train.max_length"
    assert remedy([*few, long]) == f"{longer}, set train.overlong: cut_tokens, or raise max_dropped"
    assert remedy([*few, long], train={"overlong": "cut_tokens"}) == f"{longer}, or raise max_dropped"
    assert remedy([*few, bad]) == "mend the bad rows, or raise max_dropped"
    assert (
        remedy([*few, long, bad], train={"overlong": "cut_tokens"})
        == f"{longer}, mend the bad rows, or raise max_dropped"
    )
    assert remedy([*few, *[{"messages": [{"role": "user", "content": "a"}]}] * 9]).startswith(
        "mend or remove these rows: "
    )
