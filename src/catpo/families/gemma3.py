"""Gemma 3: square pictures of 256 patches that see each other in both directions; layers with a sliding window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from catpo.families import _base
from catpo.families._base import Encoded
from catpo.families._tiles import WHOLE, tile_boxes
from catpo.types import PatchGrid


class Family(_base.Family):
    """`Gemma3ForConditionalGeneration`. With pan and scan the crops follow the whole picture, along its longer side."""

    def grids(
        self, prompt_ids: Sequence[int], pixels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[PatchGrid]:
        side = math.isqrt(self.processor.image_seq_length)
        grids = []
        for picture, (crops, (width, height)) in enumerate(zip(self._crops(prompt_ids, len(sizes)), sizes, strict=True)):
            boxes = [WHOLE, *(tile_boxes(1, crops) if width >= height else tile_boxes(crops, 1))]
            grids += [PatchGrid(picture, side, side, box) for box in boxes]
        return grids

    def _crops(self, prompt_ids: Sequence[int], picture_count: int) -> list[int]:
        """How many crops follow each picture: the processor introduces them with a sentence, told by its tokens' number."""
        views = sum(token == self.tokenizer.boi_token_id for token in prompt_ids)
        if views == picture_count:
            return [0] * picture_count
        text = self.tokenizer.decode(list(prompt_ids))
        parts = text.split("Here is the original image")[1:]
        return [part.count(self.tokenizer.boi_token) - 1 for part in parts]

    def prompt_blocks(self, encoded: Encoded) -> list[int]:
        """The tokens of one view of a picture see each other."""
        blocks = [-1] * len(encoded.prompt_ids)
        for number, position in enumerate(encoded.patches):
            blocks[position] = number // self.processor.image_seq_length
        return blocks
