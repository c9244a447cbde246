"""Your own pictures and texts: a folder with one .jsonl of pairs or samples, or one that `catpo pair` wrote.

    {"image": "a.jpg", "prompt": "Describe the image.", "chosen": "A dog.", "rejected": "A cat."}       a pair
    {"image": "a.jpg", "references": ["A dog on a beach."], "truth": {"present": ["dog"]}}              a sample

Every row is checked when the folder is opened, so that no later step fails halfway; pictures are decoded when needed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from catpo.core.conversation import DEFAULT_PROMPT, IMAGE, Turn
from catpo.core.errors import UserError, did_you_mean
from catpo.core.types import SIDES, Picture, PreferencePair, Sample, Span, check_pair, pair_id
from catpo.data import datasets
from catpo.data.datasets import FieldOptions, Row
from catpo.data.datasets._files import line_object, numbered_lines
from catpo.data.datasets._messages import dialogue
from catpo.data.pair_folder import ABOUT, HASHED, ROWS
from catpo.files.inside import stay_inside
from catpo.files.json_files import read_json
from catpo.text.object_words import check_vocabulary

FIELDS = ("id", "image", "images", "prompt", "chosen", "rejected", "history", "labels", "meta", "references", "truth")
KNOWN = frozenset(FIELDS)
USUAL_FILES = (ROWS, "data.jsonl")
LABELS = ("grounded", "hallucinated")


class Dataset(datasets.RowDataset):
    """Rows of DIR/pairs.jsonl, DIR/data.jsonl, or the one .jsonl in DIR.

    Rows with chosen and rejected are pairs, the others are samples. Other fields are kept in a pair's `meta`.

    Args:
        source: the folder, or the .jsonl file in it.
        images: folder of the pictures, which all of them must lie inside; by default the file's own.
        limit: read at most this many rows.
        prompt: for rows without one.
        vocabulary: JSON file inside the folder, surface form -> object, e.g. {"puppies": "dog"}; by default DIR/vocabulary.json
            if there is one, else the built-in words.

    Raises:
        UserError: a file is missing, or a row is wrong; names file, line and field.
    """

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        images: str | None = None,
        limit: int | None = None,
        prompt: str = DEFAULT_PROMPT,
        vocabulary: str | None = None,
    ) -> None:
        if source is None:
            raise UserError("folder needs a place to read: folder(source='DIR'), or simply the path.")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise UserError(f"folder: limit={limit!r} must be a whole number, 1 or more.")
        self.name, self.limit, self.prompt = str(source), limit, prompt
        _check_finished(Path(source))
        self.file = row_file(Path(source))
        self.is_ours = _is_made_by_catpo(self.file)
        """Whether `catpo` made the folder, whose pictures are named by their hash."""
        self.root = Path(images or self.file.parent).resolve()
        self.vocabulary = self.words(source, vocabulary=vocabulary)
        self._items: list[PreferencePair | Sample] | None = None

    def read_with(self, fields: FieldOptions) -> None:
        """Set which columns are read, and read all rows, so that no later step fails halfway.

        Raises:
            UserError: a row is wrong, or there is none; names file, line and field.
        """
        super().read_with(fields)
        self._items = []
        for _, item in islice(self._scanned(), self.limit):
            if isinstance(item, UserError):
                raise item
            self._items.append(item)
        if not self._items:
            raise UserError(f"{self.file} holds no rows. Give it one JSON object per line.")

    def _read(self) -> list[PreferencePair | Sample]:
        if self._items is None:
            self.read_with(self.fields)
        return self._items or []

    def samples(self) -> Iterator[Sample]:
        """The rows without chosen and rejected."""
        samples = [item for item in self._read() if isinstance(item, Sample)]
        return iter(samples) if samples else super().samples()

    def pairs(self) -> Iterator[PreferencePair]:
        """The rows with chosen and rejected."""
        pairs = [item for item in self._read() if isinstance(item, PreferencePair)]
        return iter(pairs) if pairs else datasets.Dataset.pairs(self)

    @classmethod
    def scan(cls, *arguments: Any, fields: FieldOptions = FieldOptions(), **options: Any) -> Iterator[datasets.Scanned]:
        """Every line, bad ones too."""
        dataset = cls(*arguments, **options)
        dataset.fields = fields
        return islice(dataset._scanned(), dataset.limit)

    def _scanned(self) -> Iterator[datasets.Scanned]:
        """Each line's pair or sample, or what is wrong with it; blank lines are skipped."""
        seen: dict[str, int] = {}
        name = str(self.file)
        for number, line in numbered_lines(self.file):
            where = f"{name}:{number}"
            try:
                row = _Row(where, line_object(where, line), self.root, is_ours=self.is_ours)
                [item] = row.made(partial(_Row.items, prompt=self.prompt, number=number), self.fields)
                if item.id in seen:
                    raise UserError(
                        f"{where}: id '{item.id}' is that of line {seen[item.id]}. Remove the row or give it another id."
                    )
            except UserError as error:
                yield where, error
                continue
            seen[item.id] = number
            yield where, item

    @classmethod
    def words(cls, source: str | Path, *, vocabulary: str | None = None, **options: Any) -> Mapping[str, str] | None:
        """DIR/vocabulary.json, or the file named."""
        folder = row_file(Path(source)).parent
        path = stay_inside(folder / (vocabulary or "vocabulary.json"), folder)
        if vocabulary is None and not path.exists():
            return None
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file. Put a JSON file there that maps words to objects, or remove it.")
        words = read_json(path, made_by="")
        check_vocabulary(words, path)
        return words


