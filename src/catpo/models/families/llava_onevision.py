"""LLaVA-OneVision: overview and tiles as in LLaVA-NeXT, up to a largest number of patches; several pictures have no tiles."""

from collections.abc import Sequence

from catpo.models.families import PatchGrid, Pixels, Size, _anyres


class Family(_anyres.Family):
    """`LlavaOnevisionForConditionalGeneration`; `anyres_max_9` bounds the large grid."""

    def grids(self, prompt_ids: Sequence[int], pixels: Pixels, sizes: Sequence[Size]) -> list[PatchGrid]:
        if len(sizes) > 1:
            return [PatchGrid(picture, self.side, self.side, end=1) for picture in range(len(sizes))]
        most = int(self.unwrapped.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        height, width = pixels["image_sizes"][0].tolist()
        return self.overview_and_tiles(0, (height, width), most)
