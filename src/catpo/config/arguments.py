"""Fields of transformers' `TrainingArguments` as options of `catpo train`, and why some are none.

Their names and types are read from the library's source, since to import it takes seconds, which `--help` and recipes do
without. Knows no value's meaning.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le
from cyclopts import Parameter

from catpo.config.other_trainers import OPTIONS
from catpo.config.validation import Keywords, Names, Text
from catpo.core.checks import LARGEST, MOST

PASSED_ON = Parameter(show=False)
"""In the type of an option that goes to transformers as it is given; None: not given."""
KINDS: dict[str, Any] = {
    "dict": Keywords,
    "list": Names,
    "str": Text,
    "float": Annotated[float, Ge(-LARGEST), Le(LARGEST)],
    "int": Annotated[int, Ge(-MOST), Le(MOST)],
    "bool": bool,
}
"""What a field's annotation mentions, the widest first -> its type as an option."""

NO_PREDICTIONS = "preference training has neither labels nor predictions to compute metrics from"
SAME_POLICY = "an evaluation runs the policy in the precision it trains in"
NOT_HERE = {
    "auto_find_batch_size": "it would start again with a smaller batch, from weights that have been trained already and with "
    "another learning-rate schedule; if memory runs out, lower per_device_train_batch_size and raise "
    "gradient_accumulation_steps by as much (`catpo train --dry-run` shows what a batch takes)",
    "neftune_noise_alpha": "noise in the embeddings would make the policy another one than the reference before it has learned",
    "use_liger_kernel": "it replaces the forward pass in which catpo computes log-probs and KL without logits",
    "label_smoothing_factor": "it is for labels of tokens; the objective smooths those of pairs: dpo(label_smoothing=0.1)",
    "label_names": NO_PREDICTIONS,
    "batch_eval_metrics": NO_PREDICTIONS,
    "include_for_metrics": NO_PREDICTIONS,
    "include_num_input_tokens_seen": "the tokens of a pair's batch are not counted; --dry-run predicts them",
    "length_column_name": "batches of like length are made by the reward store's token counts",
    "bf16_full_eval": SAME_POLICY,
    "fp16_full_eval": SAME_POLICY,
}
"""Arguments of transformers that would have no effect, or the wrong one -> why."""

