"""How a mixture's supervised tokens are shared out over its sources, and which rows make up each share.

    key                         what it says
    share: 0.3 (of an entry)    this source's part of all supervised tokens; the others divide what is left by what they
                                hold: the supervised tokens of their training rows, times `repeat`
    mixing_temperature: T       parts in proportion to n^(1/T) of what each holds: 1 as they stand, more: more equal
    tokens: 20M                 supervised tokens of the whole mixture, one epoch of it; parts by the above, or by what
                                each source holds. Left out beside one of the above: as many as there are without a
                                source going through its rows more often than its `repeat` says (else once)
    repeat: 4                   beside one of these: the most passes over a source's rows; more is an error

A source is drawn as whole passes over its rows and a part of one, in an order of the seed's. A row is never cut, so
that a source may be off by less than one row; a larger budget keeps the rows of a smaller one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftflow.foundation.errors import DataError, RecipeError
from sftflow.recipe import Recipe


@dataclass(frozen=True)
class Asked:
    """What a source shall have: its share of all supervised tokens, and how many these are."""

    share: float
    tokens: int


def shares_out(recipe: Recipe) -> bool:
    """Whether the recipe says how many supervised tokens a source shall have, and not just which rows."""
    asks = recipe.tokens is not None or recipe.mixing_temperature is not None
    return asks or any(entry.share is not None for entry in recipe.mixture)


def check_shares(recipe: Recipe) -> None:
    """Raises RecipeError where the shares of a recipe do not fit together."""
    given = {n: entry.share for n, entry in enumerate(recipe.mixture) if entry.share is not None}
    if not given:
        return
    left, total = [entry for entry in recipe.mixture if entry.share is None], round(sum(given.values()), 9)
    place = recipe.origin.place("mixture", max(given), "share")
    if recipe.mixing_temperature is not None:
        place = recipe.origin.place("mixing_temperature")
        raise RecipeError(place, "sources have a share, too, and both say how much each gets", "leave one of them out")
    if total > 1:
        raise RecipeError(place, f"the shares add up to {total:g}", "let them add up to 1, or less")
    if total == 1 and left:
        fact = f"the shares add up to 1, and nothing is left for {left[0].label}"
        raise RecipeError(place, fact, "give it a share, too, or leave it out")
    if total < 1 and not left:
        fact = f"the shares add up to {total:g}, and there is no source without one to take the rest"
        raise RecipeError(place, fact, "let them add up to 1, or leave the share of one source out")


def share_out(recipe: Recipe, tokens: Sequence[int]) -> list[Asked]:
    """What each source of the mixture shall have.   tokens: supervised ones of its training rows, each row once.

    Raises DataError where a source has none to make its share of, or would go through its rows more often than it may.
    """
    check_shares(recipe)
    entries = recipe.mixture
    holds = np.array([n * (e.repeat or 1) for n, e in zip(tokens, entries, strict=True)], np.float64)
    weight = holds / (holds.max() or 1.0)  # of the largest, so that no power of it is too large a number
    if recipe.mixing_temperature is not None:
        weight = weight ** (1 / recipe.mixing_temperature)
    given = np.array([e.share or 0.0 for e in entries])
    rest = np.where(given > 0, 0.0, weight)
    share = given + (1 - given.sum()) * rest / (rest.sum() or 1.0)
    for n, entry in enumerate(entries):
        if not tokens[n] and (entry.share or (not rest.sum() and given.sum() < 1)):
            place = recipe.origin.place("mixture", n, "share" if entry.share else "source")
            raise DataError(place, f"{entry.label} has no supervised token to make its share of", "leave it out")
    bound = np.array([recipe.tokens is None or e.repeat is not None for e in entries])
    most = np.where(bound, holds, np.inf)  # supervised tokens that a source may have
    fits = int(np.floor((most[share > 0] / share[share > 0]).min() + 1e-6)) if (bound & (share > 0)).any() else 0
    total = recipe.tokens or fits
    ends = np.floor(np.cumsum([0.0, *share]) * total + 0.5).astype(np.int64)
    asked = []
    for n, (entry, part, of_all) in enumerate(zip(entries, share.tolist(), np.diff(ends).tolist(), strict=True)):
        if of_all > most[n] + 1:
            fact = f"{part:.4g} of {total:,} supervised tokens are {of_all / tokens[n]:.3g} passes over {entry.label}"
            place = recipe.origin.place("mixture", n, "repeat")
            raise DataError(place, fact, f"raise repeat, leave it out, or lower tokens to {fits}")
        asked.append(Asked(part, int(min(of_all, most[n]))))
    return asked


def drawn(supervised: NDArray[np.int32], tokens: int, seed: str) -> NDArray[np.int64]:
    """Rows of a source that have so many supervised tokens, as near as whole rows come: indices, each as often as it is
    trained on.   supervised: tokens of each row.

    >>> len(drawn(np.array([5, 5, 5], np.int32), 24, "seed"))
    5
    """
    n, whole = len(supervised), int(supervised.sum(dtype=np.int64))
    passes, left = divmod(tokens, whole) if whole else (0, 0)
    order = list(range(n))
    random.Random(seed).shuffle(order)
    ends = np.cumsum([0, *supervised[order].tolist()], dtype=np.int64)
    part = order[: int(np.abs(ends - left).argmin())]
    return np.concatenate([np.tile(np.arange(n), passes), np.sort(np.array(part, np.int64))])
