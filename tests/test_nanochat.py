"""picollm's and nanochat's models: the fixtures' logits, and the formulas read naively in every shape and version."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.outside import outside
from helpers.training import BF16, FP32, spec
from sftflow.fingerprint import weights_and_body_hash
from sftflow.foundation.errors import CheckpointError
from sftflow.generation.decoder import PackedDecoder
from sftflow.generation.kv_cache import Prefix
from sftflow.nanochat import weights
from sftflow.nanochat.files import Files, files_of
from sftflow.packing.check_model import prove_forward
from sftflow.packing.loss import batch_loss, head_of
from sftflow.packing.pack import Example, pack_batch, pad_batch
from sftflow.training.bf16_weights import Bf16Weights, restore_classes
from sftflow.training.lora import target_names
from sftflow.training.optimizers import groups_of, make_optimizers

State = dict[str, torch.Tensor]
EXACT = 2e-5
SHAPE = {"sequence_len": 12, "vocab_size": 70, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
# By version: q and k times, gates to, theta, short windows of 12 tokens, softcap; what its meta file has more.
VERSIONS: dict[str, tuple[float, float, float, int, float]] = {
    "today": (1.2, 3.0, 1e5, 128, 15.0),
    "march": (1.15, 3.0, 1e5, 128, 15.0),
    "january": (1.0, 2.0, 1e4, 6, 20.0),
    "lambdas": (1.0, 0.0, 1e4, 6, 15.0),
    "2025": (1.0, 0.0, 1e4, 0, 15.0),
}


def random_state(version: str, shape: dict[str, Any], seed: int = 0) -> State:
    """Tensors of a version by their names and padded shapes, none of them near zero."""
    draw = torch.Generator().manual_seed(seed)
    n, width, kv = shape["n_layer"], shape["n_embd"], shape["n_kv_head"]
    keys = width // shape["n_head"] * kv
    rows = shape["vocab_size"] + -shape["vocab_size"] % 64

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=draw) * (1.0 if size[0] == rows else 1.2 * size[-1] ** -0.5)

    out = {"transformer.wte.weight": normal(rows, width), "lm_head.weight": normal(rows, width) * width**-0.5}
    for i in range(n):
        block = f"transformer.h.{i}"
        for name, size in (("q", width), ("k", keys), ("v", keys), ("proj", width)):
            out[f"{block}.attn.c_{name}.weight"] = normal(size, width)
        out[f"{block}.mlp.c_fc.weight"] = normal(4 * width, width)
        out[f"{block}.mlp.c_proj.weight"] = normal(width, 4 * width)
        if version in ("today", "march", "january") and i % 2 == (n - 1) % 2:
            out[f"{block}.attn.ve_gate.weight"] = normal(kv, 32 if version == "january" else 12)
            out[f"value_embeds.{i}.weight"] = normal(rows, keys)
    if version != "2025":
        out |= {name: 0.5 + torch.rand(n, generator=draw) for name in ("resid_lambdas", "x0_lambdas")}
    if version == "today":
        out |= {"smear_gate.weight": normal(1, 24), "smear_lambda": torch.tensor([0.7])}
        out |= {"backout_lambda": torch.tensor([0.3])}
    return out


def naive(state: State, shape: dict[str, Any], version: str, ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) logits, token by token, by the formulas."""
    scale, reach, theta, short, cap = VERSIONS[version]
    n, heads, kv, length = (shape[key] for key in ("n_layer", "n_head", "n_kv_head", "sequence_len"))
    size, pattern = shape["n_embd"] // heads, shape.get("window_pattern", "L")
    windows = [short if pattern[i % len(pattern)] == "S" and i < n - 1 else length for i in range(n)]
    if version == "2025" or (version == "lambdas" and "window_pattern" not in shape):
        windows = [10**9] * n
    state = {key: value.double() for key, value in state.items()}

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 2.0**-23).sqrt()

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        first, second = x[..., : size // 2], x[..., size // 2 :]
        angle = position * theta ** (-torch.arange(0, size, 2).double() / size)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)

    embedded = [norm(state["transformer.wte.weight"][i]) for i in ids]
    xs = list(embedded)
    if version == "today":
        for t in range(1, len(ids)):
            gate = torch.sigmoid(state["smear_gate.weight"][0] @ embedded[t][:24])
            xs[t] = embedded[t] + state["smear_lambda"] * gate * embedded[t - 1]
    x0s, middle = list(xs), xs
    for i in range(n):
        block = f"transformer.h.{i}"
        if "resid_lambdas" in state:
            xs = [state["resid_lambdas"][i] * x + state["x0_lambdas"][i] * x0 for x, x0 in zip(xs, x0s, strict=True)]
        q, k, v = (
            [(state[f"{block}.attn.c_{name}.weight"] @ norm(x)).view(-1, size) for x in xs] for name in ("q", "k", "v")
        )
        if f"value_embeds.{i}.weight" in state:
            gates = state[f"{block}.attn.ve_gate.weight"]
            for t, token in enumerate(ids):
                opened = reach * torch.sigmoid(gates @ norm(xs[t])[: gates.shape[1]])
                v[t] = v[t] + opened[:, None] * state[f"value_embeds.{i}.weight"][token].view(-1, size)
        q, k = ([scale * norm(turned(x, t)) for t, x in enumerate(y)] for y in (q, k))
        for t in range(len(ids)):
            seen, heard = range(max(0, t - windows[i]), t + 1), []
            for head in range(heads):
                shared = head // (heads // kv)
                scores = torch.stack([q[t][head] @ k[j][shared] for j in seen]) * size**-0.5
                heard.append(scores.softmax(0) @ torch.stack([v[j][shared] for j in seen]))
            x = xs[t] + state[f"{block}.attn.c_proj.weight"] @ torch.cat(heard)
            xs[t] = (
                x
                + state[f"{block}.mlp.c_proj.weight"]
                @ (state[f"{block}.mlp.c_fc.weight"] @ norm(x)).clamp(min=0).square()
            )
        if i == n // 2:
            middle = list(xs)
    if version == "today":
        xs = [x - state["backout_lambda"] * y for x, y in zip(xs, middle, strict=True)]
    logits = torch.stack([state["lm_head.weight"] @ norm(x) for x in xs])[:, : shape["vocab_size"]]
    return (cap * torch.tanh(logits / cap)).float()


