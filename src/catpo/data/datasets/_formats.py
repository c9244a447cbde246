"""What the rows of other projects mean: each format's fields as pictures, conversation and answers. Knows nothing of files."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from catpo.core.conversation import Turn
from catpo.core.errors import UserError, did_you_mean
from catpo.core.types import Picture, PreferencePair
from catpo.data.datasets._base import Row, make_pair
from catpo.data.datasets._messages import Message, dialogue, message_of

PICTURES = ("images", "image", "img_path", "image_path")
VISUAL_GENOME = ("{}.jpg", "VG_100K/{}.jpg", "VG_100K_2/{}.jpg")
HA_DPO_PROMPT = "Describe this image in detail."


@dataclass(frozen=True)
class Choices:
    """What a row leaves open."""

    format: str = "auto"
    """One of `FORMATS`; auto: whichever the fields are of."""
    prompt: str | None = None
    """Question of rows that have none."""
    seed: int = 0
    """Draws one of several texts."""
    min_gap: float = 0.0
    """Two ranked answers are a pair if their scores differ by more than this."""

    def __post_init__(self) -> None:
        if self.format != "auto" and self.format not in FORMATS:
            raise UserError(f"format='{self.format}' is not known. {did_you_mean(self.format, ['auto', *FORMATS])}")


@dataclass(frozen=True)
class Preference:
    """A row's conversation up to its question, and two answers; the question stands in `field`."""

    field: str
    asked: list[Message]
    chosen: str
    rejected: str


def pairs_of(row: Row, choices: Choices = Choices(), pictures: tuple[Picture, ...] | None = None) -> list[PreferencePair]:
    """The pairs of a row: one, or one for every two of its ranked answers; `pictures` if they do not stand in the row.

    Raises:
        UserError: the row is of no known format, or not of the one that is asked for; names row and field.
    """
    shape = _shape(row, choices.format)
    if shape == "ranked":
        return _ranked(row, choices, pictures)
    read = SHAPES[shape](row, choices)
    asked = [*_earlier(row, read.asked), *read.asked]
    if asked[-1].turn.role != "user":
        raise row.error(read.field, "ends with the assistant's turn, so the answers answer nothing. End it with a question")
    pictures = _pictures(row, asked) if pictures is None else pictures
    *history, question = row.placed(read.field, [message.turn for message in asked], len(pictures))
    return [make_pair(pictures, question.text, read.chosen, read.rejected, _meta(row), tuple(history))]


# ---- which format --------------------------------------------------------------------------------------------------------

MARKS = {
    "rejected_conversations": "two conversations", "rejected_messages": "two lists", "rejected_response": "ms-swift",
    "completions": "ranked", "conversations": "sharegpt", "messages": "sharegpt", "instruction": "alpaca", "text": "json",
}  # fmt: skip
"""Field -> the shape of a row that has it; the first that is there decides."""
FORMATS = {
    "llama-factory": ("sharegpt", "alpaca"),
    "ms-swift": ("ms-swift", "two lists"),
    "povid": ("two conversations",),
    "trl": ("plain",),
    "rlhf-v": ("json", "plain"),
}
"""Name of a format -> the shapes of its rows."""


def _shape(row: Row, name: str) -> str:
    if name == "auto" and MARKS.keys().isdisjoint(row.values):
        return "plain"
    rejected = [field for field in MARKS if field.startswith("rejected_") and field in row.values]
    is_empty = rejected and not any(row.has(field) for field in (*rejected, "chosen"))  # its own format says so
    field = rejected[0] if is_empty else next(filter(row.has, MARKS), None)
    shape = "plain" if field is None else MARKS[field]
    if name == "auto" or shape in FORMATS[name]:
        return shape
    if "plain" in FORMATS[name]:
        return "plain"  # says which of its fields is missing
    raise UserError(
        f"{row.where}: the fields {', '.join(row.values)} are not those of format '{name}'. Leave the format out, so that the "
        "fields decide, or map the columns: columns={'prompt': 'my_column'}."
    )


# ---- each format ---------------------------------------------------------------------------------------------------------


def _two_conversations(row: Row, _: Choices) -> Preference:
    """POVID, CSR: `conversations`, `rejected_conversations`; ms-swift: `messages`, `rejected_messages`."""
    second = _first(row, "rejected_conversations", "rejected_messages")
    field = second.removeprefix("rejected_")
    asked, chosen = _answered(row, field, row.values.get(field))
    other, rejected = _answered(row, second, row.values.get(second))
    if other != asked:
        raise row.error(second, f"answers another conversation than '{field}'")
    return Preference(field, asked, chosen, rejected)


def _ms_swift(row: Row, _: Choices) -> Preference:
    """`messages` that end with the chosen answer, or `query` and `response`; `rejected_response`."""
    if row.has("query"):
        return Preference("query", [_question(row, "query")], row.text("response"), row.text("rejected_response"))
    asked, chosen = _answered(row, "messages", row.values.get("messages"))
    return Preference("messages", asked, chosen, row.text("rejected_response"))


