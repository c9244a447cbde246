"""Rows of TRL's vision preference format, as users give them to a trainer, as preference pairs. Knows nothing of files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from catpo.core.types import Picture, PreferencePair
from catpo.data.datasets import Row
from catpo.data.datasets.trl import pair_of, picture_field


def as_pairs(dataset: Any) -> Any:
    """Pairs as they are, or pairs made of rows with `images` or `image`, `prompt`, `chosen`, `rejected`; None stays None.

    Raises:
        UserError: a row lacks a field or its picture cannot be used; names the row.
    """
    if dataset is None or (len(dataset) and isinstance(dataset[0], PreferencePair)):
        return dataset
    pairs = []
    for number, values in enumerate(dataset):
        row = Row(f"row {number} of the data set", values)
        field = picture_field(row)
        value = row.values.get(field)
        images = value if isinstance(value, list | tuple) else [value]
        with row.named():
            pairs.append(pair_of(row, tuple(_picture(row, field, image) for image in images)))
    return pairs


def _picture(row: Row, field: str, image: Any) -> Picture:
    if isinstance(image, Image.Image):
        content = io.BytesIO()
        image.convert("RGB").save(content, "PNG")
        return Picture(data=content.getvalue(), name=row.where)
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return Picture(data=image, name=row.where)
    if isinstance(image, str | Path):
        return Picture(path=Path(image), name=str(image))
    problem = "is missing" if image is None else f"holds a {type(image).__name__}, which is no picture"
    raise row.error(field, f"{problem}. Give PIL pictures, paths, or encoded bytes")
