"""Checks a value against an annotated type with pydantic, and says in our words what is wrong with it.

Pydantic is imported when the first value is checked, since `--help` checks none.
"""

from __future__ import annotations

import ast
import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from annotated_types import Ge, Gt, Le, Lt

from catpo.core.checks import LARGEST, MOST
from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import Spec, parse, parse_list

if TYPE_CHECKING:
    from pydantic import ValidationError

EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "lines of the form `option: value`",
    "mapping_type": "lines of the form `option: value`",
}
"""Pydantic's name of an error -> what the value must be."""


def validated(value: Any, hint: Any, label: str) -> Any:
    """The value as `hint` asks for it; `label` names the option, and the file where there is one.

    Nothing is coerced but whole numbers to floats; the text `none` stands for None where None is allowed.

    >>> validated(2, float, "learning_rate")
    2.0
    >>> validated("six", Count, "recipe.yaml: 'train.save_steps'")
    Traceback (most recent call last):
    catpo.core.errors.UserError: recipe.yaml: 'train.save_steps' must be a whole number, not 'six'.

    Raises:
        UserError: the value is of another type, outside its range, or not one of the known words.
    """
    if isinstance(value, str) and value.lower() == "none" and type(None) in get_args(hint):
        return None
    from pydantic import ValidationError

    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{label} {problem(error, hint)}") from None


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(strict=True))


def problem(error: ValidationError, hint: Any = None) -> str:
    """What is wrong with a value, to be put behind the name of its option."""
    first = error.errors(include_url=False)[0]
    kind, context, value = first["type"], first.get("ctx", {}), shown(first["input"])
    if isinstance(first["input"], float) and not math.isfinite(first["input"]):
        return f"must be a finite number, not {value}."
    if kind == "literal_error":
        known = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        return f"must be {' or '.join(known)}, not {value}. {did_you_mean(str(first['input']), known)}"
    if kind == "value_error":
        return f"{context['error']}"
    if kind == "greater_than_equal":
        return f"must be {context['ge']:,} or more, not {value}."
    if kind == "greater_than":
        return f"must be more than {context['gt']:,}, not {value}."
    if kind == "less_than":
        return f"must be less than {context['lt']:,}, not {value}."
    if kind == "less_than_equal":
        return f"must be at most {context['le']:,}, not {value}."
    item = "a list, each " if first["loc"] and type(first["loc"][-1]) is int else ""
    or_null = " or null" if type(None) in get_args(hint) else ""
    return f"must be {item}{EXPECTED.get(kind, kind)}{or_null}, not {value}."


def shown(value: Any) -> str:
    """A value in a message, shortened: YAML aliases can make a short file very long."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- types of options ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Before:
    """In an annotated type: a function that converts a value before it is checked, or instead of checking it."""

    convert: Callable[[Any], Any]
    is_all: bool = False
    """Whether the function checks the value itself."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        if self.is_all:
            return core_schema.no_info_plain_validator_function(self.convert)
        return core_schema.no_info_before_validator_function(self.convert, handler(source))


def _path(value: Any) -> Path:
    if isinstance(value, Path) or (isinstance(value, str) and value):
        return Path(value)
    raise ValueError(f"must be a path, not {shown(value)}.")


def _text(value: Any) -> Any:
    """A path or a spec as text."""
    return str(value) if isinstance(value, Path | Spec) else value


def _text_or_object(value: Any) -> Any:
    """A name as text; a model, data set or list of pairs that is loaded already stays as it is."""
    if value is None or isinstance(value, bool | int | float | dict | bytes):
        raise ValueError(f"must be text, not {shown(value)}.")
    return _text(value)


def _several(value: Any) -> Any:
    """One item needs no list."""
    if isinstance(value, str | Path | Spec):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _specs(value: Any) -> tuple[str, ...]:
    """A list of `name(option=value)`, each item possibly several separated by commas."""
    items = _several(value)
    if not isinstance(items, tuple) or not all(isinstance(item, str | Spec) for item in items):
        raise ValueError(f"must be a list, each text, not {shown(value)}.")
    # YAML and the command line split [a(b=1, c=2)] at its comma
    return tuple(str(spec) for spec in parse_list(", ".join(str(item) for item in items)))


def _keywords(value: Any) -> dict[str, Any]:
    """Keyword arguments: a mapping, or text as in `use_reentrant=False, …`, or JSON."""
    given = value
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.lstrip().startswith("{") else dict(parse(f"keywords({given})").options)
        except (ValueError, RecursionError, UserError):
            given = None
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"must be of the form option=value, option=value, not {shown(value)}.")
    return dict(given)


def _names(value: Any) -> str | list[str]:
    """A text, or a list of texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"must be text or a list, each text, not {shown(value)}.")
    return list(value)


def _layers(value: Any) -> str | int | list[int]:
    """A word, a number or numbers; the command line gives `19,20` as text."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    if isinstance(value, tuple):
        value = list(value)
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(type(number) is int for number in numbers):
        raise ValueError(f"must be text, a whole number or a list, each a whole number, not {shown(value)}.")
    return value


def _picture(value: Any) -> str | int:
    """`all`, or a picture's number."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, str) or type(value) is int:
        return value
    raise ValueError(f"must be text or a whole number, not {shown(value)}.")


Count = Annotated[int, Ge(1), Le(MOST)]
Whole = Annotated[int, Ge(0), Le(MOST)]
Measure = Annotated[float, Ge(0), Le(LARGEST)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Probability = Annotated[float, Gt(0), Le(1)]
Seed = Annotated[int, Ge(0), Lt(1 << 32)]
"""NumPy takes the smallest seeds: below 2**32."""
File = Annotated[Path, Before(_path)]
Files = Annotated[tuple[File, ...], Before(_several)]
Text = Annotated[str, Before(_text)]
Source = Annotated[str, Before(_text_or_object, is_all=True)]
"""What Python may also give as an object that is loaded already."""
Layers = Annotated[str | int, Before(_layers, is_all=True)]
PictureNumber = Annotated[str | int, Before(_picture, is_all=True)]
Keywords = Annotated[str, Before(_keywords, is_all=True)]
Names = Annotated[str, Before(_names, is_all=True)]
Specs = Annotated[tuple[str, ...], Before(_specs)]