def saved(folder: Path, state: Any, shape: dict[str, Any], **more: Any) -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "model_000001.pt")
    return Files(folder / "model_000001.pt", {"model_config": shape, **more}, folder / "tokenizer.pkl", "mine")


def tiny(folder: Path, version: str = "today", **shape: Any) -> tuple[State, dict[str, Any], Any]:
    shape = SHAPE | shape
    state = random_state(version, shape)
    more = {"softcap": 20} if version == "january" else {}
    return state, shape, weights.model_of(saved(folder, state, shape, **more)).eval()


def off(model: Any, ids: list[int], wanted: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(torch.tensor([ids])).logits[0] - wanted).abs().max())


@pytest.mark.parametrize(
    ("version", "shape"),
    [
        ("today", {"window_pattern": "SSSL", "n_layer": 4}),
        ("today", {"window_pattern": "sl", "n_head": 4, "n_kv_head": 1, "sequence_len": 5}),
        ("today", {"window_pattern": "L", "n_layer": 1, "n_kv_head": 4}),
        ("today", {"n_layer": 2, "vocab_size": 64}),  # an old meta file, and no padding
        ("march", {"window_pattern": "SSL"}),
        ("january", {"window_pattern": "SL"}),
        ("lambdas", {"window_pattern": "S"}),
        ("lambdas", {}),
        ("2025", {}),
    ],
)
def test_logits_are_those_of_the_formulas(version: str, shape: dict[str, Any], tmp_path: Path) -> None:
    state, shape, model = tiny(tmp_path, version, **shape)
    ids = np.random.default_rng(0).integers(0, shape["vocab_size"], 21).tolist()
    if "window_pattern" in shape:
        shape["window_pattern"] = shape["window_pattern"].upper()
    assert off(model, ids, naive(state, shape, version, ids)) <= EXACT
    assert off(model, ids[:1], naive(state, shape, version, ids[:1])) <= EXACT
    assert type(model).__name__ == ("NanoChatForCausalLM" if version == "2025" else "SftflowNanochatForCausalLM")
    prove_forward(model)


