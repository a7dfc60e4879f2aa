"""A chat template's own arguments, as requests set them."""

from __future__ import annotations

import json
from typing import Any

from sftflow.serving.errors import wrong
from sftflow.serving.model_entry import ServedModel
from sftflow.serving.schemas import PromptBody

_OWN = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
}

_THINKING = ("enable_thinking", "thinking")


def template_arguments(model: ServedModel, body: PromptBody) -> dict[str, Any]:
    """The template's own arguments that a body sets: those of `chat_template_kwargs`, and `enable_thinking` and
    `reasoning_effort` beside it. Raises ApiError 400 for one that the template does not read: it would change nothing,
    and nobody would know. Whether a model thinks may be asked for where the format has no switch for it, and it does so
    anyway."""
    renderer, given = model.assistant.renderer, dict(body.chat_template_kwargs or {})
    places = {name: f"chat_template_kwargs.{name}" for name in given}
    for name in ("enable_thinking", "reasoning_effort"):
        value = getattr(body, name)
        if value is not None and given.setdefault(name, value) != value:
            raise wrong(name, "chat_template_kwargs says otherwise")
    known = {*renderer.arguments(), *renderer.format.kwargs}
    if given.get("reasoning_effort") == "none" and "reasoning_effort" not in known:  # OpenAI's word for no thoughts
        del given["reasoning_effort"]
        if given.setdefault("enable_thinking", False):
            raise wrong("reasoning_effort", "enable_thinking says otherwise")
    out: dict[str, Any] = {}
    anyway = [] if known & set(_THINKING) else _THINKING
    for name, value in given.items():
        place = places.get(name, name)
        if name in known:
            if renderer.special_re.search(json.dumps({name: value}, ensure_ascii=False)):
                raise wrong(place, "it holds a control token")
            out[name] = value
        elif name in _OWN or name.endswith("_token"):
            raise wrong(place, "it is not the caller's to set", "unsupported_parameter")
        elif value is not None and not (name in anyway and _thinks(model) in (None, value)):
            fact = f"the {renderer.format.name} chat format does not read it"
            remedy = f"it reads {', '.join(sorted(known))}" if known else "it reads none; leave it out"
            raise wrong(place, f"{fact}; {remedy}", "unsupported_parameter")
    return out


def _thinks(model: ServedModel) -> bool | None:
    """Whether replies have thoughts: always, never, or as the model likes (None)."""
    if model.thoughts is None:
        return False
    return True if model.thoughts.always else None
