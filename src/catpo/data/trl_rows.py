"""Rows of TRL's vision preference format, as users give them to a trainer, as preference pairs. Knows nothing of files.

Pictures stay encoded until they are needed: those of a `datasets.Dataset` in its own files, the others in a temporary file.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from catpo.core.errors import UserError
from catpo.core.types import Picture, PreferencePair
from catpo.data.datasets import Row
from catpo.data.datasets._formats import Choices, pairs_of
from catpo.data.spool import PairsAt, SpooledPairs

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
TIFF_MODES = ("I", "F", "CMYK")
REMEDY = "dataset.remove_columns('{}')"


def as_pairs(dataset: Any) -> Any:
    """Pairs as they are, or pairs made of rows with `images` or `image`, `prompt`, `chosen`, `rejected`; None stays None.

    A data set is as long as its `__len__` says; a `datasets.IterableDataset` is read to its end, once, into a temporary file.

    Raises:
        UserError: a row lacks a field, its picture cannot be used, or it holds texts or pictures that TRL's format has not;
            names the row.
    """
    if dataset is None:
        return None
    if _is_of(dataset, "IterableDataset"):
        return SpooledPairs.of(_pairs(dataset))
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"A {type(dataset).__name__} has no length. Give the trainer a list, a data set with len() and [i], or a "
            "datasets.IterableDataset (IterableDataset.from_generator)."
        )
    if not _is_stored(dataset) and len(dataset) and isinstance(dataset[0], PreferencePair):
        return dataset if isinstance(dataset, list | tuple | SpooledPairs | PairsAt) else PairsAt([dataset])
    return SpooledPairs.of(_pairs(dataset))


def _pairs(dataset: Any) -> Iterator[PreferencePair]:
    for row in _rows(dataset):
        yield from row.made(_pairs_of, remedy=REMEDY)


def _pairs_of(row: Row) -> list[PreferencePair]:
    field = "images" if row.has("images") else "image"
    value = row.values.get(field)
    if value is None:
        raise row.error(field, "is missing. Give PIL pictures, paths, or encoded bytes")
    cells = list(value) if isinstance(value, list | tuple) else [value]
    pictures = tuple(_picture(row, field, number, cell) for number, cell in enumerate(cells))
    return pairs_of(row, Choices("trl"), pictures)


def _rows(dataset: Any) -> Iterator[Row]:
    """The rows by their numbers; those of a `datasets.Dataset` as they are stored, unless it has a transform of its own."""
    if _is_stored(dataset) or _is_of(dataset, "IterableDataset"):
        from catpo.data.datasets._table import Table, undecoded

        yield from Table("the data set", undecoded(dataset), Path.cwd()).rows()
        return
    for number in range(len(dataset)):
        values = dataset[number]
        if not isinstance(values, Mapping):
            raise UserError(
                f"the data set, row {number} is a {type(values).__name__}. Give rows with prompt, chosen and rejected."
            )
        yield Row(f"the data set, row {number}", values)


def _is_stored(dataset: Any) -> bool:
    """Whether it is a `datasets.Dataset` without a transform."""
    return _is_of(dataset, "Dataset") and dataset.format["type"] is None


def _is_of(dataset: Any, kind: str) -> bool:
    """Whether it is of a class of `datasets`; if the library is not imported, it is none."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(dataset, getattr(library, kind))


def _picture(row: Row, field: str, index: int, cell: Any) -> Picture:
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(content, bytes) and row.stored is not None:
        return row.stored(field, index)
    if isinstance(cell, Image.Image):
        return Picture(data=_encoded(cell), name=row.where)
    named = cell.get("path") if isinstance(cell, Mapping) and content is None else cell
    if isinstance(named, Path) or (isinstance(named, str) and os.path.isfile(named)):  # False for what is no path at all
        return Picture(path=Path(named), name=str(named))
    if not isinstance(named, bytes | str | Mapping):
        problem = "is missing" if named is None else f"holds a {type(named).__name__}, which is no picture"
        raise row.error(field, f"{problem}. Give PIL pictures, paths, or encoded bytes")
    return row.picture(field, cell, Path("/") if isinstance(named, str) and named.startswith("/") else Path.cwd())


def _encoded(image: Image.Image) -> bytes:
    """The file's own bytes if the picture is not decoded yet, else all of its pixels, without loss."""
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.fp is not None:
        place = image.fp.tell()
        image.fp.seek(0)
        content = image.fp.read()
        image.fp.seek(place)
        return content
    stream = io.BytesIO()
    exif = image.getexif()  # says how to turn the picture
    kept = {"exif": exif} if exif else {}
    if image.mode in PNG_MODES:
        image.save(stream, "PNG", compress_level=1, **kept)
    elif image.mode in TIFF_MODES:
        image.save(stream, "TIFF", **kept)
    else:
        image.convert("RGBA" if image.has_transparency_data else "RGB").save(stream, "PNG", compress_level=1, **kept)
    return stream.getvalue()
