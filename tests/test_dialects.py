"""The shapes that data sets are published in: the right conversation, or one line that says what to do."""

from __future__ import annotations

import datetime
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sftflow as sf
from helpers.outside import each, outside
from helpers.runs import run
from sftflow.api.rows import entry_of, read
from sftflow.chat.columns import fault_of, parse_columns
from sftflow.chat.render import Renderer
from sftflow.chat.row_keys import READ
from sftflow.chat.schema import Conversation, parse_row
from sftflow.data.mixture import build_mixture
from sftflow.data.prepare import _source
from sftflow.foundation.errors import DataError, RecipeError, SchemaError
from sftflow.recipe import parse_recipe

Said = tuple[str, str]
HI: list[Said] = [("user", "hi"), ("assistant", "yo")]
U, A = ({"role": role, "content": text} for role, text in HI)
STANFORD = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
READY = "### Instruction:\nhi\n\n### Response:\n"
CALL = '[{"name": "bell", "arguments": {"times": 2}}]'
BELL = json.dumps([{"name": "bell", "parameters": {"type": "object", "properties": {}}}])


def said(row: Any, columns: dict[str, str] | None = None) -> list[Said]:
    return [(m.role, m.text) for m in parse_row(row, "f:1", columns).messages]


def refusal(row: Any, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(SchemaError) as error:
        parse_row(row, "f:1", columns)
    assert error.value.remedy and "\n" not in str(error.value)
    return str(error.value)


# ---- read

SAME: dict[str, Any] = {
    "conversations of messages": {"conversations": [U, A]},
    "conversation": {"conversation": [U, A]},
    "capital roles": [{"role": "User", "content": "hi"}, {"role": "ASSISTANT", "content": "yo"}],
    "Human and Bot": [{"role": "Human", "content": "hi"}, {"role": "Bot", "content": "yo"}],
    "capital from": {"conversations": [{"from": "Human", "value": "hi"}, {"from": "GPT", "value": "yo"}]},
    "prompter": {"messages": [{"role": "prompter", "text": "hi"}, {"role": "assistant", "text": "yo"}]},
    "query": {"query": "hi", "response": "yo"},
    "Dolly": {"instruction": "hi", "context": "", "response": "yo", "category": "closed_qa"},
    "GPTeacher": {"instruction": "hi", "input": "", "response": "yo"},
    "question": {"question": "hi", "answer": "yo"},
    "Orca": {"id": 1, "system_prompt": "", "question": "hi", "response": "yo"},
    "prompt": {"prompt": "hi", "response": "yo"},
    "prompt of messages": {"prompt": [U], "response": "yo"},
    "mathematics": {"problem": "hi", "solution": "yo", "answer": "7"},
    "input": {"input": "hi", "output": "yo"},
    "input of messages": {"input": [U], "output": "yo", "reasoning": "off"},
    "inputs": {"inputs": "hi", "targets": "yo"},
    "columns of speakers": {"user": "hi", "assistant": "yo"},
    "turns by speaker": {"messages": [{"user": "hi"}, {"assistant": "yo"}]},
    "a turn of both": {"messages": [{"assistant": "yo", "user": "hi"}]},
    "Capybara": {"conversation": [{"input": "hi", "output": "yo"}], "source": "s"},
    "Firefly": {"conversation": [{"human": "hi", "assistant": "yo"}]},
    "Arrow's turns": {"messages": [{"user": "hi", "assistant": None}, {"user": None, "assistant": "yo"}]},
    "Responses": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "yo", "annotations": []}]},
    ],
    "Alpaca's ready text": {"text": f"{STANFORD}{READY}yo"},
    "Guanaco": {"text": "### Human: hi### Assistant: yo"},
    "a ready prompt": {"prompt": STANFORD + READY, "completion": "yo"},
    "a ready prompt beside its parts": {"instruction": "hi", "input": "", "output": "yo", "prompt": READY + "yo"},
    "messages beside a question": {"messages": [U, A], "question": "6*7?", "answer": "42"},
}


@pytest.mark.parametrize("name", SAME)
def test_published_shapes(name: str) -> None:
    found = parse_row(SAME[name], "f:1")
    assert [(m.role, m.text) for m in found.messages] == HI
    assert found.supervised == [1] and all(m.reasoning_content is None for m in found.messages)


