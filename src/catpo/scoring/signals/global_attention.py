"""Global relevance (Eq. 2): how much of a token's attention goes to the picture."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from catpo.scoring.signals import Evidence


def score(evidence: Evidence) -> Float[Tensor, " tokens"]:
    """Attention mass on all patches, in [0, 1]; the plain softmax scores, not renormalised over patches (else it were 1)."""
    return evidence.attention.sum(-1)  # Eq. 2
