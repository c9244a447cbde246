"""One cell of a study: a method at one learning rate and seed, trained and evaluated in a folder of its own. Knows no table.

A cell is identified by what it does, not by the study or row it belongs to, so studies with the same output folder share cells,
pairs and reward stores. All work can be interrupted and resumed; `cell.json` is written last and marks a finished cell.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

try:
    import resource
except ImportError:  # Windows: memory is not measured
    resource = None  # type: ignore[assignment]

from catpo.core.errors import UserError
from catpo.core.registry import load, names
from catpo.core.spec import Spec, parse
from catpo.data.read import open_data
from catpo.evaluation.evaluate import evaluate
from catpo.experiments.rounds import RoundPlan, equal_parts, run_rounds, some_samples
from catpo.experiments.study.file import Row, Study, Tuning
from catpo.experiments.study.probe import FILE as PROBE
from catpo.experiments.study.probe import probe
from catpo.files.json_files import read_json, read_rows, write_json
from catpo.files.lock import lock
from catpo.files.provenance import versions
from catpo.models.devices import device_of
from catpo.pairing.pair import pair
from catpo.rewards.store import RewardStore
from catpo.scoring.score import score
from catpo.training.train import train

DONE = "cell.json"
Keep = Literal["nothing", "lent", "model"]
"""What stays of the weights of a finished cell: nothing, the model until `take_back`, or the model for good."""
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Pairs and their scores, used by all cells with the same pictures, method and seed."""

    model: str
    data: str
    method: str | None
    """None: the data set's own finished pairs."""
    seed: int
    pair: Mapping[str, Any] = field(default_factory=dict)
    score: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        pairing = parse(self.method).name if self.method else "given"
        return f"{pairing}-seed{self.seed}-{_hash(asdict(self))}"

    def folder(self, output: Path) -> Path:
        return output / "shared" / self.name

    def pairs(self, output: Path) -> str:
        return self.data if self.method is None else str(self.folder(output) / "pairs")

    def rewards(self, output: Path) -> Path:
        return self.folder(output) / "rewards"

    def is_finished(self, output: Path) -> bool:
        return _is_complete(self.rewards(output) / "store.json")

    def run(self, output: Path, *, keep: Keep = "nothing") -> None:
        """Make the pairs and the reward store, unless they exist."""
        if self.is_finished(output):
            return
        common: dict[str, Any] = {"model": self.model, "progress": False}
        if self.method is not None:
            pairs = self.folder(output) / "pairs"
            pair(data=self.data, output=pairs, method=self.method, seed=self.seed, **common, **self.pair)
        score(pairs=self.pairs(output), output=self.rewards(output), **common, **self.score)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All that determines a cell's numbers: equal cells give equal numbers."""

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
        """Readable and unique."""
        method = parse(self.objective).name if self.objective else "untrained"
        rate = f"-{self.learning_rate:.3g}" if self.learning_rate else ""
        return f"{method}{rate}-seed{self.seed}-{_hash(asdict(self))}"

    @property
    def training(self) -> str:
        """Equal for cells that train the same model and evaluate it differently; empty for those that do not lend theirs."""
        evaluation = ("benchmarks", "evaluate", "probe")
        trained = {name: value for name, value in asdict(self).items() if name not in evaluation}
        is_alone = self.objective is None or self.measure or self.rounds > 1
        return "" if is_alone else _hash(trained)

    def folder(self, output: Path) -> Path:
        return output / "cells" / self.name

    def is_finished(self, output: Path) -> bool:
        return _is_complete(self.folder(output) / DONE)

    def run(self, output: Path, *, keep: Keep = "nothing") -> None:
        """Train and evaluate, unless that is done."""
        folder = self.folder(output)
        if self.is_finished(output):
            return
        with lock(folder):
            if not (folder / DONE).exists():
                write_json(folder / DONE, {**self._measured(output, folder), "complete": False})
            _tidy(folder, keep)  # before the cell counts as finished, since nobody looks into it afterwards
            write_json(folder / DONE, {**read_json(folder / DONE), "lends": keep == "lent", "complete": True})

    def take_back(self, output: Path) -> None:
        """Remove the weights that were kept for other cells only."""
        folder = self.folder(output)
        if self.is_finished(output) and read_json(folder / DONE).get("lends"):
            _tidy(folder, "nothing")
            write_json(folder / DONE, {**read_json(folder / DONE), "lends": False})

    def _measured(self, output: Path, folder: Path) -> dict[str, Any]:
        """The content of `cell.json`: the cell itself, and the figures of its training."""
        manifest: dict[str, Any] = {"cell": asdict(self), "training": self.training, "versions": versions()}
        model, lent = self.model, None
        if self.objective is not None:
            started = time.monotonic()
            lent = self._lent(output, folder)
            model = str(lent or self._trained(output, folder))
            manifest["train_seconds"] = round(time.monotonic() - started, 2)
            manifest["figures"] = self._figures(model, lent.parent if lent else folder / "run", output, folder)
        if self.benchmarks:
            evaluate(model=model, benchmarks=self.benchmarks, output=folder / "evaluation", progress=False, **self.evaluate)
        if lent is not None:  # last, since a run without weights cannot be resumed
            shutil.copytree(lent.parent, folder / "run", ignore=lambda *_: ["model"], dirs_exist_ok=True)
        return manifest

    def _lent(self, output: Path, folder: Path) -> Path | None:
        """The model of a finished cell with the same training; None if there is none, or this cell has begun its own."""
        if not self.training or (folder / "run").exists():
            return None
        for model in output.glob("cells/*/run/model"):
            done = model.parent.parent / DONE
            told = read_json(done) if done.is_file() else {}
            if told.get("complete") and told.get("training") == self.training:
                return model
        return None

    def _trained(self, output: Path, folder: Path) -> Path:
        """Train, and return the model's folder."""
        assert self.shared is not None
        options = {"objective": self.objective, "learning_rate": self.learning_rate, **self.train}
        if self.rounds > 1:
            return self._on_policy(self.shared, folder, options)
        self.shared.run(output)
        run = train(
            pairs=self.shared.pairs(output), rewards=self.shared.rewards(output), model=self.model, output=folder / "run",
            seed=self.seed, resume=True, progress=False, **options,
        )  # fmt: skip
        return run.model

    def _on_policy(self, shared: Shared, folder: Path, train_options: Mapping[str, Any]) -> Path:
        """`catpo rounds` with the same seed in all rounds; the last run lies where that of any other cell does."""
        if shared.method is None:
            raise UserError(f"rounds={self.rounds} needs pictures that the model answers; {shared.data} has finished pairs.")
        data = open_data(shared.data)
        plans = []
        for number, samples in enumerate(equal_parts(list(data.samples()), self.rounds), start=1):
            part = some_samples(data, samples, f"{data.name}, part {number} of {self.rounds}")
            here = folder / f"round-{number}"
            run = (folder if number == self.rounds else here) / "run"
            plans.append(RoundPlan(folder=here, data=part, seed=self.seed, run=run))
        options = {"pair": {"method": shared.method, **shared.pair}, "score": shared.score, "train": train_options}
        *_, last = run_rounds(folder, plans, self.model, options, progress=False)
        return last.model

    def _figures(self, model: str, log: Path, output: Path, folder: Path) -> dict[str, float]:
        """Figures of the training itself: learned coefficients, time and memory, log-probs of some pairs."""
        run = read_json(log / "catpo.json", made_by="catpo study")
        device = device_of(self.train.get("device"))
        figures = {f"learned/{signal}": value for signal, value in run.get("learned_fusion", {}).items()}
        if self.measure:
            speed = read_rows(log / "metrics.jsonl")[-1].get("train_samples_per_second")
            if speed:  # none if the training was interrupted after its last step: nothing was left to measure
                figures |= {"cost/seconds_per_pair": 1 / speed, "cost/memory": peak_mebibytes(device)}
        if self.probe and self.shared is not None and self.rounds == 1:
            store = RewardStore.open(self.shared.rewards(output))
            scored = set(store.pair_ids)
            pairs = [pair for pair in open_data(self.shared.pairs(output)).pairs() if pair.id in scored]
            figures |= probe(model, store, spread_over(pairs, self.probe), folder / PROBE, device)
        return figures


