"""The reward store: raw signals of every response token in shards that are written once and verified when read.

Knows nothing of models. Finished weights are not in it: `RewardStore.weights` makes them with any `Fusion`. The files are
described in docs/reference/rewards-format.md.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from catpo.core.errors import UserError
from catpo.core.types import SIDES, PatchGrid, PreferencePair, Side
from catpo.rewards.description import check_same_store, flat_fields, hash_pairs, json_fields, read_description, shard_count
from catpo.rewards.fusion import Fusion, PairWeights, ResponseSignals, fuse, normalised_signals
from catpo.rewards.shards import ResponseRow, Shard, ShardColumns
from catpo.rewards.words import NO_WORDS, WordRow, WordTable, by_pictures, digest_of

KEPT_BYTES = 1 << 30
"""Token columns that an open store keeps in memory: all of them for some hundred thousand pairs, then the last used."""
TOP = ("top_ids", "top_logps")
"""Arrays of the reference's k most likely tokens, and of their log-probs with that of all others last."""
ABSENT = {
    "hidden": "hidden states. Score again with them (`catpo score --cache hidden`), or train with reference='online'.",
    "topk": "most likely tokens. Score again with them (`catpo score --cache 'topk(k=64)'`).",
    "maps": "attention maps. Score again with them (`catpo score --attention-maps`).",
}
"""Field of `store.json` -> what a store without these arrays does not hold, and what to do."""
Made = TypeVar("Made")


