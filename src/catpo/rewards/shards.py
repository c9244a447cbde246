"""Files of one shard of the reward store: written whole or not at all, verified when read. Knows no model."""

from __future__ import annotations

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

from catpo.core.checks import check_regular
from catpo.core.errors import UserError
from catpo.core.types import PatchGrid, Side
from catpo.files.atomic import write_atomic
from catpo.files.checksums import checksum
from catpo.files.inside import stay_inside
from catpo.files.json_files import read_json, write_json
from catpo.rewards import words
from catpo.rewards.fusion import ResponseSignals

COLUMNS = {
    "token_ids": pa.list_(pa.int32()),
    "logps": pa.list_(pa.float32()),
    "labels": pa.list_(pa.int8()),
    "pieces": pa.list_(pa.string()),
    "is_special": pa.list_(pa.bool_()),
}
"""Columns with one value per token, beside one per signal."""
GRID = {
    **dict.fromkeys(("picture", "rows", "columns"), pa.int32()),
    **dict.fromkeys(("left", "top", "right", "bottom"), pa.float64()),
}
"""Fields of a `PatchGrid` in the column `grids`; separator tokens are not patches, so they are left out."""
MAX_GRID = 10_000
"""Most rows or columns of patches: a hundred times those of the largest images that models take."""


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


def check_row(row: ResponseRow, signals: Sequence[str]) -> None:
    """Raise UserError for a row that a later step could not use: lengths differ, or a number is not finite."""
    where, tokens = f"pair {row.pair_id}, {row.side}", len(row.token_ids)
    if not tokens:
        raise UserError(f"{where}: the response has no tokens. Remove the pair or give it a text.")
    if set(row.signals) != set(signals):
        raise UserError(f"{where}: signals {sorted(row.signals)} were scored, but the store holds {sorted(signals)}.")
    for name, values in {**{name: getattr(row, name) for name in COLUMNS}, **row.signals}.items():
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
    columns: dict[str, pa.Array] = {
        "pair_id": pa.array([row.pair_id for row in rows], pa.string()),
        "side": pa.array([row.side for row in rows], pa.string()),
    }
    for name, kind in COLUMNS.items():
        values: Any
        if name == "pieces":
            values = [piece for row in rows for piece in row.pieces]
        else:
            values = np.concatenate([getattr(row, name) for row in rows])
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values, kind.value_type))
    for name in signals:
        values = np.concatenate([np.asarray(row.signals[name], np.float32) for row in rows])
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values, pa.float32()))
    grids = []
    for row in rows:
        grids.append([dict(zip(GRID, (grid.picture, grid.rows, grid.columns, *grid.box), strict=True)) for grid in row.grids])
    columns["grids"] = pa.array(grids, pa.list_(pa.struct(GRID)))
    stream = BytesIO()
    # dictionary encoding pays for texts only; for numbers it costs time and space
    pq.write_table(pa.table(columns), stream, compression="zstd", use_dictionary=["pieces.list.element"])
    return stream.getvalue()


