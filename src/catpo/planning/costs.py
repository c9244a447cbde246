"""How a run's memory is divided over processes, how much it computes, and what it sends: docs/how-to/gpu.md has the formulas.

Arithmetic on sizes; knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Engine = Literal["ddp", "fsdp2", "zero2", "zero3"]
SHARDED: Mapping[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero2": frozenset({"gradients", "optimiser"}),
    "zero3": frozenset({"weights", "adapter", "gradients", "optimiser"}),
    "fsdp2": frozenset({"weights", "adapter", "gradients", "optimiser"}),
}
"""Parts of the memory of which each process holds its share only."""
GATHERED_LAYERS = 2
"""Layers whose weights are whole at a time: the one that runs, and the next, which is fetched meanwhile."""
CUDA_CONTEXT, CUDA_CONTEXT_NAME = 600_000_000, "CUDA context"
"""Bytes of an NVIDIA GPU that CUDA and its libraries' kernels take: roughly, by card and version."""
ATTENTION_BACKWARD = 2.5
"""Fused attention, of its forward pass: scores again, and gradients of four instead of two products."""


@dataclass(frozen=True)
class Operations:
    """Operations of one pair's forward pass, by what computes them; two per weight and token."""

    linear: float
    """The decoder's linear layers."""
    attention: float
    """The decoder's; half of the square of tokens."""
    head: float
    """Logits of the response tokens."""
    tower: float
    """The vision tower and its projector."""

    @property
    def forward(self) -> float:
        return self.linear + self.attention + self.head + self.tower

    def training(self, *, adapter: float | None, is_checkpointed: bool, keeps_kl: bool) -> float:
        """Forward and backward: to the inputs, and to the weights that train; `adapter` is what its forward pass takes, if any.

        The head keeps no logits: where it trains the backward pass makes them again, the reference's for the KL too.
        """
        is_full = adapter is None
        linear = (2 + is_full + is_checkpointed) * self.linear + (3 + is_checkpointed) * (adapter or 0.0)
        attention = (1 + ATTENTION_BACKWARD + is_checkpointed) * self.attention
        head = ((4 if is_full else 2) + 2 * keeps_kl) * self.head
        return linear + attention + head + self.tower


@dataclass(frozen=True)
class Work:
    """What a run computes and sends, all processes together."""

    flops: float
    """Operations; see `Operations`."""
    sent_per_step: float
    """Bytes each process sends per optimiser step."""


def per_process(memory: Mapping[str, int], engine: str, processes: int, *, layer: int, head: int) -> dict[str, int]:
    """Bytes on each device: what the engine shards divided, the rest whole, and what is gathered to be used.

    The head stays whole from the end of the forward pass to the beginning of the backward pass.

    >>> per_process({"weights": 800, "optimiser": 160, "activations": 50}, "fsdp2", 8, layer=100, head=30)
    {'weights': 100, 'optimiser': 20, 'activations': 50, 'gathered layers': 230}
    """
    if processes == 1:
        return dict(memory)
    shared = SHARDED[engine]
    divided = {name: -(-size // processes) if name in shared else size for name, size in memory.items()}
    return {**divided, "gathered layers": GATHERED_LAYERS * layer + head} if "weights" in shared else divided


def with_context(memory: Mapping[str, int], device: str) -> dict[str, int]:
    """What a device holds besides, on the kind of it that has such."""
    return {**memory, CUDA_CONTEXT_NAME: CUDA_CONTEXT} if device == "cuda" else dict(memory)


def sent_bytes(engine: str, processes: int, *, gathered: int, gradients: int, batches: int) -> float:
    """Bytes each process sends per optimiser step of so many batches, by ring algorithms.

    DDP adds the gradients up over the processes once, ZeRO-2 in every batch, and it gathers what was updated. Where weights are
    sharded, `gathered` of them are fetched in every batch, forward and backward, and each process gets its share of gradients.
    """
    if processes == 1:
        return 0.0
    part = (processes - 1) / processes
    if "weights" in SHARDED[engine]:
        return part * batches * (gathered + gradients)
    if "gradients" in SHARDED[engine]:
        return part * (2 * batches * gradients + gradients)
    return part * 2 * gradients
