"""What every objective returns, and how its options are told from those of the token weights."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
from catpo.training.pair_stats import PairStats, dummy, requirements, view_needs

FORMS = ("code", "paper")
"""Where a method's released code and its paper differ, `form` chooses; docs/methods.md says how."""
FUSION = [each.name for each in dataclasses.fields(Fusion)]
"""Options of token weights."""


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
    **more: Float[Tensor, " pairs"],
) -> LossOutput:
    """Losses with the figures every objective logs, and more of its own under `loss/`.

    Args:
        preference: the preference term by itself; log 2 as long as policy and reference are the same.
        chosen: implicit reward of the chosen response.
        rejected: implicit reward of the rejected response.
    """
    metrics = {"loss/preference": preference, "rewards/chosen": chosen, "rewards/rejected": rejected}
    metrics |= {f"loss/{name}": value for name, value in more.items()}
    return LossOutput(losses, {name: value.detach() for name, value in metrics.items()})


def check_choice(what: str, value: str, allowed: Iterable[str]) -> None:
    """Raise UserError unless `value` is one of the words an option takes; `what` names it, as in `tpo(form=…)`."""
    if value not in tuple(allowed):
        raise UserError(f"{what}='{value}' is not known. {did_you_mean(value, allowed)}")


@dataclass(frozen=True)
class Objective:
    """A loss with its options, and the fusion that makes its weights."""

    spec: Spec
    loss: Callable[..., LossOutput]
    options: dict[str, Any]
    fusion: Fusion


def build(text: str | Spec) -> Objective:
    """The objective that `name(option=value, …)` stands for, e.g. `catpo(preset='paper', shared_prefix='neutral')`.

    Options that the loss does not know are options of the token weights (`Fusion`). A `preset` is a named set of options in the
    objective's module; options given beside it win. Objectives that weigh no tokens by themselves do with
    `weights='catpo(…)'`, whose options are those of `Fusion`.

    Raises:
        UserError: no such objective, preset, view or option; or nothing would be learned with these options.
    """
    spec = parse(text)
    loss = registry.load("objectives", spec.name)
    given = dict(spec.options)
    preset = given.pop("preset", None)
    if preset is not None:
        given = {**_preset(loss, spec.name, preset), **given}
    own = keyword_options(loss)
    options = {name: value for name, value in given.items() if name in own}
    for name, value in options.items():
        check_kind(f"{spec.name}({name}={value!r})", value, own[name])
    needs = requirements(loss, options)
    of_weights = {name: value for name, value in given.items() if name not in own}
    if "weights" not in needs and "weights" in of_weights:
        loss, of_weights = _weighted(loss), _weight_options(spec.name, of_weights, own)
    elif of_weights:
        _check_weight_options(spec.name, of_weights, own, weighs="weights" in needs)
    for need in view_needs(needs):
        View.of(need.view)
    _check_learns(spec, loss, options)
    return Objective(spec, loss, options, Fusion(**of_weights))


def _preset(loss: Callable[..., Any], objective: str, name: object) -> dict[str, Any]:
    presets = getattr(sys.modules[loss.__module__], "PRESETS", {})  # stands beside the loss in its module
    if name not in presets:
        raise UserError(f"'{objective}' has no preset '{name}'. {did_you_mean(str(name), presets)}")
    return presets[name]


# ---- token weights --------------------------------------------------------------------------------------------------------


def _weighted(loss: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
    """The same loss with token weights in each of its sums."""

    def weighted(stats: PairStats, **options: Any) -> LossOutput:
        return loss(stats.weighted(), **options)

    return weighted


def _weight_options(objective: str, given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Options of `Fusion` from weights='catpo(alpha=0.3)', which says what the weights of another objective are."""
    text = given["weights"]
    spec = parse(str(text))
    if spec.name != "catpo":
        raise UserError(f"{objective}(weights={text!r}): only 'catpo', with options of its token weights, makes weights.")
    others = {name: value for name, value in given.items() if name != "weights"}
    _check_weight_options(objective, others, own, weighs=False)
    options = dict(spec.options)
    preset = options.pop("preset", None)
    if preset is not None:
        of_preset = _preset(registry.load("objectives", "catpo"), "catpo", preset)
        options = {**{name: value for name, value in of_preset.items() if name in FUSION}, **options}
    for name in options:
        if name not in FUSION:
            raise UserError(f"{objective}(weights={text!r}): the weights have no option '{name}'. {did_you_mean(name, FUSION)}")
    return options


def _check_weight_options(objective: str, given: dict[str, Any], own: dict[str, Any], *, weighs: bool) -> None:
    """What the loss does not know must be an option of its token weights; no option may go unused."""
    known = ["preset", *own, *(FUSION if weighs else ["weights"])]
    for name, value in given.items():
        if name in FUSION and not weighs:
            raise UserError(
                f"'{objective}' has no option '{name}': it weighs no tokens by itself. "
                f'Give {objective}(weights="catpo({name}={value!r})") to weigh its log-ratios.'
            )
        if name == "weights":
            raise UserError(f"'{objective}' weighs tokens by itself. Give it the options of its weights directly.")
        if name not in known:
            raise UserError(f"'{objective}' has no option '{name}'. {did_you_mean(name, known)}")


# ---- the gradient check ---------------------------------------------------------------------------------------------------


def _check_learns(spec: Spec, loss: Callable[..., LossOutput], options: dict[str, Any]) -> None:
    """Refuse options under which the loss does not depend on the policy, e.g. beta=0."""
    generator = torch.Generator().manual_seed(0)
    trained: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        value = dummy(name, tokens=5)
        if value.is_floating_point() and not name.startswith(("mask", "meta", "weights")):
            value = torch.randn(value.shape, generator=generator, dtype=torch.float64) - 3
        return trained.setdefault(name, value.requires_grad_()) if name.startswith(("policy", "kl")) else value

    losses = loss(PairStats(read), **options).losses
    gradients = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True) if losses.requires_grad else ()
    if not any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients):
        raise UserError(
            f"{spec}: the loss does not depend on the policy, its gradient is zero, so nothing would be learned. "
            "Give beta and the weights of its terms values other than 0."
        )
