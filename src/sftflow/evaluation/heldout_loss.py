"""Loss on rows that were not trained on: by role, by source, of the end of turn; and bits per byte of plain text.

    assistant                      what is supervised of a reply, without its end
    end_of_turn                    the control token that ends a supervised turn
    user, system, developer, tool  the turn's words: its tokens without the control tokens that mark it
    text                           plain text, with its end
    (no group)                     control tokens of headers, replies of weight 0, what the calculator wrote

A row is computed once, whatever its groups. A system message that the format writes inside the user's turn counts
there; a header's words, as ChatML's `user`, count as the turn's. Everything is in nats per token of the group, never a
mean of rows' means.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.plain_text import TEXT
from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import ROLES, Conversation
from sftflow.checkpoint import Assistant
from sftflow.data.run_rows import read_held_out
from sftflow.foundation.errors import CheckpointError, ContextError, FormatError, MaskError, SchemaError, SftflowError
from sftflow.foundation.ranks import shared_out
from sftflow.packing.attending import evaluating
from sftflow.packing.check_model import prove_forward
from sftflow.packing.length_limits import length_limit
from sftflow.packing.loss import batch_loss
from sftflow.packing.pack import Example, PackedBatch, pack_batch, pad_batch, split_padded, split_step

GROUPS = (*ROLES, "end_of_turn", TEXT)
NO_GROUP = -1
PLAIN_TEXT = Path(__file__).with_name("plain.txt")
TOO_LONG = "longer than the model's context"
NOT_RENDERED = "the format cannot express it, or its mask cannot be proven"
NO_REPLY = "it holds no reply that is taught"
MICRO_TOKENS = 8192
"""slots that are computed at once"""
Int = NDArray[np.int64]
Float = NDArray[np.float64]


# ---- by group


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Nats per token; None where there is no such token.

    rows: measured ones.   tokens: supervised ones of replies.   all: of these.   roles, sources: by name; of plain
    text, where there is any, the role "text".   skipped: rows that
    could not be measured, by the reason.   first_skipped: what is the matter with the first of them.
    """

    rows: int
    tokens: int
    all: float | None
    end_of_turn: float | None
    roles: dict[str, float | None]
    sources: dict[str, float | None]
    skipped: dict[str, int]
    first_skipped: str | None


def groups_of(rendered: Rendered, renderer: Renderer, seen: int = 0) -> Int:
    """(n,) the group of each token, an index of GROUPS, or NO_GROUP. `rendered` with its turns.

    seen: so many first messages are another example's, too, and count there; what is supervised counts here. Where
    the template rewrites earlier replies and ends them with no token, so that the turn after one cannot be told from
    it, only that counts.
    """
    ids, supervised = rendered.ids, rendered.mask == 1
    groups = np.full(len(ids), NO_GROUP)
    words = ~np.isin(ids, list(renderer.special.values()))
    ends = [*(start for start, _ in rendered.turns[1:]), len(ids)][: len(rendered.turns)]
    message = 0
    if any("assistant+" in role for _, role in rendered.turns):
        words[:] = False
    for (start, role), end in zip(rendered.turns, ends, strict=True):
        *_, last = role.split("+")  # "system+user": one inside the other's turn
        if last != "assistant" and message >= seen:
            groups[start:end][words[start:end]] = GROUPS.index(last)
        message += role.count("+") + 1
    if [role for _, role in rendered.turns] == [TEXT]:
        groups[supervised] = GROUPS.index(TEXT)
        return groups
    groups[supervised] = GROUPS.index("assistant")
    closing = renderer.ends()
    for stop in np.flatnonzero(supervised & np.isin(ids, renderer.stop_ids())):
        written = (len(end) for end in closing if tuple(ids[max(0, stop + 1 - len(end)) : stop + 1]) == end)
        n = next(written, 1)  # a row of tokens may end a turn as no template does
        groups[stop + 1 - n : stop + 1] = GROUPS.index("end_of_turn")
    return groups


