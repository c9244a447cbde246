"""What a data set offers: samples, pairs, or both; and rows that are checked field by field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from catpo.core.conversation import IMAGE, Turn, check_places, without_leading_places
from catpo.core.errors import UserError
from catpo.core.types import Picture, PreferencePair, Sample, check_pair, pair_id
from catpo.data.datasets._content import content_of
from catpo.data.datasets._pictures import picture
from catpo.files import strict_json

MAX_TEXT = 1_000_000
"""Characters of the longest text; no model reads as much, so a longer one is a mistake in the data."""
CORRECT = "Correct the row or remove it."
Scanned = tuple[str, "PreferencePair | Sample | UserError"]
"""Place of a row, and what it becomes, or why it cannot be used."""


@dataclass(frozen=True)
class FieldOptions:
    """Options of every data set that is read row by row."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Field -> the column of the file that holds it."""
    ignore: Sequence[str] = ()
    """Columns that are left out, though they hold texts or pictures."""


class Dataset:
    """Base of every module in `datasets/`; a data set overrides what it has."""

    name: str = "dataset"
    vocabulary: Mapping[str, str] | None = None
    """Surface form -> object, for the words that can be checked against `Sample.truth`; None: the built-in table."""

    def samples(self) -> Iterator[Sample]:
        """Pictures with prompts, in a fixed order.

        Raises:
            UserError: this data set has none.
        """
        raise UserError(f"{self.name} has no samples to answer, only finished pairs. Give it to `catpo score`.")

    def pairs(self) -> Iterator[PreferencePair]:
        """Preference pairs, in a fixed order.

        Raises:
            UserError: this data set has none.
        """
        raise UserError(
            f"{self.name} has no preference pairs. Make some: `catpo pair --data {quote(self.name)} --output pairs`."
        )

    @classmethod
    def scan(cls, *arguments: Any, **options: Any) -> Iterator[Scanned]:
        """Every row with its place, bad ones too, for `catpo data check`."""
        dataset = cls(*arguments, **options)
        rows: Iterator[Any] = dataset.pairs() if type(dataset).pairs is not Dataset.pairs else dataset.samples()
        yield from ((f"row {number}", row) for number, row in enumerate(rows))

    @classmethod
    def words(cls, *arguments: Any, **options: Any) -> Mapping[str, str] | None:
        """The vocabulary, also of a data set with bad rows."""
        return cls.vocabulary


class RowDataset(Dataset):
    """A data set whose pairs are made row by row, so that a bad row does not hide the next."""

    fields = FieldOptions()

    def rows(self) -> Iterator[Row]:
        """The rows in their order, as they are read."""
        raise NotImplementedError

    def pairs_of(self, row: Row) -> Iterable[PreferencePair]:
        """The pairs of a row, usually one.

        Raises:
            UserError: a field is missing or is not what it should be.
        """
        raise NotImplementedError

    def read_with(self, fields: FieldOptions) -> None:
        """Set which columns are read; called before any row is read."""
        self.fields = fields

    def pairs(self) -> Iterator[PreferencePair]:
        for row in self.rows():
            yield from self._pairs_of(row)

    @classmethod
    def scan(cls, *arguments: Any, fields: FieldOptions = fields, **options: Any) -> Iterator[Scanned]:
        dataset = cls(*arguments, **options)
        dataset.read_with(fields)
        for row in dataset.rows():
            try:
                for pair in dataset._pairs_of(row):
                    yield row.where, pair
            except UserError as error:
                yield row.where, error

    def _pairs_of(self, row: Row) -> list[PreferencePair]:
        return row.made(self.pairs_of, self.fields)


