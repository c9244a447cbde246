"""What the reference says of words that it might name in an answer: one row per word and pair, kept with the shard of the pair.

The words of all pairs about the same pictures are one table, from which `catpo.rewards.word_rewards` makes rewards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from catpo.core.errors import UserError
from catpo.core.types import Picture
from catpo.files.checksums import checksum

REMOVED, KEPT, UNKNOWN = 0, 1, -1
"""Labels of a word: named by the rejected response only, by the chosen one, by neither (or the pairs disagree)."""
COLUMNS = {
    "pair_id": pa.string(),
    "pictures": pa.string(),
    "word": pa.string(),
    "token_ids": pa.list_(pa.int32()),
    "label": pa.int8(),
    "forms": pa.list_(pa.list_(pa.int32())),
}
"""Columns beside one of float32 per feature. Stores of earlier versions have no `forms`."""


@dataclass(frozen=True)
class WordRow:
    """A word that the reference might name in an answer about some pictures."""

    pair_id: str
    pictures: str
    """Digest of the pair's pictures."""
    word: str
    token_ids: tuple[int, ...]
    """The tokens with which the word can begin."""
    label: int
    """1 if the pair keeps or inserts the word, 0 if it removes it, -1 if it says nothing."""
    features: Mapping[str, float]
    """What the reference says of it, e.g. `self_question`."""
    forms: tuple[tuple[int, ...], ...] = ()
    """All tokens of each way to write the word; none where only the first are known."""


@dataclass(frozen=True)
class WordTable:
    """The words of some pictures, each once."""

    words: Sequence[str]
    token_ids: Sequence[Sequence[int]]
    labels: NDArray[np.integer]
    features: Mapping[str, NDArray[np.floating]]
    """[words] each."""
    forms: Sequence[Sequence[tuple[int, ...]]] = ()

    def columns(self, names: Sequence[str]) -> NDArray[np.float64]:
        """Features of every word, [words, names]."""
        return np.stack([self.features[name] for name in names], axis=1).astype(np.float64)


def digest_of(images: Sequence[Picture]) -> str:
    """Identity of some pictures together."""
    return checksum("\n".join(picture.digest() for picture in images).encode())


NO_WORDS = WordTable([], [], np.array([], dtype=np.int8), {})
"""Of pictures of which the reference would name none."""


def to_bytes(rows: Sequence[WordRow], features: Sequence[str]) -> bytes:
    """The rows of a shard as a Parquet file.

    Raises:
        UserError: a number is not finite.
    """
    for row in rows:
        for name in features:
            if not np.isfinite(row.features[name]):
                raise UserError(
                    f"pair {row.pair_id}: {name} of the word '{row.word}' is {row.features[name]}. Score in float32."
                )
    columns = {name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in COLUMNS.items()}
    columns |= {name: pa.array([row.features[name] for row in rows], pa.float32()) for name in features}
    stream = BytesIO()
    pq.write_table(pa.table(columns), stream, compression="zstd")
    return stream.getvalue()


def from_bytes(content: bytes, features: Sequence[str]) -> Iterator[WordRow]:
    """The rows of a shard.

    Raises:
        UserError: the file is none, or not what this library writes.
    """
    try:
        table = pq.read_table(pa.BufferReader(content), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError("the words are not a Parquet file") from error
    kinds = {**COLUMNS, **dict.fromkeys(features, pa.float32())}
    if "forms" not in table.column_names:
        del kinds["forms"]
    for name, kind in kinds.items():
        if name not in table.column_names or table.schema.field(name).type != kind or table[name].null_count:
            raise UserError(f"column '{name}' of the words is missing, has empty cells, or is of another kind than {kind}")
    for row in table.select(list(kinds)).to_pylist():
        of_row = {name: row.pop(name) for name in features}
        token_ids, forms = tuple(row["token_ids"]), tuple(map(_tuple, row.get("forms", ())))
        is_written = all(map(_are_ids, (token_ids, *forms))) and (not forms or {form[0] for form in forms} == {*token_ids})
        if not is_written or row["label"] not in (REMOVED, KEPT, UNKNOWN):
            raise UserError(f"the word '{row['word']}' has token ids or a label that `catpo score` does not write")
        if not np.isfinite(list(of_row.values())).all():
            raise UserError(f"the word '{row['word']}' has a feature that is not finite")
        yield WordRow(**row | {"token_ids": token_ids, "forms": forms}, features=of_row)


def _tuple(form: Sequence[int | None] | None) -> tuple[int | None, ...]:
    return tuple(form or ())


def _are_ids(tokens: Sequence[int | None]) -> bool:
    return bool(tokens) and all(token is not None and token >= 0 for token in tokens)


def by_pictures(rows: Sequence[WordRow], features: Sequence[str]) -> dict[str, WordTable]:
    """Digest of pictures -> the words of all pairs about them. Features are the largest of any pair; a word that one pair keeps
    and another removes has no label.
    """
    grouped: dict[str, dict[str, list[WordRow]]] = {}
    for row in rows:
        grouped.setdefault(row.pictures, {}).setdefault(row.word, []).append(row)
    return {pictures: _table(words, features) for pictures, words in grouped.items()}


def _table(words: Mapping[str, Sequence[WordRow]], features: Sequence[str]) -> WordTable:
    features_of_words = [_largest(rows, features) for rows in words.values()]
    return WordTable(
        words=list(words),
        token_ids=[rows[0].token_ids for rows in words.values()],
        labels=np.array([_label(rows) for rows in words.values()], dtype=np.int8),
        features={name: np.array([each[name] for each in features_of_words]) for name in features},
        forms=[rows[0].forms for rows in words.values()],
    )


def _largest(rows: Sequence[WordRow], features: Sequence[str]) -> dict[str, float]:
    """The largest value of each feature that any of a word's rows has."""
    return {name: max(row.features[name] for row in rows) for name in features}


def _label(rows: Sequence[WordRow]) -> int:
    labels = {row.label for row in rows} - {UNKNOWN}
    return labels.pop() if len(labels) == 1 else UNKNOWN
