"""Pairs as model input: rows that are trees, `[prompt | chosen | rejected]`, and the model's forward pass on such rows.

A leaf does not see another and its positions restart after what it hangs on, so picture and prompt run once. Pairs of one
prompt share a row, in which each response stands once; questions about the same pictures hang beside the responses. Knows
nothing of losses, rewards or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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

    Pairs that share their prompt (`Family.encode_all`) stand in one row, where that makes the batch no longer; equal
    responses of theirs are one leaf. `prefix='separate'` gives each response a row of its own: for families that cannot
    share, and to test against.

    Shapes: `row`, `leaf` [pairs, 2]; `tokens_at`, `predictors`, `token_ids`, `mask` [pairs, 2, tokens]; `leaf_tokens_at`,
    `leaf_predictors` [rows, leaves, tokens]; `patches` [rows, patches]; `asked_at` [questions], see `Encoded.questions`.
    Positions are those in the row, -1 in padding; `read_at`, all whose outputs are read, and `asked_at` count through the rows
    laid end to end. `padding` is the share of it in each pair's rows, `parts` lists each row's parts, `responses` names the
    pair and side that each leaf stands for.
    """
    rows = _shared(family, encoded) if prefix == "shared" else _separate(family, encoded)
    leaf_count = max(len(row.responses) for row in rows)
    spans = [(row, span) for row in rows for span in row.response_spans(leaf_count)]
    tokens_at = pad_indices([span for _, span in spans]).view(len(rows), leaf_count, -1)
    predictors = pad_indices([row.predictors(span) for row, span in spans]).view(len(rows), leaf_count, -1)
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
    row, leaf = _places(rows, pairs)
    batch: Batch = {
        "model_inputs": model_inputs,
        "row": row,
        "leaf": leaf,
        "leaf_tokens_at": tokens_at,
        "leaf_predictors": predictors,
        "tokens_at": tokens_at[row, leaf],
        "predictors": predictors[row, leaf],
        "token_ids": response_ids.view(pairs, 2, -1),
        "mask": tokens_at[row, leaf] >= 0,
        "patches": pad_indices([row.source.patches for row in rows]),
        "asked_at": _asked_at(rows, pairs, segments.shape[1]),
        "host_inputs": {name: model_inputs.pop(name).numpy() for name in HOST_INPUTS if name in model_inputs},
        "padding": (segments < 0).float().mean(1)[row].mean(1),
        "parts": [row.parts for row in rows],
        "read_at": packed.read_positions([row.parts for row in rows], segments.shape[1]),
        "pair_ids": [pair.pair_id for pair in encoded],
        "responses": [(encoded[owners[0][0]].pair_id, owners[0][1]) for row in rows for owners in row.responses],
    }
    return batch | flat_tokens(batch)


def flat_tokens(batch: Batch) -> Batch:
    """The response tokens one after another, those of each leaf once, in the order of the rows, which is that of (pair, side,
    token) unless pairs share responses: `flat_ids`, and `flat_predictors`, the positions that predict them in rows laid end to
    end. `token_of` says which of them each token in the order (pair, side, token) is, and is left out where that is itself.

    Made where batches are made: on a GPU, choosing by `mask` would make the host wait.
    """
    mask, length = batch["mask"], batch["model_inputs"]["input_ids"].shape[1]
    starts = batch["row"][:, :, None] * length
    places, token_of = (starts + batch["tokens_at"])[mask].unique(return_inverse=True)
    ids, predictors = batch["token_ids"][mask], (starts + batch["predictors"])[mask]
    if len(places) == len(ids) and torch.equal(token_of, torch.arange(len(ids))):
        return {"flat_ids": ids, "flat_predictors": predictors}
    flat = {"flat_ids": ids.new_empty(len(places)), "flat_predictors": predictors.new_empty(len(places))}
    flat["flat_ids"][token_of], flat["flat_predictors"][token_of] = ids, predictors
    return {**flat, "token_of": token_of}


@dataclass(frozen=True)
class _Leaf:
    """Tokens that see a row's prompt up to `hangs_at`, and themselves."""

    ids: Sequence[int]
    hangs_at: int


Owner = tuple[int, Side]
"""Index of a pair, and the side whose response it is."""
Asked = tuple[int, int]
"""Index of a pair, and number of its question."""


