"""GGUF files of tiny random models, against llama.cpp itself and our own loader; refusals; the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from helpers.outside import each, tokenizer_names
from helpers.tiny import make_renderer
from sftflow import checkpoint
from sftflow.chat.schema import parse_row
from sftflow.exporting import llamacpp, parity
from sftflow.exporting import to_gguf as exporting
from sftflow.exporting.llamacpp import LlamaCpp
from sftflow.exporting.parity_prompts import cases
from sftflow.exporting.to_gguf import export_gguf
from sftflow.foundation.errors import CheckpointError, RecipeError
from sftflow.generation.request import GenerationRequest
from sftflow.gguf import architectures as layout
from sftflow.gguf import writer as writing
from sftflow.gguf.architectures import interleave, separate
from sftflow.gguf.vocabulary import CONTROL, UNUSED, vocabulary_of
from sftflow.gguf.writer import exported_template

pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp: pip install xllamacpp")

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama biases, wide heads": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama3 rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "linear rope": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3Config", {}),
}


def build(directory: Path, tokenizer_dir: Path, which: str, format_name: str = "sftflow", **more: Any) -> Path:
    """A random SFT checkpoint, whose weights are large enough that its greedy tokens vary."""
    import transformers

    kind, options = MODELS[which]
    config = getattr(transformers, kind)(**{**SHAPE, **options, **more})
    # Some architectures read a tokenizer in a class of their own: it is saved and read once before it is used.
    first = directory.with_name(f"{directory.name}-tokenizer")
    config.save_pretrained(first)
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(first)
    renderer = make_renderer(first, format_name)
    tokenizer = renderer.tokenizer
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, None
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            else:
                weight.copy_(0.15 * torch.randn_like(weight))
    checkpoint.save(directory, model, tokenizer, renderer, dtype=torch.float32, meta={})
    return directory


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return build(tmp_path_factory.mktemp("sft") / "sft", tokenizer_dir, "llama")


def silent(_: str) -> None: ...


# ---- parity


@needs_llama_cpp
@pytest.mark.parametrize("which", MODELS)
def test_f32_is_the_model_itself_in_llama_cpp(tmp_path: Path, tokenizer_dir: Path, which: str) -> None:
    model = build(tmp_path / "sft", tokenizer_dir, which)
    found = export_gguf(str(model), tmp_path / "m.gguf", "f32", prompts=24, say=silent)
    assert found["passed"], found["failures"][:3]
    assert found["prompts"] == found["rendered_equal"] == found["ids_equal"] == found["greedy_equal"] == 24
    assert found["largest_logit_difference"] < 1e-4
    assert found["look_alikes"] >= 2
    assert len({tuple(r["tokens"]) for r in found["rows"]}) > 12  # not the same reply everywhere
    assert json.loads((tmp_path / "m.parity.json").read_text())["sha256"] == found["sha256"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "m.parity.json", "sft", "sft-tokenizer"]


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_smaller_types_are_near(tmp_path: Path, sft: Path, kind: str) -> None:
    found = export_gguf(str(sft), tmp_path / "m.gguf", kind, prompts=20, say=silent)
    assert found["passed"] and found["ids_equal"] == 20
    assert 1e-4 < found["largest_logit_difference"] < 2
    again = checkpoint.load_model(checkpoint.resolve(str(tmp_path / "m.gguf")))[0].state_dict()
    for name, weight in checkpoint.load_model(checkpoint.resolve(str(sft)))[0].state_dict().items():
        step = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[kind]
        off = float((again[name] - weight).abs().max())
        assert off == 0 if "norm" in name else off <= step * float(weight.abs().max()), name


@needs_llama_cpp
@pytest.mark.parametrize("format_name", ["chatml", "llama3", "phi3", "alpaca", "llama2"])
def test_every_format(tmp_path: Path, tokenizer_dir: Path, format_name: str) -> None:
    model = build(tmp_path / "sft", tokenizer_dir, "llama", format_name)
    found = export_gguf(str(model), tmp_path / "m.gguf", "f32", prompts=20, say=silent)
    assert found["passed"], found["failures"][:3]


@needs_llama_cpp
def test_a_certificate_fails_where_the_file_is_another_models(
    tmp_path: Path, sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, template and tokenizer that are not the checkpoint's are each found, and the prompt is named."""
    assistant = checkpoint.load_assistant(str(sft))
    chosen = cases(assistant.renderer, 4, 400)
    path = tmp_path / "m.gguf"

    def failures() -> set[str]:
        found = parity.certificate(path, "f32", assistant, chosen)
        assert not found["passed"] or not found["failures"]
        assert all(f["prompt"] and f["detail"] for f in found["failures"])
        return {f["check"] for f in found["failures"]}

    export_gguf(str(sft), path, "f32", prompts=1, say=silent)
    assert failures() == set()
    with torch.no_grad():
        assistant.model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    assert failures() >= {"logits"}
    other = exported_template(assistant.renderer).replace("<|user_end|>", "<|user_start|>")
    monkeypatch.setattr(writing, "exported_template", lambda _: other)
    export_gguf(str(sft), path, "f32", prompts=1, say=silent)
    monkeypatch.undo()
    monkeypatch.setattr(assistant.renderer._plain.prover, "stop_ids", [5])
    assert failures() >= {"rendered", "stop"}


