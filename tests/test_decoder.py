"""Rows that come and go give each the logits of its whole sequence computed alone, on every architecture."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.architectures import ARCHITECTURES, FP32, SMALL, STATEFUL, stateful, tiny
from helpers.generation import Ids, draw, requests_of
from sftflow.foundation.errors import CheckpointError
from sftflow.generation.check_decoder import find_decode_mode, find_short_cuts
from sftflow.generation.decoder import PackedDecoder
from sftflow.generation.engine import Engine, shared_beginning
from sftflow.generation.hf_decoders import OwnDecoder
from sftflow.generation.llama import step_of
from sftflow.generation.onednn import ordered_forwards
from sftflow.generation.request import GenerationRequest
from sftflow.generation.sampling import likeliest


def alone(model: Any, ids: Ids) -> torch.Tensor:
    """The oracle: the model's own forward pass over the whole sequence, no cache; the last logits."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()


def drive(model: Any, decoder: Any, rows: list[Ids], plan: list[Any], rng: Any) -> list[tuple[Ids, torch.Tensor]]:
    """Follow a plan: ("add", prompts), "step", ("keep", numbers). Every (sequence, logits) that came out."""
    out: list[tuple[Ids, torch.Tensor]] = []
    for what in plan:
        if what == "step":
            tokens = draw(rng, len(rows))
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
            out += [(list(r), x) for r, x in zip(rows, decoder.step(tokens), strict=True)]
        elif what[0] == "add":
            rows += [list(p) for p in what[1]]
            out += [(list(p), x) for p, x in zip(what[1], decoder.add(what[1]), strict=True)]
        else:
            decoder.keep(what[1])
            rows[:] = [rows[i] for i in what[1]]
    return out


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("ordered", [False, True])
def test_rows_that_come_and_go(name: str, ordered: bool) -> None:
    model = tiny(name)
    rng = np.random.default_rng(0)
    held = draw(rng, 5)
    first, second = [*held, *draw(rng, 9)], [*held, *draw(rng, 2)]
    twin = [*second, *draw(rng, 3)]  # begins with another prompt of the same call, whole
    late = [[*held, *draw(rng, 14)], [*held, *draw(rng, 1)]]
    plan: list[Any] = [
        ("add", [first, second, twin, second]),
        "step",
        ("keep", [0, 3, 2]),
        "step",
        ("add", late),
        "step",
        ("keep", [4, 1]),
        *["step"] * 3,
    ]
    forwards = ordered_forwards(model) if ordered else None
    decoder = PackedDecoder(model, FP32, shared_prefix=held, forwards=forwards)
    try:
        got = drive(model, decoder, [], plan, rng)
    finally:
        decoder.close()
    assert not any("forward" in m.__dict__ for m in model.modules())
    for ids, logits in got:
        torch.testing.assert_close(logits, alone(model, ids), atol=2e-4, rtol=2e-4)


