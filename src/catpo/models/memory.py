"""How much memory a model takes: what to say when it runs out, and how many tokens fit into a pass. Knows no trainer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from catpo.core.errors import UserError

if TYPE_CHECKING:
    from catpo.models.family import Family

ADAPTER = "train an adapter (lora='lora') instead of all weights"
SETTINGS = {
    "weights": "load them in half precision (dtype='bfloat16') or in 4 bits (quantization='4bit')",
    "gradients": ADAPTER,
    "optimiser": ADAPTER,
    "activations": "lower the batch size (in training, raise gradient_accumulation_steps by as much), then give "
    "gradient_checkpointing=True or a max_length",
}
"""Part -> the setting to lower."""
CPU_TOKENS = 2048
"""Tokens of a pass on a CPU: more leave its caches and take longer each (docs/lab-notes.md, `make bench`)."""
GPU_SHARE = 0.5
"""Of a GPU's memory beside the weights; the rest is for the vision tower and what the allocator cannot use."""


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
    """Bytes in use by part; on a GPU, activations and temporaries are what the peak had beyond the other parts."""
    parameters = list(model.parameters())
    states = [
        value for state in getattr(optimizer, "state", {}).values() if isinstance(state, Mapping) for value in state.values()
    ]
    sizes = {
        "weights": _bytes(parameters),
        "gradients": _bytes(parameter.grad for parameter in parameters),
        "optimiser": _bytes(states),
    }
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    if devices:
        sizes["activations"] = max(0, sum(map(torch.cuda.max_memory_allocated, devices)) - sum(sizes.values()))
    return {name: size for name, size in sizes.items() if size}


def _bytes(values: Iterable[Any]) -> int:
    """Of the tensors among the values."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _message(doing: str, sizes: Mapping[str, int], reason: str) -> str:
    asked = re.search(r"allocate ([\d.]+ \w+)", reason)
    largest = sorted(sizes, key=lambda name: -sizes[name])
    held = ", ".join(f"{name} {readable(sizes[name])}" for name in largest)
    if "activations" not in sizes:  # not measured on a CPU
        held += ", the rest activations and temporaries"
    advice = dict.fromkeys((SETTINGS["activations"], *(SETTINGS[name] for name in largest[:1])))
    return (
        f"Out of memory {doing}{f': {asked[1]} more were asked for' if asked else ''}. Held: {held}. To need less, "
        f"{'; or '.join(advice)}. `--dry-run` shows what each part takes."
    )


def readable(size: float) -> str:
    """Bytes as people read them.

    >>> readable(7_063_000_000)
    '7.1 GB'
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def pass_tokens(family: Family, device: torch.device) -> int:
    """Most tokens of a pass without gradients on a device; the same on every run there, so that results are too."""
    if device.type != "cuda":
        return CPU_TOKENS
    free = torch.cuda.get_device_properties(device).total_memory - _bytes(family.unwrapped.parameters())
    return max(CPU_TOKENS, int(GPU_SHARE * free) // DecoderMemory(family).largest_layer)


class DecoderMemory:
    """Activations in bytes per token of a decoder built like Llama's, from its sizes."""

    def __init__(self, family: Family) -> None:
        text = family.text_config
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        self.layers, self.width, self.inner = text.num_hidden_layers, text.hidden_size, text.intermediate_size
        self.queries = heads * head_size
        self.keys = (getattr(text, "num_key_value_heads", None) or heads) * head_size
        self.element = family.unwrapped.dtype.itemsize

    @property
    def largest_layer(self) -> int:
        """Kept for the backward pass of one layer: inputs of both norms and their results, queries, keys and values before and
        after rotation, attention's output, and the MLP's gate, its activation, the other half and their product. A forward
        pass alone holds one layer at a time.
        """
        norms = 2 * (2 * self.width + self.width * 4 // self.element)  # norms work in float32
        attention = 3 * self.queries + 4 * self.keys
        return self.element * (norms + attention + 4 * self.inner)

    @property
    def kept(self) -> int:
        """All layers, for a backward pass."""
        return self.layers * self.largest_layer

    @property
    def checkpointed(self) -> int:
        """With gradient checkpointing: the input of each layer, and one layer recomputed."""
        return self.layers * self.width * self.element + self.largest_layer
