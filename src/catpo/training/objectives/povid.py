"""POVID, stage 2: the model's own slips under a noised picture are rejected too."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.core.checks import check_word
from catpo.training.objectives import FORMS, LossOutput, PairStats, output


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    text_weight: float = 0.5,
    noise_weight: float = 0.5,
    view: str = "noised(step=500)",
    form: str = "code",
) -> LossOutput:
    """DPO against the rejected response and against the tokens a_t that a noised picture makes most likely (Zhou et al. 2024).

    Policy and reference each find their own a_t, along the chosen response; the log-probs are those with the clean picture.
    Where a_t is the response's own token the terms cancel (`dpo_trainer_inherent.py`).

    Args:
        text_weight: of the rejected response.
        noise_weight: of the tokens under noise.
        view: the corrupted picture.
        form: `code`, two log-sigmoids weighted half and half; `paper`, one, around the chosen less both weighted rejections.
    """
    check_word("povid", "form", form, FORMS)
    chosen, rejected = stats.sum(stats.policy_logps - stats.reference_logps).unbind(1)
    slips = stats.view(view, "chosen")
    slipped = stats.sum(slips.policy_top_logps - slips.reference_top_logps, "chosen")
    preference = -F.logsigmoid(beta * (chosen - rejected))
    own = -F.logsigmoid(beta * (chosen - slipped))
    if form == "code":
        losses = text_weight * preference + noise_weight * own
    else:
        losses = -F.logsigmoid(beta * (chosen - text_weight * rejected - noise_weight * slipped))
    return output(losses, preference=preference, chosen=beta * chosen, rejected=beta * rejected, noise=own)
