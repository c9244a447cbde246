"""Open a data set by what a user writes: `scenes(count=400)`, or a path; and take a part of it. Knows no data set by name.

Options of every data set, beside its own: `limit`, `where='field=value'`, `max_words`, and `part='train'` or `'dev'` with
`dev_share` and `dev_seed`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from catpo.core import registry
from catpo.core.checks import check_kind, check_positive
from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import Spec, check_options, keyword_options, parse
from catpo.core.types import SIDES, PreferencePair, Sample, check_pair
from catpo.data.datasets import Dataset, Scanned
from catpo.data.spool import SpooledPairs, ids_of, select
from catpo.runtime.skip_log import SkipLog

DEV_SHARE, DEV_SEED = 0.1, 42


def open_data(text: str | Path | Spec | Dataset) -> Dataset:
    """A data set: `name(option=value)`, a path (a folder or a file, as data set `folder`), or one that is open already.

    A plugin that reads files takes the place as option `source`: `folder(source='DIR', limit=10)`. Where a folder has the
    name of a plugin, the plugin is meant; `./scenes` is the folder.

    >>> len(list(open_data("scenes(count=3)").samples()))
    3

    Raises:
        UserError: there is neither such a data set nor such a path, or an option is not known.
    """
    if isinstance(text, Dataset):
        return text
    request = _request(text)
    dataset = request.make(*request.arguments, **request.options)
    return dataset if request.part.is_all else _PartOf(dataset, request.part)


def scan(text: str | Path) -> Iterator[Scanned]:
    """Every row of a data set with its place, bad ones as the error they raise.

    Raises:
        UserError: there is no such data set, or it cannot be read at all.
    """
    request = _request(text)
    rows = request.make.scan(*request.arguments, **request.options)
    return islice((row for row in rows if isinstance(row[1], UserError) or request.part.has(row[1])), request.part.limit)


def read_pairs(data: str | Path, skipped: SkipLog, limit: int | None = None) -> SpooledPairs:
    """The first so many pairs, checked, on disk; bad rows are left out if `skipped` goes on.

    Raises:
        UserError: a row cannot be used, or none can.
    """
    if not skipped.goes_on:
        return SpooledPairs.of(check_pair(pair) for pair in islice(open_data(data).pairs(), limit))
    request = _request(data)
    usable = skipped.sieve(_different_pairs(request, skipped), lambda found: check_pair(found[1]), lambda found: found[0])
    return SpooledPairs.of(_of_part(SpooledPairs.of(pair for _, pair in usable), request.part))[:limit]


def _different_pairs(request: _Request, skipped: SkipLog) -> Iterator[tuple[str, PreferencePair]]:
    """Pairs with their places; what is none, or was there before, is noted."""
    seen = set()
    for where, row in request.make.scan(*request.arguments, **request.options):
        if isinstance(row, UserError):
            skipped.note(where, row)
        elif isinstance(row, PreferencePair) and request.part.has(row):
            if row.id in seen:
                skipped.note(where, UserError(f"{where}: pair {row.id} stands in the data twice. Remove one of them."))
            else:
                seen.add(row.id)
                yield where, row


def read_samples(
    data: str | Path | Dataset, skipped: SkipLog, limit: int | None = None
) -> tuple[list[Sample], Mapping[str, str] | None]:
    """The first so many samples, and the data set's object words; bad rows are left out if `skipped` goes on.

    Raises:
        UserError: a row cannot be used, or none can.
    """
    if not skipped.goes_on or isinstance(data, Dataset):
        dataset = open_data(data)
        return list(islice(dataset.samples(), limit)), dataset.vocabulary
    request = _request(data)
    samples = []
    for where, row in request.make.scan(*request.arguments, **request.options):
        if isinstance(row, UserError):
            skipped.note(where, row)
        elif isinstance(row, Sample) and request.part.has(row):
            samples.append(row)
    return list(islice(samples, request.part.limit))[:limit], request.make.words(*request.arguments, **request.options)


def dev_split(
    pairs: Sequence[PreferencePair], share: float, seed: int
) -> tuple[Sequence[PreferencePair], Sequence[PreferencePair]]:
    """Pairs for training and for the dev set; which pair goes where depends on its id and the seed only.

    Raises:
        UserError: nothing is left to train on.
    """
    if not 0 <= share < 1:
        raise UserError(f"eval_fraction={share} must lie in [0, 1).")
    ids = ids_of(pairs)
    order = sorted(range(len(ids)), key=lambda place: hashlib.blake2b(f"{seed}/{ids[place]}".encode()).digest())
    held_out = set(order[: int(len(order) * share)])
    if len(held_out) == len(ids):
        raise UserError("There are no preference pairs to train on.")
    kept = [place for place in range(len(ids)) if place not in held_out]
    return select(pairs, kept), select(pairs, sorted(held_out))


@dataclass(frozen=True)
class Part:
    """Which rows of a data set are taken; the options that every data set has."""

    limit: int | None = None
    """The first so many."""
    where: str = ""
    """`field=value` in a pair's `meta`."""
    max_words: int | None = None
    """The longest response, in words."""
    part: str = "all"
    """`train`, `dev`, or `all`."""
    eval_fraction: float = DEV_SHARE
    dev_seed: int = DEV_SEED

    def __post_init__(self) -> None:
        if self.part not in ("all", "train", "dev"):
            raise UserError(f"part='{self.part}' is not known. {did_you_mean(str(self.part), ('train', 'dev', 'all'))}")
        for name in ("limit", "max_words"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name}={value!r} must be a whole number, 1 or more.")
            check_positive(**{name: value})
        if self.where and "=" not in self.where:
            raise UserError(f"where='{self.where}' must have the form field=value, e.g. where='ds_name=COCO'.")

    @property
    def is_all(self) -> bool:
        return self == Part()

    def has(self, row: PreferencePair | Sample) -> bool:
        """Whether a row fits `where` and `max_words`."""
        field, _, value = self.where.partition("=")
        meta: Mapping[str, Any] = row.meta if isinstance(row, PreferencePair) else row.truth
        if self.where and str(meta.get(field.strip())) != value.strip():
            return False
        if self.max_words is None or not isinstance(row, PreferencePair):
            return True
        return all(len(row.response(side).split()) <= self.max_words for side in SIDES)


