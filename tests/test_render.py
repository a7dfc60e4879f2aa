"""The mask is the product: exact ids, exact masks, and the invariants against transformers' own rendering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.outside import each, outside
from helpers.tiny import make_renderer
from sftflow.chat.calculator_parts import flatten_python
from sftflow.chat.format import ChatFormat
from sftflow.chat.render import Renderer
from sftflow.chat.schema import Conversation, Message, Part, parse_row, text_message
from sftflow.foundation.errors import FormatError, MaskError

TEXTS = st.text(
    st.one_of(
        st.characters(codec="utf-8", exclude_categories=("Cs",)),
        st.sampled_from(list(" \n\t<|>é😀ב")),
    ),
    max_size=30,
)
LOOK_ALIKES = st.sampled_from(["<|assistant_end|>", "<|bos|>", "<|user_start|>", "<|im_end|>", "<think>", "</s>"])
CONTENT = st.lists(st.one_of(TEXTS, LOOK_ALIKES), min_size=1, max_size=3).map("".join)
CONTENT_TEXT = (
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
    .filter(lambda t: "<|" not in t)
    .map(lambda t: f"x{t}y")
)
LAYOUT = tuple(
    "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end".split()  # noqa: SIM905
)


def conversation(*turns: tuple[str, Any], **extra: Any) -> Conversation:
    return parse_row({"messages": [{"role": r, "content": c} for r, c in turns], **extra}, "t:1")


def shown(renderer: Renderer, rendered: Any) -> list[tuple[str, int]]:
    names = renderer.tokenizer.convert_ids_to_tokens(rendered.ids.tolist())
    return list(zip(names, rendered.mask.tolist(), strict=True))


def supervised_text(renderer: Renderer, rendered: Any) -> str:
    return str(renderer.tokenizer.decode(rendered.ids[rendered.mask == 1]))


def assert_parity(renderer: Renderer, row: Conversation) -> None:
    """prompt ids + supervised ids (and what the calculator wrote) = training ids, for the last turn."""
    full = renderer.render(row)
    last = max(i for i, m in enumerate(row.messages) if m.role == "assistant")
    prompt = renderer.render(row.before(last), add_generation_prompt=True)
    n = len(prompt.ids)
    assert full.ids[:n].tolist() == prompt.ids.tolist()
    tail_ids, tail_mask = full.ids[n:], full.mask[n:]
    ends = np.flatnonzero(tail_mask)
    assert (len(ends) and tail_mask[0] == 1) or row.messages[last].parts[0].kind == "python_output"
    assert tail_ids[ends[-1]] == renderer.special[renderer.end_token]


def test_worked_example(renderer: Renderer) -> None:
    """user 'hi', assistant 'yo'  ->  B U hi /U A yo /A, supervised: yo /A"""
    tokens = shown(renderer, renderer.render(conversation(("user", "x"), ("assistant", "y"))))
    assert tokens == [
        ("<|bos|>", 0),
        ("<|user_start|>", 0),
        ("x", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("y", 1),
        ("<|assistant_end|>", 1),
    ]


def test_calculator_output_is_not_supervised(renderer: Renderer) -> None:
    parts = [
        {"type": "python", "text": "4/2"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2"},
    ]
    tokens = shown(renderer, renderer.render(conversation(("user", "x"), ("assistant", parts))))
    assert tokens[5:] == [
        ("<|python_start|>", 1),
        ("4", 1),
        ("/", 1),
        ("2", 1),
        ("<|python_end|>", 1),
        ("<|output_start|>", 0),
        ("2", 0),
        ("<|output_end|>", 0),
        ("2", 1),
        ("<|assistant_end|>", 1),
    ]


PARTS = st.lists(st.tuples(st.sampled_from(["text", "python", "python_output"]), CONTENT_TEXT), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(CONTENT_TEXT, PARTS), min_size=1, max_size=3), system=st.none() | CONTENT_TEXT)
def test_the_layout_position_by_position(
    tokenizer_dir: Path, turns: list[tuple[str, list[tuple[str, str]]]], system: str | None
) -> None:
    """<bos> then, for each exchange, <user_start> text <user_end> <assistant_start> parts <assistant_end>: a call is
    <python_start> ... <python_end>, supervised; its result is <output_start> ... <output_end>, not."""
    renderer = _cached(tokenizer_dir, "sftflow")
    control = {name: renderer.special[f"<|{name}|>"] for name in LAYOUT}

    def text(value: str) -> list[int]:
        ids: list[int] = renderer.tokenizer(value, add_special_tokens=False).input_ids
        return ids

    ids, mask = [control["bos"]], [0]

    def put(more: list[int], supervised: int) -> None:
        ids.extend(more)
        mask.extend([supervised] * len(more))

    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for number, (ask, parts) in enumerate(turns):
        messages.append({"role": "user", "content": ask})
        messages.append({"role": "assistant", "content": [{"type": kind, "text": t} for kind, t in parts]})
        asked = f"{system}\n\n{ask}" if system and number == 0 else ask
        put([control["user_start"], *text(asked), control["user_end"], control["assistant_start"]], 0)
        joined: list[tuple[str, str]] = []  # neighbouring text parts are one text
        for kind, t in parts:
            if kind == "text" and joined and joined[-1][0] == "text":
                joined[-1] = ("text", joined[-1][1] + t)
            else:
                joined.append((kind, t))
        for kind, t in joined:
            if kind == "python":
                put([control["python_start"], *text(t), control["python_end"]], 1)
            elif kind == "python_output":
                put([control["output_start"], *text(t), control["output_end"]], 0)
            else:
                put(text(t), 1)
        put([control["assistant_end"]], 1)
    rendered = renderer.render(parse_row(messages, "t:1"))
    assert rendered.ids.tolist() == ids
    assert rendered.mask.tolist() == mask


def test_weight_zero_leaves_the_loss(renderer: Renderer) -> None:
    row = parse_row(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "first", "weight": 0},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "second"},
        ],
        "t:1",
    )
    assert supervised_text(renderer, renderer.render(row)) == "second<|assistant_end|>"


def test_system_is_merged_into_the_first_user_turn(renderer: Renderer) -> None:
    rendered = renderer.render(conversation(("system", "be kind"), ("user", "hi"), ("assistant", "yo")))
    assert rendered.text.startswith("<|bos|><|user_start|>be kind\n\nhi<|user_end|>")


def test_two_user_turns_are_refused_by_name(renderer: Renderer, tokenizer_dir: Path) -> None:
    row = conversation(("user", "a"), ("user", "b"), ("assistant", "c"))
    with pytest.raises(FormatError, match="two user turns in a row"):
        renderer.render(row)
    assert make_renderer(tokenizer_dir, "chatml").render(row).n_supervised > 0  # ChatML takes them


ROWS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3)


def _row(pairs: list[tuple[str, str]]) -> Conversation:
    messages: list[Message] = []
    for user, assistant in pairs:
        messages += [text_message("user", user), text_message("assistant", assistant)]
    return Conversation(tuple(messages), source="h:1")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=ROWS)
@pytest.mark.parametrize("name", ["sftflow", "chatml"])
def test_invariants_hold_for_any_content(tokenizer_dir: Path, name: str, pairs: list[tuple[str, str]]) -> None:
    renderer = _cached(tokenizer_dir, name)
    row = _row(pairs)
    if any(c in t for p in pairs for t in p for c in ("\uf8f0", "\uf8f1")):
        return  # the marks themselves: refused, tested below
    rendered = renderer.render(row)
    end = renderer.special[renderer.end_token]
    # exactly one supervised end token per turn, and no control id from content
    assert int((rendered.ids[rendered.mask == 1] == end).sum()) == len(pairs)
    per_turn = {"sftflow": 4, "chatml": 4}[name]
    n_special = sum(int(i) in renderer.special.values() for i in rendered.ids)
    assert n_special == per_turn * len(pairs) + (name == "sftflow")
    # the supervised text is the replies, to the letter
    assert supervised_text(renderer, rendered) == "".join(a + renderer.end_token for _, a in pairs)
    assert_parity(renderer, row)
    # without look-alikes the ids are transformers' own
    if not any(s in t for p in pairs for t in p for s in renderer.special):
        messages = [{"role": m.role, "content": m.text} for m in row.messages]
        expected = renderer.tokenizer.apply_chat_template(messages, return_dict=False)
        if rendered.boundary_splits == 0:
            assert rendered.ids.tolist() == expected
        else:
            assert renderer.tokenizer.decode(rendered.ids) == renderer.tokenizer.decode(expected)


_renderers: dict[tuple[Path, str], Renderer] = {}


def _cached(directory: Path, name: str) -> Renderer:
    key = (directory, name)
    if key not in _renderers:
        _renderers[key] = make_renderer(directory, name)
    return _renderers[key]


def test_boundary_straddle_is_split_and_counted(tokenizer_dir: Path) -> None:
    """ChatML's prompt ends in a line end: a reply that begins with one would share its token."""
    renderer = _cached(tokenizer_dir, "chatml")
    row = conversation(("user", "x"), ("assistant", "\n\ny"))
    assert_parity(renderer, row)
    assert supervised_text(renderer, renderer.render(row)) == "\n\ny<|im_end|>"


