"""Chosen is a human answer, rejected the model's own: for pictures whose objects nobody has listed, only described."""

from __future__ import annotations

import random
from collections.abc import Mapping

from catpo.core.errors import UserError
from catpo.core.types import PreferencePair, Sample
from catpo.pairing.methods import Dropped, finish
from catpo.text.object_words import mentions

PICKS = ("first", "random", "longest")


def make(
    sample: Sample,
    answer: str,
    rng: random.Random,
    vocabulary: Mapping[str, str] | None = None,
    *,
    pick: str = "first",
) -> PreferencePair | Dropped:
    """One of the sample's references against the model's answer.

    Object words are grounded if `sample.truth["present"]` has the object, or, without it, if any reference names it: what
    nobody mentioned then counts as hallucinated, which is a noisy truth.

    Args:
        sample: the picture with its references.
        answer: the model's answer.
        rng: for `pick='random'`.
        vocabulary: surface form -> object; the built-in words if None.
        pick: which reference is chosen: first, random or longest.

    Raises:
        UserError: the sample has no reference, or `pick` is not one of these.
    """
    if pick not in PICKS:
        raise UserError(f"reference: pick='{pick}' is not known. Give one of {', '.join(PICKS)}.")
    if not sample.references:
        raise UserError(
            f'sample {sample.id} has no references to choose. Add "references": ["..."], or use --method corrected.'
        )
    named = {mention.object for text in sample.references for mention in mentions(text, vocabulary)}
    present = sample.truth.get("present", named)
    return finish(sample, _pick(sample, rng, pick), answer, present, vocabulary, {})


def _pick(sample: Sample, rng: random.Random, pick: str) -> str:
    if pick == "random":
        return rng.choice(sample.references)
    return max(sample.references, key=len) if pick == "longest" else sample.references[0]
