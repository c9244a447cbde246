"""Chosen is the model's answer to the picture, rejected its answer to a noised one: needs no truth, no judge (SeVa)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from catpo.core.types import PreferencePair, Sample
from catpo.models.views import asked_on
from catpo.pairing.methods import Dropped, finish


def asks(sample: Sample, rng: random.Random, *, view: str = "noised(step=500)") -> list[Sample]:
    """The same question on the corrupted picture.

    Raises:
        UserError: no such view, or one that is not a corrupted picture.
    """
    return [asked_on(view, sample, rng, "seva")]


def make(
    sample: Sample,
    answer: str,
    rng: random.Random,
    vocabulary: Mapping[str, str] | None = None,
    others: Sequence[str] = (),
    *,
    view: str = "noised(step=500)",
) -> PreferencePair | Dropped:
    """The answer against the one to the corrupted picture (Zhu et al. 2024); equal answers give no pair.

    Object words are labelled if `sample.truth["present"]` lists the objects. The authors noise the normalised pixels, at step
    500 or 800; here the picture itself is noised.

    Args:
        others: the answer to the corrupted picture.
        view: how the picture is corrupted.
    """
    return finish(sample, answer, others[0], sample.truth.get("present"), vocabulary, {"view": view})
