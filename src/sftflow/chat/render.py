'''The only renderer: conversation -> ids and loss mask, for training, evaluation, terminal and server.

    """user 'hi', assistant 'yo'  ->  ids  B U hi /U A yo /A
                                      mask 0 0 0  0  0 1  1 """

The text is the template's own rendering, to the letter. Where a reply begins is not guessed from marker strings:
it is the length of the template's own prompt for that turn (history + generation prompt), which must be a prefix
of the whole text. Where it ends is the first end-of-turn token the TEMPLATE wrote after that point; the end-of-turn
token is learnt from a probe rendering. What cannot be proven this way is refused with MaskError.
'''

from __future__ import annotations

import bisect
import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.format import ChatFormat, tokenizer_json
from sftflow.chat.schema import Conversation, Message, Part
from sftflow.errors import FormatError, MaskError

MARK_OPEN, MARK_CLOSE = "\uf8f0", "\uf8f1"  # private-use characters: stand for content while literals are told apart
Literal = tuple[int, int, str]  # (start, end, token): a special token the template itself wrote


@dataclass(frozen=True, slots=True)
class Rendered:
    """ids: (n,) token ids.   mask: (n,) 1 where supervised.   text: what was encoded.
    boundary_splits: prompt/reply boundaries that a token would have straddled, encoded on both sides separately."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int8]
    text: str
    source: str = ""
    boundary_splits: int = 0

    @property
    def n_supervised(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True, slots=True)
class _Encoded:
    """ids with the character span [begin, end) of each."""

    ids: list[int] = field(default_factory=list)
    begin: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    splits: int = 0

    def __add__(self, other: _Encoded) -> _Encoded:
        return _Encoded(self.ids + other.ids, self.begin + other.begin, self.end + other.end)

    def shifted(self, by: int) -> _Encoded:
        if not by:
            return self
        return _Encoded(self.ids, [b + by for b in self.begin], [e + by for e in self.end])


def flatten_python(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Calculator parts as plain text, for formats without tokens for them: a call and its result become `48/2=24`.

    What the text around already says is not said twice: a call spelled out just before (`48/2 = `) and a result
    repeated just after are dropped.

    >>> flatten_python([Part("text", "She sold 48/2 = "), Part("python", "48/2"), Part("python_output", "24"),
    ...                 Part("text", "24 clips")])[0].text
    'She sold 48/2=24 clips'
    """
    out, result = "", ""
    for part in parts:
        if part.kind == "python":
            out = _drop_spelled_out(out, part.text) + part.text
            result = ""
        elif part.kind == "python_output":
            out += f"={part.text}"
            result = part.text
        else:
            repeats = result and part.text.startswith(result) and not re.match(r"[\d.]*\d", part.text[len(result) :])
            out += part.text[len(result) :] if repeats else part.text
            result = ""
    return (Part("text", out),)


def _drop_spelled_out(text: str, call: str) -> str:
    """`... 9 * 2 = $` before a call `9*2` -> `... $`."""
    tail = re.search(r"=\s*([$€£]?)\s*$", text)
    if tail is None:
        return text
    wanted, at = re.sub(r"\s", "", call), tail.start()
    for char in reversed(wanted):
        while at > 0 and text[at - 1].isspace():
            at -= 1
        if at == 0 or text[at - 1] != char:
            return text
        at -= 1
    if at > 0 and (text[at - 1].isalnum() or text[at - 1] == "."):
        return text  # the expression before is longer than the call
    return text[:at] + tail.group(1)


