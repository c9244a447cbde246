"""Qwen2-VL: pictures in their own shape, 2 x 2 patches merged, positions in three axes."""

from __future__ import annotations

from catpo.models.families import _mrope


class Family(_mrope.Family):
    """`Qwen2VLForConditionalGeneration`."""
