"""The training loop, for base pretraining and supervised fine-tuning alike: only the masks differ.

Loss of a step = sum over supervised tokens / number of supervised tokens of the whole step, floor 1. Each
micro-batch adds its SUM divided by the step's count, so accumulation cannot change the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sftflow.errors import CheckpointError, RunError
from sftflow.mixture.pack import IGNORE, Example, PackedBatch, best_fit, lengths_of, pack_batch
from sftflow.runtime import Runtime
from sftflow.train.attention import layout_of, use_packed_attention
from sftflow.train.loss import chunked_cross_entropy
from sftflow.train.optim import lr_factor, make_optimizers

MAX_BAD_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """Everything the loop needs to know, in tokens, steps and plain rates."""

    max_length: int
    tokens_per_step: int
    micro_tokens: int
    steps: int | None
    epochs: float | None
    optimizer: str
    lr: float
    weight_decay: float
    clip: float
    schedule: str
    warmup: float
    warmdown: float
    final: float
    dropout: float
    seed: int
    compile: bool = False

    @property
    def rows_per_step(self) -> int:
        return max(1, self.tokens_per_step // self.max_length)

    @property
    def rows_per_micro(self) -> int:
        return max(1, min(self.rows_per_step, self.micro_tokens // self.max_length))


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """One row of metrics.jsonl. loss: nats per supervised token. seconds: wall time of this step.

    tokens: real ones, padding not counted. computed_tokens: those that went through the layers (fewer, where
    conversations share their beginning). flops: floating-point work of the step's matrix products.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float
    padding_share: float
    computed_tokens: int = 0
    flops: float = 0.0
    source_loss: dict[str, float] = field(default_factory=dict)
    skipped: bool = False


