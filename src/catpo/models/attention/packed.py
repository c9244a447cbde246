"""Attention over rows that are trees: a prompt and its leaves, e.g. `[prompt | chosen | rejected]`.

A leaf sees the prompt, up to where it hangs, and itself, and only that is computed.

A layout says where the parts of each row are. It is an integer tensor with four axes, so transformers passes it on to the
attention function like a finished mask, also in checkpointed layers. Knows nothing of pairs, families or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Layout = Int[Tensor, "rows 1 parts 3"]
"""As `Part`, the prompt first; all zeros where a row has fewer parts than another."""
Part = tuple[int, int, int]
"""First position, the one after the last, and the one up to which the prompt is seen: its end, or where a leaf hangs."""
BUNDLE = 4
"""Short leaves that hang at the same place are computed together, if their tokens are at most this part of those they see."""
PREFIX = "catpo_"
"""Begins the names of attention functions that take a layout; the name of the one underneath follows."""
PARTS = "catpo_parts"
"""Attribute of a layout: the same as lists, since reading them off a GPU would stop the host in every layer."""
READ_AT = "catpo_read_at"
"""Attribute of a mask of packed rows: `read_positions`."""
TRIANGLES = "catpo_triangles"
"""Attribute of a layout on a GPU: the masks of its leaves, which all layers share."""
Fused = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention function as transformers calls it: outputs are [rows, tokens, heads, size]."""


def layout_of(rows: Sequence[Sequence[Part]]) -> Layout:
    """Parts of every row, prompt first."""
    most = max(map(len, rows))
    return torch.tensor([[*parts, *[(0, 0, 0)] * (most - len(parts))] for parts in rows], dtype=torch.long)[:, None]


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


def hangs(layout: Layout, part: Int[Tensor, "rows length"]) -> Int[Tensor, "rows length"]:
    """Position up to which each token sees the prompt, by the number of its part."""
    return layout[:, 0, :, 2].gather(1, part.clamp(min=0))


def sees(query_part: Tensor, key_part: Tensor, hang: Tensor, query: Tensor, key: Tensor) -> Bool[Tensor, ...]:
    """Whether a query sees a key: an earlier one of its own part, or of the prompt before position `hang`. Padding sees itself,
    so no row is empty.
    """
    earlier = (key <= query) & (query_part >= 0) & (key_part >= 0)
    return (earlier & (((key_part == 0) & (key < hang)) | (key_part == query_part))) | (query == key)


def visible(
    layout: Layout, length: int, positions: Int[Tensor, "rows tokens"] | None = None
) -> Bool[Tensor, "rows tokens length"]:
    """Which keys the queries at `positions` (all, if left out) see."""
    part = segments(layout, length)
    key = torch.arange(length, device=layout.device)
    query = key.expand(len(part), length) if positions is None else positions
    own = part.gather(1, query)
    return sees(own[:, :, None], part[:, None], hangs(layout, own)[:, :, None], query[:, :, None], key)


def mask_for(
    implementation: str,
    layout: Layout,
    length: int,
    dtype: torch.dtype,
    *,
    parts: Sequence[Sequence[Part]] | None = None,
    read_at: Int[Tensor, " positions"] | None = None,
) -> Layout | Tensor | BlockMask:
    """The mask that the decoder's attention function takes: the layout, a block mask, numbers to add, or booleans.

    `parts` are the layout as lists, and `read_at` its `read_positions`, where they are known.
    """
    mask: Layout | Tensor | BlockMask = layout
    if implementation == f"{PREFIX}flex":
        mask = block_mask(layout, length)
    elif implementation != f"{PREFIX}sdpa":  # which computes part by part
        mask = dense_mask(implementation, visible(layout, length)[:, None], dtype)
    setattr(layout, PARTS, parts)
    setattr(mask, READ_AT, read_at)  # the last layer looks it up
    return mask