@pytest.mark.parametrize(("version", "pattern"), [*((version, "SSL") for version in VERSIONS), ("lambdas", "")])
def test_written_back_it_is_what_was_read(version: str, pattern: str, tmp_path: Path) -> None:
    shape = {"window_pattern": pattern} if pattern and version != "2025" else {}
    state, shape, model = tiny(tmp_path, version, **shape)
    back, n = weights.state_dict_of(model), shape["vocab_size"]
    assert back.keys() == state.keys() and weights.meta_of(model.config) == shape
    for key, value in state.items():
        table = len(value) == 128
        assert back[key].shape == value.shape and torch.equal(
            back[key][: n if table else None], value[: n if table else None]
        )


def test_what_older_checkpoints_lack_does_nothing(tmp_path: Path) -> None:
    """A compiled model's names, tables in bf16, no lambdas."""
    state, shape, _ = tiny(tmp_path / "a")
    ids = list(range(20))
    neutral = state | {"resid_lambdas": torch.ones(3), "x0_lambdas": torch.zeros(3)}
    rounded = {k: v.bfloat16().float() if len(v) == 128 else v for k, v in neutral.items()}
    old = {f"_orig_mod.{k}": v.bfloat16() if len(v) == 128 else v for k, v in state.items() if k[-7:] != "lambdas"}
    model = weights.model_of(saved(tmp_path / "b", old, shape))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert off(model, ids, naive(rounded, shape, "today", ids)) <= EXACT


def test_what_is_no_such_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    state = random_state("today", SHAPE)

    def refused(match: str, state: Any = state, shape: dict[str, Any] = SHAPE, **more: Any) -> None:
        with pytest.raises(CheckpointError, match=match):
            weights.model_of(saved(tmp_path, state, shape, **more))

    gate, missing = "transformer.h.0.attn.ve_gate.weight", {k: v for k, v in state.items() if k != "backout_lambda"}
    refused("1 of its 29 tensors are missing: backout_lambda", missing)
    bare = {key: weight for key, weight in state.items() if "ve_gate" not in key and "value_embeds" not in key}
    refused("4 of its 29 tensors are missing: transformer.h.0.attn.ve_gate", bare)  # no version smeared without them
    refused("it has tensors of 3 layers, where its meta file asks for 100000000", shape=SHAPE | {"n_layer": 10**8})
    refused(r"wte.weight is \d+x32, where .* a width of 6000000000", shape=SHAPE | {"n_embd": 6 * 10**9})
    refused("not a plain state dict", state | {"smear_lambda": torch.ones(1).to_sparse()})
    refused("no known version of this layout has engram.weight", state | {"engram.weight": torch.ones(2)})
    refused(f"{gate} is 2x16, where its meta file asks for 2x12", state | {gate: torch.ones(2, 16)})
    refused(
        "lm_head.weight is 72x32, where its meta file asks for 128x32", state | {"lm_head.weight": torch.ones(72, 32)}
    )
    refused("smear_lambda is stored as int64", state | {"smear_lambda": torch.ones(1, dtype=torch.int64)})
    refused("mine: model_config: n_layer is '3'; ", shape=SHAPE | {"n_layer": "3"})
    refused("model_config: it asks for n_expert, which", shape=SHAPE | {"n_expert": 3})
    refused("window_pattern is 'SXL'; it is made of S and L", shape=SHAPE | {"window_pattern": "SXL"})
    refused("3 heads of 2 keys do not fit a width of 32", shape=SHAPE | {"n_head": 3})
    january = random_state("january", SHAPE)
    refused('mine: its version capped logits at 15 until .*; write "softcap": 15 or 20 into', january)
    refused("softcap is 'no' in its meta file", january, softcap="no")
    (tmp_path / "model_000001.pt").write_bytes(b"PK\3\4" + bytes(99))
    with pytest.raises(CheckpointError, match=r"model_000001\.pt: damaged"):
        weights.model_of(Files(tmp_path / "model_000001.pt", {"model_config": SHAPE}, tmp_path, "mine"))


