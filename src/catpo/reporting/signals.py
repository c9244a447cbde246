"""How the signals are distributed over grounded, hallucinated and all tokens, and how well each separates them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from catpo.reporting.plots import histogram
from catpo.rewards.fusion import Fusion
from catpo.rewards.quality import FINAL, SignalQuality, quality_of, read_scores
from catpo.rewards.store import RewardStore


@dataclass(frozen=True)
class SignalSection:
    """What the section shows."""

    drawings: list[tuple[str, Markup]]
    """(signal, histogram); grounded, hallucinated and all tokens have series colours 0, 1 and 2."""
    quality: list[SignalQuality]
    net_shared: float
    """Mean net coefficient of shared-prefix tokens over the pairs; NaN if nothing is fused or shared."""

    @property
    def grounded_count(self) -> int:
        return self.quality[0].overall.grounded_count if self.quality else 0

    @property
    def hallucinated_count(self) -> int:
        return self.quality[0].overall.hallucinated_count if self.quality else 0

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


def signal_section(store: RewardStore, fusion: Fusion | None) -> SignalSection:
    """Histograms, AUROC and net coefficient over the pairs of the store; of the signals only if `fusion` is None."""
    tokens = read_scores(store, fusion)
    is_text = ~tokens.is_special
    groups = (is_text & (tokens.labels == 1), is_text & (tokens.labels == 0), is_text)
    drawings = []
    for name, scores in tokens.scores.items():
        label = "T" if name == FINAL else name.partition("(")[0]  # without options: a drawing holds no text of a user
        description = f"Histogram of {name}: grounded, hallucinated and all tokens"
        drawings.append((name, histogram([scores[group] for group in groups], label=label, description=description)))
    net = tokens.net_shared
    return SignalSection(drawings, quality_of(tokens), float(np.nanmean(net)) if np.isfinite(net).any() else math.nan)
