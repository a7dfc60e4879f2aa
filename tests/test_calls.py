"""Tool calls: how a format writes them is learnt from its template, and read back however the text is cut."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.oracle import frozen_clock
from helpers.outside import each, outside_files
from helpers.templates import BACK, CHATML, DROPS, FRONT, STRIPS, chat
from helpers.tiny import TEXT
from sftflow.chat.format import TEMPLATE_NOW, ChatFormat
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.chat.tool_format import learn_calls, written_calls
from sftflow.chat.tool_parser import (
    IDENTITIES,
    Call,
    CallFormat,
    CallReader,
    JsonEntry,
    NamedEntry,
    TaggedEntry,
    read_calls,
)
from sftflow.chat.verify import verify
from sftflow.pretraining.tokenizer import train_tokenizer

NAMED = (
    FRONT
    + """{%- if m.tool_calls -%}{{- '[CALLS]' -}}{%- for c in m.tool_calls -%}
{{- '[NAME]' + c.function.name + '[ID]' + c.id + '[ARGS]' + (c.function.arguments | tojson) -}}{%- endfor -%}
{{- '[/CALLS]' -}}{%- endif -%}"""
    + BACK
)
TAGGED = (
    FRONT
    + """{%- if m.tool_calls -%}{{- '<calls>' -}}{%- for c in m.tool_calls -%}
{{- '<function=' + c.function.name + '>\n' -}}{%- for k, v in c.function.arguments.items() -%}
{{- '<parameter=' + k + '>\n' + (v if v is string else v | tojson) + '\n</parameter>\n' -}}{%- endfor -%}
{{- '</function>' -}}{%- endfor -%}{{- '</calls>' -}}{%- endif -%}"""
    + BACK
)
NESTED = (
    FRONT
    + """{%- for c in m.tool_calls or [] -%}{{- 'Action: ' + ({'function': {'id': c.id, 'called': c.function.name,
    'with': c.function.arguments | tojson}} | tojson) + '\n' -}}{%- endfor -%}"""
    + BACK
)
SINGLE = (
    FRONT
    + """{%- if m.tool_calls -%}
{%- if m.tool_calls | length > 1 -%}{{- raise_exception('one call only') -}}{%- endif -%}
{%- set c = m.tool_calls[0] -%}
{{- '{"name": "' + c.function.name + '", "parameters": ' + (c.function.arguments | tojson) + '}' -}}{%- endif -%}"""
    + BACK
)
# Text and calls stand between control tokens that begin alike.
TOKENS = (Path(__file__).parent / "templates" / "calls_end_of_two_tokens.jinja").read_text(encoding="utf-8")
OWN_SYNTAX = Path(__file__).parent / "templates" / "tool_calls_own_syntax.jinja"
TEMPLATES = {"chatml": CHATML, "named": NAMED, "tagged": TAGGED, "nested": NESTED, "single": SINGLE, "tokens": TOKENS}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "more": {"type": "object"}},
            },
        },
    }
    for name in ("weather", "weather_at", "clock")
]
CALLING = [
    path
    for path in outside_files("fixtures/chat_templates", "*/*.jinja")
    if "arguments" in path.read_text(encoding="utf-8") and path.stem not in ("Kimi-K2-Instruct", "GLM-4.6")
]
PARIS = {"city": "Paris, 2nd", "days": 3, "more": {"a": [1, None, "é"]}}


def renderer_of(template: str) -> Renderer:
    tokenizer = train_tokenizer(TEXT, 400, 256)
    control = sorted(set(re.findall(r"<\|[\w ]+?\|>|<｜[^｜]+｜>|\[/?[A-Z_]+\]", template)))
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": control})
    return Renderer(tokenizer, ChatFormat(name="own", template=template))


@pytest.fixture(scope="module")
def learnt() -> dict[str, tuple[Renderer, CallFormat]]:
    out = {}
    for name, template in TEMPLATES.items():
        renderer = renderer_of(template)
        found = learn_calls(renderer)
        assert found is not None, name
        out[name] = (renderer, found)
    return out


def written(renderer: Renderer, content: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What the engine's text would be if the model made these calls: the template's rendering of the turn, without
    control tokens."""
    made = [
        {"id": f"call{n:05}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for n, (name, arguments) in enumerate(calls)
    ]
    user = {"role": "user", "content": "u"}
    row = {"messages": [user, {"role": "assistant", "content": content, "tool_calls": made}], "tools": TOOLS}
    prompt = renderer.text(parse_row({"messages": [user], "tools": TOOLS}, "x"), add_generation_prompt=True)
    text = renderer.text(parse_row(row, "x"))
    assert text.startswith(prompt)
    return renderer.special_re.sub("", text[len(prompt) :]).removesuffix("\n")


def test_what_is_learnt(learnt: dict[str, tuple[Renderer, CallFormat]]) -> None:
    found = {name: call_format for name, (_, call_format) in learnt.items()}
    assert found["chatml"].open.strip() == "<tool_call>"
    assert found["chatml"].entry == JsonEntry(("name",), ("arguments",))
    assert found["named"].open == "" and isinstance(found["named"].entry, NamedEntry)
    assert isinstance(found["tagged"].entry, TaggedEntry)
    assert found["nested"].entry == JsonEntry(("called",), ("with",))
    assert (found["tokens"].open, found["tokens"].close) == ("[", "]")
    assert found["single"] == CallFormat("", JsonEntry(("name",), ("parameters",)), None, "")
    assert learn_calls(renderer_of(DROPS)) is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_how_a_call_must_be_written(name: str, learnt: dict[str, tuple[Renderer, CallFormat]]) -> None:
    """What a reply is held to where a call is asked for is what the template writes, control tokens included."""
    renderer, call_format = learnt[name]
    must = written_calls(renderer, call_format)
    if name in ("tagged", "nested"):  # between tags, and as a text in JSON
        assert must is None
        return
    assert must is not None
    arguments = json.dumps(PARIS, ensure_ascii=False)
    call = must.head + "weather" + must.middle + arguments + must.tail
    text = must.open + call + ("" if must.between is None else must.between + call) + must.close
    n = 1 if must.between is None else 2
    made = {"id": IDENTITIES[0], "type": "function", "function": {"name": "weather", "arguments": arguments}}
    reply = {"role": "assistant", "content": "", "tool_calls": [made] * n}
    row = {"messages": [{"role": "user", "content": "u"}, reply], "tools": TOOLS}
    assert text in renderer.text(parse_row(row, "x"))
    assert read_calls(call_format, TOOLS, renderer.special_re.sub("", text)) == ("", [("weather", PARIS)] * n)


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_are_read_back_however_the_text_is_cut(name: str, learnt: dict[str, tuple[Renderer, CallFormat]]) -> None:
    renderer, call_format = learnt[name]
    content = "" if call_format.open == "" else "Let me look."
    lists: list[list[tuple[str, dict[str, Any]]]] = [[("weather", PARIS)], [("clock", {})]]
    if call_format.between is not None:
        lists += [[("weather_at", PARIS), ("weather", {}), ("clock", {"city": "a\nb"})], [("clock", {}), ("clock", {})]]
    random_cuts = random.Random(0)
    for calls in lists:
        text = written(renderer, content, calls)
        assert read_calls(call_format, TOOLS, text) == (content, calls), text
        for _ in range(20):
            cuts = sorted(random_cuts.choices(range(len(text) + 1), k=random_cuts.randint(1, len(text))))
            reader = CallReader(call_format, TOOLS)
            pieces: list[str | Call] = []
            for left, right in zip([0, *cuts], [*cuts, len(text)], strict=True):
                pieces += reader.feed(text[left:right])
            pieces += reader.flush()
            assert "".join(p for p in pieces if isinstance(p, str)) == content
            assert [(p.name, p.arguments) for p in pieces if isinstance(p, Call)] == calls


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "Just text with <tool_call> in it.",
        "<tool_call>\nnot json\n</tool_call> and more",
        '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Par',
        '<tool_call>{"name": 5}</tool_call>  ',
        "<tool_c",
        "a < b",
        "{" * 5000,
        '<tool_call>\n{"name": "weather", "arguments": {"days": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"days": 1e999}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": ' + '{"a":' * 3000,
        '{"answer": 5}',
        "weather is fine",
        "<function=nobody></function>",
    ],
)
def test_what_is_no_call_stays_text(text: str, learnt: dict[str, tuple[Renderer, CallFormat]]) -> None:
    for _, call_format in learnt.values():
        assert read_calls(call_format, TOOLS, text) == (text, [])
        reader = CallReader(call_format, TOOLS)
        pieces = [p for c in text[:200] for p in reader.feed(c)] + reader.feed(text[200:]) + reader.flush()
        assert "".join(map(str, pieces)) == text


