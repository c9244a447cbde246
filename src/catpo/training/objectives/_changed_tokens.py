"""Which tokens of two responses differ, by longest matching blocks. Knows nothing of losses."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from catpo.models.transfer import to_device, to_host
from catpo.training.objectives import PairStats


def changed_tokens(
    rejected: Sequence[int], chosen: Sequence[int], *, block: int = 3, one_sided: bool = False
) -> tuple[list[bool], list[bool]]:
    """Whether each token of the rejected and of the chosen response was changed (RLHF-V: Muffin's `diff_lib`).

    Changes are the gaps between matching blocks of `block` tokens or more. A gap that is empty on one side, an insertion or a
    deletion, counts only if `one_sided`. From 200 tokens on difflib takes frequent tokens for junk, as it does in RLHF-V.

    >>> changed_tokens([7, 8, 9, 1, 4, 5, 6], [7, 8, 9, 2, 3, 4, 5, 6])
    ([False, False, False, True, False, False, False], [False, False, False, True, True, False, False, False])
    """
    *blocks, end = SequenceMatcher(None, rejected, chosen).get_matching_blocks()  # the last is empty and marks the ends
    is_changed = ([False] * len(rejected), [False] * len(chosen))
    a = b = 0
    for match in [*(match for match in blocks if match.size >= block), end]:
        gaps = (range(a, match.a), range(b, match.b))
        if one_sided or all(gaps):
            for flags, gap in zip(is_changed, gaps, strict=True):
                flags[gap.start : gap.stop] = [True] * len(gap)
        a, b = match.a + match.size, match.b + match.size
    return is_changed


def segment_weights(stats: PairStats, weight: float, *, block: int = 3) -> Float[Tensor, "pairs 2 tokens"]:
    """`weight` on the changed tokens of a batch and 1 on the others."""
    ones = torch.ones_like(stats.policy_logps)
    return torch.where(changed_mask(stats, block=block), weight * ones, ones)


def changed_mask(stats: PairStats, *, block: int = 3, one_sided: bool = False) -> Bool[Tensor, "pairs 2 tokens"]:
    """`changed_tokens` of a batch of pairs; False in the padding."""
    here = to_host({"mask": stats.mask, "ids": stats.token_ids})
    mask = here["mask"]
    changed = torch.zeros_like(mask)
    for pair, ids in enumerate(here["ids"]):
        chosen, rejected = (ids[side][mask[pair, side]].tolist() for side in (0, 1))
        flags = changed_tokens(rejected, chosen, block=block, one_sided=one_sided)
        for side, values in enumerate(reversed(flags)):
            changed[pair, side, mask[pair, side]] = torch.tensor(values, dtype=torch.bool)
    return to_device({"changed": changed}, stats.mask.device)["changed"]
