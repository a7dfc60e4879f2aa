"""The fixed prompts answered: by the base in both arms, by the SFT model in its format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sftflow.checkpoint import Assistant
from sftflow.comparison.prompts import PromptSet
from sftflow.errors import SftflowError
from sftflow.evaluation.prompts_for import PLAIN_STOPS, Arm, plain_ids
from sftflow.generation.request import GenerationRequest, Reply

PROMPT_TOKENS = 96


@dataclass(frozen=True)
class PromptReply:
    """A reply to a fixed prompt; where it could not be asked, `text` says why and `reply` is None."""

    text: str
    finish: str
    reply: Reply | None = None


def answers(assistant: Assistant, prompts: PromptSet, arm: Arm, step: Callable[[int], None]) -> list[PromptReply]:
    """The reply to each fixed prompt, in order."""
    out = [PromptReply("", "error")] * len(prompts.prompts)
    requests: list[GenerationRequest] = []
    where: list[int] = []
    context = assistant.engine.context
    for i, prompt in enumerate(prompts.prompts):
        try:
            if arm == "chat":
                ids = tuple(
                    int(t) for t in assistant.renderer.render(prompt.conversation, add_generation_prompt=True).ids
                )
            else:
                ids = plain_ids(assistant, prompt.plain)
        except SftflowError as error:
            out[i] = PromptReply(f"[not asked: {error.fact}]", "error")
            step(1)
            continue
        if len(ids) >= context:
            out[i] = PromptReply(f"[not asked: {len(ids)} tokens do not fit {context}]", "error")
            step(1)
            continue
        stops = PLAIN_STOPS if arm == "plain" else ()
        requests.append(
            GenerationRequest(prompt_ids=ids, max_new_tokens=PROMPT_TOKENS, stop_texts=stops, use_python=arm == "chat")
        )
        where.append(i)

    def done(number: int, reply: Reply) -> None:
        text = reply.text.strip() if arm == "plain" else reply.text
        out[where[number]] = PromptReply(text, reply.finish_reason, reply)
        step(1)

    assistant.engine.generate(requests, done)
    return out


def shown(
    prompts: PromptSet,
    base: Sequence[PromptReply],
    plain: Sequence[PromptReply],
    sft: Sequence[PromptReply],
    flags: dict[str, list[list[str]]],
) -> list[dict[str, Any]]:
    """compare.json's `prompts`. flags: for base and sft, what hygiene has against each reply."""
    return [
        {
            "id": prompt.id,
            "kind": prompt.kind,
            "messages": prompt.messages_json(),
            "base": base[i].text,
            "base_plain": plain[i].text,
            "sft": sft[i].text,
            "base_finish": base[i].finish,
            "base_plain_finish": plain[i].finish,
            "sft_finish": sft[i].finish,
            "hygiene": {side: flags[side][i] for side in ("base", "sft")},
        }
        for i, prompt in enumerate(prompts.prompts)
    ]
