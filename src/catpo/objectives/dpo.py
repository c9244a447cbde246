"""DPO (Eq. 1): the plain preference loss every other objective is held against."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.errors import UserError
from catpo.objectives._base import LossOutput
from catpo.stats import PairStats
from catpo.tensors import masked_sum


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kl_weight: float = 0.0,
    kl_direction: str = "policy||reference",
) -> LossOutput:
    """-log sigmoid(beta h), h the difference of the log-ratios summed over tokens (Rafailov et al. 2023).

    Args:
        label_smoothing: share of pairs taken to be labelled the wrong way round (conservative DPO), in [0, 0.5).
        kl_weight: adds this much of the unweighted full-vocabulary KL over all response tokens; 0 is DPO proper.
    """
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"dpo(label_smoothing={label_smoothing}) must lie in [0, 0.5).")
    ratios = masked_sum(stats.policy_logps - stats.reference_logps, stats.mask)  # (pair, side)
    chosen, rejected = ratios.unbind(1)
    margin = chosen - rejected
    preference = -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)  # Eq. 1
    metrics = {"loss/preference": preference, "rewards/chosen": beta * chosen, "rewards/rejected": beta * rejected}
    losses = preference
    if kl_weight:
        kl = masked_sum(stats.kl(kl_direction), stats.mask)  # (pair, side)
        losses = losses + kl_weight * kl.sum(1)
        metrics |= {"loss/kl": kl_weight * kl.sum(1), "kl/chosen": kl[:, 0], "kl/rejected": kl[:, 1]}
    return LossOutput(losses, {name: value.detach() for name, value in metrics.items()})
