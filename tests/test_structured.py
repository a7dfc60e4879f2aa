"""Replies held to a grammar: JSON under a schema, and tool calls, beside an outside validator."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from helpers.outside import Tokenizers
from helpers.schemas import SCHEMAS, record, several, words
from helpers.serving import learn_by_heart, local, refusal
from helpers.templates import CHATML, chat
from sftflow.chat.token_rows import token_bytes
from sftflow.checkpoint import Assistant, load_assistant
from sftflow.foundation.errors import GrammarError
from sftflow.generation.constraint import Constraint
from sftflow.generation.request import GenerationRequest
from sftflow.pretraining.pretrain import BaseSpec, build_model
from sftflow.serving.model_entry import ServedModel
from sftflow.serving.schemas import ChatBody
from sftflow.serving.structured import grammar_for, json_rule

CHAT = "/v1/chat/completions"
CITY = record(city=words(20), people={"type": "integer", "minimum": 0}, sights=several(words(20), 0, 3))
ANSWER = {"city": "Köln", "people": 42, "sights": ['"Dom"']}
STYLES = {
    "compact": json.dumps(ANSWER, separators=(",", ":"), ensure_ascii=False),
    "on one line": json.dumps(ANSWER),
    "indented by four": json.dumps(ANSWER, indent=4, ensure_ascii=False),
    "indented by tabs": json.dumps(ANSWER, indent="\t", ensure_ascii=False).replace("\n", "\r\n"),
}

THINKS = CHATML.replace(
    "(m.content or '')",
    "('<think>\n' + m.reasoning_content + '\n</think>\n\n' if m.reasoning_content else '') + (m.content or '')",
)


@pytest.fixture(scope="module")
def shipped() -> Assistant:
    return load_assistant("builtin:tiny")


@pytest.fixture(scope="module")
def by_heart(known_tokenizers: Tokenizers, tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """A tiny model with Qwen3's kind of tokenizer and more embeddings than that has words. It has learnt ANSWER in each
    of STYLES, and once behind a thought."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("heart") / "checkpoint"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(known_tokenizers["own_qwen3"])
    tokenizer.chat_template = THINKS
    build_model(BaseSpec(params="0.1M", context=512), len(tokenizer) + 40, None).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    assistant = load_assistant(str(directory))
    rows = [{"messages": [*asked(style), {"role": "assistant", "content": text}]} for style, text in STYLES.items()]
    thought = {"role": "assistant", "reasoning_content": "hm", "content": STYLES["compact"]}
    learn_by_heart(assistant, [*rows, {"messages": [*asked("think"), thought]}])
    return assistant


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def schema(wanted: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": wanted, "strict": True}}


def create(client: TestClient, text: str = "go", **fields: Any) -> dict[str, Any]:
    response = client.post(CHAT, json={"model": "tiny", "messages": asked(text), "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


@pytest.fixture(scope="module")
def client(by_heart: Assistant) -> TestClient:
    return local(by_heart)


def validate(text: str, wanted: dict[str, Any]) -> None:
    oracle = pytest.importorskip("jsonschema", reason="of the dev extra").Draft202012Validator
    oracle(wanted, format_checker=oracle.FORMAT_CHECKER).validate(json.loads(text))


def held(assistant: Assistant, wanted: dict[str, Any], **fields: Any) -> GenerationRequest:
    grammar = assistant.engine.grammars.compile(f"start: {json_rule(wanted)}")
    return assistant.request(chat("Give me JSON."), grammar=grammar, **fields)


@pytest.mark.parametrize("style", STYLES)
def test_greedy_text_is_the_unconstrained_one_where_the_schema_takes_it(client: TestClient, style: str) -> None:
    for wanted in (CITY, {"type": "object"}, {}):
        choice = create(client, style, response_format=schema(wanted), max_tokens=200)
        assert (choice["message"]["content"], choice["finish_reason"]) == (STYLES[style], "stop")


def test_thoughts_come_first_where_the_model_begins_with_some(client: TestClient) -> None:
    for wanted in (CITY, {"type": "object"}):
        message = create(client, "think", response_format=schema(wanted), max_tokens=200)["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", STYLES["compact"])
    assert create(client, "think", structured_outputs={"choice": ["no"]}, max_tokens=50)["message"]["content"] == "no"


def test_thoughts_that_the_prompt_has_opened_are_ended(by_heart: Assistant) -> None:
    model = ServedModel("tiny", by_heart)
    model.thread.close()
    body = ChatBody(model="tiny", messages=asked("go"), response_format={"type": "json_object"})
    for prompt, begun, text in (
        ("<think>\n", "<think>", 'so {"\n</think>\n\n{}'),
        ("<think>\n\n</think>\n\n", "", "{}"),
        ("", "", "{}"),
    ):
        grammar = grammar_for(model, body, prompt, begun)
        assert grammar is not None
        constraint = Constraint(grammar, [(0,)])
        for token in by_heart.renderer.encode_plain(text):
            allowed = constraint.allowed()
            assert allowed[token] and not allowed[0]
            constraint.accept(token)
        assert constraint.allowed()[0]


def test_a_token_is_kept_from_a_reply_only_where_the_schema_forbids_it(shipped: Assistant) -> None:
    """At every step the model's own favourite comes wherever the text so far and its bytes begin a text of the schema,
    which a matcher over single bytes is asked."""
    from llguidance import LLMatcher, LLTokenizer

    wanted = SCHEMAS["review"]
    reply = shipped.engine.generate([held(shipped, wanted, max_tokens=120, logprobs=1)])[0]
    assert reply.finish_reason == "stop"
    matcher = LLMatcher(LLTokenizer("byte"), f"start: {json_rule(wanted)}")
    table = token_bytes(shipped.tokenizer, range(len(shipped.tokenizer)))
    followed = 0
    for token, told in zip(reply.ids[:-1], reply.logprobs, strict=False):
        favourite = told.top[0][0]
        text = list(table[favourite])
        fits = favourite not in shipped.reply_decoder.control and matcher.validate_tokens(text) == len(text)
        assert (token == favourite) == fits
        followed += fits
        assert matcher.consume_tokens(list(table[token]))
    assert 10 < followed < len(reply.ids) - 10 and matcher.is_accepting()


def test_neighbours_and_the_way_of_decoding_change_nothing(by_heart: Assistant) -> None:
    engine = by_heart.engine
    requests = [by_heart.request(chat(text), max_tokens=40) for text in ("on one line", "else", "compact")]
    drawn = {"temperature": 1.0, "max_tokens": 60, "repetition_penalty": 1.2, "presence_penalty": 0.5}
    some = [held(by_heart, SCHEMAS[name], seed=7, **drawn) for name in ("nested", "review")]
    mixed = [requests[0], some[0], requests[1], some[1], requests[2]]
    alone = [engine.generate([request])[0].ids for request in mixed]
    assert [reply.ids for reply in engine.generate(mixed)] == alone
    for mode in ("padded", "single", "whole"):
        engine._modes = {True: mode, False: mode}
        try:
            assert [reply.ids for reply in engine.generate(mixed)] == alone, mode
        finally:
            engine._modes = {}


@pytest.mark.parametrize("name", ["own_llama2", "own_llama3_1"])
def test_other_tokenizers(known_tokenizers: Tokenizers, tmp_path: Path, name: str) -> None:
    """Bytes without a character of their own, a space in front of every text, an embedding larger than the words."""
    from transformers import AutoTokenizer

    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(known_tokenizers[name])
    build_model(BaseSpec(params="0.1M", context=256), len(tokenizer) + 9, tokenizer.bos_token_id).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    assistant = load_assistant(str(tmp_path))
    for wanted in (SCHEMAS["unicode keys"], SCHEMAS["enum of kinds"], record(emoji={"const": "é🙂"})):
        (reply,) = assistant.engine.generate([held(assistant, wanted, max_tokens=150, temperature=1.5, seed=2)])
        assert reply.finish_reason == "stop"
        validate(reply.text, wanted)


def test_control_tokens_are_no_text_of_a_schema(by_heart: Assistant) -> None:
    text = "<|im_end|><|im_start|>user <|endoftext|><think>"
    (reply,) = by_heart.engine.generate([held(by_heart, {"const": text}, max_tokens=100)])
    assert json.loads(reply.text) == text
    assert reply.ids[-1] in by_heart.reply_decoder.stop
    assert not by_heart.reply_decoder.control.intersection(reply.ids[:-1])


def test_the_end_comes_exactly_where_the_grammar_may_end(shipped: Assistant) -> None:
    ends = [(4099, 7), (0,)]
    grammar = shipped.engine.grammars.compile('start: "a" "b"?')
    (a,), (b,) = shipped.renderer.encode_plain("a"), shipped.renderer.encode_plain("b")
    constraint = Constraint(grammar, ends)
    allowed = constraint.allowed()
    assert allowed[a] and not allowed[[0, 7, 4099]].any()
    constraint.accept(a)
    allowed = constraint.allowed()
    assert allowed[[b, 0, 4099]].all() and allowed.sum() == 3
    constraint.accept(4099)
    assert constraint.allowed().nonzero().flatten().tolist() == [7]


def test_a_reply_without_an_end_of_turn_ends_with_its_grammar(shipped: Assistant) -> None:
    (reply,) = shipped.engine.generate([held(shipped, {"const": [1, "x"]}, stop_ids=frozenset(), max_tokens=50)])
    assert (json.loads(reply.text), reply.finish_reason, reply.stopped_by) == ([1, "x"], "stop", None)


def test_a_reply_that_can_neither_go_on_nor_end_is_an_error_of_its_own(shipped: Assistant) -> None:
    endless = {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}}, "$ref": "#/$defs/a"}
    (reply,) = shipped.engine.generate([held(shipped, endless, max_tokens=20)])
    assert reply.finish_reason == "length"
    grammar = shipped.engine.grammars.compile('start: "a" <[4096]>')  # a control token that is a stop id
    request = shipped.request(chat("go"), grammar=grammar, stop_ids=frozenset({4096}), max_tokens=9)
    with pytest.raises(GrammarError, match="no token of this model can follow"):
        shipped.engine.generate([request])


def test_long_texts_and_what_one_reply_has_used_up(shipped: Assistant) -> None:
    grammars, encode = shipped.engine.grammars, shipped.renderer.encode_plain

    def follow(wanted: dict[str, Any], text: str) -> None:
        constraint = Constraint(grammars.compile(f"start: {json_rule(wanted)}"), [(0,)])
        for token in encode(text):
            assert constraint.allowed()[token]
            constraint.accept(token)

    prose = " ".join(f"word {n}" for n in range(500))
    follow({"type": "string", "maxLength": 5000}, json.dumps(prose))
    costly = {"type": "string", "pattern": ".*a.{30}b.*"}
    draw = random.Random(0)
    with pytest.raises(GrammarError, match="too many states"):
        follow(costly, '"' + "".join(draw.choice("ab ") for _ in range(60_000)))
    follow(costly, '"ab ab')


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"not": {"type": "string"}}, 'no grammar holds "not"; leave it out'),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "minimum"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"$ref": "https://example.com/s.json"}, "example.com"),
        ({"enum": ["x" * 1000] * 70}, "65536"),
        ({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(1, 12)]}, "regex"),
        ({"type": "strin"}, "strin"),
        ({"type": "integer", "minimum": 10**30}, "a bound of the integer is too large"),
        ({"enum": [{"a": i, "b": [i]} for i in range(2500)]}, "2000"),  # known when the reply has begun
        ({"properties": {"a": {"$ref": "#/$defs/none"}}, "required": ["a"]}, "none"),
        # One key may be written twice, and be counted twice.
        ({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2}, "minProperties 2"),
        ({"items": {"patternProperties": {"^[ab]$": {}}, "additionalProperties": False, "minProperties": 2}}, "min"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_held_is_refused_with_its_reason(client: TestClient, wanted: Any, says: str) -> None:
    body = {"model": "tiny", "messages": asked("go"), "response_format": schema(wanted)}
    began = time.perf_counter()
    error = refusal(client.post(CHAT, json=body), 400, "response_format", "invalid_schema")
    assert says in error["message"] and time.perf_counter() - began < 2


@pytest.mark.parametrize("wanted", [{"type": "number"}, {}, {"items": {"type": "number"}}])
def test_an_exponent_has_two_digits_at_most(shipped: Assistant, wanted: dict[str, Any]) -> None:
    """A number that no float holds is Infinity to a reader; hexadecimal digits in quotes are none."""
    names = token_bytes(shipped.tokenizer, range(len(shipped.tokenizer)))

    def may_follow(text: str) -> set[bytes]:
        grammar = shipped.engine.grammars.compile(f"start: {json_rule(wanted)}")
        constraint = Constraint(grammar, [(0,)])
        for token in shipped.tokenizer.encode(text, add_special_tokens=False):
            assert constraint.allowed()[token], text
            constraint.accept(token)
        return {names[i] for i in constraint.allowed().nonzero().flatten().tolist()}

    start = "[" if "items" in wanted else ""
    assert {b"5"} <= may_follow(start + "1.5e3") & may_follow(start + "1E-3") & may_follow(start + "12345")
    for text in ("1e35", "1.5E-35", "2e+35"):
        assert not {t for t in may_follow(start + text) if t[:1].isdigit()}
    if wanted == {}:
        assert b"5" in may_follow('"1e35')


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('"7e12345a"', json_rule({"enum": ["7e12345a"]})),
        ('{"1e345": 1}', json_rule({"properties": {"1e345": {"const": 1}}, "required": ["1e345"]})),
        ('"12e34567"', json_rule({"type": "string", "pattern": r"^\d+e\d{5}$"})),
        ("7e12345", '"7e12345" | "no"'),
        ("7e12345", "/[0-9]e[0-9]{5}/"),
        ("7e12345", '"7e12" | "7e12345"'),
    ],
)
def test_a_given_text_may_look_like_a_large_number(shipped: Assistant, text: str, rule: str) -> None:
    constraint = Constraint(shipped.engine.grammars.compile(f"start: {rule}"), [(0,)])
    for token in shipped.tokenizer.encode(text, add_special_tokens=False):
        assert constraint.allowed()[token]
        constraint.accept(token)
    assert constraint.allowed()[0]


