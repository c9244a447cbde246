"""Two answers of the model as they are, neither better: for `tilt`, which takes its rewards from the store."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from catpo.core.types import UNRANKED, PreferencePair, Sample
from catpo.pairing.methods import Dropped, finish


def asks(sample: Sample, rng: random.Random) -> list[Sample]:
    """The same question again."""
    return [replace(sample, id=f"{sample.id}/sampled")]


def make(
    sample: Sample,
    answer: str,
    rng: random.Random,
    vocabulary: Mapping[str, str] | None = None,
    others: Sequence[str] = (),
) -> PreferencePair | Dropped:
    """Both answers, unranked; equal answers give no pair. Needs no truth and no judge.

    Args:
        others: the second answer.
    """
    return finish(sample, answer, others[0], sample.truth.get("present"), vocabulary, {UNRANKED: True})