@needs_llama_cpp
def test_without_rope_order_it_would_fail(tmp_path: Path, sft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "permuted", lambda *_: None)
    found = export_gguf(str(sft), tmp_path / "m.gguf", "f32", prompts=2, say=silent)
    assert {f["check"] for f in found["failures"]} >= {"logits"}


def test_interleaving_and_back() -> None:
    rows = np.arange(24).reshape(12, 2)
    assert interleave(rows[:6], 1)[:, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert (separate(interleave(rows, 2), 2) == rows).all()


# ---- tokenizers


@needs_llama_cpp
@pytest.mark.parametrize(
    "which",
    tokenizer_names("llama2", "llama3_1", "qwen3"),
)
def test_tokenizers_of_known_kinds(tmp_path: Path, known_tokenizers: dict[str, Path], which: str) -> None:
    ids_survive(tmp_path, known_tokenizers[which], which)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("which", each(["hf_llama2", "hf_llama3_1", "hf_qwen3"]))
def test_whole_tokenizers(tmp_path: Path, whole_tokenizers: dict[str, Path], which: str) -> None:
    ids_survive(tmp_path, whole_tokenizers[which], which)


def ids_survive(tmp_path: Path, tokenizer: Path, which: str) -> None:
    format_name = {"llama2": "llama2", "llama3_1": "llama3", "qwen3": "chatml"}[which.partition("_")[2]]
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build(tmp_path / "sft", tokenizer, "llama tied", format_name, **small)
    found = export_gguf(str(model), tmp_path / "m.gguf", "f32", say=silent)
    if which.startswith("hf"):
        assert found["passed"], found["failures"][:3]
    else:  # among so few tokens a random model may write halves of characters only, of which llama.cpp tells nothing
        assert all("told no log-prob" in failure["detail"] for failure in found["failures"]), found["failures"][:3]
    assert found["ids_equal"] == found["rendered_equal"] == found["prompts"] == 50
    assert any("NFC" in note for note in found["notes"]) == which.endswith("qwen3")  # NFC


def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(tokenizer_dir: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    def refused(change: Any) -> str:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        change(tokenizer)
        with pytest.raises(CheckpointError) as caught:
            vocabulary_of(tokenizer, len(tokenizer) + 2, "m")
        return str(caught.value)

    def split(tokenizer: Any) -> None:
        steps = [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def lower(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    def greedy_space(tokenizer: Any) -> None:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken("<wide>", rstrip=True)])

    assert r"llama.cpp has no pre-tokenizer that splits by \w+" in refused(split)
    assert "the tokenizer normalises text (Lowercase)" in refused(lower)
    assert "'<wide>' takes in the spaces beside it" in refused(greedy_space)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(CheckpointError, match="a WordLevel tokenizer cannot be exported"):
        vocabulary_of(words, 1, "m")


def test_rows_without_a_token_are_unused(tokenizer_dir: Path) -> None:
    tokenizer = make_renderer(tokenizer_dir, "sftflow").tokenizer
    found = vocabulary_of(tokenizer, len(tokenizer) + 3, "m")
    assert found.pre == "qwen2" and found.types[-3:] == [UNUSED] * 3 and found.types[0] == CONTROL
    assert len(set(found.tokens)) == len(tokenizer) + 3


def test_no_bos_and_a_clock_are_written_into_the_template(tokenizer_dir: Path) -> None:
    from dataclasses import replace

    renderer = make_renderer(tokenizer_dir, "chatml")
    template = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}" + renderer.format.template
    names = {k: v for k, v in renderer.spec.names.items() if k != "bos_token"}
    spec = replace(renderer.spec, names=names, format=replace(renderer.format, template=template))
    text = exported_template(type(renderer)(None, spec.format, spec=spec))
    assert text.startswith("{%- set bos_token = '' -%}{{ bos_token }}{{ \"01 Jan 2026\" }}")


# ---- our own loader


@pytest.mark.parametrize("which", ["llama", "llama3 rope", "qwen3", "smollm3"])
def test_the_file_comes_back_as_what_it_was(tmp_path: Path, tokenizer_dir: Path, which: str) -> None:
    model = build(tmp_path / "sft", tokenizer_dir, which)
    path = tmp_path / "m.gguf"
    before = checkpoint.load_assistant(str(model))
    exporting.write(exporting.plan_of(before, "f32"), path)
    after = checkpoint.load_assistant(str(path))
    for name, weight in before.model.state_dict().items():
        assert torch.equal(weight, after.model.state_dict()[name]), name
    assert after.renderer.stop_ids() == before.renderer.stop_ids()
    assert after.renderer.python_ids() == before.renderer.python_ids() is not None
    assert after.renderer.special == before.renderer.special
    one, two = cases(before.renderer, 30, 400), cases(after.renderer, 30, 400)
    assert [c.rendered.ids.tolist() for c in one] == [c.rendered.ids.tolist() for c in two]
    asked = [GenerationRequest(prompt_ids=tuple(c.rendered.ids.tolist()), max_new_tokens=12) for c in one[:6]]
    assert [r.ids for r in before.engine.generate(asked)] == [r.ids for r in after.engine.generate(asked)]


@needs_llama_cpp
def test_llama_cpp_chats_and_stops(tmp_path: Path, tokenizer_dir: Path) -> None:
    """A model that always ends its turn: llama.cpp's chat endpoint gives an empty reply, finished by `stop`."""
    directory = build(tmp_path / "sft", tokenizer_dir, "llama")
    assistant = checkpoint.load_assistant(str(directory))
    stop = assistant.renderer.stop_ids()[0]
    with torch.no_grad():
        assistant.model.model.norm.weight.zero_()
        assistant.model.model.norm.weight[0] = 1.0
        assistant.model.model.embed_tokens.weight[:, 0] = 4.0
        for layer in assistant.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        assistant.model.lm_head.weight.zero_()
        assistant.model.lm_head.weight[stop, 0] = 9.0
    exporting.write(exporting.plan_of(assistant, "f32"), tmp_path / "m.gguf")
    with LlamaCpp(tmp_path / "m.gguf", context=128) as engine:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        choice = engine.post("/v1/chat/completions", body)["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == ""


def test_the_directory_generates_in_transformers(tmp_path: Path, tokenizer_dir: Path) -> None:
    """AutoModel, the stored template and its own generation config: the ids of our engine, stop token included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = build(tmp_path / "sft", tokenizer_dir, "llama")
    assistant = checkpoint.load_assistant(str(directory))
    messages = [{"role": "user", "content": "What is it?"}]
    prompt = assistant.renderer.render(
        parse_row({"messages": messages}, "t:1"), add_generation_prompt=True
    ).ids.tolist()
    (mine,) = assistant.engine.generate(
        [GenerationRequest(prompt_ids=tuple(prompt), max_new_tokens=20, use_python=False)]
    )
    # Whatever comes fifth shall be the end of turn: its row and the end token's change places.
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    stop, fifth = assistant.renderer.stop_ids()[0], mine.ids[4]
    assert fifth not in mine.ids[:4]
    with torch.no_grad():
        model.lm_head.weight[[stop, fifth]] = model.lm_head.weight[[fifth, stop]]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == prompt
    out = model.generate(torch.tensor([ids]), max_new_tokens=20)[0].tolist()
    assert out[len(ids) :] == [*mine.ids[:4], stop]
    names = {p.name for p in directory.iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert needed | {"chat_template.jinja"} <= names  # what vLLM reads
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


# ---- refusals, before anything is written


def run(*args: str) -> Any:
    from sftflow.cli import app

    return CliRunner().invoke(app, ["export", *args])


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path, tokenizer_dir: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    renderer = make_renderer(tokenizer_dir, "sftflow")
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(renderer.tokenizer)))
    checkpoint.save(tmp_path / "gpt2", model, renderer.tokenizer, renderer, dtype=torch.float32, meta={})
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    window = build(tmp_path / "window", tokenizer_dir, "mistral", sliding_window=64)
    stretched = build(tmp_path / "yarn", tokenizer_dir, "llama", rope_parameters=yarn)
    relu = build(tmp_path / "relu", tokenizer_dir, "llama", hidden_act="relu")
    for directory, words in [
        (tmp_path / "gpt2", "GPT2LMHeadModel cannot be exported to GGUF"),
        (window, "this MistralForCausalLM attends to a window of 64 tokens"),
        (stretched, "this LlamaForCausalLM has rope scaling of the kind yarn"),
        (relu, "this LlamaForCausalLM has the activation relu"),
    ]:
        result = run(str(directory), "--to", "gguf", "--out", str(tmp_path / "out" / "m.gguf"))
        assert isinstance(result.exception, CheckpointError) and result.exception.exit_code == 2
        assert words in str(result.exception)
        assert not (tmp_path / "out").exists()


def test_an_adapter_whose_base_is_not_named_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"the adapter names no base; .*export ADAPTER --to merged --base BASE"):
        export_gguf(str(tmp_path), tmp_path / "x.gguf", "f32")


def test_out_is_ours_or_new(tmp_path: Path, sft: Path) -> None:
    for name, words in [("m.bin", "no .gguf file name"), ("taken.gguf", "something other than an export")]:
        (tmp_path / "taken.gguf").write_text("mine")
        with pytest.raises(RecipeError, match=words):
            export_gguf(str(sft), tmp_path / name, "f32", say=silent)
    assert (tmp_path / "taken.gguf").read_text() == "mine"
    exporting.write(exporting.plan_of(checkpoint.load_assistant(str(sft)), "f32"), tmp_path / "m.gguf")
    with pytest.raises(RecipeError, match="the model itself"):
        export_gguf(str(tmp_path / "m.gguf"), tmp_path / "m.gguf", "f32", say=silent)


def test_out_in_a_file_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = run("/no/such/model", "--to", "gguf", "--out", str(tmp_path / "file" / "sub" / "m.gguf"))
    assert isinstance(result.exception, RecipeError) and result.exception.exit_code == 2
    assert f"{tmp_path / 'file'} is a file" in str(result.exception)


def test_a_file_with_only_some_of_our_keys_is_not_ours(tmp_path: Path, sft: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_string("sftflow.config", "{}")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    before = (tmp_path / "m.gguf").read_bytes()
    result = run(str(sft), "--to", "gguf", "--out", str(tmp_path / "m.gguf"))
    assert isinstance(result.exception, RecipeError) and "something other than an export" in str(result.exception)
    assert (tmp_path / "m.gguf").read_bytes() == before
    with pytest.raises(CheckpointError, match=r"cannot be loaded .*it has sftflow.config and no sftflow.format"):
        checkpoint.load_assistant(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("when", ["loading", "writing"])
def test_sigterm_leaves_the_old_file_and_its_certificate(
    tmp_path: Path, sft: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The signal comes while a library loads, whose errors become our own, or between two tensors of the file."""
    import signal

    import transformers

    monkeypatch.setattr(llamacpp, "available", lambda: False)
    args = (str(sft), "--to", "gguf", "--out", str(tmp_path / "m.gguf"))
    assert run(*args).exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["m.gguf", "m.parity.json"]
    owner, name = (transformers.AutoModelForCausalLM, "from_pretrained") if when == "loading" else (writing, "_encoded")
    real = getattr(owner, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        assert when == "loading" or any(path.suffix == ".tmp" for path in tmp_path.iterdir())
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    result = run(*args, "--type", "f32")
    assert result.exit_code == 143 and "stopped; " in result.output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_numbers_beyond_f16_are_refused(tmp_path: Path, sft: Path) -> None:
    assistant = checkpoint.load_assistant(str(sft))
    with torch.no_grad():
        assistant.model.lm_head.weight[3, 3] = 1e5
    with pytest.raises(CheckpointError, match=r"lm_head.weight: it holds numbers beyond what f16 reaches"):
        exporting.write(exporting.plan_of(assistant, "f16"), tmp_path / "m.gguf")
    with torch.no_grad():
        assistant.model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=f"^{sft.name}.*: lm_head.weight: it holds numbers that are not finite"):
        exporting.write(exporting.plan_of(assistant, "f32"), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


# ---- the command


@needs_llama_cpp
def test_the_command(tmp_path: Path, sft: Path) -> None:
    result = run(str(sft), "--to", "gguf", "--type", "f32", "--out", str(tmp_path / "m.gguf"), "--prompts", "3")
    assert result.exit_code == 0, result.output
    assert "parity with llama.cpp and transformers, 3 prompts: passed" in result.output
    again = run(str(sft), "--to", "gguf", "--out", str(tmp_path / "m.gguf"), "--prompts", "2")  # ours: replaced
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "m.parity.json").read_text())["type"] == "f16"


@needs_llama_cpp
def test_a_failed_certificate_exits_1(tmp_path: Path, sft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "permuted", lambda *_: None)
    result = run(str(sft), "--to", "gguf", "--type", "f32", "--out", str(tmp_path / "m.gguf"), "--prompts", "2")
    assert getattr(result.exception, "exit_code", None) == 1
    assert str(result.exception).startswith("prompt digits: ")
    assert json.loads((tmp_path / "m.parity.json").read_text())["passed"] is False


def test_without_llama_cpp_the_certificate_says_so(tmp_path: Path, sft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "available", lambda: False)
    result = run(str(sft), "--to", "gguf", "--type", "f32", "--out", str(tmp_path / "m.gguf"))
    assert result.exit_code == 0 and "not checked: the package xllamacpp is not installed" in result.output
    assert json.loads((tmp_path / "m.parity.json").read_text())["passed"] is None
