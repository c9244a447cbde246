"""What `catpo detect` found as one HTML page: pictures, texts and words in doubt. All text that is not ours is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catpo import __version__
from catpo.reporting.page import render, replace_report
from catpo.reporting.pictures import Album

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A stretch of a text: an object word with its probability, or what stands between."""

    text: str
    grounded: float | None
    is_doubtful: bool


def doubtful_first(rows: Sequence[Row], threshold: float) -> list[int]:
    """The numbers of the rows, those with the most words below the threshold first."""

    def doubts(number: int) -> int:
        return sum(word["grounded"] is not None and word["grounded"] < threshold for word in rows[number]["words"])

    return sorted(range(len(rows)), key=lambda number: (-doubts(number), number))


def write_page(found: Any, folder: Path, *, threshold: float, max_pictures: int) -> Path:
    """Write `report.html` into the folder; returns its path.

    Args:
        found: a `catpo.scoring.detect.Detection`, which this room does not import.
        folder: the detection's.
        threshold: words less likely than this are marked.
        max_pictures: at most so many texts are shown.

    Raises:
        UserError: the folder holds a report.html that catpo did not write.
    """
    album, shown = Album(), []
    for number in doubtful_first(found.rows, threshold)[:max_pictures]:
        row, pictures = found.rows[number], album.add_all(found.items[number].sample.images)
        shown.append((row["picture"], [album.uris[each] for each in pictures], parts(row, threshold)))
    page = render(
        "detections.html.j2",
        shown=shown,
        total=len(found.rows),
        words=doubted_words(found.rows, threshold),
        threshold=threshold,
        settings=found.about["settings"],
        auroc=found.about.get("auroc"),
        problems=list(dict.fromkeys(album.problems)),
        version=__version__,
    )
    path = folder / "report.html"
    replace_report(path, page.encode("utf-8", "replace"))
    return path


def parts(row: Row, threshold: float) -> list[Part]:
    """A text in its stretches."""
    stretches, end = [], 0
    for word in row["words"]:
        stretches.append(Part(row["text"][end : word["start"]], None, False))
        end, grounded = word["end"], word["grounded"]
        stretches.append(Part(row["text"][word["start"] : end], grounded, grounded is not None and grounded < threshold))
    return [*stretches, Part(row["text"][end:], None, False)]


def doubted_words(rows: Sequence[Row], threshold: float) -> list[tuple[str, int, int]]:
    """(object, how often it is named, how often it is below the threshold), the most doubted first; for what is said of an
    object its question stands.
    """
    counts: dict[str, list[int]] = {}
    for row in rows:
        for word in row["words"]:
            if word["grounded"] is not None:
                is_object = word.get("kind", "objects") == "objects"
                named = counts.setdefault(word["object"] if is_object else word["question"], [0, 0])
                named[0] += 1
                named[1] += word["grounded"] < threshold
    ordered = sorted(counts.items(), key=lambda item: (-item[1][1], item[0]))
    return [(name, named, doubted) for name, (named, doubted) in ordered]
