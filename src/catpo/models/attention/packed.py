"""Attention over packed rows `[prompt | chosen | rejected]`: a response sees the prompt and itself, and only that is computed.

A layout says where the parts of each row are. It is an integer tensor with four axes, so transformers passes it on to the
attention function like a finished mask, also in checkpointed layers. Knows nothing of pairs, families or files.
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
"""Begins the names of attention functions that take a layout; the name of the one underneath follows."""
LAYOUT = "catpo_layout"
"""Attribute of a mask: the layout it was made from."""
Fused = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention function as transformers calls it: outputs are [rows, tokens, heads, size]."""


def layout_of(rows: Sequence[Sequence[tuple[int, int]]]) -> Layout:
    """Parts of every row, prompt first, as (start, end)."""
    return torch.tensor(rows, dtype=torch.long)[:, None]


def is_layout(mask: object) -> TypeGuard[Layout]:
    """Whether an attention mask is a layout: other masks are boolean, or numbers to add."""
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
    """The mask that the decoder's attention function takes: the layout, a block mask, numbers to add, or booleans."""
    if implementation == f"{PREFIX}sdpa" and layout.device.type == "cpu":
        return layout
    is_flex = implementation == f"{PREFIX}flex"
    mask = block_mask(layout, length) if is_flex else dense_mask(implementation, visible(layout, length)[:, None], dtype)
    setattr(mask, LAYOUT, layout)  # the last layer looks it up
    return mask


def dense_mask(implementation: str, visible: Bool[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Booleans for fused attention; for eager attention, numbers that are added to the scores."""
    if not implementation.endswith("eager"):
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def layout_behind(mask: object) -> Layout | None:
    """The layout that a mask is or was made from, if any."""
    return mask if is_layout(mask) else getattr(mask, LAYOUT, None)


def read_positions(layout: Layout, length: int) -> Int[Tensor, " positions"]:
    """Positions of response tokens and of the prompt's last one, in the rows laid end to end."""
    is_read = segments(layout, length) > 0
    row = torch.arange(len(layout), device=layout.device)
    is_read[row, layout[:, 0, 0, 1] - 1] = True  # predicts the first token of each response
    return is_read.flatten().nonzero()[:, 0]


def block_mask(layout: Layout, length: int) -> BlockMask:
    """For FlexAttention, which skips blocks of keys that no query sees."""
    part = segments(layout, length)
    # a lambda: create_block_mask counts its arguments, and the tests' type checks would wrap a function
    is_seen = lambda row, head, query, key: sees(part[row, query], part[row, key], query, key)
    on_cuda = layout.device.type == "cuda"
    return create_block_mask(is_seen, len(layout), None, length, length, device=str(layout.device), _compile=on_cuda)


def reads_responses(attention: nn.Module) -> bool:
    """Whether a `ReadsResponses` marks this module."""
    return getattr(attention, "catpo_reads_responses", False)


class ReadsResponses:
    """Marks an attention module whose output is read only at responses and at the prompt's last token, until `remove`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        module.catpo_reads_responses = True  # type: ignore[assignment]

    def remove(self) -> None:
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
    (start, prompt_end), (_, first_end), *others = parts
    first_query = prompt_end - 1 if reads_responses(module) else start
    # the first response comes right after the prompt: one causal sequence
    sequence = slice(start, first_end)
    queries = query[:, :, first_query:first_end]
    outputs = [_causal(fused, module, queries, key[:, :, sequence], value[:, :, sequence], options)]
    for begin, end in others:
        if begin == end:  # an empty part: the row has one response
            continue
        keys = torch.cat([key[:, :, start:prompt_end], key[:, :, begin:end]], dim=2)
        values = torch.cat([value[:, :, start:prompt_end], value[:, :, begin:end]], dim=2)
        outputs.append(_causal(fused, module, query[:, :, begin:end], keys, values, options))
    output = torch.cat(outputs, dim=1)  # (1, query, head, size)
    return nn.functional.pad(output, (0, 0, 0, 0, first_query, query.shape[2] - parts[-1][1]))  # zeros where nothing is read


def _causal(
    fused: Fused, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Float[Tensor, "1 queries heads size"]:
    """Causal attention of the last queries of a sequence."""
    queries, keys = query.shape[2], key.shape[2]
    mask = None if queries == keys else torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return fused(module, query, key, value, None if mask is None else mask[None, None], **options)[0]
