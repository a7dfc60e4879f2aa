"""Every key of a row is read, refused by name, or counted as ignored; and is the same in every kind of file."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from helpers.outside import each, outside
from helpers.templates import CHATML
from sftflow.api.rows import read
from sftflow.chat import row_keys
from sftflow.chat.data_files import read_conversations
from sftflow.chat.format import ChatFormat
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.data.mixture import build_mixture
from sftflow.foundation.errors import SchemaError
from sftflow.recipe import parse_recipe

ASKED = {"role": "user", "content": "hi"}
REPLIED = {"role": "assistant", "content": "yo"}
CHAT = {"messages": [ASKED, REPLIED]}
BARE = {"prompt": "hi", "completion": "yo"}
ALPACA = {"instruction": "hi", "output": "yo"}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
DIALECTS: list[dict[str, Any]] = [CHAT, BARE, ALPACA, SHAREGPT, {"query": "hi", "response": "yo"}]


def taught(row: Any) -> list[tuple[str, str, int]]:
    return taught_by(parse_row(row, "f:1"))


def taught_by(conversation: Any) -> list[tuple[str, str, int]]:
    return [(m.role, m.text, m.weight) for m in conversation.messages]


def refusal(row: Any) -> str:
    with pytest.raises(SchemaError) as error:
        parse_row(row, "f:1")
    assert error.value.remedy and "\n" not in str(error.value)
    return str(error.value)


# ---- read


@pytest.mark.parametrize("row", DIALECTS)
@pytest.mark.parametrize("key", row_keys.SYSTEM)
def test_a_system_key_is_the_system_message(row: dict[str, Any], key: str) -> None:
    assert taught({**row, key: "Be brief."}) == [("system", "Be brief.", 1), ("user", "hi", 1), ("assistant", "yo", 1)]
    assert taught({**row, key: ""}) == taught({**row, key: None}) == taught(row)


def test_one_system_message_is_enough() -> None:
    own = {"messages": [{"role": "system", "content": [{"type": "text", "text": "A"}]}, *CHAT["messages"]]}
    assert taught({**own, "system": "A", "system_prompt": "A"}) == taught(own)
    assert "f:1.system: the row's own system message is another" in refusal({**own, "system": "B"})
    assert "system and system_prompt differ" in refusal({**CHAT, "system": "A", "system_prompt": "B"})
    assert "f:1.system: it is a list" in refusal({**CHAT, "system": ["A"]})


@pytest.mark.parametrize("keys", [("instruction", "output"), ("query", "response")])
def test_a_history_comes_first(keys: tuple[str, str]) -> None:
    row = {keys[0]: "three", keys[1]: "C", "system": "S", "history": [["one", "A"], ["two", "B"]]}
    said = [
        ("user", "one"),
        ("assistant", "A"),
        ("user", "two"),
        ("assistant", "B"),
        ("user", "three"),
        ("assistant", "C"),
    ]
    assert taught(row) == [("system", "S", 1), *((role, text, 1) for role, text in said)]
    assert taught({**row, "history": []}) == [("system", "S", 1), ("user", "three", 1), ("assistant", "C", 1)]
    assert "f:1.history[1]: it is a list, not a pair" in refusal({**row, "history": [["one", "A"], ["two"]]})
    assert "f:1.history[0][1]: it is null" in refusal({**row, "history": [["one", None]]})
    assert "a history beside messages" in refusal({**CHAT, "history": [["one", "A"]]})


def test_an_input_alone_is_what_is_asked() -> None:
    assert taught({"instruction": "", "input": "hi", "output": "yo"}) == taught(ALPACA)


@pytest.mark.parametrize("key", ["images", "documents", "chosen", "history"])
def test_nothing_but_nulls_is_absent(key: str) -> None:
    for nulls in ([None], [{"title": None, "text": None}, None], [[None], {}]):
        assert taught({**CHAT, key: nulls}) == taught(CHAT)
        if key == "images":
            assert taught([{**m, key: nulls, "tool_calls": nulls} for m in CHAT["messages"]]) == taught(CHAT)
    for there in ([""], [0], [None, "x"], [{"title": None, "text": "x"}]):
        refusal({**CHAT, key: there})


@pytest.mark.parametrize("row", DIALECTS)
def test_tools_are_read_in_every_dialect(row: dict[str, Any]) -> None:
    bell = {"name": "bell", "parameters": {"type": "object", "properties": {}}}
    tools = ({"type": "function", "function": bell},)
    for given_as in (
        {"tools": list(tools)},
        {"tools": json.dumps(tools)},
        {"functions": [bell]},
        {"tools": [json.dumps(tools[0])]},
        {"functions": list(tools)},
        {"tools": [bell], "functions": [bell]},
        {"tools": json.dumps([bell])},
        {"tools": [{"type": "function", **bell}]},
        {"tools": [{"type": None, "function": None, **bell, "parameters": json.dumps(bell["parameters"])}]},
    ):
        assert parse_row({**row, **given_as}, "f:1").tools == tools
    nulls = {"type": None, "function": {"name": None, "parameters": {}}}
    for empty in (None, "", [], "null", "[]", "[null]", [None], [nulls], json.dumps([nulls, None])):
        assert parse_row({**row, "tools": empty}, "f:1").tools == ()
        assert parse_row({**row, "tools": empty, "functions": [bell]}, "f:1").tools == tools
    assert parse_row({**row, "tools": [nulls, bell, None]}, "f:1").tools == tools
    assert "f:1.tools: not a list of objects" in refusal({**row, "tools": [bell, 7]})
    assert "f:1.tools[1].parameters: it is a list" in refusal({**row, "tools": [None, {**bell, "parameters": "[1]"}]})
    unit = {"type": "string", "enum": ["C", None], "default": None}
    (tool,) = parse_row(
        {**row, "tools": [{**bell, "strict": None, "parameters": {"unit": unit, "zone": None}}]}, "f"
    ).tools
    assert tool == {"type": "function", "function": {"name": "bell", "parameters": {"unit": unit}}}
    as_text = {"type": "function", "function": {**bell, "parameters": json.dumps(bell["parameters"])}}
    assert parse_row({**row, "tools": [as_text]}, "f:1").tools == tools
    assert "f:1.tools[0].parameters: it is a list" in refusal({**row, "tools": [{**bell, "parameters": "[1]"}]})
    assert "tools and functions differ" in refusal({**row, "tools": [bell], "functions": [{"name": "gong"}]})
    assert "f:1.tools: a text that is not JSON" in refusal({**row, "tools": "bell"})
    assert "stands twice" in refusal({**row, "tools": '[{"name": "a", "name": "b"}]'})


@pytest.mark.parametrize("key", row_keys.CONVERSATIONS)
def test_messages_in_any_spelling(key: str) -> None:
    for turns in (CHAT["messages"], SHAREGPT["conversations"]):
        assert taught({key: turns}) == taught({key: json.dumps(turns)}) == taught(CHAT)
    assert "a text that is not JSON" in refusal({key: "[hi"})


def test_two_dialects_in_one_row_say_the_same() -> None:
    assert taught({**CHAT, **ALPACA}) == taught(CHAT)
    assert taught({**CHAT, "prompt": None, "completion": None}) == taught({**BARE, "messages": []}) == taught(CHAT)
    assert "different conversations under messages and instruction" in refusal({**CHAT, **ALPACA, "output": "no"})


def test_a_question_is_not_lost_beside_another() -> None:
    asked = {"query": "hi", "response": "yo"}
    for more in ({"instruction": "Shout."}, {"instruction": "Shout.", "input": "sea"}):
        assert "f:1.instruction: instruction and query both ask" in refusal({**asked, **more})
    assert "f:1.query: query and instruction both ask" in refusal({**ALPACA, "query": "hey"})
    assert taught({**asked, "instruction": "", "input": "sea"})[0] == ("user", "hi\n\nsea", 1)
    both = {"instruction": "hi", "input": "sea", "output": "yo", "query": "hi\n\nsea", "response": "yo"}
    assert taught(both) == [("user", "hi\n\nsea", 1), ("assistant", "yo", 1)]
    assert parse_row({**CHAT, "instruction": "Shout.", "query": "hey"}, "f:1").ignored == ("instruction", "query")


def test_nothing_of_a_prompt_is_taught() -> None:
    prompt = [{"role": "system", "content": "S"}, ASKED, REPLIED, {"role": "user", "content": "and?"}]
    for completion in ("yes", [{"role": "assistant", "content": "yes"}]):
        found = taught({"prompt": prompt, "completion": completion})
        assert found == [
            ("system", "S", 1),
            ("user", "hi", 1),
            ("assistant", "yo", None),
            ("user", "and?", 1),
            ("assistant", "yes", 1),
        ]
    more = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "M"}]
    assert [weight for *_, weight in taught({"prompt": [ASKED, REPLIED], "completion": more})] == [1, None, 1, 1]
    assert "ends with a reply" in refusal({"prompt": [ASKED, REPLIED], "completion": "yes"})
    weighed = [ASKED, {**REPLIED, "weight": 1}, ASKED]
    assert "f:1.prompt[1].weight: no message of a prompt is taught" in refusal({"prompt": weighed, "completion": "yes"})


# ---- what is not taught


@pytest.mark.parametrize("flag", row_keys.FLAGS)
@pytest.mark.parametrize("kind", [int, bool, float])
def test_a_turn_marked_so_is_not_taught(flag: str, kind: Any) -> None:
    value, other = kind(flag in row_keys.NOT_TAUGHT), kind(flag not in row_keys.NOT_TAUGHT)
    call = {"from": "function_call", "value": '{"name": "bell", "arguments": {}}', flag: value}
    turns = [*SHAREGPT["conversations"], {"from": "human", "value": "ring"}, call]
    assert [weight for *_, weight in taught({"conversations": turns})] == [1, 1, 1, 0]
    assert [weight for *_, weight in taught([ASKED, {**REPLIED, flag: value}])] == [1, 0]
    assert [weight for *_, weight in taught([{**ASKED, flag: value}, {**REPLIED, flag: other}])] == [0, 1]
    if flag in row_keys.NOT_TAUGHT:  # tables have it in every message
        assert taught([{**ASKED, flag: other}, REPLIED]) == taught(CHAT)
        prompt = [ASKED, {**REPLIED, flag: other}, ASKED]
        assert [weight for *_, weight in taught({"prompt": prompt, "completion": "yes"})] == [1, None, 1, 1]
    else:
        assert "only an assistant message" in refusal([{**ASKED, flag: other}, REPLIED])
    assert f"{flag} is 'no'" in refusal([ASKED, {**REPLIED, flag: "no"}])


def test_flags_may_not_contradict_each_other() -> None:
    assert [weight for *_, weight in taught([ASKED, {**REPLIED, "loss": False, "train": False}])] == [1, 0]
    assert "loss and weight" in refusal([ASKED, {**REPLIED, "loss": False, "weight": 1}]).replace(
        "weight and loss", "loss and weight"
    )


@pytest.mark.parametrize("flag", row_keys.FLAGS)
def test_a_reply_may_count_in_part(flag: str) -> None:
    said = [ASKED, {**REPLIED, flag: 0.25}]
    if flag not in row_keys.WEIGHTS:
        assert f"messages[1].{flag}: {flag} is 0.25; use 0 or 1" in refusal(said)
        return
    assert [weight for *_, weight in taught(said)] == [1, 0.25]
    assert taught(parse_row(said, "f:1").to_row()) == taught(said)
    assert "only an assistant message" in refusal([{**ASKED, flag: 0.25}, REPLIED])
    for wrong in (1.5, -0.25, "0.25", 7):
        said_wrong = f"messages[1].{flag}: {flag} is {wrong!r}; use a number from 0 to 1"
        assert said_wrong in refusal([ASKED, {**REPLIED, flag: wrong}])
    assert [w for *_, w in taught([ASKED, {**REPLIED, flag: 0.25, "train": True, "masked": False}])] == [1, 0.25]
    for other in ({"train": False}, {"ignore": True}, {"loss_weight": 0.5, "weight": 0.25}):
        assert "contradict" in refusal([ASKED, {**REPLIED, flag: 0.25, **other}])


def test_a_label_of_a_turn_marks_it_where_it_is_no_class() -> None:
    asked, replied = SHAREGPT["conversations"]
    assert [weight for *_, weight in taught([asked, {**replied, "label": False}])] == [1, 0]
    turns = [{**asked, "label": False}, {**replied, "label": True}]
    assert [weight for *_, weight in taught(turns)] == [0, 1]
    assert "label" in refusal([asked, {**replied, "label": False, "weight": 1}])
    assert parse_row([asked, {**replied, "label": 0}], "f:1").ignored == ("messages[].label",)


@pytest.mark.parametrize("row", DIALECTS)
@pytest.mark.parametrize("flag", row_keys.ROW_FLAGS)
def test_a_row_that_is_marked_so_teaches_nothing(row: dict[str, Any], flag: str) -> None:
    value = flag in row_keys.NOT_TAUGHT
    for no in (value, int(value)):
        found = parse_row({**row, flag: no}, "f:1")
        assert (found.supervised, found.ignored) == ([], ())
    assert taught({**row, flag: float(not value)}) == taught(row)
    if flag in row_keys.WEIGHTS:
        half = parse_row({**row, flag: 0.5}, "f:1")
        assert (half.weight, half.ignored) == (0.5, ()) and taught_by(half) == taught(row)
        assert parse_row(half.to_row(), "f:1").weight == 0.5
    else:
        assert f"f:1.{flag}: {flag} is 0.5; use 0 or 1" in refusal({**row, flag: 0.5})
    for wrong in (2, -0.5, "0.5", [0.5, 1], {"a": 1}):
        assert f"f:1.{flag}: {flag} is " in refusal({**row, flag: wrong})
    assert f"f:1.{flag}: nan is not a number of JSON" in refusal({**row, flag: float("nan")})
    assert "contradict" in refusal({**row, flag: value, "loss_weight": None, "weight": 1, "loss": 0})


@pytest.mark.parametrize("row", DIALECTS)
@pytest.mark.parametrize("key", row_keys.PREFERRED)
def test_a_reply_that_is_not_wanted_is_refused(row: dict[str, Any], key: str) -> None:
    assert f"f:1.{key}: {key} is false" in refusal({**row, key: False})
    assert parse_row({**row, key: True}, "f:1").ignored == ()
    for no in (0, 0.0, "false", "False"):
        if key != "label" or row is BARE:
            assert f"f:1.{key}: {key} is false" in refusal({**row, key: no})
        else:
            assert parse_row({**row, key: no}, "f:1").ignored == ("label",)  # a class
    assert parse_row({**BARE, key: 1}, "f:1").ignored == ()


# ---- refused, ignored


@pytest.mark.parametrize("row", DIALECTS)
def test_keys_that_change_the_meaning_are_refused_by_name(row: dict[str, Any]) -> None:
    relatives = {"rejected_output", "output_rejected", "image_url", "image_path", "image_file", "media"}
    for key in {*row_keys.REFUSED, *relatives}:
        assert refusal({**row, key: ["x"]}).startswith(f"f:1.{key}: ")
        for empty in (None, "", [], {}, {"a": None, "b": ""}):
            assert taught({**row, key: empty}) == taught(row)


def test_preference_data_is_named_also_where_the_dialect_is_not_known() -> None:
    assert "preference data" in refusal({"prompt": "hi", "chosen": "yo", "rejected": "no"})
    assert "preference data" in refusal({"chosen": CHAT["messages"], "rejected": [ASKED]})
    assert "preference data" in refusal(
        {"input": CHAT, "preferred_output": [REPLIED], "non_preferred_output": [REPLIED]}
    )
    both = {**CHAT, "chosen": CHAT["messages"], "rejected": [ASKED, {**REPLIED, "content": "no"}]}
    assert taught(both) == taught(CHAT)
    assert parse_row(both, "f:1").ignored == ("chosen", "rejected")


def test_keys_of_messages_are_refused_by_name() -> None:
    for key in {*row_keys.MESSAGE_REFUSED, "image_url", "image_path", "media"}:
        for turns in ([ASKED, {**REPLIED, key: ["x"]}], [ASKED, {"from": "gpt", "value": "yo", key: ["x"]}]):
            assert refusal(turns).startswith(f"f:1.messages[1].{key}: ")
    gone = {
        "refusal": None,
        "audio": "",
        "function_call": {"name": None, "arguments": None},
        "tool_calls": [],
        "annotations": [],
        "weight": None,
    }
    assert taught([{**ASKED, "tool_calls": None, "reasoning_content": None}, {**REPLIED, **gone}]) == taught(CHAT)
    part = {"type": "text", "text": "hi", "image_url": None}
    assert taught([{"role": "user", "content": [part]}, REPLIED]) == taught(CHAT)


def test_reasoning_has_one_name() -> None:
    for key in ("reasoning_content", "thinking", "reasoning"):
        (_, message) = parse_row([{**ASKED, "thinking": ""}, {**REPLIED, key: "hm"}], "f:1").messages
        assert message.reasoning_content == "hm"
        for empty in {"reasoning_content", "thinking", "reasoning"} - {key}:
            for no in ("", None):
                (_, message) = parse_row([ASKED, {**REPLIED, key: "hm", empty: no}], "f:1").messages
                assert message.reasoning_content == "hm"
    assert "differ" in refusal([ASKED, {**REPLIED, "thinking": "hm", "reasoning_content": "so"}])


def test_a_turn_with_both_names_of_a_key_says_the_same_in_both() -> None:
    asked, replied = SHAREGPT["conversations"]
    both = [{**asked, **ASKED}, {**replied, "role": "assistant", "content": None}]
    assert (
        taught(both)
        == taught([{**asked, "role": "human", "content": ""}, {**REPLIED, "from": "model"}])
        == taught(CHAT)
    )
    assert taught([*both, {"from": "observation", "role": "function", "value": "9"}])[2] == ("tool", "9", 1)
    assert "from and role differ" in refusal([{**asked, "role": "system"}, replied])
    assert "value and content differ" in refusal([{**asked, "value": "human", "content": "user"}, replied])


def test_other_keys_are_counted(tmp_path: Path, renderer: Renderer) -> None:
    turn = {"from": "gpt", "value": "yo", "id": 7, "markdown": None}
    rows = [{**CHAT, "topic": "sea", "empty": []}, {**BARE, "topic": "sky", "id": 1}]
    rows.append({"conversations": [SHAREGPT["conversations"][0], turn]})
    assert parse_row(rows[0], "f:1").meta == {"topic": "sea", "empty": []}
    for bare in ([ASKED, turn], {"messages": [ASKED, turn]}):
        assert parse_row(bare, "f:1").ignored == ("messages[].id",)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe({"mixture": [{"source": str(tmp_path / "d.jsonl")}], "validation": 0}, "recipe")
    mixture = build_mixture(recipe, renderer)
    assert mixture.ledger["sources"][0]["ignored"] == {"topic": 2, "conversations[].id": 1, "id": 1}
    assert mixture.ignored() == ["ignored: topic (2 rows), conversations[].id (1 row), id (1 row) in d"]


# ---- calls


def call_of(**call: Any) -> dict[str, Any]:
    """The function of the one call that a message makes."""
    row = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return dict(parse_row(row, "f:1").messages[1].tool_calls[0]["function"])


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "input"])
def test_arguments_in_any_spelling_are_kept_to_the_letter(key: str) -> None:
    for given_as in ('{"b":1.0,  "a": 12345678901234567890}', {"b": 1.0, "a": None}):
        assert call_of(function={"name": "f", key: given_as}) == {"name": "f", "arguments": given_as}
        for kind in ("tool_use", "tool_call"):
            assert call_of(name="f", id="c", type=kind, **{key: given_as}) == {"name": "f", "arguments": given_as}
    for nothing in ("", "  ", None, {}):
        assert call_of(function={"name": "f", key: nothing}) == {"name": "f", "arguments": {}}
    assert call_of(function={"name": "f"}) == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ('{"a": 1,}', "a text that is not JSON"),
        ("{'a': 1}", "a text that is not JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "arguments: a number of more than 4,300 digits"),
        ("[1, 2]", "arguments are a list"),
        ([1, 2], "arguments are a list"),
        (7, "arguments are a number"),
        ("null", "arguments are null"),
        ('"{\\"a\\": 1}"', "JSON text of a JSON text"),
        ('{"a": NaN}', "nan is not a number of JSON"),
        ('{"a": [-Infinity]}', "-inf is not a number of JSON"),
        ('{"a": 1e400}', "inf is not a number of JSON"),
        ({"a": float("nan")}, "nan is not a number of JSON"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice"),
        ('{"a": "\\ud800"}', "a lone surrogate"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "nested"),
    ],
)
def test_arguments_that_are_no_object_are_refused(arguments: Any, fact: str) -> None:
    row = [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    said = refusal(row)
    assert said.startswith("f:1.messages[1].tool_calls[0].") or said.startswith("f:1.messages[1].tool_calls[0]:")
    assert fact in said


@pytest.mark.parametrize(
    ("call", "fact"),
    [
        ({"function": {"name": "f", "arguments": {"a": 1}, "parameters": {"a": 1}}}, "arguments and parameters in one"),
        ({"function": {"name": "f", "arguments": {}, "strictly": 1}}, "unknown key 'strictly' in a call"),
        ({"function": {"name": "f"}, "arguments": {"a": 1}}, "unknown key 'arguments' in a call"),
        ({"type": "custom", "custom": {"name": "f", "input": "x"}}, "type 'custom' is not known"),
        ({"function": {"arguments": {"a": 1}}}, "no function name"),
    ],
)
def test_calls_that_say_more_than_is_read_are_refused(call: dict[str, Any], fact: str) -> None:
    assert fact in refusal([ASKED, {"role": "assistant", "tool_calls": [call]}])


def test_calls_of_every_dialect_are_the_same_calls() -> None:
    one, two = {"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}
    made = [{"type": "function", "function": call} for call in (one, two)]
    spelled: list[list[dict[str, Any]]] = [
        [{"role": "assistant", "content": None, "tool_calls": made}],
        [{"from": "function_call", "value": json.dumps([{"name": "f", "parameters": {"x": 1}}, two])}],
        [{"from": "function_call", "value": json.dumps(made)}],
        [{"from": "function_call", "value": [one, two]}],
        [{"role": "tool_call", "content": json.dumps(call)} for call in (one, two)],
    ]
    for turns in spelled:
        (message,) = parse_row([ASKED, *turns], "f:1").messages[1:]
        assert (list(message.tool_calls), message.text) == (made, "")
    old = [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}]
    old.append({"role": "function", "name": "f", "content": "ok"})
    called, answered = parse_row([ASKED, *old], "f:1").messages[1:]
    assert called.tool_calls[0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert (answered.role, answered.name, answered.text) == ("tool", "f", "ok")
    thought = {"from": "function_call", "value": "<think>\nhm\n</think>\n" + json.dumps(one)}
    (message,) = parse_row([ASKED, thought], "f:1").messages[1:]
    assert (message.text, list(message.tool_calls)) == ("<think>\nhm\n</think>", made[:1])
    for value, fact in (
        ("ring!", "not JSON"),
        ("[]", "no call"),
        ("3", "not a call or a list of calls"),
        ("[1]", "not a call or a list"),
    ):
        assert fact in refusal([ASKED, {"from": "function_call", "value": value}])


def test_reasoning_and_calls_may_be_parts() -> None:
    def part(kind: str, value: str) -> dict[str, str]:
        return {"type": kind, "value": value}

    call = part("tool_call", '{"name": "f", "arguments": {"x": 1}}')
    for said, text in (([part("text", "a"), part("text", "b")], "ab"), ([], "")):
        turn = {"role": "assistant", "content": [part("reasoning", "hm"), *said, call, call], "loss_weight": 0.0}
        (message,) = parse_row([ASKED, turn], "f:1").messages[1:]
        assert (message.reasoning_content, message.text, len(message.tool_calls), message.weight) == ("hm", text, 2, 0)
        assert message.tool_calls[0]["function"] == {"name": "f", "arguments": {"x": 1}}
    for parts in ([call, part("text", "a")], [part("text", "a"), part("reasoning", "hm")]):
        assert "in several places" in refusal([ASKED, {"role": "assistant", "content": parts}])
    assert "only an assistant message has tool_calls" in refusal([{"role": "user", "content": [call]}])


def test_a_tool_call_is_made_by_the_message_in_front_of_it() -> None:
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    (message,) = parse_row([ASKED, REPLIED, call, call], "f:1").messages[1:]
    assert (message.text, len(message.tool_calls), message.weight) == ("yo", 2, 1)
    said, called = parse_row([ASKED, REPLIED, {**call, "loss": False}], "f:1").messages[1:]
    assert (said.weight, called.weight) == (1, 0)
    assert "a message is a number" in refusal([ASKED, call, 7])


@pytest.mark.parametrize(
    ("file", "rows", "calls", "thoughts"),
    each([("glaive_toolcall_en_demo.json", 300, 211, 0), ("reason_tool_use_demo_50.jsonl", 50, 68, 112)]),
)
def test_public_rows_with_calls_are_read(file: str, rows: int, calls: int, thoughts: int) -> None:
    found = list(read_conversations(outside("tools", file)))
    messages = [m for conversation in found for m in conversation.messages]
    assert (len(found), sum(len(m.tool_calls) for m in messages)) == (rows, calls)
    assert sum(m.reasoning_content is not None for m in messages) == thoughts
    assert not any(conversation.ignored for conversation in found)


# ---- one row, whatever file it is in

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
ARGUMENTS = {"a": st.text(max_size=4), "b": st.integers(-9, 9), "c": st.booleans(), "d": st.just({"e": 1.5})}
"""of calls: a column of Arrow has one type"""


def full_row(**made: Any) -> dict[str, Any]:
    """A row with all keys that the rows of a table have together, in the order of Arrow's structs."""
    arguments = made.get("arguments", {"a": "", "b": 1, "c": True, "d": {"e": 1.5}})
    properties = {name: {"type": "string", "enum": ["x"]} for name in arguments}
    tool = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
    asked, answered, replied = made.get("words", ("u", "t", "r"))
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": answered, "tool_call_id": "call00001"},
            {"role": "assistant", "content": replied, "weight": 1},
        ],
        "tools": [{"type": "function", "function": tool}],
        "system": "S",
        **BARE,
    }


