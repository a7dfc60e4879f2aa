"""The texts of a row's beginnings, found by watching one rendering, are those that the template writes for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.outside import each, outside_files
from sftflow.chat import beginnings
from sftflow.chat.beginnings import Beginnings
from sftflow.chat.format import ChatFormat, add_tokens, builtin_format
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.chat.template import Template
from sftflow.chat.verify import verify
from sftflow.foundation.errors import FormatError

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
EACH = "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
END = "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
STATE = "{% set s = namespace(n=0, last='') %}"

# Templates that know more, when they ask for a message, than the messages before it.
LOOK = {
    "last": EACH + "{% if loop.last %}.{% endif %}" + END,
    "last by its key": EACH + "{% if loop['last'] %}.{% endif %}" + END,
    "last by a filter": EACH + "{{ loop|attr('last') }}" + END,
    "next": EACH + "{% if loop.nextitem is defined and loop.nextitem.role == 'user' %}.{% endif %}" + END,
    "length": EACH + "{{ loop.length }}{{ loop.revindex }}" + END,
    "last of filtered": "{% for m in messages if m.role == 'user' %}{{ m.content }}{{ loop.last }}" + END,
    "negative": "{{ messages[-1].content }}" + EACH + END,
    "number": "{{ messages|length }}" + EACH + END,
    "number less one": EACH + "{% if loop.index0 == messages|length - 1 %}.{% endif %}" + END,
    "number compared": "{% if messages|length > 4 %}long{% endif %}" + EACH + END,
    "number equal": "{% if messages|count == 3 %}three{% endif %}" + EACH + END,
    "ahead": EACH + "{% if messages[loop.index0 + 1] is defined %}.{% endif %}" + END,
    "backwards": "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}" + EACH + END,
    "reversed": "{% for m in messages|reverse %}{{ m.content }}{% endfor %}" + EACH + END,
    "all but the last": "{% for m in messages[:-1] %}{{ m.content }}" + END,
    "first loop": STATE + "{% for m in messages %}{% set s.n = loop.index0 %}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% if loop.index0 > s.n - 2 %}!{% endif %}" + END,
    "second loop": EACH + "{% endfor %}{% for m in messages %}{{ m.content }}" + END,
    "listed": "{% set all = messages|list %}{% for m in all %}{{ m.content }}" + END,
    "joined": "{{ messages|map(attribute='content')|join(' ') }}" + END.removeprefix("{% endfor %}"),
    "written": "{{ messages }}" + EACH + END,
    "as JSON": EACH + "{% endfor %}{{ messages|tojson }}{% for m in messages %}" + END,
    "searched": EACH + "{% if m in messages %}.{% endif %}" + END,
    "macro": "{% macro say(all) %}{% for m in all %}{{ m.content }}{% endfor %}{% endmacro %}{{ say(messages) }}"
    + END.removeprefix("{% endfor %}"),
    "block": "{% set text %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}<{{ text|length }}>{{ text }}"
    + END.removeprefix("{% endfor %}"),
    "counted": STATE + EACH + "{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}{% for m in messages[:0] %}" + END,
    "kept": STATE + EACH + "{% set s.last = m %}{% endfor %}{{ s.last.content }}{% for m in messages[:0] %}" + END,
    "state": STATE + EACH + "{% set s.last = m.role %}{% endfor %}{% if s.last == 'user' %}?{% endif %}"
    "{% for m in [] %}" + END,
    "state that looks back": STATE + EACH + "{% set s.last = m.role %}{% endfor %}"
    "{% if s.last == 'user' %}{{ messages[-1].content }}{% endif %}{% for m in [] %}" + END,
    "cycle": "{% set c = cycler(1, 2) %}" + EACH + "{{ c.next() }}{% endfor %}{{ c.current }}{% for m in [] %}" + END,
    "asked within": EACH + "{% if add_generation_prompt and loop.index0 > 3 %}+{% endif %}" + END,
    "without the first": "{% set rest = messages[1:] %}{% for m in rest %}{{ m.content }}" + END,
    "raises": EACH + "{% if loop.index0 > 5 %}{{ raise_exception('too many') }}{% endif %}" + END,
    "raises behind": STATE + EACH + "{% set s.last = m.role %}{% endfor %}"
    "{% if add_generation_prompt and s.last != 'user' %}{{ raise_exception('no') }}{% endif %}{% for m in [] %}" + END,
}  # fmt: skip


def turns(kinds: list[int]) -> list[dict[str, Any]]:
    """Messages: each number one or more, of text, reasoning, a call and its result, or a further user message."""
    out: list[dict[str, Any]] = [{"role": "system", "content": "be"}] if kinds[0] % 2 else []
    for n, kind in enumerate(kinds):
        out.append({"role": "user", "content": f"u{n}"})
        if kind == 1:
            out.append({"role": "assistant", "content": f"a{n}", "reasoning_content": "hm", "thinking": "hm"})
        elif kind == 2:
            out += [{"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "it", "tool_call_id": "abcdefghi", "name": "look"}]  # fmt: skip
        if kind != 3:
            out.append({"role": "assistant", "content": f"a{n}"})
    return out


def said(text: Any) -> str | tuple[str, str]:
    try:
        return str(text())
    except FormatError as error:
        return ("refused", error.fact)


def all_equal(template: Template, messages: list[dict[str, Any]], order: list[int]) -> None:
    tools = [TOOL] if any("tool_calls" in m for m in messages) else []
    found = Beginnings(template, messages, tools)
    for asked in (True, False):
        for n in sorted(range(len(messages) + 1), key=lambda n: order[n % len(order)]):
            wanted = said(lambda n=n, asked=asked: template.text(messages[:n], tools, asked, "x"))
            assert said(lambda n=n, asked=asked: found.text(n, asked, "x")) == wanted, (n, asked)


KINDS = st.lists(st.integers(0, 3), min_size=2, max_size=6)
ORDER = st.permutations(range(12))


@pytest.mark.parametrize("name", LOOK)
@settings(max_examples=12)
@given(kinds=KINDS, order=ORDER)
def test_a_template_that_looks_further_is_not_misread(name: str, kinds: list[int], order: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beginnings, "MANY", 2)
        all_equal(Template(ChatFormat(name="own", template=LOOK[name]), NAMES, ()), turns(kinds), order)


OWN = sorted((Path(__file__).parent / "templates").glob("*.jinja"))


@pytest.mark.parametrize(
    "path", [*OWN, *each(outside_files("fixtures/chat_templates", "*/*.jinja"))], ids=lambda p: p.stem
)
@settings(max_examples=2)
@given(kinds=KINDS, order=ORDER)
def test_every_template(path: Path, kinds: list[int], order: list[int]) -> None:
    template = Template(ChatFormat(name="own", template=path.read_text(encoding="utf-8")), NAMES, ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beginnings, "MANY", 2)
        all_equal(template, turns(kinds), order)


@pytest.mark.parametrize("name", ["sftflow", "chatml", "llama3"])
def test_a_long_row_is_rendered_a_few_times_only(
    name: str, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    add_tokens(tokenizer, builtin_format(name))
    renderer = Renderer(tokenizer, builtin_format(name))
    messages = [{"role": role, "content": f"{role} {n}"} for n in range(150) for role in ("user", "assistant")]
    row = parse_row({"messages": messages}, "x:1")
    rendered: list[int] = []
    once = Template._text

    def counted(self: Template, chat: Any, *more: Any) -> str:
        rendered.append(len(chat))
        return once(self, chat, *more)

    monkeypatch.setattr(Template, "_text", counted)
    assert verify(renderer, row, renderer.render(row)) == {}
    assert sum(rendered) < 8 * len(messages) and len(rendered) < 16
