"""From signals to token weights (Eq. 6-7, 11; Fig. 1b, 4a, 4d): normalise, fuse, squash, weigh, select.

Plain NumPy on one pair at a time. Knows nothing of models, files or losses; the same signals can be fused any number of times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from catpo.core.errors import UserError, did_you_mean
from catpo.core.types import Side
from catpo.rewards.fusion_options import GLOBAL, LOCAL, SEMANTIC
from catpo.rewards.fusion_options import Fusion as Fusion

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Quantiles = Mapping[str, NDArray[np.floating]]
"""Signal -> all its values in a reward store, sorted."""
HALF_WAY = math.atanh(0.5)
"""0.5493…: the relevance at which tanh gives T = 0.5, so that equal tokens of both sides cancel."""


@dataclass(frozen=True, kw_only=True)
class ResponseSignals:
    """What the fusion reads of one response."""

    token_ids: NDArray[np.integer]
    """[tokens]"""
    is_special: Bools
    """[tokens], true for EOS and other tokens that are not text."""
    signals: Mapping[str, NDArray[np.floating]]
    """Name -> [tokens]; a name may carry its options, as in `semantic(embedding='hidden')`."""


@dataclass(frozen=True, kw_only=True)
class PairWeights:
    """Weights of a pair's tokens, and what they were made of."""

    chosen: Floats
    """w of Eq. 7, [chosen tokens]."""
    rejected: Floats
    chosen_relevance: Floats
    """T of Eq. 7, [chosen tokens]; 0.5 on special tokens that are not scored."""
    rejected_relevance: Floats
    shared_count: int
    """Tokens before the first difference of the two responses."""
    net_shared_coefficient: float
    """Mean w+ - w- over those tokens, NaN when there are none. It is 2T - 1 for equal T, whatever the base weight, and 0 in
    plain DPO; below 0, training pushes the shared (correct) words down."""


def fuse(
    chosen: ResponseSignals, rejected: ResponseSignals, fusion: Fusion | None = None, quantiles: Quantiles | None = None
) -> PairWeights:
    """Weights of both responses' tokens (Eq. 6-7).

    `fusion` is the paper's if None; only `normalise='quantile'` reads the quantiles.

    Raises:
        UserError: a signal is missing, has a wrong length, or is not finite.

    >>> def response(ids, values):
    ...     return ResponseSignals(
    ...         token_ids=np.array(ids), is_special=np.array(ids) == 2, signals={"patch_logit": np.array(values)}
    ...     )
    >>> pair = fuse(
    ...     response([5, 6, 2], [0.2, 0.8, 0.1]), response([5, 7, 2], [0.2, 0.0, 0.1]), Fusion(signals={"patch_logit": 1.0})
    ... )
    >>> pair.chosen.round(2), pair.rejected.round(2), pair.shared_count
    (array([0.5 , 1.26, 1.  ]), array([0.74, 1.5 , 1.  ]), 1)
    """
    fusion = fusion or Fusion()
    signals, is_scored = _normalised(chosen, rejected, fusion, quantiles)
    scores = [_score(of_side, fusion) for of_side in signals]  # s
    if fusion.normalise == "mean_calibrated":
        scores = _over_scope(calibrate, scores, fusion.scope)
    squashed = [squash(score, fusion.activation, fusion.temperature) for score in scores]  # T

    chosen_weights = _weights(squashed[0], "chosen", is_scored[0], fusion)
    rejected_weights = _weights(squashed[1], "rejected", is_scored[1], fusion)
    shared = shared_prefix(chosen.token_ids, rejected.token_ids)
    if fusion.shared_prefix == "neutral":
        chosen_weights[:shared] = rejected_weights[:shared] = (chosen_weights[:shared] + rejected_weights[:shared]) / 2
    net = float((chosen_weights[:shared] - rejected_weights[:shared]).mean()) if shared else math.nan
    return PairWeights(
        chosen=chosen_weights,
        rejected=rejected_weights,
        chosen_relevance=_spread(squashed[0], is_scored[0], elsewhere=0.5),
        rejected_relevance=_spread(squashed[1], is_scored[1], elsewhere=0.5),
        shared_count=shared,
        net_shared_coefficient=net,
    )


def normalised_signals(
    chosen: ResponseSignals, rejected: ResponseSignals, fusion: Fusion, quantiles: Quantiles | None = None
) -> list[tuple[Floats, Bools]]:
    """Per response, the signals of Eq. 11 before they are summed, [tokens, 3], and which tokens are scored; 0 at the others."""
    signals, is_scored = _normalised(chosen, rejected, fusion, quantiles)
    sides = []
    for of_side, scored in zip(signals, is_scored, strict=True):
        columns = [_spread(of_side[name], scored, elsewhere=0.0) for name in fusion.needs]
        sides.append((np.stack(columns, axis=1), scored))
    return sides


