"""SmolVLM: Idefics3's tiles, each behind its row and column, then the whole picture."""

from catpo.models.families import _row_col


class Family(_row_col.Family):
    """`SmolVLMForConditionalGeneration`."""
