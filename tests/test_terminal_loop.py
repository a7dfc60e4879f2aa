"""The conversation in the terminal, with a real tiny model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from helpers.serving import ASK, own, request
from sftflow.chat.schema import Conversation, Message, text_message
from sftflow.checkpoint import Assistant
from sftflow.foundation.errors import ContextError, FormatError
from sftflow.generation.request import Delta, GenerationRequest, Reply
from sftflow.terminal.repl import chat


class Watched:
    """A real engine that keeps the requests it gets, draws a few tokens only, and can fail in the middle."""

    def __init__(self, assistant: Assistant, failure: BaseException | None = None) -> None:
        self.engine, self.failure = assistant.engine, failure
        self.context = assistant.engine.context
        self.requests: list[GenerationRequest] = []
        self.replies: list[Reply] = []

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        self.requests.append(request)
        for delta in self.engine.stream(replace(request, max_new_tokens=12, temperature=1.0, seed=5)):
            yield delta
            if delta.text and self.failure is not None:
                raise self.failure
            if delta.reply is not None:
                self.replies.append(delta.reply)


def watched(assistant: Assistant, failure: BaseException | None = None) -> tuple[Assistant, Watched]:
    engine = Watched(assistant, failure)
    return replace(assistant, engine=engine), engine  # type: ignore[arg-type]


def test_one_shot_writes_the_reply_and_nothing_else(
    assistant: Assistant, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = own(assistant, 1000, temperature=0.0)
    capsys.readouterr()
    chat(assistant, prompt=ASK[0]["content"])
    captured = capsys.readouterr()
    assert captured.out.removesuffix("\n") == expected.text.removesuffix("\n") and expected.finish_reason == "length"
    assert captured.err == "[cut: the reply did not end by itself]\n"
    with pytest.raises(ContextError):
        chat(assistant, prompt="zq" * 500)


def talk(assistant: Assistant, lines: list[Any]) -> str:
    """What the conversation wrote to standard output; an exception among the lines is raised by the prompt."""
    feed = iter([*lines, EOFError()])

    def read(prompt: str) -> str:
        line = next(feed)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    out = io.StringIO()
    chat(assistant, out=out, read=read)
    return out.getvalue()


def prompt_of(assistant: Assistant, *messages: Message) -> tuple[int, ...]:
    return tuple(assistant.renderer.render(Conversation(messages), add_generation_prompt=True).ids.tolist())


def test_conversation_keeps_history_and_obeys_commands(
    assistant: Assistant, capsys: pytest.CaptureFixture[str]
) -> None:
    spied, engine = watched(assistant)
    lines = ["hi", "", "again", "/help", "/nonsense", "zq" * 500, "/reset", "/system be kind", "hello", "/quit", "no"]
    written = talk(spied, lines)
    assert written == "".join(f"{r.text}\n" for r in engine.replies) and len(engine.replies) == 3
    first, hi = Message("assistant", engine.replies[0].parts), text_message("user", "hi")
    assert [r.prompt_ids for r in engine.requests if len(r.prompt_ids) < 256] == [
        prompt_of(assistant, hi),
        prompt_of(assistant, hi, first, text_message("user", "again")),
        prompt_of(assistant, text_message("system", "be kind"), text_message("user", "hello")),
    ]
    notes = capsys.readouterr().err
    assert "/system TEXT" in notes and "/nonsense is not a command" in notes and "tokens" in notes


def test_ctrl_c_stops_the_reply_not_the_program(assistant: Assistant) -> None:
    spied, engine = watched(assistant, KeyboardInterrupt())
    shown = next(d.text for d in assistant.engine.stream(request(assistant, 12)) if d.text)
    assert talk(spied, [KeyboardInterrupt(), ASK[0]["content"], "again"]).startswith(f"{shown}\n")
    asked, said = text_message("user", ASK[0]["content"]), text_message("assistant", shown)
    assert engine.requests[1].prompt_ids == prompt_of(assistant, asked, said, text_message("user", "again"))


def test_input_that_is_not_utf8_does_not_break_the_loop(assistant: Assistant) -> None:
    spied, engine = watched(assistant)
    assert talk(spied, ["caf\udce9"]) == f"{engine.replies[0].text}\n"


def test_a_format_that_refuses_is_said_in_one_shot(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise FormatError("chat", "no system messages", "leave it out")

    monkeypatch.setattr(assistant.renderer, "render", refuse)
    with pytest.raises(FormatError):
        chat(assistant, prompt="hi", system="be kind")
