"""The training loop, for base pretraining and supervised fine-tuning alike: only the masks differ.

Loss of a step = sum over supervised tokens / number of supervised tokens of the whole step, floor 1; where tokens have
weights, the weighted sum / the sum of the weights. Each micro-batch adds its SUM divided by the step's, so neither
accumulation nor the number of processes can change the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch import config as functorch_config

from sftflow.foundation.errors import RunError
from sftflow.foundation.ranks import ranks
from sftflow.foundation.runtime import Runtime, keep_freed_memory
from sftflow.packing.attending import evaluating
from sftflow.packing.check_model import check_length, prove_forward
from sftflow.packing.loss import Parts, batch_loss, fused_parts, head_of, loss_parts
from sftflow.packing.pack import Example, PackedBatch
from sftflow.packing.token_rows import token_rows
from sftflow.recipe import Train
from sftflow.training.batch_plan import RowPlan, StepLog, Tally, micro_batches, weight_of
from sftflow.training.bf16_weights import Bf16Weights, decoder_layers, halve_frozen, restore_classes
from sftflow.training.optimizers import groups_of, lr_factor, make_optimizers
from sftflow.training.sharding import Gradients, add_gradient, gathered_head, shard

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
        self.ranks = ranks()
        self.sharded = settings.shard == "full" and self.ranks.world > 1
        torch.manual_seed(settings.seed + 1_000_003 * self.ranks.rank)  # no two ranks drop out alike
        keep_freed_memory()
        restore_classes(model)
        check_length(model, settings.max_length)
        prove_forward(model, packed=settings.packing)
        self.flops_body, self.flops_head = flops_a_token(model)
        if runtime.precision == "bf16":
            halve_frozen(model)
        if self.sharded:
            shard(model, self.ranks, runtime.device, bf16=runtime.precision == "bf16")
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(model, settings)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ends = (token_rows(end()) for end in (model.get_input_embeddings, model.get_output_embeddings) if end())
        self.token_rows = [rows for rows in ends if rows is not None]
        self.bf16 = Bf16Weights(model) if runtime.precision == "bf16" else None
        self.parts: Parts = loss_parts
        if settings.compile is True:
            # One layer's code serves them all, so it takes seconds and not minutes, and any number of slots, so that a
            # resumed run computes the same. Attention stays outside (`packed_attention`); what gains is all between the
            # matrix products: norms, rotary embedding, activations, sums, conversions, each else a pass over memory.
            if runtime.device == "cpu":
                keep_fewer_activations()
            for layer in decoder_layers(model):
                layer.compile(dynamic=True)
            self.parts = torch.compile(fused_parts, dynamic=True)
        self.gradients = Gradients(self.trained, self.ranks)

    def __iter__(self) -> Iterator[StepLog]:
        while self.step < self.plan.total_steps:
            yield self.train_step()

    def train_step(self) -> StepLog:
        """One optimizer step over `rows_per_step` packed rows.

        The update of a step whose loss or gradient is not finite is skipped, and its log says so.
        """
        started = time.perf_counter()
        examples = [e for row in self.plan.step_rows(self.step) for e in row]
        batches = micro_batches(examples, self.settings, self.ranks, even=self.sharded)
        self.model.train()
        scale = 1 / weight_of(examples)
        found = Tally(examples)
        for batch in batches:
            found.add(batch, self.loss(batch, scale))
        self.gradients.sum_over_ranks()
        found.over_ranks(self.ranks)
        norm = self.gradients.clip(self.settings.clip if self.settings.clip > 0 else math.inf)
        factor = lr_factor(self.step, self.plan.total_steps, self.settings.schedule)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * factor
        finite = math.isfinite(found.loss) and math.isfinite(norm)
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
            self.refresh()
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.model.zero_grad(set_to_none=False)
        self.step += 1
        return StepLog(
            step=self.step,
            loss=found.loss,
            lr=self.settings.peak_lr * factor,
            grad_norm=norm,
            tokens=sum(len(e.ids) for e in examples),
            supervised_tokens=found.supervised,
            seconds=time.perf_counter() - started,
            padding_share=1 - found.computed / max(1, found.slots),
            computed_tokens=found.computed,
            flops=self.flops_body * found.computed + self.flops_head * found.supervised,
            source_loss={self.names.get(s, str(s)): x for s, x in enumerate(found.by_source()) if x is not None},
            skipped=not finite,
            supervised_weight=found.weight,
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
        for rows in self.token_rows:
            rows.refresh()
        if self.bf16 is not None:
            self.bf16.refresh()

    def loss(self, batch: PackedBatch, scale: float | None = None) -> torch.Tensor:
        """(n,) loss per supervised token; with `scale`, the gradient of scale * their sum is added up too."""
        head = head_of(self.model, None if self.bf16 is None else self.bf16.head)
        kept = head.weight
        if self.sharded:
            head = gathered_head(head, self.ranks, bf16=self.runtime.precision == "bf16", trained=scale is not None)
        packed = self.settings.packing
        losses = batch_loss(self.model, batch, self.runtime, packed=packed, parts=self.parts, scale=scale, head=head)
        if head.grad is not None:
            add_gradient(kept, head.grad)
        return losses

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> Tally:
        """Held-out loss: nats per supervised token over all examples, weighted as in training, and per source."""
        self.model.eval()
        found = Tally(examples, len(self.names))
        for batch in micro_batches(examples, self.settings, self.ranks, even=self.sharded):
            found.add(batch, self.loss(batch))
        found.over_ranks(self.ranks)
        self.model.train()
        return found


@contextmanager
def resting(model: Any) -> Iterator[None]:
    """For generating with the live model: no dropout, nothing compiled anew for other shapes, and the training goes
    on with the random numbers it would have had."""
    with torch.random.fork_rng(devices=[]), evaluating(model), torch.compiler.set_stance("force_eager"):
        yield


def keep_fewer_activations() -> None:
    """Tell torch's compiler to compute elementwise results (an activation times its gate, a norm) again in the backward
    pass, also where a matrix product needs them there: a quarter of what a layer keeps, and no time, on a CPU."""
    for what in ("materialized_backward", "used_far_apart", "long_fusible_chains"):
        setattr(functorch_config, f"ban_recompute_{what}", False)


def flops_a_token(model: Any) -> tuple[float, float]:
    """Floating-point operations of (a computed token in the blocks, a supervised one in the output projection): 2 for
    each number of a matrix forward, 2 backward, and 2 for its gradient where it is trained. Of experts those that a
    token uses."""
    config = model.config.get_text_config()
    experts = next((n for k in EXPERTS if (n := getattr(config, k, None))), 1)
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    body = sum(_flops(p) * (active if p.ndim == 3 else 1) for p in groups_of(model, frozen=True)["matrices"])
    return body, _flops(head_of(model).weight)


def _flops(weight: torch.Tensor) -> float:
    return weight.numel() * (6.0 if weight.requires_grad else 4.0)
