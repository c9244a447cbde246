"""How sure the reference is of the token that comes next, whichever it is (not in the paper)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from catpo.scoring.signals import Evidence

CHUNK = 64
"""Tokens whose logits are in memory at once."""


def score(evidence: Evidence) -> Float[Tensor, " tokens"]:
    """Sum over the vocabulary of p log p where the token is predicted, in nats: minus the entropy, 0 where it is certain."""
    entropies = []
    for hidden in evidence.predicting.split(CHUNK):
        logps = evidence.head.logits(hidden).log_softmax(-1)
        entropies.append((logps.exp() * logps).sum(-1))
    return torch.cat(entropies).float()
