"""Requests of pairing methods to a judge, and how its replies are read. Knows neither the judge nor the method.

A request is one message: the pictures, then a text with an instruction and sections under headings. The text includes earlier
turns, and what the data set knows about the picture, so that a judge that reads no pictures, or only follows rules, finds what
it needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.judges._base import Judge
from catpo.models.remote import messages as with_pictures

Read = TypeVar("Read")
ATTEMPTS = 3
NO_OBJECTS = "Objects: none."
"""What `known_of` says of a picture that is known to show nothing."""
TASKS = {
    "claims": "Take the answer apart. Write every single claim that it makes about the picture as a question that is "
    "answered with yes or no, such that yes means that the claim is true. One question a line, nothing else.",
    "verify": "Look at the picture and answer every question with yes or no. One answer a line, in the order of the "
    "questions, nothing else.",
    "rate": "Look at the picture and rate how faithful the answer is to it: 10 where all that it says is there, 0 where "
    "nothing is. What it leaves out does not count. Write `Rating: ` and the number, nothing else.",
    "correct": "Look at the picture and correct the answer: change or remove what is not true of the picture, leave all else "
    "as it is. Write the corrected answer, nothing else. If all of it is true, write the answer as it stands.",
    "restyle": "Write the answer anew in plain, fluent sentences. Keep every claim that it makes, true or not, and add none. "
    "Write the new text, nothing else.",
    "invent": "Look at the picture and write the answer with mistakes in it, such as a careless viewer makes: a thing that "
    "often goes with what is there but is not on the picture, a wrong attribute, number or place. Keep length and "
    "style. Write the changed answer, nothing else.",
}
"""Name of a request -> its instruction."""
FORMS = {
    "claims": "one question a line, each with a question mark at its end",
    "verify": "as many lines with yes or no as there are questions",
    "rate": "`Rating: ` and a number from 0 to 10",
    **dict.fromkeys(("correct", "restyle", "invent"), "the text alone, not empty"),
}
"""Name of a request -> the reply that can be read."""


@dataclass(frozen=True)
class Request:
    """A request, for judges without a language model."""

    task: str
    sections: Mapping[str, str]
    """Heading -> text: `Known of the picture`, `Question`, `Answer`, `Questions`."""


def ask(
    judge: Judge, task: str, sample: Sample, read: Callable[[str], Read | None], *, number: int = 0, **sections: str
) -> Read | None:
    """The judge's reply as `read` returns it, after up to three attempts; None if none could be read, which the judge is told.

    Args:
        judge: is asked under the key `ID/TASK-NUMBER`.
        task: one of TASKS.
        sample: the picture with its question.
        read: returns None for a reply that cannot be read.
        number: distinguishes requests of the same task about one sample.
        sections: heading in lower case -> text.
    """
    headed = {"Question": sample.asked, **{heading.capitalize(): text for heading, text in sections.items()}}
    known = known_of(sample)
    if known:
        headed = {"Known of the picture": known, **headed}
    text = "\n\n".join([TASKS[task], *(f"## {heading}\n{text}" for heading, text in headed.items())])
    messages = with_pictures(replace(sample, prompt=text, history=()))
    key, reply = f"{sample.id}/{task}-{number}", ""
    for attempt in range(1, ATTEMPTS + 1):
        reply = judge.ask(messages, key=key, attempt=attempt)
        found = read(reply)
        if found is not None:
            return found
    judge.note_unreadable(key, reply, FORMS[task])
    return None


def request_of(messages: Sequence[Mapping[str, Any]]) -> Request | None:
    """The request that these messages are, or None if they are something else."""
    content = messages[-1]["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    instruction, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    for task, words in TASKS.items():
        if words == instruction.strip():
            headings = [part.partition("\n") for part in parts]
            return Request(task, {heading.strip(): body.strip() for heading, _, body in headings})
    return None


def as_text(reply: str) -> str | None:
    """The reply as an answer."""
    text = reply.strip().removeprefix("Answer:").strip().strip('"').strip()
    return text or None


def as_rating(reply: str) -> float | None:
    """The one number behind `Rating`, from 0 to 10.

    >>> as_rating("**Rating**: 7.5"), as_rating("I would say 7"), as_rating("Rating: 70")
    (7.5, None, None)
    """
    match = re.search(r"rating\W{1,6}(\d+(?:\.\d+)?)", reply, re.I)
    return float(match[1]) if match and float(match[1]) <= 10 else None


def as_questions(reply: str) -> list[str] | None:
    r"""The lines that are questions, without numbers or bullets.

    >>> as_questions("1. Is there a dog?\n- Is it brown?\nThat is all.")
    ['Is there a dog?', 'Is it brown?']
    """
    lines = (re.sub(r"^[\s\-*•]*(\d+[.)])?\s*", "", line).strip() for line in reply.splitlines())
    return [line for line in lines if line.endswith("?")] or None


def as_verdicts(count: int) -> Callable[[str], list[bool] | None]:
    r"""Reads `count` answers, each yes or no.

    >>> as_verdicts(2)("1. Yes.\n2. No, it is a cat."), as_verdicts(2)("yes")
    ([True, False], None)
    """

    def read(reply: str) -> list[bool] | None:
        matches = [re.search(r"\b(yes|no)\b", line, re.I) for line in reply.splitlines()]
        verdicts = [match[1].lower() == "yes" for match in matches if match]
        return verdicts if len(verdicts) == count else None

    return read


def known_of(sample: Sample) -> str:
    """What the data set knows about a picture, in words."""
    if "present" not in sample.truth:
        return ""
    counts = sample.truth.get("counts", {})
    named = [f"{name} ({counts[name]})" if name in counts else name for name in sample.truth["present"]]
    return f"Objects: {', '.join(named)}." if named else NO_OBJECTS


def missing_judge(method: str) -> UserError:
    return UserError(f"{method} asks a judge: name one with --judge (`catpo list judges` shows them).")
