"""What a parity certificate lets pass: near ties that are ones, and log-probabilities that were compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from sftflow.exporting.bounds import difference_of, parting_of
from sftflow.exporting.llamacpp import Continuation

STOP = 7


def written(*tokens: int, stopped: bool = False) -> Continuation:
    return Continuation(tokens=list(tokens), logprobs=[{} for _ in tokens], stopped=stopped)


def likeliest(*places: dict[int, float]) -> torch.Tensor:
    """(places, 8) log-probabilities; what is not named is far away."""
    out = torch.full((len(places), 8), -9.0)
    for row, named in zip(out, places, strict=True):
        for token, value in named.items():
            row[token] = value
    return out


TIE = {1: -0.70000, 2: -0.70005, STOP: -0.70002}


@pytest.mark.parametrize(
    ("theirs", "mine", "places", "found"),
    [
        ((1, 3), [1, 3], [TIE, {3: -0.1}, {STOP: -0.1}], ("", 0, 0)),
        ((2, 3), [1, 4], [TIE, {3: -0.1}, {STOP: -0.1}], ("", 1, 1)),
        ((1, 3), [], [TIE, {3: -0.1}, {STOP: -0.1}], ("", 1, 1)),  # its end is one of the two
        ((2, 3), [2, 3], [TIE, {3: -0.1}, {STOP: -0.1}], ("", 1, 0)),  # a tie that both decided alike
        ((2, 5), [2, 3], [TIE, {3: -0.1}, {}], ("token 1: llama.cpp 5, sftflow 3, transformers 3", 1, 0)),
        ((5, 3), [1, 3], [TIE, {3: -0.1}, {STOP: -0.1}], ("token 0: llama.cpp 5, sftflow 1, transformers 1", 0, 0)),
        ((1, 3), [5, 3], [TIE, {3: -0.1}, {STOP: -0.1}], ("token 0: llama.cpp 1, sftflow 5, transformers 1", 0, 0)),
    ],
)  # fmt: skip
def test_a_near_tie_is_between_the_two_that_are_near(
    theirs: Sequence[int], mine: list[int], places: list[dict[int, float]], found: tuple[str, int, int]
) -> None:
    assert parting_of(written(*theirs, stopped=True), likeliest(*places), (mine, True), [STOP]) == found


def test_log_probabilities_that_were_not_compared_are_counted() -> None:
    rows = likeliest({1: -0.5}, {2: -0.5}, {3: -0.5})
    told: list[dict[int, float]] = [{1: -0.25, 2: -9.0}, {}]
    assert difference_of(rows, Continuation(tokens=[1, 2], logprobs=told, stopped=False)) == (0.25, 1)
    assert difference_of(rows, written(1, 2)) == (0.0, 0)
    for value in (math.nan, -math.inf):
        told = [{1: value}, {2: -0.5}]
        assert difference_of(rows, Continuation(tokens=[1, 2], logprobs=told, stopped=False)) == (math.inf, 2)
