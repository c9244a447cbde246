"""One cell of a study: a method at one rate and seed, trained and evaluated in a folder of its own. Knows no table.

A cell is known by what it does, not by the study or row it belongs to: studies with the same output folder share cells, pairs
and reward stores. Everything can be killed and goes on; `cell.json` is written last and stands for a finished cell.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

try:
    import resource
except ImportError:  # Windows: memory is not measured
    resource = None  # type: ignore[assignment]

from catpo.core.errors import UserError
from catpo.core.registry import load, names
from catpo.core.spec import Spec, parse
from catpo.core.types import Sample
from catpo.data.datasets import Dataset
from catpo.data.read import open_data
from catpo.evaluation.evaluate import evaluate
from catpo.experiments.study.file import Row, Study, Tuning
from catpo.experiments.study.probe import FILE as PROBE
from catpo.experiments.study.probe import probe
from catpo.files.json_files import read_json, read_rows, write_json
from catpo.files.lock import lock
from catpo.files.provenance import versions
from catpo.pairing.pair import pair
from catpo.rewards.store import RewardStore
from catpo.scoring.score import score
from catpo.training.train import train

DONE = "cell.json"
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Pairs and their scores, which all cells with the same pictures, method and seed use."""

    model: str
    data: str
    method: str | None
    """None: the data set's own finished pairs."""
    seed: int
    pair: Mapping[str, Any] = field(default_factory=dict)
    score: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        made_by = parse(self.method).name if self.method else "given"
        return f"{made_by}-seed{self.seed}-{_hash(asdict(self))}"

    def folder(self, output: Path) -> Path:
        return output / "shared" / self.name

    def is_finished(self, output: Path) -> bool:
        return is_complete(self.rewards(output) / "store.json")

    def run(self, output: Path, *, keep_model: bool = False) -> None:
        """The pairs, and the reward store; what is there is not made again."""
        if self.is_finished(output):
            return
        folder = self.folder(output)
        if self.method is not None:
            pair(
                model=self.model, data=self.data, output=folder / "pairs", method=self.method, seed=self.seed, progress=False,
                **self.pair,
            )  # fmt: skip
        score(pairs=self.pairs(output), model=self.model, output=self.rewards(output), progress=False, **self.score)

    def pairs(self, output: Path) -> str:
        """Where the pairs are."""
        return self.data if self.method is None else str(self.folder(output) / "pairs")

    def rewards(self, output: Path) -> Path:
        return self.folder(output) / "rewards"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is done, in full: the same cell gives the same numbers."""

    shared: Shared | None
    """None where nothing is trained."""
    model: str
    objective: str | None
    learning_rate: float | None
    seed: int
    train: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 1
    benchmarks: tuple[str, ...] = ()
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    probe: int = 0
    measure: bool = False

    @property
    def name(self) -> str:
        """Readable, and unlike that of any other cell."""
        what = parse(self.objective).name if self.objective else "untrained"
        rate = f"-{self.learning_rate:.3g}" if self.learning_rate else ""
        return f"{what}{rate}-seed{self.seed}-{_hash(asdict(self))}"

    def folder(self, output: Path) -> Path:
        return output / "cells" / self.name

    def is_finished(self, output: Path) -> bool:
        return is_complete(self.folder(output) / DONE)

    def run(self, output: Path, *, keep_model: bool = False) -> None:
        """Train and evaluate; what is done already is not done again."""
        folder = self.folder(output)
        if self.is_finished(output):
            return
        with lock(folder):
            if not (folder / DONE).exists():
                write_json(folder / DONE, {**self._measured(output, folder), "complete": False})
            _tidy(folder, keep_model)  # before the cell counts as finished, since nobody looks into it afterwards
            write_json(folder / DONE, {**read_json(folder / DONE), "complete": True})

    def _measured(self, output: Path, folder: Path) -> dict[str, Any]:
        """What the cell is, and what training and evaluation say of themselves."""
        about: dict[str, Any] = {"cell": asdict(self), "versions": versions()}
        model = self.model
        if self.objective is not None:
            began = time.monotonic()
            model = str(self._trained(output, folder))
            about["train_seconds"] = round(time.monotonic() - began, 2)
            about["figures"] = self._figures(Path(model), output, folder)
        if self.benchmarks:
            evaluate(model=model, benchmarks=self.benchmarks, output=folder / "evaluation", progress=False, **self.evaluate)
        return about

    def _trained(self, output: Path, folder: Path) -> Path:
        """The trained model."""
        assert self.shared is not None
        if self.rounds > 1:
            return self._on_policy(self.shared, folder)
        self.shared.run(output)
        return self._train(self.model, self.shared.pairs(output), self.shared.rewards(output), folder / "run")

    def _on_policy(self, shared: Shared, folder: Path) -> Path:
        """Each round's pictures are answered, and its pairs scored, by the model that the last round made."""
        if shared.method is None:
            raise UserError(f"rounds={self.rounds} needs pictures that the model answers; {shared.data} has finished pairs.")
        model: str | Path = self.model
        for number in range(1, self.rounds + 1):
            here = folder if number == self.rounds else folder / f"round-{number}"
            part = _Part(open_data(shared.data), number, self.rounds)
            pairs, rewards = (folder / f"round-{number}" / name for name in ("pairs", "rewards"))
            if not is_complete(pairs / "pairs.json"):
                pair(
                    model=model, data=part, output=pairs, method=shared.method, seed=self.seed, progress=False, **shared.pair
                )  # fmt: skip
            score(pairs=pairs, model=model, output=rewards, progress=False, **shared.score)
            model = self._train(model, str(pairs), rewards, here / "run")
        return Path(model)

    def _figures(self, model: Path, output: Path, folder: Path) -> dict[str, float]:
        """What training itself has to say: learned coefficients, log-probs of some pairs, time and memory."""
        about = read_json(folder / "run" / "catpo.json", made_by="catpo study")
        figures = {f"learned/{signal}": value for signal, value in about.get("learned_fusion", {}).items()}
        if self.measure:
            last = read_rows(folder / "run" / "metrics.jsonl")[-1]
            figures |= {"cost/seconds_per_pair": 1 / last["train_samples_per_second"], "cost/memory": peak_mebibytes()}
        if self.probe and self.shared is not None and self.rounds == 1:
            store = RewardStore.open(self.shared.rewards(output))
            scored = set(store.pair_ids)
            pairs = spread_over(
                [each for each in open_data(self.shared.pairs(output)).pairs() if each.id in scored], self.probe
            )
            figures |= probe(model, store, pairs, folder / PROBE)
        return figures

    def _train(self, model: str | Path, pairs: str, rewards: Path, output: Path) -> Path:
        assert self.objective is not None
        assert self.learning_rate is not None
        return train(
            pairs=pairs, model=model, output=output, rewards=rewards, objective=self.objective,
            learning_rate=self.learning_rate, seed=self.seed, resume=True, progress=False, **self.train,
        ).model  # fmt: skip


