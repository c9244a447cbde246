"""How likely the reference finds each token (not in the paper)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from catpo.scoring.signals import Evidence


def score(evidence: Evidence) -> Float[Tensor, " tokens"]:
    """Log p(y_t | picture, prompt, y_<t) in nats."""
    return evidence.logps
