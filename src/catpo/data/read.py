"""Open a data set by what a user writes, `scenes(count=400)` or a path, and select rows of it. Knows no data set by name.

Options of every data set, besides its own: `limit`, `where='field=value'`, `max_words`, and `part='train'` or `'dev'` with
`eval_fraction` and `dev_seed`; of those that are read row by row also `columns={'field': 'column'}` and `ignore=['column']`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from catpo.core import registry
from catpo.core.checks import check_kind, check_positive
from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import Spec, check_options, keyword_options, parse
from catpo.core.types import SIDES, PreferencePair, Sample, check_pair
from catpo.data.datasets import Dataset, FieldOptions, RowDataset, Scanned
from catpo.data.path_kind import data_set_of
from catpo.data.spool import PairsAt, SpooledPairs, ids_of, select
from catpo.runtime.skip_log import SkipLog


def open_data(text: str | Path | Spec | Dataset) -> Dataset:
    """A data set: `name(option=value)`, a path (a file or a folder, opened as what it is), or one that is open already.

    A plugin that reads files takes their path as option `source`: `folder(source='DIR', limit=10)`. If a folder has the name of
    a plugin, the plugin is meant; `./scenes` is the folder.

    >>> len(list(open_data("scenes(count=3)").samples()))
    3

    Raises:
        UserError: there is neither such a data set nor such a path, or an option is not known.
    """
    if isinstance(text, Dataset):
        return text
    request = _request(text)
    dataset = request.open()
    return dataset if request.part == Part() else Subset(dataset, request.part.samples, request.part.pairs)


def scan(text: str | Path) -> Iterator[Scanned]:
    """Every row of a data set with its place; a bad row comes as the error it raises.

    Raises:
        UserError: there is no such data set, or it cannot be read at all.
    """
    request = _request(text).streamed()
    return islice(
        (row for row in request.scan() if isinstance(row[1], UserError) or request.part.has(row[1])), request.part.limit
    )


def read_pairs(data: str | Path, skip_log: SkipLog, limit: int | None = None) -> PairsAt:
    """The first `limit` pairs, checked, on disk; bad rows are left out if `skip_log` goes on.

    Raises:
        UserError: a row cannot be used, or none can.
    """
    if not skip_log.goes_on:
        return SpooledPairs.of(check_pair(pair) for pair in islice(open_data(data).pairs(), limit))
    request = _request(data)
    usable = skip_log.sieve(
        _unique_pairs(request, skip_log), lambda scanned: check_pair(scanned[1]), lambda scanned: scanned[0]
    )
    whole = SpooledPairs.of(pair for _, pair in usable)
    return SpooledPairs.of(request.part.pairs(whole))[:limit]


def _unique_pairs(request: _Request, skip_log: SkipLog) -> Iterator[tuple[str, PreferencePair]]:
    """Pairs with their places; bad rows and repeated pairs are noted."""
    seen = set()
    for where, row in request.scan():
        if isinstance(row, UserError):
            skip_log.note(where, row)
        elif isinstance(row, PreferencePair) and request.part.has(row):
            if row.id in seen:
                skip_log.note(where, UserError(f"{where}: pair {row.id} stands in the data twice. Remove one of them."))
                continue
            seen.add(row.id)
            yield where, row


def read_samples(
    data: str | Path | Spec | Dataset, skip_log: SkipLog, limit: int | None = None
) -> tuple[list[Sample], Mapping[str, str] | None]:
    """The first `limit` samples, and the data set's object words; bad rows are left out if `skip_log` goes on.

    Raises:
        UserError: a row cannot be used, or none can.
    """
    if not skip_log.goes_on or isinstance(data, Dataset):
        dataset = open_data(data)
        return list(islice(dataset.samples(), limit)), dataset.vocabulary
    request = _request(data)
    samples = []
    for where, row in request.scan():
        if isinstance(row, UserError):
            skip_log.note(where, row)
        elif isinstance(row, Sample):
            samples.append(row)
    return list(request.part.samples(samples))[:limit], request.plugin.words(*request.source, **request.options)


def dev_split(
    pairs: Sequence[PreferencePair], share: float, seed: int
) -> tuple[Sequence[PreferencePair], Sequence[PreferencePair]]:
    """Pairs for training and for validation; which pair goes where depends only on its id and the seed.

    Raises:
        UserError: nothing is left to train on.
    """
    if not 0 <= share < 1:
        raise UserError(f"eval_fraction={share} must lie in [0, 1).")
    ids = ids_of(pairs)
    order = sorted(range(len(ids)), key=lambda index: hashlib.blake2b(f"{seed}/{ids[index]}".encode()).digest())
    held_out = set(order[: int(len(order) * share)])
    if len(held_out) == len(ids):
        raise UserError("There are no preference pairs to train on.")
    kept = [index for index in range(len(ids)) if index not in held_out]
    return select(pairs, kept), select(pairs, sorted(held_out))


class Subset(Dataset):
    """Some rows of another data set, e.g. the samples of one round; each function gets all rows and returns those to keep."""

    def __init__(
        self,
        whole: Dataset,
        samples: Callable[[Iterator[Sample]], Iterable[Sample]] = iter,
        pairs: Callable[[Iterator[PreferencePair]], Iterable[PreferencePair]] = iter,
        name: str | None = None,
    ) -> None:
        self.whole, self.choose_samples, self.choose_pairs = whole, samples, pairs
        self.name, self.vocabulary = name or whole.name, whole.vocabulary

    def samples(self) -> Iterator[Sample]:
        return iter(self.choose_samples(self.whole.samples()))

    def pairs(self) -> Iterator[PreferencePair]:
        return iter(self.choose_pairs(self.whole.pairs()))


@dataclass(frozen=True)
class Part:
    """Which rows of a data set are read: the options that every data set has."""

    limit: int | None = None
    """At most this many."""
    where: str = ""
    """`field=value` in a pair's `meta` or a sample's `truth`."""
    max_words: int | None = None
    """Of the longer response."""
    part: str = "all"
    """`train`, `dev`, or `all`; of pairs."""
    eval_fraction: float = 0.1
    dev_seed: int = 42

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

    def has(self, row: PreferencePair | Sample) -> bool:
        """Whether a row fits `where` and `max_words`."""
        field, _, value = self.where.partition("=")
        facts = row.meta if isinstance(row, PreferencePair) else row.truth
        if self.where and str(facts.get(field.strip())) != value.strip():
            return False
        if self.max_words is None or not isinstance(row, PreferencePair):
            return True
        return all(len(row.response(side).split()) <= self.max_words for side in SIDES)

    def samples(self, rows: Iterable[Sample]) -> Iterator[Sample]:
        return islice(filter(self.has, rows), self.limit)

    def pairs(self, rows: Iterable[PreferencePair]) -> Iterator[PreferencePair]:
        kept: Iterable[PreferencePair] = filter(self.has, rows)
        if self.part != "all":
            train, dev = dev_split(SpooledPairs.of(kept), self.eval_fraction, self.dev_seed)
            kept = train if self.part == "train" else dev
        return islice(kept, self.limit)


@dataclass(frozen=True)
class _Request:
    """What a user's text asks for."""

    plugin: type[Dataset]
    source: tuple[str, ...]
    options: dict[str, Any]
    part: Part
    fields: FieldOptions

    def open(self) -> Dataset:
        dataset = self.plugin(*self.source, **self.options)
        if isinstance(dataset, RowDataset):
            dataset.read_with(self.fields)
        return dataset

    def streamed(self) -> _Request:
        """The same rows; those of Parquet files are read once, a few at a time."""
        is_on_disk = bool(self.source) and Path(self.source[0]).exists()
        if not is_on_disk or "streaming" not in keyword_options(self.plugin):
            return self
        return replace(self, options={**self.options, "streaming": True})

    def scan(self) -> Iterator[Scanned]:
        fields = {"fields": self.fields} if issubclass(self.plugin, RowDataset) else {}
        return self.plugin.scan(*self.source, **fields, **self.options)


