"""Nested tensors between host and GPU in one copy: they lie in one buffer, on the host in pinned memory.

A copy from pinned memory needs no waiting for. Knows nothing of what a batch holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes at whose multiples tensors begin in the buffer, as torch's own allocations do: kernels read them in wide loads."""


class HostBatch(dict[Any, Any]):
    """A batch before it goes to a device; `DataLoader` calls `pin_memory`, accelerate and `to_device` call `to`."""

    buffer: Tensor | None = None
    """The bytes of all tensors, if they lie together."""

    def pin_memory(self) -> HostBatch:
        """The same in one buffer of pinned memory."""
        buffer, parts = _joined([*_tensors(self)], pin_memory=True)
        pinned = HostBatch(_with(self, parts))
        pinned.buffer = buffer
        return pinned

    def to(self, device: torch.device | str, non_blocking: bool = False) -> dict[Any, Any]:
        """The same on a device as plain dictionaries, which wrappers of a model know how to take apart.

        A pinned buffer is copied without waiting, also if that was not asked for: nothing writes to it afterwards.
        """
        tensors = [*_tensors(self)]
        if self.buffer is None:
            return _with(self, [tensor.to(device, non_blocking=non_blocking) for tensor in tensors])
        return _with(self, _parts(self.buffer.to(device, non_blocking=True), tensors))


def to_device(batch: dict[Any, Any], device: torch.device) -> dict[Any, Any]:
    """Nested tensors of the host on a device; other values stay as they are."""
    host = HostBatch(batch)
    return (host.pin_memory() if device.type == "cuda" else host).to(device)


def to_host(results: dict[Any, Any]) -> dict[Any, Any]:
    """Nested tensors of one device on the host, which waits once."""
    tensors = [*_tensors(results)]
    if not tensors or tensors[0].device.type == "cpu":
        return results
    buffer, _ = _joined(tensors, device=tensors[0].device)
    return _with(results, _parts(buffer.cpu(), tensors))


def _joined(tensors: Sequence[Tensor], **place: Any) -> tuple[Tensor, list[Tensor]]:
    """Copies of tensors in one buffer: its bytes, and the tensors."""
    buffer = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, **place)
    parts = _parts(buffer, tensors)
    return buffer, [part.copy_(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _parts(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a buffer, with the types and shapes of the tensors that it was made for."""
    parts = []
    for room, tensor in zip(buffer.split([_room(tensor) for tensor in tensors]), tensors, strict=True):
        size = tensor.numel() * tensor.element_size()
        parts.append(room[:size].view(tensor.dtype).view(tensor.shape))
    return parts


def _room(tensor: Tensor) -> int:
    """Bytes that a tensor takes in the buffer."""
    return math.ceil(tensor.numel() * tensor.element_size() / ALIGNMENT) * ALIGNMENT


def _tensors(batch: dict[Any, Any]) -> Iterator[Tensor]:
    for value in batch.values():
        if isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def _with(batch: dict[Any, Any], tensors: Sequence[Tensor]) -> dict[Any, Any]:
    """The same with other tensors, in the order of `_tensors`."""
    following = iter(tensors)

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: replaced(each) for name, each in value.items()}
        return next(following) if isinstance(value, Tensor) else value

    mapped: dict[Any, Any] = replaced(batch)
    return mapped
