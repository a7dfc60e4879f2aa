"""Real chat templates x tokenizers x shapes of conversation: every row that is made must be right.

`python -m pytest tests/test_templates.py -s -q` prints the table; `-m slow` runs the whole product.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.judge import HEADER, TAGS, Line, control_tokens, judge, lengths_are_sure, owns
from helpers.outside import NOT_SET, each, outside, outside_files
from helpers.shapes import SHAPES
from sftflow.chat.format import choose_format
from sftflow.chat.render import Renderer

PATHS = outside_files("fixtures/chat_templates", "*/*.jinja")

# What each template closes an assistant's turn with, read from its source by hand: None where it writes nothing there.
EOS = "eos_token"
ENDS: dict[str, str | None] = {
    "alpaca": EOS,
    "amberchat": None,
    "chatml": "<|im_end|>",
    "chatqa": None,
    "falcon-instruct": None,
    "gemma-it": "<end_of_turn>",
    "granite-3.0-instruct": "<|end_of_text|>",
    "llama-2-chat": EOS,
    "llama-3-instruct": "<|eot_id|>",
    "mistral-instruct": EOS,
    "openchat-3.5": "<|end_of_turn|>",
    "phi-3": "<|end|>",
    "phi-3-small": "<|end|>",
    "qwen2.5-instruct": "<|im_end|>",
    "saiga": EOS,
    "solar-instruct": None,
    "vicuna": EOS,
    "zephyr": EOS,
    "GLM-4.6": None,
    "HuggingFaceTB-SmolLM3-3B": "<|im_end|>",
    "Kimi-K2-Instruct": "<|im_end|>",
    "LFM2.5-Instruct": "<|im_end|>",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "<|im_end|>",
    "Qwen-QwQ-32B": "<|im_end|>",
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "Qwen-Qwen3-0.6B": "<|im_end|>",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "<｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V3.1": "<｜end▁of▁sentence｜>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "ibm-granite-granite-3.3-2B-Instruct": "<|end_of_text|>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "meta-llama-Llama-3.2-3B-Instruct": "<|eot_id|>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "mistralai-Mistral-Nemo-Instruct-2407": EOS,
}

# bos and eos of the tokenizers that these templates were written for, where they are not <s> and </s>.
BOS_EOS = {
    "chatml": ("<s>", "<|im_end|>"),
    "llama-3-instruct": ("<|begin_of_text|>", "<|eot_id|>"),
    "meta-llama-Llama-3.1-8B-Instruct": ("<|begin_of_text|>", "<|eot_id|>"),
    "meta-llama-Llama-3.2-3B-Instruct": ("<|begin_of_text|>", "<|eot_id|>"),
    "google-gemma-2-2b-it": ("<bos>", "<eos>"),
    "LFM2.5-Instruct": ("<|startoftext|>", "<|im_end|>"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("<|begin_of_text|>", "<|im_end|>"),
    "Kimi-K2-Instruct": ("[BOS]", "<|im_end|>"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-ai-DeepSeek-V3.1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "microsoft-Phi-3.5-mini-instruct": ("<s>", "<|endoftext|>"),
}

# Enough for the everyday run where the tokenizer lacks the template's tokens, so that nearly every row is refused.
FEW = ("single", "turns", "system", "call", "reasoning", "lookalikes_user", "lookalikes_assistant", "repeated")


# GPT-2's first merges make a tokenizer of the same kind that loads and saves many times faster.
MERGES = 4000


def gpt2(*, bos: str = "<|endoftext|>", eos: str = "<|endoftext|>", special: tuple[str, ...] = ()) -> Any:
    """The GPT-2 tokenizer of the public files, cut to its first merges, with further special tokens."""
    from tokenizers import AddedToken
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = outside("fixtures", "tokenizers", "gpt2")
    encoder = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1 : MERGES + 1]
    vocab = {token: i for token, i in encoder.items() if i < 256 + MERGES}
    inner = ByteLevelBPETokenizer(vocab, [(a, b) for a, b in (line.split() for line in lines)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner._tokenizer, bos_token=bos, eos_token=eos, unk_token="<|endoftext|>"
    )
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer


@pytest.fixture(scope="session")
def own_tokenizers(known_tokenizers: dict[str, Path]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    published = {n: AutoTokenizer.from_pretrained(path) for n, path in known_tokenizers.items() if n.startswith("hf_")}
    return {"gpt2": gpt2(), **published}


def given_tokenizer(path: Path) -> Any:
    """GPT-2 with every control token of the template, so that each template is met where its tokens are owned."""
    template = path.read_text(encoding="utf-8")
    bos, eos = BOS_EOS.get(path.stem, ("<s>", "</s>"))
    return gpt2(bos=bos, eos=eos, special=control_tokens(template, gpt2(bos=bos, eos=eos)))


def stops_of(path: Path, tokenizer: Any) -> tuple[str, ...]:
    """What the template closes a reply with."""
    end = ENDS[path.stem]
    return (str(tokenizer.eos_token),) if end == EOS else (end,) if end else ()


def tokenizers_of(path: Path, own: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "given", given_tokenizer(path)
    yield from own.items()


@pytest.fixture(scope="module")
def table() -> Iterator[list[Line]]:
    """Collects the lines of all templates; printed at the end (pytest shows it with -s)."""
    lines: list[Line] = []
    yield lines
    if lines:
        print(f"\n{HEADER}")
        for line in lines:
            print(line)
        owned = [line for line in lines if line.owned]
        for label, part in (("all", lines), ("owned", owned)):
            right, forced = sum(x.right for x in part), sum(x.forced for x in part)
            avoidable, wrong = sum(x.open for x in part), sum(len(x.wrong) for x in part)
            declined = sum(x.declined for x in part)
            share = 100 * avoidable / max(1, right + wrong + avoidable)
            print(f"{label}: {right=} {declined=} {forced=} {avoidable=} ({share:.1f} %) {wrong=}")


@pytest.mark.parametrize("path", each(PATHS))
def test_every_row_is_right(path: Path, own_tokenizers: dict[str, Any], table: list[Line]) -> None:
    """No wrong row in any combination; all shapes where the tokenizer has the template's tokens, a few elsewhere."""
    wrong = []
    for name, tokenizer in tokenizers_of(path, own_tokenizers):
        stops = stops_of(path, tokenizer)
        owned = owns(path.read_text(encoding="utf-8"), tokenizer, stops)
        line = judge(path, name, tokenizer, stops, SHAPES if owned else {k: SHAPES[k] for k in FEW})
        table.append(line)
        wrong += line.wrong
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not PATHS, reason=NOT_SET)
def test_few_refusals(own_tokenizers: dict[str, Any], table: list[Line]) -> None:
    """Where tokens are owned, at most one in twenty of the conversations that a template can express is refused."""
    owned = [line for line in table if line.owned]
    if len({line.template for line in owned}) < len(PATHS):
        pytest.skip("needs the table of all templates: run the whole file")
    refused = sum(line.open for line in owned)
    accepted = refused + sum(line.right + len(line.wrong) for line in owned)
    avoidable = [s for line in owned for s in line.shapes if ": AVOIDABLE: " in s]
    assert refused <= 0.05 * accepted, f"{refused} of {accepted} refused:\n" + "\n".join(avoidable)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", each(PATHS))
def test_whole_product(path: Path, own_tokenizers: dict[str, Any]) -> None:
    """Every shape with every tokenizer, whether or not it has the template's tokens."""
    wrong = [
        problem
        for name, tokenizer in tokenizers_of(path, own_tokenizers)
        for problem in judge(path, name, tokenizer, stops_of(path, tokenizer), SHAPES).wrong
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", each(PATHS[::4]))
def test_a_prompt_is_never_shorter_than_is_surely_said(path: Path) -> None:
    tokenizer = given_tokenizer(path)
    checked = lengths_are_sure(Renderer(tokenizer, choose_format(str(path), tokenizer)))
    assert checked or not owns(path.read_text(encoding="utf-8"), tokenizer, stops_of(path, tokenizer))
