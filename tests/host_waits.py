"""Print how often the host waits for a GPU, by family, counted on a pretended one: python tests/host_waits.py [FAMILY ...]"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from catpo.models.loading import quiet
from catpo.scoring.score import score_pairs
from catpo.training.config import CatPOConfig
from catpo.training.trainer import CatPOTrainer
from family_checks import sized_pair
from pretended_cuda import Device, pretended_cuda
from tiny_families import BUILDERS, build


class SecondStep(TrainerCallback):
    """What the second optimiser step makes the host wait for: later ones do the same, the first is checked besides."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.waits: Counter[tuple[str, str]] = Counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 1:
            self.device.waits.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 2:
            self.waits = self.device.waits.copy()


def line(name: str, folder: Path) -> str:
    """Waits per response of a scored batch of eight pairs, and per training batch of two pairs, transformers' own in it."""
    pairs = [sized_pair(number) for number in range(8)]
    with pretended_cuda() as device, quiet():
        family = build(name)
        family.model.to("cuda")
        assert family.model_hash  # read once
        device.reset()
        store = score_pairs(pairs, family, folder / "store", progress=False, dataloader_num_workers=0)
        scoring = device.waits.total() / 16
        config = CatPOConfig(
            output_dir=str(folder / "run"), rewards=str(store.path), max_steps=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=1, save_strategy="no", disable_tqdm=True, dataloader_num_workers=0, logging_steps=9,
        )  # fmt: skip
        second = SecondStep(device)
        CatPOTrainer(family, config, pairs, callbacks=[second]).train()
    theirs = sum(count for (_, where), count in second.waits.items() if " < " in where)
    return f"| {name} | {scoring:.1f} | {second.waits.total()} | {theirs} |"


if __name__ == "__main__":
    print("| Model | Scoring, per response | Training, per batch | Of these in transformers |\n|---|---:|---:|---:|")
    for each in sys.argv[1:] or BUILDERS:
        with tempfile.TemporaryDirectory() as place:
            print(line(each, Path(place)), flush=True)
