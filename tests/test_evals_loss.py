"""Held-out loss and bits per byte against transformers' own logits, summed by a few independent lines."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.architectures import SMALL
from helpers.runs import Quiet, write_recipe
from helpers.templates import STRIPS, THOUGHTS, open_with
from helpers.tiny import make_renderer
from helpers.training import examples, spec
from sftflow.chat.render import Rendered, Renderer
from sftflow.chat.schema import Conversation, parse_row
from sftflow.checkpoint import Assistant, load_assistant
from sftflow.data.mixture import build_mixture
from sftflow.evaluation import heldout_loss
from sftflow.evaluation.heldout_loss import (
    GROUPS,
    NO_REPLY,
    NOT_RENDERED,
    TOO_LONG,
    BitsPerByte,
    bits_per_byte,
    groups_of,
    held_out_conversations,
    held_out_loss,
    plain_texts,
    windows,
)
from sftflow.foundation.errors import ContextError, DataError
from sftflow.foundation.runtime import Runtime
from sftflow.generation.engine import Engine
from sftflow.pretraining.pretrain import bits_per_byte as base_bits
from sftflow.recipe import load_recipe
from sftflow.training.batch_plan import RowPlan
from sftflow.training.run import run_training
from sftflow.training.trainer import Trainer

FP32 = Runtime(device="cpu", precision="fp32", reason="test")
CALL = [
    {"type": "text", "text": "Let me see: "},
    {"type": "python", "text": "48/2"},
    {"type": "python_output", "text": "24"},
    {"type": "text", "text": " so 24."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
LONG = "The cat sat on the mat. " * 30


def turns(*texts: Any, weights: tuple[int, ...] = (), system: bool = False) -> list[dict[str, Any]]:
    out = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    for message, weight in zip(out[1::2], weights, strict=False):
        message["weight"] = weight
    return [SYSTEM, *out] if system else out


ROWS = [
    ("a", turns("Hello!", "I am fine.")),
    ("b", turns("What is 48/2?", CALL, "And 1+1?", "The answer is 2.")),
    ("a", turns("Hello!", "I am fine.", "What is it?", "A cat.", weights=(0, 1))),
    ("b", turns("How are you?", "Fine, thank you.", system=True)),
]


def read(rows: list[tuple[str, Any]]) -> list[tuple[str, Conversation]]:
    return [(name, parse_row(row, f"{name}:{n}")) for n, (name, row) in enumerate(rows, 1)]


def assistant_of(model: Any, renderer: Any) -> Assistant:
    return Assistant("test", model, renderer.tokenizer, renderer, Engine(model, renderer, FP32), {})


@pytest.fixture(scope="module")
def assistant(tiny_base: Path) -> Assistant:
    found = load_assistant(str(tiny_base))
    with torch.no_grad():
        for parameter in found.model.parameters():  # so that the loss is not the same everywhere
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return found


def nats(model: Any, ids: Any) -> list[float]:
    """The oracle: one row alone, all logits; [i] is the loss of token i, [0] is not a number."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(map(int, ids))]), use_cache=False).logits[0].float()
    logprobs = logits.log_softmax(-1)
    return [math.nan, *(-float(logprobs[i, int(t)]) for i, t in enumerate(ids[1:]))]


def by_reading(assistant: Assistant, conversations: list[tuple[str, Conversation]]) -> dict[str, list[float]]:
    """The losses of each group in the `sftflow` format, told by walking over the tokens' names."""
    out: dict[str, list[float]] = {}
    for source, conversation in conversations:
        rendered = assistant.renderer.render(conversation)
        role = ""
        for token, supervised, loss in zip(
            rendered.ids, rendered.mask, nats(assistant.model, rendered.ids), strict=True
        ):
            name = assistant.renderer.decode([int(token)])
            role = {"<|user_start|>": "user", "<|assistant_start|>": "assistant"}.get(name, role)
            if supervised:
                groups = ["end_of_turn" if name == "<|assistant_end|>" else "assistant", "all", f"from {source}"]
            else:
                groups = ["user"] if role == "user" and not name.startswith("<|") else []
            for group in groups:
                out.setdefault(group, []).append(loss)
    return out


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_every_figure_is_transformers_own(assistant: Assistant) -> None:
    conversations = read(ROWS)
    wanted = by_reading(assistant, conversations)
    got = held_out_loss(assistant, conversations)
    assert got.rows == 4 and got.tokens == len(wanted["all"])
    assert got.all == pytest.approx(mean(wanted["all"]), abs=1e-4)
    assert got.end_of_turn == pytest.approx(mean(wanted["end_of_turn"]), abs=1e-4)
    assert len(wanted["end_of_turn"]) == 5  # one a supervised turn, however many calls it makes
    roles = {"assistant": mean(wanted["assistant"]), "user": mean(wanted["user"])}
    assert got.roles == pytest.approx(roles | dict.fromkeys(("system", "developer", "tool")), abs=1e-4)
    assert got.sources == pytest.approx({s: mean(wanted[f"from {s}"]) for s in ("a", "b")}, abs=1e-4)
    assert got.skipped == {} and got.first_skipped is None


