"""Mistral 3 (Pixtral tower): pictures in their own shape, patches merged, a break token after each row."""

from collections.abc import Sequence

from catpo.models import families
from catpo.models.families import PatchGrid, Pixels, Size
from catpo.models.families._tiles import grids_of_sizes


class Family(families.Family):
    """`Mistral3ForConditionalGeneration`; break and end tokens are ordinary tokens, not patches."""

    def grids(self, prompt_ids: Sequence[int], pixels: Pixels, sizes: Sequence[Size]) -> list[PatchGrid]:
        config = self.unwrapped.config
        return grids_of_sizes(pixels["image_sizes"], config.vision_config.patch_size * config.spatial_merge_size)