LLAMAS: dict[str, dict[str, Any]] = {
    "one head for all": SMALL | {"num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 3},
    "as many, tied": SMALL | {"num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
    "scaled angles": SMALL
    | {"max_position_embeddings": 256}
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("shape", LLAMAS)
def test_a_step_without_modules_is_the_models_own(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, beside others, and over the end of the table of angles."""
    monkeypatch.setattr("sftflow.generation.llama.TABLE", 8)
    model = tiny("Llama", **LLAMAS[shape])
    forwards, step = find_short_cuts(model, FP32)
    assert step is not None and len(forwards) == 7 * model.config.num_hidden_layers + 1
    rng = np.random.default_rng(0)
    decoder = PackedDecoder(model, FP32, forwards=forwards, next_step=step)
    plan = [("add", [draw(rng, 6)]), *["step"] * 12, ("add", [draw(rng, 3)]), *["step"] * 3, ("keep", [1]), "step"]
    for ids, logits in drive(model, decoder, [], plan, rng):
        torch.testing.assert_close(logits, alone(model, ids), atol=1e-5, rtol=1e-5)
    decoder.close()


def test_what_is_no_plain_llama_steps_by_its_own_modules() -> None:
    def changed(**more: Any) -> Any:
        return tiny("Llama", **SMALL | more)

    hooked, patched, other, mixed = (changed() for _ in range(4))
    hooked.model.norm.register_forward_hook(lambda module, args, out: out * 2)
    patched.model.layers[0].mlp.forward = torch.zeros_like
    other.model.layers[1].mlp.act_fn = torch.nn.GELU()
    mixed.model.layers[1].self_attn.layer_idx = 0
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    others = [tiny(name) for name in ARCHITECTURES if name != "Llama"]
    biased, halved = changed(attention_bias=True), changed().bfloat16()
    for model in [hooked, patched, other, mixed, biased, halved, changed(rope_parameters=dynamic), *others]:
        assert step_of(model) is None
    wrong = changed()
    wrong.model.layers[0].self_attn.scaling *= 2  # of one layer: the proof sees it, the classes do not
    assert step_of(wrong) is not None
    assert find_short_cuts(wrong, FP32)[1] is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_these_are_packed(name: str) -> None:
    model = tiny(name)
    before = [vars(model.config), [vars(m).get("sliding_window") for m in model.modules()]]
    assert find_decode_mode(model, FP32) == "packed"
    assert before == [vars(model.config), [vars(m).get("sliding_window") for m in model.modules()]]


def test_what_cannot_be_packed_is_found_out() -> None:
    broken = tiny("Llama")
    broken.model.layers[0].self_attn.layer_idx = 1  # two layers that would share one buffer
    assert find_decode_mode(broken, FP32, ["packed"]) == "whole"


@pytest.mark.parametrize("name", STATEFUL)
def test_models_with_state_are_decoded_as_they_compute_themselves(name: str, tiny_base: Path) -> None:
    """Greedy replies of different prompts side by side equal a loop over the model's own forward pass, no cache."""
    from sftflow.checkpoint import load_assistant

    model = stateful(name)
    engine = Engine(model, load_assistant(str(tiny_base)).renderer, FP32, max_running=3)
    assert engine.decode_mode() == STATEFUL[name][0]
    rng = np.random.default_rng(0)
    prompts = [draw(rng, n) for n in (11, 2, 7, 5)]
    requests = [
        GenerationRequest(prompt_ids=tuple(p), max_new_tokens=6, stop_ids=frozenset(), use_python=False)
        for p in prompts
    ]
    for prompt, reply in zip(prompts, engine.generate(requests), strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(alone(model, ids).argmax()))
        assert list(reply.ids) == ids[len(prompt) :]
    options = [[1, 2]] * 4
    for i, scores in list(engine.choice_scores(prompts, options)):
        torch.testing.assert_close(torch.tensor(scores), alone(model, prompts[i]).log_softmax(-1)[[1, 2]])


def test_a_model_that_cannot_compute_is_refused() -> None:
    model = tiny("Llama")
    del model.model.layers[1].self_attn.q_proj
    with pytest.raises(CheckpointError, match=r"^model: LlamaForCausalLM cannot compute a sequence"):
        find_decode_mode(model, FP32)


def test_beyond_the_length_at_which_numbers_change_each_is_alone(tiny_base: Path) -> None:
    """Dynamic rotary embeddings: a sequence longer than 32 is computed otherwise, its earlier tokens too."""
    from sftflow.checkpoint import load_assistant

    model = tiny("Llama")
    dynamic = copy.deepcopy(model.config)
    dynamic.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic.original_max_position_embeddings = 32
    dynamic.max_position_embeddings = 64
    fresh = type(model)(dynamic).eval()
    fresh.load_state_dict(model.state_dict())
    engine = Engine(fresh, load_assistant(str(tiny_base)).renderer, FP32)
    assert (engine.decode_mode(32), engine.decode_mode()) == ("packed", "single")
    rng = np.random.default_rng(0)
    prompts = [draw(rng, n) for n in (28, 40, 3)]
    decoder = engine.decoder(longest=64)
    for ids, logits in drive(fresh, decoder, [], [("add", prompts), *["step"] * 8], rng):
        torch.testing.assert_close(logits, alone(fresh, ids), atol=2e-4, rtol=2e-4)


def test_padded_rows(name: str = "Llama") -> None:
    model = tiny(name)
    rng = np.random.default_rng(1)
    decoder = OwnDecoder(model, FP32, padded=True)
    plan: list[Any] = [("add", [draw(rng, 7), draw(rng, 3), draw(rng, 5)]), "step", ("keep", [2, 1]), "step"]
    for ids, logits in drive(model, decoder, [], plan, rng):
        torch.testing.assert_close(logits, alone(model, ids), atol=2e-4, rtol=2e-4)


def test_ordered_weights_only_where_they_are_the_same() -> None:
    model = tiny("Llama")
    assert ordered_forwards(model)
    assert not ordered_forwards(model.bfloat16())


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.booleans())
def test_how_many_run_changes_no_reply(engine: Engine, seed: int, n: int, padded: bool) -> None:
    """However many run side by side, and whichever decoder: the same tokens, but for near-ties."""
    requests = requests_of(seed, 11)
    one = Engine(engine.model, engine.renderer, engine.runtime, max_running=1)
    many = Engine(engine.model, engine.renderer, engine.runtime, max_running=n)
    if padded:
        many._modes = {True: "padded", False: "padded"}
    finished: list[int] = []
    got = many.generate(requests, lambda i, reply: finished.append(i))
    assert sorted(finished) == list(range(11))
    for request, a, b in zip(requests, one.generate(requests), got, strict=True):
        assert a.n_prompt == len(request.prompt_ids) and len(a.ids) <= request.max_new_tokens
        if not a.near_ties:
            assert a.ids == b.ids and a.finish_reason == b.finish_reason


def test_cancelling_frees_the_slot_and_disturbs_nobody(engine: Engine) -> None:
    requests = [GenerationRequest(prompt_ids=(5 + i, 7, 9), max_new_tokens=20, stop_ids=frozenset()) for i in range(5)]
    wanted = engine.generate(requests)
    small = Engine(engine.model, engine.renderer, engine.runtime, max_running=3)
    done = {}
    with small.scheduler() as scheduler:
        numbers = [scheduler.submit(r) for r in requests]
        for turn in range(60):
            if turn == 4:
                scheduler.cancel(numbers[1])  # runs
                scheduler.cancel(numbers[4])  # waits
            if not scheduler.busy:
                break
            done.update({d.number: d.reply() for d in scheduler.advance() if d.finish})
        scheduler.cancel(99)
    assert sorted(done) == [0, 2, 3]
    assert all(done[i].ids == wanted[i].ids for i in done)


def test_near_ties_are_told() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0 - 5e-5], [1.0, 3.0, 2.9]])
    assert likeliest(logits) == ([1, 1], [True, False])


