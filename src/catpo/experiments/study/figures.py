"""Figures of a study, for print (SVG and PDF): trade-offs, sweeps, training curves, log-probs token by token.

A figure is named with its options in the study's file, `sweep(metric='chair_i')`. Text that comes from a user is drawn as it
is: nothing in it is markup or mathematics.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
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
from catpo.experiments.study.probe import FILE as PROBE
from catpo.experiments.study.probe import Response, read, risen
from catpo.experiments.study.results import EQUAL, HEADINGS, Result, Results, full_name
from catpo.files.atomic import write_atomic
from catpo.files.json_files import read_rows

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000")
"""Told apart by people who see colours differently (Okabe and Ito)."""
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
    EQUAL: f"{HEADINGS[EQUAL]} (%)",
}


def draw(found: Results, output: Path, folder: Path) -> dict[str, Path]:
    """All figures of a study as `folder/NAME.svg` and `.pdf`; name -> SVG. One that cannot be drawn becomes a note."""
    drawn = {}
    for name, text in found.study.figures.items():
        spec = parse(text)
        try:
            with context(["default", STYLE]):
                figure = FIGURES[spec.name](found, output, **check_options(FIGURES[spec.name], spec))
                drawn[name] = _write(figure, folder / name)
        except UserError as error:
            found.notes.append(f"{name} is not drawn: {error}")
    return drawn


def check_figure(where: str, name: str, text: str) -> None:
    """Raise UserError unless there is such a figure with these options, and `name` can be a file's; `where` begins messages."""
    spec = parse(text)
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{where}: the name becomes a file's. Use letters, digits, '-' and '_'.")
    if spec.name not in FIGURES:
        raise UserError(f"{where}: '{spec.name}' is not a figure. {did_you_mean(spec.name, FIGURES)}")
    check_options(FIGURES[spec.name], spec)


def tradeoff(found: Results, output: Path, *, x: str = "cover", y: str = "chair_i") -> Figure:
    """Every row as a point with its intervals over seeds: what it says of the picture against what it makes up."""
    figure, axes = _panels(1, height=3.0, width=1.6 * WIDTH)
    for number, row in enumerate(found.rows):
        across, up = row.spread(_metric(found, x)), row.spread(_metric(found, y))
        axes[0].errorbar(
            across.value,
            up.value,
            xerr=_half(across),
            yerr=_half(up),
            capsize=2,
            linestyle="none",
            elinewidth=0.6,
            **_look(number),
        )
    axes[0].set(xlabel=_label(x), ylabel=_label(y))
    _legend(figure, axes[0], [row.name for row in found.rows], lines=False)
    return figure


def sweep(found: Results, output: Path, *, metric: str = EQUAL, baseline: str = "") -> Figure:
    """One panel for each `panel` of the rows, the metric over `at` with intervals over seeds; a dashed line for `baseline`."""
    rows = [(found.study.rows[row.name], row) for row in found.rows]
    panels = list(dict.fromkeys(of.panel for of, _ in rows if of.panel))
    if not panels:
        raise UserError("no row has a 'panel' and an 'at'.")
    figure, axes = _panels(len(panels))
    name = _metric(found, metric)
    for panel, drawing in zip(panels, axes, strict=True):
        points = sorted(
            ((of.at, row.spread(name)) for of, row in rows if of.panel == panel and of.at is not None),
            key=lambda point: point[0],
        )
        drawing.errorbar(
            [at for at, _ in points], [spread.value for _, spread in points], yerr=[_half(spread) or 0 for _, spread in points],
            capsize=2, elinewidth=0.6, **_look(0),
        )  # fmt: skip
        if (level := found.row(baseline)) is not None:
            drawing.axhline(level.spread(name).value, color=COLOURS[6], linestyle="--", linewidth=0.8)
            drawing.annotate(
                baseline, (0.98, level.spread(name).value), xycoords=("axes fraction", "data"), ha="right", va="bottom"
            )
        drawing.set(xlabel=panel, ylabel=_label(metric))
    return figure


