"""A model's replies to a task's items, generated or chosen, and their grades, row by row as they finish."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sftflow.chat.render import Renderer
from sftflow.chat.thoughts import ThoughtMarks, learn_thoughts, split_thoughts
from sftflow.checkpoint import Assistant
from sftflow.evaluation.journal import EvalRow, Journal, Key, key_of
from sftflow.evaluation.options import Arm, EvalTask
from sftflow.evaluation.prompts_for import ItemPrompt, letter_scores, prompts_for
from sftflow.evaluation.side_by_side import Asker, Work, batches_of, cost_of, finite_logits, generate
from sftflow.foundation.errors import ContextError
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


Grade = Callable[[Question, Reply | None], None]


def whole_batches(prompts: Sequence[Sequence[int]], engine: Engine) -> list[list[int]]:
    """Numbers of prompts that are read and not answered, in even batches that stay whole (why: `batches_of`):
    those that begin alike together, twice as many as run at once."""
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    parts = -(-len(order) // (2 * engine.max_running))
    return [part.tolist() for part in np.array_split(np.array(order, int), parts)] if parts else []


class Asking:
    """A model asked a task's items in one arm, an `Asker` of the replies that it generates.

    questions, keys: of all replies, by item and sample in their order.   rows: those that are known.   chosen: numbers
    of the questions still to be answered by letter, in batches, and of those that do not fit the context.
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
        self.name, self._fresh = task.name, list[EvalRow]()
        pairs = zip(task.items, prompts_for(assistant, task, arm), strict=True)
        self.questions = [Question(item, prompt, n) for item, prompt in pairs for n in range(task.how.samples)]
        self.keys = [key_of(q.item, q.prompt.ids, q.sample) for q in self.questions]
        known = journal.rows if journal else {}
        self.rows: dict[Key, EvalRow] = {key: known[key] for key in self.keys if key in known}
        self.known = frozenset(number for number, key in enumerate(self.keys) if key in self.rows)
        first = {key: number for number, key in reversed(list(enumerate(self.keys)))}  # of items that are the same, one
        context, lengths = assistant.engine.context, [len(q.prompt.ids) for q in self.questions]
        fitting = [number for number in sorted(first.values()) if lengths[number] < context]
        if not fitting:
            raise ContextError(
                task.name,
                f"no prompt fits a context of {context} tokens (shortest: {min(lengths)})",
                "leave the task out, or take a model with a longer context",
            )
        self._marks = thought_marks(assistant.renderer, arm)
        letters = [self.questions[n].prompt.ids for n in fitting if task.by_letter]
        chosen = [[fitting[i] for i in batch] for batch in whole_batches(letters, assistant.engine)]
        chosen.append([number for number in first.values() if lengths[number] >= context])
        self.chosen = [new for batch in chosen if (new := [n for n in batch if n not in self.known])]
        self.requests = {} if task.by_letter else {n: self._request(self.questions[n]) for n in fitting}
        if ranks().first:
            missing = sum(map(len, self.chosen)) + len(self.requests.keys() - self.known)
            progress(len(self.keys) - missing)

    def _request(self, question: Question) -> GenerationRequest:
        task = self.task
        return GenerationRequest(
            prompt_ids=question.prompt.ids,
            max_new_tokens=task.max_new_tokens,
            temperature=task.how.temperature,
            seed=question.seed,
            stop_texts=task.task.plain_stops if self.arm == "plain" else (),
            use_python=self.arm == "chat",
            shown=self._marks.shown(self.assistant.renderer) if self._marks else (),
            loops_at_once=True,
        )

    @contextmanager
    def taking(self) -> Iterator[Callable[[int, Reply], None]]:
        """As `Asker.taking` says: each reply is graded and booked."""
        with _grader(self.task.task, self._keep) as grade:

            def take(number: int, reply: Reply) -> None:
                question = self.questions[number]
                if self.arm == "plain":
                    reply = plain_reply(self.task.task, question.item, reply)
                elif self._marks:
                    begun = self._marks.begun(self.assistant.renderer.decode(question.prompt.ids[-64:]))
                    reply = replace(reply, text=split_thoughts(self._marks, reply.text, begun)[1])
                grade(question, reply)

            yield take

    def choose(self, number: int) -> None:
        """Answer a batch of `chosen`. Raises RunError where the model's logits are not finite."""
        asked = [self.questions[n] for n in self.chosen[number]]
        assistant = self.assistant
        fitting = [q for q in asked if len(q.prompt.ids) < assistant.engine.context]
        with _grader(self.task.task, self._keep) as grade:
            for question in asked:
                if len(question.prompt.ids) >= assistant.engine.context:
                    grade(question, None)
            if fitting:
                assistant.engine.decode_mode(max(len(q.prompt.ids) for q in fitting) + 1)
                with finite_logits(assistant.model, f"{assistant.name}: {self.task.name}"):
                    _choose(assistant, fitting, grade)

    def left(self) -> Work:
        """What is not known yet; of letters nothing is generated."""
        read = [len(self.questions[n].prompt.ids) for batch in self.chosen for n in batch]
        unknown = (request for n, request in self.requests.items() if n not in self.known)
        return Work(replies=len(read), read=sum(n for n in read if n < self.assistant.engine.context)) + Work.of(
            unknown
        )

    def _keep(self, row: EvalRow) -> None:
        self._fresh.append(self.journal.add(row) if self.journal else row)
        self.progress(1)

    def drain(self) -> list[EvalRow]:
        """The rows that are new since it was last asked."""
        new, self._fresh = self._fresh, []
        return new

    def take_in(self, drained: Sequence[EvalRow]) -> None:
        self.rows |= {row.key: row for row in drained}


