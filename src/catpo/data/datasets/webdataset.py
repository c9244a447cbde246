"""WebDataset shards: .tar files with `name.jpg` beside `name.json` (prompt, chosen, rejected); read as a stream.

    webdataset(source='shards/')        webdataset(source='shards/train-000.tar')

The format (github.com/webdataset/webdataset, "The WebDataset Format"): the files of a sample are neighbours and share
their name up to the first dot. Several pictures are `name.0.jpg`, `name.1.jpg`. Pictures stay in the tar until they are opened.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from catpo.core.errors import UserError
from catpo.core.types import MAX_BYTES, Picture, PreferencePair
from catpo.data import datasets
from catpo.data.datasets import Row, make_pair

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Dataset(datasets.RowDataset):
    """One pair per sample.

    Args:
        source: a .tar file, or a folder of them, read in the order of their names.
    """

    def __init__(self, source: str | Path | None = None) -> None:
        if source is None:
            raise UserError("webdataset needs a place to read: webdataset(source='FILE.tar or FOLDER').")
        path = Path(source)
        self.files = [path] if path.is_file() else sorted(path.rglob("*.tar"))
        if not self.files:
            raise UserError(f"webdataset: '{source}' holds no .tar files. Give a .tar file, or a folder of them.")
        self.name = str(source)

    def rows(self) -> Iterator[Row]:
        for file in self.files:
            try:
                with tarfile.open(file, "r:") as archive:  # compressed ones cannot be opened in the middle
                    for stem, members in groupby(_files(archive), key=_stem):
                        yield Row(f"{file}, {stem}", {"members": list(members), "file": file})
            except (tarfile.TarError, OSError) as error:
                raise UserError(
                    f"{file} cannot be read ({error}). Give an uncompressed .tar, as WebDataset writes them."
                ) from error

    def pairs_of(self, row: Row) -> Iterable[PreferencePair]:
        file, members = row.values["file"], row.values["members"]
        for member in members:
            if member.size > MAX_BYTES:
                problem = f"has {member.size:,} bytes, more than {MAX_BYTES:,}. Make it smaller, or remove it"
                raise row.error(member.name, problem)
        jsons = [member for member in members if Path(member.name).suffix.lower() == ".json"]
        if len(jsons) != 1:
            raise row.error("json", f"must be there once, not {len(jsons)} times")
        texts = row.inner("json", _read(file, jsons[0].offset_data, jsons[0].size))
        pictures = []
        for member in members:
            if Path(member.name).suffix.lower() in PICTURES:
                at = (str(file), member.offset_data, member.size)
                pictures.append(Picture(load=_read, at=at, name=f"{member.name} ({file})"))
        if not pictures:
            raise row.error("jpg", f"is missing. Put a picture ({', '.join(PICTURES)}) beside the .json")
        return [make_pair(tuple(pictures), texts.text("prompt"), texts.text("chosen"), texts.text("rejected"))]


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every header
        if member.isfile():
            yield member


def _stem(member: tarfile.TarInfo) -> str:
    folder, _, name = member.name.rpartition("/")
    return f"{folder}/{name.split('.', 1)[0]}".lstrip("/")


def _read(file: str | Path, offset: int, size: int) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)