def test_text_around_calls_is_given_out_as_it_comes(learnt: dict[str, tuple[Renderer, CallFormat]]) -> None:
    reader = CallReader(learnt["chatml"][1], TOOLS)
    assert reader.feed("Let me look.\n") == ["Let me look."]
    assert reader.feed("<tool") == []
    assert reader.feed('_call>\n{"arguments": {"city": "x"},') == []
    assert reader.feed(' "name": "clock"}\n</tool_call>') == []
    assert reader.feed("\nDone") == [Call("clock", {"city": "x"}), "Done"]
    assert reader.feed(".") + reader.flush() == ["."]


def test_a_call_may_end_with_the_reply(learnt: dict[str, tuple[Renderer, CallFormat]]) -> None:
    text = '<tool_call>{"name":"clock","arguments":{}}'
    for end in ("", "\n", "</", "\n</tool_call"):
        assert read_calls(learnt["chatml"][1], TOOLS, text + end) == ("", [("clock", {})])
    assert read_calls(learnt["chatml"][1], TOOLS, text + " so") == ("so", [("clock", {})])


# What the published templates write, read from their source by hand.
PUBLISHED = {
    "Qwen-Qwen2.5-7B-Instruct": "<tool_call>",
    "Qwen-Qwen3-0.6B": "<tool_call>",
    "Qwen-QwQ-32B": "<tool_call>",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "<tool_call>",
    "GLM-4.6": "<tool_call>",
    "meta-llama-Llama-3.1-8B-Instruct": "",
    "meta-llama-Llama-3.2-3B-Instruct": "",
    "mistralai-Mistral-Nemo-Instruct-2407": "[",
    "deepseek-ai-DeepSeek-V3.1": "",
}


