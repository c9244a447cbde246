"""`catpo probe`: learns from a reward store which of a model's words are in the picture, labelled by what the pairs' edits say.

A logistic regression on what the store keeps of words. It is judged on pictures that it has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catpo.core.errors import UserError
from catpo.core.intervals import auroc_between
from catpo.data.read import read_samples
from catpo.rewards.store import RewardStore
from catpo.rewards.word_rewards import Probe
from catpo.rewards.words import UNKNOWN, WordTable, digest_of
from catpo.runtime.skip_log import SkipLog

FOLDS = 5
"""Parts of the pictures; each is judged by a probe that learned from the others."""
Features = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """How well one score tells words that are in the pictures from others: AUROC with its 95 % interval over pictures."""

    score: str
    words: str
    """`labelled` by the pairs; with --truth `all`, `named` by a response, or `unnamed`."""
    auroc: float
    low: float
    high: float
    present: int
    absent: int


@dataclass(frozen=True)
class Learned:
    """A probe, and the rows of its table."""

    path: Path
    rows: Sequence[Row]
    pictures: int


def learn(rewards: str | Path, output: str | Path, *, features: Sequence[str] = (), truth: str | None = None) -> Learned:
    """Learn a probe from the words of a reward store, and write it as JSON.

    Args:
        rewards: a store with words (`catpo score --words words`).
        output: the JSON file.
        features: what it reads of each word; all that the store holds by default.
        truth: a data set that lists the objects in the same pictures (`truth["present"]`), to judge the scores by; without one
            they are judged by the pairs' labels, which only words named by a response have.

    Raises:
        UserError: scikit-learn is not installed; the store holds no words or no labels of both kinds, or lacks a feature.
    """
    store = RewardStore.open(rewards)
    if not store.word_features:
        raise UserError(f"{rewards} holds no words. Score the pairs with --words words.")
    data = _Words.of(store, tuple(features) or tuple(store.word_features))
    out_of_fold = data.out_of_fold()
    probe = data.fitted(data.is_labelled)
    scores = {name: data.columns[:, number] for number, name in enumerate(data.features)} | {"probe": out_of_fold}
    present = data.labels if truth is None else data.present(truth)
    rows = [row for name, values in scores.items() for row in data.judged(name, values, present, is_true=truth is not None)]
    table = [_as_json(row) for row in rows]
    about = {name: store.provenance[name] for name in ("pairs_hash", "model_hash")}
    probe.write(output, format=1, learned_from=about, auroc=table)
    return Learned(Path(output), rows, len(set(data.pictures.tolist())))


def _as_json(row: Row) -> dict[str, Any]:
    """A row without numbers that JSON does not have: one kind of words may be missing."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(row).items()}


@dataclass(frozen=True)
class _Words:
    """All words of a store."""

    features: tuple[str, ...]
    columns: Features
    """[words, features]"""
    labels: NDArray[np.int64]
    pictures: NDArray[np.int64]
    """Which pictures each word is about."""
    digests: Sequence[str]
    """Of the pictures, by their number."""
    names: Sequence[str]

    @classmethod
    def of(cls, store: RewardStore, features: tuple[str, ...]) -> _Words:
        tables: Mapping[str, WordTable] = store.words_by_pictures
        for name in features:
            if name not in store.word_features:
                held = ", ".join(store.word_features)
                raise UserError(f"{store.path} holds no '{name}' of words, only {held}. Score again with it, or leave it out.")
        if not tables:
            raise UserError(f"{store.path} holds no word that the model might name. Lower the floor of --words.")
        counts = [len(table.words) for table in tables.values()]
        return cls(
            features=features,
            columns=np.concatenate([table.columns(features) for table in tables.values()]),
            labels=np.concatenate([table.labels for table in tables.values()]).astype(np.int64),
            pictures=np.repeat(np.arange(len(tables)), counts),
            digests=list(tables),
            names=[word for table in tables.values() for word in table.words],
        )

    @property
    def is_labelled(self) -> NDArray[np.bool_]:
        return self.labels != UNKNOWN

    def fitted(self, chosen: NDArray[np.bool_]) -> Probe:
        """The probe of the labelled words that are chosen."""
        return Probe.fitted(self.features, self.columns[chosen], self.labels[chosen])

    def out_of_fold(self) -> Features:
        """The log-odds of every word by a probe that has not seen its pictures."""
        if len(self.digests) < 2:
            raise UserError("A probe is judged on pictures that it has not seen: there must be two or more.")
        fold = np.random.default_rng(0).permutation(len(self.digests)) % min(FOLDS, len(self.digests))
        logits = np.empty(len(self.labels))
        for number in range(fold.max() + 1):
            is_held_out = fold[self.pictures] == number
            probe = self.fitted(self.is_labelled & ~is_held_out)
            logits[is_held_out] = probe.logits(dict(zip(self.features, self.columns[is_held_out].T, strict=True)))
        return logits

    def present(self, truth: str) -> NDArray[np.int64]:
        """1 for words that are in their pictures, 0 for others, -1 where the data set knows nothing of the pictures."""
        objects: dict[str, set[str]] = {}
        for sample in read_samples(truth, SkipLog("stop"))[0]:
            if "present" in sample.truth:
                objects[digest_of(sample.images)] = set(sample.truth["present"])
        known = [objects.get(digest) for digest in self.digests]
        if not any(each is not None for each in known):
            raise UserError(f"{truth} lists the objects (truth['present']) of none of the store's pictures.")
        found = []
        for name, number in zip(self.names, self.pictures.tolist(), strict=True):
            of_picture = known[number]
            found.append(-1 if of_picture is None else int(name in of_picture))
        return np.array(found)

    def judged(self, score: str, values: Features, present: NDArray[np.int64], *, is_true: bool) -> list[Row]:
        """AUROC of a score over the words whose truth is known."""
        parts = {"labelled": present >= 0}
        if is_true:
            is_known = present >= 0
            parts = {"all": is_known, "named": is_known & self.is_labelled, "unnamed": is_known & ~self.is_labelled}
        rows = []
        for name, part in parts.items():
            labels = present[part]
            counts = int(labels.sum()), int((1 - labels).sum())
            rows.append(Row(score, name, *auroc_between(values[part], labels, self.pictures[part]), *counts))
        return rows
