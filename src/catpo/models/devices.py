"""Which device a process computes on, and where a model at hand lies. Knows no command and no trainer."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from catpo.core.errors import UserError, first_line
from catpo.runtime.launcher import local_process_number, process_count

if TYPE_CHECKING:
    from catpo.models.family import Family


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of this process: the one that is named, or the best there is. `cuda` is the process's own GPU.

    Raises:
        UserError: torch cannot use it, or each of several processes would take the same GPU.
    """
    own = _own_gpu()
    try:
        device = torch.device(name or (own if torch.cuda.is_available() else "cpu"))
        device = torch.device(own) if device.type == "cuda" and device.index is None else device
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        raise UserError(
            f"device='{name or own}' cannot be used ({first_line(error)}). Give cpu, cuda, or leave it out."
        ) from error
    if device.type == "cuda" and process_count() > 1 and device != torch.device(own):
        raise UserError(
            f"device='{name}' with {process_count()} processes: each takes a GPU of its own, this one {own}. Leave device out."
        )
    return device


def _own_gpu() -> str:
    """Of several processes on a machine, each takes its own; they are counted as accelerate does."""
    return f"cuda:{local_process_number() % max(1, torch.cuda.device_count())}"


@functools.cache
def tell_of_idle_gpus() -> None:
    """Say once that a process uses one of several visible GPUs, and how to use them all."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1 and process_count() == 1:
        print(
            f"catpo: {count} GPUs are visible; one process uses one, {_own_gpu()}. To use all, start with `torchrun "
            f"--nproc_per_node {count} -m catpo …` or `accelerate launch --num_processes {count} -m catpo …`.",
            file=sys.stderr,
        )


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its input: accelerate says so of one that it has spread, whose weights may be elsewhere."""
    execution = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if execution is None else torch.device(execution)


def check_in_one_place(model: Any, name: str) -> None:
    """Raises UserError if `device_map` has spread a model: head and hidden states would lie on different devices."""
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1 or (places == {"meta"} and getattr(model, "hf_device_map", None)):
        spread = sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()} or places)
        raise UserError(
            f"{name} is spread over several devices ({', '.join(spread)}): it can answer, but not be scored or trained. Load "
            "it with device_map={'': 0}; if too large for one GPU, in 4 bits, or train it with FSDP2 (docs/how-to/gpu.md)."
        )


def place(family: Family, device: torch.device) -> bool:
    """Move a model at hand to a device; returns whether it was elsewhere.

    Raises:
        UserError: it is spread over several devices, or is quantised in a way that cannot be moved.
    """
    model = family.unwrapped
    if getattr(model, "hf_device_map", None):
        check_in_one_place(model, family.model_id)
    if {_indexed(parameter.device) for parameter in model.parameters()} == {_indexed(device)}:
        return False
    try:
        family.model.to(device)
    except ValueError as error:  # of some quantised models
        raise UserError(
            f"{family.model_id} cannot be moved to {device}: {first_line(error)} Load it with device_map={{'': '{device}'}}."
        ) from error
    if getattr(model, "hf_device_map", None):
        model.hf_device_map = {"": device}
    return True


def _indexed(device: torch.device) -> tuple[str, int]:
    """A kind of device without a number is its first."""
    return device.type, device.index or 0
