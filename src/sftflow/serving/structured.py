"""What a reply must be: `response_format`, `structured_outputs` and `tool_choice` as a grammar.

    start: thoughts? (value | calls)

thoughts are free, and stand where the chat format has some. value is JSON under a schema, a regular expression or one
of some texts. calls are written as the chat format's own template writes them, with arguments under each tool's schema.
Anything wrong is an ApiError 400 that names the field.

JSON may be written as people and models write it: on one line or indented. Between its parts there may be two spaces at
most, or one line end and the indentation behind it, for a small model would write blanks without end.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sftflow.chat.tool_parser import IDENTITIES
from sftflow.foundation.errors import GrammarError
from sftflow.generation.constraint import Grammar
from sftflow.serving.errors import ApiError, internal, wrong
from sftflow.serving.model_entry import ServedModel
from sftflow.serving.schemas import ChatBody, SamplingBody

BLANKS = r"\x20{1,2}|\r?\n(\x20{0,24}|\t{0,6})"
FORMATS = (
    "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri",
    "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer", "relative-json-pointer", "regex",
)  # fmt: skip
"""of JSON Schema 2020-12; those that no grammar can hold are refused"""
OPTIONS = {"whitespace_pattern": BLANKS, "json_allow_general_unicode_escapes": True}
"""of llguidance's reading of a schema; a client cannot change them"""


def grammar_for(model: ServedModel, body: SamplingBody, prompt: str = "", begun: str = "") -> Grammar | None:
    """What a body's replies are held to; None: nothing. May take a second, the first time. Raises ApiError 400.

    prompt: its text.   begun: what of the reply's thoughts it has, see `ThoughtMarks`.
    """
    chat = body if isinstance(body, ChatBody) else None
    tools, forced = (chat.offered, chat.forced) if chat else ([], None)
    field, value = _value(body)
    if forced is not None:
        field, value = "tool_choice", ""  # a call, whatever else was asked
        names = [tool["function"]["name"] for tool in tools]
        if not tools or forced not in ("", *names):
            raise wrong(field, f"no such tool is given; there are: {', '.join(names) or 'none'}")
    if not field:
        return None
    if chat and chat.continue_final_message:
        raise wrong(field, "a message that is continued cannot be held to it; let the model begin the reply")
    if value and "%json" not in value and model.assistant.renderer.writes_prefix_spaces:
        value = f'" "? ({value})'  # which its decoder takes off again
    rules = [f"value: {value}"] if value else []
    rules += _call_rules(model, chat, field) if chat and tools else []
    thought_rules, leads = _thoughts(model, prompt, begun) if chat else ([], [{}])
    texts = []
    for lead in leads:
        starts = [
            f"{lead.get(rule, '')} {rule}" for rule in ("value", "calls") if any(r.startswith(rule) for r in rules)
        ]
        texts.append("\n".join([f"start: {' | '.join(starts)}", *rules, *(thought_rules if lead else ())]))
    try:
        return model.assistant.engine.grammars.compile(*texts, place=field)
    except GrammarError as error:
        raise internal(error) from None


def _thoughts(model: ServedModel, prompt: str, begun: str) -> tuple[list[str], list[dict[str, str]]]:
    """(rules, what stands in front of a value and of calls). Where the prompt has opened thoughts, they come first;
    where it has closed them, there are none; else the second entry is for a model that begins with some of its own."""
    marks, special = model.thoughts, model.assistant.renderer.special
    if marks is None or marks.coded(prompt).rstrip().endswith(marks.closing):
        return [], [{}]
    opening, closing, plain = marks.opening, marks.closing, marks.plain
    for token, code in marks.codes:
        opening, closing, plain = (text.replace(code, token) for text in (opening, closing, plain))
    end, *more = _symbols(closing, special)
    rules = [
        f"thoughts: {'' if begun else _literals(opening, special)} thought {' '.join(more)} /\\n{{0,2}}/",
        f"thought: ANY {end}" if end.startswith("<[") else f"thought[lazy]: ANY {end}",
        "ANY: /(?s:.*)/",
    ]
    # Between control tokens a call has a header of its own, which follows no thoughts.
    thoughtful = {"value": "thoughts", "calls": "" if marks.codes else "thoughts"}
    return rules, [thoughtful] if begun else [{"value": _literals(plain, special)}, thoughtful]


def _value(body: SamplingBody) -> tuple[str, str]:
    """(the field that asks for a value, the rule for it); ("", "") where none does."""
    asked = {"response_format": _format(body.response_format), "structured_outputs": _outputs(body.structured_outputs)}
    found = [(field, rule) for field, rule in asked.items() if rule]
    if len(found) > 1:
        raise wrong("structured_outputs", "response_format is given, too; keep one of them")
    return found[0] if found else ("", "")


