"""Preference pairs as training batches: packed rows, token weights and the stored reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from catpo.core.errors import UserError
from catpo.core.types import SIDES, PreferencePair, Side
from catpo.models.family import Encoded, Family
from catpo.models.packing import Batch, Prefix, pack
from catpo.rewards.fusion import Fusion
from catpo.rewards.store import RewardStore
from catpo.training.pair_stats import kl_direction

# ---- the collator ---------------------------------------------------------------------------------------------------------


@dataclass
class PairCollator:
    """Pairs in, batch out: encodes, looks weights and reference up by (id, side), and verifies the stored token ids.

    Args:
        rewards: the store; None for an objective that needs neither weights nor a cached reference.
        needs: what the objective reads, see `requirements`.
    """

    family: Family
    rewards: RewardStore | None = None
    fusion: Fusion = field(default_factory=Fusion)
    needs: frozenset[str] = frozenset()
    max_length: int | None = None
    prefix: Prefix = "shared"
    beside: Callable[[Sequence[PreferencePair], Sequence[Encoded]], Batch] | None = None
    """Makes what else belongs to a batch, e.g. rows with another view of the picture."""
    keeps_hidden: bool = False
    """Whether the reference's hidden states are needed without a KL too."""
    weights_from: RewardStore | None = None
    """Store of the weights, where it is another than that of the reference."""

    def __call__(self, pairs: Sequence[PreferencePair]) -> Batch:
        encoded = [self.family.encode(pair, max_length=self.max_length) for pair in pairs]
        prefix: Prefix = self.prefix if self.family.shares_prefix else "separate"
        batch = pack(self.family, encoded, prefix=prefix)
        if self.rewards is not None:
            for each in encoded:
                _check_token_ids(self.rewards, each)
            batch.update(self._stored(self.rewards, encoded))
        if "weights" not in batch:
            batch["weights"] = batch["mask"].float()
        if self.beside is not None:
            batch.update(self.beside(pairs, encoded))
        return batch

    def _stored(self, rewards: RewardStore, encoded: Sequence[Encoded]) -> Batch:
        stored: Batch = {}
        responses = [(each.pair_id, side) for each in encoded for side in SIDES]
        if "weights" in self.needs:
            signals = self.weights_from or rewards
            weights = [signals.weights(each.pair_id, self.fusion) for each in encoded]
            sides = [values for pair in weights for values in (pair.chosen, pair.rejected)]
            stored["weights"] = _padded(sides)
            net = [pair.net_shared_coefficient for pair in weights]
            stored["net_shared_coefficient"] = torch.tensor([np.nan if value is None else value for value in net])
            if self.fusion.learned:
                parts = [part for each in encoded for part in signals.normalised_signals(each.pair_id, self.fusion)]
                columns = [_padded([signals[:, column] for signals, _ in parts]) for column in range(3)]
                stored["signals"] = torch.stack(columns, dim=-1)
                stored["is_scored"] = _padded([is_scored for _, is_scored in parts]).bool()
        stored["reference_logps"] = _padded([rewards.get(*response).logps for response in responses])
        if (kl_direction(self.needs) or self.keeps_hidden) and rewards.has_hidden:
            stored["reference_hidden"] = torch.cat([rewards_hidden(rewards, *response) for response in responses])
        elif kl_direction(self.needs) and rewards.has_top:
            kept = [rewards.top(*response) for response in responses]
            ids, logps = (torch.from_numpy(np.concatenate(each)) for each in zip(*kept, strict=True))
            stored |= {"reference_top_ids": ids, "reference_top_logps": logps}
        return stored


def stored_logps(rewards: RewardStore, encoded: Sequence[Encoded]) -> Float[Tensor, "pairs 2 tokens"]:
    """A store's log-probs of pairs, after checking that it holds the same tokens."""
    for each in encoded:
        _check_token_ids(rewards, each)
    return _padded([rewards.get(each.pair_id, side).logps for each in encoded for side in SIDES])


def rewards_hidden(rewards: RewardStore, pair_id: str, side: Side) -> Float[Tensor, "tokens width"]:
    """The reference's final hidden states of one response, in the precision they were stored in."""
    values = torch.from_numpy(np.array(rewards.hidden(pair_id, side)))
    return values.view(torch.bfloat16) if values.dtype == torch.int16 else values


def _padded(rows: Sequence[np.ndarray]) -> Float[Tensor, "pairs 2 tokens"]:
    table = torch.zeros(len(rows), max(len(row) for row in rows))
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.float32))
    return table.view(len(rows) // 2, 2, -1)


def _check_token_ids(rewards: RewardStore, encoded: Encoded) -> None:
    if encoded.pair_id not in rewards:
        raise UserError(f"pair {encoded.pair_id} is not in the reward store {rewards.path}. Score it first: `catpo score`.")
    for side in SIDES:
        fresh, stored = encoded.response_ids[side], list(rewards.get(encoded.pair_id, side).token_ids)
        if fresh == stored:
            continue
        first = next((at for at, (a, b) in enumerate(zip(fresh, stored, strict=False)) if a != b), min(len(fresh), len(stored)))
        raise UserError(
            f"pair {encoded.pair_id}, {side}: the store's token ids differ from the fresh ones at token {first} "
            f"({stored[first : first + 1]} stored, {fresh[first : first + 1]} now; {len(stored)} against {len(fresh)} tokens). "
            "The tokenizer or the text has changed: score again."
        )