SAVED = """
import sys; folder, order = sys.argv[1:]
if order == "sftflow first":
    import sftflow
    assert not {"torch", "transformers"} & set(sys.modules)
import transformers, torch
if order == "after its auto classes":
    transformers.AutoModelForCausalLM
import sftflow
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
print(type(model).__name__, type(transformers.AutoModel.from_pretrained(folder)).__name__)
torch.save({"logits": model(torch.arange(40)[None]).logits, "state": model.state_dict()}, folder + "/read.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sftflow first", "transformers first", "after its auto classes"])
def test_saved_it_is_loaded_by_the_auto_classes(order: str, tmp_path: Path) -> None:
    _, _, model = tiny(tmp_path / "theirs", window_pattern="SSL")
    model.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", SAVED, str(tmp_path), order], capture_output=True, text=True)
    assert done.stdout.split() == ["SftflowNanochatForCausalLM", "SftflowNanochatModel"], done.stderr
    read = torch.load(tmp_path / "read.pt")
    assert all(torch.equal(value, read["state"][key]) for key, value in model.state_dict().items())
    assert torch.equal(read["logits"], model(torch.arange(40)[None]).logits)


def test_more_tokens_and_fewer(tmp_path: Path) -> None:
    """Every table grows, none of the rows that fill theirs up is taken for a token; shrunk again it is what it was."""
    state, shape, model = tiny(tmp_path)
    ids, body = list(range(20)), weights_and_body_hash(model)[1]
    assert model.get_input_embeddings().weight.shape[0] == 70
    model.resize_token_embeddings(75, mean_resizing=False)
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert [len(m.weight) for m in tables] == [m.num_embeddings for m in tables] == [75, 75, 75]
    value = model.model.layers[0].self_attn.value_embed.weight
    assert weights_and_body_hash(model)[1] == body  # by which an adapter knows its base
    torch.testing.assert_close(value[70:], state["value_embeds.0.weight"][:70].mean(0).expand(5, -1))
    assert model(torch.tensor([[1, 74]])).logits.shape[-1] == weights.meta_of(model.config)["vocab_size"] == 75
    grown = saved(tmp_path, weights.state_dict_of(model), weights.meta_of(model.config))
    assert torch.equal(weights.model_of(grown).lm_head.weight, model.lm_head.weight)
    model.resize_token_embeddings(70)
    assert off(model, ids, naive(state, shape, "today", ids)) <= EXACT


def test_generate_in_batches(tmp_path: Path) -> None:
    """Greedy and by beams, padded on the left, by caches of two kinds: each row as it is alone, computed whole."""
    _, _, model = tiny(tmp_path, window_pattern="SSSL", n_layer=4)
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 70, n).tolist() for n in (9, 4)]
    ids = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        together = model.generate(ids, attention_mask=(ids > 0).long(), **how, **more)[:, 9:]
        plain = {"num_beams": 2} if "num_beams" in more else {}
        for row, got in zip(rows, together, strict=True):
            alone = model.generate(torch.tensor([row]), use_cache=False, **how, **plain)[0, len(row) :]
            assert torch.equal(got, alone), more


def test_a_cache_that_it_did_not_fill_is_refused(tmp_path: Path) -> None:
    _, _, model = tiny(tmp_path)
    cache = model(torch.tensor([[1, 2, 3]])).past_key_values
    cache.layers.pop()
    with pytest.raises(ValueError, match="pass previous_ids"):
        model(torch.tensor([[4]]), past_key_values=cache)
    given = model(torch.tensor([[4]]), past_key_values=cache, previous_ids=torch.tensor([[3]])).logits
    torch.testing.assert_close(given[0, 0], model(torch.tensor([[1, 2, 3, 4]])).logits[0, -1], atol=EXACT, rtol=0)


def conversations() -> list[Example]:
    """Some begin alike, longer than either window."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 70, 15)
    pieces = [rng.integers(0, 70, n) for n in (3, 25, 14, 9)]
    rows = [*pieces, *(np.concatenate([first, piece]) for piece in pieces)]
    return [Example(ids=ids, mask=np.asarray(rng.random(len(ids)) < 0.7, np.int8)) for ids in rows]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trained_packed_is_trained_alone(checkpointing: bool, tmp_path: Path) -> None:
    """Loss and gradients of packed rows, with shared beginnings, against each conversation by itself in full logits."""
    _, _, model = tiny(tmp_path, window_pattern="SSL", sequence_len=12)
    model.config.sliding_window = 6  # today's short windows begin at 128 tokens
    rows = conversations()
    wanted = torch.zeros(())
    for e in rows:
        logits = model(torch.from_numpy(e.ids)[None], use_cache=False).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.from_numpy(e.ids[1:]), reduction="none")
        wanted = wanted + (losses * torch.from_numpy(e.mask[1:])).sum()
    n = sum(int(e.mask[1:].sum()) for e in rows)
    (wanted / n).backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for batch, packed in ((pack_batch(rows), True), (pack_batch(rows, share=False), True), (pad_batch(rows), False)):
        model.zero_grad(set_to_none=False)  # as the trainer does: rows of the embedding's gradient are added one by one
        losses = batch_loss(model, batch, FP32, packed=packed, scale=1 / n)
        assert float(losses.sum()) / n == pytest.approx(float(wanted.detach()) / n, abs=1e-6)
        for key, parameter in model.named_parameters():
            assert float((parameter.grad - grads[key]).abs().max()) <= 1e-5, key


