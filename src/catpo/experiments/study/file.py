"""Reads a study's YAML file strictly: what it does not know is refused by key and line. Runs nothing."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from catpo.config import strict_yaml
from catpo.config.command import hints
from catpo.config.options import COMMANDS, TrainOptions
from catpo.config.recipes import FOR_BUILTIN, SHIPPED
from catpo.config.validation import Specs, validated
from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import parse

BUILTIN = "builtin"
BUILTIN_TRAINING = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
SET_BY_STUDY = {
    "pair": frozenset({"model", "data", "output", "method", "seed", "limit"}),
    "score": frozenset({"pairs", "model", "output", "limit"}),
    "train": frozenset({"pairs", "model", "output", "rewards", "objective", "learning_rate", "seed", "resume"}),
    "evaluate": frozenset({"model", "benchmarks", "answers", "output", "limit", "base_url", "adapter", "shuffled"}),
}
"""Command -> its options that the study sets itself; the others can stand in the section of this name."""
ADVICE = "`catpo study table1` is an example, and docs/how-to/studies.md has all keys."
Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method of the table."""

    objective: str | None = None
    """None: the untrained model."""
    method: str | None = None
    """How its pairs are made. Default: the study's method."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Options of `catpo train` for this row only."""
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    """Options of `catpo evaluate` for this row only, such as `decoding`."""
    rounds: int = 1
    """On-policy: the pictures are split among this many rounds, each answered by the model that the last one trained."""
    tuned_as: str | None = None
    """Another row whose learning rate this one takes."""
    panel: str = ""
    """Panel of a `sweep` figure."""
    at: float | None = None
    """Position on that panel's horizontal axis."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How learning rates are chosen: on other seeds and pictures than those reported."""

    seed: int = 1000
    """Of pictures, sampling and training."""
    data: str | None = None
    """Pictures of the pairs. Default: the study's data with the tuning seed."""
    benchmarks: Specs = ()
    """Held-out pictures other than those reported."""
    metric: str = "equal_coverage"
    """`equal_coverage`: CHAIRi of all candidates and the untrained model at equal Cover; or a metric of the benchmark."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole file."""

    name: str
    title: str
    model: str
    """Hub id, folder, or `builtin`."""
    data: str
    """Pictures with prompts, or finished pairs, which rows without a `method` of their own use as they are."""
    rows: Mapping[str, Row]
    note: str = ""
    method: str = "corrected"
    """How pairs are made, see `catpo list pairings`."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each seed has its own sampling and training, and its own pictures where the data set takes a seed."""
    benchmarks: Specs = ()
    """Held-out pictures; empty: nothing is evaluated."""
    learning_rates: list[float] | None = None
    """The budget: every method is tuned over this list. A single rate: no tuning."""
    rate_factors: list[float] = field(default_factory=lambda: [1.0])
    """The budget as multiples of the model's usual rate, which suit another model too; ignored with `learning_rates`."""
    tuning: Tuning | None = None
    reference: str | None = None
    """The row that others are compared with. Default: the first."""
    at_cover: list[float] = field(default_factory=list)
    """Shares of what is there, in percent, at which CHAIRi is compared as well: `[60, 70, 75]`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Heading -> metric. Default: those of the benchmarks."""
    figures: Mapping[str, str] = field(default_factory=dict)
    """File name -> figure with its options."""
    pair: Mapping[str, Any] = field(default_factory=dict)
    score: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    probe: int = 0
    """Number of pairs whose log-probs are kept token by token, for figures."""
    measure: bool = False
    """Time and memory: each cell runs alone in a process of its own and is not shared with other studies."""
    keep_models: bool = False

    @property
    def rates(self) -> list[float]:
        """The learning rates that every method is tuned over."""
        if self.learning_rates is not None:
            return self.learning_rates
        usual = float(str(FOR_BUILTIN["learning_rate"] if self.model == BUILTIN else TrainOptions.learning_rate))
        return [float(f"{factor * usual:.3g}") for factor in self.rate_factors]

    @property
    def compared_with(self) -> str:
        """The reference row."""
        return self.reference or next(iter(self.rows))

    def training(self, row: Row) -> dict[str, Any]:
        """Options of `catpo train`: those of the built-in model as in the demo, then the study's, then the row's."""
        usual: dict[str, Any] = {}
        if self.model == BUILTIN:
            usual = {"lora": None} | {name: FOR_BUILTIN[name] for name in BUILTIN_TRAINING}
        return {**usual, **self.train, **row.train}


def _found(path: Path) -> Path:
    """The file itself, or the study of this name that comes with catpo."""
    shipped = SHIPPED / "studies" / f"{path.name.removesuffix('.yaml')}.yaml"
    return shipped if len(path.parts) == 1 and shipped.is_file() and not path.exists() else path


def read(path: str | Path) -> Study:
    """The study in a file, or of a name such as `table1`.

    Raises:
        UserError: no such file, not YAML, an unknown or repeated key, a value of another type, or a reference to a row that
            does not exist; names file, key and line.
    """
    path = _found(Path(path))
    file = _Section(path, "", strict_yaml.mapping(strict_yaml.load(path, what="study", advice=ADVICE), str(path)))
    rows = file.child("rows")
    read_already: dict[str, Any] = {"name": path.stem, "rows": {str(name): _row(rows, name) for name in rows.values}}
    if file.values.get("tuning") is not None:
        read_already["tuning"] = _filled(Tuning, file.child("tuning"))
    study = _filled(Study, file, **read_already, **_command_options(file, SET_BY_STUDY))
    _check(study, file)
    return study


