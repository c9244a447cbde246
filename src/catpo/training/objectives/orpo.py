"""ORPO: likelihood for the chosen response, and the odds ratio of the two, without a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from catpo.training.objectives import LossOutput, PairStats, output


def loss(stats: PairStats, *, beta: float = 0.1) -> LossOutput:
    """-log p(y_w) - beta log sigmoid(log [odds(y_w) / odds(y_l)]), log p a mean over tokens (Hong et al. 2024, Eq. 6-7).

    odds = p / (1 - p). No reference. Only the response's tokens count; TRL adds the prompt's to the likelihood.

    Args:
        beta: lambda, weight of the odds ratio.
    """
    means = stats.mean(stats.policy_logps)  # log p; (pair, side)
    chosen, rejected = _log_odds(means).unbind(1)
    preference, nll = -F.logsigmoid(chosen - rejected), -means[:, 0]
    losses = nll + beta * preference
    rewards = beta * means
    return output(losses, preference=preference, chosen=rewards[:, 0], rejected=rewards[:, 1], nll=nll)


def _log_odds(logps: Tensor) -> Tensor:
    """Of log p: log p - log(1 - p), finite for a p that rounds to 1."""
    logps = logps.clamp_max(-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))
