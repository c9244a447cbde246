"""Checkpoints of a run: which of them are whole, when they are written, and when an older one may go. Knows no objective.

transformers writes a checkpoint file by file into its folder, and takes the folder with the highest number for the last one.
A process that is killed meanwhile leaves half of it. Here a checkpoint counts once it carries a mark, written after every
process has written its part; older ones are removed only then. The mark tells size and checksum of every file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from catpo.core.errors import UserError, shown
from catpo.files.atomic import PART
from catpo.files.json_files import read_json, write_json
from catpo.runtime.sigterm import Stop

MARK = "whole.json"
"""In a checkpoint's folder: all of it is there, and what it is."""
CHUNK = 1 << 20
"""Bytes that are read at once."""


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint in `folder` that was written to its end."""
    marked = (mark.parent for mark in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MARK}"))
    return max((each for each in marked if _number(each).isdecimal()), key=lambda each: int(_number(each)), default=None)


def _number(checkpoint: Path) -> str:
    return checkpoint.name.rpartition("-")[2]


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a whole checkpoint and what to do, as a message; None if every file is as it was written.

    Reads all of it once. A checkpoint of a version that did not write down its files counts as undamaged.
    """
    try:
        mark = read_json(checkpoint / MARK, made_by="catpo train")
    except UserError:
        return _told(checkpoint, MARK, "cannot be read")
    if str(mark.get("step")) != _number(checkpoint):
        return _told(checkpoint, MARK, "is of another step")
    written = mark.get("files", {})
    if not isinstance(written, Mapping):
        return _told(checkpoint, MARK, "does not list the checkpoint's files")
    there = {file.relative_to(checkpoint).as_posix(): file for file in _files(checkpoint)}
    for name, facts in written.items():
        if name not in there:
            return _told(checkpoint, shown(name), "is missing")
        try:
            is_as_written = _facts(there[name]) == facts
        except OSError as error:
            return _told(checkpoint, name, f"cannot be read ({error.strerror})")
        if not is_as_written:
            return _told(checkpoint, name, "is damaged")
    return None


def _told(checkpoint: Path, name: str, reason: str) -> str:
    return (
        f"{checkpoint / name} {reason}, so training cannot go on from there. Put the file back, or remove {checkpoint} and "
        "give the same command again to train from an older checkpoint, if there is one, or from the start."
    )


class AllTrained(Exception):
    """The checkpoint that a run goes on from is that of its last step; its weights are loaded."""


class AtomicCheckpoints(TrainerCallback):
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
            written = {file.relative_to(folder).as_posix(): _synced(file) for file in _files(folder)}
            write_json(folder / MARK, {"step": state.global_step, "files": written})
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


def _files(folder: Path) -> list[Path]:
    """Of a checkpoint, those of all processes, without the mark."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in found if file != folder / MARK and not PART.fullmatch(file.name)]


def _synced(file: Path) -> dict[str, Any]:
    """The facts of a file that is on disk before the mark is."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
    return _facts(file)


def _facts(file: Path) -> dict[str, Any]:
    """Size in bytes and checksum."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "blake2b": digest.hexdigest()}
