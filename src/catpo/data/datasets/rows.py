"""Rows of any file, JSON, CSV or Parquet, of a folder of them, `save_to_disk`, or a hub id; their fields say what they mean.

    rows(source='dpo.json', images='photos')        rows(source='votes.csv', columns={'chosen': 'better', 'rejected': 'worse'})

A path alone is read in this way, too. The format is recognised by its fields:

| Fields | Format of |
|---|---|
| `prompt`, `chosen`, `rejected` as texts or messages | trl |
| `conversations` or `messages`, `chosen`, `rejected`; `instruction`, `input`, `chosen`, `rejected` | llama-factory |
| `messages` or `query` with `response`, `rejected_response`; `messages`, `rejected_messages` | ms-swift |
| `conversations`, `rejected_conversations` | povid, CSR |
| `text`, an object with question, chosen and rejected; or these as columns | rlhf-v |
| `question` or `prompt`, `chosen`, `reject` or `rejected` | SeVa, mDPO, HA-DPO's pope_data.json |
| `image_id`, `chosen`, `rejected` (lists) | HA-DPO's desc_data.json |
| `prompt`, `completions` with ratings or scores | VLFeedback (Silkie), BPO: a pair for every two answers of unequal score |

The fields `system` and `history` come before the conversation in every format.
"""

from __future__ import annotations

from pathlib import Path

from catpo.data.datasets._formats import Choices
from catpo.data.datasets._table import TableDataset


class Dataset(TableDataset):
    """Pairs of the rows, usually one each.

    Args:
        source: the file, the folder, or a hub id.
        format: refuse rows of another: llama-factory, ms-swift, povid, trl or rlhf-v.
        images: folder of the pictures; by default the file's own. Absolute paths must lie inside it, too.
        split: of a hub or saved data set, or of a folder whose files are named by it.
        streaming: read a hub data set or Parquet files row by row, instead of downloading or unpacking all rows first.
        prompt: question of rows that have none.
        seed: draws one of several chosen and rejected texts (HA-DPO has three of each).
        min_gap: two ranked answers make a pair if their scores differ by more than this.
    """

    plugin = "rows"

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        format: str = "auto",
        images: str | None = None,
        split: str = "train",
        streaming: bool = False,
        prompt: str | None = None,
        seed: int = 0,
        min_gap: float = 0.0,
    ) -> None:
        self.choices = Choices(format, prompt, seed, min_gap)
        super().__init__(source, split=split, streaming=streaming, images=images)
