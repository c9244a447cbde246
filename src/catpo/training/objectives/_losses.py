"""Losses of a pair by the names that TRL gives them, from one number per response. Knows nothing of tokens or models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from catpo.core.checks import check_word
from catpo.core.errors import UserError

TAU = 0.05
"""Temperature of `discopop`, as its authors recommend."""


@dataclass(frozen=True)
class Gains:
    """What the policy has gained on each response, as a log-ratio, or a log-prob if there is no reference; and the options."""

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = TAU

    @property
    def margin(self) -> Float[Tensor, " pairs"]:
        """h, gain of the chosen less that of the rejected response."""
        return self.chosen - self.rejected


def sigmoid(gains: Gains) -> Float[Tensor, " pairs"]:
    """DPO: log(1 + exp(-beta h)), mixed with that of the swapped pair (Rafailov et al. 2023; Mitchell 2023)."""
    h, share = gains.beta * gains.margin, gains.label_smoothing
    return -(1 - share) * F.logsigmoid(h) - share * F.logsigmoid(-h)


def hinge(gains: Gains) -> Float[Tensor, " pairs"]:
    """SLiC: 1 - beta h, at least 0 (Zhao et al. 2023; normalised as by Liu et al. 2024)."""
    return torch.relu(1 - gains.beta * gains.margin)


def ipo(gains: Gains) -> Float[Tensor, " pairs"]:
    """(h - 1 / 2 beta)^2 (Azar et al. 2023, Eq. 17)."""
    return (gains.margin - 1 / (2 * gains.beta)) ** 2


def exo_pair(gains: Gains) -> Float[Tensor, " pairs"]:
    """KL[(sigmoid(beta h), sigmoid(-beta h)) || (1 - label_smoothing, label_smoothing)] (Ji et al. 2024, Eq. 16)."""
    h, epsilon = gains.beta * gains.margin, gains.label_smoothing
    right = torch.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-epsilon))
    return right + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(epsilon))


def nca_pair(gains: Gains) -> Float[Tensor, " pairs"]:
    """-log sigmoid(beta c) - log sigmoid(-beta c) / 2 - log sigmoid(-beta r) / 2 (Chen et al. 2024)."""
    chosen, rejected = gains.beta * gains.chosen, gains.beta * gains.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(gains: Gains) -> Float[Tensor, " pairs"]:
    """An unbiased estimate of DPO's loss if a share of the pairs is the wrong way round (Chowdhury et al. 2024)."""
    h, share = gains.beta * gains.margin, gains.label_smoothing
    return (share * F.logsigmoid(-h) - (1 - share) * F.logsigmoid(h)) / (1 - 2 * share)


def bco_pair(gains: Gains) -> Float[Tensor, " pairs"]:
    """-log sigmoid(beta c) - log sigmoid(-beta r) (Jung et al. 2024, without the moving reward shift, as in TRL)."""
    return -F.logsigmoid(gains.beta * gains.chosen) - F.logsigmoid(-gains.beta * gains.rejected)


def sppo_hard(gains: Gains) -> Float[Tensor, " pairs"]:
    """(c - 1 / 2 beta)^2 + (r + 1 / 2 beta)^2 (Wu et al. 2024, Eq. 4.7 with probabilities 1 and 0)."""
    target = 1 / (2 * gains.beta)
    return (gains.chosen - target) ** 2 + (gains.rejected + target) ** 2


def apo_zero(gains: Gains) -> Float[Tensor, " pairs"]:
    """1 - sigmoid(beta c) + sigmoid(beta r), for answers better than the model's own (D'Oosterlinck et al. 2024, Eq. 7)."""
    return 1 - torch.sigmoid(gains.beta * gains.chosen) + torch.sigmoid(gains.beta * gains.rejected)


def apo_down(gains: Gains) -> Float[Tensor, " pairs"]:
    """sigmoid(beta c) + 1 - sigmoid(beta h), for answers worse than the model's own (D'Oosterlinck et al. 2024, Eq. 8)."""
    return torch.sigmoid(gains.beta * gains.chosen) + 1 - torch.sigmoid(gains.beta * gains.margin)


def discopop(gains: Gains) -> Float[Tensor, " pairs"]:
    """DPO's loss and exp(-beta h), blended by sigmoid(beta h / tau) (Lu et al. 2024, Eq. 5)."""
    h = gains.beta * gains.margin
    log_share = F.logsigmoid(h / gains.discopop_tau)
    return -F.logsigmoid(h) * (1 - log_share.exp()) + torch.exp(log_share - h)  # one exponent: a product could be 0 * infinity


LOSSES: dict[str, Callable[[Gains], Tensor]] = {
    each.__name__: each
    for each in (
        sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, discopop,
    )
}  # fmt: skip
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair")
"""Losses that read `label_smoothing`."""
SORTED = ("aot", "aot_unpaired")
"""TRL's losses that are not offered."""


def check_loss(owner: str, name: object, known: Sequence[str], *, beta: float, label_smoothing: float) -> None:
    """Raise UserError unless an objective has the loss, and the options fit it."""
    if name in SORTED:
        raise UserError(
            f"{owner}(loss_type='{name}') is not offered: it sorts log-ratios across the batch, so a pair's loss would depend "
            f"on the pairs beside it and on the batch size. Give one of {', '.join(known)}."
        )
    check_word(owner, "loss_type", name, known)
    given = f"{owner}(loss_type='{name}', "
    if name in ("ipo", "ipo_norm", "sppo_hard") and beta <= 0:
        raise UserError(f"{given}beta={beta}): the target margin is 1 / (2 beta). Give a positive beta.")
    if name == "exo_pair" and label_smoothing == 0:
        raise UserError(f"{given}label_smoothing=0.0) is infinite. Give a label_smoothing above 0, such as 0.001.")
