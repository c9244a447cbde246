"""Precision of a run: what trains is kept in float32, whatever the checkpoint, and the forward pass computes as it would.

A step of a usual learning rate is less than half the gap between two bfloat16 numbers: weights kept in half precision would
not move, and in float16 AdamW diverges. Knows no loss.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers.utils import is_torch_bf16_gpu_available

from catpo.core.errors import UserError
from catpo.models.family import Family
from catpo.models.tensors import dtype_name
from catpo.training.config import CatPOConfig

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The half precisions, as accelerate calls them."""
ASKED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""What autocast computes in by accelerate's word for it."""


def compute_dtype(stored: torch.dtype, bf16: bool | None, fp16: bool = False, *, on_cpu: bool) -> torch.dtype:
    """What the forward pass computes in: what is asked for, else the checkpoint's precision, for float16 rather bfloat16.

    Args:
        stored: precision of the decoder's weights.
        bf16: None if the user says neither yes nor no.
        fp16: see `TrainingArguments`.
        on_cpu: whether the run is on CPUs.

    Raises:
        UserError: the device or the weights do not allow it.
    """
    has_bfloat16 = on_cpu or is_torch_bf16_gpu_available()
    given = "fp16" if fp16 else "bf16" if bf16 else None
    asked = ASKED.get(given or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    if asked is None and stored not in NAMES:
        return stored
    if asked is None and bf16 is False:
        raise UserError(
            f"bf16=False (--no-bf16), but the weights are {dtype_name(stored)}. Leave bf16 out, or load them in float32, for "
            "scoring too: dtype='float32' (--dtype float32)."
        )
    if asked is None:
        asked = torch.bfloat16 if has_bfloat16 or stored == torch.bfloat16 else torch.float16
    if bf16 is False and asked == torch.bfloat16:
        raise UserError("bf16=False (--no-bf16), but accelerate was set up with mixed_precision bf16 or fp8. Give one of them.")
    if asked == torch.float16 and on_cpu:
        raise UserError("fp16=True needs a GPU. On a CPU give bf16=True, or neither.")
    if asked == torch.float16 and stored == torch.bfloat16:
        raise UserError("fp16=True, but the weights are bfloat16, whose range float16 lacks. Leave fp16 out.")
    if asked == torch.bfloat16 and not has_bfloat16:
        raise UserError(
            "This GPU does not compute in bfloat16. Leave bf16 out and load the weights in float16, for scoring too: "
            "dtype='float16' (--dtype float16)."
        )
    return asked


def settled(args: CatPOConfig, stored: torch.dtype) -> tuple[CatPOConfig, torch.dtype]:
    """Arguments with `bf16`, `fp16` and `mixed_precision` as the model asks, and what it computes in; the user's stay as given.

    Raises:
        UserError: see `compute_dtype`; or DeepSpeed was set up for another precision.
    """
    computes = compute_dtype(stored, args.bf16, args.fp16, on_cpu=args.device.type == "cpu")
    args = copy.copy(args)
    before = args.mixed_precision
    args.bf16, args.fp16 = computes == torch.bfloat16, computes == torch.float16
    if before != "fp8":
        args.mixed_precision = NAMES.get(computes, "no")
    if args.deepspeed_plugin is not None and args.mixed_precision != before:
        raise UserError(
            f"The model computes in {args.mixed_precision}, but DeepSpeed was set up without it, before the model was known. "
            f"Give {args.mixed_precision}=True in CatPOConfig."
        )
    if AcceleratorState._shared_state.get("_mixed_precision", args.mixed_precision) != args.mixed_precision:
        AcceleratorState._reset_state()  # of an earlier trainer with these arguments; new ones reset it themselves
    return args, computes


def keep_masters(family: Family, args: CatPOConfig, *, is_saved: bool) -> dict[str, torch.dtype]:
    """Keep what trains in float32; returns the precision that each changed weight of a model `is_saved` whole had, by name.

    Autocast mixes bfloat16 with float32 but not with float16, so what is frozen in float16 changes too: to float32 if it is
    saved, else to bfloat16, which autocast would round it to. Adapters stay float32, in files as well. DeepSpeed keeps
    masters of its own.
    """
    if args.deepspeed_plugin is not None:
        return {}
    model, had = family.model, {}
    rest = torch.float32 if is_saved else torch.bfloat16
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    for name, tensor in named:
        if tensor.dtype in NAMES and (tensor.requires_grad or (args.bf16 and tensor.dtype == torch.float16)):
            had[name] = tensor.dtype
    for name, tensor in named:
        if name in had:
            tensor.data = tensor.data.to(torch.float32 if tensor.requires_grad else rest)
    computes = torch.bfloat16 if args.bf16 else torch.float16
    for name, module in model.named_modules():
        if getattr(module, "compute_dtype", None) == torch.float16 and args.bf16:  # a 4-bit layer
            module.compute_dtype = torch.bfloat16
        own = [f"{name}.{parameter}".lstrip(".") for parameter, _ in module.named_parameters(recurse=False)]
        if not isinstance(module, nn.Linear) and any(had.get(each) == computes for each in own):
            module.register_forward_hook(_as_in_half_precision)
    return had if is_saved else {}


def _as_in_half_precision(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Norms and embeddings return what they did before their weights became float32; autocast sees to matrix products."""
    if isinstance(output, Tensor) and output.dtype == torch.float32 and torch.is_autocast_enabled(output.device.type):
        return output.to(torch.get_autocast_dtype(output.device.type))
    return output


def as_loaded(model: nn.Module, had: Mapping[str, torch.dtype], weights: Mapping[str, Tensor] | None) -> Any:
    """The weights in the precision they had, for a model that is used and not trained on: those given, or the model's own."""
    if weights is not None:
        return {name: weight.to(had.get(name, weight.dtype)) for name, weight in weights.items()}
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), model.named_buffers()):
        tensor.data = tensor.data.to(had.get(name, tensor.dtype))
    return None
