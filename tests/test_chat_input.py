"""`sftflow chat --input`: every row asked once, in order, whatever stops it; answered as the chat and the server do."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sftflow as sf
from helpers.runs import Result, error_line, run
from helpers.templates import CHATML, FRONT, open_with
from sftflow.chat.exchanges import OTHERS
from sftflow.chat.schema import parse_row
from sftflow.checkpoint import Assistant
from sftflow.foundation.errors import DataError, SftflowError
from sftflow.generation.request import Delta, Reply
from sftflow.generation.sampling import derived_seed
from sftflow.replies import asking
from sftflow.replies.questions import Asker, Question, read_question
from sftflow.serving.chat import ChatChoice
from sftflow.serving.model_entry import ServedModel
from sftflow.serving.schemas import ChatBody

BO = {"role": "assistant", "content": "Bo."}
USER, SAID = {"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "It is Ann."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
ROWS: list[tuple[Any, list[Any], Any]] = [
    ({"messages": [USER]}, [USER], None),
    ([USER, SAID], [USER], SAID),
    ("Who is it?", [USER], None),
    ({"prompt": "Who is it?"}, [USER], None),
    ({"prompt": "Who is it?", "completion": ""}, [USER], None),
    ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER], None),
    ({"prompt": [USER, SAID]}, [USER], SAID),
    ({"prompt": [USER, SAID, USER], "completion": "Bo."}, [USER, {**SAID, "weight": 0}, USER], BO),
    ({"prompt": "Who is it?", "completion": "It is Ann.", "system": "Be brief."}, [SYSTEM, USER], SAID),
    ({"instruction": "Who", "input": "is it?"}, [{**USER, "content": "Who\n\nis it?"}], None),
    ({"instruction": "Who is it?", "output": "It is Ann."}, [USER], SAID),
    ({"query": "Who is it?", "history": [["Who is it?", "It is Ann."]]}, [USER, SAID, USER], None),
    ({"conversations": [{"from": "human", "value": "Who is it?"}]}, [USER], None),
    ({"conversations": [{"from": "human", "value": "Who is it?"}, {"from": "gpt", "value": "Bo."}]}, [USER], BO),
    ({"messages": [USER, {**SAID, "weight": 0}, USER, SAID]}, [USER, {**SAID, "weight": 0}, USER], SAID),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, [USER], None),
    ({"messages": [], "prompt": "Who is it?", "completion": None}, [USER], None),
    ({"question": "Who is it?"}, [USER], None),
    ({"question": "Who is it?", "answer": "Bo."}, [USER], BO),
    ({"question": "Who is it?", "answer": "<<1+1=2>> #### 2"}, [USER], {**BO, "content": "<<1+1=2>> #### 2"}),
    ({"instruction": "Who", "context": "is it?", "response": "Bo."}, [{**USER, "content": "Who\n\nis it?"}], BO),
]  # fmt: skip


@pytest.mark.parametrize(("row", "asked", "reference"), ROWS)
def test_what_a_row_asks(row: Any, asked: list[Any], reference: Any) -> None:
    for payload in (row, json.dumps(row).encode()):
        conversation, reply = read_question(payload, "q.jsonl:1")
        assert conversation.to_row() == {"messages": asked}
        assert (reply and reply.to_json()) == reference


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ({"messages": [SYSTEM]}, "no user message"),
        ({"messages": [USER, SYSTEM]}, "a system message behind the last user message"),
        ({"messages": [USER, SAID, SAID]}, "two replies in a row"),
        ({"input_ids": [1, 2, 3], "mask": [0, 0, 1]}, "a row of tokens"),
        ({"prompt": "a", "instruction": "b"}, "both ask"),
        ({"chosen": [USER, SAID], "rejected": [USER, SAID]}, "preference data"),
        ({"prompt": "a", "output": "b"}, "no conversation in its keys"),
        ({"prompt": {"text": "a", "replies": []}}, "a tree of replies"),
        ({"question": "a", "choices": ["b", "c"]}, "several choices"),
        ({}, "an empty row"),
        (3, "a row is a number"),
    ],
)
def test_what_asks_nothing_is_named(row: Any, fact: str) -> None:
    with pytest.raises(SftflowError, match=f"q.jsonl:1.*{fact}") as refused:
        read_question(row, "q.jsonl:1")
    assert refused.value.exit_code == 2


def test_the_system_message_is_the_row_s_own_or_the_given_one() -> None:
    asked, _ = read_question({"prompt": "hi"}, "q:1", "Be brief.")
    assert asked.to_row()["messages"][0] == SYSTEM
    assert read_question({"messages": [SYSTEM, USER]}, "q:1", "Be brief.")[0].to_row() == {"messages": [SYSTEM, USER]}
    with pytest.raises(SftflowError, match="another than --system"):
        read_question({"messages": [SYSTEM, USER]}, "q:1", "Be long.")


# ---- the file


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


MIXED: list[Any] = [
    {"prompt": f"What is {i}+{i}?", "completion": str(2 * i), "id": i, "source": "sums"} for i in range(40)
]


@pytest.fixture(scope="module")
def model(assistant: Assistant, tmp_path_factory: pytest.TempPathFactory) -> sf.api.Assistant:  # type: ignore[name-defined]
    return sf.load(assistant)


def chat_input(assistant: Assistant, questions: Path, out: Path, *options: str) -> Result:
    return run("chat", assistant.name, "--input", str(questions), "--out", str(out), *options)


def test_replies_are_those_of_single_questions_in_order_and_rows_to_train_on(model: Any, tmp_path: Path) -> None:
    questions, out = write(tmp_path / "q.jsonl", MIXED), tmp_path / "new" / "r.jsonl"
    done = chat_input(model, questions, out, "--max-tokens", "9", "--temperature", "1", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert not done.stdout and "40 of 40 rows are answered in" in done.stderr and "tokens/s" in done.stderr
    rows = written(out)
    assert [r["source"] for r in rows] == [f"{questions}:{i}" for i in range(1, 41)]
    for number, (asked, row) in enumerate(zip(MIXED, rows, strict=True), 1):
        alone = model.chat(asked["prompt"], max_tokens=9, temperature=1.0, seed=derived_seed(3, number))
        last = row["messages"][-1]
        said = "".join(p.text for p in parse_row(row, "r").messages[-1].parts if p.kind == "text")
        assert said == alone.text or alone.near_ties
        assert row["messages"][:-1] == [{"role": "user", "content": asked["prompt"]}]
        assert last.get("weight", 1) == (row["finish_reason"] == "stop") == (alone.finish_reason == "stop")
        assert row["reference"] == {"role": "assistant", "content": asked["completion"]}
        assert (row["id"], row["meta"], row["seed"]) == (asked["id"], {"source": "sums"}, derived_seed(3, number))
    assert len(sf.render(out, model).rows) + len(sf.render(out, model).refused) == 40
    assert list(model.replies(questions, max_tokens=9, temperature=1, seed=3)) == rows
    assert list(model.replies(MIXED, max_tokens=9, temperature=1, seed=3))[7]["source"] == "rows:8"
    # Asked a second time, its own replies are the references.
    again = list(model.replies(out, max_tokens=2))
    assert [r.get("reference") for r in again] == [m if (m := r["messages"][-1])["content"] else None for r in rows]


def test_a_stopped_file_goes_on_and_is_the_same(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions, whole = write(tmp_path / "q.jsonl", MIXED), tmp_path / "whole.jsonl"
    options = ("--max-tokens", "6", "--temperature", "1")
    assert chat_input(model, questions, whole, *options).returncode == 0
    lines, settings = (
        whole.read_bytes().splitlines(keepends=True),
        whole.with_name("whole.jsonl.meta.json").read_bytes(),
    )
    out = tmp_path / "r.jsonl"
    for there in (b"", lines[0][:-1], b"".join(lines[:7]), b"".join(lines[:9]) + lines[9][:5], b"".join(lines)):
        out.write_bytes(there)
        out.with_name("r.jsonl.meta.json").write_bytes(settings)
        done = chat_input(model, questions, out, *options)
        assert done.returncode == 0 and out.read_bytes() == whole.read_bytes(), done.stderr
        assert f"chat: {there.count(10)}/40" in done.stderr
    assert f"answered in {out} already" in done.stderr
    # A window of one row keeps the order, too; and so does one that a long reply holds up.
    monkeypatch.setattr(asking, "WINDOW", 1)
    assert chat_input(model, questions, out, *options, "--overwrite").returncode == 0
    assert [r["messages"] for r in written(out)] == [r["messages"] for r in written(whole)]


def test_other_settings_and_other_files_are_refused_by_name(model: Any, tmp_path: Path) -> None:
    questions, out = write(tmp_path / "q.jsonl", MIXED[:3]), tmp_path / "r.jsonl"
    assert chat_input(model, questions, out, "--max-tokens", "2").returncode == 0
    before = out.read_bytes()
    for options, fact in (
        (["--max-tokens", "3"], "begun with max_tokens 2;"),
        (["--max-tokens", "2", "--system", "Be brief."], "begun with system null;"),
        (["--max-tokens", "2", "--temperature", "1", "--seed", "4"], "begun with seed 0, temperature 0.0;"),
    ):
        assert fact in error_line(chat_input(model, questions, out, *options))
    assert "begun with another model" in error_line(
        run("chat", "builtin:tiny", "--input", str(questions), "--out", str(out), "--max-tokens", "2")
    )
    write(questions, MIXED[1:4])
    assert "begun with other rows in --input" in error_line(chat_input(model, questions, out, "--max-tokens", "2"))
    assert out.read_bytes() == before
    assert chat_input(model, questions, out, "--max-tokens", "2", "--overwrite").returncode == 0
    assert [r["id"] for r in written(out)] == [1, 2, 3]
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[1] + lines[0])  # out of order
    assert f"{out}:2: not the row" in error_line(chat_input(model, questions, out, "--max-tokens", "2"))
    out.write_bytes(lines[0] + lines[2])
    assert "2 replies for 3 rows" in error_line(chat_input(model, questions, out, "--max-tokens", "2"))
    foreign = write(tmp_path / "mine.jsonl", MIXED)
    assert "not of this command" in error_line(chat_input(model, questions, foreign))
    assert written(foreign) == MIXED
    assert "--out is --input" in error_line(chat_input(model, questions, questions))
    assert "not a file" in error_line(chat_input(model, questions, tmp_path))
    assert "JSON lines are written" in error_line(chat_input(model, questions, tmp_path / "r.parquet"))


@pytest.mark.parametrize(
    ("bad", "fact"),
    [
        ({"messages": [SYSTEM]}, "no user message"),
        ({"prompt": "word " * 400}, "and the model's context 256"),
        ({"prompt": "hi", "tools": [TOOL]}, "no tool calls that could be read back"),
        ({"messages": [USER, USER]}, ""),  # in the format's own words
    ],
)
def test_a_row_that_cannot_be_asked_stops_it_before_anything_is_written(
    model: Any, tmp_path: Path, bad: Any, fact: str
) -> None:
    questions = write(tmp_path / "q.jsonl", [{"prompt": "a"}, bad, {"prompt": "b"}])
    out = tmp_path / "r.jsonl"
    line = error_line(chat_input(model, questions, out))
    assert line.startswith(f"error: {questions}:2") and fact in line
    assert os.listdir(tmp_path) == ["q.jsonl"]
    for _ in range(2):
        done = chat_input(model, questions, out, "--on-bad-row", "skip", "--max-tokens", "2")
        assert done.returncode == 0 and f"1 left out (the first: {questions}:2" in done.stderr, done.stderr
    assert [r["source"].rpartition(":")[2] for r in written(out)] == ["1", "3"]


def test_options_that_do_not_go_together() -> None:
    for words, fact in (
        (["--input", "q.jsonl"], "give --out"),
        (["--input", "q.jsonl", "--out", "r.jsonl", "--prompt", "hi"], "--prompt: --input asks"),
        (["--input", "q.jsonl", "--out", "r.jsonl", "--base", "builtin:tiny"], "--base: --input asks"),
        (["--prompt", "hi", "--out", "r.jsonl"], "--out: it belongs to --input"),
        (["--prompt", "hi", "--overwrite"], "--overwrite: it belongs to --input"),
    ):
        assert fact in error_line(run("chat", "builtin:tiny", *words))


def test_a_full_disk_is_told_and_what_is_there_stays(model: Any, tmp_path: Path) -> None:
    questions, out = write(tmp_path / "q.jsonl", MIXED), tmp_path / "r.jsonl"
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        done = chat_input(model, questions, out, "--max-tokens", "3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "free space; a rerun goes on from the finished rows" in error_line(done, 3)
    n = len(written(out))
    assert 0 < n < 40
    again = chat_input(model, questions, out, "--max-tokens", "3")
    assert again.returncode == 0 and f"chat: {n}/40" in again.stderr and len(written(out)) == 40


@pytest.mark.slow
def test_killed_at_any_time_each_row_is_there_once(model: Any, tmp_path: Path) -> None:
    questions, out = write(tmp_path / "q.jsonl", MIXED * 50), tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "sftflow", "chat", model.name, "--input", str(questions), "--max-tokens", "8"]
    seen = 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while (out.read_bytes().count(b"\n") if out.exists() else 0) <= seen and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGKILL else 143), said
        seen = out.read_bytes().count(b"\n")
    assert "stopped; the same command goes on from the rows in" in said and 0 < seen < 2000
    assert run(*command[3:], "--out", str(out)).returncode == 0
    assert [r["source"] for r in written(out)] == [f"{questions}:{i}" for i in range(1, 2001)]
    assert [r["id"] for r in written(out)] == list(range(40)) * 50


def test_one_writer_at_a_time(model: Any, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    questions, out = write(tmp_path / "q.jsonl", MIXED[:2]), tmp_path / "r.jsonl"
    model.write_replies(questions, out, max_tokens=1)
    with out.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing it"):
            model.write_replies(questions, out, max_tokens=1)


def test_columns_of_other_names(model: Any, tmp_path: Path) -> None:
    questions = write(tmp_path / "q.jsonl", [{"q": "Who?", "a": "Bo.", "n": 1}, {"q": "Who else?", "a": None, "n": 2}])
    for options, answers in (("q=prompt,a=completion", ["Bo.", None]), ("q=prompt", [None, None])):
        out = tmp_path / f"{len(answers)}{options}.jsonl"
        assert chat_input(model, questions, out, "--max-tokens", "2", "--columns", options).returncode == 0
        assert [r.get("reference", {}).get("content") for r in written(out)] == answers
        assert [(r["messages"][0]["content"], r["n"]) for r in written(out)] == [("Who?", 1), ("Who else?", 2)]
    line = error_line(chat_input(model, questions, tmp_path / "r.jsonl", "--columns", "x=prompt"))
    assert "x" in line and not (tmp_path / "r.jsonl").exists()


def test_several_files_one_of_them_packed(model: Any, tmp_path: Path) -> None:
    folder, out = tmp_path / "data", tmp_path / "r.jsonl"
    folder.mkdir()
    write(folder / "b.jsonl", MIXED[:3])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes()))
    (folder / "a.csv").write_text("prompt,id\nWho?,9\n")
    assert chat_input(model, folder, out, "--max-tokens", "2").returncode == 0
    sources = [f"{folder}/a.csv:2", *(f"{folder}/{name}:{i}" for name in ("b.jsonl", "c.jsonl.gz") for i in (1, 2, 3))]
    whole = out.read_bytes()
    assert [r["source"] for r in written(out)] == sources
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    done = chat_input(model, folder, out, "--max-tokens", "2")
    assert "chat: 5/7" in done.stderr and [r["source"] for r in written(out)] == sources
    for source, inside in ((folder, "r.jsonl"), (folder / "*.jsonl", "r.jsonl"), (folder / "b*", "b2.jsonl")):
        line = error_line(chat_input(model, source, folder / inside))
        assert "would be read as a part of --input" in line


# ---- as the server reads a reply


@pytest.fixture(scope="module")
def talking(assistant: Assistant, tokenizer_dir: Path) -> list[Assistant]:
    """Formats with tool calls, and with thoughts before them, over the tiny model."""
    thinking = CHATML.replace("(m.content or '')", "('<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' if m.reasoning_content else '') + (m.content or '')")  # fmt: skip # noqa: E501
    assert thinking != CHATML and FRONT in CHATML
    return [replace(assistant, renderer=open_with(tokenizer_dir, template)) for template in (CHATML, thinking)]


WORDS = ["<think>\n", "\n</think>\n\n", "hm", '\n<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>', "Yes.", "\n", "<tool_call>", '{"name": "no"}']  # fmt: skip # noqa: E501


@given(words=st.lists(st.sampled_from(WORDS), max_size=6), offered=st.booleans(), kind=st.integers(0, 1))
def test_thoughts_and_calls_are_those_that_the_server_tells(
    talking: list[Assistant], words: list[str], offered: bool, kind: int
) -> None:
    text, which = "".join(words), talking[kind]
    tools = {"tools": [TOOL]} if offered else {}
    asked = parse_row({"messages": [USER], **tools}, "q:1")
    reply = Reply(ids=(), text=text, parts=(), finish_reason="stop", n_prompt=1, n_generated=0, seconds=0.0)
    asker = Asker(which, None, 0, max_tokens=4)
    row = asker.row(Question(1, asked, None, which.request([1], max_tokens=4)), reply)
    served = ServedModel("m", which)
    choice = ChatChoice(served, ChatBody(model="m", messages=[USER], **tools))
    whole = choice.whole(choice.feed(Delta(text, "stop", reply)))
    message, mine = whole["message"], row["messages"][-1]
    assert (mine["content"] or "") == (message["content"] or "")
    assert mine.get("reasoning_content") == message.get("reasoning_content")
    theirs = [c["function"] for c in message.get("tool_calls", [])]
    assert [c["function"] for c in mine.get("tool_calls", [])] == theirs
    assert row["finish_reason"] == whole["finish_reason"]
    assert parse_row(row, "r:1").to_row() == {key: row[key] for key in ("messages", *tools)}


# ---- what is written is read back


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).filter(str.strip)
OTHER = st.dictionaries(
    st.sampled_from(
        ["id", "source", "label", "chosen", "finish_reason", "meta", "topic", "answer_key", "tools", "rank"]
    ),
    st.one_of(st.integers(-9, 9), st.sampled_from(["a", "wiki"]), st.none()),
    max_size=4,
)


@st.composite
def written_rows(draw: Any) -> tuple[dict[str, Any], list[Any]]:
    """(a row of some dialect, the messages that it asks)"""
    texts = draw(st.lists(TEXTS, min_size=1, max_size=6))
    roles = ["user", "assistant"]
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    asked = turns[: len(turns) - (len(turns) + 1) % 2]
    kind, other = draw(st.sampled_from(["messages", "prompt", "sharegpt", "alpaca", "query", "pair"])), draw(OTHER)
    if kind == "messages":
        row: dict[str, Any] = {"messages": turns}
    elif kind == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        row = {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in turns]}
    elif kind == "prompt":
        row = {"prompt": asked, "completion": texts[-1]} if len(turns) > len(asked) else {"prompt": asked}
        if len(turns) > len(asked):  # its replies are not taught
            asked = [{**t, "weight": 0} if t["role"] == "assistant" else t for t in asked]
    elif kind == "pair":
        ask, reply = draw(st.sampled_from([pair for pair in OTHERS if pair != ("query", "answers")]))
        asked, row = turns[:1], {ask: texts[0], **({reply: texts[1]} if len(texts) > 1 else {})}
    else:
        ask, reply = ("instruction", "output") if kind == "alpaca" else ("query", "response")
        pairs = [[asked[i]["content"], asked[i + 1]["content"]] for i in range(0, len(asked) - 1, 2)]
        row = {"history": pairs, ask: asked[-1]["content"]}
        if len(turns) > len(asked):
            row[reply] = texts[-1]
    return {**other, **row}, asked


@given(case=written_rows(), said=TEXTS, whole=st.booleans())
def test_a_row_that_is_written_reads_as_what_was_asked_and_the_reply(
    assistant: Assistant, case: tuple[dict[str, Any], list[Any]], said: str, whole: bool
) -> None:
    row, wanted = case
    try:
        asked, reference = read_question(json.dumps(row).encode(), "q:1")
    except SftflowError as refused:  # by a key beside the conversation: what training refuses, too
        assert refused.place.partition(".")[2] in ("label", "chosen", "tools")
        return
    assert [m.to_json() for m in asked.messages] == wanted
    ended: Any = "stop" if whole else "length"
    reply = Reply(ids=(), text=said, parts=(), finish_reason=ended, n_prompt=1, n_generated=0, seconds=0.0)
    asker = Asker(assistant, None, 0, max_tokens=4)
    out = asker.row(Question(1, asked, reference, assistant.request([1])), reply)
    back = parse_row(json.loads(json.dumps(out)), "r:1")
    message = {"role": "assistant", "content": said, **({} if whole else {"weight": 0})}
    assert [m.to_json() for m in back.messages] == [*wanted, message]
    kept = {**out, **out.get("meta", {})}
    assert all(kept[key] == value for key, value in asked.meta.items())
    again, before = read_question(json.dumps(out).encode(), "r:1")
    assert again.messages == asked.messages and before is not None and before.to_json() == message


def test_the_calculator_s_calls_are_parts_and_one_that_was_cut_is_left_out(assistant: Assistant) -> None:
    renderer = assistant.renderer
    start, end, shown, closed = renderer.python_ids() or ()
    said, call, value = (renderer.encode_plain(text) for text in ("It is ", "1+1", "2"))
    stop = next(iter(renderer.stop_ids()))
    asker = Asker(assistant, None, 0)

    def row_of(ids: list[int], ended: Any) -> list[Any]:
        n = len(ids) - (ended == "stop")
        parts = assistant.engine.reply_decoder.parts(ids[:n])
        text = "".join(p.text for p in parts if p.kind == "text")
        reply = Reply(
            ids=tuple(ids), text=text, parts=parts, finish_reason=ended, n_prompt=1, n_generated=n, seconds=0.0
        )
        asked = parse_row([USER], "q:1")
        row = asker.row(Question(1, asked, None, assistant.request([1])), reply)
        parse_row(row, "r:1")
        message: dict[str, Any] = row["messages"][-1]
        return [message["content"], message.get("weight", 1)]

    parts = [("text", "It is "), ("python", "1+1"), ("python_output", "2")]
    content = [{"type": kind, "text": text} for kind, text in parts]
    assert row_of([*said, start, *call, end, shown, *value, closed, stop], "stop") == [content, 1]
    assert row_of([*said, start, *call], "length") == ["It is ", 0]
