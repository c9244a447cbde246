"""The log's figures: means over processes and batches, with one collective however many figures there are."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from bench.launching import together
from torch import distributed

from catpo.training.config import CatPOConfig
from catpo.training.figures import Figures
from catpo.training.trainer import CatPOTrainer
from tiny import pairs

COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "all_gather_object", "broadcast", "reduce")


def counted():
    """Counts every collective from now on; ends with the process."""
    calls = []

    def counting(name, real):
        def collective(*args, **options):
            calls.append(name)
            return real(*args, **options)

        return collective

    for name in COLLECTIVES:
        setattr(distributed, name, counting(name, getattr(distributed, name)))
    return calls


def means_of_two_processes():
    """The means of three batches, and what gathering each figure of each batch by itself gives."""
    accelerator = Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    figures, expected = Figures(), {}
    for pairs_here, counted_values in ((3, None), (2, None), (2, 3)):
        batch = {"loss": torch.randn(pairs_here, generator=generator), "rows": torch.rand(2 * pairs_here, generator=generator)}
        batch["sometimes"] = torch.full((pairs_here,), torch.nan) if pairs_here == 3 else batch["loss"] + 1
        figures.record(batch, counted_values)
        for name, values in batch.items():
            mean = accelerator.gather(values)[:counted_values].nanmean().item()
            if not math.isnan(mean):
                expected.setdefault(name, []).append(mean)
    calls = counted()
    means = figures.means(accelerator.gather)
    assert figures.means(accelerator.gather) == {}
    return means, {name: sum(values) / len(values) for name, values in expected.items()}, calls


def test_figures_of_all_processes_are_gathered_at_once():
    for means, expected, calls in together(2, means_of_two_processes):
        assert means == expected and list(means) == ["loss", "rows", "sometimes"]
        assert len(calls) == 1


def collectives_of_logs(folder, store, output):
    """Collectives that each log took, transformers' own mean of the loss left out, and the figures logged."""
    config = CatPOConfig(
        output_dir=str(output), rewards=str(store), max_steps=2, logging_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = CatPOTrainer(str(folder), config, pairs(8)[:5], pairs(8)[5:])
    calls, counts, log = counted(), [], CatPOTrainer.log

    def counting(self, *args, **options):
        before = len(calls)
        log(self, *args, **options)
        counts.append(len(calls) - before)

    CatPOTrainer.log = counting
    trainer.train()
    return counts, trainer.state.log_history


def test_a_log_takes_one_collective(folder, store, tmp_path):
    (counts, history), (others, _) = together(2, partial(collectives_of_logs, folder, store, tmp_path))
    assert counts == others == [1, 1, 1, 0]  # two of training, one of validation; the last has no figures of ours
    assert history[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert "eval_rewards/margins" in history[2]
