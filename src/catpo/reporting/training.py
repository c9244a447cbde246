"""Training runs side by side: curves of what metrics.jsonl holds, and what each run was. Knows no trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from markupsafe import Markup

from catpo.core.errors import UserError
from catpo.files.json_files import read_json, read_rows
from catpo.reporting.plots import Series, curves

CURVES = {
    "loss": "Loss",
    "loss/preference": "Loss, preference part",
    "loss/kl": "Loss, KL part",
    "rewards/margins": "Margin (chosen − rejected reward)",
    "rewards/accuracies": "Accuracy (margin above 0)",
    "kl/chosen": "KL of chosen, nats per response",
    "kl/rejected": "KL of rejected, nats per response",
    "weights/net_shared": "Net coefficient of shared prefix",
    "logps/chosen": "log p of chosen",
    "logps/rejected": "log p of rejected",
    "rewards/chosen": "Reward of chosen",
    "rewards/rejected": "Reward of rejected",
    "weights/chosen": "Weight mass of chosen",
    "weights/rejected": "Weight mass of rejected",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "eval_loss": "Held-out loss",
    "eval_rewards/margins": "Held-out margin",
    "eval_rewards/accuracies": "Held-out accuracy",
}
"""Drawn in this order, where a run has logged them."""
WITH_ZERO = {"rewards/margins", "weights/net_shared", "rewards/chosen", "rewards/rejected", "eval_rewards/margins"}


@dataclass(frozen=True)
class Run:
    """What one folder of `catpo train` holds."""

    name: str
    path: Path
    settings: Mapping[str, Any]
    """catpo.json."""
    rows: list[dict[str, Any]]
    """metrics.jsonl."""

    @property
    def objective(self) -> str:
        return str(self.settings.get("objective", ""))

    @property
    def step_count(self) -> int:
        return max((int(row.get("step", 0)) for row in self.rows), default=0)

    def last(self, metric: str) -> float | None:
        """The last value logged."""
        return next((row[metric] for row in reversed(self.rows) if _is_number(row.get(metric))), None)

    def points(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps, and values of a metric."""
        logged = [row for row in self.rows if _is_number(row.get(metric)) and "step" in row]
        return [row["step"] for row in logged], [row[metric] for row in logged]


def load_run(folder: Path, name: str) -> Run:
    """Read a run.

    Raises:
        UserError: the folder holds no run.
    """
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise UserError(
            f"{folder} holds no training run (no metrics.jsonl in it). `catpo train --output {quote(str(folder))}` makes one."
        )
    settings = read_json(folder / "catpo.json", made_by="catpo train") if (folder / "catpo.json").is_file() else {}
    rows = read_rows(log)
    for number, row in enumerate(rows, start=1):
        if not _is_number(row.get("step", 0)):
            raise UserError(f"{log}:{number}: 'step' must be a number. Remove the line or train again.")
    return Run(name, folder, settings, rows)


def training_curves(runs: Sequence[Run], colours: Mapping[str, int]) -> list[tuple[str, Markup]]:
    """(title, drawing) of every metric that a run has logged more than once."""
    drawings = []
    for metric, title in CURVES.items():
        lines = []
        for run in runs:
            steps, values = run.points(metric)
            if steps:
                lines.append(Series(steps, values, colours[run.name]))
        if any(len(line.x) > 1 for line in lines):
            description = f"{title} over training steps"
            drawings.append((title, curves(lines, x="step", y="", description=description, zero=metric in WITH_ZERO)))
    return drawings


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
