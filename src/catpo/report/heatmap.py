"""Attention maps as the page needs them: one byte per patch and token, scaled token by token. Knows no file, no colour."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Grids = Sequence[tuple[int, int]]
"""(rows, columns) of each picture's patches."""


@dataclass(frozen=True)
class Heatmap:
    """Maps of one response, ready for JSON."""

    grids: list[tuple[int, int]]
    """(rows, columns) of each picture, after pooling."""
    data: str
    """Base64 of [tokens, patches] bytes, row by row and picture after picture; 255 is the token's strongest patch."""
    peaks: list[float]
    """[tokens], the attention that 255 stands for."""


def heatmap(maps: NDArray[np.floating], grids: Grids, *, pool: int = 1) -> Heatmap:
    """Maps of one response as bytes.

    >>> heatmap(np.array([[0.0, 0.1, 0.2, 0.4]]), [(2, 2)]).peaks
    [0.4]

    Args:
        maps: [tokens, patches], not negative; patches of all pictures one after the other, row by row.
        grids: of those pictures.
        pool: join so many rows and columns of patches to one by their mean.

    Raises:
        ValueError: the number of patches is not that of the grids.
    """
    maps = np.nan_to_num(np.asarray(maps, dtype=np.float64), posinf=0.0).clip(min=0)
    sizes = [rows * columns for rows, columns in grids]
    if maps.shape[1] != sum(sizes):
        raise ValueError(f"maps have {maps.shape[1]} patches, the grids {sum(sizes)}")
    parts = np.split(maps, np.cumsum(sizes)[:-1], axis=1)
    pooled = [_pool(part.reshape(-1, *grid), pool) for part, grid in zip(parts, grids, strict=True)]
    flat = np.concatenate([part.reshape(len(maps), -1) for part in pooled], axis=1)
    peaks = flat.max(axis=1, initial=0.0)
    scale = np.divide(255, peaks, out=np.zeros_like(peaks), where=peaks > 0)
    levels = np.rint(flat * scale[:, None]).astype(np.uint8)
    return Heatmap(
        [(int(part.shape[1]), int(part.shape[2])) for part in pooled],
        base64.b64encode(levels.tobytes()).decode("ascii"),
        [float(f"{peak:.4g}") for peak in peaks],
    )


def _pool(maps: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """[tokens, rows, columns] -> means of blocks of size x size; blocks at the right and lower edge may be smaller."""
    if size == 1:
        return maps
    for axis in (1, 2):
        starts = np.arange(0, maps.shape[axis], size)
        counts = np.diff([*starts, maps.shape[axis]])
        sums = np.add.reduceat(maps, starts, axis=axis)
        maps = sums / counts.reshape([-1 if each == axis else 1 for each in range(3)])
    return maps


def pool_for(patch_counts: Sequence[int], token_counts: Sequence[int], budget: int) -> int:
    """How many patches a side must be joined so that all maps fit into so many bytes of Base64.

    >>> pool_for([576] * 100, [80] * 100, 3_000_000)
    2
    """
    size = sum(patches * tokens for patches, tokens in zip(patch_counts, token_counts, strict=True)) * 4 / 3
    pool = 1
    while size / pool**2 > budget:
        pool += 1
    return pool
