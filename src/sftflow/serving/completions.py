"""`/v1/completions`: plain prompts, continued as they are; with `echo` and `logprobs`, the prompt's log-probabilities.

As in `chat`, a plain answer is made of the pieces that a stream would have sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from sftflow.generation.request import Delta, GenerationRequest
from sftflow.serving.errors import ApiError, wrong
from sftflow.serving.logprobs import TextLogprobs, token_texts
from sftflow.serving.model_entry import SamplingParams, Served
from sftflow.serving.prompt import plain_prompts, prompt_ids, too_long
from sftflow.serving.schemas import MAX_CHOICES, MAX_LOGPROBS, SamplingBody

MOST_TOLD = 500_000
"""log-probabilities of the prompts that one request may ask for: about 20 MB of JSON"""


class TextBody(SamplingBody):
    """POST /v1/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingBody.unsupported,
        "suffix": ("",),
        "best_of": (1,),
        "prompt_embeds": (),
        "response_format": ({"type": "text"},),
    }

    prompt: Any = None
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class TextAnswer:
    """The shape of the answer to one request: `n` choices for each prompt, in the order of the prompts."""

    id_prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, served: Served, body: TextBody) -> None:
        """Reads the prompts, which takes its time. Raises ApiError 400."""
        self.served, self.body = served, body
        self._n = body.n or 1
        self._prompts = plain_prompts(body.prompt)
        if len(self._prompts) * self._n > MAX_CHOICES:
            fact = f"{len(self._prompts)} prompts with n={self._n} are more than {MAX_CHOICES} replies; send fewer"
            raise wrong("prompt", fact)
        if body.max_tokens == 0 and not body.echo:
            raise wrong("max_tokens", "0 only makes sense with echo: true")
        drawing = SamplingParams.of(served.assistant, body)
        self.requests: list[GenerationRequest] = []
        self.n_prompt = 0
        each = self._n * ((body.logprobs or 0) + 1) if body.echo and body.logprobs is not None else 0
        for prompt in self._prompts:
            ids = prompt_ids(served.assistant, prompt)
            self.n_prompt += len(ids)
            if self.n_prompt * each > MOST_TOLD:
                fact = f"at most {MOST_TOLD} log-probabilities of prompts are told: tokens x n x (logprobs + 1)"
                raise wrong("prompt", f"{fact}; send fewer prompts at once")
            self.requests += drawing.requests(
                body,
                ids,
                self._limit(len(ids)),
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
                use_python=False,  # a calculator's tokens are none of the model's own
            )

    def _limit(self, n_prompt: int) -> int:
        context, wanted = self.served.context, self.body.max_tokens
        room = context - n_prompt
        if room < (0 if wanted == 0 else 1):
            raise too_long("prompt", n_prompt, context)
        if wanted is None:
            return room
        if wanted > room:
            fact = (
                f"the prompt is {n_prompt} tokens, the model's context is {context}: max_tokens {wanted} does not fit; "
                f"at most {room} do"
            )
            raise ApiError(400, fact, param="max_tokens", code="context_length_exceeded")
        return wanted

    def choice(self, index: int) -> TextChoice:
        prompt = self._prompts[index // self._n]
        return TextChoice(self.served, self.body, prompt, self.requests[index])


class TextChoice:
    """One reply in pieces, each the fields of a chunk's choice."""

    def __init__(self, served: Served, body: TextBody, prompt: str | list[int], request: GenerationRequest) -> None:
        self._served, self._body, self._prompt, self._request = served, body, prompt, request
        self._shape = TextLogprobs(served.table, served.silent)
        self._echoed = not body.echo
        self._held: list[Delta] = []
        self.finish_reason: str | None = None

    def opening(self) -> list[dict[str, Any]]:
        return []

    def is_large(self, delta: Delta) -> bool:
        """The echo comes at once, and with log-probabilities so does all that waited for it."""
        return not self._echoed and (self._body.logprobs is None or delta.reply is not None)

    def feed(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of one piece of the reply; the last one says why it ended."""
        final = delta.reply is not None
        out = []
        if not self._echoed:
            if self._body.logprobs is not None and not final:
                self._held.append(delta)  # the prompt comes first, and its log-probabilities come with the reply
                return []
            self._echoed = True
            out = [self._echo(delta)]
            for held in self._held:
                out += self.feed(held)
        if delta.text or final or delta.tokens:
            logprobs = None
            if self._body.logprobs is not None and (delta.tokens or final):
                logprobs = self._shape.shape([t.id for t in delta.tokens], delta.tokens)
            out.append({"text": delta.text, "logprobs": logprobs, "finish_reason": None})
        if final:
            assert delta.reply is not None
            self.finish_reason = out[-1]["finish_reason"] = delta.reply.finish_reason
        return out

    def _echo(self, delta: Delta) -> dict[str, Any]:
        ids = self._request.prompt_ids
        text = self._prompt
        if not isinstance(text, str):
            text = "".join(token_texts(self._served.assistant.tokenizer, ids))
        logprobs = None
        if self._body.logprobs is not None:
            told = delta.reply.prompt_logprobs if delta.reply else ()
            logprobs = self._shape.shape(ids, told, shown=not isinstance(self._prompt, str))
        return {"text": text, "logprobs": logprobs, "finish_reason": None}

    def whole(self, chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The choice of a plain answer, from its chunks."""
        logprobs: dict[str, Any] | None = None
        if self._body.logprobs is not None:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            for chunk in chunks:
                for key, values in (chunk["logprobs"] or {}).items():
                    logprobs[key] += values
        return {
            "text": "".join(c["text"] for c in chunks),
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
        }
