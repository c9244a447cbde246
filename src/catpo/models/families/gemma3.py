"""Gemma 3: square pictures of 256 patches that see each other in both directions; layers with a sliding window."""

from collections.abc import Sequence

from catpo.models import families
from catpo.models.families import Encoded, PatchGrid, Pixels, Size
from catpo.models.families._tiles import square


class Family(families.Family):
    """`Gemma3ForConditionalGeneration`. Its processor leaves pan and scan off, so a picture is squeezed to one square."""

    def grids(self, prompt_ids: Sequence[int], pixels: Pixels, sizes: Sequence[Size]) -> list[PatchGrid]:
        return [square(picture, self.processor.image_seq_length) for picture in range(len(sizes))]

    def prompt_blocks(self, encoded: Encoded) -> list[int]:
        """The patches of one picture see each other."""
        blocks = [-1] * len(encoded.prompt_ids)
        for number, position in enumerate(encoded.patches):
            blocks[position] = number // self.processor.image_seq_length
        return blocks
