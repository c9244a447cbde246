"""LLaVA-1.5: one square grid of projected CLIP patches per picture. The built-in VLM is of this family."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from catpo.families import _base


class Family(_base.Family):
    """`LlavaForConditionalGeneration`: patches are rows x columns of the vision tower, class token dropped."""

    def grids(self, pixels: Mapping[str, Tensor], image_count: int) -> list[tuple[int, int]]:
        patch = self.unwrapped.config.vision_config.patch_size
        height, width = pixels["pixel_values"].shape[-2:]
        return [(height // patch, width // patch)] * image_count
