"""Who says what before the answer, and where the pictures stand. Knows no model and no file format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from catpo.core.errors import UserError

IMAGE = "<image>"
"""Stands in a prompt where a picture goes; a prompt without it has its pictures first."""
DEFAULT_PROMPT = "Describe the image."
"""Asked about pictures that come without a question."""
Role = Literal["system", "user", "assistant"]
Shown = TypeVar("Shown")


@dataclass(frozen=True)
class Turn:
    """What one side says before the last question."""

    role: Role
    text: str


def arranged(history: Sequence[Turn], prompt: str, pictures: Sequence[Shown]) -> list[tuple[Role, list[Shown | str]]]:
    """Role, texts and pictures of every turn, in order; the last is the prompt.

    Pictures come first in the first question, unless the questions say where: one `<image>` per picture. If no picture is
    given, their places are left out.

    >>> arranged((), "Is <image> like <image>?", ["a.png", "b.png"])
    [('user', ['Is ', 'a.png', ' like ', 'b.png', '?'])]
    >>> arranged([Turn("system", "Be brief."), Turn("user", "A cat?"), Turn("assistant", "Yes.")], "Sure?", ["a.png"])
    [('system', ['Be brief.']), ('user', ['a.png', 'A cat?']), ('assistant', ['Yes.']), ('user', ['Sure?'])]

    Raises:
        UserError: there are some places, but not one per picture.
    """
    turns = [*history, Turn("user", prompt)]
    check_places(turns, len(pictures))
    waiting = list(pictures)
    has_places = any(IMAGE in turn.text for turn in turns if turn.role == "user")
    arranged: list[tuple[Role, list[Shown | str]]] = []
    for turn in turns:
        parts: list[Shown | str] = []
        if turn.role == "user" and not has_places:
            parts, waiting = [*waiting], []
        texts = turn.text.split(IMAGE) if turn.role == "user" else [turn.text]
        for number, text in enumerate(texts):
            parts += [waiting.pop(0)] if number and waiting else []
            parts += [text] if text else []
        arranged.append((turn.role, parts))
    return arranged


def check_places(turns: Sequence[Turn], pictures: int) -> None:
    """Raise UserError if the questions have places for pictures, but not one per picture."""
    places = sum(turn.text.count(IMAGE) for turn in turns if turn.role == "user")
    if places and pictures and places != pictures:
        raise UserError(
            f"'{IMAGE}' stands in the prompt {_times(places)}, but the pair has {pictures} picture{'s' * (pictures > 1)}. "
            "Write it once per picture, or not at all: then the pictures come first."
        )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def without_leading_places(turns: Sequence[Turn], pictures: int) -> list[Turn]:
    r"""The same turns, without places that only say that the pictures come first; texts are stripped.

    >>> without_leading_places([Turn("user", "<image>\nWhat is this?")], 1)[0].text
    'What is this?'
    """
    kept = [Turn(turn.role, turn.text.strip()) for turn in turns]
    first = next((number for number, turn in enumerate(kept) if turn.role == "user"), None)
    if first is None or sum(turn.text.count(IMAGE) for turn in kept) != pictures:
        return kept
    text = kept[first].text
    for _ in range(pictures):
        if not text.startswith(IMAGE):
            return kept
        text = text.removeprefix(IMAGE).lstrip()
    kept[first] = Turn(kept[first].role, text)
    return kept


def spoken(history: Sequence[Turn], prompt: str) -> str:
    r"""The prompt as a reader sees it, below what was said before.

    >>> spoken([Turn("user", "A cat?"), Turn("assistant", "Yes.")], "Sure?")
    'user: A cat?\nassistant: Yes.\nSure?'
    """
    return "\n".join([*(f"{turn.role}: {turn.text}" for turn in history), prompt])


def as_role(word: object) -> Role | None:
    """Who speaks, as LLaVA, OpenAI or TRL call it."""
    names = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    return cast("Role | None", names.get(word)) if isinstance(word, str) else None
