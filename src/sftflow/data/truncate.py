"""One row of a source -> its training examples, as far as max_length, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sftflow.chat.plain_text import Document, piece_of, pieces
from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import Conversation
from sftflow.foundation.errors import FormatError, SchemaError, SftflowError

TOO_LONG = "longer than max_length"
UNTAUGHT = "not taught: weight 0"
EMPTY = "empty: a text of no words"
FEW_REPLIES = 8  # a row of no more is rendered whole before it is cut


@dataclass(frozen=True, slots=True)
class FittedRow:
    """pairs: (what was rendered, its rendering); where tokens are cut, `first_tokens` of it are to be used.
    cut: whether turns or tokens are left out to fit.   dropped: why nothing is left, or None."""

    pairs: Sequence[tuple[Conversation, Rendered]]
    cut: bool = False
    dropped: str | None = None


def fit_to_length(conversation: Conversation, renderer: Renderer, max_length: int, overlong: str) -> FittedRow:
    """The row's examples. An over-long conversation is cut back to whole turns that fit (`overlong: cut`), or dropped,
    or its first max_length tokens are kept if any of them is supervised (`cut_tokens`): a reply that is cut has no end.
    The prompt is never cut. Plain text is never dropped for its length, nor shortened: it is cut into pieces.

    What is surely too long is left out before anything is proven: the cost is that of what is kept. A row that says of
    all its replies that they are not taught is dropped, unrendered.
    Raises SchemaError where the row holds no reply; FormatError and MaskError as the renderer does.
    """
    if conversation.document is not None:
        return _fit_text(conversation, conversation.document, renderer, max_length)
    tokens, replies = conversation.tokens, renderer.spec.supervise == "replies"
    left_out = conversation.left_out
    untaught = not conversation.supervised if replies else len(left_out) == len(conversation.messages)
    if tokens:
        untaught = tokens.mask is not None and not any(tokens.mask)
    has_reply = any(m.role == "assistant" for m in conversation.messages)
    if untaught and (tokens or has_reply or len(left_out) == len(conversation.messages)):
        return FittedRow([], dropped=UNTAUGHT)
    if untaught:
        raise SchemaError(conversation.source, "no assistant turn to learn from", "add one, or remove the row")
    beginning = _may_fit(conversation, renderer, max_length)
    shortened = beginning is not conversation
    pairs = renderer.render_pairs(beginning)
    by_tokens = overlong == "cut_tokens"
    kept = [
        (c, r)
        for c, r in pairs
        if len(r.ids) <= max_length or (by_tokens and first_tokens(r, max_length, renderer).mask[1:].any())
    ]
    if by_tokens:
        shortened |= any(len(r.ids) > max_length for _, r in kept)
    if len(pairs) > 1:
        cut = bool(kept) and (shortened or len(kept) < len(pairs))
        return FittedRow(kept, cut=cut, dropped=None if kept else TOO_LONG)
    if kept and (overlong != "drop" or not shortened):
        return FittedRow(kept, cut=shortened)
    if overlong == "cut":
        shorter = _whole_turns(*pairs[0], renderer, max_length) if conversation.supervised else None
        return FittedRow([shorter] if shorter else [], cut=shorter is not None, dropped=None if shorter else TOO_LONG)
    return FittedRow([], dropped=TOO_LONG)


def _fit_text(conversation: Conversation, document: Document, renderer: Renderer, max_length: int) -> FittedRow:
    """Plain text in pieces of max_length, one after another: each is an example of its own, which sees nothing of those
    before it."""
    if not conversation.weight:
        return FittedRow([], dropped=UNTAUGHT)
    if document.is_empty:
        return FittedRow([], dropped=EMPTY)
    whole = renderer.render(conversation)
    if 1 < len(whole.ids) <= max_length:
        return FittedRow([(conversation, whole)])
    pairs = []
    for begin, end in pieces(len(whole.ids), max_length) if len(whole.ids) > 1 else ():
        ids = tuple(whole.ids[begin:end].tolist())
        piece = piece_of(document, ids, renderer.decode(ids), last=end == len(whole.ids))
        example = replace(conversation, document=piece)
        pairs.append((example, renderer.render(example)))
    return FittedRow(pairs, dropped=None if pairs else EMPTY)  # nothing predicts a single token


def first_tokens(rendered: Rendered, n: int, renderer: Renderer) -> Rendered:
    """The first n tokens of a row; where that cuts an end of turn in two, its beginning is not taught."""
    if len(rendered.ids) <= n:
        return rendered
    ids, mask = rendered.ids, rendered.mask[:n].copy()
    for end in renderer.ends():
        starts = range(max(0, n - len(end) + 1), n)
        for start in starts:
            if tuple(ids[start : start + len(end)].tolist()) == end:
                mask[start:] = 0
    weights = None if rendered.weights is None else rendered.weights[:n] * mask
    return replace(rendered, ids=ids[:n], mask=mask, weights=weights)


def _may_fit(conversation: Conversation, renderer: Renderer, max_length: int) -> Conversation:
    """The conversation as far as the last reply whose prompt may be shorter than max_length; found by doubling and
    halving, so that little more than this beginning is read.

    Whole where it has few replies, or where a longer beginning may have the shorter prompt: reasoning that a template
    writes in the last turns only.
    """
    replies = [turn for turn, m in enumerate(conversation.messages) if m.role == "assistant"]
    if len(replies) <= FEW_REPLIES or any(m.reasoning_content for m in conversation.messages):
        return conversation

    def too_long(n: int) -> bool:
        return renderer.rough_length(conversation.before(replies[n]))[1] >= max_length

    try:
        fits, fails = 0, FEW_REPLIES
        while fails < len(replies) and not too_long(fails):
            fits, fails = fails, 2 * fails
        fails = min(fails, len(replies))
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (fits, middle) if too_long(middle) else (middle, fails)
    except FormatError:
        return conversation  # the template takes no such beginning
    kept = [turn for turn in conversation.supervised if turn <= replies[fits]]
    return conversation if fails == len(replies) or not kept else conversation.before(kept[-1] + 1)


def _whole_turns(
    conversation: Conversation, rendered: Rendered, renderer: Renderer, max_length: int
) -> tuple[Conversation, Rendered] | None:
    """The longest beginning that ends with a supervised reply and fits: the rendering says where each reply ends, so
    that what cannot fit is not rendered."""
    if renderer.spec.supervise == "all":  # then the mask of the replies says where they end
        try:
            rendered = renderer.supervising("replies").render(conversation)
        except SftflowError:
            return None
    ends = np.flatnonzero(np.isin(rendered.ids, renderer.stop_ids()) & (rendered.mask == 1))
    turns = conversation.supervised
    for turn, end in reversed(list(zip(turns, ends.tolist(), strict=True))):
        if end >= max_length or turn + 1 == len(conversation.messages):
            continue
        shorter = conversation.before(turn + 1)
        try:
            found = renderer.render(shorter)
        except SftflowError:
            continue
        if len(found.ids) <= max_length:
            return shorter, found
    return None
