"""What the terminal shows of results."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from catpo.cli.tables import quality_table, scores_table
from catpo.rewards.quality import Separation, SignalQuality
from catpo.text.tables import for_csv, latex_table, markdown_table


def test_scores_are_shown_with_their_intervals_and_unknown_ones_as_a_dash() -> None:
    figures = {
        "chair_i": {"value": 31.24, "low": 28.0, "high": 34.96},
        "cog": {"value": math.nan, "low": math.nan, "high": math.nan},
        "cover": {"value": None, "low": None, "high": None},
    }
    console = Console(width=80, record=True, file=None)
    with console.capture() as capture:
        console.print(scores_table({"benchmarks": {"scenes": {"metrics": figures}}}))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capture.get().splitlines() if "scenes" in line]
    assert rows == [
        ["scenes", "chair_i", "31.2", "28.0 to 35.0"],
        ["scenes", "cog", "-", "-"],
        ["scenes", "cover", "-", "-"],
    ]


def test_the_table_of_signals_says_on_how_many_pairs_they_are_measured() -> None:
    separation = Separation(0.7, 0.6, 0.8, 12, 3)
    rows = [SignalQuality("semantic", separation, separation, separation)]
    assert "12 grounded, 3 hallucinated in 8 pairs" in str(quality_table(rows, 8).title)
    assert "3 hallucinated in 10,000 of 12,345 pairs" in str(quality_table(rows, 12_345).title)


@pytest.mark.parametrize("write", [latex_table, markdown_table])
def test_a_name_in_a_table_is_one_line_of_text(write) -> None:
    table = write(["model"], [["a\x1b[31m\nb\u202e"]])
    assert "a[31m b" in table.replace("\\", "")
    assert not set("\x1b\u202e") & set(table)


def test_a_cell_of_a_csv_file_is_no_formula() -> None:
    assert [for_csv(name) for name in ("=SUM(A1)", "@x", "+1", "-1", "a=b", "")] == [
        "'=SUM(A1)",
        "'@x",
        "'+1",
        "'-1",
        "a=b",
        "",
    ]
