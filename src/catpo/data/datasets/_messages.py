"""Conversations as LLaVA, OpenAI, TRL and others write them, message by message. Knows no data set's fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from catpo.core.conversation import IMAGE, Turn, as_role
from catpo.data.datasets._base import Row
from catpo.data.datasets._content import content_of

READ = ("role", "from", "content", "value")
PICTURE_PARTS = ("image", "image_url", "input_image")
TEXT_PARTS = ("text", "input_text", "output_text", None)


@dataclass(frozen=True)
class Message:
    """One turn, with the pictures that it holds itself; `<image>` marks the place of each."""

    turn: Turn
    pictures: tuple[Any, ...] = ()


def dialogue(row: Row, field: str, value: Any, *, is_history: bool = False) -> list[Message]:
    """The messages of a conversation; a system message only as the first, then questions and answers in turn.

    A history ends with an answer, or is a system message alone: a question follows.

    Raises:
        UserError: it is no such conversation; names row and field.
    """
    if not isinstance(value, list | tuple) or not value or not all(isinstance(message, Mapping) for message in value):
        raise row.error(field, "is missing" if value is None else "must be a list of messages")
    messages = [message_of(row, field, message) for message in value]
    roles = [message.turn.role for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    is_whole = len(spoken) % 2 == 0 if is_history else bool(spoken)
    if not is_whole or spoken != [("user", "assistant")[number % 2] for number in range(len(spoken))]:
        end = ", the last an answer" if is_history else ""
        raise row.error(field, f"must be questions and answers in turn{end}, not the turns {roles}")
    return messages


def message_of(row: Row, field: str, message: Mapping[str, Any]) -> Message:
    """One message; its content is a text, or a list of texts and pictures.

    Raises:
        UserError: its role is not known, it is empty, or holds what no model here reads.
    """
    role = as_role(message.get("from") or message.get("role"))
    if role is None:
        raise row.error(field, f"holds a message of role {message.get('from') or message.get('role')!r}, not user or assistant")
    for name, value in message.items():
        other = "" if name in READ else content_of(name, value)
        if other:
            raise row.error(field, f"holds a message with {other} in '{name}', which cannot be read")
    content = message.get("value") if message.get("content") is None else message["content"]
    joined, pictures = _joined(row, field, content) if isinstance(content, list | tuple) else (content, ())
    text = row.checked(field, joined)
    if role != "user" and IMAGE in text:
        raise row.error(field, f"has '{IMAGE}' in what the {role} says. Only questions have pictures")
    return Message(Turn(role, text), pictures)


def _joined(row: Row, field: str, parts: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    """The text of a message's parts, and the pictures that they hold or name."""
    text, pictures = "", []
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind in TEXT_PARTS and isinstance(part, Mapping):
            text += str(part.get("text") or "")
        elif kind in PICTURE_PARTS:
            text += IMAGE
            named = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key)), None)
            pictures += [] if named is None else [named]
        else:
            raise row.error(field, f"holds a part of type {kind!r}, and only texts and pictures can be read")
    return text, tuple(pictures)
