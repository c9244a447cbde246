"""Chosen is a true answer, rejected one with mistakes, caused by noise on the picture or written by a judge (POVID)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.core.types import PreferencePair, Sample
from catpo.judges import Judge, as_text, ask, missing_judge
from catpo.models.views import asked_on
from catpo.pairing.methods import Dropped, finish


def asks(
    sample: Sample, rng: random.Random, *, part: str = "noise", chosen: str = "reference", view: str = "noised(step=500)"
) -> list[Sample]:
    """For part='noise', the same question on the noised picture.

    Raises:
        UserError: no such view, or one that is not a corrupted picture.
    """
    return [asked_on(view, sample, rng, "povid")] if part == "noise" else []


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
        others: the answer to the noised picture.
        judge: writes mistakes into the chosen answer, for part='text'.
        part: `noise` or `text`, the authors' second and first stage.
        chosen: the sample's first `reference`, or the model's own `answer`.
        view: how the picture is corrupted, for part='noise'.

    Raises:
        UserError: another word for an option; no reference; no judge where one is needed.
    """
    check_word("povid", "part", part, ("noise", "text"))
    check_word("povid", "chosen", chosen, ("reference", "answer"))
    if part == "text" and judge is None:
        raise missing_judge("povid(part='text')")
    if chosen == "reference" and not sample.references:
        raise UserError(
            f'sample {sample.id} has no references to choose. Add "references": ["..."], or give povid(chosen=\'answer\').'
        )
    correct = sample.references[0] if chosen == "reference" else answer.strip()
    if part == "noise":
        wrong = others[0]
    elif not answer.strip():  # a sample without an answer costs nothing
        return Dropped("empty answer")
    else:
        assert judge is not None
        reply = ask(judge, "invent", sample, as_text, answer=correct)
        if reply is None:
            return Dropped("unreadable reply")
        wrong = reply
    return finish(sample, correct, wrong, sample.truth.get("present"), vocabulary, {"part": part})
