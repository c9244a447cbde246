"""What an objective may read of a batch of pairs, and how it is found out which of it an objective reads.

Knows nothing of where the figures come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import parse
from catpo.core.types import SIDES, Side
from catpo.models.output_head import Direction
from catpo.models.tensors import masked_sum


class ViewNeed(NamedTuple):
    """One quantity of one side's tokens under a view of the picture."""

    quantity: str
    side: Side
    view: str

    def __str__(self) -> str:
        return f"{self.quantity}@{self.side}@{self.view}"


class PairStats:
    """What an objective may read of a batch; all [pairs, 2 (chosen, rejected), tokens], 0 in the padding.

    Nothing is computed for what nobody reads: `requirements` finds out beforehand what an objective will ask for.

    Args:
        read: gives a quantity by its name.
        is_weighted: whether `sum` weighs the tokens.
    """

    def __init__(self, read: Callable[[str], Tensor], *, is_weighted: bool = False) -> None:
        self._read = read
        self._is_weighted = is_weighted

    def weighted(self) -> PairStats:
        """The same figures, with token weights in every sum over tokens."""
        return PairStats(self._read, is_weighted=True)

    @property
    def policy_logps(self) -> Float[Tensor, "pairs 2 tokens"]:
        """Log pi(y_t), with gradient."""
        return self._read("policy_logps")

    @property
    def reference_logps(self) -> Float[Tensor, "pairs 2 tokens"]:
        """Log pi_ref(y_t)."""
        return self._read("reference_logps")

    @property
    def policy_logits(self) -> Float[Tensor, "pairs 2 tokens"]:
        """The raw logit of y_t under the policy, before the softmax, with gradient."""
        return self._read("policy_logits")

    @property
    def reference_logits(self) -> Float[Tensor, "pairs 2 tokens"]:
        """The raw logit of y_t under the reference."""
        return self._read("reference_logits")

    @property
    def weights(self) -> Float[Tensor, "pairs 2 tokens"]:
        """Token weights w_t of Eq. 7, constants."""
        return self._read("weights")

    @property
    def mask(self) -> Bool[Tensor, "pairs 2 tokens"]:
        """Where a token exists."""
        return self._read("mask").bool()

    @property
    def token_ids(self) -> Int[Tensor, "pairs 2 tokens"]:
        """The response tokens y_t."""
        return self._read("token_ids").long()

    @property
    def token_weights(self) -> Float[Tensor, "pairs 2 tokens"]:
        """What `sum` multiplies with: token weights if the objective was given some, else 1."""
        return self.weights if self._is_weighted else torch.ones_like(self.policy_logps)

    def kl(self, direction: str = "policy||reference") -> Float[Tensor, "pairs 2 tokens"]:
        """KL of the full next-token distributions in nats, with gradient to the policy (Eq. 9).

        Raises:
            UserError: another direction than the two of `head.Direction`.
        """
        if direction not in get_args(Direction):
            raise UserError(f"kl_direction='{direction}' is not known. {did_you_mean(direction, get_args(Direction))}")
        return self._read(f"kl {direction}")

    def judge_logps(self, judge: str) -> Float[Tensor, "pairs 2 tokens"]:
        """Log-probs of y_t under another checkpoint, which scored the pairs into the store `judge`."""
        return self._read(f"judge_logps {judge}")

    def meta(self, name: str, default: float) -> Float[Tensor, " pairs"]:
        """A number that comes with each pair (`PreferencePair.meta`), or `default` where there is none."""
        return self._read(f"meta {name} {default}")

    def view(self, view: str, side: Side) -> ViewStats:
        """One side's tokens under another view of the picture, e.g. `stats.view("noised(step=500)", "chosen")`."""
        return ViewStats(self, str(parse(view)), side)

    def sum(self, values: Float[Tensor, "pairs *side tokens"], side: Side | None = None) -> Float[Tensor, " pairs *side"]:
        """Sum over the tokens that exist, weighted if the objective was given token weights; of both sides or of one."""
        mask = self.mask if side is None else self.mask[:, SIDES.index(side)]
        if self._is_weighted:
            values = values * (self.weights if side is None else self.weights[:, SIDES.index(side)])
        return masked_sum(values, mask)