def test_a_schema_beside_json_object_is_heard(client: TestClient) -> None:
    for fields in ({"type": "json_object", "schema": CITY}, schema(CITY)):
        validate(create(client, response_format=fields, max_tokens=200)["message"]["content"], CITY)
    wrong = {"model": "tiny", "messages": asked("go"), "response_format": {"type": "json_object", "schema": 5}}
    refusal(client.post(CHAT, json=wrong), 400, "response_format")


def test_a_schema_deeper_than_any_parser_is_refused(client: TestClient) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    refusal(client.post(CHAT, json={"model": "tiny", "messages": asked("go"), "response_format": schema(deep)}), 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": schema([])}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly_is_refused_by_name(client: TestClient, fields: Any, param: str) -> None:
    refusal(client.post(CHAT, json={"model": "tiny", "messages": asked("go"), **fields}), 400, param)


def test_choices_and_regular_expressions(client: TestClient) -> None:
    for outputs, pattern in (
        ({"choice": ["yes", "no / never"]}, "yes|no / never"),
        ({"regex": "[ab]{3}/x"}, "[ab]{3}/x"),
    ):
        assert re.fullmatch(pattern, create(client, structured_outputs=outputs)["message"]["content"])
        plain = {"model": "tiny", "prompt": "x", "structured_outputs": outputs, "max_tokens": 30, "temperature": 1}
        assert re.fullmatch(pattern, client.post("/v1/completions", json=plain).json()["choices"][0]["text"])
    choice = create(client, structured_outputs={"json": json.dumps(CITY)}, max_tokens=200)
    validate(choice["message"]["content"], CITY)


def test_a_stream_says_what_is_answered_whole(client: TestClient) -> None:
    fields = {"response_format": schema(SCHEMAS["review"]), "n": 2, "seed": 3, "temperature": 1, "max_tokens": 200}
    body = {"model": "tiny", "messages": asked("go"), **fields}
    whole = [choice["message"]["content"] for choice in client.post(CHAT, json=body).json()["choices"]]
    lines = client.post(CHAT, json={**body, "stream": True}).text.splitlines()
    texts = ["", ""]
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == whole and whole[0] != whole[1]
    for text in whole:
        validate(text, SCHEMAS["review"])


def replies(assistant: Assistant, names: Iterable[str], **fields: Any) -> dict[str, str]:
    """How the reply to each schema ended; those that ended by themselves are valid."""
    client, out = local(assistant), {}
    for name in names:
        choice = create(client, f"Give me JSON: {name}.", response_format=schema(SCHEMAS[name]), **fields)
        out[name] = choice["finish_reason"]
        if out[name] == "stop":
            validate(choice["message"]["content"], SCHEMAS[name])
    return out


def test_replies_are_valid_and_end(shipped: Assistant) -> None:
    names = ["integer", "person", "times", "one of, by a tag"]
    assert set(replies(shipped, names, max_tokens=200).values()) == {"stop"}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["shipped", "by_heart"])
def test_of_fifty_schemas_nearly_all_replies_end(which: str, request: pytest.FixtureRequest) -> None:
    ended = replies(request.getfixturevalue(which), SCHEMAS, max_tokens=400)
    assert len(ended) == 50 and set(ended.values()) <= {"stop", "length"}
    assert list(ended.values()).count("stop") >= 45, [name for name, how in ended.items() if how != "stop"]
