"""Any OpenAI-compatible server as the judge; its replies are kept and never paid for twice.

    openai(model='gpt-4-0314')

OPENAI_API_KEY holds the key, OPENAI_BASE_URL or `base_url` the server. Replies are kept in `catpo/judge-replies.jsonl` in the
user's cache folder, or in the file that `cache` names, by a hash of model, server, decoding and conversation.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catpo import judges
from catpo.core.checks import check_positive
from catpo.core.errors import UserError
from catpo.judges._replies import Replies, hash_of
from catpo.models.exchange import LONGEST
from catpo.models.openai_client import ChatServer
from catpo.text.thoughts import without_thoughts

LEFT_TO_SERVER = -1


class Judge(judges.Judge):
    """A chat model that grades.

    Args:
        model: its name at the server. Take a dated one: scores of a name that moves on to newer models cannot be compared.
        base_url: the server's address up to `/v1`; OPENAI_BASE_URL or OpenAI's own if empty.
        temperature: of sampling; the benchmark's own if None, not sent if -1 (some models have one temperature only).
        max_tokens: longest reply; the benchmark's own if None, not sent if -1.
        seed: sent if not None; few servers guarantee anything for it.
        repeat: number of the repetition. Another number asks again instead of using the kept reply; for a judge's spread.
        workers: questions asked at once.
        timeout: seconds that a reply may take.
        retries: how often a busy, slow or broken server is asked again, after 1, 2, 4, … seconds or when it says.
        cache: file of replies; '' for the user's own, 'none' to keep nothing.
    """

    def __init__(
        self,
        *,
        model: str = "",
        base_url: str = "",
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        repeat: int = 1,
        workers: int = 4,
        timeout: float = 120.0,
        retries: int = 6,
        cache: str = "",
    ) -> None:
        if not model:
            raise UserError("the openai judge needs the name of a model: openai(model='gpt-4-0314').")
        check_positive(repeat=repeat, workers=workers)
        if not 0 < timeout <= LONGEST or retries < 0:
            limits = f"above 0 and up to {LONGEST:,.0f} seconds, and 0 retries or more"
            raise UserError(f"openai(timeout={timeout}, retries={retries}): give {limits}.")
        self.server = ChatServer(model, base_url=base_url, timeout=timeout, retries=retries)
        options = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        self.given = {name: value for name, value in options.items() if value is not None}
        self.decoding = _sent(self.given)
        self.repeat, self.workers = repeat, workers
        self.replies = None if cache == "none" else Replies(Path(cache) if cache else _users_cache())
        self.answered_by: set[str] = set()

    @property
    def identity(self) -> dict[str, Any]:
        """The model asked for, those that say they answered (known after the first reply), the decoding."""
        return {
            "name": self.server.model,
            "version": " and ".join(sorted(self.answered_by)),
            "decoding": dict(self.decoding),
            "server": self.server.url,
            "repeat": self.repeat,
        }

    def decoding_as(self, official: Mapping[str, Any]) -> Judge:
        """A judge of the same server and cache, with the benchmark's decoding where this one has none of its own."""
        judge = copy.copy(self)
        judge.decoding, judge.answered_by = _sent({**official, **self.given}), set()
        return judge

    def ask(self, messages: list[dict[str, Any]], *, key: str, attempt: int = 1) -> str:
        """The kept reply, or the server's, without the thoughts of a reasoning model; the cache keeps them."""
        asked = hash_of([self.server.model, self.server.url, self.decoding, [self.repeat, attempt], messages])
        kept = self.replies.get(asked) if self.replies else None
        if kept is None:
            try:
                reply = self.server.ask(messages, **self.decoding)
            except UserError as error:
                raise UserError(f"{key}: {error}") from error
            kept = {"key": key, "model": reply.model, "reply": reply.text}
            if self.replies and reply.text:
                self.replies.add(asked, **kept)
        self.answered_by.add(kept["model"])
        return without_thoughts(str(kept["reply"]))[0]


def _sent(decoding: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in decoding.items() if value != LEFT_TO_SERVER}


def _users_cache() -> Path:
    """$XDG_CACHE_HOME/catpo/judge-replies.jsonl, or the same in ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "catpo" / "judge-replies.jsonl"
