"""Chosen is the model's answer as a judge corrects it, rejected the answer itself, both in the judge's style (HA-DPO)."""

from __future__ import annotations

import random
from collections.abc import Mapping

from catpo.core.checks import check_word
from catpo.core.types import PreferencePair, Sample
from catpo.judges import Judge
from catpo.judges._requests import as_text, ask, no_judge
from catpo.pairing.methods import Dropped, finish

RESTYLED = ("both", "rejected", "none")


def make(
    sample: Sample,
    answer: str,
    rng: random.Random,
    vocabulary: Mapping[str, str] | None = None,
    judge: Judge | None = None,
    *,
    restyle: str = "both",
) -> PreferencePair | Dropped:
    """The corrected answer against the original (Zhao et al. 2023, Hallucination-Aware DPO).

    A corrected text reads as its corrector writes, and training would learn the style; so the judge writes the original anew
    too. An answer in which the judge finds nothing to correct gives no pair.

    Args:
        sample: the picture with its question.
        answer: the model's answer.
        rng: not used.
        vocabulary: surface form -> object; the built-in words if None.
        judge: corrects, and writes anew; it is told the objects that `sample.truth["present"]` names.
        restyle: which side is written anew after the correction: `both`, as the authors do, `rejected`, or `none`.

    Raises:
        UserError: no judge, or another word for `restyle`.
    """
    check_word("hadpo", "restyle", restyle, RESTYLED)
    if judge is None:
        raise no_judge("hadpo")
    answer = answer.strip()
    if not answer:
        return Dropped("empty answer")
    corrected = ask(judge, "correct", sample, as_text, answer=answer)
    if corrected is None:
        return Dropped("nothing left")
    if corrected == answer:
        return Dropped("nothing to correct")
    sides = [corrected, answer]
    for number, is_restyled in enumerate((restyle == "both", restyle != "none")):
        if is_restyled:
            styled = ask(judge, "restyle", sample, as_text, number=number, answer=sides[number])
            if styled is None:
                return Dropped("unreadable reply")
            sides[number] = styled
    return finish(sample, sides[0], sides[1], sample.truth.get("present"), vocabulary, {"restyle": restyle})