class ViewStats:
    """One side's tokens under a view of the picture; all [pairs, tokens]. Policy and reference see the same draw."""

    def __init__(self, stats: PairStats, view: str, side: Side) -> None:
        self._stats, self._view, self._side = stats, view, side

    def _read(self, quantity: str) -> Tensor:
        return self._stats._read(str(ViewNeed(quantity, self._side, self._view)))

    @property
    def policy_logps(self) -> Float[Tensor, "pairs tokens"]:
        """Log pi(y_t | view), with gradient."""
        return self._read("policy_logps")

    @property
    def constant_policy_logps(self) -> Float[Tensor, "pairs tokens"]:
        """Log pi(y_t | view) without gradient: its forward pass keeps no graph."""
        return self._read("constant_policy_logps").detach()

    @property
    def reference_logps(self) -> Float[Tensor, "pairs tokens"]:
        """Log pi_ref(y_t | view)."""
        return self._read("reference_logps")

    @property
    def policy_logits(self) -> Float[Tensor, "pairs tokens"]:
        """The raw logit of y_t under the policy, with gradient."""
        return self._read("policy_logits")

    @property
    def reference_logits(self) -> Float[Tensor, "pairs tokens"]:
        """The raw logit of y_t under the reference."""
        return self._read("reference_logits")

    @property
    def policy_top_logps(self) -> Float[Tensor, "pairs tokens"]:
        """Log pi(a_t | clean picture), a_t the token the policy finds likeliest under this view; with gradient."""
        return self._read("policy_top_logps")

    @property
    def reference_top_logps(self) -> Float[Tensor, "pairs tokens"]:
        """Log pi_ref(a_t | clean picture), a_t the token the reference finds likeliest under this view."""
        return self._read("reference_top_logps")

    @property
    def mask(self) -> Bool[Tensor, "pairs tokens"]:
        """Where a token counts: all of them, but for those that a view of the text replaced."""
        return self._read("mask").bool()


# ---- what an objective reads ----------------------------------------------------------------------------------------------


def requirements(loss: Callable[..., Any], options: dict[str, Any]) -> frozenset[str]:
    """Names of what `loss` reads, found by running it once on two tokens."""
    asked: set[str] = set()

    def read(name: str) -> Tensor:
        asked.add(name)
        return dummy(name, tokens=2)

    loss(PairStats(read), **options)
    return frozenset(asked)


def dummy(name: str, *, tokens: int) -> Tensor:
    """A stand-in for the quantity `name` of one pair: zeros, or ones, or tokens that all differ."""
    if name.startswith("meta "):
        return torch.tensor([float(name.rpartition(" ")[2])])
    if name == "token_ids":
        return torch.arange(2 * tokens).view(1, 2, tokens)
    shape = (1, tokens) if "@" in name else (1, 2, tokens)
    return torch.ones(shape) if re.match("mask|weights", name) else torch.zeros(shape)


def kl_direction(needs: frozenset[str]) -> Direction | None:
    """Which KL an objective asked for, if any.

    Raises:
        UserError: it asked for both.
    """
    directions = [name.removeprefix("kl ") for name in needs if name.startswith("kl ")]
    if len(directions) > 1:
        raise UserError("An objective may read the KL in one direction only.")
    return directions[0] if directions else None  # type: ignore[return-value]


def view_needs(needs: Iterable[str]) -> list[ViewNeed]:
    """What an objective reads under other views of the picture."""
    return [ViewNeed(*name.split("@", 2)) for name in sorted(needs) if "@" in name]  # type: ignore[arg-type]
