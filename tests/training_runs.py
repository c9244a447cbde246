"""Training runs of the tiny model: trainers and their curves; runs of `catpo.train`, whole and interrupted."""

from __future__ import annotations

import pytest

from catpo.files.json_files import read_rows
from catpo.models.family import Family
from catpo.training.config import CatPOConfig
from catpo.training.train import train
from catpo.training.trainer import CatPOTrainer
from tiny import pairs


def trainer(folder, output, data=None, peft_config=None, **options):
    """A trainer of the model in a folder or in memory, on eight pairs or on `data`, that logs every step and saves nothing."""
    defaults = dict(
        output_dir=str(output), learning_rate=1e-3, per_device_train_batch_size=2, logging_steps=1, use_cpu=True,
        save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", seed=3,
    )  # fmt: skip
    model = folder if isinstance(folder, Family) else str(folder)
    return CatPOTrainer(model, CatPOConfig(**{**defaults, **options}), data or pairs(8), peft_config=peft_config)


def curve(trainer, name="loss"):
    """A figure at every step that logged it."""
    return [row[name] for row in trainer.state.log_history if name in row]


def training(folder, store, output, **options):
    """Two epochs over eight pairs: eight steps, with a checkpoint after every second one."""
    defaults = dict(
        pairs=pairs(8), model=str(folder), rewards=store, learning_rate=1e-3, num_train_epochs=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, lora="lora(r=4, alpha=8)", save_steps=2,
        logging_steps=1, eval_fraction=0.0, progress=False,
    )  # fmt: skip
    return train(output=output, **{**defaults, **options})


def interrupted_and_resumed(folder, store, output, step, **options):
    """The same run, killed within `step` and continued from the checkpoint before it."""
    training_step, calls = CatPOTrainer.training_step, []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CatPOTrainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            training(folder, store, output, **options)
    return training(folder, store, output, **options, resume=True)


def logged(run, *names):
    """The values under `names` of every row of a run's `metrics.jsonl` that has a loss."""
    rows = read_rows(run.output / "metrics.jsonl")
    return [[row[name] for name in names] for row in rows if "loss" in row]
