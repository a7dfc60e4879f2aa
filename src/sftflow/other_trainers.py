"""What other trainers call the keys of a recipe: one table, for refusals of unknown keys and for
docs/from_other_trainers.md, which `page` writes.

A row: the names that others have for a thing, our key ("" where there is none), and what is to be known beside it, or
done instead. `datasets.NAME` is a name inside an entry of a list of data sets.
"""

from __future__ import annotations

from typing import NamedTuple


class Ours(NamedTuple):
    """key: ours, with dots, or "".   note: one line, "" where the key says it all."""

    key: str
    note: str


TRAINERS = {
    "TRL and transformers": "model_name_or_path chat_template_path dataset_name dataset_text_field dataset_num_proc "
    "max_length max_seq_length packing packing_strategy padding_free eval_packing per_device_train_batch_size "
    "per_device_eval_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_ratio warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "label_smoothing_factor bf16 fp16 tf32 torch_dtype gradient_checkpointing activation_offloading torch_compile "
    "use_liger_kernel neftune_noise_alpha assistant_only_loss completion_only_loss eos_token truncation_mode "
    "shuffle_dataset output_dir overwrite_output_dir run_name report_to logging_steps logging_dir disable_tqdm "
    "eval_strategy eval_steps do_train do_eval save_strategy save_steps save_total_limit save_only_model "
    "load_best_model_at_end metric_for_best_model resume_from_checkpoint push_to_hub hub_model_id seed data_seed "
    "dataloader_num_workers group_by_length auto_find_batch_size trust_remote_code attn_implementation device_map "
    "use_peft peft_config load_in_4bit load_in_8bit",
    "axolotl": "base_model base_model_config tokenizer_type model_type chat_template chat_template_jinja datasets "
    "test_datasets datasets.type datasets.ds_type datasets.data_files datasets.field_messages "
    "datasets.message_property_mappings datasets.roles datasets.roles_to_train datasets.train_on_eos "
    "datasets.chat_template datasets.shards dataset_prepared_path dataset_processes shuffle_merged_datasets "
    "sequence_len sample_packing eval_sample_packing pad_to_sequence_len micro_batch_size eval_batch_size "
    "gradient_accumulation_steps num_epochs max_steps learning_rate lr_scheduler cosine_min_lr_ratio warmup_ratio "
    "warmup_steps optimizer weight_decay max_grad_norm train_on_inputs bf16 fp16 tf32 gradient_checkpointing "
    "flash_attention xformers_attention torch_compile neftune_noise_alpha output_dir val_set_size evals_per_epoch "
    "eval_steps saves_per_epoch save_steps save_total_limit early_stopping_patience logging_steps wandb_project "
    "wandb_entity wandb_name use_tensorboard special_tokens tokens default_system_message adapter lora_model_dir "
    "lora_r lora_alpha lora_dropout lora_target_modules lora_target_linear load_in_4bit load_in_8bit deepspeed fsdp "
    "fsdp_config resume_from_checkpoint hub_model_id rl group_by_length local_rank strict",
    "LLaMA-Factory": "model_name_or_path adapter_name_or_path stage do_train finetuning_type template dataset "
    "eval_dataset dataset_dir cutoff_len max_samples mix_strategy interleave_probs preprocessing_num_workers "
    "overwrite_cache packing neat_packing val_size train_on_prompt mask_history enable_thinking default_system "
    "tool_format per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate "
    "lr_scheduler_type warmup_ratio warmup_steps optim max_grad_norm bf16 fp16 pure_bf16 flash_attn output_dir "
    "overwrite_output_dir plot_loss logging_steps save_steps report_to eval_strategy eval_steps lora_rank lora_alpha "
    "lora_dropout lora_target quantization_bit use_galore use_badam deepspeed ddp_timeout trust_remote_code "
    "resume_from_checkpoint",
    "torchtune": "model tokenizer checkpointer dataset dataset_val batch_size gradient_accumulation_steps epochs "
    "max_steps_per_epoch optimizer lr_scheduler num_warmup_steps loss clip_grad_norm compile dtype device "
    "enable_activation_checkpointing enable_activation_offloading output_dir metric_logger log_every_n_steps "
    "log_peak_memory_stats profiler seed shuffle resume_from_checkpoint lora_rank lora_alpha lora_attn_modules "
    "apply_lora_to_mlp packed train_on_input run_val_every_n_steps",
    "unsloth": "model_name max_seq_length load_in_4bit full_finetuning r lora_alpha lora_dropout target_modules bias "
    "use_gradient_checkpointing random_state use_rslora loftq_config dtype train_on_responses_only",
    "nanochat": "run device_type model_tag model_step load_optimizer num_iterations max_seq_len device_batch_size "
    "total_batch_size embedding_lr unembedding_lr matrix_lr init_lr_frac warmup_ratio warmdown_ratio final_lr_frac "
    "eval_every eval_tokens chatcore_every chatcore_max_cat chatcore_max_sample mmlu_epochs gsm8k_epochs",
    "OpenAI": "training_file validation_file model n_epochs batch_size learning_rate_multiplier suffix "
    "hyperparameters method integrations",
}
"""the names that each has, in the order in which its own examples write them"""

