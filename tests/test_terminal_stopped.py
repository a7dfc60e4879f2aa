"""Ctrl-C in the middle of a reply that calls the calculator: what was whole stays in the conversation."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sftflow.chat.schema import Conversation, Message, Part, text_message
from sftflow.checkpoint import Assistant, load_assistant
from sftflow.generation.request import Delta, GenerationRequest
from sftflow.generation.sequence import ReplyDecoder, ReplySequence
from sftflow.terminal.repl import chat

BEFORE, CALL, RESULT, AFTER = Part("text", "It is "), Part("python", "48/2"), Part("python_output", "24"), "ok"


@pytest.fixture(scope="module")
def assistant(tiny_base: Path) -> Assistant:
    return load_assistant(str(tiny_base))


def tokens(assistant: Assistant) -> list[int]:
    """A reply with a call, as the model would write it: what the calculator writes left out."""
    renderer, python = assistant.renderer, assistant.renderer.python_ids()
    assert python is not None
    before, call, after = (renderer.encode_plain(text) for text in (BEFORE.text, CALL.text, AFTER))
    return [*before, python[0], *call, python[1], *after]


class Stopped:
    """A reply of given tokens, made by the engine's own draft; Ctrl-C comes after `n` tokens of the whole."""

    def __init__(self, assistant: Assistant, n: int) -> None:
        self.context, self.n = assistant.engine.context, n
        self.speech, self.written = ReplyDecoder(assistant.renderer), tokens(assistant)
        self.ids: list[int] = []
        self.requests: list[GenerationRequest] = []

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        self.requests.append(request)
        draft, written = ReplySequence(request, self.speech, 100, streamed=True), iter(self.written)
        for _ in range(self.n):
            draft.accept(draft.forced.popleft() if draft.forced else next(written))
            yield draft.take()
        self.ids = draft.ids
        raise KeyboardInterrupt


def test_a_reply_is_kept_up_to_a_call_that_is_not_whole(assistant: Assistant) -> None:
    start, end, _, output_end = assistant.renderer.python_ids() or (0, 0, 0, 0)
    whole = Stopped(assistant, len(tokens(assistant)) + len(assistant.renderer.encode_plain(RESULT.text)) + 2)
    with pytest.raises(KeyboardInterrupt):
        list(whole.stream(GenerationRequest(prompt_ids=(1,))))
    before, result = whole.ids.index(start), whole.ids.index(output_end) + 1
    speech, seen = ReplyDecoder(assistant.renderer), set()
    for n in range(len(whole.ids) + 1):
        kept = list(speech.without_open_call(whole.ids[:n]))
        assert kept == whole.ids[: before if before < n < result else n]
        seen.add(speech.parts(kept)[1:])
    assert seen == {(), (CALL, RESULT), *((CALL, RESULT, Part("text", AFTER[:n])) for n in range(1, len(AFTER) + 1))}
    no_value = [start, *assistant.renderer.encode_plain("import os"), end]  # nothing follows what has no value
    assert speech.without_open_call(no_value) == no_value and list(speech.without_open_call(no_value[:-1])) == []


@pytest.mark.parametrize(("left", "parts"), [(0, (BEFORE, CALL, RESULT, Part("text", AFTER))), (4, (BEFORE,))])
def test_the_next_prompt_has_the_calls_of_a_stopped_reply(
    assistant: Assistant, left: int, parts: tuple[Part, ...]
) -> None:
    renderer = assistant.renderer
    n = len(tokens(assistant)) + len(renderer.encode_plain(RESULT.text)) + 2 - left
    engine = Stopped(assistant, n)
    lines = iter(["48/2?", "on", "/quit"])
    out = io.StringIO()
    chat(replace(assistant, engine=engine), out=out, read=lambda _: next(lines))  # type: ignore[arg-type]
    assert out.getvalue().splitlines() == ["".join(p.text for p in parts if p.kind == "text")] * 2
    said = (text_message("user", "48/2?"), Message("assistant", parts, weight=0), text_message("user", "on"))
    assert engine.requests[1].prompt_ids == tuple(
        renderer.render(Conversation(said), add_generation_prompt=True).ids.tolist()
    )
