"""Mistral 3 (Pixtral tower): pictures in their own shape, patches merged, a break token after each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from catpo.core.types import PatchGrid
from catpo.models import family
from catpo.models.families._tiles import grids_of_sizes


class Family(family.Family):
    """`Mistral3ForConditionalGeneration`; break and end tokens are ordinary tokens, not patches."""

    def grids(
        self, prompt_ids: Sequence[int], pixels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[PatchGrid]:
        config = self.unwrapped.config
        return grids_of_sizes(pixels["image_sizes"], config.vision_config.patch_size * config.spatial_merge_size)
