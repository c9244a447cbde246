"""POPE: is there a such-and-such in the image? Half yes, half no, with absent objects of three kinds; as evaluate.py counts.

    pope    pope(subset='adversarial', labels='old')

Three versions of the labels are in use: `old` (random has 2,910 questions; LLaVA's documents point at it), `head` (3,000 each,
the newest) and `mixed` (random of `head`, popular and adversarial of `old`; 9,000 questions). Figures of different labels are
not comparable. Papers print the average over the three subsets.

Source: github.com/RUCAIBox/POPE at 3df3ba1b (head) and e3e39262 (old), whose quirks are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from catpo.core.errors import UserError, did_you_mean
from catpo.core.types import Sample
from catpo.evaluation.benchmarks import QUESTION_TOKENS, Floats, FolderBenchmark, Grade, Item, Sums, percent, ratio
from catpo.evaluation.benchmarks._answers import in_order
from catpo.evaluation.benchmarks._files import Folder, Pictures, Record, Source

SUBSETS = ("random", "popular", "adversarial")
HASHES = {
    "old/random": "c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35",
    "old/popular": "5b16653023bf4f64d57eb0d168259de6627f5cde7538b85ebed3cc33034aa6cc",
    "old/adversarial": "1d8f0906a9b50c05640f6f23abfac97523be2a1bed28f7eadc63b811699b2d26",
    "head/random": "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994",
    "head/popular": "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753",
    "head/adversarial": "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8",
}
COMMITS = {"old": "e3e39262c85a6a83f26cf5094022a782cb0df58d", "head": "main"}
FOLDERS = {
    "old": ("pope/coco_e3e39262", "coco_e3e39262", "pope/coco", "pope_coco", "pope/output/coco", "output/coco"),
    "head": ("pope/coco_HEAD", "coco_HEAD", "pope/output/coco", "output/coco"),
}
VERSIONS = {
    "old": dict.fromkeys(SUBSETS, "old"),
    "head": dict.fromkeys(SUBSETS, "head"),
    "mixed": {"random": "head", "popular": "old", "adversarial": "old"},
}
"""Labels -> subset -> whose file."""
SENTENCE_TOKENS = 64
SUFFIX = "\nAnswer the question using a single word or phrase."
"""What LLaVA adds to a question."""


def _source(name: str) -> Source:
    version, subset = name.split("/")
    file = f"coco_pope_{subset}.json"
    return Source(
        f"{version}/{file}",
        tuple(f"{folder}/{file}" for folder in FOLDERS[version]),
        f"https://raw.githubusercontent.com/RUCAIBox/POPE/{COMMITS[version]}/output/coco/{file}",
        HASHES[name],
        is_needed=version == "old",
        note="for labels 'old' and 'mixed'" if version == "old" else "for labels 'head' and 'mixed'",
    )


class Benchmark(FolderBenchmark):
    """Yes/no questions about 500 COCO photographs.

    Args:
        subset: `random`, `popular` or `adversarial`; all three and their average if empty.
        labels: `old`, `head` or `mixed`.
        parser: `official` (what does not say no, not or No in its first sentence is a yes) or `tolerant` (the first word, or
            the only yes or no; else it is wrong and counted as unparsed).
        prompt: `short` asks for a single word, as LLaVA does; `plain` is the question alone.
    """

    sources = tuple(_source(name) for name in HASHES)
    pictures = Pictures(
        ("coco/val2014", "val2014", "pope/val2014", "images"),
        500,
        "http://images.cocodataset.org/zips/val2014.zip",
        "COCO_val2014_000000*.jpg; 500 of the 40,504 are asked about",
    )

    def __init__(self, *, subset: str = "", labels: str = "old", parser: str = "official", prompt: str = "short") -> None:
        for name, value, known in (
            ("subset", subset, ("", *SUBSETS)),
            ("labels", labels, tuple(VERSIONS)),
            ("parser", parser, ("official", "tolerant")),
            ("prompt", prompt, ("short", "plain")),
        ):
            if value not in known:
                raise UserError(f"pope({name}={value!r}) is not known. {did_you_mean(value, [each for each in known if each])}")
        self.subsets = (subset,) if subset else SUBSETS
        self.labels, self.parser, self.prompt = labels, parser, prompt

    def open(self, folder: Folder) -> list[Item]:
        """Questions of each subset in the order of its file; answers are matched by it."""
        return [item for subset in self.subsets for item in self._questions(subset, folder)]

    def _questions(self, subset: str, folder: Folder) -> list[Item]:
        version = VERSIONS[self.labels][subset]
        rows = folder.rows(f"{version}/coco_pope_{subset}.json")
        _check_version(folder, version, subset)
        suffix = SUFFIX if self.prompt == "short" else ""
        items = []
        for number, row in enumerate(rows, start=1):
            if row.get("label") not in ("yes", "no") or not isinstance(row.get("question_id"), int | str):
                raise UserError(
                    f"{version}/coco_pope_{subset}.json: row {number} needs question_id, and label yes or no. Get it again."
                )
            name = f"{subset}/{row['question_id']}"
            truth = {"question": row["text"]}
            sample = Sample(name, (folder.picture(row["image"]),), row["text"] + suffix, truth=truth)
            expected = "no" if row["label"] == "no" else "yes"
            items.append(Item(name, sample, subset, row["image"], expected, QUESTION_TOKENS if suffix else SENTENCE_TOKENS))
        return items

    def provenance(self) -> dict[str, Any]:
        """Which labels, and how answers are read."""
        return {"labels": self.labels, "parser": self.parser}

    def match(self, records: Sequence[Record], items: Sequence[Item]) -> dict[str, str]:
        """By order. A row or its file's name says which subset it is of; else it is the first order that fits the questions."""
        wanted = {subset: [item for item in items if item.group == subset] for subset in self.subsets}
        subsets = [_subset(record) for record in records]
        named = {name: [each for each, own in zip(records, subsets, strict=True) if own == name] for name in wanted}
        if sum(map(len, named.values())) == len(records):
            return {name: text for subset, own in named.items() if own for name, text in _ordered(own, wanted[subset]).items()}
        problem = None
        for order in permutations(wanted.values()):
            try:
                return _ordered(records, [item for own in order for item in own])
            except UserError as error:
                problem = problem or error
        raise problem or UserError("POPE has no subset.")

    def grade(self, item: Item, answer: str) -> Grade:
        """Count one answer; "yes" is the positive class."""
        said = read_official(answer) if self.parser == "official" else read_tolerant(answer)
        counts = {
            "questions": 1,
            "tp": int(said == "yes" and item.expected == "yes"),
            "fp": int(said == "yes" and item.expected == "no"),
            "tn": int(said == "no" and item.expected == "no"),
            "fn": int(said == "no" and item.expected == "yes"),
            "expected_yes": int(item.expected == "yes"),
            "unparsed": int(not said),
        }
        return Grade(counts, is_right=said == item.expected)

    @staticmethod
    def summarise(sums: Sums) -> dict[str, Floats]:
        """Accuracy, precision, recall, F1 and yes-ratio in percent: their average over subsets first, then each subset's."""
        subsets = {subset: _metrics(counts) for subset, counts in sums.items()}
        names = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed")
        average = {name: np.mean([metrics[name] for metrics in subsets.values()], axis=0) for name in names}
        return average | {f"{subset}/{name}": metrics[name] for subset, metrics in subsets.items() for name in names}

    @staticmethod
    def official(sums: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """What evaluate.py prints for each subset: counts and fractions with all their digits."""
        return {subset: _printed({name: int(count) for name, count in counts.items()}) for subset, counts in sums.items()}


def _check_version(folder: Folder, version: str, subset: str) -> None:
    """Refuse labels of another version than asked for: in a clone of POPE, both lie in the same folder."""
    file = f"coco_pope_{subset}.json"
    found = next((other for other in FOLDERS if HASHES[f"{other}/{subset}"] == folder.hashes[f"{version}/{file}"]), version)
    if found != version:
        raise UserError(
            f"{folder.find(f'{version}/{file}')} has the labels called '{found}', not '{version}'. Choose "
            f"pope(labels='{found}'), or get the others: `catpo data get pope --data {folder.path}`."
        )


def _subset(record: Record) -> str:
    """The subset that a row belongs to, by its field `category` or the name of its file; empty if neither says."""
    if record.row.get("category") in SUBSETS:
        return str(record.row["category"])
    file = re.split(r"[/\\]", record.place)[-1]
    named = [subset for subset in SUBSETS if subset in file]
    return named[0] if len(named) == 1 else ""


def _ordered(records: Sequence[Record], items: Sequence[Item]) -> dict[str, str]:
    return in_order(records, [(item.id, item.sample.truth["question"]) for item in items])


def read_official(answer: str) -> str:
    """`no` if the text before the first full stop has No, not or no as a word between single spaces; everything else is a yes.

    >>> read_official("No, there is not."), read_official("There isn't any"), read_official("NO"), read_official("")
    ('no', 'yes', 'yes', 'yes')
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def read_tolerant(answer: str) -> str:
    """`yes` or `no` if that is the first word, or the only one of the two in the answer; else nothing.

    >>> read_tolerant("NO!"), read_tolerant("There are no dogs"), read_tolerant("I cannot tell")
    ('no', 'no', '')
    """
    words = re.findall(r"[a-z]+", answer.lower())
    found = set(words[:1]) & {"yes", "no"} or set(words) & {"yes", "no"}
    return found.pop() if len(found) == 1 else ""


def _metrics(counts: Mapping[str, Floats]) -> dict[str, Floats]:
    said_yes = counts["tp"] + counts["fp"]
    precision, recall = ratio(counts["tp"], said_yes), ratio(counts["tp"], counts["expected_yes"])
    return {
        "accuracy": percent(counts["tp"] + counts["tn"], counts["questions"]),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * ratio(2 * precision * recall, precision + recall),
        "yes_ratio": percent(said_yes, counts["questions"]),
        "unparsed": percent(counts["unparsed"], counts["questions"]),
    }


def _printed(counts: Mapping[str, int]) -> dict[str, Any]:
    """One block of the program's output. Where it would divide by zero and end, None stands."""
    tp, fp, tn, fn = (counts[name] for name in ("tp", "fp", "tn", "fn"))
    precision = tp / (tp + fp) if tp + fp else None
    recall = tp / counts["expected_yes"] if counts["expected_yes"] else None
    f1 = 2 * precision * recall / (precision + recall) if precision and recall else None
    return {
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "Accuracy": (tp + tn) / counts["questions"],
        "Precision": precision,
        "Recall": recall,
        "F1 score": f1,
        "Yes ratio": (tp + fp) / counts["questions"],
    }
