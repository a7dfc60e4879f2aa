"""`sftflow base`: text -> tokenizer -> a tiny Llama-layout base, by the same training loop as SFT.

Documents are joined, each opened by `<|bos|>`, and cut into rows of the context length; every token is
supervised. A row is one stretch of text, so nothing is isolated in it (as usual in pretraining).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sftflow.checkpoint import load_model, load_tokenizer, resolve
from sftflow.checkpoint.older_readers import respell_config
from sftflow.checkpoint.tokenizer import write_tokenizer
from sftflow.data.documents import read_documents
from sftflow.foundation.atomic_io import digest_of, sweep, write_directory, write_json
from sftflow.foundation.errors import DataError, RecipeError
from sftflow.foundation.runtime import Runtime
from sftflow.packing.pack import Example
from sftflow.pretraining.loops import against_loops, continuations, escape_loops
from sftflow.pretraining.tokenizer import train_tokenizer
from sftflow.recipe import Schedule, Train
from sftflow.training.batch_plan import RowPlan
from sftflow.training.resume import forget, require_free, require_own_links
from sftflow.training.trainer import Trainer
from sftflow.training.training_run import Listener, TrainingRun

HELD_OUT_BYTES = 300_000  # what bits per byte are measured on
TOKENIZER_CHARACTERS = 24_000_001  # what the tokenizer is trained on
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
    start: str = ""
    """a base to train further: its tokenizer and shape are kept, `params` and `vocab` say nothing then"""
    skip: int = 0
    """tokens at the beginning of the text that are left out, because `start` has seen them"""
    against_loops: bool = False
    """whether it is trained not to fall into loops (`loops.against_loops`, `loops.escape_loops`)"""

    def settings(self, save_every: int) -> Train:
        """The trainer's, tuned on the base that is shipped."""
        return Train(
            max_length=self.context,
            tokens_per_step=self.tokens_per_step,
            steps=max(1, self.tokens // self.tokens_per_step),
            optimizer="muon",
            lr=self.lr,
            weight_decay=0.02,
            schedule=Schedule(kind="linear", warmup=0.01, warmdown=0.45),
            save_every=save_every,
            seed=self.seed,
            compile=self.compile,
        )


def build_model(spec: BaseSpec, vocab_size: int, bos: int) -> Any:
    """A randomly initialised LlamaForCausalLM of the asked size, in fp32."""
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


def read_corpus(texts: Sequence[Path], heldout: Sequence[Path], seed: int) -> tuple[list[str], dict[str, list[str]]]:
    """The documents to train on in random order, and those to measure on by where they are from: one in a hundred where
    no file is given for that. Raises DataError where there is no text."""
    documents = [document for path in texts for document in read_documents(path)]
    if not documents:
        raise DataError(", ".join(map(str, texts)), "no text in it", "give files with text")
    documents = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
    if heldout:
        return documents, {path.name: list(read_documents(path)) for path in heldout}
    n = max(1, len(documents) // 100)
    return documents[n:] or documents, {"1% of the documents": documents[:n]}


def first_documents(documents: Sequence[str], size: int, size_of: Callable[[str], int] = len) -> Sequence[str]:
    """As many documents from the start as it takes to have `size` characters, or what `size_of` counts."""
    ends = np.cumsum([size_of(document) for document in documents])
    return documents[: int(np.searchsorted(ends, size)) + 1]


def token_stream(tokenizer: Any, documents: Sequence[str], limit: int | None = None) -> NDArray[np.uint16]:
    """The documents' ids one after another, `limit` of them at most; the tokenizer opens each with `<|bos|>`."""
    parts, n = [np.zeros(0, np.uint16)], 0
    for start in range(0, len(documents), 512):
        if limit is not None and n >= limit:
            break
        encoded = tokenizer(list(documents[start : start + 512])).input_ids
        parts += [np.asarray(ids, np.uint16) for ids in encoded]
        n += sum(len(ids) for ids in encoded)
    return np.concatenate(parts)[:limit]


def rows_of(stream: NDArray[np.uint16], length: int) -> list[Example]:
    """Rows of `length` tokens cut from one long stream; every token is supervised."""
    rows: Any = stream[: len(stream) // length * length].reshape(-1, length)
    mask = np.ones(length, np.int8)
    return [Example(ids=row, mask=mask) for row in rows]


def bits_per_byte(trainer: Trainer, tokenizer: Any, documents: Sequence[str]) -> float:
    """Held-out bits per byte: total nats over the documents' tokens / ln 2 / their UTF-8 bytes.

    The context restarts every `max_length` tokens; each row's first token is not predicted, and its bytes are left out
    of the count. `<|bos|>` has no bytes, but predicting it costs: counted in nats, absent from bytes.
    """
    stream = token_stream(tokenizer, first_documents(documents, HELD_OUT_BYTES, lambda d: len(d.encode())))
    rows = rows_of(stream, max(1, min(trainer.settings.max_length, len(stream))))
    found = trainer.evaluate(rows)
    loss, n_tokens = found.loss, found.supervised
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
    documents, held_out = read_corpus(texts, heldout, spec.seed)
    states = out / "resume"
    require_own_links(out)
    sweep(out, "resume", "checkpoint", "metrics.jsonl")
    sweep(states, "*")
    if not resume or (out / "ledger.json").is_file():  # which a fine-tuning has written
        require_free(out, "remove the folder")
        forget(states)
    start = resolve(spec.start) if spec.start else None
    if start is not None:
        tokenizer = load_tokenizer(start)
        out.mkdir(parents=True, exist_ok=True)
    elif (states / "tokenizer").is_dir():  # an earlier part of this run has trained it
        tokenizer = AutoTokenizer.from_pretrained(states / "tokenizer")
    else:
        listener.say("training the tokenizer")
        tokenizer = train_tokenizer(first_documents(documents, TOKENIZER_CHARACTERS), spec.vocab, spec.context)
        write_directory(states / "tokenizer", lambda d: tokenizer.save_pretrained(d) and None)
    listener.say("encoding the text")
    wanted = spec.skip + int(spec.tokens * 1.02) + spec.context * 64
    rows = rows_of(token_stream(tokenizer, documents, wanted)[spec.skip :], spec.context)
    if not rows:
        fact = f"fewer than {spec.context} tokens of text" + (f" behind the first {spec.skip:,}" if spec.skip else "")
        raise DataError(", ".join(map(str, texts)), fact, "give more text" + (", or skip less" if spec.skip else ""))
    if spec.against_loops:
        rows = against_loops(rows, spec.seed)
    if start is not None:
        model, _ = load_model(start)
    else:
        model = build_model(spec, len(tokenizer), tokenizer.bos_token_id)
    settings = spec.settings(save_every)
    trainer = Trainer(model, RowPlan(rows, settings), settings, runtime, ["text"])
    corpus = digest_of(document.encode() + b"\0" for document in documents)
    identity = {"corpus": corpus, "spec": json.dumps(asdict(spec) | {"compile": None})}
    run = TrainingRun(out, trainer, listener, identity=identity)
    run.restore()
    run.begin()
    run.train()
    if spec.against_loops:
        escape_loops(model, tokenizer, rows, settings, runtime, listener)
    listener.say("measuring held-out bits per byte, and how it goes on")
    measured = {name: bits_per_byte(trainer, tokenizer, documents) for name, documents in held_out.items()}
    card = {
        "command": "sftflow " + " ".join(sys.argv[1:]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": trainer.plan.total_steps * spec.tokens_per_step,
        "corpus": {p.name: p.stat().st_size for p in texts},
        "bits_per_byte": {name: round(bits, 4) for name, bits in measured.items()},
        "continuations": continuations(model, tokenizer, runtime, list(held_out.values())),
        "training_seconds": round(run.state.seconds),
        "precision": runtime.precision,
        "spec": asdict(spec),
    }
    save_base(out, model, tokenizer, card)
    return card


def save_base(out: Path, model: Any, tokenizer: Any, card: dict[str, Any]) -> None:
    """Write `out/checkpoint`: bf16 weights (the model's own become that), tokenizer, config and a model card."""

    def fill(directory: Path) -> None:
        model.to(torch.bfloat16).save_pretrained(directory)
        respell_config(directory)
        write_tokenizer(tokenizer, directory)
        write_json(directory / "sftflow.json", {"kind": "base", "card": card})
        (directory / "README.md").write_text(model_card(card), encoding="utf-8")

    write_directory(out / "checkpoint", fill)


def model_card(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    corpus = "\n".join(f"- `{name}`, {size:,} bytes on disk" for name, size in card["corpus"].items())
    bpb = "\n".join(f"- {name}: {value:.3f}" for name, value in card["bits_per_byte"].items())
    more = card["continuations"]
    samples = "\n".join("- " + " ".join(f"{a} **|** {b}".split()) for a, b in more["samples"])
    seen = f", {card['spec']['skip']:,} by {card['spec']['start']} before" if card["spec"]["start"] else ""
    return f"""# A tiny base checkpoint

{card["parameters"]:,} parameters, Llama layout, trained on plain text only: it continues text, it has never seen a
chat format, and it knows little.

Command: `{card["command"]}`

Corpus:

{corpus}

Tokens seen: {card["tokens"]:,}{seen} ({card["precision"]} autocast, {card["training_seconds"]:,} seconds of training).

Held-out bits per byte:

{bpb}

Of {more["prompts"]} greedy continuations of held-out beginnings {more["looping"]:.0%} end in a loop; of their runs of
three tokens {more["distinct_3"]:.0%} are different ones. Drawn at temperature 1 it goes on like this (behind the bar):

{samples}
"""
