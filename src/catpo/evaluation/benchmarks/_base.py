"""What benchmarks share: items, grades of captions by their objects and of yes/no answers, ratios of summed counts.

A metric is a function of sums of counts, never a mean of per-item values: sums can be resampled, and groups joined.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from shlex import quote
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.evaluation.benchmarks._answers import by_id
from catpo.evaluation.benchmarks._files import Folder, Pictures, Source
from catpo.files.records import Record
from catpo.text.object_words import mentions

Floats = NDArray[np.float64]
Sums = Mapping[str, Mapping[str, Floats]]
"""Group -> count -> sums, [1 + resamples] or any other shape except a single number."""

CAPTIONS = "captions"
"""The group of captions; questions have the name of their split."""
GROUNDED, HALLUCINATED = "grounded", "hallucinated"
QUESTION_TOKENS = 8
"""Enough for "Yes, there is ..."."""
REPETITION_WORDS = 4


@dataclass(frozen=True)
class Item:
    """One thing that a model is asked."""

    id: str
    """Unique in its benchmark; a caption's is its sample's."""
    sample: Sample
    """Picture, prompt and truth."""
    group: str
    """What is summed up together: `captions`, or a split of questions."""
    picture: str
    """Items of one picture are drawn together when resampling."""
    expected: str = ""
    """The right answer of a yes/no question."""
    max_new_tokens: int | None = None
    """Longest useful answer, if shorter than the benchmark's or what the user allows."""
    options: Mapping[str, str] | None = None
    """Answers to choose from, by their letters: the model does not write, the option with the lowest loss is taken."""


@dataclass(frozen=True)
class Grade:
    """What an answer adds to the sums."""

    counts: Mapping[str, float]
    mentions: Sequence[tuple[str, str]] | None = None
    """A caption's objects in the order named, each once, with `grounded` or `hallucinated`."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping in grades.jsonl, such as a judge's reply."""
    is_right: bool | None = None
    """Whether the answer is right, for lists of answers that changed; None where that cannot be said."""
    has_verdict: bool = True
    """False where the judge's reply cannot be read; scores list such items and are not called complete."""