def held_out_conversations(run: Path, limit: int | None = None) -> list[tuple[str, Conversation]]:
    """(source, conversation) of the rows that a run directory held out; `limit` of them at most, drawn in turn from
    each source. Raises DataError where an older version trained the run."""
    return [(row.source, row.conversation) for row in read_held_out(run, limit)]


def held_out_loss(assistant: Assistant, conversations: Sequence[tuple[str, Conversation]]) -> HeldOutLoss:
    """The loss on (source, conversation) rows. A row that the format expands into one example a turn counts each token
    once."""
    renderer = assistant.renderer
    examples: list[Example] = []
    labels: list[tuple[str, Int]] = []
    skipped: Counter[str] = Counter()
    first: str | None = None
    rows = 0
    for source, conversation in conversations:
        try:
            pairs = renderer.render_pairs(conversation, turns=True)
        except (FormatError, MaskError, SchemaError) as error:
            skipped[NOT_RENDERED] += 1
            first = first or str(error)
            continue
        longest = max(len(r.ids) for _, r in pairs)
        if longest > assistant.engine.context or not any(r.n_supervised for _, r in pairs):
            why = TOO_LONG if longest > assistant.engine.context else NO_REPLY
            skipped[why] += 1
            first = first or f"{conversation.source}: {why} ({longest:,} tokens)"
            continue
        rows += 1
        seen = 0
        for made_from, rendered in pairs:
            groups = groups_of(rendered, renderer, seen)
            groups[:1] = NO_GROUP  # nothing predicts the first token
            examples.append(Example(ids=rendered.ids, mask=(groups != NO_GROUP).astype(np.int8)))
            labels.append((source, groups[groups != NO_GROUP]))
            seen = len(made_from.messages)
    nats: defaultdict[tuple[str, ...], float] = defaultdict(float)
    tokens: Counter[tuple[str, ...]] = Counter()
    reply = [GROUPS.index("assistant"), GROUPS.index("end_of_turn")]
    for (source, groups), losses in zip(labels, token_losses(assistant, examples), strict=True):
        replied = losses[np.isin(groups, reply)]
        taught = losses[np.isin(groups, [*reply, GROUPS.index(TEXT)])]
        parts = {("group", name): losses[groups == number] for number, name in enumerate(GROUPS)}
        for key, some in {**parts, ("group", "all"): replied, ("source", source): taught}.items():
            nats[key] += float(some.sum())
            tokens[key] += len(some)

    def mean(*key: str) -> float | None:
        return nats[key] / tokens[key] if tokens[key] else None

    return HeldOutLoss(
        rows=rows,
        tokens=tokens["group", "all"],
        all=mean("group", "all"),
        end_of_turn=mean("group", "end_of_turn"),
        roles={role: mean("group", role) for role in (*ROLES, TEXT) if role != TEXT or tokens["group", TEXT]},
        sources={name: mean("source", name) for name in dict.fromkeys(name for name, _ in conversations)},
        skipped=dict(skipped),
        first_skipped=first,
    )


# ---- single tokens, by the forward pass of training


def token_losses(assistant: Assistant, examples: Sequence[Example]) -> list[Float]:
    """For each example (m,) nats of its supervised tokens, in order; the first token is never among them.

    Packed where the model can be, else each example alone and padded; the batches are shared out over the ranks. Leaves
    the model as it was found. Raises CheckpointError where its logits are not those of our head.
    """
    model, runtime = assistant.model, assistant.engine.runtime
    out = [np.zeros(0)] * len(examples)
    with evaluating(model):
        numbered = [replace(e, source=i) for i, e in enumerate(examples)]
        batches = list(_batches(numbered, model, _can_pack(assistant)))

        def losses_of(number: int) -> Float:
            batch, packed = batches[number]
            return batch_loss(model, batch, runtime, packed=packed).cpu().double().numpy()

        found = shared_out([float(b.input_ids.size) for b, _ in batches], losses_of, agree=(SftflowError,))
    for (batch, _), losses in zip(batches, found, strict=True):
        for i in np.unique(batch.sources):
            out[i] = losses[batch.sources == i]
    return out