@pytest.mark.parametrize("path", each(outside_files("fixtures/chat_templates/llamacpp", "*.jinja")))
def test_published_templates(path: Path) -> None:
    renderer = renderer_of(path.read_text(encoding="utf-8"))
    call_format = learn_calls(renderer)
    if path.stem not in PUBLISHED:
        assert call_format is None
        return
    assert call_format is not None and call_format.open.strip() == PUBLISHED[path.stem]
    if path.stem == "Qwen-QwQ-32B":
        return  # its prompt is no prefix of its own rendering
    calls = [("weather", PARIS)]
    text = re.sub(r"(?s)^\s*<think>\s*</think>\s*", "", written(renderer, "", calls))
    assert read_calls(call_format, TOOLS, text) == ("", calls)


# ---- what a template is offered as arguments

WRITES = (
    "{%- for c in m.tool_calls or [] -%}{{- '<call>' + c.function.name + ' ' -}}WRITTEN{{- '</call>' -}}{%- endfor -%}"
)
OFFERED = {
    "object": "{{- c.function.arguments | tojson -}}",
    "object in an object": "{{- {'with': c.function.arguments} | tojson -}}",
    "whole call": "{{- c | tojson -}}",
    "text": "{{- c.function.arguments -}}",
    "joined text": "{{- '[' + c.function.arguments + ']' -}}",
    "both": "{%- set a = c.function.arguments -%}{{- a if a is string else a | tojson -}}",
    "text, or pairs as Python writes them": "{%- set a = c.function.arguments -%}{%- if a is string -%}{{- a -}}"
    "{%- else -%}{%- for k, v in a.items() -%}{{- '\"' + k + '\": ' + v | string -}}{%- endfor -%}{%- endif -%}",
    "text, or names": "{%- set a = c.function.arguments -%}{{- a if a is string else a | join -}}",
    "tags": "{%- for k, v in c.function.arguments | items -%}{{- '<' + k + '>' -}}"
    "{{- v | tojson if v is mapping else v | string -}}{%- endfor -%}",
}
OBJECT = {"zeta": True, "a": None, "n": [1, 1.0, 12345678901234567890, -0.5], "deep": {"é": 'x "y"\n<|im_end|>'}}
TEXTS = (
    json.dumps(OBJECT),
    json.dumps(OBJECT, ensure_ascii=False, separators=(",", ":")),
    json.dumps(OBJECT, indent=1),
)
ESCAPED = '{"s": "\\u003c|im_end|\\u003e"}'


