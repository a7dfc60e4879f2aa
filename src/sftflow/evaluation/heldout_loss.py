"""Loss on text that was not trained on: by role, by source, of the end of turn; and bits per byte of plain text.

    assistant                      what is supervised of a reply, without its end
    end_of_turn                    the control token that ends a supervised turn
    user, system, developer, tool  the turn's words: its tokens without the control tokens that mark it
    (no group)                     control tokens of headers, replies of weight 0, what the calculator wrote

A row is computed once, whatever its groups. A system message that the format writes inside the user's turn counts
there; a header's words, as ChatML's `user`, count as the turn's. Everything is in nats per token of the group, never a
mean of rows' means.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import ROLES, Conversation, parse_line, parse_row
from sftflow.checkpoint import Assistant
from sftflow.data.documents import read_documents
from sftflow.data.mixture import Mixture, build_mixture
from sftflow.data.sources import items_of, prefix_of
from sftflow.data.truncate import fit
from sftflow.errors import ContextError, DataError, FormatError, MaskError, SftflowError
from sftflow.evaluation.prompts_for import plain_ids
from sftflow.evaluation.token_loss import Float, token_losses
from sftflow.packing.pack import Example
from sftflow.recipe import Recipe

GROUPS = (*ROLES, "end_of_turn")
NO_GROUP = -1
PLAIN_TEXT = Path(__file__).with_name("plain.txt")
TOO_LONG = "longer than the model's context"
NOT_RENDERED = "the format cannot express it, or its mask cannot be proven"
NO_REPLY = "nothing in it is supervised"
Int = NDArray[np.int64]


# ---- by group


@dataclass
class _Sums:
    """Nats and tokens, by whatever they are asked of."""

    nats: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, losses: Float) -> None:
        self.nats[name] += float(losses.sum())
        self.tokens[name] += len(losses)

    def mean(self, name: str) -> float | None:
        return self.nats[name] / self.tokens[name] if self.tokens[name] else None


def groups_of(rendered: Rendered, renderer: Renderer, seen: int = 0) -> Int:
    """(n,) the group of each token, an index of GROUPS, or NO_GROUP. `rendered` with its turns.

    seen: so many first messages are another example's, too, and count there; what is supervised counts here. Where
    the template rewrites earlier replies, so that the turn after one cannot be told from it, only that counts.
    """
    ids, supervised = rendered.ids, rendered.mask == 1
    groups = np.full(len(ids), NO_GROUP)
    words = ~np.isin(ids, list(renderer.special.values()))
    ends = [start for start, _ in rendered.turns[1:]] + [len(ids)]
    message = 0
    if any("assistant+" in role for _, role in rendered.turns):
        words[:] = False
    for (start, role), end in zip(rendered.turns, ends, strict=True):
        *_, last = role.split("+")  # "system+user": one inside the other's turn
        if last != "assistant" and message >= seen:
            groups[start:end][words[start:end]] = GROUPS.index(last)
        message += role.count("+") + 1
    groups[supervised] = GROUPS.index("assistant")
    groups[supervised & np.isin(ids, renderer.stop_ids())] = GROUPS.index("end_of_turn")
    return groups


def held_out_loss(assistant: Assistant, conversations: Sequence[tuple[str, Conversation]]) -> dict[str, Any]:
    """Nats per token over (source, conversation) rows; None where there is no such token.

    -> {"rows", "tokens": supervised ones, "all": of these, "end_of_turn", "roles": {...}, "sources": {...},
        "skipped": {why: rows}, "first_skipped": the first one's error}

    A row that the format expands into one example a turn counts each token once.
    """
    renderer = assistant.renderer
    examples: list[Example] = []
    labels: list[tuple[str, Int]] = []
    skipped: Counter[str] = Counter()
    first: str | None = None
    rows = 0
    for source, conversation in conversations:
        try:
            pairs = renderer.render_pairs(conversation, turns=True)
        except (FormatError, MaskError) as error:
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
    sums, by_source = _Sums(), _Sums()
    reply = [GROUPS.index("assistant"), GROUPS.index("end_of_turn")]
    for (source, groups), losses in zip(labels, token_losses(assistant, examples), strict=True):
        for number, name in enumerate(GROUPS):
            sums.add(name, losses[groups == number])
        sums.add("all", losses[np.isin(groups, reply)])
        by_source.add(source, losses[np.isin(groups, reply)])
    return {
        "rows": rows,
        "tokens": sums.tokens["all"],
        "all": sums.mean("all"),
        "end_of_turn": sums.mean("end_of_turn"),
        "roles": {role: sums.mean(role) for role in ROLES},
        "sources": {name: by_source.mean(name) for name in dict.fromkeys(name for name, _ in conversations)},
        "skipped": dict(skipped),
        "first_skipped": first,
    }


# ---- the held-out rows of a run


def run_mixture(
    recipe: Recipe,
    renderer: Renderer,
    *,
    digest: str | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Mixture:
    """The mixture of a run, made again from its resolved recipe (from the row cache where it is still there).

    digest: the run's `data_sha256` (in ledger.json; `data` in the checkpoint's sftflow.json). Raises DataError, with
    the reason in one line, where the data is gone or gives other rows than those.
    """
    try:
        mixture = build_mixture(recipe, renderer, progress)
    except (SftflowError, OSError) as error:
        raise DataError("mixture", f"the run's rows cannot be made again ({error})") from error
    if digest is not None and mixture.digest() != digest:
        fact = "the data, the tokenizer or the format is not what the run was trained on"
        raise DataError("mixture", f"{fact} (rows {mixture.digest()}, trained on {digest})")
    return mixture


def held_out_conversations(
    recipe: Recipe, renderer: Renderer, limit: int | None = None, *, digest: str | None = None
) -> list[tuple[str, Conversation]]:
    """(source, conversation) of a run's validation rows, at most `limit`, spread over its sources; always the same.

    Raises DataError as `run_mixture` does.
    """
    return held_out_rows(run_mixture(recipe, renderer, digest=digest), recipe, limit)


def held_out_rows(mixture: Mixture, recipe: Recipe, limit: int | None = None) -> list[tuple[str, Conversation]]:
    """The same of a mixture that has been made already."""
    picked = spread_out(mixture.held_out.chosen, limit, recipe.train.seed)
    out: list[tuple[str, Conversation]] = []
    for number, (entry, rows) in enumerate(zip(recipe.mixture, mixture.rows, strict=True)):
        wanted: dict[int, list[int]] = {}
        for row in picked.get(number, []):
            wanted.setdefault(int(rows.table["number"][row]), []).append(row)
        last = max(wanted, default=0)
        for at, payload in items_of(entry, recipe) if wanted else ():
            if at in wanted:
                place = f"{prefix_of(entry)}:{at}"
                if not isinstance(payload, Conversation):
                    payload = parse_row(parse_line(payload, place) if isinstance(payload, bytes) else payload, place)
                pairs = fit(payload, mixture.renderer, recipe.train.max_length, recipe.train.overlong).pairs
                for row in wanted[at]:
                    found = [c for c, r in pairs if np.array_equal(r.ids, rows.ids(row))]
                    if not found:
                        raise DataError(place, "this row is no longer the one that was held out")
                    out.append((entry.label, found[0]))
            if at == last:
                break
    return out


def spread_out(chosen: NDArray[Any], limit: int | None, seed: int) -> dict[int, list[int]]:
    """`limit` of the (source, row) pairs, drawn in turn from each source, as {source: rows in order}.

    >>> spread_out(np.array([[0, 4], [0, 5], [0, 6], [1, 9]]), 2, seed=0)
    {0: [5], 1: [9]}
    """
    queues: dict[int, list[int]] = {}
    for source, row in chosen.tolist():
        queues.setdefault(source, []).append(row)
    for source, queue in queues.items():
        random.Random(f"{source}:{seed}").shuffle(queue)
    order = sorted((turn, source) for source, queue in queues.items() for turn in range(len(queue)))[:limit]
    return {source: sorted(queues[source][turn] for turn, s in order if s == source) for source in sorted(queues)}


# ---- plain text


def plain_texts(path: Path | None = None) -> list[str]:
    """The documents of a user's file (.txt, or .jsonl with `text`); of ours where there is none, which three blank
    lines keep apart."""
    if path is not None:
        return list(read_documents(path))
    return [text.strip() + "\n" for text in PLAIN_TEXT.read_text(encoding="utf-8").split("\n\n\n\n")]


def bits_per_byte(assistant: Assistant, texts: Sequence[str], *, window: int = 512) -> dict[str, Any]:
    """Plain text as the base was pretrained to read it: total nats / ln 2 / UTF-8 bytes. Unlike nats per token, it
    compares models of different tokenizers.

    Texts are read in windows of `window` tokens (no more than the context) that overlap by half, so that every token
    has at least half a window before it, and each is counted once. Without a BOS nothing predicts a text's first
    token: it is left out, and its bytes with it. -> {"bytes", "tokens", "bpb": None where there is no token}
    """
    size = min(window, assistant.engine.context)
    if size < 2:
        raise ContextError("window", f"{size} tokens leave nothing to predict", "use 2 or more")
    examples: list[Example] = []
    n_bytes = 0
    for text in texts:
        ids = np.array(plain_ids(assistant, text), np.int64)
        words = assistant.renderer.encode_plain(text)
        n_bytes += len(text.encode())
        first = len(ids) - len(words)
        if first == 0 and words:
            n_bytes -= len(assistant.renderer.decode(words[:1]).encode())
        examples += [Example(ids=ids[a:b], mask=m) for a, b, m in windows(len(ids), size, max(1, first))]
    losses = token_losses(assistant, examples)
    nats, tokens = sum(float(x.sum()) for x in losses), sum(len(x) for x in losses)
    return {"bytes": n_bytes, "tokens": tokens, "bpb": nats / math.log(2) / n_bytes if tokens and n_bytes else None}


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