@st.composite
def tables(draw: Any) -> list[dict[str, Any]]:
    """Rows each of which lacks some of the keys."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        names = [name for name in ARGUMENTS if draw(st.booleans())] or ["a"]
        arguments = {name: draw(ARGUMENTS[name]) for name in names}
        row = full_row(arguments=arguments, words=draw(st.tuples(WORDS, WORDS, WORDS)))
        bare = draw(st.integers(0, 3)) == 0
        for key in (
            ("messages", "tools") if bare else ("prompt", "completion", *draw(st.sampled_from([(), ("tools",)])))
        ):
            del row[key]
        for inner, key in ((row, "system"), *((message, "weight") for message in row.get("messages", ()))):
            if key in inner and draw(st.booleans()):
                del inner[key]
        for schema in row["tools"][0]["function"]["parameters"]["properties"].values() if "tools" in row else ():
            if draw(st.booleans()):
                del schema["enum"]
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def calling(tokenizer_dir: Path) -> Renderer:
    """A format that writes tools, calls and system messages."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return Renderer(tokenizer, ChatFormat(name="own", template=CHATML))


def test_rows_of_the_hub_lack_what_others_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_called_with(city="Oslo"), {**BARE, "system": "S"}, _called_with(zone="CET")]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    found = [c.to_row() for c in read_conversations("hub:set")]
    assert found == [parse_row(row, "f:1").to_row() for row in rows]


