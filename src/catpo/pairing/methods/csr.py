"""Best against worst of a tree of the model's sentences, by likelihood and by fit to the picture: no truth, no judge (CSR)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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

FORMS = ("code", "paper")
SHORTEST = 4
"""Sentences of fewer characters are left out, as in the released code."""


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

    A sentence's reward mixes how likely the model finds it with how well it fits the picture; an answer's reward is the mean
    over its sentences. Sentences are sampled, where the authors use diverse beam search.

    Args:
        sample: the picture with its question.
        answer: not used: the tree gives the answers.
        rng: not used; the tree draws from the seed.
        vocabulary: surface form -> object, for labels where `sample.truth["present"]` tells what is there.
        others: the answers of the tree.
        scorer: what tells how well a sentence fits the picture; `catpo list scorers` shows all.
        relevance: weight of the fit to the picture, λ; the likelihood has the rest.
        branches: sentences that are drawn to follow each begun answer.
        best: begun answers of the highest reward that are kept after each sentence.
        worst: the same of the lowest.
        sentences: where an answer is ended at the latest.
        sentence_tokens: longest sentence.
        form: `code` ranks the sentences that follow one another's place by mean log-prob and by fit, and mixes the ranks;
            it keeps begun answers by log-prob. `paper` mixes exp(sum of log-probs) with 100·cosine, cut off at 0.

    Raises:
        UserError: a number that makes no tree, or no such scorer.
    """
    _check(form, relevance, branches=branches, best=best, worst=worst, sentences=sentences, sentence_tokens=sentence_tokens)
    check_scorer(scorer)
    if not others:
        return Dropped("no whole sentence")
    first = max(others, key=lambda each: each.reward)
    last = min(others, key=lambda each: each.reward)
    meta = {"rewards": [round(first.reward, 6), round(last.reward, 6)], "answers": len(others)}
    return finish(sample, first.text, last.text, sample.truth.get("present"), vocabulary, meta)


def search(
    family: Family,
    decoding: Decoding,
    *,
    scorer: str = "own",
    relevance: float = 0.9,
    branches: int = 5,
    best: int = 1,
    worst: int = 2,
    sentences: int = 10,
    sentence_tokens: int = 70,
    form: str = "code",
) -> Callable[[Sequence[Sample]], list[list[Candidate]]]:
    """What finds the answers of a block of samples: the leaves of each sample's tree with their rewards."""
    if decoding.temperature == 0:
        raise UserError("csr draws sentences: give a temperature above 0.")
    tree = _Tree(relevance, branches, best, worst, sentences, sentence_tokens, form)
    return _Search(family, open_scorer(scorer, family), tree, decoding)


@dataclass(frozen=True)
class _Tree:
    """How the tree grows."""

    relevance: float
    branches: int
    best: int
    worst: int
    sentences: int
    sentence_tokens: int
    form: str

    def rewards(self, siblings: Sequence[Sentence], fits: Sequence[float]) -> list[float]:
        """Of the sentences that may follow one begun answer, larger is better; `fits` are cosines with the picture."""
        if self.form == "paper":
            likelihoods = [math.exp(sum(each.logps)) for each in siblings]  # R_T
            return self._mixed([max(100 * fit, 0.0) for fit in fits], likelihoods)  # R_I
        return self._mixed(_ranks(fits), _ranks([_mean(each.logps) for each in siblings]))

    def _mixed(self, fits: Sequence[float], likelihoods: Sequence[float]) -> list[float]:
        return [self.relevance * fit + (1 - self.relevance) * own for fit, own in zip(fits, likelihoods, strict=True)]

    def kept(self, paths: Sequence[_Path]) -> list[_Path]:
        """The begun answers that grow on: some of the best, some of the worst."""
        order = sorted(paths, key=lambda path: -(path.likelihood if self.form == "code" else path.reward))
        if len(order) <= self.best + self.worst:
            return order
        return [*order[: self.best], *order[len(order) - self.worst :]]


@dataclass(frozen=True)
class _Path:
    """A begun answer."""

    sample: int
    text: str = ""
    total: float = 0.0
    """Sum of its sentences' rewards."""
    likelihood: float = 0.0
    """Sum of its sentences' mean log-probs."""
    count: int = 0

    @property
    def reward(self) -> float:
        return self.total / max(1, self.count)

    def with_sentence(self, sentence: Sentence, reward: float) -> _Path:
        likelihood = self.likelihood + _mean(sentence.logps)
        return replace(
            self, text=self.text + sentence.text, total=self.total + reward, likelihood=likelihood, count=self.count + 1
        )


