"""Measuring around a training run: what is checked before it, what it leaves behind, whose results are whose."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers.runs import Quiet, write_recipe
from helpers.runs import run as command
from sftflow import api
from sftflow.api.assistant import base_beside
from sftflow.checkpoint import Assistant, base_format, load_assistant, load_info, resolve
from sftflow.comparison.lineage import kind_of
from sftflow.comparison.run_artifacts import read_run, run_of
from sftflow.evaluation.evaluate import EvalDuringTraining
from sftflow.evaluation.options import open_tasks
from sftflow.foundation.atomic_io import CHECKSUM, with_checksum, write_json
from sftflow.foundation.runtime import detect
from sftflow.generation.engine import Engine
from sftflow.packing.attending import attending
from sftflow.packing.attention import NAME
from sftflow.recipe import load_recipe
from sftflow.training.run import run_training
from sftflow.training.signals import Stopped
from sftflow.training.trainer import resting

CODE = {"prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1\n"}
MEASURED = ("eval.json", "compare.json", "report.html")


def short_recipe(folder: Path, base: Path, **more: Any) -> Path:
    path = write_recipe(folder, base, steps=2, save_every=2, tokens_per_step=256, optimizer="adamw")
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_training(load_recipe(short_recipe(folder, tiny_base)), Quiet())
    return folder / "run"


def test_training_anew_leaves_no_earlier_results(run: Path, tmp_path: Path, tiny_base: Path) -> None:
    """--resume would take them for this run's own, and call it finished."""
    recipe = load_recipe(short_recipe(tmp_path, tiny_base))
    shutil.copytree(run, tmp_path / "run")
    for name in MEASURED:
        (tmp_path / "run" / name).write_text("{}")
    assert run_training(recipe, Quiet(), resume=True).already_done
    assert all((tmp_path / "run" / name).is_file() for name in MEASURED)
    run_training(recipe, Quiet(), overwrite=True)
    assert not any((tmp_path / "run" / name).exists() for name in MEASURED)


def test_a_base_that_borrows_a_template_is_no_continued_sft(run: Path, tiny_base: Path) -> None:
    sft = load_assistant(str(run))
    borrowed = base_format(sft)
    for name in (borrowed.name, "own"):  # a model of somebody else's calls every template its own
        fallback = type(borrowed)(name=name, template=borrowed.template, tokens=borrowed.tokens)
        assert kind_of(load_assistant(str(tiny_base), fallback=fallback), sft) == "base-versus-SFT"


