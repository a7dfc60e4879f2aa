"""Random adapters as peft trains and saves them, and the logits that peft computes with each beside its base."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

IDS = torch.tensor([[0, 5, 9, 7, 17, 99, 256, 12, 301, 3], [3, 301, 17, 5, 5, 9, 200, 140, 1, 7]])
QV = ["q_proj", "v_proj"]


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": QV, **options})


def write_base(
    folder: Path, tokenizer: Any, *, tied: bool, dtype: torch.dtype = torch.float32, **generation: Any
) -> Path:
    """A random Llama with biases in its attention, and no chat template.   generation: of its generation config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {"num_key_value_heads": 2, "max_position_embeddings": 256, "attention_bias": True, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=tied, **sizes, **own)).eval()
    randomise(model.parameters(), 0.2)
    model.generation_config.update(**generation)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_other_base(folder: Path, tokenizer: Any, architecture: str) -> Path:
    """A random model of another architecture, by transformers' name of it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    own = {"gpt2": {"n_positions": 256}, "phi3": {"num_key_value_heads": 2}, "gemma3_text": more}
    own["qwen3_moe"] = {**more, **experts, "tie_word_embeddings": False}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), **sizes, **own[architecture], **ids)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model.parameters(), 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def randomise(parameters: Any, scale: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * scale)


def write_adapter(
    folder: Path,
    base: Path,
    config: Any,
    *,
    tokenizer: Any = None,
    prepare: Callable[[Any], object] = lambda model: None,
    save_embeddings: bool | str = "auto",
) -> torch.Tensor:
    """Save an adapter with random weights; its logits over `IDS`, (2, 10, rows).

    tokenizer: saved beside it.   prepare: what is done to the base before (a resized embedding).
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prepare(model)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied ends, which is what we are after
        wrapped = get_peft_model(model, config).eval()
        randomise((p for p in wrapped.parameters() if p.requires_grad), 0.2)
        wrapped.save_pretrained(folder, save_embedding_layers=save_embeddings)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return logits(wrapped)


def logits(model: Any) -> torch.Tensor:
    """Over `IDS`, with the last ids of the vocabulary behind them."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.cat([IDS, torch.arange(rows - 8, rows).view(2, 4)], 1)
    with torch.inference_mode():
        return model(ids.to(model.device)).logits.cpu()


def off_by(model: Any, wanted: torch.Tensor) -> float:
    """The largest difference of a logit, as a part of the largest logit."""
    return float((logits(model) - wanted).abs().max() / wanted.abs().max())


def train_adapter(model: Any, rows: list[Any], steps: int) -> Any:
    """The model with LoRA of rank 8 on all linear layers, trained on so many batches of four rendered rows."""
    from peft import get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(model, lora(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        losses = []
        for row in rows[4 * step : 4 * step + 4]:
            ids, mask = torch.tensor(row.ids.tolist())[None], torch.tensor(row.mask.tolist()).bool()[1:]
            scores = wrapped(ids).logits[0, :-1][mask]
            losses.append(torch.nn.functional.cross_entropy(scores, ids[0, 1:][mask], reduction="none"))
        torch.cat(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped.eval()


def greedy(model: Any, ids: list[int], n: int) -> tuple[list[int], list[float]]:
    """The n likeliest next tokens one after another, and the lead of each over the second: transformers' own forward
    pass over everything so far."""
    reply: list[int] = []
    leads: list[float] = []
    with torch.inference_mode():
        past = None
        for _ in range(n):
            given = [*ids, *reply] if past is None else reply[-1:]
            out = model(torch.tensor([given]), past_key_values=past, use_cache=True)
            past, best = out.past_key_values, out.logits[0, -1].topk(2)
            reply.append(int(best.indices[0]))
            leads.append(float(best.values[0] - best.values[1]))
    return reply, leads
