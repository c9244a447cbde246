"""Files of one shard of the reward store: written whole or not at all, verified when read. Knows no model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from catpo.core.errors import UserError
from catpo.core.types import PatchGrid, Side
from catpo.files.atomic import write_atomic
from catpo.files.json_files import read_json, write_json
from catpo.rewards.fusion import ResponseSignals

COLUMNS = {
    "token_ids": pa.list_(pa.int32()),
    "logps": pa.list_(pa.float32()),
    "labels": pa.list_(pa.int8()),
    "pieces": pa.list_(pa.string()),
    "is_special": pa.list_(pa.bool_()),
}
"""Columns with one value per token, beside one per signal."""


MAX_GRID = 10_000
"""Most rows and columns of patches: a hundred times those of the largest pictures that models take."""
GRID = {
    **dict.fromkeys(("picture", "rows", "columns"), pa.int32()),
    **dict.fromkeys(("left", "top", "right", "bottom"), pa.float64()),
}
"""Fields of a `PatchGrid` in the column `grids`; its separator tokens are no patches and have no place in a map."""


@dataclass(frozen=True, kw_only=True)
class ResponseRow(ResponseSignals):
    """One scored response: what the fusion reads of it, and what training and the report need besides."""

    pair_id: str
    side: Side
    logps: NDArray[np.floating]
    """[tokens], log-probs of the reference model in nats."""
    labels: NDArray[np.integer]
    """[tokens], 1 grounded, 0 hallucinated, -1 not labelled."""
    pieces: Sequence[str]
    """[tokens], their texts; joined they are the response."""
    grids: Sequence[PatchGrid]
    """How the patches lie on the pictures, in the order of the patches."""


class Shard:
    """The files of one shard: arrays, token columns, and last their checksums, which say that the shard is whole."""

    def __init__(self, store: Path, number: int) -> None:
        self.store = store
        self.number = number
        stem = store / "shards" / f"{number:05d}"
        self.tensors_path, self.parquet_path = stem.with_suffix(".safetensors"), stem.with_suffix(".parquet")
        self.checksums_path = stem.with_suffix(".json")

    def write(self, parquet: bytes, tensors: bytes | None) -> None:
        checksums = {self.parquet_path.name: checksum(parquet)}
        if tensors is not None:
            checksums[self.tensors_path.name] = checksum(tensors)
            write_atomic(self.tensors_path, tensors, is_durable=False)
        write_atomic(self.parquet_path, parquet, is_durable=False)  # what a power cut loses, the checksums tell
        write_json(self.checksums_path, checksums)
        self.checksums = checksums

    def is_there(self) -> bool:
        return self.checksums_path.exists()

    def is_whole(self) -> bool:
        """Whether every file is there and is what was written."""
        try:
            for name in {self.parquet_path.name, *self.checksums}:
                self._read(Path(name).name)
        except UserError:
            return False
        return True

    def read_table(self, signals: Sequence[str]) -> pa.Table:
        """The token columns, which have the kinds and hold the values that a writer of this library gives them.

        Raises:
            UserError: the file is not what was written, or somebody else wrote it.
        """
        try:
            table = pq.read_table(pa.BufferReader(self._read(self.parquet_path.name)), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise self._damage(self.parquet_path.name) from error
        if problem := _problem_of(table, signals):
            raise UserError(
                f"{self.store}: shard {self.number:05d}: {problem}. `catpo score` did not write that: score the pairs again "
                "into a new folder."
            )
        return table

    def read_array(self, name: str, rows: slice, width: int | None = None) -> NDArray[Any]:
        """Rows of one of the arrays, through a memory map; of each the first `width` values, or all.

        Raises:
            UserError: the file is not what was written, or has no such array or rows.
        """
        try:
            found = self.tensors.get_slice(name)[rows, :width] if width is not None else self.tensors.get_slice(name)[rows]
        except (SafetensorError, IndexError, OSError) as error:
            raise self._damage(self.tensors_path.name) from error
        if len(found) != rows.stop - rows.start or (width is not None and found.shape[1:] != (width,)):
            raise self._damage(self.tensors_path.name)
        return found

    def read_ids(self) -> tuple[list[str], list[str]]:
        """Pair and side of each row; the whole file is verified."""
        source = pa.BufferReader(self._read(self.parquet_path.name))
        try:
            table = pq.read_table(source, columns=["pair_id", "side"], use_threads=False)
            ids, sides = (table[name].to_pylist() for name in ("pair_id", "side"))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise self._damage(self.parquet_path.name) from error
        if not all(isinstance(each, str) for each in (*ids, *sides)):
            raise self._damage(self.parquet_path.name)
        return ids, sides

    @cached_property
    def tensors(self) -> Any:
        """The open safetensors file, verified once per process."""
        self._read(self.tensors_path.name)
        try:
            return safe_open(self.tensors_path, framework="numpy").__enter__()
        except (SafetensorError, OSError) as error:
            raise self._damage(self.tensors_path.name) from error

    @cached_property
    def checksums(self) -> dict[str, str]:
        try:
            return {name: str(each) for name, each in read_json(self.checksums_path).items()}
        except UserError as error:
            raise self._damage(self.checksums_path.name) from error

    def _read(self, name: str) -> bytes:
        try:
            content = (self.store / "shards" / name).read_bytes()
        except OSError as error:
            raise self._damage(name) from error
        if checksum(content) != self.checksums.get(name):
            raise self._damage(name)
        return content

    def _damage(self, name: str) -> UserError:
        return UserError(
            f"{self.store}: shard {self.number:05d} is damaged ({name} is missing or not what was written). Delete "
            f"{self.store}/shards/{self.number:05d}.* and run the same `catpo score` again: only this shard is scored anew."
        )


def check_row(row: ResponseRow, signals: Sequence[str]) -> None:
    """Refuse what a later step could not use."""
    where, tokens = f"pair {row.pair_id}, {row.side}", len(row.token_ids)
    if not tokens:
        raise UserError(f"{where}: the response has no tokens. Remove the pair or give it a text.")
    if set(row.signals) != set(signals):
        raise UserError(f"{where}: signals {sorted(row.signals)} were scored, but the store holds {sorted(signals)}.")
    columns: dict[str, Any] = {"logps": row.logps, "labels": row.labels, "pieces": row.pieces, "is_special": row.is_special}
    for name, values in {**columns, **row.signals}.items():
        if len(values) != tokens:
            raise UserError(f"{where}: {name} has {len(values)} values for {tokens} tokens.")
    for name, values in {"logps": row.logps, **row.signals}.items():
        if not np.isfinite(values).all():
            token = int(np.flatnonzero(~np.isfinite(values))[0])
            raise UserError(
                f"{where}: {name} is {values[token]} at token {token}. Score in float32 if this was half precision."
            )


def to_parquet(rows: Sequence[ResponseRow], signals: Sequence[str]) -> bytes:
    """The token columns of a shard as a Parquet file, one row per response."""
    offsets = pa.array(np.cumsum([0, *(len(row.token_ids) for row in rows)], dtype=np.int32))

    def per_token(kind: pa.DataType, values: Sequence[Any]) -> pa.Array:
        if kind.value_type == pa.string():
            return pa.ListArray.from_arrays(offsets, pa.array([text for each in values for text in each], kind.value_type))
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values), kind.value_type))

    columns = {
        "pair_id": pa.array([row.pair_id for row in rows], pa.string()),
        "side": pa.array([row.side for row in rows], pa.string()),
        **{name: per_token(kind, [getattr(row, name) for row in rows]) for name, kind in COLUMNS.items()},
        **{
            name: per_token(pa.list_(pa.float32()), [np.asarray(row.signals[name], np.float32) for row in rows])
            for name in signals
        },
        "grids": pa.array([[_grid_fields(grid) for grid in row.grids] for row in rows], pa.list_(pa.struct(GRID))),
    }
    stream = BytesIO()
    # dictionaries pay for texts only; for numbers they cost time and space
    pq.write_table(pa.table(columns), stream, compression="zstd", use_dictionary=["pieces.list.element"])
    return stream.getvalue()


def _grid_fields(grid: PatchGrid) -> dict[str, float]:
    return dict(zip(GRID, (grid.picture, grid.rows, grid.columns, *grid.box), strict=True))


def _problem_of(table: pa.Table, signals: Sequence[str]) -> str:
    """What in a table no writer of this library has put there; empty if nothing."""
    kinds = {"pair_id": pa.string(), "side": pa.string(), **COLUMNS, **dict.fromkeys(signals, pa.list_(pa.float32()))}
    for name, kind in {**kinds, "grids": pa.list_(pa.struct(GRID))}.items():
        if name not in table.column_names or table.schema.field(name).type != kind:
            return f"column '{name}' is missing or of another kind than {kind}"
        cells = table[name].combine_chunks()
        inner = cells.flatten() if pa.types.is_list(kind) else cells
        if cells.null_count or inner.null_count:
            return f"column '{name}' has empty cells"
        if pa.types.is_floating(inner.type) and not np.isfinite(inner.to_numpy(zero_copy_only=False)).all():
            return f"column '{name}' holds what is not a finite number"
    labels = table["labels"].combine_chunks().flatten().to_numpy()
    if ((labels < -1) | (labels > 1)).any():
        return "column 'labels' holds other values than -1, 0 and 1"
    return _problem_of_grids(table["grids"].combine_chunks())


def _problem_of_grids(column: pa.ListArray) -> str:
    if (column.value_lengths().to_numpy() < 1).any():
        return "column 'grids' has a row without a grid"
    fields = column.flatten()
    picture, rows, columns = (fields.field(name).to_numpy(zero_copy_only=False) for name in ("picture", "rows", "columns"))
    sides = np.concatenate([rows, columns])
    if (picture < 0).any() or (sides < 1).any() or (sides > MAX_GRID).any():
        return f"column 'grids' has a grid that is not of 1 to {MAX_GRID} rows and columns"
    return ""


@dataclass(frozen=True)
class ShardColumns:
    """The token columns of a shard, each as one flat array; rows are responses."""

    values: dict[str, NDArray[Any]]
    pieces: pa.Array
    """Texts of the tokens, as Arrow has them: as Python objects they would take ten times the memory."""
    offsets: NDArray[np.int64]
    """Where each row's tokens begin."""
    grids: NDArray[np.float64]
    grid_offsets: NDArray[np.int64]

    @classmethod
    def of(cls, table: pa.Table, signals: Sequence[str], path: Path) -> ShardColumns:
        """Raises UserError for a column that is missing, or has other lengths than the tokens."""
        table = table.combine_chunks()
        columns: dict[str, pa.Array] = {}
        offsets = table["token_ids"].chunk(0).offsets.to_numpy().astype(np.int64)
        for name in [*COLUMNS, *signals]:
            if name not in table.column_names or not np.array_equal(table[name].chunk(0).offsets.to_numpy(), offsets):
                raise UserError(
                    f"{path}: column {name} is missing or has other lengths than the tokens. Score the pairs again."
                )
            columns[name] = table[name].chunk(0).flatten()
        pieces = columns.pop("pieces")
        values = {name: np.array(column.to_numpy(zero_copy_only=False)) for name, column in columns.items()}
        grids = table["grids"].chunk(0)
        fields = grids.flatten()
        numbers = np.stack([fields.field(name).to_numpy(zero_copy_only=False) for name in GRID], axis=1)
        return cls(values, pieces, offsets, numbers.astype(np.float64), grids.offsets.to_numpy().astype(np.int64))

    @property
    def nbytes(self) -> int:
        numbers = [*self.values.values(), self.offsets, self.grids, self.grid_offsets]
        return sum(each.nbytes for each in numbers) + self.pieces.nbytes

    def tokens(self, row: int) -> slice:
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    def pieces_of(self, row: int) -> list[str]:
        return self.pieces[self.tokens(row)].to_pylist()

    def grids_of(self, row: int) -> NDArray[np.float64]:
        """As `as_grids` takes them."""
        return self.grids[self.grid_offsets[row] : self.grid_offsets[row + 1]]


def as_grids(fields: NDArray[np.float64]) -> list[PatchGrid]:
    """Rows of `ShardColumns.grids_of`."""
    return [PatchGrid(int(row[0]), int(row[1]), int(row[2]), tuple(row[3:].tolist())) for row in fields]


def checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
