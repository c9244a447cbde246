"""What objectives read beyond log-probs and KL with the clean picture: views of it, raw logits, another checkpoint's log-probs.

A view adds one row per pair, with the sides that are read under it; policy and reference see the same row. Knows no loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from catpo.core.errors import UserError
from catpo.core.types import SIDES, PreferencePair, Side
from catpo.models.family import Encoded, Family
from catpo.models.output_head import at_head, likeliest_tokens, token_logits, token_stats
from catpo.models.packing import Batch, Prefix, flat_tokens, pack, repeated, response_hidden, run_backbone, unflatten
from catpo.models.tensors import pad_indices
from catpo.models.views import OtherPictures, View
from catpo.rewards.store import RewardStore
from catpo.training.collator import stored_logps
from catpo.training.pair_stats import Needs, Quantity, view_needs

Quantities = dict[Quantity, Tensor]
Replaced = dict[Side, list[bool]]
"""Which tokens of each response a view of the text replaced; empty if none."""


@dataclass
class ViewPasses:
    """The additional rows of a batch, and what policy and reference compute for them.

    Args:
        reader: the model's family, see `PairCollator`; the models that run are given with each call.
        needs: what the objective reads, see `requirements`.
        others: pairs whose pictures serve as `another`.
        seed: with epoch and pair id it seeds every draw, independent of the batch, so that a resumed run draws the same.
    """

    reader: Family
    needs: Needs
    others: Sequence[PreferencePair] = ()
    seed: int = 0
    prefix: Prefix = "shared"
    max_length: int | None = None
    epoch: int = 0

    def __post_init__(self) -> None:
        self.prefix = self.prefix if self.reader.shares_prefix else "separate"
        self.views: dict[str, list[Quantity]] = {}
        """View -> what is read under it."""
        for need in view_needs(self.needs):
            self.views.setdefault(str(need.view), []).append(need)
        self._metas = [need for need in self.needs if need.name == "meta"]
        self._judge: tuple[Quantity, RewardStore] | None = None
        for need in self.needs:
            if need.name == "judge_logps":
                self._judge = need, _open_judge(need.argument)
        self._other_pictures = OtherPictures(self.others)

    @property
    def reads_reference(self) -> bool:
        """Whether the reference has to run, or its hidden states are read, for what is computed here."""
        return self._reads_logits("reference") or any(need.model == "reference" for need in view_needs(self.needs))

    @property
    def reads_clean_reference(self) -> bool:
        """Whether the reference's hidden states with the clean picture are read."""
        return self._reads_logits("reference") or any(need.name == "reference_top_logps" for need in self.needs)

    def _reads_logits(self, model: str) -> bool:
        return Quantity(f"{model}_logits") in self.needs

    # ---- rows, made where batches are made ----------------------------------------------------------------------------

    def __call__(self, pairs: Sequence[PreferencePair], encoded: Sequence[Encoded]) -> Batch:
        """What a batch carries in addition: `given`, the numbers that come with the pairs, and the rows of every view."""
        given: Quantities = {need: _numbers(pairs, need) for need in self._metas}
        if self._judge is not None:
            need, store = self._judge
            given[need] = stored_logps(store, encoded)
        # views are padded to the width of the clean picture's responses, so that their values line up
        width = max(len(ids) for item in encoded for ids in item.response_ids.values())
        views = {view: self._rows(View.of(view), needs, pairs, encoded, width) for view, needs in self.views.items()}
        return {"given": given, "views": views}

    def _rows(
        self, view: View, needs: Sequence[Quantity], pairs: Sequence[PreferencePair], encoded: Sequence[Encoded], width: int
    ) -> Batch:
        """One row per pair, without the sides that nobody reads."""
        sides = {need.side for need in needs}
        rows, replaced = [], []
        for pair, item in zip(pairs, encoded, strict=True):
            shown, flags = self.show(view, pair, item)
            responses = {side: shown.response_ids[side] if side in sides else [] for side in SIDES}
            rows.append(replace(shown, response_ids=responses))
            replaced.append(flags)
        batch = pack(self.reader, rows, prefix=self.prefix)
        missing = width - batch["mask"].shape[2]
        for name, fill in (("mask", False), ("predictors", -1), ("token_ids", 0), ("tokens_at", -1)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=fill)
        for pair_index, flags in enumerate(replaced):
            for side, is_replaced in flags.items():
                batch["mask"][pair_index, SIDES.index(side), : len(is_replaced)] &= ~torch.tensor(is_replaced)
        # of the clean picture's tokens, those that the view has too
        exists = pad_indices([item.response_ids[side] for item in encoded for side in SIDES]) >= 0
        in_clean = batch["mask"].flatten(0, 1)[exists].nonzero()[:, 0]
        return batch | flat_tokens(batch) | {"in_clean": in_clean}

    def show(self, view: View, pair: PreferencePair, encoded: Encoded) -> tuple[Encoded, Replaced]:
        """A pair as it is under a view, and which response tokens the view replaced.

        Raises:
            UserError: the view shows another pair's picture, and there is none.
        """
        generator = view.generator(self.seed, self.epoch, pair.id)
        if view.acts_on == "pixels":
            return replace(encoded, pixels=view.of_pixels(encoded.pixels, generator)), {}
        if view.acts_on == "text":
            base = encoded if view.inner is None else self.show(view.inner, pair, encoded)[0]
            return self._perturbed(base, view, generator)
        if view.spec.name == "none":
            return self.reader.without_pictures(pair, encoded), {}
        if view.spec.name == "another":
            images = self._other_pictures.of(pair)
            if images is None:
                raise UserError(f"pair {pair.id}: no other pair has another picture, so the view 'another' cannot be shown.")
        else:
            images = tuple(view.of_file(picture, generator) for picture in pair.images)
        return self.reader.encode(replace(pair, images=images), max_length=self.max_length), {}

    def _perturbed(self, encoded: Encoded, view: View, generator: torch.Generator) -> tuple[Encoded, Replaced]:
        """Random tokens in place of a share of those in prompt and responses; special tokens stay."""
        ordinary, special = self._vocabulary

        def perturb(ids: Sequence[int]) -> tuple[list[int], list[bool]]:
            is_drawn = view(torch.tensor(ids), generator).tolist()
            drawn = torch.randint(len(ordinary), (len(ids),), generator=generator).tolist()
            flags = [chance and token not in special for chance, token in zip(is_drawn, ids, strict=True)]
            perturbed = list(ids)
            for position, is_replaced in enumerate(flags):
                if is_replaced:
                    perturbed[position] = ordinary[drawn[position]]
            return perturbed, flags

        prompt, _ = perturb(encoded.prompt_ids)
        responses, replaced = {}, {}
        for side in SIDES:
            responses[side], replaced[side] = perturb(encoded.response_ids[side])
        return replace(encoded, prompt_ids=prompt, response_ids=responses), replaced

    @cached_property
    def _vocabulary(self) -> tuple[list[int], set[int]]:
        """Ids of ordinary tokens, and of special ones."""
        tokenizer = self.reader.tokenizer
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, self.reader.image_token_id}
        return [token for token in range(len(tokenizer)) if token not in special], special

    # ---- quantities, computed where the models run --------------------------------------------------------------------

    def of_policy(self, model: Any, hidden: Float[Tensor, "flat width"], batch: Batch) -> Quantities:
        """The policy's quantities. Call it inside its forward, with its final hidden states for the clean picture."""
        return self._compute("policy", model, hidden, batch)

    @torch.no_grad()
    def of_reference(self, model: Any, hidden: Float[Tensor, "flat width"] | None, batch: Batch) -> Quantities:
        """The reference's quantities, inside its forward; `hidden` are its states for the clean picture, if known."""
        if hidden is None and self.reads_clean_reference:
            hidden = _hidden(model, batch)
        return self._compute("reference", model, hidden, batch)

    def _compute(self, whose: str, model: Any, hidden: Tensor | None, batch: Batch) -> Quantities:
        computed: Quantities = {}
        if self._reads_logits(whose) and hidden is not None:
            logits = at_head(model, hidden, token_logits, batch["flat_ids"])
            computed[Quantity(f"{whose}_logits")] = unflatten(logits, batch)
        clean = None if hidden is None else repeated(hidden, batch)
        for view, needs in self.views.items():
            rows = batch["views"][view]
            # sorted, since under FSDP every process must call the head in the same order
            names = sorted({need.name for need in needs if need.model == whose})
            values: dict[str, Tensor] = {"mask": rows["mask"]}
            if names:
                takes_gradient = "policy_logps" in names or "policy_logits" in names
                with torch.set_grad_enabled(torch.is_grad_enabled() and takes_gradient):
                    under_view = _hidden(model, rows)
                values |= {name: _at_tokens(name, model, under_view, rows, clean) for name in names}
            for need in needs:
                if need.name in values:
                    computed[need] = values[need.name][:, SIDES.index(need.side)]
        return computed


