"""How likely each word of an answer is true of the picture, by the model that is asked about it. Knows nothing of files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from catpo.core.types import PreferencePair, Sample
from catpo.files.checksums import checksum
from catpo.models.family import Family
from catpo.models.memory import pass_tokens
from catpo.models.questions import yes_less_no
from catpo.models.views import OtherPictures
from catpo.rewards.word_rewards import Probe
from catpo.scoring.batches import Preparation
from catpo.scoring.claims import Asker, Claim
from catpo.scoring.forward import PairScorer
from catpo.scoring.settings import ScoreSettings
from catpo.scoring.words import WordSettings
from catpo.text.things import TAGGERS

SELF_QUESTION = "self_question"
ALMOST_CERTAIN = 0.999
"""Floor of the candidates that a probe's features are read of: those that the text names, and hardly any other."""


@dataclass(frozen=True)
class AnswerWord:
    """Words of an answer that claim something of the picture: `text[start:end]`."""

    start: int
    end: int
    object: str
    kind: str
    """What they claim, of `catpo.scoring.claims.KINDS`."""
    question: str
    logit: float | None
    """Of being true: logit(yes) - logit(no), or the probe's log-odds; None if the probe cannot read the word."""
    grounded: float | None
    """The same as a probability, 0 to 1; how well it is calibrated depends on the model."""


class WordJudge:
    """Asks the model about the words that an asker finds in answers, or lets a probe judge them.

    Args:
        family: the model.
        asker: finds the words and phrases the questions.
        probe: judges by what `catpo score` keeps of words, instead of the answer alone; objects only.
        batch_size: texts per forward pass.
    """

    def __init__(self, family: Family, asker: Asker, probe: Probe | None, batch_size: int) -> None:
        self.family, self.asker = family, asker
        self.probe, self.batch_size = probe, batch_size

    def provenance(self) -> dict[str, Any]:
        """What changes its judgement, beside the model."""
        asker = self.asker
        vocabulary = None if asker.found_by in TAGGERS else _digest(sorted(asker.forms.items()))
        probe = None if self.probe is None else _digest(self.probe)
        finder = {"nouns": asker.found_by, "vocabulary": vocabulary, "kinds": list(asker.kinds)}
        return {"question": asker.wording("objects"), **finder, "probe": probe}

    def words(self, samples: Sequence[Sample], texts: Sequence[str]) -> list[list[AnswerWord]]:
        """What each text claims, in its order; a question is asked once per text."""
        found = [sorted(self.asker.claims(text), key=lambda claim: claim.start) for text in texts]
        judged_by = self._asked if self.probe is None else self._probed
        logits = judged_by(samples, texts, [{claim.question: claim.object for claim in each} for each in found])
        judged = []
        for claims, of_text in zip(found, logits, strict=True):
            judged.append([_judged(claim, of_text.get(claim.question)) for claim in claims])
        return judged

    def _asked(
        self, samples: Sequence[Sample], texts: Sequence[str], questions: Sequence[Mapping[str, str]]
    ) -> list[dict[str, float]]:
        """Of each text: question -> logit of yes less that of no."""
        asked = [(sample.images, list(of_text)) for sample, of_text in zip(samples, questions, strict=True)]
        margins = yes_less_no(self.family, asked, batch_size=self.batch_size)
        return [dict(zip(of_text, answers, strict=True)) for of_text, answers in zip(questions, margins, strict=True)]

    def _probed(
        self, samples: Sequence[Sample], texts: Sequence[str], questions: Sequence[Mapping[str, str]]
    ) -> list[dict[str, float]]:
        """Of each text: question -> log-odds by the probe; those whose object no token of their own begins are left out."""
        assert self.probe is not None
        if self.probe.features == (SELF_QUESTION,):
            features = [_as_features(of_text) for of_text in self._asked(samples, texts, questions)]
        else:
            features = self._features(self.probe, samples, texts, questions)
        logits = []
        for of_text in features:
            columns = {name: np.array([row[name] for row in of_text.values()]) for name in self.probe.features}
            values = self.probe.logits(columns).tolist() if of_text else []
            logits.append(dict(zip(of_text, values, strict=True)))
        return logits

    def _features(
        self, probe: Probe, samples: Sequence[Sample], texts: Sequence[str], questions: Sequence[Mapping[str, str]]
    ) -> list[dict[str, Mapping[str, float]]]:
        """Of each text: question -> what the probe reads of it, in `catpo score`'s pass with the text as both responses."""
        of_objects = [{name: question for question, name in of_text.items()} for of_text in questions]
        asks = {name: question for of_text in of_objects for name, question in of_text.items()}
        words = _Settings(probe.features, ALMOST_CERTAIN, "{}", None, given=self._forms(texts), asks=asks)
        bound = pass_tokens(self.family, self.family.device)
        scorer = PairScorer(self.family, ScoreSettings((), "last", "mean", "token", "all", words), batch_tokens=bound)
        pairs = [
            PreferencePair(str(number), sample.images, sample.prompt, text or ".", text or ".", history=sample.history)
            for number, (sample, text) in enumerate(zip(samples, texts, strict=True))
        ]
        preparation = Preparation(self.family.reader(), pairs, OtherPictures(pairs), self.batch_size, bound)
        found: list[dict[str, Mapping[str, float]]] = [{} for _ in texts]
        for window in preparation.windows(0, slice(0, len(pairs)), reads_another=False):
            for batch in preparation(window)[1]:
                scored = scorer.score_batch(batch, [pairs[place] for place in batch.places], preparation.others)
                for row in (row for response in scored for row in response.words):
                    of_text = of_objects[int(row.pair_id)]
                    if row.word in of_text:
                        found[int(row.pair_id)][of_text[row.word]] = row.features
        return found

    def _forms(self, texts: Sequence[str]) -> Mapping[str, str]:
        """Surface form -> object: the vocabulary's, with a tagger also what it finds in these texts."""
        forms = dict(self.asker.forms)
        if self.asker.found_by in TAGGERS:
            for text in texts:
                forms |= {text[claim.start : claim.end].lower(): claim.object for claim in self.asker.claims(text)}
        return forms


@dataclass(frozen=True)
class _Settings(WordSettings):
    """Settings with words and questions at hand."""

    given: Mapping[str, str] = field(default_factory=dict)
    asks: Mapping[str, str] = field(default_factory=dict)

    def asked(self, word: str) -> str:
        return self.asks.get(word, word)

    @property
    def forms(self) -> Mapping[str, str]:
        return self.given


def _as_features(logits: Mapping[str, float]) -> dict[str, Mapping[str, float]]:
    return {name: {SELF_QUESTION: logit} for name, logit in logits.items()}


def _judged(claim: Claim, logit: float | None) -> AnswerWord:
    said = (claim.start, claim.end, claim.object, claim.kind, claim.question)
    if logit is None:
        return AnswerWord(*said, None, None)
    grounded = 0.5 * (1 + math.tanh(logit / 2))  # the logistic function, for any logit
    return AnswerWord(*said, round(logit, 6), round(grounded, 6))


def _digest(what: object) -> str:
    return checksum(repr(what).encode())