def test_a_role_in_any_case_is_the_same_role() -> None:
    turns = [
        {"role": "System", "content": "S"},
        {"role": "USER", "content": "hi"},
        {"role": "Function_Call", "content": CALL},
        {"role": "Function", "content": "rung"},
        {"role": "Model", "content": "yo"},
    ]
    assert said(turns) == [("system", "S"), ("user", "hi"), ("assistant", ""), ("tool", "rung"), ("assistant", "yo")]
    assert "role 'usr' is not known" in refusal([{"role": "usr", "content": "hi"}])
    assert "role 'Agent' is not known" in refusal([{"role": "Agent", "content": "hi"}])


def test_what_stands_below_an_instruction() -> None:
    for key in ("input", "context"):
        for reply in ("output", "response"):
            assert said({"instruction": "hi", key: "C", reply: "yo"})[0] == ("user", "hi\n\nC")
    assert "context beside input" in refusal({"instruction": "hi", "input": "I", "context": "C", "output": "yo"})
    for row in (
        {"instruction": "hi\n\n### Input:\nC", "output": "yo"},
        {"text": STANFORD + READY[:-15] + "### Input:\nC\n\n### Response:\nyo"},
    ):
        assert said(row) == [("user", "hi\n\nC"), ("assistant", "yo")]
    own = "Sort.\n### Input:\n2 1\n### Output:"  # somebody's own headers are words of the prompt
    assert said({"instruction": own, "output": "1 2"})[0] == ("user", own)
    assert said({"prompt": "Be brief.\n\n" + READY, "completion": "yo"}) == [("system", "Be brief."), *HI]


def test_history_and_system_go_with_every_text() -> None:
    for ask, reply in (("query", "response"), ("prompt", "response"), ("question", "answer"), ("user", "assistant")):
        row = {ask: "hi", reply: "yo", "history": [["a", "b"]], "system": "S"}
        assert said(row) == [("system", "S"), ("user", "a"), ("assistant", "b"), *HI]
    messages = {"query": "hi", "response": "yo", "history": [U, A]}
    assert said(messages) == [*HI, *HI] and parse_row(messages, "f:1").supervised == [1, 3]
    ready = {"instruction": "Be brief.\n\n" + READY, "output": "yo", "history": [["a", "b"]]}
    assert said(ready) == [("system", "Be brief."), ("user", "a"), ("assistant", "b"), *HI]
    assert "a history beside prompt" in refusal({"prompt": [U], "response": "yo", "history": [["a", "b"]]})
    assert "a history beside prompt" in refusal({"prompt": "hi", "completion": "yo", "history": [["a", "b"]]})


@pytest.mark.parametrize("key", ["reasoning", "thinking", "reasoning_content"])
def test_reasoning_beside_a_reply_is_its_reasoning(key: str) -> None:
    for row in (
        {"question": "hi", "answer": "yo"},
        {"prompt": "hi", "completion": "yo"},
        {"instruction": "hi", "output": "yo"},
    ):
        reply = parse_row({**row, key: "hm"}, "f:1").messages[-1]
        assert (reply.text, reply.reasoning_content) == ("yo", "hm")
        assert parse_row({**row, key: "on"}, "f:1").ignored == (key,)
        assert "differ" in refusal({**row, "reasoning": "hm", "thinking": "so"})
        named = {name: name for name in row}
        assert parse_row({**row, key: "hm"}, "f:1", named).ignored == (key,)
        cot = parse_row({**row, "Complex_CoT": "hm"}, "f:1", {**named, "Complex_CoT": key}).messages[-1]
        assert cot.reasoning_content == "hm"
    both = parse_row({"prompt": "hi", "response": "<think>hm</think>yo", key: "hm"}, "f:1")
    assert both.messages[-1].reasoning_content is None and both.ignored == (key,)
    assert parse_row({"messages": [U, A], key: "hm"}, "f:1").ignored == (key,)
    thought = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "yo"}]
    assert parse_row([U, {"role": "assistant", "content": thought}], "f:1").messages[1].reasoning_content == "hm"