def test_on_bf16_copies_it_computes_nearly_the_same(tmp_path: Path) -> None:
    _, _, model = tiny(tmp_path, window_pattern="SSL")
    batch = pack_batch(conversations())
    exact = float(batch_loss(model, batch, FP32).mean())
    copies = Bf16Weights(model)
    near = batch_loss(model, batch, BF16, scale=1.0, head=head_of(model, copies.head))
    restore_classes(model)
    assert float(near.mean()) == pytest.approx(exact, abs=0.02) and float(near.mean()) != exact
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_optimizers_and_adapters_know_its_parts(tmp_path: Path) -> None:
    """Muon moves the blocks' matrices, as the projects' own optimizer has it, with the gates of value embeddings;
    tables and scalars are AdamW's. Adapters are for the linear layers."""
    _, _, model = tiny(tmp_path)
    names = {id(p): key for key, p in model.named_parameters()}
    groups = {kind: {names[id(p)].rpartition("model.")[2] for p in part} for kind, part in groups_of(model).items()}
    tables = {f"layers.{i}.self_attn.value_embed.weight" for i in (0, 2)}
    assert groups["embeddings"] == {"embed_tokens.weight", "lm_head.weight", *tables}
    assert groups["rest"] == {"resid_lambdas", "x0_lambdas", "smear_gate", "smear_lambda", "backout_lambda"}
    first, second = make_optimizers(model, spec(optimizer="muon"))
    moved = {names[id(p)] for group in first.param_groups for p in group["params"]}
    assert len(moved) == 3 * 6 + 2 and all("layers" in name for name in moved) and len(second.param_groups) == 2
    assert target_names(model, "all") == ["fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj"]