def lenders(cells: Sequence[Cell]) -> list[Cell]:
    """The cells whose training is that of another one, too."""
    counts = Counter(cell.training for cell in cells)
    return [cell for cell in cells if cell.training and counts[cell.training] > 1]


def spread_over(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items at equal distances.

    >>> spread_over(range(10), 4)
    [0, 2, 5, 7]
    """
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def peak_mebibytes(device: torch.device | None = None) -> float:
    """Peak memory of this process on a GPU (by default, if there is one), or on the machine."""
    device = device or device_of(None)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def cell_of(study: Study, row: Row, rate: float, *, seed: int, tuning: Tuning | None = None) -> Cell:
    """A row's cell at a learning rate and seed; with `tuning`, on the pictures that rates are chosen by."""
    benchmarks = study.benchmarks if tuning is None else tuning.benchmarks
    common: dict[str, Any] = {
        "model": study.model, "benchmarks": benchmarks, "measure": study.measure,
        "evaluate": {**study.evaluate, **row.evaluate},
    }  # fmt: skip
    if row.objective is None:  # the same for all seeds
        return Cell(shared=None, objective=None, learning_rate=None, seed=0, **common)
    return Cell(
        shared=shared_of(study, row, seed=seed, tuning=tuning),
        objective=str(parse(row.objective)),
        learning_rate=rate,
        seed=seed,
        train=study.training(row),
        rounds=row.rounds,
        probe=study.probe if tuning is None else 0,
        **common,
    )


def shared_of(study: Study, row: Row, *, seed: int, tuning: Tuning | None = None) -> Shared:
    """The pairs that a row is trained on."""
    data = with_seed(tuning.data if tuning and tuning.data else study.data, seed)
    method = row.method or (study.method if has_samples(data) else None)
    return Shared(
        model=study.model, data=data, method=None if method is None else str(parse(method)), seed=seed, pair=study.pair,
        score=study.score,
    )  # fmt: skip


def with_seed(data: str, seed: int) -> str:
    """The data set with its option `seed` set, if it has one that is not given, so that each seed has its own pictures.

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
    """Whether a data set has pictures to answer rather than finished pairs."""
    try:
        next(iter(open_data(data).samples()))
    except UserError:
        next(iter(open_data(data).pairs()))  # raises where it has neither
        return False
    except StopIteration:
        raise UserError(f"{data} holds nothing.") from None
    return True


def _is_complete(path: Path) -> bool:
    return path.is_file() and bool(read_json(path).get("complete"))


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def _tidy(folder: Path, keep: Keep) -> None:
    """Remove what no table or figure reads: optimiser states, and weights unless they are kept."""
    unneeded = ["run/checkpoints", "round-*/run/checkpoints"]
    if keep == "nothing":  # round-*/model: an adapter merged into its base model
        unneeded += ["run/model", "round-*/run/model", "round-*/model"]
    for pattern in unneeded:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
