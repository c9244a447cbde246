"""What pairing methods share: the reason for a missing pair, labels of object words, the check of a pair's texts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from catpo.core.errors import UserError
from catpo.core.types import PreferencePair, Sample, Span, pair_id
from catpo.models import steering
from catpo.text.object_words import mentions


@dataclass(frozen=True)
class Dropped:
    """An answer gives no pair; pairs.json counts the reasons."""

    reason: str


@dataclass(frozen=True)
class Candidate:
    """One of several answers to a sample."""

    text: str
    reward: float
    """Larger is better; its unit is the method's own."""


@dataclass(frozen=True)
class Decoding:
    """The sampling options of `catpo pair`."""

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 96
    batch_size: int = 32
    decoding: steering.Decoding | None = None
    """Changes the scores from which tokens are drawn."""


def label(text: str, present: Collection[str], vocabulary: Mapping[str, str] | None = None) -> tuple[Span, ...]:
    """Every object word of a text, grounded if the object is present.

    >>> label("A dog and a cat.", ["dog"])
    (Span(start=2, end=5, label='grounded'), Span(start=12, end=15, label='hallucinated'))
    """
    return tuple(
        Span(mention.start, mention.end, "grounded" if mention.object in present else "hallucinated")
        for mention in mentions(text, vocabulary)
    )


def present_objects(sample: Sample) -> list[str]:
    """The objects in the picture.

    Raises:
        UserError: the data set does not list them.
    """
    if "present" not in sample.truth:
        raise UserError(
            f"sample {sample.id} has no truth['present'], so its answers cannot be corrected. Give its objects as "
            '"truth": {"present": ["dog", ...]}, or use --method reference with human captions.'
        )
    return list(sample.truth["present"])


def finish(
    sample: Sample,
    chosen: str,
    rejected: str,
    present: Collection[str] | None,
    vocabulary: Mapping[str, str] | None,
    meta: Mapping[str, Any],
) -> PreferencePair | Dropped:
    """The pair with its labels (none if `present` is None: objects unknown), or the reason why it teaches nothing."""
    chosen, rejected = chosen.strip(), rejected.strip()
    if not rejected:
        return Dropped("empty answer")
    if not chosen:
        return Dropped("nothing left")
    if chosen == rejected:
        return Dropped("same text")
    labels = {}
    if present is not None:
        labels = {"chosen": label(chosen, present, vocabulary), "rejected": label(rejected, present, vocabulary)}
    return PreferencePair(
        id=pair_id(sample.images, sample.prompt, chosen, rejected, sample.history),
        images=sample.images,
        prompt=sample.prompt,
        chosen=chosen,
        rejected=rejected,
        labels=labels,
        meta={"sample": sample.id, **meta},
        history=sample.history,
    )
