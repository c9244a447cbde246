"""Tiles named by `<row_R_col_C>` tokens in the prompt, as Idefics3 and SmolVLM write them."""

import re
from collections.abc import Sequence

from catpo.models import families
from catpo.models.families import PatchGrid, Pixels, Size
from catpo.models.families._tiles import WHOLE, square, tile_boxes


class Family(families.Family):
    """What Idefics3 and SmolVLM share: every tile and the overview give a square of patches (pixel shuffle)."""

    def grids(self, prompt_ids: Sequence[int], pixels: Pixels, sizes: Sequence[Size]) -> list[PatchGrid]:
        grids: list[PatchGrid] = []
        picture = rows = columns = 0
        for token in self.tokenizer.convert_ids_to_tokens(prompt_ids):
            if tile := re.fullmatch(r"<row_(\d+)_col_(\d+)>", token or ""):
                rows, columns = int(tile[1]), int(tile[2])  # the last tile has the number of rows and columns
            elif token == "<global-img>":  # the overview ends a picture
                boxes = [*tile_boxes(rows, columns), WHOLE]
                grids += [square(picture, self.processor.image_seq_len, box) for box in boxes]
                picture, rows, columns = picture + 1, 0, 0
        return grids
