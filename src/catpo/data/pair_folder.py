"""A folder of preference pairs on disk: rows, pictures named by their content, provenance. Read back by data set `folder`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.core.types import Picture, PreferencePair, opened
from catpo.files.atomic import make_folder, write_atomic
from catpo.files.inside import stay_inside
from catpo.files.json_files import append_rows, write_json

ROWS, ABOUT, PICTURES = "pairs.jsonl", "pairs.json", "images"
PAIR = {
    "id": str, "images": list[str], "prompt": str, "chosen": str, "rejected": str,
    "labels": dict[str, list[list]], "meta": dict,
}  # fmt: skip
"""A row of pairs.jsonl."""
HASHED = r"images/([0-9a-f]{32})\.\w+"
"""How rows name their pictures: by `Picture.digest`."""
EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif"}


def write_pairs(folder: str | Path, pairs: Sequence[PreferencePair], provenance: Mapping[str, Any]) -> None:
    """Write all pairs with their pictures, and mark the folder as complete in pairs.json.

    Raises:
        UserError: the folder holds pairs already, or cannot be written.
    """
    folder = Path(folder)
    if (folder / ROWS).exists():
        raise UserError(f"{folder} holds pairs already. Choose another folder, or remove it.")
    make_folder(folder)
    append_rows(folder / ROWS, [row_of(folder, pair) for pair in pairs])
    write_json(folder / ABOUT, {"format": 1, **provenance, "complete": True})


def row_of(folder: Path, pair: PreferencePair) -> dict[str, Any]:
    """A pair's row; its pictures are saved in the folder."""
    history = [{"role": turn.role, "content": turn.text} for turn in pair.history]
    return {
        "id": pair.id,
        "images": [_save(folder, picture) for picture in pair.images],
        **({"history": history} if history else {}),
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "labels": {side: [[span.start, span.end, span.label] for span in spans] for side, spans in pair.labels.items()},
        "meta": dict(pair.meta),
    }


def _save(folder: Path, picture: Picture) -> str:
    """Save the picture's bytes as they are, once, named by their hash; a broken picture is refused."""
    content = picture.read()
    in_memory = Picture(data=content, name=picture.label)
    in_memory.open()
    with opened(content) as image:
        kind = image.format or "img"
    path = Path(PICTURES) / f"{in_memory.digest()}.{EXTENSIONS.get(kind, kind.lower())}"
    if not (folder / path).exists():
        make_folder(stay_inside(folder / PICTURES, folder))
        write_atomic(folder / path, content, is_durable=False)
    return path.as_posix()
