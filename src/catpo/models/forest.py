"""Prefix trees that a model has read, one per row: their keys and values are kept, and any branch can be read on.

A node is a run of tokens that follows another node; a token sees its node's ancestors and what stands before it in its own.
Knows nothing of answers: which tokens are added, and why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from catpo.models.attention import packed
from catpo.models.output_head import at_head, token_stats
from catpo.models.tensors import common_length, pad_indices

if TYPE_CHECKING:
    from catpo.models.family import Encoded, Family

NOBODY, TRUNK, FIRST_PROMPT = 0, 1, 2
"""Nodes of a row: padding, what all prompts begin with, and the first prompt's own tokens; the other prompts' follow."""
DENSE_TOKENS = 1024
"""A longer row is first read part by part, so that no prompt's own tokens are compared with another's."""


@dataclass(frozen=True)
class Tree:
    """Different prompts about the same pictures; their first `common` tokens are the same and are read once."""

    prompts: Sequence[Encoded]
    common: int

    @property
    def parts(self) -> list[range]:
        """Where the common tokens and each prompt's own stand in the row. A prompt's last token is left to the branches."""
        ends = [self.common]
        for prompt in self.prompts:
            ends.append(ends[-1] + len(prompt.prompt_ids) - 1 - self.common)
        return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def per_token(self, values: Sequence[Sequence[int]]) -> list[int]:
        """From values of every prompt's tokens to those of the row's."""
        own = (of_prompt[self.common : -1] for of_prompt in values)
        return [*values[0][: self.common], *chain.from_iterable(own)]


def tree_of(family: Family, prompts: Sequence[Encoded]) -> Tree | None:
    """The tree of different prompts about the same pictures; None if they cannot share their beginning.

    Pictures must stand in what is shared, and tokens that see each other in both directions on one side of its end.
    """
    shortest, *others = sorted((prompt.prompt_ids for prompt in prompts), key=len)
    common = len(shortest) - 1
    for ids in others:
        common = common_length(shortest[:common], ids)
    for prompt in prompts:
        blocks = family.prompt_blocks(prompt)
        while common and blocks[common] >= 0 and blocks[common - 1] == blocks[common]:
            common -= 1
    image = family.image_token_id
    is_shared = common > 0 and all(image not in prompt.prompt_ids[common:] for prompt in prompts)
    return Tree(prompts, common) if is_shared else None


class Forest:
    """Trees of a batch. `node` numbers are a row's own; all tensors of bookkeeping are [rows, …].

    The same trees with other pixels may stand beside them: what is done to these is done to those.
    """

    def __init__(self, family: Family, trees: Sequence[Tree], beside: Sequence[Tree] = ()) -> None:
        self.family, self.cache = family, Cache(layer_class_to_replicate=_RoomyLayer)
        self.beside = Forest(family, beside) if beside else None
        device = family.device
        nodes = FIRST_PROMPT + max(len(tree.prompts) for tree in trees)
        self.lineage: Bool[Tensor, "rows nodes nodes"] = torch.eye(nodes, dtype=torch.bool).repeat(len(trees), 1, 1).to(device)
        """Whether the first node's tokens see those of the second."""
        self.lineage[:, FIRST_PROMPT:, TRUNK] = True
        lengths = [[0, tree.common, *(len(prompt.prompt_ids) - 1 for prompt in tree.prompts)] for tree in trees]
        self.count: Int[Tensor, "rows nodes"] = pad_indices(lengths, fill=0).to(device)
        """Tokens from the row's start to the end of a node, along its ancestors."""
        places = [[_positions(family, prompt) for prompt in tree.prompts] for tree in trees]
        self.axes = places[0][0].shape[:-1]
        nexts = [[0, 0, *(int(place.max()) for place in of_row)] for of_row in places]
        self.position: Int[Tensor, "rows nodes"] = pad_indices(nexts, fill=0).to(device)
        """Position id of the next token of a node."""
        self.owner, self.index = _of_keys(trees, device)
        self._read(trees, places)

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.owner.shape[1]

    def _read(self, trees: Sequence[Tree], places: Sequence[Sequence[Tensor]]) -> None:
        """The first pass: pictures, common beginnings, and the prompts but for their last tokens."""
        family = self.family
        inputs: dict[str, Tensor] = {}
        for name in trees[0].prompts[0].prompt_inputs:
            values = [tree.per_token([prompt.prompt_inputs[name] for prompt in tree.prompts]) for tree in trees]
            inputs[name] = pad_indices(values, fill=0)
        ids = pad_indices([tree.per_token([prompt.prompt_ids for prompt in tree.prompts]) for tree in trees], fill=0)
        rows = []
        for tree, of_row in zip(trees, places, strict=True):
            behind = [each[..., tree.common : -1] for each in of_row]
            rows.append(torch.cat([of_row[0][..., : tree.common], *behind], -1))
        positions = torch.stack([F.pad(row, (0, self.length - row.shape[-1])) for row in rows], dim=-2)
        blocks = pad_indices([tree.per_token([family.prompt_blocks(prompt) for prompt in tree.prompts]) for tree in trees])
        pixels = family.join_pixels([tree.prompts[0].pixels for tree in trees])
        mask = self._first_mask(trees, blocks.to(self.owner.device))
        self._forward(mask, 1, input_ids=ids, position_ids=positions, **inputs, **pixels)

    def _first_mask(self, trees: Sequence[Tree], blocks: Int[Tensor, "rows length"]) -> Any:
        family, length = self.family, self.length
        implementation = family.text_config._attn_implementation
        is_plain = implementation == f"{packed.PREFIX}sdpa" and family.window(self.index) is None and int(blocks.max()) < 0
        if is_plain and length > DENSE_TOKENS:
            rows = [[(part.start, part.stop, tree.common) for part in tree.parts] for tree in trees]
            return packed.mask_for(implementation, packed.layout_of(rows), length, family.unwrapped.dtype, parts=rows)
        same_block = (blocks[:, :, None] == blocks[:, None]) & (blocks[:, :, None] >= 0)
        return self._mask(self._sees(self.owner, self.index) | same_block, self.index)

    def _sees(self, nodes: Int[Tensor, "rows new"], index: Int[Tensor, "rows new"]) -> Bool[Tensor, "rows new length"]:
        rows = torch.arange(len(self), device=nodes.device)[:, None]
        seen = self.lineage[rows, nodes]  # (row, new token, node)
        owners = self.owner[:, None].expand(-1, nodes.shape[1], -1)
        return seen.gather(2, owners) & (self.index[:, None] <= index[:, :, None])

    def _mask(self, visible: Bool[Tensor, "rows new length"], index: Int[Tensor, "rows new"]) -> Any:
        masks = self.family.attention_masks(visible[:, None], self.index, index)
        return _as_numbers(masks, self.family.unwrapped.dtype)

    # ---- growing ------------------------------------------------------------------------------------------------------

    def branch(self, parents: Int[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
        """New nodes that follow these ones; what follows nobody is padding."""
        if self.beside:
            self.beside.branch(parents)
        columns, before = parents.shape[1], self.lineage.shape[1]
        rows = torch.arange(len(self), device=parents.device)[:, None]
        inherited = F.pad(self.lineage[rows, parents], (0, columns))
        own = torch.eye(columns, dtype=torch.bool, device=parents.device).expand(len(self), -1, -1)
        inherited[:, :, before:] |= own
        self.lineage = torch.cat([F.pad(self.lineage, (0, columns)), inherited], dim=1)
        self.count = torch.cat([self.count, self.count.gather(1, parents)], dim=1)
        self.position = torch.cat([self.position, self.position.gather(1, parents)], dim=1)
        return torch.arange(before, before + columns, device=parents.device).expand(len(self), -1)

    def grow(self, nodes: Int[Tensor, "rows new"], ids: Int[Tensor, "rows new"]) -> Float[Tensor, "rows new vocabulary"]:
        """Add a token to each of these nodes, which differ, and return what the model expects behind it."""
        inputs, mask = self._added(nodes, ids, torch.zeros_like(nodes))
        return self._forward(mask, 0, **inputs)

    def logps(
        self, nodes: Int[Tensor, "rows new"], ids: Int[Tensor, "rows new"], place: Int[Tensor, "rows new"], following: Tensor
    ) -> Float[Tensor, "rows new"]:
        """Add tokens to nodes; `place` counts the new ones of each from 0. Log-prob of the one `following` each."""
        inputs, mask = self._added(nodes, ids, place)
        output = self.family.backbone(**inputs, attention_mask=mask, past_key_values=self.cache, use_cache=True)
        hidden = output.last_hidden_state
        logps = at_head(self.family.unwrapped, hidden.flatten(0, 1), token_stats, following.flatten()).logps
        return logps.view(following.shape)

    def _added(self, nodes: Tensor, ids: Tensor, place: Tensor) -> tuple[dict[str, Tensor], Any]:
        """Model inputs of new tokens, and their mask."""
        index, positions = self.count.gather(1, nodes) + place, self.position.gather(1, nodes) + place
        self.owner, self.index = torch.cat([self.owner, nodes], dim=1), torch.cat([self.index, index], dim=1)
        one = torch.ones_like(nodes)
        self.count, self.position = self.count.scatter_add(1, nodes, one), self.position.scatter_add(1, nodes, one)
        inputs = {name: torch.full_like(ids, value) for name, value in self.family.response_inputs.items()}
        inputs |= {"input_ids": ids, "position_ids": positions.expand(*self.axes, -1, -1)}
        return inputs, self._mask(self._sees(nodes, index), index)

    def _forward(self, mask: Any, logits_to_keep: int, **tensors: Tensor) -> Tensor:
        arguments: dict[str, Any] = {name: values.to(self.family.device) for name, values in tensors.items()}
        arguments |= {"attention_mask": mask, "past_key_values": self.cache, "use_cache": True}
        with self.family.running():
            return self.family.model(**arguments, logits_to_keep=logits_to_keep).logits

    def prune(self, nodes: Bool[Tensor, "rows nodes"]) -> None:
        """Forget the tokens that none of these nodes sees."""
        if self.beside:
            self.beside.prune(nodes)
        seen = (self.lineage & nodes[:, :, None]).any(1)
        kept = seen.gather(1, self.owner) & (self.owner != NOBODY)
        length = int(kept.sum(1).max())
        places = kept.int().argsort(dim=1, descending=True, stable=True)[:, :length]
        self.owner = torch.where(kept, self.owner, NOBODY).gather(1, places)
        self.index = self.index.gather(1, places)
        for layer in self.cache.layers:
            layer.keep(places.to(layer.keys.device))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows only; one that is named several times is copied."""
        if list(rows) == list(range(len(self))):
            return
        if self.beside:
            self.beside.keep_rows(rows)
        chosen = torch.tensor(rows, device=self.owner.device)
        self.cache.batch_select_indices(chosen)
        for name in ("lineage", "count", "position", "owner", "index"):
            setattr(self, name, getattr(self, name)[chosen])


def _as_numbers(masks: Any, dtype: torch.dtype) -> Any:
    """Of booleans, fused attention would make them in every layer anew."""
    if isinstance(masks, dict):
        return {kind: _as_numbers(mask, dtype) for kind, mask in masks.items()}
    return packed.additive(masks, dtype) if masks.dtype == torch.bool else masks


class _RoomyLayer(DynamicLayer):
    """Keys and values of a layer with room for more, so that adding a token seldom copies all of them."""

    ROOM = 64
    """Tokens to come for which there is room after a copy."""
    rooms: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        before, after = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self.rooms or self.rooms[0].shape[-2] < after:
            self.rooms = tuple(_with_room(kept, after + self.ROOM) for kept in (self.keys, self.values))
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, before:after] = states
        self.keys, self.values = (room[:, :, :after] for room in self.rooms)
        return self.keys, self.values

    def keep(self, places: Int[Tensor, "rows length"]) -> None:
        """Only the tokens at these places of each row, in this order."""
        index = places[:, None, :, None].expand(-1, self.keys.shape[1], -1, -1)
        self.keys = self.keys.gather(2, index.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, index.expand(-1, -1, -1, self.values.shape[-1]))
        self.rooms = ()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices.to(self.keys.device))
        self.rooms = ()


def _with_room(kept: Tensor, length: int) -> Tensor:
    """A longer tensor that begins with this one, along the last axis but one."""
    room = kept.new_empty(*kept.shape[:-2], length, kept.shape[-1])
    room[..., : kept.shape[-2], :] = kept
    return room


def _of_keys(trees: Iterable[Tree], device: torch.device) -> tuple[Tensor, Tensor]:
    """Node and place of each token of the first pass."""
    owners, indices = [], []
    for tree in trees:
        trunk, *own = tree.parts
        owners.append([TRUNK] * len(trunk))
        indices.append([*trunk])
        for number, part in enumerate(own):
            owners[-1] += [FIRST_PROMPT + number] * len(part)
            indices[-1] += range(tree.common, tree.common + len(part))
    return pad_indices(owners, fill=NOBODY).to(device), pad_indices(indices, fill=0).to(device)


def _positions(family: Family, prompt: Encoded) -> Int[Tensor, "*axes prompt"]:
    positions = family.prompt_positions(prompt)
    return torch.arange(len(prompt.prompt_ids)) if positions is None else positions
