"""HSA-DPO: the more severe a hallucination, the more its response counts."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.training.objectives import LossOutput, PairStats, output


def loss(stats: PairStats, *, beta: float = 0.1, severity: float = 1.0, chosen_weight: float = 1.0) -> LossOutput:
    """-log sigmoid(beta [c Delta_w - d Delta_l]) (Xiao et al. 2025, `base_dpo_trainer.py`).

    Args:
        severity: d of pairs whose row has no `severity`.
        chosen_weight: c.
    """
    chosen, rejected = stats.sum(stats.policy_logps - stats.reference_logps).unbind(1)
    chosen, rejected = chosen_weight * chosen, stats.meta("severity", severity) * rejected
    losses = -F.logsigmoid(beta * (chosen - rejected))
    return output(losses, preference=losses, chosen=beta * chosen, rejected=beta * rejected)