class Fields(dict[str, Any]):
    """A row's fields, which know those that were read by name; iterating reads none."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return dict.__getitem__(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return dict.get(self, name, default)


@dataclass(frozen=True)
class Row:
    """Fields with their place in the file; an error names the place and the field."""

    where: str
    values: Mapping[str, Any]
    root: Path = Path()
    """Folder of pictures that are given by name; resolved."""
    stored: Callable[[str, int], Picture] | None = None
    """(column, index in the cell) -> a picture whose bytes are read when it is opened; for rows of a table on disk."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field -> what the file calls it, where that differs."""
    problem: UserError | None = None
    """Why the row could not be read at all."""
    inside: list[Row] = field(default_factory=list)
    """Objects that fields hold as text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", Fields(self.values))

    def error(self, field: str, problem: str) -> UserError:
        """What is wrong with a field; advice is added unless the problem ends with some."""
        advice = "." if ". " in problem else f". {CORRECT}"
        return UserError(f"{self.where}: field '{self.columns.get(field, field)}' {problem}{advice}")

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the row's place in front of errors raised inside."""
        try:
            yield
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(self.where) else f"{self.where}: {error}") from error

    def made(
        self, make: Callable[[Row], Iterable[Any]], fields: FieldOptions = FieldOptions(), remedy: str = "ignore=['{}']"
    ) -> list[Any]:
        """What `make` makes of the row, whose columns are renamed and left out as `fields` say.

        `remedy` is how to leave a column out, with `{}` for its name.

        Raises:
            UserError: the row cannot be used, or holds texts or pictures that `make` has not read.
        """
        if self.problem is not None:
            raise self.problem
        row = self._renamed(fields)
        with row.named():
            items = list(make(row))
            row._refuse_unread(remedy)
        return items

    def _renamed(self, fields: FieldOptions) -> Row:
        if not fields.columns and not fields.ignore:
            return self
        values = {name: value for name, value in self.values.items() if name not in fields.ignore}
        for ours, theirs in fields.columns.items():
            if theirs not in self.values:
                raise self.error(
                    theirs, f"is missing, which columns={{'{ours}': '{theirs}'}} names. There are {_listed(self.values)}"
                )
            if content_of(ours, values.get(ours)) and ours not in fields.columns.values():
                raise self.error(ours, f"is there beside '{theirs}', which columns= names. Leave one out: ignore=['{ours}']")
        taken = {name: value for name, value in values.items() if name not in fields.columns.values()}
        renamed = {ours: self.values.get(theirs) for ours, theirs in fields.columns.items()}
        return replace(self, values={**taken, **renamed}, columns=fields.columns)

    def _refuse_unread(self, remedy: str) -> None:
        """Raise UserError if a field that nobody has read holds a text, a conversation, a picture or a video."""
        for row in (self, *self.inside):
            for name in self.unread(row.values):
                content = content_of(name, row.peek(name))
                if content:
                    theirs = self.columns.get(name, name)
                    problem = f"holds {content}, and this format has no use for it. Correct the row, or leave the field out:"
                    raise self.error(name, f"{problem} {remedy.format(theirs)}")

    @staticmethod
    def unread(values: Mapping[str, Any]) -> list[str]:
        """Names of the fields that nobody has read."""
        assert isinstance(values, Fields)
        return [name for name in values if name not in values.read]

    def has(self, field: str) -> bool:
        """Whether there is such a field; a table fills a missing one with None. Does not count as reading it."""
        return self.peek(field) is not None

    def peek(self, field: str) -> Any:
        """What a field holds; does not count as reading it."""
        values: Any = self.values
        return dict.get(values, field)  # not that of `Fields`, which counts

    def text(self, field: str, default: str | None = None) -> str:
        """A text that is not blank."""
        if field not in self.values and default is not None:
            return default
        return self.checked(field, self.values.get(field))

    def texts(self, field: str) -> list[str]:
        """A list of texts that are not blank; empty if the field is missing."""
        values = self.values.get(field, [])
        if not isinstance(values, list):
            raise self.error(field, "must be a list of texts")
        return [self.checked(field, value) for value in values]

    def mapping(self, field: str) -> dict[str, Any]:
        value = self.values.get(field, {})
        if not isinstance(value, dict):
            raise self.error(field, "must be an object: {...}")
        return value

    def inner(self, field: str, content: str | bytes | Mapping[str, Any]) -> Row:
        """The JSON object that a field holds, as text or as it is."""
        if not isinstance(content, Mapping):
            content = strict_json.parse_object(content, place=f"{self.where}: field '{field}'", remedy=CORRECT)
        row = replace(self, values=content)
        self.inside.append(row)
        return row

    def checked(self, field: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.error(field, "is missing" if value is None else f"must be a text, not {type(value).__name__}")
        if not value.strip():
            raise self.error(field, "is empty")
        if len(value) > MAX_TEXT:
            raise self.error(field, f"is longer than {MAX_TEXT:,} characters. Shorten the text, or remove the row")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(field, f"holds half a character (a lone surrogate at {error.start}). Remove it") from error
        return value

    def picture(self, field: str, value: Any, root: Path) -> Picture:
        """A picture's bytes, or its name inside `root` (resolved), which neither the name nor a link may leave."""
        return picture(self, field, value, root)

    def pictures(self, field: str) -> tuple[Picture, ...]:
        """The picture or pictures in a field."""
        value = self.values.get(field)
        cells = list(value) if isinstance(value, list | tuple) else [value]
        if not cells:
            raise self.error(field, "is an empty list. Give at least one picture")
        pictures = []
        for index, cell in enumerate(cells):
            content = cell.get("bytes") if isinstance(cell, Mapping) else cell
            if self.stored is not None and isinstance(content, bytes) and content:
                pictures.append(self.stored(self.columns.get(field, field), index).holding(content))
            else:
                pictures.append(self.picture(field, cell, self.root))
        return tuple(pictures)

    def placed(self, field: str, turns: Sequence[Turn], pictures: int) -> list[Turn]:
        """The turns of a conversation whose question stands in `field`, without places for pictures that come first anyway.

        Raises:
            UserError: the question is empty, or there are places for another number of pictures.
        """
        try:
            check_places(turns, pictures)
        except UserError as error:
            raise self.error(field, f"cannot be used: {error}".rstrip(".")) from error
        placed = without_leading_places(turns, pictures)
        self.checked(field, placed[-1].text.replace(IMAGE, ""))
        return placed


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def make_pair(
    images: tuple[Picture, ...],
    prompt: str,
    chosen: str,
    rejected: str,
    meta: Mapping[str, Any] | None = None,
    history: tuple[Turn, ...] = (),
) -> PreferencePair:
    """A checked pair whose id is the hash of its content."""
    texts = prompt.strip(), chosen.strip(), rejected.strip()
    name = pair_id(images, *texts, history)
    return check_pair(PreferencePair(name, images, *texts, meta=dict(meta or {}), history=history))
