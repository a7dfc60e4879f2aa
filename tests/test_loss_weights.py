"""Weights between 0 and 1: from a row to the step's loss, as one row at a time through the model's own forward pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sftflow as sf
from helpers.architectures import tiny
from helpers.training import BF16, FP32, shared_rows, spec, weighted
from sftflow.api.rows import render
from sftflow.chat.render import Renderer
from sftflow.chat.schema import parse_row
from sftflow.chat.verify import ENDS, verify
from sftflow.data.mixture import Mixture, build_mixture
from sftflow.data.mixture_part import build_part
from sftflow.data.parts import parse_part
from sftflow.data.run_rows import read_held_out
from sftflow.data.store import spans_of
from sftflow.fingerprint import rows_digest
from sftflow.foundation.errors import SchemaError
from sftflow.packing.loss import batch_loss, fused_parts
from sftflow.packing.pack import Example
from sftflow.recipe import parse_recipe
from sftflow.training.batch_plan import RowPlan, micro_batches, weight_of
from sftflow.training.trainer import Trainer

TALK = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "How are you?", "weight": 0.5},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "The answer is 42.", "weight": 0.25},
    {"role": "user", "content": "I am fine."},
    {"role": "assistant", "content": "It was cold.", "weight": 0},
    {"role": "user", "content": "The cat sat."},
    {"role": "assistant", "content": "Thank you."},
]
PLAIN = [{k: v for k, v in m.items() if k != "weight" or v == 0} for m in TALK]


# ---- the loss


def naive(model: Any, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor], dict[int, float]]:
    """One row at a time, all its logits in fp32: the loss, its gradients, and the loss of each source."""
    model.zero_grad()
    total, sums = 0.0, {}
    for e in examples:
        weights = torch.from_numpy((e.mask if e.weights is None else e.weights)[1:].astype(np.float32))
        ids = torch.from_numpy(e.ids)[None]
        nats = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        (nats * weights).sum().backward()
        total += float(weights.double().sum())
        have = sums.setdefault(e.source, [0.0, 0.0])
        have[0] += float((nats.detach().double() * weights).sum())
        have[1] += float(weights.double().sum())
    gradients = {name: p.grad.clone() / total for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = sum(s for s, _ in sums.values()) / total
    return loss, gradients, {source: s / w for source, (s, w) in sums.items()}


@pytest.mark.parametrize(
    ("architecture", "way"),
    [
        ("Llama", {}),
        ("Llama", {"packing": False}),
        pytest.param("Llama", {"share_prefixes": False}, marks=pytest.mark.slow),
        ("Gemma2", {}),
    ],
)
def test_loss_and_gradients_are_those_of_one_row_at_a_time(architecture: str, way: dict[str, Any]) -> None:
    """Packed with shared beginnings (whose rows are there twice, at other weights), padded, accumulated."""
    model = tiny(architecture).eval()
    rows = [replace(e, source=n % 3) for n, e in enumerate(weighted(shared_rows()[20:40]))]
    loss, gradients, by_source = naive(model, rows)
    settings = spec(micro_tokens=128, tokens_per_step=4096, steps=None, epochs=1, **way)
    batches = micro_batches(rows, settings)
    assert len(batches) > 2
    for batch in batches:
        batch_loss(model, batch, FP32, packed=settings.packing, scale=1 / weight_of(rows))
    largest = max(1.0, *(float(g.abs().max()) for g in gradients.values()))
    assert all((p.grad - gradients[n]).abs().max() <= 1e-6 * largest for n, p in model.named_parameters())
    model.zero_grad()
    log = Trainer(model, RowPlan(rows, settings), settings, FP32, ["a", "b", "c"]).train_step()
    assert log.loss == pytest.approx(loss, abs=1e-6)
    assert log.supervised_weight == pytest.approx(sum(e.weight for e in rows))
    assert log.supervised_tokens == sum(int(e.mask[1:].sum()) for e in rows)
    assert log.source_loss == pytest.approx({"abc"[s]: x for s, x in by_source.items()}, abs=1e-6)
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert log.grad_norm == pytest.approx(float(norm), rel=1e-5)


def test_what_is_fused_and_bf16_follow() -> None:
    model = tiny("Llama").eval()
    rows = weighted(shared_rows()[20:40])
    _, gradients, _ = naive(model, rows)
    for runtime, parts, bound in ((FP32, fused_parts, 1e-6), (BF16, fused_parts, 0.03)):
        for batch in micro_batches(rows, spec(micro_tokens=256)):
            batch_loss(model, batch, runtime, parts=parts, scale=1 / weight_of(rows))
        off = torch.cat([(p.grad - gradients[n]).flatten() for n, p in model.named_parameters()]).norm()
        assert off <= bound * torch.cat([g.flatten() for g in gradients.values()]).norm()
        model.zero_grad()


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_one_weight_everywhere_is_a_mean_and_changes_nothing(optimizer: str) -> None:
    """Also where the sum of the weights is below 1. Weights of 1 are bitwise those of none."""

    def run(weight: float | None) -> list[tuple[float, float, int, float | None]]:
        rows = shared_rows()
        if weight is not None:
            rows = [replace(e, weights=weight * e.mask.astype(np.float64)) for e in rows]
        s = spec(optimizer=optimizer, steps=3, tokens_per_step=128, micro_tokens=64)
        logs = list(Trainer(tiny("Llama"), RowPlan(rows, s), s, FP32))
        return [(log.loss, log.grad_norm, log.supervised_tokens, log.supervised_weight) for log in logs]

    plain = run(None)
    assert run(1.0) == plain and all(weight is None for *_, weight in plain)
    bound = 1e-5 if optimizer == "adamw" else 1e-3
    for weight in (0.5, 0.001):
        for (loss, norm, n, _), (was, norm_was, n_was, _) in zip(run(weight), plain, strict=True):
            assert (loss, n) == (pytest.approx(was, abs=bound), n_was) and norm == pytest.approx(norm_was, rel=bound)


def test_nothing_supervised_is_no_division_by_nothing() -> None:
    rows = [Example(ids=np.arange(9), mask=np.zeros(9, np.int8)), Example(ids=np.arange(9), mask=np.ones(9, np.int8))]
    assert weight_of(rows[:1]) == 1 and weight_of(rows) == 8


# ---- rows


def test_the_tokens_of_a_reply_have_its_weight(renderer: Renderer) -> None:
    row = parse_row(TALK, "f:1")
    found, plain = renderer.render(row), renderer.render(parse_row(PLAIN, "f:1"))
    assert np.array_equal(found.ids, plain.ids) and np.array_equal(found.mask, plain.mask)
    assert plain.weights is None and found.weights is not None
    stops = np.flatnonzero(np.isin(found.ids, renderer.stop_ids()) & (found.mask == 1))
    expected = np.zeros(len(found.ids))
    for start, end, weight in zip([0, *stops], [*stops], (0.5, 0.25, 1), strict=False):
        expected[start + (start > 0) : end + 1] = weight
    assert np.array_equal(found.weights, expected * found.mask)
    assert verify(renderer, row, found) == {}
    for wrong in (None, found.mask.astype(float), np.roll(found.weights, 1), found.weights * 0.5):
        assert ENDS in verify(renderer, row, replace(found, weights=wrong))
    half = parse_row({"messages": TALK, "weight": 0.5}, "f:1")
    assert np.array_equal(renderer.render(half).weights, 0.5 * found.weights)  # type: ignore[arg-type]
    assert verify(renderer, half, renderer.render(half)) == {}
    assert renderer.render(row.before(5), add_generation_prompt=True).weights is None
    again = parse_row(half.to_row(), "f:1")
    assert (again.messages, again.weight) == (half.messages, half.weight)


def test_supervise_all_weighs_replies_and_rows(renderer: Renderer) -> None:
    whole = renderer.supervising("all")
    row = parse_row({"messages": TALK, "weight": 0.5}, "f:1")
    found, replies = whole.render(row), renderer.render(row)
    assert found.weights is not None and replies.weights is not None
    assert np.array_equal(found.weights[replies.mask == 1], replies.weights[replies.mask == 1])
    others = (found.mask == 1) & (replies.mask == 0)
    assert others.any() and set(found.weights[others]) == {0.5} and not found.weights[found.mask == 0].any()
    assert verify(whole, row, found) == {}


def test_rows_of_tokens_are_weighed(renderer: Renderer) -> None:
    found = renderer.render(parse_row(TALK, "f:1"))
    ids, mask, weights = found.ids.tolist(), found.mask.tolist(), found.weights.tolist()  # type: ignore[union-attr]
    labels = [i if m else -100 for i, m in zip(ids, mask, strict=True)]
    ways: list[dict[str, Any]] = [{"weights": weights}, {"mask": mask, "weights": weights}, {"loss_mask": weights}]
    for beside in [*ways, {"labels": labels, "weights": weights}]:
        row = parse_row({"input_ids": ids, **beside}, "f:1")
        rendered = renderer.render(row)
        assert (rendered.mask.tolist(), rendered.weights.tolist()) == (mask, weights)  # type: ignore[union-attr]
        assert parse_row(row.to_row(), "f:1").tokens == row.tokens
        half = renderer.render(parse_row({"input_ids": ids, **beside, "weight": 0.5}, "f:1"))
        assert half.weights.tolist() == [0.5 * w for w in weights]  # type: ignore[union-attr]
        with pytest.raises(SchemaError, match="some tokens count in part, and supervise: all"):
            renderer.supervising("all").render(row)
    for beside in ({"weights": [float(m) for m in mask]}, {"mask": mask, "weights": mask}):
        assert renderer.render(parse_row({"input_ids": ids, **beside}, "f:1")).weights is None


def test_render_shows_them(tokenizer_dir: Path, tmp_path: Path) -> None:
    found = render([{"messages": TALK}, {"messages": PLAIN}], tokenizer_dir)
    first, second = found.to_json()["rows"]
    assert "weights" not in second and first["mask"] == second["mask"]
    assert [w > 0 for w in first["weights"]] == [m == 1 for m in first["mask"]]
    assert sorted(set(first["weights"])) == [0, 0.25, 0.5, 1]
    assert "weight 0.25" in str(found) and "weight 0.5" in str(found)
    found.save_html(tmp_path / "rows.html")
    page = (tmp_path / "rows.html").read_text(encoding="utf-8")
    assert "supervised, weight 0.25" in page and "<br>weight 0.5</span>" in page


@given(st.lists(st.sampled_from([0, 0.25, 0.5, 1]), min_size=1, max_size=30))
def test_spans_give_the_weights_back(weights: list[float]) -> None:
    given_weights = np.array([0, *weights], np.float64)
    mask = (given_weights > 0).astype(np.int8)
    back = mask.astype(np.float64)
    for _, start, end, weight in spans_of(3, mask, given_weights):
        assert start < end and weight not in (0, 1)
        back[start:end] = weight
    assert np.array_equal(back, given_weights)


# ---- a mixture, and a run


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mixed(renderer: Renderer, *files: Path, **keys: Any) -> Mixture:
    train = {"max_length": 64, "tokens_per_step": 64, **keys.pop("train", {})}
    recipe = {"mixture": [{"source": str(file)} for file in files], "train": train, "validation": 0, **keys}
    return build_mixture(parse_recipe(recipe, "test"), renderer, every_row=True)


def stored(mixture: Mixture) -> dict[str, bytes]:
    names = ("ids.bin", "mask.bin", "rows.npy", "weights.npy")
    return {name: file.read_bytes() for name in names if (file := mixture.rows[0].directory / name).is_file()}


def rows_of(n: int) -> list[dict[str, Any]]:
    """Exchanges of which every third counts in part, and every seventh not at all."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": "42 " * (i % 4 + 1), "weight": 0 if i % 7 == 6 else 1},
                {"role": "user", "content": "And now?"},
                {"role": "assistant", "content": f"It is {i}.", **({"weight": 0.25} if i % 3 == 0 else {})},
            ]
        }
        for i in range(n)
    ]


