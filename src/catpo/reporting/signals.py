"""How the signals are spread over grounded, hallucinated and all tokens, and how well each tells them apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from catpo.core.types import SIDES
from catpo.data.spool import spread
from catpo.reporting.plots import histogram
from catpo.rewards.fusion import Fusion
from catpo.rewards.quality import FINAL, MEASURED_PAIRS, SignalQuality, signal_quality
from catpo.rewards.store import RewardStore

GROUPS = ("grounded", "hallucinated", "all tokens")
"""In the order of the page's series colours."""


@dataclass(frozen=True)
class SignalSection:
    """What the section shows."""

    drawings: list[tuple[str, Markup]]
    """(signal, histogram)."""
    quality: list[SignalQuality]
    grounded_count: int
    hallucinated_count: int
    net_shared: float
    """Mean net coefficient of shared-prefix tokens over the pairs; NaN if nothing is fused or shared."""

    @property
    def has_labels(self) -> bool:
        return bool(self.grounded_count and self.hallucinated_count)

    @property
    def best(self) -> SignalQuality | None:
        """The stored signal of the highest AUROC."""
        rows = [row for row in self.quality if row.signal != FINAL and not math.isnan(row.overall.value)]
        return max(rows, key=lambda row: row.overall.value, default=None)

    @property
    def final(self) -> SignalQuality | None:
        return next((row for row in self.quality if row.signal == FINAL), None)


def signal_section(store: RewardStore, fusion: Fusion | None, *, resamples: int = 1000) -> SignalSection:
    """Histograms, AUROC and net coefficient over (some of) the pairs of the store; `fusion` None: of the signals only."""
    quality = signal_quality(store, fusion, resamples=resamples)
    values, labels, net = _tokens(store, fusion)
    groups = (labels == 1, labels == 0, np.ones(len(labels), dtype=bool))
    drawings = [
        (
            name,
            histogram(
                [each[group] for group in groups],
                label=_label(name),
                description=f"Histogram of {name}: grounded, hallucinated and all tokens",
            ),
        )
        for name, each in values.items()
    ]
    overall = quality[0].overall if quality else None
    return SignalSection(
        drawings,
        quality,
        overall.grounded_count if overall else 0,
        overall.hallucinated_count if overall else 0,
        float(np.nanmean(net)) if np.isfinite(net).any() else math.nan,
    )


def _tokens(store: RewardStore, fusion: Fusion | None) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Values by signal and labels of all tokens that are text; the net coefficient of each pair."""
    values: dict[str, list[np.ndarray]] = {name: [] for name in [*store.signals, *([FINAL] if fusion else [])]}
    labels, net = [], []
    for pair_id in spread(store.pair_ids, MEASURED_PAIRS):
        weights = store.weights(pair_id, fusion) if fusion else None
        net.append(weights.net_shared_coefficient if weights else math.nan)
        for side in SIDES:
            row = store.get(pair_id, side)
            is_text = ~np.asarray(row.is_special)
            for name in store.signals:
                values[name].append(row.signals[name][is_text])
            if weights is not None:
                values[FINAL].append(getattr(weights, f"{side}_relevance")[is_text])
            labels.append(row.labels[is_text])
    return {name: np.concatenate(parts) for name, parts in values.items()}, np.concatenate(labels), np.array(net)


def _label(name: str) -> str:
    """The axis says the signal's name without its options: drawings hold no text of a user."""
    return "T" if name == FINAL else name.partition("(")[0]
