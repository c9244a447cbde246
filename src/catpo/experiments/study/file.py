"""What a study's YAML file says, strictly read: what is not known is refused by key and line. Runs nothing."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from catpo.config import strict_yaml
from catpo.config.command import hints
from catpo.config.options import COMMANDS, TrainOptions
from catpo.config.recipes import FOR_BUILTIN
from catpo.config.validation import Specs, validated
from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import parse

BUILTIN = "builtin"
SECTIONS = {
    "pair": frozenset({"model", "data", "output", "method", "seed", "limit"}),
    "score": frozenset({"pairs", "model", "output", "limit"}),
    "train": frozenset({"pairs", "model", "output", "rewards", "objective", "learning_rate", "seed", "resume"}),
    "evaluate": frozenset({"model", "benchmarks", "answers", "output", "limit", "base_url", "adapter", "shuffled"}),
}
"""Command -> its options that the study sets itself."""
ADVICE = "recipes/studies has some to start from; docs/studies.md tells what may stand in it."
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method of the table."""

    objective: str | None = None
    """What it is trained with; none: the model itself, untrained."""
    method: str | None = None
    """How its pairs are made; the study's way if left out."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Options of `catpo train` for this row only."""
    rounds: int = 1
    """On-policy: the pictures are shared out among so many rounds, each answered and trained from where the last one ended."""
    tuned_as: str | None = None
    """Takes the learning rate that was chosen for this other row."""
    panel: str = ""
    """Part of a `sweep` figure that it belongs to."""
    at: float | None = None
    """Where it stands on the horizontal axis there."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the learning rate of a method is chosen: apart from the seeds and pictures that are reported."""

    seed: int = 1000
    """Seed of pictures, sampling and training."""
    data: str | None = None
    """Pictures of its pairs; the study's data with the tuning seed if left out."""
    benchmarks: Specs = ()
    """Held-out pictures other than those that are reported."""
    metric: str = "equal_coverage"
    """`equal_coverage`: CHAIRi of all candidates and the untrained model at equal Cover; or a metric of the benchmark."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole file."""

    name: str
    """The file's name without ending."""
    title: str
    model: str
    """Hub id, folder, or `builtin`."""
    data: str
    """Pictures with prompts; or finished pairs, which rows without a `method` of their own take as they are."""
    rows: Mapping[str, Row]
    note: str = ""
    """What a reader of the table must know."""
    method: str = "corrected"
    """How pairs are made, `catpo list pairings`."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """What is reported: each seed has its own pairs, where the data set takes a seed, its own sampling and training."""
    benchmarks: Specs = ()
    """Held-out pictures; none: nothing is evaluated."""
    learning_rates: list[float] | None = None
    """The budget: every method is tuned over this list. One rate: no tuning."""
    rate_factors: list[float] = field(default_factory=lambda: [1.0])
    """The budget as multiples of the model's usual rate, which fit another model too; not used beside `learning_rates`."""
    tuning: Tuning | None = None
    reference: str | None = None
    """The row that others are compared with; the first if left out."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Heading -> metric; those of the benchmarks if left out."""
    figures: Mapping[str, str] = field(default_factory=dict)
    """File name -> figure with its options."""
    pair: Mapping[str, Any] = field(default_factory=dict)
    score: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    probe: int = 0
    """Pairs whose log-probs are kept token by token, for figures of them."""
    measure: bool = False
    """Time and memory: every cell in a process of its own, one after the other, and shared with no other study."""
    keep_models: bool = False
    """Keep the weights of finished cells."""

    @property
    def rates(self) -> list[float]:
        """The learning rates that every method is tuned over."""
        if self.learning_rates is not None:
            return self.learning_rates
        usual = float(str(FOR_BUILTIN["learning_rate"] if self.model == BUILTIN else TrainOptions.learning_rate))
        return [float(f"{factor * usual:.3g}") for factor in self.rate_factors]

    @property
    def compared_with(self) -> str:
        """The row that differences are to."""
        return self.reference or next(iter(self.rows))

    def training(self, row: Row) -> dict[str, Any]:
        """Options of `catpo train`: the model's usual ones, the study's, the row's."""
        usual = {name: value for name, value in BUILTIN_TRAINING.items() if self.model == BUILTIN}
        return {**usual, **self.train, **row.train}


