"""Chosen is the answer as corrected by a judge, rejected the answer itself, both in the judge's style (HA-DPO)."""

from __future__ import annotations

import random
from collections.abc import Mapping

from catpo.core.checks import check_word
from catpo.core.types import PreferencePair, Sample
from catpo.judges import Judge, as_text, ask, missing_judge
from catpo.pairing.methods import Dropped, finish


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

    A corrected text has its corrector's style, which training would learn, so the judge rewrites the original as well. An
    answer in which the judge finds nothing to correct gives no pair.

    Args:
        judge: corrects and rewrites; it is told the objects in `sample.truth["present"]`.
        restyle: the sides rewritten after the correction: `both`, as the authors do, `rejected`, or `none`.

    Raises:
        UserError: no judge, or another word for `restyle`.
    """
    check_word("hadpo", "restyle", restyle, ("both", "rejected", "none"))
    if judge is None:
        raise missing_judge("hadpo")
    answer = answer.strip()
    if not answer:
        return Dropped("empty answer")
    corrected = ask(judge, "correct", sample, as_text, answer=answer)
    if corrected is None:
        return Dropped("unreadable reply")
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
