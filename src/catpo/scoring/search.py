"""`catpo probe --search`: which signal of a model tells its grounded words from its hallucinated ones best.

All signals are read in one pass, at the first tokens of words whose truth is known; nothing else is kept. What has to be
chosen, a layer or a head, is chosen on one half of the pictures, and every figure is of the other half.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.intervals import auroc, auroc_between
from catpo.core.spec import Spec, parse
from catpo.core.types import SIDES, UNRANKED, PreferencePair, Side
from catpo.data.read import read_pairs, read_samples
from catpo.files.json_files import write_json
from catpo.models import loading, memory
from catpo.models.family import Family
from catpo.models.family_check import check_family
from catpo.models.memory import pass_tokens
from catpo.models.views import OtherPictures
from catpo.rewards.words import digest_of
from catpo.runtime.progress import track
from catpo.runtime.skip_log import SkipLog
from catpo.scoring.batches import Preparation, Prepared, Window
from catpo.scoring.claims import AUTO, Asker
from catpo.scoring.forward import TeacherForced
from catpo.scoring.settings import PAPER_SIGNALS, ScoreSettings
from catpo.scoring.signals import Evidence

BATCH, SHARD = 8, 32
"""Pairs per forward pass and per window: all layers' states are in memory at once."""
LENS, LAYERS, HEADS = "patch_lens, best layer", "attention, best layer", "attention, best head"
"""Groups of signals of which the best is chosen."""
ASKING = "self_question"


@dataclass(frozen=True)
class Found:
    """How well a signal tells grounded words (positive) from hallucinated ones."""

    signal: str
    """As `catpo score --signals` takes it."""
    chosen_from: str
    """The group whose best it is on the pictures for choosing; empty for a signal by itself."""
    auroc: float
    """On the other pictures, with its 95 % interval from a bootstrap over pictures."""
    low: float
    high: float
    grounded: int
    hallucinated: int


@dataclass
class _Words:
    """The words whose truth is known, and their signals."""

    pictures: list[str] = field(default_factory=list)
    grounded: list[bool] = field(default_factory=list)
    values: list[NDArray[np.float32]] = field(default_factory=list)
    """[signals] each; NaN where the signal says nothing of the word: the model was not asked about it."""


@dataclass(frozen=True)
class _Truth:
    """The objects in pictures, as a data set lists them."""

    present: Mapping[str, set[str]]
    """Digest of pictures -> the objects in them."""
    vocabulary: Mapping[str, str]
    """Surface form -> object, as the lists call it."""

    @classmethod
    def of(cls, data: str, asker: Asker) -> _Truth:
        """What a data set lists, in its own words; in those of the asker if it has none."""
        samples, vocabulary = read_samples(data, SkipLog("stop"))
        listed = [sample for sample in samples if "present" in sample.truth]
        present = {digest_of(sample.images): set(sample.truth["present"]) for sample in listed}
        return cls(present, vocabulary or asker.forms)

    @cached_property
    def known(self) -> set[str]:
        """What the lists would name if it were there; of other things they do not tell."""
        return {*self.vocabulary.values()}.union(*self.present.values())

    def labels(self, pair: PreferencePair, side: Side, asker: Asker) -> list[tuple[int, int, bool]]:
        """Start and end of the words in a response that the asker finds, and whether they are in the pictures."""
        text, objects = pair.response(side), self.present.get(digest_of(pair.images))
        if objects is None:
            return []
        found = [
            (claim, self.vocabulary.get(text[claim.start : claim.end].lower(), claim.object)) for claim in asker.claims(text)
        ]
        return [(claim.start, claim.end, name in objects) for claim, name in found if name in self.known]


