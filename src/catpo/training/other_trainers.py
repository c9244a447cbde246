"""What scripts for TRL's `DPOTrainer` and transformers' `Trainer` give and `CatPOTrainer` lacks: refused, with what to use.

Knows names only, and needs neither library's newest version: some of the options are those of older ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import TrainingArguments

from catpo.config.other_trainers import LOADED, OPTIONS
from catpo.core.errors import UserError, did_you_mean

NO_LOGITS = "there are neither logits nor labels here; evaluate() gives losses, rewards/margins and rewards/accuracies"
ARGUMENTS = {
    "compute_metrics": NO_LOGITS,
    "preprocess_logits_for_metrics": NO_LOGITS,
    "data_collator": "batches are made by the trainer's own, with token weights and reference; change the rows before, with "
    "dataset.map",
    "model_init": "give the model itself; a search over options makes a new CatPOTrainer for each",
    "compute_loss_func": "the loss is the objective, which may be your own: docs/how-to/plugins/objective.md",
    "tokenizer": "give the model's processor as processing_class=AutoProcessor.from_pretrained(…)",
    "quantization_config": f"{LOADED} (quantization_config=… goes there)",
}
"""Argument of the constructors of `Trainer` or `DPOTrainer` that ours lacks -> what to do instead."""


def check_options(given: Collection[str], known: Collection[str]) -> None:
    """Raises UserError for options of a `CatPOConfig` that it has not; names them all."""
    _refuse("CatPOConfig", given, known, OPTIONS)


def check_arguments(given: Mapping[str, Any], known: Collection[str], options: Collection[str]) -> None:
    """Raises UserError for arguments of a `CatPOTrainer` that it has not, unless they are None, as other trainers have them.

    Args:
        given: arguments by name that the constructor does not name.
        known: arguments that it has.
        options: those of `CatPOConfig`, where older scripts gave them here.
    """
    moved = {name: f"it belongs to the options: args=CatPOConfig({name}=…)" for name in options if name not in known}
    unknown = [name for name, value in given.items() if value is not None or name not in ARGUMENTS]
    _refuse("CatPOTrainer", unknown, known, OPTIONS | moved | ARGUMENTS)


def check_places(args: Any, train_dataset: Any, own: type) -> None:
    """Raises UserError for a configuration of another trainer, or arguments in the order of another one's."""
    kind = type(args).__name__
    if isinstance(args, TrainingArguments) and not isinstance(args, own):
        raise UserError(
            f"args is a {kind}. Give a CatPOConfig (from catpo import CatPOConfig): it has the options of TrainingArguments "
            "under the same names, and says of each option of DPOConfig that it lacks what to use."
        )
    if args is not None and not isinstance(args, own):
        raise UserError(f"args is a {kind}, not a CatPOConfig. Give the arguments by name: TRL's second one is ref_model.")
    if isinstance(train_dataset, TrainingArguments):
        raise UserError(
            f"train_dataset is a {type(train_dataset).__name__}. Give the arguments by name: TRL's third one is args."
        )


def _refuse(owner: str, given: Collection[str], known: Collection[str], advice: Mapping[str, str]) -> None:
    problems = []
    for name in given:
        if name not in known:
            hint = f"{advice[name]}." if name in advice else did_you_mean(name, known)
            problems.append(f"{owner} has no {name}: {hint}" if name in advice else f"{owner} has no {name}. {hint}")
    if problems:
        raise UserError("\n".join(problems))
