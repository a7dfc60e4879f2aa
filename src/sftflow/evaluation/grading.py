"""A model's replies to a task's items, generated or chosen, and their grades, row by row as they finish."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sftflow.chat.thoughts import learn_thoughts, split_thoughts
from sftflow.checkpoint import Assistant
from sftflow.evaluation.journal import EvalRow, Journal, key_of
from sftflow.evaluation.options import Arm, EvalTask
from sftflow.evaluation.prompts_for import ItemPrompt, letter_scores, prompts_for
from sftflow.foundation.errors import ContextError, RunError
from sftflow.generation.request import GenerationRequest, Reply
from sftflow.generation.sampling import NEAR
from sftflow.tasks import Item, Task

Asked = Sequence[tuple[Item, ItemPrompt]]
Grade = Callable[[Item, ItemPrompt, Reply | None], None]


def grade_items(
    assistant: Assistant,
    task: EvalTask,
    arm: Arm,
    journal: Journal | None,
    progress: Callable[[int], None] = lambda k: None,
) -> list[EvalRow]:
    """The rows of all items in their order.

    journal: the rows that it holds are not asked again, and new ones are added; None: all are asked, and none is
    written.   progress: told how many more rows there are.

    Raises TaskError where the task cannot be asked in this format, ContextError where no prompt fits the model's
    context, RunError where the model's logits are not finite.
    """
    prompts = prompts_for(assistant, task, arm)
    keys = [key_of(item, prompt.ids) for item, prompt in zip(task.items, prompts, strict=True)]
    rows = {key: journal.rows[key] for key in keys if journal and key in journal.rows}
    asked = [(i, p) for key, i, p in zip(keys, task.items, prompts, strict=True) if key not in rows]
    progress(len(keys) - len(asked))

    def graded(row: EvalRow) -> None:
        rows[row.key] = journal.add(row) if journal else row
        progress(1)

    context = assistant.engine.context
    fitting = [(item, prompt) for item, prompt in asked if len(prompt.ids) < context]
    if asked and not fitting:
        shortest = min(len(prompt.ids) for _, prompt in asked)
        raise ContextError(
            task.name,
            f"no prompt fits a context of {context} tokens (shortest: {shortest})",
            "leave the task out, or take a model with a longer context",
        )
    most = 1 if task.by_letter else task.task.max_new_tokens
    longest = max((len(prompt.ids) + most for _, prompt in fitting), default=0)
    with _grader(task.task, graded) as grade:
        for item, prompt in asked:
            if len(prompt.ids) >= context:
                grade(item, prompt, None)
        assistant.engine.decode_mode(longest)  # found out before logits are looked at: it may try ways that give none
        with finite_logits(assistant.model, f"{assistant.name}: {task.name}"):
            if task.by_letter:
                _choose(assistant, fitting, grade)
            else:
                _generate(assistant, task.task, arm, fitting, grade)
    return [rows[key] for key in keys]


@contextmanager
def _grader(task: Task, keep: Callable[[EvalRow], None]) -> Iterator[Grade]:
    """Gives the function that grades a reply and tells `keep` of its row; for tasks that run code it does so beside the
    generation, on every core, and an error in grading shows at the next reply."""

    def finish(item: Item, prompt: ItemPrompt, reply: Reply | None) -> None:
        keep(_row(task, item, prompt, reply))

    if not task.runs_code:
        yield finish
        return
    pending: list[Future[None]] = []

    def grade(item: Item, prompt: ItemPrompt, reply: Reply | None) -> None:
        for future in pending:
            if future.done():
                future.result()
        pending.append(pool.submit(finish, item, prompt, reply))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            yield grade
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for future in pending:
        future.result()


def _row(task: Task, item: Item, prompt: ItemPrompt, reply: Reply | None) -> EvalRow:
    """reply None: the prompt does not fit the model's context."""
    text = reply.text if reply else ""
    _, prompt_sha256, item_sha256 = key_of(item, prompt.ids)
    return EvalRow(
        id=item.id,
        question=item.messages[-1].text,
        earlier=tuple({"role": m.role, "content": m.text} for m in item.messages[:-1]),
        answer=item.answer,
        reply=text,
        score=task.grade(item, text) if reply else 0.0,
        finish_reason=reply.finish_reason if reply else "too_long",
        n_prompt=len(prompt.ids),
        n_generated=reply.n_generated if reply else 0,
        seconds=round(reply.seconds, 3) if reply else 0.0,
        prompt_sha256=prompt_sha256,
        item_sha256=item_sha256,
        near_ties=len(reply.near_ties) if reply else 0,
        details=task.details(item, text),
        ids=reply.ids if reply else (),
    )


def _generate(assistant: Assistant, task: Task, arm: Arm, asked: Asked, grade: Grade) -> None:
    renderer = assistant.renderer
    marks = learn_thoughts(renderer) if arm == "chat" else None
    marks = marks if marks and marks.codes else None  # those that are text a grader reads itself (`tasks.answers`)

    def done(number: int, reply: Reply) -> None:
        item, prompt = asked[number]
        if arm == "plain":
            reply = plain_reply(task, item, reply)
        elif marks:
            begun = marks.begun(renderer.decode(prompt.ids[-64:]))
            reply = replace(reply, text=split_thoughts(marks, reply.text, begun)[1])
        grade(item, prompt, reply)

    requests = [
        GenerationRequest(
            prompt_ids=prompt.ids,
            max_new_tokens=task.max_new_tokens,
            stop_texts=task.plain_stops if arm == "plain" else (),
            use_python=arm == "chat",
            shown=marks.shown(renderer) if marks else (),
        )
        for _, prompt in asked
    ]
    assistant.engine.generate(requests, done)


def plain_reply(task: Task, item: Item, reply: Reply) -> Reply:
    """A base's reply in plain text as it is graded: without the space around it (code keeps its first line's
    indentation), and where the task has it so as far as its first blank line, unless the whole is graded higher."""
    text = reply.text.rstrip() if task.runs_code else reply.text.strip()
    if task.plain_paragraph:
        text = max((text.partition("\n\n")[0].rstrip(), text), key=lambda said: task.grade(item, said))
    return replace(reply, text=text)


def _choose(assistant: Assistant, asked: Asked, grade: Grade) -> None:
    """Multiple choice: the item's own letter with the highest probability."""
    for number, scores in letter_scores(assistant.engine, [prompt for _, prompt in asked]):
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
        grade(item, prompt, reply)


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