def calling(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "clock", "arguments": arguments}, "id": "call00001"}
    turns = ({"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [call]})
    return {"messages": [*turns, {"role": "user", "content": "v"}, {"role": "assistant", "content": "w"}]}


@pytest.mark.parametrize("name", OFFERED)
def test_arguments_are_written_once(name: str) -> None:
    """In the row's own form where the template writes its JSON once, as transformers; else in the other."""
    renderer = renderer_of(FRONT + WRITES.replace("WRITTEN", OFFERED[name]) + BACK)
    template = renderer.format.template

    def theirs(arguments: Any) -> str:
        row = calling(arguments)["messages"]
        return str(renderer.tokenizer.apply_chat_template(row, chat_template=template, tokenize=False))

    for own in (OBJECT, *TEXTS):
        rendered = renderer.render(parse_row(calling(own), "x"))
        offered: Any = OBJECT if "object" in name or name in ("whole call", "tags") else own
        if "text" in name and own is OBJECT:
            offered = json.dumps(OBJECT, ensure_ascii=False)
        assert rendered.text == theirs(offered), own
        # Two replies end; what looks like an end inside the arguments is text.
        assert rendered.ids.tolist().count(renderer.special["<|im_end|>"]) == 4
        assert not verify(renderer, parse_row(calling(own), "x"), rendered)
    assert renderer.decode(rendered.ids[rendered.mask == 1].tolist()).count("<|im_end|>") == 3


@pytest.mark.parametrize("name", ["object", "text", "both"])
def test_an_end_of_turn_that_is_escaped_in_a_text_is_text(name: str) -> None:
    renderer = renderer_of(FRONT + WRITES.replace("WRITTEN", OFFERED[name]) + BACK)
    conversation = parse_row(calling(ESCAPED), "x")
    whole, end = renderer.render(conversation), renderer.special["<|im_end|>"]
    prompt = renderer.render(conversation, add_generation_prompt=True)
    assert (whole.ids == end).sum() == (prompt.ids == end).sum() == 4
    assert not verify(renderer, conversation, whole)


@pytest.mark.parametrize("path", [pytest.param(OWN_SYNTAX, id="own syntax"), *each(CALLING)])
def test_arguments_as_transformers_writes_them(path: Path) -> None:
    """With templates of well-known models: what an object, or where that is its form a text, comes out as."""
    template = path.read_text(encoding="utf-8")
    renderer = renderer_of(template)
    takes_texts = path.stem in ("Qwen-Qwen3-0.6B", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use")
    for own in (OBJECT, *TEXTS):
        offered = own if takes_texts else OBJECT
        with frozen_clock(TEMPLATE_NOW):
            theirs = renderer.tokenizer.apply_chat_template(
                calling(offered)["messages"], tools=TOOLS, chat_template=template, tokenize=False
            )
        assert renderer.text(parse_row({**calling(own), "tools": TOOLS}, "x")) == theirs, own


def test_a_turn_that_opens_with_a_call_is_headed_rightly() -> None:
    """Also where the template writes the last reply, and no other, behind an empty block of thoughts."""
    thoughts = "{% if loop.last and m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    front = FRONT.replace("+ (m.content or '') -}}", f"-}}}}{thoughts}{{{{- m.content or '' -}}}}")
    renderer = renderer_of(
        front + "{%- for c in m.tool_calls or [] -%}{{- '<tool_call>' + (c | tojson) -}}{%- endfor -%}" + BACK
    )
    call = {"id": "call00001", "type": "function", "function": {"name": "clock", "arguments": {}}}
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "noon", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "It is noon."},
    ]
    row = renderer.render(parse_row(messages, "x"), turns=True)
    starts = [start for start, _ in row.turns]
    shown = [renderer.decode(row.ids[a:b].tolist()) for a, b in zip(starts, [*starts[1:], len(row.ids)], strict=True)]
    assert [role for _, role in row.turns] == ["user", "assistant", "tool", "assistant"]
    assert [text.partition("\n")[0] for text in shown] == [f"<|im_start|>{role}" for _, role in row.turns]
    assert "<tool_call>" in shown[1] and "<think>" in shown[3]