class _PartOf(Dataset):
    """Some of another data set's rows."""

    def __init__(self, whole: Dataset, part: Part) -> None:
        self.whole, self.part = whole, part
        self.name, self.vocabulary = whole.name, whole.vocabulary

    def samples(self) -> Iterator[Sample]:
        return islice(filter(self.part.has, self.whole.samples()), self.part.limit)

    def pairs(self) -> Iterator[PreferencePair]:
        return _of_part(filter(self.part.has, self.whole.pairs()), self.part)


def _of_part(pairs: Iterable[PreferencePair], part: Part) -> Iterator[PreferencePair]:
    if part.part != "all":
        whole = pairs if isinstance(pairs, SpooledPairs) else SpooledPairs.of(pairs)
        train, dev = dev_split(whole, part.eval_fraction, part.dev_seed)
        pairs = train if part.part == "train" else dev
    return islice(pairs, part.limit)


@dataclass(frozen=True)
class _Request:
    """What a user's text asks for."""

    make: type[Dataset]
    arguments: tuple[str, ...]
    options: dict[str, Any]
    part: Part


def _request(text: str | Path | Spec) -> _Request:
    if isinstance(text, Path):
        return _made(Spec("folder", {"source": str(text)}))
    spec = _spec(text)
    if spec is not None and spec.name in registry.names("datasets"):
        return _made(spec)
    if Path(str(text)).exists():
        return _made(Spec("folder", {"source": str(text)}))
    raise _unknown(str(text), spec)


def _spec(text: str | Spec) -> Spec | None:
    """The text as `name(option=value)`, or nothing if it is a path; a bad option is the user's to hear of."""
    try:
        return parse(text)
    except UserError:
        name = str(text).split("(", 1)[0].strip()
        if name in registry.names("datasets") and not Path(str(text)).exists():
            raise
        return None


def _made(spec: Spec) -> _Request:
    make = registry.load("datasets", spec.name)
    options = dict(spec.options)
    source = options.pop("source", None)
    if source is not None and not isinstance(source, str):
        raise UserError(f"{spec.name}: source={source!r} must be a path in quotes.")
    if source is not None and "source" not in inspect.signature(make).parameters:
        raise UserError(f"'{spec.name}' reads no file, so it has no option 'source'.")
    part = _taken(spec.name, options, make)
    checked = check_options(make, Spec(spec.name, options))
    if "sources" in checked:
        checked["sources"] = [open_data(each) for each in checked["sources"]]
    return _Request(make, () if source is None else (source,), checked, part)


def _taken(name: str, options: dict[str, Any], make: Callable[..., Any]) -> Part:
    """Removes from the options those of every data set, as far as the plugin has none of that name."""
    own = keyword_options(make)
    common = {field: default for field, default in vars(Part()).items() if field not in own}
    given = {field: options.pop(field) for field in common if field in options}
    for field, value in given.items():
        check_kind(f"{name}({field}={value!r})", value, common[field])
    return Part(**given)


def _unknown(text: str, spec: Spec | None) -> UserError:
    if spec is None or "/" in text or "." in text:
        return UserError(f"'{text}' does not exist. Give a folder, a .jsonl file, or a data set such as scenes(count=400).")
    known = registry.names("datasets")
    return UserError(
        f"'{spec.name}' is neither a path nor a data set. {did_you_mean(spec.name, known)} `catpo list` shows them all."
    )