def test_items_of_responses() -> None:
    call = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "bell", "arguments": '{"n": 2}'}
    said_first = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Now:"}]}
    result = {"type": "function_call_output", "call_id": "c1", "output": "rung"}
    function = {"name": "bell", "arguments": '{"n": 2}'}
    openai = [
        U,
        {"role": "assistant", "content": "Now:", "tool_calls": [{"id": "c1", "function": function}]},
        {"role": "tool", "content": "rung", "tool_call_id": "c1"},
        A,
    ]
    plain = [
        {**m, "tool_calls": [{"id": "c1", "type": "function", "function": function}]} if "tool_calls" in m else m
        for m in openai
    ]
    found = parse_row({"input": [U], "output": [said_first, call, result, A]}, "f:1")
    assert found.messages == parse_row(plain, "f:1").messages and found.supervised == [1, 3]
    assert "unknown key 'namespace'" in refusal([U, {**call, "namespace": "x"}])
    assert "instructions beside input" in refusal({"instructions": "Be brief.", "input": [U], "output": "yo"})


def test_answers_that_are_calls() -> None:
    found = parse_row({"query": "ring", "answers": CALL, "tools": BELL}, "f:1")
    assert [call["function"] for call in found.messages[1].tool_calls] == json.loads(CALL)
    assert found.supervised == [1] and found.tools[0]["function"]["name"] == "bell"
    assert "no conversation in its keys" in refusal({"query": "ring", "answers": ["twice"]})


# ---- refused

