"""What pairing methods ask of a judge, and how its replies are read. Knows neither the judge nor the method.

A request is one message: the pictures, then an instruction and sections with headings. One is what the data set knows of
the picture, for judges that see no picture or follow rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.judges import Judge
from catpo.models.remote import messages as with_pictures

Read = TypeVar("Read")
ATTEMPTS = 3
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


@dataclass(frozen=True)
class Request:
    """A request as a judge without a language model reads it."""

    task: str
    sections: Mapping[str, str]
    """Heading -> text: `Known of the picture`, `Question`, `Answer`, `Questions`."""


def ask(
    judge: Judge, task: str, sample: Sample, read: Callable[[str], Read | None], *, number: int = 0, **sections: str
) -> Read | None:
    """The judge's reply as `read` understands it; None if three replies cannot be read.

    Args:
        judge: is asked under the key `ID/TASK-NUMBER`.
        task: one of TASKS.
        sample: the picture with its question.
        read: returns None for a reply that cannot be read.
        number: distinguishes requests of one task about one sample.
        sections: heading in lower case -> text.
    """
    parts = [TASKS[task]]
    if known := known_of(sample):
        parts.append(f"## Known of the picture\n{known}")
    parts.append(f"## Question\n{sample.prompt}")
    parts += [f"## {heading.capitalize()}\n{text}" for heading, text in sections.items()]
    request = with_pictures(replace(sample, prompt="\n\n".join(parts)))
    for attempt in range(1, ATTEMPTS + 1):
        value = read(judge.ask(request, key=f"{sample.id}/{task}-{number}", attempt=attempt))
        if value is not None:
            return value
    return None


def request_of(messages: Sequence[Mapping[str, Any]]) -> Request | None:
    """The request in the messages; None if they are something else."""
    content = messages[-1]["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    instruction, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    task = next((name for name, words in TASKS.items() if words == instruction.strip()), None)
    if task is None:
        return None
    sections = {}
    for part in rest:
        heading, _, body = part.partition("\n")
        sections[heading.strip()] = body.strip()
    return Request(task, sections)


def as_text(reply: str) -> str | None:
    """The reply as an answer."""
    text = reply.strip().removeprefix("Answer:").strip().strip('"').strip()
    return text or None


def as_rating(reply: str) -> float | None:
    """The number after `Rating`, from 0 to 10.

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
    """What the data set knows of a picture, in words."""
    if "present" not in sample.truth:
        return ""
    counts = sample.truth.get("counts", {})
    named = [f"{name} ({counts[name]})" if name in counts else name for name in sample.truth["present"]]
    return f"Objects: {', '.join(named)}." if named else "Objects: none."


def no_judge(method: str) -> UserError:
    """The error of a method that was given no judge."""
    return UserError(f"{method} asks a judge: name one with --judge (`catpo list judges` shows them).")
