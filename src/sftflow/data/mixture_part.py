"""One part of a mixture, rendered for whoever builds the whole later: `sftflow mix RECIPE --part I/N`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftflow.chat.render import Renderer
from sftflow.data.mixture import training_renderer
from sftflow.data.parts import PROVEN, Part, name_of, told_numbers
from sftflow.data.prepare import Progress, prepare_part
from sftflow.data.row_cache import shared_cache
from sftflow.data.sources import pinned_recipe
from sftflow.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PreparedPart:
    """A part of a mixture that is in the cache.

    rows, tokens, supervised_tokens: of its training sequences, None where the whole mixture is there, joined already.
    ready: which parts are there.   folder: where.   seconds: what preparing it took.
    """

    part: Part
    rows: int | None
    tokens: int | None
    supervised_tokens: int | None
    ready: list[int]
    folder: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        of = {"part": self.part.number, "of": self.part.of}
        rest = {key: value for key, value in vars(self).items() if key != "part"}
        return {**of, **rest, "folder": str(self.folder), "seconds": round(self.seconds, 3)}

    def __str__(self) -> str:
        if self.rows is None:
            return f"{self.part}: nothing is left to do, all rows are in {self.folder}"
        n, of = len(self.ready), self.part.of
        missing = [Part(i, of) for i in range(1, of + 1) if i not in self.ready]
        there = f"{n:,} of {of:,} parts {'is' if n == 1 else 'are'} ready"
        there += f" (missing: {told_numbers(missing)})" if missing else ": sftflow mix and train join them"
        return f"{self.part}: {self.rows:,} rows, {self.tokens:,} tokens in {self.seconds:.1f} s; {there}"


def build_part(recipe: Recipe, renderer: Renderer, part: Part, progress: Progress) -> PreparedPart:
    """Render a part of every source's rows into the cache, each row verified, for whoever builds the mixture later.

    Raises DataError where the cache cannot be written, or a source's rows are not kept, and the first bad row's error
    (on_bad_row: stop)."""
    started, folder = time.perf_counter(), shared_cache()
    recipe = pinned_recipe(recipe)
    renderer = training_renderer(recipe, renderer)
    made = [prepare_part(e, n, recipe, renderer, part, folder, progress) for n, e in enumerate(recipe.sources)]
    names = {path.name for path in folder.iterdir()}

    def is_ready(number: int) -> bool:
        return all({f"{key}{PROVEN}", name_of(key, Part(number, part.of))} & names for key, _ in made)

    found = {key: meta for key, meta in made if meta is not None}
    counts = [sum(m[k] for m in found.values()) if found else None for k in ("rows", "tokens", "supervised_tokens")]
    return PreparedPart(
        part=part,
        rows=counts[0],
        tokens=counts[1],
        supervised_tokens=counts[2],
        ready=[number for number in range(1, part.of + 1) if is_ready(number)],
        folder=folder,
        seconds=time.perf_counter() - started,
    )