REFUSED: list[tuple[Any, str, str]] = [
    ({"question": "q", "answer": "6<<2*3=6>>"}, "GSM8K", "source: gsm8k"),
    ({"question": "q", "answer": "six\n#### 1,006"}, "GSM8K", "source: gsm8k"),
    ({"question": "q", "choices": ["a", "b"], "answer": 1}, "several choices", "source: mmlu"),
    ({"question": "q", "options": ["a", "b"], "answer": "A"}, "several choices", "source: mmlu_pro"),
    ({"question": "q", "choices": ["a", "b"], "answer": "a"}, "several choices", "source: jsonl"),
    ({"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}, "several choices", "source: arc"),
    ({"Question": "q", "A": "a", "B": "b", "answer": "A"}, "several choices", "into a prompt"),
    ({"prompt": "p", "response": "r", "endings": ["a", "b"]}, "several choices", "into a prompt"),
    ({"turns": [{"speaker": "USER", "utterance": "hi"}]}, "not said who is the assistant", "as messages"),
    ({"task_id": "t", "prompt": "p", "canonical_solution": "s"}, "HumanEval", "canonical_solution: completion"),
    ({"key": 1, "prompt": "p", "instruction_id_list": ["x"]}, "IFEval", "--tasks ifeval=FILE"),
    ({"question": "q", "choice0": "a", "choice1": "b", "answer": "1"}, "several choices", "source: mmlu"),
    ({"question": "q", "answer": True}, "yes or no", "source: boolq"),
    ({"question": "q", "context": "c", "answer": "a"}, "context beside question", "context: input"),
    ({"prompt": "p", "input": "i", "response": "r"}, "input beside prompt", "prompt: instruction, input: input"),
    ({"question": "q", "answer": "a", "prompt": "p", "completion": "c"}, "under prompt and question", "columns: {"),
    ({"instruction": "i", "output": "o", "response": "r"}, "under output and response", "columns: {"),
    ({"question": "q", "answer": "a", "response": "r"}, "response beside question and answer", "columns: {"),
    ({"prompt": "p", "question": "q", "answer": "a"}, "prompt beside question and answer", "columns: {"),
    ({"prompt": "p", "input": "i", "output": "o"}, "prompt beside input and output", "columns: {"),
    ({"prompt": "p", "answer": "72"}, "no conversation in its keys", "columns: {"),
    ({"source": "s", "target": "t"}, "no conversation in its keys", "columns: {"),
    ({"Question": "q", "Response": "a"}, "no conversation", "columns: {Question: question, Response: response}"),
    ({"chat": [U, A]}, "no conversation", "columns: {chat: messages}"),
    ({"dialog": ["hi", "yo"]}, "no conversation", "give messages"),
    ({"messages": ["hi", "yo"]}, "a message is a string", "role and content"),
    ({"messages": [{"user": "hi", "human": "ho"}]}, "human, user in one turn", "keep one"),
    ({"text": "Once upon a time.", "label": 1}, "plain text", "{source: text, path: FILE}"),
    ({"text": "<|im_start|>user\nhi<|im_end|>"}, "written already", "messages"),
    ({"text": READY + "yo</s>"}, "written already (</s>)", "without its tokens"),
    ({"text": "### Human: hi### Assistant: yo<|endoftext|>"}, "written already (<|endoftext|>)", "without its tokens"),
    ({"prompt": READY + "yo"}, "ready text with headers", "columns: {prompt: text}"),
    ({"query": "q", "context": "c", "response": "r"}, "context beside query", "query: instruction, context: input"),
    ({"text": READY + "yo\n\n" + READY + "yo"}, "not one instruction and its response", "messages"),
    ({"prompt": {"text": "hi", "role": "prompter", "replies": [{"text": "yo", "replies": []}]}}, "a tree", "each path"),
    ({"a": {"x": 1}, "b": {"x": 2}}, "not a row", "each of them as a row"),
    (
        {"data": [{"prompt": "p", "completion": "c"}], "version": 1},
        "rows below the key 'data'",
        "each of them as a row",
    ),
    ({"train": [{"messages": [U, A]}], "test": []}, "rows below the key 'train'", "each of them as a row"),
    ({"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}, "role, parts: which are not read", "as messages"),
    ({"prompt": "p", "completion": None}, "no reply beside prompt, or an empty one", "remove the row"),
    ({"id": 1, "completion": "c"}, "nothing that is asked beside completion", "{ITS_NAME: prompt, completion: comp"),
    ({"instruction": "i", "input": "x", "answer": "a"}, "", "columns: {instruction: instruction, answer: output}"),
    ({"input": "p", "response": "r"}, "no conversation in", "columns: {input: prompt, response: completion}"),
    ({"id": 1, **U}, "one message, not a conversation", "messages: [...]"),
    ({"messages": str([U, A])}, "not JSON", "write it with json.dumps"),
    ([{**U, "seen": 1}, A], "unknown key 'seen'", "remove it"),
]


@pytest.mark.parametrize(("row", "fact", "remedy"), REFUSED)
def test_what_has_no_one_meaning_is_refused_with_what_to_do(row: Any, fact: str, remedy: str) -> None:
    found = refusal(row)
    assert fact in found.partition("; ")[0] and remedy in found.partition("; ")[2]


def test_what_is_noted_about_a_message_is_ignored() -> None:
    noted = {
        "language": "English",
        "toxic": False,
        "redacted": False,
        "turn_identifier": 3,
        "timestamp": None,
        "id": "x",
    }
    found = parse_row({"conversation": [{**U, **noted}, {**A, **noted}]}, "f:1")
    assert found.messages == parse_row([U, A], "f:1").messages
    assert "conversation[].language" in found.ignored and "conversation[].timestamp" not in found.ignored


def test_a_heading_is_no_mark_of_gsm8k() -> None:
    for answer in ("#### Steps\nFirst, a << b.", "See\n#### 3 ways\nto do it"):
        assert said({"question": "hi", "answer": answer})[1] == ("assistant", answer)


def test_remedies_do_what_they_say() -> None:
    asked = {"question": "prompt", "answer": "completion"}
    two = {"question": "hi", "answer": "yo", "prompt": "p", "completion": "c", "response": "r"}
    assert said(two, asked) == HI
    found = parse_row(two, "f:1", asked)
    assert found.ignored == ("completion", "prompt", "response")
    assert said({"question": "hi", "answer": "six\n#### 6"}, asked)[1] == ("assistant", "six\n#### 6")
    below = {"question": "instruction", "context": "input", "answer": "output"}
    assert said({"question": "hi", "context": "C", "answer": "yo"}, below)[0] == ("user", "hi\n\nC")
    pair = {"prompt": "hi", "chosen": "yo", "rejected": "no"}
    assert said(pair, {"chosen": "completion"}) == HI
    assert parse_row(pair, "f:1", {"chosen": "completion"}).ignored == ("rejected",)
    assert said({"chosen": [U, A], "rejected": [U]}, {"chosen": "messages"}) == HI
    assert said({"prompt": READY + "yo"}, {"prompt": "text"}) == HI
    assert said(
        {"instruction": "hi", "input": "C", "answer": "yo"}, {"instruction": "instruction", "answer": "output"}
    )[0] == ("user", "hi\n\nC")
    assert said({"Question": "hi", "Response": "yo"}, {"Question": "question", "Response": "response"}) == HI


# ---- every dialect says the same

TEXT = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)


def dialects_of(turns: list[Said], system: str | None) -> list[Any]:
    """A conversation in every dialect that can express it."""
    *before, (_, asked), (_, replied) = turns
    openai = [{"role": role, "content": text} for role, text in turns]
    names = {"user": ("human", "Human", "User"), "assistant": ("gpt", "Bot", "ASSISTANT")}
    rows: list[dict[str, Any]] = [{key: openai} for key in ("messages", "conversations", "conversation")]
    for n in range(3):
        rows.append({"conversations": [{"from": names[role][n], "value": text} for role, text in turns]})
        rows.append({"messages": [{"role": names[role][n], "content": text} for role, text in turns]})
        rows.append({"messages": [{names[role][0]: text} for role, text in turns]})
    rows.append(
        {"conversation": [{"input": q, "output": a} for (_, q), (_, a) in zip(turns[::2], turns[1::2], strict=True)]}
    )
    pairs = [[q, a] for (_, q), (_, a) in zip(before[::2], before[1::2], strict=True)]
    for ask, reply in (
        ("instruction", "output"),
        ("instruction", "response"),
        ("query", "response"),
        ("question", "answer"),
        ("question", "response"),
        ("prompt", "response"),
        ("problem", "solution"),
        ("inputs", "targets"),
        ("user", "assistant"),
        ("input", "output"),
    ):
        rows.append({ask: asked, reply: replied, "history": pairs})
    if not before:
        rows.append({"prompt": asked, "completion": replied})
        rows.append({"text": f"{STANFORD}### Instruction:\n{asked}\n\n### Response:\n{replied}"})
    if system is None:
        rows.append(
            {"text": "".join(f"### {names[role][1] if role == 'user' else 'Assistant'}: {t}" for role, t in turns)}
        )
    return [row if system is None else {**row, "system": system} for row in rows]


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), system=st.none() | TEXT)
def test_one_conversation_in_every_dialect(pairs: list[Said], system: str | None) -> None:
    turns = [turn for q, a in pairs for turn in (("user", q), ("assistant", a))]
    whole = turns if system is None else [("system", system), *turns]
    for row in dialects_of(turns, system):
        found = parse_row(row, "f:1")
        assert [(m.role, m.text) for m in found.messages] == whole
        assert found.supervised == [i for i, (role, _) in enumerate(whole) if role == "assistant"]


@settings(max_examples=40, deadline=None)
@given(
    row=st.sampled_from([row for row in SAME.values() if isinstance(row, dict)]),
    new=st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=5).map("~".__add__),
        min_size=9,
        max_size=9,
        unique=True,
    ),
    chosen=st.sets(st.sampled_from(sorted(READ))),
)
def test_renamed_columns_give_the_same_rows(row: dict[str, Any], new: list[str], chosen: set[str]) -> None:
    names = {key: name for key, name in zip(row, new, strict=False) if key in READ and key in chosen}
    other = {names.get(key, key): value for key, value in row.items()}
    columns = {name: key for key, name in names.items()}
    given, found = parse_row(row, "f:1"), parse_row(other, "f:1", columns)
    assert found.messages == given.messages and found.ignored == given.ignored


