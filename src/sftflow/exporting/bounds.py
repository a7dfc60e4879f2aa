"""How far an exported file may be from its checkpoint, and how far it is: log-probabilities and greedy tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sftflow.exporting.llamacpp import Continuation

TOKENS = 24
"""greedy tokens of each reply that are compared"""


@dataclass(frozen=True)
class Bounds:
    """How far a type may be from the checkpoint.

    difference: of a log-probability.   likely: of the tokens that have this probability on either side.
    near: two tokens this close in log-probability: rounding chose between them.
    """

    difference: float
    near: float
    likely: float = 0.05


# Three times what was measured and more, and far below what an error does (a wrong head: 5 and more). f32: over all
# tokens that llama.cpp tells. Measured on builtin:tiny and SmolLM2-135M: f32 0.0003, f16 0.019, bf16 0.14, q8_0 0.56;
# choices that differed were within 0.08 (bf16) and 0.23 (q8_0).
BOUNDS = {
    "f32": Bounds(1e-3, 1e-4, likely=0.0),
    "f16": Bounds(0.1, 0.05),
    "bf16": Bounds(0.5, 0.25),
    "q8_0": Bounds(2.0, 1.0),
}
NEAR = BOUNDS["f32"].near


def likeliest_of(model: Any, ids: list[int], reply: Continuation) -> Any:
    """(n + 1, vocabulary) log-probabilities of transformers' own forward pass over what llama.cpp wrote."""
    import torch

    with torch.inference_mode():
        row = torch.tensor([[*ids, *reply.tokens]], device=model.device)
        logits = model(input_ids=row, use_cache=False, logits_to_keep=len(reply.tokens) + 1).logits[0]
    return logits.float().log_softmax(-1).cpu()


def difference_of(likeliest: Any, reply: Continuation, likely: float = 0.0) -> tuple[float, int]:
    """(the largest difference of a log-probability, infinite where one is no number; the places compared).

    likely: of tokens with at least this probability on one of the two sides."""
    import torch

    gap, places = 0.0, 0
    for place, told in enumerate(reply.logprobs):
        if not told:
            continue
        places += 1
        ours, theirs = likeliest[place, list(told)], torch.tensor(list(told.values()))
        counted = ~(torch.maximum(ours, theirs).exp() < likely)  # what is no number counts
        here = float((ours - theirs)[counted].abs().max()) if counted.any() else 0.0
        gap = max(gap, here if math.isfinite(here) else math.inf)  # max(0.0, nan) would be 0.0
    return gap, places


def parting_of(
    reply: Continuation, likeliest: Any, ours: tuple[list[int], bool], stops: list[int], near: float = NEAR
) -> tuple[str, int, int]:
    """Greedy tokens side by side: (where they differ by more than a near tie, "" where they do not; the number of
    places where rounding chose; that of the places behind one that parted llama.cpp and us: from there on they answer
    different texts).   near: how far from the likeliest token llama.cpp's may be; ours was computed with the
    checkpoint's own weights."""
    tokens, ended = reply.tokens, reply.stopped
    if tokens and tokens[-1] in stops:
        tokens, ended = tokens[:-1], True
    mine, mine_ended = ours
    near_ties = 0
    for place in range(min(TOKENS, max(len(tokens), len(mine)) + 1)):
        a = tokens[place] if place < len(tokens) else "end" if ended else None
        b = mine[place] if place < len(mine) else "end" if mine_ended else None
        row = likeliest[place]
        best = int(row.argmax())
        c = "end" if best in stops else best
        if not a == b == c:
            if not (_near_best(a, row, stops, near) and _near_best(b, row, stops)):
                detail = f"token {place}: llama.cpp {a}, sftflow {b}, transformers {c}"
                return detail, near_ties, 0
            near_ties += 1
            if a != b:
                return "", near_ties, max(len(tokens), len(mine)) - place - 1
        if a == "end":
            break
    return "", near_ties, 0


def _near_best(choice: int | str | None, row: Any, stops: list[int], near: float = NEAR) -> bool:
    """Whether a token, or one of those that end a reply, is as good as the likeliest of (vocabulary,)."""
    ids = stops if choice == "end" else [choice] if isinstance(choice, int) else []
    return any(float(row.max() - row[i]) < near for i in ids)
