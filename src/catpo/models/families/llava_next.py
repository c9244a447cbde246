"""LLaVA-NeXT (1.6): an overview and tiles of the picture in high resolution, joined to one large grid with newlines."""

from collections.abc import Sequence

from catpo.models.families import PatchGrid, Pixels, Size, _anyres


class Family(_anyres.Family):
    """`LlavaNextForConditionalGeneration`."""

    def grids(self, prompt_ids: Sequence[int], pixels: Pixels, sizes: Sequence[Size]) -> list[PatchGrid]:
        grids = []
        for picture, (height, width) in enumerate(pixels["image_sizes"].tolist()):
            grids += self.overview_and_tiles(picture, (height, width))
        return grids