class RewardStore:
    """A complete store, read by pair and side.

    In memory are the ids of the pairs and the token columns that were read last, up to `KEPT_BYTES`, so that a store of a
    million pairs takes no more than a small one. Hidden states and maps are read when asked for.

    All methods raise UserError for a pair that is not in the store, an array that was not stored, and a damaged shard.
    """

    def __init__(self, path: Path, provenance: dict[str, Any], shards: list[Shard]) -> None:
        self.path = path
        self.provenance: Mapping[str, Any] = provenance
        """What `store.json` says: model, options, versions."""
        self.pair_ids: list[str] = []
        """All pairs, in the order in which they were scored."""
        self._shards = shards
        self._kept: OrderedDict[int, ShardColumns] = OrderedDict()
        self._quantiles: dict[bool, dict[str, NDArray[np.floating]]] = {}
        is_same = True
        for shard in shards:
            ids, sides = shard.read_ids()
            is_same &= sides == len(ids[::2]) * list(SIDES) and ids[::2] == ids[1::2]
            self.pair_ids += ids[::2]
        is_same &= len(self.pair_ids) == provenance["pair_count"] and hash_pairs(self.pair_ids) == provenance["pairs_hash"]
        if not is_same:
            raise UserError(
                f"{path}: the shards hold other pairs than store.json says. Score the pairs again into a new folder."
            )
        self._number = {pair_id: number for number, pair_id in enumerate(self.pair_ids)}

    @classmethod
    def open(cls, path: str | Path) -> RewardStore:
        """Open a store and verify its token columns against their checksums.

        Raises:
            UserError: there is no store, it is incomplete, or a shard is damaged.
        """
        path = Path(path)
        provenance = read_description(path)
        count = shard_count(provenance)
        written = sum(file.stem.isdecimal() and int(file.stem) < count for file in path.glob("shards/*.json"))
        if written < count or not provenance.get("complete"):
            raise UserError(
                f"{path} is incomplete: {written} of {count} shards are there. Run the same `catpo score` again to continue."
            )
        return cls(path, provenance, [Shard(path, number) for number in range(count)])

    def __reduce__(self) -> tuple[Any, ...]:
        return RewardStore.open, (self.path,)  # open files cannot be pickled; worker processes open their own

    def __len__(self) -> int:
        return len(self.pair_ids)

    def __contains__(self, pair_id: object) -> bool:
        return pair_id in self._number

    def __iter__(self) -> Iterator[str]:
        return iter(self.pair_ids)

    @property
    def signals(self) -> list[str]:
        """Names of the stored signals, with their options."""
        return list(self.provenance["signals"])

    @property
    def word_features(self) -> list[str]:
        """What is kept of words that the reference might name; empty if nothing."""
        return list(self.provenance.get("words", {}).get("features", []))

    def words(self, pair: PreferencePair) -> WordTable:
        """What the reference says of words that it might name of the pair's pictures, from all pairs about these."""
        self._find(pair.id, "chosen")
        if pair.id in self._word_tables:
            return self._word_tables[pair.id]
        return self.words_by_pictures.get(digest_of(pair.images), NO_WORDS)  # its own responses reach none

    @cached_property
    def words_by_pictures(self) -> dict[str, WordTable]:
        """Digest of pictures -> the words of all pairs about them."""
        return by_pictures(self._word_rows, self.word_features)

    @cached_property
    def _word_tables(self) -> dict[str, WordTable]:
        """By pair; one whose responses reach no word has none."""
        return {row.pair_id: self.words_by_pictures[row.pictures] for row in self._word_rows}

    @cached_property
    def _word_rows(self) -> list[WordRow]:
        return [row for shard in self._shards for row in shard.read_words(self.word_features)] if self.word_features else []

    @property
    def has_hidden(self) -> bool:
        return bool(self.provenance.get("hidden"))

    @property
    def has_top(self) -> bool:
        """Whether the reference's most likely tokens are stored."""
        return bool(self.provenance.get("topk"))

    @property
    def has_maps(self) -> bool:
        return bool(self.provenance.get("maps"))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything in the store but the path of the model and the list of skipped pairs."""
        digest = hashlib.blake2b(digest_size=16)
        hashed = {field: value for field, value in self.provenance.items() if field not in ("model", "skipped")}
        digest.update(json.dumps(hashed, sort_keys=True).encode())
        for shard in self._shards:
            digest.update(json.dumps(shard.checksums, sort_keys=True).encode())
        return digest.hexdigest()

    def verify(self, expected: Mapping[str, Any]) -> None:
        """Raise UserError if the store was made with other values; only the fields given are compared."""
        stored, now = flat_fields(self.provenance), flat_fields(json_fields(expected))
        model = self.provenance.get("model", "the same model")
        next_step = f"Use {model} as it was then, or score the pairs again with `catpo score`."
        check_same_store({field: stored.get(field) for field in now}, now, f"{self.path} was scored with", next_step)

    def get(self, pair_id: str, side: Side) -> ResponseRow:
        """One response: token ids, signals, reference log-probs, labels, pieces, patch grids."""
        number, row = self._find(pair_id, side)
        columns = self._columns_of(number)
        tokens = columns.tokens(row)
        return ResponseRow(
            **vars(self._signals_of(pair_id, side)),
            pair_id=pair_id,
            side=side,
            logps=columns.values["logps"][tokens],
            labels=columns.values["labels"][tokens],
            pieces=columns.pieces_of(row),
            grids=columns.grids_of(row),
        )

    def weights(self, pair_id: str, fusion: Fusion | None = None) -> PairWeights:
        """Weights of a pair's tokens (Eq. 6-7); raises UserError if the fusion reads a signal that was not scored."""
        return self._fused(fuse, pair_id, fusion or Fusion())

    def normalised_signals(self, pair_id: str, fusion: Fusion) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        """Per response of a pair, the signals that Eq. 11 sums, [tokens, 3], and which tokens are scored."""
        return self._fused(normalised_signals, pair_id, fusion)

    def _fused(self, function: Callable[..., Made], pair_id: str, fusion: Fusion) -> Made:
        quantiles = self.quantiles(with_special=fusion.eos == "scored") if fusion.normalise == "quantile" else None
        chosen, rejected = (self._signals_of(pair_id, side) for side in SIDES)
        try:
            return function(chosen, rejected, fusion, quantiles)
        except UserError as error:
            raise UserError(f"pair {pair_id}: {error}") from error

    def quantiles(self, *, with_special: bool = False) -> dict[str, NDArray[np.floating]]:
        """Signal -> all its values in the store, sorted; without those of special tokens unless asked for."""
        if with_special not in self._quantiles:
            parts: dict[str, list[NDArray[Any]]] = {name: [] for name in self.signals}
            for columns in self._all_columns():
                is_counted = slice(None) if with_special else ~columns.values["is_special"]
                for name, values in parts.items():
                    values.append(columns.values[name][is_counted])
            self._quantiles[with_special] = {name: np.sort(np.concatenate(values)) for name, values in parts.items()}
        return self._quantiles[with_special]

    def hidden(self, pair_id: str, side: Side) -> NDArray[np.generic]:
        """The reference's final hidden states, [tokens, width]; bfloat16 comes as int16 of the same bits."""
        return self._array("hidden", "hidden", pair_id, side)

    def top(self, pair_id: str, side: Side) -> tuple[NDArray[np.integer], NDArray[np.floating]]:
        """The reference's k most likely tokens, [tokens, k], and [tokens, k + 1] their log-probs and that of all others."""
        ids, logps = (self._array("topk", name, pair_id, side) for name in TOP)
        return ids, logps

    def maps(self, pair_id: str, side: Side) -> NDArray[np.floating]:
        """Attention maps, float16 [tokens, patches of `map_grids`]."""
        return self._array("maps", "maps", pair_id, side, sum(grid.size for grid in self.map_grids(pair_id, side)))

    def map_grids(self, pair_id: str, side: Side) -> list[PatchGrid]:
        """The grids whose patches attention was recorded on: those of all pictures, or of the one that was chosen."""
        number, row = self._find(pair_id, side)
        picture = self.provenance.get("attention", {}).get("patches", "all")
        return [grid for grid in self._columns_of(number).grids_of(row) if picture in ("all", grid.picture)]

    def _array(self, field: str, name: str, pair_id: str, side: Side, width: int | None = None) -> NDArray[Any]:
        if not self.provenance.get(field):
            raise UserError(f"{self.path} holds no {ABSENT[field]}")
        number, row = self._find(pair_id, side)
        return self._shards[number].read_array(name, self._columns_of(number).tokens(row), width)

    def _find(self, pair_id: str, side: Side) -> tuple[int, int]:
        """The shard of a response, and its row there."""
        if pair_id not in self._number or side not in SIDES:
            raise UserError(
                f"pair {pair_id} ({side}) is not in {self.path}, which holds {len(self)} pairs. Score it with `catpo score`."
            )
        shard, pair = divmod(self._number[pair_id], self.provenance["shard_size"])
        return shard, 2 * pair + SIDES.index(side)

    def _columns_of(self, number: int) -> ShardColumns:
        """A shard's token columns, cached; the least recently used shards are dropped beyond `KEPT_BYTES`."""
        if number not in self._kept:
            self._kept[number] = self._shards[number].read_columns(self.signals)
            while len(self._kept) > 1 and sum(columns.nbytes for columns in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def _all_columns(self) -> Iterator[ShardColumns]:
        return map(self._columns_of, range(len(self._shards)))

    def _signals_of(self, pair_id: str, side: Side) -> ResponseSignals:
        number, row = self._find(pair_id, side)
        columns = self._columns_of(number)
        tokens, values = columns.tokens(row), columns.values
        return ResponseSignals(
            token_ids=values["token_ids"][tokens],
            is_special=values["is_special"][tokens],
            signals={name: values[name][tokens] for name in self.signals},
        )
