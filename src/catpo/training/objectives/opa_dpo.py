"""OPA-DPO: a preference at every token position, a masked picture, and an anchor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from catpo.core.checks import check_word
from catpo.models.tensors import masked_sum
from catpo.training.objectives import FORMS, LossOutput, PairStats, output


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    image_weight: float = 0.2,
    anchor_weight: float = 1.0,
    anchor: float = 0.0,
    view: str = "masked(share=0.3, patch=1)",
    form: str = "code",
) -> LossOutput:
    """Position by position: the mean of -log sigmoid(beta [s_t d_t of the chosen - s_t d_t of the rejected]).

    The same between picture and masked picture on the chosen response, and the anchor of mDPO (Yang et al. 2025,
    `dpo_models/dpo_trainer.py`). s_t, GPT-4V's scores of sentences in the release, are here the token weights: weights='catpo'.
    Expects pairs of the model's own answers, after supervised training on them.

    Args:
        image_weight: of the term between picture and masked picture.
        anchor_weight: of the anchor.
        anchor: the reward the chosen response is held above.
        view: the masked picture.
        form: `code`, position by position, the shorter response padded with log-ratios of 0; `paper`, the log-ratios of a
            response summed inside one log-sigmoid.
    """
    check_word("opa_dpo", "form", form, FORMS)
    ratios = (stats.policy_logps - stats.reference_logps).masked_fill(~stats.mask, 0.0)  # d_t; (pair, side, token)
    under_mask = stats.view(view, "chosen")
    masked = (under_mask.policy_logps - under_mask.reference_logps).masked_fill(~stats.mask[:, 0], 0.0)
    weights = stats.token_weights.masked_fill(~stats.mask, 0.0)
    chosen, rejected, corrupted = weights[:, 0] * ratios[:, 0], weights[:, 1] * ratios[:, 1], weights[:, 0] * masked
    if form == "paper":
        chosen, rejected, corrupted = (values.sum(-1, keepdim=True) for values in (chosen, rejected, corrupted))
    exists = stats.mask.any(1) if form == "code" else torch.ones_like(chosen, dtype=torch.bool)
    preference = _mean(-F.logsigmoid(beta * (chosen - rejected)), exists)
    image = _mean(-F.logsigmoid(beta * (chosen - corrupted)), exists)
    anchored = _mean(-F.logsigmoid(beta * chosen - anchor), exists)
    losses = preference + image_weight * image + anchor_weight * anchored
    sums = (beta * chosen.sum(-1), beta * rejected.sum(-1))
    return output(losses, preference=preference, chosen=sums[0], rejected=sums[1], image=image, anchor=anchored)


def _mean(values: Float[Tensor, "pairs positions"], exists: Bool[Tensor, "pairs positions"]) -> Float[Tensor, " pairs"]:
    """Over the positions of the longer response; past the end of the shorter one its log-ratio is 0."""
    return masked_sum(values, exists) / exists.sum(-1).clamp_min(1)
