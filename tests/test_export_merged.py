"""A LoRA adapter merged into its base: the same logits as peft gives, in a checkpoint like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sftflow import checkpoint
from sftflow.foundation.errors import CheckpointError, RecipeError

IDS = torch.tensor([[0, 17, 99, 256, 12, 301, 7]])


def run(*args: str) -> Any:
    from sftflow.cli import app

    return CliRunner().invoke(app, ["export", *args])


@pytest.fixture
def adapter(tmp_path: Path, tiny_base: Path) -> tuple[Path, torch.Tensor]:
    """(an adapter directory as peft saves it, the logits of base and adapter together)."""
    peft = pytest.importorskip("peft", reason="adapters: pip install peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * 0.2)
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        return tmp_path / "adapter", model(IDS).logits


def test_merged_is_base_and_adapter(tmp_path: Path, tiny_base: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, logits = adapter
    out = tmp_path / "merged"
    result = run(str(directory), "--to", "merged", "--out", str(out))
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    vocabulary = logits.shape[-1]
    with torch.inference_mode():
        assert torch.allclose(merged(IDS).logits[..., :vocabulary], logits, atol=1e-5)
        assert not torch.allclose(base(IDS).logits, logits, atol=1e-2)
    assert not any("lora" in name for name in merged.state_dict())
    assert AutoTokenizer.from_pretrained(out).chat_template is None  # as the base
    assistant = checkpoint.load_assistant(str(out))
    assert assistant.info["merged"]["base"] == str(tiny_base)
    assert run(str(directory), "--to", "merged", "--type", "bf16", "--out", str(out)).exit_code == 0  # ours: replaced
    assert checkpoint.load_assistant(str(out)).info["dtype"] == "bfloat16"


def test_the_base_may_be_named(tmp_path: Path, tiny_base: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    directory, _ = adapter
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    out = tmp_path / "merged"
    result = run(str(directory), "--to", "merged", "--out", str(out))
    assert isinstance(result.exception, CheckpointError) and "--base BASE" in str(result.exception)
    assert not out.exists()
    assert run(str(directory), "--to", "merged", "--out", str(out), "--base", str(tiny_base)).exit_code == 0
    result = run(str(directory), "--to", "merged", "--out", str(tmp_path / "x"), "--base", "builtin:tiny")
    assert isinstance(result.exception, CheckpointError) and "it does not fit this base" in str(result.exception)
    assert not (tmp_path / "x").exists()


def test_what_is_no_adapter_is_said(tmp_path: Path, tiny_base: Path) -> None:
    result = run(str(tiny_base), "--to", "merged", "--out", str(tmp_path / "merged"))
    assert isinstance(result.exception, CheckpointError) and result.exception.exit_code == 2
    assert "it is no adapter (no adapter_config.json in it)" in str(result.exception)


def test_another_folder_is_not_replaced(tmp_path: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    directory, _ = adapter
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    result = run(str(directory), "--to", "merged", "--out", str(tmp_path / "mine"))
    assert isinstance(result.exception, RecipeError)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    result = run(str(directory), "--to", "merged", "--out", str(tmp_path / "mine" / "notes.txt" / "merged"))
    assert isinstance(result.exception, RecipeError) and "notes.txt is a file" in str(result.exception)
