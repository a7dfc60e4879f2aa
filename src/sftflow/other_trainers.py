"""What other trainers call the keys of a recipe, and other programs the options of our commands: one table, for what is
said of those that are unknown and for docs/from_other_trainers.md, which `page` writes.

A row: the names that others have for a thing, our key ("" where there is none), and what is to be known beside it, or
done instead. `datasets.NAME` is a name inside an entry of a list of data sets; `*` stands for any letters, and counts
where no row has the name itself.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple


class Ours(NamedTuple):
    """key: ours, with dots, or "".   note: one line, "" where the key says it all."""

    key: str
    note: str


_HELD_OUT = "a share (below 1) or a number of rows, held out of the mixture"
_SAVES = "the state is saved, and the held-out loss measured, every so many steps"
_OWN_TEMPLATE = "auto is the checkpoint's own template; or a built-in format, or a .jinja file"
_COUNTED = "a step is counted in tokens, not in rows"
_FROM_THE_ROW = "a row's dialect is read from the row itself (docs/rows.md); leave it out"

Rows = tuple[tuple[str, str, str], ...]
SECTIONS: dict[str, Rows] = {
    "The model": (
        ("model_name_or_path base_model model_name model model_id init_from", "base", ""),
        ("model_revision revision revision_of_model", "base", "OWNER/NAME@REVISION"),
        ("base_model_config model_type tokenizer tokenizer_* checkpointer model_tag model_step processing_class "
         "is_llama_derived_model overrides_of_model_config checkpoint_dir", "base",
         "all of it is found in the base's own directory"),
        ("chat_template_path chat_template chat_template_jinja template chat_format prompt_template", "format",
         _OWN_TEMPLATE),
        ("eos_token pad_token special_tokens tokens eot_tokens mean_resizing_embeddings add_tokens "
         "add_special_tokens new_special_tokens added_tokens_overrides resize_vocab resize_token_embeddings*", "format",
         "tokens are the base's and the format's own; append_eos: true adds an end"),
        ("default_system_message default_system system_prompt system", "", "write a system message into the rows"),
        ("enable_thinking tool_format chat_template_kwargs", "",
         "the template's own way is found by rendering; leave it out"),
        ("hf_use_auth_token token hub_token", "", "HF_TOKEN in the environment is used; leave it out"),
        ("trust_remote_code", "", "code from a checkpoint is never run; leave it out"),
        ("attn_implementation flash_attention flash_attn *_attention flash_attn_* shift_attn", "",
         "the attention is chosen, and proven; leave it out"),
        ("rope_scaling rope_*", "", "positions are as in the base's config.json; leave it out"),
        ("device_map device device_type local_rank use_cpu no_cuda max_memory gpu_memory_* low_cpu_mem_usage", "",
         "the device is found (sftflow doctor says which); leave it out"),
    ),
    "The rows": (
        ("dataset datasets dataset_name dataset_path train*_file train_dataset train_data data data_path sources",
         "mixture", "its rows are entries of the mixture: - source: FILE, hub:OWNER/NAME or a task"),
        ("test_datasets eval_dataset dataset_val validation_file eval_data val_data test_file", "validation",
         "{files: [...]}: rows of one's own, entries as in the mixture"),
        ("val_set_size val_size dataset_test_split validation_split", "validation", _HELD_OUT),
        ("dataset_config dataset_config_name datasets.subset", "mixture.config", "of an entry with hub:OWNER/NAME"),
        ("datasets.revision", "mixture.source", "hub:OWNER/NAME@REVISION"),
        ("dataset_train_split datasets.train_on_split", "mixture.source", "hub:OWNER/NAME:SPLIT"),
        ("field_* datasets.field_* datasets.columns columns", "mixture.columns",
         "{theirs: ours}, where a row's keys are not known (docs/rows.md)"),
        ("dataset_text_field field datasets.field datasets.message_* datasets.roles "
         "datasets.type datasets.ds_type datasets.chat_template datasets.conversation datasets.*format "
         "dataset_kwargs label_names formatting_func remove_unused_columns split_thinking", "", _FROM_THE_ROW),
        ("pretraining_dataset", "mixture", "plain text beside conversations: {source: text, path: FILE}"),
        ("datasets.data_files", "mixture.source", "a file, a folder, or a pattern such as data/*.jsonl.gz"),
        ("datasets.roles_to_train roles_to_train", "supervise",
         'replies (the assistant), or all roles; "weight": 0 in a message takes it out'),
        ("datasets.train_on_eos datasets.train_on_eot train_on_eos train_on_eot", "",
         "the end of each taught reply is taught; turns: last for the last one alone"),
        ("datasets.shards datasets.shards_idx datasets.skip datasets.num_samples datasets.size max_samples "
         "max_train_samples", "mixture.limit", "rows of each entry"),
        ("datasets.dataset datasets.dataset_name datasets.data datasets.file datasets.id datasets.task",
         "mixture.source", "a data file, hub:OWNER/NAME or a task"),
        ("datasets.weight datasets.ratio datasets.proportion datasets.sampling_weight mix_strategy interleave_probs",
         "mixture.share", "of all supervised tokens; or repeat: passes over a source's rows"),
        ("datasets.epochs mmlu_epochs gsm8k_epochs identity_epochs", "mixture.repeat", "passes over a source's rows"),
        ("sampling_temperature mixture_temperature", "mixing_temperature", ""),
        ("token_budget max_train_tokens n_train_tokens", "tokens", "supervised ones, of one epoch"),
        ("decontamination decontaminate_*", "decontaminate", "report, or drop"),
        ("dataset_dir", "mixture.source", "write each file's whole path"),
        ("dataset_num_proc dataset_processes preprocessing_* dataloader_* datasets.preprocess_shards", "",
         "all cores render; leave it out"),
        ("dataset_prepared_path overwrite_cache tokenized_path dataset_keep_in_memory skip_prepare_dataset", "",
         "rendered rows are kept by their contents (SFTFLOW_CACHE); leave it out"),
        ("curriculum curriculum_*", "order", "listed: source after source"),
        ("shuffle shuffle_* group_by_length length_column_name", "", "rows are shuffled by train.seed; leave it out"),
        ("streaming dataset_streaming datasets.streaming buffer_size", "",
         "rows are read in parts already; leave it out"),
        ("dataset_exact_deduplication min_sample_len datasets.drop_system_message image_* video_*", "",
         "rows are taken as they stand, and are text: change the file"),
        ("truncation_mode excess_length_strategy", "train.overlong", "cut (to whole turns), drop or cut_tokens"),
        ("train_on_* assistant_only_loss completion_only_loss mask_prompt", "supervise",
         "replies (the default, proven), or all: every token after the first"),
        ("ignore_pad_token_for_loss instruction_part response_part", "",
         "replies alone are taught, and that is proven; leave it out"),
        ("mask_history last_turn_only train_on_last_turn", "turns",
         "last: a conversation's last reply; its tool calls are taught with it"),
        ("merge_turns merge_consecutive_messages concat_consecutive*", "join_turns",
         "true: messages in a row of the user, and of the assistant, become one"),
        ("loss_scale loss_weights loss_weighting", "", 'give replies, or rows, a "weight" from 0 to 1'),
    ),
    "How long, and how much at once": (
        ("max_length max_seq_length sequence_len cutoff_len max_seq_len seq_len seq_length max_len ctx_len "
         "context_length block_size model_max_length max_prompt_length max_completion_length", "train.max_length",
         "of a whole conversation, in tokens"),
        ("max_tokens", "train.max_length", "tokens of a row; tokens of a step are train.tokens_per_step"),
        ("packing sample_packing neat_packing packed packing_strategy padding_free batch_flattening "
         "sample_packing_* multipack_*", "train.packing",
         "true already: rows are packed, and kept apart by the attention mask"),
        ("eval_packing eval_sample_packing pad_to_* eval_sequence_len", "",
         "rows are packed and never padded to a length; leave it out"),
        ("batch_size gradient_accumulation_steps gradient_accumulation grad_accum* accumulate_grad_batches "
         "train_batch_size total_batch_size global_batch_size target_examples_per_step", "train.tokens_per_step",
         f"{_COUNTED}: rows x accumulation x length"),
        ("per_device_train_batch_size micro_batch_size device_batch_size", "train.micro_tokens",
         f"{_COUNTED}: rows at once x length; a whole step is train.tokens_per_step"),
        ("per_device_eval_batch_size eval_batch_size batch_size_val eval_accumulation_steps auto_find_batch_size", "",
         "it is chosen; leave it out"),
        ("num_train_epochs num_epochs n_epochs epochs epoch num_epoch max_epochs", "train.epochs", ""),
        ("max_steps num_iterations max_steps_per_epoch max_iters num_train_steps", "train.steps",
         "null, not -1, where epochs decide"),
    ),
    "The optimizer": (
        ("learning_rate", "train.lr", "auto, or a number"),
        ("learning_rate_multiplier init_lr_frac", "train.lr", "{of_base: 0.8}: a multiple of the base's own rate"),
        ("embedding_lr unembedding_lr embedding_learning_rate embedding_lr_scale", "train.lr_scale.embeddings",
         "a multiple of train.lr"),
        ("lr_groups lr_div_factor", "train.lr_scale", "{matrices, embeddings, rest}, multiples of train.lr"),
        ("matrix_lr", "train.lr_scale.matrices", "a multiple of train.lr"),
        ("lr_scheduler_type lr_scheduler decay_lr", "train.schedule.kind", "linear, cosine or constant"),
        ("lr_scheduler_kwargs cosine_constant_lr_ratio", "train.schedule", "{kind, warmup, warmdown, final}"),
        ("warmup_ratio", "train.schedule.warmup", ""),
        ("warmup_steps num_warmup_steps lr_warmup_steps warmup_iters", "train.schedule.warmup",
         "a share of all steps, not their number"),
        ("warmdown_ratio lr_decay_iters", "train.schedule.warmdown", "a share of all steps"),
        ("cosine_min_lr_ratio final_lr_frac min_lr", "train.schedule.final", "a share of train.lr"),
        ("optim optimizer use_muon use_adam_mini", "train.optimizer", "adamw, adamw8bit or muon"),
        ("weight_decay", "train.weight_decay", ""),
        ("adam_beta1 adam_beta2 adam_epsilon beta1 beta2 betas eps optim_args optimizer_in_bwd", "",
         "AdamW's betas are 0.9 and 0.95, its epsilon 1e-8; leave it out"),
        ("max_grad_norm clip_grad_norm grad_clip", "train.clip", "0: none"),
        ("load_optimizer", "train.warm_start", ""),
        ("loss loss_type label_smoothing_factor moe_aux_loss_coef average_tokens_across_devices", "",
         "the loss is cross-entropy, a mean over a step's supervised tokens; leave it out"),
        ("neftune_* noisy_embedding_alpha", "", "noise is not added; train.dropout is there"),
        ("seed data_seed random_state full_determinism", "train.seed", ""),
    ),
    "The machine": (
        ("bf16 bfloat16 pure_bf16 fp16 float16 fp32 half dtype torch_dtype mixed_precision amp load_in_16bit "
         "*_full_eval", "train.precision", "auto, bf16 or fp32"),
        ("gradient_checkpointing use_gradient_checkpointing enable_activation_checkpointing "
         "gradient_checkpointing_* disable_gradient_checkpointing", "train.gradient_checkpointing", "true or false"),
        ("activation_offloading enable_activation_offloading", "train.gradient_checkpointing",
         "or a smaller train.micro_tokens"),
        ("torch_compile compile torch_compile_*", "train.compile", "auto, true or false"),
        ("*liger* *_cross_entropy* fast_inference use_unsloth upcast_layernorm plugins lora_*_kernel", "",
         "logits are computed in chunks already, and nothing is patched; leave it out"),
        ("deepspeed fsdp fsdp_* custom_sharded_layers", "train.shard", "full shares the model out over the processes"),
        ("ddp ddp_* num_gpus gpus nproc_per_node world_size accelerator_config use_ray", "",
         "sftflow train RECIPE --nproc N, or torchrun (docs/scale.md)"),
        ("*_parallel_*", "", "processes share rows (--nproc N) and weights (train.shard); leave it out"),
    ),
    "What is written, and when": (
        ("output_dir out_dir save_dir", "train.out", ""),
        ("overwrite_output_dir", "", "it is said to the command: sftflow train RECIPE --overwrite"),
        ("resume_from_checkpoint auto_resume_from_checkpoints ignore_data_skip", "",
         "it is said to the command: sftflow train RECIPE --resume"),
        ("save_steps", "train.save_every", _SAVES),
        ("saves_per_epoch save_* always_save_checkpoint enable_async_checkpointing", "train.save_every",
         f"{_SAVES}; the checkpoint holds weights only"),
        ("save_total_limit", "train.keep", "saved states"),
        ("eval_steps evals_per_epoch eval_every eval_interval run_val_every_n_steps do_eval eval_strategy "
         "evaluation_strategy eval_on_start", "train.save_every", f"{_SAVES}; tasks are asked every eval.every steps"),
        ("evaluation evals", "eval", "{tasks, limit, every, sample}"),
        ("eval_tokens eval_iters", "validation", _HELD_OUT),
        ("chatcore_every eval_metrics_every", "eval.every", ""),
        ("chatcore_max_* eval_metrics_max_problems", "eval.sample", ""),
        ("eval_max_new_tokens eval_table_size predict_with_generate compute_accuracy do_*_eval "
         "eval_causal_lm_metrics", "eval.tasks", "tasks are asked, each with its own length and measure"),
        ("max_new_tokens max_gen_toks", "eval.max_tokens", "in place of each task's own length"),
        ("num_fewshot n_shots fewshot", "eval.shots", "examples in front of each item"),
        ("top_p top_k do_sample", "", "tasks are asked greedily, or at eval.temperature; leave it out"),
        ("load_best_model_at_end metric_for_best_model greater_is_better", "train.best",
         "validation_loss (as it is) or last"),
        ("early_stopping early_stopping_* patience", "",
         "a run goes on to its last step; the checkpoint is that of the least held-out loss (train.best)"),
        ("logging_* log_* plot_loss include_num_input_tokens_seen include_tokens_per_second", "",
         "every step is logged into metrics.jsonl; leave it out"),
        ("report_to metric_logger use_tensorboard use_wandb wandb_log integrations", "train.logger",
         "tensorboard, wandb or trackio"),
        ("wandb_* run_name run project", "train.logger", "wandb; WANDB_PROJECT and WANDB_ENTITY count"),
        ("mlflow_* use_mlflow comet_* use_comet use_swanlab swanlab_*", "train.logger",
         "tensorboard, wandb or trackio; metrics.jsonl has it all"),
        ("push_to_hub hub_* suffix push_dataset_to_hub", "",
         "a run directory is a checkpoint: hf upload OWNER/NAME RUN/checkpoint"),
        ("export_*", "", "it is a command: sftflow export RUN --to gguf --out FILE"),
    ),
    "Kinds of training": (
        ("use_peft adapter finetuning_type lora peft_* use_lora", "train.lora", "{} for an adapter, null for none"),
        ("lora_r lora_rank r", "train.lora.rank", ""),
        ("lora_alpha", "train.lora.alpha", ""),
        ("lora_dropout", "train.lora.dropout", ""),
        ("lora_target* target_modules lora_layers", "train.lora.targets",
         "all, attention, or a list of layers' names"),
        ("use_rslora", "train.lora.rslora", ""),
        ("use_dora", "train.lora.dora", ""),
        ("modules_to_save lora_modules_to_save additional_target", "train.lora.train_embeddings",
         "auto trains the rows of new tokens, true the whole embedding and head"),
        ("lora_* *_lora* bias loraplus_* relora_* pissa_* create_new_adapter *galore* *badam* *apollo* freeze_* "
         "finetune_* unfrozen_parameters full_finetuning", "", "all weights are trained, or train.lora"),
        ("lora_model_dir adapter_name_or_path", "base",
         "an adapter's directory is a base, too: it is added into its own"),
        ("load_in_4bit load_in_8bit loftq_config bnb_* quant* double_quantization use_bnb_nested_quant qlora", "",
         "quantised weights cannot be trained; give the base in bf16"),
        ("stage rl method dpo_* pref_*", "", "this is supervised fine-tuning; preference data are refused by name"),
        ("train_from_scratch n_layer depth n_head n_embd", "", "a base is trained by sftflow base"),
        ("hyperparameters training_args args", "train", "their keys are keys of train"),
        ("do_train strict tf32 disable_tqdm metadata tags profiler profiler_* debug efficient_eos dry_run", "",
         "leave it out"),
    ),
}  # fmt: skip
ROWS: Rows = tuple(row for rows in SECTIONS.values() for row in rows)
KEYS = {name: Ours(key, note) for names, key, note in ROWS for name in names.split()}

_FLAGS = {
    "model model_path model_name_or_path pretrained": "write the model without an option: sftflow COMMAND MODEL",
    "config recipe": "write the recipe without an option: sftflow train RECIPE",
    "top_k min_p repetition_penalty": "it is the checkpoint's own choice (generation_config.json); leave it out",
    "learning_rate": "write --lr",
    "do_sample": "replies are drawn where the temperature is above 0, else greedy",
    "tensor_parallel_size data_parallel_size pipeline_parallel_size": "a model runs on one device; leave it out",
    "gpu_memory_utilization": "memory is taken as it is needed; leave it out",
    "max_model_len max_seq_length ctx_size n_ctx num_ctx": "the context is the model's own; leave it out",
    "dtype torch_dtype": "the precision is found in the checkpoint; leave it out",
    "device device_map n_gpu_layers": "the device is found: sftflow doctor says which; leave it out",
    "trust_remote_code": "code from a checkpoint is never run; leave it out",
    "load_in_4bit load_in_8bit quantization": "give a model in bf16, fp16 or fp32, or a .gguf file",
    "served_model_name model_name alias": "write --name",
    "chat_template": "the template is the checkpoint's own; it is chosen in training (format: in the recipe)",
    "system_prompt": "write --system",
    "max_new_tokens num_predict n_predict max_gen_toks": "write --max-tokens",
    "num_fewshot n_shots fewshot": "write --shots",
    "batch_size max_batch_size max_num_seqs": "how many run side by side is chosen; leave it out",
    "output output_dir output_path output_file outfile": "write --out",
    "confirm_run_unsafe_code": "write --allow-code",
    "quantize outtype": "write --type",
    "max_samples num_samples": "write --limit",
    "n_samples num_return_sequences": "write --samples",
    "enable_thinking": "write --thinking on or --thinking off",
    "cors_allow_origins allowed_origins": "write --allow-origin",
}
FLAGS = {name: remedy for names, remedy in _FLAGS.items() for name in names.split()}
"""options that other programs' commands have (`--` and dashes taken away), and what to do here"""

