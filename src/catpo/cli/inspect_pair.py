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
from catpo.text.tables import one_line
from catpo.text.words import merge, plain, words

WEIGHT, RELEVANCE, LOGPS = "weight", "relevance", "logps"
STEPS = 5
MARKS = {"grounded": "✓", "hallucinated": "✗"}
BELOW = ("#084594", "#2171b5", "#4292c6", "#9ecae1", "#deebf7")
"""Blue, from far below the centre to near it; colour-blind readers can tell it from `ABOVE`."""
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
    heading = Text(one_line(f"Pair {pair_id}, words coloured by {name}"))
    if weights is not None and weights.shared_count:
        net = f"{weights.net_shared_coefficient:+.3f}"
        heading.append(f"; net coefficient of the {weights.shared_count} shared prefix tokens: {net}")
    rows = [opened.get(pair_id, side) for side in SIDES]
    values = [_values(row, row.side, name, weights) for row in rows]
    text_values = [of_side[~row.is_special] for of_side, row in zip(values, rows, strict=True)]
    scale = _Scale(np.concatenate(text_values), name)
    panels = [_response(row, of_side, scale) for row, of_side in zip(rows, values, strict=True)]
    return Group(heading, scale.legend(), *panels)


def _find_pair(store: RewardStore, pair: str) -> str:
    if pair in store:
        return pair
    matches = [pair_id for pair_id in store if pair and pair_id.startswith(pair)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"{len(matches)} pairs begin with '{pair}': {', '.join(matches[:3])}, … Give more of the id.")
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
    """Colours between the lowest and the highest value of a pair.

    Weights are centred on 1 (plain DPO) and signals of both signs on 0; others have no centre.
    """

    def __init__(self, values: np.ndarray, name: str) -> None:
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        self.centre = 1.0 if name == WEIGHT else 0.0 if low < 0 < high else None
        if self.centre is not None:
            reach = max(high - self.centre, self.centre - low) or 1.0
            low, high = self.centre - reach, self.centre + reach
        self.low, self.high = low, high

    def style(self, value: float) -> Style:
        """Background of a word, with black or white letters, whichever is easier to read on it."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        shades = ABOVE if self.centre is None else BELOW + ABOVE
        shade = shades[min(int(max(share, 0.0) * len(shades)), len(shades) - 1)]
        is_dark = shade in (*BELOW[:2], *ABOVE[3:])
        return Style(color="white" if is_dark else "black", bgcolor=shade)

    def legend(self) -> Text:
        """A bar of the colours with their ends, and what labelled words look like."""
        legend = Text()
        for step in np.linspace(self.low, self.high, STEPS if self.centre is None else 2 * STEPS):
            legend.append("  ", self.style(float(step)))
        middle = f", {self.centre:g} in the middle" if self.centre is not None else ""
        legend.append(f"  {self.low:.3f} to {self.high:.3f}{middle}    ")
        for label, mark in MARKS.items():
            legend.append(label, _label_style(label)).append(f"{mark}(value)  ")
        return legend


def _response(row: ResponseRow, values: np.ndarray, scale: _Scale) -> Panel:
    """The words with their colours, and means over grounded, hallucinated and all words."""
    text = Text()
    merged = words(row.pieces, row.is_special, row.labels)
    of_words = merge(values, merged)
    for word, value in zip(merged, of_words, strict=True):
        text.append(plain(word.space))
        if word.text:
            text.append(plain(word.text), scale.style(float(value)) + _label_style(word.label))
        elif word.is_special:
            text.append("⏎", Style(dim=True))
        if word.label:
            text.append(f"{MARKS[word.label]}({value:.3g})", Style(italic=True))
    means = Table.grid(padding=(0, 2))
    groups = {label: [word.label == label for word in merged] for label in MARKS}
    groups["all"] = [not word.is_special for word in merged]
    for name, is_member in groups.items():
        if any(is_member):
            means.add_row(f"{name}:", f"{sum(is_member)} words, mean {of_words[is_member].mean():.3f}")
    return Panel(Group(text, means), title=row.side, title_align="left")


def _label_style(label: str) -> Style:
    return Style(underline=bool(label), bold=label == "hallucinated")
