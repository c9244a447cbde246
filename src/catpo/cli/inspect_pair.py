"""One pair in the terminal: words coloured by a signal or the weight, with values under labelled words. Knows no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from catpo.core.errors import UserError, did_you_mean
from catpo.core.types import SIDES, Side
from catpo.rewards.fusion import Fusion, PairWeights, find_signal
from catpo.rewards.store import ResponseRow, RewardStore
from catpo.text.words import Word, merge, plain, words

WEIGHT, RELEVANCE, LOGPS = "weight", "relevance", "logps"
STEPS = 5
MARKS = {"grounded": "✓", "hallucinated": "✗"}
BELOW = ("#084594", "#2171b5", "#4292c6", "#9ecae1", "#deebf7")
"""Blue, from far below the centre to near it; with `ABOVE` told apart by colour-blind readers too."""
ABOVE = ("#feedde", "#fdbe85", "#fd8d3c", "#d94801", "#8c2d04")
"""Orange, from near the centre to far above it."""


def inspect_pair(
    store: RewardStore | str | Path, pair: str, *, signal: str = WEIGHT, fusion: Fusion | None = None
) -> RenderableType:
    """Both responses of a pair for `rich.print`.

    Args:
        store: reward store, or its folder.
        pair: its id, or a beginning of it that no other pair has.
        signal: what colours the words: `weight`, `relevance` (T), `logps`, or a stored signal.
        fusion: how weights are made; the paper's if None.

    Raises:
        UserError: no such store, pair or signal, or the weights cannot be made from the store's signals.
    """
    opened = store if isinstance(store, RewardStore) else RewardStore.open(store)
    pair_id = _find_pair(opened, pair)
    name = _find_column(opened, signal)
    weights = opened.weights(pair_id, fusion) if name in (WEIGHT, RELEVANCE) else None
    rows = {side: opened.get(pair_id, side) for side in SIDES}
    values = {side: _values(rows[side], side, name, weights) for side in SIDES}
    scale = _Scale.of(np.concatenate([values[side][~rows[side].is_special] for side in SIDES]), name)
    panels = [_response(rows[side], values[side], scale) for side in SIDES]
    return Group(_heading(pair_id, name, weights), scale.legend(), *panels)


def _find_pair(store: RewardStore, pair: str) -> str:
    if pair in store:
        return pair
    found = [each for each in store if pair and each.startswith(pair)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{len(found)} pairs begin with '{pair}': {', '.join(found[:3])}, … Give more of the id.")
    raise UserError(f"{store.path} has no pair '{pair}'. Give one that it has; the first are {', '.join(store.pair_ids[:3])}.")


def _find_column(store: RewardStore, signal: str) -> str:
    if signal in (WEIGHT, RELEVANCE, LOGPS):
        return signal
    try:
        return find_signal(dict.fromkeys(store.signals), signal)
    except UserError:
        known = [WEIGHT, RELEVANCE, LOGPS, *store.signals]
        raise UserError(f"'{signal}' is not in {store.path}. {did_you_mean(signal, known)}") from None


def _values(row: ResponseRow, side: Side, name: str, weights: PairWeights | None) -> np.ndarray:
    """[tokens]"""
    if weights is not None:
        return getattr(weights, side if name == WEIGHT else f"{side}_relevance")
    return np.asarray(row.logps if name == LOGPS else row.signals[name], dtype=np.float64)


class _Scale:
    """Where a value lies between the lowest and the highest of the pair."""

    def __init__(self, low: float, high: float, centre: float | None) -> None:
        self.low, self.high, self.centre = low, high, centre

    @classmethod
    def of(cls, values: np.ndarray, name: str) -> _Scale:
        """Weights are seen from 1 (plain DPO), signals with a sign from 0, others from their lowest."""
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        centre = 1.0 if name == WEIGHT else 0.0 if low < 0 < high else None
        if centre is None:
            return cls(low, high, None)
        reach = max(high - centre, centre - low) or 1.0
        return cls(centre - reach, centre + reach, centre)

    def style(self, value: float) -> Style:
        """Background of a word; the writing is black or white, whichever is read better."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        shades = ABOVE if self.centre is None else BELOW + ABOVE
        shade = shades[min(int(max(share, 0.0) * len(shades)), len(shades) - 1)]
        is_dark = shade in (*BELOW[:2], *ABOVE[3:])
        return Style(color="white" if is_dark else "black", bgcolor=shade)

    def legend(self) -> Text:
        """A bar of the colours with their ends, and what lines under words mean."""
        legend = Text()
        for step in np.linspace(self.low, self.high, STEPS if self.centre is None else 2 * STEPS):
            legend.append("  ", self.style(float(step)))
        middle = f", {self.centre:g} in the middle" if self.centre is not None else ""
        legend.append(f"  {self.low:.3f} to {self.high:.3f}{middle}    ")
        for label, mark in MARKS.items():
            legend.append(label, _label_style(label)).append(f"{mark}(value)  ")
        return legend


def _heading(pair_id: str, name: str, weights: PairWeights | None) -> Text:
    heading = Text(f"Pair {plain(pair_id)}, words coloured by {plain(name)}")
    if weights is not None and weights.shared_count:
        heading.append(
            f"; net coefficient of the {weights.shared_count} shared prefix tokens: {weights.net_shared_coefficient:+.3f}"
        )
    return heading


def _response(row: ResponseRow, values: np.ndarray, scale: _Scale) -> Panel:
    text = Text()
    merged = words(row.pieces, row.is_special, row.labels)
    for word, value in zip(merged, merge(values, merged), strict=True):
        text.append(plain(word.space))
        if word.text:
            text.append(plain(word.text), scale.style(float(value)) + _label_style(word.label))
        elif word.is_special:
            text.append("⏎", Style(dim=True))
        if word.label:
            text.append(f"{MARKS[word.label]}({value:.3g})", Style(italic=True))
    return Panel(Group(text, _labelled(row, merged, values)), title=row.side, title_align="left")


def _label_style(label: str) -> Style:
    return Style(underline=bool(label), bold=label == "hallucinated")


def _labelled(row: ResponseRow, merged: list[Word], values: np.ndarray) -> RenderableType:
    """Mean over grounded, hallucinated and all words."""
    by_word = merge(values, merged)
    table = Table.grid(padding=(0, 2))
    for label in ("grounded", "hallucinated"):
        chosen = [value for word, value in zip(merged, by_word, strict=True) if word.label == label]
        if chosen:
            table.add_row(f"{label}:", f"{len(chosen)} words, mean {np.mean(chosen):.3f}")
    is_text = [not word.is_special for word in merged]
    if any(is_text):
        table.add_row("all:", f"{sum(is_text)} words, mean {by_word[is_text].mean():.3f}")
    return table
