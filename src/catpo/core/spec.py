"""The one notation for options, `name(option=value)`: literals only, never evaluated. Knows nothing of plugins."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from catpo.core.errors import UserError, did_you_mean, shown

VALUES = "Write values as numbers, quoted texts, True, False, None, or lists of these; nothing is evaluated."
MOST = (1 << 31) - 1
"""The largest count: what every library below takes as one."""
LARGEST = 1e30
"""The largest measure: times a count it is still far within a float."""


@dataclass(frozen=True)
class Spec:
    """A plugin's name and the options given to it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        inside = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.name}({inside})"


def parse(text: str | Spec) -> Spec:
    """Read `name` or `name(option=value, …)`; values are Python literals.

    >>> parse("catpo(kl_weight=0.03, shared='neutral')")
    Spec(name='catpo', options={'kl_weight': 0.03, 'shared': 'neutral'})
    >>> str(parse("dpo"))
    'dpo'

    Raises:
        UserError: the text is not of this form, or a value is not a literal.
    """
    if isinstance(text, Spec):
        return text
    return _spec(_expression(text, text, "name(option=value, ...)"), text)


def parse_list(text: str) -> list[Spec]:
    """Read several specs separated by commas.

    >>> [str(spec) for spec in parse_list("amber, pope(subset='random')")]
    ['amber', "pope(subset='random')"]

    Raises:
        UserError: the text is not of this form, or a value is not a literal.
    """
    node = _expression(text, f"[{text}]", "name(option=value, ...), name, ...")
    if not isinstance(node, ast.List):  # a], [b
        raise UserError(f"'{shown(text)}' is not of the form name(option=value, ...), name, .... {VALUES}")
    return [_spec(element, text) for element in node.elts]


def check_options(function: Callable[..., Any], spec: Spec) -> dict[str, Any]:
    """The spec's options, after checking that `function` has a keyword-only parameter for each, of its default's kind.

    Raises:
        UserError: an option is not one of them (the message names the closest), or its value is of another kind.
    """
    known = keyword_options(function)
    for option, value in spec.options.items():
        if option not in known:
            raise UserError(f"'{spec.name}' has no option '{option}'. {did_you_mean(option, known)}")
        if not (value is None and _may_be_none(function, option)):
            check_kind(f"{spec.name}({option}={value!r})", value, known[option])
    return dict(spec.options)


def _may_be_none(function: Callable[..., Any], option: str) -> bool:
    """Whether the parameter is annotated `… | None`."""
    return "None" in str(inspect.signature(function).parameters[option].annotation)


def check_kind(what: str, value: Any, default: Any) -> None:
    """Raise UserError unless `value` is of the default's kind: truth value, number or text; other defaults say nothing.

    >>> check_kind("dpo(beta='high')", "high", 0.1)
    Traceback (most recent call last):
    catpo.errors.UserError: dpo(beta='high'): it must be a number, such as 0.1.
    """
    kinds: tuple[tuple[type, tuple[type, ...], str], ...] = (
        (bool, (bool,), "True or False"),
        (int, (int,), "a whole number"),
        (float, (int, float), "a number"),
        (str, (str,), "a text in quotes"),
    )
    for kind, allowed, words in kinds:
        if type(default) is kind and type(value) not in allowed:
            raise UserError(f"{what}: it must be {words}, such as {default!r}.")


def check_positive(**counts: int | None) -> None:
    """Raise UserError unless each is from 1 to `MOST`, or None.

    >>> check_positive(limit=0)
    Traceback (most recent call last):
    catpo.errors.UserError: limit=0 must be 1 or more.
    """
    _check_range("must be 1 or more", lambda value: value >= 1, counts)
    _check_range(f"is too large. Give at most {MOST}", lambda value: value <= MOST, counts)


def check_not_negative(**numbers: float | None) -> None:
    """Raise UserError unless each is a number from 0 to `LARGEST`, or None."""
    _check_range("must be a number, 0 or more", lambda value: 0 <= value < math.inf, numbers)
    _check_range(f"is too large. Give at most {LARGEST:g}", lambda value: value <= LARGEST, numbers)


def check_seed(seed: int) -> None:
    """Raise UserError unless NumPy, which takes the smallest seeds, takes this one.

    >>> check_seed(2**32)
    Traceback (most recent call last):
    catpo.errors.UserError: seed=4294967296 must be from 0 to 4294967295.
    """
    _check_range("must be from 0 to 4294967295", lambda value: 0 <= value < 1 << 32, {"seed": seed})


def _check_range(must: str, is_right: Callable[[float], bool], numbers: Mapping[str, float | None]) -> None:
    for name, value in numbers.items():
        if value is not None and not is_right(value):
            raise UserError(f"{name}={shown(repr(value))} {must}.")


def keyword_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _expression(text: str, source: str, form: str) -> ast.expr:
    try:
        return ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"'{shown(text)}' is not of the form {form}. {VALUES}") from error


def _spec(node: ast.expr, text: str) -> Spec:
    if isinstance(node, ast.Name):
        return Spec(node.id)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise UserError(f"'{shown(text)}' is not of the form name(option=value, ...). {VALUES}")
    return Spec(node.func.id, _literal_options(node, text))


def _literal_options(node: ast.Call, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise UserError(f"'{shown(text)}': '**' is not allowed in options. Write each as option=value.")
        if keyword.arg in options:
            raise UserError(f"'{shown(text)}': option '{keyword.arg}' is given twice. Remove one of them.")
        try:
            options[keyword.arg] = _plain(ast.literal_eval(keyword.value))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise UserError(
                f"'{shown(text)}': the value of '{keyword.arg}' must be a number, a quoted text, True, False, None, or a "
                "list, tuple or dict of these."
            ) from error
    return options


def _plain(value: Any) -> Any:
    """The value, after checking that it reads back from its `repr` and can be written as JSON."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _plain(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _plain(key)
            _plain(item)
    elif not (value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))):
        raise ValueError(f"{value!r} is not plain")
    return value
