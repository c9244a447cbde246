"""RLHF-V and RLAIF-V: Parquet with the picture's bytes, question, chosen and rejected answer.

    rlhf_v(source='openbmb/RLHF-V-Dataset')        rlhf_v(source='RLAIF-V-Dataset/')        rlhf_v(source='pairs.parquet')

Columns (dataset cards of openbmb/RLHF-V-Dataset and openbmb/RLAIF-V-Dataset): `image` (or `image_path`,
for pictures in a folder), and either `text`, a JSON object with question, chosen and rejected, or these three as columns. The
other columns are kept in a pair's `meta`. Both are CC BY-NC 4.0.
"""

from __future__ import annotations

from collections.abc import Iterable

from catpo.core.types import PreferencePair
from catpo.data.datasets import Row, make_pair
from catpo.data.datasets._table import NUMBER, TableDataset

READ = {"image", "text", "question", "chosen", "rejected", NUMBER}


class Dataset(TableDataset):
    """One pair per row."""

    plugin = "rlhf_v"

    def pairs_of(self, row: Row) -> Iterable[PreferencePair]:
        text = row.values.get("text")
        texts = row
        if isinstance(text, dict):
            texts = Row(row.where, text)
        elif text is not None:
            texts = row.inner("text", row.text("text"))
        pictures = self.table.pictures(row, "image" if row.values.get("image") is not None else "image_path")
        question, chosen, rejected = (texts.text(name) for name in ("question", "chosen", "rejected"))
        meta = {name: value for name, value in row.values.items() if name not in READ and isinstance(value, str | int | float)}
        return [make_pair(pictures, question, chosen, rejected, meta)]
