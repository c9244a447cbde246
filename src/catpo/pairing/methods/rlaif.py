"""The best against the worst of several answers of the model, as a judge finds them claim by claim (RLAIF-V)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.core.types import PreferencePair, Sample
from catpo.judges import Judge
from catpo.judges._requests import as_questions, as_rating, as_verdicts, ask, no_judge
from catpo.pairing.methods import Candidate, Dropped, finish

WAYS = ("claims", "rating")


def asks(sample: Sample, rng: random.Random, *, candidates: int = 5, by: str = "claims") -> list[Sample]:
    """The same question again, once for each further candidate."""
    if candidates < 2:
        raise UserError(f"rlaif(candidates={candidates}): it must be 2 or more.")
    return [replace(sample, id=f"{sample.id}/rlaif-{number}") for number in range(1, candidates)]


def make(
    sample: Sample,
    answer: str,
    rng: random.Random,
    vocabulary: Mapping[str, str] | None = None,
    others: Sequence[str] = (),
    judge: Judge | None = None,
    *,
    candidates: int = 5,
    by: str = "claims",
) -> PreferencePair | Dropped:
    """The candidate with the fewest wrong claims against that with the most (Yu et al. 2024, RLAIF-V).

    Args:
        sample: the picture with its question.
        answer: the first candidate.
        rng: chooses among candidates of the same reward.
        vocabulary: surface form -> object; the built-in words if None.
        others: the further candidates.
        judge: takes answers apart and looks at the picture.
        candidates: how many answers are drawn; equal ones count once. The authors draw 10.
        by: `claims` divides an answer into claims, asks of each whether it is true, and counts those that are not; `rating`
            asks for one number from 0 to 10.

    Raises:
        UserError: no judge, or another word for `by`.
    """
    check_word("rlaif", "by", by, WAYS)
    if judge is None:
        raise no_judge("rlaif")
    texts = list(dict.fromkeys(text.strip() for text in (answer, *others) if text.strip()))
    if len(texts) < 2:
        return Dropped("same text" if texts else "empty answer")
    reward = _true_claims if by == "claims" else _rating
    rewards = [reward(judge, sample, text, number) for number, text in enumerate(texts)]
    graded = [Candidate(text, value) for text, value in zip(texts, rewards, strict=True) if value is not None]
    if len(graded) < 2:
        return Dropped("unreadable reply")
    rng.shuffle(graded)
    best, worst = (pick(graded, key=lambda each: each.reward) for pick in (max, min))
    if best.reward == worst.reward:
        return Dropped("all equally good")
    meta = {"rewards": [best.reward, worst.reward], "answers": len(graded)}
    return finish(sample, best.text, worst.text, sample.truth.get("present"), vocabulary, meta)


def _true_claims(judge: Judge, sample: Sample, text: str, number: int) -> float | None:
    """Minus the number of claims that the judge calls wrong."""
    questions = ask(judge, "claims", sample, as_questions, number=number, answer=text)
    if questions is None:
        return None
    verdicts = ask(judge, "verify", sample, as_verdicts(len(questions)), number=number, questions="\n".join(questions))
    return None if verdicts is None else float(-verdicts.count(False))


def _rating(judge: Judge, sample: Sample, text: str, number: int) -> float | None:
    return ask(judge, "rate", sample, as_rating, number=number, answer=text)
