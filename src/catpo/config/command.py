"""One dataclass of options makes a command: Python signature, docstring, flags and recipe section."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from itertools import pairwise
from types import MappingProxyType
from typing import Any, TypeVar

from cyclopts import Parameter

from catpo.config.validation import validated
from catpo.core.errors import UserError, did_you_mean

Result = TypeVar("Result")


class Options:
    """Base of every command's options: each field is validated when the object is made."""

    ELSEWHERE = MappingProxyType[str, str]({})
    """Name that the command has not, and that users of other tools know -> what to do instead."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, fit(type(self), name, value))  # frozen


def fit(options: Any, name: str, value: Any, label: str = "") -> Any:
    """A value as the option `name` takes it; `label` is what messages call the option.

    Raises:
        UserError: see `validated`.
    """
    return validated(value, hints(options)[name], label or name)


@functools.cache
def hints(options: Any) -> dict[str, Any]:
    """Name -> annotated type of each option."""
    return typing.get_type_hints(options, include_extras=True)


@functools.cache
def field_docs(options: Any) -> dict[str, str]:
    """Name -> what the option means, in one line: the docstring below the field, or the help that its type carries."""
    docs = {}
    for name, hint in hints(options).items():
        for note in getattr(hint, "__metadata__", ()):
            if isinstance(note, Parameter) and note.help:
                docs[name] = note.help
    body = ast.parse(inspect.getsource(options)).body[0].body  # type: ignore[attr-defined]
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = inspect.cleandoc(ast.literal_eval(below.value)).replace("\n", " ")
    return docs


def command(options: Any) -> Callable[[Callable[[Any], Result]], Callable[..., Result]]:
    """Turns a function of one `options` object into one that takes the options as keyword arguments."""

    def decorate(run: Callable[[Any], Result]) -> Callable[..., Result]:
        @functools.wraps(run)
        def engine(**given: Any) -> Result:
            return run(made(options, given, run.__name__))

        engine.__signature__ = _signature(options, run)  # type: ignore[attr-defined]
        engine.__doc__ = _with_arguments(run.__doc__ or "", options)
        return engine

    return decorate


def made(options: Any, given: Mapping[str, Any], name: str) -> Any:
    """The options object of what was given; `name` is the command's.

    Raises:
        UserError: an option is unknown, missing, or has a value that it does not take.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}
    for option in given:
        if option not in fields:
            raise UserError(f"'{name}' has no option '{option}'{instead(options, option, fields)}")
    for option, field in fields.items():
        if option not in given and field.default is MISSING:
            raise UserError(f"'{name}' needs '{option}': {field_docs(options)[option]}")
    return options(**given)


def instead(options: Any, unknown: str, known: Iterable[str], *, prefix: str = "") -> str:
    """The end of a message about an option that a command has not: what to do instead, or the closest that it has."""
    if unknown in options.ELSEWHERE:
        return f": {options.ELSEWHERE[unknown]}."
    return f". {did_you_mean(unknown, known, prefix=prefix)}"


def _signature(options: Any, run: Callable[..., Any]) -> inspect.Signature:
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=field.type,
        )
        for field in dataclasses.fields(options)
    ]
    return inspect.Signature(parameters, return_annotation=inspect.signature(run).return_annotation)


def _with_arguments(doc: str, options: Any) -> str:
    """The docstring with a section of arguments before `Returns:` or `Raises:`."""
    doc = inspect.cleandoc(doc)
    arguments = "\n".join(["Args:", *(f"    {name}: {text}" for name, text in field_docs(options).items())])
    for section in ("\n\nReturns:", "\n\nRaises:"):
        if section in doc:
            before, after = doc.split(section, 1)
            return f"{before}\n\n{arguments}{section}{after}"
    return f"{doc}\n\n{arguments}"
