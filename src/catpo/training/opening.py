"""The model to train, on the device of its training: by name, as a model at hand, or as a family. Knows no step."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from catpo.core.errors import UserError
from catpo.models import devices, loading
from catpo.models.family import Family
from catpo.runtime.launcher import is_main_process
from catpo.training.config import CatPOConfig, needs_store, objective_of
from catpo.training.objectives import Objective


def shards_itself(rewards: Any, objective: Objective, reference: str) -> bool:
    """Whether FSDP moves its share of the weights to the GPU; to make a store, the whole model must be there first."""
    is_scored = rewards is None and needs_store(objective, reference)
    return not is_scored and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def open_for_training(
    model: str | Path | nn.Module | Family, processor: Any, args: CatPOConfig, ref_model: nn.Module | None = None
) -> Family:
    """The family of a model on the device that trains it, where it is scored too.

    Raises:
        UserError: a model without its processor, or one that is spread over several devices.
    """
    if args.train_device is None and args.device.type == "cuda":
        devices.tell_of_idle_gpus()
    if ref_model is not None:
        devices.check_in_one_place(ref_model, "ref_model")
    leaves_it = shards_itself(args.rewards, objective_of(args), args.reference)
    device = torch.device("cpu") if leaves_it else args.device
    if isinstance(model, str | Path):
        return loading.load(model, device=device)
    family = model if isinstance(model, Family) else _family_of(model, processor)
    was_on = family.device
    if devices.place(family, device) and not leaves_it and is_main_process():
        print(f"catpo: the model was on {was_on}; it is scored and trained on {device}.", file=sys.stderr)
    return family


def _family_of(model: nn.Module, processor: Any) -> Family:
    if processor is None:
        raise UserError(
            "CatPOTrainer got a model but no processing_class. Give the model's processor (AutoProcessor.from_pretrained)."
        )
    name = getattr(model.config, "_name_or_path", "") or "in memory"
    return loading.family_of(model, processor, model_id=str(name))


def thaw(family: Family, *, train_vision: bool) -> None:
    """All of a model trains, or all but vision tower and projector."""
    model = family.model.requires_grad_(True)
    if not train_vision:
        family.freeze_vision()
    # transformers' own key names cannot be loaded back by its Trainer: a resumed run would restart from the base weights
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
