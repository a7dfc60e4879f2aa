"""Calculator parts as plain text, for formats that have no tokens for them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sftflow.chat.schema import Part


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