def _request(text: str | Path | Spec) -> _Request:
    """The plugin and its options; a plugin's name wins over a path, and a path over a mistyped option."""
    path, known = Path(str(text)), registry.names("datasets")
    if isinstance(text, Path):
        return _request_of_path(text)
    try:
        spec = parse(text)
    except UserError:
        if str(text).split("(", 1)[0].strip() in known and not path.exists():
            raise
        spec = None
    if spec is not None and spec.name in known:
        return _request_of(spec)
    if path.exists():
        return _request_of_path(path, str(text))
    if spec is None or "/" in str(text) or "." in str(text):
        raise UserError(f"'{text}' does not exist. Give a folder, a file, or a data set such as scenes(count=400).")
    raise UserError(
        f"'{spec.name}' is neither a path nor a data set. {did_you_mean(spec.name, known)} `catpo list` shows them all."
    )


def _request_of_path(path: Path, text: str | None = None) -> _Request:
    return _request_of(Spec(data_set_of(path), {"source": str(path) if text is None else text}))


def _request_of(spec: Spec) -> _Request:
    plugin = registry.load("datasets", spec.name)
    options = dict(spec.options)
    source = options.pop("source", None)
    if source is not None and not isinstance(source, str):
        raise UserError(f"{spec.name}: source={source!r} must be a path in quotes.")
    if source is not None and "source" not in inspect.signature(plugin).parameters:
        raise UserError(f"'{spec.name}' reads no file, so it has no option 'source'.")
    fields = _take_fields(spec.name, options, plugin)
    part = _take_part(spec.name, options, plugin)
    _check_known(spec.name, options, plugin)
    checked = check_options(plugin, Spec(spec.name, options))
    if "sources" in checked:
        checked["sources"] = [open_data(source) for source in checked["sources"]]
    return _Request(plugin, () if source is None else (source,), checked, part, fields)


