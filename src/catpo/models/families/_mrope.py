"""Positions in three axes (time, height, width), as all Qwen-VL models have them; 2 x 2 patches are merged to one."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from catpo.models import families
from catpo.models.families import Encoded, PatchGrid, Pixels, Size


class Family(families.Family):
    """What the Qwen-VL families share. Pictures keep their shape; each is resized to whole merged patches."""

    def grids(self, prompt_ids: Sequence[int], pixels: Pixels, sizes: Sequence[Size]) -> list[PatchGrid]:
        merge = self.unwrapped.config.vision_config.spatial_merge_size
        shapes = pixels["image_grid_thw"].tolist()
        return [PatchGrid(picture, height // merge, width // merge) for picture, (_, height, width) in enumerate(shapes)]

    def prompt_positions(self, encoded: Encoded) -> Int[Tensor, "3 prompt"]:
        """The model's own rule (`get_rope_index`): a picture takes as many positions as its longer side has patches."""
        positions, _ = self.backbone.get_rope_index(
            input_ids=torch.tensor([encoded.prompt_ids]),
            mm_token_type_ids=torch.tensor([encoded.prompt_inputs["mm_token_type_ids"]]),
            image_grid_thw=encoded.pixels.get("image_grid_thw"),
        )
        return positions[:, 0]
