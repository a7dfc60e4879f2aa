"""The invariants of a rendered row, checked again from its ids: not by the proof that made its mask.

The renderer refuses what it cannot prove; this is the second opinion that the audit counts, and that a sample of every
run gets before training starts.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sftflow.chat.call_arguments import decoded
from sftflow.chat.plain_text import Document
from sftflow.chat.prompts import Prompts
from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import Conversation, Message, Part
from sftflow.foundation.errors import FormatError, MaskError

PARITY = "prompt + supervised = training ids"
ENDS = "one supervised end of turn per supervised turn"
CONTROL = "no control ids from content"
BOS = "BOS as the template writes it"
CONTENT = "content round-trips"
INVARIANTS = (PARITY, ENDS, CONTROL, BOS, CONTENT)
Checks = dict[str, dict[str, Any]]  # by invariant: {"checked": rows, "failed": rows, "first": "PLACE: FACT" or None}


def verify(
    renderer: Renderer, conversation: Conversation, rendered: Rendered, prompts: Prompts | None = None
) -> dict[str, str]:
    """What is wrong with a row, by invariant; {} where nothing is. `conversation` is the one that was rendered.

    prompts: where the row expands, those of its examples, so that none is rendered again for each of them.
    Of a row that is tokens already there is nothing to check. Where all is supervised, what is left out is checked."""
    wrong: dict[str, str] = {}
    if conversation.tokens is not None:
        return wrong
    if conversation.document is not None:
        return verify_text(renderer, conversation.document, [rendered])
    if renderer.spec.supervise == "all":
        return verify(renderer.supervising("replies"), *_left_out(renderer, conversation, rendered), prompts)
    ids, mask = rendered.ids, rendered.mask
    turns = conversation.supervised
    fact = _parity(renderer, conversation, rendered, prompts or renderer.prompts(conversation))
    if fact:
        wrong[PARITY] = fact
    stops = np.isin(ids, renderer.stop_ids()) & (mask == 1)
    after = np.append(mask[1:], 0)
    if int(stops.sum()) != len(turns) or int((stops & (after == 0)).sum()) != len(turns):
        wrong[ENDS] = f"{int(stops.sum())} supervised ends of turn for {len(turns)} supervised turns"
    elif conversation.fractions or conversation.weight != 1:
        of_turn = [conversation.weight * (conversation.messages[turn].weight or 0) for turn in turns]
        own = np.array([*of_turn, 0.0])[np.searchsorted(np.flatnonzero(stops), np.arange(len(ids)))] * mask
        if not np.array_equal(mask if rendered.weights is None else rendered.weights, own):
            wrong[ENDS] = "the weights of its tokens are not those of its turns"
    special = np.isin(ids, list(renderer.special.values()))
    expected = _control_tokens(renderer, conversation, rendered.text)
    found = ids[special].tolist()
    if expected is not None and found != expected:
        wrong[CONTROL] = f"{len(found)} control ids where the template writes {len(expected)}"
    bos = renderer.special.get(renderer.spec.names.get("bos_token", ""))
    if expected is not None and bos is not None and found.count(bos) != expected.count(bos):
        wrong[BOS] = f"{found.count(bos)} BOS ids where the template writes {expected.count(bos)}"
    decoded = renderer.decode(ids.tolist())
    if decoded != rendered.text and decoded != renderer.round_trip(rendered.text):
        wrong[CONTENT] = "decoding its ids does not give back its text"
    return wrong


def verify_text(renderer: Renderer, document: Document, pieces: Sequence[Rendered]) -> dict[str, str]:
    """The same of plain text.   pieces: all that it was cut into, in order."""
    wrong: dict[str, str] = {}
    ids = [i for piece in pieces for i in piece.ids.tolist()]
    if any(piece.mask.tolist() != [0, *(len(piece.ids) - 1) * [1]] for piece in pieces):
        wrong[PARITY] = "not every token after the first is supervised"
    if document.ids is not None:
        return wrong
    opening, end = renderer.document_opening, renderer.document_end if document.ends else ()
    words = ids[len(opening) : len(ids) - len(end)]
    if (*opening, *words, *end) != tuple(ids):
        wrong[BOS] = "it does not begin and end as the base's documents do"
    if not set(words).isdisjoint(renderer.special.values()):
        wrong[CONTROL] = "control ids in its words"
    if renderer.decode(words) not in (document.text, renderer.round_trip(document.text)):
        wrong[CONTENT] = "decoding its ids does not give back its text"
    return wrong


def _left_out(renderer: Renderer, conversation: Conversation, rendered: Rendered) -> tuple[Conversation, Rendered]:
    """The same row with its replies of weight 0 as the supervised ones."""
    if any(m.weight == 0 and m.role != "assistant" for m in conversation.messages):
        others = tuple(m if m.role == "assistant" else replace(m, weight=1) for m in conversation.messages)
        rendered = renderer.render(replace(conversation, messages=others))
    messages = tuple(
        replace(m, weight=int(m.weight == 0)) if m.role == "assistant" else m for m in conversation.messages
    )
    mask = 1 - rendered.mask
    mask[:1] = 0
    return replace(conversation, messages=messages, weight=1), replace(rendered, mask=mask, weights=None)


def checks(wrong: dict[str, str], conversation: Conversation) -> Checks:
    """What `verify` says of one row, to be added up."""
    if conversation.tokens is not None:
        return {}
    place = conversation.source
    first = {name: f"{place}: {fact}" for name, fact in wrong.items()}
    held = [name for name in INVARIANTS if name != ENDS or conversation.document is None]  # text has no turns to end
    return {name: {"checked": 1, "failed": int(name in wrong), "first": first.get(name)} for name in held}


def add_checks(total: Checks, more: Checks) -> None:
    for name, mine in more.items():
        entry = total.setdefault(name, {"checked": 0, "failed": 0, "first": None})
        entry["checked"] += mine["checked"]
        entry["failed"] += mine["failed"]
        entry["first"] = entry["first"] or mine["first"]


def _parity(renderer: Renderer, conversation: Conversation, rendered: Rendered, prompts: Prompts) -> str | None:
    """The prompt for each turn is rendered for itself. The last one's ids must be the row's to the first; of the
    others, whose ids are among those, what follows the last control token is encoded again."""
    text, ids, mask = rendered.text, rendered.ids, rendered.mask
    turns = [turn for turn in conversation.supervised if turn]
    told_apart = len(turns) > 1 and not (renderer.writes_prefix_spaces or conversation.mentions(renderer.special_re))
    controls = [(m.start(), m.end()) for m in renderer.special_re.finditer(text)] if told_apart else []
    places = np.flatnonzero(np.isin(ids, list(renderer.special.values()))).tolist() if told_apart else []
    told_apart = told_apart and len(controls) == len(places)
    for turn in turns:
        where = f"messages[{turn}]"
        try:
            prompt = prompts.before(turn)
            n = None
            if told_apart and turn != turns[-1] and text.startswith(prompt):
                last = bisect.bisect_left(controls, (len(prompt),)) - 1
                tail = renderer.encode_plain(prompt[controls[last][1] :]) if last >= 0 else []
                first = places[last] + 1
                n = first + len(tail) if last >= 0 and ids[first : first + len(tail)].tolist() == tail else None
            if n is None:
                whole = renderer.render(conversation.before(turn), add_generation_prompt=True, prompts=prompts).ids
                n = len(whole) if np.array_equal(ids[: len(whole)], whole) else len(ids)
        except (FormatError, MaskError) as error:
            return f"{where}: no prompt ({error.fact})"
        if n >= len(ids):
            return f"{where}: the prompt's ids are not the beginning of the row's"
        if n and mask[n - 1]:
            return f"{where}: the last token of its prompt is supervised"
        parts = conversation.messages[turn].parts
        if not mask[n] and not (parts and parts[0].kind == "python_output"):
            return f"{where}: its first token is not supervised"
    return None


def _control_tokens(renderer: Renderer, conversation: Conversation, text: str) -> list[int] | None:
    """Ids of the control tokens that the template itself writes, in order; None where that cannot be told."""
    found = renderer.special_re.findall
    if not conversation.mentions(renderer.special_re):
        return [renderer.special[t] for t in found(text)]

    def harmless(value: Any) -> Any:
        if isinstance(value, str):
            return renderer.special_re.sub("control", value)
        if isinstance(value, dict):
            return {harmless(k): harmless(v) for k, v in value.items()}
        return [harmless(v) for v in value] if isinstance(value, list) else value

    def harmless_message(message: Message) -> Message:
        return replace(
            message,
            parts=tuple(Part(p.kind, harmless(p.text)) for p in message.parts),
            tool_calls=tuple(harmless([decoded(c) for c in message.tool_calls])),
            reasoning_content=harmless(message.reasoning_content),
            name=harmless(message.name),
            tool_call_id=harmless(message.tool_call_id),
        )

    messages = tuple(map(harmless_message, conversation.messages))
    without = replace(conversation, messages=messages, tools=tuple(harmless(list(conversation.tools))))
    try:
        text_without = renderer.text(without)
        block = len(text) - len(renderer.text(conversation))  # the last reply stands behind a block of its prompt
        if block:
            prompt = renderer.text(without.before(len(messages) - 1), add_generation_prompt=True)
            text_without = prompt + text_without[len(prompt) - block :]
        return [renderer.special[t] for t in found(text_without)]
    except FormatError:
        return None
