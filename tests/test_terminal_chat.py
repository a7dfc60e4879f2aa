"""Terminal chat: what is typed, what is saved, base beside SFT, and a real terminal at its other end."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.bigrams import bigrams, write_checkpoint
from helpers.runs import error_line, run
from helpers.tokenizers import byte_level
from sftflow.chat.data_files import read_conversations
from sftflow.chat.schema import Conversation, Message, Part, text_message
from sftflow.checkpoint import Assistant, load_assistant, save
from sftflow.foundation.errors import DataError
from sftflow.generation.request import Delta, GenerationRequest, Reply
from sftflow.pretraining.pretrain import BaseSpec, build_model
from sftflow.terminal.repl import chat
from sftflow.terminal.repl_input import Typed, read_message
from sftflow.terminal.save import append_row, row_of


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Assistant:
    """A trained-looking checkpoint: its sftflow.json names the base."""
    import torch

    base = load_assistant(str(tiny_base))
    directory = tmp_path_factory.mktemp("sft") / "checkpoint"
    meta = {"base": {"name": str(tiny_base)}}
    save(directory, base.model, base.tokenizer, base.renderer, dtype=torch.float32, meta=meta)
    return load_assistant(str(directory))


class Recorded:
    """The engine, and what it was asked; every reply ends as `ending` says."""

    def __init__(self, engine: Any, ending: str | None = "stop") -> None:
        self._engine, self._ending = engine, ending
        self.context = engine.context
        self.requests: list[GenerationRequest] = []
        self.replies: list[Reply] = []

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        self.requests.append(request)
        for delta in self._engine.stream(replace(request, max_new_tokens=6)):
            if delta.reply is not None and self._ending:
                delta = replace(delta, reply=replace(delta.reply, finish_reason=self._ending))
            if delta.reply is not None:
                self.replies.append(delta.reply)
            yield delta


def talk(assistant: Assistant, lines: list[Any], **options: Any) -> tuple[str, Recorded]:
    """What the conversation wrote to standard output, and its engine."""
    engine = Recorded(assistant.engine)
    feed = iter([*lines, EOFError()])

    def read(prompt: str) -> str:
        line = next(feed)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    out = io.StringIO()
    chat(replace(assistant, engine=engine), out=out, read=read, **options)  # type: ignore[arg-type]
    return out.getvalue(), engine


def prompt_of(assistant: Assistant, *messages: Message) -> tuple[int, ...]:
    return tuple(assistant.renderer.render(Conversation(messages), add_generation_prompt=True).ids.tolist())


# ---- what is typed


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["hello"], Typed("hello")),
        (["a \\", "b\\", " c"], Typed("a \nb\n c")),
        (["pasted\nlines\r\nof text\n"], Typed("pasted\nlines\nof text")),
        (['"""', "/quit", "", "  x", '"""'], Typed("/quit\n\n  x", plain=True)),
        (['"""one"""'], Typed("one", plain=True)),
        (['"""one', 'two"""'], Typed("one\ntwo", plain=True)),
        (['"""', "cut off"], Typed("cut off", plain=True)),
        (["caf\udce9"], Typed("caf?")),
    ],
)
def test_messages_of_several_lines(lines: list[str], message: Typed) -> None:
    feed = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(feed)
        except StopIteration:
            raise EOFError from None

    assert read_message(read) == message
    assert list(feed) == []


# ---- commands


def test_a_pasted_text_is_one_message_and_no_command(assistant: Assistant) -> None:
    _, engine = talk(assistant, ["/quit\nis a command", '"""', "/reset", '"""'])
    first = Message("assistant", engine.replies[0].parts)
    assert [r.prompt_ids for r in engine.requests] == [
        prompt_of(assistant, text_message("user", "/quit\nis a command")),
        prompt_of(assistant, text_message("user", "/quit\nis a command"), first, text_message("user", "/reset")),
    ]


