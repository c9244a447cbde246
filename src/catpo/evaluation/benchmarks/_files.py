"""The official files of a benchmark: where they may lie in a folder, where to get them, and what they must contain."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any

from catpo.core.errors import UserError, shown
from catpo.core.types import Picture
from catpo.files.records import decode, parse_json, parse_records, read_bytes


@dataclass(frozen=True)
class Source:
    """One official file."""

    name: str
    """What messages and scores.json call it."""
    places: tuple[str, ...]
    """Where it may lie in `--data`, in the order looked for; the first is where to put it."""
    url: str
    """Where to get it."""
    sha256: str = ""
    """Of the contents (unpacked, if the name ends with .gz) that official numbers were checked with."""
    is_needed: bool = True
    """Whether grading needs it; False: an alternative to another file, or for an option."""
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


@dataclass
class Folder:
    """What `--data` names, opened for one benchmark.

    Reading raises UserError where a source is missing, is not UTF-8, or is not the JSON that is asked for.
    """

    path: Path
    benchmark: str
    sources: Sequence[Source]
    pictures: Pictures | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    """Name of each file that was read -> its SHA-256."""
    known_pictures: dict[str, Picture] = field(default_factory=dict, repr=False)
    """Pictures already looked for; many questions are about the same."""

    def source(self, name: str) -> Source:
        return next(source for source in self.sources if source.name == name)

    def find(self, name: str) -> Path | None:
        """Where a source lies, if it is there."""
        paths = (self.path / place for place in self.source(name).places)
        return next((path for path in paths if path.is_file()), None)

    def read(self, name: str) -> str:
        """Text of a source."""
        path = self.find(name)
        if path is None:
            raise UserError(
                f"{self.benchmark}: {name} is not in {self.path} (looked for {', '.join(self.source(name).places)}). "
                f"`catpo data get {self.benchmark} --data {quote(str(self.path))}` shows where to get it."
            )
        content = read_bytes(path)
        self.hashes[name] = hashlib.sha256(content).hexdigest()
        return decode(content, path)

    def json(self, name: str) -> Any:
        """A source that is one JSON value."""
        return parse_json(self.read(name), str(self.find(name)))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A source that is JSON Lines, or one JSON list of objects."""
        return [record.row for record in parse_records(self.read(name), str(self.find(name)))]

    def picture_files(self, pattern: str) -> list[Path]:
        """All picture files whose name fits."""
        assert self.pictures is not None
        return [path for place in self.pictures.places for path in (self.path / place).glob(pattern)]

    def picture(self, file: str) -> Picture:
        """A picture by its file name; whether it is there is seen when it is opened.

        Raises:
            UserError: the name leaves the folder.
        """
        assert self.pictures is not None
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            files = ", ".join(self.hashes)
            raise UserError(f"{self.benchmark}: picture '{shown(file)}' leaves {self.path}. Get {files} again.")
        if file not in self.known_pictures:
            paths = [self.path / place / file for place in self.pictures.places]
            path = next((path for path in paths if path.is_file()), paths[0])
            self.known_pictures[file] = Picture(path=path, name=file)
        return self.known_pictures[file]
