"""What every objective returns, and how its options are told from those of the token weights."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from catpo.core import registry
from catpo.core.checks import check_kind
from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import Spec, keyword_options, parse
from catpo.models.views import View
from catpo.rewards.fusion import Fusion
from catpo.rewards.word_rewards import WordReward
from catpo.training.objectives._losses import LOSSES
from catpo.training.pair_stats import PairStats, Quantity, dummy, requirements, view_needs

FORMS = ("code", "paper")
"""Where a method's released code and its paper differ, `form` chooses; docs/reference/methods.md says how."""
FUSION = [field.name for field in dataclasses.fields(Fusion)]
"""Options of token weights."""
ELSEWHERE = {name: f"dpo(loss_type='{name}')" for name in (*LOSSES, "sft")} | {
    "apo": "dpo(loss_type='apo_zero') or dpo(loss_type='apo_down')",
    "alphapo": "simpo(alpha=0.25)",
    "cpo_simpo": "simpo(nll_weight=1.0)",
}
"""Losses that have a name of their own in other libraries -> how they are given here."""


@dataclass(frozen=True)
class LossOutput:
    """Per-pair losses, and named per-pair figures for the log (detached)."""

    losses: Float[Tensor, " pairs"]
    metrics: dict[str, Float[Tensor, " pairs"]]


def output(
    losses: Float[Tensor, " pairs"],
    *,
    preference: Float[Tensor, " pairs"],
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    figures: Mapping[str, Float[Tensor, " pairs"]] | None = None,
    **terms: Float[Tensor, " pairs"],
) -> LossOutput:
    """Losses with the figures every objective logs.

    Args:
        preference: the preference term by itself. The first step checks that it is what the loss makes of equal log-probs of
            policy and reference.
        chosen: implicit reward of the chosen response.
        rejected: implicit reward of the rejected response.
        figures: more figures, by the name in the log.
        terms: other terms of the loss, logged as `loss/NAME`.
    """
    metrics = {"loss/preference": preference, "rewards/chosen": chosen, "rewards/rejected": rejected}
    metrics |= {f"loss/{name}": value for name, value in terms.items()} | dict(figures or {})
    return LossOutput(losses, {name: value.detach() for name, value in metrics.items()})


@dataclass(frozen=True)
class Objective:
    """A loss with its options, and the fusion that makes its weights."""

    spec: Spec
    loss: Callable[..., LossOutput]
    options: dict[str, Any]
    fusion: Fusion
    ranks: bool = True
    """Whether the loss depends on which response is the chosen one."""

    def preference(self, stats: PairStats) -> Float[Tensor, " pairs"]:
        """The preference term by itself, of each pair; detached."""
        return self.loss(stats, **self.options).metrics["loss/preference"]


def build(text: str | Spec) -> Objective:
    """The objective that `name(option=value, …)` stands for, e.g. `catpo(preset='paper', shared_prefix='neutral')`.

    Options that the loss does not know are options of the token weights (`Fusion`). A `preset` is a named set of options in the
    objective's module; options given beside it win. Objectives that do not weight tokens themselves do so with
    `weights='catpo(…)'`, whose options are those of `Fusion`.

    Raises:
        UserError: no such objective, preset, view or option; or nothing would be learned with these options.
    """
    spec = parse(text)
    if spec.name in ELSEWHERE and spec.name not in registry.names("objectives"):
        raise UserError(f"'{spec.name}' is an option of another objective. Give {ELSEWHERE[spec.name]}.")
    loss = registry.load("objectives", spec.name)
    given = _with_preset(spec, loss)
    own = keyword_options(loss)
    options = {name: value for name, value in given.items() if name in own}
    others = {name: value for name, value in given.items() if name not in own}
    for name, value in options.items():
        check_kind(f"{spec.name}({name}={value!r})", value, own[name])
    needs = requirements(loss, options)
    weighs = Quantity("weights") in needs
    _check_others(spec.name, others, ["preset", *own], weighs=weighs)
    if "weights" in others:
        loss, others = _weighted(loss), _weight_options(spec.name, others["weights"])
    for need in view_needs(needs):
        View.of(str(need.view))
    for need in needs:
        if need.reward:
            WordReward.of(need.reward)
    _check_learns(spec, loss, options)
    return Objective(spec, loss, options, Fusion(**others), ranks=_ranks(loss, options))


