'''The only renderer: conversation -> ids and loss mask, for training, evaluation, terminal and server.

    """user 'hi', assistant 'yo'  ->  ids  B U hi /U A yo /A
                                      mask 0 0 0  0  0 1  1 """

The text is the template's own rendering, to the letter. Where a reply begins is not guessed from marker strings:
it is the length of the template's own prompt for that turn (history + generation prompt), which must be a prefix
of the whole text. Where it ends is the control token that the template itself writes after the turn's last word. Which
words are the template's and which the row's is proven by rendering marks in place of the row's (skeleton.py).
What cannot be proven this way is refused with MaskError.

template.py turns messages into the text, encode.py the text into ids; here the two meet the mask.
'''

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.encode import Encoded, Encoder, Literal, pieces_of
from sftflow.chat.format import ChatFormat, tokenizer_text
from sftflow.chat.schema import Conversation, Message, parse_row
from sftflow.chat.shape import End, Marked, Shape
from sftflow.chat.skeleton import Marker, Placeholder
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


@dataclass(frozen=True, slots=True)
class _Proof:
    """The row's text is its shape's skeleton, filled. spans: of each slot in the order of the skeleton."""

    shape: Shape
    spans: list[tuple[int, int]]
    piece_starts: list[int]


@dataclass(frozen=True, slots=True)
class RendererSpec:
    """What a Renderer is made of; can be sent to another process.

    tokenizer: tokenizer.json.   names: what the template calls tokens by.   eos: id of the end of text, or None.
    """

    tokenizer: str
    names: dict[str, str]
    eos: int | None
    format: ChatFormat


