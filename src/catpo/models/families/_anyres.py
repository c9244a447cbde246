"""An overview and tiles of the picture in high resolution, joined to one large grid with newlines, as in LLaVA-NeXT."""

import math

from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from catpo.models import families
from catpo.models.families import PatchGrid
from catpo.models.families._tiles import unpadded


class Family(families.Family):
    """What LLaVA-NeXT and LLaVA-OneVision share: tiles lose their border; the newline token after each row is no patch."""

    @property
    def side(self) -> int:
        """Rows and columns of patches of the overview."""
        vision = self.unwrapped.config.vision_config
        return vision.image_size // vision.patch_size

    def overview_and_tiles(self, picture: int, size: tuple[int, int], most: float = math.inf) -> list[PatchGrid]:
        """The grids of a picture of this (height, width); the large one has at most `most` times the overview's patches."""
        config, side = self.unwrapped.config, self.side
        tiles = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        rows, columns = unpadded(size, tiles[0] * side, tiles[1] * side, most=most * side**2)
        return [PatchGrid(picture, side, side), PatchGrid(picture, rows, columns, row_end=1)]
