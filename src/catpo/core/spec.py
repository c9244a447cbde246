"""The one notation for options, `name(option=value)`: literals only, never evaluated. Knows nothing of plugins."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from catpo.core.checks import check_kind
from catpo.core.errors import UserError, did_you_mean, shown

VALUES = "Write values as numbers, quoted texts, True, False, None, or lists of these; nothing is evaluated."


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

    >>> parse("catpo(kl_weight=0.03, shared_prefix='neutral')")
    Spec(name='catpo', options={'kl_weight': 0.03, 'shared_prefix': 'neutral'})
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
    repr(value)  # ValueError: an integer of thousands of digits
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