_ALL_WEIGHTS = "this version trains all weights; leave it out"
_ONE_DEVICE = "this version trains in one process on one device; leave it out"
_ROWS = "its rows are entries of the mixture: - source: FILE, hub:OWNER/NAME or a task"
_HELD_OUT = "rows are held out of the mixture by the share `validation`"
_BY_COMMAND = "it is said to the command: sftflow train RECIPE --resume"
_SAVES = "the state is saved, and the held-out loss measured, every so many steps"
_ALWAYS_MASKED = "replies alone are taught, and that is proven; leave it out"
_OWN_TEMPLATE = "auto is the checkpoint's own template; or a built-in format, or a .jinja file"
_COUNTED = "a step is counted in tokens, not in rows"
_EVERY_STEP = "every step is logged into metrics.jsonl; leave it out"

ROWS: tuple[tuple[str, str, str], ...] = (
    # the model
    ("model_name_or_path base_model model_name model", "base", ""),
    ("base_model_config model_type tokenizer_type tokenizer checkpointer model_tag model_step", "base",
     "all of it is found in the base's own directory"),
    ("chat_template_path chat_template chat_template_jinja template", "format", _OWN_TEMPLATE),
    ("eos_token special_tokens tokens", "format",
     "tokens are the base's and the format's own; append_eos: true adds an end"),
    ("default_system_message default_system", "", "write a system message into the rows"),
    ("enable_thinking tool_format", "", "the template's own way is found by rendering; leave it out"),
    ("trust_remote_code", "", "code from a checkpoint is never run; leave it out"),
    ("attn_implementation flash_attention flash_attn xformers_attention", "",
     "the attention is chosen, and proven; leave it out"),
    ("device_map device device_type local_rank", "", "the device is found (sftflow doctor says which); leave it out"),
    # the rows
    ("dataset datasets dataset_name training_file", "mixture", _ROWS),
    ("test_datasets eval_dataset dataset_val validation_file", "validation", _HELD_OUT),
    ("val_set_size val_size", "validation", "a share (below 1) or a number of rows"),
    ("dataset_text_field field_messages datasets.field_messages datasets.message_property_mappings datasets.roles",
     "", "a row's dialect is read from the row itself (docs/rows.md); plain text is for sftflow base"),
    ("datasets.type datasets.ds_type datasets.chat_template", "",
     "a row's dialect is read from the row itself (docs/rows.md); leave it out"),
    ("datasets.data_files", "mixture.source", "name the file: hub:OWNER/NAME, or a path"),
    ("datasets.roles_to_train datasets.train_on_eos", "",
     'replies and their ends are taught; "weight": 0 in a message takes it out'),
    ("datasets.shards datasets.num_samples datasets.size max_samples", "mixture.limit", "rows of each entry"),
    ("datasets.dataset datasets.dataset_name datasets.data datasets.file datasets.id datasets.task", "mixture.source",
     "a data file, hub:OWNER/NAME or a task"),
    ("datasets.weight datasets.ratio datasets.epochs", "mixture.repeat",
     "a whole number; limit takes a sample of the rows"),
    ("mix_strategy interleave_probs", "mixture.repeat",
     "an entry counts as often as repeat says; limit takes a sample of it"),
    ("mmlu_epochs gsm8k_epochs", "mixture.repeat", "of the task's own entry"),
    ("dataset_dir", "mixture.source", "write each file's whole path"),
    ("dataset_num_proc dataset_processes preprocessing_num_workers dataloader_num_workers", "",
     "all cores render; leave it out"),
    ("dataset_prepared_path overwrite_cache", "",
     "rendered rows are kept by their contents (SFTFLOW_CACHE); leave it out"),
    ("shuffle shuffle_dataset shuffle_merged_datasets group_by_length", "",
     "rows are shuffled by train.seed; leave it out"),
    ("truncation_mode", "train.overlong", "cut (to whole turns), drop or cut_tokens"),
    ("train_on_inputs train_on_prompt train_on_input assistant_only_loss completion_only_loss train_on_responses_only",
     "", _ALWAYS_MASKED),
    ("mask_history", "", 'give earlier replies "weight": 0 in the rows'),
    # length and packing
    ("max_length max_seq_length sequence_len cutoff_len max_seq_len", "train.max_length", ""),
    ("packing sample_packing neat_packing packed packing_strategy padding_free", "train.packing",
     "true already: rows are packed, and kept apart by the attention mask"),
    ("eval_packing eval_sample_packing pad_to_sequence_len", "",
     "rows are packed and never padded to a length; leave it out"),
    # how much at once
    ("batch_size gradient_accumulation_steps total_batch_size", "train.tokens_per_step",
     f"{_COUNTED}: rows x accumulation x length"),
    ("per_device_train_batch_size micro_batch_size device_batch_size", "train.micro_tokens",
     f"{_COUNTED}: rows at once x length; a whole step is train.tokens_per_step"),
    ("max_tokens", "train.max_length", "tokens of a row; tokens of a step are train.tokens_per_step"),
    ("per_device_eval_batch_size eval_batch_size auto_find_batch_size", "", "it is chosen; leave it out"),
    ("num_train_epochs num_epochs n_epochs epochs", "train.epochs", ""),
    ("max_steps num_iterations max_steps_per_epoch", "train.steps", "null, not -1, where epochs decide"),
    # the optimizer
    ("learning_rate", "train.lr", "auto, or a number"),
    ("learning_rate_multiplier init_lr_frac", "train.lr", "the rate itself, not a multiple of one"),
    ("embedding_lr unembedding_lr", "train.lr_scale.embeddings", "a multiple of train.lr"),
    ("matrix_lr", "train.lr_scale.matrices", "a multiple of train.lr"),
    ("lr_scheduler_type lr_scheduler", "train.schedule.kind", "linear, cosine or constant"),
    ("lr_scheduler_kwargs", "train.schedule", "{kind, warmup, warmdown, final}"),
    ("warmup_ratio", "train.schedule.warmup", ""),
    ("warmup_steps num_warmup_steps", "train.schedule.warmup", "a share of all steps, not their number"),
    ("warmdown_ratio", "train.schedule.warmdown", ""),
    ("cosine_min_lr_ratio final_lr_frac", "train.schedule.final", ""),
    ("optim optimizer", "train.optimizer", "adamw or muon"),
    ("weight_decay", "train.weight_decay", ""),
    ("adam_beta1 adam_beta2 adam_epsilon", "", "AdamW's betas are 0.9 and 0.95; leave it out"),
    ("max_grad_norm clip_grad_norm", "train.clip", ""),
    ("load_optimizer", "train.warm_start", ""),
    ("loss label_smoothing_factor", "", "the loss is cross-entropy over the supervised tokens; leave it out"),
    ("neftune_noise_alpha", "", "noise is not added; train.dropout is there"),
    ("seed data_seed random_state", "train.seed", ""),
    # the machine
    ("bf16 bfloat16 pure_bf16 fp16 dtype torch_dtype", "train.precision", "auto, bf16 or fp32"),
    ("tf32", "", "leave it out"),
    ("gradient_checkpointing use_gradient_checkpointing enable_activation_checkpointing",
     "train.gradient_checkpointing", ""),
    ("activation_offloading enable_activation_offloading", "train.gradient_checkpointing",
     "or a smaller train.micro_tokens"),
    ("torch_compile compile", "train.compile", "auto, true or false"),
    ("use_liger_kernel", "", "logits are computed in chunks already; leave it out"),
    ("deepspeed fsdp fsdp_config ddp_timeout", "", _ONE_DEVICE),
    # what is written, and when
    ("output_dir", "train.out", ""),
    ("overwrite_output_dir", "", "it is said to the command: sftflow train RECIPE --overwrite"),
    ("resume_from_checkpoint", "", _BY_COMMAND),
    ("save_steps", "train.save_every", _SAVES),
    ("saves_per_epoch save_strategy save_only_model", "train.save_every",
     f"{_SAVES}; the checkpoint holds weights only"),
    ("save_total_limit", "train.keep", "saved states"),
    ("eval_steps evals_per_epoch eval_strategy eval_every run_val_every_n_steps do_eval", "train.save_every",
     f"{_SAVES}; tasks are asked every eval.every steps"),
    ("eval_tokens", "validation", _HELD_OUT),
    ("chatcore_every", "eval.every", ""),
    ("chatcore_max_cat chatcore_max_sample", "eval.sample", ""),
    ("load_best_model_at_end metric_for_best_model", "train.best", "validation_loss (as it is) or last"),
    ("early_stopping early_stopping_patience early_stopping_threshold", "",
     "a run goes on to its last step; the checkpoint is that of the least held-out loss (train.best)"),
    ("logging_steps logging_strategy logging_dir log_every_n_steps plot_loss log_peak_memory_stats", "", _EVERY_STEP),
    ("report_to metric_logger use_tensorboard integrations", "train.logger", "tensorboard, wandb or trackio"),
    ("wandb_project wandb_entity wandb_name run_name run", "train.logger",
     "wandb; WANDB_PROJECT and WANDB_ENTITY count"),
    ("disable_tqdm profiler", "", "leave it out"),
    ("push_to_hub hub_model_id suffix", "", "a run directory is a checkpoint: hf upload OWNER/NAME RUN/checkpoint"),
    # kinds of training
    ("use_peft peft_config adapter finetuning_type lora_r lora_rank r lora_alpha lora_dropout lora_target "
     "lora_target_modules lora_target_linear lora_attn_modules apply_lora_to_mlp target_modules bias use_rslora "
     "use_galore use_badam full_finetuning", "", _ALL_WEIGHTS),
    ("lora_model_dir adapter_name_or_path", "base", "an adapter's directory is a base, too: it is added into its own"),
    ("load_in_4bit load_in_8bit quantization_bit loftq_config", "",
     "quantised weights cannot be trained; give the base in bf16"),
    ("stage rl method", "", "this is supervised fine-tuning; preference data are refused by name"),
    ("hyperparameters", "train", ""),
    ("do_train strict", "", "leave it out"),
)  # fmt: skip

