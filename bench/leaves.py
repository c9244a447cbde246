"""Work of one measured process on rows with several leaves: ranked answers to a prompt, and questions beside a pair.

A peer that begins with `alone` reads every pair, or every question, in a row of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from bench.shapes import WORDS, Shape, make_pairs, make_ranked
from catpo.core.spec import Spec
from catpo.core.types import PreferencePair, Side
from catpo.models import questions
from catpo.models.family import Encoded, Family
from catpo.scoring.forward import PairScorer, TeacherForced
from catpo.scoring.settings import PAPER_SETTINGS, ScoreSettings

ALONE = "alone"
RANKED_PAIRS = 6
"""Pairs of four ranked answers."""
QUESTIONS = 12
"""About each pair's picture."""


def pairs_for(work: str, shape: Shape, count: int) -> list[PreferencePair]:
    """So many pairs for a kind of work."""
    return make_ranked(shape, count // RANKED_PAIRS) if work == "ranked" else make_pairs(shape, count)


def questions_of(pair: PreferencePair) -> list[str]:
    """Different ones of about 15 tokens with what the template puts behind them, as "Is there a dog in the image?" has."""
    return [" ".join(WORDS[number : number + 4]) for number in range(QUESTIONS)]


OBJECTS = 8
"""Words that the signal self_question asks about; a pair of the built-in pictures names six things, on average."""


def self_question(folder: Path) -> ScoreSettings:
    """The paper's signals and the model's answers about a pair's objects, in questions of about 15 tokens."""
    file = folder / "objects.json"
    file.write_text(json.dumps({word: word for word in WORDS[:OBJECTS]}))
    options = {"nouns": str(file), "wordings": {"objects": f"{WORDS[0]} {WORDS[1]} {{}}"}}
    return replace(PAPER_SETTINGS, signals=(*PAPER_SETTINGS.signals, Spec("self_question", options)))


@contextmanager
def sharing(trainer: str) -> Iterator[None]:
    """Inside, an `alone` peer shares no row among pairs or questions."""
    if not trainer.startswith(ALONE):
        yield
        return
    with mock.patch.object(Family, "encode_all", _one_by_one), mock.patch.object(questions, "_beside", return_value=None):
        yield


def _one_by_one(family: Family, pairs: Sequence[PreferencePair], *, max_length: int | None = None) -> list[Encoded]:
    return [family.encode(pair, max_length=max_length) for pair in pairs]


@contextmanager
def answers_kept(family: Family) -> Iterator[list[float]]:
    """Inside, scoring reads the answers to questions beside the pairs, as a signal would, into the list."""
    kept: list[float] = []
    words, read = questions.YesNo.of(family), PairScorer._read

    def read_answers(scorer: PairScorer, run: TeacherForced, index: int, side: Side) -> dict[str, Any]:
        if side == "chosen":
            kept.extend(map(float, run.evidence(index, side).answers(words).values()))
        return read(scorer, run, index, side)

    with mock.patch.object(PairScorer, "_read", read_answers):
        yield kept
