"""Preference pairs as training batches: packed rows, token weights and the stored reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from catpo.core.errors import UserError
from catpo.core.types import SIDES, UNRANKED, PreferencePair, Side
from catpo.models.family import Encoded, Family
from catpo.models.packing import Batch, Prefix, pack
from catpo.models.tensors import common_length, pad_indices
from catpo.models.transfer import HostBatch
from catpo.rewards.fusion import Fusion
from catpo.rewards.store import RewardStore
from catpo.rewards.word_prefixes import Tokens
from catpo.rewards.word_rewards import WordReward
from catpo.training.pair_stats import Needs, Quantity, kl_need


@dataclass
class PairCollator:
    """Pairs in, batch out: encodes, looks weights and reference up by (id, side), and verifies the stored token ids.

    Args:
        reader: the model's family; its weights are not used, so it should have none where worker processes make the batches
            (`Family.reader`).
        rewards: the store; None for an objective that needs neither weights nor a cached reference.
        needs: what the objective reads, see `requirements`.
    """

    reader: Family
    rewards: RewardStore | None = None
    fusion: Fusion = field(default_factory=Fusion)
    needs: Needs = frozenset()
    max_length: int | None = None
    prefix: Prefix = "shared"
    extra: Callable[[Sequence[PreferencePair], Sequence[Encoded]], Batch] | None = None
    """Adds to a batch, e.g. rows with another view of the picture."""
    keeps_hidden: bool = False
    """Whether the reference's hidden states are needed even without a KL."""
    weights_from: RewardStore | None = None
    """Store of the weights, if another than that of the reference."""

    ranks: bool = True
    """Whether the objective depends on which response is the chosen one, so that unranked pairs cannot be trained on."""

    def __call__(self, pairs: Sequence[PreferencePair]) -> Batch:
        if self.ranks:
            check_ranked(pairs)
        encoded = self.reader.encode_all(pairs, max_length=self.max_length)
        prefix: Prefix = self.prefix if self.reader.shares_prefix else "separate"
        batch = pack(self.reader, encoded, prefix=prefix)
        batch["weights"] = batch["mask"].float()
        if self.rewards is not None:
            batch["reference_logps"] = stored_logps(self.rewards, encoded)
            batch |= self._reference_distribution(self.rewards, batch["responses"])
            if self._word_reward is not None:
                batch["tilt"] = self._tilt(self.rewards, pairs, encoded, batch["responses"])
            if Quantity("weights") in self.needs:
                batch |= self.weights_of(batch["pair_ids"])
        return HostBatch(batch if self.extra is None else batch | self.extra(pairs, encoded))

    def weights_of(self, pair_ids: Sequence[str]) -> Batch:
        """Token weights of Eq. 7 by the latest store, and the signals behind them if their coefficients are learned."""
        rewards = self.weights_from or self.rewards
        assert rewards is not None
        weights, net_shared, signals, is_scored = [], [], [], []
        for pair_id in pair_ids:
            pair_weights = rewards.weights(pair_id, self.fusion)
            weights += [pair_weights.chosen, pair_weights.rejected]
            net_shared.append(pair_weights.net_shared_coefficient)
            if self.fusion.learned:
                for values, flags in rewards.normalised_signals(pair_id, self.fusion):
                    signals.append(values)
                    is_scored.append(flags)
        batch: Batch = {"weights": _padded(weights), "net_shared_coefficient": torch.tensor(net_shared)}
        if self.fusion.learned:
            columns = [_padded([values[:, column] for values in signals]) for column in range(3)]
            batch["signals"] = torch.stack(columns, dim=-1)  # (pair, side, token, signal)
            batch["is_scored"] = _padded(is_scored).bool()
        return batch

    @cached_property
    def _divergence(self) -> Quantity | None:
        return kl_need(self.needs)

    @cached_property
    def _word_reward(self) -> WordReward | None:
        if self._divergence is None or not self._divergence.reward or self.rewards is None:
            return None
        return WordReward.of(self._divergence.reward).ready([*self.rewards.words_by_pictures.values()])

    def _tilt(
        self,
        rewards: RewardStore,
        pairs: Sequence[PreferencePair],
        encoded: Sequence[Encoded],
        responses: Sequence[tuple[str, Side]],
    ) -> Batch:
        """What tilts the reference: a table of token rewards per pair and beginning of a word in its responses, and which of
        them each response token reads.
        """
        assert self._word_reward is not None and self._divergence is not None
        words = [self._word_reward.of_tokens(rewards.words(pair), self._divergence.tokens) for pair in pairs]
        numbers = {item.pair_id: number for number, item in enumerate(encoded)}
        tables: dict[tuple[int, Tokens], int] = {}  # number of a pair, and the beginning of a word in one of its responses
        read = []
        for pair_id, side in responses:
            number = numbers[pair_id]
            for prefix in words[number].open_before(encoded[number].response_ids[side]):
                read.append(tables.setdefault((number, prefix), len(tables)))
        entries = [words[number].rewards(prefix) for number, prefix in tables]
        return {
            "ids": pad_indices([[*each] for each in entries]),
            "rewards": pad_sequence(
                [torch.tensor([*each.values()], dtype=torch.float32) for each in entries], batch_first=True
            ),
            "table": torch.tensor(read),
        }

    def _reference_distribution(self, rewards: RewardStore, responses: Sequence[tuple[str, Side]]) -> Batch:
        """What the store holds of the reference's next-token distributions, if the objective reads it: exact or top-k.

        `responses` are those of the rows, each once.
        """
        reads_kl = self._divergence is not None
        if (reads_kl or self.keeps_hidden) and rewards.has_hidden:
            return {"reference_hidden": torch.cat([_hidden(rewards, *response) for response in responses])}
        if not (reads_kl and rewards.has_top):
            return {}
        ids, logps = zip(*(rewards.top(*response) for response in responses), strict=True)
        return {
            "reference_top_ids": torch.from_numpy(np.concatenate(ids)),
            "reference_top_logps": torch.from_numpy(np.concatenate(logps)),
        }


