"""The reward store: raw signals of every response token in shards that are written once and verified when read.

Knows nothing of models. Finished weights are not in it: `RewardStore.weights` makes them with any `Fusion`. The files are
described in docs/rewards-format.md.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as to_safetensors

from catpo.core.errors import UserError
from catpo.core.types import SIDES, Side
from catpo.files.json_files import make_folder, read_json, write_json
from catpo.rewards.fusion import Fusion, PairWeights, ResponseSignals, fuse, normalised_signals
from catpo.rewards.shards import COLUMNS, ResponseRow, Shard, ShardColumns, as_grids, check_row, checksum, to_parquet

FORMAT = 2
KEPT_BYTES = 1 << 30
"""Token columns that an open store keeps in memory: all of them for some hundred thousand pairs, then the last used."""
TOP = ("top_ids", "top_logps")
"""Arrays of the reference's likeliest words, and of their log-probs with that of all others last."""
KNOWN_AS = {
    "model_hash": "model",
    "processor_hash": "processor",
    "template_hash": "chat template",
    "pairs_hash": "set of pairs",
}
"""What messages call the fields of `store.json` that are hashes."""


class RewardWriter:
    """Writes a store shard by shard; a killed run goes on with the shards that are missing.

    Hold `catpo.runs.lock(path)` as long as you write.

        with lock(path):
            writer = RewardWriter.create_or_resume(path, provenance, pair_ids)
            for shard in writer.missing_shards():
                writer.write_shard(shard, [row for pair_id in pair_ids[writer.pairs_of(shard)] for row in rows(pair_id)])
            writer.finish()
    """

    def __init__(
        self, path: Path, description: dict[str, Any], pair_ids: Sequence[str], *, written: Iterable[int] | None = None
    ) -> None:
        self.path = path
        self.description = description
        self.pair_ids = list(pair_ids)
        self.shards = [Shard(path, number) for number in range(_shard_count(description))]
        whole = (shard.number for shard in self.shards if shard.is_whole()) if written is None else written
        self._written = set(whole)

    @classmethod
    def create_or_resume(
        cls, path: str | Path, provenance: Mapping[str, Any], pair_ids: Sequence[str], *, shard_size: int = 64
    ) -> RewardWriter:
        """A writer for the store at `path`, which may have been begun before.

        Args:
            path: folder of the store; new, empty, or a store of the same provenance and pairs.
            provenance: everything that decides the numbers, as JSON: hashes of model, processor and template, `signals`
                (names of the columns), `hidden` and `maps` (whether these arrays are kept), options, versions.
            pair_ids: all pairs, in their order.
            shard_size: pairs per shard.

        Raises:
            UserError: there is no pair, or one twice; the store was begun with another model, other pairs, or other options.
        """
        path = Path(path)
        description = _describe(provenance, pair_ids, shard_size)
        if (path / "store.json").exists():
            stored = read_json(path / "store.json", made_by="catpo score")
            _check_same(
                stored,
                description,
                f"{path} was begun with",
                "Give the same again, choose another --output, or delete the folder.",
            )
            description.update({"model": stored["model"]} if "model" in stored else {})  # it may have moved since
        else:
            path.mkdir(parents=True, exist_ok=True)
            check_place(path)
            write_json(path / "store.json", description)
        make_folder(path / "shards")
        for leftover in [*path.glob(".*.part"), *path.glob("shards/.*.part")]:
            leftover.unlink()  # of a killed run
        return cls(path, description, pair_ids)

    @classmethod
    def join(cls, path: str | Path, pair_ids: Sequence[str]) -> RewardWriter:
        """A further writer, in another process, for a store that `create_or_resume` has begun; it is told what to write."""
        path = Path(path)
        return cls(path, read_json(path / "store.json", made_by="catpo score"), pair_ids, written=range(0))

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are still to be written, a damaged one among them."""
        return [shard.number for shard in self.shards if shard.number not in self._written]

    def pairs_of(self, shard: int) -> slice:
        """Which pairs, in the order given, a shard holds."""
        size = self.description["shard_size"]
        return slice(shard * size, min((shard + 1) * size, len(self.pair_ids)))

    def write_shard(
        self,
        shard: int,
        rows: Sequence[ResponseRow],
        *,
        hidden: NDArray[np.generic] | None = None,
        maps: NDArray[np.floating] | None = None,
        top: tuple[NDArray[np.integer], NDArray[np.floating]] | None = None,
    ) -> None:
        """Write a whole shard; until this returns, a reader sees none of it.

        Args:
            shard: its number.
            rows: chosen and rejected of each of its pairs, in order.
            hidden: [tokens, width], final hidden states of all rows' tokens; bfloat16 as int16 of the same bits.
            maps: [tokens, patches], attention over the patches of all rows' tokens, filled with zeros at the end.
            top: [tokens, k] the reference's likeliest words, and [tokens, k + 1] their log-probs and that of the rest.

        Raises:
            UserError: a row does not belong here, a length is wrong, a number is not finite, or an array is missing.
        """
        expected = [(pair_id, side) for pair_id in self.pair_ids[self.pairs_of(shard)] for side in SIDES]
        if [(row.pair_id, row.side) for row in rows] != expected:
            raise UserError(
                f"shard {shard:05d} must hold chosen and rejected of its {len(expected) // 2} pairs, in their order."
            )
        for row in rows:
            check_row(row, self.description["signals"])
        given = {"hidden": hidden, "maps": maps, **dict(zip(TOP, top or (None, None), strict=True))}
        arrays = {name: np.ascontiguousarray(array) for name, array in given.items() if array is not None}
        for name in given:
            field = "topk" if name in TOP else name
            if (name in arrays) != bool(self.description.get(field)):
                raise UserError(f"shard {shard:05d}: the store was begun with {field}={bool(self.description.get(field))}.")
        token_count = sum(len(row.token_ids) for row in rows)
        for name, array in arrays.items():
            if array.ndim != 2 or len(array) != token_count:
                raise UserError(f"shard {shard:05d}: {name} has shape {array.shape} for {token_count} tokens.")
        self.shards[shard].write(to_parquet(rows, self.description["signals"]), to_safetensors(arrays) if arrays else None)
        self._written.add(shard)

    def finish(self, *, elsewhere: Iterable[int] = (), skipped: Mapping[str, Any] | None = None) -> None:
        """Mark the store complete, so that it can be opened.

        Args:
            elsewhere: shards that further writers were to write.
            skipped: which pairs are not in it, and why.

        Raises:
            UserError: shards are missing.
        """
        self._written.update(number for number in elsewhere if self.shards[number].is_there())
        missing = self.missing_shards()
        if missing:
            raise UserError(f"{self.path} cannot be finished: {len(missing)} of {len(self.shards)} shards are missing.")
        self.description |= {"complete": True} if skipped is None else {"complete": True, "skipped": skipped}
        write_json(self.path / "store.json", self.description)


def check_place(path: Path) -> None:
    """Raises UserError if the folder holds something that is no reward store."""
    is_store = (path / "store.json").exists()
    if path.is_dir() and not is_store and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise UserError(f"{path} holds other files and no reward store. Choose another --output, or empty it.")


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
        if len(self.pair_ids) != provenance["pair_count"] or _pairs_hash(self.pair_ids) != provenance["pairs_hash"]:
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
        _check_fields(path, provenance)
        count = _shard_count(provenance)
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
        before, now = _flat(self.provenance), _flat(_as_json(expected))
        next_step = (
            f"Use {self.provenance.get('model', 'the same')} as it was then, or score the pairs again with `catpo score`."
        )
        _check_same({field: before.get(field) for field in now}, now, f"{self.path} was scored with", next_step)

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
            raise UserError(f"{self.path} holds no attention maps. Score again with them (`catpo score --maps`).")
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


def _check_fields(path: Path, provenance: Mapping[str, Any]) -> None:
    """Refuse a `store.json` whose values no writer of this library can have put there."""
    signals, patches = provenance["signals"], _mapping(provenance.get("attention", {})).get("patches", "all")
    is_kept = {
        "pair_count": _is_count(provenance["pair_count"]),
        "shard_size": _is_count(provenance["shard_size"]),
        "signals": isinstance(signals, list) and all(isinstance(name, str) for name in signals),
        "attention": isinstance(provenance.get("attention", {}), Mapping),
        "attention.patches": patches == "all" or (isinstance(patches, int) and patches >= 0),
        "versions": isinstance(provenance.get("versions", {}), Mapping),
    }
    wrong = next((name for name, is_right in is_kept.items() if not is_right), None)
    if wrong is not None:
        raise UserError(
            f"{path}/store.json: '{wrong}' is not what `catpo score` writes. Score the pairs again into a new folder."
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _describe(provenance: Mapping[str, Any], pair_ids: Sequence[str], shard_size: int) -> dict[str, Any]:
    """What `store.json` says at the beginning."""
    if not pair_ids:
        raise UserError("There is no pair to score.")
    if shard_size < 1:
        raise UserError(f"shard_size={shard_size} must be 1 or more.")
    seen: set[str] = set()
    for pair_id in pair_ids:
        if pair_id in seen:
            raise UserError(f"pair {pair_id} is in the data twice. Remove one of them.")
        seen.add(pair_id)
    clash = {"pair_id", "side", "grids", *COLUMNS} & set(provenance["signals"])
    if clash:
        raise UserError(
            f"a signal cannot be called '{clash.pop()}': the reward store has a column of that name. Rename the signal."
        )
    return _as_json(
        {
            "format": FORMAT,
            **provenance,
            "pair_count": len(pair_ids),
            "shard_size": shard_size,
            "pairs_hash": _pairs_hash(pair_ids),
            "complete": False,
        }
    )


def _pairs_hash(pair_ids: Sequence[str]) -> str:
    return checksum("\n".join(pair_ids).encode())


def _shard_count(description: Mapping[str, Any]) -> int:
    return -(-description["pair_count"] // description["shard_size"])


def _check_same(stored: Mapping[str, Any], now: Mapping[str, Any], begun_with: str, next_step: str) -> None:
    """Refuse when a field differs; where the model lies may differ as long as its hash is the same."""
    ignored = {"complete", "skipped"} | ({"model"} if "model_hash" in now else set())
    before, after = _flat(stored), _flat(now)
    for field in [*after, *(field for field in before if field not in after)]:
        if field.split(".")[0] not in ignored and before.get(field) != after.get(field):
            name = KNOWN_AS.get(field, field)
            raise UserError(
                f"{begun_with} another {name} ({field} is {before.get(field)!r}, now {after.get(field)!r}). {next_step}"
            )


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under dotted names."""
    flat = {}
    for name, value in fields.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


def _as_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back: tuples are lists."""
    return json.loads(json.dumps(fields))
