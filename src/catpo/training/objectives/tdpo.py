"""TDPO: DPO with a margin for how far each response's distributions have moved from the reference."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.models.tensors import masked_sum
from catpo.training.objectives import FORMS, LossOutput, PairStats, output

DEFAULT_VERSION = {"code": 1, "paper": 2}
"""The released configuration runs TDPO1 whatever the command says; TDPO2 is what the paper recommends."""


def loss(
    stats: PairStats, *, beta: float = 0.1, version: int | None = None, alpha: float = 0.5, form: str = "paper"
) -> LossOutput:
    """-log sigmoid(beta [h - (K_l - K_w)]), K the sum of KL[ref || policy] over the whole vocabulary (Zeng et al. 2024).

    Args:
        version: 1 as above; 2 takes alpha (K_l - sg[K_w]), without gradient through K_w.
        alpha: of version 2.
        form: decides the version if none is given: the released `code` runs 1, the `paper` recommends 2.
    """
    check_word("tdpo", "form", form, FORMS)
    version = DEFAULT_VERSION[form] if version is None else version
    if version not in (1, 2):
        raise UserError(f"tdpo(version={version!r}): there are versions 1 and 2.")
    chosen, rejected = stats.sum(stats.policy_logps - stats.reference_logps).unbind(1)
    moved_chosen, moved_rejected = masked_sum(stats.kl("reference||policy"), stats.mask).unbind(1)  # K_w, K_l
    margin = moved_rejected - moved_chosen if version == 1 else alpha * (moved_rejected - moved_chosen.detach())
    losses = -F.logsigmoid(beta * (chosen - rejected - margin))
    rewards = beta * (chosen + moved_chosen), beta * (rejected + moved_rejected)
    figures = {"kl/chosen": moved_chosen, "kl/rejected": moved_rejected}
    return output(losses, preference=losses, chosen=rewards[0], rejected=rewards[1], figures=figures)
