"""Dense DPO (RLHF-V): tokens that the correction changed count more."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.core.checks import check_word
from catpo.training.objectives import FORMS, LossOutput, PairStats, output
from catpo.training.objectives._changed_tokens import segment_weights

SEGMENT_WEIGHTS = {"code": 1.1, "paper": 5.0}
"""gamma of the released command, and of the paper (which goes with beta = 0.5)."""


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    form: str = "code",
    segment_weight: float | None = None,
    block: int = 3,
    sft_weight: float = 0.0,
) -> LossOutput:
    """DPO with weight gamma on changed tokens and 1 on the others (Yu et al. 2024; Muffin `train/trainers.py`).

    Args:
        form: `code`, a sum over tokens; `paper`, divided by the sum of the weights.
        segment_weight: gamma; 1.1 in the code's form, 5 in the paper's.
        block: shortest run of equal tokens that counts as unchanged.
        sft_weight: adds this much of the weighted negative log-likelihood of the chosen response.
    """
    check_word("ddpo", "form", form, FORMS)
    gamma = SEGMENT_WEIGHTS[form] if segment_weight is None else segment_weight
    weights = segment_weights(stats, gamma, block=block)
    norm = stats.sum(weights).clamp_min(1e-12) if form == "paper" else 1.0
    chosen, rejected = (stats.sum(weights * (stats.policy_logps - stats.reference_logps)) / norm).unbind(1)
    losses = preference = -F.logsigmoid(beta * (chosen - rejected))
    if sft_weight:
        losses = losses - sft_weight * (stats.sum(weights * stats.policy_logps) / norm)[:, 0]
    return output(losses, preference=preference, chosen=beta * chosen, rejected=beta * rejected)
