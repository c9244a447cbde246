"""Figures of a study for print (SVG and PDF): trade-offs, sweeps, training curves, log-probs token by token.

A study's file names a figure with its options, `sweep(metric='chair_i')`. A user's text is drawn literally: nothing in it is
markup or mathematics.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import MaxNLocator

from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import check_options, parse
from catpo.evaluation.bootstrap import Estimate
from catpo.experiments.study.probe import FILE as PROBE
from catpo.experiments.study.probe import Response, read, risen
from catpo.experiments.study.results import EQUAL, EQUAL_HEADING, Result, Results, full_name, half_width
from catpo.files.atomic import write_atomic
from catpo.files.json_files import read_rows

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000")
"""Safe for colour-blind readers (Okabe and Ito)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "catpo",
    "pdf.fonttype": 42,
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "axes.formatter.use_mathtext": False,
}
WIDTH = 3.4
"""Of one panel, in inches: a column of a two-column page."""
LABELS = {
    "chair_i": "CHAIRi (%)",
    "cover": "Cover (%)",
    "loss": "loss",
    "rewards/margins": "reward margin",
    "grad_norm": "gradient norm",
    EQUAL: f"{EQUAL_HEADING} (%)",
}


def draw(results: Results, output: Path, folder: Path) -> dict[str, Path]:
    """Draw all figures of a study as `folder/NAME.svg` and `.pdf`; name -> SVG. One that cannot be drawn becomes a note."""
    drawn = {}
    for name, text in results.study.figures.items():
        spec = parse(text)
        try:
            with context(["default", STYLE]):
                figure = FIGURES[spec.name](results, output, **check_options(FIGURES[spec.name], spec))
                drawn[name] = _write(figure, folder / name)
        except UserError as error:
            results.notes.append(f"{name} is not drawn: {error}")
    return drawn


def check_figure(where: str, name: str, text: str) -> None:
    """Raise UserError unless there is such a figure with these options and `name` can be a file's; `where` begins messages."""
    spec = parse(text)
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{where}: the name becomes a file's. Use letters, digits, '-' and '_'.")
    if spec.name not in FIGURES:
        raise UserError(f"{where}: '{spec.name}' is not a figure. {did_you_mean(spec.name, FIGURES)}")
    check_options(FIGURES[spec.name], spec)


def tradeoff(results: Results, output: Path, *, x: str = "cover", y: str = "chair_i") -> Figure:
    """Every row as a point with its intervals over seeds: how much it says against how much it hallucinates."""
    figure, axes = _panels(1, height=3.0, width=1.6 * WIDTH)
    for number, row in enumerate(results.rows):
        across, up = row.mean(_metric(results, x)), row.mean(_metric(results, y))
        axes[0].errorbar(
            across.value, up.value, xerr=half_width(across), yerr=half_width(up), capsize=2, elinewidth=0.6, linestyle="none",
            **_look(number),
        )  # fmt: skip
    axes[0].set(xlabel=_label(x), ylabel=_label(y))
    _legend(figure, axes[0], [row.name for row in results.rows], lines=False)
    return figure


