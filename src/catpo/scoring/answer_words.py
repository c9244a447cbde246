"""How likely each object word of an answer is in the picture, by the model that is asked for it. Knows nothing of files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from catpo.core.types import PreferencePair, Sample
from catpo.models.family import Family
from catpo.models.memory import pass_tokens
from catpo.models.questions import yes_less_no
from catpo.models.views import OtherPictures
from catpo.rewards.word_rewards import Probe
from catpo.scoring.batches import Preparation
from catpo.scoring.forward import PairScorer
from catpo.scoring.settings import ScoreSettings
from catpo.scoring.words import WordSettings
from catpo.text.caption_edits import name_object
from catpo.text.object_words import mentions

SELF_QUESTION = "self_question"
ALMOST_CERTAIN = 0.999
"""Floor of the candidates that a probe's features are read of: those that the text names, and hardly any other."""


@dataclass(frozen=True)
class Named:
    """An object word of a text, `text[start:end]`, and the question about it."""

    start: int
    end: int
    object: str
    question: str


@dataclass(frozen=True)
class AnswerWord:
    """An object that an answer names: `text[start:end]`."""

    start: int
    end: int
    object: str
    logit: float | None
    """Of being in the picture: logit(yes) - logit(no), or the probe's log-odds; None if the probe cannot read the word."""
    grounded: float | None
    """The same as a probability, 0 to 1; how well it is calibrated depends on the model."""


class WordJudge:
    """Finds the object words of answers and asks the model about each, or lets a probe judge it.

    Args:
        family: the model.
        forms: surface form -> object.
        question: asked about each object; {} stands for the word with its article.
        probe: judges by what `catpo score` keeps of words, instead of the answer alone.
        batch_size: texts per forward pass.
    """

    def __init__(self, family: Family, forms: Mapping[str, str], question: str, probe: Probe | None, batch_size: int) -> None:
        self.family, self.forms, self.question = family, forms, question
        self.probe, self.batch_size = probe, batch_size

    def provenance(self) -> dict[str, Any]:
        """What changes its judgement, beside the model."""
        digest = hashlib.blake2b(repr(sorted(self.forms.items())).encode(), digest_size=16).hexdigest()
        probe = None if self.probe is None else hashlib.blake2b(repr(self.probe).encode(), digest_size=16).hexdigest()
        return {"question": self.question, "vocabulary": digest, "probe": probe}

    def words(self, samples: Sequence[Sample], texts: Sequence[str]) -> list[list[AnswerWord]]:
        """The object words of each text in their order; an object is judged once per text."""
        found = [self.find(text) for text in texts]
        judged_by = self._asked if self.probe is None else self._probed
        logits = judged_by(samples, texts, [{word.object: word.question for word in each} for each in found])
        judged = []
        for named, of_text in zip(found, logits, strict=True):
            judged.append([_judged(word, of_text.get(word.object)) for word in named])
        return judged

    def find(self, text: str) -> list[Named]:
        """The object words of a text, each with its question: the one place that decides what is asked about."""
        named = []
        for mention in mentions(text, self.forms):
            question = self.question.replace("{}", name_object(mention.object, 1, self.forms))
            named.append(Named(mention.start, mention.end, mention.object, question))
        return named

    def _asked(
        self, samples: Sequence[Sample], texts: Sequence[str], questions: Sequence[Mapping[str, str]]
    ) -> list[dict[str, float]]:
        """Of each text: object -> logit of yes less that of no."""
        asked = [(sample.images, list(of_text.values())) for sample, of_text in zip(samples, questions, strict=True)]
        margins = yes_less_no(self.family, asked, batch_size=self.batch_size)
        return [dict(zip(of_text, answers, strict=True)) for of_text, answers in zip(questions, margins, strict=True)]

    def _probed(
        self, samples: Sequence[Sample], texts: Sequence[str], questions: Sequence[Mapping[str, str]]
    ) -> list[dict[str, float]]:
        """Of each text: object -> log-odds by the probe; those that no token of their own begins are left out."""
        assert self.probe is not None
        if self.probe.features == (SELF_QUESTION,):
            asked = self._asked(samples, texts, questions)
            features = [_as_features(of_text) for of_text in asked]
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
        """Of each text: object -> what the probe reads of it, in the pass of `catpo score` with the text as both responses."""
        words = _Settings(probe.features, ALMOST_CERTAIN, self.question, None, given=self.forms)
        bound = pass_tokens(self.family, self.family.device)
        scorer = PairScorer(self.family, ScoreSettings((), "last", "mean", "token", "all", words), batch_tokens=bound)
        pairs = [
            PreferencePair(str(number), sample.images, sample.prompt, text or ".", text or ".")
            for number, (sample, text) in enumerate(zip(samples, texts, strict=True))
        ]
        preparation = Preparation(self.family.reader(), pairs, OtherPictures(pairs), self.batch_size, bound)
        found: list[dict[str, Mapping[str, float]]] = [{} for _ in texts]
        for window in preparation.windows(0, slice(0, len(pairs)), reads_another=False):
            for batch in preparation(window)[1]:
                scored = scorer.score_batch(batch, [pairs[place] for place in batch.places], preparation.others)
                for row in (row for response in scored for row in response.words):
                    if row.word in questions[int(row.pair_id)]:
                        found[int(row.pair_id)][row.word] = row.features
        return found


@dataclass(frozen=True)
class _Settings(WordSettings):
    """Settings with words at hand."""

    given: Mapping[str, str] = field(default_factory=dict)

    @property
    def forms(self) -> Mapping[str, str]:
        return self.given


def _as_features(logits: Mapping[str, float]) -> dict[str, Mapping[str, float]]:
    return {name: {SELF_QUESTION: logit} for name, logit in logits.items()}


def _judged(word: Named, logit: float | None) -> AnswerWord:
    if logit is None:
        return AnswerWord(word.start, word.end, word.object, None, None)
    grounded = 0.5 * (1 + math.tanh(logit / 2))  # the logistic function, for any logit
    return AnswerWord(word.start, word.end, word.object, round(logit, 6), round(grounded, 6))