def test_they_lie_beside_the_rows_that_have_them(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one process, from several, and from parts: the same store. Explicit ones of 1 are none, to the byte."""
    rows = rows_of(70)
    file = write(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr("sftflow.data.prepare.BLOCK_ROWS", 8)
    monkeypatch.setattr("sftflow.data.prepare.n_cores", lambda: 1)
    monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / "one"))
    one = mixed(renderer, file)
    wanted = [r for row in rows for r in renderer.render_rows(parse_row(row, "x:1"))]
    sums = [float(r.mask.sum() if r.weights is None else r.weights.sum()) for r in wanted]
    assert one.rows[0].weight_sums.tolist() == pytest.approx(sums)
    for i, r in enumerate(wanted):
        found = one.rows[0].example(i)
        assert np.array_equal(found.ids, r.ids) and found.weight == sums[i]
        assert (found.weights is None) == (r.weights is None)
        assert r.weights is None or np.array_equal(found.weights, r.weights)
    ledger = one.ledger
    assert ledger["supervised_weight"] == ledger["sources"][0]["supervised_weight"] == pytest.approx(sum(sums))
    assert ledger["supervised_tokens"] == sum(int(r.mask.sum()) for r in wanted)
    assert any("weights of" in note for note in one.notes())
    monkeypatch.setenv("SFTFLOW_CACHE", str(tmp_path / "parts"))
    recipe = {"mixture": [{"source": str(file)}], "train": {"max_length": 64, "tokens_per_step": 64}, "validation": 0}
    for part in ("2/3", "1/3"):
        build_part(parse_recipe(recipe, "test"), renderer, parse_part(part), lambda *_: None)
    joined = mixed(renderer, file)
    assert stored(joined) == stored(one) and "weights.npy" in stored(one)
    assert joined.ledger["data_sha256"] == ledger["data_sha256"]
    plain = [{"messages": [{k: v for k, v in m.items() if v != 0.25} for m in row["messages"]]} for row in rows]
    first = mixed(renderer, write(tmp_path / "plain.jsonl", plain))
    bare = [{"messages": [{k: v for k, v in m.items() if v != 1} for m in row["messages"]]} for row in plain]
    second = mixed(renderer, write(tmp_path / "plain.jsonl", bare))
    assert stored(first) == stored(second) and set(stored(first)) == {"ids.bin", "mask.bin", "rows.npy"}
    assert first.ledger["data_sha256"] == second.ledger["data_sha256"] != ledger["data_sha256"]
    assert first.ledger == second.ledger and "supervised_weight" not in str(first.ledger)
    digests = {rows_digest(mixture.rows[0]) for mixture in (one, joined, first, second)}
    assert len(digests) == 2


def test_a_run_reports_and_holds_out_by_weight(tiny_base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", rows_of(60))
    keys: dict[str, Any] = {"validation": 0.2, "max_length": 64, "tokens_per_step": 128, "precision": "fp32"}
    mixture = sf.mix([str(file)], str(tiny_base), validation=0.2, max_length=64)
    run = sf.train(str(tiny_base), mixture, out=tmp_path / "run", steps=4, **keys)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < line.get("supervised_weight", 0) < line["supervised_tokens"] for line in lines)
    held_out = json.loads((tmp_path / "run" / "validation.jsonl").read_text().splitlines()[-1])
    assert 0 < held_out["supervised_weight"] < held_out["supervised_tokens"]
    kept = read_held_out(tmp_path / "run")
    assert any(m.weight == 0.25 for row in kept for m in row.conversation.messages)
    model = run.assistant.model
    total = weight = 0.0
    for row in kept:
        rendered = run.assistant.renderer.render(row.conversation)
        ids = torch.from_numpy(rendered.ids)[None]
        with torch.no_grad():
            nats = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        own = (rendered.mask if rendered.weights is None else rendered.weights)[1:].astype(np.float64)
        total, weight = total + float((nats.double().numpy() * own).sum()), weight + float(own.sum())
    assert held_out["supervised_weight"] == pytest.approx(weight)
    assert held_out["loss"] == pytest.approx(total / weight, abs=0.01)  # saved in bf16
    assert "their weights sum to" in (tmp_path / "run" / "log.txt").read_text()