def ask_all(
    askings: Sequence[Asking], agree: tuple[type[BaseException], ...] = (), also: Sequence[Asker] = ()
) -> list[list[EvalRow]]:
    """For each asking the rows of all its items in their order, those of an item side by side. What is asked of one
    model is asked together (`side_by_side`), and all batches are shared out over the ranks.

    agree: see `shared_out`.   also: who else wants replies; each `take_in`s what all ranks have drained of it.
    """
    askers: list[Asker] = [*askings, *also]
    chosen = [(asking, number) for asking in askings for number in range(len(asking.chosen))]
    together = batches_of(askers)
    costs = [float(sum(len(a.questions[q].prompt.ids) + 1 for q in a.chosen[n])) for a, n in chosen]
    costs += [cost_of(batch, askers) for batch in together]

    def ask(part: int) -> list[list[Any]]:
        if part < len(chosen):
            asking, number = chosen[part]
            asking.choose(number)
        else:
            generate(together[part - len(chosen)], askers)
        return [asker.drain() for asker in askers]

    for drained in shared_out(costs, ask, agree):
        for asker, new in zip(askers, drained, strict=True):
            asker.take_in(new)
    if askings and ranks().first and ranks().world > 1:
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


def thought_marks(renderer: Renderer, arm: Arm) -> ThoughtMarks | None:
    """Of thoughts that stand between control tokens; those that are text a grader reads itself (`tasks.answers`)."""
    marks = learn_thoughts(renderer) if arm == "chat" else None
    return marks if marks and marks.codes else None


def plain_reply(task: Task, item: Item, reply: Reply) -> Reply:
    """A base's reply in plain text as it is graded: without the space around it (code keeps its first line's
    indentation), and where the task has it so as far as its first blank line, unless the whole is graded higher."""
    text = reply.text.rstrip() if task.runs_code else reply.text.strip()
    if task.plain_paragraph:
        text = max((text.partition("\n\n")[0].rstrip(), text), key=lambda said: task.grade(item, said))
    return replace(reply, text=text)


def _choose(assistant: Assistant, asked: Sequence[Question], grade: Grade) -> None:
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
