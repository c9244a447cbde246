"""A reference that is known by its k likeliest words and the mass of all others together, and the KL to it: approximate.

The other words count as one, so the KL of Eq. 9 is never larger than the exact one, and as small as it where both models spread
the rest alike. Knows nothing of pairs, losses or files.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from catpo.models.output_head import Direction, OutputHead, token_logits

CHUNK = 64
"""Tokens whose rows of the head, [tokens, k, width], are there at once."""


class TopTokens(NamedTuple):
    """What is kept of a next-token distribution."""

    ids: Int[Tensor, "tokens k"]
    """The likeliest words, likeliest first."""
    logps: Float[Tensor, "tokens k_and_rest"]
    """Their log-probs, and last the logarithm of all other words' mass."""


@torch.no_grad()
def top_tokens(hidden: Float[Tensor, "tokens width"], head: OutputHead, k: int) -> TopTokens:
    """The k likeliest next words at each position."""
    parts = []
    for states in hidden.split(CHUNK):
        logps = head.logits(states).log_softmax(-1)
        top = logps.topk(k, dim=-1)
        rest = logps.scatter(1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
        parts.append((top.indices.int(), torch.cat([top.values, rest], dim=1).float()))
    ids, logps = (torch.cat(each) for each in zip(*parts, strict=True))
    return TopTokens(ids, logps)


def top_kl(
    hidden: Float[Tensor, "tokens width"],
    head: OutputHead,
    tokens: Int[Tensor, " tokens"],
    logps: Float[Tensor, " tokens"],
    reference: TopTokens,
    direction: Direction,
) -> Float[Tensor, " tokens"]:
    """KL between policy and reference over k words and the rest (Eq. 9), with gradient to the policy.

    `logps` are the policy's log-probs of `tokens`: with the tokens' logits they give the normaliser of all words.
    """
    norm = token_logits(hidden, head, tokens) - logps
    parts = zip(hidden.split(CHUNK), norm.split(CHUNK), *(each.split(CHUNK) for each in reference), strict=True)
    found = [checkpoint(_kl, *part, head, direction, use_reentrant=False) for part in parts]
    return torch.cat(found) if found else norm


def _kl(hidden: Tensor, norm: Tensor, ids: Tensor, reference: Tensor, head: OutputHead, direction: Direction) -> Tensor:
    rows, k = ids.shape
    every_word = token_logits(hidden.repeat_interleave(k, dim=0), head, ids.reshape(-1).long())
    top = every_word.view(rows, k) - norm[:, None]
    tiny = torch.finfo(top.dtype).tiny
    rest = torch.log((1 - top.exp().sum(-1, keepdim=True)).clamp_min(tiny))
    policy, reference = torch.cat([top, rest], dim=1), reference.to(top.dtype).clamp_min(torch.log(top.new_tensor(tiny)))
    first, second = (policy, reference) if direction == "policy||reference" else (reference, policy)
    return (first.exp() * (first - second)).sum(-1)