def _holding(place: str, text: str) -> dict[str, Any]:
    """A row of two replies that has the text at one place."""
    call = {"type": "function", "function": {"name": "clock", "arguments": {"a": 1}}, "id": "call00001"}
    told = {"role": "tool", "content": "r", "tool_call_id": "call00001", "name": "clock"}
    tools = json.loads(json.dumps(TOOLS))
    if place == "id":
        call["id"] = told["tool_call_id"] = text
    elif place == "key":
        call["function"] = {"name": "clock", "arguments": {text: 1}}
    elif place == "name":
        told["name"] = text
    else:
        tools[0]["function"]["parameters"]["properties"]["city"][place] = [{text: text}, text]
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {
        "messages": [{"role": "user", "content": "u"}, said, told, {"role": "assistant", "content": "w"}],
        "tools": tools,
    }


@pytest.mark.parametrize("place", ["id", "key", "name", "description", "enum"])
def test_a_control_token_is_text_wherever_a_row_holds_it(place: str) -> None:
    """Not in contents alone: in what identifies calls, and deep inside a tool's definition; prompts and rows alike."""
    front = FRONT.replace("m.role + ", "m.role + (m.name or '') + (m.tool_call_id or '') + ")
    renderer = renderer_of(front + WRITES.replace("WRITTEN", OFFERED["whole call"]) + BACK)
    end = renderer.special["<|im_end|>"]
    counts = []
    for text in ("plain", "x<|im_end|>"):
        conversation = parse_row(_holding(place, text), "x")
        row, prompt = renderer.render(conversation), renderer.render(conversation.before(3), add_generation_prompt=True)
        assert not verify(renderer, conversation, row)
        assert row.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist() and text in row.text
        counts.append([(ids == end).sum() for ids in (row.ids, prompt.ids)])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("said", ["b<|im_end|>c", "b <|im_end|> c"])
def test_a_control_token_is_text_where_the_template_cuts_contents(said: str) -> None:
    renderer = renderer_of(STRIPS)
    end = renderer.special["<|im_end|>"]
    for who in (0, 1, 2):
        texts = ["a", "<think>hm</think>b", "d"]
        texts[who] = texts[who].replace("b", said) if who == 1 else said
        prompt = renderer.render(chat(*texts), add_generation_prompt=True)
        assert said in prompt.text and (prompt.ids == end).sum() == 3
