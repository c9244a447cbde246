"""TGDPO: token rewards of another preference-trained checkpoint scale beta token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from catpo.training.objectives import LossOutput, PairStats, output


def loss(stats: PairStats, *, beta: float = 0.1, alpha: float = 0.5, judge: str = "") -> LossOutput:
    """-log sigmoid(sum beta (1 + alpha beta q_t) d_t of the chosen, less sum beta (1 - alpha beta q_t) d_t of the rejected).

    d is the policy's log-ratio to the reference and q that of the other checkpoint, a constant (Zhu et al. 2025,
    `tgdpo/trainer.py`).

    Args:
        alpha: how much the token rewards count; 0 is DPO.
        judge: folder of a reward store in which the other checkpoint scored the same pairs (`catpo score --model THAT`).
    """
    ratios = stats.policy_logps - stats.reference_logps  # d; (pair, side, token)
    scales = torch.ones_like(ratios)
    if alpha:
        rewards = stats.judge_logps(judge) - stats.reference_logps  # q
        sign = torch.tensor([1.0, -1.0], dtype=ratios.dtype, device=ratios.device)[:, None]
        scales = 1 + sign * alpha * beta * rewards
    chosen, rejected = (beta * stats.sum(scales * ratios)).unbind(1)
    losses = -F.logsigmoid(chosen - rejected)
    return output(losses, preference=losses, chosen=chosen, rejected=rejected)