# ---- columns


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


TABLE = [{"q": f"hi {n}", "a": f"yo {n}", "system": "S", "note": n} for n in range(6)]
NAMED = {"q": "prompt", "a": "completion"}


def test_columns_in_every_door(tmp_path: Path, renderer: Renderer) -> None:
    path = _write(tmp_path / "d.jsonl", TABLE)
    plain = _write(tmp_path / "plain.jsonl", [{"prompt": r["q"], "completion": r["a"], "system": "S"} for r in TABLE])
    recipe = parse_recipe({"mixture": [{"source": str(path), "columns": NAMED}], "validation": 2}, "recipe")
    mixture = build_mixture(recipe, renderer)
    own = build_mixture(
        parse_recipe({"mixture": [{"source": str(plain), "name": "d"}], "validation": 2}, "recipe"), renderer
    )
    assert mixture.rows[0].ids(3).tolist() == own.rows[0].ids(3).tolist()
    assert mixture.ledger["data_sha256"] == own.ledger["data_sha256"]
    assert mixture.ledger["sources"][0]["ignored"] == {"note": 6}
    for rows in (read(path, columns=NAMED), read(TABLE, columns=NAMED), read(entry_of(read(TABLE, columns=NAMED)))):
        assert [c.to_row() for c in rows.conversations() if isinstance(c, Conversation)] == [
            c.to_row() for c in read(plain).conversations() if isinstance(c, Conversation)
        ]
    shown = sf.render(TABLE, "builtin:tiny", columns=NAMED)
    assert shown.to_json()["rows"][0]["ids"] == sf.render(str(plain), "builtin:tiny").to_json()["rows"][0]["ids"]


