"""`catpo train`: pairs, a reward store and a model in, a run out: `catpo.json`, `metrics.jsonl`, `checkpoints/`, `model/`.

Knows nothing of a step; that is `trainer.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

from catpo.core.errors import Stopped, UserError
from catpo.core.types import PreferencePair
from catpo.data.read import dev_split, read_pairs
from catpo.files.json_files import read_json, read_rows, write_json
from catpo.files.provenance import check_same, versions
from catpo.models import loading
from catpo.rewards.store import RewardStore
from catpo.runtime import disk_errors
from catpo.runtime.launcher import process_count
from catpo.runtime.sigterm import Stop, on_sigterm
from catpo.runtime.skip_log import SkipLog
from catpo.runtime.work_group import WorkGroup
from catpo.training.callbacks import CLOSING, MetricsFile, StepProgress
from catpo.training.checkpoints import AllTrained, AtomicCheckpoints, damage, last_whole
from catpo.training.config import CatPOConfig, check_values, lora_config
from catpo.training.pairs import checked, usable
from catpo.training.trainer import CatPOTrainer


@dataclass(frozen=True)
class TrainingResult:
    """Where the run lies and how it ended."""

    output: Path
    model: Path
    metrics: dict[str, float]


def train(
    *,
    pairs: str | Path | Sequence[PreferencePair],
    model: str | Path,
    output: str | Path,
    rewards: str | Path | None = None,
    objective: str = "catpo",
    reference: str = "cached",
    learning_rate: float = 1.4e-6,
    num_train_epochs: float = 6,
    per_device_train_batch_size: int = 1,
    gradient_accumulation_steps: int = 32,
    warmup_steps: int = 0,
    lr_scheduler_type: str = "cosine",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    lora: str | None = "lora",
    max_length: int | None = None,
    max_steps: int = -1,
    eval_fraction: float = 0.1,
    seed: int = 42,
    resume: bool = False,
    save_steps: int = 0,
    logging_steps: int = 10,
    rescore_every: int = 0,
    group_by_length: bool = False,
    dataloader_num_workers: int = 0,
    limit: int | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    report_to: str = "none",
    on_error: str = "stop",
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Train a model on preference pairs; writes `catpo.json`, `metrics.jsonl`, `checkpoints/` and `model/` into `output`.

    Args:
        rewards: the reward store; without one, what the objective needs is scored into `output/checkpoints/rewards` first.
        objective: `dpo`, `catpo`, with options, e.g. `catpo(preset='paper', shared_prefix='neutral')`.
        reference: `cached` in the store, or `online` beside the policy.
        lora: `lora(r=128, alpha=256, dropout=0.0)`, or None for full training of the decoder.
        dev_share: share of the pairs kept out of training and logged as `eval_…`.
        resume: go on from the last checkpoint in `output`.
        save_steps: a checkpoint every so many steps; 0: one per epoch.
        on_error: `skip` leaves out pairs that cannot be used or were not scored, and says in `catpo.json` which.
        trust_remote_code: run Python code that the checkpoint brings along.

    Raises:
        UserError: see `CatPOTrainer`; or `output` holds another run.
    """
    options = dict(locals())
    output = Path(output)
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in options.items() if name not in _NOT_SETTINGS
    }
    group = WorkGroup()
    with group.lock(output):
        checkpoint = free_output(output, resume)
        if checkpoint and (output / "catpo.json").exists():
            begun = _begun(output)
            check_same(begun["settings"], settings, where=str(output))
            if begun["complete"] and (output / "model").is_dir():
                group.leave()
                return TrainingResult(output, output / "model", _last_metrics(output))
        if checkpoint and (problem := group.broadcast("damage", lambda: damage(checkpoint))):
            group.leave()
            raise UserError(problem)
        check_values(options)
        skipped = SkipLog(on_error)
        everything = read_pairs(pairs, skipped, limit) if isinstance(pairs, str | Path) else checked(pairs, skipped, limit)
        train_pairs, dev_pairs = dev_split(everything, eval_fraction, seed)
        place = "cpu" if rewards is not None and os.environ.get("ACCELERATE_USE_FSDP") == "true" else device
        family = loading.load(
            model, device=place, dtype=dtype, quantization=quantization, attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if skipped.goes_on:
            readable = usable(everything, family, skipped, max_length, None if rewards is None else RewardStore.open(rewards))
            train_pairs, dev_pairs = dev_split(readable, eval_fraction, seed)
            if group.is_main:
                skipped.write(output)
        config = CatPOConfig(
            output_dir=str(output / "checkpoints"),
            objective=objective,
            rescore_every=rescore_every,
            rewards=None if rewards is None else str(rewards),
            reference=reference,
            max_length=max_length,
            learning_rate=learning_rate,
            num_train_epochs=num_train_epochs,
            max_steps=max_steps,
            per_device_train_batch_size=per_device_train_batch_size,
            per_device_eval_batch_size=per_device_train_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            warmup_steps=warmup_steps,
            lr_scheduler_type=lr_scheduler_type,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            seed=seed,
            logging_steps=logging_steps,
            save_strategy="steps" if save_steps else "epoch",
            save_steps=save_steps or 500,
            eval_strategy="epoch" if dev_pairs else "no",
            dataloader_num_workers=dataloader_num_workers,
            train_sampling_strategy="group_by_length" if group_by_length else "random",
            bf16=bf16,
            report_to=report_to,
            disable_tqdm=True,
            use_cpu=_is_on_cpu(device),
        )
        config.gradient_checkpointing = gradient_checkpointing  # as an argument, newer transformers warn even of False
        trainer = CatPOTrainer(
            family, config, train_pairs, dev_pairs or None, peft_config=lora_config(lora, family) if lora else None,
            callbacks=[MetricsFile(output / "metrics.jsonl"), *([StepProgress()] if progress else [])],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        about = lambda: _provenance(trainer, settings, len(train_pairs), len(dev_pairs), skipped)
        if group.is_main:
            write_json(output / "catpo.json", {**about(), "complete": False})
        with loading.quiet(), on_sigterm() as stop, disk_errors.explained(lambda: _whole_so_far(output)):
            _run(trainer, checkpoint, stop)
            weights = trainer.whole_weights()
            if group.is_main:
                _save_model(trainer, output / "model", weights)
                write_json(output / "catpo.json", {**about(), "complete": True})  # with coefficients as they were learned
        group.barrier("saved")
    group.leave()
    return TrainingResult(output, output / "model", _last_metrics(output))


def _run(trainer: CatPOTrainer, checkpoint: Path | None, stop: Stop) -> None:
    """All steps that are left; leaves with a checkpoint after the next one when it is asked to."""
    accelerator = trainer.accelerator
    any_process = lambda is_so: bool(accelerator.reduce(torch.tensor(float(is_so), device=accelerator.device)) > 0)
    here_only = lambda is_so: is_so
    trainer.add_callback(
        AtomicCheckpoints(stop, any_process if process_count() > 1 else here_only, accelerator.wait_for_everyone)
    )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AllTrained:
        trainer.log({CLOSING: 0.0, "total_flos": trainer.state.total_flos})
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    state = trainer.state
    if state.global_step < state.max_steps:
        raise Stopped(
            f"SIGTERM: step {state.global_step} of {state.max_steps} is done, with a checkpoint in {trainer.args.output_dir}. "
            "Give the same command with --resume to go on."
        )


_NOT_SETTINGS = (
    "output", "resume", "pairs", "dataloader_num_workers", "report_to", "progress", "device", "on_error", "trust_remote_code",
)  # fmt: skip


def _is_on_cpu(device: str | None) -> bool:
    """Whether the training runs on CPUs. DeepSpeed finds its device itself; asked for a CPU, accelerate would leave it out."""
    return (device == "cpu" or not torch.cuda.is_available()) and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"


def _last_metrics(output: Path) -> dict[str, float]:
    rows = read_rows(output / "metrics.jsonl")
    return rows[-1] if rows else {}


def _whole_so_far(output: Path) -> str:
    """For a message about a full disk."""
    last = last_whole(output / "checkpoints")
    return (
        f"Whole so far: {last or 'no checkpoint'}. An older checkpoint is removed after a newer one is whole, so there must be "
        "room for two. Make room, then give the same command with --resume."
    )


def _begun(output: Path) -> dict[str, Any]:
    """The `catpo.json` of the run in `output`.

    Raises:
        UserError: it lacks what a run goes on from.
    """
    path = output / "catpo.json"
    begun = read_json(path, made_by="catpo train")
    for name, kind in (("settings", dict), ("complete", bool)):
        if not isinstance(begun.get(name), kind):
            raise UserError(f"{path} lacks a usable '{name}'. Remove {output} and start again, or choose another --output.")
    return begun


def free_output(output: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, if there is one.

    Raises:
        UserError: the folder holds a run, and it is not to be gone on with.
    """
    is_finished = (output / "model").exists()
    last = last_whole(output / "checkpoints")
    if not resume and (is_finished or last):
        raise UserError(f"{output} already holds a run. Give resume=True (--resume) to go on, or another --output.")
    return last


def _save_model(trainer: CatPOTrainer, folder: Path, weights: Mapping[str, Any] | None) -> None:
    """Weights (or adapter) and processor, complete or not at all; `weights` where the model holds a part of them only."""
    part, old = folder.with_name(".model.part"), folder.with_name(".model.old")
    for leftover in (part, old):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = trainer.family.model_id
    type(model).save_pretrained(model, part, state_dict=weights)  # the customary key names, unlike the checkpoints'
    trainer.family.processor.save_pretrained(part)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _provenance(
    trainer: CatPOTrainer, settings: Mapping[str, Any], train_count: int, dev_count: int, skipped: SkipLog
) -> dict[str, Any]:
    objective = trainer.objective
    return {
        "format": 1,
        "objective": str(objective.spec),
        "objective_options": objective.options,
        "fusion": vars(objective.fusion),
        **({"learned_fusion": trainer.learned_fusion.coefficients} if trainer.learned_fusion is not None else {}),
        "model": trainer.family.model_id,
        "rewards": trainer.rewards.fingerprint if trainer.rewards is not None else None,
        "pairs": {"train": train_count, "dev": dev_count},
        **({"skipped": skipped.summary()} if skipped.goes_on else {}),
        "settings": dict(settings),
        "processes": {"count": process_count(), "engine": trainer.accelerator.distributed_type.value},
        "versions": versions(),
    }
