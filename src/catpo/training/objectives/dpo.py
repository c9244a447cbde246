"""DPO (Eq. 1): the plain preference loss that every other objective is compared with."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.models.tensors import masked_sum
from catpo.training.objectives import LossOutput, PairStats, output


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "sum",
    kl_weight: float = 0.0,
    kl_direction: str = "policy||reference",
) -> LossOutput:
    """-log sigmoid(beta h), h the difference of the log-ratios summed over tokens (Rafailov et al. 2023).

    Args:
        label_smoothing: share of pairs assumed to be labelled the wrong way round (conservative DPO), in [0, 0.5).
        loss_type: `sigmoid`, or `ipo`: (h - 1 / 2 beta)^2 (Azar et al. 2023).
        reduction: `sum` over tokens, or their `mean`, as in TRL's IPO.
        kl_weight: adds this much of the unweighted full-vocabulary KL over all response tokens; 0 is DPO proper.
    """
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"dpo(label_smoothing={label_smoothing}) must lie in [0, 0.5).")
    check_word("dpo", "loss_type", loss_type, ("sigmoid", "ipo"))
    check_word("dpo", "reduction", reduction, ("sum", "mean"))
    ratios = stats.sum(stats.policy_logps - stats.reference_logps)  # (pair, side)
    if reduction == "mean":
        ratios = ratios / stats.mask.sum(-1).clamp_min(1)
    chosen, rejected = ratios.unbind(1)
    margin = chosen - rejected
    preference = -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)  # Eq. 1
    losses, figures = preference, {}
    if loss_type == "ipo":
        if beta <= 0:
            raise UserError(f"dpo(loss_type='ipo', beta={beta}): the target margin is 1 / (2 beta). Give a positive beta.")
        losses = figures["loss/ipo"] = (margin - 1 / (2 * beta)) ** 2
    if kl_weight:
        kl = masked_sum(stats.kl(kl_direction), stats.mask)  # (pair, side)
        regulariser = kl_weight * kl.sum(1)
        losses = losses + regulariser
        figures |= {"loss/kl": regulariser, "kl/chosen": kl[:, 0], "kl/rejected": kl[:, 1]}
    return output(losses, preference=preference, chosen=beta * chosen, rejected=beta * rejected, figures=figures)
