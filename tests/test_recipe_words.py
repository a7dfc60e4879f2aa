"""What a recipe's mistakes are answered with: the place where the value was written, and what to write instead."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import sftflow as sf
from helpers.runs import error_line, run
from sftflow import other_trainers
from sftflow.foundation.errors import SftflowError
from sftflow.recipe import Recipe, load_recipe, parse_recipe
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
        ("lora_r: 8", "lora_r: unknown key; write train.lora.rank"),
        ("train: {base: x}", "train.base: unknown key; write base, at the top of the recipe"),
        ("warmup: 0.1", "warmup: unknown key; write train.schedule.warmup"),
        ("limit: 3", "limit: unknown key; it is a key of eval and of a mixture's entries"),
        (
            "mixture: [{source: a.jsonl, type: alpaca}]",
            "mixture.0.type: unknown key; a row's dialect is read from the row",
        ),
        (
            "mixture: [{source: a.jsonl}, {dataset: b}]",
            "mixture.1.dataset: unknown key; write source in an entry of the mixtu",
        ),
        ("mixture: [{source: a.jsonl, epochs: 2}]", "mixture.0.epochs: unknown key; write repeat in an entry of the"),
        ("eval: {top_p: 1}", "eval.top_p: unknown key; tasks are asked greedily, "),
        ("eval: {max_new_tokens: 9}", "eval.max_new_tokens: unknown key; write eval.max_tokens ("),
        ("eval: {num_fewshot: 9}", "eval.num_fewshot: unknown key; write eval.shots (examples in front of each item)"),
        ("train: {schedule: {warmup_steps: 9}}", "; write train.schedule.warmup (a share of all steps, not"),
        ("mixture: [{path: a.jsonl}]", "mixture.0.source: this key is missing; write source: a data file, "),
        ("mixture: [a.jsonl]", 'mixture.0: it should be a mapping of keys (given: "a.jsonl"); write source: a.jsonl'),
        ("mixture: a.jsonl", 'mixture: it should be a list (given: "a.jsonl"); write [source: a.jsonl]'),
        ("mixture: []", "mixture: it is empty; write what to train on: "),
        ("datasets: []", "datasets: unknown key; write mixture, "),
        ("train: {zebra: 1}", "train.zebra: unknown key; known here: out, max_length, "),
        (
            "train: {optimizer: adamw_torch}",
            "it should be 'adamw' or 'adamw8bit' or 'muon' (given: \"adamw_torch\"); did you mean 'adamw'?",
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
        ("base: a\ntrain: {steps: 2}\nbase: b", "r.yaml:4: not YAML (the key base twice, first in line 2); "),
        ("train:\n  lr: 1\n  steps: 2\n  'lr': 3", "r.yaml:5: not YAML (the key lr twice, first in line 3); "),
        ("train:\n  on: 1", "r.yaml:3: train.on: unknown key; known here: "),
        ("5: 1", "r.yaml:2: 5: unknown key; known here: "),
        ("null: 1", "r.yaml:2: null: unknown key; known here: "),
        ("eval: {tasks: {gsm8k: a.jsonl}}", "; write [gsm8k=a.jsonl]"),
        ("train: {precision: torch.bfloat16}", "; did you mean 'bf16'?"),
        ("train: {steps: [3}", "r.yaml:2: not YAML (expected ',' or ']', but got"),
        ("train: {seed: 2026-13-45}", "r.yaml: not YAML (month must be in 1..12); fix the line"),
        (
            "train: {eps: 1e-8}",
            "train.eps: unknown key; AdamW's betas are 0.9 and 0.95, its epsilon 1e-8; leave it out",
        ),
        ("train: {lr_warmup_steps: 9}", "; write train.schedule.warmup (a share of all steps, not their number)"),
        ("train: {schedule: {warmup: 100}}", "(given: 100); it is a share of the steps: 0.1 is a tenth"),
        ("max_dropped: 5", "(given: 5); it is a share of the rows: 0.1 is a tenth"),
        ("train: {dropout: 1}", "(given: 1); it is a share: 0.1 is a tenth"),
        ("evaluation: {tasks: [spelling]}", "evaluation: unknown key; write eval, at the top of the recipe ("),
        ("sources: [a.jsonl]", "sources: unknown key; write mixture, at the top of the recipe (its rows are "),
        ("LR: 1", "r.yaml:2: LR: unknown key; write train.lr"),
        ("train: {Micro-Tokens: 1}", "train.Micro-Tokens: unknown key; did you mean 'micro_tokens'?"),
        ("mixture: [{source: spelling, Limit: 1}]", "mixture.0.Limit: unknown key; did you mean 'limit'?"),
        ("mixture:", "(given: null); write what to train on: mixture: [{source: "),
        ("mixture: [{source: }]", "mixture.0.source: it should be a text (given: null); write source: a data file, "),
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


def test_a_key_may_stand_beside_the_one_it_is_merged_with(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("mixture: [&a {source: spelling, limit: 3, repeat: 2}, {<<: *a, limit: 4}, *a]")
    assert [(entry.limit, entry.repeat) for entry in load_recipe(file).mixture] == [(3, 2), (4, 2), (3, 2)]


def test_a_value_is_named_by_where_it_was_written(tmp_path: Path) -> None:
    assert refused(tmp_path, "", "train.learning_rate=1").startswith(
        "--set train.learning_rate=1: train.learning_rate: unknown key; write --set train.lr="
    )
    assert refused(tmp_path, "train: {lr: 3}", "train.steps=0").startswith(
        "--set train.steps=0: train.steps: it should be "
    )
    for key, ours in {"max_samples": "mixture.0.limit", "mixture.0.max_samples": "mixture.0.limit"}.items():
        assert f": unknown key; write --set {ours}=... (rows of each entry)" in refused(tmp_path, "", f"{key}=3")
    twice = "--set train={lr: 1, lr: 2}: the value is not YAML (the key lr twice, first in line 1); "
    assert refused(tmp_path, "", "train={lr: 1, lr: 2}").startswith(twice)
    assert refused(tmp_path, "train: {lr: x}", "train.steps=3").startswith("r.yaml:2: train.lr: it should be ")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"learning_rate": 1e-4}, "learning_rate: unknown key; write lr=... (auto, or a number)"),
        ({"warmup_ratio": 0.1}, "warmup_ratio: unknown key; write schedule={'warmup': ...}"),
        ({"max_samples": 4}, "max_samples: unknown key; write limit in an entry of the mixture: sf.task(NAME, limit="),
        ({"limit": 4}, "limit: unknown key; it is a key of eval and of a mixture's entries: sf.task(NAME, limit=...) "),
        ({"base_model": "x"}, "base_model: unknown key; write base=..."),
        (
            {"optimizer": "adamw_torch"},
            "optimizer: it should be 'adamw' or 'adamw8bit' or 'muon' (given: \"adamw_torch\"); did you mean",
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


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: sf.train("builtin:tiny", "a.jsonl"), "mix: it should be a mixture (given: str); give sftflow.mix(SO"),
        (
            lambda: sf.train("builtin:tiny", [{"prompt": "a", "completion": "b"}]),
            "mix: it should be a mixture (given: ",
        ),
        (lambda: sf.train(sf.read([{"prompt": "a"}])), "model: it should be a model (given: Rows); give its name, "),
        (lambda: sf.load(5), "model: it should be a model (given: int); give its name, its folder, or "),
        (lambda: sf.load(""), "'': a model without a name; give a directory, a hub id or builtin:tiny"),
        (
            lambda: sf.load("builtin:tiny", precision="fp16"),
            "precision: it should be 'auto' or 'fp32' or 'bf16' (given",
        ),
        (lambda: sf.read(5), "rows: no rows, but a number; give a file, or a list of rows"),
        (lambda: sf.mix(5), "rows: no rows, but a number; "),
        (lambda: sf.evaluate("builtin:tiny", "spelin"), "tasks: unknown task 'spelin'; did you mean 'spelling'?"),
        (lambda: sf.mix("rows"), "recipe: mixture.0.source: unknown task 'rows'; known: spelling, "),
    ],
)
def test_another_kind_of_argument_is_named(call: Callable[[], object], line: str) -> None:
    with pytest.raises(sf.SftflowError) as error:
        call()
    assert str(error.value).startswith(line)
    assert "unknown task 'rows'" not in line or str(error.value).endswith("; a file is written ./rows")


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
            "--max-new-tokens; write --max-tokens; see",
        ),
        (
            "chat --model builtin:tiny",
            "No such option: --model; write the model without an option: sftflow chat MODEL; ",
        ),
        (
            "train r.yaml --learning-rate 1e-4",
            "--learning-rate; write --set train.lr=... (auto, or a number); see sftflow train --help",
        ),
        (
            "train r.yaml --lora-r 8",
            "--lora-r; write --set train.lora.rank=...; see sftflow train --help",
        ),
        (
            "serve m --tensor-parallel-size 2",
            "--tensor-parallel-size; a model runs on one device; leave it out; see sftflow serve --help",
        ),
        ("finetune r.yaml", "No such command 'finetune'; write sftflow train; see sftflow --help"),
        ("compare a", "builtin:tiny); see sftflow compare --help"),
        ("serve m --port x", "Invalid value for '--port': it should be a whole number; see sftflow serve --help"),
        ("chat m --top-p x", "Invalid value for '--top-p': it should be a number; see sftflow chat --help"),
        ("--debug", "Missing command; see sftflow --help"),
        ("export m --to", "Option '--to' requires an argument; see sftflow export --help"),
    ],
)
def test_a_wrong_command_line_leads_on(arguments: str, line: str) -> None:
    said = error_line(run(*arguments.split()))
    assert said.startswith("error: usage: ") and line in said


def test_no_command_at_all_is_answered_with_the_help() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "") and " compare " in done.stdout


def test_a_path_without_a_file_says_why(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "empty").mkdir()
    for name, said in {
        "row.jsonl": "no such file; did you mean 'rows.jsonl'?",
        "other.txt": "no such file; check the path; a hub data set is hub:OWNER/NAME",
        "*.json": "no file fits the pattern; check the pattern",
        "link.jsonl": "no such file: a link to gone.jsonl, which is not there; mend the link",
        "rows.jsonl/x": f"no such file: {tmp_path}/rows.jsonl is a file, not a folder; ",
        "no/where.jsonl": f"no such file: there is no folder {tmp_path}/no; ",
        "~/a.jsonl": "no such file; ~ is for the shell to read; write the folder out",
        "$HOME/a.jsonl": "no such file; $ is for the shell to read; write the folder out",
        "empty": "an empty folder; what is read of a folder is .jsonl, ",
    }.items():
        (refused,) = [error_line(run("render", f"{tmp_path}/{name}", "--model", "builtin:tiny"))]
        assert refused.startswith(f"error: {tmp_path}/{name}: {said}"), refused
    (tmp_path / "dir.gguf").mkdir()
    assert "dir.gguf: a folder, not a file; " in error_line(run("chat", f"{tmp_path}/dir.gguf"))
    (tmp_path / "mine.yml").touch()
    line = error_line(run("train", str(tmp_path)))
    assert line.endswith(f": a folder, not a recipe; give the path of a YAML file, as {tmp_path}/mine.yml")
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
    assert refusal("").endswith(": no model in it, but in base; name one of them: base")

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


THEIRS = {
    "TRL": """
        model_name_or_path model_revision torch_dtype dtype attn_implementation use_liger_kernel bf16 tf32
        dataset_name dataset_config dataset_train_split dataset_test_split dataset_text_field dataset_kwargs
        dataset_num_proc dataset_streaming packing padding_free packing_strategy eval_packing max_length
        max_seq_length assistant_only_loss loss_type eos_token pad_token chat_template_path learning_rate
        num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps optim
        adam_beta2 weight_decay max_grad_norm gradient_checkpointing gradient_checkpointing_kwargs
        gradient_accumulation_steps per_device_train_batch_size per_device_eval_batch_size
        eval_accumulation_steps average_tokens_across_devices activation_offloading do_train do_eval
        eval_strategy evaluation_strategy eval_steps eval_on_start logging_steps logging_strategy
        logging_first_step log_level log_completions output_dir overwrite_output_dir hub_model_id hub_strategy
        hub_private_repo push_to_hub report_to run_name save_strategy save_steps save_total_limit
        save_only_model load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience
        seed data_seed full_determinism remove_unused_columns dataloader_drop_last dataloader_pin_memory
        dataloader_num_workers ddp_find_unused_parameters group_by_length length_column_name label_names
        label_smoothing_factor neftune_noise_alpha use_cpu no_cuda fp16 fp16_full_eval bf16_full_eval
        torch_compile torch_compile_backend use_peft lora_r lora_alpha lora_dropout lora_target_modules
        lora_modules_to_save lora_task_type use_rslora use_dora load_in_4bit bnb_4bit_quant_type
        bnb_4bit_compute_dtype bnb_4bit_use_double_quant use_bnb_nested_quant accelerator_config deepspeed fsdp
        resume_from_checkpoint ignore_data_skip include_num_input_tokens_seen disable_tqdm auto_find_batch_size
        max_prompt_length max_completion_length completion_only_loss formatting_func train_dataset eval_dataset
        peft_config processing_class tokenizer_name tokenizer_name_or_path trust_remote_code shuffle_dataset
        pad_to_multiple_of beta1""",
    "axolotl": """
        base_model base_model_config model_type tokenizer_type tokenizer_config tokenizer_use_fast
        trust_remote_code is_llama_derived_model load_in_8bit load_in_4bit strict chat_template
        chat_template_jinja datasets pretraining_dataset test_datasets dataset_prepared_path dataset_processes
        dataset_exact_deduplication dataset_keep_in_memory push_dataset_to_hub hub_model_id hf_use_auth_token
        shuffle_merged_datasets skip_prepare_dataset val_set_size output_dir sequence_len sample_packing
        eval_sample_packing sample_packing_group_size sample_packing_bin_size sample_packing_eff_est
        sample_packing_sequentially multipack_real_batches pad_to_sequence_len excess_length_strategy
        eval_sequence_len min_sample_len batch_flattening adapter lora_model_dir lora_r lora_alpha lora_dropout
        lora_fan_in_fan_out lora_target_modules lora_target_linear lora_modules_to_save lora_layers_to_transform
        lora_mlp_kernel lora_qkv_kernel lora_o_kernel peft_use_dora peft_use_rslora peft_layers_to_transform
        loraplus_lr_ratio relora_steps unfrozen_parameters wandb_project wandb_entity wandb_watch wandb_name
        wandb_run_id wandb_log_model wandb_mode mlflow_tracking_uri mlflow_experiment_name comet_api_key
        use_comet use_wandb use_mlflow use_tensorboard gradient_accumulation_steps micro_batch_size
        eval_batch_size batch_size auto_find_batch_size num_epochs max_steps optimizer optim_args lr_scheduler
        lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio learning_rate lr_div_factor lr_groups
        embedding_lr embedding_lr_scale adam_beta1 adam_epsilon train_on_inputs group_by_length bf16 bfloat16
        fp16 float16 tf32 gradient_checkpointing gradient_checkpointing_kwargs early_stopping_patience
        resume_from_checkpoint auto_resume_from_checkpoints local_rank logging_steps xformers_attention
        flash_attention flash_attn_rms_norm flash_attn_cross_entropy sdp_attention eager_attention s2_attention
        attn_implementation warmup_steps warmup_ratio evals_per_epoch eval_steps eval_strategy eval_table_size
        eval_max_new_tokens eval_causal_lm_metrics do_causal_lm_eval do_bench_eval saves_per_epoch save_steps
        save_total_limit save_strategy save_safetensors save_only_model save_first_step debug deepspeed
        weight_decay fsdp fsdp_config fsdp_version special_tokens added_tokens_overrides eot_tokens
        default_system_message plugins liger_rope liger_rms_norm liger_glu_activation
        liger_fused_linear_cross_entropy cut_cross_entropy unsloth_cross_entropy_loss neftune_noise_alpha
        torch_compile torch_compile_backend torch_dtype seed rl dpo_beta max_grad_norm gpu_memory_limit
        low_cpu_mem_usage device_map max_memory ddp ddp_timeout dataloader_num_workers dataloader_pin_memory
        dataloader_prefetch_factor remove_unused_columns resize_token_embeddings_to_32x
        include_tokens_per_second rope_scaling overrides_of_model_config noisy_embedding_alpha
        mean_resizing_embeddings chat_template_kwargs context_parallel_size sequence_parallel_degree
        tensor_parallel_size use_ray profiler_steps datasets.type datasets.ds_type datasets.data_files
        datasets.field datasets.field_messages datasets.message_field_role datasets.message_field_content
        datasets.message_property_mappings datasets.roles datasets.roles_to_train datasets.train_on_eos
        datasets.train_on_eot datasets.train_on_split datasets.conversation datasets.shards datasets.shards_idx
        datasets.preprocess_shards datasets.revision datasets.trust_remote_code datasets.drop_system_message
        datasets.split_thinking datasets.field_tools datasets.field_system datasets.field_instruction
        datasets.field_output datasets.system_prompt datasets.format datasets.no_input_format datasets.skip
        datasets.message_field_training datasets.message_field_training_detail datasets.input_format
        datasets.streaming""",
    "LLaMA-Factory": """
        model_name_or_path image_max_pixels trust_remote_code stage do_train finetuning_type
        freeze_trainable_layers lora_rank lora_alpha lora_dropout lora_target loraplus_lr_ratio
        additional_target use_rslora use_dora pissa_init create_new_adapter dataset dataset_dir eval_dataset
        template cutoff_len max_samples overwrite_cache preprocessing_num_workers preprocessing_batch_size
        tokenized_path dataloader_num_workers streaming buffer_size packing neat_packing mix_strategy
        interleave_probs train_on_prompt mask_history ignore_pad_token_for_loss efficient_eos val_size
        output_dir logging_steps save_steps plot_loss overwrite_output_dir save_only_model report_to
        per_device_train_batch_size gradient_accumulation_steps learning_rate num_train_epochs lr_scheduler_type
        warmup_ratio bf16 pure_bf16 fp16 ddp_timeout resume_from_checkpoint per_device_eval_batch_size
        eval_strategy eval_steps flash_attn enable_liger_kernel use_unsloth disable_gradient_checkpointing
        upcast_layernorm neftune_alpha resize_vocab add_tokens add_special_tokens new_special_tokens shift_attn
        rope_scaling moe_aux_loss_coef use_galore galore_rank use_apollo use_badam badam_mode use_adam_mini
        use_muon quantization_bit quantization_method double_quantization adapter_name_or_path enable_thinking
        default_system tool_format train_from_scratch compute_accuracy predict_with_generate
        include_num_input_tokens_seen export_dir pref_loss pref_beta deepspeed seed data_seed optim
        max_grad_norm use_swanlab low_cpu_mem_usage""",
    "torchtune": """
        output_dir tokenizer dataset dataset_val seed shuffle model checkpointer resume_from_checkpoint
        batch_size batch_size_val epochs optimizer lr_scheduler loss max_steps_per_epoch
        gradient_accumulation_steps optimizer_in_bwd clip_grad_norm compile run_val_every_n_steps
        enable_activation_checkpointing enable_activation_offloading device dtype metric_logger
        log_every_n_steps log_peak_memory_stats log_level profiler lora_attn_modules apply_lora_to_mlp
        apply_lora_to_output lora_rank quantizer quantize_base use_dora custom_sharded_layers fsdp_cpu_offload
        save_adapter_weights_only enable_async_checkpointing resize_token_embeddings tensor_parallel_dim
        context_parallel_dim data_parallel_shard_dim packed train_on_input num_warmup_steps max_seq_len""",
    "unsloth, nanochat, OpenAI and others": """
        model_name max_seq_length load_in_4bit load_in_16bit full_finetuning fast_inference r target_modules
        lora_alpha lora_dropout bias use_gradient_checkpointing random_state use_rslora loftq_config
        max_lora_rank gpu_memory_utilization dtype finetune_language_layers finetune_attention_modules
        instruction_part response_part train_on_responses_only dataset_text_field dataset_num_proc
        embedding_learning_rate run device_type model_tag model_step load_optimizer num_iterations max_seq_len
        device_batch_size total_batch_size target_examples_per_step embedding_lr unembedding_lr matrix_lr
        weight_decay init_lr_frac warmup_ratio warmdown_ratio final_lr_frac eval_every eval_steps eval_tokens
        eval_metrics_every eval_metrics_max_problems chatcore_every chatcore_max_cat chatcore_max_sample
        mmlu_epochs gsm8k_epochs dry_run depth grad_clip n_epochs training_file validation_file hyperparameters
        method integrations suffix model metadata n_layer block_size max_iters learning_rate min_lr
        lr_decay_iters warmup_iters decay_lr beta2 eval_interval eval_iters log_interval out_dir init_from
        wandb_log wandb_run_name always_save_checkpoint max_tokens epoch num_epoch max_epochs train_batch_size
        global_batch_size micro_batch_size grad_accum gradient_accumulation accumulate_grad_batches
        early_stopping patience context_length ctx_len seq_len seq_length max_len train_file data data_path
        train_data dataset_path eval_data val_data test_file checkpoint_dir save_dir tags project fp32 half
        mixed_precision amp num_gpus nproc_per_node world_size gpus log_every system_prompt system
        prompt_template chat_format lora qlora""",
}
"""keys of recipes, as each trainer's own examples and reference have them"""