def _with_preset(spec: Spec, loss: Callable[..., Any]) -> dict[str, Any]:
    """The options of a specification, added to those of the preset it names."""
    options = dict(spec.options)
    preset = options.pop("preset", None)
    if preset is None:
        return options
    presets = getattr(sys.modules[loss.__module__], "PRESETS", {})  # stands beside the loss in its module
    if preset not in presets:
        raise UserError(f"'{spec.name}' has no preset '{preset}'. {did_you_mean(str(preset), presets)}")
    return {**presets[preset], **options}


# ---- token weights --------------------------------------------------------------------------------------------------------


def _check_others(objective: str, others: Mapping[str, Any], own: list[str], *, weighs: bool) -> None:
    """Options that the loss does not know must be options of its token weights, or give it some."""
    known = FUSION if weighs else ["weights"]
    for name, value in others.items():
        if name in FUSION and not weighs:
            raise UserError(
                f"'{objective}' has no option '{name}': it does not weight tokens itself. "
                f'Give {objective}(weights="catpo({name}={value!r})") to weight its log-ratios.'
            )
        if name == "weights" and weighs:
            raise UserError(f"'{objective}' weights tokens itself. Give it the options of its weights directly.")
        if name not in known:
            raise UserError(f"'{objective}' has no option '{name}'. {did_you_mean(name, [*own, *known])}")


def _weighted(loss: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
    """The same loss with token weights in each of its sums."""

    @wraps(loss)
    def weighted(stats: PairStats, **options: Any) -> LossOutput:
        return loss(stats.weighted(), **options)

    return weighted


def _weight_options(objective: str, text: object) -> dict[str, Any]:
    """Options of `Fusion` from weights='catpo(alpha=0.3)', by which another objective gets token weights."""
    spec = parse(str(text))
    if spec.name != "catpo":
        raise UserError(f"{objective}(weights={text!r}): only 'catpo', with options of its token weights, makes weights.")
    for name in spec.options:
        if name not in ("preset", *FUSION):
            raise UserError(f"{objective}(weights={text!r}): the weights have no option '{name}'. {did_you_mean(name, FUSION)}")
    options = _with_preset(spec, registry.load("objectives", "catpo"))
    return {name: value for name, value in options.items() if name in FUSION}  # a preset sets options of the loss too


# ---- does it rank? --------------------------------------------------------------------------------------------------------


def _ranks(loss: Callable[..., LossOutput], options: dict[str, Any]) -> bool:
    """Whether the loss changes when chosen and rejected change places."""
    needs = requirements(loss, options)
    if view_needs(needs):
        return True
    generator = torch.Generator().manual_seed(0)
    values: dict[Quantity, Tensor] = {}
    for need in sorted(needs, key=str):
        value = dummy(need, tokens=5)
        is_drawn = value.is_floating_point() and need.name not in ("mask", "meta")
        values[need] = torch.rand(value.shape, generator=generator, dtype=torch.float64) - 3 if is_drawn else value

    def swapped(need: Quantity) -> Tensor:
        return values[need] if need.name == "meta" else values[need].flip(1)

    return not torch.allclose(loss(PairStats(values.__getitem__), **options).losses, loss(PairStats(swapped), **options).losses)


# ---- the gradient check ---------------------------------------------------------------------------------------------------


def _check_learns(spec: Spec, loss: Callable[..., LossOutput], options: dict[str, Any]) -> None:
    """Refuse options under which the loss does not depend on the policy, e.g. beta=0."""
    if not any(_has_gradient(loss, options, is_swapped) for is_swapped in (False, True)):
        raise UserError(
            f"{spec}: the loss does not depend on the policy, its gradient is zero, so nothing would be learned. "
            "Give beta and the weights of its terms values other than 0."
        )


def _has_gradient(loss: Callable[..., LossOutput], options: dict[str, Any], is_swapped: bool) -> bool:
    """Whether the loss of a random pair has one; a hinge has none in one of the pair's two orders."""
    generator = torch.Generator().manual_seed(0)
    trained: dict[Quantity, Tensor] = {}

    def read(quantity: Quantity) -> Tensor:
        if quantity in trained:
            return trained[quantity]
        value = dummy(quantity, tokens=5)
        if value.is_floating_point() and quantity.name not in ("mask", "meta", "weights"):
            value = torch.randn(value.shape, generator=generator, dtype=torch.float64) - 3
            value = value.flip(1) if is_swapped and quantity.view is None else value
        if quantity.name.startswith(("policy", "kl")):  # what the policy computes with gradient
            trained[quantity] = value.requires_grad_()
        return value

    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has switched off
        total = loss(PairStats(read), **options).losses.sum()
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True) if total.requires_grad else ()
    return any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)