class Renderer:
    """Renders conversations with one tokenizer and one format.

    >>> renderer.render(conversation).ids              # a training example, with its mask
    >>> renderer.render(conversation, reply=True).ids  # the prompt that evaluation and server send
    """

    def __init__(self, tokenizer: Any, chat_format: ChatFormat) -> None:
        from jinja2 import TemplateError
        from tokenizers import Tokenizer
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.tokenizer, self.format = tokenizer, chat_format
        self._template_error = TemplateError
        try:
            self._template = _compile_jinja_template(chat_format.template)
        except TemplateError as error:
            raise FormatError(chat_format.name, f"the chat template does not compile ({error})", "mend it") from None
        data = tokenizer_json(tokenizer)
        data["post_processor"] = None  # it would add a BOS, and (byte-level) shorten the offsets by leading spaces
        self._encoder = Tokenizer.from_str(json.dumps(data))
        self.special: dict[str, int] = {t["content"]: t["id"] for t in data["added_tokens"] if t["special"]}
        self._special_ids = frozenset(self.special.values())
        self._id_to_special = {i: t for t, i in self.special.items()}
        longest_first = sorted(self.special, key=len, reverse=True)
        self._special_re = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._json = data
        self._skeletons: dict[tuple[Any, ...], list[str] | None] = {}
        self._alias: tuple[Any, dict[int, int]] | None = None
        self._names = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        self._has_python = chat_format.python is not None and all(t in self.special for t in chat_format.python)
        self.end_token = chat_format.end if chat_format.end in self.special else self._probe_end()

    # ---- the public part

    def render(self, conversation: Conversation, *, reply: bool = False) -> Rendered:
        """One conversation -> ids and mask. With reply=True, the prompt for the next assistant turn (mask all 0).

        Raises FormatError where the template refuses the conversation (its own message quoted) and MaskError where
        the mask cannot be proven.
        """
        messages = self._messages(conversation)
        text = self._text(messages, conversation.tools, reply, conversation.source)
        starts = self._reply_starts(conversation, messages, text, must_hold=not reply)
        if not reply:
            self._nothing_vanishes(conversation, messages, text)
        literals = self._literals(text, conversation, messages, reply)
        encoded = self._encode(text, literals, sorted(set(starts.values())), conversation.source)
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
        return self._encode_pieces([("content", text)]).ids

    # ---- text

    def _messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        return [self._message(m) for m in conversation.messages]

    def _message(self, message: Message) -> dict[str, Any]:
        parts = message.parts
        if message.uses_python and not self._has_python:
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

    def _text(self, messages: list[dict[str, Any]], tools: Any, reply: bool, place: str) -> str:
        def render(chat: list[dict[str, Any]]) -> str:
            out: str = self._template.render(
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

    def _reply_starts(
        self, conversation: Conversation, messages: list[dict[str, Any]], text: str, *, must_hold: bool
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

    def _nothing_vanishes(self, conversation: Conversation, messages: list[dict[str, Any]], text: str) -> None:
        """Every content, call and tool definition of the row must be in the text. It is tested with unique marks in
        their place, so that a text which happens to occur elsewhere cannot stand in for one that was left out."""
        if not any(m.role == "assistant" and m.weight for m in conversation.messages):
            return
        if self._is_substitution(conversation, messages, text):
            return
        marked = copy.deepcopy(messages)
        marks: list[tuple[str, str]] = []

        def mark(where: str, value: str) -> str:
            if not value.strip():
                return value
            marks.append((f"{MARK_OPEN}{len(marks)}{MARK_CLOSE}", where))
            return marks[-1][0]

        last_user = max((i for i, m in enumerate(conversation.messages) if m.role == "user"), default=-1)
        for number, message in enumerate(marked):
            name = f"messages[{number}]"
            if isinstance(message["content"], str):
                message["content"] = mark(f"{name}.content", message["content"])
            else:
                for part in message["content"]:
                    part["text"] = mark(f"{name}.content", part["text"])
            original = conversation.messages[number]
            if message.get("reasoning_content") and (original.weight or number > last_user):
                message["reasoning_content"] = mark(f"{name}.reasoning_content", message["reasoning_content"])
            for call in message.get("tool_calls", []):
                call["function"]["name"] = mark(f"{name}.tool_calls", call["function"]["name"])
                for key in list(call["function"]["arguments"]):
                    call["function"]["arguments"][mark(f"{name}.tool_calls", key)] = call["function"]["arguments"].pop(
                        key
                    )
        tools = copy.deepcopy(list(conversation.tools))
        for number, tool in enumerate(tools):
            function = tool.get("function", tool)
            if isinstance(function.get("name"), str):
                function["name"] = mark(f"tools[{number}]", function["name"])
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

    def _is_substitution(self, conversation: Conversation, messages: list[dict[str, Any]], text: str) -> bool:
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
                    message["content"], count = f"{MARK_OPEN}{count}{MARK_CLOSE}", count + 1
                    continue
                for part in message["content"]:
                    part["text"], count = f"{MARK_OPEN}{count}{MARK_CLOSE}", count + 1
            try:
                skeleton = self._text(marked, (), False, conversation.source)
            except FormatError:
                skeleton = ""
            pieces = re.split(f"{MARK_OPEN}(\\d+){MARK_CLOSE}", skeleton)
            whole = sorted(map(int, pieces[1::2])) == list(range(count))
            self._skeletons[key] = pieces if whole else None
        found = self._skeletons[key]
        if found is None:
            return False
        filled = [contents[int(p)] if i % 2 else p for i, p in enumerate(found)]
        return "".join(filled) == text

    # ---- ids

    def _encode(self, text: str, literals: list[Literal], boundaries: list[int], place: str) -> _Encoded:
        """Ids of the text with their character offsets. Where a token would straddle a boundary between prompt and
        reply, or the prompt alone would encode otherwise, the two sides are encoded separately."""

        def encode(left: int, right: int) -> _Encoded:
            inside = [(s - left, e - left, t) for s, e, t in literals if left <= s and e <= right]
            return self._encode_pieces(_pieces(text[left:right], inside)).shifted(left)

        done, start, splits = _Encoded(), 0, 0
        rest = encode(0, len(text))
        literal_ends = {end for _, end, _ in literals}
        for boundary in boundaries:
            if boundary in literal_ends or boundary >= len(text):
                continue  # a special token ends here (or the text does): nothing can straddle
            left = encode(start, boundary)
            n = len(left.ids)
            if rest.ids[:n] == left.ids and (n == len(rest.ids) or rest.begin[n] >= boundary):
                continue
            done, start, splits = done + left, boundary, splits + 1
            rest = encode(boundary, len(text))
        whole = replace(done + rest, splits=splits)
        n_special = sum(i in self._special_ids for i in whole.ids)
        if n_special != len(literals):
            raise MaskError(
                place,
                f"{n_special} control ids where the template wrote {len(literals)}",
                "the tokenizer turns content into control ids; remove the control-token strings from the row",
            )
        return whole

    def _literals(
        self, text: str, conversation: Conversation, messages: list[dict[str, Any]], reply: bool
    ) -> list[Literal]:
        """Special tokens in the text that the template wrote, not the content. Where content holds look-alikes, it
        is rendered again with each look-alike replaced by a mark; what is special then is the template's."""
        everything = [(m.start(), m.end(), m.group()) for m in self._special_re.finditer(text)]
        if not self._has_look_alike(conversation):
            return everything
        found: list[str] = []

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                if MARK_OPEN in value or MARK_CLOSE in value:
                    raise MaskError(conversation.source, "control-token strings beside private-use characters", "")

                def replace_one(m: re.Match[str]) -> str:
                    found.append(m.group())
                    return f"{MARK_OPEN}{len(found) - 1}{MARK_CLOSE}"

                return self._special_re.sub(replace_one, value)
            if isinstance(value, dict):
                return {hide(k): v if k in ("role", "type") else hide(v) for k, v in value.items()}
            return [hide(v) for v in value] if isinstance(value, list) else value

        hidden = self._text(hide(messages), hide(list(conversation.tools)), reply, conversation.source)
        out: list[Literal] = []
        shift = at = 0
        rebuilt = []
        pattern = re.compile(f"{MARK_OPEN}(\\d+){MARK_CLOSE}|{self._special_re.pattern}")
        for m in pattern.finditer(hidden):
            rebuilt.append(hidden[at : m.start()])
            at = m.end()
            if m.group(1) is None:
                out.append((m.start() + shift, m.end() + shift, m.group()))
                rebuilt.append(m.group())
            else:
                original = found[int(m.group(1))]
                shift += len(original) - (m.end() - m.start())
                rebuilt.append(original)
        rebuilt.append(hidden[at:])
        if "".join(rebuilt) != text:
            raise MaskError(
                conversation.source,
                "content holds control-token strings and the template changes its text by them",
                "remove those strings from the row",
            )
        return out

    def _has_look_alike(self, conversation: Conversation) -> bool:
        search = self._special_re.search
        return any(
            search(m.text)
            or search(m.reasoning_content or "")
            or (m.tool_calls and search(json.dumps(m.tool_calls, ensure_ascii=False)))
            for m in conversation.messages
        ) or bool(conversation.tools and search(json.dumps(conversation.tools, ensure_ascii=False)))

    def _encode_pieces(self, pieces: list[tuple[str, str]]) -> _Encoded:
        """Encode (kind, text) pieces, kind "special" or "content", to ids and their character offsets."""
        if any(kind == "content" and self._special_re.search(text) for kind, text in pieces):
            return self._encode_alias(pieces)
        encoding = self._encoder.encode("".join(t for _, t in pieces), add_special_tokens=False)
        return _Encoded(encoding.ids, [o[0] for o in encoding.offsets], [o[1] for o in encoding.offsets])

    def _encode_alias(self, pieces: list[tuple[str, str]]) -> _Encoded:
        """Encode with a twin of the tokenizer whose special tokens carry other names, so that their usual names in
        content are plain text while everything else (splitting, merging, prefix spaces) stays as it is."""
        from tokenizers import Tokenizer

        if self._alias is None:
            data = copy.deepcopy(self._json)
            for token in data["added_tokens"]:
                if token["special"]:
                    token["content"] = f"{MARK_OPEN}{token['content']}{MARK_CLOSE}"
            twin = Tokenizer.from_str(json.dumps(data))
            back: dict[int, int] = {}
            for renamed, original in zip(data["added_tokens"], self._json["added_tokens"], strict=True):
                new_id = twin.token_to_id(renamed["content"])
                assert new_id is not None, renamed
                back[new_id] = original["id"]
            self._alias = (twin, back)
        twin, back = self._alias
        parts, real_at, alias_at = [], [0], [0]
        for kind, text in pieces:
            written = f"{MARK_OPEN}{text}{MARK_CLOSE}" if kind == "special" else text
            parts.append(written)
            real_at.append(real_at[-1] + len(text))
            alias_at.append(alias_at[-1] + len(written))
        encoding = twin.encode("".join(parts), add_special_tokens=False)

        def real(position: int, right: bool) -> int:
            i = (bisect.bisect_left if right else bisect.bisect_right)(alias_at, position) - 1
            i = max(0, min(i, len(pieces) - 1))
            inside = position - alias_at[i]
            if pieces[i][0] == "special":
                inside = min(inside, len(pieces[i][1])) if inside < len(parts[i]) else len(pieces[i][1])
            return real_at[i] + inside

        ids = [back.get(i, i) for i in encoding.ids]
        begin = [real(s, False) for s, _ in encoding.offsets]
        return _Encoded(ids, begin, [real(e, True) for _, e in encoding.offsets])

    # ---- mask

    def _probe_end(self) -> str | None:
        """The end-of-turn token: the first special token the template writes after a reply."""
        probe = [{"role": "user", "content": "U0probe"}, {"role": "assistant", "content": "A0probe"}]
        try:
            text = self._text(probe, [], False, "probe")
        except FormatError:
            return None
        at = text.find("A0probe")
        found = self._special_re.search(text, at + len("A0probe")) if at >= 0 else None
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


def _calls_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = copy.deepcopy(messages)
    for message in out:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return out


def _pieces(text: str, literals: list[Literal]) -> list[tuple[str, str]]:
    """The text as ("special", token) and ("content", text between them)."""
    pieces, at = [], 0
    for start, end, token in literals:
        if start > at:
            pieces.append(("content", text[at:start]))
        pieces.append(("special", token))
        at = end
    if at < len(text):
        pieces.append(("content", text[at:]))
    return pieces
