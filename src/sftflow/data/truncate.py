"""One row of a source -> its training examples, none longer than max_length, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import Conversation
from sftflow.foundation.errors import SchemaError, SftflowError

TOO_LONG = "longer than max_length"


@dataclass(frozen=True, slots=True)
class FittedRow:
    """pairs: (what was rendered, its rendering).   cut: whether turns were left out to fit.
    dropped: why nothing is left, or None."""

    pairs: Sequence[tuple[Conversation, Rendered]]
    cut: bool = False
    dropped: str | None = None


def fit_to_length(conversation: Conversation, renderer: Renderer, max_length: int, overlong: str) -> FittedRow:
    """The row's examples. An over-long conversation is cut back to whole turns that fit (`overlong: cut`), or dropped.

    Raises SchemaError where the row holds nothing to supervise; FormatError and MaskError as the renderer does.
    """
    if not conversation.supervised:
        replies = any(m.role == "assistant" for m in conversation.messages)
        fact = "every assistant turn has weight 0" if replies else "no assistant turn to learn from"
        raise SchemaError(conversation.source, fact, "add one, remove the row, or set on_bad_row: skip")
    pairs = renderer.render_pairs(conversation)
    if all(len(r.ids) <= max_length for _, r in pairs):
        return FittedRow(pairs)
    if len(pairs) > 1:
        kept = [(c, r) for c, r in pairs if len(r.ids) <= max_length]
        return FittedRow(kept, cut=bool(kept), dropped=None if kept else TOO_LONG)
    if overlong == "cut":
        for turn in range(len(conversation.messages) - 1, 1, -1):
            last = conversation.messages[turn - 1]
            if last.role != "assistant" or not last.weight:
                continue
            shorter = replace(conversation, messages=conversation.messages[:turn])
            try:
                rendered = renderer.render(shorter)
            except SftflowError:
                continue
            if len(rendered.ids) <= max_length:
                return FittedRow([(shorter, rendered)], cut=True)
    return FittedRow([], dropped=TOO_LONG)