def test_columns_on_the_command_line(tmp_path: Path, tiny_base: Path) -> None:
    path = str(_write(tmp_path / "d.jsonl", TABLE[:1]))
    command = ("render", path, "--model", str(tiny_base), "--json", "--columns")
    assert len(json.loads(run(*command, "q=prompt,a=completion").stdout)["rows"]) == 1
    done = run(*command, "q=prompt,b=completion")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {path}: no row has a column 'b'; name one that is there: q, a, system, note\n"


def test_columns_are_part_of_what_rows_are_kept_under(tmp_path: Path, renderer: Renderer) -> None:
    path = str(_write(tmp_path / "d.jsonl", TABLE))

    def key(columns: dict[str, str]) -> str | None:
        recipe = parse_recipe({"mixture": [{"source": path, "columns": columns}]}, "recipe")
        return _source(recipe.mixture[0], 0, recipe, renderer).key

    assert key(NAMED) == key(dict(NAMED)) != key({"a": "prompt", "q": "completion"})


def test_a_column_that_some_row_has_is_there(tmp_path: Path) -> None:
    rows = [{"q": "hi", "a": "yo"}, {"q": "hi", "a": "yo", "sys": "S"}, {"q": "hi", "a": "yo", "sys": None}]
    path = _write(tmp_path / "d.jsonl", rows)
    columns = {**NAMED, "sys": "system"}
    found = [c for c in read(path, columns=columns).conversations() if isinstance(c, Conversation)]
    assert [len(c.messages) for c in found] == [2, 3, 2]
    with pytest.raises(DataError, match="no row has a column 'syst'; name one that is there: q, a, sys"):
        list(read(path, columns={**NAMED, "syst": "system"}).conversations())
    with pytest.raises(DataError, match="no rows in it"):
        list(read(_write(tmp_path / "none.jsonl", []), columns=NAMED).conversations())


def test_what_json_has_not_under_a_key_that_is_not_read() -> None:
    today = datetime.date(2020, 1, 1)
    rows = read([{"messages": [U, A], "answer": today}, {"question": "hi", "answer": "yo", "at": today}])
    assert [len(c.messages) for c in read(rows.path).conversations() if isinstance(c, Conversation)] == [2, 2]
    with pytest.raises(DataError, match="rows:1: not JSON"):
        _ = read([{"question": "hi", "answer": today}]).path


def test_cells_of_a_table_are_texts_where_texts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("question,answer,weight\n6*7?,42,1\nTrue?,true,0\n", encoding="utf-8")
    rows = [c for c in read(path).conversations() if isinstance(c, Conversation)]
    assert [(c.messages[1].text, c.supervised) for c in rows] == [("42", [1]), ("true", [])]
    path.write_text("frage,antwort,w\n6*7?,42,1\nTrue?,true,0\n", encoding="utf-8")
    named = {"frage": "question", "antwort": "answer", "w": "weight"}
    again = [c for c in read(path, columns=named).conversations() if isinstance(c, Conversation)]
    assert [c.messages for c in again] == [c.messages for c in rows]


@pytest.mark.parametrize(("cell", "weight"), [("True", 1), ("FALSE", 0), ("2.5e-1", 0.25), ("true", 1), ("1.0", 1)])
def test_a_cell_of_a_weight_as_pandas_and_spreadsheets_write_it(cell: str, weight: float, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text(f"prompt,completion,weight\nTrue,FALSE,{cell}\n")
    (found,) = read(path).conversations()
    assert isinstance(found, Conversation) and [m.text for m in found.messages] == ["True", "FALSE"]
    assert found.weight * (found.messages[1].weight or 0) == weight


def test_a_column_inside_another() -> None:
    row = {"translation": {"en": "hi", "de": "yo"}, "a.b": "S"}
    columns = {"translation.en": "prompt", "translation.de": "completion", "a.b": "system"}
    assert said(row, columns) == [("system", "S"), *HI]
    assert parse_row(row, "f:1", columns).ignored == ("translation",)


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"q": "promt"}, "q: 'promt' is no key of a row; did you mean 'prompt'?"),
        ({"q": "zzz"}, "q: 'zzz' is no key of a row; known: messages, "),
        ({"q": "prompt", "p": "prompt"}, "q and p are both called prompt; name one of them"),
    ],
)
def test_columns_that_say_nothing_are_refused(columns: dict[str, str], fault: str) -> None:
    assert (fault_of(columns) or "").startswith(fault)
    with pytest.raises(RecipeError, match=fault.partition(";")[0]):
        parse_recipe({"mixture": [{"source": "d.jsonl", "columns": columns}]}, "recipe")
    with pytest.raises(RecipeError, match=fault.partition(";")[0]):
        read(TABLE, columns=columns)


