"""Pairs as model input: one row per pair, `[prompt | chosen | rejected]`, and the model's forward pass on such rows.

Rejected tokens do not see chosen tokens and their positions restart after the prompt, so picture and prompt run once.
Knows nothing of losses, rewards or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
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
HOST_INPUTS = ("image_sizes", "batch_num_images")
"""Model inputs that transformers reads number by number: on a GPU, the host would wait for each. They stay on the host as NumPy
arrays, which nothing moves.
"""


def pack(family: Family, encoded: Sequence[Encoded], *, prefix: Prefix = "shared") -> Batch:
    """Encoded pairs as one batch, padded on the right.

    `prefix='separate'` gives chosen and rejected rows of their own (twice the picture): for families that cannot share, and to
    test against. Shapes: `row` [pairs, 2]; `tokens_at`, `predictors`, `token_ids`, `mask` [pairs, 2, tokens]; `patches`
    [rows, patches]. Positions are those in the row, -1 in padding. `padding` is each row's share of padding, `parts` lists its
    parts, and `read_at` are the positions whose outputs are read, in the rows laid end to end.
    """
    row_sides: list[tuple[Side, ...]] = [SIDES] if prefix == "shared" else [(side,) for side in SIDES]
    rows = [_row(family, pair, sides) for pair in encoded for sides in row_sides]
    responses = [(number, row.spans[side]) for number, row in enumerate(rows) for side in row.spans]
    tokens_at = pad_indices([span for _, span in responses])
    predictors = pad_indices([rows[number].predictors(span) for number, span in responses])
    response_ids = pad_indices([pair.response_ids[side] for pair in encoded for side in SIDES], fill=0)
    segments = pad_indices([row.segments for row in rows])
    model_inputs: Batch = {
        "input_ids": pad_indices([row.ids for row in rows], fill=0),
        "attention_mask": _attention(family, rows, segments) if prefix == "shared" else (segments >= 0).long(),
        **{name: pad_indices([row.inputs[name] for row in rows], fill=0) for name in rows[0].inputs},
        **family.join_pixels([row.source.pixels for row in rows]),
    }
    positions = [row.positions for row in rows if row.positions is not None]
    if positions:
        padded = [F.pad(each, (0, segments.shape[1] - each.shape[-1])) for each in positions]
        model_inputs["position_ids"] = torch.stack(padded, dim=-2)  # (*axes, row, token)
    pairs = len(encoded)
    batch: Batch = {
        "model_inputs": model_inputs,
        "row": torch.tensor([number for number, _ in responses]).view(pairs, 2),
        "tokens_at": tokens_at.view(pairs, 2, -1),
        "predictors": predictors.view(pairs, 2, -1),
        "token_ids": response_ids.view(pairs, 2, -1),
        "mask": (tokens_at >= 0).view(pairs, 2, -1),
        "patches": pad_indices([row.source.patches for row in rows]),
        "host_inputs": {name: model_inputs.pop(name).numpy() for name in HOST_INPUTS if name in model_inputs},
        "padding": (segments < 0).float().mean(1),
        "parts": [row.parts for row in rows],
        "read_at": packed.read_positions([row.parts for row in rows], segments.shape[1]),
        "pair_ids": [pair.pair_id for pair in encoded],
    }
    return batch | flat_tokens(batch)


def flat_tokens(batch: Batch) -> Batch:
    """The response tokens one after another, in the order (pair, side, token): `flat_ids`, and `flat_predictors`, the
    positions that predict them in rows laid end to end. Made where batches are made: on a GPU, choosing by `mask` would make
    the host wait.
    """
    mask, length = batch["mask"], batch["model_inputs"]["input_ids"].shape[1]
    positions = batch["row"][:, :, None] * length + batch["predictors"]
    return {"flat_ids": batch["token_ids"][mask], "flat_predictors": positions[mask]}


@dataclass(frozen=True)
class _Row:
    """One row before padding."""

    source: Encoded
    spans: dict[Side, range]
    """Where each response stands."""
    ids: list[int]
    segments: list[int]
    """0 prompt, 1 chosen, 2 rejected."""
    index: list[int]
    """Index of each token in its own sequence: every response starts again where the prompt ended."""
    positions: Int[Tensor, "*axes length"] | None
    """Position ids; None leaves them to the model."""
    blocks: list[int]
    """Tokens of the same block >= 0 see each other in both directions."""
    inputs: dict[str, list[int]]
    """Further model inputs with one value per token."""

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Start and end of the prompt and of each response."""
        return [(0, len(self.source.prompt_ids)), *((span.start, span.stop) for span in self.spans.values())]

    def predictors(self, span: range) -> list[int]:
        """Position whose hidden state predicts the token: the one before, or the prompt's last for a first token."""
        return [len(self.source.prompt_ids) - 1, *span][: len(span)]


