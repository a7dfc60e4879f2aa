"""How much of an evaluation stands in the rows of a mixture: the audit's overlap, without the rest of the audit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sftflow.chat.render import Renderer
from sftflow.data.audit import SourceRows, item_parts
from sftflow.data.audit.overlap import NGRAM, EvalIndex
from sftflow.data.audit.rows import AuditRows
from sftflow.errors import SftflowError
from sftflow.evaluation.heldout_loss import run_mixture
from sftflow.evaluation.prompts_for import TaskRun
from sftflow.recipe import Recipe


def contamination(
    runs: Sequence[TaskRun],
    sources: Sequence[SourceRows],
    renderer: Renderer,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Which of the tasks' items are found in the rows, by 13 words in a row (see `EvalIndex`).

    -> {task: {"ngram", "items", "contaminated", "share", "unchecked", "examples": [{"item": id, "source", "place",
        "words"}]}}

    sources: a mixture's `rows`, held-out ones among them.   renderer: what rendered them.   progress: (done, total).
    """
    backend = renderer.tokenizer.backend_tokenizer
    rows = AuditRows(
        sources,
        lambda ids: backend.decode_batch(ids, skip_special_tokens=True),
        special_ids=list(renderer.special.values()),
    )
    index = EvalIndex({r.name: [item_parts(i) for i in r.items] for r in runs}, [s.name for s in sources])
    for chunk, words in rows.words(progress):
        index.search(words, rows, chunk)
    items = {r.name: r.items for r in runs}
    return {
        found.task: {
            "ngram": NGRAM,
            "items": found.items,
            "contaminated": found.contaminated,
            "share": found.share,
            "unchecked": found.unchecked,
            "examples": [
                {"item": items[found.task][e.item].id, "source": e.source, "place": e.place, "words": e.words}
                for e in found.examples
            ],
        }
        for found in index.result()
    }


def contamination_of_run(
    runs: Sequence[TaskRun], recipe: Recipe, renderer: Renderer, *, digest: str | None = None
) -> dict[str, dict[str, Any]] | str:
    """The same over a run's mixture (see `run_mixture`), or "not checked: REASON" where it cannot be made again."""
    try:
        mixture = run_mixture(recipe, renderer, digest=digest)
    except SftflowError as error:
        return f"not checked: {error}"
    return contamination(runs, mixture.rows, mixture.renderer)
