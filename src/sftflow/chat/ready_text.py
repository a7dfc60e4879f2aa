"""Texts that hold a whole prompt, or a whole conversation, under headers: Alpaca's and Guanaco's -> what is said.

Below is an instruction that describes a task. ...       ### Human: hi### Assistant: yo

### Instruction:
Translate.

### Input:
Hund

### Response:
dog

The headers are those of one chat format; a row that keeps them would have them inside the turns of another.
"""

from __future__ import annotations

import re

from sftflow.foundation.errors import SchemaError

_HEADER = re.compile(r"^### (Instruction|Input|Response):[ \t]*\n*", re.MULTILINE)
_SPEAKER = re.compile(r"### (Human|Assistant):[ \t]*")
_ANY_HEADER = re.compile(r"^### \w[^\n]*:", re.MULTILINE)
_PREAMBLE = re.compile(
    r"\s*(Below is an instruction that describes a task[^\n]*"
    r"Write a response that appropriately completes the request\.)?\s*"
)
_RENDERED = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|eot_id|endoftext|end_of_text|start|user|end)\|>|</?s>\s*\Z|\A<s>|<start_of_turn>|\[INST\]"
)
_OF_PROMPT = (["Instruction", "Response"], ["Instruction", "Input", "Response"])
ROLES = {"Human": "user", "Assistant": "assistant"}


def is_ready(text: str) -> bool:
    """Whether a prompt is Alpaca's ready text, up to where the reply follows; or an instruction with its input below a
    header of its own.

    >>> [is_ready(text) for text in ("### Instruction:\\nAdd.\\n\\n### Response:\\n", "Add.\\n### Input:\\n1", "Add.")]
    [True, True, False]
    """
    if "### I" not in text:
        return False
    first, names, said = _split(text)
    if names == ["Input"]:
        return bool(first.strip()) and len(_ANY_HEADER.findall(text)) == 1
    return names in _OF_PROMPT and not said[-1].strip()


def parts_of_prompt(text: str) -> tuple[str, str]:
    """(system, what is asked) of a ready text. The preamble is the system message, but for Alpaca's own.

    >>> parts_of_prompt("Be brief.\\n\\n### Instruction:\\nAdd.\\n\\n### Input:\\n1 2\\n\\n### Response:\\n")
    ('Be brief.', 'Add.\\n\\n1 2')
    """
    first, names, said = _split(text)
    said = [first, *said] if names == ["Input"] else said[: len(names) - 1]
    system = "" if names == ["Input"] or _PREAMBLE.fullmatch(first) else first.strip()
    return system, "\n\n".join(part.strip() for part in said if part.strip())


def turns_of_text(text: str, place: str) -> list[tuple[str, str]]:
    """(role, text) of a row's text; [] where it is plain text. Raises SchemaError where a chat format has written it,
    or its turns cannot be told apart.

    >>> turns_of_text("### Human: hi### Assistant: yo", "x:1.text")
    [('user', 'hi'), ('assistant', 'yo')]
    """
    if found := _RENDERED.search(text):
        fact = f"a text that a chat format has written already ({found[0].strip()})"
        remedy = "give the messages that it was made of, without its tokens; plain text about them is {source: text, "
        raise SchemaError(place, fact, f"{remedy}path: FILE}}")
    if text.lstrip().startswith("### Human:"):
        _, *pieces = _SPEAKER.split(text)
        return [(ROLES[name], said.strip()) for name, said in zip(pieces[::2], pieces[1::2], strict=True)]
    _, names, said = _split(text)
    if names in _OF_PROMPT and said[-1].strip():
        system, asked = parts_of_prompt(text)
        turns = [("system", system)] if system else []
        return [*turns, ("user", asked), ("assistant", said[-1].strip())]
    if names:
        fact = f"ready text with the headers {', '.join(names[:4])}: not one instruction and its response"
        raise SchemaError(place, fact, "write its turns as messages")
    return []


def _split(text: str) -> tuple[str, list[str], list[str]]:
    """(what stands before the headers, their names, what stands below each)"""
    first, *pieces = _HEADER.split(text)
    return first, pieces[::2], pieces[1::2]
