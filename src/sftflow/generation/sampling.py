"""Choosing the next token from its logits, and saying how likely it was.

    logits -> penalties -> / temperature -> top_k -> top_p -> min_p -> one uniform number against the distribution

in the order of transformers' processors. Every row is computed by itself, so neighbours change nothing.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

import torch

from sftflow.generation.request import GenerationRequest, TokenLogprob

NEAR = 1e-4
"""two logits this close are a near-tie: products in another order of summation may swap them"""
NUCLEUS = 1024
"""so many of the likeliest tokens are sorted first; they nearly always hold the whole nucleus"""


def derived_seed(seed: int, choice: int) -> int:
    """The seed of reply number `choice` of one request, or of a file's row of that number; choice 0 has the request's
    own, so that n=1 is the beginning of n=2.

    >>> derived_seed(7, 0)
    7
    """
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{choice}".encode()).digest()[:8]) >> 1


class Sampler:
    """How one reply's tokens are chosen: its random numbers, and the tokens that penalties count."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.greedy = request.temperature <= 0
        penalties = request.repetition_penalty, request.presence_penalty, request.frequency_penalty
        self.penalised = penalties != (1, 0, 0)
        # Random ignores the sign of a seed.
        self.uniform = random.Random(request.seed % 2**64).random
        self._counts: torch.Tensor | None = None  # (vocabulary,) how often each was generated
        self._seen: torch.Tensor | None = None  # (vocabulary,) whether it stands in the prompt or was generated
        self._noted: list[int] = []

    def note(self, token: int) -> None:
        """A token has been generated (what the calculator wrote counts, too)."""
        if self.penalised:
            self._noted.append(token)

    def penalise(self, scores: torch.Tensor) -> None:
        """(vocabulary,) in place. Repetition (Keskar et al. 2019): logits of tokens seen in the prompt or the reply are
        divided by the penalty where positive, else multiplied. Presence and frequency (OpenAI): those of generated
        tokens are lowered once, and for each time."""
        if not self.penalised:
            return
        request = self.request
        if self._counts is None or self._seen is None:
            self._counts = torch.zeros(len(scores))
            self._seen = torch.zeros(len(scores), dtype=torch.bool)
            self._seen[[i for i in set(request.prompt_ids) if i < len(scores)]] = True
        for token in self._noted:
            self._counts[token] += 1
            self._seen[token] = True
        self._noted.clear()
        if request.repetition_penalty != 1:
            penalty = request.repetition_penalty
            scores.copy_(torch.where(self._seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores))
        scores -= request.frequency_penalty * self._counts + request.presence_penalty * (self._counts > 0)


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> tuple[list[int], list[bool]]:
    """(n, vocabulary) -> each row's next id, and whether it was a near-tie of greedy decoding."""
    ids, near = [0] * len(samplers), [False] * len(samplers)
    plain = [i for i, s in enumerate(samplers) if s.greedy and not s.penalised]
    if plain:
        best = likeliest(logits if len(plain) == len(samplers) else logits[plain])
        for i, token, tie in zip(plain, *best, strict=True):
            ids[i], near[i] = token, tie
    others = [i for i, s in enumerate(samplers) if not s.greedy or s.penalised]
    if others:
        chosen = [samplers[i] for i in others]
        scores = warped(logits[others], chosen)
        drawn = [row for row, s in enumerate(chosen) if not s.greedy]
        if drawn:
            found = draw(scores[drawn], [chosen[row].uniform() for row in drawn])
            for row, token in zip(drawn, found, strict=True):
                ids[others[row]] = token
        for row, sampler in enumerate(chosen):
            if sampler.greedy:
                (ids[others[row]],), (near[others[row]],) = likeliest(scores[row : row + 1])
    return ids, near


def likeliest(logits: torch.Tensor) -> tuple[list[int], list[bool]]:
    """(n, vocabulary) -> each row's likeliest id, and whether the second was within NEAR of it."""
    best, ids = logits.max(-1)
    others = logits.scatter(-1, ids[:, None], float("-inf"))
    near = best - others.amax(-1) < NEAR
    return ids.tolist(), near.tolist()


def warped(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """(n, vocabulary) logits -> scores on the CPU, in a tensor of their own: -inf where a token may not be chosen."""
    scores = logits.to("cpu", torch.float32, copy=True)
    for row, sampler in zip(scores, samplers, strict=True):
        sampler.penalise(row)
    scores /= torch.tensor([1.0 if s.greedy else s.request.temperature for s in samplers])[:, None]
    for row, sampler in zip(scores, samplers, strict=True):
        if not sampler.greedy:
            _cut(row, sampler.request)
    return scores


def _cut(scores: torch.Tensor, request: GenerationRequest) -> None:
    """In place: the top_k likeliest; of them the fewest whose mass reaches top_p (nucleus sampling, Holtzman et al.
    2020); of them those at least min_p times as likely as the likeliest (Nguyen et al. 2024). Ties stay together."""
    if request.top_k > 0:
        least = scores.topk(min(request.top_k, len(scores))).values[-1]
        scores.masked_fill_(scores < least, -math.inf)
    if request.top_p < 1:
        mass = scores.logsumexp(-1)
        ordered = scores.topk(min(NUCLEUS, len(scores))).values
        shares = (ordered - mass).exp()
        if float(shares.sum()) < request.top_p:
            ordered = scores.sort(descending=True).values
            shares = (ordered - mass).exp()
        n = int((shares.cumsum(0) - shares < request.top_p).sum())
        scores.masked_fill_(scores < ordered[max(n, 1) - 1], -math.inf)
    if request.min_p > 0:
        scores.masked_fill_(scores < scores.max() + math.log(request.min_p), -math.inf)


def draw(scores: torch.Tensor, uniforms: Sequence[float]) -> list[int]:
    """(n, vocabulary), a number from [0, 1) each -> the id at which the cumulative distribution passes it.

    The ids stand in their own order, not in that of their likelihood: logits that differ in their last bits, as they
    do between batches of different size, then move the borders between ids by as little, and hardly ever the choice.
    """
    cumulative = scores.softmax(-1).double().cumsum(-1)
    total = cumulative[:, -1]
    wanted = torch.tensor(uniforms, dtype=torch.float64) * total
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0]
    ids: list[int] = found.clamp(max=scores.shape[-1] - 1).tolist()
    return ids


def token_logprobs(logits: torch.Tensor, ids: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """(n, vocabulary) raw logits, an id and a number of alternatives for each -> the log-probabilities."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(list(ids), device=logits.device)[:, None])[:, 0].tolist()
    most = min(max(top, default=0), logits.shape[-1])
    values, index = (x.tolist() for x in logprobs.topk(most, -1))
    return [
        TokenLogprob(token, logprob, tuple(zip(index[row][: top[row]], values[row][: top[row]], strict=True)))
        for row, (token, logprob) in enumerate(zip(ids, chosen, strict=True))
    ]
