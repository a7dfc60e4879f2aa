"""How many of the evaluation items stand in the rows that a model was trained on: the audit's overlap alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from sftflow.chat.render import Renderer
from sftflow.data.audit import item_parts
from sftflow.data.audit.overlap import EvalIndex
from sftflow.data.audit.overlap import Overlap as Overlap
from sftflow.data.audit.rows import AuditRows
from sftflow.data.run_rows import TRAINING_ROWS, TrainingRows, read_training_rows
from sftflow.data.store import Rows
from sftflow.evaluation.options import EvalTask
from sftflow.foundation.errors import DataError


def contamination(tasks: Sequence[EvalTask], sources: Sequence[Rows], renderer: Renderer) -> dict[str, Overlap]:
    """The overlap of each task with the rows, its examples by the items' ids.

    sources: a mixture's `rows`, held-out ones among them.   renderer: of the tokenizer that they were rendered with.
    """
    backend = renderer.tokenizer.backend_tokenizer
    rows = AuditRows(
        sources,
        lambda ids: backend.decode_batch(ids, skip_special_tokens=True),
        control=renderer.special,
    )
    index = EvalIndex({r.name: [item_parts(i) for i in r.items] for r in tasks}, [s.name for s in sources])
    for chunk, words in rows.words():
        index.search(words, rows, chunk)
    items = {r.name: r.items for r in tasks}
    return {
        found.task: Overlap(
            **{f.name: getattr(found, f.name) for f in fields(Overlap)}
            | {"examples": tuple(replace(e, item=items[found.task][int(e.item)].id) for e in found.examples)}
        )
        for found in index.result()
    }


def contamination_of_run(tasks: Sequence[EvalTask], run: Path, renderer: Renderer) -> dict[str, Overlap]:
    """The same over the rows that a run directory was trained on. Raises DataError as `whole_training_rows` does."""
    return contamination(tasks, whole_training_rows(run).sources, renderer) if tasks else {}


def whole_training_rows(run: Path) -> TrainingRows:
    """The rows that a run directory was trained on. Raises DataError where it does not hold them: an older version
    trained it, or they were too many to be kept."""
    rows = read_training_rows(run)
    if rows.without_ids is not None:
        raise DataError(str(run / TRAINING_ROWS), rows.without_ids)
    return rows
