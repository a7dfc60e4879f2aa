"""The loop is exact: packed == unpacked, accumulation changes nothing, a killed run resumes bit for bit."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sftflow.base.run import BaseSpec, build_model
from sftflow.errors import CheckpointError, RunError
from sftflow.mixture.pack import Example, pack_batch
from sftflow.runtime import Runtime
from sftflow.train.attention import use_packed_attention
from sftflow.train.loop import LoopSpec, RowPlan, Trainer, batch_loss, prove_forward
from sftflow.train.loss import chunked_cross_entropy
from sftflow.train.optim import lr_factor

FP32 = Runtime(device="cpu", precision="fp32", reason="test")


def examples(count: int, seed: int = 0, longest: int = 40) -> list[Example]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        n = int(rng.integers(2, longest))
        out.append(Example(ids=rng.integers(0, 320, n), mask=rng.integers(0, 2, n).astype(np.int8)))
    return out


def spec(**changes: Any) -> LoopSpec:
    values: dict[str, Any] = dict(
        max_length=64,
        tokens_per_step=512,
        micro_tokens=512,
        steps=6,
        epochs=None,
        optimizer="adamw",
        lr=3e-3,
        weight_decay=0.0,
        clip=1.0,
        schedule="linear",
        warmup=0.2,
        warmdown=0.5,
        final=0.0,
        dropout=0.0,
        seed=0,
    )
    return LoopSpec(**(values | changes))


def full_logits_loss(model: Any, rows: list[Example]) -> float:
    """The oracle: every sequence alone through the model's own forward, all logits, torch's cross-entropy."""
    total = 0.0
    for e in rows:
        logits = model(input_ids=torch.from_numpy(e.ids)[None]).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(e.ids[1:]), reduction="none")
        total = total + (losses * torch.from_numpy(e.mask[1:])).sum()
    return total  # type: ignore[return-value]


def tiny(config: str = "llama") -> Any:
    """Tiny random models of several architectures, real transformers code."""
    import transformers as tf

    torch.manual_seed(0)
    small = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    gqa = small | dict(num_key_value_heads=2)
    configs = {
        "llama": lambda: tf.LlamaConfig(**gqa, tie_word_embeddings=True),
        "qwen2": lambda: tf.Qwen2Config(**gqa),
        "qwen3": lambda: tf.Qwen3Config(**gqa, head_dim=16),
        "gpt2": lambda: tf.GPT2Config(
            vocab_size=320, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        "mistral": lambda: tf.MistralConfig(**gqa, sliding_window=6),
        "gemma2": lambda: tf.Gemma2Config(**gqa, head_dim=16, sliding_window=6),
        "olmo2": lambda: tf.Olmo2Config(**gqa),
        "smollm3": lambda: tf.SmolLM3Config(**gqa, pad_token_id=0),
    }
    return tf.AutoModelForCausalLM.from_config(configs[config](), attn_implementation="eager").float().eval()


ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "mistral", "gemma2", "olmo2", "smollm3")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_loss_and_gradient_equal_unpacked(name: str) -> None:
    model = tiny(name)
    rows = examples(6, longest=20)
    n = sum(int(e.mask[1:].sum()) for e in rows)
    expected = full_logits_loss(model, rows) / n
    expected.backward()  # type: ignore[attr-defined]
    wanted = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    use_packed_attention(model)
    total, per_token, _ = batch_loss(model, pack_batch([rows[:3], rows[3:]], 64), FP32)
    (total / n).backward()
    assert len(per_token) == n
    assert float(total.detach()) / n == pytest.approx(float(expected.detach()), abs=1e-5)  # type: ignore[attr-defined]
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, wanted[key], atol=1e-5), key


def test_an_architecture_with_state_is_refused() -> None:
    import transformers as tf

    model = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(CheckpointError, match="MambaForCausalLM cannot be trained packed"):
        prove_forward(model)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_chunked_loss_equals_full(bias: bool, softcap: float | None) -> None:
    torch.manual_seed(0)
    n = 2500  # more than two chunks
    hidden = torch.randn(n, 16, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    b = torch.randn(50, requires_grad=True) if bias else None
    targets = torch.randint(0, 50, (n,))
    total, per_token = chunked_cross_entropy(hidden, weight, targets, bias=b, softcap=softcap)
    leaves = [x for x in (hidden, weight, b) if x is not None]
    ours = torch.autograd.grad(total, leaves)
    logits = torch.nn.functional.linear(hidden, weight, b)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(per_token, expected, atol=1e-5)
    for a, e in zip(ours, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert torch.allclose(a, e, rtol=1e-4, atol=1e-3)


def run_loop(micro: int, optimizer: str, steps: int = 4) -> dict[str, torch.Tensor]:
    model = build_model(BaseSpec(params="0.1M", context=64), 320, 0)
    s = spec(micro_tokens=micro, optimizer=optimizer, steps=steps)
    for _ in Trainer(model, RowPlan(examples(60), s), s, FP32):
        pass
    return {k: p.detach().clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize(("optimizer", "bound"), [("adamw", 1e-5), ("muon", 1e-3)])
def test_accumulation_changes_nothing(optimizer: str, bound: float) -> None:
    whole, eighths = run_loop(512, optimizer), run_loop(64, optimizer)
    assert max(float((whole[k] - eighths[k]).abs().max()) for k in whole) <= bound


def test_every_row_is_used_once_an_epoch() -> None:
    rows = examples(100)
    plan = RowPlan(rows, spec(steps=None, epochs=1))
    seen = [id(e) for s in range(plan.total_steps) for row in plan.step_rows(s) for e in row]
    assert sorted(seen) == sorted(id(e) for e in rows)


def test_schedule() -> None:
    linear = [round(lr_factor(s, 10, kind="linear", warmup=0.2, warmdown=0.5, final=0.0), 2) for s in range(10)]
    assert linear == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]


def test_a_step_that_is_not_finite_is_skipped_and_three_stop_the_run() -> None:
    model = build_model(BaseSpec(params="0.1M", context=64), 320, 0)
    s = spec(steps=5)
    trainer = Trainer(model, RowPlan(examples(60), s), s, FP32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = copy.deepcopy(model.model.embed_tokens.weight)
    assert trainer.train_step().skipped
    assert torch.equal(model.model.embed_tokens.weight, before)
    trainer.train_step()
    with pytest.raises(RunError, match="not finite"):
        trainer.train_step()


def write_recipe(folder: Path, base: Path, **train: Any) -> Path:
    rows = [{"prompt": f"What is {a}+{b}?", "completion": f"It is {a + b}."} for a in range(9) for b in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {
        "out": str(folder / "run"),
        "max_length": 64,
        "tokens_per_step": 512,
        "micro_tokens": 256,
        "steps": 24,
        "save_every": 4,
        "precision": "fp32",
        "optimizer": "muon",
        "lr": 0.003,
    }
    recipe = {"base": str(base), "mixture": [{"source": "rows.jsonl"}], "validation": 4, "train": settings | train}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def sftflow(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sftflow", *args], capture_output=True, text=True, timeout=200, **kwargs
    )


class Quiet:
    """A listener that says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_bit_for_bit(how: signal.Signals, tiny_base: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()  # type: ignore[func-returns-value]
    assert sftflow("train", str(write_recipe(whole, tiny_base))).returncode == 0
    recipe = str(write_recipe(killed, tiny_base))
    process = subprocess.Popen(
        [sys.executable, "-m", "sftflow", "train", recipe], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    at = random.Random(str(how)).randint(6, 18)
    metrics = killed / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= at:
            os.kill(process.pid, how)
            break
        time.sleep(0.005)
    code = process.wait(60)
    process.communicate()
    assert code == (143 if how == signal.SIGTERM else -signal.SIGKILL)
    assert not (killed / "run" / "DONE").exists()
    refused = sftflow("train", recipe)
    assert refused.returncode == 2 and "unfinished run" in refused.stderr
    resumed = sftflow("train", recipe, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step" in resumed.stderr
    name = "checkpoint/model.safetensors"
    assert digest(whole / "run" / name) == digest(killed / "run" / name)
    logs = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, (d / "run" / "metrics.jsonl").open())]
        for d in (whole, killed)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 24
    again = sftflow("train", recipe, "--resume")
    assert again.returncode == 0 and "finished" in again.stderr


def test_resume_refuses_changed_data_and_damaged_state(tiny_base: Path, tmp_path: Path) -> None:
    from sftflow.train.resume import load_state, save_state

    model = build_model(BaseSpec(params="0.1M", context=64), 320, 0)
    s = spec()
    trainer = Trainer(model, RowPlan(examples(60), s), s, FP32)
    trainer.train_step()
    saved = save_state(tmp_path, trainer, {"data": "a"}, {}, keep=2)
    with pytest.raises(CheckpointError, match=r"data changed since this run was saved \(a -> b\)"):
        load_state(saved, trainer, {"data": "b"})
    blob = bytearray((saved / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (saved / "model.safetensors").write_bytes(blob)
    with pytest.raises(CheckpointError, match="sha256"):
        load_state(saved, trainer, {"data": "a"})


def test_a_changed_recipe_is_named_by_its_key(tiny_base: Path, tmp_path: Path) -> None:
    from sftflow.recipe import load_recipe
    from sftflow.train.run import Stopped, run_training

    path = write_recipe(tmp_path, tiny_base)

    class StopAtFive(Quiet):
        def step(self, log: Any, total: int) -> None:
            if log.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run_training(load_recipe(path), StopAtFive())
    with pytest.raises(CheckpointError, match=r"recipe.train.steps changed since this run was saved \(24 -> 30\)"):
        run_training(load_recipe(path, ["train.steps=30"]), Quiet(), resume=True)


def test_the_checkpoint_is_a_hugging_face_one(tiny_base: Path, tmp_path: Path) -> None:
    """It loads with transformers alone, renders the same, stops at the same token, and new rows are the old mean."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sftflow.checkpoint import load_assistant, prepare, resolve
    from sftflow.recipe import load_recipe
    from sftflow.train.run import run_training

    run_training(load_recipe(write_recipe(tmp_path, tiny_base, steps=2)), Quiet())
    directory = tmp_path / "run" / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assistant = load_assistant(str(tmp_path / "run"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, assistant.model.state_dict()[key]), key
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    from sftflow.chat.schema import parse_row

    assert assistant.renderer.render(parse_row([{"role": "user", "content": "hi"}], ""), reply=True).ids.tolist() == ids
    assert tokenizer.convert_tokens_to_ids("<|assistant_end|>") in np.atleast_1d(model.generation_config.eos_token_id)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    grown, _, _, _ = prepare(resolve(str(tiny_base)))
    old = base.get_input_embeddings().weight
    new = grown.get_input_embeddings().weight
    assert new.shape[0] == old.shape[0] + 8
    assert torch.allclose(new[old.shape[0] :], old.mean(0).expand(8, -1), atol=1e-6)
    assert grown.lm_head.weight.data_ptr() == new.data_ptr()  # tied as before
