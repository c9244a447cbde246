"""Qwen3-VL: as Qwen2.5-VL, with interleaved axes and vision features added again in the first decoder layers."""

from catpo.models.families import _mrope


class Family(_mrope.Family):
    """`Qwen3VLForConditionalGeneration`; patch features are those that enter the first layer (deepstack adds more later)."""
