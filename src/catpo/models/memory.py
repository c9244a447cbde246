"""What to say when memory runs out: what takes the most of it, and which setting makes that smaller. Knows no trainer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from catpo.core.errors import UserError

if TYPE_CHECKING:
    from catpo.models.family import Family

SETTINGS = {
    "weights": "load them in half precision (dtype='bfloat16') or in 4 bits (quantization='4bit')",
    "gradients": "train an adapter (lora='lora') instead of all weights",
    "optimiser": "train an adapter (lora='lora') instead of all weights",
    "activations": "lower the batch size (in training, raise gradient_accumulation_steps by as much), then give "
    "gradient_checkpointing=True or a max_length",
}
"""Part -> the setting to lower."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a GPU's, or that of torch on a CPU, which raises RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def explained(doing: str, model: nn.Module, optimizer: Any = None) -> Iterator[None]:
    """Turns running out of memory into a message; `doing` names the work and its size.

    Raises:
        UserError: memory ran out; names the largest parts and the setting to lower.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_message(doing, parts(model, optimizer), str(error))) from error


def parts(model: nn.Module, optimizer: Any = None) -> dict[str, int]:
    """Bytes of what is known to be held, by part; on a GPU, activations and temporaries are what the peak had beyond it."""
    parameters = list(model.parameters())
    held = {
        "weights": sum(_size(each) for each in parameters),
        "gradients": sum(_size(each.grad) for each in parameters if each.grad is not None),
        "optimiser": sum(_size(each) for state in getattr(optimizer, "state", {}).values() for each in _tensors(state)),
    }
    devices = {each.device for each in parameters if each.device.type == "cuda"}
    if devices:
        held["activations"] = max(0, sum(map(torch.cuda.max_memory_allocated, devices)) - sum(held.values()))
    return {name: size for name, size in held.items() if size}


def _message(doing: str, held: Mapping[str, int], reason: str) -> str:
    asked = re.search(r"allocate ([\d.]+ \w+)", reason)
    largest = sorted(held, key=lambda name: -held[name])
    sizes = ", ".join(f"{name} {readable(held[name])}" for name in largest)
    if "activations" not in held:  # not measured: what was asked for when memory ran out
        sizes += ", the rest activations and temporaries"
    steps = dict.fromkeys((SETTINGS["activations"], *(SETTINGS[name] for name in largest[:1])))
    return (
        f"Out of memory {doing}{f': {asked[1]} more were asked for' if asked else ''}. Held: {sizes}. To need less, "
        f"{'; or '.join(steps)}. `--dry-run` shows what each part takes."
    )


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    return (value for value in state.values() if isinstance(value, torch.Tensor)) if isinstance(state, Mapping) else iter(())


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def readable(size: float) -> str:
    """Bytes as people read them.

    >>> readable(7_063_000_000)
    '7.1 GB'
    """
    for unit, each in (("GB", 1e9), ("MB", 1e6)):
        if size >= each:
            return f"{size / each:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


CPU_TOKENS = 2048
"""Tokens of a pass on a CPU: more leave its caches and take longer each (docs/lab-notes.md, `make bench`)."""


GPU_SHARE = 0.5
"""Of a GPU's memory beside the weights; the rest is for the vision tower and what the allocator cannot use."""


def pass_tokens(family: Family, device: torch.device) -> int:
    """Most tokens of a pass without gradients on a device; the same on every run there, so that results are too."""
    if device.type != "cuda":
        return CPU_TOKENS
    total = torch.cuda.get_device_properties(device).total_memory
    weights = sum(parameter.numel() * parameter.element_size() for parameter in family.unwrapped.parameters())
    return max(CPU_TOKENS, int(GPU_SHARE * (total - weights)) // DecoderMemory(family).largest_layer)


class DecoderMemory:
    """Bytes per token that a decoder of Llama's build keeps, from its sizes."""

    def __init__(self, family: Family) -> None:
        text = family.unwrapped.config.get_text_config()
        self.layers, self.width = text.num_hidden_layers, text.hidden_size
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or self.width // heads
        self.queries = heads * size
        self.keys = (getattr(text, "num_key_value_heads", None) or heads) * size
        self.inner = text.intermediate_size
        self.element = family.unwrapped.dtype.itemsize

    @property
    def layer(self) -> int:
        """Kept for the backward pass of one layer: inputs of both norms and their results, queries, keys and values before and
        after rotation, attention's output, and the MLP's gate, its activation, the other half and their product.
        """
        norms = 2 * (2 * self.width + self.width * 4 // self.element)  # norms work in float32
        attention = 3 * self.queries + 4 * self.keys
        return self.element * (norms + attention + 4 * self.inner)

    @property
    def kept(self) -> int:
        return self.layers * self.layer

    @property
    def checkpointed(self) -> int:
        """The input of each layer, and one layer recomputed."""
        return self.layers * self.width * self.element + self.layer

    @property
    def largest_layer(self) -> int:
        """A forward pass alone holds one layer at a time."""
        return self.layer
