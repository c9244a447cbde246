"""TPO: a token counts by how much its logit drops when the picture is noised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from catpo.core.checks import check_word
from catpo.core.types import SIDES
from catpo.training.objectives import FORMS, LossOutput, PairStats, output


def loss(
    stats: PairStats, *, beta: float = 0.1, margin: float = 0.5, view: str = "noised(step=500)", form: str = "code"
) -> LossOutput:
    """DPO on log pi(y_t) and a visual reward c_t of each token (Gu et al. 2025; `tpo_trainer.py`).

    c_t = margin + sigmoid(s_t) on the chosen side, margin + 1 - sigmoid(s_t) on the rejected; s_t is the label's raw logit with
    the picture less that with the noised one. Policy and reference each have their own; gradients flow through both passes.

    Args:
        margin: a; with 0.5 c lies in (0.5, 1.5), and is 1 where the picture makes no difference.
        view: the corrupted picture.
        form: the `code` adds log c_t to the log-prob; `paper` multiplies the log-prob by c_t.
    """
    check_word("tpo", "form", form, FORMS)
    corrupted = [stats.view(view, side) for side in SIDES]
    policy_gain = stats.policy_logits - torch.stack([side.policy_logits for side in corrupted], dim=1)  # s_t
    reference_gain = stats.reference_logits - torch.stack([side.reference_logits for side in corrupted], dim=1)
    policy = _rewarded(stats.policy_logps, policy_gain, margin, form)
    reference = _rewarded(stats.reference_logps, reference_gain, margin, form)
    chosen, rejected = stats.sum(policy - reference).unbind(1)
    losses = -F.logsigmoid(beta * (chosen - rejected))
    return output(losses, preference=losses, chosen=beta * chosen, rejected=beta * rejected)


def _rewarded(logps: Tensor, gain: Tensor, margin: float, form: str) -> Tensor:
    anchored = torch.sigmoid(gain)  # sigma(s_t); (pair, side, token)
    reward = margin + torch.stack([anchored[:, 0], 1 - anchored[:, 1]], dim=1)  # c_t
    return logps + reward.log() if form == "code" else logps * reward
