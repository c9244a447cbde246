"""LLaVA-1.5 and Pixtral in its Hugging Face form: projected patches in rows and columns. The built-in VLM is of this family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from catpo.core.types import PatchGrid
from catpo.models import family
from catpo.models.families._tiles import center_crop, grids_of_sizes


class Family(family.Family):
    """`LlavaForConditionalGeneration`.

    With a CLIP or SigLIP tower a picture is one square of patches, class token dropped, of the middle of the picture if the
    processor crops. With a Pixtral tower it keeps its shape, and each row of patches ends with a break token.
    """

    def grids(
        self, prompt_ids: Sequence[int], pixels: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[PatchGrid]:
        patch = self.unwrapped.config.vision_config.patch_size
        if "image_sizes" in pixels:
            return grids_of_sizes(pixels["image_sizes"], patch)
        height, width = pixels["pixel_values"].shape[-2:]
        return [
            PatchGrid(picture, height // patch, width // patch, center_crop(self.processor.image_processor, size))
            for picture, size in enumerate(sizes)
        ]
