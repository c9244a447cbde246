"""Bytes that a decoder takes per token, and how many tokens one pass may therefore have. Knows nothing of pairs or files."""

from __future__ import annotations

import torch

from catpo.models.family import Family

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
