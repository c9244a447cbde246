"""Writes a reward store, shard by shard; a killed run continues with the shards that are missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as to_safetensors

from catpo.core.errors import UserError
from catpo.core.types import SIDES
from catpo.files.atomic import make_folder
from catpo.files.json_files import read_json, write_json
from catpo.rewards.description import TOP, check_same_store, describe, shard_count
from catpo.rewards.shards import ResponseRow, Shard, check_row, to_parquet


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
        self.shards = [Shard(path, number) for number in range(shard_count(description))]
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
        description = describe(provenance, pair_ids, shard_size)
        if (path / "store.json").exists():
            stored = read_json(path / "store.json", made_by="catpo score")
            check_same_store(
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
