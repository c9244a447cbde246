"""InternVL 3: a picture is stretched to the canvas of tiles nearest to its shape; a thumbnail of the whole follows."""

from collections.abc import Sequence

from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from catpo.models import families
from catpo.models.families import PatchGrid, Pixels, Size
from catpo.models.families._tiles import square, tile_boxes


class Family(families.Family):
    """`InternVLForConditionalGeneration`: every tile gives a square of patches, 2 x 2 of the vision tower's joined to one."""

    def grids(self, prompt_ids: Sequence[int], pixels: Pixels, sizes: Sequence[Size]) -> list[PatchGrid]:
        patches = self.unwrapped.config.image_seq_length
        limits = self.processor.image_processor.min_patches, self.processor.image_processor.max_patches
        tile = tuple(pixels["pixel_values"].shape[-2:])
        is_tiled = len(pixels["pixel_values"]) > len(sizes)
        grids = []
        for picture, (width, height) in enumerate(sizes):
            columns, rows = get_optimal_tiled_canvas((height, width), tile, *limits) if is_tiled else (1, 1)
            if rows * columns > 1:
                grids += [square(picture, patches, box) for box in tile_boxes(rows, columns)]
            grids.append(square(picture, patches))  # the thumbnail
        return grids