def test_flattened_calculator() -> None:
    def flat(*parts: tuple[str, str]) -> str:
        return flatten_python([Part(k, t) for k, t in parts])[0].text  # type: ignore[arg-type]

    call, result = ("python", "48/2"), ("python_output", "24")
    assert flat(("text", "It is "), call, result, ("text", " clips")) == "It is 48/2=24 clips"
    assert flat(("text", "sold 48 / 2 = "), call, result, ("text", "24 clips")) == "sold 48/2=24 clips"
    assert flat(("text", "costs 48/2 = $"), call, result, ("text", "24.")) == "costs $48/2=24."
    assert flat(("text", "148/2 = "), call, result, ("text", "245")) == "148/2 = 48/2=24245"


def test_flattened_calculator_is_supervised(tokenizer_dir: Path) -> None:
    renderer = _cached(tokenizer_dir, "chatml")
    parts = [{"type": "python", "text": "48/2"}, {"type": "python_output", "text": "24"}]
    rendered = renderer.render(conversation(("user", "x"), ("assistant", parts)))
    assert supervised_text(renderer, rendered) == "48/2=24<|im_end|>"


def test_a_vanishing_content_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "forgets.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    from transformers import AutoTokenizer

    from sftflow.chat.format import choose_format

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    renderer = Renderer(tokenizer, choose_format(str(path), tokenizer))
    assert renderer.render(conversation(("user", "x"), ("assistant", "y"))).n_supervised == 2
    with pytest.raises(MaskError, match="leaves it out"):
        renderer.render(conversation(("system", "s"), ("user", "x"), ("assistant", "y")))


