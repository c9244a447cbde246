"""What a reward store keeps of the reference for the KL of Eq. 9, and the bytes that it takes. Knows nothing of scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from catpo.core.errors import UserError
from catpo.core.spec import check_options, parse
from catpo.models.family import Encoded, Family


@dataclass(frozen=True)
class Cache:
    """What a store keeps of the reference in addition to its log-probs, for the KL of Eq. 9."""

    hidden: bool = False
    """Final hidden states: with the frozen head they give the whole distribution, exactly."""
    k: int = 0
    """Number of most likely tokens, kept with the probability of all the rest."""

    @classmethod
    def of(cls, text: str) -> Cache:
        """`hidden`, `topk(k=64)` or `logps` (nothing).

        Raises:
            UserError: none of these, or k is less than 1.
        """
        spec = parse(text)
        if spec.name not in CACHES:
            raise UserError(
                f"cache='{text}' is not known. Give hidden (exact KL), topk(k=64) (approximate, smaller) or logps (no KL, "
                "or reference='online' in training)."
            )
        make = CACHES[spec.name]
        cache: Cache = make(**check_options(make, spec))
        if spec.name == "topk" and cache.k < 1:
            raise UserError(f"cache='{text}': k must be 1 or more tokens.")
        return cache

    def check(self, family: Family) -> None:
        """Raises UserError if more tokens are to be kept than the vocabulary has."""
        vocabulary = len(family.head.weight)
        if self.k >= vocabulary:
            raise UserError(
                f"cache=topk(k={self.k}): the model has {vocabulary} tokens. Give fewer, or cache=hidden, which is exact."
            )


def _topk(*, k: int = 64) -> Cache:
    return Cache(k=k)


# functions without other options, so that hidden(k=4) is refused
CACHES: dict[str, Callable[..., Cache]] = {"hidden": lambda: Cache(hidden=True), "topk": _topk, "logps": lambda: Cache()}
COMPRESSED = 3
"""Bytes of a token's id, label, flag and text, together, measured."""


def token_bytes(signals: int) -> int:
    """Bytes of a token in a store without a cache: log-prob and signals in float32, and what compresses well."""
    return 4 * (1 + signals) + COMPRESSED


def store_bytes(
    family: Family, encoded: Sequence[Encoded], pairs: int, signals: int, cache: Cache, maps: bool
) -> dict[str, int]:
    """Bytes of the parts of a reward store of `pairs` pairs, from a sample of encoded ones."""
    sampled = sum(len(ids) for item in encoded for ids in item.response_ids.values())
    tokens = pairs * sampled / len(encoded)
    widest = max(len(item.patches) for item in encoded)
    width = family.unwrapped.config.get_text_config().hidden_size
    element = min(family.unwrapped.dtype.itemsize, 4)
    parts = {
        "signals": tokens * token_bytes(signals),
        "hidden states": tokens * width * element * cache.hidden,
        "top tokens": tokens * (8 * cache.k + 4) * bool(cache.k),
        "attention maps": tokens * widest * 2 * maps,  # float16
    }
    return {name: int(size) for name, size in parts.items() if size}
