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
from contextlib import suppress
from itertools import permutations
from shlex import quote
from typing import Any

import numpy as np

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.evaluation.benchmarks import (
    QUESTION_FIELDS,
    QUESTION_TOKENS,
    Floats,
    Folder,
    FolderBenchmark,
    Grade,
    Item,
    Pictures,
    Record,
    Source,
    Sums,
    by_id,
    id_of,
    in_order,
    only_yes_no,
    percent,
    ratio,
)

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
NUMBER_FIELDS = ("question_id", "id")
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
        note=f"for labels '{version}' and 'mixed'",
    )


class Benchmark(FolderBenchmark):
    """Yes/no questions about 500 COCO photographs.

    Args:
        subset: `random`, `popular` or `adversarial`; all three and their average if empty.
        labels: `old`, `head` or `mixed`.
        parser: `official` (what does not say no, not or No in its first sentence is a yes) or `tolerant` (the first word, or
            the only yes or no; else it is wrong, as the opposite of the right answer would be, and counted as unparsed).
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
        if subset:
            check_word("pope", "subset", subset, SUBSETS)
        check_word("pope", "labels", labels, tuple(VERSIONS))
        check_word("pope", "parser", parser, ("official", "tolerant"))
        check_word("pope", "prompt", prompt, ("short", "plain"))
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
            picture, tokens = folder.picture(row["image"]), QUESTION_TOKENS if suffix else SENTENCE_TOKENS
            sample = Sample(name, (picture,), row["text"] + suffix, truth={"question": row["text"]})
            items.append(Item(name, sample, subset, row["image"], row["label"], tokens))
        return items

    def provenance(self) -> dict[str, Any]:
        """Which labels, and how answers are read."""
        return {"labels": self.labels, "parser": self.parser}

    def match(self, records: Sequence[Record], items: Sequence[Item]) -> dict[str, str]:
        """By POPE's own question_id, else by order. A row or its file's name says which subset it is of.

        Rows that do not say so are those of all subsets in the first order that fits the questions they repeat.
        """
        asked = {subset: [item for item in items if item.group == subset] for subset in self.subsets}
        rows: dict[str, list[Record]] = {subset: [] for subset in self.subsets}
        for record in records:
            rows.setdefault(_subset(record), []).append(record)
        if len(asked) == 1 and rows.get(""):
            rows[self.subsets[0]] += rows.pop("")
        if set(rows) == set(self.subsets):
            answers: dict[str, str] = {}
            for subset in self.subsets:
                if rows[subset]:
                    answers |= _matched(rows[subset], asked[subset])
            return answers
        unknown = next((record for record in records if not any(field in record.row for field in QUESTION_FIELDS)), None)
        if unknown is not None:
            raise UserError(
                f"{unknown.place} does not say which subset it is of. Give one file per subset, with random, popular or "
                "adversarial in its name, or a field 'category', or the 'question' in every row."
            )
        problems = []
        for order in permutations(asked.values()):
            try:
                return in_order(records, [item for subset in order for item in subset])
            except UserError as error:
                problems.append(error)
        raise problems[0]

    def grade(self, item: Item, answer: str) -> Grade:
        """Count one answer; "yes" is the positive class."""
        said = read_official(answer) if self.parser == "official" else read_tolerant(answer)
        cases = {"tp": ("yes", "yes"), "fp": ("yes", "no"), "tn": ("no", "no"), "fn": ("no", "yes")}
        counts = {"questions": 1, **{name: int(case == (said, item.expected)) for name, case in cases.items()}}
        counts |= {"expected_yes": int(item.expected == "yes"), "unparsed": int(not said)}
        return Grade(counts, is_right=said == item.expected)

    @staticmethod
    def summarise(sums: Sums) -> dict[str, Floats]:
        """Accuracy, precision, recall, F1 and yes-ratio in percent: their average over subsets first, then each subset's."""
        subsets = {subset: _metrics(counts) for subset, counts in sums.items()}
        figures: dict[str, Floats] = {}
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed"):
            figures[name] = np.mean([metrics[name] for metrics in subsets.values()], axis=0)
        for subset, metrics in subsets.items():
            figures |= {f"{subset}/{name}": values for name, values in metrics.items()}
        return figures

    @staticmethod
    def official(sums: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """What evaluate.py prints for each subset: counts and fractions with all their digits."""
        return {subset: _printed({name: int(count) for name, count in counts.items()}) for subset, counts in sums.items()}


def _check_version(folder: Folder, version: str, subset: str) -> None:
    """Refuse labels of another version than asked for: in a clone of POPE, both lie in the same folder."""
    name = f"{version}/coco_pope_{subset}.json"
    for other in FOLDERS:
        if other != version and HASHES[f"{other}/{subset}"] == folder.hashes[name]:
            raise UserError(
                f"{folder.find(name)} has the labels called '{other}', not '{version}'. Choose "
                f"pope(labels='{other}'), or get the others: `catpo data get pope --data {quote(str(folder.path))}`."
            )


def _matched(records: Sequence[Record], items: Sequence[Item]) -> dict[str, str]:
    """Id -> answer in one subset.

    Other tools number the questions in their own way. Such numbers say nothing, but where they do not ascend the rows are not
    in POPE's order either, unless all repeat their questions in that order.
    """
    own = {item.id.partition("/")[2]: item.id for item in items} | {item.id: item.id for item in items}
    numbers = [id_of(record, NUMBER_FIELDS) for record in records if any(field in record.row for field in NUMBER_FIELDS)]
    if len(numbers) == len(records) and own.keys() >= set(numbers):
        try:
            return by_id(records, own.values(), id_fields=NUMBER_FIELDS, as_id=own.__getitem__, items=items)
        except UserError:
            with suppress(UserError):
                return in_order(records, items)
            raise
    repeats = all(any(field in record.row for field in QUESTION_FIELDS) for record in records)
    for record, number, before in zip(records[1:], numbers[1:], numbers, strict=False):
        if not repeats and not _ascends(before, number):
            raise UserError(
                f"{record.place}: the id {number} comes after {before}, and not all ids are POPE's own, so neither ids nor "
                "order say which question is answered. Sort the rows as the questions, or give each its question_id."
            )
    return in_order(records, items)


def _ascends(before: str, number: str) -> bool:
    return not (before.isdecimal() and number.isdecimal()) or int(before) < int(number)


def _subset(record: Record) -> str:
    """The subset that a row belongs to, by its field `category` or the name of its file; empty if neither says."""
    if record.row.get("category") in SUBSETS:
        return str(record.row["category"])
    file = re.split(r"[/\\]", record.place)[-1]
    named = [subset for subset in SUBSETS if subset in file]
    return named[0] if len(named) == 1 else ""


def read_official(answer: str) -> str:
    """`no` if the text before the first full stop has No, not or no as a word between single spaces; else `yes`.

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
    first = re.findall(r"[a-z]+", answer.lower())[:1]
    return first[0] if first in (["yes"], ["no"]) else only_yes_no(answer)


def _metrics(counts: Mapping[str, Floats]) -> dict[str, Floats]:
    """What is neither yes nor no is wrong everywhere: a wrong yes where no is right, a missed yes where yes is."""
    said_yes, wrong_yes = counts["tp"] + counts["fp"], counts["questions"] - counts["expected_yes"] - counts["tn"]
    precision, recall = ratio(counts["tp"], counts["tp"] + wrong_yes), ratio(counts["tp"], counts["expected_yes"])
    return {
        "accuracy": percent(counts["tp"] + counts["tn"], counts["questions"]),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * ratio(2 * precision * recall, precision + recall),
        "yes_ratio": percent(said_yes, counts["questions"]),
        "unparsed": percent(counts["unparsed"], counts["questions"]),
    }


def _printed(counts: Mapping[str, int]) -> dict[str, Any]:
    """One block of the program's output; None where it would end by dividing by zero."""
    tp, tn, yes, questions = counts["tp"], counts["tn"], counts["expected_yes"], counts["questions"]
    fp = questions - yes - tn
    precision = tp / (tp + fp) if tp + fp else None
    recall = tp / yes if yes else None
    f1 = 2 * precision * recall / (precision + recall) if precision and recall else None
    return {
        "TP": tp, "FP": fp, "TN": tn, "FN": yes - tp,
        "Accuracy": (tp + tn) / questions,
        "Precision": precision,
        "Recall": recall,
        "F1 score": f1,
        "Yes ratio": (tp + counts["fp"]) / questions,
    }  # fmt: skip