def keys_of(model: type[BaseModel], above: str = "") -> Iterator[str]:
    for name in model.model_fields:
        yield above + name
        if (inner := model_at(model, (name,))) is not model:
            yield from keys_of(inner, f"{above}{name}.")


def test_the_table_is_whole_and_names_keys_that_there_are() -> None:
    assert sum(len(names.split()) for names, _, _ in other_trainers.ROWS) == len(other_trainers.KEYS), "a name twice"
    assert {row.key for row in other_trainers.KEYS.values() if row.key} <= set(keys_of(Recipe))
    assert all(row.key or row.note for row in other_trainers.KEYS.values())


@pytest.mark.parametrize("trainer", THEIRS)
def test_every_key_of_another_trainer_s_recipe_is_answered(trainer: str) -> None:
    for name in THEIRS[trainer].split():
        entry: dict[str, Any] = {"source": "spelling"}
        recipe: dict[str, Any] = {"mixture": [entry]}
        inside, _, key = name.rpartition(".")
        (entry if inside else recipe)[key] = 1
        with pytest.raises(sf.SftflowError) as error:
            parse_recipe(recipe, "r.yaml")
        place = f"mixture.0.{key}" if inside else key
        assert error.value.place == f"r.yaml: {place}" and error.value.fact == "unknown key", name
        assert not re.search("known here|did you mean", error.value.remedy), name


