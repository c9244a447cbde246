"""Which tokens of two responses differ, by longest matching blocks. Knows nothing of losses."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from catpo.training.pair_stats import PairStats


def changed_tokens(
    rejected: Sequence[int], chosen: Sequence[int], *, block: int = 3, one_sided: bool = False
) -> tuple[list[bool], list[bool]]:
    """For the tokens of the rejected and of the chosen response, whether they were changed (RLHF-V: Muffin's `diff_lib`).

    The gaps between matching blocks of `block` tokens or more are the changes. A gap that is empty on one side, an insertion
    or a deletion, counts only if `one_sided`. For 200 tokens or more difflib takes frequent tokens for junk, as there.

    >>> changed_tokens([7, 8, 9, 1, 4, 5, 6], [7, 8, 9, 2, 3, 4, 5, 6])
    ([False, False, False, True, False, False, False], [False, False, False, True, True, False, False, False])
    """
    blocks = SequenceMatcher(None, rejected, chosen).get_matching_blocks()
    kept = [*(each for each in blocks[:-1] if each.size >= block), blocks[-1]]  # the last is empty and marks the ends
    flags = ([False] * len(rejected), [False] * len(chosen))
    first = (0, 0)
    for each in kept:
        gaps = [range(begin, end) for begin, end in zip(first, (each.a, each.b), strict=True)]
        if all(gaps) or one_sided:
            for side, gap in zip(flags, gaps, strict=True):
                side[gap.start : gap.stop] = [True] * len(gap)
        first = (each.a + each.size, each.b + each.size)
    return flags


def segment_weights(stats: PairStats, weight: float, *, block: int = 3) -> Float[Tensor, "pairs 2 tokens"]:
    """`weight` on the changed tokens of a batch and 1 on the others."""
    ones = torch.ones_like(stats.policy_logps)
    return torch.where(changed_mask(stats, block=block), weight * ones, ones)


def changed_mask(stats: PairStats, *, block: int = 3, one_sided: bool = False) -> Bool[Tensor, "pairs 2 tokens"]:
    """`changed_tokens` of a batch of pairs; False in the padding."""
    mask = stats.mask.cpu()
    changed = torch.zeros_like(mask)
    for pair, ids in enumerate(stats.token_ids.cpu()):
        chosen, rejected = (ids[side][mask[pair, side]].tolist() for side in (0, 1))
        flags = changed_tokens(rejected, chosen, block=block, one_sided=one_sided)
        for side, values in enumerate(reversed(flags)):
            changed[pair, side, mask[pair, side]] = torch.tensor(values, dtype=torch.bool)
    return changed.to(stats.mask.device)
