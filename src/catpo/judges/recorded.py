"""Replies from a file instead of a judge: replays what was recorded, or reviews that others published.

    recorded(file='reviews.jsonl', name='gpt-4-0314')

It reads JSON Lines with `key` and `reply`, LLaVA-Bench's reviews (`question_id`, `content`), and MMHal-Bench's list of chat
completions, one per question in order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from catpo import judges
from catpo.core.errors import UserError
from catpo.files.records import as_id, decode, parse_records, read_bytes


class Judge(judges.Judge):
    """The judge who gave the replies in a file.

    Args:
        file: the replies.
        name: the judge that gave them; as the file says if empty.
        version: its version, if it is known.
    """

    def __init__(self, *, file: str = "", name: str = "", version: str = "") -> None:
        if not file:
            raise UserError("the recorded judge needs a file of replies: recorded(file='reviews.jsonl').")
        self.path = Path(file)
        self._replies: dict[str, str] = {}
        models = set()
        for number, record in enumerate(parse_records(decode(read_bytes(self.path), self.path), file)):
            given = record.row.get("key", record.row.get("question_id", number))
            key = as_id(given) or str(given)
            reply = _reply(record.row)
            if not isinstance(reply, str):
                raise UserError(f"{record.place} has no reply: neither reply, content nor choices.")
            if key in self._replies:
                raise UserError(f"{record.place} is a second reply for {key}. Remove one of them.")
            self._replies[key] = reply
            models.add(str(record.row.get("model") or ""))
        self._name = name or " and ".join(sorted(models - {""})) or f"recorded in {self.path.name}"
        self._version = version

    @property
    def identity(self) -> dict[str, Any]:
        """What the file and the user say; how the replies were decoded is not known."""
        return {"name": self._name, "version": self._version, "decoding": {}, "recorded": self.path.name}

    def ask(self, messages: list[dict[str, Any]], *, key: str, attempt: int = 1) -> str:
        """The recorded reply to an item, whatever is asked of it; `mmhal/3` may be recorded as `3`."""
        for name in (key, key.rpartition("/")[2]):
            if name in self._replies:
                return self._replies[name]
        count, first = len(self._replies), ", ".join(list(self._replies)[:5])
        raise UserError(f"{self.path} has no reply for {key}. It has {count}: {first}{', …' if count > 5 else ''}.")


def _reply(row: dict[str, Any]) -> Any:
    if "choices" not in row:
        return row.get("reply", row.get("content"))
    try:
        return row["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return None
