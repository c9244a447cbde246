"""Idefics3: tiles of the picture, each behind its row and column, then the whole picture."""

from catpo.models.families import _row_col


class Family(_row_col.Family):
    """`Idefics3ForConditionalGeneration`."""
