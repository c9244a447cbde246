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
from catpo.evaluation.benchmarks import Folder, FolderBenchmark, Item, Pictures, Source
from catpo.evaluation.tasks import picture_files
from catpo.files.records import read_bytes

SHOWN = 20
"""Missing pictures that are listed unless all are asked for."""


@dataclass(frozen=True)
class FoundFile:
    """One official file."""

    source: Source
    path: Path | None
    """Where it lies; None if it is missing."""
    verdict: str
    """`as checked`, `another version`, `there` (no hash is known), `missing`, or `not there` where it is not needed."""


@dataclass(frozen=True)
class FileReport:
    """What `--data` has of a benchmark."""

    benchmark: str
    files: list[FoundFile]
    pictures: Pictures | None
    asked: list[Path] = field(default_factory=list)
    """Pictures asked about; empty where the files do not say."""
    missing: list[Path] = field(default_factory=list)
    """Those of them that are not there."""
    problem: str = ""
    """Why the benchmark cannot be opened; empty if answers made elsewhere can be graded."""
    picture_problem: str = ""
    """Why no model can be asked, where that is not about single pictures."""


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
    opened = make(**check_options(make, spec))
    if data is None:
        return FileReport(spec.name, [FoundFile(source, None, "") for source in opened.sources], opened.pictures)
    if not data.is_dir():
        raise UserError(f"{data} is not a folder. Make it, or leave --data out to see what it must hold.")
    folder = Folder(data, spec.name, opened.sources, opened.pictures)
    files = [_file(folder, source) for source in opened.sources]
    items, problem = _open(opened, folder)
    if problem:
        return FileReport(spec.name, files, opened.pictures, problem=problem)
    if opened.is_open:  # only a model must be told which pictures it is asked about
        opened.is_answered_here = True
        items, problem = _open(opened, folder)
    asked, missing = picture_files(items)
    return FileReport(spec.name, files, opened.pictures, asked, missing, picture_problem=problem)


def _open(benchmark: FolderBenchmark, folder: Folder) -> tuple[list[Item], str]:
    """The items, or why there are none."""
    try:
        return benchmark.opened(folder), ""
    except UserError as error:
        return [], str(error)


def _file(folder: Folder, source: Source) -> FoundFile:
    path = folder.find(source.name)
    if path is None:
        return FoundFile(source, None, "missing" if source.is_needed else "not there")
    if not source.sha256:
        return FoundFile(source, path, "there")
    is_same = hashlib.sha256(read_bytes(path)).hexdigest() == source.sha256
    return FoundFile(source, path, "as checked" if is_same else "another version")


def describe(report: FileReport, data: Path | None, *, is_complete: bool = False) -> list[str]:
    """A report in lines for the terminal.

    Args:
        report: what `look` found.
        data: where; None shows where to put things.
        is_complete: list every missing picture.
    """
    lines = []
    for file in report.files:
        path = file.path or (data or Path("DIR")) / file.source.places[0]
        state = file.verdict or ("needed" if file.source.is_needed else "not always needed")
        lines.append(f"{state}: {path}{_in_brackets(file.source.note)}")
        if file.source.url and file.verdict != "as checked":
            lines.append(f"    {file.source.url}")
    if report.pictures is not None:
        lines.append(_pictures_line(report, report.pictures, data))
        shown = report.missing if is_complete else report.missing[:SHOWN]
        lines += [f"    missing: {path}" for path in shown]
        if len(shown) < len(report.missing):
            lines.append(f"    and {len(report.missing) - len(shown):,} more; --all lists them")
    return lines if data is None else [*lines, report.problem or _conclusion(report)]


def _pictures_line(report: FileReport, pictures: Pictures, data: Path | None) -> str:
    source = f"{pictures.count:,} pictures{_in_brackets(pictures.note)} from {pictures.url}"
    if data is None or not report.asked:
        return f"Pictures, only for asking a model: {source}, into {data or 'DIR'}/{pictures.places[0]}."
    count = f"{len(report.asked) - len(report.missing):,} of {len(report.asked):,} pictures are there"
    if report.missing:
        return f"{count}. The others: {source}, into {report.missing[0].parent}."
    return f"{count}; SHA-256 over all of them in order: {_hash(report.asked)}."


def _conclusion(report: FileReport) -> str:
    changed = [file.source.name for file in report.files if file.verdict == "another version"]
    warning = f" Not the versions that official figures were checked with: {', '.join(changed)}." if changed else ""
    if report.asked and not report.missing:
        return f"{report.benchmark} can be asked and graded.{warning}"
    reason = report.picture_problem or "asking a model takes the pictures."
    return f"{report.benchmark}: answers made elsewhere can be graded; {reason}{warning}"


def _in_brackets(note: str) -> str:
    return f" ({note})" if note else ""


def _hash(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
