"""`sftflow base`: text in, a tokenizer and a tiny base out; stopped and gone on with, it is the same bit for bit."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.runs import Quiet, digest
from helpers.runs import run as sftflow
from sftflow.checkpoint import load_assistant
from sftflow.data.documents import read_documents
from sftflow.foundation.errors import CheckpointError, DataError
from sftflow.foundation.runtime import Runtime
from sftflow.packing.pack import Example
from sftflow.pretraining.loops import NEAR, REPEATED, against_loops, distinct_3, ends_in_a_loop, repeats
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


def test_a_base_is_trained_further(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    first = train(text, tmp_path / "first")
    spec = replace(SPEC, start=str(tmp_path / "first"), skip=SPEC.tokens, against_loops=True)
    card = train_base([text], tmp_path / "second", spec, FP32, Quiet(), resume=False)
    assert sum(card["bits_per_byte"].values()) < sum(first["bits_per_byte"].values())
    for name in ("tokenizer.json", "config.json"):
        assert digest(tmp_path / "second" / "checkpoint" / name) == digest(tmp_path / "first" / "checkpoint" / name)
    assert f"{SPEC.tokens:,} by {tmp_path / 'first'} before" in (tmp_path / "second/checkpoint/README.md").read_text()
    with pytest.raises(DataError, match="fewer than 64 tokens of text behind the first 10,000,000; give more text, or"):
        train_base([text], tmp_path / "third", replace(spec, skip=10_000_000), FP32, Quiet(), resume=False)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=200))
def test_what_was_said_before_is_found(ids: list[int]) -> None:
    said = [
        any(
            ids[j - REPEATED + 1 : j + 1] == ids[i - REPEATED + 1 : i + 1]
            for j in range(max(REPEATED - 1, i - NEAR), i)
        )
        for i in range(len(ids))
    ]
    assert repeats(np.array(ids)).tolist() == [found and i >= REPEATED - 1 for i, found in enumerate(said)]


def test_rows_against_loops_hide_what_is_repeated_and_lose_nothing_else() -> None:
    """All that was there before comes in its order, supervised, until the row is full."""
    plain = [Example(ids=np.arange(1000 * i, 1000 * i + 512), mask=np.ones(512, np.int8)) for i in range(40)]
    changed = 0
    for row, now in zip(plain, against_loops(plain, seed=0), strict=True):
        assert len(now.ids) == 512 == len(now.mask)
        kept = now.ids[:-1][now.mask[:-1] == 1]  # a row's last token is always supervised
        assert kept.tolist() == row.ids[: len(kept)].tolist()
        changed += len(kept) < 511
    assert 10 <= changed <= 30


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([1, 2, 3, 4] * 3, True),
        ([9, 8, 7] + [1, 2, 3, 4] * 3, True),
        ([1, 2, 3, 4] * 3 + [9], False),
        ([1, 2, 3, 4] * 2, False),
        ([5] * 11, False),
        ([5] * 12, True),
        (list(range(32)) * 3, True),
        (list(range(33)) * 3, False),
        ([], False),
    ],
)
def test_the_end_of_a_loop_is_told(ids: list[int], loops: bool) -> None:
    assert ends_in_a_loop(ids) is loops
    assert distinct_3([1, 2, 3, 1, 2, 3]) == 3 / 4 and distinct_3([]) == 1


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
