"""Pairs as model input: one row per pair, `[prompt | chosen | rejected]`, with weights and reference looked up in the store.

Rejected tokens do not see chosen tokens and their positions restart after the prompt, so picture and prompt run once.
Knows nothing of losses or of how training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catpo.core.types import SIDES, Side
from catpo.models.attention import packed
from catpo.models.family import Encoded, Family
from catpo.models.output_head import at_head, token_stats
from catpo.models.tensors import pad_indices

Batch = dict[str, Any]
"""Nested tensors: `model_inputs`, and per (pair, side, token) `row`, `tokens_at`, `predictors`, `token_ids`, `mask`, …"""


Prefix = Literal["shared", "separate"]


def pack(family: Family, encoded: Sequence[Encoded], *, prefix: Prefix = "shared", padding_side: str = "right") -> Batch:
    """Encoded pairs as one batch.

    `prefix='separate'` gives chosen and rejected rows of their own (twice the picture): for families that cannot share, and to
    test against. Shapes: `row` [pairs, 2]; `tokens_at`, `predictors`, `token_ids`, `mask` [pairs, 2, tokens]; `patches`
    [rows, patches]; positions are those in the padded row, -1 where there is none. `padding` is the share of each row that is.
    """
    rows = [row for each in encoded for row in _rows(family, each, prefix)]
    length = max(len(row.ids) for row in rows)
    shift = [length - len(row.ids) if padding_side == "left" else 0 for row in rows]
    sides = [(number, side) for number, row in enumerate(rows) for side in row.sides]
    moved = lambda positions, number: [position + shift[number] for position in positions]
    padded = lambda rows, fill: pad_indices([[fill] * begin + row for begin, row in zip(shift, rows, strict=True)], fill=fill)
    tokens_at = pad_indices([moved(rows[number].tokens_at[side], number) for number, side in sides])
    predictors = pad_indices([moved(rows[number].predictors[side], number) for number, side in sides])
    response_ids = pad_indices([each.response_ids[side] for each in encoded for side in SIDES], fill=0)
    segments = padded([row.segments for row in rows], -1)
    model_inputs: Batch = {
        "input_ids": padded([row.ids for row in rows], 0),
        "attention_mask": (segments >= 0).long(),
        **{name: padded([row.inputs[name] for row in rows], 0) for name in rows[0].inputs},
        **family.join_pixels([row.source.pixels for row in rows]),
    }
    positions = [row.positions for row in rows if row.positions is not None]
    if positions:
        model_inputs["position_ids"] = _padded_positions(positions, shift, length)
    if prefix == "shared":
        model_inputs["attention_mask"] = _attention(family, rows, shift, segments, padded)
    pairs = len(encoded)
    return {
        "model_inputs": model_inputs,
        "row": torch.tensor([number for number, _ in sides]).view(pairs, 2),
        "tokens_at": tokens_at.view(pairs, 2, -1),
        "predictors": predictors.view(pairs, 2, -1),
        "token_ids": response_ids.view(pairs, 2, -1),
        "mask": (tokens_at >= 0).view(pairs, 2, -1),
        "patches": pad_indices([moved(row.source.patches, number) for number, row in enumerate(rows)]),
        "padding": (segments < 0).float().mean(1),
        "pair_ids": [each.pair_id for each in encoded],
    }


@dataclass(frozen=True)
class _Row:
    """One row before padding; places count from its start."""

    source: Encoded
    sides: tuple[Side, ...]
    ids: list[int]
    segments: list[int]
    """0 prompt, 1 chosen, 2 rejected."""
    index: list[int]
    """Place of each token in its own sequence: every response starts again where the prompt ended."""
    blocks: list[int]
    """Tokens of the same block >= 0 see each other whatever their order."""
    positions: Int[Tensor, "*axes length"] | None
    """Position ids; None leaves them to the model."""
    inputs: dict[str, list[int]]
    """Further model inputs with one value per token."""

    @property
    def tokens_at(self) -> dict[Side, list[int]]:
        """Where each response stands."""
        number = {side: SIDES.index(side) + 1 for side in self.sides}
        return {side: [at for at, segment in enumerate(self.segments) if segment == number[side]] for side in self.sides}

    def parts(self, begin: int) -> list[tuple[int, int]]:
        """Start and end of the prompt and of each response, in a row that `begin` places of padding precede."""
        ends = np.cumsum([len(self.source.prompt_ids), *(len(self.source.response_ids[side]) for side in self.sides)])
        return list(pairwise([begin, *(begin + int(end) for end in ends)]))

    @property
    def predictors(self) -> dict[Side, list[int]]:
        """Position whose hidden state predicts the token: the one before, or the prompt's last for a first token."""
        last = len(self.source.prompt_ids) - 1
        return {side: [last, *places[:-1]] for side, places in self.tokens_at.items()}


def _rows(family: Family, encoded: Encoded, prefix: Prefix) -> list[_Row]:
    """One row with both responses, or one for each."""
    sides: list[tuple[Side, ...]] = [SIDES] if prefix == "shared" else [(side,) for side in SIDES]
    return [_row(family, encoded, each) for each in sides]