@pytest.mark.parametrize(
    ("option", "led"),
    [
        ("train r.yaml --lr 3", "write --set train.lr=...; see sftflow train --help"),
        ("train r.yaml --seed 3", "write --set train.seed=..."),
        ("mix r.yaml --batch-size 3", "write --set train.tokens_per_step=... (a step is counted in tokens"),
        ("eval m --out e --batch-size 3", "how many run side by side is chosen; leave it out; see sftflow eval"),
        ("chat m --top-k 3", "No such option: --top-k; it is the checkpoint's own choice"),
        ("train", "Missing argument 'recipe' (a YAML recipe); see sftflow train --help"),
        ("render a.jsonl --model", "Option '--model' requires an argument; see sftflow render --help"),
        ("doctor --jsom", "No such option: --jsom; see sftflow doctor --help"),
        ("serve m --port 70000", "'--port': it should be less than or equal to 65535; see sftflow serve --help"),
        ("chat m --temperature hot", "'--temperature': it should be a number; see"),
    ],
)
def test_an_option_is_answered_by_the_command_s_own_means(option: str, led: str) -> None:
    assert led in error_line(run(*option.split()))


def test_a_split_or_configuration_that_would_not_be_heard_is_refused() -> None:
    for key in ("split", "config"):
        with pytest.raises(sf.SftflowError, match=rf"{key} 'x': only data sets \(hub:NAME, .*; name the {key}'s file"):
            sf.mix({"source": "a.jsonl", key: "x"})
    with pytest.raises(sf.SftflowError, match="names the split 'train', and split: 'test' another; write one of them"):
        sf.mix({"source": "hub:a/b:train", "split": "test"})


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, '"\\ud800": 1').startswith("r.yaml: a key in it cannot be read (")


def test_the_page_is_written_from_the_table() -> None:
    page = Path(__file__).parent.parent / "docs" / "from_other_trainers.md"
    assert page.read_text(encoding="utf-8") == other_trainers.page()


def test_a_line_stays_a_line_whatever_it_quotes() -> None:
    error = SftflowError("r.yaml:1", "a" * 9_000, "write source: " + "b" * 9_000)
    assert len(str(error)) < 2_000 and str(error).count(" ... ") == 2
