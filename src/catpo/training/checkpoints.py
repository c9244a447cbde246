"""Checkpoints of a run: which are complete, when one is written, and when older ones are removed. Knows no objective.

transformers writes a checkpoint file by file, and resumes from the folder with the highest number, even if the process was
killed halfway through it. Here a checkpoint counts once it carries a mark, written after every process has written its part;
only then are older ones removed. The mark lists size and checksum of every file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from catpo.core.errors import UserError, border, did_you_mean, shown
from catpo.files import strict_json
from catpo.files.atomic import PART
from catpo.files.checksums import describe_file, problem_with
from catpo.files.json_files import read_json, write_json
from catpo.files.records import read_bytes
from catpo.models.memory import is_out_of_memory
from catpo.runtime.sigterm import Stop

MARK = "whole.json"
"""In a checkpoint's folder: says that it is complete, and lists its files."""
STATE_NUMBERS = ("epoch", "max_steps", "num_train_epochs", "num_input_tokens_seen", "total_flos", "train_batch_size")


def checkpoint_of(args: Any, step: int) -> Path:
    """The folder of a step's checkpoint, for the Trainer's arguments."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def last_whole(folder: Path) -> Path | None:
    """The last complete checkpoint in `folder`."""
    return max(_marked(folder), key=_number, default=None)


def _marked(folder: Path) -> list[Path]:
    return [mark.parent for mark in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MARK}") if _step(mark.parent).isdecimal()]


def _number(checkpoint: Path) -> int:
    return int(_step(checkpoint))


def _step(checkpoint: Path) -> str:
    return checkpoint.name.rpartition("-")[2]


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a marked checkpoint and what to do, as a message; None if every file is as it was written.

    Reads all of it once. Of files that an older version listed, only the size is compared; if it listed none, nothing is.
    """
    try:
        mark = read_json(checkpoint / MARK, made_by="catpo train")
    except UserError:
        return _message(checkpoint, MARK, "cannot be read")
    if str(mark.get("step")) != _step(checkpoint):
        return _message(checkpoint, MARK, "is of another step")
    listed = mark.get("files", {})
    if not isinstance(listed, Mapping):
        return _message(checkpoint, MARK, "does not list the checkpoint's files")
    for name, written in listed.items():
        if problem := problem_with(checkpoint, name, written):
            return _message(checkpoint, shown(name), problem)
    return _problem_of_state(checkpoint)


def _problem_of_state(checkpoint: Path) -> str | None:
    """What the Trainer would take from its own file without a look at it: of an early version, that file has no checksum."""
    for file in checkpoint.iterdir():
        if not (file.is_file() or file.is_dir()):
            return _message(checkpoint, shown(file.name), "is not a file")
    try:
        content = read_bytes(checkpoint / TRAINER_STATE_NAME)
        state = strict_json.parse_object(content, place=TRAINER_STATE_NAME, remedy="", loads=json.loads)
    except UserError:
        return _message(checkpoint, TRAINER_STATE_NAME, "cannot be read")
    is_step = type(state.get("global_step")) is int and str(state["global_step"]) == _step(checkpoint)
    numbers = [state[name] for name in STATE_NUMBERS if state.get(name) is not None]
    are_numbers = all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
    if not (is_step and are_numbers and strict_json.fits(state.get("log_history"), list[dict])):
        return _message(checkpoint, TRAINER_STATE_NAME, "is not that of this step")
    return None


def _message(checkpoint: Path, name: str, reason: str) -> str:
    return (
        f"{checkpoint / name} {reason}, so training cannot continue from there. Put the file back, or remove {checkpoint} and "
        "give the same command again to train from an older checkpoint, if there is one, or from the start."
    )


class AllTrained(Exception):
    """The run resumes from the checkpoint of its last step; the weights are loaded."""


