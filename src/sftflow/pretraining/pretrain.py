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
from sftflow.errors import CheckpointError, DataError, RecipeError
from sftflow.packing.pack import Example
from sftflow.runtime import Runtime

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


def bits_per_byte(
    model: Any, tokenizer: Any, documents: Sequence[str], runtime: Runtime, max_bytes: int = 300_000
) -> float:
    """Held-out bits per byte: total nats over the documents' tokens / ln 2 / their UTF-8 bytes.

    The context restarts every max_position_embeddings tokens; each row's first token is not predicted, and its
    bytes are left out of the count.
    """
    import torch

    length = model.config.max_position_embeddings
    taken, size = [], 0
    for text in documents:
        taken.append(text)
        size += len(text.encode())
        if size >= max_bytes:
            break
    stream = encode_stream(tokenizer, taken)
    rows = TokenRows(stream, min(length, len(stream)))
    nats, n_bytes = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), 8):
            ids = torch.from_numpy(np.stack([rows[i].ids for i in range(start, min(start + 8, len(rows)))]))
            ids = ids.to(model.device)
            with runtime.autocast():
                logits = model(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="sum"
            )
            nats += float(loss)
            # <|bos|> has no bytes, but predicting it costs: counted in nats, absent from bytes.
            n_bytes += sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in ids.tolist())
    return nats / math.log(2) / max(1, n_bytes)


def train_base(
    texts: Sequence[Path],
    out: Path,
    spec: BaseSpec,
    runtime: Runtime,
    *,
    resume: bool,
    save_every: int,
    heldout: Sequence[Path] = (),
    say: Callable[[str], None],
    progress: Callable[[Any, int], None],
) -> dict[str, Any]:
    """The whole stage; returns the facts of the model card. `progress(log, total_steps)` is called every step."""
    from sftflow.training.batch_plan import LoopSpec, RowPlan
    from sftflow.training.resume import flush_to_disk, forget_states, load_state, save_state, saved_states, truncate_log
    from sftflow.training.trainer import Trainer

    documents: list[str] = []
    for path in texts:
        documents.extend(read_documents(path))
    if not documents:
        raise DataError(", ".join(map(str, texts)), "no text in it", "give files with text")
    rng = np.random.default_rng(spec.seed)
    documents = [documents[i] for i in rng.permutation(len(documents))]
    if heldout:
        held = {p.name: list(read_documents(p)) for p in heldout}
    else:
        n = max(1, len(documents) // 100)
        held = {"1% of the documents": documents[:n]}
        documents = documents[n:] or documents
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode())
        digest.update(b"\0")
    identity = {"corpus": digest.hexdigest()[:16], "spec": json.dumps(asdict(spec) | {"compile": None})}

    work = out / "resume"
    sweep(out, "resume", "checkpoint", "metrics.jsonl")
    sweep(work, "*")
    if not resume:
        if saved_states(work) and not (out / "checkpoint").is_dir():
            raise CheckpointError(
                str(out), "an unfinished run is in it", "continue it with --resume, or remove the folder"
            )
        forget_states(work)
    tokenizer_dir = work / "tokenizer"
    if resume and tokenizer_dir.is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    else:
        say("training the tokenizer")
        from sftflow.pretraining.tokenizer import train_tokenizer

        sample, size = [], 0
        for document in documents:
            sample.append(document)
            size += len(document)
            if size > 24_000_000:
                break
        tokenizer = train_tokenizer(sample, spec.vocab, spec.context)
        write_directory(tokenizer_dir, lambda d: tokenizer.save_pretrained(d) and None)
    say("encoding the text")
    needed = int(spec.tokens * 1.02) + spec.context * 64
    stream, at = np.zeros(0, np.uint16), 0
    while len(stream) < needed and at < len(documents):
        stream = np.concatenate([stream, encode_stream(tokenizer, documents[at : at + 4096])])
        at += 4096
    rows = TokenRows(stream[:needed], spec.context)
    model = build_model(spec, len(tokenizer), tokenizer.bos_token_id)
    loop = LoopSpec(
        max_length=spec.context,
        tokens_per_step=spec.tokens_per_step,
        micro_tokens=spec.tokens_per_step,
        steps=max(1, spec.tokens // spec.tokens_per_step),
        epochs=None,
        optimizer="muon",
        lr=spec.lr,
        weight_decay=0.02,
        clip=1.0,
        schedule="linear",
        warmup=0.01,
        warmdown=0.45,
        final=0.0,
        dropout=0.0,
        seed=spec.seed,
        compile=spec.compile,
    )
    plan = RowPlan(rows, loop)
    trainer = Trainer(model, plan, loop, runtime)
    states = saved_states(work)
    seconds = 0.0
    if resume and states:
        seconds = float(load_state(states[-1], trainer, identity)["seconds"])
        say(f"resumed at step {trainer.step}")
    metrics = out / "metrics.jsonl"
    truncate_log(metrics, trainer.step)
    with metrics.open("a", encoding="utf-8") as f:
        for log in trainer:
            seconds += log.seconds
            row = asdict(log)
            del row["source_loss"]
            f.write(json.dumps(row) + "\n")
            progress(log, plan.total_steps)
            if trainer.step % save_every == 0 or trainer.step == plan.total_steps:
                flush_to_disk(f)
                save_state(work, trainer, identity, {"seconds": seconds}, keep=2)
    say("measuring held-out bits per byte")
    bpb = {name: round(bits_per_byte(model, tokenizer, docs, runtime), 4) for name, docs in held.items()}
    card = {
        "command": "sftflow " + " ".join(sys.argv[1:]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": plan.total_steps * spec.tokens_per_step,
        "corpus": {p.name: p.stat().st_size for p in texts},
        "bits_per_byte": bpb,
        "training_seconds": round(seconds),
        "precision": runtime.precision,
        "spec": asdict(spec),
    }
    save_base(out, model, tokenizer, card)
    return card


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
