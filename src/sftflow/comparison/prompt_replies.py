"""The fixed prompts answered: by the base in both arms, by the SFT model in its format."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from sftflow.checkpoint import Assistant
from sftflow.comparison.prompt_results import PromptReply
from sftflow.comparison.prompts import FixedPrompt, PromptSet
from sftflow.evaluation.options import PLAIN_STOPS, Arm
from sftflow.evaluation.reply_checks import ReplyChecks
from sftflow.evaluation.side_by_side import Work
from sftflow.foundation.errors import ContextError, SftflowError
from sftflow.foundation.ranks import ranks
from sftflow.generation.request import GenerationRequest, Reply

PROMPT_TOKENS = 96


class PromptAsking:
    """A model asked the fixed prompts in one arm: an `Asker`. replies: to each prompt that is known; one that cannot be
    asked has the reason as its text."""

    name = "prompts"

    def __init__(self, assistant: Assistant, arm: Arm, prompts: PromptSet, progress: Callable[[int], None]) -> None:
        """progress: told how many more replies there are."""
        self.assistant, self.arm, self.prompts, self.progress = assistant, arm, prompts.prompts, progress
        self.replies: dict[int, PromptReply] = {}
        self.requests: dict[int, GenerationRequest] = {}
        self.known = frozenset[int]()
        self._fresh: list[tuple[int, Reply]] = []
        for i, prompt in enumerate(self.prompts):
            try:
                ids = _prompt_ids(assistant, prompt, arm)
            except SftflowError as error:
                self.replies[i] = PromptReply(text=f"[not asked: {error.fact}]", finish_reason="error")
            else:
                self.requests[i] = GenerationRequest(
                    prompt_ids=ids,
                    max_new_tokens=PROMPT_TOKENS,
                    stop_texts=PLAIN_STOPS if arm == "plain" else (),
                    use_python=arm == "chat",
                    loops_at_once=True,
                )
        if ranks().first:
            progress(len(self.replies))

    def left(self) -> Work:
        return Work.of(self.requests.values())

    @contextmanager
    def taking(self) -> Iterator[Callable[[int, Reply], None]]:
        def take(number: int, reply: Reply) -> None:
            self._fresh.append((number, reply))
            self.progress(1)

        yield take

    def drain(self) -> list[tuple[int, Reply]]:
        new, self._fresh = self._fresh, []
        return new

    def take_in(self, drained: Sequence[tuple[int, Reply]]) -> None:
        for i, reply in drained:
            text = reply.text.strip() if self.arm == "plain" else reply.text
            right = self.prompts[i].right(text)
            self.replies[i] = PromptReply(text=text, finish_reason=reply.finish_reason, reply=reply, right=right)

    def in_order(self) -> list[PromptReply]:
        """The reply to each prompt, once all are taken in."""
        return [self.replies[i] for i in range(len(self.prompts))]


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
