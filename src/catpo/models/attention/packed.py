"""Attention over packed rows `[prompt | chosen | rejected]`: a response sees the prompt and itself, and no more is computed.

A layout says where the parts of each row stand. It is an integer tensor of four axes, which transformers hands through to the
attention function like a finished mask, checkpointed layers included. Knows nothing of pairs, families or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Layout = Int[Tensor, "rows 1 parts 2"]
"""First position and the one after the last of the prompt and of each response; equal where there is no such part."""
PREFIX = "catpo_"
"""How attention functions that take a layout are called, before the name of the one they stand on."""
LAYOUT = "catpo_layout"
"""Attribute of a mask: the layout it was made of."""


Fused = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention function as transformers calls it: outputs are [rows, tokens, heads, size]."""


def layout_of(rows: Sequence[Sequence[tuple[int, int]]]) -> Layout:
    """Parts of every row, prompt first, as (start, end)."""
    return torch.tensor(rows, dtype=torch.long)[:, None]


def is_layout(mask: object) -> TypeGuard[Layout]:
    """Whether what came as a mask is a layout: masks are boolean, or numbers to add."""
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.long


def segments(layout: Layout, length: int) -> Int[Tensor, "rows length"]:
    """Number of the part each position belongs to, 0 the prompt; -1 in the padding."""
    position = torch.arange(length, device=layout.device)
    start, end = layout[:, 0, :, 0, None], layout[:, 0, :, 1, None]  # (row, part, 1)
    is_inside = (start <= position) & (position < end)
    number = torch.arange(layout.shape[2], device=layout.device)[:, None]
    return torch.where(is_inside, number, -1).amax(1)


def sees(query_part: Tensor, key_part: Tensor, query: Tensor, key: Tensor) -> Bool[Tensor, ...]:
    """Whether a query sees a key: an earlier one of the prompt or of its own part. Padding sees itself, so no row is empty."""
    earlier = (key <= query) & (query_part >= 0) & (key_part >= 0)
    return (earlier & ((key_part == 0) | (key_part == query_part))) | (query == key)


def visible(
    layout: Layout, length: int, positions: Int[Tensor, "rows tokens"] | None = None
) -> Bool[Tensor, "rows tokens length"]:
    """Which keys the queries at `positions` (all, if left out) see."""
    part = segments(layout, length)
    key = torch.arange(length, device=layout.device)
    query = key.expand(len(part), length) if positions is None else positions
    return sees(part.gather(1, query)[:, :, None], part[:, None], query[:, :, None], key)


def mask_for(implementation: str, layout: Layout, length: int, dtype: torch.dtype) -> Layout | Tensor | BlockMask:
    """What the decoder's attention function takes for a layout: the layout, a block mask, numbers to add, or booleans."""
    mask: Tensor | BlockMask
    if implementation == f"{PREFIX}sdpa" and layout.device.type == "cpu":
        return layout
    if implementation == f"{PREFIX}flex":
        mask = block_mask(layout, length)
    elif implementation.endswith("eager"):
        mask = as_numbers(visible(layout, length)[:, None], dtype)
    else:
        mask = visible(layout, length)[:, None]
    setattr(mask, LAYOUT, layout)
    return mask


def as_numbers(mask: Bool[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """A boolean mask as eager attention takes it: numbers that are added to the scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def layout_behind(mask: object) -> Layout | None:
    """The layout that a mask was made of, if it was."""
    return mask if is_layout(mask) else getattr(mask, LAYOUT, None)


def read_places(layout: Layout, length: int) -> Int[Tensor, " places"]:
    """Positions of response tokens and of the prompt's last one, in the rows laid end to end."""
    is_read = segments(layout, length) > 0
    row = torch.arange(len(layout), device=layout.device)
    is_read[row, layout[:, 0, 0, 1] - 1] = True  # predicts the first token of each response
    return is_read.flatten().nonzero()[:, 0]


def block_mask(layout: Layout, length: int) -> BlockMask:
    """For FlexAttention, which leaves out blocks of keys that nobody sees."""
    part = segments(layout, length)
    is_seen = lambda row, head, query, key: sees(part[row, query], part[row, key], query, key)
    on_cuda = layout.device.type == "cuda"
    return create_block_mask(is_seen, len(layout), None, length, length, device=str(layout.device), _compile=on_cuda)


def reads_responses(attention: nn.Module) -> bool:
    """Whether a `ReadsResponses` marks this module."""
    return getattr(attention, "catpo_reads_responses", False)


class ReadsResponses:
    """Marks an attention module of whose prompt only the last token's output is read, until it is removed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        module.catpo_reads_responses = True  # type: ignore[assignment]

    def remove(self) -> None:
        """The module is as it was."""
        del self.module.catpo_reads_responses


def attend(
    fused: Fused, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Layout, options: dict[str, Any]
) -> tuple[Float[Tensor, "rows length heads size"], None]:
    """Part by part: prompt and first response as one sequence, each further response against the prompt's keys and its own."""
    inputs = zip(query.split(1), key.split(1), value.split(1), layout[:, 0].tolist(), strict=True)
    return torch.cat([_attend_row(fused, module, *row, options) for row in inputs]), None


def _attend_row(
    fused: Fused, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, parts: list[list[int]], options: dict[str, Any]
) -> Float[Tensor, "1 length heads size"]:
    (start, split), (_, beside), *others = parts
    at = lambda tensor, begin, end: tensor[:, :, begin:end]
    first = split - 1 if reads_responses(module) else start
    # the first response stands right behind the prompt: one causal sequence
    outputs = [_causal(fused, module, at(query, first, beside), at(key, start, beside), at(value, start, beside), options)]
    for begin, end in others:
        if begin == end:  # there is no such part: a row may hold one response
            continue
        keys, values = (torch.cat([at(each, start, split), at(each, begin, end)], dim=2) for each in (key, value))
        outputs.append(_causal(fused, module, at(query, begin, end), keys, values, options))
    after = query.shape[2] - parts[-1][1]
    blank = lambda count: outputs[0].new_zeros(1, count, *outputs[0].shape[2:])
    return torch.cat([blank(first), *outputs, blank(after)], dim=1)


def _causal(
    fused: Fused, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Float[Tensor, "1 queries heads size"]:
    """Attention of the last queries of a sequence to all of it up to themselves."""
    queries, keys = query.shape[2], key.shape[2]
    mask = None if queries == keys else torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return fused(module, query, key, value, None if mask is None else mask[None, None], **options)[0]