COMMANDS = {
    "train": "finetune fine-tune sft fit",
    "chat": "generate infer inference complete cli talk run",
    "eval": "evaluate benchmark test lm_eval lm-eval",
    "serve": "server api web webui webchat",
    "export": "convert quantize merge gguf",
    "mix": "audit prepare preprocess data",
    "render": "tokenize template",
    "base": "pretrain",
    "doctor": "env info check version",
}
"""our commands, and what other programs call theirs"""


def normal(name: str) -> str:
    """A key or an option as the tables write it.

    >>> normal("--Max-New-Tokens")
    'max_new_tokens'
    """
    return name.lstrip("-").replace("-", "_").lower()


def ours(name: str, *, in_mixture: bool = False) -> Ours | None:
    """Our key for another trainer's, and what to know of it; None where nobody that we know has it.

    >>> ours("per-device-train-batch-size").key, ours("lora_r").key, ours("colour")
    ('train.micro_tokens', 'train.lora.rank', None)
    """
    for said in (f"datasets.{normal(name)}", normal(name))[not in_mixture :]:
        if said in KEYS:
            return KEYS[said]
        if found := next((row for key, row in KEYS.items() if "*" in key and fnmatchcase(said, key)), None):
            return found
    return None


def page() -> str:
    """docs/from_other_trainers.md."""
    lines = [
        "# Coming from another trainer",
        "",
        "What TRL and transformers, axolotl, LLaMA-Factory, torchtune, unsloth, nanochat and OpenAI call the keys of a",
        "recipe. An unknown key of a recipe, of `--set` or of `sf.train` is answered from the same table:",
        "`src/sftflow/other_trainers.py`, from which this page is written. `datasets.NAME` stands in an entry of a",
        "list of data sets, `*` for any letters.",
    ]
    for section, rows in SECTIONS.items():
        lines += ["", f"## {section}", "", "| there | here | |", "|---|---|---|"]
        for names, key, note in rows:
            theirs = " ".join(f"`{name}`" for name in names.split())
            lines.append(f"| {theirs} | {f'`{key}`' if key else 'none'} | {note} |")
    return "\n".join(lines) + "\n"
