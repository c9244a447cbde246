"""SEED-Bench, image part: 14,232 questions with four options each, about nine kinds of understanding.

    seed    seed(protocol='likelihood')

`letter` is what papers print since LLaVA: the model answers with the option's letter. `likelihood` is the official
ranking: the option whose text has the lowest mean loss per token. Answers made elsewhere can be graded against the letters
alone; asking a model takes SEED-Bench.json and the pictures.

Source: github.com/AILab-CVC/SEED-Bench eval.py at 991e849b; LLaVA scripts/convert_seed_for_submission.py at c121f043.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.evaluation.benchmarks import (
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
    percent,
    total,
)

LETTERS = ("A", "B", "C", "D")
SUFFIX = "Answer with the option's letter from the given choices directly."
QUESTIONS, LETTERS_ONLY = "SEED-Bench.json", "GPT-4V_seed1.json"
ID_FIELDS = ("question_id", "q_id", "id")
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
        check_word("seed", "protocol", protocol, ("letter", "likelihood"))
        check_word("seed", "parser", parser, ("exact", "first"))
        self.protocol, self.parser = protocol, parser

    def open(self, folder: Folder) -> list[Item]:
        """Image questions in the order of the file."""
        if folder.find(QUESTIONS) is not None:
            content = folder.json(QUESTIONS)
            types = {number: name.lower().replace(" ", "_") for name, number in content.get("question_type", {}).items()}
            rows = [row for row in content["questions"] if row["data_type"] == "image"]
            return _numbered([self._item(row, types, folder) for row in rows])
        if self.is_answered_here or folder.find(LETTERS_ONLY) is None:
            folder.read(QUESTIONS)  # says where to get it
        answers = {str(row["question_id"]): row["gt_answer"] for row in folder.rows(LETTERS_ONLY)}  # eight are there twice
        items = []
        for name, answer in answers.items():
            if not _is_video(name):
                items.append(Item(name, Sample(name, (), ""), UNKNOWN_TYPE, name, answer, QUESTION_TOKENS))
        return items

    def _item(self, row: Mapping[str, Any], types: Mapping[int, str], folder: Folder) -> Item:
        name, picture = str(row["question_id"]), str(row["data_id"])
        options = {letter: str(row[f"choice_{letter.lower()}"]) for letter in LETTERS}
        is_ranked = self.protocol == "likelihood"
        listed = [f"{letter}. {option}" for letter, option in options.items()]
        prompt = row["question"] if is_ranked else "\n".join([row["question"], *listed, SUFFIX])
        truth = {"question": row["question"], "options": tuple(options.values())}
        sample = Sample(name, (folder.picture(picture),), prompt, truth=truth)
        group = types.get(row["question_type_id"], str(row["question_type_id"]))
        return Item(name, sample, group, picture, row["answer"], QUESTION_TOKENS, options if is_ranked else None)

    def provenance(self) -> dict[str, Any]:
        """Protocol and parser."""
        return {"protocol": self.protocol, "parser": self.parser}

    def match(self, records: Sequence[Record], items: Sequence[Item]) -> dict[str, str]:
        """By question; rows about videos are left out. A row may have four `losses` instead of a letter."""
        rows = [_with_letter(record) for record in records if not _is_video(id_of(record, ID_FIELDS))]
        questions = {item.id: item.id.split("#")[0] for item in items}
        answer_fields = ("prediction", "text", "answer", "response")
        given = by_id(rows, questions.values(), id_fields=ID_FIELDS, answer_fields=answer_fields, repeats=True, items=items)
        return {item: given[question] for item, question in questions.items() if question in given}

    def grade(self, item: Item, answer: str) -> Grade:
        """Whether the answer is the right letter."""
        said = answer if self.parser == "exact" else answer.strip()[:1].upper()
        counts = {"questions": 1, "right": int(said == item.expected), "unparsed": int(said not in LETTERS)}
        return Grade(counts, is_right=said == item.expected)

    @staticmethod
    def summarise(sums: Sums) -> dict[str, Floats]:
        """Accuracy over all image questions, then of each type where types are known."""
        overall = total(sums)
        metrics = {
            "accuracy": percent(overall["right"], overall["questions"]),
            "unparsed": percent(overall["unparsed"], overall["questions"]),
        }
        for kind, counts in sums.items():
            if kind != UNKNOWN_TYPE:
                metrics[f"{kind}/accuracy"] = percent(counts["right"], counts["questions"])
        return metrics

    @staticmethod
    def official(sums: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Per type and in all, as LLaVA's script prints it."""
        printed: dict[str, Any] = {}
        overall = total(sums)
        for kind, counts in {**sums, "image accuracy": overall}.items():
            if kind != UNKNOWN_TYPE:
                printed[kind] = f"{counts['right'] / counts['questions'] * 100:.2f}%"
        return printed | {"right": int(overall["right"]), "questions": int(overall["questions"])}


def _numbered(items: Sequence[Item]) -> list[Item]:
    """The items with `#2` appended to an id that was there before: SEED-Bench.json asks question 49914 twice."""
    seen: Counter[str] = Counter()
    numbered = []
    for item in items:
        seen[item.id] += 1
        numbered.append(item if seen[item.id] == 1 else replace(item, id=f"{item.id}#{seen[item.id]}"))
    return numbered


def _is_video(name: str) -> bool:
    return not name.isdigit()


def _with_letter(record: Record) -> Record:
    """The record, with the letter of its lowest loss if it has losses."""
    losses = record.row.get("losses")
    if losses is None:
        return record
    if not isinstance(losses, list) or len(losses) != len(LETTERS) or not all(isinstance(x, int | float) for x in losses):
        raise UserError(f"{record.place}: 'losses' must be four numbers, one per option.")
    return replace(record, row={**record.row, "prediction": LETTERS[losses.index(min(losses))]})
