"""Figures of batches between two logs. They stay where they were computed until then: one collective, one copy to the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class _Batch:
    sizes: dict[str, int]
    """Values that each figure has in this process."""
    values: Float[Tensor, " all_figures"]
    counted: int | None
    """Values that count of all processes' together; None for all."""


@dataclass
class Figures:
    """What was recorded since the last log."""

    batches: list[_Batch] = field(default_factory=list)

    @torch.no_grad()
    def record(self, figures: Mapping[str, Float[Tensor, " values"]], counted: int | None = None) -> None:
        """Keep a batch's figures: values per pair or per row, NaN where there is none.

        Args:
            figures: of this process; the others have as many.
            counted: values that count in the order of the processes, if the last batch was filled up with the first pairs.
        """
        sizes = {name: len(values) for name, values in figures.items()}
        self.batches.append(_Batch(sizes, torch.cat([values.float() for values in figures.values()]), counted))

    def means(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Each figure's mean over the batches of its mean over all processes; the record starts again.

        `gather` lays the tensors of all processes end to end: every process takes part.
        """
        if not self.batches:
            return {}
        own = torch.cat([batch.values for batch in self.batches])
        everywhere = gather(own).view(-1, len(own)).cpu()  # (process, value)
        means: dict[str, list[float]] = {}
        start = 0
        for batch in self.batches:
            for name, size in batch.sizes.items():
                mean = everywhere[:, start : start + size].flatten()[: batch.counted].nanmean().item()
                start += size
                if not math.isnan(mean):
                    means.setdefault(name, []).append(mean)
        self.batches.clear()
        return {name: sum(values) / len(values) for name, values in means.items()}