class AtomicCheckpoints(TrainerCallback):
    """Marks checkpoints and removes older ones, so that a resumed run neither repeats nor leaves out anything.

    Add it as the last callback: what the others write belongs to the checkpoint.

    Args:
        stop: asks the run to stop after a step.
        any_process: whether its argument is true in any process.
        wait: a barrier.
        keep: how many of the last checkpoints stay; the best one stays beside them, if the run ends with that.
    """

    def __init__(self, stop: Stop, any_process: Callable[[bool], bool], wait: Callable[[], None], keep: int = 1) -> None:
        self.stop, self.any_process, self.wait, self.keep = stop, any_process, wait, keep
        self.is_due = self.has_begun = False

    def reading(self, checkpoint: Path) -> AbstractContextManager[None]:
        """The net around everything that reads a checkpoint, up to the first step after it."""
        advice = f"Remove {checkpoint} and give the same command again to train from an older one or from the start."

        def passes(error: BaseException) -> bool:
            return self.has_begun or isinstance(error, AllTrained) or is_out_of_memory(error)

        return border(f"{checkpoint} cannot be read", advice, passes=passes)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.has_begun = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > state.max_steps:
            raise UserError(
                f"The last checkpoint in {args.output_dir} is of step {state.global_step}, and the run has {state.max_steps} "
                "steps. Resume it with the pairs and the number of processes it began with."
            )
        if state.global_step and state.is_world_process_zero:
            folder = checkpoint_of(args, state.global_step)
            for part in folder.glob(f".{MARK}.*.part"):  # of a run that was killed as it wrote the mark
                part.unlink()
            self._remove_others(folder, args, state)
        if args.load_best_model_at_end and state.best_global_step:
            _point_to_best(args, state)
        if state.global_step >= state.max_steps:  # transformers would take one more step in the middle of an epoch
            raise AllTrained

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends_epoch = control.should_training_stop or state.epoch == int(state.epoch)
        if self.any_process(self.stop.is_asked):
            control.should_save = control.should_training_stop = True
        # at an epoch's end the evaluation comes first: its figures belong to the checkpoint
        self.is_due = control.should_save and self.ends_epoch
        control.should_save &= not self.is_due
        control.should_log |= control.should_save  # a resumed run would miss what is not logged yet

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ends_epoch:
            control.should_save |= self.is_due
            control.should_log |= control.should_save
        else:  # stopped in the middle of an epoch, with a checkpoint
            control.should_save = control.should_evaluate = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metric = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if metric not in kwargs["metrics"]:
            raise UserError(
                f"metric_for_best_model='{args.metric_for_best_model}' is no figure of this run. "
                f"{did_you_mean(metric, kwargs['metrics'])}"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wait()
        if state.is_world_process_zero:
            folder = checkpoint_of(args, state.global_step)
            written = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
            with ThreadPoolExecutor(1) as disk:  # hashing takes no time of its own while the disk writes
                on_disk = disk.map(_sync, written.values())
                files = {name: describe_file(file) for name, file in written.items()}
                list(on_disk)  # before the mark is
            write_json(folder / MARK, {"step": state.global_step, "files": files})
            self._remove_others(folder, args, state)

    def _remove_others(self, folder: Path, args: Any, state: Any) -> None:
        """Remove checkpoints older than those to keep, and what a killed run wrote of newer ones."""
        older = sorted((each for each in _marked(folder.parent) if _number(each) < _number(folder)), key=_number, reverse=True)
        kept = {folder, *older[: self.keep - 1]}
        if args.load_best_model_at_end and state.best_global_step:
            kept.add(checkpoint_of(args, state.best_global_step))
        for other in folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if other not in kept:
                (other / MARK).unlink(missing_ok=True)  # first: half a folder must not count
                shutil.rmtree(other, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    """The files of a checkpoint, those of all processes, without the mark."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in files if file != folder / MARK and not PART.fullmatch(file.name)]


def _point_to_best(args: Any, state: Any) -> None:
    """The Trainer looks for the best checkpoint where the run was when that was written, and goes on without one."""
    best = checkpoint_of(args, state.best_global_step)
    if not (best / MARK).is_file():
        raise UserError(
            f"{best}, the best checkpoint so far, is not there, so the run cannot end with it. Put it back, or start again."
        )
    state.best_model_checkpoint = str(best)


def _sync(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def check_loaded(load_result: Any, tied: Collection[str]) -> None:
    """Raises UserError for a checkpoint that does not hold the model's weights, those aside that are tied to others."""
    missing = [name for name in load_result.missing_keys if name not in tied]
    if missing or load_result.unexpected_keys:
        raise UserError(
            f"The checkpoint does not hold this model's weights ({len(missing)} missing, "
            f"{len(load_result.unexpected_keys)} unknown, "
            f"e.g. '{(missing or load_result.unexpected_keys)[0]}'). Resume with the model and options the run began with."
        )
