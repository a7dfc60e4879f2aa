"""A model's replies to a task's items, generated or chosen, and their grades, row by row as they finish."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sftflow.checkpoint import Assistant
from sftflow.errors import ContextError, RunError
from sftflow.evaluation.journal import EvalRow, Key, key_of
from sftflow.evaluation.multiple_choice import ItemPrompt, letter_scores
from sftflow.evaluation.options import Arm, EvalTask
from sftflow.evaluation.prompts_for import prompts_for
from sftflow.generation.engine import GenerationRequest, Reply
from sftflow.generation.sampling import NEAR
from sftflow.tasks import Item, Task

Asked = Sequence[tuple[Item, ItemPrompt]]
Keep = Callable[[EvalRow], None]


def grade_items(
    assistant: Assistant,
    task: EvalTask,
    arm: Arm,
    prompts: Sequence[ItemPrompt],
    keep: Keep,
    *,
    finished: Container[Key] = (),
) -> None:
    """Ask the items, but for those whose row is `finished`, and tell `keep(row)` of each as it is graded (from several
    threads where grading runs code).

    Raises RunError where the model's logits are not finite, ContextError where no prompt fits the model's context.
    """
    asked = [(i, p) for i, p in zip(task.items, prompts, strict=True) if key_of(i, p.ids) not in finished]
    context = assistant.engine.context
    fitting = [(item, prompt) for item, prompt in asked if len(prompt.ids) < context]
    if asked and not fitting:
        shortest = min(len(prompt.ids) for _, prompt in asked)
        raise ContextError(task.name, f"no prompt fits a context of {context} tokens (shortest: {shortest})", "drop it")
    most = 1 if task.by_letter else task.task.max_new_tokens
    longest = max((len(prompt.ids) + most for _, prompt in fitting), default=0)
    with Grading(task.task, keep) as grading:
        for item, prompt in asked:
            if len(prompt.ids) >= context:
                grading.grade(item, prompt, None)
        assistant.engine.decode_mode(longest)  # found out before logits are looked at: it may try ways that give none
        with finite_logits(assistant.model, f"{assistant.name}: {task.name}"):
            if task.by_letter:
                _choose(assistant, fitting, grading)
            else:
                _generate(assistant, task.task, arm, fitting, grading)


def grade_in_memory(assistant: Assistant, task: EvalTask, arm: Arm, progress: Callable[[int], None]) -> list[EvalRow]:
    """The rows of all items in their order, without a file. progress: told how many are new."""
    prompts = prompts_for(assistant, task, arm)
    rows: dict[Key, EvalRow] = {}

    def keep(row: EvalRow) -> None:
        rows[row.key] = row
        progress(1)

    grade_items(assistant, task, arm, prompts, keep)
    return [rows[key_of(item, prompt.ids)] for item, prompt in zip(task.items, prompts, strict=True)]


class Grading:
    """Grades replies and tells `keep` of their rows; tasks that run code grade beside the generation, on every core."""

    def __init__(self, task: Task, keep: Keep) -> None:
        self._task, self._keep = task, keep
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1) if task.runs_code else None
        self._pending: list[Future[None]] = []

    def __enter__(self) -> Grading:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
            for future in self._pending if kind is None else []:
                future.result()

    def grade(self, item: Item, prompt: ItemPrompt, reply: Reply | None) -> None:
        """Grade a reply, at once or soon; None: its prompt was too long. An error in grading shows at the next one."""
        if self._pool is None:
            self._keep(self._row(item, prompt, reply))
            return
        finished = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if future not in finished]
        for future in finished:
            future.result()
        self._pending.append(self._pool.submit(lambda: self._keep(self._row(item, prompt, reply))))

    def _row(self, item: Item, prompt: ItemPrompt, reply: Reply | None) -> EvalRow:
        text = reply.text if reply else ""
        _, prompt_sha256, item_sha256 = key_of(item, prompt.ids)
        return EvalRow(
            id=item.id,
            question="\n\n".join(m.text for m in item.messages),
            answer=item.answer,
            reply=text,
            score=self._task.grade(item, text) if reply else 0.0,
            finish_reason=reply.finish_reason if reply else "too_long",
            n_prompt=len(prompt.ids),
            n_generated=reply.n_generated if reply else 0,
            seconds=round(reply.seconds, 3) if reply else 0.0,
            prompt_sha256=prompt_sha256,
            item_sha256=item_sha256,
            near_ties=len(reply.near_ties) if reply else 0,
            details=self._task.details(item, text),
            ids=reply.ids if reply else (),
        )


def _generate(assistant: Assistant, task: Task, arm: Arm, asked: Asked, grading: Grading) -> None:
    def done(number: int, reply: Reply) -> None:
        if arm == "plain":  # without the space around it; code keeps its first line's indentation
            reply = replace(reply, text=reply.text.rstrip() if task.runs_code else reply.text.strip())
        grading.grade(*asked[number], reply)

    requests = [
        GenerationRequest(
            prompt_ids=prompt.ids,
            max_new_tokens=task.max_new_tokens,
            stop_texts=task.plain_stops if arm == "plain" else (),
            use_python=arm == "chat",
        )
        for _, prompt in asked
    ]
    assistant.engine.generate(requests, done)


def _choose(assistant: Assistant, asked: Asked, grading: Grading) -> None:
    """Multiple choice: the item's own letter with the highest probability."""

    def done(number: int, scores: dict[str, float]) -> None:
        item, prompt = asked[number]
        best, second = sorted(scores, key=lambda c: -scores[c])[:2]
        ids = prompt.letters[best]
        reply = Reply(
            ids=ids,
            text=best,
            parts=(),
            finish_reason="stop",
            n_prompt=len(prompt.ids),
            n_generated=len(ids),
            seconds=0.0,
            near_ties=(0,) if scores[best] - scores[second] < NEAR else (),
        )
        grading.grade(item, prompt, reply)

    letter_scores(assistant.engine, [prompt for _, prompt in asked], done)


@contextmanager
def finite_logits(model: Any, name: str) -> Iterator[None]:
    """Raises RunError when the model's logits hold a NaN or +inf: its replies mean nothing then."""

    def look(module: Any, given: Any, out: Any) -> None:
        # The maximum is NaN where any of them is. -inf is allowed: some models rule ids out by it.
        if not bool(out.logits.amax().isfinite()):
            raise RunError(name, "the model's logits are not finite", "give another checkpoint")

    hook = model.register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()
