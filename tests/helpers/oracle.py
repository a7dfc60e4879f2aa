"""A second opinion on rendered training rows: slow, simple, and sharing nothing with the renderer.

A row is judged from three things only: what transformers' own `apply_chat_template` writes for the same messages, what
the tokenizer says each id stands for, and the source messages. Where several readings are right (a call's arguments as
an object or as JSON text, one row or one per assistant turn) each of them is accepted.
"""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from unittest import mock

import numpy as np
from transformers.utils import chat_template_utils

MARKER = re.compile(r"zq[a-z0-9]+")
THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
CLOSED_BLOCK = re.compile(r"\s*<[^<>]+>[\w\s]*<[^<>]+>\s*")
EMPTY_THINKING = re.compile(r"\A\s*<think>\s*</think>")
OPENS_THINKING, CLOSES_THINKING = re.compile(r"<think>\s*\Z"), re.compile(r"\A\s*</think>")
# What closes a reply, whichever it is: a token, or several, with words between them. () where nothing does.
Stops = tuple[str, ...]

Messages = list[dict[str, Any]]


@contextmanager
def frozen_clock(now: str) -> Iterator[None]:
    """`strftime_now` in templates tells `now`. transformers replaces callables in the keyword arguments by text, so
    that the function cannot be handed in; its module's `datetime` is the one place to freeze."""
    moment = datetime.fromisoformat(now)
    with mock.patch.object(chat_template_utils, "datetime", mock.Mock(now=lambda: moment)):
        yield