@dataclass(frozen=True)
class _Row:
    """One row before padding."""

    source: Encoded
    """The pair whose prompt it is."""
    responses: list[list[Owner]]
    """Of each response's leaf, whose it is."""
    asked: list[list[Asked]]
    """Of each further leaf, which questions it is; of the prompt, if the row has no leaf."""
    spans: list[range]
    """Where each leaf stands."""
    ids: list[int]
    segments: list[int]
    """0 prompt, 1, 2, … the leaves."""
    hangs: list[int]
    """Up to where each token sees the prompt."""
    index: list[int]
    """Index of each token in its own sequence: every leaf starts again where it hangs."""
    positions: Int[Tensor, "*axes length"] | None
    """Position ids; None leaves them to the model."""
    blocks: list[int]
    """Tokens of the same block >= 0 see each other in both directions."""
    inputs: dict[str, list[int]]
    """Further model inputs with one value per token."""

    @property
    def prompt_length(self) -> int:
        return len(self.source.prompt_ids)

    @property
    def parts(self) -> list[packed.Part]:
        """Start and end of the prompt and of each leaf, and up to where it sees the prompt."""
        leaves = [(span.start, span.stop, self.hangs[span.start] if span else self.prompt_length) for span in self.spans]
        return [(0, self.prompt_length, self.prompt_length), *leaves]

    def response_spans(self, count: int) -> list[range]:
        """Where the responses stand; empty ones make them `count`."""
        spans = self.spans[: len(self.responses)]
        return spans + [range(0)] * (count - len(spans))

    def predictors(self, span: range) -> list[int]:
        """Position whose hidden state predicts the token: the one before, or the prompt's last for a first token."""
        return [self.prompt_length - 1, *span][: len(span)]

    def asked_positions(self) -> list[int]:
        """Position of the last token of each question."""
        spans = self.spans[len(self.responses) :]
        return [span.stop - 1 for span in spans] or [self.prompt_length - 1]


# ---- which rows a batch has -----------------------------------------------------------------------------------------------


def _shared(family: Family, encoded: Sequence[Encoded]) -> list[_Row]:
    """A row per prompt, or per pair if that makes the batch shorter: a long row among short ones is padding."""
    alone = [[index] for index in range(len(encoded))]
    rows = [_row_of(family, encoded, group) for group in by_prompt(encoded)]
    if len(rows) < len(encoded):
        pairs = [_row_of(family, encoded, group) for group in alone]
        rows = min(rows, pairs, key=_padded_tokens)
    return [*rows, *_rows_of_questions(family, encoded)]


def _padded_tokens(rows: Sequence[_Row]) -> int:
    return len(rows) * max(len(row.ids) for row in rows)


