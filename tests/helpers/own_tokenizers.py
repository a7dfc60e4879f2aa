"""Two small tokenizers trained at test time, of the two kinds there are: byte-level BPE, as GPT-2's, and BPE over text
whose blanks are written as ▁, as Llama 2's. Control tokens are added as asked."""

from __future__ import annotations

import functools
import json
from typing import Any

from helpers.tiny import TEXT

# In the tokenizers that have these, they are added tokens but not special ones.
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def byte_level(bos: str = "<s>", eos: str = "</s>", special: tuple[str, ...] = ()) -> Any:
    """Splits text as GPT-2 does. Its fast way through our encoder is the one of remembered words."""
    return _open(_byte_level_json(), bos, eos, special)


def sentencepiece(bos: str = "<s>", eos: str = "</s>", special: tuple[str, ...] = ()) -> Any:
    """Writes a blank before the first word of whatever it is given, and bytes for what it does not know."""
    return _open(_sentencepiece_json(), bos, eos, special)


KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece}


def _open(text: str, bos: str, eos: str, special: tuple[str, ...]) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    if special:
        tokens = [AddedToken(t, normalized=False, special=True) for t in special if t not in (bos, eos)]
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer


@functools.cache
def _byte_level_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return str(tokenizer.to_str())


@functools.cache
def _sentencepiece_json() -> str:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learnt["merges"]]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return str(tokenizer.to_str())
