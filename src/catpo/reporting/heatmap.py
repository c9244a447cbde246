"""Attention maps as the page needs them: one byte per place and token, scaled token by token. Knows no file, no colour.

A picture's grids (tiles, an overview, a centre crop) become one map of the whole picture: every patch spreads its attention
evenly over the part of the picture that it shows, so that no attention is lost or counted twice.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from catpo.core.types import PatchGrid

MOST = 64
"""Most rows or columns of a picture's map."""


@dataclass(frozen=True)
class Heatmap:
    """Maps of one response, ready for JSON."""

    grids: list[tuple[int, int]]
    """(rows, columns) of each picture's map."""
    data: str
    """Base64 of [tokens, places] bytes, row by row and picture after picture; 255 is the token's strongest place."""
    peaks: list[float]
    """[tokens], the attention that 255 stands for."""


def heatmap(maps: NDArray[np.floating], grids: Sequence[PatchGrid], *, pool: int = 1) -> Heatmap:
    """Maps of one response as bytes.

    `maps` is [tokens, patches], not negative, with the patches of all grids one after the other, row by row; `pool` averages
    blocks of that many rows and columns. Raises ValueError if the number of patches is not that of the grids.

    >>> heatmap(np.array([[0.0, 0.1, 0.2, 0.4]]), [PatchGrid(picture=0, rows=2, columns=2)]).peaks
    [0.4]
    """
    maps = np.nan_to_num(np.asarray(maps, dtype=np.float64), posinf=0.0).clip(min=0)
    sizes = [grid.size for grid in grids]
    if maps.shape[1] != sum(sizes):
        raise ValueError(f"maps have {maps.shape[1]} patches, the grids {sum(sizes)}")
    parts = iter(np.split(maps, np.cumsum(sizes)[:-1], axis=1))
    pooled = [_pool(compose([next(parts) for _ in group], group), pool) for group in _by_picture(grids)]
    flat = np.concatenate([part.reshape(len(maps), -1) for part in pooled], axis=1)
    peaks = flat.max(axis=1, initial=0.0)
    scale = np.divide(255, peaks, out=np.zeros_like(peaks), where=peaks > 0)
    levels = np.rint(flat * scale[:, None]).astype(np.uint8)
    return Heatmap(
        [part.shape[1:] for part in pooled],
        base64.b64encode(levels.tobytes()).decode("ascii"),
        [float(f"{peak:.4g}") for peak in peaks],
    )


def compose(parts: Sequence[NDArray[np.float64]], grids: Sequence[PatchGrid]) -> NDArray[np.float64]:
    """One map [tokens, rows, columns] of a picture, from the maps [tokens, patches] of its grids; the sum stays."""
    rows, columns = canvas(grids)
    whole = np.zeros((len(parts[0]), rows, columns))
    for part, grid in zip(parts, grids, strict=True):
        left, top, right, bottom = grid.box
        down, across = _overlap(rows, grid.rows, top, bottom), _overlap(columns, grid.columns, left, right)
        whole += down @ part.reshape(-1, grid.rows, grid.columns) @ across.T
    return whole


def canvas(grids: Sequence[PatchGrid]) -> tuple[int, int]:
    """Rows and columns of a picture's map: those of its finest grid, extended to the whole picture.

    >>> canvas([PatchGrid(0, 4, 4, (0.25, 0.0, 0.75, 1.0))])
    (4, 8)
    """
    rows = max(grid.rows / (grid.box[3] - grid.box[1]) for grid in grids)
    columns = max(grid.columns / (grid.box[2] - grid.box[0]) for grid in grids)
    return min(round(rows), MOST), min(round(columns), MOST)


def places(grids: Sequence[PatchGrid]) -> int:
    """Number of places in the maps of all pictures together."""
    return sum(math.prod(canvas(group)) for group in _by_picture(grids))


def _by_picture(grids: Sequence[PatchGrid]) -> list[list[PatchGrid]]:
    return [list(group) for _, group in groupby(grids, key=lambda grid: grid.picture)]


def _overlap(places: int, patches: int, start: float, end: float) -> NDArray[np.float64]:
    """[places, patches]: the share of each patch, on one axis, that lies in each place; columns sum to 1."""
    edges = np.linspace(start, end, patches + 1) * places
    low, high = edges[:-1], edges[1:]
    left = np.arange(places)[:, None]
    overlap = (np.minimum(left + 1, high) - np.maximum(left, low)).clip(min=0)
    return overlap / (high - low)


def _pool(maps: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """[tokens, rows, columns] -> means of blocks of size x size; blocks at the right and lower edge may be smaller."""
    if size == 1:
        return maps
    for axis in (1, 2):
        starts = np.arange(0, maps.shape[axis], size)
        counts = np.diff([*starts, maps.shape[axis]])
        sums = np.add.reduceat(maps, starts, axis=axis)
        maps = sums / np.expand_dims(counts, [other for other in (0, 1, 2) if other != axis])
    return maps


def pool_for(place_counts: Sequence[int], token_counts: Sequence[int], budget: int) -> int:
    """The smallest `pool` with which all maps fit into a budget of bytes in Base64.

    >>> pool_for([576] * 100, [80] * 100, 3_000_000)
    2
    """
    size = sum(places * tokens for places, tokens in zip(place_counts, token_counts, strict=True)) * 4 / 3
    return max(1, math.ceil(math.sqrt(size / budget)))
