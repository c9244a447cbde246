"""Several data sets mixed in given proportions, without repeating a pair.

mix(sources=["rlhf_v(source='openbmb/RLHF-V-Dataset')", "my-pairs"], weights=[3, 1], seed=0)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from catpo.core.errors import UserError
from catpo.core.types import PreferencePair
from catpo.data import datasets


class Dataset(datasets.Dataset):
    """Pairs of all sources; which are taken and in which order depends only on their ids and the seed.

    Args:
        sources: the data sets, opened.
        weights: proportions of the sources; equal by default.
        count: number of pairs; by default as many as the proportions allow.
        seed: draws the pairs and their order.

    Raises:
        UserError: the weights do not fit, or a source has too few pairs.
    """

    def __init__(
        self,
        *,
        sources: Sequence[datasets.Dataset] = (),
        weights: Sequence[float] | None = None,
        count: int | None = None,
        seed: int = 0,
    ) -> None:
        if not sources:
            raise UserError("mix needs data sets: mix(sources=['pairs', \"rlhf_v(source='…')\"], weights=[3, 1]).")
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if len(weights) != len(sources) or not all(isinstance(weight, int | float) and weight > 0 for weight in weights):
            raise UserError(f"mix: weights={weights} must be {len(sources)} positive numbers, one per source.")
        self.sources, self.weights, self.count, self.seed = list(sources), weights, count, seed
        self.name = f"mix of {', '.join(source.name for source in sources)}"

    def pairs(self) -> Iterator[PreferencePair]:
        read = [list(source.pairs()) for source in self.sources]
        chosen: dict[str, PreferencePair] = {}
        for pairs, count in zip(read, self._counts(read), strict=True):
            chosen |= {pair.id: pair for pair in self._drawn(pairs)[:count]}
        return iter(self._drawn(list(chosen.values())))

    def _counts(self, read: Sequence[Sequence[PreferencePair]]) -> list[int]:
        whole = sum(self.weights)
        shares = [weight / whole for weight in self.weights]
        most = min(len(pairs) / share for pairs, share in zip(read, shares, strict=True))
        total = most if self.count is None else self.count
        counts = [round(total * share) for share in shares]
        for source, pairs, count in zip(self.sources, read, counts, strict=True):
            if count > len(pairs):
                raise UserError(
                    f"mix: {count} pairs are asked of {source.name}, which has {len(pairs)}. Lower count to {int(most)}, or "
                    "change the weights."
                )
        return counts

    def _drawn(self, pairs: list[PreferencePair]) -> list[PreferencePair]:
        return sorted(pairs, key=lambda pair: hashlib.blake2b(f"{self.seed}/{pair.id}".encode()).digest())
