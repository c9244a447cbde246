"""V-DPO: guides the policy's log-probs away from what it would say without the picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.core.types import SIDES
from catpo.training.objectives import FORMS, LossOutput, PairStats, output
from catpo.training.pair_stats import shared_prefix_mask


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    guidance: float = 1.5,
    unconditional: str = "policy",
    view: str = "blank",
    form: str = "paper",
) -> LossOutput:
    """DPO with gamma log pi(y|v) - (gamma - 1) sg[log p_0(y|v0)] in place of the policy's log-probs (Xie et al. 2024).

    Only the policy is guided, not the reference, so the first loss is not log 2.

    Args:
        guidance: gamma; 1 is DPO, above 1 what the picture adds counts more. 0, the released script's value, is refused.
        unconditional: p_0, the current `policy` without gradient, or the `reference`.
        view: v0, what is shown instead of the picture.
        form: matters for gamma = 1 only: the `code` then counts tokens from the first difference on.
    """
    check_word("vdpo", "form", form, FORMS)
    check_word("vdpo", "unconditional", unconditional, ("policy", "reference"))
    if guidance == 0:
        raise UserError(
            "vdpo(guidance=0.0) multiplies the policy's log-probs by 0 and leaves terms without gradient, so nothing would be "
            "learned. Give a guidance above 1, such as 1.5."
        )
    counts = torch.ones_like(stats.mask)
    if form == "code" and guidance == 1:
        counts = ~shared_prefix_mask(stats.token_ids, stats.mask)[:, None]  # (pair, side, token)
    plain = (stats.policy_logps - stats.reference_logps) * counts
    guided = guidance * stats.policy_logps * counts - stats.reference_logps * counts
    if guidance != 1:
        guided = guided - (guidance - 1) * _unconditional(stats, unconditional, view)
    chosen, rejected = stats.sum(guided).unbind(1)
    margin = stats.sum(plain).detach()
    losses = -F.logsigmoid(beta * (chosen - rejected))
    preference = -F.logsigmoid(beta * (margin[:, 0] - margin[:, 1]))
    return output(losses, preference=preference, chosen=beta * margin[:, 0], rejected=beta * margin[:, 1], guided=losses)


def _unconditional(stats: PairStats, unconditional: str, view: str) -> Tensor:
    sides = [stats.view(view, side) for side in SIDES]
    is_policy = unconditional == "policy"
    return torch.stack([side.constant_policy_logps if is_policy else side.reference_logps for side in sides], dim=1)