def bars(found: Results, output: Path, *, metrics: Sequence[str] = (EQUAL,), rows: Sequence[str] = ()) -> Figure:
    """Rows side by side, a panel for each metric, with intervals over seeds."""
    shown = _chosen(found, rows)
    figure, axes = _panels(len(metrics), height=0.6 + 0.22 * len(shown))
    for metric, drawing in zip(metrics, axes, strict=True):
        spreads = [row.spread(_metric(found, metric)) for row in shown]
        places = np.arange(len(shown))[::-1]
        drawing.barh(
            places, [spread.value for spread in spreads], xerr=[_half(spread) or 0 for spread in spreads], height=0.7,
            color=[COLOURS[number % len(COLOURS)] for number in range(len(shown))], error_kw={"elinewidth": 0.8, "capsize": 2},
        )  # fmt: skip
        drawing.set_yticks(places, [row.name for row in shown])
        drawing.set_xlabel(_label(metric))
        drawing.grid(visible=False, axis="y")
    return figure


def curves(
    found: Results,
    output: Path,
    *,
    metrics: Sequence[str] = ("loss", "rewards/margins", "grad_norm"),
    rows: Sequence[str] = (),
) -> Figure:
    """What training logged over its steps (Fig. 6): the mean over seeds, and the range of the seeds behind it."""
    shown = [row for row in _chosen(found, rows) if row.rate is not None]
    figure, axes = _panels(len(metrics))
    for number, row in enumerate(shown):
        logs = [read_rows(cell.folder(output) / "run" / "metrics.jsonl") for cell in row.cells.values()]
        for metric, drawing in zip(metrics, axes, strict=True):
            steps, values = _by_step(logs, metric)
            colour = COLOURS[number % len(COLOURS)]
            drawing.plot(steps, values.mean(0), color=colour)
            drawing.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            drawing.set(xlabel="step", ylabel=_label(metric))
            drawing.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes[-1], [row.name for row in shown], lines=True)
    return figure


def token_logps(found: Results, output: Path, *, row: str = "catpo", against: str = "dpo", pairs: int = 2) -> Figure:
    """Log-probs of chosen responses token by token under two methods, bars for their difference (Fig. 8-9); first seed."""
    ours, theirs = (_probed(found, output, name)[0] for name in (row, against))
    shown = [pair for pair in ours if pair in theirs][:pairs]
    figure, axes = _panels(len(shown), height=2.3, width=2 * WIDTH, columns=1)
    for pair, drawing in zip(shown, axes, strict=True):
        first, second = ours[pair], theirs[pair]
        places = np.arange(len(first.pieces))
        drawing.bar(places, first.policy - second.policy, color="#f0c419", width=0.8, label=f"{row} minus {against}")
        drawing.plot(places, first.policy, color=COLOURS[0], label=row)
        drawing.plot(places, second.policy, color=COLOURS[2], label=against)
        drawing.set_xticks(places, [piece.strip() or "·" for piece in first.pieces], rotation=90, fontsize=5)
        drawing.set_ylabel("log-prob (nats)")
        drawing.grid(visible=False, axis="x")
    axes[0].legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def rises(found: Results, output: Path, *, rows: Sequence[str] = ("dpo", "catpo"), against: str = "dpo") -> Figure:
    """Share of tokens and of responses that became likelier (Fig. 11): of chosen ones against the reference model and against
    another row; every seed's pairs together.
    """
    bars: dict[str, dict[str, float]] = {}
    for name in rows:
        probed = _probed(found, output, name)
        bars[f"{name} − reference"] = risen([response for of in probed for response in of.values()])
        if name != against:
            pairs = zip(probed, _probed(found, output, against), strict=False)
            bars[f"{name} − {against}"] = risen(
                [_less(of[pair], base[pair]) for of, base in pairs for pair in of if pair in base]
            )
    figure, axes = _panels(3, height=0.7 + 0.25 * len(bars))
    labels = {
        "probe/risen_tokens": "tokens that rose (%)",
        "probe/risen_responses": "responses that rose (%)",
        "probe/gain": "nats gained per token",
    }
    for (metric, label), drawing in zip(labels.items(), axes, strict=True):
        places = np.arange(len(bars))[::-1]
        drawing.barh(places, [values[metric] for values in bars.values()], color=COLOURS[: len(bars)], height=0.7)
        drawing.set_yticks(places, list(bars))
        drawing.set_xlabel(label)
        drawing.grid(visible=False, axis="y")
    return figure


