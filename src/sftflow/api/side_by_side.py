"""`sf.ask` and `sf.diff`: models side by side, in what they reply and in their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftflow.api.assistant import base_beside, load
from sftflow.api.rows import Chat, conversation_of_chat
from sftflow.api.shared import ModelLike, model_id, name_of, parts_of, quiet
from sftflow.chat.schema import Conversation
from sftflow.comparison import weights
from sftflow.foundation.errors import RecipeError
from sftflow.generation.request import Reply
from sftflow.report.tables import as_html, as_text, asked_table, weights_table


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What models reply to the same questions; prints as a table, a column a model.

    questions: as they were asked.   replies: of each model by its name, in the order of the questions.
    """

    questions: tuple[Conversation, ...]
    replies: Mapping[str, tuple[Reply, ...]]

    def __str__(self) -> str:
        return as_text(asked_table(self.questions, self.replies))

    def _repr_html_(self) -> str:
        return as_html(asked_table(self.questions, self.replies))


def ask(
    models: ModelLike | Sequence[ModelLike] | Mapping[str, ModelLike],
    questions: Chat | Sequence[Chat],
    *,
    system: str | None = None,
    **sampling: Any,
) -> Replies:
    """Ask models the same questions, each in its own chat format.

    models: one, several, or several by the names that the table shall give them.   questions: texts, or conversations
    that wait for a reply.   sampling: as for `Assistant.chat`; without any, replies are decoded greedily.
    """
    if isinstance(models, Mapping):
        named = dict(models)
    else:
        several: Sequence[Any] = list(models) if isinstance(models, list | tuple) else [models]
        named = {model_id(name_of(m)): m for m in several}
        if len(named) < len(several):
            raise RecipeError("models", "two have one name", "give a mapping of names to models")
    chats: Any = [questions] if _is_one(questions) else questions
    asked = tuple(conversation_of_chat(chat, system) for chat in chats)
    quiet()
    replies = {}
    for name, model in named.items():
        assistant = load(model)
        replies[name] = tuple(assistant.engine.generate([assistant.request(q, **sampling) for q in asked]))
    return Replies(questions=asked, replies=replies)


def _is_one(questions: Any) -> bool:
    """Whether it is one conversation: a text, a row, or a list whose entries are messages; or nothing to go through."""
    if isinstance(questions, str | Mapping | Conversation) or not isinstance(questions, Iterable):
        return True
    first = questions[0] if isinstance(questions, Sequence) and questions else None
    return isinstance(first, Mapping) and "role" in first


@dataclass(frozen=True, kw_only=True)
class WeightChange(weights.WeightChange):
    """How two models differ tensor by tensor; prints as a table."""

    def __str__(self) -> str:
        return as_text(weights_table(self))

    def _repr_html_(self) -> str:
        return as_html(weights_table(self))


def diff(base: ModelLike, trained: ModelLike) -> WeightChange:
    """Whether two models are of one class and have tensors of the same names and shapes, and how far each kind of
    weights has moved from the first to the second."""
    after = load(trained)
    return WeightChange(**parts_of(weights.weight_change(base_beside(base, after).model, after.model)))