def _called_with(**arguments: str) -> dict[str, Any]:
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call], "weight": 1}]}


def test_what_json_has_not_is_named_where_it_is_read(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    now = datetime.datetime(2020, 1, 1)
    columns = {"prompt": ["hi"], "completion": ["yo"], "at": [now], "price": [Decimal("1.5")], "raw": [b"x"]}
    table = pa.table(
        {**columns, "kind": pa.array(["a"]).dictionary_encode(), "prompt": pa.array(["hi"], pa.large_string())}
    )
    pq.write_table(table, tmp_path / "d.parquet")
    for rows in (read(tmp_path / "d.parquet"), read(read(datasets.Dataset(table)).path)):
        (found,) = rows.conversations()
        assert taught_by(found) == taught(CHAT) and found.ignored == ("at", "kind", "price", "raw")
    for column in ("at", "price", "raw"):
        pq.write_table(pa.table({**columns, "completion": columns[column]}), tmp_path / "d.parquet")
        asked, replied = SHAREGPT["conversations"]
        turns = {"conversations": [{**asked, "seen": {"at": columns[column][0]}}, replied]}
        pq.write_table(pa.Table.from_pylist([turns]), tmp_path / "turns.parquet")
        (found,) = read(tmp_path / "turns.parquet").conversations()
        assert taught_by(found) == taught(CHAT) and found.ignored == ("conversations[].seen",)
        assert "unknown key 'seen'" in refusal([{**ASKED, "seen": columns[column][0]}, REPLIED])
        assert "JSON has not" in refusal([asked, {**replied, "thinking": columns[column][0]}])
        (refused,) = read(tmp_path / "d.parquet").conversations()
        assert isinstance(refused, SchemaError) and "d.parquet:1.completion: it is a value of type" in str(refused)
        call = {"function": {"name": "f", "arguments": {"x": columns[column][0]}}}
        assert "JSON has not" in refusal([ASKED, {"role": "assistant", "tool_calls": [call]}])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=tables())
def test_a_row_is_the_same_in_jsonl_parquet_and_arrow(
    tmp_path: Path, calling: Renderer, rows: list[dict[str, Any]]
) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = pa.Table.from_pylist(rows, schema=pa.Table.from_pylist([full_row()]).schema)
    pq.write_table(table, tmp_path / "d.parquet")
    for name, opened in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with opened(tmp_path / name, table.schema) as file:
            file.write_table(table)
    files = [tmp_path / name for name in ("d.jsonl", "d.parquet", "file.arrow", "stream.arrow")]
    found = []
    for source in (*files, table, datasets.Dataset(table)):
        rendered = [r for c in read(source).conversations() for r in calling.render_rows(c)]
        found.append([(r.text, r.ids.tolist(), r.mask.tolist()) for r in rendered])
    assert all(each == found[0] for each in found[1:])


def test_the_page_names_every_key() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rows.md").read_text(encoding="utf-8")
    named = {*row_keys.READ, *row_keys.REFUSED, *row_keys.MESSAGE_KEYS, *row_keys.SAME_AS, *row_keys.FLAGS}
    named |= {"train_detail", "training_detail", "refusal"}
    assert [key for key in sorted(named) if f"`{key}`" not in page] == []
