"""Rows of files, folders of files, saved data sets and hub data sets, read when needed.

JSON and CSV are read strictly, the others through the `datasets` library.

Pictures stay encoded, and on disk, until they are opened. Knows no column by name.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import logging

from catpo.core.checks import check_regular
from catpo.core.errors import UserError, border
from catpo.core.proxies import trouble_with_hub
from catpo.core.types import Picture, PreferencePair
from catpo.data.datasets._base import Row, RowDataset
from catpo.data.datasets._files import CSV, JSON, rows_of
from catpo.data.datasets._formats import Choices, pairs_of

KINDS = {".parquet": "parquet", ".arrow": "arrow", **dict.fromkeys(JSON, "json"), **dict.fromkeys(CSV, "csv")}
METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""Files that describe a data set, and hold none of its rows."""
BLOCK = 16
"""Rows of a table that are in memory together."""
BUFFER = 1 << 16
"""Bytes of each column that are read together."""
SPLITS = {
    "training": "train", "train": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Word in a file's or folder's name -> split, as the `datasets` library reads them."""


@dataclass(frozen=True)
class Table:
    """Rows with their places."""

    name: str
    data: Any
    """A `datasets.Dataset`; when streaming, an `IterableDataset` or `ParquetRows`; or a list of JSON or CSV files."""
    root: Path
    """Folder of pictures that are given by name; resolved."""

    @classmethod
    def open(cls, source: str | Path | None, *, split: str, streaming: bool, images: str | None, plugin: str) -> Table:
        """A file, a folder of files, a folder made by `save_to_disk`, or a hub id.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        if source is None:
            raise UserError(f"{plugin} needs a place to read: {plugin}(source='FILE, FOLDER or hub id').")
        path = Path(source)
        advice = (
            "Give a .parquet, .json, .jsonl or .csv file, a folder of them, a folder made by save_to_disk, or the id of a data "
            "set on the hub (needs a connection the first time)."
        )
        check_regular(path)
        with border(f"{plugin}: '{source}' cannot be read", advice), _quiet():
            try:
                data = _load(path, str(source), split, streaming)
            except StopIteration as error:
                raise ValueError("it is empty") from error
            except Exception as error:
                trouble = "" if path.exists() else trouble_with_hub()
                if not trouble:
                    raise
                raise ValueError(trouble) from error
        folder = path if path.is_dir() else path.parent
        return cls(str(source), undecoded(data), Path(images or folder).resolve())

    @cached_property
    def read_cell(self) -> Callable[[int, str, int], bytes]:
        """(row, column, index in the cell) -> a picture's encoded bytes; one function for all rows."""
        return partial(_read_cell, self.data)

    def rows(self) -> Iterator[Row]:
        """Every row with its number, from 0; a row that cannot be read ends it."""
        if isinstance(self.data, list):
            for file in self.data:
                yield from rows_of(file, self.root)
            return
        is_stored = isinstance(self.data, datasets.Dataset)
        with border(f"{self.name} cannot be read to its end", "Repair the file or get it again."):
            for number, values in enumerate(_stored_rows(self.data) if is_stored else self.data):
                where = f"{self.name}, row {number}"
                yield Row(where, values, self.root, partial(self._stored, where, number) if is_stored else None)

    def _stored(self, where: str, number: int, column: str, index: int) -> Picture:
        """A picture whose bytes stay in the table until they are needed."""
        name = where + (f", picture {index}" if index else "")
        return Picture(load=self.read_cell, at=(number, column, index), name=name)


class ParquetRows:
    """Rows of Parquet files, a few in memory at a time; the `datasets` library would copy all of them to its cache first.

    Raises:
        ValueError: the files have different columns.
        pyarrow.ArrowException: a file is not Parquet.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        names = [set(pq.read_schema(file).names) for file in files]
        if any(others != names[0] for others in names):
            raise ValueError(f"its files have different columns: {', '.join(sorted(set.union(*names)))}")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for file in self.files:
            with pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False) as table:
                for batch in table.iter_batches(batch_size=BLOCK):
                    yield from batch.to_pylist()


class TableDataset(RowDataset):
    """A data set of which each row is a row of a table.

    Args:
        source: Parquet, JSON or CSV file, folder of them, folder made by `save_to_disk`, or hub id.
        split: of a hub or saved data set, or of a folder whose files are named by it.
        streaming: read a hub data set or Parquet files row by row, instead of downloading or unpacking all rows first.
        images: folder of the pictures, for rows that name them instead of holding them; by default the file's own.
    """

    plugin = ""
    """Its name, for messages."""
    choices = Choices()

    def __init__(
        self, source: str | Path | None = None, *, split: str = "train", streaming: bool = False, images: str | None = None
    ) -> None:
        self.table = Table.open(source, split=split, streaming=streaming, images=images, plugin=self.plugin)
        self.name = str(source)

    def rows(self) -> Iterator[Row]:
        return self.table.rows()

    def pairs_of(self, row: Row) -> Iterable[PreferencePair]:
        return pairs_of(row, self.choices)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's log, which prints tracebacks; the error that it raises is enough."""
    level, had_bars = logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            datasets.enable_progress_bars()


def _stored_rows(data: datasets.Dataset) -> Iterator[dict[str, Any]]:
    for block in data.iter(batch_size=BLOCK):
        yield from block.to_pylist()


def _read_cell(data: datasets.Dataset, row: int, field: str, index: int) -> bytes:
    """The encoded bytes of a picture."""
    cell = data[row].column(field)[0]
    cell = cell[index] if isinstance(cell, pa.ListScalar) else cell
    return bytes((cell["bytes"] if isinstance(cell, pa.StructScalar) else cell).as_py())


def _load(path: Path, name: str, split: str, streaming: bool) -> Any:
    """A data set of the library, or the JSON or CSV files to read."""
    if not path.exists():
        return datasets.load_dataset(name, split=split, streaming=streaming)
    if (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if split not in saved:
            raise ValueError(f"it has no split '{split}' but {', '.join(saved)}")
        return saved[split]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    files = [path] if path.is_file() else files_of(path, split)
    kinds = {KINDS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError("no Parquet, JSON or CSV files in it" if not files else f"files of several kinds: {files[0].name}, …")
    kind = kinds.pop()
    if kind in ("json", "csv"):
        return files
    if kind == "parquet" and streaming:
        return ParquetRows(files)
    literal = [glob.escape(str(file)) for file in files]  # the library takes names for patterns
    return datasets.load_dataset(kind, data_files={split: literal}, split=split, streaming=streaming)


def files_of(folder: Path, split: str) -> list[Path]:
    """The files of rows in a folder and below it, in the order of their names; of one split, if their names say which.

    Raises:
        ValueError: there are files, but none of this split.
    """
    splits: dict[str, list[Path]] = {}
    for file in sorted(file for file in folder.rglob("*") if _has_rows(file)):
        words = re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())
        splits.setdefault(next((SPLITS[word] for word in words if word in SPLITS), "train"), []).append(file)
    wanted = SPLITS.get(split, split)
    if splits and wanted not in splits:
        raise ValueError(f"it has no split '{split}' but {', '.join(splits)}")
    return splits.get(wanted, [])


def _has_rows(file: Path) -> bool:
    return file.suffix in KINDS and file.name not in METADATA and file.is_file()  # not a pipe, which would block


def undecoded(data: Any) -> Any:
    """The same rows as they are stored, with pictures, sounds and videos encoded."""
    if isinstance(data, list | ParquetRows):
        return data
    if isinstance(data, datasets.Dataset):
        return data.with_format("arrow")
    for column, feature in (data.features or {}).items():
        media = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(media, datasets.Image | datasets.Audio | datasets.Video):
            encoded = type(media)(decode=False)
            data = data.cast_column(column, datasets.List(encoded) if isinstance(feature, datasets.List) else encoded)
    return data