def _check_known(name: str, options: Mapping[str, Any], plugin: type[Dataset]) -> None:
    """Raise UserError for an unknown option; lists the data set's own and those of every data set."""
    own = [*(["source"] if "source" in inspect.signature(plugin).parameters else []), *keyword_options(plugin)]
    common = [option for option in _common(plugin) if option not in own]
    for option in options:
        if option not in own:
            close = did_you_mean(option, [*own, *common])
            near = f" {close}" if close.startswith("Did") else ""
            listed = f"Its options: {', '.join(own) or 'none'}; those of every data set: {', '.join(common)}."
            raise UserError(f"'{name}' has no option '{option}'.{near} {listed}")


def _common(plugin: type[Dataset]) -> dict[str, Any]:
    """Options of every data set, or of every one that is read row by row, with their defaults."""
    return {**vars(Part()), **(vars(FieldOptions()) if issubclass(plugin, RowDataset) else {})}


def _take_fields(name: str, options: dict[str, Any], plugin: type[Dataset]) -> FieldOptions:
    """Remove `columns` and `ignore` from the options of a data set that is read row by row."""
    if not issubclass(plugin, RowDataset):
        return FieldOptions()
    own = keyword_options(plugin)
    given = {field: options.pop(field) for field in vars(FieldOptions()) if field in options and field not in own}
    columns, ignore = given.get("columns", {}), given.get("ignore", [])
    if not isinstance(columns, dict) or not all(isinstance(text, str) for text in (*columns, *columns.values())):
        raise UserError(f"{name}: columns={columns!r} must say which column holds which field: columns={{'chosen': 'better'}}.")
    if not isinstance(ignore, list | tuple) or not all(isinstance(text, str) for text in ignore):
        raise UserError(f"{name}: ignore={ignore!r} must be a list of columns: ignore=['system'].")
    return FieldOptions(columns, tuple(ignore))


def _take_part(name: str, options: dict[str, Any], plugin: type[Dataset]) -> Part:
    """Remove the options of every data set from `options`, except those for which the plugin has its own."""
    own = keyword_options(plugin)
    defaults = {field: default for field, default in vars(Part()).items() if field not in own}
    given = {field: options.pop(field) for field in defaults if field in options}
    for field, value in given.items():
        check_kind(f"{name}({field}={value!r})", value, defaults[field])
    return Part(**given)
