"""Checks of a step: losses and gradients must be finite, and the first step's what they must be. Knows no trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from catpo.core.errors import UserError
from catpo.core.types import SIDES
from catpo.models.tensors import masked_sum
from catpo.training.pair_stats import Needs, PairStats, Quantity, kl_need

CAUSES = {
    "weights": "the token weights are the cause: score the pairs again in float32 (`catpo score --dtype float32`)",
    "reference_logps": "the reference's log-probs are the cause: score the pairs again in float32, or give reference='online'",
    "policy_logps": "the policy's log-probs are the cause, so its weights or activations have overflowed: lower the learning "
    "rate, leave max_grad_norm at 1, and use bf16 or float32 instead of float16",
}
"""What a loss is made of, in the order of computation, with the advice if it is the first that is not finite."""
KL = "the KL alone is the cause: policy and reference have nothing in common any more. Lower the learning rate or kl_weight"
OTHER = "the cause is in the objective alone: lower beta or the learning rate"
LOOK = "Other options need another --output; `catpo inspect` shows a pair."
CAUSE_OF_DRIFT = (
    "The stored reference comes from other weights, precision or attention implementation: score again with this model, or "
    "give reference='online'."
)
LEAST = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Least tolerance of the first loss by precision of the forward pass; 0.02 in half precision."""


def check_losses(
    losses: Tensor, metrics: Mapping[str, Tensor], made_of: Mapping[str, Tensor], pair_ids: Sequence[str], step: int
) -> None:
    """Refuse losses that are not finite.

    Args:
        losses: [pairs].
        metrics: the objective's figures of each pair; its terms are called `loss/…`.
        made_of: what the losses were computed from, by the names of `CAUSES`.
        pair_ids: of the batch.
        step: optimiser steps done before.

    Raises:
        UserError: names the pairs, the terms, the first cause, and what to change.
    """
    is_finite = torch.isfinite(losses.detach()).tolist()
    if all(is_finite):
        return
    bad = [pair for pair, fine in zip(pair_ids, is_finite, strict=True) if not fine]
    terms = [name for name, values in metrics.items() if not torch.isfinite(values).all()]
    raise UserError(
        f"The loss became {losses.detach().tolist()} at step {step} (pairs {', '.join(bad)}; "
        f"not finite: {', '.join(terms) or 'the loss itself'}): {_cause(terms, made_of)}. {LOOK}"
    )


def _cause(terms: Sequence[str], made_of: Mapping[str, Tensor]) -> str:
    for name, advice in CAUSES.items():
        if name in made_of and not torch.isfinite(made_of[name]).all():
            return advice
    return KL if [term for term in terms if term.startswith("loss/")] == ["loss/kl"] else OTHER


def rounding(dtype: torch.dtype) -> float:
    """Error of one token's log-prob in nats: half the gap between two numbers near 10, the size of a logit; 0.03 in bfloat16.

    Measured as root mean square, bfloat16 against another precision, on the built-in model: 0.014 to 0.031.
    """
    return 4 * torch.finfo(dtype).eps


def check_first_losses(
    found: Float[Tensor, " pairs"],
    preference: Callable[[PairStats], Float[Tensor, " pairs"]],
    stats: PairStats,
    needs: Needs,
    dtype: torch.dtype,
) -> None:
    """Refuse a first step whose losses say that policy and reference differ, although nothing has been trained yet.

    What the loss must be is the objective's own with the policy in place of the reference: log 2 for DPO, 1 for a hinge.
    Tokens round independently, so a pair's margin is off by `rounding` times the root of its tokens, and the loss by what such
    a margin makes of it; three of these are allowed. The KL has no sign: it is at most the square of `rounding` per token.

    Args:
        found: the preference term of each pair.
        preference: computes that term.
        stats: what the objective read of the batch.
        needs: which of it there is.
        dtype: precision of the policy's forward pass.

    Raises:
        UserError: the preference loss is not what it must be, or the KL not 0.
    """
    least, divergence = LEAST.get(dtype, 0.02), kl_need(needs)
    kl = 0.0
    with torch.no_grad():
        equal = preference(_as_if_equal(stats, needs))
        apart = preference(_as_if_equal(stats, needs, margin=rounding(dtype))) - equal
        if divergence is not None and not divergence.reward:
            kl = masked_sum(stats.read(divergence), stats.mask).sum(1).mean().item()
    loss, expected, tokens = found.mean().item(), equal.mean().item(), int(stats.mask.sum((1, 2)).max())
    tolerance = max(least, 3 * apart.abs().max().item())
    if abs(loss - expected) > tolerance or abs(kl) > max(10 * least, tokens * rounding(dtype) ** 2):
        raise UserError(
            f"First step: the preference loss is {loss:.4f} and the KL {kl:.2g}, but policy and reference are the same, "
            f"so they must be {expected:.4f} and 0. {CAUSE_OF_DRIFT}"
        )


def _as_if_equal(stats: PairStats, needs: Needs, *, margin: float = 0.0) -> PairStats:
    """A batch in float64 with the policy's log-probs as the reference's, as far as the policy computes the same ones.

    Args:
        margin: moves each pair's margin by this many nats times the root of its tokens, all by the same amount.
    """
    shift = margin / stats.mask.sum((1, 2)).sqrt()  # of a token; (pair)
    signs = torch.tensor([-1.0, 1.0], device=shift.device)  # a reference that finds the chosen response less likely
    shifts = shift[:, None, None] * signs[:, None]  # (pair, side, token)

    def read(quantity: Quantity) -> Tensor:
        policy = replace(quantity, name=quantity.name.replace("reference", "policy"))
        if quantity.name == "kl" and not quantity.reward:
            return torch.zeros_like(stats.read(quantity), dtype=torch.float64)
        if policy != quantity and policy in needs:
            return stats.read(policy).double() + (shifts if quantity.side is None else shifts[:, SIDES.index(quantity.side)])
        values = stats.read(quantity)
        return values.double() if values.is_floating_point() else values

    return PairStats(read)


def check_first_logps(policy: Tensor, reference: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
    """Refuse a first step whose log-probs differ from the reference's by more than rounding, however long the responses are.

    Args:
        policy: log-probs, [pairs, sides, tokens].
        reference: the same of the reference.
        mask: where a token exists.
        dtype: precision of the policy's forward pass.

    Raises:
        UserError: the root mean square of the difference is more than five times `rounding`.
    """
    drift = (policy.detach() - reference)[mask].square().mean().sqrt().item()
    if drift > 5 * max(LEAST.get(dtype, 0.02), rounding(dtype)):
        raise UserError(
            f"First step: the tokens' log-probs differ from the reference's by {drift:.2g} (root mean square), but policy and "
            f"reference are the same. {CAUSE_OF_DRIFT}"
        )


def check_first_gradient(norm: float) -> None:
    """Raise UserError if the norm of the first gradient is zero."""
    if norm == 0:
        raise UserError(
            "First step: the gradient norm is 0, so nothing is learned. Are all weights 0, is the loss constant, "
            "or are the trained parameters not part of the decoder?"
        )


def check_gradient(norm: float, pair_ids: Sequence[str], step: int) -> None:
    """Refuse a gradient that is not finite before it reaches the weights, or at least a checkpoint.

    Raises:
        UserError: names the pairs of the step's last batch, and what to change.
    """
    if not math.isfinite(norm):
        raise UserError(
            f"The gradient of step {step} is not finite though its losses are (last batch: pairs {', '.join(pair_ids)}). "
            f"No checkpoint holds it. Lower the learning rate, or use bf16 or float32 instead of float16. {LOOK}"
        )
