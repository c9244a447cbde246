"""Drawings of the report as SVG for a page: histograms, training curves, coverage against CHAIRi. Knows numbers only, no names.

A drawing holds no text that comes from a user: the page writes legends itself, where they are escaped. Colours are
`var(--series-0)` … and `currentColor`, so that the page's style decides about light and dark.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.style import context
from numpy.typing import ArrayLike, NDArray

BINS = 24
SERIES_COUNT = 8
"""Colours of the page; a ninth line has the first colour again, dashed."""
INK, FAINT = "#010203", "#040506"
"""Stand for `currentColor` and `var(--line)` until the drawing is finished."""
SERIES = tuple(f"#0708{number:02x}" for number in range(SERIES_COUNT))
PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--line)"} | {colour: f"var(--series-{n})" for n, colour in enumerate(SERIES)}
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
STYLE = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.use_mathtext", "text.parse_math"), False),
    "svg.fonttype": "none",
    "svg.hashsalt": "catpo",  # ids are the same in every run
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "axes.formatter.limits": (-4, 5),
    "axes.unicode_minus": True,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Series:
    """One line of a drawing."""

    x: Sequence[float] | NDArray[np.float64]
    y: Sequence[float] | NDArray[np.float64]
    colour: int
    """Number of the page's series colour; a model has the same colour in all drawings."""


def histogram(groups: Sequence[ArrayLike], *, label: str, description: str) -> Markup:
    """Outlined histograms on the same bins, each in percent of its own group, so that a small group is visible.

    Groups have series colours 0, 1, …; empty ones are left out. Screen readers say the description.
    """
    values = [np.asarray(group, dtype=np.float64) for group in groups]
    edges = np.histogram_bin_edges(np.concatenate([[], *values]), BINS)

    def draw(axes: Any) -> None:
        for number, group in enumerate(values):
            if len(group):
                heights = 100 * np.histogram(group, edges)[0] / len(group)
                colour = SERIES[number % SERIES_COUNT]
                axes.stairs(heights, edges, color=colour, linewidth=1.5)
                axes.stairs(heights, edges, color=colour, fill=True, alpha=0.12)
        axes.set(xlabel=label, ylabel="% of tokens")
        axes.set_ylim(bottom=0)

    return _svg(draw, description, size=(3.4, 2.1))


def curves(lines: Sequence[Series], *, x: str, y: str, description: str, markers: bool = False, zero: bool = False) -> Markup:
    """Lines over a common axis; points that are not finite are left out.

    `markers` marks each point, the last one larger; `zero` draws the line y = 0. Screen readers say the description.
    """

    def draw(axes: Any) -> None:
        if zero:
            axes.axhline(0, color=INK, linewidth=0.7)
        for line in lines:
            xs, ys = np.asarray(line.x, dtype=np.float64), np.asarray(line.y, dtype=np.float64)
            is_finite = np.isfinite(xs) & np.isfinite(ys)
            xs, ys = xs[is_finite], ys[is_finite]
            look = {"color": SERIES[line.colour % SERIES_COUNT], "linestyle": DASHES[line.colour // SERIES_COUNT % len(DASHES)]}
            axes.plot(xs, ys, marker="o" if markers or len(xs) == 1 else "", markersize=2.5, **look)
            if markers and len(xs):
                axes.plot(xs[-1:], ys[-1:], marker="o", markersize=6, **look)
        axes.set(xlabel=x, ylabel=y)

    return _svg(draw, description, size=(5.2, 3.2) if markers else (3.4, 2.1))


def _svg(draw: Callable[[Any], None], description: str, size: tuple[float, float]) -> Markup:
    """A drawing as an `<svg>` element: same numbers, same bytes."""
    with context(["default", STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        stream = StringIO()
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Markup(_for_a_page(stream.getvalue(), description))


def _for_a_page(svg: str, description: str) -> str:
    """Matplotlib's file as an element that passes the page's content policy: no style rules or attributes, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|\s+xmlns:xlink=\"[^\"]*\"", "", svg, flags=re.S)
    svg = re.sub(r' style="([^"]*)"', lambda match: _attributes(match[1]), svg)
    svg = svg.replace("xlink:href", "href")
    # ids must be unique on the page: each drawing prefixes its own, and the references to them
    prefix = f"p{zlib.crc32(svg.encode()):x}-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    for colour, name in PAGE_COLOURS.items():
        svg = svg.replace(colour, name)
    title = escape(description)
    opening = f'<svg class="plot" role="img" aria-label="{title}" stroke-linejoin="round"'
    svg = re.sub(r'\b(width|height)="([\d.]+)pt"', lambda match: f'{match[1]}="{float(match[2]):g}"', svg, count=2)
    svg = svg.replace("<svg", opening, 1)
    return svg.replace(">", f"><title>{title}</title>", 1)


def _attributes(style: str) -> str:
    """`fill: none; stroke: red` as ` fill="none" stroke="red"`: a content policy forbids style attributes."""
    attributes = ""
    for rule in style.split(";"):
        name, _, value = (part.strip() for part in rule.partition(":"))
        if name == "font":
            name, value = "font-size", value.split("px")[0].split()[-1]
        if name and value and name not in ("font-family", "font-stretch", "font-variant"):
            attributes += f' {name}="{escape(value)}"'
    return attributes
