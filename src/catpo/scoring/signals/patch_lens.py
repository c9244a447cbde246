"""Whether some patch, read through the output head after a layer, says the word of a token (not in the paper)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from catpo.core.checks import check_word
from catpo.models.output_head import token_probabilities
from catpo.scoring.signals import Evidence


def score(evidence: Evidence, *, layer: int = -1, token: str = "first") -> Float[Tensor, " tokens"]:
    """Largest probability over patches that the output head gives at a patch's hidden state, in [0, 1].

    Args:
        evidence: of the response.
        layer: decoder layer after which the patches are read, through the final norm; -1 is the last.
        token: `first`, all tokens of a word get that of the word's first one; `own`, each its own, as `patch_logit`.

    Raises:
        UserError: another word for `token`, or no such layer.
    """
    check_word("patch_lens", "token", token, ("first", "own"))
    own = token_probabilities(evidence.patch_lens_hidden(layer), evidence.head, evidence.token_ids).amax(0)
    return own if token == "own" else own[torch.tensor(evidence.first_tokens, device=own.device)]
