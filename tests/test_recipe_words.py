"""What a recipe's mistakes are answered with: the place where the value was written, and what to write instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import sftflow as sf
from helpers.runs import error_line, run
from sftflow import other_trainers
from sftflow.recipe import Recipe, load_recipe
from sftflow.recipe_words import model_at

MIXTURE = "mixture: [{source: spelling}]\n"


def refused(tmp_path: Path, text: str, *sets: str) -> str:
    """The error of a recipe with this text behind its mixture, without the folder."""
    file = tmp_path / "r.yaml"
    file.write_text(text if "mixture:" in text else MIXTURE + text, encoding="utf-8")
    with pytest.raises(sf.SftflowError) as error:
        load_recipe(file, list(sets))
    return str(error.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("learning_rate: 1e-4", "r.yaml:2: learning_rate: unknown key; write train.lr (auto, or a number)"),
        (
            "train:\n  steps: 3\n  num_train_epochs: 2",
            "r.yaml:4: train.num_train_epochs: unknown key; write train.epochs",
        ),
        ("train: {early_stopping: 3}", "train.early_stopping: unknown key; a run goes on to its last step; "),
        ("train: {max_tokens: 64}", "train.max_tokens: unknown key; write train.max_length (tokens of a row; "),
        ("per_device_train_batch_size: 4", "; write train.micro_tokens (a step is counted in tokens, not in rows"),
        ("batch_size: 4", "; write train.tokens_per_step ("),
        ("sequence_len: 2048", "; write train.max_length"),
        ("val_set_size: 0.1", "; write validation, at the top of the recipe (a share "),
        ("neat_packing: true", "; write train.packing (true already"),
        ("lora_r: 8", "lora_r: unknown key; this version trains all weights; leave it out"),
        ("train: {base: x}", "train.base: unknown key; write base, at the top of the recipe"),
        ("warmup: 0.1", "warmup: unknown key; write train.schedule.warmup"),
        ("limit: 3", "limit: unknown key; it is a key of a mixture's entries and of eval"),
        (
            "mixture: [{source: a.jsonl, type: alpaca}]",
            "mixture.0.type: unknown key; a row's dialect is read from the row",
        ),
        (
            "mixture: [{source: a.jsonl}, {dataset: b}]",
            "mixture.1.dataset: unknown key; write source in an entry of the mixtu",
        ),
        ("mixture: [{path: a.jsonl}]", "mixture.0.source: this key is missing; write source: a data file, "),
        ("mixture: [a.jsonl]", 'mixture.0: it should be a mapping of keys (given: "a.jsonl"); write source: a.jsonl'),
        ("mixture: a.jsonl", 'mixture: it should be a list (given: "a.jsonl"); write [source: a.jsonl]'),
        ("mixture: []", "mixture: it is empty; write what to train on: "),
        ("datasets: []", "datasets: unknown key; write mixture, "),
        ("train: {zebra: 1}", "train.zebra: unknown key; known here: out, max_length, "),
        (
            "train: {optimizer: adamw_torch}",
            "it should be 'adamw' or 'muon' (given: \"adamw_torch\"); did you mean 'adamw'?",
        ),
        ("train: {precision: bfloat16}", "; did you mean 'bf16'?"),
        (
            "train: {schedule: {kind: cosine_with_restarts}}",
            "r.yaml:2: train.schedule.kind: it should be 'linear' or 'cosine' or ",
        ),
        ("train: {schedule: cosine}", 'it should be a mapping of keys (given: "cosine"); its keys: kind, warmup, '),
        ("train: {overlong: truncate}", "; did you mean 'cut'?"),
        ("train: {logger: none}", "; write null"),
        ("train: {steps: -1}", "train.steps: it should be greater than 0 (given: -1); write null"),
        ("train: {steps: 2.5}", "train.steps: it should be a whole number (given: 2.5)"),
        ("train: {epochs: yes}", "train.epochs: it should be a number (given: true)"),
        ("train: {packing: maybe}", 'train.packing: it should be true or false (given: "maybe")'),
        ("train: {max_length: 9999}", "; raise train.tokens_per_step, or lower train.max_length"),
        ("eval: {tasks: gsm8k}", 'eval.tasks: it should be a list (given: "gsm8k"); write [gsm8k]'),
        ("format: null", "format: it should be a text (given: null); leave the key out, or give it a value"),
    ],
)
def test_a_recipe_is_told_what_to_write(text: str, line: str, tmp_path: Path) -> None:
    assert line in refused(tmp_path, text)


def test_a_recipe_of_another_trainer_is_known_as_one(tmp_path: Path) -> None:
    said = refused(tmp_path, "base_model: x\ndatasets: []\nsequence_len: 9\nlora_r: 3\nmixture: 3")
    assert said.startswith(
        "r.yaml:1: base_model: unknown key; write base, at the top of the recipe. 4 keys are unknown"
    )
    assert said.endswith("docs/from_other_trainers.md has those of other trainers")


def test_a_value_is_named_by_where_it_was_written(tmp_path: Path) -> None:
    assert refused(tmp_path, "", "train.learning_rate=1").startswith(
        "--set train.learning_rate=1: train.learning_rate: unknown key; write --set train.lr="
    )
    assert refused(tmp_path, "train: {lr: 3}", "train.steps=0").startswith(
        "--set train.steps=0: train.steps: it should be "
    )
    assert refused(tmp_path, "train: {lr: x}", "train.steps=3").startswith("r.yaml:2: train.lr: it should be ")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"learning_rate": 1e-4}, "learning_rate: unknown key; write lr=... (auto, or a number)"),
        ({"warmup_ratio": 0.1}, "warmup_ratio: unknown key; write schedule={'warmup': ...}"),
        ({"base_model": "x"}, "base_model: unknown key; write base=..."),
        (
            {"optimizer": "adamw_torch"},
            "optimizer: it should be 'adamw' or 'muon' (given: \"adamw_torch\"); did you mean",
        ),
        ({"schedule": {"kind": "x"}}, "schedule.kind: it should be "),
        ({"eval": {"tasks": ["spelin"]}}, "eval.tasks: unknown task 'spelin'; did you mean 'spelling'?"),
        (
            {"eval": {"tasks": ["humaneval=HUMANEVAL"]}},
            "humaneval: it runs code that the model wrote; allow that with eval.",
        ),
        ({"format": "sftflw"}, "format: 'sftflw' is not a format"),
        ({"compare": {"judge": "http://127.0.0.1:9"}}, "compare.judge: it needs compare.judge_model, and that needs "),
    ],
)
def test_arguments_are_named_as_such(keys: dict[str, Any], line: str, tmp_path: Path) -> None:
    (tmp_path / "HUMANEVAL").write_text("")
    for task in keys.get("eval", {}).get("tasks", []):
        keys = {"eval": {"tasks": [task.replace("=", f"={tmp_path}/")]}}
    with pytest.raises(sf.SftflowError) as error:
        sf.train(recipe={"mixture": [{"source": "spelling"}]}, out=tmp_path / "run", **keys)
    assert str(error.value).startswith(line) and not (tmp_path / "run").exists()


def test_the_door_speaks_of_arguments_and_a_recipe_of_its_keys(tmp_path: Path) -> None:
    for call, line in [
        (lambda: sf.evaluate("builtin:tiny", ["spelin"]), "tasks: unknown task 'spelin'"),
        (lambda: sf.evaluate("builtin:tiny", ["gsm8k=none.jsonl"]), "tasks: gsm8k: no such file none.jsonl"),
        (
            lambda: sf.train(recipe={"mixture": [{"source": "spelling"}]}, resume=True, overwrite=True),
            "overwrite=True: it starts anew, and resume=True goes on; give one of the two",
        ),
        (lambda: sf.task("spelling", limits=3), "limits: unknown key; did you mean 'limit'?"),
        (
            lambda: sf.compare("builtin:tiny", "builtin:tiny", judge="http://127.0.0.1:9"),
            "judge: it needs judge_model, and ",
        ),
    ]:
        with pytest.raises(sf.SftflowError) as error:
            call()
        assert str(error.value).startswith(line)
    (tmp_path / "r.yaml").write_text(f"{MIXTURE}eval:\n  tasks: [gsm8k=none.jsonl]\ntrain: {{out: {tmp_path}/run}}\n")
    for command in ("train", "mix", "doctor"):
        said = error_line(run(command, str(tmp_path / "r.yaml")))
        assert f"r.yaml:3: eval.tasks: gsm8k: no such file {tmp_path}/none.jsonl; " in said, command
    line = error_line(run("eval", "builtin:tiny", "--tasks", "spelin", "--out", str(tmp_path / "e")))
    assert line.startswith("error: --tasks: unknown task 'spelin'")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "chat builtin:tiny --max-new-tokens 3",
            "--max-new-tokens (Possible options: --max-tokens); write --max-tokens; see",
        ),
        (
            "chat --model builtin:tiny",
            "No such option: --model; write the model without an option: sftflow chat MODEL; ",
        ),
        ("train r.yaml --learning-rate 1e-4", "--learning-rate; write --set train.lr=...; see sftflow train --help"),
        (
            "train r.yaml --lora-r 8",
            "--lora-r; this version trains all weights; leave it out; see sftflow train --help",
        ),
        (
            "serve m --tensor-parallel-size 2",
            "--tensor-parallel-size; a model runs on one device; see sftflow serve --help",
        ),
        ("finetune r.yaml", "No such command 'finetune'; write sftflow train; see sftflow --help"),
        ("compare a", "Missing argument 'SFT'; see sftflow compare --help"),
        ("serve m --port x", "Invalid value for '--port': it should be a number; see sftflow serve --help"),
    ],
)
def test_a_wrong_command_line_leads_on(arguments: str, line: str) -> None:
    said = error_line(run(*arguments.split()))
    assert said.startswith("error: usage: ") and line in said


def test_a_path_without_a_file_says_why(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "empty").mkdir()
    for name, said in {
        "row.jsonl": "no such file; did you mean 'rows.jsonl'?",
        "other.txt": "no such file; check the path; a hub data set is hub:OWNER/NAME",
        "*.jsonl": "no such file: patterns are not read here; name the files: link.jsonl, rows.jsonl",
        "link.jsonl": "no such file: a link to gone.jsonl, which is not there; mend the link",
        "rows.jsonl/x": f"no such file: {tmp_path}/rows.jsonl is a file, not a folder; ",
        "no/where.jsonl": f"no such file: there is no folder {tmp_path}/no; ",
        "~/a.jsonl": "no such file; ~ is for the shell to read; write the folder out",
        "$HOME/a.jsonl": "no such file; $ is for the shell to read; write the folder out",
        "empty": "an empty folder, not a file; give the path of a file",
    }.items():
        (refused,) = [error_line(run("render", f"{tmp_path}/{name}", "--model", "builtin:tiny"))]
        assert refused.startswith(f"error: {tmp_path}/{name}: {said}"), refused
    line = error_line(run("render", "https://x.org/a.jsonl", "--model", "builtin:tiny"))
    assert "an address is not read; download it, and name the file" in line


def test_what_is_no_checkpoint_says_what_is_there(tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(sf.SftflowError) as error:
            sf.load(tmp_path / name)
        return str(error.value).removeprefix(f"{tmp_path}/{name}").removeprefix(": ").replace(f"{tmp_path}/", "")

    base = tmp_path / "base"
    shutil.copytree(Path(sf.__file__).parent / "pretraining" / "tiny", base)
    (base / "sftflow.json").unlink()
    weights, config = base / "model.safetensors", json.loads((base / "config.json").read_text())
    assert refusal("base/config.json") == "a file, not a checkpoint directory; give the folder that it lies in"
    assert refusal("bose") == "no such checkpoint directory; did you mean 'base'?"
    assert refusal("").endswith(": no config.json in it, but in base; name one of them: base")

    (base / "config.json").write_text(json.dumps({**config, "model_type": "newest"}))
    assert "knows no model of type 'newest'; pip install -U transformers, or give another model" in refusal("base")
    (base / "config.json").write_text(json.dumps({**config, "hidden_size": "many"}))
    assert "its config.json asks for what no model is (" in refusal("base")
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq", "bits": 4}}))
    assert refusal("base").endswith(
        "; install that package; to train, give the base in bf16: quantised weights cannot be trained"
    )
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = (base / "tokenizer.json").read_text()
    (base / "tokenizer.json").write_text("{")
    assert refusal("base").startswith("its tokenizer.json is not JSON (")
    (base / "tokenizer.json").write_text(tokenizer)
    weights.rename(base / "pytorch_model.bin")
    assert refusal("base").startswith(
        "no model.safetensors in it, but pytorch_model.bin; pickled weights are not loaded; "
    )
    (base / "pytorch_model.bin").unlink()
    assert (
        refusal("base")
        == "no model.safetensors in it: no weights at all; copy the whole checkpoint, or give one with weights"
    )
    (base / "model-00001-of-00002.safetensors").touch()
    assert refusal("base").startswith("model-00001-of-00002.safetensors is there, and not model.safetensors.index.json")


def keys_of(model: type[BaseModel], above: str = "") -> Iterator[str]:
    for name in model.model_fields:
        yield above + name
        if (inner := model_at(model, (name,))) is not model:
            yield from keys_of(inner, f"{above}{name}.")


def test_the_table_is_whole_and_names_keys_that_there_are() -> None:
    listed = {name for names in other_trainers.TRAINERS.values() for name in names.split()}
    assert listed <= other_trainers.KEYS.keys()
    assert sum(len(names.split()) for names, _, _ in other_trainers.ROWS) == len(other_trainers.KEYS), "a name twice"
    assert {row.key for row in other_trainers.KEYS.values() if row.key} <= set(keys_of(Recipe))
    assert all(row.key or row.note for row in other_trainers.KEYS.values())


def test_the_page_is_written_from_the_table() -> None:
    page = Path(__file__).parent.parent / "docs" / "from_other_trainers.md"
    assert page.read_text(encoding="utf-8") == other_trainers.page()
