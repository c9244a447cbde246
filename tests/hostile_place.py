"""What the tables of bad and hostile input share: the folder a case writes into, the commands, and how a case is added."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TEXT_LIMIT = 1_000_000
PAIR = {"image": "a.png", "prompt": "What is there?", "chosen": "A dog.", "rejected": "A cat."}
SAMPLE = {"image": "a.png", "prompt": "What is there?", "references": ["A dog."], "truth": {"present": ["dog"]}}
CODE = "__import__('pathlib').Path('pwned').touch()"


@dataclass(frozen=True)
class Place:
    """Where a case may write, and what it may read."""

    path: Path
    model: Path
    """A tiny model on disk."""
    store: Path
    """A reward store of that model."""

    @property
    def out(self) -> Path:
        return self.path / "out"

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def data(self, *rows: Any, picture: bytes | None = None) -> Path:
        """A folder with rows and the picture a.png."""
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        self.write("data/data.jsonl", b"\n".join(lines) + b"\n")
        self.write("data/a.png", picture if picture is not None else encoded())
        return self.path / "data"


@dataclass(frozen=True)
class Case:
    name: str
    command: Callable[[Place], list[Any]]
    """Writes what is wrong, and gives the command line."""
    says: tuple[str, ...]
    """What the message must tell: the item and the reason."""


@dataclass(frozen=True)
class Fine:
    name: str
    command: Callable[[Place], list[Any]]
    holds: Callable[[Place, str], bool]
    """Of the folder and what was printed: that it worked, and how."""


BAD: list[Case] = []
GOOD: list[Fine] = []


def bad(name: str, command: Callable[[Place], list[Any]], *says: str) -> None:
    BAD.append(Case(name, command, says))


def good(name: str, command: Callable[[Place], list[Any]], holds: Callable[[Place, str], bool]) -> None:
    GOOD.append(Fine(name, command, holds))


def refused(name: str, command: Callable[[Place], list[Any]], *says: str) -> None:
    """What scoring or training refuses, and a dry run of it with the same words."""
    bad(name, command, *says)
    bad(f"{name}-planned", lambda place: [*command(place), "--dry-run"], *says)


# ---- commands ----------------------------------------------------------------------------------------------------------------


def convert(place: Place, source: Any) -> list[Any]:
    """Reads every pair and its picture; needs no model."""
    return ["data", "convert", source, "--output", place.out]


def ask(place: Place, source: Any) -> list[Any]:
    """Reads samples before any model is loaded."""
    return ["pair", "--data", source, "--model", place.model, "--output", place.out]


def score(place: Place, source: Any, *options: Any) -> list[Any]:
    return ["score", "--pairs", source, "--model", place.model, "--output", place.out, *options]


def train(place: Place, source: Any, *options: Any) -> list[Any]:
    return ["train", "--pairs", source, "--model", place.model, "--max-steps", "1", "--output", place.out, *options]


def show_store(place: Place) -> list[Any]:
    return ["report", "--rewards", place.path / "store", "--output", place.out]


def grade(place: Place, answers: Any, *options: Any, benchmarks: str = "scenes(count=1)") -> list[Any]:
    return ["evaluate", "--benchmarks", benchmarks, "--answers", answers, "--output", place.out, *options]


# ---- input -------------------------------------------------------------------------------------------------------------------

MISSING = object()
HUGE = "dog " * (TEXT_LIMIT // 4 + 1)
HUGE_COUNT = str(10**20)


def encoded(mode: str = "RGB", size: tuple[int, int] = (24, 16), form: str = "PNG", **options: Any) -> bytes:
    """A picture whose left half is red and whose right half is blue."""
    picture = Image.new("RGB", size, (220, 30, 30))
    picture.paste((30, 30, 220), (size[0] // 2, 0, size[0], size[1]))
    stream = io.BytesIO()
    picture.convert(mode).save(stream, form, **options)
    return stream.getvalue()


def changed(row: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    return {key: each for key, each in {**row, field: value}.items() if each is not MISSING}


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def make_pipe(path: Path) -> Path:
    """A pipe that nobody writes into: reading it would hang."""
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    return path


def parquet(columns: Mapping[str, list[Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), stream)
    return stream.getvalue()


def names(cases: list[Any]) -> Iterator[str]:
    """Of pytest: one word each."""
    yield from (case.name for case in cases)
