"""One layer of the model: attention with value embeddings, and the feed-forward part. No norm has a weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.nanochat.modeling_nanochat import eager_attention_forward

from sftflow.nanochat.config import SftflowNanochatConfig


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(..., size) x, its halves turned by minus the angle, against the habit: (x1 cos + x2 sin, x2 cos - x1 sin)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


class SftflowNanochatAttention(nn.Module):
    def __init__(self, config: SftflowNanochatConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        self.head_dim = width // heads
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.is_sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.value_embed = None
        if layer_idx in config.value_layers:
            self.value_embed = nn.Embedding(config.vocab_size, kv_heads * self.head_dim)
            # A parameter, no layer of its own: an adapter has no use for so few numbers.
            self.value_gate = nn.Parameter(torch.empty(kv_heads, config.value_gate_channels))

    def forward(
        self,
        x: torch.Tensor,
        input_ids: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (project(x).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.value_embed is not None:
            opened = torch.sigmoid(F.linear(x[..., : self.config.value_gate_channels], self.value_gate))
            v = v + self.config.value_gate_range * opened[..., None] * self.value_embed(input_ids).view(shape)
        eps, scale = self.config.rms_norm_eps, self.config.qk_scale
        q, k = (scale * F.rms_norm(rotated(y, *rotary), (self.head_dim,), eps=eps) for y in (q, k))
        q, k, v = (y.to(q.dtype).transpose(1, 2) for y in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        window = self.config.sliding_window if self.is_sliding else self.config.long_window
        out, weights = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, sliding_window=window, **kwargs
        )
        return self.o_proj(out.reshape(x.shape).contiguous()), weights


class SftflowNanochatMLP(nn.Module):
    def __init__(self, config: SftflowNanochatConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)).square())


class SftflowNanochatLayer(GradientCheckpointingLayer):
    def __init__(self, config: SftflowNanochatConfig, layer_idx: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = SftflowNanochatAttention(config, layer_idx)
        self.mlp = SftflowNanochatMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        size = hidden_states.shape[-1:]
        attended, _ = self.self_attn(F.rms_norm(hidden_states, size, eps=self.eps), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(F.rms_norm(hidden_states, size, eps=self.eps))
