"""The order of pairs in training: batches of similar length, so that little is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from catpo.core.types import SIDES, PreferencePair
from catpo.rewards.store import RewardStore

PICTURE = 400
"""Words that a picture counts for: about as many tokens as LLaVA-1.5 makes of one."""


class LikeLengths(Sampler[int]):
    """Pairs of similar length side by side, the longest first, otherwise in an order drawn anew for each epoch.

    The order depends on seed and epoch only (accelerate calls `set_epoch`), so a resumed run continues with the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=generator))


def lengths_of(pairs: Sequence[PreferencePair], rewards: RewardStore | None) -> list[int]:
    """Tokens of pictures and responses by the store's counts; without one, words of all texts, `PICTURE` per picture."""
    lengths = []
    for pair in pairs:
        if rewards is None:
            texts = (*(turn.text for turn in pair.history), pair.prompt, pair.chosen, pair.rejected)
            lengths.append(sum(len(text.split()) for text in texts) + PICTURE * len(pair.images))
            continue
        stored = [rewards.get(pair.id, side) for side in SIDES]
        lengths.append(sum(grid.size for grid in stored[0].grids) + sum(len(row.token_ids) for row in stored))
    return lengths
