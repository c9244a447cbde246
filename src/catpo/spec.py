"""The one notation for options, `name(option=value)`: literals only, never evaluated. Knows nothing of plugins."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from catpo.errors import UserError, did_you_mean


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
        raise UserError(f"'{_short(text)}' is not of the form name(option=value, ...), name, ....")
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
        check_kind(f"{spec.name}({option}={value!r})", value, known[option])
    return dict(spec.options)


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


def keyword_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _expression(text: str, source: str, form: str) -> ast.expr:
    try:
        return ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"'{_short(text)}' is not of the form {form}.") from error


def _spec(node: ast.expr, text: str) -> Spec:
    if isinstance(node, ast.Name):
        return Spec(node.id)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise UserError(f"'{_short(text)}' is not of the form name(option=value, ...).")
    return Spec(node.func.id, _literal_options(node, text))


def _literal_options(node: ast.Call, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise UserError(f"'{_short(text)}': '**' is not allowed in options.")
        if keyword.arg in options:
            raise UserError(f"'{_short(text)}': option '{keyword.arg}' is given twice.")
        try:
            options[keyword.arg] = _plain(ast.literal_eval(keyword.value))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise UserError(
                f"'{_short(text)}': the value of '{keyword.arg}' must be a number, a quoted text, True, False, None, or a "
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


def _short(text: str) -> str:
    """The text for a message: on one line, and not too long."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 80 else text[:77] + "..."
