"""Your own pictures and texts: a folder with one .jsonl of pairs or samples, or what `catpo pair` wrote.

    {"image": "a.jpg", "prompt": "Describe the image.", "chosen": "A dog.", "rejected": "A cat."}       a pair
    {"image": "a.jpg", "references": ["A dog on a beach."], "truth": {"present": ["dog"]}}              a sample

Every row is checked when the folder is opened, so that nothing fails halfway; pictures are decoded when they are needed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError, did_you_mean
from catpo.core.types import SIDES, Picture, PreferencePair, Sample, Span, check_pair, pair_id
from catpo.data import datasets
from catpo.data.datasets import Row
from catpo.files import strict_json
from catpo.files.json_files import read_json

DEFAULT_PROMPT = "Describe the image."
FIELDS = ("id", "image", "images", "prompt", "chosen", "rejected", "labels", "meta", "references", "truth")
USUAL_FILES = ("pairs.jsonl", "data.jsonl")
LABELS = ("grounded", "hallucinated")
MAX_LINE = 16_000_000
"""Bytes of the longest row."""


class Dataset(datasets.Dataset):
    """Rows of DIR/pairs.jsonl, DIR/data.jsonl, or the one .jsonl in DIR.

    Rows with chosen and rejected are pairs, the others are samples. Fields that are not ours are kept in a pair's `meta`.

    Args:
        source: the folder, or the .jsonl file in it; every picture must lie inside the folder.
        limit: read only the first so many rows.
        prompt: for rows without one.
        vocabulary: JSON file inside the folder, surface form -> object, e.g. {"puppies": "dog"}; DIR/vocabulary.json is taken
            by itself. Without one, the built-in words hold.

    Raises:
        UserError: a file is missing, or a row is not as it should be; names file, line and field.
    """

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        limit: int | None = None,
        prompt: str = DEFAULT_PROMPT,
        vocabulary: str | None = None,
    ) -> None:
        if source is None:
            raise UserError("folder needs a place to read: folder(source='DIR'), or simply the path.")
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise UserError(f"folder: limit={limit!r} must be a whole number, 1 or more.")
        self.name = str(source)
        reader = _reader(Path(source), prompt)
        self.file, self.root = reader.file, reader.file.parent
        self.vocabulary = _vocabulary(self.root, vocabulary)
        rows = list(islice(reader.rows(), limit))
        self._pairs = [row for row in rows if isinstance(row, PreferencePair)]
        self._samples = [row for row in rows if isinstance(row, Sample)]
        if not rows:
            raise UserError(f"{self.file} holds no rows. Give it one JSON object per line.")

    def samples(self) -> Iterator[Sample]:
        """The rows without chosen and rejected."""
        return iter(self._samples) if self._samples else super().samples()

    def pairs(self) -> Iterator[PreferencePair]:
        """The rows with chosen and rejected."""
        return iter(self._pairs) if self._pairs else super().pairs()

    @classmethod
    def scan(
        cls, source: str | Path, *, limit: int | None = None, prompt: str = DEFAULT_PROMPT, **options: Any
    ) -> Iterator[datasets.Scanned]:
        """Every line, bad ones too."""
        return islice(_reader(Path(source), prompt).scan(), limit)

    @classmethod
    def words(cls, source: str | Path, *, vocabulary: str | None = None, **options: Any) -> Mapping[str, str] | None:
        """DIR/vocabulary.json, or the file named."""
        return _vocabulary(_row_file(Path(source)).parent, vocabulary)


def _reader(source: Path, prompt: str) -> _Reader:
    file = _row_file(source)
    _check_finished(file)
    return _Reader(file, file.parent.resolve(), prompt)


@dataclass
class _Reader:
    """Turns lines into pairs and samples."""

    file: Path
    root: Path
    """Resolved; no picture may lie outside."""
    prompt: str

    def rows(self) -> Iterator[PreferencePair | Sample]:
        """Each line's pair or sample; the first bad line ends it."""
        for _, made in self.scan():
            if isinstance(made, UserError):
                raise made
            yield made

    def scan(self) -> Iterator[datasets.Scanned]:
        """Each line's pair or sample, or what is wrong with it; blank lines are skipped."""
        seen: dict[str, int] = {}
        for number, line in self._lines():
            where = f"{self.file}:{number}"
            try:
                row = _Row(where, _object(line, where))
                row.unknown()
                made = self._pair(row) if row.is_pair else self._sample(row, number)
                if made.id in seen:
                    raise UserError(
                        f"{where}: id '{made.id}' is that of line {seen[made.id]}. Remove the row or give it another id."
                    )
            except UserError as error:
                yield where, error
                continue
            seen[made.id] = number
            yield where, made

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with open(self.file, "rb") as stream:
                for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), start=1):
                    content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    if content.strip():
                        yield number, content
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error.strerror}). Check the path.") from error

    def _pair(self, row: _Row) -> PreferencePair:
        images = self._images(row)
        prompt, chosen, rejected = row.text("prompt", self.prompt), row.text("chosen"), row.text("rejected")
        texts = {"chosen": chosen, "rejected": rejected}
        meta = {**row.mapping("meta"), **row.unknown()}
        labels: dict[str, tuple[Span, ...]] = {side: row.spans(side, texts[side]) for side in SIDES if side in row.labels()}
        name = row.identity() or row.named(lambda: pair_id(images, prompt, chosen, rejected))
        return row.named(lambda: check_pair(PreferencePair(name, images, prompt, chosen, rejected, labels, meta)))

    def _sample(self, row: _Row, number: int) -> Sample:
        return Sample(
            id=row.identity() or str(number),
            images=self._images(row),
            prompt=row.text("prompt", self.prompt),
            references=tuple(row.texts("references")),
            truth=row.truth(),
        )

    def _images(self, row: _Row) -> tuple[Picture, ...]:
        if ("image" in row.values) == ("images" in row.values):
            raise row.error("image", "or 'images' must be given, and not both")
        field = "image" if "image" in row.values else "images"
        names = [row.text(field)] if field == "image" else row.texts(field)
        if not names:
            raise row.error(field, "is an empty list. Give at least one picture")
        return tuple(row.picture(field, name, self.root) for name in names)


