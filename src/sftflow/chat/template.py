"""A format's Jinja template, compiled: messages -> text, refusals as FormatError."""

from __future__ import annotations

import copy
import json
from typing import Any

from sftflow.chat.flatten import flatten_python
from sftflow.chat.format import ChatFormat
from sftflow.chat.schema import Message
from sftflow.errors import FormatError

Messages = list[dict[str, Any]]


class Template:
    """Renders messages (as `as_dict` gives them) with the format's arguments and clock.

    names: what the template may call tokens by, e.g. {"bos_token": "<s>"}.
    """

    def __init__(self, chat_format: ChatFormat, names: dict[str, str]) -> None:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.format, self._names = chat_format, names
        self._template_error = TemplateError
        try:
            self._compiled = _compile_jinja_template(chat_format.template)
        except TemplateError as error:
            raise FormatError(chat_format.name, f"the chat template does not compile ({error})", "mend it") from None

    def text(self, messages: Messages, tools: Any, reply: bool, place: str) -> str:
        """The rendering, with the generation prompt where `reply`. Raises FormatError in the template's own words."""

        def render(chat: Messages) -> str:
            out: str = self._compiled.render(
                messages=chat,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=reply,
                strftime_now=self.format.clock,
                **{**self._names, **self.format.kwargs},
            )
            return out

        try:
            try:
                return render(messages)
            except TypeError:
                if not any(m.get("tool_calls") for m in messages):
                    raise
                return render(_calls_as_text(messages))  # templates that join arguments as a string
        except self._template_error as error:
            raise FormatError(place, f"the {self.format.name} format refuses it: {error}", "change the row") from None
        except (TypeError, KeyError, AttributeError) as error:
            fact = f"the {self.format.name} format cannot express it ({type(error).__name__}: {error})"
            raise FormatError(place, fact, "change the row or the format") from None


def as_dict(message: Message, *, keep_python: bool) -> dict[str, Any]:
    """A message in the shape templates expect; calculator parts become plain text unless `keep_python`."""
    parts = message.parts
    if message.uses_python and not keep_python:
        parts = flatten_python(parts)
    content: Any
    if any(p.kind != "text" for p in parts):
        content = [{"type": p.kind, "text": p.text} for p in parts]
    else:
        content = "".join(p.text for p in parts)
    out: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        out["tool_calls"] = [_normal_call(c) for c in message.tool_calls]
    for key in ("tool_call_id", "name", "reasoning_content"):
        value = getattr(message, key)
        if value is not None:
            out[key] = value
    return out


def _normal_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call in the shape templates expect: a function object whose arguments are an object."""
    function = dict(call.get("function", {k: v for k, v in call.items() if k in ("name", "arguments")}))
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
            arguments = parsed if isinstance(parsed, dict) else {"value": parsed}
        except ValueError:
            arguments = {"value": arguments}
    function["arguments"] = arguments
    return {**{k: v for k, v in call.items() if k in ("id", "index")}, "type": "function", "function": function}


def _calls_as_text(messages: Messages) -> Messages:
    out = copy.deepcopy(messages)
    for message in out:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return out
