"""Coefficients of Eq. 11 that are learned with the policy (Table 4), and the token weights they give (Eq. 7).

The same arithmetic as `catpo.rewards.fusion`, on a batch and with gradients. Knows nothing of models or losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from catpo.rewards.fusion import Fusion
from catpo.training.pair_stats import shared_prefix_mask


class LearnedFusion(nn.Module):
    """Three numbers whose softmax is gamma, delta and 1 - gamma - delta."""

    def __init__(self, fusion: Fusion) -> None:
        super().__init__()
        self.fusion = fusion
        gamma, delta = fusion.gamma or 0.0, fusion.delta or 0.0
        begin = torch.tensor([gamma, delta, 1 - gamma - delta]).clamp_min(1e-6)
        self.logits = nn.Parameter(begin.log())

    @property
    def coefficients(self) -> dict[str, float]:
        """The current coefficient of each signal."""
        return dict(zip(self.fusion.needs, self.logits.softmax(0).tolist(), strict=True))

    def forward(self, batch: Mapping[str, Any]) -> Float[Tensor, "pairs 2 tokens"]:
        """Token weights of a batch (Eq. 7) from its `signals` and the current coefficients (Eq. 11)."""
        fusion, is_scored = self.fusion, batch["is_scored"]
        relevance = batch["signals"] @ self.logits.softmax(0).to(batch["signals"].dtype)  # Eq. 11; (pair, side, token)
        squashed = self._squashed(relevance)  # T
        weights = torch.stack([fusion.base_weight + squashed[:, 0], fusion.base_weight + 1 - squashed[:, 1]], dim=1)  # Eq. 7
        weights = torch.where(is_scored, weights, 1.0 if fusion.eos == "neutral" else 0.0)
        if fusion.shared_prefix == "neutral":
            mean = weights.mean(1, keepdim=True).expand_as(weights)
            is_shared = shared_prefix_mask(batch["token_ids"], batch["mask"])[:, None]
            weights = torch.where(is_shared, mean, weights)
        return weights * batch["mask"]

    def _squashed(self, relevance: Tensor) -> Tensor:
        if self.fusion.activation == "sigmoid":
            return torch.sigmoid(relevance / self.fusion.temperature)
        return torch.tanh(relevance.clamp_min(0) / self.fusion.temperature)

    def restore(self, logits: Sequence[float]) -> None:
        """Set the three numbers to those of a checkpoint."""
        with torch.no_grad():
            self.logits.copy_(torch.tensor(logits))
