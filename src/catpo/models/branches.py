"""Answers to prompts that have been read as trees: every answer is a branch, written token by token beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from catpo.models.decoding import forbidding, longest_forbidden
from catpo.models.forest import FIRST_PROMPT, NOBODY, Forest
from catpo.models.steering import Steering
from catpo.models.tensors import pad_indices, text_hash
from catpo.models.views import View


@dataclass(frozen=True)
class Writing:
    """How answers are written."""

    max_new_tokens: int
    stops: Sequence[int]
    temperature: float
    top_p: float
    seed: int | str
    batch_size: int
    steering: Steering | None = None
    """Makes of the model's scores those from which tokens are chosen."""
    view: View | None = None
    """Of the pictures, behind which the steering reads the same answers."""

    def seed_of(self, name: str) -> int:
        """The seed of a batch whose first sample is called so."""
        return int(text_hash(f"{self.seed}/{name}")[:15], 16)


@dataclass
class Branch:
    """An answer as it is written."""

    before: Sequence[int]
    """The tokens that it follows, the prompt's first; the last one has not been read yet."""
    number: int = 0
    """Of its sample, among those that are answered."""
    parent: int = FIRST_PROMPT
    """The node of the tokens before, in the row's tree."""
    node: int = NOBODY
    """The answer's own node, once it is being written."""
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    """The model's own log-prob of each token, before steering, temperature and top-p."""

    @property
    def last(self) -> int:
        """The token that is read next."""
        return self.ids[-1] if self.ids else self.before[-1]

    def context(self, count: int) -> list[int]:
        """The last `count` tokens before, and the answer."""
        return [*self.before[len(self.before) - count :], *self.ids]


def write(forest: Forest, branches: Sequence[Sequence[Branch]], writing: Writing, seed: int, *, keeps: bool = False) -> None:
    """Write the answers that begin in each row of a forest. Their order decides which random numbers they get.

    With `keeps`, the forest's rows stay as they are, so that further branches can follow; else it is of no use afterwards.
    """
    rows = [list(row) for row in branches] if keeps else _rows(forest, branches, writing)
    parents = pad_indices([[branch.parent for branch in row] for row in rows], fill=NOBODY)
    nodes = forest.branch(parents.to(forest.owner.device)).tolist()
    for of_row, row in zip(nodes, rows, strict=True):
        for branch, node in zip(row, of_row, strict=False):  # the longest row has as many branches as there are new nodes
            branch.node = node
    pick = _Picker(forest, [*chain.from_iterable(branches)], writing, seed)
    for _ in range(writing.max_new_tokens):
        beside = None if forest.beside is None else _grown(forest.beside, rows)
        pick([*chain.from_iterable(rows)], _grown(forest, rows), beside)
        rows = [[branch for branch in row if branch.ids[-1] not in pick.stops] for row in rows]
        if not any(rows):
            break
        rows = rows if keeps else _without_finished(forest, rows)


Rows = list[list[Branch]]
"""Of each row of a forest, the branches that are being written."""


def _rows(forest: Forest, branches: Sequence[Sequence[Branch]], writing: Writing) -> Rows:
    """Branches beside one another skip each other's keys: a row takes no more than are worth a copy of its tree."""
    widest = 1 + forest.length // writing.max_new_tokens
    sources: list[int] = []
    rows: Rows = []
    for source, of_tree in enumerate(branches):
        parts = -(-len(of_tree) // widest)
        width = -(-len(of_tree) // parts)
        rows += [[*of_tree[start : start + width]] for start in range(0, len(of_tree), width)]
        sources += [source] * (len(rows) - len(sources))
    forest.keep_rows(sources)
    return rows


def _grown(forest: Forest, rows: Rows) -> Float[Tensor, "branches vocabulary"]:
    """Logits behind the last token of each branch, row by row."""
    device = forest.owner.device
    nodes = pad_indices([[branch.node for branch in row] for row in rows], fill=NOBODY).to(device)
    logits = forest.grow(nodes, pad_indices([[branch.last for branch in row] for row in rows], fill=0).to(device))
    return logits[nodes.to(logits.device) != NOBODY].float()


def _without_finished(forest: Forest, rows: Rows) -> Rows:
    """Rows without an open branch leave the batch when they are half of it: leaving costs a copy of the others."""
    left = [number for number, row in enumerate(rows) if row]
    if 2 * len(left) > len(rows):
        return rows
    forest.keep_rows(left)
    return [rows[number] for number in left]


class _Picker:
    """Chooses the next token of branches: the most likely one, or one drawn."""

    def __init__(self, forest: Forest, branches: Sequence[Branch], writing: Writing, seed: int) -> None:
        model = forest.family.unwrapped
        self.stops, self.steering = {*writing.stops}, writing.steering
        self.shown = longest_forbidden(model)
        self.forbidding = forbidding(model, begin=self.shown, stops=[*writing.stops])
        self.warping = LogitsProcessorList()
        if writing.temperature not in (0, 1):
            self.warping.append(TemperatureLogitsWarper(writing.temperature))
        if writing.top_p < 1:
            self.warping.append(TopPLogitsWarper(writing.top_p))
        self.generator = None if writing.temperature == 0 else torch.Generator(forest.owner.device).manual_seed(seed)
        self.number = {id(branch): number for number, branch in enumerate(branches)}

    def __call__(
        self, branches: Sequence[Branch], logits: Float[Tensor, "branches vocabulary"], beside: Tensor | None = None
    ) -> None:
        """Append a token to each branch; `beside` are the logits behind another view of the pictures."""
        shown = torch.tensor([branch.context(self.shown) for branch in branches] if self.forbidding else [[]])
        scores = self.forbidding(shown.to(logits.device), logits)
        logps = scores.log_softmax(-1)
        if self.steering is not None:
            scores = self.steering([branch.number for branch in branches], scores, beside)
        ids = scores.argmax(-1) if self.generator is None else self._drawn(branches, self.warping(shown, scores).softmax(-1))
        of_ids = logps.gather(1, ids[:, None])[:, 0]
        for branch, token, logp in zip(branches, ids.tolist(), of_ids.tolist(), strict=True):
            branch.ids.append(token)
            branch.logps.append(logp)

    def _drawn(
        self, branches: Sequence[Branch], probabilities: Float[Tensor, "branches vocabulary"]
    ) -> Int[Tensor, " branches"]:
        """As torch.multinomial draws from all branches at once, so that nobody's draws depend on who has finished."""
        waits = probabilities.new_empty(len(self.number), probabilities.shape[1]).exponential_(generator=self.generator)
        numbers = torch.tensor([self.number[id(branch)] for branch in branches], device=waits.device)
        return (probabilities / waits[numbers]).argmax(-1)
