"""What an objective may read of a batch of pairs, and which of it a given objective reads.

Knows nothing of where the numbers come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import parse
from catpo.core.types import SIDES, Side
from catpo.models.output_head import Direction
from catpo.models.tensors import masked_sum


@dataclass(frozen=True)
class Quantity:
    """One thing that an objective reads of a batch."""

    name: str
    """As the property or method of `PairStats` or `ViewStats` is called."""
    side: Side | None = None
    """The side of a quantity under a view; the others have both."""
    view: str | None = None
    argument: str = ""
    """Direction of a `kl`, store of `judge_logps`, or which number of `meta`."""
    default: float = 0.0
    """Of a `meta` number that a pair lacks."""
    reward: str = ""
    """Of a `kl` to the tilted reference: what the reference is tilted by."""
    tokens: str = "first"
    """Which tokens of a word the reward acts on."""

    @property
    def model(self) -> str | None:
        """`policy` or `reference`, for what one of the two models computes."""
        for model in ("policy", "reference"):
            if model in self.name:
                return model
        return None


Needs = frozenset[Quantity]
"""What an objective reads; see `requirements`."""


class ModelStats(ABC):
    """What policy and reference say of a batch's tokens, with the clean picture or under a view."""

    @abstractmethod
    def _of(self, name: str) -> Tensor: ...

    @property
    def policy_logps(self) -> Float[Tensor, "pairs *sides tokens"]:
        """Log pi(y_t), with gradient."""
        return self._of("policy_logps")

    @property
    def reference_logps(self) -> Float[Tensor, "pairs *sides tokens"]:
        """Log pi_ref(y_t)."""
        return self._of("reference_logps")

    @property
    def policy_logits(self) -> Float[Tensor, "pairs *sides tokens"]:
        """The raw logit of y_t under the policy, before the softmax, with gradient."""
        return self._of("policy_logits")

    @property
    def reference_logits(self) -> Float[Tensor, "pairs *sides tokens"]:
        """The raw logit of y_t under the reference."""
        return self._of("reference_logits")

    @property
    def mask(self) -> Bool[Tensor, "pairs *sides tokens"]:
        """Where a token exists; tokens that a view of the text replaced do not count."""
        return self._of("mask").bool()


class PairStats(ModelStats):
    """What an objective may read of a batch; all [pairs, 2 (chosen, rejected), tokens], 0 in the padding.

    Only what the objective reads is computed: `requirements` finds out beforehand.

    Args:
        read: returns the values of a quantity.
        is_weighted: whether `sum` weights the tokens.
    """

    def __init__(self, read: Callable[[Quantity], Tensor], *, is_weighted: bool = False) -> None:
        self.read = read
        self._is_weighted = is_weighted

    def _of(self, name: str) -> Tensor:
        return self.read(Quantity(name))

    def weighted(self) -> PairStats:
        """The same quantities, with token weights in every sum over tokens."""
        return PairStats(self.read, is_weighted=True)

    @property
    def weights(self) -> Float[Tensor, "pairs 2 tokens"]:
        """Token weights w_t of Eq. 7, constants."""
        return self._of("weights")

    @property
    def token_ids(self) -> Int[Tensor, "pairs 2 tokens"]:
        """The response tokens y_t."""
        return self._of("token_ids").long()

    @property
    def token_weights(self) -> Float[Tensor, "pairs 2 tokens"]:
        """What `sum` multiplies by: the token weights if the user gave any, else 1."""
        return self.weights if self._is_weighted else torch.ones_like(self.policy_logps)

    def kl(self, direction: str = "policy||reference") -> Float[Tensor, "pairs 2 tokens"]:
        """KL of the full next-token distributions in nats, with gradient to the policy (Eq. 9).

        Raises:
            UserError: `direction` is neither policy||reference nor reference||policy.
        """
        _check_direction(direction)
        return self.read(Quantity("kl", argument=direction))

    def tilted_kl(
        self, reward: str, direction: str = "reference||policy", tokens: str = "first"
    ) -> Float[Tensor, "pairs 2 tokens"]:
        """KL between the policy and the reference tilted by the rewards of words, in nats, with gradient to the policy.

        Args:
            reward: how words are rewarded, see `catpo.rewards.word_rewards.WordReward`.
            direction: as in `kl`, with the tilted reference in the place of the reference.
            tokens: `first` rewards the first token of a word, `word` every one, see `catpo.rewards.word_prefixes.WordPrefixes`.

        Raises:
            UserError: the direction is not known.
        """
        _check_direction(direction)
        return self.read(Quantity("kl", argument=direction, reward=reward, tokens=tokens))

    def judge_logps(self, judge: str) -> Float[Tensor, "pairs 2 tokens"]:
        """Log-probs of y_t under another checkpoint, which scored the pairs into the store `judge`."""
        return self.read(Quantity("judge_logps", argument=judge))

    def meta(self, name: str, default: float) -> Float[Tensor, " pairs"]:
        """A number that comes with each pair (`PreferencePair.meta`), or `default` for pairs without it."""
        return self.read(Quantity("meta", argument=name, default=float(default)))

    def view(self, view: str, side: Side) -> ViewStats:
        """One side's tokens under another view of the picture, e.g. `stats.view("noised(step=500)", "chosen")`."""
        return ViewStats(self, str(parse(view)), side)

    def sum(self, values: Float[Tensor, "pairs *sides tokens"], side: Side | None = None) -> Float[Tensor, " pairs *sides"]:
        """Sum over existing tokens of both sides or of one, weighted if the user gave token weights."""
        mask = self.mask if side is None else self.mask[:, SIDES.index(side)]
        if self._is_weighted:
            values = values * (self.weights if side is None else self.weights[:, SIDES.index(side)])
        return masked_sum(values, mask)

    def mean(self, values: Float[Tensor, "pairs sides tokens"]) -> Float[Tensor, "pairs sides"]:
        """`sum` divided by the number of tokens that exist."""
        return self.sum(values) / self.mask.sum(-1).clamp_min(1)


