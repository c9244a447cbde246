"""TRL's vision preference format: `images` or `image`, `prompt`, `chosen`, `rejected`, plain or conversational.

    trl(source='trl-lib/rlaif-v')        trl(source='pairs.parquet')        trl(source='rows.jsonl', images='photos')

Columns: TRL's documentation, "Dataset formats". A prompt may also stand at the head of both conversations (implicit prompt).
"""

from catpo.data.datasets._formats import Choices
from catpo.data.datasets._table import TableDataset


class Dataset(TableDataset):
    """One pair per row."""

    plugin = "trl"
    choices = Choices("trl")
