"""RLHF-V and RLAIF-V: Parquet with the picture's bytes, question, chosen and rejected answer.

    rlhf_v(source='openbmb/RLHF-V-Dataset')        rlhf_v(source='RLAIF-V-Dataset/')        rlhf_v(source='pairs.parquet')

Columns (dataset cards of openbmb/RLHF-V-Dataset and openbmb/RLAIF-V-Dataset): `image` (or `image_path`,
for pictures in a folder), and either `text`, a JSON object with question, chosen and rejected, or these three as columns. The
other columns are kept in a pair's `meta`. Both are CC BY-NC 4.0.
"""

from catpo.data.datasets._formats import Choices
from catpo.data.datasets._table import TableDataset


class Dataset(TableDataset):
    """One pair per row."""

    plugin = "rlhf_v"
    choices = Choices("rlhf-v")
