"""A model's replies to a task's items, generated or chosen, and their grades, row by row as they finish."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sftflow.chat.thoughts import learn_thoughts, split_thoughts
from sftflow.checkpoint import Assistant
from sftflow.evaluation.journal import EvalRow, Journal, Key, key_of
from sftflow.evaluation.options import Arm, EvalTask
from sftflow.evaluation.prompts_for import ItemPrompt, letter_scores, prompts_for
from sftflow.foundation.errors import ContextError, RunError
from sftflow.foundation.ranks import cores, ranks, shared_out
from sftflow.generation.engine import Engine
from sftflow.generation.request import GenerationRequest, Reply
from sftflow.generation.sampling import NEAR
from sftflow.tasks import Item, Task


@dataclass(frozen=True)
class Question:
    """An item with its prompt, and which of the replies to it this one is, from 0."""

    item: Item
    prompt: ItemPrompt
    sample: int

    @property
    def seed(self) -> int:
        """Of what is drawn for the reply: another one for each item and sample, the same for every model."""
        return int.from_bytes(hashlib.sha256(f"{self.item.id}:{self.sample}".encode()).digest()[:8], "little")


Asked = Sequence[Question]
Grade = Callable[[Question, Reply | None], None]


def whole_batches(prompts: Sequence[Sequence[int]], engine: Engine, *, by_beginning: bool = False) -> list[list[int]]:
    """Numbers of prompts in even batches that stay whole, whoever computes them: those of similar lengths together, the
    longest first; or those that begin alike.

    What runs side by side decides a reply's last bits, and at a near-tie the reply. So the batches hang on the prompts
    alone, and neither on the number of processes nor on what is known already. Each is twice as many as run at once: a
    reply that ends makes room for another.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]) if by_beginning else (-len(prompts[i]),))
    parts = -(-len(order) // (2 * engine.max_running))
    return [part.tolist() for part in np.array_split(np.array(order, int), parts)] if parts else []


class Asking:
    """A model asked a task's items in one arm: `rows` are those that are known, each of `batches` is still to be asked.

    keys: of all replies, by item and sample in their order.   costs: of each batch, in tokens.
    """

    def __init__(
        self,
        assistant: Assistant,
        task: EvalTask,
        arm: Arm,
        journal: Journal | None,
        progress: Callable[[int], None] = lambda k: None,
    ) -> None:
        """journal: the rows that it holds are not asked again, and new ones are added; None: all are asked, and none is
        written.   progress: told how many more rows there are.

        Raises TaskError where the task cannot be asked in this format, ContextError where no prompt fits the model's
        context.
        """
        self.assistant, self.task, self.arm, self.journal, self.progress = assistant, task, arm, journal, progress
        pairs = zip(task.items, prompts_for(assistant, task, arm), strict=True)
        questions = [Question(item, prompt, n) for item, prompt in pairs for n in range(task.how.samples)]
        prompts = [q.prompt for q in questions]
        self.keys = [key_of(q.item, q.prompt.ids, q.sample) for q in questions]
        known = journal.rows if journal else {}
        self.rows: dict[Key, EvalRow] = {key: known[key] for key in self.keys if key in known}
        first = {key: number for number, key in reversed(list(enumerate(self.keys)))}  # of items that are the same, one
        context = assistant.engine.context
        fitting = [number for number in sorted(first.values()) if len(prompts[number].ids) < context]
        if not fitting:
            shortest = min(len(prompt.ids) for prompt in prompts)
            raise ContextError(
                task.name,
                f"no prompt fits a context of {context} tokens (shortest: {shortest})",
                "leave the task out, or take a model with a longer context",
            )
        whole = whole_batches([prompts[n].ids for n in fitting], assistant.engine, by_beginning=task.by_letter)
        numbers = [[fitting[i] for i in batch] for batch in whole]
        numbers.append([number for number in first.values() if len(prompts[number].ids) >= context])
        asked = [[number for number in batch if self.keys[number] not in self.rows] for batch in numbers]
        self.batches: list[Asked] = [[questions[n] for n in batch] for batch in asked if batch]
        most = 1 if task.by_letter else task.max_new_tokens
        self.costs = [sum(len(q.prompt.ids) + most for q in batch) for batch in self.batches]
        if ranks().first:
            progress(len(self.keys) - sum(map(len, self.batches)))
        self._longest = max(len(prompts[number].ids) for number in fitting) + most

    def ask(self, number: int) -> list[EvalRow]:
        """The rows of a batch. Raises RunError where the model's logits are not finite."""
        out: list[EvalRow] = []

        def graded(row: EvalRow) -> None:
            out.append(self.journal.add(row) if self.journal else row)
            self.progress(1)

        assistant, context = self.assistant, self.assistant.engine.context
        fitting = [q for q in self.batches[number] if len(q.prompt.ids) < context]
        with _grader(self.task.task, graded) as grade:
            for question in self.batches[number]:
                if len(question.prompt.ids) >= context:
                    grade(question, None)
            # Found out before logits are looked at: it may try ways that give none.
            assistant.engine.decode_mode(self._longest)
            with finite_logits(assistant.model, f"{assistant.name}: {self.task.name}"):
                if self.task.by_letter:
                    _choose(assistant, fitting, grade)
                else:
                    _generate(assistant, self.task, self.arm, fitting, grade)
        return out


def ask_all(askings: Sequence[Asking], agree: tuple[type[BaseException], ...] = ()) -> list[list[EvalRow]]:
    """For each asking the rows of all its items in their order, those of an item side by side. The batches of all
    are shared out over the ranks.

    agree: see `shared_out`.
    """
    batches = [(asking, number) for asking in askings for number in range(len(asking.batches))]
    costs = [asking.costs[number] for asking, number in batches]
    found = shared_out(costs, lambda i: batches[i][0].ask(batches[i][1]), agree)
    for (asking, _), rows in zip(batches, found, strict=True):
        asking.rows |= {row.key: row for row in rows}
    if ranks().first and ranks().world > 1:
        askings[-1].progress(0)  # the others may have finished last
    return [[asking.rows[key] for key in asking.keys] for asking in askings]


@contextmanager
def _grader(task: Task, keep: Callable[[EvalRow], None]) -> Iterator[Grade]:
    """Gives the function that grades a reply and tells `keep` of its row; for tasks that run code it does so beside the
    generation, on every core, and an error in grading shows at the next reply."""

    def finish(question: Question, reply: Reply | None) -> None:
        keep(_row(task, question, reply))

    if not task.runs_code:
        yield finish
        return
    pending: list[Future[None]] = []

    def grade(question: Question, reply: Reply | None) -> None:
        for future in pending:
            if future.done():
                future.result()
        pending.append(pool.submit(finish, question, reply))

    with ThreadPoolExecutor(cores()) as pool:
        try:
            yield grade
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for future in pending:
        future.result()


def _row(task: Task, question: Question, reply: Reply | None) -> EvalRow:
    """reply None: the prompt does not fit the model's context."""
    text, item, prompt = reply.text if reply else "", question.item, question.prompt
    _, prompt_sha256, item_sha256, sample = key_of(item, prompt.ids, question.sample)
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
        sample=sample,
    )


def _generate(assistant: Assistant, task: EvalTask, arm: Arm, asked: Asked, grade: Grade) -> None:
    renderer = assistant.renderer
    marks = learn_thoughts(renderer) if arm == "chat" else None
    marks = marks if marks and marks.codes else None  # those that are text a grader reads itself (`tasks.answers`)

    def done(number: int, reply: Reply) -> None:
        question = asked[number]
        if arm == "plain":
            reply = plain_reply(task.task, question.item, reply)
        elif marks:
            begun = marks.begun(renderer.decode(question.prompt.ids[-64:]))
            reply = replace(reply, text=split_thoughts(marks, reply.text, begun)[1])
        grade(question, reply)

    requests = [
        GenerationRequest(
            prompt_ids=question.prompt.ids,
            max_new_tokens=task.max_new_tokens,
            temperature=task.how.temperature,
            seed=question.seed,
            stop_texts=task.task.plain_stops if arm == "plain" else (),
            use_python=arm == "chat",
            shown=marks.shown(renderer) if marks else (),
        )
        for question in asked
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
    for number, scores in letter_scores(assistant.engine, [question.prompt for question in asked]):
        question = asked[number]
        prompt = question.prompt
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
        grade(question, reply)


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
