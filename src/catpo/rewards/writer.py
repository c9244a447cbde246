"""Writes a reward store shard by shard, so that a killed run continues with the shards that are missing."""

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
from catpo.files.inside import stay_inside
from catpo.files.json_files import read_json, write_json
from catpo.rewards import words
from catpo.rewards.description import check_same_store, describe, shard_count
from catpo.rewards.shards import ResponseRow, Shard, check_row, to_parquet


class RewardWriter:
    """Writes a store; hold `catpo.files.lock.lock(path)` while you do.

    with lock(path):
        writer = RewardWriter.create_or_resume(path, provenance, pair_ids)
        for shard in writer.missing_shards():
            writer.write_shard(shard, [row for pair_id in pair_ids[writer.pairs_of(shard)] for row in rows(pair_id)])
        writer.finish()
    """

    def __init__(self, path: Path, description: dict[str, Any], pair_ids: Sequence[str], *, is_joining: bool = False) -> None:
        self.path = path
        self.description = description
        self.pair_ids = list(pair_ids)
        self.shards = [Shard(path, number) for number in range(shard_count(description))]
        self._written = {shard.number for shard in self.shards if not is_joining and shard.is_whole()}

    @classmethod
    def create_or_resume(
        cls, path: str | Path, provenance: Mapping[str, Any], pair_ids: Sequence[str], *, shard_size: int = 64
    ) -> RewardWriter:
        """A writer for a new store at `path`, or for an incomplete one.

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
            next_step = "Give the same again, choose another --output, or delete the folder."
            check_same_store(stored, description, f"{path} was begun with", next_step)
            if "model" in stored:
                description["model"] = stored["model"]  # its folder may have moved since
        else:
            path.mkdir(parents=True, exist_ok=True)
            check_place(path)
            write_json(path / "store.json", description)
        make_folder(stay_inside(path / "shards", path))
        for leftover in [*path.glob(".*.part"), *path.glob("shards/.*.part")]:
            leftover.unlink()  # of a killed run
        return cls(path, description, pair_ids)

    @classmethod
    def join(cls, path: str | Path, pair_ids: Sequence[str]) -> RewardWriter:
        """A writer in another process, for a store that `create_or_resume` made; it does not look what is written already."""
        path = Path(path)
        return cls(path, read_json(path / "store.json", made_by="catpo score"), pair_ids, is_joining=True)

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are not written yet, or damaged."""
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
        word_rows: Sequence[words.WordRow] | None = None,
    ) -> None:
        """Write a whole shard; until this returns, a reader sees none of it.

        Args:
            shard: its number.
            rows: chosen and rejected of each of its pairs, in order.
            hidden: [tokens, width], final hidden states of all rows' tokens; bfloat16 as int16 of the same bits.
            maps: [tokens, patches], attention over the patches of all rows' tokens, padded with zeros at the end.
            top: [tokens, k] the reference's most likely tokens, and [tokens, k + 1] their log-probs and that of the rest.
            word_rows: words that the reference might name in answers about the pictures, of each pair.

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
        top_ids, top_logps = top or (None, None)
        token_count = sum(len(row.token_ids) for row in rows)
        arrays = {}
        for name, field, array in (
            ("hidden", "hidden", hidden),
            ("maps", "maps", maps),
            ("top_ids", "topk", top_ids),
            ("top_logps", "topk", top_logps),
        ):
            is_stored = bool(self.description.get(field))
            if (array is not None) != is_stored:
                raise UserError(f"shard {shard:05d}: the store was begun with {field}={is_stored}.")
            if array is not None and (array.ndim != 2 or len(array) != token_count):
                raise UserError(f"shard {shard:05d}: {name} has shape {array.shape} for {token_count} tokens.")
            if array is not None:
                arrays[name] = np.ascontiguousarray(array)
        features = self.description.get("words", {}).get("features")
        if (word_rows is not None) != bool(features):
            raise UserError(f"shard {shard:05d}: the store was begun with words={features}.")
        tensors = to_safetensors(arrays) if arrays else None
        word_file = None if word_rows is None else words.to_bytes(word_rows, features)
        self.shards[shard].write(to_parquet(rows, self.description["signals"]), tensors, word_file)
        self._written.add(shard)

    def finish(self, *, elsewhere: Iterable[int] = (), skipped: Mapping[str, Any] | None = None) -> None:
        """Mark the store complete, so that it can be opened.

        Args:
            elsewhere: shards that other processes were to write.
            skipped: which pairs are not in it, and why.

        Raises:
            UserError: shards are missing.
        """
        self._written.update(number for number in elsewhere if self.shards[number].is_written())
        missing = self.missing_shards()
        if missing:
            raise UserError(f"{self.path} cannot be finished: {len(missing)} of {len(self.shards)} shards are missing.")
        self.description["complete"] = True
        if skipped is not None:
            self.description["skipped"] = skipped
        write_json(self.path / "store.json", self.description)


def check_place(path: Path) -> None:
    """Raise UserError if the folder holds something that is not a reward store."""
    is_store = (path / "store.json").exists()
    if path.is_dir() and not is_store and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise UserError(f"{path} holds other files and no reward store. Choose another --output, or empty it.")