def _row(family: Family, encoded: Encoded, sides: tuple[Side, ...]) -> _Row:
    prompt = len(encoded.prompt_ids)
    ids, segments, index = list(encoded.prompt_ids), [0] * prompt, list(range(prompt))
    spans: dict[Side, range] = {}
    for side in sides:
        response = encoded.response_ids[side]
        spans[side] = range(len(ids), len(ids) + len(response))
        ids += response
        segments += [SIDES.index(side) + 1] * len(response)
        index += range(prompt, prompt + len(response))
    count = len(ids) - prompt
    inputs = {}
    for name, values in encoded.prompt_inputs.items():
        inputs[name] = [*values, *[family.response_inputs.get(name, 0)] * count]
    blocks = [*family.prompt_blocks(encoded), *[-1] * count]
    positions = _positions(family.prompt_positions(encoded), index)
    return _Row(encoded, spans, ids, segments, index, positions, blocks, inputs)


def _positions(prompt: Int[Tensor, "*axes prompt"] | None, index: Sequence[int]) -> Int[Tensor, "*axes length"] | None:
    """Every response continues one step after the furthest position of the prompt, on all axes."""
    if prompt is None:
        return None
    start = prompt.shape[-1]
    response = torch.tensor(index[start:], dtype=torch.long) - start + int(prompt.max()) + 1
    return torch.cat([prompt, response.expand(*prompt.shape[:-1], -1)], dim=-1)


def _attention(family: Family, rows: Sequence[_Row], segments: Int[Tensor, "rows length"]) -> Any:
    """The layout of the rows if it says everything; else a mask of which key each query sees."""
    blocks, index = pad_indices([row.blocks for row in rows]), pad_indices([row.index for row in rows], fill=0)
    if int(blocks.max()) < 0 and family.window(index) is None:
        return packed.layout_of([row.parts for row in rows])
    position = torch.arange(segments.shape[1])
    causal = packed.sees(segments[:, :, None], segments[:, None], position[:, None], position)
    same_block = (blocks[:, :, None] == blocks[:, None]) & (blocks[:, :, None] >= 0)
    return family.attention_masks((causal | same_block)[:, None], index)


# ---- the model on a batch -------------------------------------------------------------------------------------------------


def response_hidden(last_hidden: Float[Tensor, "rows length width"], batch: Batch) -> Float[Tensor, "flat width"]:
    """Final hidden states that predict the response tokens, flat in the order (pair, side, token)."""
    return last_hidden.flatten(0, 1)[batch["flat_predictors"]]


def unflatten(values: Float[Tensor, " flat"], mask: Bool[Tensor, "pairs 2 tokens"]) -> Float[Tensor, "pairs 2 tokens"]:
    """From flat response tokens back to (pair, side, token), 0 in the padding."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def run_backbone(model: Any, batch: Batch, **options: Any) -> Any:
    """The model without its output head on a batch's rows."""
    on_host = {name: torch.from_numpy(values) for name, values in batch["host_inputs"].items()}
    return model.base_model(**model_inputs(model, batch), **on_host, use_cache=False, **options)


def model_inputs(model: Any, batch: Batch) -> Batch:
    """A batch's inputs with the mask that the decoder's attention takes."""
    inputs: Batch = batch["model_inputs"]
    mask, dtype = inputs["attention_mask"], model.dtype
    device = inputs["input_ids"].device.type
    if device != "cpu" and torch.is_autocast_enabled(device):  # else every layer would cast the mask again
        dtype = torch.get_autocast_dtype(device)
    if not packed.is_layout(mask):
        return {**inputs, "attention_mask": packed.ready(mask, dtype)}
    implementation, length = model.config.get_text_config()._attn_implementation, inputs["input_ids"].shape[1]
    made = packed.mask_for(implementation, mask, length, dtype, parts=batch["parts"], read_at=batch["read_at"])
    return {**inputs, "attention_mask": made}


def hidden_and_logps(model: Any, batch: Batch) -> tuple[Float[Tensor, "flat width"], Float[Tensor, " flat"]]:
    """Final hidden states that predict the response tokens, and the tokens' log-probs."""
    hidden = response_hidden(run_backbone(model, batch).last_hidden_state, batch)
    return hidden, at_head(model, hidden, token_stats, batch["flat_ids"]).logps


def size_of(batch: Batch) -> str:
    """How large a batch is, in words."""
    rows, tokens = batch["model_inputs"]["input_ids"].shape
    return f"{len(batch['pair_ids'])} pairs ({rows} rows of {tokens:,} tokens)"