def by_prompt(encoded: Sequence[Encoded]) -> list[list[int]]:
    """Indices of the pairs of each prompt, in their order; only what `encode_all` made once is known to be the same."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, pair in enumerate(encoded):
        groups.setdefault((id(pair.prompt_ids), id(pair.pixels)), []).append(index)
    return list(groups.values())


def row_length(encoded: Sequence[Encoded]) -> int:
    """Tokens of the row that pairs of one prompt share."""
    responses = {tuple(pair.response_ids[side]) for pair in encoded for side in SIDES}
    questions = {(tuple(question.ids), question.hangs_at) for pair in encoded for question in pair.questions}
    return len(encoded[0].prompt_ids) + sum(map(len, responses)) + sum(len(ids) for ids, _ in questions)


def _row_of(family: Family, encoded: Sequence[Encoded], group: Sequence[int]) -> _Row:
    """The row of pairs with one prompt."""
    source = encoded[group[0]]
    owners: dict[tuple[int, ...], list[Owner]] = {}
    for index in group:
        for side in SIDES:
            owners.setdefault(tuple(encoded[index].response_ids[side]), []).append((index, side))
    leaves = [_Leaf(ids, len(source.prompt_ids)) for ids in owners]
    asked: dict[tuple[tuple[int, ...], int], list[Asked]] = {}
    for index in group:
        for number, question in enumerate(encoded[index].questions):
            if question.is_beside:
                asked.setdefault((tuple(question.ids), question.hangs_at), []).append((index, number))
    leaves += [_Leaf(ids, hangs_at) for ids, hangs_at in asked]
    return _row(family, source, list(owners.values()), list(asked.values()), leaves)


def _separate(family: Family, encoded: Sequence[Encoded]) -> list[_Row]:
    """A row per response, and per question."""
    rows = []
    for index, pair in enumerate(encoded):
        for side in SIDES:
            leaf = _Leaf(pair.response_ids[side], len(pair.prompt_ids))
            rows.append(_row(family, pair, [[(index, side)]], [], [leaf]))
    return [*rows, *_rows_of_questions(family, encoded)]


def _rows_of_questions(family: Family, encoded: Sequence[Encoded]) -> list[_Row]:
    """Rows of the questions that cannot stand beside a response."""
    rows = []
    for index, pair in enumerate(encoded):
        for number, question in enumerate(pair.questions):
            if question.alone is not None:
                rows.append(_row(family, question.alone, [], [[(index, number)]], []))
    return rows


def _places(rows: Sequence[_Row], pairs: int) -> tuple[Int[Tensor, "pairs 2"], Int[Tensor, "pairs 2"]]:
    """Row of each response, and its leaf in the row."""
    row, leaf = torch.zeros(pairs, 2, dtype=torch.long), torch.zeros(pairs, 2, dtype=torch.long)
    for number, each in enumerate(rows):
        for place, owners in enumerate(each.responses):
            for index, side in owners:
                row[index, SIDES.index(side)], leaf[index, SIDES.index(side)] = number, place
    return row, leaf


def _asked_at(rows: Sequence[_Row], pairs: int, length: int) -> Int[Tensor, " questions"]:
    """Where the questions end, in the order (pair, question), in rows laid end to end."""
    places: dict[Asked, int] = {}
    for number, row in enumerate(rows):
        for questions, position in zip(row.asked, row.asked_positions(), strict=False):
            places |= dict.fromkeys(questions, number * length + position)
    return torch.tensor([places[question] for question in sorted(places)], dtype=torch.long)


def _row(
    family: Family, source: Encoded, responses: list[list[Owner]], asked: list[list[Asked]], leaves: Sequence[_Leaf]
) -> _Row:
    prompt = len(source.prompt_ids)
    ids, segments, hangs, index = list(source.prompt_ids), [0] * prompt, [prompt] * prompt, list(range(prompt))
    spans = []
    for number, leaf in enumerate(leaves, start=1):
        spans.append(range(len(ids), len(ids) + len(leaf.ids)))
        ids += leaf.ids
        segments += [number] * len(leaf.ids)
        hangs += [leaf.hangs_at] * len(leaf.ids)
        index += range(leaf.hangs_at, leaf.hangs_at + len(leaf.ids))
    inputs = {}
    answered = sum(len(span) for span in spans[: len(responses)])
    for name, values in source.prompt_inputs.items():
        of_questions = [0] * (len(ids) - prompt - answered)
        inputs[name] = [*values, *[family.response_inputs.get(name, 0)] * answered, *of_questions]
    blocks = [*family.prompt_blocks(source), *[-1] * (len(ids) - prompt)]
    positions = _positions(family.prompt_positions(source), leaves)
    return _Row(source, responses, asked, spans, ids, segments, hangs, index, positions, blocks, inputs)


def _positions(prompt: Int[Tensor, "*axes prompt"] | None, leaves: Sequence[_Leaf]) -> Int[Tensor, "*axes length"] | None:
    """Every leaf continues one step after the furthest position of what it sees of the prompt, on all axes."""
    if prompt is None:
        return None
    parts = [prompt]
    for leaf in leaves:
        start = int(prompt[..., : leaf.hangs_at].max()) + 1
        parts.append(torch.arange(start, start + len(leaf.ids)).expand(*prompt.shape[:-1], -1))
    return torch.cat(parts, dim=-1)


def _attention(family: Family, rows: Sequence[_Row], segments: Int[Tensor, "rows length"]) -> Any:
    """The layout of the rows if it says everything; else a mask of which key each query sees."""
    blocks, index = pad_indices([row.blocks for row in rows]), pad_indices([row.index for row in rows], fill=0)
    if int(blocks.max()) < 0 and family.window(index) is None:
        return packed.layout_of([row.parts for row in rows])
    position, hangs = torch.arange(segments.shape[1]), pad_indices([row.hangs for row in rows], fill=0)
    causal = packed.sees(segments[:, :, None], segments[:, None], hangs[:, :, None], position[:, None], position)
    same_block = (blocks[:, :, None] == blocks[:, None]) & (blocks[:, :, None] >= 0)
    return family.attention_masks((causal | same_block)[:, None], index)


# ---- the model on a batch -------------------------------------------------------------------------------------------------


def response_hidden(last_hidden: Float[Tensor, "rows length width"], batch: Batch) -> Float[Tensor, "flat width"]:
    """Final hidden states that predict the response tokens, in the order of `flat_tokens`."""
    return last_hidden.flatten(0, 1)[batch["flat_predictors"]]


def repeated(values: Tensor, batch: Batch) -> Tensor:
    """From each token once to the order (pair, side, token), in which a response of several pairs comes several times."""
    return values[batch["token_of"]] if "token_of" in batch else values


def unflatten(values: Float[Tensor, " flat"], batch: Batch) -> Float[Tensor, "pairs 2 tokens"]:
    """From flat response tokens back to (pair, side, token), 0 in the padding."""
    mask = batch["mask"]
    return values.new_zeros(mask.shape).masked_scatter(mask, repeated(values, batch))


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
