"""What a data set offers: samples, pairs, or both; and rows that are checked field by field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from catpo.core.errors import UserError, shown
from catpo.core.types import Picture, PreferencePair, Sample, check_pair, pair_id
from catpo.files import strict_json

MAX_TEXT = 1_000_000
"""Characters of the longest text; no model reads as much, so a longer one is a mistake in the data."""
CORRECT = "Correct the row or remove it."
Scanned = tuple[str, "PreferencePair | Sample | UserError"]
"""Place of a row, and what it becomes, or why it cannot be used."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Role in a conversation, as LLaVA or TRL writes it -> who speaks."""


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
        raise UserError(f"{self.name} has no preference pairs. Make some: `catpo pair --data {self.name} --output pairs`.")

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

    def rows(self) -> Iterator[Row]:
        """The rows in their order, as they are read."""
        raise NotImplementedError

    def pairs_of(self, row: Row) -> Iterable[PreferencePair]:
        """The pairs of a row, usually one.

        Raises:
            UserError: a field is missing or is not what it should be.
        """
        raise NotImplementedError

    def pairs(self) -> Iterator[PreferencePair]:
        for row in self.rows():
            yield from self._pairs_of(row)

    @classmethod
    def scan(cls, *arguments: Any, **options: Any) -> Iterator[Scanned]:
        dataset = cls(*arguments, **options)
        for row in dataset.rows():
            try:
                for pair in dataset._pairs_of(row):
                    yield row.where, pair
            except UserError as error:
                yield row.where, error

    def _pairs_of(self, row: Row) -> list[PreferencePair]:
        with row.named():
            return list(self.pairs_of(row))


@dataclass(frozen=True)
class Row:
    """Fields with their place in the file; an error names the place and the field."""

    where: str
    values: Mapping[str, Any]

    def error(self, field: str, problem: str) -> UserError:
        """What is wrong with a field; advice is added unless the problem ends with some."""
        advice = "" if ". " in problem else f" {CORRECT}"
        return UserError(f"{self.where}: field '{field}' {problem}.{advice}")

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the row's place in front of errors raised inside."""
        try:
            yield
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(self.where) else f"{self.where}: {error}") from error

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

    def inner(self, field: str, content: str | bytes) -> Row:
        """The JSON object that a field holds as text."""
        place = f"{self.where}: field '{field}'"
        return Row(self.where, strict_json.parse_object(content, place=place, remedy=CORRECT))

    def turns(self, field: str, messages: Any, speakers: Sequence[str]) -> list[str]:
        """The texts of a conversation in LLaVA's or TRL's form, in which these speak, in this order.

        System messages are left out: the model's own template has one.
        """
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise self.error(field, "must be a list of messages")
        roles, texts = [], []
        for message in messages:
            role = ROLES.get(str(message.get("from", message.get("role"))), "unknown")
            if role != "system":
                roles.append(role)
                texts.append(message_text(message))
        if roles != list(speakers):
            wanted = "one question" if len(speakers) == 1 else "one question with one answer"
            raise self.error(field, f"must be {wanted}, not the turns {roles}")
        return [self.checked(field, text) for text in texts]

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

    def picture(self, field: str, name: Any, root: Path) -> Picture:
        """A picture by its name inside `root` (resolved), which neither the name nor a link may leave."""
        name = self.checked(field, name)
        is_absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or PureWindowsPath(name).drive
        if is_absolute or ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts:
            raise self.error(field, f"'{shown(name)}' leaves the folder. Give a path relative to {root}, inside it")
        try:
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                raise self.error(field, f"'{shown(name)}' is a link that leads out of the folder. Put the picture inside")
            if not path.is_file():
                raise self.error(field, f"'{shown(name)}' is not a file in {root}. Check the name")
        except (OSError, ValueError, RuntimeError) as error:  # NUL in the name, a name too long, a loop of links
            reason = getattr(error, "strerror", None) or error
            raise self.error(field, f"'{shown(name)}' is not a usable path ({reason})") from error
        return Picture(path=path, name=f"{name} ({self.where})")


def message_text(message: Mapping[str, Any]) -> Any:
    """What a message says; its picture parts are placed by the model's own template."""
    content = message.get("value", message.get("content"))
    if not isinstance(content, list):
        return content
    return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))


def make_pair(
    images: tuple[Picture, ...], prompt: str, chosen: str, rejected: str, meta: Mapping[str, Any] | None = None
) -> PreferencePair:
    """A checked pair whose id is the hash of its content."""
    texts = prompt.strip(), chosen.strip(), rejected.strip()
    return check_pair(PreferencePair(pair_id(images, *texts), images, *texts, meta=dict(meta or {})))
