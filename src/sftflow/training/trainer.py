"""The training loop, for base pretraining and supervised fine-tuning alike: only the masks differ.

Loss of a step = sum over supervised tokens / number of supervised tokens of the whole step, floor 1. Each
micro-batch adds its SUM divided by the step's count, so accumulation cannot change the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sftflow.foundation.errors import RunError
from sftflow.foundation.runtime import Runtime, keep_freed_memory
from sftflow.packing.attending import evaluating
from sftflow.packing.check_model import check_length, prove_forward
from sftflow.packing.loss import Parts, batch_loss, fused_parts, head_of, loss_parts
from sftflow.packing.pack import Example, PackedBatch
from sftflow.recipe import Train
from sftflow.training.batch_plan import RowPlan, StepLog, micro_batches
from sftflow.training.bf16_weights import Bf16Weights, decoder_layers, restore_classes
from sftflow.training.optimizers import groups_of, lr_factor, make_optimizers

MAX_BAD_STEPS = 3
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


class Trainer:
    """Iterate to train: `for log in Trainer(...): ...`. Between two steps its state may be saved.

    model: a transformers causal LM in fp32 whose weights are trained in place.   settings: of a resolved recipe.
    """

    def __init__(
        self, model: Any, plan: RowPlan, settings: Train, runtime: Runtime, source_names: Sequence[str] = ()
    ) -> None:
        self.model, self.plan, self.settings, self.runtime = model, plan, settings, runtime
        self.names = dict(enumerate(source_names))
        self.step = 0
        self.bad_steps = 0
        torch.manual_seed(settings.seed)
        keep_freed_memory()
        restore_classes(model)
        check_length(model, settings.max_length)
        prove_forward(model, packed=settings.packing)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(model, settings)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.bf16 = Bf16Weights(model) if runtime.precision == "bf16" else None
        self.parts: Parts = loss_parts
        if settings.compile is True:
            # One layer's code serves them all, so it takes seconds and not minutes, and any number of slots, so that a
            # resumed run computes the same. Attention stays outside (`packed_attention`); what gains is all between the
            # matrix products: norms, rotary embedding, activations, sums, conversions, each else a pass over memory.
            for layer in decoder_layers(model):
                layer.compile(dynamic=True)
            self.parts = torch.compile(fused_parts, dynamic=True)
        self.n_body, self.n_head = matrix_sizes(model)
        # Every gradient is allocated once and for all: made anew each step among activations that come and go, they
        # leave the heap full of holes, and where it is there, that of the token embedding can be sparse (`attending`).
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def __iter__(self) -> Iterator[StepLog]:
        while self.step < self.plan.total_steps:
            yield self.train_step()

    def train_step(self) -> StepLog:
        """One optimizer step over `rows_per_step` packed rows.

        The update of a step whose loss or gradient is not finite is skipped, and its log says so.
        """
        started = time.perf_counter()
        examples = [e for row in self.plan.step_rows(self.step) for e in row]
        batches = micro_batches(examples, self.settings)
        self.model.train()
        scale = 1 / max(1, sum(b.n_supervised for b in batches))
        losses = np.concatenate([np.zeros(0), *(self.loss(b, scale).cpu().double().numpy() for b in batches)])
        sources = np.concatenate([np.zeros(0, np.int64), *(b.sources for b in batches)])
        bound = self.settings.clip if self.settings.clip > 0 else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, bound))
        factor = lr_factor(self.step, self.plan.total_steps, self.settings.schedule)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * factor
        loss_sum = float(losses.sum(dtype=np.float64))
        finite = math.isfinite(loss_sum) and math.isfinite(norm)
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
            self.refresh()
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.model.zero_grad(set_to_none=False)
        self.step += 1
        n_computed = sum(b.n_computed for b in batches)
        present = np.unique(sources).tolist()
        return StepLog(
            step=self.step,
            loss=loss_sum / max(1, len(losses)),
            lr=self.settings.peak_lr * factor,
            grad_norm=norm,
            tokens=sum(len(e.ids) for e in examples),
            supervised_tokens=len(losses),
            seconds=time.perf_counter() - started,
            padding_share=1 - n_computed / max(1, sum(b.input_ids.size for b in batches)),
            computed_tokens=n_computed,
            flops=6.0 * (self.n_body * n_computed + self.n_head * len(losses)),
            source_loss={self.names.get(s, str(s)): float(losses[sources == s].mean()) for s in present},
            skipped=not finite,
        )

    def require_finite(self, log: StepLog) -> None:
        """Raises RunError after the third step in a row whose update was skipped."""
        if self.bad_steps >= MAX_BAD_STEPS:
            why = f"(loss {log.loss}, norm {log.grad_norm})"
            fact = f"loss or gradient not finite {MAX_BAD_STEPS} steps in a row {why}"
            raise RunError(f"step {log.step}", fact, "lower train.lr, or look at the rows of these steps")

    @property
    def updated(self) -> int:
        """The last step that has changed the weights."""
        return self.step - self.bad_steps

    def refresh(self) -> None:
        """After every change of the weights: what is derived from them follows."""
        if self.bf16 is not None:
            self.bf16.refresh()

    def loss(self, batch: PackedBatch, scale: float | None = None) -> torch.Tensor:
        """(n,) loss per supervised token; with `scale`, the gradient of scale * their sum is added up too."""
        head = head_of(self.model, None if self.bf16 is None else self.bf16.head)
        packed = self.settings.packing
        return batch_loss(self.model, batch, self.runtime, packed=packed, parts=self.parts, scale=scale, head=head)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> tuple[float, list[float | None], int]:
        """Held-out loss: nats per supervised token over all examples, per source, and the number of tokens."""
        self.model.eval()
        n_sources = max([len(self.names), *(e.source + 1 for e in examples)])
        sums, counts = np.zeros(n_sources), np.zeros(n_sources, np.int64)
        for batch in micro_batches(list(examples), self.settings):
            sums += np.bincount(batch.sources, self.loss(batch).cpu().double().numpy(), n_sources)
            counts += np.bincount(batch.sources, minlength=n_sources)
        self.model.train()
        by_source = [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)]
        return float(sums.sum() / max(1, counts.sum())), by_source, int(counts.sum())


@contextmanager
def resting(model: Any) -> Iterator[None]:
    """For generating with the live model: no dropout, nothing compiled anew for other shapes, and the training goes
    on with the random numbers it would have had."""
    with torch.random.fork_rng(devices=[]), evaluating(model), torch.compiler.set_stance("force_eager"):
        yield


def matrix_sizes(model: Any) -> tuple[int, int]:
    """(parameters in the blocks' matrices, in the output projection): what products are counted by. Of experts those
    that a token uses."""
    config = model.config.get_text_config()
    experts = next((n for k in EXPERTS if (n := getattr(config, k, None))), 1)
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    body = sum(p.numel() * (active if p.ndim == 3 else 1) for p in groups_of(model)["matrices"])
    return int(body), model.get_output_embeddings().weight.numel()
