"""The fixed prompts answered: by the base in both arms, by the SFT model in its format."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from sftflow.checkpoint import Assistant
from sftflow.comparison.prompt_results import PromptReply
from sftflow.comparison.prompts import FixedPrompt, PromptSet
from sftflow.evaluation.options import PLAIN_STOPS, Arm
from sftflow.evaluation.reply_checks import ReplyChecks
from sftflow.foundation.errors import ContextError, SftflowError
from sftflow.generation.request import GenerationRequest

PROMPT_TOKENS = 96


def prompt_replies(
    assistant: Assistant, prompts: PromptSet, arm: Arm, step: Callable[[int], None]
) -> list[PromptReply]:
    """The reply to each fixed prompt, in order. One that cannot be asked has the reason as its text."""
    told: dict[int, PromptReply] = {}
    requests: dict[int, GenerationRequest] = {}
    stops = PLAIN_STOPS if arm == "plain" else ()
    for i, prompt in enumerate(prompts.prompts):
        try:
            ids = _prompt_ids(assistant, prompt, arm)
        except SftflowError as error:
            told[i] = PromptReply(text=f"[not asked: {error.fact}]", finish_reason="error")
            step(1)
        else:
            requests[i] = GenerationRequest(
                prompt_ids=ids, max_new_tokens=PROMPT_TOKENS, stop_texts=stops, use_python=arm == "chat"
            )
    replies = assistant.engine.generate(list(requests.values()), lambda number, reply: step(1))
    for i, reply in zip(requests, replies, strict=True):
        text = reply.text.strip() if arm == "plain" else reply.text
        right = prompts.prompts[i].right(text)
        told[i] = PromptReply(text=text, finish_reason=reply.finish_reason, reply=reply, right=right)
    return [told[i] for i in sorted(told)]


def _prompt_ids(assistant: Assistant, prompt: FixedPrompt, arm: Arm) -> tuple[int, ...]:
    """Raises SftflowError where the format cannot express the prompt, or the context cannot hold it."""
    if arm == "chat":
        rendered = assistant.renderer.render(prompt.conversation, add_generation_prompt=True)
        ids = tuple(int(t) for t in rendered.ids)
    else:
        ids = assistant.plain_ids(prompt.plain)
    context = assistant.engine.context
    if len(ids) >= context:
        fact = f"the prompt has {len(ids):,} tokens, and the model's context {context:,}"
        raise ContextError(prompt.id, fact, "give --prompts a file of shorter ones")
    return ids


def with_faults(replies: Sequence[PromptReply], checks: ReplyChecks) -> list[PromptReply]:
    """The replies with what the checks have against each. checks: over those that were asked first, then others."""
    number = itertools.count()
    return [replace(r, faults=tuple(checks.faults_of(next(number)))) if r.reply else r for r in replies]
