"""LLaVA-style JSON: POVID, CSR, HA-DPO, SeVa, mDPO, VLFeedback (Silkie), BPO, LLaMA-Factory, ms-swift.

    llava(source='povid.json', images='coco/train2014')        llava(source='MMInstruction/VLFeedback')

The formats are told apart by their fields:

| Fields | Of |
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
from catpo.data.datasets import Row, make_pair
from catpo.data.datasets._table import Table
from catpo.files import strict_json

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PICTURES = ("images", "image", "img_path", "image_path")
VISUAL_GENOME = ("{}.jpg", "VG_100K/{}.jpg", "VG_100K_2/{}.jpg")


class Dataset(datasets.RowDataset):
    """Pairs of a JSON file, a JSONL file, Parquet, or a hub data set.

    Args:
        source: the file, or a hub id.
        images: folder of the pictures; the file's own folder if left out.
        prompt: question of rows that have none (HA-DPO's descriptions).
        seed: which of several chosen and rejected texts are taken (HA-DPO has three of each).
        min_gap: least difference of two ranked answers' scores that makes a pair.
        split: which split of a hub data set.
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
            question, chosen = _turn(row, "conversations", fields.get("conversations"))
            rejected = _turn(row, "rejected_conversations", fields["rejected_conversations"])[1]
        elif "rejected_response" in fields:
            question, chosen = _turn(row, "messages", fields.get("messages"))
            rejected = row.text("rejected_response")
        elif "completions" in fields:
            return self._ranked(row)
        elif "conversations" in fields:
            question = _question(row, fields["conversations"])
            chosen, rejected = (_said(row, side) for side in ("chosen", "rejected"))
        else:
            question, chosen, rejected = self._plain(row)
        return [make_pair(self._pictures(row), _without_placeholder(question), chosen, rejected, _meta(row))]

    def _plain(self, row: Row) -> tuple[str, str, str]:
        """Question and answers as texts; of lists one each, drawn by the seed and the picture."""
        rejected = "reject" if "reject" in row.values else "rejected"
        rng = random.Random(f"{self.seed}/{row.values.get('image_id', row.where)}")
        answers = []
        for field in ("chosen", rejected):
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
        if "image_id" in row.values and not any(field in row.values for field in PICTURES):
            number = row.values["image_id"]
            names = [pattern.format(number) for pattern in VISUAL_GENOME]
            found = next((name for name in names if isinstance(number, int | str) and (self.root / name).is_file()), names[0])
            return (row.picture("image_id", found, self.root),)
        field = next((name for name in PICTURES if row.values.get(name) is not None), "image")
        if self.table is not None:
            return self.table.pictures(row, field)
        value = row.values.get(field)
        if value == []:
            raise row.error(field, "is an empty list. Give at least one picture")
        return tuple(row.picture(field, name, self.root) for name in (value if isinstance(value, list) else [value]))


def _json_rows(path: Path) -> Iterator[Row]:
    """Objects of a JSON list, of an object by picture number (HA-DPO), or of lines."""
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            values: Any = [strict_json.loads(line) for line in content.split("\n") if line.strip()]
        else:
            values = strict_json.loads(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Mend it, or write it again.") from error
    if isinstance(values, dict):
        values = [{"image_id": number, **value} if isinstance(value, dict) else value for number, value in values.items()]
    if not isinstance(values, list):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, not a list of rows. Give it one: [{{...}}, ...].")
    for number, value in enumerate(values):
        yield Row(f"{path}, row {number}", value if isinstance(value, dict) else {})


def _turn(row: Row, field: str, messages: Any) -> tuple[str, str]:
    """The one question and the one answer of a conversation."""
    turns = [(role, words) for role, words in _messages(row, field, messages) if role != "system"]
    if [role for role, _ in turns] != ["user", "assistant"]:
        raise row.error(field, f"must be one question with one answer, not the turns {[role for role, _ in turns]}")
    return row.checked(field, turns[0][1]), row.checked(field, turns[1][1])


def _question(row: Row, messages: Any) -> str:
    turns = [(role, words) for role, words in _messages(row, "conversations", messages) if role != "system"]
    if [role for role, _ in turns] != ["user"]:
        raise row.error("conversations", f"must be one question, not the turns {[role for role, _ in turns]}")
    return row.checked("conversations", turns[0][1])


def _messages(row: Row, field: str, messages: Any) -> list[tuple[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(each, Mapping) for each in messages):
        raise row.error(field, "must be a list of messages")
    return [
        (ROLES.get(str(each.get("from", each.get("role"))), "unknown"), each.get("value", each.get("content")))
        for each in messages
    ]


def _said(row: Row, field: str) -> str:
    """An answer that is a text or one message."""
    value = row.values.get(field)
    return row.checked(field, value.get("value", value.get("content")) if isinstance(value, Mapping) else value)


def _scored(row: Row) -> list[tuple[float, str]]:
    """Score and text of each answer: its `score`, or the mean of its ratings (Silkie); unrated answers are left out."""
    completions = row.values["completions"]
    if isinstance(completions, Mapping):  # as the `datasets` library turns a list of objects: an object of lists
        columns = list(completions.values())
        if not all(isinstance(each, list) and len(each) == len(columns[0]) for each in columns):
            raise row.error("completions", "must be a list of answers")
        completions = [dict(zip(completions, values, strict=True)) for values in zip(*completions.values(), strict=True)]
    if not isinstance(completions, list) or not all(isinstance(each, Mapping) for each in completions):
        raise row.error("completions", "must be a list of answers")
    scores = [(_score(row, each), row.checked("completions.response", each.get("response"))) for each in completions]
    return [(score, text) for score, text in scores if score is not None]


def _score(row: Row, answer: Mapping[str, Any]) -> float | None:
    score = answer.get("score")
    if isinstance(score, int | float):
        return float(score)
    if not isinstance(annotations := answer.get("annotations") or {}, Mapping):
        raise row.error("completions.annotations", "must be an object: {...}")
    ratings = [each.get("Rating") for each in annotations.values() if isinstance(each, Mapping)]
    numbers = [float(str(rating)) for rating in ratings if str(rating).replace(".", "", 1).isdigit()]
    return sum(numbers) / len(numbers) if numbers else None


def _without_placeholder(question: str) -> str:
    """The model's own template places the picture."""
    return question.replace("<image>", "").strip()


def _meta(row: Row) -> dict[str, Any]:
    return {name: row.values[name] for name in ("id", "image_id") if isinstance(row.values.get(name), str | int)}
