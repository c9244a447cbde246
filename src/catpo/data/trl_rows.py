"""Rows of TRL's vision preference format, as users hand them to a trainer, as preference pairs. Knows nothing of files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from catpo.core.errors import UserError
from catpo.core.types import Picture, PreferencePair, check_pair, pair_id


def as_pairs(dataset: Any) -> Any:
    """Pairs as they are, or pairs made of rows with `images` or `image`, `prompt`, `chosen`, `rejected`; None stays.

    Raises:
        UserError: a row lacks a field or its picture cannot be used; names the row.
    """
    if dataset is None or (len(dataset) and isinstance(dataset[0], PreferencePair)):
        return dataset
    return [_pair_from_row(row, number) for number, row in enumerate(dataset)]


def _pair_from_row(row: Mapping[str, Any], number: int) -> PreferencePair:
    """A row of TRL's vision preference format: plain texts or conversations, PIL pictures."""
    try:
        images = row["images"] if row.get("images") is not None else [row["image"]]
        texts = {name: _text(row[name]) for name in ("prompt", "chosen", "rejected")}
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"row {number} of the data set lacks {error}. It needs images (or image), prompt, chosen, rejected."
        ) from error
    pictures = tuple(_picture(image, f"row {number}") for image in images)
    prompt, chosen, rejected = (texts[name] for name in ("prompt", "chosen", "rejected"))
    return check_pair(PreferencePair(pair_id(pictures, prompt, chosen, rejected), pictures, prompt, chosen, rejected))


def _text(value: Any) -> str:
    """The words of a plain text, or of the last message of a conversation."""
    if isinstance(value, str):
        return value
    content = value[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _picture(image: Any, name: str) -> Picture:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return Picture(data=buffer.getvalue(), name=name)
    if isinstance(image, Mapping):
        return Picture(
            path=Path(image["path"]) if image.get("path") and not image.get("bytes") else None,
            data=image.get("bytes"),
            name=name,
        )
    if isinstance(image, str | Path):
        return Picture(path=Path(image), name=str(image))
    raise UserError(f"{name}: {type(image).__name__} is not a picture. Give PIL pictures, paths, or encoded bytes.")