def check_ranked(pairs: Sequence[PreferencePair]) -> None:
    """Raise UserError for a pair of which neither response is known to be the better one."""
    for pair in pairs:
        if pair.meta.get(UNRANKED):
            raise UserError(
                f"pair {pair.id} is unranked: neither response is known to be the better one. Train on it with "
                "tilt(answers='both'), or make ranked pairs (`catpo list pairings`)."
            )


def stored_logps(rewards: RewardStore, encoded: Sequence[Encoded]) -> Float[Tensor, "pairs 2 tokens"]:
    """A store's log-probs of pairs, after checking that it holds the same tokens.

    Raises:
        UserError: a pair was not scored, or its tokens have changed since.
    """
    for item in encoded:
        _check_token_ids(rewards, item)
    return _padded([rewards.get(item.pair_id, side).logps for item in encoded for side in SIDES])


def _hidden(rewards: RewardStore, pair_id: str, side: Side) -> Float[Tensor, "tokens width"]:
    """The reference's final hidden states of one response, in the precision they were stored in."""
    values = torch.from_numpy(np.array(rewards.hidden(pair_id, side)))
    return values.view(torch.bfloat16) if values.dtype == torch.int16 else values  # NumPy has no bfloat16


def _padded(rows: Sequence[np.ndarray]) -> Float[Tensor, "pairs 2 tokens"]:
    table = torch.zeros(len(rows), max(len(row) for row in rows))
    for index, row in enumerate(rows):
        table[index, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.float32))
    return table.view(len(rows) // 2, 2, -1)


def _check_token_ids(rewards: RewardStore, encoded: Encoded) -> None:
    if encoded.pair_id not in rewards:
        raise UserError(f"pair {encoded.pair_id} is not in the reward store {rewards.path}. Score it first: `catpo score`.")
    for side in SIDES:
        fresh, stored = encoded.response_ids[side], list(rewards.get(encoded.pair_id, side).token_ids)
        if fresh == stored:
            continue
        first = common_length(fresh, stored)
        raise UserError(
            f"pair {encoded.pair_id}, {side}: the store's token ids differ from the fresh ones at token {first} "
            f"({stored[first : first + 1]} stored, {fresh[first : first + 1]} now; {len(stored)} against {len(fresh)} tokens). "
            "The tokenizer or the text has changed: score again."
        )