# The fixtures: picollm's own checkpoints, with its own logits.


@pytest.fixture(scope="module", params=["tiny_d4", "old_layout"])
def theirs(request: pytest.FixtureRequest) -> tuple[Any, Any, dict[str, Any]]:
    """(the model, expected.npz, expected.json)"""
    folder = outside("fixtures", "picollm", request.param)
    files = files_of(folder)
    assert files is not None
    told = json.loads((folder / "expected.json").read_text("utf-8"))
    return weights.model_of(files).eval(), np.load(folder / "expected.npz"), told


def lengths(expected: Any) -> list[int]:
    return sorted(int(key.removeprefix("logits_")) for key in expected.files if key.startswith("logits_"))


@torch.no_grad()
def test_logits_at_every_length(theirs: Any) -> None:
    """Whole, with a cache in parts of any size, and by our decoder: in one part, in several, and token by token."""
    model, expected, _ = theirs
    for n in lengths(expected):
        ids, wanted = torch.from_numpy(expected[f"ids_{n}"]).long(), torch.from_numpy(expected[f"logits_{n}"])
        last, known = wanted.shape[1], max(1, n - 16)
        cache, cached = None, []
        for part in ids.split([part for part in (known // 2, known - known // 2, *[1] * (n - known)) if part], 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache, cached = out.past_key_values, [*cached, out.logits]
        for got in (model(ids, use_cache=False).logits, torch.cat(cached, 1)):
            assert float((got[:, -last:] - wanted).abs().max()) <= EXACT, n
        decoder, rows = PackedDecoder(model, FP32), ids.tolist()
        try:
            got = [decoder.add([row[:known] for row in rows])]
            got += [decoder.step([row[at] for row in rows]) for at in range(known, n)]
            assert float((torch.stack(got, 1)[:, -16:] - wanted[:, -16:]).abs().max()) <= EXACT, n
            prefix = Prefix()
            several = [
                decoder.read(prefix, part, every=True) for part in (rows[1][:3], rows[1][3:90], rows[1][90:]) if part
            ]
            assert float((torch.cat(several)[-last:] - wanted[1]).abs().max()) <= EXACT, n
        finally:
            decoder.close()


@torch.no_grad()
def test_their_loss(theirs: Any) -> None:
    model, expected, _ = theirs
    ids, targets = (torch.from_numpy(expected[key]).long() for key in ("loss_ids", "loss_targets"))
    loss = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert float(loss) == pytest.approx(float(expected["loss"]), abs=1e-5)
    rows = []
    for row, wanted in zip(ids, targets, strict=True):  # targets are shifted already
        mask = np.concatenate([[0], (wanted >= 0).numpy()]).astype(np.int8)
        rows.append(Example(ids=np.concatenate([row.numpy(), wanted[-1:].clamp(min=0).numpy()]), mask=mask))
    ours = batch_loss(model, pack_batch(rows), FP32)
    assert len(ours) == int((targets >= 0).sum())
    assert float(ours.mean()) == pytest.approx(float(expected["loss"]), abs=1e-5)


def test_their_greedy_replies(theirs: Any) -> None:
    """Every token that their engine chose, and did not force."""
    model, _, told = theirs
    decoder = PackedDecoder(model, FP32)
    try:
        logits = decoder.add([each["prompt"] for each in told["greedy"]])
        replies = [each["continuation"] for each in told["greedy"]]
        for at in range(max(map(len, replies))):
            tokens = [reply[at] if at < len(reply) else 0 for reply in replies]
            for row, each in enumerate(told["greedy"]):
                if at < len(replies[row]) and each["mask"][at]:
                    assert int(logits[row].argmax()) == tokens[row]
            logits = decoder.step(tokens)
    finally:
        decoder.close()
