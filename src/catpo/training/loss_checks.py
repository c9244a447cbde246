"""What to say when a loss or a gradient is no number any more: which pairs, which term, what to change. Knows no trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from catpo.core.errors import UserError

CAUSES = {
    "weights": "the token weights are the cause: score the pairs again in float32 (`catpo score --dtype float32`)",
    "reference_logps": "the reference's log-probs are the cause: score the pairs again in float32, or give reference='online'",
    "policy_logps": "the policy's log-probs are the cause, so its weights or activations have overflowed: lower the learning "
    "rate, leave max_grad_norm at 1, and use bf16 or float32 instead of float16",
}
"""What a loss is made of, in the order in which one becomes the next, with the advice where it is the first to go."""
KL = "the KL alone is the cause, policy and reference have nothing in common any more: lower the learning rate or kl_weight"
OTHER = "the cause is in the objective alone: lower beta or the learning rate"
LOOK = "Go on from the last checkpoint with --resume; `catpo inspect` shows a pair."


def check_losses(
    losses: Tensor, metrics: Mapping[str, Tensor], made_of: Mapping[str, Tensor], pair_ids: Sequence[str], step: int
) -> None:
    """Refuse losses that are not finite.

    Args:
        losses: [pairs].
        metrics: what the objective tells of each pair; its terms are called `loss/…`.
        made_of: what the losses were computed from, by the names of `CAUSES`.
        pair_ids: of the batch.
        step: optimiser steps done before.

    Raises:
        UserError: names the pairs, the terms, the first cause, and what to change.
    """
    bad = [pair for pair, is_finite in zip(pair_ids, torch.isfinite(losses.detach()).tolist(), strict=True) if not is_finite]
    if not bad:
        return
    terms = [name for name, values in metrics.items() if not torch.isfinite(values).all()]
    raise UserError(
        f"The loss became {losses.detach().tolist()} at step {step} (pairs {', '.join(bad)}; "
        f"not finite: {', '.join(terms) or 'the loss itself'}): {_cause(terms, made_of)}. {LOOK}"
    )


def _cause(terms: Sequence[str], made_of: Mapping[str, Tensor]) -> str:
    for name, advice in CAUSES.items():
        if name in made_of and not torch.isfinite(made_of[name]).all():
            return advice
    losses = [term for term in terms if term.startswith("loss/")]
    return KL if losses == ["loss/kl"] else OTHER


def check_gradient(norm: float, pair_ids: Sequence[str], step: int) -> None:
    """Refuse a gradient that is not finite before it goes into the weights, or at least into a checkpoint.

    Raises:
        UserError: names the pairs of the step's last batch, and what to change.
    """
    if not math.isfinite(norm):
        raise UserError(
            f"The gradient of step {step} is not finite though its losses are (last batch: pairs {', '.join(pair_ids)}). "
            "No checkpoint holds it. Lower the learning rate, or use bf16 or float32 instead of float16. " + LOOK
        )


def check_first_gradient(norm: float) -> None:
    """Refuse to train on where nothing would be learned.

    Raises:
        UserError: the norm is zero.
    """
    if norm == 0:
        raise UserError(
            "First step: the gradient norm is 0, so nothing is learned. Are all weights 0, is the loss constant, "
            "or are the trained parameters not part of the decoder?"
        )
