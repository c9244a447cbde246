"""One measured process: trains a few steps with one trainer and prints times, peak memory and losses as JSON."""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from bench.shapes import LLAVA, make_pairs
from catpo.families import _base as families
from catpo.trainer import CatPOConfig, CatPOTrainer
from catpo.training import lora_config
from catpo.types import PreferencePair

LORA = "lora(r=16, alpha=32)"


class StepTimes(TrainerCallback):
    """Seconds of each optimiser step, data loading included; peak memory is asked for at the end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.seconds:
            self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.began = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rewards", type=Path)
    parser.add_argument("--trainer", required=True, help="trl, or an objective of ours")
    parser.add_argument("--pairs", type=int, default=1, help="per batch")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as output:
        print(json.dumps(measure(options, output)))


def measure(options: argparse.Namespace, output: str) -> dict[str, Any]:
    pairs = make_pairs(LLAVA, options.pairs * (options.steps + 1))
    times = StepTimes()
    common = {
        "output_dir": output,
        "per_device_train_batch_size": options.pairs,
        "max_steps": options.steps + 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",  # their defaults differ
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,  # TRL would switch it on
        "disable_tqdm": True,
        "seed": 0,
        "beta": 0.1,
    }
    trainer = _peer(options, pairs, common) if options.trainer == "trl" else _ours(options, pairs, common)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(times)
    before = _peak_mebibytes()
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"seconds": times.seconds[1:], "memory": _peak_mebibytes() - before, "losses": losses}  # the first step warms up


def _ours(options: argparse.Namespace, pairs: list[PreferencePair], common: dict[str, Any]) -> Any:
    family = families.load(options.model)
    peft_config = lora_config(LORA, family) if options.lora else None
    arguments = CatPOConfig(**common, objective=options.trainer, rewards=str(options.rewards), self_check=False)
    return CatPOTrainer(family, arguments, pairs, peft_config=peft_config)


def _peer(options: argparse.Namespace, pairs: list[PreferencePair], common: dict[str, Any]) -> Any:
    from trl import DPOConfig, DPOTrainer

    family = families.load(options.model)
    family.freeze_vision()
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"images": List(ImageFeature()), "prompt": message, "chosen": message, "rejected": message})
    rows = Dataset.from_list([_row(pair) for pair in pairs], features=features)
    return DPOTrainer(
        model=family.model,
        ref_model=None if options.lora else copy.deepcopy(family.model),
        args=DPOConfig(**common, max_length=None),
        train_dataset=rows,
        processing_class=family.processor,
        peft_config=lora_config(LORA, family) if options.lora else None,
    )


def _row(pair: PreferencePair) -> dict[str, Any]:
    return {
        "images": [pair.images[0].open()],
        "prompt": [{"role": "user", "content": pair.prompt}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


def _peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
