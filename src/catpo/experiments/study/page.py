"""The study as one HTML page: table, figures, and how learning rates were chosen. All text that is not ours is escaped."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path

from catpo import __version__
from catpo.experiments.study.results import Results, footnotes, table_of
from catpo.files.atomic import write_atomic
from catpo.reporting.page import render


def write_page(results: Results, drawn: Mapping[str, Path], tuned: Mapping[str, Mapping[float, float]], path: Path) -> None:
    """Write `report.html`.

    Args:
        results: the table.
        drawn: name of a figure -> its SVG.
        tuned: row -> rate -> the value it was chosen by.
        path: of the page.
    """
    headings, rows = table_of(results)
    study = results.study
    figures = []
    for name, svg in drawn.items():  # as <img>, in which a drawing runs nothing and loads nothing
        uri = f"data:image/svg+xml;base64,{base64.b64encode(svg.read_bytes()).decode()}"
        figures.append((name, study.figures[name], uri))
    choices = []
    for name, values in tuned.items():
        if values:
            texts = ["-" if math.isnan(value) else f"{value:.1f}" for value in values.values()]
            choices.append((name, [(f"{rate:g}", text) for rate, text in zip(values, texts, strict=True)]))
    page = render(
        "study.html.j2",
        study=study,
        headings=headings,
        rows=rows,
        footnotes=footnotes(results),
        figures=figures,
        tuned=choices,
        cells=[(row.name, row.cells) for row in results.rows],
        version=__version__,
    )
    write_atomic(path, page.encode("utf-8", "replace"))
