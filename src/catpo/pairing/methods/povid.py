"""Chosen is a true answer, rejected one with mistakes: told by noise on the picture, or written by a judge (POVID)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.core.types import PreferencePair, Sample
from catpo.judges import Judge
from catpo.judges._requests import as_text, ask, no_judge
from catpo.models.views import asked_on
from catpo.pairing.methods import Dropped, finish

PARTS, CHOSEN = ("noise", "text"), ("reference", "answer")


def asks(
    sample: Sample,
    rng: random.Random,
    *,
    part: str = "noise",
    chosen: str = "reference",
    view: str = "noised(step=500)",
) -> list[Sample]:
    """For part='noise', the same question on the noised picture.

    Raises:
        UserError: no such view, or one that is not a corrupted picture.
    """
    if part != "noise":
        return []
    return [asked_on(view, sample, rng, "povid")]


def make(
    sample: Sample,
    answer: str,
    rng: random.Random,
    vocabulary: Mapping[str, str] | None = None,
    others: Sequence[str] = (),
    judge: Judge | None = None,
    *,
    part: str = "noise",
    chosen: str = "reference",
    view: str = "noised(step=500)",
) -> PreferencePair | Dropped:
    """A true answer against one with hallucinations (Zhou et al. 2024).

    The authors' chosen answers are those of LLaVA's data. Their noise enters the loss (objective `povid`); here the answer to
    the noised picture is one of its own, so that any objective can use the pair.

    Args:
        sample: the picture with its question.
        answer: the model's answer.
        rng: not used here; `asks` draws the noise.
        vocabulary: surface form -> object; the built-in words if None.
        others: the answer to the noised picture.
        judge: writes mistakes into the chosen answer, for part='text'.
        part: `noise` or `text`, the authors' second and first stage.
        chosen: the sample's first `reference`, or the model's own `answer`.
        view: how the picture is corrupted, for part='noise'.

    Raises:
        UserError: another word for an option; no reference; no judge where one is asked.
    """
    check_word("povid", "part", part, PARTS)
    check_word("povid", "chosen", chosen, CHOSEN)
    if part == "text" and judge is None:
        raise no_judge("povid(part='text')")
    if chosen == "reference" and not sample.references:
        raise UserError(
            f'sample {sample.id} has no references to choose. Add "references": ["..."], or give povid(chosen=\'answer\').'
        )
    good = sample.references[0] if chosen == "reference" else answer.strip()
    present, meta = sample.truth.get("present"), {"part": part}
    if part == "noise":
        return finish(sample, good, others[0], present, vocabulary, meta)
    if not answer.strip():  # a sample without an answer costs nothing
        return Dropped("empty answer")
    assert judge is not None
    bad = ask(judge, "invent", sample, as_text, answer=good)
    return Dropped("unreadable reply") if bad is None else finish(sample, good, bad, present, vocabulary, meta)