BUILTIN_TRAINING: dict[str, Any] = {
    "lora": None,
    **{n: FOR_BUILTIN[n] for n in ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")},
}
"""How the built-in model is trained where a study does not say else, as in the demo."""


def read(path: str | Path) -> Study:
    """The study in a file.

    Raises:
        UserError: no such file, not YAML, a key that is unknown or stands twice, a value of another type, a row that names
            another that is not there; names file, key and line.
    """
    path = Path(path)
    whole = _Place(path, "", strict_yaml.mapping(strict_yaml.load(path, what="study", advice=ADVICE), str(path)))
    rows = whole.below("rows")
    ready: dict[str, Any] = {"name": path.stem, "rows": {str(name): _row(rows, name) for name in rows.values}}
    if whole.values.get("tuning") is not None:
        ready["tuning"] = _made(Tuning, whole.below("tuning"))
    study = _made(Study, whole, **_sections(whole, SECTIONS), **ready)
    _check(study, whole)
    return study


@dataclass(frozen=True)
class _Place:
    """A mapping of the file, with the words for where it stands."""

    path: Path
    name: str
    """`rows.dpo`; empty for the whole file."""
    values: Mapping[Any, Any]

    def of(self, key: Any) -> str:
        """Words for a key in here."""
        lines = getattr(self.values, "lines", {})
        return f"{self.path}{f', line {lines[key]}' if key in lines else ''}: '{self.inside(key)}'"

    def inside(self, key: Any) -> str:
        return f"{self.name}.{key}" if self.name else str(key)

    def below(self, key: Any) -> _Place:
        """The mapping that stands under a key."""
        return _Place(self.path, self.inside(key), strict_yaml.mapping(self.values.get(key), self.of(key)))

    def check(self, known: Collection[str]) -> None:
        for key in self.values:
            if key not in known:
                prefix = f"{self.name}." if self.name else ""
                raise UserError(f"{self.of(key)} is not an option. {did_you_mean(str(key), known, prefix=prefix)}")


def _row(rows: _Place, name: Any) -> Row:
    """A row, of which the objective alone may stand there: `dpo: dpo`."""
    given = rows.values[name]
    if given is None or isinstance(given, str):
        return Row(objective=given)
    place = rows.below(name)
    return _made(Row, place, **_sections(place, ("train",)))


def _sections(place: _Place, commands: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Options of commands, as a recipe has them."""
    return {command: _section(place.below(command), command) for command in commands if command in place.values}


def _section(place: _Place, command: str) -> dict[str, Any]:
    known = {name: hint for name, hint in hints(COMMANDS[command]).items() if name not in SECTIONS[command]}
    for key in place.values:
        if key in SECTIONS[command]:
            raise UserError(f"{place.of(key)} is set by the study itself. Leave it out.")
    place.check(known)
    return {key: validated(value, known[key], place.of(key)) for key, value in place.values.items()}


def _made(kind: Callable[..., Made], place: _Place, **ready: Any) -> Made:
    """A dataclass of what stands at a place; `ready` fields are read already."""
    types = {name: hint for name, hint in hints(kind).items() if name != "name"}
    place.check(types)
    for each in dataclasses.fields(kind):  # type: ignore[arg-type]
        is_needed = each.default is MISSING and each.default_factory is MISSING
        if is_needed and each.name not in place.values and each.name not in ready:
            raise UserError(f"{place.path}: '{place.inside(each.name)}' is missing. {ADVICE}")
    fitted = {key: _value(value, types[key], place.of(key)) for key, value in place.values.items() if key not in ready}
    return kind(**fitted, **ready)


def _value(value: Any, hint: Any, where: str) -> Any:
    """Lines of `name: text`, or a value of any other type."""
    if typing.get_origin(hint) is not None and issubclass(typing.get_origin(hint), Mapping):
        lines = strict_yaml.mapping(value, where)
        return {str(key): validated(each, str, f"{where}, '{key}'") for key, each in lines.items()}
    return validated(value, hint, where)


def _check(study: Study, whole: _Place) -> None:
    """What no single value shows."""
    if not study.rows:
        raise UserError(f"{whole.path}: 'rows' is missing. Give at least one, such as `dpo: dpo`.")
    for name, row in study.rows.items():
        where = f"{whole.path}: 'rows.{name}'"
        if row.objective is not None:
            parse(row.objective)
        if row.rounds < 1:
            raise UserError(f"{where}: rounds={row.rounds} must be 1 or more.")
        if row.tuned_as is not None and (row.tuned_as not in study.rows or study.rows[row.tuned_as].tuned_as is not None):
            raise UserError(f"{where}: tuned_as='{row.tuned_as}' is not a row that is tuned itself.")
    if study.compared_with not in study.rows:
        raise UserError(f"{whole.of('reference')} is not one of the rows. {did_you_mean(study.compared_with, study.rows)}")
    if not study.seeds or len(set(study.seeds)) != len(study.seeds):
        raise UserError(f"{whole.of('seeds')} must be one or more different whole numbers.")
    if not study.rates or any(rate <= 0 for rate in study.rates):
        raise UserError(f"{whole.path}: 'learning_rates' or 'rate_factors' must be one or more positive numbers.")
    if len(study.rates) > 1 and (study.tuning is None or not study.tuning.benchmarks):
        raise UserError(
            f"{whole.path}: {len(study.rates)} rates are tried, so 'tuning.benchmarks' must name pictures to choose by: "
            "others than those reported. Or give one rate."
        )
    if study.tuning is not None:
        if study.tuning.seed in study.seeds:
            raise UserError(f"{whole.path}: 'tuning.seed' {study.tuning.seed} is one of the seeds reported. Give another.")
        if same := set(study.tuning.benchmarks) & set(study.benchmarks):
            raise UserError(f"{whole.path}: 'tuning.benchmarks' has {same.pop()}, which is reported. Give other pictures.")
