"""Talking with an assistant in the terminal: one question, or a conversation.

The reply is all that goes to standard output; prompts, notes and errors go to standard error. Prompts are rendered as
in training; `repl_input` reads what is typed, `save` writes what was said.
"""

from __future__ import annotations

import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sftflow.chat.schema import Conversation, Message, Part, text_message
from sftflow.chat.thoughts import Piece, ThoughtReader, learn_thoughts
from sftflow.foundation.errors import CheckpointError, SftflowError
from sftflow.terminal.repl_input import Typed, keyboard, read_message, whole
from sftflow.terminal.save import append_row, row_of

if TYPE_CHECKING:
    from sftflow.checkpoint import Assistant

HELP = '''/system TEXT   set the system prompt (without TEXT: remove it)
/retry         answer the last question again, with another seed (of a --seed: the next one)
/base          let the base answer the last question, too
/save FILE     add the conversation to a JSONL file, as a row to train on, with the system prompt of its last reply;
               replies that were cut, or made under another one, have weight 0
/reset         forget the conversation
/quit          leave (so does Ctrl-D)
Ctrl-C stops a reply. A \\ at a line's end goes on in the next line; """ begins and ends a block of lines.'''

# A greedy model that has begun to repeat itself would fill a context of thousands of tokens.
LONGEST_REPLY = 1024
CUT = "[cut{}: the reply did not end by itself]"

