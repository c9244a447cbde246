"""Tokens as people read them: merged to words, without control characters. Knows no model and no page."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

LABELS = {1: "grounded", 0: "hallucinated"}
"""Labels of tokens in a reward store; -1 means no label."""
SPACELESS = ("CJK ", "HIRAGANA", "KATAKANA", "THAI", "LAO ", "KHMER", "MYANMAR", "TIBETAN")
"""How Unicode names of scripts without spaces begin; there, a token is a word."""


@dataclass(frozen=True)
class Word:
    """Tokens `first` … `end` - 1 of a response, shown as one word."""

    first: int
    end: int
    space: str
    """White space before it."""
    text: str
    label: str
    """grounded, hallucinated, or empty; a word with one hallucinated token is hallucinated."""
    is_special: bool
    """An end-of-sequence or other token that is not text."""


def words(pieces: Sequence[str], is_special: Sequence[bool] | NDArray[np.bool_], labels: ArrayLike | None = None) -> list[Word]:
    """The words of a response; each token is in exactly one, and spaces and texts joined give the response.

    A word begins at white space, where letters meet other signs, and at a special token.

    >>> [word.text for word in words([" An", " um", "brella", ",", " a", " cat", ".", ""], [False] * 7 + [True])]
    ['An', 'umbrella', ',', 'a', 'cat', '.', '']
    """
    starts: list[int] = []
    for token, piece in enumerate(pieces):
        before = "".join(pieces[starts[-1] : token]) if starts else ""
        if not token or is_special[token] or is_special[token - 1] or _begins(before, piece):
            starts.append(token)
    labels = np.full(len(pieces), -1) if labels is None else np.asarray(labels)
    merged = []
    for first, end in pairwise([*starts, len(pieces)]):
        text = "".join(pieces[first:end])
        body = text.lstrip()
        within = set(labels[first:end].tolist())
        label = next((LABELS[kind] for kind in (0, 1) if kind in within), "")
        merged.append(Word(first, end, text[: len(text) - len(body)], body, label, bool(is_special[first])))
    return merged


def _begins(word: str, piece: str) -> bool:
    """Whether a piece begins a new word after `word`; white space alone belongs to the word after it."""
    if not piece or not word.strip():
        return False
    if piece[0].isspace() or word[-1].isspace():
        return True
    if unicodedata.category(piece[0]) in ("Mn", "Mc", "Me", "Cf"):
        return False
    return _is_letter(piece[0]) != _is_letter(word[-1]) or unicodedata.name(piece[0], "").startswith(SPACELESS)


def _is_letter(sign: str) -> bool:
    return unicodedata.category(sign)[0] in "LMN" or unicodedata.category(sign) == "Cf"


def merge(values: ArrayLike, merged: Sequence[Word], how: Literal["mean", "max"] = "mean") -> NDArray[np.float64]:
    """One value per word from one per token: [tokens] -> [words].

    >>> merge([1.0, 2.0, 4.0], words([" a", " um", "brella"], [False] * 3))
    array([1., 3.])
    """
    values = np.asarray(values, dtype=np.float64)
    pool = np.max if how == "max" else np.mean
    return np.array([pool(values[word.first : word.end]) for word in merged])


def plain(text: str) -> str:
    r"""The text without what a terminal acts on: control characters, and marks that change the writing direction.

    >>> plain("a\x1b[31mb\u202ec\n")
    'a[31mbc\n'
    """
    return "".join(sign for sign in text if sign == "\n" or not _is_active(sign))


def _is_active(sign: str) -> bool:
    # U+200D joins emoji and U+FE0F selects their coloured form; both are harmless
    return unicodedata.category(sign) in ("Cc", "Cs", "Co", "Zl", "Zp") or (
        unicodedata.category(sign) == "Cf" and sign != "\u200d"
    )