@dataclass
class Reference:
    """transformers' own rendering with one tokenizer, template and clock. Answers are kept: a check asks repeatedly.

    parts: the roles whose contents the template wants as a list of parts.
    ends: what closes replies, whose tokens are control tokens though the tokenizer may not mark them special."""

    tokenizer: Any
    template: str
    now: str
    parts: tuple[str, ...] = ()
    ends: Stops = ()
    _texts: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        added = self.tokenizer.added_tokens_decoder
        self.added: dict[int, str] = {i: t.content for i, t in added.items()}
        ends = {token for stop in self.ends for token in self.tokens(stop)}
        self.special: dict[int, str] = {i: t.content for i, t in added.items() if t.special or t.content in ends}
        backend = self.tokenizer.backend_tokenizer
        self.composes: bool = "NFC" in repr(backend.normalizer)
        self.byte_level: bool = "ByteLevel" in repr(backend.pre_tokenizer)
        longest_first = sorted(self.special.values(), key=len, reverse=True)
        self.lookalike = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def tokens(self, stop: str) -> list[str]:
        """The added tokens in what closes a reply; [] where it does not begin and end with such."""
        longest_first = sorted(self.added.values(), key=len, reverse=True)
        found = re.findall("|".join(map(re.escape, longest_first)) or "(?!)", stop)
        return found if found and stop.startswith(found[0]) and stop.endswith(found[-1]) else []

    def owns(self, stops: Stops) -> bool:
        return all(map(self.tokens, stops))

    def text(
        self, messages: Messages, tools: Any, kwargs: dict[str, Any], add_generation_prompt: bool = False
    ) -> str | None:
        """The rendering, where asked with the generation prompt; None where the template refuses."""
        key = json.dumps([messages, tools, kwargs, add_generation_prompt])
        if key not in self._texts:
            self._texts[key] = self._render(messages, tools, kwargs, add_generation_prompt)
        return self._texts[key]

    def _render(
        self, messages: Messages, tools: Any, kwargs: dict[str, Any], add_generation_prompt: bool
    ) -> str | None:
        try:
            messages = self._given(messages)
            with frozen_clock(self.now):
                if not messages:  # apply_chat_template declines an empty list, the template itself may not
                    texts, _ = chat_template_utils.render_jinja_template(
                        conversations=[[]],
                        tools=tools,
                        chat_template=self.template,
                        add_generation_prompt=add_generation_prompt,
                        **{**self.tokenizer.special_tokens_map, **kwargs},
                    )
                    return str(texts[0])
                return str(
                    self.tokenizer.apply_chat_template(
                        messages,
                        tools=tools,
                        chat_template=self.template,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        **kwargs,
                    )
                )
        except Exception:  # a template raises whatever it likes
            return None

    def _given(self, messages: Messages) -> Messages:
        return [
            {**m, "content": [{"type": "text", "text": m["content"] or ""}]} if m["role"] in self.parts else m
            for m in messages
        ]

    def marks(self, messages: Messages, tools: Any) -> list[tuple[int, int]]:
        """(first, past last) character of what stands inside each `{% generation %}` mark of the template."""
        with frozen_clock(self.now):
            _, spans = chat_template_utils.render_jinja_template(
                conversations=[self._given(messages)],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return list(spans[0])

    def ids(self, messages: Messages, tools: Any, kwargs: dict[str, Any]) -> list[int]:
        with frozen_clock(self.now):
            ids = self.tokenizer.apply_chat_template(
                self._given(messages),
                tools=tools,
                chat_template=self.template,
                tokenize=True,
                return_dict=False,
                **kwargs,
            )
        return list(ids)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def seen(self, text: str) -> str:
        """`text` as the tokenizer sees it, after its normaliser: sentencepiece takes a literal ▁ for a space."""
        if not self.byte_level:
            text = text.replace("▁", " ")
        return unicodedata.normalize("NFC", text) if self.composes else text

    def harmless(self, value: Any) -> Any:
        """The same JSON with every special-token string in it replaced by letters, character for character."""
        if isinstance(value, str):
            return self.lookalike.sub(lambda m: "Q" * len(m.group()), value)
        if isinstance(value, dict):
            return {k: self.harmless(v) if k not in ("role", "type", "id") else v for k, v in value.items()}
        if isinstance(value, list):
            return [self.harmless(v) for v in value]
        return value

    def piece(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""
        if token_id in self.added:
            return self.seen(self.added[token_id]).encode()
        token: str = self.tokenizer.convert_ids_to_tokens(int(token_id))
        if self.byte_level:
            return bytes(BYTE_OF[c] for c in token)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def spans(self, ids: list[int], text: str, starts: set[int]) -> list[tuple[int, int]] | None:
        """(first, past last) byte of `text` that each token writes; None where the tokens do not spell the text.

        A sentencepiece tokenizer writes a space that is not in the text at the start of a stretch of plain text: the
        beginning, behind an added token, and at `starts`, where something may have been encoded on its own.
        """
        data = text.encode()
        reached: list[dict[int, int]] = [{0: 0}]  # per token: byte reached -> byte before
        for t, token_id in enumerate(ids):
            piece = self.piece(token_id)
            here: dict[int, int] = {}
            for at in reached[-1]:
                if data.startswith(piece, at):
                    here.setdefault(at + len(piece), at)
                start = t == 0 or ids[t - 1] in self.added or at in starts
                if start and not self.byte_level and piece[:1] == b" " and data.startswith(piece[1:], at):
                    here.setdefault(at + len(piece) - 1, at)
            if not here:
                return None
            reached.append(here)
        at = len(data)
        if at not in reached[-1]:
            return None
        out = []
        for step in reversed(reached[1:]):
            out.append((step[at], at))
            at = step[at]
        return out[::-1]


def _byte_of() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, the other way round."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    out = {chr(b): b for b in printable}
    rest = [b for b in range(256) if b not in printable]
    out.update({chr(256 + i): b for i, b in enumerate(rest)})
    return out


BYTE_OF = _byte_of()


def template_messages(row: dict[str, Any]) -> Iterator[Messages]:
    """The messages as a template may be given them: arguments as they are, as objects, as JSON text; null content
    left out, or empty."""
    seen = set()
    for arguments in ("as given", "object", "text"):
        for empty in (False, True):
            messages: Messages = []
            for source in row["messages"]:
                message = {k: v for k, v in copy.deepcopy(source).items() if k != "weight"}
                if message["content"] is None:
                    message["content"] = "" if empty else None
                for call in message.get("tool_calls", ()):
                    function = call["function"]
                    if arguments == "object" and isinstance(function["arguments"], str):
                        function["arguments"] = json.loads(function["arguments"])
                    if arguments == "text" and not isinstance(function["arguments"], str):
                        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
                messages.append(message)
            key = json.dumps(messages)
            if key not in seen:
                seen.add(key)
                yield messages


def strings(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield k
            yield from strings(v)
    elif isinstance(value, list):
        for v in value:
            yield from strings(v)


def markers(value: Any) -> set[str]:
    return {word for text in strings(value) for word in MARKER.findall(text)}


def must_say(message: dict[str, Any], as_history: bool = False) -> set[str]:
    """The marker words of a message that a rendering must hold; of an earlier turn its reasoning may be left out."""
    words = markers([message["content"], message.get("tool_calls")])
    if as_history:
        return words - {w for block in THINKING.findall(message["content"] or "") for w in MARKER.findall(block)}
    return words | markers(message.get("reasoning_content"))


@dataclass(frozen=True)
class Turn:
    """Where a supervised turn stands in a reference text, in characters, and what is wrong with it there."""

    start: int
    end: int
    problems: tuple[str, ...] = ()


@dataclass
class Case:
    """One source row, as one choice of template arguments and message form renders it.

    block: the last reply stands behind the whole of its prompt, which ends with an opened and closed block that the
    template writes before no reply: what serving sends, and then the reply."""

    reference: Reference
    row: dict[str, Any]
    kwargs: dict[str, Any]
    stops: Stops
    messages: Messages
    block: bool = False

    @property
    def tools(self) -> Any:
        return self.row.get("tools") or None

    @property
    def supervised(self) -> list[int]:
        """The assistant turns that a row, or its expansion, must teach."""
        return [i for i, m in enumerate(self.row["messages"]) if m["role"] == "assistant" and m.get("weight", 1)]

    def text(self, upto: int) -> str | None:
        return self._with_block(self.reference.text(self.messages[:upto], self.tools, self.kwargs), upto)

    def _with_block(self, text: str | None, upto: int) -> str | None:
        if not self.block or text is None:
            return text
        last = [*self.messages[: upto - 1], {"role": "assistant", "content": "zqprobe"}]
        before, _, _ = (self.reference.text(last, self.tools, self.kwargs) or "").partition("zqprobe")
        prompt = self.prompt(upto - 1) or ""
        found = prompt.startswith(before) and CLOSED_BLOCK.fullmatch(prompt[len(before) :])
        return text[: len(before)] + prompt[len(before) :] + text[len(before) :] if found else None

    def twin(self, upto: int) -> str | None:
        """The text with the look-alikes of control tokens in the contents replaced by as many letters, so that what
        is left of control tokens is the template's own. None where the template treats the two unlike."""
        text = self.text(upto)
        same = self.reference.harmless(self.messages[:upto])
        twin = self._with_block(self.reference.text(same, self.reference.harmless(self.tools), self.kwargs), upto)
        if text is None or twin is None or len(twin) != len(text):
            return None
        return twin if all(b in (a, "Q") for a, b in zip(text, twin, strict=True)) else None

    def prompt(self, k: int) -> str | None:
        """What serving sends to get turn k."""
        return self.reference.text(self.messages[:k], self.tools, self.kwargs, add_generation_prompt=True)

    def start(self, k: int, text: str) -> int | None:
        """Where the reply of turn k begins in `text`; None where the prompt is no prefix of it."""
        prompt = self.prompt(k)
        if prompt is not None:
            return len(prompt) if text.startswith(prompt) else None
        if k > 0:
            return None
        # Nothing comes before the first message: its header is what the generation prompt adds to any conversation.
        probe = [{"role": "user", "content": "x"}]
        plain = self.reference.text(probe, self.tools, self.kwargs)
        asked = self.reference.text(probe, self.tools, self.kwargs, add_generation_prompt=True)
        if plain is None or asked is None or not asked.startswith(plain) or asked == plain:
            return None
        at = text.find(asked[len(plain) :])
        return None if at < 0 else at + len(asked) - len(plain)

    def turn(self, k: int, upto: int) -> Turn | str:
        """Turn k in the rendering of messages[:upto], or why it cannot be taught there."""
        text, twin = self.text(upto), self.twin(upto)
        if text is None or twin is None:
            return "the template refuses"
        if not self.stops:
            return "the template writes no end of turn"
        start = self.start(k, text)
        if start is None:
            return "the prompt is not a prefix"
        ends = [(at, token) for token in self.stops if (at := twin.find(token, start)) >= 0]
        if not ends:
            return "no end of turn follows"
        stop, token = min(ends)
        reply = text[start:stop]
        foreign = set(MARKER.findall(reply)) - markers(self.messages[k])
        if foreign:
            return f"no end of turn before {sorted(foreign)}"
        missing = must_say(self.messages[k]) - set(MARKER.findall(reply))
        if missing:
            return f"the reply lacks {sorted(missing)}"
        if any(f'\\"{word}' in reply for word in markers(self.messages[k].get("tool_calls"))):
            return "the arguments are JSON inside of JSON"
        alone = self.text(k + 1)
        if alone is None or not alone.startswith(text[: stop + len(token)]):
            return "the reply is another one when the conversation stops with it"
        problem = self._plain(k, reply)
        return problem or Turn(start, stop + len(token))

    def _plain(self, k: int, reply: str) -> str | None:
        """A turn of nothing but content is that content, as the template trims it, after an empty thinking block, whose
        beginning may stand in the prompt."""
        message = self.messages[k]
        content = message["content"] or ""
        if message.get("tool_calls") or message.get("reasoning_content") or "</think>" in content:
            return None
        opened = OPENS_THINKING.search(self.prompt(k) or "")
        shown = (CLOSES_THINKING if opened else EMPTY_THINKING).sub("", reply)
        before, after = self._around(k)
        inside = reply.strip().removeprefix(before.strip()).removesuffix(after.strip())
        if content.strip() in (shown.strip(), inside.strip()):
            return None
        return f"the reply {shown!r} is not the content {content!r}"

    def _around(self, k: int) -> tuple[str, str]:
        """What the template writes in turn k in front of a content and behind it, as `<|channel|>final<|message|>`."""
        prompt = self.prompt(k)
        probe = [*self.messages[:k], {"role": "assistant", "content": "zqprobe"}]
        text = self.reference.text(probe, self.tools, self.kwargs)
        if text is None or prompt is None or not text.startswith(prompt):
            return "", ""
        before, _, after = text[len(prompt) :].partition("zqprobe")
        return before, after[: min((at for token in self.stops if (at := after.find(token)) >= 0), default=0)]

    def vanished(self, upto: int, taught: set[int]) -> list[str]:
        """Marker words of the conversation that its rendering leaves out."""
        text = self.text(upto) or ""
        wanted = markers(self.tools)
        for i, message in enumerate(self.messages[:upto]):
            wanted |= must_say(message, as_history=message["role"] == "assistant" and i not in taught)
        said = set(MARKER.findall(text))
        out = [f"{word} is not in the text" for word in sorted(wanted - said)]
        for i, message in enumerate(self.messages[:upto]):
            content = (message["content"] or "").strip()
            if not markers(content) and "</think>" not in content and content not in text:
                out.append(f"message {i} is not in the text")
        return out


def cases(reference: Reference, row: dict[str, Any], kwargs: dict[str, Any], stops: Stops) -> Iterator[Case]:
    for messages in template_messages(row):
        yield Case(reference, row, kwargs, stops, messages)
        yield Case(reference, row, kwargs, stops, messages, block=True)


def accepts(reference: Reference, row: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Whether the template takes the conversation at all."""
    return any(case.text(len(case.messages)) is not None for case in cases(reference, row, kwargs, ()))


def why_not(reference: Reference, row: dict[str, Any], choices: list[dict[str, Any]], stops: Stops) -> str | None:
    """Why no right row exists for this conversation, whichever of the template arguments `choices` is used; None where
    one does, as a whole row or as one row per assistant turn, so that a refusal of it could be avoided."""
    reasons = []
    for kwargs in choices:
        for case in cases(reference, row, kwargs, stops):
            whole, taught = len(case.messages), set(case.supervised)
            for plan in ([(k, whole, taught) for k in case.supervised], [(k, k + 1, {k}) for k in case.supervised]):
                found = [case.turn(k, upto) for k, upto, _ in plan]
                problems = [f for f in found if isinstance(f, str)]
                problems += ["nothing prompts for the first message" for k, _, _ in plan if case.prompt(k) is None]
                problems += [p for _, upto, turns in plan for p in case.vanished(upto, turns)]
                if not problems:
                    return None
                reasons.append(problems[0])
    # The first reason is about the plain rendering, unless that form of the messages was refused outright.
    return next((r for r in reasons if r != "the template refuses"), "the template refuses")


def check_rows(
    row: dict[str, Any],
    rendered: list[Any],
    *,
    tokenizer: Any,
    template: str,
    kwargs: dict[str, Any],
    now: str,
    stops: Stops,
    reference: Reference | None = None,
) -> list[str]:
    """What is wrong with the training rows made of one source row; [] where they are right.

    rendered: rows with `ids`, `mask`, `text` and `boundary_splits`: one, or several that share out the turns.
    """
    reference = reference or Reference(tokenizer, template, now, ends=stops)
    problems: list[str] = []
    taught: list[int] = []
    for number, one in enumerate(rendered):
        turns, found = check_row(row, one, reference=reference, kwargs=kwargs, stops=stops)
        problems += [f"row {number}: {p}" for p in found]
        taught += turns
    wanted = [i for i, m in enumerate(row["messages"]) if m["role"] == "assistant" and m.get("weight", 1)]
    if sorted(taught) != wanted:
        problems.append(f"turns {wanted} are to be taught, turns {sorted(taught)} are")
    return problems


def check_row(
    row: dict[str, Any],
    rendered: Any,
    *,
    reference: Reference,
    kwargs: dict[str, Any],
    stops: Stops,
) -> tuple[list[int], list[str]]:
    """(turns taught, what is wrong) of one training row."""
    ids, mask = [int(i) for i in rendered.ids], np.asarray(rendered.mask)
    if len(ids) != len(mask) or not set(mask.tolist()) <= {0, 1}:
        return [], ["ids and mask do not fit"]
    if not stops or not reference.owns(stops):
        return [], [f"not all ends of turn {stops} are tokens, yet the row was accepted"]
    whole = len(row["messages"])
    for case in cases(reference, row, kwargs, stops):
        for upto in range(whole, 0, -1):
            whose = row["messages"][upto - 1]["role"]
            if (upto == whole or whose == "assistant") and case.text(upto) == rendered.text:
                return _check(case, upto, rendered, ids, mask)
    return [], [f"no reference rendering has its text {rendered.text!r}"]


def _check(case: Case, upto: int, rendered: Any, ids: list[int], mask: Any) -> tuple[list[int], list[str]]:
    reference, stops = case.reference, case.stops
    text, twin = reference.seen(rendered.text), case.twin(upto)
    if twin is None:
        return [], ["the template treats look-alikes of control tokens unlike other text: cannot be judged"]
    replies = [k for k in range(upto) if case.messages[k]["role"] == "assistant"] if rendered.boundary_splits else []
    begun = [start for k in replies if (start := case.start(k, rendered.text)) is not None]
    spans = reference.spans(ids, text, {len(reference.seen(rendered.text[:start]).encode()) for start in begun})
    if spans is None:
        spelled = b"".join(map(reference.piece, ids)).decode(errors="replace")
        return [], [f"ids spell {spelled!r}, the text is {rendered.text!r}"]
    problems: list[str] = []

    # The mask: whole turns, from the end of the prompt to the end of turn, and nothing else.
    taught: list[int] = []
    expected = np.zeros(len(text.encode()) + 1, dtype=bool)
    firsts: dict[int, int] = {}
    on = np.zeros_like(expected)
    for (first, last), m in zip(spans, mask, strict=True):
        on[first:last] |= bool(m)
    for k, message in enumerate(case.messages[:upto]):
        if message["role"] != "assistant":
            continue
        start = case.start(k, rendered.text)
        if start is None or not on[len(reference.seen(rendered.text[:start]).encode())]:
            continue
        turn = case.turn(k, upto)
        if isinstance(turn, str):
            problems.append(f"turn {k} is taught but {turn}")
            continue
        first = len(reference.seen(rendered.text[: turn.start]).encode())
        last = len(reference.seen(rendered.text[: turn.end]).encode())
        expected[first:last] = True
        firsts[k] = first
        taught.append(k)
        if case.row["messages"][k].get("weight", 1) == 0:
            problems.append(f"turn {k} has weight 0 and is taught")
    if not taught:
        problems.append("no turn is taught")
    if (on != expected).any():
        data = text.encode()
        extra = bytes(b for b, x, y in zip(data, on, expected, strict=False) if x and not y).decode(errors="replace")
        lack = bytes(b for b, x, y in zip(data, on, expected, strict=False) if y and not x).decode(errors="replace")
        problems.append(f"supervised too much {extra!r}, too little {lack!r}")
    for (first, last), m in zip(spans, mask, strict=True):
        if m and not expected[first : last or 1].all():
            problems.append(f"a supervised token reaches over bytes {first}:{last}")
        if m and first == last and not (expected[first] or expected[first - 1]):
            problems.append("a supervised token that writes nothing stands outside of a turn")

    # Control ids: those that the template writes, where it writes them; strings in contents are text.
    special = [i for i in ids if i in reference.special]
    if special != [i for i in reference.encode(twin) if i in reference.special]:
        names = [reference.special[i] for i in special]
        problems.append(f"control ids are {names}, not those the template writes")
    closing = {reference.tokens(stop)[-1] for stop in stops}
    ends = [t for t, (s, m) in enumerate(zip(spans, mask, strict=True)) if m and reference.added.get(ids[t]) in closing]
    if len(ends) < len(taught):
        problems.append(f"{len(ends)} supervised ends of turn for {len(taught)} turns")
    after = [t for t in range(len(ids)) if mask[t] and (t + 1 == len(ids) or not mask[t + 1])]
    if any(reference.added.get(ids[t]) not in closing for t in after):
        problems.append("a supervised stretch does not end in the end of turn")
    bos = reference.tokenizer.bos_token
    if bos and bos not in stops and ids.count(reference.tokenizer.bos_token_id) != twin.count(bos):
        problems.append(f"{ids.count(reference.tokenizer.bos_token_id)} BOS ids, the template writes {twin.count(bos)}")

    # Prompt parity, by ids: what serving sends is what the row begins with.
    clean = case.twin(upto) == case.text(upto)
    for k in taught:
        n = next(t for t, (_, e) in enumerate(spans) if e > firsts[k])
        while n > 0 and mask[n - 1] and spans[n - 1] == (firsts[k], firsts[k]):
            n -= 1  # the sentencepiece space that begins a reply encoded on its own
        if spans[n][0] != firsts[k]:
            problems.append(f"turn {k} begins inside of a token")
        elif clean and (prompt := case.prompt(k)) is not None:
            alone, here = reference.encode(prompt), ids[:n]
            if rendered.boundary_splits and any(m["role"] == "assistant" for m in case.messages[:k]):
                # Replies in the history may have been split off as well. They end in a control token, so that what
                # follows the last one is encoded alike in any case.
                alone, here = _after_control(alone, reference.special), _after_control(here, reference.special)
            if alone != here:
                problems.append(f"turn {k}: the prompt's own ids differ from the row's")

    # Ids: the reference's, but for the places where a token was split in two at a boundary.
    if clean:
        plain = reference.ids(case.messages[:upto], case.tools, case.kwargs)
        wanted = reference.encode(rendered.text) if case.block else plain
        if wanted != ids:
            differing = _differing(wanted, ids, reference.special)
            if not rendered.boundary_splits:
                problems.append("ids differ from the reference's and no boundary split is counted")
            elif differing is None or differing > rendered.boundary_splits:
                problems.append(f"ids differ in {differing} places, {rendered.boundary_splits} splits are counted")
    problems += case.vanished(upto, set(taught))
    return taught, problems


def _after_control(ids: list[int], special: dict[int, str]) -> list[int]:
    """The last control id and what follows it."""
    return ids[max((t for t, i in enumerate(ids) if i in special), default=0) :]


def _differing(a: list[int], b: list[int], special: dict[int, str]) -> int | None:
    """How many stretches between control ids differ; None where the control ids do."""

    def stretches(ids: list[int]) -> list[list[int]]:
        out: list[list[int]] = [[]]
        for i in ids:
            if i in special:
                out += [[i], []]
            else:
                out[-1].append(i)
        return out

    left, right = stretches(a), stretches(b)
    if len(left) != len(right):
        return None
    return sum(x != y for x, y in zip(left, right, strict=True))