def dense_mask(implementation: str, visible: Bool[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Booleans for fused attention; for eager attention, numbers that are added to the scores."""
    return additive(visible, dtype) if implementation.endswith("eager") else visible


def additive(visible: Bool[Tensor, ...], dtype: torch.dtype) -> Float[Tensor, ...]:
    """Numbers to add to the scores: 0 where a key is seen. A GPU's kernels take them as they are, and make them of booleans
    in every layer anew, to keep them for the backward pass; rows begin at multiples of eight, else the kernels copy them too.
    """
    *shape, keys = visible.shape
    numbers = torch.zeros(*shape, -(-keys // 8) * 8, dtype=dtype, device=visible.device)[..., :keys]
    return numbers.masked_fill_(~visible, torch.finfo(dtype).min)


def ready(mask: Any, dtype: torch.dtype) -> Any:
    """A finished mask, or one for each kind of layers, as the kernels of its device take it best."""
    if isinstance(mask, dict):
        return {kind: ready(each, dtype) for kind, each in mask.items()}
    is_dense = isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.bool
    return additive(mask, dtype) if is_dense and mask.device.type != "cpu" else mask


def read_at(mask: object) -> Int[Tensor, " positions"] | None:
    """Where a mask says that the output of the last layer is read; None is everywhere."""
    return getattr(mask, READ_AT, None)


def read_positions(rows: Sequence[Sequence[Part]], length: int) -> Int[Tensor, " positions"]:
    """Positions of the leaves' tokens and of the prompt's last one, in the rows laid end to end; `rows` are their parts."""
    positions = []
    for row, ((_, prompt_end, _), *leaves) in enumerate(rows):
        start = row * length
        positions.append(start + prompt_end - 1)  # predicts the first token of each response
        for begin, end, _ in leaves:
            positions += range(start + begin, start + end)
    return torch.tensor(positions, dtype=torch.long)


def block_mask(layout: Layout, length: int) -> BlockMask:
    """For FlexAttention, which skips blocks of keys that no query sees."""
    part = segments(layout, length)
    hang = hangs(layout, part)
    # a lambda: create_block_mask counts its arguments, and the tests' type checks would wrap a function
    is_seen = lambda row, head, query, key: sees(part[row, query], part[row, key], hang[row, query], query, key)
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
    """Part by part: prompt and first leaf as one sequence, further leaves against their own keys and those they see."""
    call = _Call(fused, module, getattr(layout, PARTS, None) or layout[:, 0].tolist(), layout, options)
    rows = zip(query.split(1), key.split(1), value.split(1), call.parts, strict=True)
    return torch.cat([call.row(*row) for row in rows]), None


@dataclass(frozen=True)
class _Call:
    """One call of the attention function in a layer."""

    fused: Fused
    module: nn.Module
    parts: Sequence[Sequence[Part]]
    layout: Layout
    options: dict[str, Any]

    def row(self, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Part]) -> Float[Tensor, "1 length heads size"]:
        (start, prompt_end, _), *leaves = parts
        first_query, sequence_end = prompt_end - 1 if reads_responses(self.module) else start, prompt_end
        if leaves and leaves[0][0] == leaves[0][2] == prompt_end:  # the first response comes right after the prompt
            sequence_end = leaves.pop(0)[1]
        sequence = slice(start, sequence_end)
        queries = sequence_end - first_query
        outputs = [self._causal(query[:, :, first_query:sequence_end], key[:, :, sequence], value[:, :, sequence], (queries,))]
        for bundle in _bundles(leaves, start):
            begin, end, hang = bundle[0][0], bundle[-1][1], bundle[0][2]
            keys = torch.cat([key[:, :, start:hang], key[:, :, begin:end]], dim=2)
            values = torch.cat([value[:, :, start:hang], value[:, :, begin:end]], dim=2)
            lengths = tuple(leaf_end - leaf for leaf, leaf_end, _ in bundle)
            outputs.append(self._causal(query[:, :, begin:end], keys, values, lengths))
        output = torch.cat(outputs, dim=1)  # (1, query, head, size)
        after = query.shape[2] - first_query - output.shape[1]
        return nn.functional.pad(output, (0, 0, 0, 0, first_query, after))  # zeros where nothing is read

    def _causal(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]
    ) -> Float[Tensor, "1 queries heads size"]:
        """Causal attention of leaves of these lengths, the last of the keys; of one whole sequence it needs no mask."""
        keys = key.shape[2]
        mask = None if lengths == (keys,) else self._mask(lengths, keys, query)
        return self.fused(self.module, query, key, value, mask, **self.options)[0]

    def _mask(self, lengths: tuple[int, ...], keys: int, query: Tensor) -> Tensor:
        """Which keys the queries see, [1, 1, queries, keys]."""
        if query.device.type == "cpu":
            return _triangles(lengths, keys, query.device)
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        known = vars(self.layout).setdefault(TRIANGLES, {})
        if (lengths, keys, dtype) not in known:
            known[lengths, keys, dtype] = additive(_triangles(lengths, keys, query.device), dtype)
        return known[lengths, keys, dtype]


def _bundles(leaves: Sequence[Part], start: int) -> Iterator[list[Part]]:
    """Leaves that are computed together: side by side, at the same place, and short beside what they see; no empty ones."""
    bundle: list[Part] = []
    for leaf in leaves:
        begin, end, hang = leaf
        if begin == end:
            continue
        if bundle and (hang != bundle[0][2] or begin != bundle[-1][1] or BUNDLE * (end - bundle[0][0]) > hang - start):
            yield bundle
            bundle = []
        bundle.append(leaf)
    if bundle:
        yield bundle


def _triangles(lengths: tuple[int, ...], keys: int, device: torch.device) -> Bool[Tensor, "1 1 queries keys"]:
    """The last queries of a sequence in leaves of these lengths: each sees itself, and all keys before the first leaf."""
    queries = sum(lengths)
    triangle = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    start = end = keys - queries
    for length in lengths:  # a later leaf does not see an earlier one
        start, end = end, end + length
        triangle[end - keys + queries :, start:end] = False
    return triangle[None, None]