@dataclass(frozen=True)
class _Section:
    """A mapping in the file."""

    path: Path
    name: str
    """`rows.dpo`; empty for the whole file."""
    values: Mapping[Any, Any]

    def where(self, key: Any) -> str:
        """File, line and full name of a key, for messages."""
        lines = getattr(self.values, "lines", {})
        line = f", line {lines[key]}" if key in lines else ""
        return f"{self.path}{line}: '{self.full_name(key)}'"

    def full_name(self, key: Any) -> str:
        return f"{self.name}.{key}" if self.name else str(key)

    def child(self, key: Any) -> _Section:
        return _Section(self.path, self.full_name(key), strict_yaml.mapping(self.values.get(key), self.where(key)))

    def check_keys(self, known: Collection[str]) -> None:
        for key in self.values:
            if key not in known:
                prefix = f"{self.name}." if self.name else ""
                raise UserError(f"{self.where(key)} is not an option. {did_you_mean(str(key), known, prefix=prefix)}")


def _row(rows: _Section, name: Any) -> Row:
    """A row, which may be its objective alone: `dpo: dpo`."""
    value = rows.values[name]
    if value is None or isinstance(value, str):
        return Row(objective=value)
    row = rows.child(name)
    return _filled(Row, row, **_command_options(row, ["train", "evaluate"]))


def _command_options(section: _Section, commands: Collection[str]) -> dict[str, dict[str, Any]]:
    """The options of commands that stand in this section, as in a recipe: command -> options."""
    options = {}
    for command in commands:
        if command not in section.values:
            continue
        given = section.child(command)
        for key in given.values:
            if key in SET_BY_STUDY[command]:
                raise UserError(f"{given.where(key)} is set by the study itself. Leave it out.")
        known = {name: hint for name, hint in hints(COMMANDS[command]).items() if name not in SET_BY_STUDY[command]}
        given.check_keys(known)
        options[command] = {key: validated(value, known[key], given.where(key)) for key, value in given.values.items()}
    return options


def _filled(kind: Callable[..., Kind], section: _Section, **read_already: Any) -> Kind:
    """A dataclass filled from a section, but for the fields that are read already."""
    types = {name: hint for name, hint in hints(kind).items() if name != "name"}
    section.check_keys(types)
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
        is_required = entry.default is MISSING and entry.default_factory is MISSING
        if is_required and entry.name not in section.values and entry.name not in read_already:
            raise UserError(f"{section.path}: '{section.full_name(entry.name)}' is missing. {ADVICE}")
    values = {}
    for key, value in section.values.items():
        if key not in read_already:
            values[key] = _value(value, types[key], section.where(key))
    return kind(**values, **read_already)


def _value(value: Any, hint: Any, where: str) -> Any:
    """A value as its field's type; a mapping holds texts."""
    origin = typing.get_origin(hint)
    if origin is not None and issubclass(origin, Mapping):
        lines = strict_yaml.mapping(value, where)
        return {str(key): validated(text, str, f"{where}, '{key}'") for key, text in lines.items()}
    return validated(value, hint, where)


def _check(study: Study, file: _Section) -> None:
    """Check what no single value shows."""
    if not study.rows:
        raise UserError(f"{file.path}: 'rows' is missing. Give at least one, such as `dpo: dpo`.")
    tuned_rows = [name for name, row in study.rows.items() if row.tuned_as is None]
    for name, row in study.rows.items():
        where = f"{file.path}: 'rows.{name}'"
        if row.objective is not None:
            parse(row.objective)
        if row.rounds < 1:
            raise UserError(f"{where}: rounds={row.rounds} must be 1 or more.")
        if row.tuned_as is not None and row.tuned_as not in tuned_rows:
            raise UserError(f"{where}: tuned_as='{row.tuned_as}' is not a row that is tuned itself.")
    if study.compared_with not in study.rows:
        raise UserError(f"{file.where('reference')} is not one of the rows. {did_you_mean(study.compared_with, study.rows)}")
    if not study.seeds or len(set(study.seeds)) != len(study.seeds):
        raise UserError(f"{file.where('seeds')} must be one or more different whole numbers.")
    if not study.rates or any(rate <= 0 for rate in study.rates):
        raise UserError(f"{file.path}: 'learning_rates' or 'rate_factors' must be one or more positive numbers.")
    if len(study.rates) > 1 and (study.tuning is None or not study.tuning.benchmarks):
        raise UserError(
            f"{file.path}: {len(study.rates)} learning rates need 'tuning.benchmarks' to choose by: pictures other than those "
            "reported. Or give a single rate."
        )
    if not all(0 < cover <= 100 for cover in study.at_cover):
        raise UserError(f"{file.where('at_cover')} must be percentages of what is there, above 0 and at most 100.")
    if study.tuning is not None:
        if study.tuning.seed in study.seeds:
            raise UserError(f"{file.path}: 'tuning.seed' {study.tuning.seed} is one of the seeds reported. Give another.")
        reported = set(study.tuning.benchmarks) & set(study.benchmarks)
        if reported:
            raise UserError(f"{file.path}: 'tuning.benchmarks' has {reported.pop()}, which is reported. Give other pictures.")