class ViewStats(ModelStats):
    """One side's tokens under a view of the picture; all [pairs, tokens]. Policy and reference see the same draw."""

    def __init__(self, stats: PairStats, view: str, side: Side) -> None:
        self._stats, self._view, self._side = stats, view, side

    def _of(self, name: str) -> Tensor:
        return self._stats.read(Quantity(name, self._side, self._view))

    @property
    def constant_policy_logps(self) -> Float[Tensor, "pairs tokens"]:
        """Log pi(y_t | view) without gradient: its forward pass keeps no graph."""
        return self._of("constant_policy_logps").detach()

    @property
    def policy_top_logps(self) -> Float[Tensor, "pairs tokens"]:
        """Log pi(a_t | clean picture), a_t the policy's most likely token under this view; with gradient."""
        return self._of("policy_top_logps")

    @property
    def reference_top_logps(self) -> Float[Tensor, "pairs tokens"]:
        """Log pi_ref(a_t | clean picture), a_t the reference's most likely token under this view."""
        return self._of("reference_top_logps")


def _check_direction(direction: str) -> None:
    if direction not in get_args(Direction):
        raise UserError(f"kl_direction='{direction}' is not known. {did_you_mean(direction, get_args(Direction))}")


def shared_prefix_mask(
    token_ids: Int[Tensor, "pairs 2 tokens"], mask: Bool[Tensor, "pairs 2 tokens"]
) -> Bool[Tensor, "pairs tokens"]:
    """Tokens before the first difference of the two responses."""
    is_equal = (token_ids[:, 0] == token_ids[:, 1]) & mask.all(1)
    return is_equal.long().cumprod(-1).bool()


# ---- what an objective reads ----------------------------------------------------------------------------------------------


def requirements(loss: Callable[..., Any], options: dict[str, Any]) -> Needs:
    """What `loss` reads with these options, recorded in a dry run on two tokens."""
    needs: set[Quantity] = set()

    def read(quantity: Quantity) -> Tensor:
        needs.add(quantity)
        return dummy(quantity, tokens=2)

    loss(PairStats(read), **options)
    return frozenset(needs)


def dummy(quantity: Quantity, *, tokens: int) -> Tensor:
    """Values of one pair for a dry run: ones for mask and weights, distinct token ids, zeros for the rest."""
    if quantity.name == "meta":
        return torch.tensor([quantity.default])
    if quantity.name == "token_ids":
        return torch.arange(2 * tokens).view(1, 2, tokens)
    shape = (1, 2, tokens) if quantity.view is None else (1, tokens)
    return torch.ones(shape) if quantity.name in ("mask", "weights") else torch.zeros(shape)


def reads_reference(needs: Needs) -> bool:
    """Whether an objective compares the policy with a reference at all."""
    return any(need.name == "kl" or need.model == "reference" for need in needs)


def kl_need(needs: Needs) -> Quantity | None:
    """The KL that an objective reads, if it reads one.

    Raises:
        UserError: it reads several.
    """
    divergences = [quantity for quantity in needs if quantity.name == "kl"]
    if len(divergences) > 1:
        raise UserError("An objective may read the KL in one direction and to one reference only.")
    return divergences[0] if divergences else None


def view_needs(needs: Needs) -> list[Quantity]:
    """What an objective reads under views of the picture, in a fixed order."""
    return sorted(
        (quantity for quantity in needs if quantity.view), key=lambda quantity: (quantity.name, quantity.side, quantity.view)
    )
