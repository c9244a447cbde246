"""Tiles named by `<row_R_col_C>` tokens in the prompt, as Idefics3 and SmolVLM write them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from catpo.core.types import PatchGrid
from catpo.models import family
from catpo.models.families._tiles import tile_boxes


class Family(family.Family):
    """What Idefics3 and SmolVLM share: every tile and the overview give a square of patches (pixel shuffle)."""

    def grids(
        self, prompt_ids: Sequence[int], pixels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[PatchGrid]:
        side = math.isqrt(self.processor.image_seq_len)
        overview = self.tokenizer.convert_tokens_to_ids("<global-img>")
        grids: list[PatchGrid] = []
        rows = columns = 0
        for token in (token for token in self.tokenizer.convert_ids_to_tokens(prompt_ids) if token):
            place = re.fullmatch(r"<row_(\d+)_col_(\d+)>", token)
            if place:
                rows, columns = int(place[1]), int(place[2])  # the last one tells how many there are
            elif token == self.tokenizer.convert_ids_to_tokens(overview):
                picture = grids[-1].picture + 1 if grids else 0
                grids += [PatchGrid(picture, side, side, box) for box in tile_boxes(rows, columns)]
                grids.append(PatchGrid(picture, side, side))
                rows = columns = 0
        return grids