def sweep(results: Results, output: Path, *, metric: str = EQUAL, baseline: str = "") -> Figure:
    """One panel for each `panel` of the rows, the metric over `at` with intervals over seeds; a dashed line for `baseline`."""
    panels: dict[str, list[tuple[float, Estimate]]] = {}
    name = _metric(results, metric)
    for row in results.rows:
        plan = results.study.rows[row.name]
        if plan.panel:
            points = panels.setdefault(plan.panel, [])
            points.extend([] if plan.at is None else [(plan.at, row.mean(name))])
    if not panels:
        raise UserError("no row has a 'panel' and an 'at'.")
    figure, every_axes = _panels(len(panels))
    for (panel, points), axes in zip(panels.items(), every_axes, strict=True):
        points.sort(key=lambda point: point[0])
        means = [mean for _, mean in points]
        axes.errorbar(
            [at for at, _ in points], [mean.value for mean in means], yerr=_error_bars(means), capsize=2,
            elinewidth=0.6, **_look(0),
        )  # fmt: skip
        level = results.row(baseline)
        if level is not None:
            height = level.mean(name).value
            axes.axhline(height, color=COLOURS[6], linestyle="--", linewidth=0.8)
            axes.annotate(baseline, (0.98, height), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.set(xlabel=panel, ylabel=_label(metric))
    return figure


def bars(results: Results, output: Path, *, metrics: Sequence[str] = (EQUAL,), rows: Sequence[str] = ()) -> Figure:
    """Rows side by side, a panel for each metric, with intervals over seeds."""
    shown = _chosen(results, rows)
    figure, every_axes = _panels(len(metrics), height=0.6 + 0.22 * len(shown))
    for metric, axes in zip(metrics, every_axes, strict=True):
        means = [row.mean(_metric(results, metric)) for row in shown]
        _horizontal_bars(axes, {row.name: mean.value for row, mean in zip(shown, means, strict=True)}, _label(metric),
                         xerr=_error_bars(means), error_kw={"elinewidth": 0.8, "capsize": 2})  # fmt: skip
    return figure


def curves(
    results: Results,
    output: Path,
    *,
    metrics: Sequence[str] = ("loss", "rewards/margins", "grad_norm"),
    rows: Sequence[str] = (),
) -> Figure:
    """Training metrics over the steps (Fig. 6): the mean over seeds, shaded by their range."""
    shown = [row for row in _chosen(results, rows) if row.rate is not None]
    figure, every_axes = _panels(len(metrics))
    for number, row in enumerate(shown):
        logs = [read_rows(cell.folder(output) / "run" / "metrics.jsonl") for cell in row.cells.values()]
        for metric, axes in zip(metrics, every_axes, strict=True):
            steps, values = _by_step(logs, metric)
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(steps, values.mean(0), color=colour)
            axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.set(xlabel="step", ylabel=_label(metric))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, every_axes[-1], [row.name for row in shown], lines=True)
    return figure


def token_logps(results: Results, output: Path, *, row: str = "catpo", against: str = "dpo", pairs: int = 2) -> Figure:
    """Log-probs of chosen responses token by token under two methods, bars for their difference (Fig. 8-9); first seed."""
    first_seed, *_ = _probed_by_both(results, output, row, against).values()
    shown = first_seed[:pairs]
    figure, every_axes = _panels(len(shown), height=2.3, width=2 * WIDTH, columns=1)
    for (first, second), axes in zip(shown, every_axes, strict=True):
        tokens = np.arange(len(first.pieces))
        axes.bar(tokens, first.policy - second.policy, color="#f0c419", width=0.8, label=f"{row} minus {against}")
        axes.plot(tokens, first.policy, color=COLOURS[0], label=row)
        axes.plot(tokens, second.policy, color=COLOURS[2], label=against)
        axes.set_xticks(tokens, [piece.strip() or "·" for piece in first.pieces], rotation=90, fontsize=5)
        axes.set_ylabel("log-prob (nats)")
        axes.grid(visible=False, axis="x")
    every_axes[0].legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def rises(results: Results, output: Path, *, rows: Sequence[str] = ("dpo", "catpo"), against: str = "dpo") -> Figure:
    """Share of chosen tokens and responses that became likelier (Fig. 11), compared with the reference model and with another
    row; pairs of all seeds together.
    """
    figures: dict[str, dict[str, float]] = {}
    for name in rows:
        by_seed = _probed(results, output, name)
        figures[f"{name} − reference"] = risen([response for probed in by_seed.values() for response in probed.values()])
        if name == against:
            continue
        both = chain.from_iterable(_probed_by_both(results, output, name, against).values())
        figures[f"{name} − {against}"] = risen([Response(ours.pieces, theirs.policy, ours.policy) for ours, theirs in both])
    panels = {
        "probe/risen_tokens": "tokens that rose (%)",
        "probe/risen_responses": "responses that rose (%)",
        "probe/gain": "nats gained per token",
    }
    figure, every_axes = _panels(len(panels), height=0.7 + 0.25 * len(figures))
    for (metric, label), axes in zip(panels.items(), every_axes, strict=True):
        _horizontal_bars(axes, {name: values[metric] for name, values in figures.items()}, label)
    return figure


FIGURES: Mapping[str, Callable[..., Figure]] = {
    figure.__name__: figure for figure in (tradeoff, sweep, bars, curves, token_logps, rises)
}


