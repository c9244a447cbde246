"""Local relevance (Eq. 3-4): how sharply a token looks, 1 minus its normalised patch entropy."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from catpo.core.errors import UserError
from catpo.scoring.signals import Evidence


def score(evidence: Evidence, *, epsilon: float = 1e-12) -> Float[Tensor, " tokens"]:
    """1 for a token that looks at one patch only, 0 for one that looks at all alike; in [0, 1].

    A token without any attention on the picture (a sliding window that left it behind) looks nowhere: 0.

    Raises:
        UserError: the picture has a single patch, so that there is nothing to choose between.
    """
    attention = evidence.attention.double()  # epsilon vanishes in float32
    patches = attention.shape[-1]
    if patches < 2:
        raise UserError("patch_entropy needs at least two patches in the picture (Eq. 4 divides by log of their number).")
    mass = attention.sum(-1, keepdim=True)
    share = attention / mass.clamp_min(torch.finfo(attention.dtype).tiny)  # P_t, above Eq. 3
    entropy = -(share * torch.log(share + epsilon)).sum(-1)  # Eq. 3
    local = 1 - entropy / math.log(patches)  # Eq. 4
    return torch.where(mass[..., 0] > 0, local.clamp(0, 1), 0.0).float()  # epsilon makes a uniform row exceed its bound
