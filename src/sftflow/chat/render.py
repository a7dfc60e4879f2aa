'''The only renderer: conversation -> ids and loss mask, for training, evaluation, terminal and server.

    """user 'hi', assistant 'yo'  ->  ids  B U hi /U A yo /A
                                      mask 0 0 0  0  0 1  1 """

The text is the template's own rendering, to the letter. Where a reply begins is not guessed from marker strings:
it is the length of the template's own prompt for that turn (history + generation prompt), which must be a prefix
of the whole text. Where it ends is the first end-of-turn token the TEMPLATE wrote after that point; the end-of-turn
token is learnt from a probe rendering. What cannot be proven this way is refused with MaskError.

template.py turns messages into the text, encode.py the text into ids; here the two meet the mask.
'''

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.encode import MARK_PATTERN, Encoder, Literal, mark
from sftflow.chat.format import ChatFormat
from sftflow.chat.schema import Conversation, Message
from sftflow.chat.template import Messages, Template, as_dict
from sftflow.errors import FormatError, MaskError


@dataclass(frozen=True, slots=True)
class Rendered:
    """ids: (n,) token ids.   mask: (n,) 1 where supervised.   text: what was encoded.
    boundary_splits: prompt/reply boundaries that a token would have straddled, encoded on both sides separately.
    turns: (first token, role) of each turn in order, for looking at the row; () where they are not known."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int8]
    text: str
    source: str = ""
    boundary_splits: int = 0
    turns: tuple[tuple[int, str], ...] = ()

    @property
    def n_supervised(self) -> int:
        return int(self.mask.sum())


class Renderer:
    """Renders conversations with one tokenizer and one format.

    >>> renderer.render(conversation).ids              # a training example, with its mask
    >>> renderer.render(conversation, reply=True).ids  # the prompt that evaluation and server send
    """

    def __init__(self, tokenizer: Any, chat_format: ChatFormat) -> None:
        self.tokenizer, self.format = tokenizer, chat_format
        names = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        self._text = Template(chat_format, names).text
        self._encoder = Encoder(tokenizer)
        self.special = self._encoder.special
        self._skeletons: dict[tuple[Any, ...], list[str] | None] = {}
        self._has_python = chat_format.python is not None and all(t in self.special for t in chat_format.python)
        self.end_token = chat_format.end if chat_format.end in self.special else self._probe_end()

    # ---- the public part

    def render(self, conversation: Conversation, *, reply: bool = False) -> Rendered:
        """One conversation -> ids and mask. With reply=True, the prompt for the next assistant turn (mask all 0).

        Raises FormatError where the template refuses the conversation (its own message quoted) and MaskError where
        the mask cannot be proven.
        """
        messages = [self._message(m) for m in conversation.messages]
        text = self._text(messages, conversation.tools, reply, conversation.source)
        starts = self._reply_starts(conversation, messages, text, must_hold=not reply)
        if not reply:
            self._nothing_vanishes(conversation, messages, text)
        literals = self._literals(text, conversation, messages, reply)
        encoded = self._encoder.encode(text, literals, sorted(set(starts.values())), conversation.source)
        mask = np.zeros(len(encoded.ids), np.int8)
        if not reply:
            begin, end = np.asarray(encoded.begin), np.asarray(encoded.end)
            for left, right in self._supervised_spans(conversation, text, starts, literals):
                mask[(begin >= left) & (end <= right) & (end > begin)] = 1
        return Rendered(np.asarray(encoded.ids, np.int64), mask, text, conversation.source, encoded.splits)

    def render_rows(self, conversation: Conversation) -> list[Rendered]:
        """Training examples of one row: one, or one per supervised assistant turn where the template rewrites
        history (so that each turn is trained after exactly the prompt that serving will send)."""
        try:
            return [self.render(conversation)]
        except MaskError as whole:
            turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.weight]
            if len(turns) < 2:
                raise
            rows = []
            for turn in turns:
                messages = [
                    replace(m, weight=0) if m.role == "assistant" and i != turn else m
                    for i, m in enumerate(conversation.messages[: turn + 1])
                ]
                try:
                    rows.append(self.render(replace(conversation, messages=tuple(messages))))
                except MaskError:
                    raise whole from None
            return rows

    def stop_ids(self) -> list[int]:
        """Ids at which a reply ends: the end-of-turn token, and the tokenizer's own end of text."""
        ids = [self.special[self.end_token]] if self.end_token else []
        eos = self.tokenizer.eos_token_id
        if eos is not None and eos not in ids:
            ids.append(eos)
        return ids

    def python_ids(self) -> tuple[int, int, int, int] | None:
        """(call start, call end, output start, output end) ids where the format has calculator tokens."""
        if not self._has_python or self.format.python is None:
            return None
        a, b, c, d = (self.special[t] for t in self.format.python)
        return a, b, c, d

    def encode_plain(self, text: str) -> list[int]:
        """Text that comes from content -> ids; special-token strings stay text."""
        return self._encoder.encode_pieces([("content", text)]).ids

    # ---- text

    def _message(self, message: Message) -> dict[str, Any]:
        return as_dict(message, keep_python=self._has_python)

    def _reply_starts(
        self, conversation: Conversation, messages: Messages, text: str, *, must_hold: bool
    ) -> dict[int, int]:
        """For each assistant turn, the character at which its reply begins. A turn whose prompt is not a prefix of
        the text is left out where nothing is supervised there, and refused where it is (`must_hold`)."""
        starts = {}
        for turn, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            optional = not message.weight or not must_hold
            place = f"{conversation.source}.messages[{turn}]"
            try:
                prompt = self._text(messages[:turn], conversation.tools, True, place)
            except FormatError as error:
                if optional:
                    continue
                raise MaskError(place, f"the format gives no prompt for this reply ({error.fact})", "") from None
            if not text.startswith(prompt):
                if optional:
                    continue
                raise MaskError(
                    place,
                    f"the {self.format.name} format's prompt for this reply is not a prefix of the training text",
                    "the template rewrites history or pre-fills the reply; use another --format",
                )
            starts[turn] = len(prompt)
        return starts

    def _nothing_vanishes(self, conversation: Conversation, messages: Messages, text: str) -> None:
        """Every content, call and tool definition of the row must be in the text. It is tested with unique marks in
        their place, so that a text which happens to occur elsewhere cannot stand in for one that was left out."""
        supervised = any(m.role == "assistant" and m.weight for m in conversation.messages)
        if not supervised or self._is_substitution(conversation, messages, text):
            return
        marked = copy.deepcopy(messages)
        marks: list[tuple[str, str]] = []

        def marked_as(where: str, value: str) -> str:
            if not value.strip():
                return value
            marks.append((mark(len(marks)), where))
            return marks[-1][0]

        last_user = max((i for i, m in enumerate(conversation.messages) if m.role == "user"), default=-1)
        for number, message in enumerate(marked):
            name = f"messages[{number}]"
            if isinstance(message["content"], str):
                message["content"] = marked_as(f"{name}.content", message["content"])
            else:
                for part in message["content"]:
                    part["text"] = marked_as(f"{name}.content", part["text"])
            original = conversation.messages[number]
            if message.get("reasoning_content") and (original.weight or number > last_user):
                message["reasoning_content"] = marked_as(f"{name}.reasoning_content", message["reasoning_content"])
            for call in message.get("tool_calls", []):
                call["function"]["name"] = marked_as(f"{name}.tool_calls", call["function"]["name"])
                arguments = call["function"]["arguments"]
                for key in list(arguments):
                    arguments[marked_as(f"{name}.tool_calls", key)] = arguments.pop(key)
        tools = copy.deepcopy(list(conversation.tools))
        for number, tool in enumerate(tools):
            function = tool.get("function", tool)
            if isinstance(function.get("name"), str):
                function["name"] = marked_as(f"tools[{number}]", function["name"])
        try:
            skeleton = self._text(marked, tools, False, conversation.source)
        except FormatError:
            raise MaskError(
                conversation.source,
                f"the {self.format.name} format looks into the contents, so it cannot be proven that none is left out",
                "use another --format",
            ) from None
        for unique, where in marks:
            if unique not in skeleton:
                raise MaskError(
                    f"{conversation.source}.{where}",
                    f"the {self.format.name} format leaves it out of the training text",
                    "remove it from the row or use a --format that writes it",
                )

    def _is_substitution(self, conversation: Conversation, messages: Messages, text: str) -> bool:
        """Whether the text is the rendering of a conversation of the same shape (same roles and kinds of parts, marks
        for contents) with this row's contents put where the marks are. It proves that nothing vanished, and costs no
        rendering once a shape is known."""
        if conversation.tools or any(m.tool_calls or m.reasoning_content for m in conversation.messages):
            return False
        contents: list[str] = []
        shape: list[tuple[Any, ...]] = []
        for message in messages:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [p["text"] for p in content]
            kinds = () if isinstance(content, str) else tuple(p["type"] for p in content)
            shape.append((message["role"], message.get("name") is None, kinds))
            contents.extend(parts)
        if not all(c.strip() for c in contents):
            return False
        key = tuple(shape)
        if key not in self._skeletons:
            marked, count = copy.deepcopy(messages), 0
            for message in marked:
                if isinstance(message["content"], str):
                    message["content"], count = mark(count), count + 1
                    continue
                for part in message["content"]:
                    part["text"], count = mark(count), count + 1
            try:
                skeleton = self._text(marked, (), False, conversation.source)
            except FormatError:
                skeleton = ""
            pieces = re.split(MARK_PATTERN, skeleton)
            whole = sorted(map(int, pieces[1::2])) == list(range(count))
            self._skeletons[key] = pieces if whole else None
        found = self._skeletons[key]
        if found is None:
            return False
        filled = [contents[int(p)] if i % 2 else p for i, p in enumerate(found)]
        return "".join(filled) == text

    def _literals(self, text: str, conversation: Conversation, messages: Messages, reply: bool) -> list[Literal]:
        """Special tokens in the text that the template wrote, not the content. Where content holds look-alikes, it
        is rendered again with each look-alike replaced by a mark; what is special then is the template's."""
        if not self._has_look_alike(conversation):
            return self._encoder.literals(text)
        place = conversation.source
        found: list[str] = []
        hidden_messages, hidden_tools = self._encoder.hide([messages, list(conversation.tools)], found, place)
        hidden = self._text(hidden_messages, hidden_tools, reply, place)
        return self._encoder.literals_behind(hidden, found, text, place)

    def _has_look_alike(self, conversation: Conversation) -> bool:
        search = self._encoder.special_re.search
        return any(
            search(m.text)
            or search(m.reasoning_content or "")
            or (m.tool_calls and search(json.dumps(m.tool_calls, ensure_ascii=False)))
            for m in conversation.messages
        ) or bool(conversation.tools and search(json.dumps(conversation.tools, ensure_ascii=False)))

    # ---- mask

    def _probe_end(self) -> str | None:
        """The end-of-turn token: the first special token the template writes after a reply."""
        probe = [{"role": "user", "content": "U0probe"}, {"role": "assistant", "content": "A0probe"}]
        try:
            text = self._text(probe, [], False, "probe")
        except FormatError:
            return None
        at = text.find("A0probe")
        found = self._encoder.special_re.search(text, at + len("A0probe")) if at >= 0 else None
        if found is None or text[at + len("A0probe") : found.start()].strip():
            return None
        return found.group()

    def _supervised_spans(
        self, conversation: Conversation, text: str, starts: dict[int, int], literals: list[Literal]
    ) -> list[tuple[int, int]]:
        """Character spans the model must produce: from each supervised reply's start through its end-of-turn token,
        without what the calculator wrote."""
        spans: list[tuple[int, int]] = []
        turns = sorted(starts)
        for number, turn in enumerate(turns):
            if not conversation.messages[turn].weight:
                continue
            start = starts[turn]
            limit = starts[turns[number + 1]] if number + 1 < len(turns) else len(text)
            mine = [x for x in literals if start <= x[0] < limit]
            place = f"{conversation.source}.messages[{turn}]"
            end = next((x for x in mine if x[2] == self.end_token), None)
            if self.end_token is None or end is None:
                raise MaskError(
                    place,
                    f"the {self.format.name} format writes no end-of-turn token: it could not learn to stop",
                    "use another --format",
                )
            self._prove_end(conversation, turn, text, start, end, place)
            cursor = start
            if self._has_python and self.format.python is not None:
                _, _, opening, closing = self.format.python
                for s, e, token in mine:
                    if e > end[0]:
                        break
                    if token == opening:
                        spans.append((cursor, s))
                    elif token == closing:
                        cursor = e
            spans.append((cursor, end[1]))
        return spans

    def _prove_end(
        self, conversation: Conversation, turn: int, text: str, start: int, end: Literal, place: str
    ) -> None:
        """The reply's content lies before its end-of-turn token and the next message's content after it."""
        own = self._message(conversation.messages[turn])
        contents = own["content"] if isinstance(own["content"], list) else [{"text": own["content"]}]
        inside = text[start : end[0]]
        if not all(c["text"].strip() in inside for c in contents):
            raise MaskError(place, "its content does not lie between its prompt and its end-of-turn token", "")
        if turn + 1 < len(conversation.messages):
            following = self._message(conversation.messages[turn + 1])["content"]
            if isinstance(following, str) and following.strip() and following.strip() not in text[end[1] :]:
                raise MaskError(place, "the next message does not follow its end-of-turn token", "")
