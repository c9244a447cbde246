"""The folder is the registry: a plugin is a module, named by its file and imported only when it is loaded."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import Spec, check_options, parse

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

SOURCE = Path(__file__).parents[2]
"""The folder that holds `catpo`; plugins are found as files, without importing their packages."""
PLACES = {
    "families": ("catpo.models.families", "Family"),
    "signals": ("catpo.scoring.signals", "score"),
    "objectives": ("catpo.training.objectives", "loss"),
    "datasets": ("catpo.data.datasets", "Dataset"),
    "pairings": ("catpo.pairing.methods", "make"),
    "benchmarks": ("catpo.evaluation.benchmarks", "Benchmark"),
    "judges": ("catpo.judges", "Judge"),
    "decodings": ("catpo.scoring.decodings", "Decoding"),
    "scorers": ("catpo.pairing.scorers", "Scorer"),
}
"""Kind of plugin -> the package whose modules are plugins, and the public name that each defines."""


@dataclass(frozen=True)
class Plugin:
    """A plugin as `catpo list` shows it."""

    kind: str
    name: str
    summary: str


def load(kind: str, name: str) -> Any:
    """The public object of plugin `name`, e.g. `load("objectives", "dpo")` is that module's `loss`.

    Raises:
        UserError: there is no such plugin; the message names the closest.
    """
    package, public = PLACES[kind]
    if name in _own_modules(kind):
        return getattr(importlib.import_module(f"{package}.{name}"), public)
    foreign = entry_points_of(kind)
    if name in foreign:
        loaded = foreign[name].load()
        return getattr(loaded, public, loaded)
    raise UserError(f"'{name}' is not one of the {kind}. {did_you_mean(name, names(kind))}")


def opened(kind: str, text: str | Spec, *given: Any) -> Any:
    """What the plugin named by `name(option=value)` makes of these options, after `given`.

    Raises:
        UserError: no such plugin or option.
    """
    spec = parse(text)
    make = load(kind, spec.name)
    return make(*given, **check_options(make, spec))


def names(kind: str) -> list[str]:
    """Names of all plugins of a kind, ours and those of other packages."""
    return sorted({*_own_modules(kind), *entry_points_of(kind)})


def plugins(kind: str) -> list[Plugin]:
    """All plugins of a kind with the first line of their docstring, read without importing them."""
    own = _own_modules(kind)
    listed = []
    for name in names(kind):
        summary = "from another package"
        if name in own:
            docstring = ast.get_docstring(ast.parse(own[name].read_text(encoding="utf-8"))) or ""
            summary = docstring.split("\n", 1)[0]
        listed.append(Plugin(kind, name, summary))
    return listed


def _own_modules(kind: str) -> dict[str, Path]:
    package, _ = PLACES[kind]
    folder = SOURCE.joinpath(*package.split("."))
    return {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}


@cache
def entry_points_of(kind: str) -> dict[str, EntryPoint]:
    """Plugins of a kind in other packages, by name; looked up once, because it reads every installed package's metadata."""
    from importlib.metadata import entry_points  # a tenth of the time that --help takes

    return {entry.name: entry for entry in entry_points(group=f"catpo.{kind}")}