def _batches(examples: Sequence[Example], model: Any, packed: bool) -> Iterator[tuple[PackedBatch, bool]]:
    """(batch, whether it is packed). A row so long that the model computes it differently by length stands alone."""
    limit = length_limit(model)
    most = math.inf if limit is None else limit[0]
    short = [e for e in examples if len(e.ids) <= most and e.mask[1:].any()]
    if packed and short:
        yield from ((pack_batch(part), True) for part in split_step(short, MICRO_TOKENS))
    else:
        yield from ((pad_batch(part), False) for part in split_padded(short, MICRO_TOKENS))
    yield from ((pad_batch([e]), False) for e in examples if len(e.ids) > most and e.mask[1:].any())


def _can_pack(assistant: Assistant) -> bool:
    """Proven on the model itself, as training does."""
    try:
        prove_forward(assistant.model)
        return True
    except CheckpointError:
        try:
            prove_forward(assistant.model, packed=False)
        except CheckpointError as error:
            raise CheckpointError(assistant.name, f"its loss cannot be measured ({error.fact})", error.remedy) from None
        return False


# ---- plain text


def plain_texts() -> list[str]:
    """The documents of the package's own sample, which three blank lines keep apart."""
    return [text.strip() + "\n" for text in PLAIN_TEXT.read_text(encoding="utf-8").split("\n\n\n\n")]


@dataclass(frozen=True, kw_only=True)
class BitsPerByte:
    """bytes, tokens: those that were predicted.   bpb: bits per byte; None where there is no token."""

    bytes: int
    tokens: int
    bpb: float | None


def bits_per_byte(assistant: Assistant, texts: Sequence[str], *, window: int = 512) -> BitsPerByte:
    """Plain text as the base was pretrained to read it: total nats / ln 2 / UTF-8 bytes. Unlike nats per token, it
    compares models of different tokenizers.

    Texts are read in windows of `window` tokens (no more than the context) that overlap by half, so that every token
    has at least half a window before it, and each is counted once. Without a BOS nothing predicts a text's first
    token: it is left out, and its bytes with it.
    """
    size = min(window, assistant.engine.context)
    if size < 2:
        raise ContextError("window", f"{size} tokens leave nothing to predict", "use 2 or more")
    examples: list[Example] = []
    n_bytes = 0
    for text in texts:
        ids = np.array(assistant.plain_ids(text), np.int64)
        words = assistant.renderer.encode_plain(text)
        n_bytes += len(text.encode())
        first = len(ids) - len(words)
        if first == 0 and words:
            n_bytes -= len(assistant.renderer.decode(words[:1]).encode())
        examples += [Example(ids=ids[a:b], mask=m) for a, b, m in windows(len(ids), size, max(1, first))]
    losses = token_losses(assistant, examples)
    nats, tokens = sum(float(x.sum()) for x in losses), sum(len(x) for x in losses)
    bpb = nats / math.log(2) / n_bytes if tokens and n_bytes else None
    return BitsPerByte(bytes=n_bytes, tokens=tokens, bpb=bpb)


def windows(n: int, size: int, first: int) -> Iterator[tuple[int, int, NDArray[np.int8]]]:
    """(begin, end, mask of what is new) of the windows over n tokens, of which those from `first` on are counted.

    >>> [(a, b, m.tolist()) for a, b, m in windows(6, 4, 1)]
    [(0, 4, [0, 1, 1, 1]), (2, 6, [0, 0, 1, 1])]
    """
    done, step = first, max(1, size // 2)
    for begin in range(0, n, step):
        end = min(n, begin + size)
        if end > done:
            mask = np.zeros(end - begin, np.int8)
            mask[done - begin :] = 1
            yield begin, end, mask
            done = end