class _Search:
    """Grows the trees of a block together, sentence by sentence, so that batches are full."""

    def __init__(self, family: Family, scorer: Scorer, tree: _Tree, decoding: Decoding) -> None:
        self.family, self.scorer, self.tree, self.decoding = family, scorer, tree, decoding

    def __call__(self, samples: Sequence[Sample]) -> list[list[Candidate]]:
        seen = self.scorer.look(samples)
        leaves: dict[_Path, None] = {}  # an ordered set
        open_paths = [_Path(number) for number in range(len(samples))]
        for depth in range(self.tree.sentences):
            grown = self._grow(samples, seen, open_paths, depth)
            leaves |= dict.fromkeys(path for path, is_open in grown if not is_open)
            open_paths = [
                path
                for number in range(len(samples))
                for path in self.tree.kept([each for each, is_open in grown if is_open and each.sample == number])
            ]
            if not open_paths:
                break
        leaves |= dict.fromkeys(open_paths)
        found: list[list[Candidate]] = [[] for _ in samples]
        for path in leaves:
            if path.count:
                found[path.sample].append(Candidate(path.text.strip(), path.reward))
        return found

    def _grow(
        self, samples: Sequence[Sample], seen: Sequence[Any], paths: Sequence[_Path], depth: int
    ) -> list[tuple[_Path, bool]]:
        """Every begun answer one sentence longer, and whether it goes on."""
        rows = [path for path in paths for _ in range(self.tree.branches)]
        drawn = self.family.next_sentences(
            [samples[path.sample] for path in rows],
            [path.text for path in rows],
            max_new_tokens=self.tree.sentence_tokens,
            temperature=self.decoding.temperature,
            top_p=self.decoding.top_p,
            seed=f"{self.decoding.seed}/{depth}",
            batch_size=self.decoding.batch_size,
        )
        groups = [drawn[start : start + self.tree.branches] for start in range(0, len(rows), self.tree.branches)]
        usable = [_usable(group) for group in groups]
        texts = [(path.sample, sentence.text) for path, group in zip(paths, usable, strict=True) for sentence in group]
        fits = iter(self.scorer.relevance([seen[number] for number, _ in texts], [text.strip() for _, text in texts]))
        grown: list[tuple[_Path, bool]] = []
        for path, group, all_drawn in zip(paths, usable, groups, strict=True):
            rewards = self.tree.rewards(group, [next(fits) for _ in group])
            grown += [
                (path.with_sentence(sentence, reward), sentence.ending == "sentence")
                for sentence, reward in zip(group, rewards, strict=True)
            ]
            if not group or any(each.ending == "answer" and not each.text.strip() for each in all_drawn):
                grown.append((path, False))  # it was finished already, or nothing follows
        return grown


def _usable(drawn: Sequence[Sentence]) -> list[Sentence]:
    """Whole sentences, each once."""
    whole = [each for each in drawn if each.ending != "cut" and len(each.text.strip()) >= SHORTEST]
    return list({each.text: each for each in reversed(whole)}.values())[::-1]


def _ranks(values: Sequence[float]) -> list[float]:
    """Place of each value among all, from just above 0 for the lowest to just below 1 for the highest.

    The released code ranks from 1/n (best) to 1 (worst) among n; here the mean is a half for any n, since sentences that were
    drawn twice count once and n differs. For equal n both order answers alike.

    >>> _ranks([-2.0, -1.0])
    [0.25, 0.75]
    """
    order = sorted(range(len(values)), key=lambda place: values[place])
    ranks = [0.0] * len(values)
    for rank, place in enumerate(order):
        ranks[place] = (rank + 0.5) / len(values)
    return ranks


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _check(form: str, relevance: float, **counts: int) -> None:
    check_word("csr", "form", form, FORMS)
    if not 0 <= relevance <= 1:
        raise UserError(f"csr(relevance={relevance}): it must be from 0 to 1.")
    for name, least in {"branches": 2, "best": 1, "worst": 1, "sentences": 1, "sentence_tokens": 1}.items():
        if counts[name] < least:
            raise UserError(f"csr({name}={counts[name]}): it must be {least} or more.")