def search(
    pairs: str | Path,
    model: str | Path,
    *,
    truth: str | None = None,
    nouns: str = "auto",
    limit: int | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> list[Found]:
    """AUROC of every signal, the best first.

    Args:
        pairs: preference pairs whose words are judged: by `truth`, else by their labels, else by what their edits say.
        model: the reference model.
        truth: a data set that lists the objects in the same pictures (`truth["present"]`).
        nouns: what finds words, see `catpo.scoring.claims.Asker`.
        limit: use only the first pairs.
        output: a JSON file for all figures.
        progress: whether a progress bar is shown.

    Raises:
        UserError: the pairs or the model cannot be read, or there are too few words of one kind. A signal that says nothing of
            most words is judged by the others, or left out.
    """
    data = read_pairs(pairs, SkipLog("stop"), limit)
    family = loading.load(model)
    searching = _Searching.of(family, data, nouns, truth)
    words = searching.read(progress)
    found = _judged([str(signal) for signal in searching.settings.signals], words)
    if output is not None:
        write_json(output, {"format": 1, "model_hash": family.model_hash, "signals": [asdict(row) for row in found]})
    return found


@dataclass(frozen=True)
class _Searching:
    """One pass over the pairs."""

    family: Family
    pairs: Sequence[PreferencePair]
    settings: ScoreSettings
    labels: Mapping[tuple[str, Side], Sequence[tuple[int, int, bool]]]
    """(pair's id, side) -> start and end of words in the response, and whether they are grounded."""
    asker: Asker
    """What self_question asks about."""

    @classmethod
    def of(cls, family: Family, pairs: Sequence[PreferencePair], nouns: str, data: str | None) -> _Searching:
        family.check_packable()
        settings = ScoreSettings(signals_of(family, nouns), "paper", "mean", "token", "all")
        settings.check(family.depth)
        asker = Asker.of(nouns, ("objects",), {})
        truth = None if data is None else _Truth.of(data, asker)
        labels = {(pair.id, side): _labels(pair, side, asker, truth) for pair in pairs for side in SIDES}
        if not any(labels.values()):
            raise UserError(
                "No word of these pairs is known to be in its picture or not. Give --truth, or pairs that are edits."
            )
        check_family(family, pairs[0])
        return cls(family, pairs, settings, labels, asker)

    def read(self, progress: bool) -> _Words:
        """The signals of all known words."""
        bound = max(1, pass_tokens(self.family, self.family.device) // self.family.depth)
        others = OtherPictures(self.pairs)
        prepare = Preparation(self.family.reader(), self.pairs, others, BATCH, bound, None, self.settings.questions)
        words = _Words()
        with self.family.answering(), track(len(self.pairs), "Searching", "pairs", enabled=progress) as bar:
            for start in range(0, len(self.pairs), SHARD):
                places = range(start, min(start + SHARD, len(self.pairs)))
                for batch in prepare(Window(0, places, True, reads_another=False))[1]:
                    self._read(batch, words, others)
                    bar.advance(len(batch.places))
        return words

    def _read(self, batch: Prepared, words: _Words, others: OtherPictures) -> None:
        pairs = [self.pairs[place] for place in batch.places]
        doing = f"reading the signals of {len(pairs)} pairs"
        with memory.explained(doing, self.family.unwrapped), torch.inference_mode(), self.family.recordable_attention():
            run = TeacherForced(self.family, batch, self.settings, pairs, others)
            for index, pair in enumerate(pairs):
                for side in SIDES:
                    self._read_response(run, index, pair, side, words)

    def _read_response(self, run: TeacherForced, index: int, pair: PreferencePair, side: Side, words: _Words) -> None:
        known = self.labels[pair.id, side]
        if not known:
            return
        evidence = run.evidence(index, side)
        firsts = [next(iter(evidence.tokens_of(start, end)), None) for start, end, _ in known]
        at = torch.tensor([token for token in firsts if token is not None], device=evidence.token_ids.device)
        rows = [self._score(signal)(evidence, **signal.options)[at].float() for signal in self.settings.signals]
        values = torch.stack(rows, dim=1).cpu().numpy()
        values[np.ix_(~self._is_asked(evidence, at.tolist()), self._asking)] = np.nan
        words.values += [*values]
        words.grounded += [grounded for token, (_, _, grounded) in zip(firsts, known, strict=True) if token is not None]
        words.pictures += [digest_of(pair.images)] * len(at)

    @property
    def _asking(self) -> NDArray[np.bool_]:
        """Which signals are the model's answers."""
        return np.array([signal.name == ASKING for signal in self.settings.signals])

    def _is_asked(self, evidence: Evidence, tokens: Sequence[int]) -> NDArray[np.bool_]:
        """Whether the model is asked about the words of these tokens."""
        claims = self.asker.claims(evidence.response)
        asked = {token for claim in claims for token in evidence.tokens_of(claim.start, claim.end)}
        return np.array([token in asked for token in tokens], dtype=bool)

    def _score(self, signal: Spec) -> Callable[..., torch.Tensor]:
        score: Callable[..., torch.Tensor] = registry.load("signals", signal.name)
        return score


def signals_of(family: Family, nouns: str) -> tuple[Spec, ...]:
    """All signals that are compared: the paper's, those of every layer and head, and the model's own answers."""
    layers, heads = range(family.depth), range(family.text_config.num_attention_heads)
    return (
        *(Spec(name) for name in (*PAPER_SIGNALS, "log_prob", "entropy", "patch_logit")),
        Spec(ASKING) if nouns == AUTO else Spec(ASKING, {"nouns": nouns}),
        *(Spec("patch_lens", {"layer": layer}) for layer in layers),
        *(Spec("head_attention", {"layer": layer}) for layer in layers),
        *(Spec("head_attention", {"layer": layer, "head": head}) for layer in layers for head in heads),
    )


def _group(signal: str) -> str:
    """Of which group the best is looked for; empty for a signal that stands for itself."""
    spec = parse(signal)
    if spec.name == "patch_lens":
        return LENS
    if spec.name == "head_attention":
        return HEADS if "head" in spec.options else LAYERS
    return ""


def _labels(pair: PreferencePair, side: Side, asker: Asker, truth: _Truth | None) -> list[tuple[int, int, bool]]:
    """The words of a response that are known to be in the picture or not."""
    if truth is not None:
        return truth.labels(pair, side, asker)
    if pair.labels:
        return [(span.start, span.end, span.label == "grounded") for span in pair.labels.get(side, ())]
    if pair.meta.get(UNRANKED):
        return []
    kept = {claim.question for claim in asker.claims(pair.chosen)}
    return [(claim.start, claim.end, claim.question in kept) for claim in asker.claims(pair.response(side))]


def _judged(signals: Sequence[str], words: _Words) -> list[Found]:
    """The signals that stand for themselves, and the best of each group."""
    values, grounded = np.array(words.values), np.array(words.grounded, dtype=np.int64)
    names, pictures = np.unique(words.pictures, return_inverse=True)
    is_judged = (np.random.default_rng(0).permutation(len(names)) % 2 == 1)[pictures]
    for part in (is_judged, ~is_judged):
        if len({*grounded[part].tolist()}) < 2:
            raise UserError("Too few words are known to be grounded, or to be hallucinated. Give more pairs.")
    rows = []
    for column, chosen_from in _columns(signals, values[~is_judged], grounded[~is_judged]):
        is_said = is_judged & ~np.isnan(values[:, column])
        scores, labels = values[is_said, column], grounded[is_said]
        if len({*labels.tolist()}) < 2:
            _tell_silent(signals[column], len(labels), int(is_judged.sum()))
            continue
        counts = int(labels.sum()), int((1 - labels).sum())
        rows.append(Found(signals[column], chosen_from, *auroc_between(scores, labels, pictures[is_said]), *counts))
    return sorted(rows, key=lambda row: -row.auroc)


def _tell_silent(signal: str, count: int, total: int) -> None:
    what = f"asks about {count} of the {total} words, which are too few of one kind, so it is not judged"
    print(f"catpo: {signal} {what}. Choose what finds words with --nouns.", file=sys.stderr)


def _columns(signals: Sequence[str], values: NDArray[np.float32], grounded: NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    """The signals to judge, and from which group each was chosen."""
    groups: dict[str, list[int]] = {}
    for column, signal in enumerate(signals):
        groups.setdefault(_group(signal), []).append(column)
    for column in groups.pop("", []):
        yield column, ""
    for group, columns in groups.items():
        yield max(columns, key=lambda column: auroc(values[:, column], grounded)), group
