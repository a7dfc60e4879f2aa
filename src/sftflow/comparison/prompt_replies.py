"""The fixed prompts answered: by the base in both arms, by the SFT model in its format."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sftflow.checkpoint import Assistant
from sftflow.comparison.prompt_results import PromptReply
from sftflow.comparison.prompts import FixedPrompt, PromptSet
from sftflow.evaluation.grading import whole_batches
from sftflow.evaluation.options import PLAIN_STOPS, Arm
from sftflow.evaluation.reply_checks import ReplyChecks
from sftflow.foundation.errors import ContextError, SftflowError
from sftflow.foundation.ranks import ranks, shared_out
from sftflow.generation.request import GenerationRequest, Reply

PROMPT_TOKENS = 96


@dataclass(frozen=True)
class Reading:
    """A model that is asked the prompts in one arm. step: told how many more replies there are."""

    assistant: Assistant
    arm: Arm
    step: Callable[[int], None]


def prompt_replies(readings: Sequence[Reading], prompts: PromptSet) -> list[list[PromptReply]]:
    """For each reading the reply to each fixed prompt, in order. One that cannot be asked has the reason as its text.

    Whole batches of all readings are shared out over the ranks.
    """
    told: list[dict[int, PromptReply]] = [{} for _ in readings]
    batches: list[tuple[int, list[int], list[GenerationRequest]]] = []
    for number, reading in enumerate(readings):
        requests: dict[int, GenerationRequest] = {}
        stops = PLAIN_STOPS if reading.arm == "plain" else ()
        for i, prompt in enumerate(prompts.prompts):
            try:
                ids = _prompt_ids(reading.assistant, prompt, reading.arm)
            except SftflowError as error:
                told[number][i] = PromptReply(text=f"[not asked: {error.fact}]", finish_reason="error")
            else:
                requests[i] = GenerationRequest(
                    prompt_ids=ids, max_new_tokens=PROMPT_TOKENS, stop_texts=stops, use_python=reading.arm == "chat"
                )
        if ranks().first:
            reading.step(len(told[number]))
        asked = list(requests)
        for batch in whole_batches([requests[i].prompt_ids for i in asked], reading.assistant.engine):
            which = [asked[k] for k in batch]
            batches.append((number, which, [requests[i] for i in which]))

    def replies_of(k: int) -> list[Reply]:
        number, _, some = batches[k]
        return readings[number].assistant.engine.generate(some, lambda _, reply: readings[number].step(1))

    costs = [float(sum(len(r.prompt_ids) + r.max_new_tokens for r in some)) for _, _, some in batches]
    for (number, which, _), replies in zip(batches, shared_out(costs, replies_of), strict=True):
        for i, reply in zip(which, replies, strict=True):
            text = reply.text.strip() if readings[number].arm == "plain" else reply.text
            right = prompts.prompts[i].right(text)
            told[number][i] = PromptReply(text=text, finish_reason=reply.finish_reason, reply=reply, right=right)
    return [[found[i] for i in sorted(found)] for found in told]


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
