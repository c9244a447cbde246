"""Any other decoder whose image placeholders stand in the token ids; compared with eager attention before it is used."""

import math
from collections.abc import Sequence
from itertools import groupby

from jaxtyping import Int
from torch import Tensor

from catpo.core.errors import UserError
from catpo.models import families
from catpo.models.families import Encoded, PatchGrid, Pixels, Size
from catpo.models.families._tiles import square


class Family(families.Family):
    """`AutoModelForImageTextToText` of a type that has no family of its own.

    Its geometry is unknown: a picture's patches are taken for a square, or for one row if their number is not a square.
    `family_check.py` finds out by trying whether the prefix can be shared; if not, the model computes its own positions.
    """

    needs_check = True

    @property
    def image_token_id(self) -> int:
        token = getattr(self.unwrapped.config, "image_token_id", None)
        if token is None:
            raise UserError(
                f"{self.model_id} ({type(self.unwrapped).__name__}) has no image token in its prompts (config.image_token_id), "
                "so its decoder does not attend to patches in its own sequence. It cannot be scored."
            )
        return token

    def grids(self, prompt_ids: Sequence[int], pixels: Pixels, sizes: Sequence[Size]) -> list[PatchGrid]:
        grids = []
        for picture, count in enumerate(self._tokens_by_picture(prompt_ids, len(sizes))):
            is_square = math.isqrt(count) ** 2 == count
            grids.append(square(picture, count) if is_square else PatchGrid(picture, 1, count))
        return grids

    def _tokens_by_picture(self, prompt_ids: Sequence[int], picture_count: int) -> list[int]:
        """Image tokens of each picture: all of them for one picture; uninterrupted runs of them for several."""
        runs = [len(list(run)) for is_image, run in groupby(token == self.image_token_id for token in prompt_ids) if is_image]
        if picture_count == 1:
            return [sum(runs)]
        if len(runs) != picture_count:
            raise UserError(
                f"{self.model_id}: the prompt has {len(runs)} runs of image tokens for {picture_count} pictures, so it is "
                "unknown which belong to which. Give pairs with one picture each."
            )
        return runs

    def prompt_positions(self, encoded: Encoded) -> Int[Tensor, " prompt"] | None:
        return super().prompt_positions(encoded) if self.shares_prefix else None
