"""Best against worst of a tree of the model's sentences, by likelihood and image relevance: needs no truth, no judge (CSR)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.core.types import PreferencePair, Sample
from catpo.pairing.methods import Candidate, Decoding, Dropped, finish
from catpo.pairing.scorers import Scorer, check_scorer
from catpo.pairing.scorers import scorer as open_scorer

if TYPE_CHECKING:
    from catpo.models.family import Family
    from catpo.models.generation import Sentence
    from catpo.models.kept import Kept

SHORTEST = 4
"""Sentences of fewer characters are dropped, as in the released code."""


def make(
    sample: Sample,
    answer: str,
    rng: random.Random,
    vocabulary: Mapping[str, str] | None = None,
    others: Sequence[Candidate] = (),
    *,
    scorer: str = "own",
    relevance: float = 0.9,
    branches: int = 5,
    best: int = 1,
    worst: int = 2,
    sentences: int = 10,
    sentence_tokens: int = 70,
    form: str = "code",
) -> PreferencePair | Dropped:
    """The answer of the highest reward against that of the lowest (Zhou et al. 2024, Calibrated Self-Rewarding).

    A sentence's reward mixes its likelihood under the model with its relevance to the image; an answer's reward is the mean
    over its sentences. Sentences are sampled, where the authors use diverse beam search.

    Args:
        others: the answers of the tree; `answer` and `rng` are not used.
        scorer: measures a sentence's relevance to the image; `catpo list scorers` shows all.
        relevance: weight λ of the relevance; the likelihood has the weight 1 - λ.
        branches: sentences drawn to continue each partial answer.
        best: partial answers of the highest reward kept after each sentence.
        worst: partial answers of the lowest reward kept after each sentence.
        sentences: sentences in the longest answer.
        sentence_tokens: tokens in the longest sentence.
        form: `code` ranks sibling sentences by mean log-prob and by relevance, mixes the ranks, and keeps partial answers by
            log-prob. `paper` mixes exp(sum of log-probs) with 100·cosine, clipped at 0.

    Raises:
        UserError: a number that makes no tree, or no such scorer.
    """
    _Tree(relevance, branches, best, worst, sentences, sentence_tokens, form)
    check_scorer(scorer)
    if not others:
        return Dropped("no whole sentence")
    first = max(others, key=lambda candidate: candidate.reward)
    last = min(others, key=lambda candidate: candidate.reward)
    meta = {"rewards": [round(first.reward, 6), round(last.reward, 6)], "answers": len(others)}
    return finish(sample, first.text, last.text, sample.truth.get("present"), vocabulary, meta)


def search(
    family: Family, decoding: Decoding, *, scorer: str = "own", **options: Any
) -> Callable[[Sequence[Sample]], list[list[Candidate]]]:
    """The function that finds the answers to a block of samples: the leaves of each sample's tree with their rewards."""
    if decoding.temperature == 0:
        raise UserError("csr draws sentences: give a temperature above 0.")
    return _Search(family, open_scorer(scorer, family), _Tree(**options), decoding)


@dataclass(frozen=True)
class _Tree:
    """How the tree grows; see `make` for the fields."""

    relevance: float = 0.9
    branches: int = 5
    best: int = 1
    worst: int = 2
    sentences: int = 10
    sentence_tokens: int = 70
    form: str = "code"

    def __post_init__(self) -> None:
        check_word("csr", "form", self.form, ("code", "paper"))
        if not 0 <= self.relevance <= 1:
            raise UserError(f"csr(relevance={self.relevance}): it must be from 0 to 1.")
        for name in ("branches", "best", "worst", "sentences", "sentence_tokens"):
            value, least = getattr(self, name), 2 if name == "branches" else 1
            if value < least:
                raise UserError(f"csr({name}={value}): it must be {least} or more.")

    def rewards(self, siblings: Sequence[Sentence], cosines: Sequence[float]) -> list[float]:
        """Rewards of the sentences that may continue one partial answer; `cosines` are with the image."""
        if self.form == "paper":
            relevances = [max(100 * cosine, 0.0) for cosine in cosines]  # R_I
            likelihoods = [math.exp(sum(sentence.logps)) for sentence in siblings]  # R_T
        else:
            relevances = _ranks(cosines)
            likelihoods = _ranks([_mean(sentence.logps) for sentence in siblings])
        mixed = []
        for relevance, likelihood in zip(relevances, likelihoods, strict=True):
            mixed.append(self.relevance * relevance + (1 - self.relevance) * likelihood)
        return mixed

    def kept(self, paths: Sequence[_Path]) -> list[_Path]:
        """The partial answers that grow on: some of the best, some of the worst."""
        order = sorted(paths, key=lambda path: -(path.likelihood if self.form == "code" else path.reward))
        if len(order) <= self.best + self.worst:
            return order
        return [*order[: self.best], *order[len(order) - self.worst :]]


