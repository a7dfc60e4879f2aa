"""Marks in place of a row's values, and what the template writes around them.

    messages    user "hi", assistant "yo"
    marked      user "⟦0⟧", assistant "⟦1⟧"
    skeleton    B U ⟦0⟧ /U A ⟦1⟧ /A            the template rendered on the marks: its pieces are its own words
    filled      B U hi /U A yo /A               equal to the row's text: then every content is known to be where the
                                                marks are, none has vanished, and what is special in the pieces is
                                                the template's, what is special in the contents is not

Some templates look into contents (they trim them, or cut reasoning off). A placeholder may therefore be filled with
the content stripped, or escaped as JSON; and where that does not fit, every word of the content gets a mark of its own,
so that tags and spaces stay visible to the template. What fits in no way is not proven.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from sftflow.chat.call_arguments import with_texts
from sftflow.chat.template import Row
from sftflow.foundation.errors import MaskError

# Private-use pairs that can stand around a mark's number; the first that the row itself does not use is taken.
MARKS = (("\uf8f0", "\uf8f1"), ("\ue0f0", "\ue0f1"), ("\uf1d2", "\uf1d3"), ("\U000ff0f0", "\U000ff0f1"))
_WORDS = re.compile(r"(<[^<>\s]{1,40}>|\s+)")
_NONE = re.compile("(?!)")
_THINK = re.compile(r"<(/?)think(?:ing)?>")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A place of the row whose value must be found in the text.

    message: its index, -1 for the tool definitions.   where: the place, as `messages[1].content`.
    required: whether it may not be left out.
    exact: whether the value can only stand as it is, neither stripped nor escaped.
    """

    message: int
    where: str
    value: str
    required: bool = True
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The template's words around the marks: pieces[0], mark order[0], pieces[1], mark order[1] ... pieces[-1].

    starts: where each piece begins in the rendering with marks.   exact: of each mark in `order`, as in Placeholder.
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    starts: tuple[int, ...]
    exact: tuple[bool, ...]

    def find(self, values: list[str], text: str) -> list[Span] | None:
        """The span in the text of each mark's value, in the order of `order`; None where the text is not this skeleton
        with the values in it."""
        parts = [self.pieces[0]]
        spans: list[Span] = []
        at = len(self.pieces[0])
        for mark, piece in zip(self.order, self.pieces[1:], strict=True):
            value = values[mark]
            end = at + len(value)
            spans.append((at, end))
            parts += (value, piece)
            at = end + len(piece)
        if at == len(text) and "".join(parts) == text:
            return spans
        return self._find_forms(values, text)

    def _find_forms(self, values: list[str], text: str) -> list[Span] | None:
        """Depth-first over the forms that each value may have taken; mostly the first that fits is the one."""
        if not text.startswith(self.pieces[0]):
            return None
        n = len(self.order)
        forms = [[values[m]] if exact else _forms(values[m]) for m, exact in zip(self.order, self.exact, strict=True)]
        tried = [0] * (n + 1)
        spans: list[Span] = []
        at, i = len(self.pieces[0]), 0
        budget = 50 * (n + 1)  # against a row of adversarial repetitions
        while budget > 0:
            budget -= 1
            if i == n and at == len(text):
                return spans
            if i < n and tried[i] < len(forms[i]):
                form, piece = forms[i][tried[i]], self.pieces[i + 1]
                tried[i] += 1
                if text.startswith(form, at) and text.startswith(piece, at + len(form)):
                    spans.append((at, at + len(form)))
                    at += len(form) + len(piece)
                    i += 1
                    tried[i] = 0
                continue
            if i == 0:
                return None
            i -= 1
            at = spans.pop()[0]
        return None


def _forms(value: str) -> list[str]:
    """A value as templates may write it: as it is, stripped, or as JSON (once, twice, in ASCII)."""
    once = json.dumps(value, ensure_ascii=False)[1:-1]
    every = [value, value.strip(), value.rstrip(), value.lstrip(), once, json.dumps(once, ensure_ascii=False)[1:-1]]
    ascii_blanks = " \t\n\r"
    every += [value.strip(ascii_blanks), value.rstrip(ascii_blanks), value.lstrip(ascii_blanks)]
    every += [json.dumps(value)[1:-1], value.strip("\n"), value.lstrip("\n"), value.rstrip("\n")]
    return list(dict.fromkeys(every))


