"""Options of the fusion of signals into token weights (Eq. 6-7, 11), checked when a `Fusion` is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from catpo.core.checks import check_word
from catpo.core.errors import UserError

GLOBAL, LOCAL, SEMANTIC = "global_attention", "patch_entropy", "semantic"
"""The three signals of Eq. 6, by the names of their plugins."""
NORMALISATIONS = ("none", "minmax", "mean_calibrated", "zscore", "quantile")
WORDS = {
    "normalise": NORMALISATIONS,
    "scope": ("response", "pair"),
    "activation": ("tanh", "sigmoid"),
    "eos": ("neutral", "zero", "scored"),
    "select": ("top", "bottom"),
    "shared_prefix": ("own", "neutral"),
}
"""Options of `Fusion` that are one of a few words."""
UPPER_LIMITS = {
    **dict.fromkeys(("alpha", "token_fraction", "gamma", "delta"), 1.0),
    **dict.fromkeys(("base_weight", "temperature", "learned_rate"), math.inf),
}
"""Options of `Fusion` that are numbers from 0 to this."""


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How raw signals become weights; the defaults are the preset `paper`.

    >>> Fusion(alpha=0.3).base_weight
    0.5
    >>> Fusion(scope="pairs")
    Traceback (most recent call last):
    catpo.core.errors.UserError: fusion has no scope='pairs'. Did you mean 'pair'?
    """

    normalise: str = "minmax"
    """Applied to each signal before the sum: `minmax` to [0, 1]; `zscore` to mean 0 and deviation 1; `quantile`, the rank among
    all tokens of the store; `none`. `mean_calibrated` leaves the signals as they are and scales their sum to a mean of
    arctanh 0.5, where T is 0.5. Under tanh, `zscore` gives T = 0 to all tokens below the mean; use it with a sigmoid."""
    scope: str = "response"
    """Minimum, mean and deviation are taken over the `response` or over the `pair`."""
    alpha: float = 0.5
    """α of Eq. 6: 1 is attention only, 0 is similarity only."""
    base_weight: float = 0.5
    """λ_ref of Eq. 7."""
    activation: str = "tanh"
    """`tanh` (Eq. 7; scores below 0 count as 0, so that T stays in [0, 1)) or `sigmoid`."""
    temperature: float = 1.0
    """T = activation(s / temperature)."""
    eos: str = "neutral"
    """EOS and other special tokens weigh 1 (`neutral`), 0 (`zero`), or are treated as any token (`scored`)."""
    token_fraction: float = 1.0
    """Fraction of the chosen response's tokens that get weights of Eq. 7; the rejected response always gets them for all."""
    select: str = "top"
    """Whether `token_fraction` selects the tokens of largest T (`top`) or smallest (`bottom`)."""
    unselected: float | str = 1.0
    """Weight of the tokens not selected: 1 is plain DPO, 0 drops them, `base` is the base weight."""
    shared_prefix: str = "own"
    """`neutral`: tokens before the first difference of the responses get the mean of both sides' weights, and so cancel as in
    DPO."""
    signals: Mapping[str, float] | None = None
    """Coefficients of another sum in place of Eq. 6, e.g. {"patch_logit": 1.0}; α is then not used."""
    gamma: float | None = None
    """γ of Eq. 11, fixed; with `delta` it replaces Eq. 6."""
    delta: float | None = None
    """δ of Eq. 11, fixed."""
    learned: bool = False
    """Whether training learns γ and δ of Eq. 11, as a softmax over three numbers (Table 4). They start at `gamma` and `delta`,
    or at 0.25 each."""
    learned_rate: float = 0.01
    """Learning rate of these three numbers."""

    def __post_init__(self) -> None:
        for option, known in WORDS.items():
            check_word("fusion", option, getattr(self, option), known)
        if self.learned:
            self._check_learned()
        for option, limit in UPPER_LIMITS.items():
            value = getattr(self, option)
            if not (option in ("gamma", "delta") and value is None):
                self._set(option, _number(option, value, high=limit))
        if self.temperature == 0:
            raise UserError("fusion: temperature=0 would divide by zero. Give a small positive number, such as 0.1.")
        if self.unselected != "base":
            self._set("unselected", _number("unselected", self.unselected, otherwise=" or 'base'"))
        if self.normalise == "mean_calibrated" and self.activation == "sigmoid":
            raise UserError(
                "fusion: normalise='mean_calibrated' needs activation='tanh': a sigmoid of positive scores is above 0.5 "
                "however they are scaled. With a sigmoid use normalise='zscore'."
            )
        self._check_coefficients()

    def _set(self, option: str, value: Any) -> None:
        object.__setattr__(self, option, value)  # the way to fill in a field of a frozen dataclass

    def _check_coefficients(self) -> None:
        if (self.gamma is None) != (self.delta is None):
            raise UserError("fusion: gamma and delta (Eq. 11) go together. Give both, or neither.")
        if self.gamma is not None and self.delta is not None and self.gamma + self.delta > 1 + 1e-9:
            raise UserError(
                f"fusion: gamma + delta = {self.gamma + self.delta:g} is more than 1, which would make the coefficient of the "
                "semantic signal negative (Eq. 11). Make them smaller."
            )
        if self.signals is None:
            return
        if self.gamma is not None:
            raise UserError("fusion: signals and gamma/delta each replace Eq. 6. Give one of them.")
        if not isinstance(self.signals, Mapping) or not self.signals:
            raise UserError(f"fusion: signals={self.signals!r} is not of the form {{'patch_logit': 1.0}}.")
        numbers = {name: _number(f"signals[{name!r}]", value, low=-math.inf) for name, value in self.signals.items()}
        self._set("signals", numbers)

    def _check_learned(self) -> None:
        """Learned coefficients (Eq. 11) exclude the options that would replace the sum or select tokens."""
        for option, default in (("signals", None), ("token_fraction", 1.0), ("alpha", 0.5)):
            if getattr(self, option) != default:
                raise UserError(
                    f"fusion: learned=True learns Eq. 11 over all tokens, where {option} has no place. Leave it out."
                )
        if self.normalise == "mean_calibrated":
            raise UserError("fusion: learned=True needs signals that are normalised one by one, e.g. normalise='minmax'.")
        if self.gamma is None and self.delta is None:
            self._set("gamma", 0.25)
            self._set("delta", 0.25)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the signals that are read."""
        return tuple(self.signals) if self.signals is not None else (GLOBAL, LOCAL, SEMANTIC)


def _number(option: str, value: object, *, low: float = 0.0, high: float = math.inf, otherwise: str = "") -> float:
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and low <= number <= high:
            return number
    kind = "a number of 0 or more" if math.isinf(high) else f"a number from 0 to {high:g}"
    if math.isinf(low):
        kind = "a finite number"
    raise UserError(f"fusion: {option}={value!r} is not {kind}{otherwise}.")
