"""The mixture of a run of several ranks: one of them renders, on all cores of its machine, and the others read that.

Of machines that share the cache one renders for all; else one rank of each does, at the same time.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path

from sftflow.chat.render import Renderer
from sftflow.data.decontaminate import EvalSets
from sftflow.data.mixture import Mixture, build_mixture
from sftflow.data.prepare import Progress
from sftflow.foundation.cache import cache_folder
from sftflow.foundation.ranks import Ranks, ranks
from sftflow.recipe import Recipe


def rendered_once(
    recipe: Recipe, renderer: Renderer, progress: Progress | None, eval_sets: EvalSets | None = None
) -> Mixture:
    """As `build_mixture`. All ranks must come here; what the rendering rank refuses ends the others with it."""
    here = ranks()
    source = rendering_rank(here, here.gather(here.local_rank))
    with here.patient() as gather:
        built = build_mixture(recipe, renderer, progress, eval_sets=eval_sets) if source == here.rank else None
        found = gather(None if built is None else built.prepared())[source]
    return built or build_mixture(recipe, renderer, prepared=found, eval_sets=eval_sets)


def rendering_rank(here: Ranks, local_ranks: list[int]) -> int:
    """Which rank renders for this one: the first of its machine, or rank 0 where both have one cache."""
    first = here.rank - here.local_rank
    if local_ranks.count(0) == 1:
        return first
    mark = here.from_first(_mark() if here.first else None)
    seen = here.gather(mark is not None and mark.parent == cache_folder() and mark.exists())
    if here.first and mark is not None:
        mark.rmdir()
    return 0 if seen[first] else first


def _mark() -> Path | None:
    """A new empty folder in the cache, which tells who sees it; None where it cannot be."""
    folder = cache_folder()
    if folder is not None:
        with contextlib.suppress(OSError):  # rendering will say what is wrong
            mark = folder / f".{secrets.token_hex(8)}.tmp"
            mark.mkdir(parents=True)
            return mark
    return None
