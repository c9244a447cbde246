"""The official files of a benchmark: where they may lie in a folder, where to get them, whether they are the known ones."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from catpo.core.errors import UserError, shown
from catpo.core.types import Picture
from catpo.files import strict_json

MAX_BYTES = 2_000_000_000
"""More is not read from one file; the largest official one, COCO's instances of train2014, has 448 million."""


@dataclass(frozen=True)
class Source:
    """One official file."""

    name: str
    """What it is called in messages and in scores.json."""
    places: tuple[str, ...]
    """Where it may stand in `--data`, in the order looked for; the first is where to put it."""
    url: str
    """Where to get it."""
    sha256: str = ""
    """Of the contents (unpacked, if the name ends with .gz) that official numbers were checked with."""
    is_needed: bool = True
    """Whether grading needs it; False: instead of another, or for an option."""
    note: str = ""
    """What it is for, where the name does not say."""


@dataclass(frozen=True)
class Pictures:
    """The pictures that a model is shown; grading answers made elsewhere needs none."""

    places: tuple[str, ...]
    """Folders in `--data` where they may lie; the first is where to put them."""
    count: int
    url: str
    note: str = ""


@dataclass(frozen=True)
class Record:
    """A row of somebody's file."""

    place: str
    """File and line, for messages."""
    row: dict[str, Any]


@dataclass
class Folder:
    """What `--data` names, opened for one benchmark."""

    path: Path
    benchmark: str
    sources: Sequence[Source]
    pictures: Pictures | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    """Name of each file that was read -> its SHA-256."""
    known_pictures: dict[str, Picture] = field(default_factory=dict, repr=False)
    """Pictures that were looked for; many questions are about the same."""

    def find(self, name: str) -> Path | None:
        """Where a source lies, if it is there."""
        places = (self.path / place for place in self.source(name).places)
        return next((place for place in places if place.is_file()), None)

    def source(self, name: str) -> Source:
        return next(source for source in self.sources if source.name == name)

    def read(self, name: str) -> str:
        """Text of a source.

        Raises:
            UserError: it is not there, or not UTF-8.
        """
        found = self.find(name)
        if found is None:
            raise UserError(
                f"{self.benchmark}: {name} is not in {self.path} (looked for {', '.join(self.source(name).places)}). "
                f"`catpo data get {self.benchmark} --data {self.path}` shows where to get it."
            )
        content = contents(found)
        self.hashes[name] = hashlib.sha256(content).hexdigest()
        return decode(content, found)

    def json(self, name: str) -> Any:
        """A source that is one JSON value.

        Raises:
            UserError: it is not there, or not JSON.
        """
        return _json(self.read(name), str(self.find(name)))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A source that is JSON Lines, or one JSON list of objects.

        Raises:
            UserError: it is not there, or a row is not an object.
        """
        return [record.row for record in parse_records(self.read(name), str(self.find(name)))]

    def picture_files(self, pattern: str) -> list[Path]:
        """All picture files whose name fits."""
        assert self.pictures is not None
        return [path for place in self.pictures.places for path in (self.path / place).glob(pattern)]

    def picture(self, file: str) -> Picture:
        """A picture by its file name; whether it is there is seen when it is opened."""
        assert self.pictures is not None
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            files = ", ".join(self.hashes)
            raise UserError(f"{self.benchmark}: picture '{shown(file)}' leaves {self.path}. Get {files} again.")
        if file not in self.known_pictures:
            places = [self.path / place / file for place in self.pictures.places]
            found = next((place for place in places if place.is_file()), places[0])
            self.known_pictures[file] = Picture(path=found, name=file)
        return self.known_pictures[file]


def contents(path: Path, *, most: int = MAX_BYTES) -> bytes:
    """Bytes of a file, unpacked if it ends with .gz; not more than `most`.

    Raises:
        UserError: it cannot be read or unpacked, or is too large.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            content = stream.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}). Check the path, or get the file again.") from error
    if len(content) > most:
        raise UserError(f"{path} holds more than {most:,} bytes. Is it the right file? Give another, or parts of it.")
    return content


def decode(content: bytes, path: str | Path) -> str:
    """The bytes as text.

    Raises:
        UserError: they are not UTF-8; names the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line} is not UTF-8 (byte 0x{content[error.start]:02x} at {error.start}). Save the file as UTF-8."
        ) from error


def parse_records(text: str, where: str) -> list[Record]:
    """The objects of a JSON list, or of JSON Lines (blank lines are left out).

    Raises:
        UserError: a row is not JSON or not an object; names it.
    """
    if text.lstrip().startswith("["):
        rows = [(f"{where}: row {number}", row) for number, row in enumerate(_json(text, where), start=1)]
    else:  # not splitlines(): U+2028 may stand inside a JSON text
        lines = [(f"{where}:{number}", line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [(place, _json(line.removesuffix(","), place)) for place, line in lines]  # SEED-Bench ends with commas
    return [_record(place, row) for place, row in rows]


def _record(place: str, row: Any) -> Record:
    if not isinstance(row, dict):
        raise UserError(f"{place} must be a JSON object.")
    for name, value in row.items():
        if isinstance(value, str) and not value.isascii() and _HALVES.search(value):
            raise UserError(f"{place}: '{name}' holds half a character (a lone surrogate). Remove it.")
    return Record(place, row)


_HALVES = re.compile("[\ud800-\udfff]")


def _json(text: str, where: str) -> Any:
    try:
        return strict_json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}). Mend or remove it.") from error
