"""POVID, stage 2: the model's own slips under a noised picture are rejected too."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.training.objectives import FORMS, LossOutput, check_choice, output
from catpo.training.pair_stats import PairStats


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    text_weight: float = 0.5,
    noise_weight: float = 0.5,
    view: str = "noised(step=500)",
    form: str = "code",
) -> LossOutput:
    """DPO against the rejected response and against the tokens that a noised picture makes likeliest (Zhou et al. 2024).

    These tokens a_t are found on the chosen response, by policy and reference each for itself, and their log-probs are those
    with the clean picture; where a_t is the response's own token nothing is left (`dpo_trainer_inherent.py`).

    Args:
        text_weight: of the rejected response.
        noise_weight: of the tokens under noise.
        view: the corrupted picture.
        form: `code`, two log-sigmoids weighted half and half; `paper`, one, around the chosen less both weighted rejections.
    """
    check_choice("povid: form", form, FORMS)
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
