"""Tool calls and tool definitions as rows spell them -> the OpenAI shape. Arguments stay the row's own: a text or an
object, to the letter."""

from __future__ import annotations

import json
import re
from typing import Any

from sftflow.chat.row_keys import absent
from sftflow.foundation.errors import SchemaError
from sftflow.foundation.json_values import (
    AS_JSON,
    MOST_NESTED,
    RepeatedKeyError,
    check_plain,
    kind_of,
    loads,
    python_text,
)

ARGUMENTS = ("arguments", "parameters", "args", "input")
TOOL = '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
CALL = '{"name": ..., "arguments": {...}}'
_THOUGHT = re.compile(r"\s*(<think>.*?</think>)(.*)", re.DOTALL)


def read_json(text: str, place: str) -> Any:
    """A JSON text inside a row. Raises SchemaError where it is none, or holds what JSON has not."""
    try:
        value = loads(text)
    except RecursionError:
        raise SchemaError(place, f"nested more than {MOST_NESTED} deep", "make it flatter, or remove the row") from None
    except (json.JSONDecodeError, RepeatedKeyError) as error:
        shown = isinstance(error, json.JSONDecodeError) and python_text(error)
        raise SchemaError(place, f"a text that is not JSON ({error})", AS_JSON if shown else "mend the text") from None
    except ValueError:
        raise SchemaError(place, "a number of more than 4,300 digits", "make it a string") from None
    check_plain(value, place)
    return value


def read_tools(value: Any, place: str) -> list[dict[str, Any]]:
    """Definitions of tools, of a list of objects, or of JSON texts, or JSON text of one: in OpenAI's shape, into whose
    envelope those without it are put."""
    if isinstance(value, str):
        value = read_json(value, place)
    if absent(value):
        return []
    if isinstance(value, list):
        value = [read_json(t, place) if isinstance(t, str) else t for t in value]
    if not isinstance(value, list) or not all(isinstance(t, dict) or absent(t) for t in value):
        raise SchemaError(place, "not a list of objects", f"write [{TOOL}]")
    check_plain(value, place)
    return [_defined(_tool(tool, f"{place}[{number}]")) for number, tool in enumerate(value) if not absent(tool)]


def _tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    """A definition in its envelope."""
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": _function(tool["function"], place)}
    if tool.get("function") is None and tool.get("name") and tool.get("type") in (None, "function"):
        bare = {key: value for key, value in tool.items() if key not in ("type", "function")}
        return {"type": "function", "function": _function(bare, place)}
    return _function(tool, place)


def _function(function: dict[str, Any], place: str) -> dict[str, Any]:
    """A definition whose parameters may be JSON text, as in tables whose tools have nothing in common."""
    schema = function.get("parameters")
    if not isinstance(schema, str):
        return function
    found = read_json(schema, f"{place}.parameters") if schema.strip() else None
    if not isinstance(found, dict | None):
        raise SchemaError(f"{place}.parameters", f"it is {kind_of(found)}", "make it a JSON schema object")
    return {**function, "parameters": found}


def _defined(schema: Any) -> Any:
    """A part of a definition without null for what is not defined; null may be a default."""
    if isinstance(schema, dict):
        return {key: _defined(v) for key, v in schema.items() if v is not None or key in ("default", "const")}
    return [_defined(v) for v in schema] if isinstance(schema, list) else schema


def read_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """A message's `tool_calls`. Raises SchemaError, naming the call."""
    if not isinstance(value, list) or not all(isinstance(c, dict) for c in value):
        raise SchemaError(place, "not a call or a list of calls", f"write {CALL}")
    return [_call(call, f"{place}[{number}]") for number, call in enumerate(value)]


def calls_in_content(content: Any, place: str) -> tuple[str | None, list[dict[str, Any]]]:
    """(what is thought, or None; the calls) of a content that is a call or a list of calls, as JSON text behind
    reasoning between <think> tags, or as it is."""
    thought = None
    if isinstance(content, str):
        if match := _THOUGHT.fullmatch(content):
            thought, content = match.groups()
        content = read_json(content, place)
    calls = [content] if isinstance(content, dict) else content
    if not calls:
        raise SchemaError(place, "no call in it", f"write {CALL}")
    return thought, read_calls(calls, place)


def _call(raw: dict[str, Any], place: str) -> dict[str, Any]:
    """One call: {"id"?, "type"?, "index"?, "function": {"name", "arguments"}}, in the row's own order."""
    call = {key: value for key, value in raw.items() if value is not None}
    if call.get("type") in ("tool_use", "tool_call"):  # Anthropic's, LangChain's
        call["type"] = "function"
    if call.get("type", "function") != "function":
        raise SchemaError(place, f"type {call['type']!r} is not known", 'use "function"')
    envelope = {key: value for key, value in call.items() if key in ("id", "type", "index")}
    nested = isinstance(call.get("function"), dict)
    given = call["function"] if nested else {key: value for key, value in call.items() if key not in envelope}
    given = {key: value for key, value in given.items() if value is not None}
    if not isinstance(given.get("name"), str) or not given["name"]:
        raise SchemaError(place, "no function name", "give function.name and arguments")
    unknown = [key for key in call if key not in (*envelope, "function")] if nested else []
    unknown += [key for key in given if key not in ("name", *ARGUMENTS)]
    if unknown:
        raise SchemaError(place, f"unknown key {unknown[0]!r} in a call", "known: id, type, index, function")
    spelled = [key for key in given if key in ARGUMENTS]
    if len(spelled) > 1:
        raise SchemaError(place, f"{spelled[0]} and {spelled[1]} in one call", "keep one of them")
    function = {"name" if key == "name" else "arguments": value for key, value in given.items()}
    function["arguments"] = _arguments(given[spelled[0]], f"{place}.{spelled[0]}") if spelled else {}
    return {**call, "function": function} if nested else {**envelope, "type": "function", "function": function}


def _arguments(given: Any, place: str) -> Any:
    """Arguments as they are; an empty text is no arguments."""
    if isinstance(given, str):
        if not given.strip():
            return {}
        found = read_json(given, place)
        if isinstance(found, str):
            raise SchemaError(place, "JSON text of a JSON text", "encode the arguments once")
    else:
        found = given
    if not isinstance(found, dict):
        raise SchemaError(place, f"arguments are {kind_of(found)}", "make them one JSON object")
    return given