def test_without_packing_it_is_the_same(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    conversations = read(ROWS)
    packed = held_out_loss(assistant, conversations)
    monkeypatch.setattr(heldout_loss, "MICRO_TOKENS", 40)  # several batches
    several = held_out_loss(assistant, conversations)
    monkeypatch.setattr(heldout_loss, "length_limit", lambda model: (20, "test"))  # what is longer stands alone
    alone = held_out_loss(assistant, conversations)
    for other in (several, alone):
        assert other.roles == pytest.approx(packed.roles, abs=1e-5)
        assert other.sources == pytest.approx(packed.sources, abs=1e-5)


def test_the_model_is_left_as_it_was_found(assistant: Assistant) -> None:
    model = assistant.model
    model.train()
    model.model.layers[0].eval()  # a part of it frozen
    before = [m.training for m in model.modules()], model.config._attn_implementation
    first = held_out_loss(assistant, read(ROWS))
    bits_per_byte(assistant, ["The cat sat."])
    assert ([m.training for m in model.modules()], model.config._attn_implementation) == before
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    assert held_out_loss(assistant, read(ROWS)) == first


def test_a_model_that_cannot_be_packed(tokenizer_dir: Path) -> None:
    import transformers

    torch.manual_seed(0)
    renderer = make_renderer(tokenizer_dir, "sftflow")
    config = transformers.MambaConfig(
        vocab_size=len(renderer.tokenizer), hidden_size=32, num_hidden_layers=1, state_size=4, initializer_range=0.5
    )
    mamba = assistant_of(transformers.AutoModelForCausalLM.from_config(config).eval(), renderer)
    wanted = by_reading(mamba, read(ROWS))
    got = held_out_loss(mamba, read(ROWS))
    assert got.all == pytest.approx(mean(wanted["all"]), abs=1e-4)
    assert got.roles["user"] == pytest.approx(mean(wanted["user"]), abs=1e-4)


def test_a_system_turn_of_its_own_has_its_own_loss(tokenizer_dir: Path) -> None:
    import transformers

    renderer = make_renderer(tokenizer_dir, "chatml")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SMALL | {"vocab_size": len(renderer.tokenizer), "initializer_range": 0.3})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    (row,) = read([ROWS[3]])
    rendered = renderer.render(row[1], turns=True)
    words = [renderer.decode([int(i)]) for i in rendered.ids]
    named = {g: "".join(w for w, k in zip(words, groups_of(rendered, renderer), strict=True) if k == n)
             for n, g in enumerate(GROUPS)}  # fmt: skip
    assert {k: v for k, v in named.items() if v} == {
        "system": "system\nBe brief.\n",
        "user": "user\nHow are you?\n",
        "assistant": "Fine, thank you.",
        "end_of_turn": "<|im_end|>",
    }
    losses = nats(model, rendered.ids)
    end = words.index("<|im_end|>")
    got = held_out_loss(assistant_of(model, renderer), [row])
    assert got.roles["system"] == pytest.approx(mean([*losses[1:end], losses[end + 1]]), abs=1e-4)


def test_rows_that_cannot_be_measured_are_counted(assistant: Assistant) -> None:
    rows = [*ROWS, ("c", turns(LONG, LONG)), ("c", turns("a", "b", weights=(0,)))]
    rows.append(("d", [{"role": "user", "content": "a"}, *turns("a", "b")]))  # the format takes no two user turns
    got = held_out_loss(assistant, read(rows))
    assert got.rows == 4
    assert got.skipped == {TOO_LONG: 1, NO_REPLY: 1, NOT_RENDERED: 1}
    assert got.first_skipped.startswith("c:5: longer than the model's context (")
    assert got.sources["c"] is None and got.sources["d"] is None
    none = held_out_loss(assistant, read(rows)[4:])
    assert none.all is None and none.rows == none.tokens == 0


