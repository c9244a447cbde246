"""The options of `catpo train` as a `CatPOConfig`: what transformers gets as given, and what is chosen here."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TrainingArguments

from catpo.config.arguments import is_passed_on
from catpo.config.command import hints
from catpo.config.options import TrainOptions
from catpo.core.errors import UserError
from catpo.models import devices
from catpo.training.config import CatPOConfig, check_optimiser, trackers

SAME_NAME = (
    "objective", "rescore_every", "reference", "max_length", "learning_rate", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "warmup_steps", "lr_scheduler_type", "weight_decay",
    "max_grad_norm", "seed", "logging_steps", "dataloader_num_workers", "prefix", "train_vision", "self_check",
)  # fmt: skip
"""Options that `CatPOConfig` has under the same name."""
OF_EVALUATION = frozenset(
    {
        "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "load_best_model_at_end",
        "metric_for_best_model", "greater_is_better",
    }
)  # fmt: skip
"""Arguments that do nothing without pairs to evaluate on."""
DONE_HERE = frozenset({"save_total_limit", "push_to_hub", "fp16"})
"""Arguments of transformers that catpo sees to itself: checkpoints are removed once a newer one is complete, and the trained
model is pushed when it is; the precision is settled with the model's."""


def passed_on(options: TrainOptions) -> dict[str, Any]:
    """The arguments of transformers that were given."""
    names = [name for name, hint in hints(TrainOptions).items() if is_passed_on(hint)]
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def config_of(options: TrainOptions, *, has_eval: bool, computes_in: torch.dtype = torch.float32) -> CatPOConfig:
    """The arguments of a run.

    Args:
        options: of `catpo train`.
        has_eval: whether pairs are held out.
        computes_in: precision of the forward pass.

    Raises:
        UserError: two of them do not fit together, or transformers takes another value.
    """
    given = passed_on(options)
    if given.get("load_best_model_at_end") and options.save_steps and not given.keys() & {"eval_strategy", "eval_steps"}:
        given["eval_steps"] = options.save_steps  # each checkpoint is to have its figures
    how_often = "steps" if given.get("eval_steps") else "epoch"
    chosen = {
        "output_dir": str(options.output / "checkpoints"),
        "rewards": None if options.rewards is None else str(options.rewards),
        "per_device_eval_batch_size": options.per_device_train_batch_size,
        "save_strategy": "steps" if options.save_steps else "epoch",
        "save_steps": options.save_steps or 500,
        "eval_strategy": how_often if has_eval else "no",
        "train_sampling_strategy": "group_by_length" if options.group_by_length else "random",
        "disable_tqdm": True,
        "report_to": trackers(options.report_to),
        "train_device": str(devices.device_of(options.device)),
        "bf16": computes_in == torch.bfloat16,
        "fp16": computes_in == torch.float16,
    }
    if options.gradient_checkpointing:  # under its newer name, transformers do not warn of it
        name = (
            "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
        )
        chosen |= {name: True, f"{name}_kwargs": given.pop("gradient_checkpointing_kwargs", None)}
    same = {name: getattr(options, name) for name in SAME_NAME}
    return CatPOConfig(**{**same, **chosen, **{name: value for name, value in given.items() if name not in DONE_HERE}})


def check_arguments(options: TrainOptions) -> None:
    """Checks of what goes to transformers, before the model is loaded.

    Raises:
        UserError: an argument would have no effect, or transformers would refuse it.
    """
    given = passed_on(options)
    if given.get("fp16") and options.bf16:
        raise UserError("bf16=True and fp16=True exclude each other. Give bf16=True where the device has bfloat16.")
    _check_checkpoints(options, given)
    _check_evaluation(options, given)
    for name, needed, is_there in (
        ("gradient_checkpointing_kwargs", "gradient_checkpointing", options.gradient_checkpointing),
        ("hub_model_id", "push_to_hub", given.get("push_to_hub")),
        ("hub_private_repo", "push_to_hub", given.get("push_to_hub")),
        ("hub_revision", "push_to_hub", given.get("push_to_hub")),
        ("push_to_hub", "hub_model_id", given.get("hub_model_id")),
    ):
        if given.get(name) and not is_there:
            raise UserError(f"{name} is given without {needed}. Give both, or neither.")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return  # its configuration would change how the model is loaded
    check_optimiser(config_of(options, has_eval=options.eval_fraction > 0), None, None)


def _check_checkpoints(options: TrainOptions, given: dict[str, Any]) -> None:
    strategy, count = given.get("save_strategy"), given.get("save_total_limit")
    if strategy == "best":
        raise UserError(
            "save_strategy='best' would leave a run that stops without its last steps. Give load_best_model_at_end: the best "
            "checkpoint is kept beside the last ones, and becomes the trained model."
        )
    if strategy is not None and (strategy == "steps") != bool(options.save_steps):
        raise UserError(f"save_strategy='{strategy}' and save_steps={options.save_steps} do not fit. Give one of them alone.")
    if count is not None and count < 1:
        raise UserError(f"save_total_limit={count}: a run keeps its last checkpoint. Give 1 or more, or leave it out.")


def _check_evaluation(options: TrainOptions, given: dict[str, Any]) -> None:
    asked = [name for name in given if name in OF_EVALUATION and given[name] not in (False, 0, "no")]
    if asked and options.eval_fraction == 0:
        raise UserError(f"{asked[0]} is given, but no pairs are held out. Give eval_fraction=0.1, or leave {asked[0]} out.")
    if given.get("eval_steps") and given.get("eval_strategy", "steps") != "steps":
        raise UserError(f"eval_steps is given, but eval_strategy='{given['eval_strategy']}'. Give one of them alone.")
    if given.get("load_best_model_at_end") and given.get("eval_steps", options.save_steps) != options.save_steps:
        raise UserError(
            f"load_best_model_at_end chooses among checkpoints, so save_steps={options.save_steps} must be the same as "
            f"eval_steps={given['eval_steps']:g}. Give save_steps alone."
        )
    by_metric = given.get("load_best_model_at_end") or options.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    for name in ("metric_for_best_model", "greater_is_better"):
        if name in given and not by_metric:
            raise UserError(f"{name} is given without load_best_model_at_end. Give both, or neither.")
