"""Small tensor helpers that several parts share. Knows nothing of models or pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catpo.files.checksums import checksum

PAD = -1
"""Fills index tensors where a row is shorter than the longest."""


def pad_indices(rows: Sequence[Sequence[int]], *, fill: int = PAD) -> Int[Tensor, "rows longest"]:
    """Rows of different lengths as one int64 tensor, filled at the end.

    >>> pad_indices([[1, 2], [3]])
    tensor([[ 1,  2],
            [ 3, -1]])
    """
    longest = max((len(row) for row in rows), default=0)
    padded = [[*row, *[fill] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long).view(len(rows), longest)


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many items two sequences begin with in common.

    >>> common_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@contextmanager
def sums_in_float32(factor: Tensor) -> Iterator[bool]:
    """On a GPU, whether `factor` is in half precision: then float32 products inside round their factors to TF32.

    Its mantissa of ten bits holds every number of half precision exactly, and its sums are float32: such numbers cast to
    float32 are multiplied as the kernels for half precision do, but the result is not rounded. On a CPU nothing changes.
    """
    device = factor.device.type
    if device != "cuda" or factor.dtype not in (torch.bfloat16, torch.float16):
        yield False
        return
    name, value = ("fp32_precision", "tf32") if hasattr(torch.backends.cuda.matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(torch.backends.cuda.matmul, name)
    setattr(torch.backends.cuda.matmul, name, value)
    try:
        with torch.autocast(device, enabled=False):
            yield True
    finally:
        setattr(torch.backends.cuda.matmul, name, before)


def masked_sum(values: Float[Tensor, "... tokens"], mask: Bool[Tensor, "... tokens"]) -> Float[Tensor, ...]:
    """Sum over the tokens that exist; whatever stands in the padding, NaN included, does not count."""
    return values.masked_fill(~mask, 0.0).sum(-1)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over the vocabulary run in float32, or in float64 where the inputs are float64 (oracle tests)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The name without its module.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def text_hash(text: str) -> str:
    """Identity of a text."""
    return checksum(text.encode())
