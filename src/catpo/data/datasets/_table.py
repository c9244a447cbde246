"""Rows of Parquet and JSON files, of saved data sets and of the hub, through the `datasets` library; read when needed.

Pictures stay encoded, and on disk, until they are opened. Knows no column by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
from datasets import logging
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from catpo.core.errors import UserError
from catpo.core.types import Picture
from catpo.data.datasets import Row, RowDataset

NUMBER = "row number"
"""Key of a row's own number; no column has a space in its name."""
KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
FAILURES = (
    DatasetNotFoundError, DatasetGenerationError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, OSError, ValueError,
)  # fmt: skip
"""What the library raises for data that is missing or cannot be read."""


@dataclass(frozen=True)
class Table:
    """Rows with their places."""

    name: str
    data: Any
    """A `datasets.Dataset`, or an `IterableDataset` when streaming."""
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
        try:
            with _quiet():
                data = _load(path, str(source), split, streaming)
        except (*FAILURES, StopIteration) as error:  # the latter for an empty file
            first_line = str(error).strip().split("\n", 1)[0] or "it is empty"
            raise UserError(
                f"{plugin}: '{source}' cannot be read ({first_line}). Give a .parquet or .json file, a folder of them, a "
                "folder made by save_to_disk, or the id of a data set on the hub (needs a connection the first time)."
            ) from error
        folder = path if path.is_dir() else path.parent
        return cls(str(source), _undecoded(data), Path(images or folder).resolve())

    @cached_property
    def read_cell(self) -> Callable[[int, str, int], bytes]:
        """(row, column, index in the cell) -> a picture's encoded bytes; one function for all rows."""
        return partial(_read_cell, self.data)

    def rows(self) -> Iterator[Row]:
        """Every row with its number, from 0; a row that cannot be read ends it."""
        try:
            for number, values in enumerate(self.data):
                yield Row(f"{self.name}, row {number}", {**values, NUMBER: number})
        except FAILURES as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.name} cannot be read to its end ({reason}). Repair the file or get it again.") from error

    def pictures(self, row: Row, field: str) -> tuple[Picture, ...]:
        """The picture(s) of a row: encoded bytes, or names inside `root`."""
        value = row.values.get(field)
        cells = value if isinstance(value, list) else [value]
        if not cells:
            raise row.error(field, "is an empty list. Give at least one picture")
        return tuple(self._picture(row, field, cell, index) for index, cell in enumerate(cells))

    def _picture(self, row: Row, field: str, cell: Any, index: int) -> Picture:
        name = row.where + (f", picture {index}" if index else "")
        if isinstance(cell, Mapping) and cell.get("bytes"):
            if not isinstance(cell["bytes"], bytes):
                raise row.error(field, f"must hold the picture's bytes, not {type(cell['bytes']).__name__}")
            if not isinstance(self.data, datasets.Dataset):
                return Picture(data=bytes(cell["bytes"]), name=name)
            return Picture(load=self.read_cell, at=(row.values[NUMBER], field, index), name=name)
        path = cell.get("path") if isinstance(cell, Mapping) else cell
        return row.picture(field, path, self.root)


class TableDataset(RowDataset):
    """A data set of which each row is a row of a table.

    Args:
        source: Parquet or JSON file, folder of them, folder made by `save_to_disk`, or hub id.
        split: of a hub or saved data set.
        streaming: read a hub data set row by row instead of downloading it first.
        images: folder of the pictures, for rows that name them instead of holding them; by default the file's own.
    """

    plugin = ""
    """Its name, for messages."""

    def __init__(
        self, source: str | Path | None = None, *, split: str = "train", streaming: bool = False, images: str | None = None
    ) -> None:
        self.table = Table.open(source, split=split, streaming=streaming, images=images, plugin=self.plugin)
        self.name = str(source)

    def rows(self) -> Iterator[Row]:
        return self.table.rows()


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


def _read_cell(data: datasets.Dataset, row: int, field: str, index: int) -> bytes:
    """The encoded bytes of a picture."""
    value = data.select_columns([field])[row][field]
    return bytes((value[index] if isinstance(value, list) else value)["bytes"])


def _load(path: Path, name: str, split: str, streaming: bool) -> Any:
    if not path.exists():
        return datasets.load_dataset(name, split=split, streaming=streaming)
    if (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if split not in saved:
            raise ValueError(f"it has no split '{split}' but {', '.join(saved)}")
        return saved[split]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in KINDS)
    kinds = {KINDS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError("no Parquet or JSON files in it" if not files else f"files of several kinds: {files[0].name}, …")
    data_files = {split: [str(file) for file in files]}
    return datasets.load_dataset(kinds.pop(), data_files=data_files, split=split, streaming=streaming)


def _undecoded(data: Any) -> Any:
    """The same rows with pictures left encoded."""
    for column, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            data = data.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return data
