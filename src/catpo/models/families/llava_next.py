"""LLaVA-NeXT (1.6): an overview and tiles of the picture in high resolution, joined to one large grid with newlines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from catpo.core.types import PatchGrid
from catpo.models import family
from catpo.models.families._tiles import unpadded


class Family(family.Family):
    """`LlavaNextForConditionalGeneration`: tiles lose their border; the newline token after each row is no patch."""

    def grids(
        self, prompt_ids: Sequence[int], pixels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[PatchGrid]:
        config = self.unwrapped.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        grids = []
        for picture, (height, width) in enumerate(pixels["image_sizes"].tolist()):
            tiles = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, config.vision_config.image_size)
            rows, columns = unpadded((height, width), tiles[0] * side, tiles[1] * side)
            grids += [PatchGrid(picture, side, side), PatchGrid(picture, rows, columns, row_end=1)]
        return grids
