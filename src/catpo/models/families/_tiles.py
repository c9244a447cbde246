"""How pictures are cropped, tiled and merged before a vision tower sees them: geometry that several families share."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from catpo.models.families import PatchGrid, Size

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def square(picture: int, patches: int, box: Box = WHOLE) -> PatchGrid:
    """As many rows as columns of patches."""
    side = math.isqrt(patches)
    return PatchGrid(picture, side, side, box)


def center_crop(image_processor: Any, size: Size) -> Box:
    """The part of a picture that remains when it is resized and the middle is cut out.

    >>> from types import SimpleNamespace as Settings
    >>> crop = {"height": 336, "width": 336}
    >>> clip = Settings(do_resize=True, size={"shortest_edge": 336}, do_center_crop=True, crop_size=crop)
    >>> center_crop(clip, (672, 336))
    (0.25, 0.0, 0.75, 1.0)
    """
    shortest = _setting(image_processor.size, "shortest_edge") if getattr(image_processor, "do_resize", True) else None
    if not getattr(image_processor, "do_center_crop", False) or shortest is None:
        return WHOLE
    margins = []
    for side, name in zip(size, ("width", "height"), strict=True):
        resized = shortest * side / min(size)
        margins.append((1 - min(1.0, _setting(image_processor.crop_size, name) / resized)) / 2)
    left, top = margins
    return (left, top, 1 - left, 1 - top)


def _setting(settings: Any, name: str) -> Any:
    return settings.get(name) if hasattr(settings, "get") else getattr(settings, name, None)


def grids_of_sizes(image_sizes: Tensor | Sequence[Sequence[int]], patch: int) -> list[PatchGrid]:
    """One grid per picture that was resized to (height, width) and cut into squares of `patch` pixels."""
    sizes = [[int(side) for side in size] for size in image_sizes]
    return [PatchGrid(picture, height // patch, width // patch) for picture, (height, width) in enumerate(sizes)]


def tile_boxes(rows: int, columns: int) -> Iterator[Box]:
    """The parts of a picture that is cut into equal tiles, row by row."""
    for row in range(rows):
        for column in range(columns):
            yield (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)


def unpadded(size: tuple[int, int], rows: int, columns: int, *, most: float = math.inf) -> tuple[int, int]:
    """Rows and columns of patches that are left of tiles when their border is taken off (LLaVA-NeXT, `unpad_image`).

    `size` is the picture's (height, width); a grid of more than 1.21 times `most` patches is made smaller (LLaVA-OneVision's
    anyres_max).

    >>> unpadded((100, 200), 48, 48)
    (24, 48)
    """
    height, width = size
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    ratio = math.sqrt(rows * columns / most)
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
