"""Whether some patch, read through the output head, says the token itself (not in the paper)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from catpo.models.output_head import token_probabilities
from catpo.scoring.signals import Evidence


def score(evidence: Evidence) -> Float[Tensor, " tokens"]:
    """Largest probability over patches that the output head gives the token at a patch's last hidden state, in [0, 1]."""
    return token_probabilities(evidence.patch_hidden(), evidence.head, evidence.token_ids).amax(0)
