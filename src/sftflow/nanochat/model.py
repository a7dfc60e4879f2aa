"""picollm's and nanochat's model of today, on transformers' base classes.

    x = norm(embedding of the token) + smear * norm(embedding of the token before it);   x0 = x
    layer i:   x = resid_lambdas[i] * x + x0_lambdas[i] * x0;   x += attention(norm x);   x += mlp(norm x)
    logits = cap * tanh(head(norm(x - backout * (x behind the middle layer))) / cap)

No norm has a weight. Attention goes through transformers' interface, so whoever puts another function there (packed
rows, a cache of ours) has this model, too. What looks back besides attention is the smear, and it needs nothing but the
id of the token before: `previous_ids`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from sftflow.nanochat.config import SftflowNanochatConfig
from sftflow.nanochat.layers import SftflowNanochatAttention, SftflowNanochatLayer

NONE = -1
"""the id before the first token of a conversation"""


class SftflowNanochatPreTrainedModel(PreTrainedModel):
    config: SftflowNanochatConfig
    config_class = SftflowNanochatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    needs_previous_ids = True
    """whoever lays tokens out otherwise than one sequence a row must say which token is before each"""
    _no_split_modules = ["SftflowNanochatLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # the ids beside the cache grow
    _can_record_outputs = {"hidden_states": SftflowNanochatLayer, "attentions": SftflowNanochatAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SftflowNanochatAttention) and module.value_embed is not None:
            init.normal_(module.value_gate, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, SftflowNanochatModel):
            init.ones_(module.resid_lambdas)
            init.zeros_(module.x0_lambdas)
            if self.config.smear_channels:
                init.normal_(module.smear_gate, mean=0.0, std=self.config.initializer_range)
                init.zeros_(module.smear_lambda)
            if self.config.backout_layer is not None:
                init.zeros_(module.backout_lambda)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """transformers' own, for the value embeddings, too: their new rows are the mean of the old ones."""
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        n = embedding.weight.shape[0]
        for module in self.modules():
            table = module.value_embed if isinstance(module, SftflowNanochatAttention) else None
            if table is not None and len(table.weight) != n:
                old = table.weight.detach()
                new = old.mean(0, keepdim=True).expand(max(0, n - len(old)), -1)
                table.weight = nn.Parameter(torch.cat([old[:n], new]), requires_grad=table.weight.requires_grad)
                table.num_embeddings = n
        return embedding

    @staticmethod
    def create_masks_for_generate(
        config: SftflowNanochatConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The mask of each kind of layer. Long layers keep all keys in the cache, and see the last `long_window`."""
        given = {
            "config": config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        seen = inputs_embeds.shape[1] + (0 if past_key_values is None else int(past_key_values.get_seq_length()))
        cut = config.long_window is not None and seen > config.long_window
        overlay = sliding_window_overlay(config.long_window) if cut else None
        masks = {"full_attention": create_causal_mask(**given, and_mask_function=overlay)}
        if "sliding_attention" in config.layer_types:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**given)
        return masks


class SftflowNanochatModel(SftflowNanochatPreTrainedModel):
    def __init__(self, config: SftflowNanochatConfig) -> None:
        super().__init__(config)
        n = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SftflowNanochatLayer(config, i) for i in range(n)])
        self.resid_lambdas = nn.Parameter(torch.empty(n))
        self.x0_lambdas = nn.Parameter(torch.empty(n))
        if config.smear_channels:
            self.smear_gate = nn.Parameter(torch.empty(config.smear_channels))
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if config.backout_layer is not None:
            self.backout_lambda = nn.Parameter(torch.empty(1))
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        previous_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """previous_ids: (batch, tokens) the id before each token, -1 where a conversation begins. By default the one to
        its left (with a cache, the last one that went into it), and -1 at position 0 and behind padding.

        Raises ValueError where there are no ids, or a cache has tokens whose ids this model was not given.
        """
        config = self.config
        if input_ids is None:  # of `generate(inputs_embeds=...)`
            raise ValueError("it is computed from ids: the smear and the value embeddings look them up")
        if (config.use_cache if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = (torch.arange(input_ids.shape[1], device=input_ids.device) + past)[None]
        if previous_ids is None:
            previous_ids = self._previous(input_ids, attention_mask, position_ids, past_key_values)
        x = self._normed(self.embed_tokens(input_ids))
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = self.create_masks_for_generate(config, x, attention_mask, past_key_values, position_ids)
        if config.smear_channels:
            gate = torch.sigmoid(F.linear(x[..., : config.smear_channels], self.smear_gate[None]))
            gate = (self.smear_lambda * gate).masked_fill((previous_ids == NONE)[..., None], 0.0)
            x = x + gate * self._normed(self.embed_tokens(previous_ids.clamp(min=0)))
        rotary = self._rotary(position_ids, x.dtype)
        x0, middle = x, None
        for i, layer in enumerate(self.layers):
            x = layer(
                self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0,
                input_ids=input_ids,
                rotary=rotary,
                attention_mask=masks[config.layer_types[i]],
                past_key_values=past_key_values,
                **kwargs,
            )
            if i == config.backout_layer:
                middle = x
        if middle is not None:
            x = x - self.backout_lambda * middle
        self._remember(input_ids, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self._normed(x), past_key_values=past_key_values)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.config.rms_norm_eps)

    def _rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, tokens, 1, size / 2) cos and sin of each position's angles."""
        size = self.config.hidden_size // self.config.num_attention_heads
        steps = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
        angles = positions[..., None, None].float() * (1.0 / self.config.rope_parameters["rope_theta"] ** steps)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _remember(self, input_ids: torch.Tensor, cache: Cache | None) -> None:
        """Keep the ids of a cache's tokens behind the layers' keys and values: as one more layer of it, so that
        whatever reorders, selects or crops those does it to these."""
        n = self.config.num_hidden_layers
        if cache is None or len(cache.layers) < n:
            return
        if len(cache.layers) == n:
            cache.layers.append(DynamicLayer())
        ids = input_ids[:, None, :, None]
        cache.layers[n].update(ids, ids)

    def _previous(
        self, input_ids: torch.Tensor, attention_mask: Any, positions: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        past = 0 if cache is None else int(cache.get_seq_length())
        before = torch.full_like(input_ids[:, :1], NONE)
        if cache is not None and past:
            known = cache.layers[self.config.num_hidden_layers :]
            if not known or known[0].get_seq_length() != past:
                raise ValueError("the cache has tokens whose ids this model was not given: pass previous_ids")
            before = known[0].keys[:, 0, -1:, 0]
        previous = torch.cat([before.to(input_ids.device), input_ids[:, :-1]], 1)
        begins = positions == 0
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            behind = F.pad(attention_mask, (1, 0))[:, past : past + input_ids.shape[1]]
            begins = begins | (behind == 0)
        return previous.masked_fill(begins, NONE)


class SftflowNanochatForCausalLM(SftflowNanochatPreTrainedModel, GenerationMixin):
    def __init__(self, config: SftflowNanochatConfig) -> None:
        super().__init__(config)
        self.model = SftflowNanochatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        previous_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits in fp32; `loss` where there are labels (-100: not counted), which are shifted here."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            previous_ids=previous_ids,
            **kwargs,
        )
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, wanted, :]).float()
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        return CausalLMOutputWithPast(
            loss=None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs),
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
