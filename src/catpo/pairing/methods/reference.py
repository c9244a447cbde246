"""Chosen is a human answer, rejected the model's own: for pictures with human captions but no list of objects."""

from __future__ import annotations

import random
from collections.abc import Mapping

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.core.types import PreferencePair, Sample
from catpo.pairing.methods import Dropped, finish
from catpo.text.object_words import mentions


def make(
    sample: Sample, answer: str, rng: random.Random, vocabulary: Mapping[str, str] | None = None, *, pick: str = "first"
) -> PreferencePair | Dropped:
    """One of the sample's references against the model's answer.

    Object words are grounded if `sample.truth["present"]` has the object or, without that list, if any reference names it.
    Objects that nobody mentioned then count as hallucinated, which is a noisy truth.

    Args:
        pick: which reference is chosen: first, random or longest.

    Raises:
        UserError: the sample has no reference, or `pick` is another word.
    """
    check_word("reference", "pick", pick, ("first", "random", "longest"))
    if not sample.references:
        raise UserError(
            f'sample {sample.id} has no references to choose. Add "references": ["..."], or use --method corrected.'
        )
    chosen = sample.references[0]
    if pick == "random":
        chosen = rng.choice(sample.references)
    elif pick == "longest":
        chosen = max(sample.references, key=len)
    named = {mention.object for text in sample.references for mention in mentions(text, vocabulary)}
    return finish(sample, chosen, answer, sample.truth.get("present", named), vocabulary, {})
