"""What every objective returns, and how its options are told from those of the token weights."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from catpo import registry
from catpo.errors import UserError, did_you_mean
from catpo.fusion import Fusion
from catpo.spec import Spec, check_kind, keyword_options, parse


@dataclass(frozen=True)
class LossOutput:
    """Per-pair losses, and named per-pair figures for the log (detached)."""

    losses: Float[Tensor, " pairs"]
    metrics: dict[str, Float[Tensor, " pairs"]]


@dataclass(frozen=True)
class Objective:
    """A loss with its options, and the fusion that makes its weights."""

    spec: Spec
    loss: Callable[..., LossOutput]
    options: dict[str, Any]
    fusion: Fusion


def build(text: str | Spec) -> Objective:
    """The objective that `name(option=value, …)` stands for, e.g. `catpo(preset='paper', shared='neutral')`.

    Options that the loss does not know are options of the token weights (`Fusion`). A `preset` is a named set of options in the
    objective's module; options given beside it win.

    Raises:
        UserError: no such objective, preset or option.
    """
    spec = parse(text)
    loss = registry.load("objectives", spec.name)
    given = dict(spec.options)
    preset = given.pop("preset", None)
    if preset is not None:
        given = {**_preset(loss, spec.name, preset), **given}
    loss_names = keyword_options(loss)
    known = {"preset": "paper", **{each.name: None for each in dataclasses.fields(Fusion)}, **loss_names}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"'{spec.name}' has no option '{name}'. {did_you_mean(name, known)}")
        check_kind(f"{spec.name}({name}={value!r})", value, known[name])
    options = {name: value for name, value in given.items() if name in loss_names}
    fusion = Fusion(**{name: value for name, value in given.items() if name not in loss_names})
    return Objective(spec, loss, options, fusion)


def _preset(loss: Callable[..., Any], objective: str, name: object) -> dict[str, Any]:
    presets = getattr(sys.modules[loss.__module__], "PRESETS", {})  # stands beside the loss in its module
    if name not in presets:
        raise UserError(f"'{objective}' has no preset '{name}'. {did_you_mean(str(name), presets)}")
    return presets[name]