def test_a_format_without_end_of_turn_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "endless.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    renderer = make_renderer(tokenizer_dir, str(path))
    with pytest.raises(MaskError, match="end-of-turn"):
        renderer.render(conversation(("user", "x"), ("assistant", "y")))


PLAIN = conversation(("user", "hi there"), ("assistant", "Hello 12 you"), ("user", "Bye 😀"), ("assistant", "x"))
SOUND = {  # template -> the tokenizer that has its tokens
    "llamacpp/Qwen-Qwen2.5-7B-Instruct.jinja": "hf_qwen3",
    "llamacpp/Qwen-Qwen3-0.6B.jinja": "hf_qwen3",
    "llamacpp/meta-llama-Llama-3.1-8B-Instruct.jinja": "hf_llama3_1",
    "llamacpp/meta-llama-Llama-3.2-3B-Instruct.jinja": "hf_llama3_1",
    "llamacpp/HuggingFaceTB-SmolLM3-3B.jinja": "hf_qwen3",
    "chujiezheng/llama-2-chat.jinja": "hf_llama2",
    "chujiezheng/vicuna.jinja": "hf_llama2",
    "chujiezheng/mistral-instruct.jinja": "hf_llama2",
    "chujiezheng/llama-3-instruct.jinja": "hf_llama3_1",
    "chujiezheng/chatml.jinja": "hf_qwen3",
    "chujiezheng/zephyr.jinja": "hf_llama2",
}


@pytest.mark.parametrize("template", each(sorted(SOUND)))
def test_real_templates_render_as_transformers_does(template: str, known_tokenizers: dict[str, Path]) -> None:
    path = outside("fixtures", "chat_templates", *template.split("/"))
    renderer = make_renderer(known_tokenizers[SOUND[template]], str(path))
    rows = renderer.render_rows(PLAIN)
    for rendered, turn in zip(rows, (4,) if len(rows) == 1 else (2, 4), strict=True):
        messages = [{"role": m.role, "content": m.text} for m in PLAIN.messages[:turn]]
        if "strftime_now" in renderer.format.template:  # transformers' own clock cannot be frozen from outside
            expected = renderer.tokenizer.encode(rendered.text, add_special_tokens=False)
        else:
            expected = renderer.tokenizer.apply_chat_template(
                messages, chat_template=renderer.format.template, return_dict=False
            )
        assert rendered.ids.tolist() == expected
        text = supervised_text(renderer, rendered)
        squeezed = "".join(text.split())
        assert squeezed.endswith("".join(f"{messages[-1]['content']}{renderer.end_token}".split()))
        assert "hi there" not in text and "Bye" not in text


def test_tool_calls_of_a_real_template_are_supervised(known_tokenizers: dict[str, Path]) -> None:
    path = outside("fixtures", "chat_templates", "llamacpp", "Qwen-Qwen2.5-7B-Instruct.jinja")
    renderer = make_renderer(known_tokenizers["hf_qwen3"], str(path))
    call = {"type": "function", "function": {"name": "get_w", "arguments": '{"city": "Rome"}'}}
    row = parse_row(
        {
            "messages": [
                {"role": "user", "content": "w?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "sun"},
                {"role": "assistant", "content": "It is sunny"},
            ],
            "tools": [{"type": "function", "function": {"name": "get_w", "parameters": {}}}],
        },
        "t:1",
    )
    (rendered,) = renderer.render_rows(row)
    text = supervised_text(renderer, rendered)
    assert '{"name": "get_w", "arguments": {"city": "Rome"}}' in text
    assert text.count("<|im_end|>") == 2 and "sun</tool_response>" not in text and "It is sunny" in text


def test_a_reply_that_merges_with_the_line_before_it_gets_no_space() -> None:
    """A tokenizer that writes a space before every text, and has tokens that begin with the end of a line."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<|end|>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "\n", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {token: i for i, token in enumerate([*letters, "\ni", "\nit"])}
    merges = [("\n", "i"), ("\ni", "t")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<|end|>"])
    template = "{% for m in messages %}{{ m.role + '\n' + m.content + '<|end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    renderer = Renderer(tokenizer, ChatFormat(name="own", template=template))
    rendered = renderer.render(conversation(("user", "hi"), ("assistant", "it is")))
    assert rendered.boundary_splits == 1
    assert renderer.decode(rendered.ids[rendered.mask == 1].tolist()) == "it is<|end|>"