def _write(figure: Figure, path: Path) -> Path:
    """The same numbers give the same bytes: no dates."""
    for ending, canvas, metadata in (
        (".svg", FigureCanvasSVG, {"Date": None, "Creator": None}),
        (".pdf", FigureCanvasPdf, {"CreationDate": None, "Creator": None, "Producer": None}),
    ):
        stream = io.BytesIO()
        canvas(figure).print_figure(stream, metadata=metadata)
        write_atomic(path.with_name(path.name + ending), stream.getvalue())
    return path.with_name(path.name + ".svg")


def _panels(count: int, *, height: float = 2.2, width: float = WIDTH, columns: int = 3) -> tuple[Figure, list[Any]]:
    if count < 1:
        raise UserError("it has nothing to show. Give at least one metric, row or pair.")
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def _horizontal_bars(axes: Any, values: Mapping[str, float], label: str, **options: Any) -> None:
    """Named bars, the first on top."""
    heights = np.arange(len(values))[::-1]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(values))]
    axes.barh(heights, list(values.values()), height=0.7, color=colours, **options)
    axes.set_yticks(heights, list(values))
    axes.set_xlabel(label)
    axes.grid(visible=False, axis="y")


def _look(number: int) -> dict[str, Any]:
    """Colour and marker of a row; the marker changes when the colours repeat."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number // len(COLOURS) % len(MARKERS)]}


def _legend(figure: Figure, axes: Any, names: Sequence[str], *, lines: bool) -> None:
    """Handles are drawn by hand, since matplotlib drops names that begin with an underscore from a legend."""
    handles = []
    for number in range(len(names)):
        look = {"color": COLOURS[number % len(COLOURS)]} if lines else {**_look(number), "linestyle": "none"}
        handles.extend(axes.plot([], [], **look))
    figure.legend(handles, names, loc="outside right upper", fontsize=7)


def _error_bars(means: Sequence[Estimate]) -> list[float]:
    return [half_width(mean) or 0 for mean in means]


def _metric(results: Results, name: str) -> str:
    full = full_name(name, results.metrics)
    if full not in results.metrics:
        raise UserError(f"no row has the metric '{name}'. {did_you_mean(name, results.metrics)}")
    return full


def _label(metric: str) -> str:
    return LABELS.get(metric, metric)


def _chosen(results: Results, names: Sequence[str]) -> list[Result]:
    """The rows named, or all of them."""
    rows = [row for row in results.rows if not names or row.name in names]
    if not rows:
        raise UserError(f"none of the rows {', '.join(names)} is finished.")
    return rows


def _by_step(logs: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> tuple[list[int], np.ndarray]:
    """Steps that all seeds have logged, and the metric there: [seeds, steps]."""
    series = [{row["step"]: float(row[metric]) for row in rows if metric in row} for rows in logs]
    steps = sorted(set.intersection(*(set(values) for values in series)))
    if not steps:
        raise UserError(f"training has not logged '{metric}'.")
    return steps, np.array([[values[step] for step in steps] for values in series])


def _probed(results: Results, output: Path, name: str) -> dict[int, dict[str, Response]]:
    """Seed -> pair -> chosen response."""
    row = results.row(name)
    paths = {seed: cell.folder(output) / PROBE for seed, cell in row.cells.items()} if row else {}
    probed = {seed: read(path, "chosen") for seed, path in paths.items() if path.is_file()}
    if not probed:
        raise UserError(f"row '{name}' has kept no log-probs. Set 'probe' in the study.")
    return probed


def _probed_by_both(results: Results, output: Path, ours: str, theirs: str) -> dict[int, list[tuple[Response, Response]]]:
    """Seed -> chosen responses under one row and another, of the pairs that both have."""
    of_ours, of_theirs = (_probed(results, output, name) for name in (ours, theirs))
    both: dict[int, list[tuple[Response, Response]]] = {}
    for seed, by_pair in of_ours.items():
        others = of_theirs.get(seed, {})
        responses = [(response, others[pair]) for pair, response in by_pair.items() if pair in others]
        if responses:
            both[seed] = responses
    if not both:
        raise UserError(f"rows '{ours}' and '{theirs}' have no probed pair in common.")
    return both
