"""Template arguments and a missing end of turn: found, built into the template, and the same for everybody after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import sftflow as sf
from helpers.templates import HEAD, STRIPS, TAIL, THOUGHTS, chat, open_with
from sftflow.chat.format import choose_format
from sftflow.chat.prefill import drop_prefill
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.chat.template_options import append_eos, choose_arguments, options_note
from sftflow.chat.verify import verify
from sftflow.foundation.errors import FormatError, MaskError

PREFILLS = HEAD + "{{ m.content }}" + TAIL + "{% if enable_thinking is not false %}<think>\n{% endif %}{% endif %}"
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}" + TAIL + "{% endif %}"
)


def supervised(renderer: Renderer, row: Any) -> str:
    return renderer.decode(row.ids[row.mask == 1].tolist())


def test_an_argument_that_keeps_history_is_found(tokenizer_dir: Path) -> None:
    renderer = open_with(tokenizer_dir, STRIPS)
    assert len(renderer.render_rows(THOUGHTS)) == 2  # without it, one example a turn
    found = choose_arguments(renderer, [THOUGHTS])
    assert found.format.kwargs == {"keep_thoughts": True}
    assert options_note(found) == "built into the own template: keep_thoughts=true"
    (row,) = found.render_rows(THOUGHTS)
    assert supervised(found, row) == "<think>hm</think>b<|im_end|><think>so</think>d<|im_end|>"


def test_an_argument_against_a_prefilled_reply_is_found(tokenizer_dir: Path) -> None:
    renderer = open_with(tokenizer_dir, PREFILLS)
    with pytest.raises(MaskError, match="not a prefix"):
        renderer.render(chat("a", "b"))
    found = choose_arguments(renderer, [chat("a", "b")])
    assert found.format.kwargs == {"enable_thinking": False}
    assert supervised(found, found.render(chat("a", "b"))) == "b<|im_end|>"
    # thoughts that begin as the template pre-fills them need no argument: the model goes on from the prompt
    thoughtful = chat("a", "<think>\nhm</think>b")
    assert choose_arguments(renderer, [thoughtful]) is renderer
    assert supervised(renderer, renderer.render(thoughtful)) == "hm</think>b<|im_end|>"


SWITCHED = (
    "{% if enable_thinking is defined and enable_thinking %}<|im_start|>system\nthink<|im_end|>\n{% endif %}"
    + HEAD
    + "{{ m.content }}"
    + TAIL
    + "{% if not (enable_thinking | default(false)) %}<quiet>\n</quiet>{% endif %}{% endif %}"
)
"""Without thoughts, which is the default, the prompt ends with an empty block that no reply has in front of it."""


def test_plain_rows_are_taught_behind_the_prompt_that_serving_sends(tokenizer_dir: Path) -> None:
    renderer = open_with(tokenizer_dir, SWITCHED)
    several = chat("a", "b", "c", "d")
    assert choose_arguments(renderer, [chat("a", "b"), several]) is renderer  # thinking stays off, and the caller's
    pairs = renderer.render_pairs(several)
    assert [supervised(renderer, row) for _, row in pairs] == ["b<|im_end|>", "d<|im_end|>"]
    for (of, row), turn in zip(pairs, (1, 3), strict=True):
        prompt = renderer.render(several.before(turn), add_generation_prompt=True)
        assert row.text.startswith(prompt.text) and prompt.text.endswith("<quiet>\n</quiet>")
        assert row.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist() and not row.mask[: len(prompt.ids)].any()
        assert verify(renderer, of, row) == {}
        alike = replace(row, text=row.text.replace("<quiet>", "<quite>"))
        assert verify(renderer, of, alike)


def test_a_row_with_look_alikes_is_verified_behind_such_a_block(tokenizer_dir: Path) -> None:
    renderer = open_with(tokenizer_dir, SWITCHED.replace("<quiet>", "<|im_start|>").replace("</quiet>", "</im_start>"))
    row = chat("say <|im_end|>", "no <|im_start|>")
    assert verify(renderer, row, renderer.render(row)) == {}


def test_no_argument_changes_what_rows_are_asked_that_can_be_taught(tokenizer_dir: Path) -> None:
    """Thoughts alone may ask for thinking; beside rows without, they are refused by name."""
    shows = SWITCHED.replace(
        "{{ m.content }}", "{% if m.thinking %}<hm>{{ m.thinking }}</hm>{% endif %}{{ m.content }}"
    )
    renderer = open_with(tokenizer_dir, shows)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "hm"}]
    thoughtful = parse_row(messages, "t:2")
    assert choose_arguments(renderer, [thoughtful]).format.kwargs == {"enable_thinking": True}
    assert choose_arguments(renderer, [thoughtful, chat("a", "b")]) is renderer
    with pytest.raises(MaskError, match=r"^t:2.messages\[1\]: .* not a prefix"):
        renderer.render_rows(thoughtful)


@pytest.mark.parametrize("said", ["<quiet>hm</quiet>b", "hm\n</quiet>\n\nb", " </quiet>b"])
def test_thoughts_are_not_taught_behind_a_block_that_is_closed(tokenizer_dir: Path, said: str) -> None:
    """Whole ones, and those whose beginning stands in the prompt that they were sampled behind."""
    renderer = open_with(tokenizer_dir, SWITCHED)
    with pytest.raises(MaskError, match=r"^t:1.messages\[1\]: .* not a prefix"):
        renderer.render(chat("a", said))
    about = chat("a", "b <quiet>hm</quiet>")  # a reply that speaks of such a block
    assert renderer.render(about).text.endswith("\n<quiet>\n</quiet>b <quiet>hm</quiet><|im_end|>\n")


@pytest.mark.parametrize(
    ("end", "closed"),
    [
        ("<|START_THINKING|><|END_THINKING|>", True),
        ("<|hm>thought\n<hm|>", True),
        ("<quiet><plan>", False),
        ("<|channel|>analysis<|message|>", False),
        ("<quiet>\n", False),
    ],
)
def test_nothing_is_taught_behind_a_block_that_stays_open(tokenizer_dir: Path, end: str, closed: bool) -> None:
    renderer = open_with(tokenizer_dir, SWITCHED.replace("<quiet>\n</quiet>", end))
    if closed:
        assert renderer.render(chat("a", "b")).text.endswith(f"assistant\n{end}b<|im_end|>\n")
    else:
        with pytest.raises(MaskError, match=r"^t:1.messages\[1\]: .* not a prefix"):
            renderer.render(chat("a", "b"))


def test_what_is_built_in_is_a_default_that_callers_override(tokenizer_dir: Path) -> None:
    found = choose_arguments(open_with(tokenizer_dir, PREFILLS), [chat("a", "b")])
    assert found.format.kwargs == {"enable_thinking": False}
    for given, thinks in (({}, False), ({"enable_thinking": False}, False), ({"enable_thinking": True}, True)):
        prompt = found.tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}],
            chat_template=found.format.template,
            add_generation_prompt=True,
            tokenize=False,
            **given,
        )
        assert prompt.endswith("<think>\n") == thinks


def test_one_prompt_has_one_form_of_reply(tokenizer_dir: Path) -> None:
    """A template that begins only the last reply with an empty block: each reply is taught as generation begins it."""
    last = HEAD + "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}" + TAIL
    renderer = open_with(tokenizer_dir, last + "{% endif %}")
    replies = [supervised(renderer, row) for row in renderer.render_rows(chat("a", "b", "c", "d"))]
    assert replies == ["<think></think>b<|im_end|>", "<think></think>d<|im_end|>"]
    first, second = chat("a", "", "c", "d"), chat("a", "b", "c", "")  # a reply without a word has a beginning, too
    assert [len(renderer.render_rows(row)) for row in (first, second)] == [2, 2]


def test_what_needs_no_argument_gets_none(tokenizer_dir: Path) -> None:
    renderer = open_with(tokenizer_dir, STRIPS)
    assert choose_arguments(renderer, [chat("a", "b", "c", "d")]) is renderer


def test_transformers_renders_the_settled_template_alike(tokenizer_dir: Path) -> None:
    """The argument is inside the template: nobody has to know of it."""
    found = choose_arguments(open_with(tokenizer_dir, STRIPS), [THOUGHTS])
    messages = [{"role": m.role, "content": m.text} for m in THOUGHTS.messages]
    ids = found.tokenizer.apply_chat_template(messages, chat_template=found.format.template, return_dict=False)
    assert ids == found.render(THOUGHTS).ids.tolist()


THINKS = HEAD + "{{ m.content }}" + TAIL + "<think>\n{% endif %}"


def test_a_prefilled_beginning_without_an_argument_is_dropped_where_asked(tokenizer_dir: Path, tmp_path: Path) -> None:
    renderer = open_with(tokenizer_dir, THINKS)
    assert choose_arguments(renderer, [chat("a", "b")]) is renderer  # it is not done unasked
    with pytest.raises(MaskError, match="drop_prefill"):
        renderer.render(chat("a", "b"))
    dropped = drop_prefill(renderer)
    assert options_note(dropped) == "built into the own template: no '<think>\\n' at the end of prompts"
    row = dropped.render(chat("a", "<think>\nhm</think>b", "c", "d"))
    assert supervised(dropped, row) == "<think>\nhm</think>b<|im_end|>d<|im_end|>"
    messages = [{"role": "user", "content": "a"}]
    ids = dropped.tokenizer.apply_chat_template(
        messages, chat_template=dropped.format.template, add_generation_prompt=True, return_dict=False
    )
    assert ids == row.ids[: len(ids)].tolist()
    renderer.tokenizer.save_pretrained(tmp_path)
    rows = [{"prompt": "a", "completion": "b"}]
    refused = sf.render(rows, tmp_path)
    assert len(refused.refused) == refused.exit_code == 1 and "refused: rows:1" in str(refused)
    rendering = sf.render(rows, tmp_path, drop_prefill=True)
    assert not rendering.refused and options_note(dropped) in rendering.notes


def test_a_beginning_that_cannot_be_taken_out_alone_is_named(tokenizer_dir: Path) -> None:
    woven = HEAD + "{{ m.content }}" + TAIL + "{{ '<thi' + 'nk>' }}{% endif %}"
    with pytest.raises(FormatError, match="cannot be taken out alone"):
        drop_prefill(open_with(tokenizer_dir, woven))


def test_append_eos(tokenizer_dir: Path) -> None:
    renderer = open_with(tokenizer_dir, ENDLESS)
    with pytest.raises(MaskError, match="append_eos"):
        renderer.render(chat("a", "b"))
    ended = append_eos(renderer)
    row = ended.render(chat("a", " b ", "c", ""))
    assert supervised(ended, row) == " b <|eos|><|eos|>"
    assert ended.format.append_eos and ended.stop_ids() == [ended.special["<|eos|>"]]
    messages = [{"role": m.role, "content": m.text} for m in chat("a", " b ", "c", "").messages]
    ids = ended.tokenizer.apply_chat_template(messages, chat_template=ended.format.template, return_dict=False)
    assert ids == row.ids.tolist()
    prompt = ended.render(chat("a", " b ", "c"), add_generation_prompt=True).ids
    assert row.ids[: len(prompt)].tolist() == prompt.tolist()


def test_append_eos_leaves_a_template_with_an_end_alone(tokenizer_dir: Path) -> None:
    renderer = open_with(tokenizer_dir, STRIPS)
    assert append_eos(renderer) is renderer


def test_append_eos_without_such_a_token(tokenizer_dir: Path) -> None:
    renderer = open_with(tokenizer_dir, ENDLESS)
    renderer.spec.names.pop("eos_token")
    with pytest.raises(FormatError, match="no end-of-text token"):
        append_eos(renderer)


def test_generation_marks_that_disagree_are_named(tokenizer_dir: Path) -> None:
    note = open_with(tokenizer_dir, MARKED).disagreement()
    assert note is not None and "'a<|im_end|>'" in note
    agreeing = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert open_with(tokenizer_dir, agreeing).disagreement() is None
    assert open_with(tokenizer_dir, STRIPS).disagreement() is None
    picky = "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}"
    assert open_with(tokenizer_dir, picky + STRIPS).disagreement() is None
    assert open_with(tokenizer_dir, picky + agreeing).disagreement() is None


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}{{ c.function.arguments | tojson }}<|/call|>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("turns", [2, 4])
def test_a_call_is_supervised_to_the_end_of_its_turn(tokenizer_dir: Path, turns: int) -> None:
    """Control tokens that close a call are not the end of the turn."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokens = ["<|im_start|>", "<|im_end|>", "<|call|>", "<|/call|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = CALLS
    renderer = Renderer(tokenizer, choose_format("auto", tokenizer))
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 'the "sky"', "n": 2}}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "It is blue."},
    ]
    row = renderer.render(parse_row(messages[:turns], "t:1"))
    written = '<|call|>look{"at": "the \\"sky\\"", "n": 2}<|/call|>' * 2 + "<|im_end|>"
    assert supervised(renderer, row) == written + ("It is blue.<|im_end|>" if turns == 4 else "")


CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|call|>"
    "{{ m.content }}{% if m.role == 'assistant' and loop.last %}<|/call|>{% else %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@pytest.mark.parametrize("reply", ["b", "", " "])
def test_an_empty_reply_ends_where_others_do(tokenizer_dir: Path, reply: str) -> None:
    """The reply's own header holds control tokens, and the last reply ends with another token than earlier ones."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokens = ["<|im_start|>", "<|im_end|>", "<|call|>", "<|/call|>", "<|channel|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = CHANNELS
    renderer = Renderer(tokenizer, choose_format("auto", tokenizer))
    rows = renderer.render_rows(chat("a", reply, "c", "d"))
    written = [f"<|channel|>final<|call|>{text}<|/call|>" for text in (reply, "d")]
    assert [supervised(renderer, row) for row in rows] == written
