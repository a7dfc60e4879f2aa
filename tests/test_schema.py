"""Dialects become the canonical conversation; bad rows are named by place, fact, remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftflow.api.rows import read
from sftflow.chat.data_files import read_conversations
from sftflow.chat.schema import parse_line, parse_row
from sftflow.foundation.errors import DataError, SchemaError

SAME: list[Any] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
    {"prompt": "hi", "completion": "yo"},
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]},
    {"instruction": "hi", "input": "", "output": "yo"},
    {"instruction": "hi", "output": "yo"},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "yo"},
        ]
    },
]


@pytest.mark.parametrize("row", SAME)
def test_dialects(row: Any) -> None:
    conversation = parse_row(row, "f:1")
    assert [(m.role, m.text) for m in conversation.messages] == [("user", "hi"), ("assistant", "yo")]


def test_alpaca_input_joins_by_a_blank_line() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "id": 7}
    conversation = parse_row(row, "f:1")
    assert conversation.messages[0].text == "Add.\n\n1 2"
    assert conversation.meta == {"id": 7}


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        ({"messages": []}, "no messages"),
        ({"text": "x", "id": 7}, "plain text beside other keys"),
        ("hi", "a row is a string"),
        ([{"role": "usr", "content": "x"}], "role 'usr' is not known"),
        ([{"role": "user", "content": "x", "colour": 1}], "unknown key 'colour'"),
        ([{"role": "user", "content": None}], "content is null"),
        ([{"role": "user", "content": 3}], "content is a number"),
        ([{"role": "user", "content": "x", "weight": 1}], "only an assistant message has weight"),
        ([{"role": "assistant", "content": "x", "weight": 2}], "weight is 2"),
        ([{"role": "user", "content": [{"type": "image", "text": ""}]}], "part type 'image' is not known"),
        ([{"role": "user", "content": [{"type": "python", "text": "1"}]}], "python parts in a user message"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien' is not known"),
    ],
)
def test_bad_rows_are_named(row: Any, fact: str) -> None:
    with pytest.raises(SchemaError) as error:
        parse_row(row, "data.jsonl:17")
    assert error.value.place.startswith("data.jsonl:17")
    assert fact in error.value.fact
    assert error.value.remedy
    assert "\n" not in str(error.value)


def test_bad_json_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{oops\n')
    with pytest.raises(DataError) as error:
        list(read_conversations(path))
    assert error.value.place == f"{path}:3"


TWICE = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no", "content": "yo"}]'


@pytest.mark.parametrize(("name", "text"), [("d.jsonl", TWICE), ("d.json", f"[{TWICE}]")])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="the key 'content' stands twice in one object"):
        list(read_conversations(tmp_path / name))


def test_nulls_of_arrow_are_absent_keys(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [_called("lamp", {"room": "hall"}), _called("heater", {"degrees": 21, "away": [None, 3]})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    table = datasets.Dataset(pa.Table.from_pylist(rows))
    for source in (tmp_path / "d.parquet", table):
        for row, found in zip(rows, read(source).conversations(), strict=True):
            assert found.to_row() == parse_row(row, "x").to_row()


def test_maps_of_arrow_are_objects(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(*arguments: tuple[str, str]) -> None:
        call = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
        message = pa.struct(
            [
                ("role", pa.string()),
                ("content", pa.large_string()),
                ("tool_calls", pa.list_(pa.struct([("function", call)]))),
            ]
        )
        row = {"messages": _called("lamp", {})["messages"]}
        row["messages"][1]["tool_calls"] = [{"function": {"name": "lamp", "arguments": list(arguments)}}]
        pq.write_table(
            pa.Table.from_pylist([row], schema=pa.schema([("messages", pa.list_(message))])), tmp_path / "d.parquet"
        )

    table(("room", "hall"), ("colour", "red"))
    (found,) = read_conversations(tmp_path / "d.parquet")
    assert found.messages[1].tool_calls[0]["function"]["arguments"] == {"room": "hall", "colour": "red"}
    table(("room", "hall"), ("room", "attic"))
    with pytest.raises(DataError, match="duplicate field names"):
        list(read_conversations(tmp_path / "d.parquet"))


def _called(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A row whose one call, tool and parameters differ in their keys from those of another tool."""
    properties = {key: {"type": "string"} for key in arguments}
    function = {"name": name, "parameters": {"type": "object", "properties": properties}}
    return {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
            {"role": "tool", "name": name, "content": "ok"},
            {"role": "assistant", "content": "Done.", "reasoning_content": f"The {name} did it."},
        ],
        "tools": [{"type": "function", "function": function}],
    }


def test_json_and_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "d.json").write_text(json.dumps(SAME))
    assert len(list(read_conversations(tmp_path / "d.json"))) == len(SAME)
    pq.write_table(pa.Table.from_pylist([SAME[0], SAME[0]]), tmp_path / "d.parquet")
    rows = list(read_conversations(tmp_path / "d.parquet"))
    assert [r.messages[1].text for r in rows] == ["yo", "yo"]
    assert rows[1].source.endswith("d.parquet:2")


DEEP = '{"a": ' * 200 + "1" + "}" * 200


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (r'{"prompt": "a\ud83d", "completion": "b"}', r"1.prompt: a lone surrogate, \ud83d at character 1"),
        (r'{"prompt": "a", "completion": "b", "note": ["\udc00"]}', "1.note[0]: a lone surrogate"),
        (r'{"prompt": "a", "\ud83d": 1}', "1: a key holds a lone surrogate"),
        ('{"prompt": "a", "completion": "b", "n": 1' + "0" * 5000 + "}", "1: a number of more than 4,300 digits"),
        ('{"prompt": "a", "x": ' + DEEP + "}", "nested more than 100 deep"),
        ("[" * 100_000, "1: nested more than 100 deep"),
    ],
)
def test_a_line_that_nothing_could_write_again_is_named(line: str, said: str) -> None:
    with pytest.raises(DataError) as error:
        parse_line(line.encode(), "d.jsonl:1")
    assert said in str(error.value) and error.value.remedy


def test_pairs_of_surrogates_and_shallow_values_are_read() -> None:
    assert parse_line(rb'{"a": "\ud83d\ude00"}', "d:1") == {"a": "😀"}
    assert parse_line(b'{"a": ' * 90 + b"1" + b"}" * 90, "d:1")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([{"role": "user", "content": "\ud83d"}], r"r.messages[0].content: a lone surrogate, \ud83d"),
        ([{"role": "user", "content": b"hi"}], "r.messages[0].content: it is of type bytes"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}],
            "x: nan",
        ),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {1: 2}}]}], "the key 1"),
        ({"prompt": "a", "completion": "b", "tools": [json.loads(DEEP)]}, "nested more than 100 deep"),
    ],
)
def test_values_that_json_has_not_are_named(row: Any, said: str) -> None:
    with pytest.raises(SchemaError) as error:
        parse_row(row, "r")
    assert said in str(error.value) and len(str(error.value)) < 250
