"""JSON as its standard has it: no NaN, no key twice, since readers disagree on both. Knows no file."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    >>> loads('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: key 'a' stands twice in one object

    Raises:
        ValueError: it is not JSON, or not in UTF-8; holds NaN or an infinity; a key stands twice.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{double[:80]}' stands twice in one object")
    return made