def _row(family: Family, encoded: Encoded, sides: tuple[Side, ...]) -> _Row:
    start = len(encoded.prompt_ids)
    responses = [(SIDES.index(side) + 1, encoded.response_ids[side]) for side in sides]
    count = sum(len(ids) for _, ids in responses)
    index = [*range(start), *(start + place for _, ids in responses for place in range(len(ids)))]
    fill = {name: [family.response_inputs.get(name, 0)] * count for name in encoded.prompt_inputs}
    return _Row(
        source=encoded,
        sides=sides,
        ids=[*encoded.prompt_ids, *(token for _, ids in responses for token in ids)],
        segments=[0] * start + [number for number, ids in responses for _ in ids],
        index=index,
        blocks=[*family.prompt_blocks(encoded), *[-1] * count],
        positions=_positions(family.prompt_positions(encoded), index),
        inputs={name: [*values, *fill[name]] for name, values in encoded.prompt_inputs.items()},
    )


def _positions(prompt: Int[Tensor, "*axes prompt"] | None, index: Sequence[int]) -> Int[Tensor, "*axes length"] | None:
    """Every response goes on one step after the furthest position of the prompt, on all axes."""
    if prompt is None:
        return None
    start = prompt.shape[-1]
    response = torch.tensor(index[start:], dtype=torch.long) - start + int(prompt.max()) + 1
    return torch.cat([prompt, response.expand(*prompt.shape[:-1], -1)], dim=-1)


def _padded_positions(rows: Sequence[Tensor], shift: Sequence[int], length: int) -> Int[Tensor, "*axes rows length"]:
    table = torch.zeros(*rows[0].shape[:-1], len(rows), length, dtype=torch.long)
    for number, (row, begin) in enumerate(zip(rows, shift, strict=True)):
        table[..., number, begin : begin + row.shape[-1]] = row
    return table


def _attention(
    family: Family, rows: Sequence[_Row], shift: Sequence[int], segments: Tensor, padded: Callable[..., Tensor]
) -> Any:
    """Where the parts of the rows stand, if that is all there is to say; else a mask of which key each query sees."""
    blocks, index = padded([row.blocks for row in rows], -1), padded([row.index for row in rows], 0)
    if int(blocks.max()) < 0 and family.window(index) is None:
        return packed.layout_of([row.parts(begin) for row, begin in zip(rows, shift, strict=True)])
    return family.attention_masks(_visible(segments, blocks), index)


def _visible(segments: Int[Tensor, "rows length"], blocks: Int[Tensor, "rows length"]) -> Bool[Tensor, "rows 1 length length"]:
    """Which key each query sees: earlier ones of its own segment and of the prompt, and all of its block.

    Padding sees itself, so that no row is empty.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = causal & (key >= 0) & (query >= 0) & ((key == 0) | (key == query))
    block = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] >= 0)
    return (own | block | torch.eye(length, dtype=torch.bool))[:, None]


def to_device(batch: Any, device: torch.device) -> Any:
    """Nested tensors on a device; what is no tensor stays."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {name: to_device(value, device) for name, value in batch.items()} if isinstance(batch, dict) else batch


# ---- the model on a batch -------------------------------------------------------------------------------------------------


def response_hidden(last_hidden: Float[Tensor, "rows length width"], batch: Batch) -> Float[Tensor, "flat width"]:
    """Final hidden states that predict the response tokens, flat in the order (pair, side, token)."""
    mask = batch["mask"]
    rows = batch["row"][:, :, None].expand_as(mask)[mask]
    return last_hidden[rows, batch["predictors"][mask]]


def unflatten(values: Float[Tensor, " flat"], mask: Bool[Tensor, "pairs 2 tokens"]) -> Float[Tensor, "pairs 2 tokens"]:
    """From flat response tokens back to (pair, side, token), 0 in the padding."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def run_backbone(model: Any, batch: Batch, **options: Any) -> Any:
    """The model without its output head on a batch's rows."""
    return model.base_model(**model_inputs(model, batch), use_cache=False, **options)


def model_inputs(model: Any, batch: Batch) -> Batch:
    """A batch's inputs with the mask that the decoder's attention takes."""
    inputs: Batch = batch["model_inputs"]
    layout = inputs["attention_mask"]
    if not packed.is_layout(layout):
        return inputs
    implementation = model.config.get_text_config()._attn_implementation
    return {**inputs, "attention_mask": packed.mask_for(implementation, layout, inputs["input_ids"].shape[1], model.dtype)}


def hidden_and_logps(model: Any, batch: Batch) -> tuple[Float[Tensor, "flat width"], Float[Tensor, " flat"]]:
    """Final hidden states that predict the response tokens, and the tokens' log-probs."""
    hidden = response_hidden(run_backbone(model, batch).last_hidden_state, batch)
    return hidden, at_head(model, hidden, token_stats, batch["token_ids"][batch["mask"]]).logps
