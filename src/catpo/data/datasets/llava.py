"""LLaVA-style JSON: POVID, CSR, HA-DPO, SeVa, mDPO, VLFeedback (Silkie), BPO, LLaMA-Factory, ms-swift.

    llava(source='povid.json', images='coco/train2014')        llava(source='MMInstruction/VLFeedback')

The format is recognised by its fields:

| Fields | Format of |
|---|---|
| `conversations`, `rejected_conversations` | POVID, CSR |
| `conversations`, `chosen`, `rejected` | LLaMA-Factory (ShareGPT) |
| `messages`, `rejected_response` | ms-swift |
| `image_id`, `chosen`, `rejected` (lists) | HA-DPO, desc_data.json |
| `question` or `prompt`, `chosen`, `reject` or `rejected` | SeVa, mDPO, HA-DPO's pope_data.json |
| `prompt`, `completions` with ratings or scores | VLFeedback (Silkie), BPO: a pair for every two answers of unequal score |
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.core.types import Picture, PreferencePair
from catpo.data import datasets
from catpo.data.datasets import Row, make_pair, message_text
from catpo.data.datasets._table import Table
from catpo.files.records import decode, parse_json, read_bytes

QUESTION_AND_ANSWER = ("user", "assistant")
PICTURES = ("images", "image", "img_path", "image_path")
VISUAL_GENOME = ("{}.jpg", "VG_100K/{}.jpg", "VG_100K_2/{}.jpg")


class Dataset(datasets.RowDataset):
    """Pairs of a JSON file, a JSONL file, Parquet, or a hub data set.

    Args:
        source: the file, or a hub id.
        images: folder of the pictures; by default the file's own.
        prompt: question of rows that have none (HA-DPO's descriptions).
        seed: draws one of several chosen and rejected texts (HA-DPO has three of each).
        min_gap: two ranked answers make a pair if their scores differ by more than this.
        split: of a hub data set.
    """

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        images: str | None = None,
        prompt: str = "Describe this image in detail.",
        seed: int = 0,
        min_gap: float = 0.0,
        split: str = "train",
    ) -> None:
        if source is None:
            raise UserError("llava needs a place to read: llava(source='FILE', images='DIR').")
        self.name, self.path = str(source), Path(source)
        self.prompt, self.seed, self.min_gap = prompt, seed, min_gap
        self.is_json = self.path.suffix in (".json", ".jsonl")
        self.table = None if self.is_json else Table.open(source, split=split, streaming=False, images=images, plugin="llava")
        self.root = Path(images or self.path.parent).resolve()

    def rows(self) -> Iterator[Row]:
        return self.table.rows() if self.table is not None else _json_rows(self.path)

    def pairs_of(self, row: Row) -> Iterable[PreferencePair]:
        fields = row.values
        if "rejected_conversations" in fields:
            question, chosen = row.turns("conversations", fields.get("conversations"), QUESTION_AND_ANSWER)
            _, rejected = row.turns("rejected_conversations", fields["rejected_conversations"], QUESTION_AND_ANSWER)
        elif "rejected_response" in fields:
            question, chosen = row.turns("messages", fields.get("messages"), QUESTION_AND_ANSWER)
            rejected = row.text("rejected_response")
        elif "completions" in fields:
            return self._ranked(row)
        elif "conversations" in fields:
            [question] = row.turns("conversations", fields["conversations"], ("user",))
            chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
        else:
            question, chosen, rejected = self._plain(row)
        return [make_pair(self._pictures(row), _without_placeholder(question), chosen, rejected, _meta(row))]

    def _plain(self, row: Row) -> tuple[str, str, str]:
        """Question and answers as texts; from lists, one each is drawn by the seed and the picture."""
        rng = random.Random(f"{self.seed}/{row.values.get('image_id', row.where)}")
        answers = []
        for field in ("chosen", "reject" if "reject" in row.values else "rejected"):
            value = row.values.get(field)
            answers.append(row.checked(field, rng.choice(value)) if isinstance(value, list) and value else row.text(field))
        question = "question" if "question" in row.values else "prompt"
        return row.text(question, self.prompt), answers[0], answers[1]

    def _ranked(self, row: Row) -> list[PreferencePair]:
        pictures, question = self._pictures(row), _without_placeholder(row.text("prompt"))
        answers = _scored(row)
        best = max((score for score, _ in answers), default=0.0)
        pairs = []
        for (first, one), (second, other) in combinations(answers, 2):
            if abs(first - second) > self.min_gap and one.strip() != other.strip():
                better, worse = (one, other) if first > second else (other, one)
                meta = {**_meta(row), "gap": abs(first - second), "is_best": float(max(first, second) == best)}
                pairs.append(make_pair(pictures, question, better, worse, meta))
        return pairs

    def _pictures(self, row: Row) -> tuple[Picture, ...]:
        field = next((name for name in PICTURES if row.values.get(name) is not None), "image")
        if "image_id" in row.values and not any(name in row.values for name in PICTURES):
            field, names = "image_id", self._visual_genome_files(row.values["image_id"])
        elif self.table is not None:
            return self.table.pictures(row, field)
        else:
            value = row.values.get(field)
            names = value if isinstance(value, list) else [value]
        if not names:
            raise row.error(field, "is an empty list. Give at least one picture")
        return tuple(row.picture(field, name, self.root) for name in names)

    def _visual_genome_files(self, number: Any) -> list[Any]:
        """The picture's name in whichever of Visual Genome's folders has it."""
        names = [pattern.format(number) for pattern in VISUAL_GENOME]
        existing = [name for name in names if isinstance(number, int | str) and (self.root / name).is_file()]
        return (existing or names)[:1]


def _json_rows(path: Path) -> Iterator[Row]:
    """Objects of a JSON list, of an object by picture number (HA-DPO), or of lines."""
    content = decode(read_bytes(path), path)
    if path.suffix == ".jsonl":
        values: Any = [parse_json(line, str(path)) for line in content.split("\n") if line.strip()]
    else:
        values = parse_json(content, str(path))
    if isinstance(values, dict):
        values = [{"image_id": number, **value} if isinstance(value, dict) else value for number, value in values.items()]
    if not isinstance(values, list):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, not a list of rows. Give it one: [{{...}}, ...].")
    for number, value in enumerate(values):
        yield Row(f"{path}, row {number}", value if isinstance(value, dict) else {})


def _answer(row: Row, field: str) -> str:
    """An answer that is a text or one message."""
    value = row.values.get(field)
    return row.checked(field, message_text(value) if isinstance(value, Mapping) else value)


def _scored(row: Row) -> list[tuple[float, str]]:
    """Score and text of each answer that has a score."""
    completions = row.values["completions"]
    if isinstance(completions, Mapping):  # the `datasets` library turns a list of objects into an object of lists
        columns = list(completions.values())
        if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            raise row.error("completions", "must be a list of answers")
        completions = [dict(zip(completions, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if not isinstance(completions, list) or not all(isinstance(answer, Mapping) for answer in completions):
        raise row.error("completions", "must be a list of answers")
    scored = []
    for answer in completions:
        score, text = _score(row, answer), row.checked("completions.response", answer.get("response"))
        if score is not None:
            scored.append((score, text))
    return scored


def _score(row: Row, answer: Mapping[str, Any]) -> float | None:
    """An answer's `score`, or the mean of its ratings (Silkie), if it has any."""
    score, annotations = answer.get("score"), answer.get("annotations") or {}
    if isinstance(score, int | float):
        return float(score)
    if not isinstance(annotations, Mapping):
        raise row.error("completions.annotations", "must be an object: {...}")
    ratings = [str(aspect.get("Rating")) for aspect in annotations.values() if isinstance(aspect, Mapping)]
    numbers = [float(rating) for rating in ratings if rating.replace(".", "", 1).isdigit()]
    return sum(numbers) / len(numbers) if numbers else None


def _without_placeholder(question: str) -> str:
    """The model's own template places the picture."""
    return question.replace("<image>", "").strip()


def _meta(row: Row) -> dict[str, Any]:
    return {name: row.values[name] for name in ("id", "image_id") if isinstance(row.values.get(name), str | int)}
