"""Rewards of words, from what the reference says of them and what the pairs' edits say. Knows nothing of models or losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import check_options, parse
from catpo.files.json_files import read_json, write_json
from catpo.rewards.word_prefixes import WordPrefixes
from catpo.rewards.words import KEPT, REMOVED, UNKNOWN, WordTable

FEATURES = ("self_question", "patch_lens", "log_prob", "judge")
"""What a store can keep of a word: the reference's logit of yes less that of no when it is asked for the word; the largest
log-prob that the output head gives the word at the last hidden state of a patch; the largest log-prob of the word at any token
of the responses; what a judge answers, as a logit.
"""
PROBE_FIELDS = {"features": list[str], "means": list[float], "scales": list[float], "weights": list[float], "intercept": float}


@dataclass(frozen=True)
class Probe:
    """Logistic regression that tells words that are in the pictures from others: `catpo probe` learns and writes one."""

    features: tuple[str, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    """Of each feature, mean and standard deviation where it was learned."""
    weights: tuple[float, ...]
    """Of each standardised feature."""
    intercept: float

    @classmethod
    def read(cls, path: str | Path) -> Probe:
        """A probe's JSON file.

        Raises:
            UserError: it cannot be read, or does not hold a probe.
        """
        content = read_json(path, made_by="catpo probe", fields=PROBE_FIELDS)
        lists = {name: tuple(content[name]) for name in PROBE_FIELDS if name != "intercept"}
        probe = cls(**lists, intercept=float(content["intercept"]))
        numbers = [*probe.means, *probe.scales, *probe.weights, probe.intercept]
        if len({len(values) for values in lists.values()}) != 1 or not all(map(math.isfinite, numbers)) or 0 in probe.scales:
            raise UserError(
                f"{path} holds no probe of one mean, scale and weight per feature. Write it again with `catpo probe`."
            )
        return probe

    @classmethod
    def fitted(cls, features: Sequence[str], columns: NDArray[np.floating], labels: NDArray[np.integer]) -> Probe:
        """The probe that separates words of label 1 from those of label 0 best (L2-penalised, scikit-learn's defaults).

        Args:
            features: names of the columns.
            columns: [words, features].
            labels: [words], 0 or 1.

        Raises:
            UserError: scikit-learn is not installed, or there are words of one label only.
        """
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise UserError("A probe needs scikit-learn: pip install 'catpo[probe]'.") from error
        if set(labels.tolist()) != {REMOVED, KEPT}:
            raise UserError(
                "A probe needs words that the pairs keep and words that they remove; here are only one kind, or none. Make "
                "pairs with `--method corrected`, or of more pictures."
            )
        scaler = StandardScaler().fit(columns)
        model = LogisticRegression().fit(scaler.transform(columns), labels)
        means, scales, weights = (tuple(map(float, values)) for values in (scaler.mean_, scaler.scale_, model.coef_[0]))
        return cls(tuple(features), means, scales, weights, intercept=float(model.intercept_[0]))

    def write(self, path: str | Path, **report: Any) -> None:
        """As JSON, with what is to be known of it beside."""
        write_json(path, {**vars(self), **report})

    def logits(self, features: Mapping[str, NDArray[np.floating]]) -> NDArray[np.floating]:
        """Log-odds that each word is in the pictures, [words].

        Raises:
            UserError: a feature that it reads was not scored.
        """
        columns = [_feature(features, name) for name in self.features]
        standardised = (np.stack(columns, axis=-1) - np.array(self.means)) / np.array(self.scales)
        return standardised @ np.array(self.weights) + self.intercept


@dataclass(frozen=True)
class WordReward:
    """How words are rewarded: `self_question(…)`, another of `FEATURES`, or `probe(…)`, learned from the store or in a file."""

    source: str
    probe: Probe | None
    scale: float
    slope: float
    offset: float
    floor: float
    labels: bool
    removed: float

    @classmethod
    def of(cls, text: str) -> WordReward:
        """The reward that `name(option=value, …)` stands for; its options are those of `_options`.

        Raises:
            UserError: there is none of that name, an option is unknown or out of range, or a probe cannot be read.
        """
        spec = parse(text)
        if spec.name not in (*FEATURES, "probe"):
            raise UserError(f"reward='{spec.name}' is not known. {did_you_mean(spec.name, (*FEATURES, 'probe'))}")
        options = _options(**check_options(_options, spec))
        file = options.pop("file")
        if file and spec.name != "probe":
            raise UserError(f"reward='{spec}': only probe(file='…') takes a file.")
        return cls(spec.name, Probe.read(file) if file else None, **options)

    @property
    def reads(self) -> tuple[str, ...]:
        """The features that must have been scored; a probe that is not learned yet reads what there is."""
        if self.probe is not None:
            return self.probe.features
        return () if self.source == "probe" else (self.source,)

    def ready(self, tables: Sequence[WordTable]) -> WordReward:
        """With a probe learned from the labelled words of these tables, unless it is there or none is needed.

        Raises:
            UserError: nothing can be learned from them, see `Probe.fitted`.
        """
        if self.source != "probe" or self.probe is not None:
            return self
        features = list(next((table.features for table in tables), {}))
        labels = np.concatenate([np.array([], dtype=np.int64), *(table.labels for table in tables)])
        columns = np.concatenate([np.empty((0, len(features))), *(table.columns(features) for table in tables)])
        is_labelled = labels != UNKNOWN
        return replace(self, probe=Probe.fitted(features, columns[is_labelled], labels[is_labelled]))

    def of_words(self, table: WordTable) -> NDArray[np.floating]:
        """The reward of each word, [words], 0 or less.

        Raises:
            UserError: a feature was not scored.
        """
        logits = _feature(table.features, self.source) if self.probe is None else self.probe.logits(table.features)
        rewards = -self.scale * np.logaddexp(0, -self.slope * (logits - self.offset))  # scale x log sigmoid
        rewards = np.maximum(rewards, self.floor)
        if self.labels:
            rewards = np.where(table.labels == REMOVED, self.removed, np.where(table.labels == KEPT, 0.0, rewards))
        return rewards

    def of_tokens(self, table: WordTable, tokens: str = "first") -> WordPrefixes:
        """What tokens are rewarded with: the first of each word, or (`word`) every one."""
        if not table.words:
            return WordPrefixes(())
        firsts = [[(token,) for token in ids] for ids in table.token_ids]
        forms = table.forms if tokens == "word" else firsts
        rewards = self.of_words(table).tolist()
        return WordPrefixes((form, reward) for of_word, reward in zip(forms, rewards, strict=True) for form in of_word)


def _options(
    *,
    file: str = "",
    scale: float = 2.0,
    slope: float = 1.0,
    offset: float = 0.0,
    floor: float = -8.0,
    labels: bool = True,
    removed: float = -6.0,
) -> dict[str, Any]:
    """A word's reward is scale x log sigmoid(slope x (logit - offset)), not below `floor`; of a word that the pairs remove it
    is `removed`, and 0 of one that they keep, unless labels=False.
    """
    if scale <= 0 or slope <= 0 or floor > 0 or removed > 0:
        raise UserError("A reward's scale and slope must be larger than 0, its floor and `removed` not larger than 0.")
    return dict(locals())


def _feature(features: Mapping[str, NDArray[np.floating]], name: str) -> NDArray[np.floating]:
    if name not in features:
        held = ", ".join(features) or "none"
        raise UserError(
            f"The store holds no '{name}' of words (it holds: {held}). Score the pairs with "
            f"--words \"words(features=['{name}'])\"."
        )
    return features[name]