def _format(wanted: dict[str, Any] | None) -> str:
    """OpenAI's field."""
    kind = "text" if wanted is None else wanted.get("type")
    if wanted is None or kind == "text":
        return ""
    if kind == "json_object":  # llama.cpp and others take a schema here
        schema = wanted.get("schema")
        if not isinstance(schema, dict | None):
            raise wrong("response_format", "its schema is not an object")
        return json_rule({"type": "object", **(schema or {})}, "response_format")
    if kind != "json_schema":
        raise wrong("response_format", f"its type {kind!r} is not known; use text, json_object or json_schema")
    given = wanted.get("json_schema")
    if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
        raise wrong("response_format", 'no schema; write {"type": "json_schema", "json_schema": {"schema": {...}}}')
    if not isinstance(given.get("strict"), bool | None):
        raise wrong("response_format", "its strict is neither true nor false")
    return json_rule(given["schema"], "response_format")


def _outputs(wanted: dict[str, Any] | None) -> str:
    """vLLM's field."""
    given = {key: value for key, value in (wanted or {}).items() if value not in (None, False)}
    if not given:
        return ""
    (kind, value), *others = given.items()
    place = f"structured_outputs.{kind}"
    if others:
        raise wrong(f"structured_outputs.{others[0][0]}", f"{kind} is given, too; keep one of them")
    if kind == "json_object":
        return json_rule({"type": "object"}, place)
    if kind == "json":
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            raise wrong(place, "not JSON") from None
        if not isinstance(value, dict):
            raise wrong(place, "not an object")
        return json_rule(value, place)
    if kind == "regex":
        from llguidance import regex_to_lark

        if not isinstance(value, str) or not value or "\n" in value:
            raise wrong(place, "not a regular expression on one line")
        return f"/{regex_to_lark(value)}/"
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
            raise wrong(place, "not a list of texts")
        return " | ".join(_text(text) for text in value)
    raise wrong(place, "it is not supported here; use json, json_object, regex or choice", "unsupported_parameter")


def _call_rules(model: ServedModel, body: ChatBody, field: str) -> list[str]:
    """The rules of `calls`: one call, or more where format and body let it."""
    written = model.written_calls
    if written is None:
        fact = f"the {model.assistant.renderer.format.name} chat format writes calls in a form that cannot be asked for"
        raise wrong(field, fact, "unsupported_parameter")
    opening, between, close, tail = (
        _literals(text or "", model.assistant.renderer.special)
        for text in (written.open, written.between, written.close, written.tail)
    )
    functions = [tool["function"] for tool in body.offered if body.forced in (None, "", tool["function"]["name"])]
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}"]
    for i, function in enumerate(functions):
        head = _literals(written.head + function["name"] + written.middle, model.assistant.renderer.special)
        arguments = json_rule(_parameters(function), field)
        rules += [f"call_{i}: {head} arguments_{i} {tail}", f"arguments_{i}: {arguments}"]
    one = written.between is None or body.forced or body.parallel_tool_calls is False
    return [f"calls: {opening} call {'' if one else f'({between} call)*'} {close}", *rules]


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments; a tool without parameters takes none."""
    schema = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    return {"type": "object", **schema}


def json_rule(schema: dict[str, Any], place: str = "schema") -> str:
    """A JSON text under a schema, in a grammar; blanks may stand in front of it. Raises ApiError 400 at `place`."""
    try:
        return f"/({BLANKS})?/ %json {json.dumps({**_asserted(schema), 'x-guidance': OPTIONS})}"
    except GrammarError as error:
        raise internal(GrammarError(place, error.fact)) from None
    except RecursionError:
        raise ApiError(400, "the schema is nested too deeply", code="invalid_json") from None


def _asserted(schema: Any) -> Any:
    """A schema without what says nothing: formats that JSON Schema does not define, which are notes to people
    (`password`), and that the names of keys are texts.

    >>> _asserted({"properties": {"format": {"format": "password"}, "day": {"format": "date"}}})
    {'properties': {'format': {}, 'day': {'format': 'date'}}}
    """
    if isinstance(schema, list):
        return [_asserted(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    is_object = schema.get("type") == "object"
    least, required = schema.get("minProperties", 0), schema.get("required")
    n_required = len(required) if isinstance(required, list) else 0
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    if isinstance(least, int) and least > n_required + 1 and not closed:  # one key written twice would count as two
        fact = f"no grammar holds minProperties {least} where keys are not listed; leave it out, and check the reply"
        raise GrammarError("schema", fact)
    return {
        key: inner if key in ("const", "enum", "default", "examples") else _asserted(inner)
        for key, inner in schema.items()
        if not (key == "format" and isinstance(inner, str) and inner not in FORMATS)
        and not (key == "propertyNames" and inner == {"type": "string"} and is_object)
    }


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _literals(text: str, special: dict[str, int]) -> str:
    return " ".join(_symbols(text, special))


def _symbols(text: str, special: dict[str, int]) -> list[str]:
    """A format's own words in a grammar: control tokens by their ids, an identity that is another in every call.

    >>> _symbols("<|call|> id: ", {"<|call|>": 7})
    ['<[7]>', '" id: "']
    """
    words = "|".join(map(re.escape, sorted([*special, *IDENTITIES], key=len, reverse=True)))
    pieces = [piece for piece in re.split(f"({words})", text) if piece]
    identity = "/[a-zA-Z0-9]{9}/"
    return [f"<[{special[p]}]>" if p in special else identity if p in IDENTITIES else _text(p) for p in pieces]
