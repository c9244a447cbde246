"""The pairs of a training run, read, checked and split."""

from __future__ import annotations

from collections.abc import Sequence

from catpo.core.types import PreferencePair, check_pair
from catpo.data.spool import select
from catpo.models.family import Family
from catpo.rewards.store import RewardStore
from catpo.runtime.skip_log import SkipLog


def checked(pairs: Sequence[PreferencePair], skipped: SkipLog, limit: int | None) -> list[PreferencePair]:
    return skipped.usable(pairs, check_pair, lambda pair: f"pair {pair.id}")[:limit]


def usable(
    pairs: Sequence[PreferencePair], family: Family, skipped: SkipLog, max_length: int | None, store: RewardStore | None
) -> Sequence[PreferencePair]:
    """The pairs that the model can read and that were scored."""

    def use(place: int) -> None:
        pair = pairs[place]
        if store is not None:
            store.get(pair.id, "chosen")
        family.encode(pair, max_length=max_length)

    return select(pairs, skipped.usable(range(len(pairs)), use, lambda place: f"pair {pairs[place].id}"))
