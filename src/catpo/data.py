"""Open a data set by what a user writes: `scenes(count=400)`, or a path. Knows no data set by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from catpo import registry
from catpo.datasets._base import Dataset
from catpo.errors import UserError, did_you_mean
from catpo.spec import Spec, check_options, parse


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
    if isinstance(text, Path):
        return _open("folder", str(text))
    spec = _spec(text)
    if spec is not None and spec.name in registry.names("datasets"):
        return _open_spec(spec)
    if Path(str(text)).exists():
        return _open("folder", str(text))
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


def _open_spec(spec: Spec) -> Dataset:
    options = dict(spec.options)
    source = options.pop("source", None)
    if source is not None and not isinstance(source, str):
        raise UserError(f"{spec.name}: source={source!r} must be a path in quotes.")
    return _open(spec.name, source, options)


def _open(name: str, source: str | None, options: dict[str, Any] | None = None) -> Dataset:
    make = registry.load("datasets", name)
    checked = check_options(make, Spec(name, options or {}))
    if source is not None and "source" not in inspect.signature(make).parameters:
        raise UserError(f"'{name}' reads no file, so it has no option 'source'.")
    return make(source, **checked) if source is not None else make(**checked)


def _unknown(text: str, spec: Spec | None) -> UserError:
    if spec is None or "/" in text or "." in text:
        return UserError(f"'{text}' does not exist. Give a folder, a .jsonl file, or a data set such as scenes(count=400).")
    known = registry.names("datasets")
    return UserError(
        f"'{spec.name}' is neither a path nor a data set. {did_you_mean(spec.name, known)} `catpo list` shows them all."
    )
