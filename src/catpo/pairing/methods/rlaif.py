"""The best against the worst of several answers of the model, judged claim by claim (RLAIF-V)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.core.types import PreferencePair, Sample
from catpo.judges import Judge, as_questions, as_rating, as_verdicts, ask, missing_judge
from catpo.pairing.methods import Candidate, Dropped, finish


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
        rng: breaks ties between candidates of the same reward.
        others: the further candidates.
        judge: splits answers into claims and verifies them against the picture.
        candidates: answers drawn; equal ones count once. The authors draw 10.
        by: `claims` splits an answer into claims, asks whether each is true, and counts those that are not; `rating` asks for
            one number from 0 to 10.

    Raises:
        UserError: no judge, or another word for `by`.
    """
    check_word("rlaif", "by", by, ("claims", "rating"))
    if judge is None:
        raise missing_judge("rlaif")
    texts = list(dict.fromkeys(text.strip() for text in (answer, *others) if text.strip()))
    if len(texts) < 2:
        return Dropped("same text" if texts else "empty answer")
    graded = []
    for number, text in enumerate(texts):
        reward = _minus_wrong_claims(judge, sample, text, number) if by == "claims" else _rating(judge, sample, text, number)
        if reward is not None:
            graded.append(Candidate(text, reward))
    if len(graded) < 2:
        return Dropped("unreadable reply")
    rng.shuffle(graded)
    best = max(graded, key=lambda candidate: candidate.reward)
    worst = min(graded, key=lambda candidate: candidate.reward)
    if best.reward == worst.reward:
        return Dropped("all equally good")
    meta = {"rewards": [best.reward, worst.reward], "answers": len(graded)}
    return finish(sample, best.text, worst.text, sample.truth.get("present"), vocabulary, meta)


def _minus_wrong_claims(judge: Judge, sample: Sample, text: str, number: int) -> float | None:
    """Minus the number of claims that the judge calls wrong."""
    questions = ask(judge, "claims", sample, as_questions, number=number, answer=text)
    if questions is None:
        return None
    verdicts = ask(judge, "verify", sample, as_verdicts(len(questions)), number=number, questions="\n".join(questions))
    return None if verdicts is None else float(-verdicts.count(False))


def _rating(judge: Judge, sample: Sample, text: str, number: int) -> float | None:
    return ask(judge, "rate", sample, as_rating, number=number, answer=text)
