"""torch's FLOP counter, extended by operations it misses on CPUs: fused attention and in-place addmm."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def counter() -> FlopCounterMode:
    """Counts operations in its context; causal attention counts half of the square, as the kernels compute."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten.addmm_: _product_added,
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


def _product_added(into: Shape, first: Shape, second: Shape, **_: Any) -> int:
    return 2 * first[0] * first[1] * second[1]


def _attention(query: Shape, key: Shape, value: Shape, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    """Scores and weighted sum of values."""
    return 2 * _seen(query, key, is_causal)


def _attention_backward(
    gradient: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    output: Shape,
    norm: Shape,
    dropout: float,
    is_causal: bool,
    **_: Any,
) -> int:
    """Recomputed scores, and gradients of probabilities, values, queries and keys."""
    return 5 * _seen(query, key, is_causal)


def _seen(query: Shape, key: Shape, is_causal: bool) -> int:
    """Operations of one product between queries and their visible keys."""
    rows, heads, queries, size = query
    seen = queries * (queries + 1) // 2 if is_causal else queries * key[2]
    return 2 * rows * heads * seen * size