LAUNCHED = "the engine is the launcher's: `catpo init --recipe fsdp2` writes a configuration for accelerate launch"
MODEL_ONLY = "a checkpoint is to resume from, and holds all that takes"
CHECKPOINTING = "write gradient_checkpointing, gradient_checkpointing_kwargs"
NOT_OPTIONS = {
    "output_dir": "write output",
    "resume_from_checkpoint": "write resume: the run goes on from its last checkpoint",
    "train_sampling_strategy": "write group_by_length",
    "use_cpu": "write device='cpu' (--device cpu)",
    "local_rank": LAUNCHED,
    "disable_tqdm": "write progress",
    "do_train": "it would have no effect",
    "do_eval": "pairs are held out for it by eval_fraction",
    "do_predict": NO_PREDICTIONS,
    "prediction_loss_only": NO_PREDICTIONS,
    "eval_do_concat_batches": NO_PREDICTIONS,
    "eval_use_gather_object": NO_PREDICTIONS,
    "eval_accumulation_steps": NO_PREDICTIONS,
    "remove_unused_columns": "pairs have no columns",
    "average_tokens_across_devices": "a step's mean is over pairs, each counted alike on all devices",
    "logging_nan_inf_filter": "a loss that is not finite is refused",
    "liger_kernel_config": NOT_HERE["use_liger_kernel"],
    "use_cache": "training generates nothing",
    "activation_checkpointing": CHECKPOINTING,
    "activation_checkpointing_kwargs": CHECKPOINTING,
    "save_only_model": MODEL_ONLY,
    "ignore_data_skip": "a resumed run goes on with the pairs that are next",
    "enable_jit_checkpoint": "SIGTERM makes a run write a checkpoint and stop already",
    "restore_callback_states_from_checkpoint": MODEL_ONLY,
    "save_on_each_node": "all nodes share the folder of the run",
    "accelerator_config": LAUNCHED,
    "parallelism_config": LAUNCHED,
    "fsdp": LAUNCHED,
    "fsdp_config": LAUNCHED,
    "deepspeed": LAUNCHED,
    "hub_token": "recipes and runs are no place for secrets: set HF_TOKEN, or log in with `hf auth login`",
    "hub_strategy": "the trained model is pushed, once, when it is complete",
    "hub_always_push": "the trained model is pushed, once, when it is complete",
}
"""Arguments of transformers that are no options of `catpo train` -> what to do instead, or why."""
BATCH = "write per_device_train_batch_size"
ACCUMULATION = "write gradient_accumulation_steps"
LORA = "write lora='lora(r=16, alpha=32)'"
DATA = "write pairs: a folder, a file, or a data set such as rlhf_v(source='openbmb/RLHF-V-Dataset')"
BETA = "give it in the objective: objective='dpo(beta=0.1)'"
ELSEWHERE = {
    **OPTIONS,
    **NOT_HERE,
    **NOT_OPTIONS,
    **dict.fromkeys(["beta", "pref_beta", "dpo_beta"], BETA),
    **dict.fromkeys(["loss", "pref_loss", "stage", "rlhf_type"], OPTIONS["loss_type"]),
    "pref_ftx": OPTIONS["rpo_alpha"],
    "lr": "write learning_rate",
    **dict.fromkeys(["epochs", "num_epochs", "max_epochs"], "write num_train_epochs"),
    **dict.fromkeys(
        [
            "batch_size",
            "train_batch_size",
            "micro_batch_size",
            "per_device_batch_size",
            "per_gpu_train_batch_size",
            "train_micro_batch_size_per_gpu",
        ],
        BATCH,
    ),
    "global_batch_size": f"{BATCH} and gradient_accumulation_steps; their product with the number of GPUs",
    **dict.fromkeys(["grad_accum", "accumulation", "gradient_accumulation", "grad_accumulation_steps"], ACCUMULATION),
    **dict.fromkeys(["scheduler", "lr_scheduler"], "write lr_scheduler_type"),
    **dict.fromkeys(["workers", "num_workers", "preprocessing_num_workers"], "write dataloader_num_workers"),
    **dict.fromkeys(["dataset", "datasets", "dataset_name", "dataset_dir", "data", "data_path", "train_data"], DATA),
    **dict.fromkeys(["image_folder", "image_dir", "media_dir"], f"pictures are named in the rows; {DATA}"),
    **dict.fromkeys(["val_size", "dev_share", "split_dataset_ratio"], "write eval_fraction"),
    **dict.fromkeys(["torch_dtype", "precision", "model_dtype"], "write dtype (--dtype bfloat16)"),
    **dict.fromkeys(["cutoff_len", "max_seq_length", "model_max_length"], OPTIONS["max_prompt_length"]),
    **dict.fromkeys(["template", "chat_template"], "the chat template is the processor's"),
    **dict.fromkeys(["image_max_pixels", "video_max_pixels"], "write max_pixels (--max-pixels)"),
    **dict.fromkeys(["flash_attn", "use_flash_attention_2"], "write attn_implementation"),
    **dict.fromkeys(["quantization_bit", "bits", "load_in_8bit"], "write quantization='4bit' (--quantization 4bit)"),
    **dict.fromkeys(["finetuning_type", "train_type", "tuner_type"], f"{LORA}, or lora none to train the whole decoder"),
    **dict.fromkeys(["freeze_vision_tower", "freeze_vit", "freeze_multi_modal_projector"], "write train_vision"),
    **dict.fromkeys(["ref_model", "reference_model"], "the reference is the model as it begins; `catpo rounds` starts anew"),
    "device_map": "write device; several GPUs are the launcher's, e.g. torchrun --nproc_per_node 8 -m catpo train",
    "config_file": "write config (--config recipe.yaml)",
    "train_device": "write device",
    "model_init_kwargs": "see dtype, quantization, attn_implementation, revision and trust_remote_code",
    **dict.fromkeys(["model_name_or_path", "model_name", "model_id"], "write model"),
    **dict.fromkeys(["use_peft", "use_lora", "lora_r", "lora_rank", "lora_alpha"], LORA),
    "lora_dropout": "write lora='lora(dropout=0.1)'",
    "lora_target": "write lora=\"lora(target_modules=['up_proj', 'down_proj'])\"",
    "lora_target_modules": "write lora=\"lora(target_modules=['up_proj', 'down_proj'])\"",
    "load_in_4bit": "write quantization='4bit' (--quantization 4bit)",
    "no_cuda": "write device='cpu' (--device cpu)",
}
"""Name that users of other trainers know -> what `catpo train` has in its place."""
Class = TypeVar("Class")


def with_arguments(options: type[Class]) -> type[Class]:
    """Adds to a class what will be fields of its dataclass: those of `TrainingArguments` that it lacks, None by default."""
    for name, hint in passed_on(frozenset(options.__annotations__)).items():
        options.__annotations__[name] = hint
        setattr(options, name, None)
    return options


def is_passed_on(hint: Any) -> bool:
    """Whether an option goes to transformers as it is given."""
    return PASSED_ON in getattr(hint, "__metadata__", ())


@functools.cache
def passed_on(own: frozenset[str]) -> dict[str, Any]:
    """Name -> type of the arguments of transformers that are options, but for those of the names in `own`."""
    hints = {}
    for field in _fields("training_args.py", "TrainingArguments"):
        name = field.target.id  # type: ignore[union-attr]
        if name not in own and name not in ELSEWHERE:
            hints[name] = Annotated[_kind(field.annotation) | None, PASSED_ON]
    return hints


def _kind(annotation: ast.expr) -> Any:
    """The option's type by the words of an annotation; names of enumerations stand for their texts."""
    words = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    return next((kind for word, kind in KINDS.items() if word in words), Text)


def _fields(file: str, name: str) -> list[ast.AnnAssign]:
    """The annotated fields of a class of transformers, as they are written; none where it is not installed."""
    package = importlib.util.find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return []
    folder = Path(package.submodule_search_locations[0])
    classes = {node.name: node for node in ast.parse((folder / file).read_bytes()).body if isinstance(node, ast.ClassDef)}
    return [node for node in classes[name].body if isinstance(node, ast.AnnAssign)]
