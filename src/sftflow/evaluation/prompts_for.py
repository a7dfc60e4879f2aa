"""Asking: the items' prompts in one arm, the replies, and their grades, row by row as they finish."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation
from sftflow.checkpoint import Assistant
from sftflow.errors import ContextError, TaskError
from sftflow.evaluation.journal import EvalRow, Key, key_of
from sftflow.evaluation.multiple_choice import ItemPrompt, chat_letters, letter_scores, plain_letters
from sftflow.evaluation.weights import finite_logits
from sftflow.generation.request import GenerationRequest, Reply
from sftflow.generation.sampling import NEAR
from sftflow.tasks import Item, Task, TaskSource, make_task

Arm = Literal["chat", "plain"]
PLAIN_STOPS = Task.plain_stops
SEED = 1234  # of the evaluation items: fixed, so that every model answers the same ones
Step = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """A task with the items that every model is asked.

    limit: as it was asked for.   available: how many items there are without it; None: as many as `items`.
    """

    name: str
    task: Task
    items: tuple[Item, ...]
    limit: int | None = None
    available: int | None = None

    @property
    def by_letter(self) -> bool:
        """Whether it is answered by the probabilities of letters instead of a generated reply."""
        return all(item.choices for item in self.items)


def open_tasks(
    specs: Sequence[str], limit: int | None, identity: dict[str, str] | None = None, *, allow_code: bool = False
) -> list[TaskRun]:
    """`name` or `name=PATH` -> tasks with their items. A name that comes again gets its file's name behind it.

    Raises TaskError for an unknown one, and for one that runs code where that is not allowed.
    """
    out: list[TaskRun] = []
    for spec in specs:
        name, _, path = (part.strip() for part in spec.partition("="))
        options = {"identity": identity} if identity else {}
        task = make_task(name, TaskSource(path=path or None, seed=SEED, limit=limit, options=options))
        if task.runs_code and not allow_code:
            raise TaskError(name, "it runs code that the model wrote", "allow that with --allow-code (docs/sandbox.md)")
        items = tuple(task.items("test"))
        if not items:
            raise TaskError(spec, "no items to ask", "check the file and --limit")
        if any(run.name == name for run in out):
            name = f"{name}-{Path(path).stem}" if path else name
        if any(run.name == name for run in out):
            raise TaskError(spec, "the task is named twice", "leave one out")
        out.append(TaskRun(name=name, task=task, items=items, limit=limit, available=_available(task, items)))
    return out


def _available(task: Task, items: Sequence[Item]) -> int:
    """How many items the task has without its limit."""
    if task.source.limit is None:
        return len(items)
    if task.n_rows is not None:
        return task.n_rows
    return max(len(items), len(type(task)(replace(task.source, limit=None)).items("test")))


def chat_prompt(assistant: Assistant, item: Item) -> tuple[int, ...]:
    """The item's prompt ids in the assistant's chat format."""
    rendered = assistant.renderer.render(Conversation(item.messages, source=item.id), add_generation_prompt=True)
    return tuple(int(i) for i in rendered.ids)


def plain_ids(assistant: Assistant, text: str) -> tuple[int, ...]:
    """Plain text as the base was pretrained to read it: with the tokenizer's own BOS, without control tokens."""
    opening = assistant.tokenizer("").input_ids  # BOS where the tokenizer writes one
    if opening and opening[-1] == assistant.tokenizer.eos_token_id != assistant.tokenizer.bos_token_id:
        opening = opening[:-1]
    return (*opening, *assistant.renderer.encode_plain(text))


def prompts_of(assistant: Assistant, run: TaskRun, arm: Arm) -> list[ItemPrompt]:
    """What the model is given for each item. Raises TaskError where the task cannot be asked in this format."""
    if run.by_letter and arm == "chat":
        return chat_letters(assistant.renderer, run.items, run.name)
    if run.by_letter:
        return plain_letters(lambda text: plain_ids(assistant, text), run.items, run.name)
    asked = [chat_prompt(assistant, i) if arm == "chat" else plain_ids(assistant, i.plain) for i in run.items]
    return [ItemPrompt(ids=ids, letters={}) for ids in asked]


def require_askable(renderer: Renderer, runs: Sequence[TaskRun]) -> None:
    """Raises TaskError where a multiple-choice task cannot be asked in this format: before minutes are spent."""
    for run in runs:
        if run.by_letter:
            chat_letters(renderer, run.items[:1], run.name)


def grade_in_memory(assistant: Assistant, run: TaskRun, step: Step) -> list[EvalRow]:
    """The rows of `evaluate` in the chat format, in the items' order, without a file."""
    prompts = prompts_of(assistant, run, "chat")
    keys = [key_of(item, prompt.ids) for item, prompt in zip(run.items, prompts, strict=True)]
    rows: dict[Key, EvalRow] = {}
    with Grading(run, prompts, keys, lambda row: rows.update({row.key: row}), step) as grading:
        ask_items(assistant, run, "chat", prompts, range(len(keys)), grading)
    return [rows[key] for key in keys]


