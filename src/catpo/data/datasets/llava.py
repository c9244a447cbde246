"""LLaVA-style JSON: POVID, CSR, HA-DPO, SeVa, mDPO, VLFeedback (Silkie), BPO, LLaMA-Factory, ms-swift; as `rows` reads them.

llava(source='povid.json', images='coco/train2014')        llava(source='MMInstruction/VLFeedback')
"""

from __future__ import annotations

from pathlib import Path

from catpo.data.datasets._formats import Choices
from catpo.data.datasets._table import TableDataset


class Dataset(TableDataset):
    """Pairs of the rows, usually one each.

    Args:
        source: the file, or a hub id.
        images: folder of the pictures; by default the file's own.
        prompt: question of rows that have none.
        seed: draws one of several chosen and rejected texts (HA-DPO has three of each).
        min_gap: two ranked answers make a pair if their scores differ by more than this.
        split: of a hub data set.
    """

    plugin = "llava"

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        images: str | None = None,
        prompt: str | None = None,
        seed: int = 0,
        min_gap: float = 0.0,
        split: str = "train",
    ) -> None:
        self.choices = Choices("auto", prompt, seed, min_gap)
        super().__init__(source, split=split, images=images)
