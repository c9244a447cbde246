"""One format of preference data per file. A plugin defines `Dataset`, a subclass of one of those exported here."""

from catpo.data.datasets._base import Dataset, Row, RowDataset, Scanned, make_pair, message_text

__all__ = ["Dataset", "Row", "RowDataset", "Scanned", "make_pair", "message_text"]
