"""`/v1/completions`: plain prompts, continued as they are; `echo` and `logprobs` tell how likely a prompt is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftflow.generation.request import Delta, GenerationRequest
from sftflow.serving.errors import wrong
from sftflow.serving.logprobs import TextLogprobs, token_texts
from sftflow.serving.model_entry import ServedModel
from sftflow.serving.prompt import plain_prompts, prompt_ids, requests_for, too_long
from sftflow.serving.responses import Chunk, ResponseShape
from sftflow.serving.schemas import MAX_CHOICES, CompletionBody
from sftflow.serving.structured import grammar_for

MOST_TOLD = 500_000
"""log-probabilities of the prompts that one request may ask for: about 20 MB of JSON"""


def completion_response(model: ServedModel, body: CompletionBody) -> ResponseShape:
    """Reads the prompts, which takes its time; `n` choices for each, in their order. Raises ApiError 400."""
    n, prompts = body.n or 1, plain_prompts(body.prompt)
    if len(prompts) * n > MAX_CHOICES:
        raise wrong("prompt", f"{len(prompts)} prompts with n={n} are more than {MAX_CHOICES} replies; send fewer")
    if body.max_tokens == 0 and not body.echo:
        raise wrong("max_tokens", "0 only makes sense with echo: true")
    n_told = n * ((body.logprobs or 0) + 1) if body.echo and body.logprobs is not None else 0  # for each prompt token
    grammar = grammar_for(model, body)
    n_prompt = 0
    requests: list[GenerationRequest] = []
    choices: list[CompletionChoice] = []
    for prompt in prompts:
        ids = prompt_ids(model.assistant, prompt)
        n_prompt += len(ids)
        if n_prompt * n_told > MOST_TOLD:
            fact = f"at most {MOST_TOLD} log-probabilities of prompts are told: tokens x n x (logprobs + 1)"
            raise wrong("prompt", f"{fact}; send fewer prompts at once")
        if model.context - len(ids) < min(1, body.limit):
            raise too_long("prompt", len(ids), model.context)
        requests += requests_for(
            model.assistant,
            body,
            ids,
            body.limit,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            grammar=grammar,
            use_python=False,  # a calculator's tokens are none of the model's own
        )
        choices += [CompletionChoice(model, body, prompt, ids) for _ in range(n)]
    return ResponseShape(model=model, body=body, n_prompt=n_prompt, requests=requests, choices=choices)


class CompletionChoice:
    """One reply: each chunk has a text and its log-probabilities. With `echo` the prompt comes first."""

    id_prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: ServedModel, body: CompletionBody, prompt: str | list[int], prompt_ids: Sequence[int]
    ) -> None:
        self._tokenizer = model.assistant.tokenizer
        self._prompt, self._prompt_ids = prompt, prompt_ids
        python = model.assistant.engine.reply_decoder.python
        told = body.logprobs is not None
        self._logprobs = TextLogprobs(model.table, model.control_ids, python) if told else None
        self._n_text = 0
        self._echoed = not body.echo
        self._held: list[Delta] = []

    def opening(self) -> list[Chunk]:
        return []

    def is_large(self, delta: Delta) -> bool:
        """The echo comes at once, and with log-probabilities so does all that waited for it."""
        return not self._echoed and (self._logprobs is None or delta.reply is not None)

    def feed(self, delta: Delta) -> list[Chunk]:
        final = delta.reply is not None
        chunks: list[Chunk] = []
        if not self._echoed:
            if self._logprobs is not None and not final:
                self._held.append(delta)  # the prompt comes first, and its log-probabilities come with the reply
                return []
            self._echoed = True
            chunks = [self._echo(delta), *(chunk for held in self._held for chunk in self.feed(held))]
        if delta.text or final or delta.tokens:
            logprobs = None
            self._n_text += len(delta.text)
            if self._logprobs is not None and (delta.tokens or final):
                logprobs = self._logprobs.shape([t.id for t in delta.tokens], delta.tokens, self._n_text)
            reason = delta.reply.finish_reason if delta.reply is not None else None
            chunks.append({"text": delta.text, "logprobs": logprobs, "finish_reason": reason})
        return chunks

    def _echo(self, delta: Delta) -> Chunk:
        text, as_ids = self._prompt, not isinstance(self._prompt, str)
        if as_ids:
            text = "".join(token_texts(self._tokenizer, self._prompt_ids))
        logprobs = None
        self._n_text += len(text)
        if self._logprobs is not None:
            told = delta.reply.prompt_logprobs if delta.reply else ()
            logprobs = self._logprobs.shape(self._prompt_ids, told, self._n_text, shown=as_ids)
        return {"text": text, "logprobs": logprobs, "finish_reason": None}

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if self._logprobs is not None:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            for chunk in chunks:
                for key, values in (chunk["logprobs"] or {}).items():
                    logprobs[key] += values
        text = "".join(c["text"] for c in chunks)
        return {"text": text, "logprobs": logprobs, "finish_reason": chunks[-1]["finish_reason"]}
