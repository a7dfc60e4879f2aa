"""What is asked of the engine, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sftflow.chat.schema import Part

if TYPE_CHECKING:
    from sftflow.generation.constraint import Grammar

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to generate. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off, as are a repetition penalty of
    1 and presence and frequency penalties of 0 (see `sampling`). stop_ids None: the format's own.

    max_new_tokens: 0 only reads the prompt, which is of use with `prompt_logprobs`.
    logprobs: how many of the likeliest tokens are told beside each token of the reply; 0 tells of the chosen one
    alone, None of none.   prompt_logprobs: the same for the prompt's own tokens.
    shown: control tokens that the reply's text has nevertheless, and what stands for each (see `chat.thoughts`).
    grammar: what the reply must be a text of (`Engine.grammars`).
    loops_at_once: where a greedy reply goes round in a loop (`loops`), its next tokens are guessed and read together.
    It is the same reply, sooner; those beside it wait longer for their next token.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop_ids: frozenset[int] | None = None
    stop_texts: tuple[str, ...] = ()
    use_python: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    shown: tuple[tuple[int, str], ...] = ()
    grammar: Grammar | None = None
    loops_at_once: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was to the model: natural logarithms of its own distribution, at temperature 1, before any
    penalty or cut (what vLLM calls raw_logprobs).

    top: (id, log-probability) of as many of the likeliest tokens as were asked for, the likeliest first; `id` may be
    among them or not.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A finished generation. ids: generated ids, the end token and what the calculator wrote included.
    text: what a person reads (text parts joined). seconds: from its first token's start to its end.
    near_ties: the places in `ids` where the two likeliest tokens were as good as equally likely, so that rounding may
    have chosen (greedy decoding only).
    logprobs: one for each of `ids`, where asked; a token that the calculator wrote has the log-probability that the
    model would have given it.
    prompt_logprobs: one for each of the prompt's ids, where asked; None for the first, which follows nothing.
    stopped_by: the stop id or the stop text that ended the reply; None where its length did."""

    ids: tuple[int, ...]
    text: str
    parts: tuple[Part, ...]
    finish_reason: FinishReason
    n_prompt: int
    n_generated: int
    seconds: float
    near_ties: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    stopped_by: int | str | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed reply: whole characters, or nothing. The last one carries the reply.

    tokens: the log-probabilities, where asked, of the tokens that this piece brings to an end: those of all pieces,
    joined, are the reply's `logprobs`.
    ids: those of the tokens that it brings to an end: of all pieces of `Engine.stream`, joined, they are the reply's.
    """

    text: str
    finish_reason: FinishReason | None = None
    reply: Reply | None = None
    tokens: tuple[TokenLogprob, ...] = ()
    ids: tuple[int, ...] = ()
