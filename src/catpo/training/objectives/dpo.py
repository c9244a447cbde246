"""DPO (Eq. 1), or TRL's other losses of its log-ratios, or a mix: hinge, ipo, robust, bco_pair, apo_zero, sft and others."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.models.tensors import masked_sum
from catpo.training.objectives import LossOutput, PairStats, output
from catpo.training.objectives._losses import LOSSES, SMOOTHED, TAU, Gains, check_loss

TYPES = [*LOSSES, "sigmoid_norm", "ipo_norm", "sft"]


def loss(
    stats: PairStats,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: Any = ("sigmoid",),
    loss_weights: Any = (),
    discopop_tau: float = TAU,
    reduction: str = "sum",
    kl_weight: float = 0.0,
    kl_direction: str = "policy||reference",
) -> LossOutput:
    """DPO: -log sigmoid(beta h), h the difference of the log-ratios summed over tokens (Eq. 1; Rafailov et al. 2023).

    Args:
        label_smoothing: share of pairs assumed to be labelled the wrong way round, in [0, 0.5): conservative DPO, `robust`; or
            the epsilon of `exo_pair`.
        loss_type: `sigmoid`, or one of docs/reference/methods.md, such as `hinge` or `apo_zero`; or several, which are added.
            `sigmoid_norm` and `ipo_norm` take means over tokens, `sft` is the mean negative log-likelihood of the chosen
            tokens.
        loss_weights: of the losses, if there are several (default: 1 each).
        discopop_tau: temperature of `discopop`.
        reduction: `sum` over tokens, or their `mean`.
        kl_weight: adds this much of the unweighted full-vocabulary KL over all response tokens; 0 is DPO proper.
    """
    shares = _shares(loss_type, loss_weights)
    _check(shares, beta, label_smoothing, discopop_tau)
    check_word("dpo", "reduction", reduction, ("sum", "mean"))

    def gains_of(ratios: Tensor) -> Gains:
        chosen, rejected = ratios.unbind(1)
        return Gains(chosen, rejected, beta, label_smoothing, discopop_tau)

    ratios = stats.policy_logps - stats.reference_logps
    means = gains_of(stats.mean(ratios))
    gains = means if reduction == "mean" else gains_of(stats.sum(ratios))
    terms = {}
    for name in shares:
        if name == "sft":
            terms[name] = -stats.mean(stats.policy_logps)[:, 0]
        else:
            terms[name] = LOSSES[name.removesuffix("_norm")](means if name.endswith("_norm") else gains)
    preference = sum((shares[name] * terms[name] for name in shares if name != "sft"), torch.zeros_like(gains.chosen))
    losses = preference + shares["sft"] * terms["sft"] if "sft" in shares else preference
    figures = {f"loss/{name}": term for name, term in terms.items()} if len(terms) > 1 else {}
    if kl_weight:
        kl = masked_sum(stats.kl(kl_direction), stats.mask)  # (pair, side)
        regulariser = kl_weight * kl.sum(1)
        losses = losses + regulariser
        figures |= {"loss/kl": regulariser, "kl/chosen": kl[:, 0], "kl/rejected": kl[:, 1]}
    return output(losses, preference=preference, chosen=beta * gains.chosen, rejected=beta * gains.rejected, figures=figures)


def _shares(loss_type: Any, loss_weights: Any) -> dict[str, float]:
    """Loss -> its weight."""
    names = [str(name) for name in _as_list(loss_type)]
    weights = _as_list(loss_weights) or [1.0] * len(names)
    are_numbers = all(type(weight) in (int, float) and math.isfinite(weight) for weight in weights)
    if not names or len(set(names)) < len(names) or len(weights) != len(names) or not are_numbers:
        raise UserError(
            f"dpo(loss_type={loss_type!r}, loss_weights={loss_weights!r}): give each loss once, and as many weights as losses, "
            "e.g. dpo(loss_type=['sigmoid', 'bco_pair', 'sft'], loss_weights=[0.8, 0.2, 1.0])."
        )
    return dict(zip(names, weights, strict=True))


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _check(names: Collection[str], beta: float, label_smoothing: float, discopop_tau: float) -> None:
    for name in names:
        check_loss("dpo", name, TYPES, beta=beta, label_smoothing=label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"dpo(label_smoothing={label_smoothing}) must lie in [0, 0.5).")
    if discopop_tau <= 0 or (discopop_tau != TAU and "discopop" not in names):
        raise UserError(f"dpo(discopop_tau={discopop_tau}) must be above 0, and is of loss_type='discopop' only.")
    if label_smoothing and not set(names) & set(SMOOTHED):
        raise UserError(f"dpo(label_smoothing={label_smoothing}): only {', '.join(SMOOTHED)} read it. Leave it out.")
