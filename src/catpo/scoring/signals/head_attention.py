"""How much of a token's attention goes to the picture, in one layer, or in one of its heads (not in the paper)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from catpo.core.errors import UserError
from catpo.scoring.signals import Evidence


def score(evidence: Evidence, *, layer: int = -1, head: int | None = None) -> Float[Tensor, " tokens"]:
    """Attention mass on all patches, in [0, 1]: of a head, or the mean of a layer's heads.

    Raises:
        UserError: no such head, or the layer's attention cannot be recorded.
    """
    masses = evidence.head_masses(layer)
    if head is None:
        return masses.mean(0)
    if not 0 <= head < len(masses):
        raise UserError(f"head_attention(layer={layer}, head={head}): the layer has heads 0 to {len(masses) - 1}.")
    return masses[head]
