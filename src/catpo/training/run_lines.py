"""A run's figures as lines for the screen. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from catpo.files.json_files import read_rows

FIGURES = {
    "loss": "loss {:.4f}",
    "rewards/margins": "margin {:+.3f}",
    "rewards/accuracies": "accuracy {:.0%}",
    "learning_rate": "lr {:.1e}",
}
"""Figure of a log -> how it is shown."""
EVALUATED = "eval_"
BOARD = "runs"
"""Folder of TensorBoard's files in that of a run; those of a resumed run come beside the first."""


def figures(logs: Mapping[str, Any], prefix: str = "") -> str:
    """The figures of a log that are shown, on one line.

    >>> figures({"loss": 0.69314, "rewards/margins": 0.01, "rewards/accuracies": 0.5, "learning_rate": 1.4e-6, "padding": 0.1})
    'loss 0.6931, margin +0.010, accuracy 50%, lr 1.4e-06'
    """
    return ", ".join(form.format(logs[prefix + name]) for name, form in FIGURES.items() if prefix + name in logs)


def closing_lines(output: Path) -> list[str]:
    """The figures that a finished run ended with, and where all of them are."""
    rows = read_rows(output / "metrics.jsonl")
    trained, validated = ([row for row in rows if f"{prefix}loss" in row] for prefix in ("", EVALUATED))
    last = f"At step {rows[-1]['step']}: {figures(trained[-1])}" if trained else ""
    if validated:
        last += f"; validation {figures(validated[-1], EVALUATED)}"
    boards = [f"tensorboard --logdir {quote(str(output / BOARD))}"] if (output / BOARD).is_dir() else []
    where = " or ".join(
        [f"{output / 'metrics.jsonl'}", f"catpo report --runs {quote(str(output))} --output report.html", *boards]
    )
    return [*([last] if last else []), f"Logs: {where}"]
