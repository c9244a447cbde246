"""What judges share: they are asked in chat messages, reply with a text, and say who they are. Knows no benchmark."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from catpo.core import registry
from catpo.core.spec import Spec
from catpo.core.types import Sample

QUOTED = 300
"""Characters of a reply in a message."""


class Judge(ABC):
    """Base of every module in `judges/`. Options are keyword arguments of its constructor.

    `ask` may be called from `workers` threads at once.
    """

    workers: int = 1
    """Number of questions it takes at a time."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """`name`, `version` and `decoding`: what must be the same for two scores to be comparable. Never a key."""

    def decoding_as(self, official: Mapping[str, Any]) -> Judge:
        """This judge with a benchmark's official decoding, e.g. {"temperature": 0.2}; options the user has set win."""
        return self

    @abstractmethod
    def ask(self, messages: list[dict[str, Any]], *, key: str, attempt: int = 1) -> str:
        """The judge's reply.

        Args:
            messages: in the chat format: `role` and `content`.
            key: which item is judged; for error messages, and for recorded replies.
            attempt: 2 or more asks again, where an earlier reply could not be read.

        Raises:
            UserError: there is no reply; names the item.
        """

    def margins(self, sample: Sample, questions: Sequence[str]) -> Sequence[float] | None:
        """Logit of yes less that of no of each question about a sample's pictures; None from a judge that writes only."""
        return None

    def note_unreadable(self, key: str, reply: str, form: str) -> None:
        """Called where no attempt gave a reply of the form that was asked for; only `CountingJudge` does something about it."""
        return


class CountingJudge(Judge):
    """A judge that keeps the replies of which nothing could be made."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.workers = judge, judge.workers
        self.unreadable: list[str] = []
        """Each as a sentence with key, reply and the form expected."""

    @property
    def identity(self) -> dict[str, Any]:
        return self.judge.identity

    def ask(self, messages: list[dict[str, Any]], *, key: str, attempt: int = 1) -> str:
        return self.judge.ask(messages, key=key, attempt=attempt)

    def note_unreadable(self, key: str, reply: str, form: str) -> None:
        self.unreadable.append(f"the judge's reply to {key} is {reply[:QUOTED]!r}, expected: {form}")


def open_judge(text: str | Spec) -> Judge:
    """The judge that `name(option=value)` stands for.

    Raises:
        UserError: no such judge or option.
    """
    judge: Judge = registry.opened("judges", text)
    return judge
