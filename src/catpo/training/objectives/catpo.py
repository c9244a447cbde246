"""Cat-PO (Eq. 8-10): DPO with visual token weights and a token-weighted full-vocabulary KL to the reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from catpo.core.checks import check_word
from catpo.core.types import SIDES
from catpo.models.tensors import masked_sum
from catpo.training.objectives import LossOutput, PairStats, output

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper-raw": {"normalise": "none"},
    "official-code": {"kl_weight": 0.015, "eos": "zero"},
    "attention-only": {"alpha": 1.0},
    "similarity-only": {"alpha": 0.0},
    "no-kl": {"kl_weight": 0.0},
}
"""Named settings. `paper` is the default everywhere; `official-code` halves lambda and drops EOS, as the released code does."""


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    kl_weight: float = 0.03,
    kl_direction: str = "policy||reference",
    reduction: str = "sum",
    weights_on: str = "both",
) -> LossOutput:
    """Weighted DPO plus weighted KL. Weights are constants, computed before training (Eq. 6-7 in `fusion.py`).

    Args:
        beta: scale of the implicit reward.
        kl_weight: lambda_KL of Eq. 9; per side, not divided by beta. With 0 the KL is not computed.
        kl_direction: policy||reference as in the paper, or reference||policy as in TDPO.
        reduction: over tokens: the paper's `sum`, the `mean`, or divided by the sum of weights (`weighted_mean`).
        weights_on: the side whose weights count; the other side's are 1.
    """
    check_word("catpo", "weights_on", weights_on, ("both", "chosen", "rejected"))
    check_word("catpo", "reduction", reduction, ("sum", "mean", "weighted_mean"))
    weights = _reduced(_on_sides(stats.weights, weights_on), stats.mask, reduction)
    policy = masked_sum(weights * stats.policy_logps, stats.mask)  # pi^(w), above Eq. 8; (pair, side)
    reference = masked_sum(weights * stats.reference_logps, stats.mask)
    chosen, rejected = (policy - reference).unbind(1)
    preference = -F.logsigmoid(beta * (chosen - rejected))  # Eq. 8
    losses = preference
    mean_weights = masked_sum(stats.weights, stats.mask) / stats.mask.sum(-1).clamp_min(1)
    figures = {"weights/chosen": mean_weights[:, 0], "weights/rejected": mean_weights[:, 1]}
    if kl_weight:
        kl = masked_sum(weights * stats.kl(kl_direction), stats.mask)  # Eq. 9; (pair, side)
        regulariser = kl_weight * kl.sum(1)
        losses = preference + regulariser  # Eq. 10
        figures |= {"loss/kl": regulariser, "kl/chosen": kl[:, 0], "kl/rejected": kl[:, 1]}
    return output(losses, preference=preference, chosen=beta * chosen, rejected=beta * rejected, figures=figures)


def _on_sides(weights: Tensor, weights_on: str) -> Tensor:
    if weights_on == "both":
        return weights
    counts = torch.tensor([side == weights_on for side in SIDES], device=weights.device)[:, None]  # (side, token)
    return torch.where(counts, weights, 1.0)


def _reduced(weights: Tensor, mask: Tensor, reduction: str) -> Tensor:
    if reduction == "sum":
        return weights
    if reduction == "mean":
        return weights / mask.sum(-1, keepdim=True).clamp_min(1)
    return weights / masked_sum(weights, mask)[..., None].clamp_min(1e-12)
