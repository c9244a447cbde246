"""TRL's vision preference format: `images` or `image`, `prompt`, `chosen`, `rejected`, plain or conversational.

    trl(source='trl-lib/rlaif-v')        trl(source='pairs.parquet')        trl(source='rows.jsonl', images='photos')

Columns: TRL's documentation, "Dataset formats". A prompt may also stand at the head of both conversations (implicit prompt).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from catpo.core.types import PreferencePair
from catpo.data import datasets
from catpo.data.datasets import Row, make_pair
from catpo.data.datasets._table import Table


class Dataset(datasets.RowDataset):
    """One pair per row.

    Args:
        source: Parquet or JSON file, folder of them, folder made by `save_to_disk`, or hub id.
        split: which split of a hub or saved data set.
        streaming: read a hub data set row by row instead of downloading it first.
        images: folder of the pictures that JSON rows name; the file's own folder if left out.
    """

    def __init__(
        self, source: str | Path | None = None, *, split: str = "train", streaming: bool = False, images: str | None = None
    ) -> None:
        self.table = Table.open(source, split=split, streaming=streaming, images=images, plugin="trl")
        self.name = str(source)

    def rows(self) -> Iterator[Row]:
        return self.table.rows()

    def pairs_of(self, row: Row) -> Iterable[PreferencePair]:
        pictures = self.table.pictures(row, "images" if row.values.get("images") is not None else "image")
        prompt, chosen = self._turns(row, "chosen")
        other, rejected = self._turns(row, "rejected")
        if prompt != other:
            raise row.error("rejected", "answers another prompt than 'chosen'")
        return [make_pair(pictures, prompt, chosen, rejected)]

    def _turns(self, row: Row, field: str) -> tuple[str, str]:
        """Prompt and answer; a conversation has one of each, and perhaps a system message, which the model's template knows."""
        answer = row.values.get(field)
        if isinstance(answer, str) or answer is None:
            return self._prompt(row), row.text(field)
        before = row.values.get("prompt")
        messages = [*(before if isinstance(before, list) else []), *answer] if isinstance(answer, list) else []
        if isinstance(before, str):
            messages = [{"role": "user", "content": before}, *messages]
        said = [(message.get("role"), _words(message.get("content"))) for message in messages if isinstance(message, dict)]
        turns = [(role, words) for role, words in said if role != "system"]
        if [role for role, _ in turns] != ["user", "assistant"]:
            raise row.error(field, f"must be one question with one answer, not the turns {[role for role, _ in turns]}")
        return row.checked("prompt", turns[0][1]), row.checked(field, turns[1][1])

    @staticmethod
    def _prompt(row: Row) -> str:
        prompt = row.values.get("prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
            return row.checked("prompt", _words(prompt[-1].get("content")))
        return row.text("prompt")


def _words(content: Any) -> Any:
    """The words of a message; picture parts are placed by the model's own template."""
    if not isinstance(content, list):
        return content
    return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
