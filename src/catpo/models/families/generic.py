"""Any other decoder whose image placeholders stand in the token ids; compared with eager attention before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Int
from torch import Tensor

from catpo.core.errors import UserError
from catpo.core.types import PatchGrid
from catpo.models import family
from catpo.models.family import Encoded


class Family(family.Family):
    """`AutoModelForImageTextToText` of a type that has no family of its own.

    Nothing is known of its geometry: a picture's patches are taken for a square, or for one row where they are none. Whether
    the prefix can be shared is found out by trying (`family_check.py`); where not, the model computes its own positions.
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

    def grids(
        self, prompt_ids: Sequence[int], pixels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[PatchGrid]:
        counts = self._tokens_by_picture(prompt_ids, len(sizes))
        sides = [math.isqrt(count) for count in counts]
        return [
            PatchGrid(picture, side, side) if side * side == count else PatchGrid(picture, 1, count)
            for picture, (count, side) in enumerate(zip(counts, sides, strict=True))
        ]

    def _tokens_by_picture(self, prompt_ids: Sequence[int], picture_count: int) -> list[int]:
        """Image tokens of each picture: all of them for one; for several, uninterrupted stretches."""
        is_image = [token == self.image_token_id for token in prompt_ids]
        if picture_count == 1:
            return [sum(is_image)]
        starts = [at for at, each in enumerate(is_image) if each and not (at and is_image[at - 1])]
        stretches = [next((end for end in range(at, len(is_image)) if not is_image[end]), len(is_image)) - at for at in starts]
        if len(stretches) != picture_count:
            raise UserError(
                f"{self.model_id}: {len(stretches)} stretches of image tokens stand for {picture_count} pictures, so it is not "
                "known which belong to which. Give pairs with one picture each."
            )
        return stretches

    def prompt_positions(self, encoded: Encoded) -> Int[Tensor, " prompt"] | None:
        return super().prompt_positions(encoded) if self.shares_prefix else None