KEYS = {name: Ours(key, note) for names, key, note in ROWS for name in names.split()}

FLAGS = {
    "model": "write the model without an option: sftflow COMMAND MODEL",
    "model_path": "write the model without an option: sftflow COMMAND MODEL",
    "model_name_or_path": "write the model without an option: sftflow COMMAND MODEL",
    "do_sample": "replies are drawn where the temperature is above 0, else greedy",
    "tensor_parallel_size": "a model runs on one device",
    "gpu_memory_utilization": "memory is taken as it is needed",
    "max_model_len": "the context is the model's own",
    "ctx_size": "the context is the model's own",
    "n_ctx": "the context is the model's own",
    "dtype": "the precision is chosen by the machine",
    "device": "the device is found: sftflow doctor says which",
    "n_gpu_layers": "the device is found: sftflow doctor says which",
    "trust_remote_code": "code from a checkpoint is never run",
    "load_in_4bit": "give a model in bf16, fp16 or fp32, or a .gguf file",
    "quantization": "give a model in bf16, fp16 or fp32, or a .gguf file",
    "served_model_name": "write --name",
    "system_prompt": "write --system",
    "max_new_tokens": "write --max-tokens",
    "num_predict": "write --max-tokens",
    "n_predict": "write --max-tokens",
    "num_fewshot": "items are asked as they are, without examples",
    "batch_size": "how many run side by side is chosen",
    "output": "write --out",
    "output_dir": "write --out",
    "output_path": "write --out",
    "confirm_run_unsafe_code": "write --allow-code",
    "config": "write the recipe without an option: sftflow train RECIPE",
    "recipe": "write the recipe without an option: sftflow train RECIPE",
    "nproc_per_node": "this version trains in one process",
    "quantize": "write --type",
    "outtype": "write --type",
    "outfile": "write --out",
}
"""options that other programs' commands have (`--` and dashes taken away), and what to do here; where an option of ours
is named, this is said by a command that has it"""

COMMANDS = {
    "train": "finetune fine-tune sft fit",
    "chat": "generate infer inference complete cli talk",
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
    ('train.micro_tokens', '', None)
    """
    name = normal(name)
    return (in_mixture and KEYS.get(f"datasets.{name}")) or KEYS.get(name)


def page() -> str:
    """docs/from_other_trainers.md."""
    lines = [
        "# Coming from another trainer",
        "",
        "What others call the keys of a recipe. An unknown key of a recipe, of `--set` or of `sf.train` is answered",
        "from the same table: `src/sftflow/other_trainers.py`, from which this page is written.",
    ]
    for trainer, names in TRAINERS.items():
        lines += ["", f"## {trainer}", "", "| there | here | |", "|---|---|---|"]
        for name in names.split():
            key, note = KEYS[name]
            lines.append(f"| `{name}` | {f'`{key}`' if key else 'none'} | {note} |")
    return "\n".join(lines) + "\n"
