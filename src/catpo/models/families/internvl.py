"""InternVL 3: a picture is stretched to the canvas of tiles nearest to its shape; a thumbnail of the whole follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from catpo.core.types import PatchGrid
from catpo.models import family
from catpo.models.families._tiles import tile_boxes


class Family(family.Family):
    """`InternVLForConditionalGeneration`: every tile gives a square of patches, 2 x 2 of the vision tower's joined to one."""

    def grids(
        self, prompt_ids: Sequence[int], pixels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[PatchGrid]:
        side = math.isqrt(self.unwrapped.config.image_seq_length)
        pictures = self.processor.image_processor
        tile = pixels["pixel_values"].shape[-2:]
        is_tiled = len(pixels["pixel_values"]) > len(sizes)
        grids = []
        for picture, (width, height) in enumerate(sizes):
            columns, rows = (1, 1)
            if is_tiled:
                columns, rows = get_optimal_tiled_canvas(
                    (height, width), tuple(tile), pictures.min_patches, pictures.max_patches
                )
            if rows * columns > 1:
                grids += [PatchGrid(picture, side, side, box) for box in tile_boxes(rows, columns)]
            grids.append(PatchGrid(picture, side, side))
        return grids
