"""Replies from a file instead of a judge: replays what was recorded, or reviews that others published.

    recorded(file='reviews.jsonl', name='gpt-4-0314')

Read are JSON Lines with `key` and `reply`, LLaVA-Bench's reviews (`question_id`, `content`), and MMHal-Bench's list of chat
completions, one per question in order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.files import strict_json
from catpo.judges import Judge as _Base


class Judge(_Base):
    """Whoever gave the replies in a file.

    Args:
        file: the replies.
        name: the judge that gave them; the file's own word if empty.
        version: its version, if it is known.
    """

    def __init__(self, *, file: str = "", name: str = "", version: str = "") -> None:
        if not file:
            raise UserError("the recorded judge needs a file of replies: recorded(file='reviews.jsonl').")
        self.path = Path(file)
        rows = _rows(self.path)
        self._replies = _by_key(rows, self.path)
        models = {str(row["model"]) for row in rows if row.get("model")}
        self._name = name or " and ".join(sorted(models)) or f"recorded in {self.path.name}"
        self._version = version

    @property
    def identity(self) -> dict[str, Any]:
        """As far as the file and the user tell; how the replies were decoded is not known."""
        return {"name": self._name, "version": self._version, "decoding": {}, "recorded": self.path.name}

    def ask(self, messages: list[dict[str, Any]], *, key: str, attempt: int = 1) -> str:
        """The recorded reply to an item, whatever is asked of it; `mmhal/3` may be recorded as `3`."""
        for name in (key, key.rpartition("/")[2]):
            if name in self._replies:
                return self._replies[name]
        raise UserError(f"{self.path} has no reply for {key}. It has {len(self._replies)}: {_some(self._replies)}.")


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        listed = (
            strict_json.loads(text)
            if text.lstrip().startswith("[")
            else [strict_json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is neither JSON Lines nor a JSON list in UTF-8 ({error}).") from error
    for number, row in enumerate(listed, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} must be a JSON object with key and reply.")
    return list(listed)


def _by_key(rows: list[dict[str, Any]], path: Path) -> dict[str, str]:
    replies: dict[str, str] = {}
    for number, row in enumerate(rows):
        key, reply = _key_and_reply(row, number)
        if not isinstance(reply, str):
            raise UserError(f"{path}: row {number + 1} has no reply: neither reply, content nor choices.")
        if key in replies:
            raise UserError(f"{path}: row {number + 1} is a second reply for {key}. Remove one of them.")
        replies[key] = reply
    return replies


def _key_and_reply(row: dict[str, Any], number: int) -> tuple[str, Any]:
    key = row.get("key", row.get("question_id", number))
    if "choices" in row:
        try:
            return str(key), row["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            return str(key), None
    return str(key), row.get("reply", row.get("content"))


def _some(replies: dict[str, str]) -> str:
    names = list(replies)
    return ", ".join(names if len(names) <= 5 else [*names[:4], "…"])