class Renderer:
    """Renders conversations with one tokenizer and one format.

    >>> renderer.render(conversation).ids              # a training example, with its mask
    >>> renderer.render(conversation, add_generation_prompt=True).ids  # the prompt that evaluation and server send
    """

    def __init__(self, tokenizer: Any, chat_format: ChatFormat) -> None:
        self.tokenizer = tokenizer
        names = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        self._open(RendererSpec(tokenizer_text(tokenizer), names, tokenizer.eos_token_id, chat_format))

    @classmethod
    def from_spec(cls, spec: RendererSpec) -> Renderer:
        """The same renderer in another process, without transformers; `tokenizer` is None there."""
        renderer = cls.__new__(cls)
        renderer.tokenizer = None
        renderer._open(spec)
        return renderer

    def with_format(self, chat_format: ChatFormat) -> Renderer:
        """The same tokenizer with another format. Made once for each template."""
        if chat_format.template not in self._others:
            renderer = Renderer.from_spec(replace(self.spec, format=chat_format))
            renderer.tokenizer = self.tokenizer
            self._others[chat_format.template] = renderer
        return self._others[chat_format.template]

    def _open(self, spec: RendererSpec) -> None:
        self.spec, self.format = spec, spec.format
        self._template = Template(spec.format, spec.names)
        self._encoder = Encoder(spec.tokenizer)
        self.special, self.special_re = self._encoder.special, self._encoder.special_re
        self._shapes: dict[Any, Shape] = {}
        self._whole: set[Any] = set()  # shapes of conversations whose prompt leaves nothing out
        self._others: dict[str, Renderer] = {}
        python = spec.format.python
        self._has_python = python is not None and all(t in self.special for t in python)
        self.end_token = spec.format.end if spec.format.end in self.special else None
        ends = self._probe_ends()
        stops = [self.special[token] for token in dict.fromkeys([*([self.end_token] if self.end_token else []), *ends])]
        self._stop_ids = stops if spec.eos is None or spec.eos in stops else [*stops, spec.eos]

    # ---- the public part

    def render(
        self, conversation: Conversation, *, add_generation_prompt: bool = False, turns: bool = False
    ) -> Rendered:
        """One conversation -> ids and mask. With add_generation_prompt=True, the prompt for the next assistant turn
        (mask all 0). With turns=True, the row also says where its turns begin.

        Raises FormatError where the template refuses the conversation (its own message quoted) and MaskError where
        the mask cannot be proven.
        """
        place = conversation.source
        messages = [as_dict(m, keep_python=self._has_python) for m in conversation.messages]
        text = self._template.text(messages, conversation.tools, add_generation_prompt, place)
        supervised = (
            [] if add_generation_prompt else [i for i, m in enumerate(conversation.messages) if _is_supervised(m)]
        )
        starts = self._reply_starts(conversation, messages, text, supervised)
        boundaries = sorted(set(starts.values()))
        if not supervised:
            literals = self._prompt_literals(conversation, messages, text, add_generation_prompt)
            encoded = self._encoder.encode(text, literals, boundaries, place)
            return Rendered(encoded.ids, np.zeros(len(encoded.ids), np.int8), text, place, encoded.splits)
        proof = self._prove(conversation, messages, text)
        literals = proof.shape.literals(proof.piece_starts)
        encoded = self._encoder.encode(text, literals, boundaries, place)
        cut = dict(zip(boundaries, encoded.cuts, strict=True))
        mask = np.zeros(len(encoded.ids), np.int8)
        for turn in supervised:
            where = f"{place}.messages[{turn}]"
            last = self._end_literal(proof, turn, starts[turn], literals, where)
            if turn == 0:
                self._prove_first(proof, text[starts[turn] :], starts[turn], where)
            mask[cut[starts[turn]] : encoded.literals[last] + 1] = 1
            self._unmask_results(mask, encoded, literals, starts[turn], last)
        found = self._turns(proof, text, literals, encoded, conversation) if turns else ()
        return Rendered(encoded.ids, mask, text, place, encoded.splits, found)

    def render_rows(self, conversation: Conversation, *, turns: bool = False) -> list[Rendered]:
        """Training examples of one row: one, or one per supervised assistant turn where the template rewrites
        history (so that each turn is trained after exactly the prompt that serving will send)."""
        return [rendered for _, rendered in self.render_pairs(conversation, turns=turns)]

    def render_pairs(self, conversation: Conversation, *, turns: bool = False) -> list[tuple[Conversation, Rendered]]:
        """The examples of `render_rows`, each with the conversation that it renders."""
        try:
            return [(conversation, self.render(conversation, turns=turns))]
        except MaskError as whole:
            supervised = [i for i, m in enumerate(conversation.messages) if _is_supervised(m)]
            if not supervised or (len(supervised) == 1 and supervised[0] == len(conversation.messages) - 1):
                raise
            pairs = []
            for turn in supervised:
                messages = [
                    replace(m, weight=0) if m.role == "assistant" and i != turn else m
                    for i, m in enumerate(conversation.messages[: turn + 1])
                ]
                example = replace(conversation, messages=tuple(messages))
                try:
                    pairs.append((example, self.render(example, turns=turns)))
                except MaskError:
                    raise whole from None
            return pairs

    def stop_ids(self) -> list[int]:
        """Ids at which a reply ends: the end-of-turn tokens, and the tokenizer's own end of text."""
        return list(self._stop_ids)

    def python_ids(self) -> tuple[int, int, int, int] | None:
        """(call start, call end, output start, output end) ids where the format has calculator tokens."""
        if not self._has_python or self.format.python is None:
            return None
        a, b, c, d = (self.special[t] for t in self.format.python)
        return a, b, c, d

    def encode_plain(self, text: str) -> list[int]:
        """Text that comes from content -> ids; special-token strings stay text."""
        return self._encoder.encode_pieces([("content", text)])

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text, control tokens included."""
        return self._encoder.decode(ids)

    def round_trip(self, text: str) -> str:
        """What the tokenizer makes of a text, there and back: normalisers and decoders may change it."""
        return self._encoder.round_trip(text)

    def text(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """The template's rendering of a conversation, or of the prompt for its next reply."""
        messages = [as_dict(m, keep_python=self._has_python) for m in conversation.messages]
        return self._template.text(messages, conversation.tools, add_generation_prompt, conversation.source)

    def rough_length(self, conversation: Conversation) -> tuple[int, int]:
        """How many tokens the prompt for the next reply has (about, at least): linear in the conversation's length,
        where `render` grows with the square of its turns.

        The text is encoded as a whole, so it may be a token or two off at each boundary between prompt and reply, where
        no control tokens stand there. And the template's control tokens are sure in any case.
        """
        about, control = self._encoder.rough_length(self.text(conversation, add_generation_prompt=True))
        messages = [as_dict(m, keep_python=self._has_python) for m in conversation.messages]
        said = json.dumps([messages, conversation.tools], ensure_ascii=False, default=str)
        as_text = sum(1 for _ in self.special_re.finditer(said))  # control tokens to the whole text, text to `render`
        replies = sum(m.role == "assistant" for m in conversation.messages) + 1
        off = 0 if self._fenced and not as_text else 4 * replies
        return about, max(about - off, control - as_text)

    @functools.cached_property
    def _fenced(self) -> bool:
        """Whether a control token stands right before and right behind every reply: nothing merges across those."""
        probe = parse_row([{"role": r, "content": f"zq{r}zq"} for r in ("user", "assistant", "user")], "probe")
        try:
            before, _, after = self.text(probe).partition("zqassistantzq")
        except FormatError:
            return False
        fences = any(before.endswith(t) for t in self.special) and any(after.startswith(t) for t in self.special)
        return fences and not self._encoder.prepends

    def left_out(self, conversation: Conversation) -> list[str]:
        """Places of the conversation that the prompt for the next reply does not hold, as `messages[1].content`: what
        people, tools and tool definitions say, and the assistant's calls. (What a template strips of the assistant's
        own words, its earlier reasoning, is the format's way.)"""
        messages = [as_dict(m, keep_python=self._has_python) for m in conversation.messages]
        key = None
        if not conversation.tools and all(len(m) == 2 and type(m["content"]) is str for m in messages):
            key = tuple((m["role"], not m["content"].strip()) for m in messages)
            if key in self._whole:
                return []
        marked, _ = self._mark(conversation, messages, words=False)
        try:
            text = self._template.text(marked.messages, marked.tools, True, conversation.source)
        except FormatError:
            return []  # it looks into contents; `render` says what it refuses
        found = set(marked.marker.skeleton(text).order)
        missing = [slot for number, slot in enumerate(marked.marker.slots) if number not in found]
        said = [
            slot.where
            for slot in missing
            if slot.message < 0 or conversation.messages[slot.message].role != "assistant" or "tool_calls" in slot.where
        ]
        if key is not None and not said:
            if len(self._whole) > 1_000:
                self._whole.clear()
            self._whole.add(key)
        return said

    def arguments(self) -> list[str]:
        """Names of the template's own arguments, such as `enable_thinking`."""
        return self._template.arguments()

    def disagreement(self) -> str | None:
        """Where the template has `{% generation %}` marks: in what they differ from our mask. None: in nothing."""
        probe = parse_row([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "probe")
        messages = [as_dict(m, keep_python=self._has_python) for m in probe.messages]
        try:
            theirs = self._template.generated(messages, (), "probe")
            rendered = self.render(probe)
        except (MaskError, FormatError):
            return None  # the format has no such plain exchange; rows will be judged one by one
        if theirs is None:
            return None
        ours = self.decode(rendered.ids[rendered.mask == 1].tolist())
        if "".join(theirs) == ours:
            return None
        return f"the template's generation marks hold {''.join(theirs)!r}, the proven mask {ours!r}; the mask is used"

    # ---- text

    def _reply_starts(
        self, conversation: Conversation, messages: Messages, text: str, supervised: Sequence[int]
    ) -> dict[int, int]:
        """For each assistant turn, the character at which its reply begins. A turn whose prompt is not a prefix of
        the text is left out where nothing is supervised there, and refused where it is."""
        starts = {}
        for turn, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            place = f"{conversation.source}.messages[{turn}]"
            try:
                prompt = self._template.text(messages[:turn], conversation.tools, True, place)
            except FormatError as error:
                if turn in supervised:
                    raise MaskError(place, f"the format gives no prompt for this reply ({error.fact})", "") from None
                continue
            if text.startswith(prompt):
                starts[turn] = len(prompt)
            elif turn in supervised:
                raise MaskError(
                    place,
                    f"the {self.format.name} format's prompt for this reply is not a prefix of the training text",
                    "the template rewrites history or pre-fills the reply; use another --format",
                )
        return starts

    def _prompt_literals(
        self, conversation: Conversation, messages: Messages, text: str, add_generation_prompt: bool
    ) -> list[Literal]:
        """Special tokens in a text without supervised turns that the template wrote, not the content."""
        if not self._has_look_alike(conversation):
            return self._encoder.literals(text)
        for words in (False, True):
            marked, values = self._mark(conversation, messages, words=words)
            try:
                skeleton = marked.marker.skeleton(
                    self._template.text(marked.messages, marked.tools, add_generation_prompt, conversation.source)
                )
            except FormatError:
                continue
            spans = skeleton.fit(values, marked.marker.slots, text)
            if spans is not None:
                starts = skeleton.piece_starts(spans)
                return [
                    (starts[n] + m.start(), starts[n] + m.end(), m.group())
                    for n, piece in enumerate(skeleton.pieces)
                    for m in self._encoder.special_re.finditer(piece)
                ]
        raise MaskError(
            conversation.source,
            "content holds control-token strings and the template changes its text by them",
            "remove those strings from the row",
        )

    def _has_look_alike(self, conversation: Conversation) -> bool:
        search = self._encoder.special_re.search
        return any(
            search(m.text)
            or search(m.reasoning_content or "")
            or (m.tool_calls and search(json.dumps(m.tool_calls, ensure_ascii=False)))
            for m in conversation.messages
        ) or bool(conversation.tools and search(json.dumps(conversation.tools, ensure_ascii=False)))

    # ---- proof

    def _prove(self, conversation: Conversation, messages: Messages, text: str) -> _Proof:
        """The text is the template's words with the row's values in their places, and no value is missing."""
        for words in (False, True):
            shape, values, slots = self._shape(conversation, messages, words=words)
            spans = shape.skeleton.fit(values, shape.slots, text) if shape else None
            if shape is None or spans is None:
                continue
            for number in shape.left_out:
                if slots[number].required:
                    raise MaskError(
                        f"{conversation.source}.{slots[number].where}",
                        f"the {self.format.name} format leaves it out of the training text",
                        "remove it from the row or use a --format that writes it",
                    )
            return _Proof(shape, spans, shape.skeleton.piece_starts(spans))
        raise MaskError(
            conversation.source,
            f"the {self.format.name} format changes the contents, so it cannot be proven that none is left out",
            "use another --format",
        )

    def _shape(
        self, conversation: Conversation, messages: Messages, *, words: bool
    ) -> tuple[Shape | None, list[str], list[Placeholder]]:
        """(the row's shape or None, its values, its slots). Shapes of whole contents are remembered."""
        key: Any = None
        if not words and not conversation.tools and all(len(m) == 2 and type(m["content"]) is str for m in messages):
            # The usual row, text turns only: no marks need to be written once its shape is known.
            values = [m["content"] for m in messages if m["content"].strip()]
            key = tuple((m["role"], m["content"].strip() == "" and m["content"]) for m in messages)
            known = self._shapes.get(key)
            if known is not None:
                return known, values, known.slots
        marked, values = self._mark(conversation, messages, words=words)
        if not words and key is None:
            key = json.dumps([marked.messages, marked.tools])
        shape = None if words else self._shapes.get(key)
        if shape is None:
            try:
                shape = Shape(self._template, self._encoder.special_re, marked, self.end_token)
            except FormatError:
                return None, values, marked.marker.slots
            if not words:
                if len(self._shapes) > 10_000:
                    self._shapes.clear()
                self._shapes[key] = shape
        return shape, values, marked.marker.slots

    def _mark(self, conversation: Conversation, messages: Messages, *, words: bool) -> tuple[Marked, list[str]]:
        """The row with marks, and its values in the order of the marks."""
        last_user = max((i for i, m in enumerate(conversation.messages) if m.role == "user"), default=-1)
        required = [
            m.role != "assistant" or bool(m.weight) or i > last_user for i, m in enumerate(conversation.messages)
        ]
        tools = list(conversation.tools)
        marker = Marker(json.dumps([messages, tools], ensure_ascii=False))
        if marker.pair is None:
            raise MaskError(
                conversation.source, "its contents use every private-use character kept for the proof", "remove them"
            )
        marked_messages, marked_tools = marker.row(messages, tools, required, words=words)
        return Marked(marked_messages, marked_tools, marker), [s.value for s in marker.slots]

    def _end_literal(self, proof: _Proof, turn: int, start: int, literals: list[Literal], place: str) -> int:
        """The number of the literal that ends the turn, after proving that the reply holds all the turn's values, and
        nothing of another message."""
        end = proof.shape.end_of(turn)
        if isinstance(end, str):
            raise MaskError(place, end, "use another --format, or append_eos: true where the format writes no end")
        if self.special[end.token] not in self._stop_ids:
            raise MaskError(place, f"this reply ends with {end.token}, at which generation would not stop", "")
        at = proof.piece_starts[end.piece] + end.start
        for slot, (left, right) in zip(proof.shape.skeleton.order, proof.spans, strict=True):
            mine = proof.shape.slots[slot].message == turn
            # (The beginning of a content may be what the template pre-fills, as `<think>`: then it is in the prompt.)
            if mine and not (start < right <= at):
                raise MaskError(place, "its content does not lie between its prompt and its end-of-turn token", "")
            if not mine and left < at and right > start:
                raise MaskError(place, "another message's content lies inside this reply", "use another --format")
        inside = [n for n, x in enumerate(literals) if start <= x[0] <= at]
        if at < start or not inside or literals[inside[-1]][0] != at:
            raise MaskError(place, "its end-of-turn token does not follow its prompt", "use another --format")
        if any(literals[n][2] == end.token for n in inside[:-1]):
            raise MaskError(place, f"the format writes {end.token} inside the reply, where generation would stop", "")
        return inside[-1]

    def _prove_first(self, proof: _Proof, reply: str, start: int, place: str) -> None:
        """A reply without history: many templates write no header unasked where there is no message, so that what
        looks like the reply begins with its own header."""
        own = [
            left
            for s, (left, _) in zip(proof.shape.skeleton.order, proof.spans, strict=True)
            if proof.shape.slots[s].message == 0
        ]
        if not own or reply[: min(own) - start].strip():
            raise MaskError(place, "nothing prompts for this reply: it is the first message", "remove it")

    def _unmask_results(
        self, mask: NDArray[np.int8], encoded: Encoded, literals: list[Literal], start: int, last: int
    ) -> None:
        """What the calculator wrote is read, not produced."""
        if not self._has_python or self.format.python is None:
            return
        _, _, opening, closing = self.format.python
        opened: int | None = None
        for number in range(last):
            if literals[number][0] < start:
                continue
            if literals[number][2] == opening and opened is None:
                opened = number
            elif literals[number][2] == closing and opened is not None:
                mask[encoded.literals[opened] : encoded.literals[number] + 1] = 0
                opened = None

    def _probe_ends(self) -> list[str]:
        """The end-of-turn tokens: of an ordinary reply, and of a reply that calls a tool where the format has that."""
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}, "id": "probe0000"}
        tool = {"type": "function", "function": {"name": "look", "description": "d", "parameters": _NO_PARAMETERS}}
        user = {"role": "user", "content": "u"}
        probes = [
            {"messages": [user, {"role": "assistant", "content": "a"}]},
            {"messages": [user, {"role": "assistant", "content": "a"}], "tools": [tool]},
            {"messages": [user, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [tool]},
        ]
        ends: list[str] = []
        for probe in probes:
            conversation = parse_row(probe, "probe")
            messages = [as_dict(m, keep_python=self._has_python) for m in conversation.messages]
            try:
                shape, _, slots = self._shape(conversation, messages, words=False)
                if shape is None or any(slots[n].message == 1 for n in shape.left_out):
                    continue
                end = shape.end_of(1)
            except FormatError:
                continue
            if isinstance(end, End):
                self.end_token = self.end_token or end.token
                ends.append(end.token)
        return ends

    # ---- looking at it

    def _turns(
        self, proof: _Proof, text: str, literals: list[Literal], encoded: Encoded, conversation: Conversation
    ) -> tuple[tuple[int, str], ...]:
        """(first token, role) of each message; of one that is written inside the next, as a system message in the
        first user turn, both roles together."""
        out: list[tuple[int, str]] = []
        starts = [start for start, _, _ in literals]
        places = [proof.piece_starts[piece] + offset for piece, offset in proof.shape.turn_starts()]
        own: dict[int, int] = {}
        for slot, (left, _) in zip(proof.shape.skeleton.order, proof.spans, strict=True):
            own.setdefault(proof.shape.slots[slot].message, left)
        waiting = ""
        for turn, (message, at) in enumerate(zip(conversation.messages, places, strict=True)):
            if turn + 1 < len(places) and own.get(turn, -1) >= places[turn + 1]:
                waiting += f"{message.role}+"
                continue
            number = bisect.bisect_left(starts, at)
            if not out:
                token = 0
            elif number < len(starts) and starts[number] == at:
                token = int(encoded.literals[number])
            else:  # a header without control tokens: close enough for the eye
                left = starts[number - 1] if number else 0
                token = int(encoded.literals[number - 1]) if number else 0
                pieces = pieces_of(text[left:at], [(0, e - s, t) for s, e, t in literals[max(0, number - 1) : number]])
                token += len(self._encoder.encode_pieces(pieces))
            out.append((max(token, out[-1][0] if out else 0), waiting + message.role))
            waiting = ""
        return tuple(out)


_NO_PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}


def _is_supervised(message: Message) -> bool:
    return message.role == "assistant" and bool(message.weight)
