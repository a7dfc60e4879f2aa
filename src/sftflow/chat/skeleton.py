"""Proof that a text is the template's own words with the row's contents in their places.

    messages    user "hi", assistant "yo"
    marked      user "⟦0⟧", assistant "⟦1⟧"
    skeleton    B U ⟦0⟧ /U A ⟦1⟧ /A            the template rendered on the marks: its pieces are its own words
    filled      B U hi /U A yo /A               equal to the row's text: then every content is known to be where the
                                                marks are, none has vanished, and what is special in the pieces is
                                                the template's, what is special in the contents is not

Some templates look into contents (they trim them, or cut reasoning off). A slot may therefore be filled with the
content stripped, or escaped as JSON; and where that does not fit, every word of the content gets a mark of its own, so
that tags and spaces stay visible to the template. What fits in no way is not proven.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

# Private-use pairs that can stand around a mark's number; the first that the row itself does not use is taken.
MARKS = (("\uf8f0", "\uf8f1"), ("\ue0f0", "\ue0f1"), ("\uf1d2", "\uf1d3"), ("\U000ff0f0", "\U000ff0f1"))
_WORDS = re.compile(r"(<[^<>\s]{1,40}>|\s+)")
_THINK = re.compile(r"<(/?)think(?:ing)?>")

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A place of the row whose value must be found in the text.

    message: its index, -1 for the tool definitions.   required: whether it may not be left out.
    exact: whether the value can only stand as it is, neither stripped nor escaped.
    """

    message: int
    where: str
    value: str
    required: bool
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The template's words around the slots: pieces[0] slot order[0] pieces[1] ... pieces[-1].

    starts: where each piece begins in the rendering with marks.
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    starts: tuple[int, ...]

    def fit(self, values: list[str], slots: list[Placeholder], text: str) -> list[tuple[int, int]] | None:
        """The span of every slot of `order` in the text, or None where the text is not this skeleton, filled."""
        parts = [self.pieces[0]]
        spans: list[tuple[int, int]] = []
        at = len(self.pieces[0])
        for slot, piece in zip(self.order, self.pieces[1:], strict=True):
            value = values[slot]
            end = at + len(value)
            spans.append((at, end))
            parts += (value, piece)
            at = end + len(piece)
        if at == len(text) and "".join(parts) == text:
            return spans
        return self._fit_forms(values, slots, text)

    def _fit_forms(self, values: list[str], slots: list[Placeholder], text: str) -> list[tuple[int, int]] | None:
        """Depth-first over the forms that each value may have taken; mostly the first that fits is the one."""
        if not text.startswith(self.pieces[0]):
            return None
        n = len(self.order)
        forms = [[values[s]] if slots[s].exact else _forms(values[s]) for s in self.order]
        tried = [0] * (n + 1)
        spans: list[tuple[int, int]] = []
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

    def piece_starts(self, spans: list[tuple[int, int]]) -> list[int]:
        """Where each piece begins in the text that `fit` gave these spans of."""
        return [0, *(end for _, end in spans)]


def _forms(value: str) -> list[str]:
    """A value as templates may write it: as it is, stripped, or as JSON (once, twice, in ASCII)."""
    once = json.dumps(value, ensure_ascii=False)[1:-1]
    every = [value, value.strip(), value.rstrip(), value.lstrip(), once, json.dumps(once, ensure_ascii=False)[1:-1]]
    ascii_blanks = " \t\n\r"
    every += [value.strip(ascii_blanks), value.rstrip(ascii_blanks), value.lstrip(ascii_blanks)]
    every += [json.dumps(value)[1:-1], value.strip("\n"), value.lstrip("\n"), value.rstrip("\n")]
    return list(dict.fromkeys(every))