def test_columns_that_are_no_mapping_are_refused() -> None:
    for columns in (["q"], "q"):
        with pytest.raises(RecipeError, match="it should be a mapping of names"):
            parse_recipe({"mixture": [{"source": "d.jsonl", "columns": columns}]}, "recipe")


def test_columns_of_a_task_and_of_lists_are_refused() -> None:
    for source in ("spelling", "./tasks.py:riddles"):
        with pytest.raises(RecipeError, match=r"columns beside the task .*(spelling|riddles), which knows"):
            entry_of({"source": source, "columns": NAMED})
    assert "a row is a list, which has no columns" in refusal([U, A], NAMED)
    for text in ("q", "q=", "=prompt", "q=prompt,q=system"):
        with pytest.raises(RecipeError, match="--columns"):
            parse_columns(text)


# ---- public rows

NAMED_QUESTION = {"question": "prompt", "answer": "completion"}
ASKED_BELOW = {"question": "instruction", "context": "input", "answer": "output"}
TAUGHT: list[tuple[str, dict[str, str] | None, str]] = [  # file, columns, how the first row's first reply begins
    ("rasbt_instruct/instruction-data.json", None, "The spelling of the given phrase"),
    ("identity/identity_conversations.jsonl", None, "I am picoLLM"),
    ("fairytaleqa/train.jsonl", ASKED_BELOW, "delightfully cold"),
    ("gsm8k/train.jsonl", NAMED_QUESTION, "Natalia sold 48/2 = <<"),
    ("humaneval/HumanEval.jsonl.gz", {"prompt": "prompt", "canonical_solution": "completion"}, "    for idx, elem"),
    ("tools/glaive_toolcall_en_demo.json", None, "Of course! I can help you with that."),
    ("tools/reason_tool_use_demo_50.jsonl", None, "I'm sorry, but the available tools"),
]
TOLD = [
    ("fairytaleqa/train.jsonl", "context beside question"),
    ("gsm8k/train.jsonl", "source: gsm8k"),
    ("humaneval/HumanEval.jsonl.gz", "--tasks humaneval=FILE"),
    ("ifeval/input_data.jsonl", "--tasks ifeval=FILE"),
    ("multiple_choice/ARC-Easy/train.jsonl", "source: arc"),
    ("multiple_choice/openbookqa/train.jsonl", "source: arc"),
    ("multiple_choice/boolq/train.jsonl", "source: boolq"),
    ("open_assistant/en_100_tree.jsonl", "write each path"),
    ("sgd/train_dialogues_001.json", "turns with the keys"),
    ("topical_chat/valid_freq.json", "write each of them as a row"),
    ("tools/BFCL_v4_multiple.json", "no reply beside question"),
]


def ten_of(file: str, columns: dict[str, str] | None) -> list[Any]:
    return list(islice(read(outside(*file.split("/")), columns=columns).conversations(), 10))


@pytest.mark.parametrize(("file", "columns", "words"), each(TAUGHT))
def test_public_rows_are_taught(file: str, columns: dict[str, str] | None, words: str) -> None:
    rows = ten_of(file, columns)
    assert all(isinstance(row, Conversation) and row.supervised for row in rows)
    assert rows[0].messages[rows[0].supervised[0]].text.startswith(words)


@pytest.mark.parametrize(("file", "words"), each(TOLD))
def test_public_rows_that_are_no_conversations_say_what_to_do(file: str, words: str) -> None:
    assert all(isinstance(row, SchemaError) and words in str(row) for row in ten_of(file, None))
