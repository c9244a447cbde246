"""SimPO: mean log-probs without a reference, and a margin to reach."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from catpo.core.errors import UserError
from catpo.training.objectives import LossOutput, PairStats, output


def loss(
    stats: PairStats,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    nll_weight: float = 0.0,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> LossOutput:
    """-log sigmoid(beta [log pi(y_w) / |y_w| - log pi(y_l) / |y_l|] - gamma) (Meng et al. 2024, Eq. 6). No reference.

    Args:
        beta: larger than DPO's, since means over tokens are small; the authors use 2 to 10.
        gamma: the margin; the authors start with half of beta.
        nll_weight: adds this much of the mean negative log-likelihood of the chosen tokens; with 1 CPO-SimPO.
        label_smoothing: share of pairs assumed to be labelled the wrong way round, in [0, 0.5).
        alpha: other than 0, (1 - p^-alpha) / alpha in place of log p, the mean log-prob (AlphaPO, Gupta et al. 2025).
    """
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"simpo(label_smoothing={label_smoothing}) must lie in [0, 0.5).")
    means = stats.mean(stats.policy_logps)  # (pair, side)
    rewards = beta * (-torch.expm1(-alpha * means) / alpha if alpha else means)
    chosen, rejected = rewards.unbind(1)
    margin = chosen - rejected - gamma
    preference = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    if not nll_weight:
        return output(preference, preference=preference, chosen=chosen, rejected=rejected)
    nll = -means[:, 0]
    return output(preference + nll_weight * nll, preference=preference, chosen=chosen, rejected=rejected, nll=nll)
