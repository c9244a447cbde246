"""AMP: every pair of ranked answers, and likelihood for the best of them."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.training.objectives import LossOutput, PairStats, output


def loss(
    stats: PairStats, *, beta: float = 0.1, best_weight: float = 1.0, is_best: float = 1.0, round_weight: float = 0.05
) -> LossOutput:
    """-log sigmoid(beta h) of each pair of K ranked answers, and -Delta of the best answer, unscaled, where it takes part.

    K answers make K (K - 1) / 2 rows; a row says with `is_best` (1 or 0) whether its chosen answer is the best of all, and with
    `round` which turn of a dialogue it belongs to, from 0 (Zhang et al. 2024, `models/dpo_trainer.py`).

    Args:
        best_weight: of the likelihood term.
        is_best: for rows that do not say.
        round_weight: by how much each later turn weighs more.
    """
    chosen, rejected = stats.sum(stats.policy_logps - stats.reference_logps).unbind(1)
    preference = -F.logsigmoid(beta * (chosen - rejected))
    best = -stats.meta("is_best", is_best) * chosen
    losses = (preference + best_weight * best) * (1 + round_weight * stats.meta("round", 0.0))
    return output(losses, preference=preference, chosen=beta * chosen, rejected=beta * rejected, best=best)