@dataclass(frozen=True)
class _Path:
    """A partial answer."""

    sample: int
    text: str = ""
    total: float = 0.0
    """Sum of its sentences' rewards."""
    likelihood: float = 0.0
    """Sum of its sentences' mean log-probs."""
    count: int = 0
    """Sentences."""

    @property
    def reward(self) -> float:
        return self.total / max(1, self.count)

    def with_sentence(self, sentence: Sentence, reward: float) -> _Path:
        return _Path(
            self.sample, self.text + sentence.text, self.total + reward, self.likelihood + _mean(sentence.logps), self.count + 1
        )


class _Search:
    """Grows the trees of some samples together, sentence by sentence, so that batches are full.

    As many as their first sentences fill a batch: all that they read and wrote is kept until they have grown.
    """

    def __init__(self, family: Family, scorer: Scorer, tree: _Tree, decoding: Decoding) -> None:
        self.family, self.scorer, self.tree, self.decoding = family, scorer, tree, decoding

    def __call__(self, samples: Sequence[Sample]) -> list[list[Candidate]]:
        size = max(1, self.decoding.batch_size // self.tree.branches)
        grown = [self._trees(samples[start : start + size]) for start in range(0, len(samples), size)]
        return [*chain.from_iterable(grown)]

    def _trees(self, samples: Sequence[Sample]) -> list[list[Candidate]]:
        images, kept = self.scorer.look(samples), self.family.keeping()
        leaves: dict[_Path, None] = {}  # an ordered set: equal answers count once
        open_paths = [_Path(sample) for sample in range(len(samples))]
        for depth in range(self.tree.sentences):
            grown: list[list[_Path]] = [[] for _ in samples]
            for path, is_open in self._grow(samples, images, open_paths, depth, kept):
                if is_open:
                    grown[path.sample].append(path)
                else:
                    leaves[path] = None
            open_paths = [path for paths in grown for path in self.tree.kept(paths)]
            if not open_paths:
                break
        leaves |= dict.fromkeys(open_paths)
        candidates: list[list[Candidate]] = [[] for _ in samples]
        for path in leaves:
            if path.count:
                candidates[path.sample].append(Candidate(path.text.strip(), path.reward))
        return candidates

    def _grow(
        self, samples: Sequence[Sample], images: Sequence[Any], paths: Sequence[_Path], depth: int, kept: Kept
    ) -> list[tuple[_Path, bool]]:
        """Every partial answer one sentence longer, and whether it goes on."""
        branches = self.tree.branches
        repeated = [path for path in paths for _ in range(branches)]
        drawn = self.family.next_sentences(
            [samples[path.sample] for path in repeated],
            [path.text for path in repeated],
            max_new_tokens=self.tree.sentence_tokens,
            temperature=self.decoding.temperature,
            top_p=self.decoding.top_p,
            seed=f"{self.decoding.seed}/{depth}",
            batch_size=self.decoding.batch_size,
            kept=kept,
            decoding=self.decoding.decoding,
        )
        siblings = [drawn[start : start + branches] for start in range(0, len(drawn), branches)]
        usable = [_usable(sentences) for sentences in siblings]
        texts, seen = [], []
        for path, sentences in zip(paths, usable, strict=True):
            texts += [sentence.text.strip() for sentence in sentences]
            seen += [images[path.sample]] * len(sentences)
        cosines = iter(self.scorer.relevance(seen, texts))
        grown: list[tuple[_Path, bool]] = []
        for path, sentences, all_drawn in zip(paths, usable, siblings, strict=True):
            rewards = self.tree.rewards(sentences, [next(cosines) for _ in sentences])
            for sentence, reward in zip(sentences, rewards, strict=True):
                grown.append((path.with_sentence(sentence, reward), sentence.ending == "sentence"))
            has_ended = any(sentence.ending == "answer" and not sentence.text.strip() for sentence in all_drawn)
            if not sentences or has_ended:  # the partial answer is a whole one, or nothing continues it
                grown.append((path, False))
        return grown


def _usable(drawn: Sequence[Sentence]) -> list[Sentence]:
    """Whole sentences, each once."""
    unique: dict[str, Sentence] = {}
    for sentence in drawn:
        if sentence.ending != "cut" and len(sentence.text.strip()) >= SHORTEST:
            unique[sentence.text] = unique.pop(sentence.text, sentence)  # the first, in the order of the last
    return list(unique.values())


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value among all, from just above 0 for the lowest to just below 1 for the highest.

    The released code ranks n values from 1/n (best) to 1 (worst). Here the mean rank is 1/2 for any n, because repeated
    sentences count once, so that n differs. For equal n both order answers alike.

    >>> _ranks([-2.0, -1.0])
    [0.25, 0.75]
    """
    ranks = [0.0] * len(values)
    for rank, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        ranks[index] = (rank + 0.5) / len(values)
    return ranks


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
