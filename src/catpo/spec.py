"""The one notation for options, `name(option=value)`: literals only, never evaluated. Knows nothing of plugins."""

from __future__ import annotations

import ast
import inspect
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
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"'{_short(text)}' is not of the form name(option=value, ...).") from error
    if isinstance(node, ast.Name):
        return Spec(node.id)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise UserError(f"'{_short(text)}' is not of the form name(option=value, ...).")
    return Spec(node.func.id, _literal_options(node, text))


def parse_list(text: str) -> list[Spec]:
    """Read several specs separated by commas: `amber, pope(subset='random')`."""
    try:
        node = ast.parse(f"[{text}]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"'{_short(text)}' is not a list of name(option=value, ...).") from error
    assert isinstance(node, ast.List)
    return [parse(ast.unparse(element)) for element in node.elts]


def check_options(function: Callable[..., Any], spec: Spec) -> dict[str, Any]:
    """The spec's options, after checking that `function` has a keyword-only parameter for each.

    Raises:
        UserError: an option is not one of them; the message names the closest.
    """
    known = keyword_options(function)
    for option in spec.options:
        if option not in known:
            raise UserError(f"'{spec.name}' has no option '{option}'. {did_you_mean(option, known)}")
    return dict(spec.options)


def keyword_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _literal_options(node: ast.Call, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise UserError(f"'{_short(text)}': '**' is not allowed in options.")
        if keyword.arg in options:
            raise UserError(f"'{_short(text)}': option '{keyword.arg}' is given twice.")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise UserError(
                f"'{_short(text)}': the value of '{keyword.arg}' must be a number, a quoted text, True, False, None, or a "
                "list, tuple or dict of these."
            ) from error
    return options


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
