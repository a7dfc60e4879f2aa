"""What a person types, as messages: line editing, pastes of many lines, and text in any encoding.

    hello                      one message
    first \\                    a \\ at the line's end: the next line belongs to it
    second
    \"\"\"                        a block: everything up to the next \"\"\" is one message, never a command
    def f(x):

        return x
    \"\"\"

A paste of many lines is one message where the terminal says that it is a paste (GNU readline asks it to); elsewhere
lines that come all at once are taken for one.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from dataclasses import dataclass

QUOTES = '"""'
MORE = "… "
TOGETHER_SECONDS = 0.02
"""nobody types the next line so soon after the last"""


@dataclass(frozen=True)
class Typed:
    """One message. plain: it came in a block, so that a / in front is no command."""

    text: str
    plain: bool = False


def whole(text: str) -> str:
    """Text that every tokenizer takes: bytes that were not UTF-8 come as halves of surrogate pairs; line ends as \\n.

    >>> whole("a\\r\\nb\\rc")
    'a\\nb\\nc'
    """
    return text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def read_message(read: Callable[[str], str]) -> Typed:
    """The next message. read: asks for a line, given the prompt to show, as `input` does.

    Raises EOFError at the end of the input, KeyboardInterrupt at Ctrl-C; an unfinished message is given up then.
    """
    text = whole(read("> "))
    if text.lstrip().startswith(QUOTES):
        return Typed(_block(text.lstrip().removeprefix(QUOTES), read), plain=True)
    while text.endswith("\\"):
        text = f"{text[:-1]}\n{whole(read(MORE))}"
    return Typed(text.strip())


def _block(text: str, read: Callable[[str], str]) -> str:
    """The rest of a block whose opening quotes have been read; the input may end in it."""
    while not text.rstrip().endswith(QUOTES):
        try:
            text = f"{text}\n{whole(read(MORE))}"
        except EOFError:
            return text.strip("\n")
    return text.rstrip().removesuffix(QUOTES).strip("\n")


def keyboard() -> Callable[[str], str]:
    """`read` for standard input, a terminal or a pipe."""
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal that is not what its locale says
    if not sys.stdin.isatty():
        return lambda prompt: input()
    # `input` edits lines only where both ends are a terminal, and would write its prompt among the replies.
    both = sys.stdout.isatty()
    told = _readline() and both

    def read(prompt: str) -> str:
        if not both:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = input(prompt if both else "")
        while not told and _more_waits():
            line = f"{line}\n{input()}"
        return line

    return read


def _readline() -> bool:
    """Switch line editing and its history on. Whether pastes will be told from typing."""
    try:
        import readline
    except ImportError:  # Windows has none
        return False
    if "libedit" in (readline.__doc__ or ""):
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off
    return True


def _more_waits() -> bool:
    try:
        return bool(select.select([sys.stdin], [], [], TOGETHER_SECONDS)[0])
    except (OSError, ValueError):  # Windows waits for sockets only
        return False
