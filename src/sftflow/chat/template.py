"""A format's Jinja template, compiled: messages -> text, refusals as FormatError.

The environment is the one transformers renders chat templates in (sandboxed, `trim_blocks`, `lstrip_blocks`, loop
controls, its own `tojson`), without the import of transformers: rendering processes start in a tenth of a second.
The tests compare the two on every real template at hand.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Container
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from sftflow.chat.calculator_parts import flatten_python
from sftflow.chat.call_arguments import Forms, forms_written, in_form
from sftflow.chat.content_parts import Messages, in_parts, roles_in_parts
from sftflow.chat.format import ChatFormat
from sftflow.chat.schema import Conversation, Message
from sftflow.chat.template_environment import Namespace, environment
from sftflow.chat.watch import View, Watch, Watched, goes_forward
from sftflow.foundation.errors import FormatError, first_line

_GOES_ON = "zqgoeson "
_DEFAULTED = re.compile(r"set\s+(\w+)\s*=\s*\1\b|(?<![\w.])(\w+) is (?:not )?defined")


@functools.lru_cache(maxsize=64)
def _code_of(template: str) -> CodeType:
    """Compiled once for all the arguments that are tried with it."""
    return environment().compile(template)


@functools.lru_cache(maxsize=64)
def _free_names(template: str) -> frozenset[str]:
    """What it reads and does not set, or only to a default: {% set thinking = thinking | default(0) %}."""
    tree = environment().parse(template)
    written = {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx != "load"}
    written -= {m.group(1) or m.group(2) for m in _DEFAULTED.finditer(template)}
    return frozenset(jinja2.meta.find_undeclared_variables(tree) - written)


@functools.lru_cache(maxsize=64)
def _can_be_watched(template: str) -> bool:
    return goes_forward(environment().parse(template))


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation, with its messages in the shape that the format's templates take.   control: the tokenizer's
    control tokens, in a text."""

    conversation: Conversation
    messages: Messages
    control: re.Pattern[str]

    @property
    def tools(self) -> list[dict[str, Any]]:
        return list(self.conversation.tools)

    @property
    def source(self) -> str:
        return self.conversation.source

    @property
    def shape_key(self) -> tuple[tuple[str, str | bool], ...] | None:
        """What rows of text turns only have in common: roles, and the blank contents. None where it has more."""
        if self.conversation.tools or not all(len(m) == 2 and type(m["content"]) is str for m in self.messages):
            return None
        return tuple((m["role"], m["content"].strip() == "" and m["content"]) for m in self.messages)

    @property
    def texts(self) -> list[str]:
        """The contents that are not blank, of a row that has a `shape_key`."""
        return [m["content"] for m in self.messages if m["content"].strip()]


