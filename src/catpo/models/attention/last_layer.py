"""The last decoder layer where its output is read: only responses, and the prompt's last token, go through its inner layers.

Keys and values are made of every token; queries, the output projection and the MLP, two thirds of the layer, are not.
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
    """`install` for a while."""
    handles = install(decoder)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def install(decoder: nn.Module) -> list[Any]:
    """From now on packed batches leave the last layer with sensible values where responses are or are predicted, only there.

    Batches that are not packed, and layers not built as most are (`self_attn.q_proj`, `self_attn.o_proj`, `mlp`), stay as they
    were. Removing the handles that are returned ends it.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return []
    last = layers[-1]
    found = [_at(last, name) for name in ("self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp")]
    modules = [module for module in found if module is not None]
    if len(modules) < len(found) or packed.reads_responses(modules[0]):  # in place already
        return []
    places, attention, mlp = _Places(), modules[0], modules[-1]
    # on its parts, not on the layer: when a checkpointed layer runs again, hooks on itself are left out
    handles: list[Any] = [packed.ReadsResponses(attention), attention.register_forward_pre_hook(places.find, with_kwargs=True)]
    for module in modules[1:]:
        narrow = _Narrow(places)
        handles += [module.register_forward_pre_hook(narrow.take), module.register_forward_hook(narrow.put, always_call=True)]
    return [*handles, mlp.register_forward_hook(places.forget, always_call=True)]


def _at(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


class _Places:
    """Where the layer that runs now is read: flat positions in its rows, or None for everywhere."""

    def __init__(self) -> None:
        self.flat: Tensor | None = None

    def find(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Of the mask that comes with the call, so that a checkpointed layer finds them again."""
        layout = packed.layout_behind(options.get("attention_mask"))
        hidden = options["hidden_states"] if "hidden_states" in options else arguments[0]
        self.flat = None if layout is None else packed.read_places(layout, hidden.shape[1])

    def forget(self, *_: object) -> None:
        self.flat = None


class _Narrow:
    """Hands a module the places that are read, and puts its outputs back among zeros."""

    def __init__(self, places: _Places) -> None:
        self.places = places
        self.shape: torch.Size | None = None

    def take(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.shape = None
        if self.places.flat is None:
            return None
        hidden = arguments[0]
        self.shape = hidden.shape
        return (hidden.flatten(0, 1)[self.places.flat][None], *arguments[1:])

    def put(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if self.shape is None:
            return None
        first, *rest = output if isinstance(output, tuple) else (output,)  # a mixture of experts returns its routing too
        rows, length, _ = self.shape
        whole = first.new_zeros(rows * length, first.shape[-1])
        whole = whole.index_copy(0, self.places.flat, first.flatten(0, -2)).view(rows, length, -1)
        return (whole, *rest) if isinstance(output, tuple) else whole