class _Row(Row):
    """One JSON object with its place in the file."""

    @property
    def is_pair(self) -> bool:
        has = [side for side in SIDES if side in self.values]
        if len(has) == 1:
            other = "rejected" if has == ["chosen"] else "chosen"
            raise UserError(f"{self.where}: field '{has[0]}' stands without '{other}'. A pair needs both, a sample neither.")
        return bool(has)

    def identity(self) -> str:
        """The row's own id, or nothing."""
        value = self.values.get("id")
        if value is None:
            return ""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self.checked("id", value)

    def truth(self) -> dict[str, Any]:
        """What is known of the picture; lists of objects must be that."""
        truth = self.mapping("truth")
        for key in ("present", "tempting"):
            names = truth.get(key, [])
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise self.error(f"truth.{key}", "must be a list of object names")
        return truth

    def labels(self) -> dict[str, Any]:
        """Side -> its labelled stretches, not yet checked."""
        labels = self.mapping("labels")
        for key in labels:
            if key not in SIDES:
                raise self.error(f"labels.{key}", f"is not known. {did_you_mean(key, SIDES)} Rename it")
        return labels

    def spans(self, side: str, text: str) -> tuple[Span, ...]:
        """Labelled stretches of a response: [[start, end, "grounded" or "hallucinated"], ...]."""
        field = f"labels.{side}"
        rows = self.mapping("labels")[side]
        if not isinstance(rows, list):
            raise self.error(field, "must be a list of [start, end, label]")
        return tuple(self._span(field, row, text) for row in rows)

    def _span(self, field: str, row: Any, text: str) -> Span:
        if not isinstance(row, list) or len(row) != 3 or any(type(value) is not int for value in row[:2]):
            raise self.error(field, f"holds {row!r}, which is not [start, end, label]")
        start, end, label = row
        if not 0 <= start < end <= len(text):
            raise self.error(field, f"holds {row!r}, which does not lie inside the response of {len(text)} characters")
        if label not in LABELS:
            raise self.error(field, f"holds {row!r}; a label is 'grounded' or 'hallucinated'")
        return Span(start, end, label)

    def unknown(self) -> dict[str, Any]:
        """Fields that are not ours; one that looks like a slip of the pen is refused."""
        extra = {key: value for key, value in self.values.items() if key not in FIELDS}
        for key in extra:
            close = [known for known in difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.8) if known not in self.values]
            if close:
                raise self.error(key, f"is not known. Did you mean '{close[0]}'? Rename it")
        return extra


def _row_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(f"{source} is neither a folder nor a file. Check the path.")
    for name in USUAL_FILES:
        if (source / name).is_file():
            return source / name
    found = sorted(file for file in source.glob("*.jsonl") if file.is_file())  # not a pipe, which would be waited for
    if len(found) != 1:
        problem = "no .jsonl file" if not found else f"{len(found)} .jsonl files ({found[0].name}, {found[1].name}, ...)"
        raise UserError(f"{source} holds {problem}. Call one of them data.jsonl or pairs.jsonl, or give the file itself.")
    return found[0]


def _check_finished(file: Path) -> None:
    """What `catpo pair` was killed over is not all there; a folder made by hand has no pairs.json and needs none."""
    about = file.parent / "pairs.json"
    if file.name == "pairs.jsonl" and about.is_file() and not read_json(about, made_by="catpo pair").get("complete"):
        raise UserError(
            f"{file.parent} is not finished. Give the same `catpo pair` command again; it goes on where it stopped."
        )


def _vocabulary(root: Path, name: str | None) -> Mapping[str, str] | None:
    path = root / (name or "vocabulary.json")
    if name is None and not path.exists():
        return None
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file. Put a JSON file there that maps words to objects, or remove it.")
    words = read_json(path, made_by="you: surface form -> object")
    if not all(isinstance(value, str) and key.strip() and value.strip() for key, value in words.items()):
        raise UserError(f'{path} must map words to objects, e.g. {{"puppies": "dog", "dog": "dog"}}.')
    return words


def _object(line: bytes, where: str) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise UserError(f"{where} is longer than {MAX_LINE:,} bytes. Is it JSON Lines? Each line must be one JSON object.")
    try:
        value = strict_json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}). Each line must be one JSON object.") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is a JSON {type(value).__name__}, not an object. Each line must be one JSON object.")
    return value
