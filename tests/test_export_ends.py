"""Replies of an exported file end where llama.cpp ends them, and rounded types are held to their bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.bigrams import bigrams, write_checkpoint
from helpers.tokenizers import byte_level
from sftflow import checkpoint
from sftflow.chat.schema import parse_row
from sftflow.exporting import llamacpp, parity
from sftflow.exporting.llamacpp import LlamaCpp
from sftflow.exporting.parity_prompts import cases
from sftflow.exporting.to_gguf import export_gguf, plan_of
from sftflow.foundation.errors import CheckpointError
from sftflow.gguf import reader
from sftflow.gguf.ends import FILL_IN, NAMED
from sftflow.gguf.writer import write

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp: pip install xllamacpp")

TEMPLATE = (
    "{% for m in messages %}<|head|>{{ m.role }}: {{ m.content }}<|halt|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant:{% endif %}"
)
ASK = parse_row({"messages": [{"role": "user", "content": "?"}]}, "test")


def silent(_: str) -> None: ...


def saying(directory: Path, *reply: str, special: tuple[str, ...] = (), ends: tuple[str, ...] = ()) -> Path:
    """A checkpoint whose reply is these words and control tokens, the last on and on, whatever it is asked.

    special: control tokens besides.   ends: what generation_config.json names."""
    tokenizer = byte_level(bos="<|bos|>", eos="<|eot|>", special=("<|head|>", "<|halt|>", *special))
    tokenizer.chat_template = TEMPLATE
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in (":", *reply)]
    write_checkpoint(directory, bigrams(len(tokenizer), [i for word in ids for i in word]), tokenizer)
    named = [tokenizer.convert_tokens_to_ids(end) for end in ends]
    (directory / "generation_config.json").write_text(f'{{"eos_token_id": {named}}}')
    return directory


def text_of(name: Path) -> str:
    assistant = checkpoint.load_assistant(str(name))
    (reply,) = assistant.engine.generate([assistant.request(ASK, max_tokens=12)])
    return f"{reply.text} ({reply.finish_reason})"


HARMONY = ("<|return|>", "<|call|>")
VOCABULARIES = {
    "all names": tuple(sorted(NAMED - {*HARMONY, "<|tool_response>"})),
    "harmony": ("<|end|>", *HARMONY, "<|start|>"),
    "half of harmony": ("<|end|>", HARMONY[0]),
    "calls": ("<|end|>", "<|calls|>", "<|flush|>"),
    "tool response": ("</s>", "<|tool_response>"),
    "fill-in": tuple(names[0] for names in FILL_IN.values()),
    "other names": ("<fim_pad>", "<|repo_name|>", "<|user|>", "<|END|>", "<end>"),
    "two of one kind": ("<|fim_pad|>", "<fim_pad>"),
}


@pytest.mark.parametrize("which", VOCABULARIES)
def test_the_names_are_those_that_llama_cpp_knows(tmp_path: Path, which: str) -> None:
    """Of every control token, llama.cpp itself says whether a reply ends there."""
    base = saying(tmp_path / "base", "yes", "<|halt|>", special=VOCABULARIES[which])
    assistant = checkpoint.load_assistant(str(base))
    if which == "harmony":
        assert "<|end|>" in assistant.renderer.special
    write(plan_of(assistant, "f32"), tmp_path / "m.gguf")
    with LlamaCpp(tmp_path / "m.gguf", context=64) as engine:
        stops = [i for i in sorted(assistant.renderer.special.values()) if parity._ends_at(engine, i)]
    assert list(reader.read_ends(tmp_path / "m.gguf")) == stops
    assert set(assistant.renderer.stop_ids()) <= set(stops)


@pytest.mark.parametrize("end", ["<|eom_id|>", "<|file_sep|>", "</s>"])
def test_an_end_that_only_llama_cpp_has_ends_replies_of_the_file_here_too(tmp_path: Path, end: str) -> None:
    base = saying(tmp_path / "base", "yes", end, "no", special=(end,))
    found = export_gguf(str(base), tmp_path / "m.gguf", "f32", prompts=4, say=silent)
    assert found["passed"] and found["greedy_equal"] == 4, found["failures"]
    assert {len(row["tokens"]) for row in found["rows"]} == {len("yes") + 1}  # by bytes; the end is told, too
    assert any(end in note for note in found["notes"])
    assert len(found["llama_cpp_stop_ids"]) == len(found["stop_ids"]) + 1
    assert text_of(tmp_path / "m.gguf") == "yes (stop)"
    assert text_of(base).startswith("yesno")  # the checkpoint itself has no such end


def test_six_ends_of_other_names_all_end_replies(tmp_path: Path) -> None:
    ends = tuple(f"<|stop {i}|>" for i in range(4))
    for end in ends:
        base = saying(tmp_path / end, "yes", end, "no", special=ends, ends=ends)
        found = export_gguf(str(base), tmp_path / "m.gguf", "f32", prompts=1, say=silent)
        assert found["passed"] and len(found["stop_ids"]) == 6 and not found["notes"], found["failures"]
        assert text_of(base) == text_of(tmp_path / "m.gguf") == "yes (stop)"


@pytest.mark.parametrize(
    ("special", "ends"),
    [
        (tuple(f"<|stop {i}|>" for i in range(5)), tuple(f"<|stop {i}|>" for i in range(5))),
        (("<|end|>", "<|return|>", "<|call|>"), ("<|end|>",)),  # llama.cpp goes on there, where it has the other two
    ],
)
def test_ends_that_it_cannot_be_told_are_refused_before_writing(
    tmp_path: Path, special: tuple[str, ...], ends: tuple[str, ...]
) -> None:
    base = saying(tmp_path / "base", "yes", "<|halt|>", special=special, ends=ends)
    with pytest.raises(CheckpointError, match=r"llama.cpp would not stop at <\|.*take it out of eos_token_id"):
        export_gguf(str(base), tmp_path / "m.gguf", "f32", say=silent)
    assert not (tmp_path / "m.gguf").exists()


def test_five_ends_that_it_knows_need_no_field(tmp_path: Path) -> None:
    ends = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
    base = saying(tmp_path / "base", "yes", "<|halt|>", special=ends, ends=ends)
    found = export_gguf(str(base), tmp_path / "m.gguf", "f32", prompts=1, say=silent)
    assert found["passed"] and len(found["stop_ids"]) == 7


# ---- bounds


SLOWER = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("f16", "bf16")]


@pytest.mark.parametrize("kind", ["f32", "q8_0", *SLOWER])
def test_each_type_has_bounds_and_a_wrong_weight_breaks_them(tmp_path: Path, kind: str) -> None:
    """The file of a model with one matrix of another."""
    assistant = checkpoint.load_assistant("builtin:tiny")
    chosen = cases(assistant.renderer, 8, 200)
    plan = plan_of(assistant, kind)
    write(plan, tmp_path / "m.gguf")
    found = parity.certificate(tmp_path / "m.gguf", kind, assistant, chosen)
    assert found["passed"], found["failures"]
    assert found["bounds"]["difference"] >= 2 * found["largest_likely_difference"] > 0
    name = next(n for n in plan.weights if "down_proj" in n)
    plan.weights[name] = plan.weights[name].roll(1, 0)
    write(plan, tmp_path / "m.gguf")
    found = parity.certificate(tmp_path / "m.gguf", kind, assistant, chosen)
    assert not found["passed"] and {f["check"] for f in found["failures"]} <= {"logits", "greedy"}


def test_a_head_of_its_own_is_written_whatever_the_config_says(tmp_path: Path) -> None:
    """Tied by config.json, untied by the weights: llama.cpp and our own reader get the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_level(bos="<|bos|>", eos="<|eot|>", special=("<|head|>", "<|halt|>"))
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    write_checkpoint(tmp_path / "base", model, tokenizer)
    file = tmp_path / "base" / "config.json"
    file.write_text(file.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    found = export_gguf(str(tmp_path / "base"), tmp_path / "m.gguf", "f32", prompts=6, say=silent)
    assert found["passed"] and found["greedy_equal"] == 6, found["failures"][:2]
    again, _ = checkpoint.load_model(checkpoint.resolve(str(tmp_path / "m.gguf")))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and not again.config.tie_word_embeddings
    one = checkpoint.load_assistant(str(tmp_path / "base"))
    one.model.lm_head.weight = one.model.model.embed_tokens.weight  # and the reverse, in memory
    write(plan_of(one, "f32"), tmp_path / "tied.gguf")
    again, _ = checkpoint.load_model(checkpoint.resolve(str(tmp_path / "tied.gguf")))
    assert again.lm_head.weight is again.model.embed_tokens.weight and again.config.tie_word_embeddings


def test_what_a_file_says_of_sampling_is_what_its_checkpoint_said(tmp_path: Path) -> None:
    assistant = checkpoint.load_assistant(str(saying(tmp_path / "model", "Paris", "<|halt|>")))
    own = {"do_sample": True, "temperature": 0.25, "top_k": 7, "repetition_penalty": 1.5}
    for key, value in own.items():
        setattr(assistant.model.generation_config, key, value)
    write(plan_of(assistant, "f32"), tmp_path / "model.gguf")
    again = checkpoint.load_assistant(str(tmp_path / "model.gguf"))
    assert again.sampling == assistant.sampling
    assert (again.sampling["temperature"], again.sampling["top_k"]) == (0.25, 7)


def test_a_tensor_too_many_in_a_file_is_refused_by_name(tmp_path: Path) -> None:
    assistant = checkpoint.load_assistant(str(saying(tmp_path / "model", "Paris", "<|halt|>")))
    plan = plan_of(assistant, "f32")
    extra = {"model.layers.7.mlp.up_proj.weight": torch.ones(4, 32)}
    write(replace(plan, weights={**plan.weights, **extra}), tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"has no place for its tensor blk\.7\.ffn_up\.weight"):
        checkpoint.load_assistant(str(tmp_path / "model.gguf"))
