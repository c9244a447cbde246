"""Gemma 3: square pictures of 256 patches that see each other in both directions; layers with a sliding window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from catpo.core.types import PatchGrid
from catpo.models import family
from catpo.models.family import Encoded


class Family(family.Family):
    """`Gemma3ForConditionalGeneration`. Its processor leaves pan and scan off, so a picture is squeezed to one square."""

    def grids(
        self, prompt_ids: Sequence[int], pixels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[PatchGrid]:
        side = math.isqrt(self.processor.image_seq_length)
        return [PatchGrid(picture, side, side) for picture in range(len(sizes))]

    def prompt_blocks(self, encoded: Encoded) -> list[int]:
        """The patches of one picture see each other."""
        blocks = [-1] * len(encoded.prompt_ids)
        for number, position in enumerate(encoded.patches):
            blocks[position] = number // self.processor.image_seq_length
        return blocks
