"""LLaVA-1.5 and Pixtral in its Hugging Face form: projected patches in rows and columns. The built-in VLM is of this family."""

from collections.abc import Sequence

from catpo.models import families
from catpo.models.families import PatchGrid, Pixels, Size
from catpo.models.families._tiles import center_crop, grids_of_sizes


class Family(families.Family):
    """`LlavaForConditionalGeneration`.

    With a CLIP or SigLIP tower a picture is one square of patches, without the class token; if the processor crops, they show
    the middle of the picture. With a Pixtral tower it keeps its shape, and each row of patches ends with a break token.
    """

    def grids(self, prompt_ids: Sequence[int], pixels: Pixels, sizes: Sequence[Size]) -> list[PatchGrid]:
        patch = self.unwrapped.config.vision_config.patch_size
        if "image_sizes" in pixels:
            return grids_of_sizes(pixels["image_sizes"], patch)
        height, width = pixels["pixel_values"].shape[-2:]
        boxes = [center_crop(self.processor.image_processor, size) for size in sizes]
        return [PatchGrid(picture, height // patch, width // patch, box) for picture, box in enumerate(boxes)]