def normalise(values: Floats, how: str = "minmax", table: NDArray[np.floating] | None = None) -> Floats:
    """One signal of one response (or one pair) on the scale of the others: [tokens] -> [tokens].

    `none` and `mean_calibrated` return it unchanged: the latter scales the sum, see `calibrate`.

    >>> normalise(np.array([2.0, 3.0, 6.0]))
    array([0.  , 0.25, 1.  ])
    >>> normalise(np.array([2.0, 2.0]))
    array([0.5, 0.5])
    >>> normalise(np.array([2.0, 9.0]), "quantile", table=np.array([1.0, 2.0, 2.0, 3.0]))
    array([0.5, 1. ])
    """
    if not len(values) or how in ("none", "mean_calibrated"):
        return values
    if how == "minmax":
        low, high = values.min(), values.max()
        return (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    if how == "zscore":
        deviation = values.std() if values.max() > values.min() else 0.0  # rounding gives equal values a tiny deviation
        return (values - values.mean()) / deviation if deviation else np.zeros_like(values)
    if table is None or not len(table):
        raise UserError("fusion: normalise='quantile' ranks tokens among all of a reward store; without one use 'minmax'.")
    values = values.astype(table.dtype)  # the stored type, else NumPy widens the whole table at each call
    return (table.searchsorted(values, "left") + table.searchsorted(values, "right")) / (2 * len(table))  # mid-rank


def relevance(global_attention: Floats, patch_entropy: Floats, semantic: Floats, *, alpha: float = 0.5) -> Floats:
    """Unified visual relevance score s of every token (Eq. 6).

    >>> relevance(np.array([0.2]), np.array([0.6]), np.array([0.1]), alpha=0.5)
    array([0.25])
    """
    return alpha * (0.5 * global_attention + 0.5 * patch_entropy) + (1 - alpha) * semantic  # Eq. 6


def relevance_by_coefficients(
    global_attention: Floats, patch_entropy: Floats, semantic: Floats, *, gamma: float, delta: float
) -> Floats:
    """Relevance score s with a coefficient per signal (Eq. 11).

    >>> relevance_by_coefficients(np.array([0.2]), np.array([0.6]), np.array([0.1]), gamma=0.25, delta=0.25)
    array([0.25])
    """
    return gamma * global_attention + delta * patch_entropy + (1 - gamma - delta) * semantic  # Eq. 11


def calibrate(relevance: Floats) -> Floats:
    """The relevance scaled to a mean of arctanh 0.5, so that tanh gives T = 0.5 at the mean.

    Scores below 0 count as 0; if there are no others, every token gets arctanh 0.5.

    >>> np.tanh(calibrate(np.array([0.1, 0.1])))
    array([0.5, 0.5])
    """
    positive = np.maximum(relevance, 0.0)
    mean = positive.mean() if len(positive) else 0.0
    return positive * (HALF_WAY / mean) if mean > 0 else np.full_like(positive, HALF_WAY)


def squash(relevance: Floats, activation: str = "tanh", temperature: float = 1.0) -> Floats:
    """T of every token: a smooth map into [0, 1) (Sec. 3.3).

    Under tanh, scores below 0 count as 0: Eq. 7 promises T in (0, 1), and a raw cosine can be negative.

    >>> squash(np.array([-1.0, 0.0, 1.0])).round(2)
    array([0.  , 0.  , 0.76])
    >>> squash(np.array([-1.0, 0.0, 1.0]), "sigmoid").round(2)
    array([0.27, 0.5 , 0.73])
    """
    if activation == "sigmoid":
        return 0.5 * (1 + np.tanh(relevance / (2 * temperature)))  # equals 1 / (1 + exp(-s)), and never overflows
    return np.tanh(np.maximum(relevance, 0.0) / temperature)


def weigh(squashed: ArrayLike, side: Side, base_weight: float = 0.5) -> Floats:
    """Weights of one response's tokens (Eq. 7).

    Chosen tokens weigh more the better they are grounded in the image, rejected tokens the worse.

    >>> weigh([0.9, 0.1], side="chosen", base_weight=1.0)
    array([1.9, 1.1])
    >>> weigh([0.9, 0.1], side="rejected", base_weight=1.0)
    array([1.1, 1.9])
    """
    squashed = np.asarray(squashed, dtype=np.float64)
    if side == "chosen":
        return base_weight + squashed  # Eq. 7, y+
    return base_weight + (1 - squashed)  # Eq. 7, y-


def select_tokens(squashed: Floats, share: float, select: str = "top") -> Bools:
    """Which tokens get weights when only a share of them does (Fig. 1b, 4a, 4d): ⌈share · tokens⌉, ties by position.

    >>> select_tokens(np.array([0.1, 0.7, 0.7, 0.3]), 0.5)
    array([False,  True,  True, False])
    >>> select_tokens(np.array([0.1, 0.7, 0.7, 0.3]), 0.25, "bottom")
    array([ True, False, False, False])
    """
    count = math.ceil(round(share * len(squashed), 9))  # 0.07 · 100 is 7.000000000000001
    ranked = np.argsort(-squashed if select == "top" else squashed, kind="stable")
    is_selected = np.zeros(len(squashed), dtype=bool)
    is_selected[ranked[:count]] = True
    return is_selected


def shared_prefix(chosen_ids: ArrayLike, rejected_ids: ArrayLike) -> int:
    """Number of tokens before the first difference of the two responses.

    >>> shared_prefix([5, 6, 7, 2], [5, 6, 8])
    2
    """
    chosen_ids, rejected_ids = np.asarray(chosen_ids), np.asarray(rejected_ids)
    shorter = min(len(chosen_ids), len(rejected_ids))
    differs = np.flatnonzero(chosen_ids[:shorter] != rejected_ids[:shorter])
    return int(differs[0]) if len(differs) else shorter


def find_signal(signals: Mapping[str, Any], name: str) -> str:
    """The key of signal `name`: the name itself, or with the options it was stored with.

    >>> find_signal({"semantic(embedding='hidden')": ...}, "semantic")
    "semantic(embedding='hidden')"

    Raises:
        UserError: there is none, or several with different options.
    """
    if name in signals:
        return name
    matches = [key for key in signals if key.partition("(")[0] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(
            f"signal '{name}' was scored with several options: {', '.join(matches)}. "
            f"Name one in full: signals={{{matches[0]!r}: 1.0}}."
        )
    raise UserError(
        f"signal '{name}' was not scored. {did_you_mean(name, signals)} Or score again with it: `catpo list signals` shows all."
    )


def _normalised(
    chosen: ResponseSignals, rejected: ResponseSignals, fusion: Fusion, quantiles: Quantiles | None
) -> tuple[list[dict[str, Floats]], list[Bools]]:
    """Of both responses, the normalised signals at the scored tokens, and which tokens are scored."""
    is_scored, raw = [], []
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        is_special = np.asarray(response.is_special, dtype=bool)
        is_scored.append(np.ones_like(is_special) if fusion.eos == "scored" else ~is_special)
        raw.append(_scored_signals(response, side, fusion.needs, is_scored[-1]))
    normalised: list[dict[str, Floats]] = [{}, {}]
    for name in fusion.needs:
        table = quantiles[find_signal(quantiles, name)] if quantiles and fusion.normalise == "quantile" else None
        how = partial(normalise, how=fusion.normalise, table=table)
        normalised[0][name], normalised[1][name] = _over_scope(how, [signals[name] for signals in raw], fusion.scope)
    return normalised, is_scored


def _scored_signals(response: ResponseSignals, side: str, names: tuple[str, ...], is_scored: Bools) -> dict[str, Floats]:
    """The signals at the scored tokens, after checking length and finiteness."""
    signals = {}
    for name in names:
        values = np.asarray(response.signals[find_signal(response.signals, name)], dtype=np.float64)
        if values.shape != is_scored.shape:
            raise UserError(
                f"signal '{name}' of the {side} response has {len(values)} values for {len(is_scored)} tokens. "
                "Score the pair again."
            )
        if not np.isfinite(values).all():
            token = int(np.flatnonzero(~np.isfinite(values))[0])
            raise UserError(
                f"signal '{name}' of the {side} response is {values[token]} at token {token}; a weight must be a number. "
                "Score the pair again, in float32 if it was scored in half precision."
            )
        signals[name] = values[is_scored]
    return signals


def _over_scope(function: Callable[[Floats], Floats], sides: Sequence[Floats], scope: str) -> list[Floats]:
    """`function` of each response, or of both together, so that its statistics are those of the pair."""
    if scope == "response":
        return [function(values) for values in sides]
    return np.split(function(np.concatenate(sides)), [len(sides[0])])


def _score(signals: Mapping[str, Floats], fusion: Fusion) -> Floats:
    """Relevance s of the scored tokens of one response: Eq. 6, Eq. 11, or a sum of the user's."""
    if fusion.signals is not None:
        return np.sum([coefficient * signals[name] for name, coefficient in fusion.signals.items()], axis=0)
    branches = signals[GLOBAL], signals[LOCAL], signals[SEMANTIC]
    if fusion.gamma is not None and fusion.delta is not None:
        return relevance_by_coefficients(*branches, gamma=fusion.gamma, delta=fusion.delta)
    return relevance(*branches, alpha=fusion.alpha)


def _weights(squashed: Floats, side: Side, is_scored: Bools, fusion: Fusion) -> Floats:
    """Weights of all tokens of one response, from T of its scored ones."""
    weights = weigh(squashed, side, fusion.base_weight)
    if side == "chosen" and fusion.token_fraction < 1:
        unselected = fusion.base_weight if fusion.unselected == "base" else fusion.unselected
        weights = np.where(select_tokens(squashed, fusion.token_fraction, fusion.select), weights, unselected)
    return _spread(weights, is_scored, elsewhere=1.0 if fusion.eos == "neutral" else 0.0)


def _spread(values: Floats, is_scored: Bools, *, elsewhere: float) -> Floats:
    """Values of the scored tokens as values of all tokens."""
    spread = np.full(len(is_scored), elsewhere)
    spread[is_scored] = values
    return spread
