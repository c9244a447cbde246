"""The order of pairs in training: batches of similar length, so that little is padded, or of few prompts, which share rows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from catpo.core.types import SIDES, PreferencePair
from catpo.data.spool import prompt_numbers
from catpo.rewards.store import RewardStore

PICTURE = 400
"""Words that a picture counts for: about as many tokens as LLaVA-1.5 makes of one."""


def prompts_together(pairs: Sequence[PreferencePair], batch_size: int, seed: int) -> PromptsTogether | None:
    """An order that keeps pairs of one prompt together; None where that changes nothing, so that any order will do."""
    prompts = prompt_numbers(pairs) if batch_size > 1 else []
    return None if len(set(prompts)) == len(prompts) else PromptsTogether(prompts, batch_size, seed)


class EpochSampler(Sampler[int]):
    """An order drawn anew for each epoch. It depends on seed and epoch only (accelerate calls `set_epoch`), so a resumed run
    continues with the same batches.

    Args:
        numbers: one for each pair, by which the pairs are put together.
        batch_size: pairs of a batch.
        seed: of the draws.
    """

    def __init__(self, numbers: Sequence[int], batch_size: int, seed: int) -> None:
        self.numbers, self.batch_size, self.seed, self.epoch = list(numbers), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.numbers)


class PromptsTogether(EpochSampler):
    """Pairs of one prompt, which is their number, in one batch.

    A prompt with more pairs than a batch fills several; one that fits nowhere whole is cut.
    """

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        filled, gaps = self._filled(rng)
        cut = [gaps[at : at + self.batch_size] for at in range(0, len(gaps), self.batch_size)]
        is_short = bool(cut) and len(cut[-1]) < self.batch_size
        last = cut.pop() if is_short else []
        batches = [*filled, *cut]
        rng.shuffle(batches)
        yield from chain(*batches, last)

    def _filled(self, rng: random.Random) -> tuple[list[list[int]], list[int]]:
        """Batches of whole prompts, and the pairs of those that filled none, prompt by prompt."""
        groups: dict[int, list[int]] = {}
        for pair, prompt in enumerate(self.numbers):
            groups.setdefault(prompt, []).append(pair)
        parts = [pairs[at : at + self.batch_size] for pairs in groups.values() for at in range(0, len(pairs), self.batch_size)]
        rng.shuffle(parts)
        by_room: dict[int, list[list[int]]] = {room: [] for room in range(self.batch_size + 1)}
        for part in sorted(parts, key=len, reverse=True):  # the largest first, each where it leaves the least room
            room = next((room for room in range(len(part), self.batch_size) if by_room[room]), self.batch_size)
            batch = by_room[room].pop() if room < self.batch_size else []
            by_room[room - len(part)].append(batch + part)
        filled = by_room.pop(0)
        unfilled = [batch for batches in by_room.values() for batch in batches]
        rng.shuffle(unfilled)
        return filled, [pair for batch in unfilled for pair in batch]


class LikeLengths(EpochSampler):
    """Pairs of similar length, which is their number, side by side, the longest first."""

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(LengthGroupedSampler(self.batch_size, lengths=self.numbers, generator=generator))


def lengths_of(pairs: Sequence[PreferencePair], rewards: RewardStore | None) -> list[int]:
    """Tokens of pictures and responses by the store's counts; without one, words of all texts, `PICTURE` per picture."""
    return [_words(pair) if rewards is None else _tokens(pair, rewards) for pair in pairs]


def _words(pair: PreferencePair) -> int:
    texts = (*(turn.text for turn in pair.history), pair.prompt, pair.chosen, pair.rejected)
    return sum(len(text.split()) for text in texts) + PICTURE * len(pair.images)


def _tokens(pair: PreferencePair, rewards: RewardStore) -> int:
    stored = [rewards.get(pair.id, side) for side in SIDES]
    return sum(grid.size for grid in stored[0].grids) + sum(len(row.token_ids) for row in stored)
