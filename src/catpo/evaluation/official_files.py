"""`catpo data get`: which official files a benchmark is made of, where they go, and whether they are there. Downloads nothing.

Files are checked by hash, pictures by count; missing ones are listed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.spec import check_options, parse
from catpo.evaluation.benchmarks import FolderBenchmark
from catpo.evaluation.benchmarks._files import Folder, Pictures, Source, contents

SHOWN = 20
"""Missing pictures that are listed unless all are asked for."""


@dataclass(frozen=True)
class FileFound:
    """One official file."""

    source: Source
    place: Path | None
    """Where it lies; None if it does not."""
    verdict: str
    """`as checked`, `another version`, `there` (no hash is known), `missing`, or `not there` where it is not needed."""


@dataclass(frozen=True)
class FileReport:
    """What `--data` has of a benchmark."""

    benchmark: str
    files: list[FileFound]
    pictures: Pictures | None
    picture_count: int = 0
    """Pictures that are there, of those asked about."""
    asked_count: int = 0
    """Pictures asked about; 0 where the files do not say."""
    missing: list[Path] = field(default_factory=list)
    pictures_hash: str = ""
    """SHA-256 over all pictures, for comparing with somebody else's; empty unless all are there."""
    problem: str = ""
    """Why the benchmark cannot be opened."""
    problem_of_pictures: str = ""
    """Why no model can be asked, where that is not about single pictures."""

    @property
    def is_gradable(self) -> bool:
        """Answers made elsewhere can be graded."""
        return not self.problem

    @property
    def is_answerable(self) -> bool:
        """A model can be asked."""
        return self.is_gradable and bool(self.asked_count) and not self.missing


def look(benchmark: str, data: Path | None) -> FileReport:
    """What a folder has of a benchmark; without a folder, what it should have.

    Args:
        benchmark: with options, which may ask for other files: `pope(labels='head')`.
        data: what `--data` will be.

    Raises:
        UserError: there is no such benchmark, or it has no official files; the folder does not exist.
    """
    spec = parse(benchmark)
    make = registry.load("benchmarks", spec.name)
    if not (isinstance(make, type) and issubclass(make, FolderBenchmark)):
        raise UserError(f"'{spec.name}' is made of a data set, not of official files. `catpo data check` looks at data sets.")
    made = make(**check_options(make, spec))
    if data is None:
        return FileReport(spec.name, [FileFound(source, None, "") for source in made.sources], made.pictures)
    if not data.is_dir():
        raise UserError(f"{data} is no folder. Make it, or leave --data out to see what it must hold.")
    folder = Folder(data, spec.name, made.sources, made.pictures)
    files = [_file(folder, source) for source in made.sources]
    try:
        items = made.opened(folder)
    except UserError as error:
        return FileReport(spec.name, files, made.pictures, problem=str(error))
    if made.is_open:  # only a model has to see which pictures
        made.is_answered_here = True
        try:
            items = made.opened(folder)
        except UserError as error:
            return FileReport(spec.name, files, made.pictures, problem_of_pictures=str(error))
    asked = list(dict.fromkeys(picture.path for item in items for picture in item.sample.images if picture.path))
    missing = [path for path in asked if not path.is_file()]
    digest = _hash(asked) if asked and not missing else ""
    return FileReport(spec.name, files, made.pictures, len(asked) - len(missing), len(asked), missing, digest)


def describe(brought: FileReport, data: Path | None, *, is_complete: bool = False) -> list[str]:
    """What was found, in lines for the terminal.

    Args:
        brought: what was found.
        data: where; None shows where to put things.
        is_complete: list every missing picture.
    """
    lines = []
    for each in brought.files:
        place = each.place or (data or Path("DIR")) / each.source.places[0]
        state = each.verdict or ("needed" if each.source.is_needed else "not always needed")
        lines.append(f"{state}: {place}{f' ({each.source.note})' if each.source.note else ''}")
        lines += [f"    {each.source.url}"] if each.source.url and each.verdict != "as checked" else []
    if brought.pictures is not None:
        lines.append(_pictures_line(brought, data))
        shown = brought.missing if is_complete else brought.missing[:SHOWN]
        lines += [f"    missing: {path}" for path in shown]
        if len(shown) < len(brought.missing):
            lines.append(f"    and {len(brought.missing) - len(shown):,} more; --all lists them")
    return lines if data is None else [*lines, brought.problem or _conclusion(brought)]


def _pictures_line(brought: FileReport, data: Path | None) -> str:
    assert brought.pictures is not None
    source = brought.pictures
    about = f"{source.count:,} pictures{f' ({source.note})' if source.note else ''} from {source.url}"
    if data is None or not brought.asked_count:
        return f"Pictures, only for asking a model: {about}, into {data or 'DIR'}/{source.places[0]}."
    found = f"{brought.picture_count:,} of {brought.asked_count:,} pictures are there"
    if brought.missing:
        return f"{found}. The others: {about}, into {brought.missing[0].parent}."
    return f"{found}; SHA-256 over all of them in order: {brought.pictures_hash}."


def _conclusion(brought: FileReport) -> str:
    changed = [each.source.name for each in brought.files if each.verdict == "another version"]
    warning = f" Not the versions that official figures were checked with: {', '.join(changed)}." if changed else ""
    if brought.is_answerable:
        return f"{brought.benchmark} can be asked and graded.{warning}"
    why = brought.problem_of_pictures or "asking a model takes the pictures."
    return f"{brought.benchmark}: answers made elsewhere can be graded; {why}{warning}"


def _file(folder: Folder, source: Source) -> FileFound:
    place = folder.find(source.name)
    if place is None:
        return FileFound(source, None, "missing" if source.is_needed else "not there")
    if not source.sha256:
        return FileFound(source, place, "there")
    same = hashlib.sha256(contents(place)).hexdigest() == source.sha256
    return FileFound(source, place, "as checked" if same else "another version")


def _hash(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
