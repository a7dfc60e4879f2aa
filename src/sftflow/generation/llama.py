"""One decoding step of a Llama, computed without transformers' modules.

A step of a small model is hundreds of small operations, and most of its time goes into the Python around them. Here
weights that multiply the same rows stand side by side, nothing is looked up twice, and rotary angles are a table:

    x += Wo attend(rotate(Wqkv norm(x)))        x += Wdown(silu(gate) * up), [gate, up] = Wgu norm(x)

`step_of` knows such a model by the classes of all its parts, and `check_decoder` proves the step on the very model. All
others, and prompts, are computed by the model's own forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sftflow.generation.kv_cache import Decoding
from sftflow.generation.onednn import (
    Forwards,
    Product,
    forward_by,
    linear_layers,
    may_order,
    product,
    times,
    transposed,
)
from sftflow.packing.attention import Scoring
from sftflow.packing.length_limits import length_limit

PARTS = {
    "transformers.models.llama.modeling_llama": {
        "LlamaForCausalLM", "LlamaModel", "LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm",
        "LlamaRotaryEmbedding",
    },
    "transformers.activations": {"SiLUActivation"},
    "torch.nn.modules.activation": {"SiLU"},
    "torch.nn.modules.container": {"ModuleList"},
    "torch.nn.modules.linear": {"Linear"},
    "torch.nn.modules.sparse": {"Embedding"},
}  # fmt: skip
"""by module, the classes of which a model that is computed here is made"""
TABLE = 512
"""positions by which the table of rotary angles grows"""


@dataclass(frozen=True)
class _Norm:
    """x / rms(x) * weight, by the length of x: rms(x) = hypot(|x|, sqrt(width * eps)) / sqrt(width)."""

    weight: torch.Tensor
    least: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), self.least)
        return x.div(length).mul_(self.weight)


@dataclass(frozen=True)
class _Layer:
    """into: queries, keys and values side by side.   out, down: (in, out) weights, whose product is added to x."""

    norm1: _Norm
    into: Product
    out: torch.Tensor
    norm2: _Norm
    gate_up: Product
    down: torch.Tensor


class LlamaStep:
    """The logits of every row's next token.   forwards: the model's linear layers by the same copies of the weights."""

    def __init__(self, model: Any) -> None:
        config, body = model.config, model.model
        self.forwards: Forwards = []
        self._embedding, self._rotary, self._norm = body.embed_tokens, body.rotary_emb, _norm(body.norm)
        self._layers = [self._layer(layer) for layer in body.layers]
        self._head = product(model.lm_head)
        self.forwards.append((model.lm_head, forward_by(self._head)))
        attention = body.layers[0].self_attn
        self._size, self._wide = attention.head_dim, config.intermediate_size
        self._heads, self._kv = config.num_attention_heads, config.num_key_value_heads
        self._how = Scoring(attention.scaling)
        self._cos = self._sin = torch.empty(0, 1, self._size)

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            _norm(layer.input_layernorm),
            self._beside(attention.q_proj, attention.k_proj, attention.v_proj),
            self._alone(attention.o_proj),
            _norm(layer.post_attention_layernorm),
            self._beside(mlp.gate_proj, mlp.up_proj),
            self._alone(mlp.down_proj),
        )

    def _beside(self, *layers: Any) -> Product:
        weight = transposed(layers)
        parts = weight.split([layer.out_features for layer in layers], 1)
        self.forwards += [(layer, forward_by(times(part))) for layer, part in zip(layers, parts, strict=True)]
        return times(weight)

    def _alone(self, layer: Any) -> torch.Tensor:
        weight = transposed([layer])
        self.forwards.append((layer, forward_by(times(weight))))
        return weight

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, plan: Decoding) -> torch.Tensor:
        """ids, positions: (rows,), each row's last token and how many stand before it -> (rows, vocabulary)."""
        n, heads, kv, size, wide = len(ids), self._heads, self._kv, self._size, self._wide
        self._grow(max(plan.cache.lengths) + 1)
        cos, sin = self._cos[positions], self._sin[positions]
        x = F.embedding(ids, self._embedding.weight)
        for number, layer in enumerate(self._layers):
            states = layer.into(layer.norm1(x)).view(n, heads + 2 * kv, size)
            turned = states.narrow(1, 0, heads + kv)
            # rotate_half: the halves change places, the first one's sign is the table's
            turned = torch.roll(turned, size // 2, -1).mul_(sin).addcmul_(turned, cos)
            q, k, v = turned.narrow(1, 0, heads), turned.narrow(1, heads, kv), states.narrow(1, heads + kv, kv)
            attended = plan.attend(number, q, k, v, self._how).reshape(n, -1)
            x = torch.addmm(x, attended, layer.out)
            both = layer.gate_up(layer.norm2(x))
            x = torch.addmm(x, F.silu(both.narrow(1, 0, wide)).mul_(both.narrow(1, wide, wide)), layer.down)
        return self._head(self._norm(x))

    def _grow(self, longest: int) -> None:
        """Tables of the angles' cosines and signed sines, (positions, 1, size) each, for at least so many."""
        if longest > len(self._cos):
            places = torch.arange(-(-max(longest, 2 * len(self._cos)) // TABLE) * TABLE)[None]
            cos, sin = (x[0].unsqueeze(1) for x in self._rotary(self._embedding.weight, places))
            half = self._size // 2
            self._cos, self._sin = cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)


def _norm(norm: Any) -> _Norm:
    width = norm.weight.numel()
    return _Norm(norm.weight.detach() * width**0.5, torch.tensor((width * norm.variance_epsilon) ** 0.5))


def is_plain(model: Any) -> bool:
    """Whether all parts of the model are a Llama's, as transformers has them, and nobody listens in on one."""
    return all(
        type(m).__name__ in PARTS.get(type(m).__module__, ())
        and "forward" not in vars(m)
        and not (m._forward_hooks or m._forward_pre_hooks)
        for m in model.modules()
    )


def step_of(model: Any) -> LlamaStep | None:
    """None unless the model `is_plain`, and its weights can be copied."""
    if type(model).__name__ != "LlamaForCausalLM" or not (is_plain(model) and may_order(model)):
        return None
    if length_limit(model) is not None or any(m.bias is not None for m in linear_layers(model)):
        return None
    numbers = [layer.self_attn.layer_idx for layer in model.model.layers]
    if model.config.hidden_act != "silu" or numbers != list(range(model.config.num_hidden_layers)):
        return None
    with torch.inference_mode():
        return LlamaStep(model)
