"""Talking with an assistant in the terminal: one question, or a conversation.

The reply is all that goes to standard output; prompts, notes and errors go to standard error.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, TextIO, TypedDict

from sftflow.chat.schema import Conversation, Message, Part, text_message
from sftflow.errors import SftflowError

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant

HELP = """/system TEXT   set the system prompt (without TEXT: remove it)
/reset         forget the conversation
/quit          leave (so does Ctrl-D); Ctrl-C stops a reply"""

# A greedy model that has begun to repeat itself would fill a context of thousands of tokens.
LONGEST_REPLY = 512


class Sampling(TypedDict):
    """How tokens are drawn; temperature 0 is greedy, top_p 1 and top_k 0 are off."""

    temperature: float
    top_p: float
    top_k: int


def own_sampling(assistant: Assistant) -> Sampling:
    """What the checkpoint's generation_config.json asks for where it asks for sampling; else greedy, as in
    evaluation, so that what one sees is what was measured."""
    config = getattr(assistant.model, "generation_config", None)
    if config is None or not getattr(config, "do_sample", False):
        return {"temperature": 0.0, "top_p": 1.0, "top_k": 0}

    def value(key: str, otherwise: float) -> float:
        found = getattr(config, key, None)
        return otherwise if found is None else float(found)

    return {"temperature": value("temperature", 1.0), "top_p": value("top_p", 1.0), "top_k": int(value("top_k", 0))}


def _conversation(system: str | None, messages: list[Message]) -> Conversation:
    opening = [text_message("system", system)] if system else []
    return Conversation((*opening, *messages), source="chat")


def _stream(assistant: Assistant, conversation: Conversation, out: TextIO) -> tuple[Message | None, str]:
    """Write the reply as it comes. Returns (the reply as a message, or None where nothing came; why it ended)."""
    from sftflow.generate.engine import Request

    ids = tuple(assistant.renderer.render(conversation, reply=True).ids.tolist())
    room = max(1, min(LONGEST_REPLY, assistant.engine.context - len(ids)))
    request = Request(prompt_ids=ids, max_new_tokens=room, seed=secrets.randbits(63), **own_sampling(assistant))
    written, ended, message = "", "interrupted", None
    try:
        with closing(assistant.engine.stream(request)) as deltas:  # type: ignore[type-var]
            for delta in deltas:
                out.write(delta.text)
                out.flush()
                written += delta.text
                if delta.reply is not None:
                    # Its parts keep the calculator's calls, which the next turn's prompt must hold, too.
                    message, ended = Message("assistant", delta.reply.parts), delta.reply.finish_reason
    except KeyboardInterrupt:
        message = Message("assistant", (Part("text", written),)) if written else None
    if not written.endswith("\n"):
        out.write("\n")
        out.flush()
    return message, ended


def _whole(text: str) -> str:
    """Bytes of the input that were not UTF-8 come as halves of surrogate pairs; no tokenizer takes them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def chat(
    assistant: Assistant,
    *,
    prompt: str | None = None,
    system: str | None = None,
    out: TextIO | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Answer one prompt, or talk until /quit or Ctrl-D.

    out: where replies go (standard output). read: asks for a line, given the prompt to show, as `input` does.
    Raises SftflowError where a one-shot prompt cannot be rendered or does not fit; in a conversation it is shown.
    """
    out = sys.stdout if out is None else out
    reconfigure = getattr(out, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks, and goes on
    system = _whole(system) if system else None
    if prompt is not None:
        _stream(assistant, _conversation(system, [text_message("user", _whole(prompt))]), out)
        return

    from rich.console import Console
    from rich.text import Text

    notes = Console(stderr=True, highlight=False)

    def note(text: str) -> None:
        notes.print(Text(text, style="dim"))

    note(f"{assistant.name} · /help for commands, Ctrl-D to leave")
    history: list[Message] = []
    # `input` writes its prompt to standard output unless both ends are a terminal.
    show = "> " if read is not input or (sys.stdin.isatty() and sys.stdout.isatty()) else ""
    while True:
        try:
            line = _whole(read(show)).strip()
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\nCtrl-D or /quit leaves")
            continue
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command == "/quit":
            return
        if command == "/help":
            note(HELP)
        elif command == "/reset":
            history = []
            note("the conversation is forgotten")
        elif command == "/system":
            system = rest.strip() or None
            note("the system prompt is set" if system else "no system prompt")
        elif re.fullmatch(r"/[a-z]+", line):
            note(f"{command} is not a command; /help lists them")
        else:
            turn = [*history, text_message("user", line)]
            try:
                message, ended = _stream(assistant, _conversation(system, turn), out)
            except SftflowError as error:  # this turn is taken back; the conversation goes on
                note(f"error: {error}" + ("" if len(turn) == 1 else " (or /reset)"))
                continue
            if message is not None:
                history = [*turn, message]
            if ended == "length":
                note("[cut: the reply did not end by itself]")