def spread_over(items: Sequence[Made], count: int) -> list[Made]:
    """So many items at equal distances.

    >>> spread_over(range(10), 4)
    [0, 2, 5, 7]
    """
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def peak_mebibytes() -> float:
    """The most memory that this process has held, on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class _Part(Dataset):
    """One of so many equal parts of a data set's samples."""

    def __init__(self, whole: Dataset, number: int, count: int) -> None:
        self.whole, self.number, self.count = whole, number, count
        self.name, self.vocabulary = f"{whole.name}, part {number} of {count}", whole.vocabulary

    def samples(self) -> Iterator[Sample]:
        every = list(self.whole.samples())
        return iter(every[len(every) * (self.number - 1) // self.count : len(every) * self.number // self.count])


def cell_of(study: Study, row: Row, rate: float, *, seed: int, tuning: Tuning | None = None) -> Cell:
    """A row's cell at a rate and seed; with `tuning`, on the pictures that rates are chosen by."""
    benchmarks = study.benchmarks if tuning is None else tuning.benchmarks
    if row.objective is None:  # the same whatever the seed
        return Cell(
            shared=None, model=study.model, objective=None, learning_rate=None, seed=0, benchmarks=benchmarks,
            evaluate=study.evaluate, measure=study.measure,
        )  # fmt: skip
    return Cell(
        shared=shared_of(study, row, seed=seed, tuning=tuning),
        model=study.model,
        objective=str(parse(row.objective)),
        learning_rate=rate,
        seed=seed,
        train=study.training(row),
        rounds=row.rounds,
        benchmarks=benchmarks,
        evaluate=study.evaluate,
        probe=study.probe if tuning is None else 0,
        measure=study.measure,
    )


def shared_of(study: Study, row: Row, *, seed: int, tuning: Tuning | None = None) -> Shared:
    """The pairs that a row is trained on."""
    given = study.data if tuning is None or tuning.data is None else tuning.data
    data = with_seed(given, seed)
    method = row.method or (study.method if has_samples(data) else None)
    return Shared(
        model=study.model, data=data, method=None if method is None else str(parse(method)), seed=seed, pair=study.pair,
        score=study.score,
    )  # fmt: skip


def with_seed(data: str, seed: int) -> str:
    """A data set's text with its option `seed`, if it has one and none is given: each seed has pictures of its own.

    >>> with_seed("scenes(count=3)", 1), with_seed("scenes(seed=7)", 1), with_seed("photos/train", 1)
    ('scenes(count=3, seed=1)', 'scenes(seed=7)', 'photos/train')
    """
    try:
        spec = parse(data)
    except UserError:  # a path
        return data
    if spec.name not in names("datasets") or "seed" in spec.options:
        return data
    takes_seed = "seed" in inspect.signature(load("datasets", spec.name)).parameters
    return str(Spec(spec.name, {**spec.options, "seed": seed})) if takes_seed else data


@lru_cache
def has_samples(data: str) -> bool:
    """Whether a data set has pictures to answer; otherwise it has finished pairs."""
    try:
        next(iter(open_data(data).samples()))
    except UserError:
        next(iter(open_data(data).pairs()))  # complains where it has neither
        return False
    except StopIteration:
        raise UserError(f"{data} holds nothing.") from None
    return True


def is_complete(path: Path) -> bool:
    """Whether a description was written and says that all is there."""
    return path.is_file() and bool(read_json(path).get("complete"))


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def _tidy(folder: Path, keep_model: bool) -> None:
    """Remove what no table or figure reads: optimiser states, and weights unless they are kept."""
    for run in (folder / "run", *folder.glob("round-*/run")):
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        if not keep_model:
            shutil.rmtree(run / "model", ignore_errors=True)