class Marker:
    """Writes marks into a row's messages and tools, and reads them from the template's rendering."""

    def __init__(self, texts: str) -> None:
        free = [pair for pair in MARKS if pair[0] not in texts and pair[1] not in texts]
        self.pair = free[0] if free else None
        self.slots: list[Placeholder] = []

    def mark(self, slot: Placeholder) -> str:
        assert self.pair is not None
        self.slots.append(slot)
        return f"{self.pair[0]}{len(self.slots) - 1}{self.pair[1]}"

    def skeleton(self, rendering: str) -> Skeleton:
        assert self.pair is not None
        opening, closing = self.pair
        # JSON may have written the mark's signs as escapes.
        escaped = [re.escape(json.dumps(c)[1:-1]) for c in self.pair]
        pieces, order, starts = [], [], [0]
        for m in re.finditer(f"(?:{opening}|{escaped[0]})(\\d+)(?:{closing}|{escaped[1]})", rendering):
            pieces.append(rendering[starts[-1] : m.start()])
            order.append(int(m.group(1)))
            starts.append(m.end())
        pieces.append(rendering[starts[-1] :])
        return Skeleton(tuple(pieces), tuple(order), tuple(starts))

    # ---- what is marked

    def row(
        self, messages: Messages, tools: list[dict[str, Any]], required_reasoning: list[bool], *, words: bool
    ) -> tuple[Messages, list[dict[str, Any]]]:
        """The row with marks for its values. `required_reasoning[i]`: whether message i's reasoning may not be left
        out. With `words`, contents and reasoning are marked word by word."""
        marked = [self._message(i, m, required_reasoning[i], words=words) for i, m in enumerate(messages)]
        return marked, [self._tool(number, tool) for number, tool in enumerate(tools)]

    def _message(self, i: int, message: dict[str, Any], required: bool, *, words: bool) -> dict[str, Any]:
        where = f"messages[{i}]"
        out = dict(message)

        def content(value: str) -> str:
            thoughts_may_go = message["role"] == "assistant" and not required
            return self._text(Placeholder(i, f"{where}.content", value, True), words, thoughts_may_go)

        if isinstance(message["content"], str):
            out["content"] = content(message["content"])
        else:
            out["content"] = [{**part, "text": content(part["text"])} for part in message["content"]]
        if message.get("reasoning_content"):
            slot = Placeholder(i, f"{where}.reasoning_content", message["reasoning_content"], required)
            out["reasoning_content"] = out["thinking"] = self._text(slot, words, False)
        if "tool_calls" in message:
            out["tool_calls"] = [
                self._call(i, f"{where}.tool_calls[{k}]", c) for k, c in enumerate(message["tool_calls"])
            ]
        return out

    def _text(self, slot: Placeholder, words: bool, thoughts_may_go: bool) -> str:
        if not slot.value.strip():
            return slot.value  # templates treat an empty content in their own way: leave it to them
        if not words:
            return self.mark(slot)
        out, thinking = [], False
        for piece in _WORDS.split(slot.value):
            tag = _THINK.fullmatch(piece)
            if tag:
                thinking = not tag.group(1)
            if not piece or piece.isspace() or (piece.startswith("<") and _WORDS.fullmatch(piece)):
                out.append(piece)
            else:
                # Text before a closing tag without an opening one is reasoning, too.
                may_go = thoughts_may_go and (thinking or "</think" in slot.value.partition(piece)[2])
                out.append(
                    self.mark(Placeholder(slot.message, slot.where, piece, slot.required and not may_go, exact=True))
                )
        return "".join(out)

    def _call(self, i: int, where: str, call: dict[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        function["name"] = self.mark(Placeholder(i, where, function["name"], True))
        function["arguments"] = self._values(i, f"{where}.arguments", function["arguments"])
        return {**call, "function": function}

    def _values(self, i: int, where: str, value: Any) -> Any:
        """Every key and every string of a call's arguments."""
        if isinstance(value, dict):
            return {
                (self.mark(Placeholder(i, where, k, True)) if k.strip() else k): self._values(i, f"{where}.{k}", v)
                for k, v in value.items()
            }
        if isinstance(value, list):
            return [self._values(i, where, v) for v in value]
        return self.mark(Placeholder(i, where, value, True)) if isinstance(value, str) and value.strip() else value

    def _tool(self, number: int, tool: dict[str, Any]) -> dict[str, Any]:
        """Its name, description, and the names of its parameters."""
        where = f"tools[{number}]"
        inner = tool.get("function", tool)
        if not isinstance(inner, dict):
            return tool
        function = dict(inner)
        for key in ("name", "description"):
            if isinstance(function.get(key), str) and function[key].strip():
                function[key] = self.mark(Placeholder(-1, f"{where}.{key}", function[key], True))
        parameters = function.get("parameters")
        if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
            names: dict[str, str] = {}
            for name in parameters["properties"]:
                names[name] = self.mark(Placeholder(-1, f"{where}.parameters", name, True)) if name.strip() else name
            parameters = {**parameters, "properties": {names[k]: v for k, v in parameters["properties"].items()}}
            if isinstance(parameters.get("required"), list):
                parameters["required"] = [names.get(k, k) if isinstance(k, str) else k for k in parameters["required"]]
            function["parameters"] = parameters
        return {**tool, "function": function} if "function" in tool else function
