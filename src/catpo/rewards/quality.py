"""Reward quality: how well each signal tells grounded object tokens from hallucinated ones. Knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catpo.core.errors import UserError
from catpo.core.intervals import auroc, bootstrap_auroc, interval
from catpo.core.types import SIDES
from catpo.data.spool import spread
from catpo.rewards.fusion import Fusion, find_signal
from catpo.rewards.store import RewardStore

FINAL = "final weight (T)"
"""Name of the row of the fused and squashed score."""
MEASURED_PAIRS = 10_000
"""A larger store is measured on so many of its pairs, spread evenly over it."""


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


def signal_quality(
    store: RewardStore, fusion: Fusion | None = None, *, resamples: int = 1000, seed: int = 0
) -> list[SignalQuality]:
    """How well every stored signal, and T of a fusion, separates grounded from hallucinated tokens.

    Only tokens that carry a label count; a store without labels gives NaN and counts of 0. Of a store with more than
    `MEASURED_PAIRS` pairs that many are read.

    Args:
        store: scored pairs with token labels.
        fusion: whose T is the last row. Left out, it is the paper's, or no row where its signals were not scored.
        resamples: of the bootstrap over pairs.
        seed: of the same.

    Raises:
        UserError: the fusion reads a signal that was not scored.
    """
    if fusion is None and _can_fuse(store):
        fusion = Fusion()
    tokens = _labelled_tokens(store, fusion)
    return [
        SignalQuality(
            name,
            overall=_separation(scores, tokens, slice(None), resamples, seed),
            chosen=_separation(scores, tokens, ~tokens["is_rejected"], resamples, seed),
            rejected=_separation(scores, tokens, tokens["is_rejected"], resamples, seed),
        )
        for name, scores in tokens["scores"].items()
    ]


def measured(pair_count: int) -> str:
    """On how many pairs of a store its signals are measured, as tables say it: `8 pairs`, `10,000 of 12,345 pairs`."""
    return f"{pair_count:,} pairs" if pair_count <= MEASURED_PAIRS else f"{MEASURED_PAIRS:,} of {pair_count:,} pairs"


def _can_fuse(store: RewardStore) -> bool:
    try:
        return bool([find_signal(dict.fromkeys(store.signals), name) for name in Fusion().needs])
    except UserError:
        return False


def _labelled_tokens(store: RewardStore, fusion: Fusion | None) -> dict[str, Any]:
    """Scores by name, and pair, side and label of every labelled token: [tokens] each."""
    scores: dict[str, list[NDArray[np.floating]]] = {name: [] for name in [*store.signals, *([FINAL] if fusion else [])]}
    pair, is_rejected, labels = [], [], []
    for number, pair_id in enumerate(spread(store.pair_ids, MEASURED_PAIRS)):
        rows = [store.get(pair_id, side) for side in SIDES]
        is_labelled = [row.labels >= 0 for row in rows]
        if not any(mask.any() for mask in is_labelled):
            continue
        weights = store.weights(pair_id, fusion) if fusion else None
        for side, row, mask in zip(SIDES, rows, is_labelled, strict=True):
            for name in store.signals:
                scores[name].append(row.signals[name][mask])
            if weights is not None:
                scores[FINAL].append(getattr(weights, f"{side}_relevance")[mask])
            pair.append(np.full(mask.sum(), number))
            is_rejected.append(np.full(mask.sum(), side == "rejected"))
            labels.append(row.labels[mask])
    return {
        "scores": {name: _joined(parts, np.float64) for name, parts in scores.items()},
        "pair": _joined(pair, np.int64),
        "is_rejected": _joined(is_rejected, np.bool_),
        "is_grounded": _joined(labels, np.int8) == 1,
    }


def _joined(parts: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def _separation(
    scores: NDArray[np.floating], tokens: Mapping[str, Any], which: slice | NDArray[np.bool_], resamples: int, seed: int
) -> Separation:
    scores, is_grounded, pair = scores[which], tokens["is_grounded"][which], tokens["pair"][which]
    grounded, hallucinated = int(is_grounded.sum()), int((~is_grounded).sum())
    if not grounded or not hallucinated:
        return Separation(math.nan, math.nan, math.nan, grounded, hallucinated)
    low, high = interval(bootstrap_auroc(scores, is_grounded, pair, resamples=resamples, seed=seed))
    return Separation(auroc(scores, is_grounded), low, high, grounded, hallucinated)