@dataclass(frozen=True)
class _Row(Row):
    """One JSON object with its place in the file."""

    is_ours: bool = False
    """Whether it is of a folder whose pictures are named by their hash."""

    @property
    def is_pair(self) -> bool:
        sides = [side for side in SIDES if side in self.values]
        if len(sides) == 1:
            other = "rejected" if sides == ["chosen"] else "chosen"
            raise UserError(f"{self.where}: field '{sides[0]}' stands without '{other}'. A pair needs both, a sample neither.")
        return bool(sides)

    def items(self, prompt: str, number: int) -> list[PreferencePair | Sample]:
        """The row's pair if it has answers, else its sample."""
        self.unknown()
        return [self.preference(prompt) if self.is_pair else self.sample(prompt, number)]

    def preference(self, prompt: str) -> PreferencePair:
        images, prompt = self.images(), self.text("prompt", prompt)
        chosen, rejected = self.text("chosen"), self.text("rejected")
        earlier = self.values.get("history") or []
        turns = [message.turn for message in dialogue(self, "history", earlier, is_history=True)] if earlier else []
        history: list[Turn] = []
        if turns or IMAGE in prompt:
            *history, question = self.placed("prompt", [*turns, Turn("user", prompt)], len(images))
            prompt = question.text if IMAGE in prompt else prompt
        labels = self.labels({"chosen": chosen, "rejected": rejected})
        meta = {**self.mapping("meta"), **self.unknown()}
        name = self.identity() or pair_id(images, prompt, chosen, rejected, history)
        return check_pair(PreferencePair(name, images, prompt, chosen, rejected, labels, meta, tuple(history)))

    def sample(self, prompt: str, number: int) -> Sample:
        images, text = self.images(), self.text("prompt", prompt)
        [question] = self.placed("prompt", [Turn("user", text)], len(images))
        return Sample(
            id=self.identity() or str(number),
            images=images,
            prompt=question.text if IMAGE in text else text,
            references=tuple(self.texts("references")),
            truth=self.truth(),
        )

    def images(self) -> tuple[Picture, ...]:
        fields = [name for name in ("image", "images") if name in self.values]
        fields = [name for name in fields if len(fields) == 1 or self.has(name)]  # one of both may be null
        if len(fields) != 1:
            raise self.error("image", "or 'images' must be given, and not both")
        [field] = fields
        if field == "images" and not isinstance(self.values.get("images"), list):
            raise self.error(field, "must be a list of pictures")
        return self.pictures(field)

    def picture(self, field: str, value: Any, root: Path) -> Picture:
        """As of any row; of one that is named by its hash, the bytes are compared."""
        picture = super().picture(field, value, root)
        named = re.fullmatch(HASHED, value) if self.is_ours and isinstance(value, str) else None
        return picture if named is None else replace(picture, expected=named[1])

    def identity(self) -> str:
        """The row's own id, or an empty text."""
        value = self.values.get("id")
        if value is None:
            return ""
        return str(value) if type(value) is int else self.checked("id", value)

    def truth(self) -> dict[str, Any]:
        """What is known of the picture."""
        truth = self.mapping("truth")
        for key in ("present", "tempting"):
            names = truth.get(key, [])
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise self.error(f"truth.{key}", "must be a list of object names")
        return truth

    def labels(self, texts: Mapping[str, str]) -> dict[str, tuple[Span, ...]]:
        """Labelled spans of each side's text: {side: [[start, end, "grounded" or "hallucinated"], ...]}."""
        if "labels" not in self.values:
            return {}
        spans = {}
        for side, rows in self.mapping("labels").items():
            field = f"labels.{side}"
            if side not in SIDES:
                raise self.error(field, f"is not known. {did_you_mean(side, SIDES)} Rename it")
            if not isinstance(rows, list):
                raise self.error(field, "must be a list of [start, end, label]")
            spans[side] = tuple(self._span(field, row, texts[side]) for row in rows)
        return {side: spans[side] for side in SIDES if side in spans}

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
        """Fields that are not ours; one that looks like a typing error is refused."""
        if self.values.keys() <= KNOWN:
            return {}
        extra = {key: value for key, value in self.values.items() if key not in KNOWN}
        for key in extra:
            close = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.8)
            if close and close[0] not in self.values:
                raise self.error(key, f"is not known. Did you mean '{close[0]}'? Rename it")
        return extra


def row_file(source: Path) -> Path:
    """The file of rows in a folder, or the file itself.

    Raises:
        UserError: there is none, there is more than one, or it is a link out of the folder.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(f"{source} is neither a folder nor a file. Check the path.")
    for name in USUAL_FILES:
        if (source / name).is_file():
            return stay_inside(source / name, source)
    files = sorted(file for file in source.glob("*.jsonl") if file.is_file())  # not a pipe, which would block
    if len(files) != 1:
        problem = "no .jsonl file" if not files else f"{len(files)} .jsonl files ({files[0].name}, {files[1].name}, ...)"
        raise UserError(f"{source} holds {problem}. Call one of them data.jsonl or pairs.jsonl, or give the file itself.")
    return stay_inside(files[0], source)


def _is_made_by_catpo(file: Path) -> bool:
    """Whether a file lies in a pair folder."""
    return file.name == ROWS and (file.parent / ABOUT).is_file()


def _check_finished(source: Path) -> None:
    """Raise if the folder's command was killed before it was complete; a folder made by hand needs no pairs.json."""
    folder = source.parent if source.name == ROWS else source
    if not (folder / ABOUT).is_file():
        return
    about = read_json(folder / ABOUT, made_by="catpo pair")
    if not about.get("complete"):
        made_by = "catpo pair" if "method" in about else "catpo data convert"
        raise UserError(f"{folder} is not finished. Give the same `{made_by}` command again; it goes on where it stopped.")
