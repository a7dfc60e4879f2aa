"""What a template's prompt holds beyond the beginning of a reply, taken out of the template.

    prompt   ...<|Assistant|><think>\\n        the model is made to think, without an argument that stops it
    text     ...<|Assistant|>It is noon.      but a reply without thoughts is written so

Behind that prompt no such reply can be learnt. Where the user asks for it, the words are removed from the template's
own source, if every text stays as it was. Like an argument, the change travels with the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, parse_row
from sftflow.foundation.errors import FormatError, SftflowError
from sftflow.foundation.sequences import common_prefix

_USER, _REPLY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "zqreply"}
_CALL = {"id": "probe0000", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
_CALLED = [
    _USER,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "t", "tool_call_id": "probe0000"},
]
_SYSTEM = {"role": "system", "content": "s"}
_PROBES = [[_USER], [_SYSTEM, _USER], [_USER, _REPLY, _USER], [_USER, _REPLY], _CALLED, [*_CALLED, _REPLY, _USER]]


def drop_prefill(renderer: Renderer) -> Renderer:
    """The renderer of the template without what its prompt begins every reply with; one that begins none is left as it
    is. Raises FormatError where that cannot be taken out alone."""
    prefill = _prefill(renderer)
    if not prefill:
        return renderer
    probes = [parse_row(probe, "probe") for probe in _PROBES]
    wanted = [[text.removesuffix(prefill) if asked else text for asked, text in _texts(renderer, p)] for p in probes]
    for template in _without(renderer.format.template, prefill):
        try:
            found = renderer.with_format(replace(renderer.format, template=template, prefill=prefill))
        except FormatError:  # what is left is no template
            continue
        if [[text for _, text in _texts(found, p)] for p in probes] == wanted:
            return found
    fact = f"the {renderer.format.name} format's prompts end with {prefill!r}, which cannot be taken out alone"
    raise FormatError("drop_prefill", fact, "leave drop_prefill off, or use another format")


def _prefill(renderer: Renderer) -> str:
    """What the prompt for a reply holds beyond the header: the reply itself stands right behind that."""
    try:
        prompt = renderer.text(parse_row([_USER], "probe"), add_generation_prompt=True)
        text = renderer.text(parse_row([_USER, _REPLY], "probe"))
    except FormatError:
        return ""
    header = common_prefix(prompt, text)
    return prompt[header:] if header and text.startswith(str(_REPLY["content"]), header) else ""


def _texts(renderer: Renderer, probe: Conversation) -> Iterator[tuple[bool, str]]:
    """(whether it is a prompt, its text): the probe, and the prompt for its next reply; "" where it is refused."""
    for asked in (False, True):
        try:
            yield asked, renderer.text(probe, add_generation_prompt=asked)
        except SftflowError:
            yield asked, ""


def _without(template: str, words: str) -> Iterator[str]:
    """The template's source without the words, as they are or written as in a string literal: at each place, then at
    all of them."""
    for form in dict.fromkeys((words, json.dumps(words, ensure_ascii=False)[1:-1])):
        at = template.find(form)
        while at >= 0:
            yield template[:at] + template[at + len(form) :]
            at = template.find(form, at + 1)
        if form in template:
            yield template.replace(form, "")