class Shard:
    """The files of one shard: arrays, token columns, and last their checksums, whose presence says that the shard is whole.

    Reading raises UserError where a file is not what was written.
    """

    def __init__(self, store: Path, number: int) -> None:
        self.store, self.number = store, number
        stem = store / "shards" / f"{number:05d}"
        self.tensors_path, self.parquet_path = stem.with_suffix(".safetensors"), stem.with_suffix(".parquet")
        self.words_path, self.checksums_path = stem.with_suffix(".words.parquet"), stem.with_suffix(".json")

    def write(self, parquet: bytes, tensors: bytes | None, words: bytes | None = None) -> None:
        checksums = {}
        for path, content in ((self.tensors_path, tensors), (self.words_path, words), (self.parquet_path, parquet)):
            if content is not None:
                checksums[path.name] = checksum(content)
                write_atomic(path, content, is_durable=False)  # the checksums reveal what a power cut loses
        write_json(self.checksums_path, checksums)
        self.checksums = checksums

    def is_written(self) -> bool:
        return self.checksums_path.exists()

    def is_whole(self) -> bool:
        """Whether every file is there and is what was written."""
        try:
            for name in {self.parquet_path.name, *self.checksums}:
                self._read(Path(name).name)
        except UserError:
            return False
        return True

    def read_ids(self) -> tuple[list[str], list[str]]:
        """Pair and side of each row; the whole file is verified."""
        table = self._read_parquet(columns=["pair_id", "side"])
        if table.schema.names != ["pair_id", "side"] or any(kind != pa.string() for kind in table.schema.types):
            raise self._damage(self.parquet_path.name)
        return table["pair_id"].to_pylist(), table["side"].to_pylist()

    def read_columns(self, signals: Sequence[str]) -> ShardColumns:
        """The token columns; refused, too, if they hold what this library never writes."""
        table = self._read_parquet()
        if problem := _problem_of(table, signals):
            raise UserError(
                f"{self.store}: shard {self.number:05d}: {problem}. `catpo score` did not write that: score the pairs again "
                "into a new folder."
            )
        return ShardColumns.of(table, signals)

    def read_words(self, features: Sequence[str]) -> list[words.WordRow]:
        """What the reference says of words, of all the shard's pairs."""
        content = self._read(self.words_path.name)
        try:
            return list(words.from_bytes(content, features))
        except UserError as error:
            raise UserError(
                f"{self.store}: shard {self.number:05d}: {error}. Score the pairs again into a new folder."
            ) from error

    def read_array(self, name: str, rows: slice, width: int | None = None) -> NDArray[Any]:
        """Rows of one of the arrays, through a memory map; the first `width` values of each, or all."""
        try:
            stored = self.tensors.get_slice(name)
            values = stored[rows] if width is None else stored[rows, :width]
        except (SafetensorError, IndexError, OSError) as error:
            raise self._damage(self.tensors_path.name) from error
        if len(values) != rows.stop - rows.start or (width is not None and values.shape[1:] != (width,)):
            raise self._damage(self.tensors_path.name)
        return values

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
        path = stay_inside(self.checksums_path, self.store)
        try:
            return {name: str(value) for name, value in read_json(path, may_link=True).items()}
        except UserError as error:
            raise self._damage(self.checksums_path.name) from error

    def _read_parquet(self, columns: list[str] | None = None) -> pa.Table:
        source = pa.BufferReader(self._read(self.parquet_path.name))
        try:
            return pq.read_table(source, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise self._damage(self.parquet_path.name) from error

    def _read(self, name: str) -> bytes:
        path = self.store / "shards" / name
        check_regular(path)
        try:
            content = stay_inside(path, self.store).read_bytes()
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


@dataclass(frozen=True)
class ShardColumns:
    """The token columns of a shard, each as one flat array; rows are responses."""

    values: dict[str, NDArray[Any]]
    pieces: pa.Array
    """Texts of the tokens; kept in Arrow, as Python strings they would take ten times the memory."""
    offsets: NDArray[np.int64]
    """Where each row's tokens begin."""
    grids: NDArray[np.float64]
    """[grids, fields of `GRID`]"""
    grid_offsets: NDArray[np.int64]

    @classmethod
    def of(cls, table: pa.Table, signals: Sequence[str]) -> ShardColumns:
        """From a table in which `_problem_of` sees nothing wrong."""
        columns = {name: table[name].combine_chunks() for name in [*COLUMNS, *signals, "grids"]}
        offsets, grid_offsets = (columns[name].offsets.to_numpy().astype(np.int64) for name in ("token_ids", "grids"))
        fields, pieces = columns.pop("grids").flatten(), columns.pop("pieces").flatten()
        grids = np.stack([_numbers(fields.field(name)) for name in GRID], axis=1).astype(np.float64)
        values = {name: np.array(_numbers(column.flatten())) for name, column in columns.items()}
        return cls(values, pieces, offsets, grids, grid_offsets)

    @property
    def nbytes(self) -> int:
        arrays = [*self.values.values(), self.offsets, self.grids, self.grid_offsets]
        return sum(array.nbytes for array in arrays) + self.pieces.nbytes

    def tokens(self, row: int) -> slice:
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    def pieces_of(self, row: int) -> list[str]:
        return self.pieces[self.tokens(row)].to_pylist()

    def grids_of(self, row: int) -> list[PatchGrid]:
        fields = self.grids[self.grid_offsets[row] : self.grid_offsets[row + 1]].tolist()
        return [PatchGrid(int(picture), int(rows), int(columns), tuple(box)) for picture, rows, columns, *box in fields]


def _problem_of(table: pa.Table, signals: Sequence[str]) -> str:
    """What in a table this library never writes; empty if nothing."""
    kinds = {"pair_id": pa.string(), "side": pa.string(), **COLUMNS, **dict.fromkeys(signals, pa.list_(pa.float32()))}
    for name, kind in {**kinds, "grids": pa.list_(pa.struct(GRID))}.items():
        if name not in table.column_names or table.schema.field(name).type != kind:
            return f"column '{name}' is missing or of another kind than {kind}"
        cells = table[name].combine_chunks()
        inner = cells.flatten() if pa.types.is_list(kind) else cells
        if cells.null_count or inner.null_count:
            return f"column '{name}' has empty cells"
        if pa.types.is_floating(inner.type) and not np.isfinite(_numbers(inner)).all():
            return f"column '{name}' holds what is not a finite number"
    offsets = table["token_ids"].combine_chunks().offsets
    for name in [*COLUMNS, *signals]:
        if not table[name].combine_chunks().offsets.equals(offsets):
            return f"column '{name}' has other lengths than the tokens"
    labels = _numbers(table["labels"].combine_chunks().flatten())
    if ((labels < -1) | (labels > 1)).any():
        return "column 'labels' holds other values than -1, 0 and 1"
    return _problem_of_grids(table["grids"].combine_chunks())


def _problem_of_grids(column: pa.ListArray) -> str:
    if (_numbers(column.value_lengths()) < 1).any():
        return "column 'grids' has a row without a grid"
    picture, rows, columns = (_numbers(column.flatten().field(name)) for name in ("picture", "rows", "columns"))
    sides = np.concatenate([rows, columns])
    if (picture < 0).any() or (sides < 1).any() or (sides > MAX_GRID).any():
        return f"column 'grids' has a grid that is not of 1 to {MAX_GRID} rows and columns"
    return ""


def _numbers(column: pa.Array) -> NDArray[Any]:
    return column.to_numpy(zero_copy_only=False)
