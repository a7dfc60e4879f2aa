"""tokenizer.json is the truth: whatever class the configuration names, text is split, normalised and decoded as the
file says, when a checkpoint is read, after it is saved, and in the processes that render."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from helpers.tokenizers import KINDS, write_tokenizer
from sftflow import checkpoint
from sftflow.chat.encode import encoder_of
from sftflow.chat.format import tokenizer_text
from sftflow.checkpoint.tokenizer import readable_config
from sftflow.exporting import llamacpp
from sftflow.exporting.to_gguf import export_gguf
from sftflow.foundation.errors import CheckpointError

CONTROL = ["<|end|>", "<|turn|>", "<|stop|>"]
TEXT = (
    "<|turn|>1. first\n\n2. second\n\n\n    37 apples, they're 1024 (in 1999)\n\n12\t5<|stop|>\n"
    "ΑΒΓ cafe\u0301 ①② ２０\n"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
NO_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, Any] = {
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "cl100k": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CL100K), "isolated"), NO_SPLIT]),
    "punctuation": pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTES]),
}
CLASSES = [
    ("llama", "GPT2Tokenizer"), ("starcoder2", "GPT2Tokenizer"), ("gpt2", "GPT2Tokenizer"), ("gpt2", None),
    ("exaone4", "GPT2Tokenizer"), ("opt", "GPT2Tokenizer"), ("granite", "GPT2TokenizerFast"),
    ("llama", "Qwen2Tokenizer"), ("qwen2", "Qwen2Tokenizer"), ("qwen2", "LlamaTokenizerFast"),
    ("qwen2", "PreTrainedTokenizerFast"), ("qwen3", "Qwen2Tokenizer"), ("qwen3", None), ("qwen2_moe", "Qwen2Tokenizer"),
    ("olmo", "GPTNeoXTokenizer"), ("gpt_neox", "GPTNeoXTokenizer"), ("gpt_neox", None), ("mamba", "GPTNeoXTokenizer"),
    ("stablelm", "GPTNeoXTokenizerFast"), ("phi", "CodeGenTokenizer"), ("cohere", "CohereTokenizerFast"),
    ("gemma", "GemmaTokenizer"), ("llama", "LlamaTokenizer"), ("mistral", "LlamaTokenizerFast"),
    ("llama", "CodeLlamaTokenizer"), ("llama", "PreTrainedTokenizerFast"), ("llama", None),
]  # fmt: skip


def backend(split: str) -> Tokenizer:
    out = Tokenizer(models.BPE())
    out.pre_tokenizer = SPLITS[split]
    out.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=CONTROL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    out.train_from_iterator([TEXT * 4, "one two 3 4 55 666. " * 9], trainer)
    return out


def directory_of(path: Path, tokenizer: Tokenizer, model_type: str, cls: str | None, **more: Any) -> Path:
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<|stop|>", "bos_token": "<|turn|>", "pad_token": "<|end|>", "unk_token": "<|end|>",
              "model_max_length": 96, "additional_special_tokens": ["<|turn|>"], **more}  # fmt: skip
    config |= {"tokenizer_class": cls} if cls else {}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return path


def loaded(path: Path) -> Any:
    return checkpoint.load_tokenizer(checkpoint.resolve(str(path)))


def ids(tokenizer: Any, text: str = TEXT) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_splits_as_the_file_says(tmp_path: Path, split: str) -> None:
    file = backend(split)
    wanted = file.encode(TEXT, add_special_tokens=False).ids
    for number, (model_type, cls) in enumerate(CLASSES):
        tokenizer = loaded(directory_of(tmp_path / str(number), file, model_type, cls))
        label = f"{model_type} {cls}"
        assert ids(tokenizer) == wanted, label
        assert encoder_of(tokenizer_text(tokenizer)).plain(TEXT) == wanted, label  # what rendering processes are sent
        assert tokenizer.decode(wanted) == TEXT, label
        assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("<|stop|>", "<|turn|>", "<|end|>")
        assert tokenizer.model_max_length == 96 and len(tokenizer) == file.get_vocab_size(), label


@pytest.mark.parametrize("cls", ["GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer"])
def test_normaliser_decoder_and_beginning_are_the_files_too(tmp_path: Path, cls: str) -> None:
    file = backend("digits")
    file.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    file.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    turn = file.token_to_id("<|turn|>")
    file.post_processor = processors.TemplateProcessing("<|turn|> $A", "<|turn|> $A $B", [("<|turn|>", turn)])
    tokenizer = loaded(directory_of(tmp_path / "m", file, "llama", cls))
    wanted = file.encode(TEXT).ids
    assert tokenizer(TEXT).input_ids == wanted and wanted[:2] == [turn, turn]
    assert tokenizer.decode(ids(tokenizer, " ＴＥＮ ①")) == "ten 1"


def test_sentencepiece_layouts(tmp_path: Path) -> None:
    """A class that builds Llama's own way of blanks: the file's is taken, whatever `legacy` and `add_prefix_space`."""
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    pieces |= {t: 259 + n for n, t in enumerate(["▁", "a", "b", "▁a", "▁▁", "\n"])}
    merges = [("▁", "a"), ("▁", "▁")]
    before = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = {
        "before every text": (before, None),
        "first": (None, pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)),
        "never": (normalizers.Replace(" ", "▁"), None),
    }
    for number, (name, (normalizer, split)) in enumerate(steps.items()):
        file = Tokenizer(models.BPE(vocab=pieces, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        file.normalizer, file.pre_tokenizer = normalizer, split
        file.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        file.add_special_tokens(["<unk>", "<s>", "</s>"])
        for legacy in (True, False, None):
            for prefix in (True, False, None):
                names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>",
                         "additional_special_tokens": [], "legacy": legacy, "add_prefix_space": prefix}  # fmt: skip
                path = tmp_path / f"{number} {legacy} {prefix}"
                tokenizer = loaded(directory_of(path, file, "llama", "LlamaTokenizer", **names))
                for text in ("a b", " a", "a<s>a b</s> a", "\na", "  é"):
                    wanted = file.encode(text, add_special_tokens=False).ids
                    assert ids(tokenizer, text) == wanted, (name, legacy, prefix, text)


def test_tokens_that_the_configuration_adds(tmp_path: Path) -> None:
    file = backend("digits")
    n = file.get_vocab_size()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {n: ("<new>", True), n + 1: ("<tag>", False)}
    decoder = {str(i): {"content": t, "special": special, **flags} for i, (t, special) in added.items()}
    path = directory_of(tmp_path / "m", file, "llama", "GPT2Tokenizer", added_tokens_decoder=decoder, pad_token="<pad>")
    tokenizer = loaded(path)
    assert ids(tokenizer, "a<new><tag><pad>")[1:] == [n, n + 1, n + 2] and len(tokenizer) == n + 3
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    assert special == {*CONTROL, "<new>", "<pad>"}
    assert ids(tokenizer) == file.encode(TEXT, add_special_tokens=False).ids


def test_what_a_class_calls_its_tokens_counts_where_the_file_has_them(tmp_path: Path) -> None:
    """GPT-2's own checkpoint names no end of text; transformers' class knows it."""
    from transformers import AutoTokenizer

    file = backend("digits")
    path = directory_of(tmp_path / "m", file, "gpt2", "GPT2Tokenizer")
    text = (path / "tokenizer.json").read_text(encoding="utf-8").replace("<|end|>", "<|endoftext|>")
    (path / "tokenizer.json").write_text(text, encoding="utf-8")
    (path / "tokenizer_config.json").write_text('{"model_max_length": 96}', encoding="utf-8")
    tokenizer, theirs = loaded(path), AutoTokenizer.from_pretrained(path)
    assert tokenizer.special_tokens_map == theirs.special_tokens_map
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    (path / "config.json").write_text('{"model_type": "cohere"}', encoding="utf-8")  # its class would add tokens
    assert len(loaded(path)) == file.get_vocab_size() < len(AutoTokenizer.from_pretrained(path))


def test_checkpoints_without_the_file(tmp_path: Path) -> None:
    """GPT-2's vocab.json and merges.txt: as transformers reads them."""
    from transformers import AutoTokenizer

    path = directory_of(tmp_path / "m", backend("digits"), "gpt2", "GPT2Tokenizer")
    model = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    (path / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    assert ids(loaded(path)) == ids(AutoTokenizer.from_pretrained(path))


SAVED = [("llama", "GPT2Tokenizer"), ("qwen3", "Qwen2Tokenizer"), ("gpt_neox", "GPTNeoXTokenizer"),
         ("phi", "CodeGenTokenizer"), ("mistral", "LlamaTokenizer")]  # fmt: skip


@pytest.mark.parametrize(("model_type", "cls"), SAVED)
def test_what_is_saved_is_read_alike_by_everyone(tmp_path: Path, model_type: str, cls: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = backend("digits")
    more = {"chat_template": "{% for m in messages %}<|turn|>{{ m.content }}<|stop|>{% endfor %}", "legacy": False}
    path = directory_of(tmp_path / "m", file, model_type, cls, add_prefix_space=False, **more)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, vocab_size=file.get_vocab_size(), **small)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    base = checkpoint.load_assistant(str(path))
    meta: dict[str, Any] = {}
    checkpoint.save(tmp_path / "sft", base.model, base.tokenizer, base.renderer, dtype=torch.float32, meta=meta)
    wanted = file.encode(TEXT, add_special_tokens=False).ids
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "sft")) == wanted
    assert ids(checkpoint.load_assistant(str(tmp_path / "sft")).tokenizer) == wanted
    saved = json.loads((tmp_path / "sft" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in saved
    assert saved["additional_special_tokens"] == ["<|turn|>"] and saved["model_max_length"] == 96
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]


def digits_and_blank_lines(n: int) -> list[str]:
    pieces = [
        "\n\n",
        "\n",
        "  ",
        " ",
        "\t",
        "1.",
        "20",
        " 345",
        "it's",
        " The",
        " cat",
        "(",
        "x=",
        "%",
        "é",
        "<|im_end|>",
    ]
    choose = random.Random(0)
    return ["".join(choose.choices(pieces, k=choose.randrange(1, 25))) for _ in range(n)]


@pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp: pip install xllamacpp")
def test_one_tokenizer_before_and_after_training_and_in_llama_cpp(tmp_path: Path) -> None:
    """SmolLM2's kind: digits stand alone, under a class of transformers that does not know it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = pytest.importorskip("gguf")
    path = write_tokenizer("smollm2", tmp_path / "base")
    file = Tokenizer.from_file(str(path / "tokenizer.json"))
    config = LlamaConfig(vocab_size=file.get_vocab_size(), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    base = checkpoint.load_assistant(str(path), format="chatml")
    checkpoint.save(tmp_path / "sft", base.model, base.tokenizer, base.renderer, dtype=torch.float32, meta={})
    sft = checkpoint.load_assistant(str(tmp_path / "sft"))
    export_gguf(str(tmp_path / "sft"), tmp_path / "m.gguf", "f32", prompts=1, say=lambda _: None)
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"]
    assert field.contents() == "smollm"
    plain = AutoTokenizer.from_pretrained(tmp_path / "sft")
    of_file = checkpoint.load_assistant(str(tmp_path / "m.gguf")).tokenizer
    with llamacpp.LlamaCpp(tmp_path / "m.gguf", context=64) as engine:
        for text in digits_and_blank_lines(2000):
            wanted = file.encode(text, add_special_tokens=False).ids
            assert ids(base.tokenizer, text) == ids(sft.tokenizer, text) == ids(plain, text) == wanted, text
            assert ids(of_file, text) == engine.ids(text) == wanted, text


def test_a_space_in_front_is_said_in_both_places(tmp_path: Path) -> None:
    """transformers 4 sets the file's answer by the configuration's, and takes "no" where that is silent."""
    file = backend("digits")
    for number, prefix in enumerate((True, False)):
        file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer = loaded(directory_of(tmp_path / str(number), file, "llama", None))
        assert readable_config({"add_prefix_space": not prefix}, tokenizer)["add_prefix_space"] is prefix
    several = loaded(directory_of(tmp_path / "several", backend("digits"), "llama", None))
    assert "add_prefix_space" not in readable_config({}, several)


@pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp: pip install xllamacpp")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_of_another_program_is_split_as_llama_cpp_does(tmp_path: Path, kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    pytest.importorskip("gguf")
    path = write_tokenizer(kind, tmp_path / "base")
    size = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    LlamaForCausalLM(LlamaConfig(vocab_size=size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=2)).save_pretrained(path)  # fmt: skip
    export_gguf(str(path), tmp_path / "m.gguf", "f32", prompts=1, say=lambda _: None)
    ours = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(ours.replace(b"sftflow.config", b"another.config"))
    tokenizer = checkpoint.load_tokenizer(checkpoint.resolve(str(tmp_path / "m.gguf")))
    control = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special][:3]
    with llamacpp.LlamaCpp(tmp_path / "m.gguf", context=64) as engine:
        for number, text in enumerate(digits_and_blank_lines(200)):
            text = text.replace("<|im_end|>", control[number % len(control)])
            assert ids(tokenizer, text) == engine.ids(text), text
    if kind == "smollm2":
        (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes().replace(b"smollm", b"smollx"))
        with pytest.raises(CheckpointError, match="split by 'smollx', which is not known here"):
            checkpoint.load_tokenizer(checkpoint.resolve(str(tmp_path / "m.gguf")))
