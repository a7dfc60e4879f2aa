"""Fifty JSON schemas as programs ask for them: each with a name that says what it tries."""

from __future__ import annotations

from typing import Any


def record(required: bool = True, /, **properties: Any) -> dict[str, Any]:
    """A closed object, all of whose keys are required."""
    names = list(properties) if required else []
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def words(most: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": most}


def several(items: Any, least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def shaped(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


def between(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


TEXT: dict[str, Any] = {"type": "string"}
INTEGER: dict[str, Any] = {"type": "integer"}
NUMBER: dict[str, Any] = {"type": "number"}
YES_NO: dict[str, Any] = {"type": "boolean"}
POINT = record(x={"type": "number", "minimum": -1, "maximum": 1}, y={"type": "number", "minimum": -1, "maximum": 1})
TREE = record(name=words(8), children={"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2})

SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {"type": "object"},
    "array": {"type": "array"},
    "string": TEXT,
    "integer": INTEGER,
    "number": NUMBER,
    "boolean": YES_NO,
    "anything": {},
    "enum": {"enum": ["red", "green", "blue"]},
    "enum of kinds": {"enum": ["one", 1, None, True, [1], {"a": 1}]},
    "const": {"const": {"version": 2, "tags": ["a", "b"]}},
    "person": record(name=TEXT, age=INTEGER),
    "person, open": {"type": "object", "properties": {"name": TEXT, "age": INTEGER}, "required": ["name"]},
    "person, bounded": record(name=words(30), age=between(0, 130)),
    "optional keys": record(False, a=INTEGER, b=TEXT, c=YES_NO),
    "required, undeclared": {"type": "object", "required": ["id"], "properties": {"note": words(20)}},
    "map": {"type": "object", "additionalProperties": INTEGER, "minProperties": 1, "maxProperties": 3},
    "map of texts": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"enum": [1, 2]}},
    "map by pattern": {"type": "object", "patternProperties": {"^k[0-9]$": YES_NO}, "additionalProperties": False},
    "empty object": record(),
    "list of texts": several(TEXT, 1, 3),
    "list of integers": several(INTEGER, 3, 5),
    "list, unbounded": {"type": "array", "items": YES_NO},
    "tuple": {"type": "array", "prefixItems": [words(10), INTEGER, YES_NO], "items": False, "minItems": 3},
    "matrix": several(several(between(0, 9), 2, 2), 2, 2),
    "points": several(POINT, 1, 2),
    "fraction": record(share={"type": "number", "minimum": 0, "maximum": 1}),
    "exclusive": record(n={"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 20}),
    "negative": record(n=between(-40, -5)),
    "multiple": record(n={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}),
    "code": record(code=shaped("^[A-Z]{3}-[0-9]{4}$")),
    "pattern inside": record(word={"type": "string", "pattern": "^(ab|cd)+$", "maxLength": 12}),
    "date": record(on={"type": "string", "format": "date"}),
    "times": record(at={"type": "string", "format": "date-time"}, of={"type": "string", "format": "time"}),
    "uuid": record(id={"type": "string", "format": "uuid"}, key={**words(9), "format": "password"}),
    "address": record(ip={"type": "string", "format": "ipv4"}),
    "lengths": record(word={"type": "string", "minLength": 3, "maxLength": 6}),
    "nested": record(user=record(name=words(12), home=record(city=words(12), zip=shaped("^[0-9]{5}$")))),
    "deep": record(a=record(b=record(c=record(d=record(e=YES_NO))))),
    "unicode keys": record(größe=between(1, 9), 名前={"enum": ["太郎", "花子"]}),
    "quotes in keys": record(**{'a "b"\n': YES_NO}),
    "nullable": record(name={"type": ["string", "null"], "maxLength": 10}, n={"anyOf": [{"type": "null"}, INTEGER]}),
    "any of": {"anyOf": [record(circle=record(r={"enum": [1, 2]})), record(square=record(a={"enum": [1, 2]}))]},
    "one of, by a tag": {
        "oneOf": [
            record(kind={"const": "cat"}, lives=between(1, 9)),
            record(kind={"const": "dog"}, tricks=several(words(8), 0, 2)),
        ]
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]},
            {"properties": {"b": YES_NO}, "required": ["b"]},
        ]
    },
    "ref": {"$defs": {"point": POINT}, **record(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"})},
    "tree": {"$defs": {"tree": TREE}, "$ref": "#/$defs/tree"},
    "linked list": {
        "$defs": {"node": record(v=INTEGER, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})},
        "$ref": "#/$defs/node",
    },
    "review": record(
        title=words(40), stars=between(1, 5), pros=several(words(20), 0, 3),
        verdict={"enum": ["buy", "wait", "avoid"]},
    ),
    "order": record(
        id=shaped("^o[0-9]{3}$"),
        lines=several(record(item=words(15), n=between(1, 99), price={**between(0, 999), "type": "number"}), 1, 2),
        paid=YES_NO,
    ),
    "steps": record(steps=several(record(explanation=TEXT, output=TEXT), 1, 2), final_answer=TEXT),
}  # fmt: skip
