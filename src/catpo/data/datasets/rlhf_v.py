"""RLHF-V and RLAIF-V: Parquet with the picture's bytes, question, chosen and rejected answer.

    rlhf_v(source='openbmb/RLHF-V-Dataset')        rlhf_v(source='RLAIF-V-Dataset/')        rlhf_v(source='pairs.parquet')

Columns (dataset cards of openbmb/RLHF-V-Dataset and openbmb/RLAIF-V-Dataset): `image`, and either `text`, a JSON object with
question, chosen and rejected, or these three as columns. The other columns are kept in a pair's `meta`. Both are CC BY-NC 4.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from catpo.core.types import PreferencePair
from catpo.data import datasets
from catpo.data.datasets import Row, make_pair
from catpo.data.datasets._table import NUMBER, Table
from catpo.files import strict_json


class Dataset(datasets.RowDataset):
    """One pair per row.

    Args:
        source: Parquet file, folder of them, or hub id.
        split: which split of a hub data set.
        streaming: read a hub data set row by row instead of downloading it first.
        images: folder of the pictures, for rows that name them in `image_path` instead of holding them.
    """

    def __init__(
        self, source: str | Path | None = None, *, split: str = "train", streaming: bool = False, images: str | None = None
    ) -> None:
        self.table = Table.open(source, split=split, streaming=streaming, images=images, plugin="rlhf_v")
        self.name = str(source)

    def rows(self) -> Iterator[Row]:
        return self.table.rows()

    def pairs_of(self, row: Row) -> Iterable[PreferencePair]:
        texts = self._texts(row)
        field = "image" if row.values.get("image") is not None else "image_path"
        pictures = self.table.pictures(row, field)
        question, chosen, rejected = (texts.text(name) for name in ("question", "chosen", "rejected"))
        return [make_pair(pictures, question, chosen, rejected, self._meta(row))]

    @staticmethod
    def _texts(row: Row) -> Row:
        """Where question and answers stand: in the JSON object of `text`, or in the row itself."""
        text = row.values.get("text")
        if text is None:
            return row
        try:
            inner = strict_json.loads(text) if isinstance(text, str) else text
        except (ValueError, RecursionError) as error:
            raise row.error("text", f"is not valid JSON ({error})") from error
        if not isinstance(inner, dict):
            raise row.error("text", "must be a JSON object with question, chosen and rejected")
        return Row(f"{row.where}, text", inner)

    @staticmethod
    def _meta(row: Row) -> dict[str, Any]:
        used = {"image", "text", "question", "chosen", "rejected", NUMBER}
        return {name: value for name, value in row.values.items() if name not in used and isinstance(value, str | int | float)}
