"""What an objective may read of a batch of pairs, and how it is found out which of it an objective reads.

Knows nothing of where the figures come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from catpo.errors import UserError, did_you_mean
from catpo.head import Direction


class PairStats:
    """What an objective may read of a batch; all [pairs, 2 (chosen, rejected), tokens], 0 in the padding.

    Nothing is computed for what nobody reads: `requirements` finds out beforehand what an objective will ask for.
    """

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = read

    @property
    def policy_logps(self) -> Float[Tensor, "pairs 2 tokens"]:
        """Log pi(y_t), with gradient."""
        return self._read("policy_logps")

    @property
    def reference_logps(self) -> Float[Tensor, "pairs 2 tokens"]:
        """Log pi_ref(y_t)."""
        return self._read("reference_logps")

    @property
    def weights(self) -> Float[Tensor, "pairs 2 tokens"]:
        """Token weights w_t of Eq. 7, constants."""
        return self._read("weights")

    @property
    def mask(self) -> Bool[Tensor, "pairs 2 tokens"]:
        """Where a token exists."""
        return self._read("mask").bool()

    def kl(self, direction: str = "policy||reference") -> Float[Tensor, "pairs 2 tokens"]:
        """KL of the full next-token distributions in nats, with gradient to the policy (Eq. 9).

        Raises:
            UserError: another direction than the two of `head.Direction`.
        """
        if direction not in get_args(Direction):
            raise UserError(f"kl_direction='{direction}' is not known. {did_you_mean(direction, get_args(Direction))}")
        return self._read(f"kl {direction}")


def requirements(loss: Callable[..., Any], options: dict[str, Any]) -> frozenset[str]:
    """Names of what `loss` reads, found by running it once on two tokens."""
    asked: set[str] = set()

    def read(name: str) -> Tensor:
        asked.add(name)
        return torch.ones(1, 2, 2) if name in ("mask", "weights") else torch.zeros(1, 2, 2)

    loss(PairStats(read), **options)
    return frozenset(asked)


def kl_direction(needs: frozenset[str]) -> Direction | None:
    """Which KL an objective asked for, if any.

    Raises:
        UserError: it asked for both.
    """
    directions = [name.removeprefix("kl ") for name in needs if name.startswith("kl ")]
    if len(directions) > 1:
        raise UserError("An objective may read the KL in one direction only.")
    return directions[0] if directions else None  # type: ignore[return-value]
