"""The study as one HTML page: table, figures, how rates were chosen. Everything that is not ours is escaped."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path

from catpo import __version__
from catpo.experiments.study.results import Results, cells_of, footnotes
from catpo.files.atomic import write_atomic
from catpo.reporting.page import render


def write_page(found: Results, drawn: Mapping[str, Path], tuned: Mapping[str, Mapping[float, float]], path: Path) -> None:
    """Write `report.html`.

    Args:
        found: the table.
        drawn: name of a figure -> its SVG.
        tuned: row -> rate -> what the rate was judged by.
        path: of the page.
    """
    headings, rows = cells_of(found)
    study = found.study
    page = render(
        "study.html.j2",
        study=study,
        headings=headings,
        rows=rows,
        footnotes=footnotes(found),
        # as pictures: a drawing inside <img> runs nothing and loads nothing
        figures=[(name, study.figures[name], _as_uri(svg)) for name, svg in drawn.items()],
        tuned=[
            (name, [(f"{rate:g}", "-" if math.isnan(value) else f"{value:.1f}") for rate, value in values.items()])
            for name, values in tuned.items()
            if values
        ],
        cells=[(row.name, row.cells) for row in found.rows],
        version=__version__,
    )
    write_atomic(path, page.encode("utf-8", "replace"))


def _as_uri(svg: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.read_bytes()).decode()}"
