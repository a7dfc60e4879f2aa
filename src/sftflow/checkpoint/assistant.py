"""A loaded checkpoint that can talk, in one chat format."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from sftflow.chat.format import ChatFormat, add_tokens, choose_format
from sftflow.chat.schema import Conversation
from sftflow.checkpoint.generation import left_out, sampling_of
from sftflow.checkpoint.loading import load_ends, load_model, load_tokenizer
from sftflow.checkpoint.location import Location, resolve
from sftflow.fingerprint import format_fingerprint
from sftflow.foundation.errors import CheckpointError, RecipeError
from sftflow.nanochat.vocabulary import BEGUN_BY_BOS

log = logging.getLogger("sftflow.checkpoint")

if TYPE_CHECKING:
    from sftflow.chat.render import Renderer
    from sftflow.foundation.runtime import Runtime
    from sftflow.generation.engine import Engine
    from sftflow.generation.request import GenerationRequest
    from sftflow.generation.sequence import ReplyDecoder


@dataclass
class Assistant:
    """A loaded checkpoint that can talk: model, tokenizer, renderer and engine of one format."""

    name: str
    model: Any
    tokenizer: Any
    renderer: Renderer
    engine: Engine
    info: dict[str, Any]

    @property
    def sampling(self) -> dict[str, Any]:
        """How the checkpoint asks for its tokens to be drawn: temperature (0: greedy), top_p (1: off), top_k (0: off),
        min_p (0: off), repetition_penalty (1: off).

        Its generation_config.json is read as transformers' `generate` reads it. Without do_sample, and most bases have
        none, a reply here is decoded as evaluation decodes, so that what one sees is what was measured.
        """
        return sampling_of(getattr(self.model, "generation_config", None))

    def request(
        self, prompt: Conversation | Sequence[int], *, max_tokens: int | None = None, **options: Any
    ) -> GenerationRequest:
        """What the engine is asked for the next reply of a conversation (or behind a prompt's ids).

        max_tokens: of the reply; at most, and by default, as many as the context has room for.
        options: further fields of `GenerationRequest`; where one is left out or None, the checkpoint's own `sampling`
        counts, else the field's default.

        Raises what rendering raises. A prompt that leaves no room for a token is refused by the engine.
        """
        from sftflow.generation.request import GenerationRequest

        known = [f.name for f in fields(GenerationRequest) if f.name not in ("prompt_ids", "max_new_tokens")]
        if unknown := sorted(options.keys() - known):
            near = difflib.get_close_matches(unknown[0], ["max_tokens", *known], 1)
            remedy = f"write {near[0]}=..." if near else f"known: max_tokens, {', '.join(known)}"
            raise RecipeError(unknown[0], "no argument of a reply", remedy)
        if isinstance(prompt, Conversation):
            ids = tuple(self.renderer.render(prompt, add_generation_prompt=True).ids.tolist())
        else:
            ids = tuple(prompt)
        room = max(1, self.engine.context - len(ids))
        asked = {**self.sampling, **{name: value for name, value in options.items() if value is not None}}
        if asked["temperature"] < 1e-4:
            asked["temperature"] = 0.0  # the limit of ever smaller ones
        asked["top_p"] = max(asked["top_p"], 1e-6)
        asked["top_k"] = max(asked["top_k"], 0)  # -1 is "off", too
        limit = room if max_tokens is None else min(max_tokens, room)
        return GenerationRequest(prompt_ids=ids, max_new_tokens=limit, **asked)

    @property
    def reply_decoder(self) -> ReplyDecoder:
        """What generated ids mean in its chat format: text, calculator calls and their results."""
        from sftflow.generation.sequence import ReplyDecoder

        return ReplyDecoder(self.renderer)

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """Plain text as the base was pretrained to read it: with the tokenizer's own BOS, without control tokens."""
        opening = self.tokenizer("").input_ids  # BOS where the tokenizer writes one
        if not opening and self.model.config.model_type in BEGUN_BY_BOS and self.tokenizer.bos_token_id is not None:
            opening = [self.tokenizer.bos_token_id]
        if opening and opening[-1] == self.tokenizer.eos_token_id != self.tokenizer.bos_token_id:
            opening = opening[:-1]
        return (*opening, *self.renderer.encode_plain(text))


def grow_embeddings(model: Any, known: Collection[int], new: Collection[int]) -> int:
    """Start the rows of the tokenizer's new tokens at the mean of the rows of its known ones; weights stay tied.

    known, new: their ids. Many embeddings have more rows than the tokenizer has tokens, to a round number: a new token
    may fall on such a row, which nothing has trained. A known token that lies beyond the embedding is started, too.
    Returns how many rows were added.
    """
    import torch

    old = int(model.get_input_embeddings().weight.shape[0])
    started = sorted({*new, *(i for i in known if i >= old)})
    if not started:
        return 0
    trained = sorted(i for i in known if i < old)
    chosen = slice(len(trained)) if trained == [*range(len(trained))] else trained  # a slice makes no copy
    n_rows = max(old, started[-1] + 1)
    ends = [end for end in (model.get_input_embeddings, model.get_output_embeddings) if end() is not None]
    parts = [(end, part) for end in ends for part in ("weight", "bias") if getattr(end(), part, None) is not None]
    means = [getattr(end(), part).detach()[chosen].float().mean(0) for end, part in parts]
    if n_rows > old:
        model.resize_token_embeddings(n_rows, mean_resizing=False)
    with torch.no_grad():
        for (end, part), mean in zip(parts, means, strict=True):
            rows = getattr(end(), part)
            rows[started] = mean.to(rows.dtype)
    return n_rows - old


def prepare(
    location: Location, *, format_name: str = "auto", fallback: ChatFormat | None = None
) -> tuple[Any, Any, Renderer, dict[str, Any]]:
    """(model, tokenizer, renderer, info): a checkpoint ready to be trained or asked in one format.

    info: its sftflow.json, and `own_template`: whether it brought a chat template.
    fallback: the format of a checkpoint that has none of its own, instead of `sftflow`.

    Raises CheckpointError where the stored fingerprint is not that of the files.
    """
    from sftflow.chat.render import Renderer

    model, info = load_model(location)
    tokenizer = load_tokenizer(location)
    ends = load_ends(location, tokenizer)
    chat_format = choose_format(format_name, tokenizer, info.get("format"))
    info["own_template"] = bool(getattr(tokenizer, "chat_template", None))
    if fallback is not None and not info["own_template"]:
        chat_format = fallback
    stored = info.get("fingerprint")
    if stored and format_name == "auto":
        now = format_fingerprint(tokenizer, chat_format)
        if now != stored:
            fact = f"tokenizer or chat format changed since training (fingerprint {stored} -> {now})"
            remedy = "restore tokenizer.json and chat_template.jinja, or train again"
            raise CheckpointError(location.name, fact, remedy)
    begins = model.config.model_type in BEGUN_BY_BOS
    known = set(tokenizer.get_vocab().values())
    add_tokens(tokenizer, chat_format)
    grow_embeddings(model, known, set(tokenizer.get_vocab().values()) - known)
    return model, tokenizer, Renderer(tokenizer, chat_format, ends=ends, begun_by_bos=begins), info


def load_assistant(
    name: str, *, format: str = "auto", precision: str = "fp32", fallback: ChatFormat | None = None
) -> Assistant:
    """Load a checkpoint that answers in a chat format (its own, or the named one)."""
    from sftflow.foundation.runtime import detect

    runtime, location = detect(precision), resolve(name)
    model, tokenizer, renderer, info = prepare(location, format_name=format, fallback=fallback)
    # What cannot be asked for is refused now.
    sampling_of(getattr(model, "generation_config", None), f"{name}/generation_config.json")
    if ignored := left_out(model.generation_config):
        log.warning("note: %s: its generation_config.json asks for %s; not done here", name, ", ".join(ignored))
    model.to(runtime.device).eval()
    return assistant_of(model, tokenizer, renderer, runtime, name=name, info=info)


def assistant_of(
    model: Any,
    tokenizer: Any,
    renderer: Renderer,
    runtime: Runtime,
    *,
    name: str = "",
    info: dict[str, Any] | None = None,
    tick: Callable[[], None] | None = None,
) -> Assistant:
    """A model in memory, with an engine of its own.   tick: called before every forward pass; what it raises ends the
    generation."""
    from sftflow.generation.engine import Engine

    return Assistant(name, model, tokenizer, renderer, Engine(model, renderer, runtime, tick=tick), info or {})


def base_format(sft: Assistant) -> ChatFormat:
    """The SFT model's format, to be given to a base that has none: with the control tokens it needs."""
    chat_format = sft.renderer.format
    written = "".join((chat_format.template, *chat_format.named.values()))
    return replace(chat_format, tokens=tuple(t for t in sft.renderer.special if t in written))