FIGURES: Mapping[str, Callable[..., Figure]] = {
    each.__name__: each for each in (tradeoff, sweep, bars, curves, token_logps, rises)
}


def _write(figure: Figure, path: Path) -> Path:
    """Same numbers, same bytes: no dates."""
    for ending, canvas, metadata in (
        (".svg", FigureCanvasSVG, {"Date": None, "Creator": None}),
        (".pdf", FigureCanvasPdf, {"CreationDate": None, "Creator": None, "Producer": None}),
    ):
        stream = io.BytesIO()
        canvas(figure).print_figure(stream, metadata=metadata)
        write_atomic(path.with_name(path.name + ending), stream.getvalue())
    return path.with_name(path.name + ".svg")


def _panels(count: int, *, height: float = 2.2, width: float = WIDTH, columns: int = 3) -> tuple[Figure, list[Any]]:
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def _look(number: int) -> dict[str, Any]:
    """Colour and marker of a row; the marker changes when colours begin again."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number // len(COLOURS) % len(MARKERS)]}


def _legend(figure: Figure, axes: Any, names: Sequence[str], *, lines: bool) -> None:
    """Names are drawn by hand: matplotlib leaves out of a legend what begins with an underscore."""
    handles = [
        axes.plot([], [], **({"color": COLOURS[n % len(COLOURS)]} if lines else {**_look(n), "linestyle": "none"}))[0]
        for n in range(len(names))
    ]
    figure.legend(handles, names, loc="outside right upper", fontsize=7)


def _half(spread: Any) -> float | None:
    half = spread.high - spread.value
    return None if math.isnan(half) or half < 1e-9 else half


def _metric(found: Results, name: str) -> str:
    known = list(dict.fromkeys(metric for row in found.rows for metric in row.values))
    full = full_name(name, known)
    if full not in known:
        raise UserError(f"no row has the metric '{name}'. {did_you_mean(name, known)}")
    return full


def _label(metric: str) -> str:
    return LABELS.get(metric, metric)


def _chosen(found: Results, names: Sequence[str]) -> list[Result]:
    """The rows named, or all of them."""
    rows = [row for row in found.rows if not names or row.name in names]
    if not rows:
        raise UserError(f"none of the rows {', '.join(names)} is finished.")
    return rows


def _by_step(logs: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> tuple[list[int], np.ndarray]:
    """Steps that every seed has logged, and the metric there: [seeds, steps]."""
    series = [{row["step"]: float(row[metric]) for row in rows if metric in row} for rows in logs]
    steps = sorted(set.intersection(*(set(of) for of in series)))
    if not steps:
        raise UserError(f"training has not logged '{metric}'.")
    return steps, np.array([[of[step] for step in steps] for of in series])


def _probed(found: Results, output: Path, name: str) -> list[dict[str, Response]]:
    """Chosen responses of each seed."""
    row = found.row(name)
    paths = [cell.folder(output) / PROBE for cell in row.cells.values()] if row else []
    there = [path for path in paths if path.is_file()]
    if not there:
        raise UserError(f"row '{name}' has kept no log-probs. Set 'probe' in the study.")
    return [read(path, "chosen") for path in there]


def _less(first: Response, second: Response) -> Response:
    """The first as it is under its policy, against the second's."""
    return Response(first.pieces, second.policy, first.policy)
