"""RRPO: a margin over the phrases that differ, and a KL on the chosen response."""

from __future__ import annotations

import torch.nn.functional as F

from catpo.models.tensors import masked_sum
from catpo.training.objectives import LossOutput, PairStats, output
from catpo.training.objectives._changed_tokens import changed_mask


def loss(stats: PairStats, *, beta: float = 0.1, alpha: float = 0.01, block: int = 1) -> LossOutput:
    """-log sigmoid(beta h over differing phrases) + alpha sum KL[ref || policy] of the chosen (Sarkar et al. 2025).

    The released data marks its phrases; here a phrase is what lies between two matching blocks of the responses.

    Args:
        alpha: of the KL; the authors use 0.01 to 0.1.
        block: shortest run of equal tokens that ends a phrase.
    """
    phrases = changed_mask(stats, block=block, one_sided=True)
    chosen, rejected = stats.sum(phrases * (stats.policy_logps - stats.reference_logps)).unbind(1)
    losses = preference = -F.logsigmoid(beta * (chosen - rejected))
    figures = {}
    if alpha:
        kl = masked_sum(stats.kl("reference||policy"), stats.mask)[:, 0]
        losses = preference + alpha * kl
        figures = {"loss/kl": alpha * kl, "kl/chosen": kl}
    return output(losses, preference=preference, chosen=beta * chosen, rejected=beta * rejected, figures=figures)
