"""The prompts of a task's items: in the model's chat format, or as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from sftflow.chat.render import Renderer
from sftflow.checkpoint import Assistant
from sftflow.evaluation.multiple_choice import ItemPrompt, chat_letters, chat_prompt, plain_letters
from sftflow.evaluation.options import Arm, EvalTask


def prompts_for(assistant: Assistant, task: EvalTask, arm: Arm) -> list[ItemPrompt]:
    """What the model is given for each item. Raises TaskError where the task cannot be asked in this format."""
    if task.by_letter and arm == "chat":
        return chat_letters(assistant.renderer, task.items, task.name)
    if task.by_letter:
        return plain_letters(assistant.plain_ids, task.items, task.name)
    renderer = assistant.renderer
    ids = [chat_prompt(renderer, i) if arm == "chat" else assistant.plain_ids(i.plain) for i in task.items]
    return [ItemPrompt(ids=prompt, letters={}) for prompt in ids]


def require_askable(renderer: Renderer, tasks: Sequence[EvalTask]) -> None:
    """Raises TaskError where a multiple-choice task cannot be asked in this format: before minutes are spent."""
    for task in tasks:
        if task.by_letter:
            chat_letters(renderer, task.items[:1], task.name)
