"""Rules instead of a language model, for pictures whose objects are listed: the built-in scenes. Free, and knows only objects.

catpo pair --data scenes --method rlaif --judge truth
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from catpo import judges
from catpo.core.errors import UserError
from catpo.judges._requests import NO_OBJECTS, Request, request_of
from catpo.text.caption_edits import remove_objects, replace_object
from catpo.text.object_words import default_vocabulary, mentions


class Judge(judges.Judge):
    """Grades and edits by the objects that `truth["present"]` names; looks at no picture."""

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": "truth", "version": "1", "decoding": {}}

    def ask(self, messages: list[dict[str, Any]], *, key: str, attempt: int = 1) -> str:
        """The reply to a request of a pairing method."""
        request = request_of(messages)
        if request is None:
            raise UserError(f"{key}: the truth judge knows only what `catpo pair` asks. Name another judge.")
        known = request.sections.get("Known of the picture")
        if known is None:
            raise UserError(f'{key}: the truth judge needs the sample\'s objects. Give "truth": {{"present": ["dog", ...]}}.')
        names = re.findall(r"[^:,.()\d]*[^:,.()\d\s]", known.removeprefix("Objects:"))
        present = [] if known == NO_OBJECTS else [name.strip() for name in names]
        reply: str = getattr(self, f"_{request.task}")(request, present, key)
        return reply

    def _claims(self, request: Request, present: list[str], key: str) -> str:
        return "\n".join(f"Is there a {name}?" for name in _named(request.sections["Answer"])) or "Is this a picture?"

    def _verify(self, request: Request, present: list[str], key: str) -> str:
        lines = request.sections["Questions"].splitlines()
        return "\n".join("no" if _absent(line, present) else "yes" for line in lines)

    def _rate(self, request: Request, present: list[str], key: str) -> str:
        named = mentions(request.sections["Answer"])
        right = sum(mention.object in present for mention in named)
        return f"Rating: {10 * right / len(named) if named else 0:.1f}"

    def _correct(self, request: Request, present: list[str], key: str) -> str:
        answer = request.sections["Answer"]
        absent = _absent(answer, present)
        return remove_objects(answer, absent) if absent else answer

    def _restyle(self, request: Request, present: list[str], key: str) -> str:
        return request.sections["Answer"]

    def _invent(self, request: Request, present: list[str], key: str) -> str:
        """The first object of the answer that can be taken for an absent one; which, the key decides."""
        answer = request.sections["Answer"]
        others = sorted(set(default_vocabulary().values()).difference(present, _named(answer)))
        other = others[int(hashlib.blake2b(key.encode(), digest_size=4).hexdigest(), 16) % len(others)]
        edits = (replace_object(answer, mention.object, other) for mention in mentions(answer))
        return next((edited for edited in edits if edited), f"{answer} There is also a {other}.")


def _absent(text: str, present: list[str]) -> list[str]:
    return [name for name in _named(text) if name not in present]


def _named(text: str) -> list[str]:
    """Objects in the order named, each once."""
    return list(dict.fromkeys(mention.object for mention in mentions(text)))
