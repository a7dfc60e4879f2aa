"""What is measured beside the tasks: losses on held-out rows and on plain text, overlap of the tasks with what was
trained on. What cannot be measured says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sftflow.chat.schema import Conversation
from sftflow.checkpoint import Assistant
from sftflow.comparison.in_training import seen_in_training
from sftflow.comparison.prompt_results import Seen
from sftflow.comparison.prompts import FixedPrompt
from sftflow.comparison.results import Forgetting, HeldOutComparison, NotChecked
from sftflow.evaluation.contamination import Overlap, contamination_of_run, whole_training_rows
from sftflow.evaluation.heldout_loss import bits_per_byte, held_out_conversations, held_out_loss, plain_texts
from sftflow.evaluation.options import EvalTask
from sftflow.foundation.errors import SftflowError

HELD_OUT_ROWS = 200
NO_RUN = "the SFT checkpoint does not lie in a run directory"


def held_out_comparison(base: Assistant, sft: Assistant, run: Path | None) -> HeldOutComparison | NotChecked | None:
    """Both models' loss on the run's held-out rows. None: there are none, or the run is not known."""
    if run is None:
        return None
    try:
        rows = held_out_conversations(run, HELD_OUT_ROWS)
        if not rows:
            return None
        if any(_other_tokens(base, sft, c) for _, c in rows):
            return NotChecked(not_checked="rows that are tokens already, and the base has another tokenizer")
        before, after = held_out_loss(base, rows), held_out_loss(sft, rows)
    except SftflowError as error:  # an older run that kept no rows; a model whose logits are not those of its head
        return NotChecked(not_checked=_why(error))
    return HeldOutComparison(rows=after.rows, base=before, sft=after)


def _other_tokens(base: Assistant, sft: Assistant, row: Conversation) -> bool:
    """Whether a row of tokens, or a piece of a text, is another text to the base."""
    ids = row.tokens.ids if row.tokens else row.document.ids if row.document else None
    return ids is not None and base.renderer.decode(ids) != sft.renderer.decode(ids)


def overlap_with_training(
    runs: Sequence[EvalTask], sft: Assistant, run: Path | None
) -> Mapping[str, Overlap | NotChecked]:
    """By task, which of its items stand in the rows that the SFT model was trained on."""
    why = NO_RUN
    if run is not None:
        try:
            return contamination_of_run(runs, run, sft.renderer)
        except SftflowError as error:
            why = _why(error)
    return {r.name: NotChecked(not_checked=why) for r in runs}


def prompts_seen(prompts: Sequence[FixedPrompt], sft: Assistant, run: Path | None) -> Sequence[Seen] | NotChecked:
    """For each fixed prompt, what of it stands in the rows that the SFT model was trained on."""
    if run is None:
        return NotChecked(not_checked=NO_RUN)
    try:
        return seen_in_training(prompts, whole_training_rows(run), sft.renderer)
    except SftflowError as error:
        return NotChecked(not_checked=_why(error))


def forgetting(base: Assistant, sft: Assistant) -> Forgetting:
    """Bits per byte of plain text before and after: what SFT made the model forget of reading."""
    texts = plain_texts()
    try:
        before, after = bits_per_byte(base, texts), bits_per_byte(sft, texts)
    except SftflowError as error:
        return Forgetting(text="", bytes=0, base=None, sft=None, not_checked=_why(error))
    return Forgetting(text="the package's own sample", bytes=after.bytes, base=before.bpb, sft=after.bpb)


def _why(error: SftflowError) -> str:
    return f"{error.place}: {error.fact}"
