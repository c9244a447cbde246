"""What objectives read beyond log-probs and KL of the clean picture: views of it, raw logits, another checkpoint's figures.

A view is one more row per pair, with the sides that are read under it; policy and reference see the same row. Knows no loss.
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
from catpo.core.types import SIDES, Picture, PreferencePair, Side
from catpo.models.family import Encoded, Family
from catpo.models.output_head import at_head, likeliest_tokens, token_logits, token_stats
from catpo.models.packing import Batch, Prefix, pack, response_hidden, run_backbone, unflatten
from catpo.models.views import OtherPictures, View
from catpo.rewards.store import RewardStore
from catpo.training.collator import stored_logps
from catpo.training.pair_stats import ViewNeed, view_needs

Quantities = dict[str, Tensor]
"""By the names under which `PairStats` reads them."""


@dataclass
class ViewPasses:
    """The further rows of a batch, and the figures read from policy and reference for them.

    Args:
        needs: what the objective reads, see `stats.requirements`.
        others: pairs whose pictures serve as `another`.
        seed: with epoch and pair it decides every random draw, whatever the batch, so that a resumed run draws the same.
    """

    family: Family
    needs: frozenset[str]
    others: Sequence[PreferencePair] = ()
    seed: int = 0
    prefix: Prefix = "shared"
    max_length: int | None = None
    epoch: int = 0

    def __post_init__(self) -> None:
        self.prefix = self.prefix if self.family.shares_prefix else "separate"
        self.views: dict[str, dict[Side, set[str]]] = {}
        """View -> side -> quantities."""
        for need in view_needs(self.needs):
            self.views.setdefault(need.view, {}).setdefault(need.side, set()).add(need.quantity)
        self.judge = self._open_judge()
        self._other = OtherPictures(self.others)

    @property
    def is_empty(self) -> bool:
        """Whether the objective reads nothing of what stands here."""
        return not (self.views or self._named("meta ") or self._named("judge_logps ") or self._clean_logits)

    @property
    def reads_reference(self) -> bool:
        """Whether the reference has to be run, or its hidden states read, for what stands here."""
        return "reference_logits" in self.needs or any("reference_" in name for name in self.needs if "@" in name)

    @property
    def reads_clean_reference(self) -> bool:
        """Whether the reference's hidden states with the clean picture are among it."""
        return any(name.startswith(("reference_logits", "reference_top")) for name in self.needs)

    @property
    def _clean_logits(self) -> bool:
        return bool({"policy_logits", "reference_logits"} & self.needs)

    def _named(self, start: str) -> list[str]:
        return [name for name in self.needs if name.startswith(start)]

    def _open_judge(self) -> RewardStore | None:
        """The store of another checkpoint's log-probs, if the objective reads one."""
        for name in self._named("judge_logps "):
            folder = name.removeprefix("judge_logps ")
            if not folder:
                raise UserError(
                    "The objective needs another checkpoint's log-probs. Let that checkpoint score the same pairs "
                    "(`catpo score --model CHECKPOINT`) and name the store: judge='folder'."
                )
            return RewardStore.open(folder)
        return None

    # ---- rows, made where batches are made ----------------------------------------------------------------------------

    def __call__(self, pairs: Sequence[PreferencePair], encoded: Sequence[Encoded]) -> Batch:
        """What is added to a batch: the rows of every view, and the numbers that come with the pairs."""
        added: Batch = {name: _numbers(pairs, *name.split(" ")[1:]) for name in self._named("meta ")}
        if self.judge is not None:
            added[self._named("judge_logps ")[0]] = stored_logps(self.judge, encoded)
        if self.views:
            tokens = max(len(ids) for each in encoded for ids in each.response_ids.values())
            added["views"] = {
                name: self._rows(View.of(name), sides, pairs, encoded, tokens) for name, sides in self.views.items()
            }
        return added

    def _rows(self, view: View, sides: Any, pairs: Sequence[PreferencePair], encoded: Sequence[Encoded], tokens: int) -> Batch:
        """One row per pair with the sides that are read; token figures are as wide as those of the clean picture."""
        shown = [self._shown(view, pair, each) for pair, each in zip(pairs, encoded, strict=True)]
        rows = [
            replace(each, response_ids={side: each.response_ids[side] if side in sides else [] for side in SIDES})
            for each, _ in shown
        ]
        batch = pack(self.family, rows, prefix=self.prefix)
        missing = tokens - batch["mask"].shape[2]
        for name, fill in (("mask", False), ("predictors", -1), ("token_ids", 0), ("tokens_at", -1)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=fill)
        for pair, (_, replaced) in enumerate(shown):
            for side, flags in replaced.items():
                batch["mask"][pair, SIDES.index(side), : len(flags)] &= ~torch.tensor(flags)
        return batch

    def _shown(self, view: View, pair: PreferencePair, encoded: Encoded) -> tuple[Encoded, dict[Side, list[bool]]]:
        """A pair as it is under a view, and which response tokens were replaced in it."""
        generator = view.generator(self.seed, self.epoch, pair.id)
        if view.acts_on == "pixels":
            return replace(encoded, pixels=view.of_pixels(encoded.pixels, generator)), {}
        if view.acts_on == "text":
            base = encoded if view.inner is None else self._shown(view.inner, pair, encoded)[0]
            return self._perturbed(base, view.spec.options.get("share", 0.05), generator)
        if view.spec.name == "none":
            return self.family.without_pictures(pair, encoded), {}
        if view.spec.name == "another":
            images = self._other_pictures(pair)
        else:
            images = tuple(view.of_file(picture, generator) for picture in pair.images)
        return self.family.encode(replace(pair, images=images), max_length=self.max_length), {}

    def _other_pictures(self, pair: PreferencePair) -> tuple[Picture, ...]:
        images = self._other.of(pair)
        if images is None:
            raise UserError(f"pair {pair.id}: no other pair has another picture, so the view 'another' cannot be shown.")
        return images

    def _perturbed(self, encoded: Encoded, share: float, generator: torch.Generator) -> tuple[Encoded, dict[Side, list[bool]]]:
        """Random words in place of a share of those of the prompt and of both responses; special tokens stay."""
        words, special = self._words
        draw = lambda ids: (torch.rand(len(ids), generator=generator) < share).tolist()
        other = lambda ids: [words[at] for at in torch.randint(len(words), (len(ids),), generator=generator).tolist()]

        def change(ids: Sequence[int]) -> tuple[list[int], list[bool]]:
            chance, news = draw(ids), other(ids)
            flags = [drawn and token not in special for drawn, token in zip(chance, ids, strict=True)]
            return [new if flag else token for token, new, flag in zip(ids, news, flags, strict=True)], flags

        prompt, _ = change(encoded.prompt_ids)
        responses = {side: change(encoded.response_ids[side]) for side in SIDES}
        return (
            replace(encoded, prompt_ids=prompt, response_ids={side: ids for side, (ids, _) in responses.items()}),
            {side: flags for side, (_, flags) in responses.items()},
        )

    @cached_property
    def _words(self) -> tuple[list[int], set[int]]:
        """Ids of ordinary tokens, and of those with a meaning of their own."""
        tokenizer = self.family.tokenizer
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, self.family.image_token_id}
        return [token for token in range(len(tokenizer)) if token not in special], special

    # ---- figures, read where the models run ---------------------------------------------------------------------------

    def of_policy(self, model: Any, hidden: Float[Tensor, "flat width"], batch: Batch) -> Quantities:
        """The policy's figures; to be called inside its forward, with its final hidden states for the clean picture."""
        return self._read("policy", model, hidden, batch)

    @torch.no_grad()
    def of_reference(self, model: Any, hidden: Float[Tensor, "flat width"] | None, batch: Batch) -> Quantities:
        """The reference's figures, inside its forward; `hidden` are its states for the clean picture, if they are there."""
        if hidden is None and self.reads_clean_reference:
            hidden = _hidden(model, batch)
        return self._read("reference", model, hidden, batch)

    def _read(self, whose: str, model: Any, hidden: Tensor | None, batch: Batch) -> Quantities:
        read: Quantities = {}
        if f"{whose}_logits" in self.needs and hidden is not None:
            logits = at_head(model, hidden, token_logits, batch["token_ids"][batch["mask"]])
            read[f"{whose}_logits"] = unflatten(logits, batch["mask"])
        for view, sides in self.views.items():
            rows = batch["views"][view]
            wanted = {quantity for of_side in sides.values() for quantity in of_side if whose in quantity}
            if not wanted:
                continue
            takes_gradient = bool(wanted & {"policy_logps", "policy_logits"})
            with torch.set_grad_enabled(torch.is_grad_enabled() and takes_gradient):
                under_view = _hidden(model, rows)
            for quantity in wanted:
                values = self._quantity(quantity, model, under_view, rows, hidden, batch)
                for side, of_side in sides.items():
                    if quantity in of_side:
                        read[str(ViewNeed(quantity, side, view))] = values[:, SIDES.index(side)]
        for need in view_needs(self.needs):
            if need.quantity == "mask":
                read[str(need)] = batch["views"][need.view]["mask"][:, SIDES.index(need.side)]
        return read

    @staticmethod
    def _quantity(
        quantity: str, model: Any, under_view: Tensor, rows: Batch, hidden: Tensor | None, batch: Batch
    ) -> Float[Tensor, "pairs 2 tokens"]:
        ids, mask = rows["token_ids"][rows["mask"]], rows["mask"]
        if quantity.endswith("_top_logps"):
            assert hidden is not None
            is_read = mask[batch["mask"]]  # of the clean picture's tokens, those that the view has too
            likeliest = at_head(model, under_view, likeliest_tokens)
            return unflatten(at_head(model, hidden[is_read], token_stats, likeliest).logps, mask)
        if quantity.endswith("_logits"):
            return unflatten(at_head(model, under_view, token_logits, ids), mask)
        return unflatten(at_head(model, under_view, token_stats, ids).logps, mask)


def _hidden(model: Any, batch: Batch) -> Float[Tensor, "flat width"]:
    """Final hidden states that predict a batch's response tokens."""
    return response_hidden(run_backbone(model, batch).last_hidden_state, batch)


def _numbers(pairs: Sequence[PreferencePair], name: str, default: str) -> Float[Tensor, " pairs"]:
    """The number `name` that comes with each pair."""
    values = []
    for pair in pairs:
        value = pair.meta.get(name, float(default))
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"pair {pair.id}: '{name}' is {value!r}, not a number. The objective reads it from the pair's row.")
        values.append(float(value))
    return torch.tensor(values)
