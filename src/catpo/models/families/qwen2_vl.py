"""Qwen2-VL: pictures in their own shape, 2 x 2 patches merged, positions in three axes."""

from catpo.models.families import _mrope


class Family(_mrope.Family):
    """`Qwen2VLForConditionalGeneration`."""
