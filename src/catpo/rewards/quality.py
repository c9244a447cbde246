"""Reward quality: how well each signal separates grounded object tokens from hallucinated ones. Knows nothing of models."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from catpo.core.errors import UserError
from catpo.core.intervals import auroc_between
from catpo.core.types import SIDES
from catpo.data.spool import spread
from catpo.rewards.fusion import Bools, Floats, Fusion, find_signal
from catpo.rewards.store import RewardStore

FINAL = "final weight (T)"
"""Name of the row of the fused and squashed score."""
MEASURED_PAIRS = 10_000
"""Of a larger store, this many pairs are measured, spread evenly over it."""


@dataclass(frozen=True)
class Separation:
    """AUROC of a score for grounded (positive) against hallucinated object tokens."""

    value: float
    """0.5 is chance, 1 perfect; NaN when one of the two kinds does not occur."""
    low: float
    """Lower end of the 95 % interval, from a bootstrap over pairs."""
    high: float
    grounded_count: int
    hallucinated_count: int


@dataclass(frozen=True)
class SignalQuality:
    """One row of the table."""

    signal: str
    overall: Separation
    chosen: Separation
    rejected: Separation


@dataclass(frozen=True)
class TokenScores:
    """Scores and labels of the tokens of a store, or of `MEASURED_PAIRS` of its pairs."""

    scores: dict[str, NDArray[np.floating]]
    """Signal -> [tokens], and T as `FINAL` where there is a fusion."""
    labels: NDArray[np.integer]
    """[tokens], as in `ResponseRow`."""
    pair: NDArray[np.integer]
    """[tokens], number of the token's pair."""
    is_rejected: Bools
    """[tokens]"""
    is_special: Bools
    """[tokens]"""
    net_shared: Floats
    """[pairs], net coefficient of the shared prefix (see `PairWeights`); NaN without a prefix or a fusion."""


def signal_quality(
    store: RewardStore, fusion: Fusion | None = None, *, resamples: int = 1000, seed: int = 0
) -> list[SignalQuality]:
    """How well every stored signal, and T of a fusion, separates grounded from hallucinated tokens.

    Only labelled tokens count; a store without labels gives NaN and counts of 0.

    Args:
        store: scored pairs with token labels.
        fusion: whose T is the last row. If None, the paper's, or no such row where its signals were not scored.
        resamples: of the bootstrap over pairs.
        seed: of the bootstrap.

    Raises:
        UserError: the fusion reads a signal that was not scored.
    """
    if fusion is None and can_fuse(store, Fusion()):
        fusion = Fusion()
    return quality_of(read_scores(store, fusion), resamples=resamples, seed=seed)


def can_fuse(store: RewardStore, fusion: Fusion) -> bool:
    """Whether the store holds all signals that a fusion reads."""
    try:
        return all(find_signal(dict.fromkeys(store.signals), name) for name in fusion.needs)
    except UserError:
        return False


def read_scores(store: RewardStore, fusion: Fusion | None) -> TokenScores:
    """Signals of the store's tokens, and T of the fusion.

    Raises:
        UserError: the fusion reads a signal that was not scored.
    """
    scores: dict[str, list[NDArray[np.floating]]] = {name: [] for name in [*store.signals, *([FINAL] if fusion else [])]}
    labels, pair, is_rejected, is_special, net_shared = [], [], [], [], []
    for number, pair_id in enumerate(spread(store.pair_ids, MEASURED_PAIRS)):
        weights = store.weights(pair_id, fusion) if fusion else None
        net_shared.append(weights.net_shared_coefficient if weights else math.nan)
        for side in SIDES:
            row = store.get(pair_id, side)
            for name in store.signals:
                scores[name].append(row.signals[name])
            if weights is not None:
                scores[FINAL].append(getattr(weights, f"{side}_relevance"))
            labels.append(row.labels)
            pair.append(np.full(len(row.labels), number))
            is_rejected.append(np.full(len(row.labels), side == "rejected"))
            is_special.append(row.is_special)
    return TokenScores(
        scores={name: np.concatenate(parts) for name, parts in scores.items()},
        labels=np.concatenate(labels),
        pair=np.concatenate(pair),
        is_rejected=np.concatenate(is_rejected),
        is_special=np.concatenate(is_special),
        net_shared=np.array(net_shared),
    )


def quality_of(tokens: TokenScores, *, resamples: int = 1000, seed: int = 0) -> list[SignalQuality]:
    """A row per score: AUROC over the labelled tokens of both sides, of chosen and of rejected responses."""
    is_labelled = tokens.labels >= 0
    rows = []
    for name, scores in tokens.scores.items():
        parts = []
        for part in (is_labelled, is_labelled & ~tokens.is_rejected, is_labelled & tokens.is_rejected):
            parts.append(_separation(scores[part], tokens.labels[part] == 1, tokens.pair[part], resamples, seed))
        rows.append(SignalQuality(name, *parts))
    return rows


def measured(pair_count: int) -> str:
    """On how many pairs of a store its signals are measured, as tables say it.

    >>> measured(8), measured(12_345)
    ('8 pairs', '10,000 of 12,345 pairs')
    """
    return f"{pair_count:,} pairs" if pair_count <= MEASURED_PAIRS else f"{MEASURED_PAIRS:,} of {pair_count:,} pairs"


def _separation(
    scores: NDArray[np.floating], is_grounded: Bools, pair: NDArray[np.integer], resamples: int, seed: int
) -> Separation:
    grounded, hallucinated = int(is_grounded.sum()), int((~is_grounded).sum())
    return Separation(*auroc_between(scores, is_grounded, pair, resamples=resamples, seed=seed), grounded, hallucinated)
