"""TARS: mDPO's picture term on texts with random tokens in them, so that the model looks rather than guesses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from catpo.core.spec import Spec
from catpo.core.types import Side
from catpo.training.objectives import LossOutput, PairStats, ViewStats, output


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    share: float = 0.05,
    image_weight: float = 1.0,
    view: str = "noised(step=500)",
) -> LossOutput:
    """-log sigmoid(beta h) - log sigmoid(beta [Delta_w - Delta_w at v']), all on perturbed texts (Zhang et al. 2026).

    Random tokens replace a share of those of prompt and responses, and do not count. The release means to draw them by CLIP
    similarity, but nothing in it computes that; here all tokens are equally likely. Its third term, on the spectrum of the
    input embeddings, has no gradient while embeddings and projector are frozen, and is left out.

    Args:
        share: of the tokens that are replaced.
        image_weight: of the term between picture and corrupted picture.
        view: the corrupted picture.
    """
    text = str(Spec("perturbed", {"share": share}))
    chosen = _ratio(stats, stats.view(text, "chosen"), "chosen")
    rejected = _ratio(stats, stats.view(text, "rejected"), "rejected")
    corrupted = _ratio(stats, stats.view(str(Spec("perturbed", {"share": share, "picture": view})), "chosen"), "chosen")
    preference = -F.logsigmoid(beta * (chosen - rejected))
    image = -F.logsigmoid(beta * (chosen - corrupted))
    losses = preference + image_weight * image
    return output(losses, preference=preference, chosen=beta * chosen, rejected=beta * rejected, image=image)


def _ratio(stats: PairStats, view: ViewStats, side: Side) -> Tensor:
    """Sum of the log-ratios of the tokens that were not replaced."""
    return stats.sum((view.policy_logps - view.reference_logps).masked_fill(~view.mask, 0.0), side)
