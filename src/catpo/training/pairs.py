"""The pairs of a training run: read and checked once."""

from __future__ import annotations

from collections.abc import Sequence

from catpo.config.options import TrainOptions
from catpo.core.errors import UserError
from catpo.core.types import PreferencePair, check_pair
from catpo.data.read import read_pairs
from catpo.data.spool import select
from catpo.models.family import Family
from catpo.rewards.store import RewardStore
from catpo.runtime.skip_log import SkipLog
from catpo.scoring.batches import encoding_problems


def read_training_pairs(options: TrainOptions, skip_log: SkipLog) -> Sequence[PreferencePair]:
    """The pairs of a data set, or those given in Python, each checked.

    Raises:
        UserError: there are none, or one cannot be used and is not to be skipped.
    """
    if isinstance(options.pairs, str):
        pairs: Sequence[PreferencePair] = read_pairs(options.pairs, skip_log, options.limit)
    else:
        pairs = skip_log.usable(options.pairs, check_pair, lambda pair: f"pair {pair.id}")[: options.limit]
    if not pairs:
        raise UserError(f"{options.pairs} holds no preference pairs.")
    return pairs


def usable_pairs(
    pairs: Sequence[PreferencePair],
    family: Family,
    skip_log: SkipLog,
    max_length: int | None,
    store: RewardStore | None,
    worker_count: int = 0,
) -> Sequence[PreferencePair]:
    """The pairs that the model can read and that were scored; the others go to the skip log."""
    problems = encoding_problems(pairs, family, max_length, worker_count)

    def use(index: int) -> None:
        problem = next(problems)
        if store is not None:
            store.get(pairs[index].id, "chosen")
        if problem:
            raise UserError(problem)

    usable = skip_log.usable(range(len(pairs)), use, lambda index: f"pair {pairs[index].id}")
    return select(pairs, usable)
