"""The reference tilted by token rewards: q(v) proportional to pi_ref(v) exp(r(v)), the distribution that maximises the expected
reward less the KL to the reference (Peters and Schaal 2007; Rafailov et al. 2023, Eq. 4).

The rewards are sparse: most of the vocabulary has none. Knows nothing of where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from catpo.models.output_head import OutputHead


@dataclass(frozen=True)
class Tilt:
    """Rewards of some tokens of the vocabulary, in tables that positions share."""

    ids: Int[Tensor, "tables entries"]
    """Tokens with a reward, each once in its table; -1 is padding."""
    rewards: Float[Tensor, "tables entries"]
    """What is added to their logits; 0 in the padding."""
    table: Int[Tensor, " positions"]
    """Which table each position reads."""

    def added_to(self, logits: Float[Tensor, "positions tile"], first: int) -> Float[Tensor, "positions tile"]:
        """Logits of the vocabulary from token `first` on, with the rewards added in place."""
        index = self.ids - first
        is_inside = (index >= 0) & (index < logits.shape[1]) & (self.ids >= 0)
        rewards = torch.where(is_inside, self.rewards, 0).to(logits.dtype)
        index = index.clamp(0, logits.shape[1] - 1)
        return logits.scatter_add_(1, index[self.table], rewards[self.table])


@dataclass(frozen=True)
class TiltedHead(OutputHead):
    """An output head whose logits are tilted; for as many hidden states as the tilt has positions."""

    tilt: Tilt | None = None

    @classmethod
    def over(cls, head: OutputHead, tilt: Tilt) -> TiltedHead:
        """The head with its logits tilted."""
        return cls(head.weight, head.bias, head.scale, head.softcap, tilt)

    def logits(self, hidden: Float[Tensor, "tokens width"], tile: slice = slice(None)) -> Float[Tensor, "tokens tile"]:
        logits = super().logits(hidden, tile)
        return logits if self.tilt is None else self.tilt.added_to(logits, tile.start or 0)