class RowPlan:
    """Which examples make which row of which step: a pure function of (examples, spec), so a resumed run needs
    only the step number. Each epoch is shuffled and packed anew with its own seed."""

    def __init__(self, examples: Sequence[Example], spec: LoopSpec) -> None:
        self.examples, self.spec = examples, spec
        self.lengths = lengths_of(examples)
        self._epochs: dict[int, list[list[int]]] = {}
        rows = len(self.epoch_rows(0))
        per_epoch = rows / spec.rows_per_step
        wanted = [s for s in (spec.steps, None if spec.epochs is None else math.ceil(per_epoch * spec.epochs)) if s]
        self.total_steps = max(1, min(wanted)) if wanted else max(1, math.ceil(per_epoch))

    def epoch_rows(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            rng = np.random.default_rng([self.spec.seed, epoch])
            order = rng.permutation(len(self.examples))
            packed = best_fit(self.lengths[order].tolist(), self.spec.max_length)
            rows = [[int(order[j]) for j in row] for row in packed]
            shuffle = rng.permutation(len(rows))  # best-fit orders rows by length; the model must not see that
            self._epochs = {epoch: [rows[i] for i in shuffle]}
        return self._epochs[epoch]

    def step_rows(self, step: int) -> list[list[Example]]:
        """The packed rows of one step; a step may straddle two epochs."""
        wanted = self.spec.rows_per_step
        out: list[list[Example]] = []
        at = step * wanted
        epoch, n = 0, len(self.epoch_rows(0))
        # The number of rows differs between epochs by a few; walk them so that no row is lost or repeated.
        while at >= n:
            at -= n
            epoch += 1
            n = len(self.epoch_rows(epoch))
        while len(out) < wanted:
            rows = self.epoch_rows(epoch)
            take = rows[at : at + wanted - len(out)]
            out += [[self.examples[i] for i in row] for row in take]
            epoch, at = epoch + 1, 0
            if step == self.total_steps - 1 and self.spec.epochs is not None and epoch >= self.spec.epochs:
                break  # the last step of the last epoch takes only what is left
        return out


class Trainer:
    """Iterate to train: `for log in Trainer(...): ...`. Between two steps its state may be saved.

    model: a transformers causal LM in fp32 whose weights are trained in place.
    """

    def __init__(
        self, model: Any, plan: RowPlan, spec: LoopSpec, runtime: Runtime, source_names: Sequence[str] = ()
    ) -> None:
        self.model, self.plan, self.spec, self.runtime = model, plan, spec, runtime
        self.source_names = list(source_names)
        self.step = 0
        self.bad_steps = 0
        torch.manual_seed(spec.seed)
        use_packed_attention(model)
        prove_forward(model)
        self.optimizers = make_optimizers(model, spec.optimizer, spec.lr, spec.weight_decay)
        self.forward: Callable[..., torch.Tensor] = hidden_states
        if spec.compile:
            self.forward = torch.compile(hidden_states, dynamic=False)

    def __iter__(self) -> Iterator[StepLog]:
        while self.step < self.plan.total_steps:
            yield self.train_step()

    def train_step(self) -> StepLog:
        """One optimizer step over `rows_per_step` packed rows.

        Raises RunError after three steps in a row whose loss or gradient is not finite; such a step's update is
        skipped and its log says so.
        """
        started = time.perf_counter()
        spec, rows = self.spec, self.plan.step_rows(self.step)
        size = spec.rows_per_micro
        batches = [pack_batch(rows[i : i + size], spec.max_length) for i in range(0, len(rows), size)]
        n_step = max(1, sum(b.n_supervised for b in batches))
        self.model.train()
        loss_sum = 0.0
        by_source: dict[int, list[float]] = {}
        for batch in batches:
            total, per_token, sources = batch_loss(self.model, batch, self.runtime, self.forward)
            if batch.n_supervised:
                (total / n_step).backward()
            loss_sum += float(per_token.sum(dtype=torch.float64))
            for source in np.unique(sources):
                losses = per_token[torch.from_numpy(sources == source)]
                entry = by_source.setdefault(int(source), [0.0, 0.0])
                entry[0] += float(losses.sum(dtype=torch.float64))
                entry[1] += len(losses)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, spec.clip if spec.clip > 0 else math.inf)
        factor = lr_factor(
            self.step,
            self.plan.total_steps,
            kind=spec.schedule,
            warmup=spec.warmup,
            warmdown=spec.warmdown,
            final=spec.final,
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        finite = math.isfinite(loss_sum) and bool(torch.isfinite(norm))
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        n_tokens = sum(b.n_tokens for b in batches)
        log = StepLog(
            step=self.step,
            loss=loss_sum / n_step,
            lr=spec.lr * factor,
            grad_norm=float(norm),
            tokens=n_tokens,
            supervised_tokens=sum(b.n_supervised for b in batches),
            seconds=time.perf_counter() - started,
            padding_share=1 - n_tokens / sum(b.input_ids.size for b in batches),
            source_loss={self._source(s): total / n for s, (total, n) in sorted(by_source.items()) if n},
            skipped=not finite,
        )
        if self.bad_steps >= MAX_BAD_STEPS:
            raise RunError(
                f"step {self.step}",
                f"loss or gradient not finite {MAX_BAD_STEPS} steps in a row (loss {log.loss}, norm {log.grad_norm})",
                "lower train.lr, or look at the rows of these steps; the last saved state is kept",
            )
        return log

    def _source(self, number: int) -> str:
        return self.source_names[number] if number < len(self.source_names) else str(number)


def hidden_states(model: Any, input_ids: torch.Tensor, positions: torch.Tensor, layout: Any) -> torch.Tensor:
    """The last hidden states, (rows, length, width), before the output projection."""
    out: torch.Tensor = model.base_model(
        input_ids=input_ids, position_ids=positions, layout=layout, use_cache=False
    ).last_hidden_state
    return out


def batch_loss(
    model: Any,
    batch: PackedBatch,
    runtime: Runtime,
    forward: Callable[..., torch.Tensor] = hidden_states,
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray[Any, np.dtype[np.int64]]]:
    """(loss sum over supervised tokens, (n,) loss per supervised token, (n,) source of each)."""
    device = model.device
    keep = np.flatnonzero(batch.targets.ravel() != IGNORE)
    sources = batch.sources.ravel()[keep]
    with runtime.autocast():
        hidden = forward(
            model,
            torch.from_numpy(batch.input_ids).to(device),
            torch.from_numpy(batch.positions).to(device),
            layout_of(batch.segments, device),
        )
    head = model.get_output_embeddings()
    flat = hidden.reshape(-1, hidden.shape[-1]).index_select(0, torch.from_numpy(keep).to(device))
    targets = torch.from_numpy(batch.targets.ravel()[keep]).to(device)
    total, per_token = chunked_cross_entropy(
        flat,
        head.weight,
        targets,
        bias=getattr(head, "bias", None),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        compute_dtype=torch.bfloat16 if runtime.precision == "bf16" else None,
    )
    return total, per_token.cpu(), sources


@torch.no_grad()
def evaluate_loss(
    model: Any, examples: Sequence[Example], spec: LoopSpec, runtime: Runtime, n_sources: int
) -> tuple[float, list[float | None], int]:
    """Held-out loss: nats per supervised token over all examples, per source, and the number of tokens."""
    model.eval()
    rows = best_fit(lengths_of(examples).tolist(), spec.max_length)
    sums, counts = [0.0] * n_sources, [0] * n_sources
    for start in range(0, len(rows), spec.rows_per_micro):
        chunk = [[examples[i] for i in row] for row in rows[start : start + spec.rows_per_micro]]
        _, per_token, sources = batch_loss(model, pack_batch(chunk, spec.max_length), runtime)
        for source in range(n_sources):
            mine = per_token[torch.from_numpy(sources == source)]
            sums[source] += float(mine.sum(dtype=torch.float64))
            counts[source] += len(mine)
    model.train()
    n = sum(counts)
    return sum(sums) / max(1, n), [s / c if c else None for s, c in zip(sums, counts, strict=True)], n


@torch.no_grad()
def prove_forward(model: Any) -> None:
    """Prove on this very model that packing isolates and that our head equals the model's own.

    Two short sequences are run packed in one row through our attention, and alone through the model's own forward
    pass; the logits must agree. Architectures with state (Mamba), other heads (scaled logits) or attention that
    ignores the interface fail here and are refused, before anything is trained.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, vocabulary, n) for n in (7, 5)]
    examples = [Example(ids=p, mask=np.ones(len(p), np.int8)) for p in pieces]
    batch = pack_batch([examples], 13)
    was_training = model.training
    model.eval()
    name = type(model).__name__
    refuse = f"{name} cannot be trained packed"
    try:
        device = model.device
        hidden = hidden_states(
            model,
            torch.from_numpy(batch.input_ids).to(device),
            torch.from_numpy(batch.positions).to(device),
            layout_of(batch.segments, device),
        )[0]
        head = model.get_output_embeddings()
        logits = torch.nn.functional.linear(hidden, head.weight, getattr(head, "bias", None)).float()
        softcap = getattr(model.config, "final_logit_softcapping", None)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        model.set_attn_implementation("eager")
        at = 0
        for piece in pieces:
            alone = model(input_ids=torch.from_numpy(piece)[None].to(device), use_cache=False).logits[0].float()
            gap = float((logits[at : at + len(piece)] - alone).abs().max())
            if not gap <= 2e-3 * max(1.0, float(alone.abs().max())):
                raise CheckpointError("base", f"{refuse}: packed and alone differ by {gap:.2g} in the logits", REMEDY)
            at += len(piece)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError("base", f"{refuse}: {type(error).__name__}: {error}", REMEDY) from error
    finally:
        use_packed_attention(model)
        model.train(was_training)


REMEDY = "use a decoder-only attention model (Llama, Qwen, Mistral, SmolLM, OLMo, GPT-2 ...)"