class MarkedRow:
    """A row with marks for its values.

    messages, tools: for the template.   placeholders: what each mark, by its number, stands for.
    """

    def __init__(self, row: Row, *, words: bool) -> None:
        """words: contents and reasoning are marked word by word. Raises MaskError where the row itself uses all the
        characters that marks are made of."""
        said = json.dumps([row.messages, row.tools], ensure_ascii=False)
        free = [pair for pair in MARKS if pair[0] not in said and pair[1] not in said]
        if not free:
            fact = "its contents use every private-use character kept for the proof"
            raise MaskError(row.source, fact, "remove them")
        self._pair, self._words = free[0], words
        self._control = row.control if row.control.search(said) else _NONE
        self.placeholders: list[Placeholder] = []
        last_user = max((i for i, m in enumerate(row.messages) if m["role"] == "user"), default=-1)
        supervised = set(row.conversation.supervised)
        # An earlier turn's reasoning may be left out where the turn is not supervised.
        self.messages = [
            self._message(i, m, m["role"] != "assistant" or i in supervised or i > last_user)
            for i, m in enumerate(row.messages)
        ]
        self.tools = [self._tool(f"tools[{number}]", tool) for number, tool in enumerate(row.tools)]

    @property
    def values(self) -> list[str]:
        return [placeholder.value for placeholder in self.placeholders]

    def skeleton(self, rendering: str) -> Skeleton:
        """The template's rendering of the marked row, taken apart at the marks."""
        opening, closing = self._pair
        # JSON may have written the mark's signs as escapes.
        escaped = [re.escape(json.dumps(c)[1:-1]) for c in self._pair]
        pieces, order, starts = [], [], [0]
        for m in re.finditer(f"(?:{opening}|{escaped[0]})(\\d+)(?:{closing}|{escaped[1]})", rendering):
            pieces.append(rendering[starts[-1] : m.start()])
            order.append(int(m.group(1)))
            starts.append(m.end())
        pieces.append(rendering[starts[-1] :])
        exact = tuple(self.placeholders[mark].exact for mark in order)
        return Skeleton(tuple(pieces), tuple(order), tuple(starts), exact)

    # ---- what is marked

    def _mark(self, placeholder: Placeholder) -> str:
        self.placeholders.append(placeholder)
        return f"{self._pair[0]}{len(self.placeholders) - 1}{self._pair[1]}"

    def _unless_blank(self, message: int, where: str, value: Any) -> Any:
        """A mark for a text. Templates treat an empty text in their own way: that is left to them."""
        return self._mark(Placeholder(message, where, value)) if isinstance(value, str) and value.strip() else value

    def _message(self, i: int, message: dict[str, Any], required: bool) -> dict[str, Any]:
        """required: whether the reasoning may not be left out."""
        where = f"messages[{i}]"
        out = dict(message)

        def content(value: str) -> str:
            return self._text(Placeholder(i, f"{where}.content", value), thoughts_may_go=not required)

        if isinstance(message["content"], str):
            out["content"] = content(message["content"])
        else:
            out["content"] = [{**part, "text": content(part["text"])} for part in message["content"]]
        if message.get("reasoning_content"):
            reasoning = Placeholder(i, f"{where}.reasoning_content", message["reasoning_content"], required)
            out["reasoning_content"] = out["thinking"] = self._text(reasoning, thoughts_may_go=False)
        if "tool_calls" in message:
            out["tool_calls"] = [self._call(i, f"{where}.tool_calls[{k}]", c) for k, c in enumerate(out["tool_calls"])]
        for key in ("name", "tool_call_id"):
            if key in message:
                out[key] = self._control_marked(i, f"{where}.{key}", message[key])
        return out

    def _text(self, whole: Placeholder, *, thoughts_may_go: bool) -> str:
        """A content or reasoning, marked as one or word by word. thoughts_may_go: whether what stands in it between
        <think> tags may be left out."""
        value = whole.value
        if not value.strip():
            return value
        if not self._words:
            return self._mark(whole)
        out, thinking = [], False
        for piece in _WORDS.split(value):
            tag = _THINK.fullmatch(piece)
            if tag:
                thinking = not tag.group(1)
            shown = tag or not self._control.fullmatch(piece)  # a control token's look-alike the template need not see
            if not piece or piece.isspace() or (shown and piece.startswith("<") and _WORDS.fullmatch(piece)):
                out.append(piece)
            else:
                # Text before a closing tag without an opening one is reasoning, too.
                may_go = thoughts_may_go and (thinking or "</think" in value.partition(piece)[2])
                required = whole.required and not may_go
                out.append(self._mark(Placeholder(whole.message, whole.where, piece, required, exact=True)))
        return "".join(out)

    def _call(self, i: int, where: str, call: dict[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        function["name"] = self._mark(Placeholder(i, where, function["name"]))
        arguments, place = function["arguments"], f"{where}.arguments"
        if isinstance(arguments, str):
            function["arguments"] = with_texts(arguments, lambda text: self._unless_blank(i, place, text))
        else:
            function["arguments"] = self._values(i, place, arguments)
        return self._control_marked(i, where, {**call, "function": function})

    def _control_marked(self, message: int, where: str, value: Any) -> Any:
        """A value of which nothing else is marked, an id or what is deep inside a tool definition: with marks for the
        control tokens that stand in it."""
        if isinstance(value, str):
            return self._control.sub(lambda m: self._mark(Placeholder(message, where, m.group(), False)), value)
        if isinstance(value, dict):
            names = {key: self._control_marked(message, where, key) for key in value}
            return {names[key]: self._control_marked(message, where, inner) for key, inner in value.items()}
        return [self._control_marked(message, where, v) for v in value] if isinstance(value, list) else value

    def _values(self, i: int, where: str, value: Any) -> Any:
        """Every key and every string of a call's arguments."""
        if isinstance(value, dict):
            return {self._unless_blank(i, where, k): self._values(i, f"{where}.{k}", v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._values(i, where, v) for v in value]
        return self._unless_blank(i, where, value)

    def _tool(self, where: str, tool: dict[str, Any]) -> dict[str, Any]:
        """Its name, description, and the names of its parameters."""
        inner = tool.get("function", tool)
        if not isinstance(inner, dict):
            return tool
        function = dict(inner)
        for key in ("name", "description"):
            if key in function:
                function[key] = self._unless_blank(-1, f"{where}.{key}", function[key])
        parameters = function.get("parameters")
        if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
            names = {name: self._unless_blank(-1, f"{where}.parameters", name) for name in parameters["properties"]}
            parameters = {**parameters, "properties": {names[k]: v for k, v in parameters["properties"].items()}}
            if isinstance(parameters.get("required"), list):
                parameters["required"] = [names.get(k, k) if isinstance(k, str) else k for k in parameters["required"]]
            function["parameters"] = parameters
        return self._control_marked(-1, where, {**tool, "function": function} if "function" in tool else function)
