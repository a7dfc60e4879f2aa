"""The training stage: recipe -> mixture -> loop -> a run directory.

recipe.yaml   fully resolved          metrics.jsonl   a row a step      validation.jsonl   held-out loss
ledger.json   every row accounted     resume/         exact state       checkpoint/        the assistant
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from sftflow import __version__
from sftflow.chat.format import fingerprint
from sftflow.chat.inspect import token_rows
from sftflow.chat.settle import settled
from sftflow.checkpoint import BUILTIN_TINY, prepare, resolve, save
from sftflow.errors import CheckpointError, RunError
from sftflow.files import write_json, write_text
from sftflow.mixture.mix import build_mixture, write_bad_rows
from sftflow.recipe import Recipe, to_yaml
from sftflow.runtime import Runtime, detect

EXIT_SIGTERM = 143

# lr: auto. The tiny base's values were tuned on the demo (docs/decisions.md has the runs); those for real checkpoints
# are the field's habit for full fine-tuning.
AUTO_LR_TINY = {"adamw": 3e-3, "muon": 8e-3}
AUTO_LR_REAL = {"adamw": 2e-5, "muon": 1e-5}


class Listener(Protocol):
    """What a run tells the person watching it."""

    def say(self, text: str) -> None: ...

    def rendering(self, source: str, rows: int) -> None: ...

    def step(self, log: Any, total: int) -> None: ...

    def validation(self, step: int, loss: float) -> None: ...


class Stopped(Exception):
    """SIGTERM came; the state has been saved."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    directory: Path
    seconds: float
    already_done: bool = False


