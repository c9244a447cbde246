"""Answers that a model goes on with: what it has read and written stays in its cache from sentence to sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from catpo.core.types import Sample
from catpo.models import memory, reading
from catpo.models.branches import Branch, Writing, write
from catpo.models.forest import Forest

if TYPE_CHECKING:
    from catpo.models.family import Family


@dataclass(frozen=True)
class _Place:
    """Where an answer goes on."""

    row: int
    node: int
    before: Sequence[int]


class Kept:
    """The trees of some samples, for as long as their answers grow; `next_sentences` fills and uses it.

    Sentences follow the tokens that the model wrote, which are not always those that a tokenizer makes of their text.
    """

    def __init__(self) -> None:
        self._forest: Forest | None = None
        self._places: dict[tuple[str, str], _Place] = {}
        """(Sample's id, beginning of an answer) -> where the answer goes on."""

    def write(
        self, family: Family, samples: Sequence[Sample], texts: Sequence[str], starts: Sequence[str], writing: Writing
    ) -> list[Branch] | None:
        """What follows each beginning of an answer; None if these have not been written here, or share no prompt."""
        if self._forest is None and not any(starts):
            self._read(family, samples, texts, writing)
        keys = [(sample.id, start) for sample, start in zip(samples, starts, strict=True)]
        if self._forest is None or any(key not in self._places for key in keys):
            return None
        self._forget_all_but(keys)
        places = [self._places[key] for key in keys]
        branches = [Branch(place.before, number, place.node) for number, place in enumerate(places)]
        rows: list[list[Branch]] = [[] for _ in range(len(self._forest))]
        for place, branch in zip(places, branches, strict=True):
            rows[place.row].append(branch)
        doing = f"writing {len(keys)} sentences at once"
        with memory.explained(doing, family.model, advice=memory.ANSWERING), family.recordable_attention():
            write(self._forest, rows, writing, writing.seed_of(samples[0].id), keeps=True)
        return branches

    def remember(self, sample: Sample, before: str, branch: Branch, text: str) -> None:
        """An answer that began with `before` has been continued to `text`."""
        row = self._places[sample.id, before].row
        self._places.setdefault((sample.id, text), _Place(row, branch.node, [*branch.before, *branch.ids]))

    def _read(self, family: Family, samples: Sequence[Sample], texts: Sequence[str], writing: Writing) -> None:
        if not reading.can_share(family):
            return
        (groups,) = reading.batches(samples, len(samples))
        found = [reading.read(family, samples, texts, group, writing.view) for group in groups]
        readings = [each for each in found if each is not None]
        if len(readings) < len(found):
            return
        doing = f"reading the prompts of {len(groups)} pictures at once"
        with memory.explained(doing, family.model, advice=memory.ANSWERING), family.recordable_attention():
            self._forest = reading.forest_of(family, readings)
        for row, each in enumerate(readings):
            for number, branch in zip(each.group, each.branches, strict=True):
                self._places[samples[number].id, ""] = _Place(row, branch.parent, branch.before)

    def _forget_all_but(self, keys: Sequence[tuple[str, str]]) -> None:
        """Drop the rows and tokens of answers that do not go on."""
        forest = self._forest
        assert forest is not None
        places = {key: self._places[key] for key in keys}
        rows = sorted({place.row for place in places.values()})
        forest.keep_rows(rows)
        self._places = {key: _Place(rows.index(place.row), place.node, place.before) for key, place in places.items()}
        nodes = torch.zeros_like(forest.count, dtype=torch.bool)
        for place in self._places.values():
            nodes[place.row, place.node] = True
        forest.prune(nodes)
