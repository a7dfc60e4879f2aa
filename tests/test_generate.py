"""The engine gives what transformers gives, whatever the batch; the calculator is bounded and exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sftflow.chat.schema import parse_row
from sftflow.foundation.calculator import calculate
from sftflow.foundation.errors import ContextError
from sftflow.generation.request import GenerationRequest


@pytest.fixture(scope="module")
def assistant(tiny_base: Path) -> Any:
    from sftflow.checkpoint import load_assistant

    loaded = load_assistant(str(tiny_base))
    with torch.no_grad():  # a random model's logits are nearly flat; make its choices clear
        for layer in loaded.model.model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
            layer.mlp.down_proj.weight.mul_(20)
    return loaded


def prompt(assistant: Any, text: str) -> tuple[int, ...]:
    row = parse_row([{"role": "user", "content": text}], "p")
    return tuple(int(i) for i in assistant.renderer.render(row, add_generation_prompt=True).ids)


PROMPTS = ["hi", "What is the answer to the question about the moon and the river?", "a cat", "1 2 3", "Hello!"]


def test_greedy_equals_transformers_and_the_batch_changes_nothing(assistant: Any) -> None:
    requests = [
        GenerationRequest(prompt_ids=prompt(assistant, p), max_new_tokens=20, stop_ids=frozenset(), use_python=False)
        for p in PROMPTS
    ]
    together = assistant.engine.generate(requests)
    for request, reply in zip(requests, together, strict=True):
        (alone,) = assistant.engine.generate([request])
        assert alone.ids == reply.ids
        ids = torch.tensor([request.prompt_ids])
        expected = assistant.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )[0, len(request.prompt_ids) :]
        assert reply.ids == tuple(expected.tolist())
        assert reply.finish_reason == "length" and reply.n_generated == 20


def test_stream_is_the_reply_in_pieces(assistant: Any) -> None:
    for seed in range(4):
        request = GenerationRequest(prompt_ids=prompt(assistant, "hi"), max_new_tokens=40, temperature=1.5, seed=seed)
        (reply,) = assistant.engine.generate([request])
        deltas = list(assistant.engine.stream(request))
        assert "".join(d.text for d in deltas) == reply.text
        assert deltas[-1].reply is not None and deltas[-1].reply.ids == reply.ids


def test_seed_decides_and_the_batch_does_not(assistant: Any) -> None:
    one = GenerationRequest(prompt_ids=prompt(assistant, "hi"), max_new_tokens=12, temperature=1.0, seed=1)
    two = GenerationRequest(prompt_ids=prompt(assistant, "hi"), max_new_tokens=12, temperature=1.0, seed=2)
    first, second = assistant.engine.generate([one, two])
    assert assistant.engine.generate([one])[0].ids == first.ids != second.ids


def test_calculator_runs_inside_the_reply(assistant: Any) -> None:
    """Force a call by hand: the engine writes output tokens right after the call ends."""
    from sftflow.generation.sequence import ReplySequence

    engine, renderer = assistant.engine, assistant.renderer
    start, end, out_start, out_end = renderer.python_ids()
    sequence = ReplySequence(GenerationRequest(prompt_ids=(1,)), engine.reply_decoder, 100)
    for token in (start, *renderer.encode_plain("48/2"), end):
        sequence.accept(token)
    assert list(sequence.forced) == [out_start, *renderer.encode_plain("24"), out_end]
    while sequence.forced:
        sequence.accept(sequence.forced.popleft())
    for token in renderer.encode_plain("24"):
        sequence.accept(token)
    sequence.accept(next(iter(engine.reply_decoder.stop)))
    reply = sequence.reply()
    assert [(p.kind, p.text) for p in reply.parts] == [("python", "48/2"), ("python_output", "24"), ("text", "24")]
    assert reply.text == "24" and reply.finish_reason == "stop"


def test_stop_text_ends_the_reply(assistant: Any) -> None:
    plain = GenerationRequest(prompt_ids=prompt(assistant, "hi"), max_new_tokens=30, stop_ids=frozenset())
    (whole,) = assistant.engine.generate([plain])
    stop = whole.text[3:6]
    stopped = GenerationRequest(
        prompt_ids=plain.prompt_ids, max_new_tokens=30, stop_ids=frozenset(), stop_texts=(stop,)
    )
    (reply,) = assistant.engine.generate([stopped])
    assert reply.finish_reason == "stop" and reply.text == whole.text[: whole.text.index(stop)]
    assert "".join(d.text for d in assistant.engine.stream(stopped)) == reply.text


def test_a_prompt_longer_than_the_context_is_refused(assistant: Any) -> None:
    with pytest.raises(ContextError, match="context of 256"):
        assistant.engine.generate([GenerationRequest(prompt_ids=tuple([5] * 300))])


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("48/2", "24"),
        ("7/2", "3.5"),
        ("2**10", "1024"),
        ("-(3+4)*2", "-14"),
        ("1,200+3", "1203"),
        ("0.1+0.2", "0.3"),
        ("'strawberry'.count('r')", "3"),
        ("10 % 3", "1"),
        ("1/0", None),
        ("9**9**9", None),
        ("__import__('os').system('true')", None),
        ("'a'*10**9", None),
        ("().__class__", None),
        ("open('x')", None),
        ("True+1", None),
        ("'ab'.upper()", None),
        ("1 if 1 else 2", None),
        ("(" * 300, None),
        ("", None),
    ],
)
def test_calculator(source: str, value: str | None) -> None:
    assert calculate(source) == value


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_calculator_never_raises(source: str) -> None:
    result = calculate(source)
    assert result is None or len(result) < 100


@given(st.integers(-999, 999), st.sampled_from("+-*"), st.integers(0, 999))
def test_calculator_is_arithmetic(a: int, op: str, b: int) -> None:
    assert calculate(f"{a}{op}{b}") == str({"+": a + b, "-": a - b, "*": a * b}[op])