class Template:
    """A format's template with its arguments and clock.

    python: (call start, call end, output start, output end) where format and tokenizer have calculator tokens.
    control: any of the control tokens, in a text; whoever knows more of them than the tokenizer marks says so.
    """

    control: re.Pattern[str] = re.compile("(?!)")

    def __init__(self, chat_format: ChatFormat, names: dict[str, str], special: Container[str]) -> None:
        """names: what the template may call tokens by, e.g. {"bos_token": "<s>"}.   special: the tokenizer's control
        tokens. Raises FormatError where the template does not compile."""
        python = chat_format.python
        self.python = python if python and all(token in special for token in python) else None
        self.format = chat_format
        self._environment = environment()
        self._context = {**names, **chat_format.kwargs, "strftime_now": chat_format.clock, "documents": None}
        try:
            globals = dict(self._environment.globals)  # not a ChainMap, which takes long to copy for each rendering
            self._compiled = jinja2.Template.from_code(self._environment, _code_of(chat_format.template), globals)
        except Exception as error:  # of Jinja, and of Python where blocks are nested too deeply
            fact = f"the chat template does not compile ({first_line(error) or type(error).__name__})"
            line = getattr(error, "lineno", None)
            place = f"{chat_format.name}:{line}" if line else chat_format.name
            raise FormatError(place, fact, "mend the template, or use another format") from None

    def row(self, conversation: Conversation) -> Row:
        """Calculator parts become plain text where the format has no tokens for them."""
        messages = [as_dict(m, keep_python=self.python is not None) for m in conversation.messages]
        return Row(conversation, self._with_calls(messages), self.control)

    def text(self, messages: Messages, tools: Any, add_generation_prompt: bool, place: str) -> str:
        """The rendering, where asked with the generation prompt. Raises FormatError in the template's own words."""
        return self._text(self._parted(messages), tools, add_generation_prompt, place)

    def up_to_the_end(self, row: Row, text: str) -> str:
        """A row's rendering up to the end of its last message's text, as transformers' `continue_final_message` finds
        it. Raises FormatError where what the template writes depends on how that goes on."""
        *before, last = row.messages
        parts = last["content"]
        if isinstance(parts, str):
            going_on: Any = parts + _GOES_ON
        else:
            going_on = [*parts[:-1], {**parts[-1], "text": parts[-1]["text"] + _GOES_ON}]
        longer = self.text([*before, {**last, "content": going_on}], row.tools, False, row.source)
        head, mark, rest = longer.rpartition(_GOES_ON.strip())
        said = (parts if isinstance(parts, str) else parts[-1]["text"]).strip()
        # Where the template strips, so is what is continued. (A blank of its own may stand behind it.)
        for end in (head, head.rstrip()) if rest.startswith(" ") else (head.rstrip(),):
            if mark and said in end and text.startswith(end):
                return end
        fact = f"the {self.format.name} format does not write the last message so that it could be continued"
        raise FormatError(f"{row.source}.messages[{len(before)}]", fact, "let the model begin the reply")

    def as_given(self, messages: Messages) -> Messages:
        """The messages with contents as lists of parts where the template leaves texts out, and the arguments of calls
        in a form of which it writes JSON."""
        return self._parted(self._with_calls(messages))

    def _parted(self, messages: Messages) -> Messages:
        return in_parts(messages, self._in_parts) if self._in_parts else messages

    def _with_calls(self, messages: Messages) -> Messages:
        if not any("tool_calls" in m for m in messages):
            return messages
        return [
            {**m, "tool_calls": [_normal_call(c, self._forms) for c in m["tool_calls"]]} if m.get("tool_calls") else m
            for m in messages
        ]

    @functools.cached_property
    def _forms(self) -> Forms:
        """The forms in which the template takes the arguments of calls."""
        return forms_written(lambda messages, tools: self._text(messages, tools, False, "probe"))

    @functools.cached_property
    def _in_parts(self) -> frozenset[str]:
        """The roles whose contents the template wants as parts."""
        if not re.search(r"\btext\b", self.format.template):
            return frozenset()
        return roles_in_parts(lambda messages: self._text(self._with_calls(messages), (), False, "probe"))

    def _text(self, messages: Messages, tools: Any, add_generation_prompt: bool, place: str) -> str:
        try:
            text = self._compiled.render(
                self._context, messages=messages, tools=list(tools) or None, add_generation_prompt=add_generation_prompt
            )
            text.isascii() or text.encode()  # half a surrogate pair, which a template can write, is no text
            return text
        except jinja2.TemplateError as error:
            fact = f"the {self.format.name} format refuses it: {error}"
            if isinstance(error, jinja2.exceptions.SecurityError):
                raise FormatError(place, fact, "mend the template, or use another format") from None
            said = "; " in str(error)  # what to do, as our own formats do
            raise FormatError(place, fact, "" if said else "change the row, or use another format") from None
        except Exception as error:  # what templates do with a row may end in any of Python's own
            fact = f"the {self.format.name} format cannot express it ({type(error).__name__}: {first_line(error)})"
            raise FormatError(
                place, fact, "take out of the row what the template does not expect, or use another format"
            ) from None

    def watched(self, messages: Messages, tools: Any, add_generation_prompt: bool) -> Watched | None:
        """The rendering, and of each message where in it the template asked for it, and in which state. None where that
        cannot be watched."""
        if not _can_be_watched(self.format.template):
            return None
        watch = self._environment.watch = Watch(self._parted(messages), Namespace)
        given = dict(messages=View(watch), tools=list(tools) or None, add_generation_prompt=add_generation_prompt)
        written, is_whole = [], True
        try:
            context = self._compiled.new_context({**self._context, **given, "namespace": watch.namespace})
            for text in self._compiled.root_render_func(context):
                written.append(text)
                watch.n_written += len(text)
        except Exception:  # of the template or of the watch: what was asked for before remains true
            is_whole = False
        finally:
            self._environment.watch = None
        return Watched("".join(written), {} if watch.looks_back else watch.at, is_whole and not watch.looks_back)

    def generated(self, messages: Messages, tools: Any, place: str) -> list[str] | None:
        """The texts inside the template's `{% generation %}` marks; None where it has no such marks."""
        if "endgeneration" not in self.format.template:
            return None
        kept = self._environment.generated = []
        try:
            self.text(messages, tools, False, place)
        finally:
            self._environment.generated = None
        return kept

    def arguments(self) -> list[str]:
        """Names the template reads that nobody sets: its own arguments, such as `enable_thinking`. Those that speak
        of thinking come first."""
        known = {"messages", "tools", "add_generation_prompt", "continue_final_message", *self._context}
        known |= set(self._environment.globals)
        free = {name for name in _free_names(self.format.template) - known if not name.endswith("_token")}
        return sorted(free, key=lambda name: (not any(w in name for w in ("think", "reason")), name))


def as_dict(message: Message, *, keep_python: bool) -> dict[str, Any]:
    """A message in the shape templates expect; calculator parts become plain text unless `keep_python`."""
    if message.uses_python and not keep_python:
        message = replace(message, parts=flatten_python(message.parts))
    out = message.to_json()
    out.pop("weight", None)
    if out["content"] is None:
        out["content"] = ""
    if message.reasoning_content is not None:
        out["thinking"] = message.reasoning_content  # what some templates call it; transformers sets both
    return out


def _normal_call(call: dict[str, Any], forms: Forms) -> dict[str, Any]:
    """A tool call in the shape templates expect: a function with arguments in one of the forms."""
    function = dict(call.get("function", {k: v for k, v in call.items() if k in ("name", "arguments")}))
    function["arguments"] = in_form(function.get("arguments") or {}, forms)
    out = {k: v for k, v in call.items() if k in ("id", "index", "type", "function")}
    return {**({} if "type" in out else {"type": "function"}), **out, "function": function}