def test_a_near_tie_reaches_the_reply(engine: Engine) -> None:
    head = engine.model.get_output_embeddings()
    request = GenerationRequest(prompt_ids=(5, 6, 7), max_new_tokens=4, stop_ids=frozenset(), use_python=False)
    (reply,) = engine.generate([request])
    twin = (reply.ids[0] + 1) % 300
    before = head.weight.detach().clone()
    try:
        with torch.no_grad():
            head.weight[twin] = head.weight[reply.ids[0]]  # two ids that are always equally likely
        fresh = Engine(engine.model, engine.renderer, engine.runtime)
        (again,) = fresh.generate([request])
        assert again.near_ties[:1] == (0,)
    finally:
        with torch.no_grad():
            head.weight.copy_(before)


def test_choice_scores_are_log_probabilities(engine: Engine) -> None:
    rng = np.random.default_rng(3)
    shared = draw(rng, 20)
    prompts = [[*shared, *draw(rng, int(rng.integers(1, 9)))] for _ in range(7)]
    options = [draw(rng, 4) for _ in prompts]
    scores = list(engine.choice_scores(prompts, options))
    assert sorted(i for i, _ in scores) == list(range(len(prompts)))
    for i, got in scores:
        wanted = alone(engine.model, prompts[i]).log_softmax(-1)[options[i]]
        torch.testing.assert_close(torch.tensor(got), wanted, atol=1e-4, rtol=1e-4)


def test_shared_beginning() -> None:
    prompt = tuple(range(40))
    assert shared_beginning([prompt]) == ()
    assert shared_beginning([prompt, (*prompt[:30], 99), (*prompt[:25], 99)]) == prompt[:25]
    assert shared_beginning([prompt, prompt]) == prompt[:39]  # a token of each is left to be computed
    assert shared_beginning([prompt, prompt[:10]]) == ()  # too short to be worth it
