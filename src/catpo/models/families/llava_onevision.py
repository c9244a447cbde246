"""LLaVA-OneVision: overview and tiles as in LLaVA-NeXT, at most so many patches; several pictures are seen without tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from catpo.core.types import PatchGrid
from catpo.models import family
from catpo.models.families._tiles import unpadded


class Family(family.Family):
    """`LlavaOnevisionForConditionalGeneration`: newline tokens are no patches; `anyres_max_9` bounds the large grid."""

    def grids(
        self, prompt_ids: Sequence[int], pixels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[PatchGrid]:
        config = self.unwrapped.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        if len(sizes) > 1:
            return [PatchGrid(picture, side, side, end=1) for picture in range(len(sizes))]
        height, width = pixels["image_sizes"][0].tolist()
        tiles = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, config.vision_config.image_size)
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2
        rows, columns = unpadded((height, width), tiles[0] * side, tiles[1] * side, most=most)
        return [PatchGrid(0, side, side), PatchGrid(0, rows, columns, row_end=1)]
