"""TRL's vision preference format: `images` or `image`, `prompt`, `chosen`, `rejected`, plain or conversational.

    trl(source='trl-lib/rlaif-v')        trl(source='pairs.parquet')        trl(source='rows.jsonl', images='photos')

Columns: TRL's documentation, "Dataset formats". A prompt may also stand at the head of both conversations (implicit prompt).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from catpo.core.types import Picture, PreferencePair
from catpo.data.datasets import Row, make_pair, message_text
from catpo.data.datasets._table import TableDataset


class Dataset(TableDataset):
    """One pair per row."""

    plugin = "trl"

    def pairs_of(self, row: Row) -> Iterable[PreferencePair]:
        return [pair_of(row, self.table.pictures(row, picture_field(row)))]


def picture_field(row: Row) -> str:
    return "images" if row.values.get("images") is not None else "image"


def pair_of(row: Row, pictures: tuple[Picture, ...]) -> PreferencePair:
    """The pair in a row with prompt, chosen and rejected: plain texts or conversations.

    Raises:
        UserError: a field is missing, or a conversation is not one question with one answer.
    """
    prompt, chosen = _prompt_and_answer(row, "chosen")
    other_prompt, rejected = _prompt_and_answer(row, "rejected")
    if prompt != other_prompt:
        raise row.error("rejected", "answers another prompt than 'chosen'")
    return make_pair(pictures, prompt, chosen, rejected)


def _prompt_and_answer(row: Row, field: str) -> tuple[str, str]:
    answer, prompt = row.values.get(field), row.values.get("prompt")
    if isinstance(answer, list):
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*before, *answer] if isinstance(before, list) else answer
        question, text = row.turns(field, messages, ("user", "assistant"))
        return question, text
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping):
        return row.checked("prompt", message_text(prompt[-1])), row.text(field)
    return row.text("prompt"), row.text(field)
