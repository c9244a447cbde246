"""Rewards that follow the policy: it scores the pairs again every few steps, while the reference stays the same.

Not in the paper, whose rewards are computed once (Sec. 4.5). Knows nothing of losses.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from catpo.core.spec import parse
from catpo.core.types import PreferencePair
from catpo.models.family import Family
from catpo.rewards.store import RewardStore
from catpo.scoring.score import score_pairs
from catpo.scoring.settings import ScoreSettings
from catpo.training.collator import PairCollator


class Rescoring(TrainerCallback):
    """Gives the collator the weights of a new store after every `every` optimiser steps.

    The stores, without hidden states and maps, stay in `folder` as `rewards-step-N`, so that a resumed run finds the last. One
    of a step that the resumed run takes again is removed: it is scored again.
    """

    def __init__(
        self,
        every: int,
        pairs: Sequence[PreferencePair],
        family: Family,
        collator: PairCollator,
        folder: Path,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        assert collator.rewards is not None
        self.every, self.pairs, self.family, self.collator, self.folder = every, pairs, family, collator, folder
        self.autocast = autocast
        self.settings = settings_of(collator.rewards)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for folder in self.folder.glob("rewards-step-*"):  # of a killed run
            step = folder.name.rpartition("-")[2]
            if step.isdecimal() and int(step) > state.global_step:
                shutil.rmtree(folder)
        last = min(state.global_step, state.max_steps - 1) // self.every * self.every  # the last step scores nothing
        if last:
            self.collator.weights_from = RewardStore.open(self._path(last))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.every or step >= state.max_steps:
            return
        family = self.family
        with family.answering(), self.autocast():
            self.collator.weights_from = score_pairs(
                self.pairs,
                family,
                self._path(step),
                self.settings,
                cache="logps",
                attention_maps=False,
                progress=False,
                dataloader_num_workers=args.dataloader_num_workers,
            )

    def _path(self, step: int) -> Path:
        return self.folder / f"rewards-step-{step}"


def settings_of(store: RewardStore) -> ScoreSettings:
    """What a store was scored with."""
    attention = store.provenance["attention"]
    signals = tuple(parse(signal) for signal in store.provenance["signals"])
    return ScoreSettings(signals, attention["layers"], attention["heads"], attention["query"], attention["patches"])
