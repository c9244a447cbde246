"""Semantic relevance (Eq. 5): cosine of a token's embedding with the picture as that token sees it."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from catpo.core.checks import check_word
from catpo.scoring.signals import Evidence

SPACES = ("input", "hidden")


def score(evidence: Evidence, *, embedding: str = "input", layer: int = -1) -> Float[Tensor, " tokens"]:
    """Cosine in [-1, 1] between e(y_t) and the attention-weighted mean of the patches.

    Args:
        embedding: `input` takes token embeddings and projected patch features, as they enter the language model (the paper's
            "before the features enter the transformer layers"); `hidden` takes both after decoder layer `layer`.

    Raises:
        UserError: another word for `embedding`.
    """
    check_word("semantic", "embedding", embedding, SPACES)
    is_input = embedding == "input"
    tokens = evidence.token_embeddings if is_input else evidence.hidden(layer)
    patches = evidence.patch_features if is_input else evidence.patch_hidden(layer)
    share = evidence.attention / evidence.attention.sum(-1, keepdim=True).clamp_min(1e-30)  # P_t, above Eq. 3
    visual = share @ patches  # v_c, above Eq. 5
    return F.cosine_similarity(tokens, visual, dim=-1)  # Eq. 5
