"""Callbacks beside the training steps: new draws, learned coefficients, the metrics file. Knows no objective."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from catpo.core.errors import UserError
from catpo.files.json_files import append_rows, read_json, read_rows, repair_rows, write_json, write_rows
from catpo.training.checkpoints import checkpoint_of
from catpo.training.learned_fusion import LearnedFusion
from catpo.training.view_passes import ViewPasses

CLOSING = "train_runtime"
"""A name that only the last row of a run has."""
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class ResampleViews(TrainerCallback):
    """Draws the random views anew in every epoch, seeded by its number, so that a resumed run draws the same."""

    def __init__(self, view_passes: ViewPasses) -> None:
        self.view_passes = view_passes

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.view_passes.epoch = math.floor((state.epoch or 0) + 1e-6)  # a resumed epoch may come as 0.9999…


class KeepFusion(TrainerCallback):
    """The learned coefficients of Eq. 11: one gradient for all processes, and a file in each checkpoint."""

    FILE = "fusion.json"

    def __init__(self, fusion: LearnedFusion, reduce: Any) -> None:
        self.fusion, self.reduce = fusion, reduce

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.fusion.logits.grad is not None:
            self.fusion.logits.grad = self.reduce(self.fusion.logits.grad, "mean")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fusion.logits.grad = None  # the Trainer clears those of the model only

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(checkpoint_of(args, state.global_step) / self.FILE, {"logits": self.fusion.logits.tolist()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            restore(self.fusion, state.best_model_checkpoint)


def restore(fusion: LearnedFusion, checkpoint: str | Path) -> None:
    """Take the coefficients that a checkpoint has, if any."""
    file = Path(checkpoint) / KeepFusion.FILE
    if file.is_file():
        fusion.restore(read_json(file, made_by="catpo train")["logits"])


class KeepSpecialTokens(TrainerCallback):
    """Keeps the model's special tokens: the Trainer overwrites them with the tokenizer's, and responses would end elsewhere."""

    def __init__(self, model: Any) -> None:
        text = model.config.get_text_config()
        configs = (text, model.generation_config)
        self.configs = [(config, {name: getattr(config, name, None) for name in SPECIAL_TOKENS}) for config in configs]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for config, tokens in self.configs:
            for name, token in tokens.items():
                setattr(config, name, token)


class MetricsFile(TrainerCallback):
    """Writes every log to `metrics.jsonl`, without the rows that a resumed run will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        rows = repair_rows(self.path) if state.global_step else []
        _check(rows, self.path)
        kept = [row for row in rows if row["step"] <= state.global_step and CLOSING not in row]
        write_rows(self.path, kept)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if CLOSING in logs:
            if state.global_step < state.max_steps:  # stopped early, so this is not the last row
                return
            logs = {**logs, "train_loss": _mean_loss(read_rows(self.path))}
        append_rows(self.path, [{"step": state.global_step, **logs}])


def _check(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Raise UserError unless every row has its step, and a loss, if any, that is a number."""
    for number, row in enumerate(rows, start=1):
        if type(row.get("step")) is not int:
            raise UserError(f"{path}:{number} lacks a whole number 'step'. Remove {path.parent} and start again.")
        if type(row.get("loss", 0.0)) not in (int, float):
            raise UserError(f"{path}:{number}: 'loss' must be a number. Remove {path.parent} and start again.")


def _mean_loss(rows: Sequence[Mapping[str, Any]]) -> float:
    """Over all steps of a run, including those before it was resumed; a row has the mean since the row before."""
    total = last = 0.0
    for row in rows:
        if "loss" in row:
            total += row["loss"] * (row["step"] - last)
            last = row["step"]
    return total / max(last, 1)