def test_retry_asks_the_same_with_another_seed(assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    _, engine = talk(assistant, ["/retry", "hi", "/retry", "on"])
    hi, again, on = engine.requests
    assert hi.prompt_ids == again.prompt_ids and hi.seed != again.seed
    second = Message("assistant", engine.replies[1].parts)
    assert on.prompt_ids == prompt_of(assistant, text_message("user", "hi"), second, text_message("user", "on"))
    notes = capsys.readouterr().err
    assert "there is no question yet" in notes and "the same again" in notes


def test_how_a_reply_is_drawn_is_asked_for(assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    """The seed is that of every question's first reply; /retry counts on, /base takes the same."""
    base = replace(assistant, name="the base", engine=Recorded(assistant.engine, None))  # type: ignore[arg-type]
    asked = {"temperature": 0.7, "top_p": 0.9, "seed": 5, "max_tokens": 3}
    _, engine = talk(assistant, ["hi", "/retry", "/retry", "/base", "on"], sampling=asked, base=base)
    assert [r.seed for r in engine.requests] == [5, 6, 7, 5]
    assert {(r.temperature, r.top_p, r.max_new_tokens) for r in engine.requests} == {(0.7, 0.9, 3)}
    assert [(r.seed, r.temperature) for r in base.engine.requests] == [(7, 0.7)]  # type: ignore[attr-defined]
    _, engine = talk(assistant, ["hi"])
    assert engine.requests[0].temperature == 0 and engine.requests[0].max_new_tokens > 3
    capsys.readouterr()
    _, engine = talk(assistant, ["hi"], sampling={"seed": -3, "top_p": 0.5})
    assert engine.requests[0].seed == -3
    assert "--top-p and --seed have no effect at temperature 0" in capsys.readouterr().err


def test_a_seed_draws_the_same_again(tiny_base: Path) -> None:
    drawn = ["chat", str(tiny_base), "--prompt", "hi", "--temperature", "1.5", "--max-tokens", "8", "--seed"]
    one, again, other = (run(*drawn, seed) for seed in ("5", "5", "6"))
    assert one.returncode == 0 and one.stdout == again.stdout != other.stdout


def test_a_reply_that_is_cut_says_by_what(assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    cut = {n: f"[cut{by}: the reply did not end by itself]" for n, by in ((7, " at --max-tokens 7"), (9999, ""))}
    for most, said in cut.items():
        chat(assistant, prompt="hi", sampling={"max_tokens": most})
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--temperature", x) for x in ("-0.1", "2.1", "nan", "inf", "warm")),
        *(("--top-p", x) for x in ("-0.1", "1.1", "nan")),
        *(("--max-tokens", x) for x in ("0", "-1", "1.5")),
        *(("--seed", x) for x in ("1.5", str(2**63))),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(option: str, value: str) -> None:
    line = error_line(run("chat", "builtin:tiny", "--prompt", "hi", option, value))
    assert line.startswith(f"error: usage: Invalid value for '{option}': ")


def test_a_retry_that_is_stopped_at_once(assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    class Stopped(Recorded):
        def stream(self, request: GenerationRequest) -> Iterator[Delta]:
            if len(self.requests) == 1:
                self.requests.append(request)
                raise KeyboardInterrupt
            yield from super().stream(request)

    engine = Stopped(assistant.engine)
    feed = iter(["hi", "/retry", "/retry", "/quit"])
    chat(replace(assistant, engine=engine), out=io.StringIO(), read=lambda _: next(feed))  # type: ignore[arg-type]
    assert len({r.prompt_ids for r in engine.requests}) == 1 and len(engine.requests) == 3
    assert "stopped before the first word" in capsys.readouterr().err


def test_base_answers_the_last_question_beside_it(assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    base = replace(assistant, name="the base", engine=Recorded(assistant.engine))  # type: ignore[arg-type]
    out, engine = talk(assistant, ["/base", "/system be kind", "hi", "/base", "on"], base=base)
    (asked,) = base.engine.requests  # type: ignore[attr-defined]
    assert asked.prompt_ids == engine.requests[0].prompt_ids and asked.seed == engine.requests[0].seed
    assert len(engine.requests[1].prompt_ids) > len(asked.prompt_ids)  # the base's reply is not part of the history
    assert out == "".join(f"{r.text}\n" for r in (engine.replies[0], engine.replies[0], engine.replies[1]))
    notes = capsys.readouterr().err
    assert "there is no question yet" in notes and "the base:" in notes


def test_base_is_found_by_the_lineage_or_said_why_not(
    assistant: Assistant, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = talk(assistant, ["hi", "/base"])
    assert len(out.splitlines()) >= 2 and f"{tiny_base}:" in capsys.readouterr().err.replace("\n", "")
    for info, reason in (({}, "names no base"), ({"base": {"name": "/no/such/place"}}, "no such checkpoint directory")):
        talk(replace(assistant, info=info), ["hi", "/base"])
        notes = " ".join(capsys.readouterr().err.split())
        assert "error: " in notes and reason in notes and "start with --base BASE" in notes


def test_one_shot_with_a_base(assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    chat(assistant, prompt="hi", base=replace(assistant, name="the base"))
    captured = capsys.readouterr()
    half = len(captured.out) // 2
    assert captured.out[:half] == captured.out[half:] and "the base:" in captured.err


# ---- saving


def test_save_writes_rows_that_train(assistant: Assistant, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    _, engine = talk(
        assistant, ["/save", f"/save {file}", "/system be kind", "hi é", f"/save {file}", "on", f"/save {file}"]
    )
    one, two = read_conversations(file)
    assert [m.role for m in one.messages] == ["system", "user", "assistant"] and one.messages[1].text == "hi é"
    assert one.messages[2].text == engine.replies[0].text and len(two.messages) == 5
    # Trained on, the prompt is what the terminal's model was given, token for token.
    for row, request in zip((one, two), engine.requests, strict=True):
        rendered = assistant.renderer.render(row)
        n = len(request.prompt_ids)
        assert tuple(rendered.ids[:n].tolist()) == request.prompt_ids and rendered.mask[n:].any()
    notes = capsys.readouterr().err
    assert "/save needs a file" in notes and "nothing to save yet" in notes and "row 2 of" in notes.replace("\n", " ")


def test_a_row_has_the_system_prompt_that_its_replies_had(
    assistant: Assistant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.jsonl"
    save = f"/save {file}"
    _, engine = talk(
        assistant, ["/system be kind", "hi", "/system be rude", save, "on", save, "/system", "/retry", save, "/reset",
                    "/system last", "hi", save]
    )  # fmt: skip
    rows = [[(m.role, m.text, m.weight) for m in row.messages if m.role != "user"] for row in read_conversations(file)]
    hi, on, again, last = (r.text for r in engine.replies)
    assert rows == [
        [("system", "be kind", 1), ("assistant", hi, 1)],  # not what was set after it
        [("system", "be rude", 1), ("assistant", hi, 0), ("assistant", on, 1)],
        [("assistant", hi, 0), ("assistant", again, 1)],
        [("system", "last", 1), ("assistant", last, 1)],
    ]
    notes = " ".join(capsys.readouterr().err.split())
    assert notes.count("(replies that were made under another system prompt have weight 0)") == 2


def test_a_row_keeps_calculator_calls_and_marks_what_was_cut() -> None:
    reply = Message(
        "assistant", (Part("text", "It is "), Part("python", "48/2"), Part("python_output", "24")), weight=0
    )
    row = row_of([None], [text_message("user", "48/2?"), reply])
    assert row["messages"][1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "It is "}, {"type": "python", "text": "48/2"},
                    {"type": "python_output", "text": "24"}],
        "weight": 0,
    }  # fmt: skip


def test_thoughts_are_shown_beside_the_reply(
    assistant: Assistant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_level(special=("<|start|>", "<|end|>"), plain=("<think>", "</think>"))
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}:{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
        "</think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
    )
    said = tokenizer(":<think>Hm</think>Yes.<|end|>", add_special_tokens=False).input_ids
    base = write_checkpoint(tmp_path / "model", bigrams(len(tokenizer), said), tokenizer)
    thinker, file = load_assistant(str(base)), tmp_path / "said.jsonl"
    out = io.StringIO()
    chat(thinker, out=out, read=lambda _, typed=iter(["So?", f"/save {file}", "/quit"]): next(typed))
    err = capsys.readouterr().err
    assert out.getvalue() == "Yes.\n" and "Hm\n" in err and "think" not in err
    (row,) = read_conversations(file)
    assert row.messages[1] == replace(text_message("assistant", "Yes."), reasoning_content="Hm")
    base = Recorded(assistant.engine)
    typed = iter(["So?", "And?", "/base", "/quit"])
    chat(thinker, out=out, read=lambda _: next(typed), base=replace(assistant, engine=base))  # type: ignore[arg-type]
    said = [text_message(role, text) for role, text in (("user", "So?"), ("assistant", "Yes."), ("user", "And?"))]
    assert base.requests[0].prompt_ids == prompt_of(assistant, *said)  # which has no place for thoughts


@pytest.mark.parametrize("content", ["not JSON\n", '{"a": 1}\n', '{"messages": []}\n', "\x00\x01"])
def test_save_leaves_other_files_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "other"
    file.write_text(content)
    with pytest.raises(DataError) as caught:
        append_row(file, row_of([None], [text_message("user", "hi"), text_message("assistant", "yo")]))
    assert "no JSONL file of conversations" in str(caught.value) and file.read_text() == content


def test_save_where_nothing_can_be_written(tmp_path: Path) -> None:
    row = row_of([None], [text_message("user", "hi"), text_message("assistant", "yo")])
    for path in (tmp_path, tmp_path / "no" / "folder.jsonl"):
        with pytest.raises(DataError):
            append_row(path, row)
    file = tmp_path / "open.jsonl"
    file.write_text(json.dumps(row))  # its last line does not end
    assert append_row(file, row) == 2 and len(list(read_conversations(file))) == 2


# ---- a real terminal


class Terminal:
    """`sftflow chat` with a pseudo-terminal at its other end."""

    def __init__(self, *args: str, **env: str) -> None:
        self.master, other = pty.openpty()
        command = [sys.executable, "-m", "sftflow", "chat", *args]
        variables = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "PYTHONIOENCODING": "", **env}
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=variables, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(other)
        self.seen = ""

    def wait(self, pattern: str, seconds: float = 60) -> str:
        """Read until the pattern comes; what came up to its end, taken away."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < deadline, f"{pattern!r} never came: {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode("utf-8", "replace")
                except OSError:  # the other end is closed
                    assert re.search(pattern, self.seen, re.DOTALL), self.seen
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    directory = tmp_path_factory.mktemp("endless")
    # With this seed its greedy reply is z after z, or, to "hi", one escape character after the other.
    spec = BaseSpec(params="0.1M", context=1 << 20, seed=8)
    build_model(spec, len(tokenizer), tokenizer.bos_token_id).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_in_a_terminal(endless: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.jsonl"
    terminal = Terminal(str(endless))
    try:
        terminal.wait(r"Ctrl-D to.*leave.*> ")
        # A bracketed paste: two lines, one message. The reply goes on until Ctrl-C; the program does, too.
        terminal.send("\x1b[200~first line\rsecond línea\x1b[201~\r")
        terminal.wait(r"l.{1,2}nea.*2004l\rz{12}")
        terminal.send("\x03")
        terminal.wait(r"\[stopped\].*> ")
        terminal.send("\x1b[A\r")  # the line before, from the history
        terminal.wait(r"first line.*2004l\r[^\x1b]{12}")
        terminal.send("\x03")
        terminal.wait(r"\[stopped\].*> ")
        terminal.send(f"/save {file}\r")
        terminal.wait(r"saved as row 1.*> ")
        terminal.send("/reset\rhi\r")
        terminal.wait("\N{SYMBOL FOR ESCAPE}{12}")  # what a model writes does not steer the terminal
        terminal.send("\x03")
        terminal.wait(r"\[stopped\].*> ")
        terminal.send("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
        os.close(terminal.master)
    (row,) = read_conversations(file)
    users = [m.text for m in row.messages if m.role == "user"]
    replies = [m for m in row.messages if m.role == "assistant"]
    assert users == ["first line\nsecond línea"] * 2
    assert all(m.text and m.weight == 0 for m in replies)


def test_ctrl_c_in_one_shot_exits_130(endless: Path) -> None:
    terminal = Terminal(str(endless), "--prompt", "hi")
    try:
        terminal.wait("\N{SYMBOL FOR ESCAPE}{12}")
        terminal.send("\x03")
        assert terminal.process.wait(20) == 130
    finally:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
        os.close(terminal.master)


def test_piped_and_not_utf8(tiny_base: Path) -> None:
    """Every line of a pipe is a message, replies are all of the output; without UTF-8 letters are lost, no more."""
    done = subprocess.run(
        [sys.executable, "-m", "sftflow", "chat", str(tiny_base)],
        input="hi\n/system caf\xe9\n/nonsense\n/quit\n".encode("latin-1"),
        capture_output=True, timeout=100, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done.stdout.decode("ascii")
    assert b"> " not in done.stdout and done.stdout.endswith(b"\n") and b"is not a command" in done.stderr