class Benchmark(ABC):
    """Base of every module in `benchmarks/`. Options are keyword arguments of its constructor.

    This one asks about the samples of a data set; see `FolderBenchmark` for those made of official files.
    """

    data: str = ""
    """The data set it is made of, as `name(option=value)` or a path."""
    max_new_tokens: ClassVar[int] = 96
    """Longest answer of a model, unless the user sets another."""
    needs_judge: bool = False
    """Whether `grade` takes a `catpo.judges.Judge` as third argument."""
    judge_decoding: ClassVar[Mapping[str, Any]] = {}
    """How the benchmark's authors decode from their judge, e.g. {"temperature": 0.2}."""
    judge_form: ClassVar[str] = ""
    """The judge's reply that can be read, in words."""
    is_gradable_in_part: ClassVar[bool] = False
    """Whether answers made elsewhere are graded although some are missing; scores then say so."""
    is_answered_here: bool = False
    """Whether a model is asked now; otherwise answers made elsewhere are graded. Set before anything is opened."""

    def items(self, samples: Sequence[Sample], vocabulary: Mapping[str, str] | None = None) -> list[Item]:
        """Everything that is asked, in a fixed order; `samples` and object words are those of `data`."""
        raise NotImplementedError(f"{type(self).__module__} has no `items`")

    @abstractmethod
    def grade(self, item: Item, answer: str) -> Grade:
        """Counts of one answer; the same names for every item of a group."""

    @staticmethod
    @abstractmethod
    def summarise(sums: Sums) -> dict[str, Floats]:
        """Metrics of summed counts, in percent unless they say otherwise; NaN where there is nothing to divide by."""

    @staticmethod
    def official(sums: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """What the official program prints for these sums, rounded as it rounds; empty if there is no such program."""
        return {}

    def provenance(self) -> dict[str, Any]:
        """What else decides the numbers, such as versions of tools; kept in scores.json and equal where scores compare."""
        return {}

    def match(self, records: Sequence[Record], items: Sequence[Item]) -> dict[str, str]:
        """Item id -> answer, from rows in the benchmark's usual format; items without a row are left out.

        Raises:
            UserError: a row answers no item, or one that has an answer already; or there is no usual format.
        """
        raise UserError(f"{records[0].place} needs the texts 'benchmark', 'id' and 'answer'.")


class FolderBenchmark(Benchmark):
    """A benchmark made of official files in the folder that `--data` names."""

    sources: ClassVar[tuple[Source, ...]]
    """Its files, for `catpo data get` too."""
    pictures: ClassVar[Pictures | None] = None
    """Its pictures; None if it has none of its own."""
    is_open: ClassVar[bool] = False
    """Whether answers made elsewhere say what was asked: nothing is opened then, and each answered item is made by `item`."""
    is_gradable_in_part: ClassVar[bool] = True

    @abstractmethod
    def open(self, folder: Folder) -> list[Item]:
        """Everything that is asked, in a fixed order. Read files through `folder`, which hashes them for scores.json."""

    def opened(self, folder: Folder) -> list[Item]:
        """`open`, with a message where a file is not in its authors' format.

        Raises:
            UserError: a file is missing, or in another format.
        """
        try:
            return self.open(folder)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else (str(error) or type(error).__name__).split("\n", 1)[0]
            file = list(folder.hashes)[-1] if folder.hashes else "a file"
            raise UserError(
                f"{folder.benchmark}: {file} in {folder.path} has not the form that its authors gave it ({reason}). Get it "
                f"again: `catpo data get {folder.benchmark} --data {quote(str(folder.path))}` says where, and compares it."
            ) from error

    def item(self, name: str) -> Item:
        """An item by its id, if the benchmark `is_open`."""
        raise NotImplementedError(f"{type(self).__module__} is not open")

    def match(self, records: Sequence[Record], items: Sequence[Item]) -> dict[str, str]:
        """By id, unless the benchmark overrides it."""
        return by_id(records, [item.id for item in items], items=items)


# ---- captions -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionTruth:
    """What can be said of a picture."""

    present: frozenset[str]
    tempting: frozenset[str] = frozenset()
    """Absent objects that usually come with those present."""


def grade_caption(answer: str, truth: CaptionTruth, vocabulary: Mapping[str, str] | None = None) -> Grade:
    """Count a caption's objects, each once however often it is named (a model that repeats itself gains nothing).

    >>> dict(grade_caption("A dog and a cat. The dog sits.", CaptionTruth(frozenset({"dog"}))).counts)["objects"]
    2
    """
    named = [mention.object for mention in mentions(answer, vocabulary)]
    labels = label_objects(named, truth.present)
    hallucinated = [name for name, label in labels if label == HALLUCINATED]
    words = re.findall(r"\w+(?:['-]\w+)*", answer.lower())
    runs = [tuple(words[start : start + REPETITION_WORDS]) for start in range(len(words) - REPETITION_WORDS + 1)]
    counts = {
        "captions": 1,
        "objects": len(labels),
        "hallucinated": len(hallucinated),
        "hallucinated_captions": int(bool(hallucinated)),
        "tempted": len(truth.tempting.intersection(hallucinated)),
        "present": len(truth.present),
        "covered": len(labels) - len(hallucinated),
        "mentions": len(named),
        "words": len(words),
        "word_runs": len(runs),
        "repeated_runs": len(runs) - len(set(runs)),
    }
    return Grade(counts, labels)


def label_objects(named: Iterable[str], present: Collection[str]) -> list[tuple[str, str]]:
    """Each object once, in the order named, with `grounded` or `hallucinated`."""
    return [(name, GROUNDED if name in present else HALLUCINATED) for name in dict.fromkeys(named)]


def caption_metrics(sums: Mapping[str, Floats]) -> dict[str, Floats]:
    """Metrics of the captions of many pictures.

    chair_i: absent objects / objects named (each object once per caption). chair_s (also called Hal): captions with an absent
    object / captions. cover: present objects named / present objects. cog: tempting absent objects / objects named.
    objects, words: per caption (no percentage). repetition: runs of four words that the caption had before / runs.
    """
    return {
        "chair_i": percent(sums["hallucinated"], sums["objects"]),
        "chair_s": percent(sums["hallucinated_captions"], sums["captions"]),
        "cover": percent(sums["covered"], sums["present"]),
        "cog": percent(sums["tempted"], sums["objects"]),
        "objects": ratio(sums["objects"], sums["captions"]),
        "words": ratio(sums["words"], sums["captions"]),
        "repetition": percent(sums["repeated_runs"], sums["word_runs"]),
    }


# ---- yes/no questions -----------------------------------------------------------------------------------------------------


def read_yes_no(answer: str) -> str:
    """`yes` or `no` if that is the first word, else nothing.

    >>> read_yes_no("Yes, there is."), read_yes_no(" **No**"), read_yes_no("None can be seen.")
    ('yes', 'no', '')
    """
    match = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
    return match[1].lower() if match else ""


def only_yes_no(answer: str) -> str:
    """`yes` or `no` if it is the only one of the two words in the answer, else nothing.

    >>> only_yes_no("There is NO dog."), only_yes_no("Yes or no?")
    ('no', '')
    """
    words = {"yes", "no"}.intersection(re.findall(r"[a-z]+", answer.lower()))
    return words.pop() if len(words) == 1 else ""


def grade_question(answer: str, expected: str) -> Grade:
    """Count a yes/no answer; what is neither is wrong, as the opposite of the right one would be, and counted as unparsed."""
    said = read_yes_no(answer)
    counts = {
        "questions": 1,
        "expected_yes": int(expected == "yes"),
        "said_yes": int(said == "yes"),
        "right_yes": int(said == expected == "yes"),
        "right": int(said == expected),
        "unparsed": int(not said),
    }
    return Grade(counts)


def question_metrics(sums: Mapping[str, Floats]) -> dict[str, Floats]:
    """Metrics of yes/no answers; "yes" is the positive class, as in POPE.

    accuracy, precision, recall, f1 as usual, where an answer that is neither counts as the opposite of the right one;
    yes_ratio: answers yes / questions; unparsed: neither yes nor no / questions.
    """
    wrong_yes = sums["questions"] - sums["expected_yes"] - (sums["right"] - sums["right_yes"])
    positive = sums["right_yes"] + wrong_yes
    return {
        "accuracy": percent(sums["right"], sums["questions"]),
        "precision": percent(sums["right_yes"], positive),
        "recall": percent(sums["right_yes"], sums["expected_yes"]),
        "f1": percent(2 * sums["right_yes"], positive + sums["expected_yes"]),
        "yes_ratio": percent(sums["said_yes"], sums["questions"]),
        "unparsed": percent(sums["unparsed"], sums["questions"]),
    }


# ---- sums -----------------------------------------------------------------------------------------------------------------


def total(sums: Mapping[str, Mapping[str, Any]], groups: Sequence[str] = ()) -> dict[str, Any]:
    """Count -> sum over some groups, or over all; their counts have the same names."""
    parts = [sums[group] for group in groups or sums]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def percent(part: Floats, whole: Floats) -> Floats:
    """100 · part / whole; NaN where whole is 0."""
    return 100 * ratio(part, whole)


def ratio(part: Floats, whole: Floats) -> Floats:
    """Part / whole; NaN where whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)
