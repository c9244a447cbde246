"""What a training run says on the screen: progress and figures as it runs, where its logs are when it ends. Knows no step."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from catpo.runtime.progress import track
from catpo.training.run_lines import BOARD, EVALUATED, figures


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
            yield f"tensorboard --logdir {quote(str(board.logging_dir))}"
        if url := getattr(getattr(sys.modules.get("wandb"), "run", None), "url", None):
            yield f"Weights & Biases: {url}"
