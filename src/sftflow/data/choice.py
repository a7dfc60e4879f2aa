"""Which of the rendered rows are trained on, and how often; which are held out, and which are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.data.held_out import n_wanted, split_held_out, told_fewer
from sftflow.data.shares import drawn, share_out, shares_out
from sftflow.data.store import Rows
from sftflow.recipe import Recipe

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What becomes of one source's rows.

    shown: the rows that are trained on, each as often as it is.   held_out: those for the validation loss.
    left_out: (rows,) those of neither side, as they overlap with an evaluation task, or were not drawn.
    taught_elsewhere: how many are of neither side since others like them are trained on.   ledger: what it says of this
    beside the usual.   told: lines of what may surprise.
    """

    shown: Indices
    held_out: Indices
    left_out: NDArray[np.bool_]
    taught_elsewhere: int
    ledger: dict[str, Any]
    told: list[str]


def choose(
    recipe: Recipe, sources: Sequence[Rows], overlapping: Sequence[NDArray[np.bool_]] = (), tasks: Sequence[str] = ()
) -> list[Choice]:
    """overlapping: of each source (rows, tasks), whether a row shall be left out for that evaluation task."""
    seeds, share = [f"{entry.label}:{recipe.train.seed}" for entry in recipe.sources], recipe.held_out_share
    n, tables = len(recipe.mixture), [rows.table for rows in sources]  # the first n are trained on
    apart = [
        split_held_out(t["digest"], t["number"], share, seed) for t, seed in zip(tables[:n], seeds, strict=False)
    ] + [np.ones(len(t), bool) for t in tables[n:]]
    out = [np.asarray(hit.any(axis=1)) for hit in overlapping] or [np.zeros(len(t), bool) for t in tables]
    own = [np.flatnonzero(~(chosen | gone)) for chosen, gone in zip(apart, out, strict=True)]
    taught = np.concatenate([t["digest"][here] for t, here in zip(tables, own, strict=True)])
    held, counts = [0] * len(sources), [0] * len(sources)  # supervised tokens: of all training rows, of those shown
    asked = None
    shown = [np.tile(here, entry.repeat or 1) for here, entry in zip(own, recipe.sources, strict=True)]
    if shares_out(recipe):
        held = _supervised(sources, own)
        asked = share_out(recipe, held[:n])
        all_asked = zip(sources, own, asked, seeds, strict=False)
        shown[:n] = [here[drawn(rows.supervised[here], a.tokens, f"drawn:{seed}")] for rows, here, a, seed in all_asked]
        counts = _supervised(sources, shown)
    choices = []
    for number, (rows, gone) in enumerate(zip(sources, out, strict=True)):
        # an example that is trained on elsewhere, in another conversation or source, is not one that was held out
        both = apart[number] & ~gone
        kept = np.flatnonzero(both & ~np.isin(rows.table["digest"], taught))
        elsewhere = int(both.sum()) - len(kept)
        wanted = n_wanted(len(rows), share) - int((apart[number] & gone).sum())
        fewer = told_fewer(len(kept), int(both.sum()), wanted) if number < n else ""
        if number >= n and elsewhere:
            fewer = f"{elsewhere:,} of {len(rows):,} rows are trained on, too: not held out"
        told, ledger = [f"{rows.name}: {fewer}"] if fewer else [], dict[str, Any]()
        if overlapping:
            by_task = dict(zip(tasks, overlapping[number].sum(axis=0).tolist(), strict=True))
            ledger["decontaminated"] = {"rows": int(gone.sum()), "tasks": by_task}
            if gone.any():
                named = ", ".join(f"{task} ({n:,})" for task, n in by_task.items() if n)
                told.append(f"{rows.name}: {int(gone.sum()):,} of {len(rows):,} rows overlap with {named}: left out")
        if asked is not None and number < n:
            passes = counts[number] / held[number] if held[number] else 0.0
            ledger["asked"] = {"share": round(asked[number].share, 6), "tokens": asked[number].tokens}
            ledger["share"] = round(counts[number] / max(1, sum(counts)), 6)
            ledger["passes"] = round(passes, 4)
            if passes > 1 and recipe.mixture[number].repeat is None:
                of = f"{asked[number].tokens:,} supervised tokens are asked of {held[number]:,}"
                told.append(f"{rows.name}: {of}: {passes:.3g} passes over its rows")
            if held[number] and not counts[number]:
                told.append(f"{rows.name}: no row fits into its share, {asked[number].tokens:,} supervised tokens")
            gone[np.setdiff1d(own[number], shown[number])] = True
        choices.append(
            Choice(
                shown=shown[number],
                held_out=kept,
                left_out=gone,
                taught_elsewhere=elsewhere,
                ledger=ledger,
                told=told,
            )
        )
    return choices


def _supervised(sources: Sequence[Rows], chosen: Sequence[Indices]) -> list[int]:
    """Supervised tokens of some rows of each source."""
    return [int(rows.supervised[some].sum(dtype=np.int64)) for rows, some in zip(sources, chosen, strict=True)]
