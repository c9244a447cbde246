"""`catpo train`: pairs, rewards and a model in, a run folder out. Knows nothing of a step; that is `trainer.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from catpo.config.command import command
from catpo.config.options import TrainOptions
from catpo.core.errors import Stopped, UserError
from catpo.core.types import PreferencePair
from catpo.data.read import dev_split
from catpo.files.atomic import check_path
from catpo.files.json_files import write_json
from catpo.models import devices, loading, memory
from catpo.models.family import Family
from catpo.rewards.store import RewardStore
from catpo.runtime import disk_errors, workers
from catpo.runtime.launcher import process_count
from catpo.runtime.progress import tell_complete
from catpo.runtime.sigterm import AGAIN, Stop, on_ctrl_c, on_sigterm
from catpo.runtime.skip_log import SkipLog
from catpo.runtime.work_group import WorkGroup
from catpo.scoring.score import worker_count
from catpo.training import hub
from catpo.training.arguments import check_arguments, config_of, passed_on
from catpo.training.callbacks import CLOSING, MetricsFile
from catpo.training.checkpoints import AllTrained, AtomicCheckpoints, damage
from catpo.training.config import check_reference, check_rescoring, check_values
from catpo.training.lora import lora_config
from catpo.training.objectives import Objective, build
from catpo.training.opening import shards_itself
from catpo.training.pairs import read_training_pairs, usable_pairs
from catpo.training.precision import compute_dtype
from catpo.training.run_folder import (
    RUN,
    check_pairs,
    check_rewards,
    complete_so_far,
    describe_run,
    facts_of,
    free_output,
    hash_of,
    is_finished,
    last_metrics,
    save_model,
)
from catpo.training.screen import StepProgress, Trackers
from catpo.training.trainer import CatPOTrainer


@dataclass(frozen=True)
class TrainingResult:
    """Where the run lies and how it ended."""

    output: Path
    model: Path
    metrics: dict[str, float]


@dataclass(frozen=True)
class Training:
    """A training run before its first step: options checked, pairs read, model at hand."""

    options: TrainOptions
    objective: Objective
    pairs: Sequence[PreferencePair]
    """All of them, validation pairs included."""
    family: Family
    skip_log: SkipLog
    computes_in: torch.dtype
    """Precision of the forward pass."""


def prepare(
    options: TrainOptions, open_model: Callable[[TrainOptions], Family] | None = None, *, processes: int | None = None
) -> Training:
    """Everything that can be refused before anything is scored or trained; the run and `--dry-run` both start here.

    Args:
        options: of `catpo train`.
        open_model: gives the model; by default with its weights.
        processes: how many will train; those of the launcher if None.

    Raises:
        UserError: an option, the model or the data cannot be used.
    """
    loading.check_options(options)
    check_path(options.output)
    check_values(options)
    check_arguments(options)
    objective = build(options.objective)
    check_rescoring(options.rescore_every, objective, options.dataloader_num_workers, processes or process_count())
    check_reference(options.reference, None, objective)
    skip_log = SkipLog(options.on_error)
    pairs = read_training_pairs(options, skip_log)
    family = open_model(options) if open_model else _opened(options, objective)
    is_fp16, on_cpu = bool(passed_on(options).get("fp16")), _is_on_cpu(options.device)
    computes_in = compute_dtype(family.head.weight.dtype, options.bf16, is_fp16, on_cpu=on_cpu)
    return Training(options, objective, pairs, family, skip_log, computes_in)


def _opened(options: TrainOptions, objective: Objective) -> Family:
    is_sharded = shards_itself(options.rewards, objective, options.reference)
    return loading.opened(options, **({"device": "cpu"} if is_sharded else {}))


@command(TrainOptions)
def train(options: TrainOptions) -> TrainingResult:
    """Train a model on preference pairs; writes `catpo.json`, `metrics.jsonl`, `checkpoints/` and `model/` into `output`.

    Without `rewards`, what the objective needs is scored into `output/checkpoints/rewards` first.

    Raises:
        UserError: see `CatPOTrainer`; or `output` holds another run.
    """
    output, group = options.output, WorkGroup()
    with group.lock(output):
        checkpoint = free_output(output, options.resume)
        problem = None
        if is_finished(options, checkpoint):
            check_pairs(output, read_training_pairs(options, SkipLog(options.on_error)))
            if group.is_main:
                tell_complete(output)
        else:
            problem = None if checkpoint is None else group.broadcast("damage", lambda: damage(checkpoint))
            if problem is None:
                _train(options, checkpoint, group)
    group.leave()
    if problem is not None:
        raise UserError(problem)
    return TrainingResult(output, output / "model", last_metrics(output))


def _train(options: TrainOptions, checkpoint: Path | None, group: WorkGroup) -> None:
    output, training = options.output, prepare(options)
    if (problem := group.broadcast("hub", lambda: hub.problem_with_repository(options))) is not None:
        raise UserError(problem)
    pairs, data_hash = training.pairs, hash_of(training.pairs)
    if checkpoint is not None:
        check_pairs(output, pairs)
    if training.skip_log.goes_on:
        store = None if options.rewards is None else RewardStore.open(options.rewards)
        count = worker_count(options.dataloader_num_workers, training.family)
        pairs = usable_pairs(pairs, training.family, training.skip_log, options.max_length, store, count)
        if group.is_main:
            training.skip_log.write(output)
    train_pairs, eval_pairs = dev_split(pairs, options.eval_fraction, options.seed)
    trainer = _trainer(training, train_pairs, eval_pairs)
    if checkpoint is not None:
        check_rewards(output, trainer)

    def write_manifest(*, complete: bool) -> None:
        write_json(output / RUN, {**manifest(), "complete": complete})

    def manifest() -> dict[str, Any]:
        facts = describe_run(trainer, options, len(train_pairs), len(eval_pairs), training.skip_log)
        return {**facts, "data_hash": data_hash}

    if group.is_main:
        write_manifest(complete=False)
    explained = disk_errors.explained(lambda: complete_so_far(output)), workers.explained(trainer.args.dataloader_num_workers)
    with loading.quiet(), on_sigterm() as stop, explained[0], explained[1]:
        _run(trainer, checkpoint, stop, passed_on(options).get("save_total_limit", 1), resume=options.resume)
        with memory.explained("gathering the trained weights", trainer.model, trainer.optimizer, advice=memory.TRAINING):
            weights = trainer.whole_weights()  # a collective call: every process takes part
        if group.is_main:
            facts = facts_of(options, training.family, trainer.needs, manifest())
            save_model(trainer, output / "model", weights, facts)
            write_manifest(complete=True)  # with coefficients as they were learned
            hub.push(options, output / "model")
    group.barrier("saved")


def _trainer(training: Training, train_pairs: Sequence[PreferencePair], eval_pairs: Sequence[PreferencePair]) -> CatPOTrainer:
    options = training.options
    callbacks = [MetricsFile(options.output / "metrics.jsonl")]
    trainer = CatPOTrainer(
        training.family,
        config_of(options, has_eval=bool(eval_pairs), computes_in=training.computes_in),
        train_pairs,
        eval_pairs or None,
        peft_config=lora_config(options.lora, training.family, options.revision) if options.lora else None,
        callbacks=[*callbacks, StepProgress()] if options.progress else callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Trackers(trainer, options.output))
    return trainer


def _is_on_cpu(device: str | None) -> bool:
    """Whether the training runs on CPUs; DeepSpeed finds its device itself."""
    return devices.device_of(device).type == "cpu" and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"


def _run(trainer: CatPOTrainer, checkpoint: Path | None, stop: Stop, keep: int, *, resume: bool) -> None:
    """All remaining steps; leaves with a checkpoint after the next one when asked to. Keeps so many checkpoints."""
    accelerator = trainer.accelerator

    def in_any_process(is_so: bool) -> bool:
        return bool(accelerator.reduce(torch.tensor(float(is_so), device=accelerator.device)) > 0)

    def here(is_so: bool) -> bool:
        return is_so

    asked = in_any_process if process_count() > 1 else here
    checkpoints = AtomicCheckpoints(stop, asked, accelerator.wait_for_everyone, keep=keep)
    trainer.add_callback(checkpoints)
    try:
        with on_ctrl_c(stop, "this step and a checkpoint"), checkpoints.reading(checkpoint) if checkpoint else nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AllTrained:  # the checkpoint is the run's last step
        trainer.load_best()
        trainer.log({CLOSING: 0.0, "total_flos": trainer.state.total_flos})
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    state = trainer.state
    if state.global_step < state.max_steps:
        done = f"step {state.global_step} of {state.max_steps} is done, with a checkpoint in {trainer.args.output_dir}."
        advice = AGAIN if resume else "Give the command with --resume to go on."
        stop.leave_if_asked(done, advice)
        raise Stopped(f"{done} {advice}")  # another process was asked
