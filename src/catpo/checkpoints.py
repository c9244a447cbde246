"""Checkpoints of a run: which of them are whole, when they are written, and when an older one may go. Knows no objective.

transformers writes a checkpoint file by file into its folder, and takes the folder with the highest number for the last one.
A process that is killed meanwhile leaves half of it. Here a checkpoint counts once it carries a mark, written after every
process has written its part; older ones are removed only then.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from catpo.runs import write_json
from catpo.stopping import Stop

MARK = "whole.json"
"""In a checkpoint's folder: all of it is there."""


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint in `folder` that was written to its end."""
    return max((mark.parent for mark in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MARK}")), key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class AllTrained(Exception):
    """The checkpoint that a run goes on from is that of its last step; its weights are loaded."""


class WholeCheckpoints(TrainerCallback):
    """Marks checkpoints, removes older ones, and sees to it that a run that goes on from one repeats and leaves out nothing.

    To be the last callback, since what others write belongs to the checkpoint.

    Args:
        stop: asks the run to leave after a step.
        any_process: whether a thing is so in any process.
        wait: until all processes are here.
    """

    def __init__(self, stop: Stop, any_process: Callable[[bool], bool], wait: Callable[[], None]) -> None:
        self.stop, self.any_process, self.wait = stop, any_process, wait
        self.is_due = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and state.is_world_process_zero:
            _tidy(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if state.global_step >= state.max_steps:  # transformers would take one step more where this is not an epoch's end
            raise AllTrained

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends_epoch = control.should_training_stop or state.epoch == int(state.epoch)
        if self.any_process(self.stop.is_asked):
            control.should_save = control.should_training_stop = True
        self.is_due = control.should_save and self.ends_epoch  # after the evaluation that is to come
        control.should_save &= not self.is_due
        control.should_log |= control.should_save  # what is not logged yet would be lost

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ends_epoch:
            control.should_save |= self.is_due
            control.should_log |= control.should_save
        else:  # left in the middle, with a checkpoint
            control.should_save = control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wait()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            for file in folder.rglob("*"):
                _sync(file)
            write_json(folder / MARK, {"step": state.global_step})
            _remove_others(folder)


def _tidy(folder: Path) -> None:
    """Finish what a run was killed over: beside the checkpoint it goes on from there is nothing."""
    for part in folder.glob(f".{MARK}.*.part"):
        part.unlink()
    _remove_others(folder)


def _remove_others(folder: Path) -> None:
    """Older checkpoints, and what a killed run has begun of newer ones."""
    for other in folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if other != folder:
            (other / MARK).unlink(missing_ok=True)
            shutil.rmtree(other, ignore_errors=True)


def _sync(file: Path) -> None:
    """On disk before the mark is."""
    if file.is_file():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