def _sharegpt(row: Row, _: Choices) -> Preference:
    """LLaMA-Factory: `conversations` or `messages` up to the question, `chosen` and `rejected` as messages or texts."""
    field = "conversations" if row.has("conversations") else "messages"
    return Preference(field, dialogue(row, field, row.values[field]), *(_answer(row, side) for side in ("chosen", "rejected")))


def _alpaca(row: Row, _: Choices) -> Preference:
    """LLaMA-Factory: `instruction` and `input`, one line each (LLaMA-Factory's `AlpacaDatasetConverter`)."""
    text = row.text("instruction")
    if row.has("input") and str(row.values["input"]).strip():
        text += "\n" + row.text("input")
    asked = [Message(Turn("user", text))]
    return Preference("instruction", asked, *(_answer(row, side) for side in ("chosen", "rejected")))


def _json(row: Row, _: Choices) -> Preference:
    """RLHF-V: `text` is an object, or the JSON of one, with question, chosen and rejected."""
    value = row.values["text"]
    inner = row.inner("text", value if isinstance(value, Mapping) else row.text("text"))
    return Preference("text", [_question(inner, "question")], inner.text("chosen"), inner.text("rejected"))


def _plain(row: Row, choices: Choices) -> Preference:
    """TRL: `prompt`, `chosen`, `rejected` as texts or conversations; SeVa, mDPO, RLHF-V, HA-DPO: `question`, `reject`."""
    other = _first(row, "reject", "rejected")
    if isinstance(row.peek("chosen"), str) and isinstance(row.peek(other), str):
        return Preference(*_prompt(row, choices), _answer(row, "chosen"), _answer(row, other))
    has_several = any(isinstance(row.peek(side), list) for side in ("chosen", other))
    rng = random.Random(f"{choices.seed}/{row.peek('image_id') or row.where}") if has_several else None
    chosen = _prompt_and_answer(row, "chosen", choices, rng)
    rejected = _prompt_and_answer(row, other, choices, rng)
    if chosen[:2] != rejected[:2]:
        raise row.error(other, "answers another prompt than 'chosen'")
    return Preference(*chosen, rejected[2])


SHAPES: dict[str, Callable[[Row, Choices], Preference]] = {
    "two conversations": _two_conversations, "two lists": _two_conversations, "ms-swift": _ms_swift, "sharegpt": _sharegpt,
    "alpaca": _alpaca, "json": _json, "plain": _plain,
}  # fmt: skip


def _prompt_and_answer(row: Row, side: str, choices: Choices, rng: random.Random | None) -> tuple[str, list[Message], str]:
    """Field of the question, conversation up to it, and one side's answer."""
    answer = row.values.get(side)
    is_messages = isinstance(answer, list) and any(isinstance(part, Mapping) for part in answer)
    if is_messages and not row.has(_first(row, "question", "prompt")):  # TRL's implicit prompt
        asked, text = _answered(row, side, answer)
        return "chosen", asked, text
    field, asked = _prompt(row, choices)
    if is_messages:
        messages = [message_of(row, side, message) for message in answer or [] if isinstance(message, Mapping)]
        if [message.turn.role for message in messages] != ["assistant"]:
            roles = [message.turn.role for message in messages]
            raise row.error(side, f"must be one answer, not the turns {roles}. Put earlier turns into '{field}'")
        return field, asked, messages[0].turn.text
    if isinstance(answer, list) and answer and rng is not None:  # HA-DPO has several texts
        return field, asked, row.checked(side, rng.choice(answer))
    return field, asked, _answer(row, side)


def _prompt(row: Row, choices: Choices) -> tuple[str, list[Message]]:
    """Field of the question, and the conversation up to it."""
    field = _first(row, "question", "prompt")
    prompt = row.values.get(field)
    return field, dialogue(row, field, prompt) if isinstance(prompt, list) else _asked(row, field, choices)


def _first(row: Row, *names: str) -> str:
    """The first of these fields that holds something, or that is there, or the last."""
    for name in names:
        if row.has(name):
            return name
    return next((name for name in names if name in row.values), names[-1])


def _asked(row: Row, field: str, choices: Choices) -> list[Message]:
    """The question as a text; HA-DPO's descriptions have none."""
    if field in row.values:
        return [_question(row, field)]
    default = choices.prompt or (HA_DPO_PROMPT if "image_id" in row.values else None)
    if default is None:
        raise row.error(field, "is missing. Name its column, columns={'prompt': 'my_column'}, or give one: prompt='…'")
    return [Message(Turn("user", default))]


def _question(row: Row, field: str) -> Message:
    return Message(Turn("user", row.text(field)))


def _answer(row: Row, field: str) -> str:
    """An answer that is a text or one message."""
    value = row.values.get(field)
    if not isinstance(value, Mapping):
        return row.checked(field, value)
    message = message_of(row, field, value)
    if message.turn.role != "assistant":
        raise row.error(field, f"must be the assistant's, not the {message.turn.role}'s")
    return message.turn.text


