"""`sftflow export MODEL --to gguf`: what can be exported is decided first, then written, then proven."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftflow.checkpoint import Assistant, load_assistant, load_config, open_renderer, resolve
from sftflow.checkpoint.weights import distinct_weights, settle_head
from sftflow.exporting import llamacpp, parity
from sftflow.exporting.bounds import TOKENS
from sftflow.exporting.parity_prompts import cases
from sftflow.exporting.target import require_replaceable
from sftflow.foundation.atomic_io import write_json
from sftflow.foundation.errors import CheckpointError, ProofError, RecipeError
from sftflow.gguf import architectures as layout
from sftflow.gguf import reader as read
from sftflow.gguf.vocabulary import vocabulary_of
from sftflow.gguf.writer import TYPES, Plan, end_fields, write

Say = Callable[[str], None]


def export_gguf(name: str, out: Path, kind: str, *, prompts: int = parity.PROMPTS, say: Say = print) -> dict[str, Any]:
    """Write `out` and, beside it, its certificate, which is returned. Nothing is written for what cannot be exported.

    Raises CheckpointError naming an architecture or tokenizer that has no place in GGUF.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(str(out), "writing .gguf needs the package gguf", "pip install 'sftflow[gguf]'")
    if kind not in TYPES:
        raise RecipeError("--type", f"{kind!r} is not a type", f"use one of {', '.join(TYPES)}")
    _check_target(out, name)
    location = resolve(name)
    config = load_config(location)
    layout.layout_of(config, name)
    renderer = open_renderer(location, "auto")
    rows = max(config.vocab_size, len(renderer.tokenizer))
    end_fields(renderer, vocabulary_of(renderer.tokenizer, rows, name), name)

    say(f"export: loading {name}")
    assistant = load_assistant(name)
    plan = plan_of(assistant, kind)
    proof = out.with_suffix(".parity.json")
    write(plan, out, before=lambda: proof.unlink(missing_ok=True))  # it never lies beside another file than its own
    say(f"export: wrote {out} ({out.stat().st_size / 1e6:,.1f} MB, {kind})")
    if not llamacpp.available():
        found = parity.not_checked(out, kind, name, "the package xllamacpp is not installed")
    elif chosen := cases(assistant.renderer, prompts, assistant.engine.context - TOKENS):
        found = parity.certificate(out, kind, assistant, chosen, notes=plan.vocabulary.notes, say=say)
    else:
        found = parity.not_checked(out, kind, name, "no prompt fits this model")
    write_json(proof, found)
    return found


def plan_of(assistant: Assistant, kind: str) -> Plan:
    """The plan of a loaded model, whose embedding has grown by the format's tokens where it had to."""
    model, config = assistant.model, assistant.model.config
    rows = int(model.get_input_embeddings().weight.shape[0])
    settle_head(model)
    weights = distinct_weights(model)
    unknown = [name for name in weights if layout.gguf_name(name) is None]
    if unknown:
        raise CheckpointError(assistant.name, f"GGUF has no place for {unknown[0]}", "serve the directory itself")

    return Plan(
        config=config,
        layout=layout.layout_of(config, assistant.name),
        vocabulary=vocabulary_of(assistant.tokenizer, rows, assistant.name),
        renderer=assistant.renderer,
        name=Path(assistant.name.rstrip("/")).stem,
        kind=kind,
        weights=weights,
        generation=model.generation_config.to_diff_dict(),
    )


def _check_target(out: Path, name: str) -> None:
    """A file of ours may be replaced, another's may not."""
    if out.suffix != ".gguf":
        raise RecipeError(f"--out {out}", "it is no .gguf file name", "write for example --out model.gguf")
    if out.is_file() and Path(name).exists() and out.samefile(name):
        raise RecipeError(f"--out {out}", "it is the model itself", "name another file")
    require_replaceable(out, lambda: out.is_file() and read.fields(out) is not None, "an export", "file")


def summary(found: dict[str, Any]) -> list[str]:
    """A certificate in a few lines."""
    if found["passed"] is None:
        return [f"parity: {found['llama_cpp']}; pip install 'sftflow[gguf]' and export again to prove this file"]
    n, ties = found["prompts"], ""
    if found["near_ties"]:
        ties = f" ({found['near_ties']} near ties, {found['greedy_uncompared']} tokens behind them not compared)"
    lines = [
        f"parity with llama.cpp and transformers, {n} prompts: {'passed' if found['passed'] else 'FAILED'}",
        f"  same rendered text {found['rendered_equal']}/{n}, same ids {found['ids_equal']}/{n}, "
        f"same {found['tokens_each']} greedy tokens {found['greedy_equal']}/{n}{ties}",
        f"  largest logit difference {found['largest_logit_difference']:.2g}, "
        f"over {found['logit_places']} of {found['generated']} generated places"
        f"; of likely tokens {found['largest_likely_difference']:.2g}, allowed {found['bounds']['difference']:g}",
    ]
    if found["look_alikes"]:
        lines.append(
            f"  in {found['look_alikes']} prompts the content holds strings of control tokens: llama.cpp's server "
            "takes them for control tokens, sftflow does not"
        )
    return [*lines, *(f"  note: {note}" for note in found["notes"])]


def require_passed(found: dict[str, Any]) -> None:
    """Raises ProofError naming the first prompt on which the exported file says something else."""
    if found["passed"] is False:
        first = found["failures"][0]
        raise ProofError(f"prompt {first['prompt']}", f"{first['check']}: {first['detail']}", "do not trust this file")
