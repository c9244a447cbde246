"""Small tensor helpers that several parts share. Knows nothing of models or pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PAD = -1
"""Fills index tensors where a row is shorter than the longest."""


def pad_indices(rows: Sequence[Sequence[int]], *, fill: int = PAD) -> Int[Tensor, "rows longest"]:
    """Rows of different lengths as one int64 tensor, filled at the end.

    >>> pad_indices([[1, 2], [3]])
    tensor([[ 1,  2],
            [ 3, -1]])
    """
    longest = max((len(row) for row in rows), default=0)
    table = torch.full((len(rows), longest), fill, dtype=torch.long)
    for row, values in enumerate(rows):
        table[row, : len(values)] = torch.as_tensor(values, dtype=torch.long)
    return table


def masked_sum(values: Float[Tensor, "... tokens"], mask: Bool[Tensor, "... tokens"]) -> Float[Tensor, ...]:
    """Sum over the tokens that exist; whatever stands in the padding, NaN included, does not count."""
    return values.masked_fill(~mask, 0.0).sum(-1)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over the vocabulary run in float32, or in float64 where the inputs are float64 (oracle tests)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def text_hash(text: str) -> str:
    """Identity of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
