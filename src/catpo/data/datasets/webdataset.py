"""WebDataset shards: .tar files with `name.jpg` beside `name.json` (prompt, chosen, rejected); read as a stream.

    webdataset(source='shards/')        webdataset(source='shards/train-000.tar')

The format (github.com/webdataset/webdataset, "The WebDataset Format"): the files of a sample are neighbours and share
their name up to the first dot. Several pictures are `name.0.jpg`, `name.1.jpg`. Pictures stay in the tar until they are opened.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from catpo.core.checks import check_regular
from catpo.core.errors import UserError, border
from catpo.core.types import MAX_BYTES, Picture, PreferencePair
from catpo.data import datasets
from catpo.data.datasets import Row
from catpo.data.datasets._formats import pairs_of

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
        self.files = sorted(path.rglob("*.tar")) if path.is_dir() else [path] * path.exists()
        if not self.files:
            raise UserError(f"webdataset: '{source}' holds no .tar files. Give a .tar file, or a folder of them.")
        for file in self.files:
            check_regular(file)
            if path.is_dir() and not file.resolve().is_relative_to(path.resolve()):
                raise UserError(f"{file} is a link that leads out of the folder. Put the .tar file inside.")
        self.name = str(source)

    def rows(self) -> Iterator[Row]:
        for file in self.files:
            net = border(f"{file} cannot be read", "Give an uncompressed .tar, as WebDataset writes them.")
            with net, tarfile.open(file, "r:") as archive:  # compressed ones cannot be opened in the middle
                for stem, members in groupby(_files(archive), key=_stem):
                    yield _row(file, Row(f"{file}, {stem}", {}, file.parent), list(members))

    def pairs_of(self, row: Row) -> Iterable[PreferencePair]:
        assert isinstance(row, _Row)
        for name in row.unused:
            if not {name, name.rpartition(".")[2]} & set(self.fields.ignore):
                raise row.error(
                    name, f"has no use here. Remove the file, or leave such files out: ignore=['{name.rpartition('.')[2]}']"
                )
        if not row.shown:
            raise row.error("jpg", f"is missing. Put a picture ({', '.join(PICTURES)}) beside the .json")
        return pairs_of(row, pictures=row.shown)


@dataclass(frozen=True)
class _Row(Row):
    """The .json of a sample, with the other files of its name."""

    shown: tuple[Picture, ...] = ()
    unused: tuple[str, ...] = ()


def _row(file: Path, row: Row, members: Sequence[tarfile.TarInfo]) -> Row:
    """A sample's row; its pictures stay in the tar."""
    try:
        for member in members:
            if member.size > MAX_BYTES:
                problem = f"has {member.size:,} bytes, more than {MAX_BYTES:,}. Make it smaller, or remove it"
                raise row.error(member.name, problem)
        by_kind = {kind: [member for member in members if _kind(member) == kind] for kind in ("json", "picture", "other")}
        jsons = by_kind["json"]
        if len(jsons) != 1:
            raise row.error("json", f"must be there once, not {len(jsons)} times")
        values = row.inner("json", _read(file, jsons[0].offset_data, jsons[0].size)).values
    except UserError as error:
        return replace(row, problem=error)
    places = [((str(file), member.offset_data, member.size), f"{member.name} ({file})") for member in by_kind["picture"]]
    shown = tuple(Picture(load=_read, at=at, name=name) for at, name in places)
    return _Row(row.where, values, row.root, shown=shown, unused=tuple(member.name for member in by_kind["other"]))


def _kind(member: tarfile.TarInfo) -> str:
    suffix = Path(member.name).suffix.lower()
    if suffix == ".json":
        return "json"
    return "picture" if suffix in PICTURES else "other"


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    end = 0
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every header
        if member.offset_data <= end or member.size < 0:  # it would be read again and again
            raise ValueError(f"{member.name}: a size that leads back, {member.size}")
        if member.issparse():
            raise ValueError(f"{member.name} is stored as a sparse file, whose bytes do not stand there")
        end = member.offset_data
        if member.isfile():
            yield member


def _stem(member: tarfile.TarInfo) -> str:
    folder, _, name = member.name.rpartition("/")
    return f"{folder}/{name.split('.', 1)[0]}".lstrip("/")


def _read(file: str | Path, offset: int, size: int) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)
