"""What a reward store keeps of the reference for the KL of Eq. 9, and the bytes that it takes. Knows nothing of scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from catpo.core.errors import UserError
from catpo.core.spec import check_options, parse
from catpo.models.family import Encoded, Family


@dataclass(frozen=True)
class Cache:
    """What a store keeps of the reference beside its log-probs, for the KL of Eq. 9."""

    hidden: bool = False
    """Final hidden states: with the frozen head they are the whole distribution, exactly."""
    k: int = 0
    """So many likeliest words, and the mass of the rest."""

    @classmethod
    def of(cls, text: str) -> Cache:
        """`hidden`, `topk(k=64)` or `logps` (nothing).

        Raises:
            UserError: none of these, or k is no count of words.
        """
        spec = parse(text)
        if spec.name not in CACHES:
            raise UserError(
                f"cache='{text}' is not known. Give hidden (exact KL), topk(k=64) (approximate, fewer bytes) or logps (no KL, "
                "or reference='online' in training)."
            )
        make = CACHES[spec.name]
        made: Cache = make(**check_options(make, spec))
        if spec.name == "topk" and made.k < 1:
            raise UserError(f"cache='{text}': k must be 1 or more words.")
        return made

    def check(self, family: Family) -> None:
        """Raises UserError if more words are to be kept than the model has."""
        words = len(family.head.weight)
        if self.k >= words:
            raise UserError(
                f"cache=topk(k={self.k}): the model has {words} words. Give fewer, or cache=hidden, which is exact."
            )


def _states() -> Cache:
    return Cache(hidden=True)


def _likeliest(*, k: int = 64) -> Cache:
    return Cache(k=k)


def _nothing() -> Cache:
    return Cache()


CACHES: dict[str, Callable[..., Cache]] = {"hidden": _states, "topk": _likeliest, "logps": _nothing}


COMPRESSED = 3
"""Bytes of a token's id, label, flag and text, together."""


def token_bytes(signals: int) -> int:
    """Bytes of a token in a store, whatever is kept of the reference: log-prob and signals, and what compresses well."""
    return 4 * (1 + signals) + COMPRESSED


def store_bytes(
    family: Family, encoded: Sequence[Encoded], pairs: int, signals: int, cache: Cache, maps: bool
) -> dict[str, int]:
    """Bytes of a reward store: numbers per token, hidden states or likeliest words, attention maps in float16."""
    responses = [sum(len(ids) for ids in each.response_ids.values()) for each in encoded]
    tokens = pairs * sum(responses) / len(responses)
    widest = max(len(each.patches) for each in encoded)
    width = family.unwrapped.config.get_text_config().hidden_size
    element = min(family.unwrapped.dtype.itemsize, 4)
    parts = {
        "signals": tokens * token_bytes(signals),
        "hidden states": tokens * width * element * cache.hidden,
        "likeliest words": tokens * (8 * cache.k + 4) * bool(cache.k),
        "attention maps": tokens * widest * 2 * maps,
    }
    return {name: int(size) for name, size in parts.items() if size}
