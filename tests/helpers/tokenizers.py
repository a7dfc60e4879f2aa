"""Tokenizers of the kinds that well-known models have, trained here on a few sentences: some 500 entries.

As files, with the published ones' normaliser, pre-tokenizer, byte handling, special tokens and configuration:

    llama2      sentencepiece's layout: a space before every text, <0xE6> for bytes without a character, adds <s>
    llama3_1    byte-level, numbers in groups of three, header tokens, adds <|begin_of_text|>
    qwen3       byte-level behind NFC, one digit at a time, no beginning token, tags that are added but not special
    smollm2     byte-level, split as GPT-2 does between digits that stand alone, read by a class that does not do that

As objects, with the control tokens that a test asks for: `byte_level`, which splits text as GPT-2 does, and
`sentencepiece`, Llama 2's without its own beginning.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from helpers.tiny import TEXT

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = [*TEXT, "Héllo, où est-ce? Ça va.", "<think> a plan </think> [INST] what? [/INST] \n\n### assistant: user"]
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def _begins_with(token: str, number: int) -> Any:
    return processors.TemplateProcessing(single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1",
                                         special_tokens=[(token, number)])  # fmt: skip


def llama2() -> tuple[Tokenizer, dict[str, Any]]:
    specials = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=True)  # for training alone: no entry spans two words
    pieces = [*specials, *(f"<0x{b:02X}>" for b in range(256))]
    backend.train_from_iterator(SENTENCES, BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False))
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = raw["added_tokens"][: len(specials)]  # the bytes are ordinary entries
    raw["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(raw))
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    backend.post_processor = _begins_with("<s>", 1)
    return backend, {
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None, "sp_model_kwargs": {},
    }  # fmt: skip


def _over_bytes(pre_tokenizer: Any, more: tuple[str, ...] = (), **options: Any) -> Tokenizer:
    backend = Tokenizer(BPE(**options))
    backend.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*SENTENCES, *more], trainer)
    backend.decoder = decoders.ByteLevel()
    return backend


def _splitting(number: str) -> Any:
    split = pre_tokenizers.Split(Regex(SPLIT.replace("NUMBER", number)), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def llama3_1() -> tuple[Tokenizer, dict[str, Any]]:
    backend = _over_bytes(_splitting("{1,3}"), ignore_merges=True)
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag")
    backend.add_special_tokens([f"<|{name}|>" for name in names])
    first = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _begins_with("<|begin_of_text|>", first)]
    )
    return backend, {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True, "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip


def qwen3() -> tuple[Tokenizer, dict[str, Any]]:
    backend = _over_bytes(_splitting(""))
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False, use_regex=False)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return backend, {
        "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace",
    }  # fmt: skip


def smollm2() -> tuple[Tokenizer, dict[str, Any]]:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    backend = _over_bytes(split, ("A list:\n\n1. one\n\n2. two\n\n    10 of 20\n\n\n3" * 9,))
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return backend, {
        "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "vocab_size": 49152,
    }  # fmt: skip


KINDS: dict[str, Callable[[], tuple[Tokenizer, dict[str, Any]]]] = {
    "llama2": llama2,
    "llama3_1": llama3_1,
    "qwen3": qwen3,
    "smollm2": smollm2,
}


def write_tokenizer(kind: str, directory: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json as a hub directory has them, not as transformers saves them."""
    backend, config = KINDS[kind]()
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = backend.get_added_tokens_decoder()
    decoder = {str(i): {key: getattr(token, key) for key in keys} for i, token in added.items()}
    config |= {"added_tokens_decoder": decoder, "model_max_length": 2048}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return directory


def byte_level(bos: str = "<s>", eos: str = "</s>", special: tuple[str, ...] = (), plain: tuple[str, ...] = ()) -> Any:
    """Its fast way through our encoder is the one of remembered words. plain: added tokens that are not special."""
    return _open(_gpt2(), bos, eos, special, plain)


def sentencepiece(
    bos: str = "<s>", eos: str = "</s>", special: tuple[str, ...] = (), plain: tuple[str, ...] = ()
) -> Any:
    """Writes a blank before the first word of whatever it is given, and bytes for what it does not know."""
    return _open(_bare_llama2(), bos, eos, special, plain)


WITH_TOKENS = {"byte-level": byte_level, "sentencepiece": sentencepiece}


@functools.cache
def _gpt2() -> str:
    return str(_over_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str())


@functools.cache
def _bare_llama2() -> str:
    return json.dumps(json.loads(llama2()[0].to_str()) | {"post_processor": None})


def _open(text: str, bos: str, eos: str, special: tuple[str, ...], plain: tuple[str, ...]) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    if special:
        tokens = [AddedToken(t, normalized=False, special=True) for t in special if t not in (bos, eos)]
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in (*TAGS, *plain)])
    return tokenizer
