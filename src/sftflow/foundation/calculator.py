"""The python tool of the chat format: arithmetic and `str.count`, by an AST whitelist, bounded in size and time."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

MAX_SOURCE = 200
MAX_DIGITS = 60
MAX_TEXT = 400

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class _Refused(ValueError):
    """No arithmetic, or too large."""


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Refused
    if abs(value) > 10**MAX_DIGITS or value != value:
        raise _Refused
    return value


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str) and len(node.value) <= MAX_TEXT:
            return node.value
        return _number(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _number(_value(node.operand))
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _number(_value(node.left)), _number(_value(node.right))
        if isinstance(node.op, ast.Pow):
            if abs(right) > 64 or abs(left) > 10**6:
                raise _Refused
            return _number(left**right)
        if type(node.op) not in _BINARY:
            raise _Refused
        return _number(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "count":
        text = _value(node.func.value)
        if node.keywords or len(node.args) != 1 or not isinstance(text, str):
            raise _Refused
        part = _value(node.args[0])
        if not isinstance(part, str) or not part:
            raise _Refused
        return text.count(part)
    raise _Refused


def _show(value: Any) -> str:
    if isinstance(value, float):
        if value == int(value) and abs(value) < 1e15:
            return str(int(value))
        return f"{value:.10g}"
    return str(value)


def calculate(source: str) -> str | None:
    """The value of an arithmetic expression or a `'text'.count('t')`, as text; None where it is anything else.

    Nothing is executed: the expression is parsed and walked, and only whitelisted nodes have a meaning.

    >>> calculate("48/2"), calculate("'strawberry'.count('r')"), calculate("__import__('os')")
    ('24', '3', None)
    """
    source = source.strip().replace(",", "") if "count" not in source else source.strip()
    if not source or len(source) > MAX_SOURCE:
        return None
    try:
        value = _value(ast.parse(source, mode="eval").body)
        return _show(value) if not isinstance(value, str) else None
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, TypeError):
        return None
