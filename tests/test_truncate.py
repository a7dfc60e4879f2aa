"""Cutting: the longest beginning that fits, as trying every one from the long end finds it; and what it may cost."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.templates import CHATML, HEAD, STRIPS, TAIL
from helpers.tokenizers import byte_level
from sftflow.chat.format import choose_format
from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import Conversation, parse_row
from sftflow.chat.template import Template
from sftflow.chat.verify import verify
from sftflow.data.render_pool import Job, render_block
from sftflow.data.truncate import TOO_LONG, UNTAUGHT, fit_to_length
from sftflow.foundation.errors import SftflowError

TEMPLATES = {
    "plain": CHATML,
    "no fence": "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "ends in dashes": HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% elif messages[-1].role == 'assistant' %}{{ '-' * 40 }}{% endif %}",
    "strips thoughts": STRIPS,
    "block in the last": HEAD
    + "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}"
    + TAIL
    + "{% endif %}",
}


@cache
def renderer_of(name: str) -> Renderer:
    tokenizer = byte_level(special=("</s>", "<s>", "<|im_end|>", "<|im_start|>"))
    tokenizer.chat_template = TEMPLATES[name]
    return Renderer(tokenizer, choose_format("auto", tokenizer))


def naive(conversation: Conversation, renderer: Renderer, max_length: int) -> list[Rendered]:
    """Every beginning from the long end, each rendered for itself; of a row that expands, the examples that fit."""
    rows = renderer.render_rows(conversation)
    if len(rows) > 1 or len(rows[0].ids) <= max_length:
        return [row for row in rows if len(row.ids) <= max_length]
    for turn in reversed(conversation.supervised):
        try:
            row = renderer.render(conversation.before(turn + 1))
        except SftflowError:
            continue
        if len(row.ids) <= max_length:
            return [row]
    return []


def _taught(rows: list[Rendered]) -> list[int]:
    return [i for row in rows for i in row.ids[row.mask == 1].tolist()]


WORDS = st.sampled_from(["", "a", "tell me more", "<think>hm</think>yes", " b\n", "<|im_end|>", "x" * 40])


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(WORDS, min_size=2, max_size=48),
    weights=st.lists(st.integers(0, 3), min_size=48, max_size=48),
    first=st.integers(0, 1),
    max_length=st.integers(8, 400),
)
def test_the_longest_beginning_that_fits(
    name: str, texts: list[str], weights: list[int], first: int, max_length: int
) -> None:
    renderer = renderer_of(name)
    messages = [
        {"role": "user", "content": text}
        if (i + first) % 2 == 0
        else {"role": "assistant", "content": text, "weight": min(weights[i], 1)}
        for i, text in enumerate(texts)
    ]
    conversation = parse_row(messages, "t:1")
    if not conversation.supervised:
        assert fit_to_length(conversation, renderer, max_length, "cut").dropped == UNTAUGHT
        return
    try:
        wanted = naive(conversation, renderer, max_length)
        found = fit_to_length(conversation, renderer, max_length, "cut")
    except SftflowError:
        return
    if len(found.pairs) == len(wanted):
        assert [row.ids.tolist() for _, row in found.pairs] == [row.ids.tolist() for row in wanted]
        assert [row.mask.tolist() for _, row in found.pairs] == [row.mask.tolist() for row in wanted]
    # What expands for the sake of a later turn need not where it ends before that: the same replies in one example.
    assert _taught([row for _, row in found.pairs]) == _taught(wanted)
    assert found.dropped == (None if wanted else TOO_LONG)
    assert all(verify(renderer, of, row) == {} for of, row in found.pairs)


def test_a_control_token_of_a_content_stays_text_where_every_word_is_marked() -> None:
    """Where the template cuts thoughts off, tags are left for it to see; strings of control tokens are no tags."""
    renderer = renderer_of("strips thoughts")
    row = parse_row(
        [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(("a", "<think>hm</think>b", "say <|im_end|>", "c"))
        ],
        "t:1",
    )
    *_, last = renderer.render_rows(row)
    assert last.ids.tolist().count(renderer.special["<|im_end|>"]) == 4 and "say <|im_end|>" in last.text


@pytest.mark.parametrize("name", ["plain", "block in the last"])
def test_cutting_reads_little_more_than_what_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that the template writes, for a conversation of 100 turns and of 400."""
    renderer, written = renderer_of(name), []
    text = Template.text
    monkeypatch.setattr(Template, "text", lambda *a: written.append(len(found := text(*a))) or found)
    costs = []
    for n in (100, 400):
        messages = [{"role": r, "content": "tell me"} for _ in range(n) for r in ("user", "assistant")]
        written.clear()
        fitted = fit_to_length(parse_row(messages, "t:1"), renderer, 256, "cut")
        assert fitted.cut and fitted.pairs
        costs.append(sum(written))
    assert costs[1] < 1.2 * costs[0]


def test_a_beginning_of_one_reply_that_nothing_prompts_for_fits_too() -> None:
    messages = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    row = parse_row([*messages, {"role": "assistant", "content": "x" * 90}], "t:1")
    [(kept, rendered)] = fit_to_length(row, renderer_of("plain"), 32, "cut").pairs
    assert len(kept.messages) == 1 and len(rendered.ids) <= 32


def test_one_long_exchange_is_cut_by_tokens_where_asked() -> None:
    """Its reply's beginning is taught and has no end; with nothing of a reply within the length, it is dropped."""
    renderer = renderer_of("plain")
    long, late = (
        parse_row([{"role": "user", "content": q}, {"role": "assistant", "content": a}], "t:1")
        for q, a in (("a", "tell me " * 40), ("tell me " * 40, "b"))
    )
    assert fit_to_length(long, renderer, 32, "cut").dropped == TOO_LONG
    fitted = fit_to_length(long, renderer, 32, "cut_tokens")
    [(_, whole)] = fitted.pairs
    assert fitted.cut and verify(renderer, long, whole) == {}
    block = render_block(renderer, Job(renderer.spec, "t", 32, "cut_tokens", "stop"), [(1, long)], -1)
    assert block.error is None and block.ids.tolist() == whole.ids[:32].tolist()
    assert block.mask.tolist() == whole.mask[:32].tolist() and block.mask[-1] == 1
    assert not np.isin(block.ids[block.mask == 1], renderer.stop_ids()).any()
    assert fit_to_length(late, renderer, 32, "cut_tokens").dropped == TOO_LONG
    short = parse_row([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "t:1")
    assert not fit_to_length(short, renderer, 32, "cut_tokens").cut
