"""The reward store: raw signals of every response token in shards that are written once and verified when read.

Knows nothing of models. Finished weights are not in it: `RewardStore.weights` makes them with any `Fusion`. The files are
described in docs/rewards-format.md.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catpo.core.errors import UserError
from catpo.core.types import SIDES, Side
from catpo.files.json_files import read_json
from catpo.rewards.description import (
    FORMAT,
    TOP,
    check_description,
    check_same_store,
    flat_fields,
    hash_pairs,
    json_fields,
    shard_count,
)
from catpo.rewards.fusion import Fusion, PairWeights, ResponseSignals, fuse, normalised_signals
from catpo.rewards.shards import ResponseRow, Shard, ShardColumns, as_grids

KEPT_BYTES = 1 << 30
"""Token columns that an open store keeps in memory: all of them for some hundred thousand pairs, then the last used."""


class RewardStore:
    """A complete store, read by pair and side.

    In memory are the ids of the pairs and the token columns that were read last, up to `KEPT_BYTES`; a store of a million pairs
    takes no more than a small one. Hidden states and maps are read when asked for.
    """

    def __init__(self, path: Path, provenance: dict[str, Any], shards: list[Shard]) -> None:
        self.path = path
        self.provenance: Mapping[str, Any] = provenance
        """What `store.json` says: model, options, versions."""
        self._shards = shards
        self._kept: OrderedDict[int, ShardColumns] = OrderedDict()
        self.pair_ids: list[str] = []
        """All pairs, in the order in which they were scored."""
        for shard in shards:
            ids, sides = shard.read_ids()
            if sides != len(ids[::2]) * list(SIDES) or ids[::2] != ids[1::2]:
                raise self._other_pairs()
            self.pair_ids += ids[::2]
        if len(self.pair_ids) != provenance["pair_count"] or hash_pairs(self.pair_ids) != provenance["pairs_hash"]:
            raise self._other_pairs()
        self._number = {pair_id: number for number, pair_id in enumerate(self.pair_ids)}
        self._quantiles: dict[bool, dict[str, NDArray[np.floating]]] = {}

    def _other_pairs(self) -> UserError:
        return UserError(
            f"{self.path}: the shards hold other pairs than store.json says. Score the pairs again into a new folder."
        )

    @classmethod
    def open(cls, path: str | Path) -> RewardStore:
        """Open a store and verify its token columns against their checksums.

        Raises:
            UserError: there is no store, it is incomplete, or a shard is damaged.
        """
        path = Path(path)
        if not (path / "store.json").is_file():
            raise UserError(f"{path} is not a reward store (no store.json in it). `catpo score` makes one.")
        provenance = read_json(path / "store.json", made_by="catpo score")
        if provenance.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {provenance.get('format')!r}, this catpo reads {FORMAT}. Score again, or update catpo."
            )
        absent = {"signals", "pair_count", "shard_size", "pairs_hash"} - set(provenance)
        if absent:
            raise UserError(
                f"{path}/store.json does not say {', '.join(sorted(absent))}. Score the pairs again into a new folder."
            )
        check_description(path, provenance)
        count = shard_count(provenance)
        there = sum(each.stem.isdecimal() and int(each.stem) < count for each in path.glob("shards/*.json"))
        if there < count or not provenance.get("complete"):
            raise UserError(
                f"{path} is incomplete: {there} of {count} shards are there. Run the same `catpo score` again, "
                "it goes on where it stopped."
            )
        return cls(path, provenance, [Shard(path, number) for number in range(count)])

    def __reduce__(self) -> tuple[Any, ...]:
        return RewardStore.open, (self.path,)  # open files do not travel to worker processes

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pair_ids)

    def __contains__(self, pair_id: object) -> bool:
        return pair_id in self._number

    def __iter__(self) -> Iterator[str]:
        """Ids of the pairs."""
        return iter(self.pair_ids)

    @property
    def signals(self) -> list[str]:
        """Names of the stored signals, with their options."""
        return list(self.provenance["signals"])

    @property
    def has_hidden(self) -> bool:
        return bool(self.provenance.get("hidden"))

    @property
    def has_top(self) -> bool:
        """Whether the reference's likeliest words are kept."""
        return bool(self.provenance.get("topk"))

    @cached_property
    def has_labels(self) -> bool:
        """Whether any token is known to be grounded or hallucinated."""
        return any((columns.values["labels"] >= 0).any() for columns in self._all_columns())

    @property
    def has_maps(self) -> bool:
        return bool(self.provenance.get("maps"))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything in the store; where the model lies and what was left out do not count."""
        digest = hashlib.blake2b(digest_size=16)
        known = {field: value for field, value in self.provenance.items() if field not in ("model", "skipped")}
        digest.update(json.dumps(known, sort_keys=True).encode())
        for shard in self._shards:
            digest.update(json.dumps(shard.checksums, sort_keys=True).encode())
        return digest.hexdigest()

    def verify(self, expected: Mapping[str, Any]) -> None:
        """Check that the store was made with what is in use now; only the fields given are compared.

        Raises:
            UserError: a field differs; names it with both values.
        """
        before, now = flat_fields(self.provenance), flat_fields(json_fields(expected))
        next_step = (
            f"Use {self.provenance.get('model', 'the same')} as it was then, or score the pairs again with `catpo score`."
        )
        check_same_store({field: before.get(field) for field in now}, now, f"{self.path} was scored with", next_step)

    def get(self, pair_id: str, side: Side) -> ResponseRow:
        """One response: token ids, signals, reference log-probs, labels, pieces, patch grids.

        Raises:
            UserError: the pair is not in the store.
        """
        columns, row = self._at(pair_id, side)
        tokens, values = columns.tokens(row), columns.values
        return ResponseRow(
            pair_id=pair_id,
            side=side,
            token_ids=values["token_ids"][tokens],
            logps=values["logps"][tokens],
            signals={name: values[name][tokens] for name in self.signals},
            labels=values["labels"][tokens],
            pieces=columns.pieces_of(row),
            is_special=values["is_special"][tokens],
            grids=as_grids(columns.grids_of(row)),
        )

    def weights(self, pair_id: str, fusion: Fusion | None = None) -> PairWeights:
        """Weights of a pair's tokens (Eq. 6-7).

        Raises:
            UserError: the pair is not in the store, or the fusion cannot be made from its signals.
        """
        fusion = fusion or Fusion()
        table = self.quantiles(with_special=fusion.eos == "scored") if fusion.normalise == "quantile" else None
        chosen, rejected = self._signals_of(pair_id, "chosen"), self._signals_of(pair_id, "rejected")
        try:
            return fuse(chosen, rejected, fusion, table)
        except UserError as error:
            raise UserError(f"pair {pair_id}: {error}") from error

    def normalised_signals(self, pair_id: str, fusion: Fusion) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        """Per response of a pair, the signals that Eq. 11 sums, [tokens, 3], and which tokens are scored.

        Raises:
            UserError: the pair is not in the store, or a signal is missing.
        """
        table = self.quantiles(with_special=fusion.eos == "scored") if fusion.normalise == "quantile" else None
        chosen, rejected = self._signals_of(pair_id, "chosen"), self._signals_of(pair_id, "rejected")
        try:
            return normalised_signals(chosen, rejected, fusion, table)
        except UserError as error:
            raise UserError(f"pair {pair_id}: {error}") from error

    def quantiles(self, *, with_special: bool = False) -> dict[str, NDArray[np.floating]]:
        """Signal -> all its values in the store, sorted; special tokens count only when asked for."""
        if with_special not in self._quantiles:
            parts: dict[str, list[NDArray[Any]]] = {name: [] for name in self.signals}
            for columns in self._all_columns():
                is_counted = slice(None) if with_special else ~columns.values["is_special"]
                for name, values in parts.items():
                    values.append(columns.values[name][is_counted])
            self._quantiles[with_special] = {name: np.sort(np.concatenate(values)) for name, values in parts.items()}
        return self._quantiles[with_special]

    def hidden(self, pair_id: str, side: Side) -> NDArray[np.generic]:
        """The reference's final hidden states, [tokens, width]; bfloat16 comes as int16 of the same bits.

        Raises:
            UserError: the store holds none, or the shard is damaged.
        """
        if not self.has_hidden:
            raise UserError(
                f"{self.path} holds no hidden states. Score again with them (`catpo score --cache hidden`), or train with "
                "reference='online'."
            )
        shard, first, last = self._place(pair_id, side)
        return shard.read_array("hidden", slice(first, last))

    def top(self, pair_id: str, side: Side) -> tuple[NDArray[np.integer], NDArray[np.floating]]:
        """The reference's k likeliest words, [tokens, k], and [tokens, k + 1] their log-probs and that of all others.

        Raises:
            UserError: the store holds none, or the shard is damaged.
        """
        if not self.has_top:
            raise UserError(
                f"{self.path} holds no likeliest words. Score again with them (`catpo score --cache 'topk(k=64)'`)."
            )
        shard, first, last = self._place(pair_id, side)
        ids, logps = (shard.read_array(name, slice(first, last)) for name in TOP)
        return ids, logps

    def maps(self, pair_id: str, side: Side) -> NDArray[np.floating]:
        """Attention maps, float16 [tokens, patches].

        Raises:
            UserError: the store holds none, or the shard is damaged.
        """
        if not self.has_maps:
            raise UserError(f"{self.path} holds no attention maps. Score again with them (`catpo score --attention-maps`).")
        shard, first, last = self._place(pair_id, side)
        return shard.read_array("maps", slice(first, last), self._patch_count(pair_id, side))

    def _patch_count(self, pair_id: str, side: Side) -> int:
        """Patches that attention was recorded on: of all pictures, or of the one that was asked for."""
        only = self.provenance.get("attention", {}).get("patches", "all")
        columns, row = self._at(pair_id, side)
        pictures, rows, per_row = columns.grids_of(row)[:, :3].T
        return int((rows * per_row)[pictures == only if isinstance(only, int) else slice(None)].sum())

    def _at(self, pair_id: str, side: Side) -> tuple[ShardColumns, int]:
        """The columns that hold a response, and its row in them."""
        number, row = self._find(pair_id, side)
        return self._columns_of(number), row

    def _find(self, pair_id: str, side: Side) -> tuple[int, int]:
        """The shard of a response, and its row there."""
        if pair_id not in self._number or side not in SIDES:
            raise UserError(
                f"pair {pair_id} ({side}) is not in {self.path}, which holds {len(self)} pairs. Score it with `catpo score`."
            )
        shard, pair = divmod(self._number[pair_id], self.provenance["shard_size"])
        return shard, 2 * pair + SIDES.index(side)

    def _columns_of(self, number: int) -> ShardColumns:
        """A shard's token columns: kept from before, or read, while those not used for longest are let go."""
        if number not in self._kept:
            self._kept[number] = ShardColumns.of(self._shards[number].read_table(self.signals), self.signals, self.path)
            while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def _all_columns(self) -> Iterator[ShardColumns]:
        return map(self._columns_of, range(len(self._shards)))

    def _signals_of(self, pair_id: str, side: Side) -> ResponseSignals:
        columns, row = self._at(pair_id, side)
        tokens, values = columns.tokens(row), columns.values
        return ResponseSignals(
            token_ids=values["token_ids"][tokens],
            is_special=values["is_special"][tokens],
            signals={name: values[name][tokens] for name in self.signals},
        )

    def _place(self, pair_id: str, side: Side) -> tuple[Shard, int, int]:
        """The shard of a response, and its first and behind-last token there."""
        number, row = self._find(pair_id, side)
        tokens = self._columns_of(number).tokens(row)
        return self._shards[number], tokens.start, tokens.stop