def grouped(renderer: Renderer, pairs: list[tuple[Conversation, Rendered]]) -> list[dict[str, str]]:
    """What of each example of one row counts in each group."""
    seen = [0, *(len(conversation.messages) for conversation, _ in pairs)]
    named = [
        {g: renderer.decode(r.ids[groups_of(r, renderer, n) == k].tolist()) for k, g in enumerate(GROUPS)}
        for n, (_, r) in zip(seen, pairs, strict=False)
    ]
    return [{group: text for group, text in entry.items() if text} for entry in named]


def test_an_expanded_row_counts_each_token_once(tokenizer_dir: Path) -> None:
    import transformers

    renderer = open_with(tokenizer_dir, STRIPS)
    pairs = renderer.render_pairs(THOUGHTS, turns=True)
    each = grouped(renderer, pairs)
    assert each == [
        {"user": "user\na\n", "assistant": "<think>hm</think>b", "end_of_turn": "<|im_end|>"},
        {"user": "user\nc\n", "assistant": "<think>so</think>d", "end_of_turn": "<|im_end|>"},
    ]
    whole = open_with(tokenizer_dir, "{% set keep_thoughts = true %}" + STRIPS)
    (unexpanded,) = grouped(whole, whole.render_pairs(THOUGHTS, turns=True))
    assert unexpanded == {group: each[0][group] + each[1][group] for group in each[0]}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL | {"vocab_size": len(renderer.tokenizer), "initializer_range": 0.3})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    got = held_out_loss(assistant_of(model, renderer), [("a", THOUGHTS)])
    wanted = [loss for _, r in pairs for loss, supervised in zip(nats(model, r.ids), r.mask, strict=True) if supervised]
    assert got.rows == 1 and got.tokens == len(wanted)
    assert got.all == pytest.approx(mean(wanted), abs=1e-4)


def test_a_turn_that_cannot_be_told_from_a_rewritten_reply_has_no_loss_of_its_own(tokenizer_dir: Path) -> None:
    ends_last = STRIPS.replace("<|im_end|>\n", "{% if m.role == 'user' or loop.last %}<|im_end|>{% endif %}\n")
    renderer = open_with(tokenizer_dir, ends_last)
    pairs = renderer.render_pairs(THOUGHTS, turns=True)
    assert [role for _, role in pairs[1][1].turns] == ["user", "assistant+user", "assistant"]
    assert grouped(renderer, pairs) == [
        {"user": "user\na", "assistant": "<think>hm</think>b", "end_of_turn": "<|im_end|>"},
        {"assistant": "<think>so</think>d", "end_of_turn": "<|im_end|>"},
    ]


# ---- the rows of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    lines = [json.dumps({"prompt": f"How is {n}?", "completion": f"It is {n}, thank you."}) for n in range(40)]
    (folder / "more.jsonl").write_text("\n".join(lines) + "\n")
    path = write_recipe(folder, tiny_base, steps=2, save_every=2)
    recipe = json.loads(path.read_text())
    path.write_text(json.dumps(recipe | {"mixture": [{"source": "rows.jsonl"}, {"source": "more.jsonl"}]}))
    run_training(load_recipe(path), Quiet())
    return folder


def test_the_held_out_rows_of_a_run_are_found_again(finished: Path) -> None:
    sft = load_assistant(str(finished / "run"))
    recipe = load_recipe(finished / "run" / "recipe.yaml")
    found = held_out_conversations(finished / "run")
    mixture = build_mixture(recipe, sft.renderer)
    assert mixture.digest() == sft.info["data"]
    assert [sft.renderer.render(c).ids.tolist() for _, c in found] == [
        e.ids.tolist() for e in sorted(mixture.held_out, key=lambda e: e.source)
    ]
    last = json.loads((finished / "run" / "validation.jsonl").read_text().splitlines()[-1])
    got = held_out_loss(sft, found)
    assert got.tokens == last["supervised_tokens"] and got.rows == 8
    assert got.all == pytest.approx(last["loss"], abs=1e-5)
    assert got.sources == pytest.approx(last["sources"], abs=1e-5)

    few = held_out_conversations(finished / "run", 3)
    assert [name for name, _ in few] == ["rows", "rows", "more"]
    assert all(pair in found for pair in few)


