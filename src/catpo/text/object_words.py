"""The built-in object words, and where a text mentions objects. Knows nothing of pictures or models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from catpo.core.errors import UserError


@dataclass(frozen=True)
class Mention:
    """A span of a text that names an object: `text[start:end]`."""

    start: int
    end: int
    object: str


@dataclass(frozen=True)
class ObjectClass:
    """A kind of object in the built-in pictures, and the words for it."""

    name: str
    one: str
    """With its article: "an apple", "a loaf of bread"."""
    plural: str
    synonyms: tuple[str, ...]
    """Other surface forms, singular and plural."""
    contexts: tuple[str, ...]
    """Contexts in which it usually occurs."""
    codepoint: str
    """Of the emoji that draws it, e.g. "U+1F34E"."""
    sprite: int
    """Its index on the sprite sheet, row by row."""

    def phrase(self, count: int) -> str:
        """The object, `count` times.

        >>> classes()["knife"].phrase(2)
        'two knives'
        """
        return self.one if count == 1 else f"{NUMBERS[count]} {self.plural}"


NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


@lru_cache(maxsize=1)
def classes() -> dict[str, ObjectClass]:
    """Name -> class, in alphabetical order, which is that of the sprite sheet."""
    rows = _table()["objects"]
    return {row["name"]: ObjectClass(**row | {key: tuple(row[key]) for key in ("synonyms", "contexts")}) for row in rows}


def check_vocabulary(forms: Mapping[str, Any], where: object, *, may_be_empty: bool = True) -> None:
    """Raise UserError unless words are mapped to objects: surface form -> object."""
    is_empty = not forms and not may_be_empty
    if is_empty or not all(isinstance(name, str) and name.strip() and form.strip() for form, name in forms.items()):
        raise UserError(f'{where} must map words to objects, e.g. {{"puppies": "dog", "dog": "dog"}}.')


@lru_cache(maxsize=1)
def contexts() -> dict[str, tuple[str, ...]]:
    """Context -> its objects, most frequent first; the 1st and 2nd are companions, the 3rd and 4th, and so on."""
    return {name: tuple(members) for name, members in _table()["contexts"].items()}


def companion(context: str, name: str) -> str | None:
    """The object that often occurs together with `name` in that context, if any."""
    members = contexts()[context]
    if name not in members:
        return None
    other = members.index(name) ^ 1
    return members[other] if other < len(members) else None


@lru_cache(maxsize=1)
def default_vocabulary() -> Mapping[str, str]:
    """Surface form -> object: singular, plural and synonyms, some of several words ("traffic light")."""
    forms: dict[str, str] = {}
    for item in classes().values():
        for form in (item.name, item.plural, *item.synonyms):
            forms[form] = item.name
    return forms


def mentions(text: str, vocabulary: Mapping[str, str] | None = None) -> list[Mention]:
    """Every object that the text names, in order; case is ignored, and the longest form wins.

    `vocabulary` maps surface forms to objects; the built-in one if None.

    >>> [(mention.object, mention.start, mention.end) for mention in mentions("A teddy bear and two DOGS.")]
    [('teddy bear', 2, 12), ('dog', 21, 25)]
    """
    words = default_vocabulary() if vocabulary is None else vocabulary
    pattern, objects = _compiled(tuple(words.items()))
    if pattern is None:
        return []
    return [Mention(match.start(), match.end(), objects[_folded(match.group())]) for match in pattern.finditer(text)]


@lru_cache(maxsize=32)
def _compiled(items: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str] | None, dict[str, str]]:
    """One pattern for all forms (longest first, whole words, any white space between words), and folded form -> object."""
    objects = {_folded(form): name for form, name in items if form.strip()}
    if not objects:
        return None, objects
    longest_first = sorted(objects, key=lambda form: (-len(form), form))
    patterns = [r"\s+".join(re.escape(word) for word in form.split(" ")) for form in longest_first]
    return re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)", re.IGNORECASE), objects


def _folded(form: str) -> str:
    return " ".join(form.lower().split())


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    text = resources.files("catpo.text").joinpath("objects.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def sprite_layout() -> tuple[int, int]:
    """Size of a sprite in pixels and sprites per row of the sheet."""
    return _table()["sprite_size"], _table()["columns"]