def _answered(row: Row, field: str, value: Any) -> tuple[list[Message], str]:
    """A conversation that ends with an answer: what comes before, and the answer."""
    messages = dialogue(row, field, value)
    if len(messages) < 2 or messages[-1].turn.role != "assistant" or messages[-2].turn.role != "user":
        roles = [message.turn.role for message in messages]
        raise row.error(field, f"must end with a question and its answer, not be the turns {roles}")
    return messages[:-1], messages[-1].turn.text


def _earlier(row: Row, asked: Sequence[Message]) -> list[Message]:
    """What the fields `system` and `history` say before the conversation."""
    earlier = []
    if row.has("system") and str(row.values["system"]).strip():
        earlier.append(Message(Turn("system", row.text("system"))))
    history = row.values["history"] if row.has("history") else []
    if not isinstance(history, list):
        raise row.error("history", "must be a list of questions with their answers")
    if history and all(isinstance(turn, Mapping) for turn in history):
        earlier += dialogue(row, "history", history, is_history=True)
    elif history:
        for turn in history:
            if not isinstance(turn, list) or len(turn) != 2:
                raise row.error("history", "must be a list of questions with their answers: [[question, answer], ...]")
            question, answer = (row.checked("history", text) for text in turn)
            earlier += [Message(Turn("user", question)), Message(Turn("assistant", answer))]
    if earlier and asked[0].turn.role == "system":
        raise row.error(
            "system" if row.has("system") else "history", "stands beside a conversation with its own system message"
        )
    return earlier


def _ranked(row: Row, choices: Choices, pictures: tuple[Picture, ...] | None) -> list[PreferencePair]:
    """VLFeedback (Silkie), BPO: a pair for every two answers of unequal score."""
    asked = [_question(row, "prompt")]
    asked = [*_earlier(row, asked), *asked]
    pictures, answers = _pictures(row, asked) if pictures is None else pictures, list(_scored(row))
    *history, question = row.placed("prompt", [message.turn for message in asked], len(pictures))
    best = max((score for score, _ in answers), default=0.0)
    pairs = []
    for (first, one), (second, other) in combinations(answers, 2):
        if abs(first - second) > choices.min_gap and one.strip() != other.strip():
            better, worse = (one, other) if first > second else (other, one)
            meta = {**_meta(row), "gap": abs(first - second), "is_best": float(max(first, second) == best)}
            pairs.append(make_pair(pictures, question.text, better, worse, meta, tuple(history)))
    return pairs


def _scored(row: Row) -> Iterator[tuple[float, str]]:
    """Score and text of each answer that has a score."""
    completions = row.values["completions"]
    if isinstance(completions, Mapping):  # the `datasets` library turns a list of objects into an object of lists
        columns = list(completions.values())
        if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            raise row.error("completions", "must be a list of answers")
        completions = [dict(zip(completions, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if not isinstance(completions, list) or not all(isinstance(answer, Mapping) for answer in completions):
        raise row.error("completions", "must be a list of answers")
    for answer in completions:
        score, text = _score(row, answer), row.checked("completions.response", answer.get("response"))
        if score is not None:
            yield score, text


def _score(row: Row, answer: Mapping[str, Any]) -> float | None:
    """An answer's `score`, or the mean of its ratings (Silkie), if it has any."""
    score, annotations = answer.get("score"), answer.get("annotations") or {}
    if isinstance(score, int | float):
        return float(score)
    if not isinstance(annotations, Mapping):
        raise row.error("completions.annotations", "must be an object: {...}")
    ratings = [str(aspect.get("Rating")) for aspect in annotations.values() if isinstance(aspect, Mapping)]
    numbers = [float(rating) for rating in ratings if rating.replace(".", "", 1).isdigit()]
    return sum(numbers) / len(numbers) if numbers else None


# ---- pictures and the rest -----------------------------------------------------------------------------------------------


def _pictures(row: Row, asked: Sequence[Message]) -> tuple[Picture, ...]:
    """The pictures in the row's own field, or those that its messages hold."""
    held = [cell for message in asked for cell in message.pictures]
    field = next((name for name in PICTURES if row.has(name)), "image")
    if held:
        value = row.values.get(field)
        cells = value if isinstance(value, list) else [value]
        if value and cells != held:
            raise row.error(field, "names other pictures than the messages. Give them in one place")
        return tuple(row.picture("messages", cell, row.root) for cell in held)
    if row.has("image_id") and not any(row.has(name) for name in PICTURES):
        return (row.picture("image_id", _visual_genome_file(row), row.root),)
    return row.pictures(field)


def _visual_genome_file(row: Row) -> Any:
    """The picture's name in whichever of Visual Genome's folders has it."""
    number = row.values["image_id"]
    names = [pattern.format(number) for pattern in VISUAL_GENOME] if isinstance(number, int | str) else [number]
    existing = [name for name in names if isinstance(name, str) and (row.root / name).is_file()]
    return (existing or names)[0]


def _meta(row: Row) -> dict[str, Any]:
    """Numbers and texts of the fields that nothing else has read."""
    meta = {}
    for name in [*row.unread(row.values), *(["image_id"] if "image_id" in row.values else [])]:
        value = row.peek(name)
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            meta[name] = value
    return meta
