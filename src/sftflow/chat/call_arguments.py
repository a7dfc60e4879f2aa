"""What a template is offered as the arguments of a tool call: an object, or JSON text.

    {{ call.arguments | tojson }}                 wants an object: a text would be encoded a second time
    {{ call.arguments }}                          wants a text: an object would come out as Python's {'a': True}
    {{ args if args is string else args | tojson }}         takes both
    {{ key }}:<|"|>{{ value }}<|"|>               has a syntax of its own and wants an object

Which of them makes a template write the arguments once is asked of the template itself, once. Where both make it write
their JSON, a row keeps its own form, a text down to its blanks. Where an object is written in another syntax than JSON,
a text, though taken, would be no call of that syntax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from sftflow.foundation.errors import FormatError

Forms = tuple[type, ...]

_ARGUMENTS: dict[str, Any] = {"zqat": True, "zqin": {"zqof": [None, 'zqis"é"']}}
_PARAMETERS = {"type": "object", "properties": {"zqat": {"type": "boolean"}, "zqin": {"type": "object"}}}
_TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": _PARAMETERS}}
_ASKS, _RESULT = {"role": "user", "content": "u"}, {"role": "tool", "content": "r", "tool_call_id": "probe0000"}
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')


def in_form(arguments: Any, forms: Forms) -> Any:
    """A call's arguments as they are where that is one of the forms, else in the first of them.

    >>> in_form('{"a": 1.0}', (dict,)), in_form({"a": True}, (str,)), in_form('{"a":1}', (dict, str))
    ({'a': 1.0}, '{"a": true}', '{"a":1}')
    """
    if type(arguments) in forms:
        return arguments
    return json.loads(arguments) if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def forms_written(render: Callable[[list[dict[str, Any]], list[Any]], str]) -> Forms:
    """The forms in which the template writes the JSON of arguments once; where it writes an object in a syntax of its
    own, that; where it writes neither, the one that it takes.   render: (messages, tools) -> text, or raises
    FormatError."""
    taken: list[type] = []
    for tools in ([_TOOL], []):
        for content in ("", "zq"):
            for behind in ([], [_RESULT]):
                found: list[type] = []
                for form in (dict, str):
                    arguments = in_form(_ARGUMENTS, (form,))
                    call = {"id": "probe0000", "type": "function", "function": {"name": "look", "arguments": arguments}}
                    said = {"role": "assistant", "content": content, "tool_calls": [call]}
                    try:
                        text = render([_ASKS, said, *behind], tools)
                    except FormatError:
                        continue
                    taken.append(form)
                    if form is dict and _ARGUMENTS not in _objects(text) and _in_own_syntax(text):
                        return (dict,)
                    if arguments in text if form is str else _ARGUMENTS in _objects(text):
                        found.append(form)
                if found:
                    return tuple(found)
    return (str,) if taken and dict not in taken else (dict,)


def _in_own_syntax(text: str) -> bool:
    """Whether all of the object is in the text, and its values not as Python writes them, whatever the quotes."""
    bare = re.sub(r"[\"'\\]", "", text)
    whole = all(word in bare for word in ("zqat", "zqin", "zqof", "zqis"))
    return whole and not re.search(r"zqin: ?\{zqof: \[None, zqis", bare)


def _objects(text: str) -> Iterator[Any]:
    """The JSON objects in a text, from wherever one begins."""
    for brace in re.finditer(r"\{", text):
        try:
            yield json.JSONDecoder().raw_decode(text, brace.start())[0]
        except ValueError:
            continue


def decoded(call: dict[str, Any]) -> dict[str, Any]:
    """A row's call with its arguments as an object."""
    if "function" in call:
        return {**call, "function": decoded(call["function"])}
    text = call.get("arguments")
    return {**call, "arguments": json.loads(text)} if isinstance(text, str) and text.strip() else call


def with_texts(arguments: str, mark: Callable[[str], str]) -> str:
    """JSON text with each text in it, keys too, as `mark` gives it back; between the quotes nothing is decoded.

    >>> with_texts('{"a": ["b"], "c":1}', str.upper)
    '{"A": ["B"], "C":1}'
    """
    return _TEXT.sub(lambda m: f'"{mark(m.group(1))}"', arguments)