def test_only_what_the_checkpoints_show_is_said_of_two_models(
    run: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a base, two models trained from it in formats of their own, a child of one of these, and a stranger."""
    shutil.copytree(tiny_base, tmp_path / "base")  # it need not lie where it lay
    for name, base, more in (("sibling", tiny_base, {"format": "chatml"}), ("child", run, {})):
        (tmp_path / name).mkdir()
        run_training(load_recipe(short_recipe(tmp_path / name, base, **more)), Quiet())
    shutil.copytree(run / "checkpoint", tmp_path / "stranger")
    scaled = load_file(tmp_path / "stranger" / "model.safetensors")
    scaled["model.norm.weight"] *= 2
    save_file(scaled, tmp_path / "stranger" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "stranger" / "sftflow.json").unlink()
    places = {name: str(tmp_path / name / "run") for name in ("sibling", "child")}
    places |= {"base": str(tmp_path / "base"), "sft": str(run), "stranger": str(tmp_path / "stranger")}
    for first, second, kind in (
        ("base", "sft", "base-versus-SFT"),
        ("base", "child", "base-versus-SFT"),
        ("sft", "child", "continued SFT"),
        ("sft", "base", "SFT-versus-base"),
        ("sft", "sibling", "two of one base"),
        ("sibling", "child", "two of one base"),
        ("sft", "sft", "one model twice"),
        ("sft", "stranger", "two models"),
        ("stranger", "sft", "two models"),
    ):
        trained = api.load(places[second])
        assert kind_of(base_beside(places[first], trained), trained) == kind, (first, second)
    # An earlier version wrote the base's name alone.
    trained = api.load(run)
    del trained.info["base"]["body"]
    assert trained.info["base"]["name"] == str(tiny_base)
    assert kind_of(base_beside(str(tiny_base), trained), trained) == "base-versus-SFT"
    assert kind_of(base_beside(places["base"], trained), trained) == "two models"


def test_a_model_beside_itself_keeps_both_scores(run: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "Say yes."}) + "\n")
    found = api.compare(str(run), str(run), ["spelling"], limit=1, prompts=str(tmp_path / "one.jsonl"), out=tmp_path)
    assert found.kind == "one model twice" and list(found.tasks) == ["spelling"]
    models = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert list(models) == [str(run), f"{run} (again)"]
    page = (tmp_path / "report.html").read_text()
    assert "forgot" not in page and "Forgetting" not in page and "continued SFT" not in page


@pytest.mark.parametrize("torn", ['{"step": 9, "lo', "\ufffd\0", "[1]"])
def test_a_torn_line_of_a_log_costs_only_itself(run: Path, tmp_path: Path, torn: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as f:
        f.write(torn)
    (tmp_path / "run" / "mask_example.json").write_text("[")
    found = read_run(tmp_path / "run")
    assert [step for step, _ in found.losses] == [1, 2] and found.mask_example is None
    assert found.ledger and found.ledger["rows"] > 0


def test_a_ledger_elsewhere_makes_no_run_directory(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoint", tmp_path / "model")
    (tmp_path / "ledger.json").write_text("{}")  # as `mix --out .` leaves it
    (tmp_path / "recipe.yaml").write_text("{}")
    assert run_of(str(tmp_path / "model")) is None
    assert run_of(str(run)) == run_of(str(run / "checkpoint")) == run
    assert run_of("owner/model") is None


def test_mix_and_doctor_take_a_recipe_with_code(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "code.jsonl").write_text(json.dumps(CODE) + "\n")
    measure = {"tasks": ["humaneval=code.jsonl"], "allow_code": True}
    recipe = short_recipe(tmp_path, tiny_base, eval=measure)
    for name in ("mix", "doctor"):
        done = command(name, str(recipe))
        assert done.returncode == 0, done.stderr
    recipe = short_recipe(tmp_path, tiny_base, eval=measure | {"allow_code": False})
    assert command("mix", str(recipe)).returncode == 0  # it asks nothing, so it runs nothing
    refused = command("doctor", str(recipe))
    assert refused.returncode == 2 and "it runs code that the model wrote" in refused.stderr  # as `train` would


@pytest.mark.parametrize(
    ("compare", "said"),
    [
        ({"prompts": "missing.jsonl"}, "missing.jsonl: "),
        ({"judge": "http://127.0.0.1:9/v1", "judge_model": "m"}, "http://127.0.0.1:9"),
        ({"judge": "http://127.0.0.1:9/v1"}, "compare.judge: it needs compare.judge_model"),
    ],
)
def test_what_a_comparison_needs_is_checked_before_training(
    tmp_path: Path, tiny_base: Path, compare: dict[str, Any], said: str
) -> None:
    done = command("train", str(short_recipe(tmp_path, tiny_base, compare=compare)))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and lines[-1].startswith("error: ") and said in lines[-1], done.stderr
    assert not (tmp_path / "run").exists()


def test_every_model_is_asked_for_its_own_name(run: Path, tmp_path: Path) -> None:
    names = []
    for name in ("Ada", "Bo"):
        shutil.copytree(run, tmp_path / name)
        info = load_info(resolve(str(tmp_path / name)))
        info["recipe"]["identity"] = {"name": name, "maker": f"the {name} company"}
        del info[CHECKSUM]
        write_json(tmp_path / name / "checkpoint" / "sftflow.json", with_checksum(info))
        names.append(str(tmp_path / name))
    out = tmp_path / "out"
    api.evaluate(names, ["identity"], limit=4, out=out)
    for name, other in (("Ada", "Bo"), ("Bo", "Ada")):
        (path,) = (out / "eval").glob(f"*{name}*identity.jsonl")
        said = path.read_text()
        assert name in said and f"{other} company" not in said


def test_a_model_that_packs_only_in_training_is_sampled(tokenizer_dir: Path) -> None:
    """Its rotary embeddings change beyond 32 tokens: short rows train packed, long replies are generated otherwise."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config

    from sftflow.chat.format import add_tokens, choose_format
    from sftflow.chat.render import Renderer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    chat_format = choose_format("sftflow", tokenizer)
    add_tokens(tokenizer, chat_format)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        max_position_embeddings=256,
        original_max_position_embeddings=32,
        rope_parameters=rope | {"original_max_position_embeddings": 32},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    sampled = EvalDuringTraining(open_tasks(["arithmetic", "spelling"], 2))
    renderer = Renderer(tokenizer, chat_format)

    def sample() -> dict[str, Any]:
        with resting(model):
            engine = Engine(model, renderer, detect("fp32"))
            return sampled(Assistant("", model, tokenizer, renderer, engine, {}))

    alone = sample()
    with attending(model, "packed"):
        within = sample()
        assert model.training and model.config._attn_implementation == NAME
    assert within["tasks"] == alone["tasks"] and within["hygiene"] == alone["hygiene"]


def test_out_of_memory_is_one_line() -> None:
    """A command that asks torch for a petabyte."""
    program = (
        "import torch\nfrom sftflow.cli import app, main\n"
        "@app.command()\ndef greedy() -> None:\n    torch.empty(1 << 50)\n"
        "import sys; sys.argv = ['sftflow', 'greedy']; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 3
    assert done.stderr.startswith("error: memory: out of memory; ") and len(done.stderr.splitlines()) == 1


def test_a_signal_does_not_wait_for_a_sample(tmp_path: Path, tiny_base: Path) -> None:
    """It comes in the middle of the sample at step 2: the state is saved, and the sample taken when the run goes on."""
    recipe = load_recipe(
        short_recipe(tmp_path, tiny_base), ["train.steps=3", "eval.every=2", "eval.tasks=[arithmetic]"]
    )
    sampled = EvalDuringTraining(open_tasks(["arithmetic"], 2))
    calls: list[int] = []

    def sampling(*args: Any) -> dict[str, Any]:
        calls.append(len(calls))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return sampled(*args)

    with pytest.raises(Stopped) as stopped:
        run_training(recipe, Quiet(), callback=sampling)
    assert stopped.value.saved and stopped.value.exit_code == 143
    log = tmp_path / "run" / "evals.jsonl"
    assert [json.loads(x)["step"] for x in log.read_text().splitlines()] == [0]
    assert run_training(recipe, Quiet(), callback=sampling, resume=True).directory.is_dir()
    assert [json.loads(x)["step"] for x in log.read_text().splitlines()] == [0, 2]
    assert len(calls) == 3