def resolve_recipe(recipe: Recipe, runtime: Runtime, n_parameters: int) -> tuple[Recipe, dict[str, Any]]:
    """Fill in what was left to `auto`; the notes say how each was decided."""
    train = recipe.train
    update: dict[str, Any] = {"precision": runtime.precision}
    notes = {"precision": runtime.reason, "device": runtime.device}
    if train.lr == "auto":
        small = recipe.base == BUILTIN_TINY or n_parameters < 20_000_000
        update["lr"] = (AUTO_LR_TINY if small else AUTO_LR_REAL)[train.optimizer]
        notes["lr"] = "auto: " + ("tuned for the tiny base" if small else "full fine-tuning of a real checkpoint")
    if train.micro_tokens is None:
        # What fits a laptop: activations of a real checkpoint grow with the micro-batch, logits do not.
        rows = max(1, (8192 if n_parameters < 20_000_000 else 4096) // train.max_length)
        update["micro_tokens"] = min(train.tokens_per_step, rows * train.max_length)
    if train.epochs is None and train.steps is None:
        update["epochs"] = 1.0
    return recipe.model_copy(update={"train": train.model_copy(update=update)}), notes


def loop_spec(recipe: Recipe) -> Any:
    from sftflow.train.loop import LoopSpec

    t = recipe.train
    assert t.micro_tokens is not None and isinstance(t.lr, float)
    return LoopSpec(
        max_length=t.max_length,
        tokens_per_step=t.tokens_per_step,
        micro_tokens=t.micro_tokens,
        steps=t.steps,
        epochs=t.epochs,
        optimizer=t.optimizer,
        lr=t.lr,
        weight_decay=t.weight_decay,
        clip=t.clip,
        schedule=t.schedule.kind,
        warmup=t.schedule.warmup,
        warmdown=t.schedule.warmdown,
        final=t.schedule.final,
        dropout=t.dropout,
        seed=t.seed,
        compile=bool(t.compile is True),
    )


def run_training(recipe: Recipe, listener: Listener, *, resume: bool = False) -> Run:
    """Train as the recipe says, into `train.out`.

    With `resume`, go on from the newest saved state, bit for bit on the CPU; with none saved, start; on a finished
    run, say so. Raises Stopped after saving when SIGTERM comes.
    """
    from safetensors import SafetensorError

    from sftflow.train.loop import RowPlan, Trainer, evaluate_loss
    from sftflow.train.resume import load_state, save_state, saved_states

    out = Path(recipe.train.out)
    started = time.perf_counter()
    if out.exists() and not out.is_dir():
        raise CheckpointError(str(out), "train.out is a file", "name a folder")
    if (out / "DONE").is_file() and resume:
        return Run(directory=out, seconds=0.0, already_done=True)
    if not resume and (out / "resume").is_dir() and not (out / "DONE").is_file():
        raise CheckpointError(str(out), "an unfinished run is in it", "continue it with --resume, or remove the folder")
    location = resolve(recipe.base)
    listener.say(f"loading {recipe.base}")
    model, tokenizer, renderer, base_info = prepare(location, format_name=recipe.format)
    runtime = detect(recipe.train.precision)
    base_dtype = _dtype_of(location, model)
    recipe, notes = resolve_recipe(recipe, runtime, model.num_parameters())
    context = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    if context and recipe.train.max_length > context:
        raise CheckpointError(
            "train.max_length", f"{recipe.train.max_length} is more than the base's context of {context}", "lower it"
        )
    set_dropout(model, recipe.train.dropout)
    listener.say("rendering the mixture")
    mixture = build_mixture(recipe, renderer, listener.rendering)
    renderer = mixture.renderer
    for note in (renderer.disagreement(), settled(renderer)):
        if note:
            listener.say(note)
    ledger = mixture.ledger()
    spec = loop_spec(recipe)
    plan = RowPlan(mixture.examples, spec)
    model.to(runtime.device)
    trainer = Trainer(model, plan, spec, runtime, mixture.names)
    identity = {
        **flat_recipe(recipe),
        "data": ledger["data_sha256"],
        "tokenizer and format": fingerprint(tokenizer, renderer.format),
    }
    states = saved_states(out / "resume")
    extra: dict[str, Any] = {"best": None, "seconds": 0.0}
    if resume and states:
        extra = load_state(states[-1], trainer, identity)
        listener.say(f"resumed at step {trainer.step} of {plan.total_steps}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "DONE").unlink(missing_ok=True)
    write_text(out / "recipe.yaml", to_yaml(recipe))
    write_json(out / "ledger.json", ledger)
    write_bad_rows(out, mixture)
    write_json(out / "mask_example.json", [token_rows(r, tokenizer) for r in mixture.samples])

    meta = {
        "version": __version__,
        "base": {"name": recipe.base, "fingerprint": base_info.get("fingerprint"), "kind": base_info.get("kind")},
        "recipe": recipe.model_dump(mode="json"),
        "notes": notes,
        "data": ledger["data_sha256"],
    }

    def save_checkpoint() -> None:
        save(out / "checkpoint", model, tokenizer, renderer, dtype=base_dtype, meta={**meta, "step": trainer.step})

    def validate() -> float | None:
        if not mixture.held_out:
            return None
        loss, by_source, n = evaluate_loss(model, mixture.held_out, spec, runtime, len(mixture.names))
        row = {
            "step": trainer.step,
            "loss": loss,
            "supervised_tokens": n,
            "sources": dict(zip(mixture.names, by_source, strict=True)),
        }
        with (out / "validation.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        listener.validation(trainer.step, loss)
        return loss

    stop_asked = _SigtermFlag()
    _truncate(out / "metrics.jsonl", trainer.step)
    _truncate(out / "validation.jsonl", trainer.step if trainer.step else -1)
    if trainer.step == 0:
        validate()
    try:
        with stop_asked, (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
            for log in trainer:
                extra["seconds"] += log.seconds
                metrics.write(json.dumps(asdict(log)) + "\n")
                metrics.flush()
                listener.step(log, plan.total_steps)
                done = trainer.step == plan.total_steps
                if trainer.step % recipe.train.save_every == 0 or done:
                    loss = validate()
                    better = loss is not None and (extra["best"] is None or loss < extra["best"])
                    if loss is None or better or recipe.train.best == "last":
                        extra["best"] = loss
                        save_checkpoint()
                    if not done:
                        save_state(out / "resume", trainer, identity, extra, recipe.train.keep)
                elif stop_asked.asked:
                    save_state(out / "resume", trainer, identity, extra, recipe.train.keep)
                if stop_asked.asked and not done:
                    raise Stopped
    except (OSError, SafetensorError) as error:
        fact = getattr(error, "strerror", None) or error
        raise RunError(str(out), f"cannot write ({fact})", "free space; --resume goes on") from error
    except RuntimeError as error:
        if "alloc" not in str(error).lower():
            raise
        raise RunError("training", "out of memory", "lower train.micro_tokens or train.max_length") from error
    write_text(out / "DONE", f"{plan.total_steps} steps\n")
    return Run(directory=out, seconds=time.perf_counter() - started)


def flat_recipe(recipe: Recipe) -> dict[str, str]:
    """What decides the weights, as `recipe.train.lr: 0.008`, so that a change is named by its key on resume."""
    kept = recipe.model_dump(
        mode="json", exclude={"eval": True, "compare": True, "train": {"out", "save_every", "keep", "logger"}}
    )
    out: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}")
        elif isinstance(value, list) and value:
            for number, inner in enumerate(value):
                walk(inner, f"{path}[{number}]")
        else:
            out[path] = json.dumps(value)

    walk(kept, "recipe")
    return out


class _SigtermFlag:
    """While inside, SIGTERM sets a flag instead of killing; the loop looks at it between steps."""

    asked = False

    def __enter__(self) -> _SigtermFlag:
        try:
            self._old = signal.signal(signal.SIGTERM, self._set)
        except ValueError:  # not in the main thread: nobody sends us signals there
            self._old = None
        return self

    def _set(self, *_: Any) -> None:
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)


def _truncate(path: Path, last_step: int) -> None:
    """Drop the log rows after `last_step`: a killed run wrote them, and the resumed one writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError):
            break  # the line that the kill cut short
    write_text(path, "".join(f"{line}\n" for line in kept))


def _dtype_of(location: Any, model: Any) -> Any:
    """The dtype the base is stored in; the checkpoint is written in the same."""
    import torch

    config = Path(location.path) / "config.json"
    if location.gguf or location.is_hub or not config.is_file():
        return torch.bfloat16  # what real checkpoints are published in
    data = json.loads(config.read_text(encoding="utf-8"))
    name = data.get("dtype") or data.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), torch.float32)
    return found if found in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def set_dropout(model: Any, rate: float) -> None:
    """Dropout is 0 unless the recipe asks: set every dropout of the model."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        for key in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, rate)
    for key in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if hasattr(model.config, key):
            setattr(model.config, key, rate)
