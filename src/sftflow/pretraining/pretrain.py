"""`sftflow base`: text -> tokenizer -> a tiny Llama-layout base, by the same training loop as SFT.

Documents are joined, each opened by `<|bos|>`, and cut into rows of the context length; every token is
supervised. A row is one stretch of text, so nothing is isolated in it (as usual in pretraining).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sftflow.atomic_io import sweep, write_directory, write_json
from sftflow.data.documents import read_documents
from sftflow.errors import DataError, RecipeError
from sftflow.packing.pack import Example
from sftflow.pretraining.tokenizer import train_tokenizer
from sftflow.recipe import Schedule, Train
from sftflow.runtime import Runtime
from sftflow.training.batch_plan import RowPlan
from sftflow.training.resume import forget_states, saved_states, unfinished
from sftflow.training.trainer import Trainer
from sftflow.training.training_run import Listener, TrainingRun

HELD_OUT_CHARACTERS = 300_000  # what bits per byte are measured on
TOKENIZER_CHARACTERS = 24_000_000  # what the tokenizer is trained on

SIZES = {
    # parameters: (layers, width, heads, feed-forward), for a vocabulary of 4,096 and tied embeddings
    "0.1M": (2, 32, 2, 96),
    "1M": (4, 112, 2, 304),
    "3.4M": (6, 192, 3, 512),
    "6M": (7, 240, 4, 640),
}


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """What to train: sizes in parameters, vocabulary entries, tokens."""

    params: str = "3.4M"
    vocab: int = 4096
    tokens: int = 20_000_000
    context: int = 512
    tokens_per_step: int = 8192
    lr: float = 5e-3
    seed: int = 0
    compile: bool = False


def build_model(spec: BaseSpec, vocab_size: int, bos: int) -> Any:
    """A randomly initialised LlamaForCausalLM of the asked size, in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if spec.params not in SIZES:
        raise RecipeError("--params", f"{spec.params!r} is not a known size", f"use one of {', '.join(SIZES)}")
    layers, width, heads, feed_forward = SIZES[spec.params]
    torch.manual_seed(spec.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=spec.context,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=bos,
        pad_token_id=None,
        rope_theta=10000.0,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.bos_token_id = bos
    model.generation_config.eos_token_id = bos
    return model


class TokenRows(Sequence[Example]):
    """Rows of `length` tokens cut from one long stream; every token is supervised."""

    def __init__(self, stream: Any, length: int) -> None:
        self.stream, self.length = stream, length
        self.mask = np.ones(length, np.int8)

    def __len__(self) -> int:
        return len(self.stream) // self.length

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError(index)
        ids = np.asarray(self.stream[index * self.length : (index + 1) * self.length], np.int64)
        return Example(ids=ids, mask=self.mask)


def encode_stream(tokenizer: Any, documents: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """All documents' ids in one uint16 stream, each document opened by `<|bos|>` (the tokenizer writes it)."""
    parts = []
    for start in range(0, len(documents), 512):
        for ids in tokenizer(list(documents[start : start + 512])).input_ids:
            parts.append(np.asarray(ids, np.uint16))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """documents: to train on, in random order.   held_out: those to measure on, by where they are from."""

    documents: list[str]
    held_out: dict[str, list[str]]

    def digest(self) -> str:
        """Of what is trained on."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.encode())
            digest.update(b"\0")
        return digest.hexdigest()[:16]


def read_corpus(texts: Sequence[Path], heldout: Sequence[Path], seed: int) -> Corpus:
    """The documents of all files; one in a hundred is held out where no file is given for that.

    Raises DataError where there is no text.
    """
    documents = [document for path in texts for document in read_documents(path)]
    if not documents:
        raise DataError(", ".join(map(str, texts)), "no text in it", "give files with text")
    documents = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
    if heldout:
        return Corpus(documents=documents, held_out={p.name: list(read_documents(p)) for p in heldout})
    n = max(1, len(documents) // 100)
    return Corpus(documents=documents[n:] or documents, held_out={"1% of the documents": documents[:n]})


def first_documents(documents: Sequence[str], size: int) -> list[str]:
    """So many documents from the start that they have `size` characters, or all."""
    ends = np.cumsum([len(document) for document in documents])
    return list(documents[: int(np.searchsorted(ends, size)) + 1])


def open_tokenizer(directory: Path, documents: Sequence[str], spec: BaseSpec, say: Callable[[str], None]) -> Any:
    """The tokenizer that an earlier part of this run has trained, or a new one."""
    if directory.is_dir():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory)
    say("training the tokenizer")
    tokenizer = train_tokenizer(first_documents(documents, TOKENIZER_CHARACTERS), spec.vocab, spec.context)
    write_directory(directory, lambda d: tokenizer.save_pretrained(d) and None)
    return tokenizer


def encode_corpus(tokenizer: Any, documents: Sequence[str], spec: BaseSpec) -> TokenRows:
    """As many rows as the steps may need."""
    needed = int(spec.tokens * 1.02) + spec.context * 64
    parts, at, n = [np.zeros(0, np.uint16)], 0, 0
    while n < needed and at < len(documents):
        parts.append(encode_stream(tokenizer, documents[at : at + 4096]))
        n, at = n + len(parts[-1]), at + 4096
    return TokenRows(np.concatenate(parts)[:needed], spec.context)


def bits_per_byte(trainer: Trainer, tokenizer: Any, documents: Sequence[str]) -> float:
    """Held-out bits per byte: total nats over the documents' tokens / ln 2 / their UTF-8 bytes.

    The context restarts every `max_length` tokens; each row's first token is not predicted, and its bytes are left out
    of the count. `<|bos|>` has no bytes, but predicting it costs: counted in nats, absent from bytes.
    """
    stream = encode_stream(tokenizer, first_documents(documents, HELD_OUT_CHARACTERS))
    rows = TokenRows(stream, max(1, min(trainer.settings.max_length, len(stream))))
    loss, _, n_tokens = trainer.evaluate(rows)
    n_bytes = sum(len(tokenizer.decode(row.ids[1:], skip_special_tokens=True).encode()) for row in rows)
    return loss * n_tokens / math.log(2) / max(1, n_bytes)


def train_base(
    texts: Sequence[Path],
    out: Path,
    spec: BaseSpec,
    runtime: Runtime,
    listener: Listener,
    *,
    resume: bool,
    save_every: int = 100,
    heldout: Sequence[Path] = (),
) -> dict[str, Any]:
    """The whole stage; returns the facts of the model card. heldout: text files to measure bits per byte on."""
    corpus = read_corpus(texts, heldout, spec.seed)
    states = out / "resume"
    sweep(out, "resume", "checkpoint", "metrics.jsonl")
    sweep(states, "*")
    if not resume:
        if saved_states(states) and not (out / "checkpoint").is_dir():
            raise unfinished(out)
        forget_states(states)
    tokenizer = open_tokenizer(states / "tokenizer", corpus.documents, spec, listener.say)
    listener.say("encoding the text")
    rows = encode_corpus(tokenizer, corpus.documents, spec)
    model = build_model(spec, len(tokenizer), tokenizer.bos_token_id)
    settings = train_settings(spec, save_every)
    trainer = Trainer(model, RowPlan(rows, settings), settings, runtime, ["text"])
    identity = {"corpus": corpus.digest(), "spec": json.dumps(asdict(spec) | {"compile": None})}
    run = TrainingRun(out, trainer, listener, identity=identity)
    run.restore()
    run.begin()
    run.train()
    listener.say("measuring held-out bits per byte")
    card = {
        "command": "sftflow " + " ".join(sys.argv[1:]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": trainer.plan.total_steps * spec.tokens_per_step,
        "corpus": {p.name: p.stat().st_size for p in texts},
        "bits_per_byte": {
            name: round(bits_per_byte(trainer, tokenizer, documents), 4) for name, documents in corpus.held_out.items()
        },
        "training_seconds": round(run.state.seconds),
        "precision": runtime.precision,
        "spec": asdict(spec),
    }
    save_base(out, model, tokenizer, card)
    return card


def train_settings(spec: BaseSpec, save_every: int) -> Train:
    """The trainer's settings for a base, tuned on the one that is shipped."""
    return Train(
        max_length=spec.context,
        tokens_per_step=spec.tokens_per_step,
        steps=max(1, spec.tokens // spec.tokens_per_step),
        optimizer="muon",
        lr=spec.lr,
        weight_decay=0.02,
        schedule=Schedule(kind="linear", warmup=0.01, warmdown=0.45),
        save_every=save_every,
        seed=spec.seed,
        compile=spec.compile,
    )


def save_base(out: Path, model: Any, tokenizer: Any, card: dict[str, Any]) -> None:
    """Write `out/checkpoint`: bf16 weights, tokenizer, config and a model card."""
    import torch

    def fill(directory: Path) -> None:
        copy = type(model)(model.config)
        copy.load_state_dict(model.state_dict())
        copy.generation_config = model.generation_config
        copy.to(torch.bfloat16).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        write_json(directory / "sftflow.json", {"kind": "base", "card": card})
        (directory / "README.md").write_text(model_card(card), encoding="utf-8")

    write_directory(out / "checkpoint", fill)


def model_card(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    corpus = "\n".join(f"- `{name}`, {size:,} bytes on disk" for name, size in card["corpus"].items())
    bpb = "\n".join(f"- {name}: {value:.3f}" for name, value in card["bits_per_byte"].items())
    return f"""# A tiny base checkpoint

{card["parameters"]:,} parameters, Llama layout, trained on plain text only: it continues text, it has never seen a
chat format, and it knows little.

Command: `{card["command"]}`

Corpus:

{corpus}

Tokens seen: {card["tokens"]:,} ({card["precision"]} autocast, {card["training_seconds"]:,} seconds of training).

Held-out bits per byte:

{bpb}
"""