def test_the_held_out_rows_outlive_the_data(finished: Path, tmp_path: Path) -> None:
    """They are in the run's directory: data that is changed, or gone, or moved with it changes nothing."""
    shutil.copytree(finished, tmp_path / "moved")
    wanted = held_out_conversations(finished / "run")
    more = tmp_path / "moved" / "more.jsonl"
    more.write_text(more.read_text().replace("thank you", "thanks"))
    (tmp_path / "moved" / "rows.jsonl").unlink()
    assert held_out_conversations(tmp_path / "moved" / "run") == wanted


def test_a_run_of_an_older_version_says_so(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished / "run", tmp_path / "run")
    (run / "held_out.jsonl").unlink()
    with pytest.raises(DataError) as error:
        held_out_conversations(run)
    said = str(error.value)
    assert said.startswith(f"{run / 'held_out.jsonl'}: missing: deleted, or of a run of an older version")
    assert "\n" not in said


# ---- plain text


def test_bits_per_byte_is_transformers_own(assistant: Assistant) -> None:
    text = "The cat sat on the mat; 48/2 = 24. <|assistant_end|> Žluťoučký kůň."
    ids = [assistant.tokenizer.bos_token_id, *assistant.renderer.encode_plain(text)]
    wanted = sum(nats(assistant.model, ids)[1:]) / math.log(2) / len(text.encode())
    got = bits_per_byte(assistant, [text], window=256)
    assert got == BitsPerByte(bytes=len(text.encode()), tokens=len(ids) - 1, bpb=pytest.approx(wanted, abs=1e-4))
    plain = text.replace("<|assistant_end|>", "")  # as the base's own measure reads it
    settings = spec(max_length=256)
    trainer = Trainer(copy.deepcopy(assistant.model), RowPlan(examples(60), settings), settings, FP32)
    theirs = base_bits(trainer, assistant.tokenizer, [plain])
    assert bits_per_byte(assistant, [plain]).bpb == pytest.approx(theirs, abs=1e-4)


def test_without_bos_the_first_token_is_not_counted(assistant: Assistant, tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.backend_tokenizer.post_processor = None
    without = Assistant("test", assistant.model, tokenizer, assistant.renderer, assistant.engine, {})
    text = "Once upon a time there was a house."
    ids = assistant.renderer.encode_plain(text)
    first = len(assistant.renderer.decode(ids[:1]))
    got = bits_per_byte(without, [text])
    assert (got.bytes, got.tokens) == (len(text) - first, len(ids) - 1)
    assert got.bpb * got.bytes * math.log(2) == pytest.approx(sum(nats(assistant.model, ids)[1:]), abs=1e-3)


def test_a_long_text_is_read_in_windows(assistant: Assistant) -> None:
    ids = [assistant.tokenizer.bos_token_id, *assistant.renderer.encode_plain(LONG)]
    total = sum(nats(assistant.model, ids[:32])[1:])
    for begin in range(16, len(ids), 16):
        total += sum(nats(assistant.model, ids[begin : begin + 32])[16:])
    got = bits_per_byte(assistant, [LONG], window=32)
    assert got.tokens == len(ids) - 1
    assert got.bpb == pytest.approx(total / math.log(2) / len(LONG), abs=1e-4)


@given(n=st.integers(0, 300), size=st.integers(2, 64), first=st.integers(1, 2))
def test_windows_count_every_token_once(n: int, size: int, first: int) -> None:
    counted: list[int] = []
    for begin, end, mask in windows(n, size, first):
        assert end - begin <= size and len(mask) == end - begin and not mask[0]
        new = np.flatnonzero(mask)
        assert begin == 0 or new[0] >= size // 2
        counted += (new + begin).tolist()
    assert counted == list(range(first, n))


def test_our_own_text(assistant: Assistant) -> None:
    ours = plain_texts()
    assert len(ours) == 6 and all(t.isascii() and t.strip() for t in ours) and "\n\n\ndef report" in ours[-1]
    got = bits_per_byte(assistant, ours, window=64)
    assert got.bytes == sum(len(t) for t in ours) > 5000 and got.bpb > 3
    assert bits_per_byte(assistant, []) == BitsPerByte(bytes=0, tokens=0, bpb=None)
    with pytest.raises(ContextError):
        bits_per_byte(assistant, ours, window=1)
