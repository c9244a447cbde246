"""A reference known by its k likeliest tokens and the mass of all others together, and the approximate KL to it.

The other tokens count as one, so the KL of Eq. 9 is never larger than the exact one, and equal to it if both models spread the
rest alike. Knows nothing of pairs, losses or files.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from catpo.models.output_head import Direction, OutputHead, token_logits

CHUNK = 64
"""Response tokens whose rows of the head, [tokens, k, width], are in memory at once."""


class TopTokens(NamedTuple):
    """What is kept of a next-token distribution."""

    ids: Int[Tensor, "tokens k"]
    """The likeliest tokens, likeliest first."""
    logps: Float[Tensor, "tokens k_and_rest"]
    """Their log-probs, and last the logarithm of all other tokens' mass."""


@torch.no_grad()
def top_tokens(hidden: Float[Tensor, "tokens width"], head: OutputHead, k: int) -> TopTokens:
    """The k likeliest next tokens at each position."""
    ids, logps = [], []
    for states in hidden.split(CHUNK):
        all_logps = head.logits(states).log_softmax(-1)
        top = all_logps.topk(k, dim=-1)
        rest = all_logps.scatter(1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
        ids.append(top.indices.int())
        logps.append(torch.cat([top.values, rest], dim=1).float())
    return TopTokens(torch.cat(ids), torch.cat(logps))


def top_kl(
    hidden: Float[Tensor, "tokens width"],
    head: OutputHead,
    tokens: Int[Tensor, " tokens"],
    logps: Float[Tensor, " tokens"],
    reference: TopTokens,
    direction: Direction,
) -> Float[Tensor, " tokens"]:
    """KL between policy and reference over k tokens and the rest (Eq. 9), with gradient to the policy.

    `logps` are the policy's log-probs of `tokens`: with the tokens' logits they give the normaliser of the softmax.
    """
    norm = token_logits(hidden, head, tokens) - logps
    chunks = zip(hidden.split(CHUNK), norm.split(CHUNK), reference.ids.split(CHUNK), reference.logps.split(CHUNK), strict=True)
    return torch.cat([checkpoint(_kl, *chunk, head, direction, use_reentrant=False) for chunk in chunks])


def _kl(hidden: Tensor, norm: Tensor, ids: Tensor, reference: Tensor, head: OutputHead, direction: Direction) -> Tensor:
    rows, k = ids.shape
    logits = token_logits(hidden.repeat_interleave(k, dim=0), head, ids.reshape(-1).long())
    top = logits.view(rows, k) - norm[:, None]
    # the rest may have no mass at all in float32: clamped, its logarithm and gradient stay finite
    tiny = top.new_tensor(torch.finfo(top.dtype).tiny)
    rest = torch.log((1 - top.exp().sum(-1, keepdim=True)).clamp_min(tiny))
    policy, reference = torch.cat([top, rest], dim=1), reference.to(top.dtype).clamp_min(torch.log(tiny))
    first, second = (policy, reference) if direction == "policy||reference" else (reference, policy)
    return (first.exp() * (first - second)).sum(-1)
