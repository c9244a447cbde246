"""One format of preference data per file. A plugin defines `Dataset`, a subclass of one of those exported here."""

from catpo.data.datasets._base import Dataset, FieldOptions, Row, RowDataset, Scanned, make_pair

__all__ = ["Dataset", "FieldOptions", "Row", "RowDataset", "Scanned", "make_pair"]
