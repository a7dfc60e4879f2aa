"""`sftflow base`: text in, a tokenizer and a tiny base out; stopped and gone on with, it is the same bit for bit."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.runs import Quiet, digest
from helpers.runs import run as sftflow
from sftflow.checkpoint import load_assistant
from sftflow.data.documents import read_documents
from sftflow.foundation.errors import CheckpointError, DataError
from sftflow.foundation.runtime import Runtime
from sftflow.pretraining.pretrain import BaseSpec, read_corpus, train_base

FP32 = Runtime(device="cpu", precision="fp32", reason="test")
SPEC = BaseSpec(params="0.1M", vocab=320, tokens=12 * 512, context=64, tokens_per_step=512)


class StopAt(Quiet):
    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, log: Any, total: int) -> None:
        if log.step == self.at:
            raise KeyboardInterrupt


def write_text(folder: Path) -> Path:
    rng = random.Random(0)
    words = ["sun", "moon", "river", "stone", "walks", "sings", "the", "a", "old", "new", "bird", "tree"]
    documents = [" ".join(rng.choices(words, k=60)) + "." for _ in range(200)]
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def train(text: Path, out: Path, listener: Any = None, *, resume: bool = False) -> dict[str, Any]:
    return train_base([text], out, SPEC, FP32, listener or Quiet(), resume=resume, save_every=4)


def test_a_stopped_base_goes_on_bit_for_bit(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    card = train(text, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(text, tmp_path / "parts", StopAt(7))
    with pytest.raises(CheckpointError, match="an unfinished run is in it"):
        train(text, tmp_path / "parts")
    assert train(text, tmp_path / "parts", resume=True)["bits_per_byte"] == card["bits_per_byte"]
    for name in ("checkpoint/model.safetensors", "resume/step-00000012/optimizer.safetensors"):
        assert digest(tmp_path / "whole" / name) == digest(tmp_path / "parts" / name)
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13)) and rows[-1]["loss"] < rows[0]["loss"]
    with pytest.raises(CheckpointError, match=r"a finished run is in it \(checkpoint\); name another folder"):
        train(text, tmp_path / "parts")


def test_bits_per_byte_are_those_of_the_plain_forward_pass(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = write_text(tmp_path)
    out = tmp_path / "base"
    [ours] = train(text, out)["bits_per_byte"].values()
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint", dtype=torch.float32)
    model.load_state_dict(load_file(out / "resume" / "step-00000012" / "model.safetensors"), strict=False)
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint")
    [held_out] = read_corpus([text], (), SPEC.seed)[1].values()
    ids = torch.tensor([i for document in held_out for i in tokenizer(document).input_ids])
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        logits = model(rows).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="sum")
    n_bytes = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True)) for row in rows)
    assert ours == pytest.approx(float(nats) / math.log(2) / n_bytes, abs=1e-3)


def test_the_command_writes_a_checkpoint_with_its_card(tmp_path: Path) -> None:
    text, out = write_text(tmp_path), tmp_path / "base"
    done = sftflow("base", str(text), "--out", str(out), "--params", "0.1M", "--vocab", "320", "--tokens", "16K")
    assert done.returncode == 0 and "held-out bits per byte" in done.stderr, done.stderr
    assert "Held-out bits per byte" in (out / "checkpoint" / "README.md").read_text()
    assert load_assistant(str(out)).info["kind"] == "base"
    assert f"run         {out}\nbase        a new one\n" in done.stderr
    assert "bits per byte of 1% of the documents" in done.stderr
    assert f"next        sftflow train RECIPE --set base={out}\n" in done.stderr
    assert "measuring held-out bits per byte" in (out / "log.txt").read_text()


def test_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="no text in it"):
        train(tmp_path / "empty.txt", tmp_path / "base")


def test_the_documents_of_a_file(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "One."}\n{"text": "Two."}\n')
    assert list(read_documents(own)) == ["One.", "Two."]
    with pytest.raises(DataError, match=r"absent\.txt: no such file"):
        list(read_documents(tmp_path / "absent.txt"))