class Grading:
    """Grades replies and writes their rows; tasks that run code grade beside the generation, on every core."""

    def __init__(
        self,
        run: TaskRun,
        prompts: Sequence[ItemPrompt],
        keys: Sequence[Key],
        keep: Callable[[EvalRow], None],
        step: Step,
    ) -> None:
        self.run, self.prompts, self.keys, self.keep, self.step = run, prompts, keys, keep, step
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1) if run.task.runs_code else None
        self._futures: list[Future[None]] = []

    def __enter__(self) -> Grading:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
            for future in self._futures if kind is None else []:
                future.result()

    def book(
        self,
        i: int,
        text: str,
        finish: str,
        *,
        ids: tuple[int, ...] = (),
        n: int = 0,
        seconds: float = 0.0,
        near_ties: int = 0,
    ) -> None:
        """Grade the reply to item i, at once or soon. An error in grading shows at the next reply."""
        item, prompt = self.run.items[i], self.prompts[i].ids

        def work() -> None:
            too_long = finish == "too_long"
            row = EvalRow(
                id=item.id,
                question="\n\n".join(m.text for m in item.messages),
                answer=item.answer,
                reply=text,
                score=0.0 if too_long else self.run.task.grade(item, text),
                finish_reason=finish,
                n_prompt=len(prompt),
                n_generated=n,
                seconds=round(seconds, 3),
                prompt_sha256=self.keys[i][1],
                item_sha256=self.keys[i][2],
                near_ties=near_ties,
                details=self.run.task.details(item, text),
                ids=ids,
            )
            self.keep(row)
            self.step(1)

        if self._pool is None:
            work()
        else:
            for future in self._futures:
                if future.done():
                    future.result()
            self._futures = [f for f in self._futures if not f.done()]
            self._futures.append(self._pool.submit(work))


def ask_items(
    assistant: Assistant,
    run: TaskRun,
    arm: Arm,
    prompts: Sequence[ItemPrompt],
    wanted: Sequence[int],
    grading: Grading,
) -> None:
    """Generate, or choose, the replies to the items `wanted`; each is booked as it finishes.

    Raises RunError where the model's logits are not finite.
    """
    context = assistant.engine.context
    fitting = [i for i in wanted if len(prompts[i].ids) < context]
    if wanted and not fitting:
        shortest = min(len(prompts[i].ids) for i in wanted)
        raise ContextError(run.name, f"no prompt fits a context of {context} tokens (shortest: {shortest})", "drop it")
    for i in wanted:
        if len(prompts[i].ids) >= context:
            grading.book(i, "", "too_long")
    most = 1 if run.by_letter else run.task.max_new_tokens
    longest = max((len(prompts[i].ids) + most for i in fitting), default=0)
    assistant.engine.decode_mode(longest)  # found out before logits are looked at: it may try ways that give none
    with finite_logits(assistant.model, f"{assistant.name}: {run.name}"):
        if run.by_letter:
            _choose(assistant, run, prompts, fitting, grading)
        else:
            _generate(assistant, run, arm, prompts, fitting, grading)


def _generate(
    assistant: Assistant,
    run: TaskRun,
    arm: Arm,
    prompts: Sequence[ItemPrompt],
    wanted: Sequence[int],
    grading: Grading,
) -> None:

    def done(number: int, reply: Reply) -> None:
        grading.book(
            wanted[number],
            _trimmed(reply.text, run.task) if arm == "plain" else reply.text,
            reply.finish_reason,
            ids=reply.ids,
            n=reply.n_generated,
            seconds=reply.seconds,
            near_ties=len(reply.near_ties),
        )

    requests = [
        GenerationRequest(
            prompt_ids=prompts[i].ids,
            max_new_tokens=run.task.max_new_tokens,
            stop_texts=run.task.plain_stops if arm == "plain" else (),
            use_python=arm == "chat",
        )
        for i in wanted
    ]
    assistant.engine.generate(requests, done)


def _trimmed(text: str, task: Task) -> str:
    """A reply in plain text without the space around it; code keeps its first line's indentation."""
    return text.rstrip() if task.runs_code else text.strip()


def _choose(
    assistant: Assistant, run: TaskRun, prompts: Sequence[ItemPrompt], wanted: Sequence[int], grading: Grading
) -> None:
    """Multiple choice: the item's own letter with the highest probability."""

    def done(number: int, scores: dict[str, float]) -> None:
        i = wanted[number]
        best, second = sorted(scores, key=lambda c: -scores[c])[:2]
        ids = prompts[i].letters[best]
        near = int(scores[best] - scores[second] < NEAR)
        grading.book(i, best, "stop", ids=ids, n=len(ids), near_ties=near)

    letter_scores(assistant.engine, [prompts[i] for i in wanted], done)
