"""What a training run says on the screen: progress and figures as it runs, where its logs are when it ends. Knows no step."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from catpo.files.json_files import read_rows
from catpo.runtime.progress import track

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

    >>> figures({"loss": 0.69315, "rewards/margins": 0.01, "rewards/accuracies": 0.5, "learning_rate": 1.4e-6, "padding": 0.1})
    'loss 0.6931, margin +0.010, accuracy 50%, lr 1.4e-06'
    """
    return ", ".join(form.format(logs[prefix + name]) for name, form in FIGURES.items() if prefix + name in logs)


class StepProgress(TrainerCallback):
    """Steps done, rate and remaining time; with every log its figures, those of the validation pairs too."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = track(state.max_steps, "Training", "steps", done=state.global_step, enabled=state.is_world_process_zero)
        self.bar.__enter__()
        self.validated = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        shown = figures(logs or {}), figures(logs or {}, EVALUATED)
        if shown[0]:
            self.bar.tell(shown[0])
        if shown[1]:
            self.bar.tell(f"validation: {shown[1]}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        self.validated += 1
        self.bar.advance(0, note=f"validating, batch {self.validated} of {len(eval_dataloader)}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.validated, self.bar.note = 0, ""
        self.bar.advance(0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.__exit__(None)


class Trackers(TrainerCallback):
    """Where the trackers of a run can be looked at: said when it begins.

    TensorBoard's files go into the run's own folder, unless TENSORBOARD_LOGGING_DIR names another.
    """

    def __init__(self, trainer: Trainer, output: Path) -> None:
        self.boards = [each for each in trainer.callback_handler.callbacks if isinstance(each, TensorBoardCallback)]
        for board in self.boards:
            board.logging_dir = board.logging_dir or str(output / BOARD)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for line in self.lines():
                print(f"catpo: watch the run: {line}", file=sys.stderr)

    def lines(self) -> Iterator[str]:
        """One line for each tracker that has something to look at."""
        for board in self.boards:
            yield f"tensorboard --logdir {board.logging_dir}"
        if url := getattr(getattr(sys.modules.get("wandb"), "run", None), "url", None):
            yield f"Weights & Biases: {url}"


def closing_lines(output: Path) -> list[str]:
    """The figures that a finished run ended with, and where all of them are."""
    rows = read_rows(output / "metrics.jsonl")
    trained, validated = ([row for row in rows if f"{prefix}loss" in row] for prefix in ("", EVALUATED))
    last = f"At step {rows[-1]['step']}: {figures(trained[-1])}" if trained else ""
    if validated:
        last += f"; validation {figures(validated[-1], EVALUATED)}"
    boards = [f"tensorboard --logdir {output / BOARD}"] if (output / BOARD).is_dir() else []
    where = " or ".join([f"{output / 'metrics.jsonl'}", f"catpo report --runs {output} --output report.html", *boards])
    return [*([last] if last else []), f"Logs: {where}"]
