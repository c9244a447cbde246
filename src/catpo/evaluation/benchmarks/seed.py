"""SEED-Bench, image part: 14,232 questions with four options each, about nine kinds of understanding.

    seed    seed(protocol='likelihood')

`letter` is what papers print since LLaVA: the model is to answer with the option's letter. `likelihood` is the official
ranking: the option whose text has the lowest mean loss per token. Answers made elsewhere can be graded against the letters
alone; asking a model takes SEED-Bench.json and the pictures.

Source: github.com/AILab-CVC/SEED-Bench eval.py at 991e849b; LLaVA scripts/convert_seed_for_submission.py at c121f043.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from catpo.core.errors import UserError, did_you_mean
from catpo.core.types import Sample
from catpo.evaluation.benchmarks import QUESTION_TOKENS, Floats, FolderBenchmark, Grade, Item, Sums, percent
from catpo.evaluation.benchmarks._answers import by_id, id_of
from catpo.evaluation.benchmarks._files import Folder, Pictures, Record, Source

LETTERS = ("A", "B", "C", "D")
SUFFIX = "Answer with the option's letter from the given choices directly."
QUESTIONS, LETTERS_ONLY = "SEED-Bench.json", "GPT-4V_seed1.json"
COUNTS = ("questions", "right", "unparsed")
METRICS = {"accuracy": "right", "unparsed": "unparsed"}
"""Metric -> the count it is a share of."""
UNKNOWN_TYPE = "image"
"""The group of questions whose type is not known, with the letters alone."""


class Benchmark(FolderBenchmark):
    """Questions with four options about 14,232 pictures.

    Args:
        protocol: `letter` or `likelihood`.
        parser: `exact` (the answer must be the letter, as in LLaVA's script) or `first` (its first character, as lmms-eval).
    """

    sources = (
        Source(QUESTIONS, (f"seed_bench/{QUESTIONS}", QUESTIONS),
               "https://huggingface.co/datasets/AILab-CVC/SEED-Bench/resolve/main/SEED-Bench.json",
               is_needed=False, note="questions, options and types; needed to ask a model"),
        Source(LETTERS_ONLY, (f"seed_bench/{LETTERS_ONLY}", "evaluate_result/SEED-Bench-1/GPT-4V.json", LETTERS_ONLY),
               "https://raw.githubusercontent.com/AILab-CVC/SEED-Bench/main/evaluate_result/SEED-Bench-1/GPT-4V.json",
               "7da556c366019b8056fdb634100a918081ca3e0fb9ffc918defaa71cc16eeb25",
               is_needed=False, note="has the right letters; enough to grade answers made elsewhere"),
    )  # fmt: skip
    pictures = Pictures(
        ("seed_bench/SEED-Bench-image", "SEED-Bench-image", "seed_bench/images"),
        14_232,
        "https://huggingface.co/datasets/AILab-CVC/SEED-Bench/resolve/main/SEED-Bench-image.zip",
        "named as data_id in SEED-Bench.json says; several questions may share one",
    )

    def __init__(self, *, protocol: str = "letter", parser: str = "exact") -> None:
        for name, value, known in (
            ("protocol", protocol, ("letter", "likelihood")),
            ("parser", parser, ("exact", "first")),
        ):
            if value not in known:
                raise UserError(f"seed({name}={value!r}) is not known. {did_you_mean(value, known)}")
        self.protocol, self.parser = protocol, parser

    def open(self, folder: Folder) -> list[Item]:
        """Image questions in the order of the file."""
        if folder.find(QUESTIONS) is not None:
            content = folder.json(QUESTIONS)
            types = {number: _slug(name) for name, number in content.get("question_type", {}).items()}
            rows = [row for row in content["questions"] if row["data_type"] == "image"]
            return _numbered([self._item(row, types, folder) for row in rows])
        if self.is_answered_here or folder.find(LETTERS_ONLY) is None:
            folder.read(QUESTIONS)  # says where to get it
        answers = {str(row["question_id"]): row for row in folder.rows(LETTERS_ONLY)}  # eight stand there twice
        return [_graded_only(row) for name, row in answers.items() if not _is_video(name)]

    def _item(self, row: Mapping[str, Any], types: Mapping[int, str], folder: Folder) -> Item:
        name, options = str(row["question_id"]), tuple(str(row[f"choice_{letter.lower()}"]) for letter in LETTERS)
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
        is_ranked = self.protocol == "likelihood"
        prompt = row["question"] if is_ranked else f"{row['question']}\n{listed}\n{SUFFIX}"
        sample = Sample(name, (folder.picture(str(row["data_id"])),), prompt, truth={"options": options})
        group = types.get(row["question_type_id"], str(row["question_type_id"]))
        ranked = dict(zip(LETTERS, options, strict=True)) if is_ranked else None
        return Item(name, sample, group, str(row["data_id"]), row["answer"], QUESTION_TOKENS, ranked)

    def provenance(self) -> dict[str, Any]:
        """Protocol and parser."""
        return {"protocol": self.protocol, "parser": self.parser}

    def match(self, records: Sequence[Record], items: Sequence[Item]) -> dict[str, str]:
        """By question; rows about videos are left out. A row may have four `losses` instead of a letter."""
        about_images = [record for record in records if not _is_video(id_of(record, ("question_id", "q_id", "id")))]
        rows = [Record(record.place, _ranked(record)) for record in about_images]
        given = by_id(
            rows,
            [_question(item.id) for item in items],
            id_fields=("question_id", "q_id", "id"),
            answer_fields=("prediction", "text", "answer", "response"),
            repeats=True,
        )
        return {item.id: given[_question(item.id)] for item in items if _question(item.id) in given}

    def grade(self, item: Item, answer: str) -> Grade:
        """Whether the answer is the right letter."""
        said = answer if self.parser == "exact" else answer.strip()[:1].upper()
        counts = {"questions": 1, "right": int(said == item.expected), "unparsed": int(said not in LETTERS)}
        return Grade(counts, is_right=said == item.expected)

    @staticmethod
    def summarise(sums: Sums) -> dict[str, Floats]:
        """Accuracy over all image questions, then of each type where types are known."""
        everything = {name: np.sum([counts[name] for counts in sums.values()], axis=0) for name in COUNTS}
        metrics = {name: percent(everything[count], everything["questions"]) for name, count in METRICS.items()}
        kinds = {kind: counts for kind, counts in sums.items() if kind != UNKNOWN_TYPE}
        return metrics | {f"{kind}/accuracy": percent(counts["right"], counts["questions"]) for kind, counts in kinds.items()}

    @staticmethod
    def official(sums: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Per type and in all, as LLaVA's script prints it."""
        right, questions = (sum(counts[name] for counts in sums.values()) for name in ("right", "questions"))
        kinds = {kind: f"{counts['right'] / counts['questions'] * 100:.2f}%" for kind, counts in sums.items()}
        kinds.pop(UNKNOWN_TYPE, None)
        return {**kinds, "image accuracy": f"{right / questions * 100:.2f}%", "right": int(right), "questions": int(questions)}


def _numbered(items: Sequence[Item]) -> list[Item]:
    """The items with `#2` behind an id that was there before: SEED-Bench.json asks question 49914 twice."""
    seen: dict[str, int] = {}
    numbered = []
    for item in items:
        seen[item.id] = seen.get(item.id, 0) + 1
        numbered.append(item if seen[item.id] == 1 else replace(item, id=f"{item.id}#{seen[item.id]}"))
    return numbered


def _question(item: str) -> str:
    return item.split("#")[0]


def _graded_only(row: Mapping[str, Any]) -> Item:
    name = str(row["question_id"])
    return Item(name, Sample(name, (), ""), UNKNOWN_TYPE, name, row["gt_answer"], QUESTION_TOKENS)


def _is_video(name: str) -> bool:
    return not name.isdigit()


def _ranked(record: Record) -> dict[str, Any]:
    """The row, with the letter of its lowest loss."""
    losses = record.row.get("losses")
    if losses is None:
        return record.row
    if not isinstance(losses, list) or len(losses) != len(LETTERS) or not all(isinstance(x, int | float) for x in losses):
        raise UserError(f"{record.place}: 'losses' must be four numbers, one per option.")
    return {**record.row, "prediction": LETTERS[losses.index(min(losses))]}


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")
