"""A saved checkpoint's tokenizer is the one it was trained with, whatever transformers leaves out on saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.outside import each, tokenizer_names
from sftflow import checkpoint

TEXTS = ["Hello world", "\n\n1. one\n\n20 two", " two", "a<s>b", "x\n y", "</s> and on", "naïve 東京"]


@pytest.mark.parametrize("name", [*tokenizer_names("llama2", "llama3_1", "qwen3"), "own_smollm2"])
def test_saved_and_loaded(tmp_path: Path, known_tokenizers: dict[str, Path], name: str) -> None:
    saved_and_loaded(tmp_path, known_tokenizers[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", each(["hf_llama2", "hf_llama3_1", "hf_qwen3"]))
def test_whole_ones_are_saved_and_loaded(tmp_path: Path, whole_tokenizers: dict[str, Path], name: str) -> None:
    saved_and_loaded(tmp_path, whole_tokenizers[name])


def saved_and_loaded(tmp_path: Path, directory: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for file in directory.iterdir():  # as it came, not as transformers saves it
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    base = checkpoint.load_assistant(str(tmp_path / "base"))
    checkpoint.save(tmp_path / "sft", base.model, base.tokenizer, base.renderer, dtype=torch.float32, meta={})
    sft = checkpoint.load_assistant(str(tmp_path / "sft"))  # raises where the fingerprint differs
    file, plain = (
        Tokenizer.from_file(str(directory / "tokenizer.json")),
        AutoTokenizer.from_pretrained(tmp_path / "sft"),
    )
    for text in TEXTS:
        wanted = file.encode(text).ids
        assert sft.tokenizer(text).input_ids == base.tokenizer(text).input_ids == plain(text).input_ids == wanted
