"""Computes the last decoder layer only where its output is read: at responses, and at the prompt's last token.

Keys and values are computed for every token; queries, the output projection and the MLP, two thirds of the layer, are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from catpo.models.attention import packed


@contextmanager
def read_at_responses(decoder: nn.Module) -> Iterator[None]:
    """As `install`, inside the context only."""
    handles = install(decoder)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def install(decoder: nn.Module) -> list[Any]:
    """From now on the last layer's output on packed batches is valid only where responses are or are predicted.

    Other batches, and layers not built as most are (`self_attn.q_proj`, `self_attn.o_proj`, `mlp`), are computed in full.
    Removing the returned handles ends it.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return []
    modules = dict(layers[-1].named_modules())
    names = ("self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp")
    if any(name not in modules for name in names) or packed.reads_responses(modules["self_attn"]):  # in place already
        return []
    positions, attention = _ReadPositions(), modules["self_attn"]
    # on its parts, not on the layer: when a checkpointed layer runs again, hooks on the layer itself do not run
    handles: list[Any] = [packed.ReadsResponses(attention)]
    handles.append(attention.register_forward_pre_hook(positions.find, with_kwargs=True))
    for name in names[1:]:
        narrow = _Narrow(positions)
        handles.append(modules[name].register_forward_pre_hook(narrow.take))
        handles.append(modules[name].register_forward_hook(narrow.put, always_call=True))
    handles.append(modules["mlp"].register_forward_hook(positions.forget, always_call=True))
    return handles


class _ReadPositions:
    """Where the output of the running layer is read: flat positions in its rows, or None for everywhere."""

    def __init__(self) -> None:
        self.flat: Tensor | None = None

    def find(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """From the mask that comes with the call, so that a recomputed layer finds them again."""
        self.flat = packed.read_at(options.get("attention_mask"))

    def forget(self, *_: object) -> None:
        self.flat = None


class _Narrow:
    """Hands a module only the positions that are read, and scatters its output back among zeros."""

    def __init__(self, positions: _ReadPositions) -> None:
        self.positions = positions
        self.shape: torch.Size | None = None

    def take(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.shape = None
        if self.positions.flat is None:
            return None
        hidden = arguments[0]
        self.shape = hidden.shape
        return (hidden.flatten(0, 1)[self.positions.flat][None], *arguments[1:])

    def put(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if self.shape is None:
            return None
        first, *rest = output if isinstance(output, tuple) else (output,)  # a mixture of experts returns its routing too
        rows, length, _ = self.shape
        whole = first.new_zeros(rows * length, first.shape[-1])
        whole = whole.index_copy(0, self.positions.flat, first.flatten(0, -2)).view(rows, length, -1)
        return (whole, *rest) if isinstance(output, tuple) else whole
