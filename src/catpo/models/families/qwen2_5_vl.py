"""Qwen2.5-VL: pictures in their own shape, 2 x 2 patches merged, windowed vision tower, positions in three axes."""

from catpo.models.families import _mrope


class Family(_mrope.Family):
    """`Qwen2_5_VLForConditionalGeneration`; without `mm_token_type_ids` it would silently use wrong positions."""
