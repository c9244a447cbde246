"""How much likelier a token is with this picture than with another one (not in the paper)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from catpo.scoring.signals import Evidence


def score(evidence: Evidence, *, view: str = "another") -> Float[Tensor, " tokens"]:
    """Log p(y_t | picture) - log p(y_t | another picture), in nats; costs a second forward pass."""
    return evidence.logps - evidence.view_logps(view)
