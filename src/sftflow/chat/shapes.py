"""What is said of a row whose shape is of no dialect, or not of one alone: what it looks like, and what can be done."""

from __future__ import annotations

from typing import Any

from sftflow.chat.exchanges import ABOUT, CANONICAL, GSM8K, OTHERS, Pair
from sftflow.chat.row_keys import ASKS, BELOW, CHOICES, CONVERSATIONS, READ, REPLIES, absent
from sftflow.foundation.errors import SchemaError

SAY_WHICH = "name what is meant: columns: {ITS_NAME: prompt, ITS_NAME: completion}"
_RESULT = {("problem", "solution"): "answer"}
"""a key that says only the end of the reply, in mathematical sets"""
_TURN = {"role", "from", "user", "human"}
_SPOKEN = {"parts", "speaker", "utterance", "sender", "agent", "message"}


def require_clear(row: dict[str, Any], pair: Pair, place: str, *, named: bool) -> None:
    """Raises SchemaError where another key of the row asks, replies, or belongs to what is asked, too.   named: the
    user has said that these two do."""
    ask, reply = pair
    beside = {key for key, value in row.items() if key not in (*pair, *ABOUT.get(ask, ())) and not absent(value)}
    other = next((key for key in (*ASKS, *REPLIES) if key in beside and key != _RESULT.get(pair)), None)
    if other and not named:
        fact = f"{other} beside {ask} and {reply}: more than one question and one reply"
        raise SchemaError(f"{place}.{other}", fact, SAY_WHICH)
    if choices := _choices(row, beside, place):
        raise choices
    require_whole(row, pair, place)
    if pair == ("question", "answer") and isinstance(row["answer"], bool):
        remedy = "the task boolq reads it: {source: boolq, path: FILE}"
        raise SchemaError(f"{place}.answer", "yes or no, not a text", remedy)
    if pair == ("question", "answer") and isinstance(row["answer"], str) and GSM8K.search(row["answer"]):
        fact = "an answer as GSM8K has it, with <<...>> or #### NUMBER"
        remedy = "the task gsm8k reads it: {source: gsm8k, path: FILE}; as plain text it is columns: "
        raise SchemaError(f"{place}.answer", fact, remedy + "{question: prompt, answer: completion}")


def require_whole(row: dict[str, Any], pair: Pair, place: str) -> None:
    """Raises SchemaError where a key belongs to what is asked, and it is not said where it goes."""
    ask, reply = pair
    for key in BELOW:
        if key not in (*pair, *ABOUT.get(ask, ())) and not absent(row.get(key)):
            fact = f"{key} beside {ask}: it is not said where it stands in the prompt"
            said = f"columns: {{{ask}: instruction, {key}: input, {reply}: output}} puts it below"
            raise SchemaError(f"{place}.{key}", fact, said)


def _choices(row: dict[str, Any], beside: set[str], place: str) -> SchemaError | None:
    """The error of a question of several choices."""
    key = next((key for key in CHOICES if key in beside), None)
    if key is None:
        return None
    texts = isinstance(row.get("choices"), list)
    task = {"options": "mmlu_pro", "choice0": "mmlu"}.get(key)
    if key in ("choices", "answerKey"):
        task = ("jsonl" if isinstance(row.get("answer"), str) else "mmlu") if texts else "arc"
    read = f"the task {task} reads it: {{source: {task}, path: FILE}}; or " if task else ""
    fact = "a question of several choices, which the question alone does not show"
    return SchemaError(f"{place}.{key}", fact, f"{read}write them into a prompt")


def unknown_shape(row: dict[str, Any], place: str) -> SchemaError:
    """The error of a row that is no conversation under any names that are known."""
    if not row:
        return SchemaError(place, "an empty row", "remove it")
    if isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]:
        fact = "a tree of replies: several conversations, of which it is not said which to teach"
        return SchemaError(f"{place}.prompt", fact, "write each path that shall be taught as a row of messages")
    lower = {key.lower(): key for key in row}
    if "question" in lower and (choices := _choices(row, {*row}, place)):
        return choices
    if {"task_id", "prompt", "canonical_solution"} <= row.keys():
        remedy = "sftflow eval asks them (--tasks humaneval=FILE); to teach them: columns: "
        return SchemaError(place, "HumanEval's problems", remedy + "{prompt: prompt, canonical_solution: completion}")
    if {"prompt", "instruction_id_list"} <= row.keys():
        return SchemaError(place, "IFEval's prompts, without replies", "sftflow eval asks them: --tasks ifeval=FILE")
    for key, value in row.items():
        if isinstance(value, str) and ("### Instruction:" in value or value.lstrip().startswith("### Human:")):
            fact = f"no reply beside {key}, which is ready text with headers"
            return SchemaError(place, fact, f"if the reply is in it: columns: {{{key}: text}}")
    names = ", ".join(map(repr, list(row)[:4])) + (", ..." if len(row) > 4 else "")
    fact = f"no conversation in its keys ({names})"
    if len(row) > 1 and all(isinstance(value, dict) for value in row.values()):
        return SchemaError(place, f"objects by their names ({names}), not a row", "write each of them as a row")
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        return SchemaError(place, "one message, not a conversation", "gather those of a conversation: messages: [...]")
    for key, value in row.items():
        turns = isinstance(value, list) and [v for v in value if isinstance(v, dict)]
        if turns and any(READ.keys() & turn.keys() for turn in turns) and not READ.keys() & (row.keys() - {key}):
            return SchemaError(place, f"rows below the key {key!r}, not a row", "write each of them as a row")
        if turns and all(not _TURN.isdisjoint(turn) and "parts" not in turn for turn in turns):
            return SchemaError(place, fact, f"if {key} is the conversation: columns: {{{key}: messages}}")
        if turns and all(not _SPOKEN.isdisjoint(turn) for turn in turns):
            why = "which are not read" if "parts" in turns[0] else "it is not said who is the assistant"
            fact = f"turns with the keys {', '.join(list(turns[0])[:4])}: {why}"
            return SchemaError(f"{place}.{key}", fact, 'write them as messages: {"role": ..., "content": ...}')
    for ask, reply in (*CANONICAL, *OTHERS):
        if ask in lower and reply in lower:
            said = ", ".join(f"{lower[key]}: {key}" for key in READ if key in lower and lower[key] != key)
            return SchemaError(place, fact, f"name its columns: columns: {{{said}}}")
    asks = [key for key in (*ASKS[:5], "inputs", "input") if key in row][:2]
    asks = asks[:1] if asks in (["instruction", "input"], ["query", "input"]) else asks
    replies = [key for key in (*REPLIES, "targets") if key in row]
    if len(asks) < 2 and len(replies) < 2 and (asks or replies):
        ask, reply = [*asks, "ITS_NAME"][0], [*replies, "ITS_NAME"][0]
        ours = CANONICAL[1] if ask == "instruction" else CANONICAL[0]
        remedy = f"columns: {{{ask}: {ours[0]}, {reply}: {ours[1]}}}"
        if asks and replies:
            return SchemaError(place, fact, f"if {reply} is the reply: {remedy}")
        fact = f"no reply beside {ask}" if asks else f"nothing that is asked beside {reply}"
        return SchemaError(place, f"{fact}, or an empty one", f"give it, remove the row, or name its column: {remedy}")
    remedy = f"give {CONVERSATIONS[0]}, or name its columns: columns: {{ONE: prompt, OTHER: completion}}"
    return SchemaError(place, fact, remedy)