def _at_tokens(name: str, model: Any, under_view: Tensor, rows: Batch, clean: Tensor | None) -> Float[Tensor, "pairs 2 tokens"]:
    """The quantity `name` of a view, from the hidden states of all pairs under it and with the clean picture."""
    ids = rows["flat_ids"]
    if name.endswith("_top_logps"):
        assert clean is not None
        likeliest = at_head(model, under_view, likeliest_tokens)
        return unflatten(at_head(model, clean[rows["in_clean"]], token_stats, likeliest).logps, rows)
    if name.endswith("_logits"):
        return unflatten(at_head(model, under_view, token_logits, ids), rows)
    return unflatten(at_head(model, under_view, token_stats, ids).logps, rows)


def _hidden(model: Any, batch: Batch) -> Float[Tensor, "flat width"]:
    """Final hidden states that predict a batch's response tokens."""
    return response_hidden(run_backbone(model, batch).last_hidden_state, batch)


def _open_judge(folder: str) -> RewardStore:
    if not folder:
        raise UserError(
            "The objective needs another checkpoint's log-probs. Let that checkpoint score the same pairs "
            "(`catpo score --model CHECKPOINT`) and name the store: judge='folder'."
        )
    return RewardStore.open(folder)


def _numbers(pairs: Sequence[PreferencePair], need: Quantity) -> Float[Tensor, " pairs"]:
    """The number that an objective reads from each pair's row."""
    values = []
    for pair in pairs:
        value = pair.meta.get(need.argument, need.default)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(
                f"pair {pair.id}: '{need.argument}' is {value!r}, not a number. The objective reads it from the pair's row."
            )
        values.append(float(value))
    return torch.tensor(values)