Sampling = Mapping[str, Any]
"""temperature, top_p, max_tokens and seed, where they were given"""


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop instead of breaking into a forward pass; asked twice, it breaks in. Gives `asked()`."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be taken
        yield asked.is_set
        return

    def on_interrupt(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


# C0 and C1 but for tab and newline: a model's escape sequences must not steer the terminal.
CONTROLS = (
    {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
)


def _stream(
    assistant: Assistant, conversation: Conversation, out: TextIO, sampling: Sampling, stop: Callable[[], bool]
) -> tuple[Message | None, str]:
    """Write the reply as it comes, until `stop()`; its thoughts go where notes go. Returns (the reply as a message, or
    None where nothing came; why it ended). A reply that did not end by itself has weight 0; one that was stopped inside
    a calculator call ends in front of that call."""
    marks = learn_thoughts(assistant.renderer)
    shown = marks.shown(assistant.renderer) if marks else ()
    request = assistant.request(conversation, **{"max_tokens": LONGEST_REPLY, "shown": shown, **sampling})
    begun = marks.begun(assistant.renderer.decode(request.prompt_ids[-64:])) if marks else ""
    reader = ThoughtReader(marks, begun) if marks else None
    written, thought, ended = "", "", "interrupted"
    ids: list[int] = []
    parts: tuple[Part, ...] | None = None
    table = CONTROLS if out.isatty() else {}

    def show(pieces: Iterable[Piece]) -> None:
        nonlocal written, thought
        for kind, text, _ in pieces:
            if kind == "thought":
                thought += text
                note(text.translate(CONTROLS), end="")
            else:
                if thought and not written:
                    note("\n")
                written += text
                out.write(text.translate(table))
                out.flush()

    try:
        with closing(assistant.engine.stream(request)) as deltas:  # type: ignore[type-var]
            for delta in deltas:
                show(reader.feed(delta.text) if reader else [Piece("said", delta.text, 0)])
                ids += delta.ids
                if delta.reply is not None:
                    # Its parts keep the calculator's calls, which the next turn's prompt must hold, too.
                    ended, parts = delta.reply.finish_reason, delta.reply.parts
                elif stop():
                    break
    except KeyboardInterrupt:
        pass
    if reader is not None:
        show(reader.flush())
        parts = (Part("text", written),)
    elif parts is None:
        decoder = assistant.reply_decoder
        parts = decoder.parts(decoder.without_open_call(ids))
    said = ended != "interrupted" or thought or any(part.text for part in parts)
    message = Message("assistant", parts, reasoning_content=thought or None, weight=int(ended == "stop"))
    if thought and not written:
        note("")
    if not written.endswith("\n"):
        out.write("\n")
        out.flush()
    if ended == "length":
        most = sampling.get("max_tokens")
        note(CUT.format(f" at --max-tokens {most}" if request.max_new_tokens == most else ""))
    return message if said else None, ended


def note(text: str, end: str = "\n") -> None:
    """Say something beside the conversation."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False).print(Text(text, style="dim"), soft_wrap=True, end=end)


@dataclass
class TerminalChat:
    """A conversation as it stands.

    systems: the system prompt that each reply of the history was made under.
    sampling: as it was given.   asked: the last question, and what stood in front of it, for /retry and /base;
    `seed` was its reply's, the `again`th to it after the first.
    base: what /base asks; where it is left out, the base that the checkpoint names, loaded when it is first asked.
    """

    assistant: Assistant
    out: TextIO
    system: str | None = None
    history: list[Message] = field(default_factory=list)
    systems: list[str | None] = field(default_factory=list)
    asked: list[Message] = field(default_factory=list)
    base: Assistant | None = None
    sampling: Sampling = field(default_factory=dict)
    seed: int = 0
    again: int = 0

    def conversation(self, messages: list[Message]) -> Conversation:
        opening = [text_message("system", self.system)] if self.system else []
        return Conversation((*opening, *messages), source="chat")

    def drawn(self, again: int = 0) -> Sampling:
        """How a reply is drawn: with the seed that was given, the `again`th after it, or else any."""
        fixed = self.sampling.get("seed")
        self.seed = secrets.randbits(63) if fixed is None else fixed + again
        return {**self.sampling, "seed": self.seed}

    def ask(self, turn: list[Message]) -> None:
        """Answer the last message of `turn`; where that fails, the conversation stays as it was."""
        self.again = self.again + 1 if turn is self.asked else 0
        with _stoppable() as stop:  # to the end, for a late Ctrl-C must not lose the reply
            try:
                how = self.drawn(self.again)
                message, ended = _stream(self.assistant, self.conversation(turn), self.out, how, stop)
            except SftflowError as error:
                note(f"error: {error}" + ("" if len(turn) == 1 else " (or /reset)"))
                return
            self.asked = turn
            # A question that nobody answered is not part of the conversation: roles take turns.
            self.history = [*turn, message] if message is not None else turn[:-1]
            before = self.systems[: sum(m.role == "assistant" for m in turn)]
            self.systems = [*before, self.system] if message is not None else before
            if ended == "interrupted":
                note("[stopped]" if message is not None else "[stopped before the first word; /retry asks again]")

    def retry(self) -> None:
        before = self.history[-1] if len(self.history) > len(self.asked) else None
        self.ask(self.asked)
        if before in self.history[-1:] and not self.temperature:
            greedy = "this checkpoint asks for" if "temperature" not in self.sampling else "--temperature 0 takes"
            note(f"[the same again: {greedy} its likeliest tokens, not for a draw]")

    @property
    def temperature(self) -> float:
        return float(self.sampling.get("temperature", self.assistant.sampling["temperature"]))

    def ask_base(self) -> None:
        """The base's reply to the last question, with the same history and seed; it does not enter the conversation."""
        if self.base is None:
            self.base = lineage_base(self.assistant)
        note(f"{self.base.name}:")
        asked = self.asked
        if learn_thoughts(self.base.renderer) is None:  # it has no place for those of another model
            asked = [replace(m, reasoning_content=None) for m in asked]
        with _stoppable() as stop:
            how = {**self.sampling, "seed": self.seed}
            _, ended = _stream(self.base, self.conversation(asked), self.out, how, stop)
        if ended == "interrupted":
            note("[stopped]")

    def save(self, name: str) -> None:
        if not name:
            note("/save needs a file: /save mine.jsonl")
        elif not self.history:
            note("there is nothing to save yet")
        else:
            path = Path(name).expanduser()
            n_rows = append_row(path, row_of(self.systems, self.history))
            why = ["were cut"] if any(not m.weight for m in self.history) else []
            why += ["were made under another system prompt"] if len(set(self.systems)) > 1 else []
            no_weight = f" (replies that {' or '.join(why)} have weight 0)" if why else ""
            note(f"saved as row {n_rows} of {path}{no_weight}")

    def take(self, typed: Typed) -> bool:
        """Obey a command, or answer a message. Whether the conversation goes on."""
        name, _, rest = typed.text.partition(" ")
        if not typed.plain and (re.fullmatch(r"/[a-z]+", typed.text) or name in ("/system", "/save")):
            return self.command(name, rest.strip())
        if typed.text:
            self.ask([*self.history, text_message("user", typed.text)])
        return True

    def command(self, name: str, rest: str) -> bool:
        """Do what a /command says. Whether the conversation goes on."""
        if name == "/quit":
            return False
        if name == "/help":
            note(HELP)
        elif name == "/reset":
            self.history, self.systems, self.asked = [], [], []
            note("the conversation is forgotten")
        elif name == "/system":
            self.system = rest or None
            note("the system prompt is set" if self.system else "no system prompt")
        elif name in ("/retry", "/base") and not self.asked:
            note("there is no question yet")
        elif name == "/retry":
            self.retry()
        elif name == "/base":
            self.ask_base()
        elif name == "/save":
            self.save(rest)
        else:
            note(f"{name} is not a command; /help lists them")
        return True


def lineage_base(assistant: Assistant) -> Assistant:
    """Load the base that a checkpoint was trained from. Raises CheckpointError where its sftflow.json names none."""
    from sftflow.checkpoint import base_format, load_assistant

    name = (assistant.info.get("base") or {}).get("name")
    if not name:
        raise CheckpointError(assistant.name, "its sftflow.json names no base", "start with --base BASE")
    try:
        return load_assistant(name, fallback=base_format(assistant))
    except CheckpointError as error:
        fact = f"the base that it was trained from cannot be loaded ({error.place}: {error.fact})"
        raise CheckpointError(assistant.name, fact, "start with --base BASE") from error


def chat(
    assistant: Assistant,
    *,
    prompt: str | None = None,
    system: str | None = None,
    base: Assistant | None = None,
    sampling: Sampling | None = None,
    out: TextIO | None = None,
    read: Callable[[str], str] | None = None,
) -> None:
    """Answer one prompt, or talk until /quit or Ctrl-D.

    base: what /base asks; where it is left out, the base that the checkpoint names, loaded when it is first asked for.
    sampling: temperature, top_p, max_tokens, seed; what is left out is as the checkpoint asks. A seed is that of every
    question's first reply.
    out: where replies go (standard output).   read: asks for a line, given the prompt to show, as `input` does.
    Raises SftflowError where a one-shot prompt cannot be rendered or does not fit, and KeyboardInterrupt where Ctrl-C
    stopped its reply; in a conversation both are shown.
    """
    out = sys.stdout if out is None else out
    reconfigure = getattr(out, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks, and goes on

    given = dict(sampling or {})
    talk = TerminalChat(assistant, out, system=whole(system) if system else None, base=base, sampling=given)
    if not talk.temperature and (idle := [f"--{key.replace('_', '-')}" for key in ("top_p", "seed") if key in given]):
        effect = "has" if len(idle) == 1 else "have"
        note(f"[{' and '.join(idle)} {effect} no effect at temperature 0, where the likeliest token is taken]")
    if prompt is not None:
        asked, how = [text_message("user", whole(prompt))], talk.drawn()
        for answering in (assistant, base) if base is not None else (assistant,):
            if base is not None:
                note(f"{answering.name}:")
            with _stoppable() as stop:
                _, ended = _stream(answering, talk.conversation(asked), out, how, stop)
            if ended == "interrupted":
                raise KeyboardInterrupt
        return
    note(f"{assistant.name} · /help for commands, Ctrl-D to leave")
    read = keyboard() if read is None else read
    while True:
        try:
            if not talk.take(read_message(read)):
                return
        except SftflowError as error:
            note(f"error: {error}")
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\nCtrl-D or /quit leaves")
