"""`catpo rounds`: pair, score, train, then again with the trained model: on-policy training.

Only calls the other commands. Each of them can be interrupted and resumed, so the loop can be as well. A round is a folder:
pairs/, rewards/, run/, and model/ where an adapter was merged into the model that answers in the next round.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.core.spec import check_options, parse
from catpo.core.types import Sample
from catpo.data.datasets import Dataset
from catpo.data.read import open_data
from catpo.files.json_files import append_rows, read_json, read_rows, repair_rows, write_json
from catpo.files.lock import lock
from catpo.files.provenance import check_same, versions
from catpo.models import loading
from catpo.pairing.pair import pair as make_pairs
from catpo.scoring.score import score as score_pairs
from catpo.training.train import train as train_model

ABOUT, DONE = "rounds.json", "rounds.jsonl"
ROUND = {"round": int, "model": str, "asked": int, "pairs": int, "accuracy": float | None}
"""A row of `DONE`."""
ACCURACY = "rewards/accuracies"
STEPS: dict[str, Callable[..., Any]] = {"pair": make_pairs, "score": score_pairs, "train": train_model}
SET_BY_LOOP = {
    "pair": frozenset({"model", "data", "output", "adapter", "seed", "limit", "progress"}),
    "score": frozenset({"pairs", "model", "output", "adapter", "limit", "progress"}),
    "train": frozenset({"pairs", "model", "output", "rewards", "resume", "seed", "limit", "progress"}),
}
"""Command -> its options that the loop sets itself."""
Options = Mapping[str, Mapping[str, Any]]
"""Command (pair, score, train) -> its options."""


@dataclass(frozen=True)
class Round:
    """The outcome of a round."""

    number: int
    """From 1."""
    folder: Path
    model: Path
    """The trained model."""
    asked: int
    pairs: int
    accuracy: float | None
    """Share of pairs whose chosen response the model prefers, at the end of training."""

    def __str__(self) -> str:
        learned = "" if self.accuracy is None else f", prefers the chosen of {self.accuracy:.0%}"
        return f"Round {self.number}: {self.pairs} pairs of {self.asked} answers{learned}. Model: {self.model}"


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """What a round works on, and where it writes."""

    folder: Path
    data: Dataset
    seed: int
    """Of sampling and training."""
    run: Path
    """Folder of the training run."""


def rounds(
    *,
    output: str | Path,
    model: str | Path | None = None,
    data: str | Path | Dataset | None = None,
    rounds: int = 3,
    fresh: bool = False,
    method: str | None = None,
    judge: str | None = None,
    objective: str | None = None,
    pair: str = "",
    score: str = "",
    train: str = "",
    limit: int | None = None,
    seed: int = 0,
    steps: Options | None = None,
    progress: bool = True,
) -> list[Round]:
    """Train on-policy: a model answers, is trained on pairs of its answers, and answers again; prints a line per round.

    The reference of each round is the model that answered. An interrupted run resumes where it stopped.

    The options are those of `catpo rounds` (see `catpo.config.options.RoundsOptions`); `steps` has further options by command,
    as the sections of a recipe do, and yields to the others.

    Raises:
        UserError: an option is missing or wrong, the output was created with other options, or a step fails.
    """
    recipe = steps or {}
    options = _options(recipe, {"pair": pair, "score": score, "train": train})
    options["pair"] |= {name: value for name, value in {"method": method, "judge": judge}.items() if value is not None}
    options["train"] |= {} if objective is None else {"objective": objective}
    section = recipe.get("pair", {})
    model, data = _required("model", model, section), _required("data", data, section)
    limit = section.get("limit") if limit is None else limit
    parts = _parts(data, rounds, fresh, limit)
    settings: dict[str, Any] = {
        "model": model, "data": data, "rounds": rounds, "fresh": fresh, "limit": limit, "seed": seed, "options": options,
    }  # fmt: skip
    settings = json.loads(json.dumps(settings, default=str))  # as they are read back in a later run
    with lock(output) as folder:
        if (folder / ABOUT).exists():
            old = read_json(folder / ABOUT, made_by="catpo rounds", fields={"settings": dict})
            check_same(old["settings"], settings, where=folder, ignore=["rounds"])
        write_json(folder / ABOUT, {"format": 1, "settings": settings, "versions": versions()})
        folders = [folder / f"round-{number + 1}" for number in range(rounds)]
        plans = [
            RoundPlan(folder=here, data=part, seed=seed + number, run=here / "run")
            for number, (here, part) in enumerate(zip(folders, parts, strict=True))
        ]
        outcomes = []
        for outcome in run_rounds(folder, plans, model, options, progress=progress):
            print(outcome, flush=True)
            outcomes.append(outcome)
        return outcomes


def run_rounds(
    folder: Path, plans: Sequence[RoundPlan], model: str | Path, options: Options, *, progress: bool
) -> Iterator[Round]:
    """Run the rounds that are not finished, one after the other, each with the model of the one before; yields every round.

    Args:
        folder: for the list of finished rounds; locked by the caller.
        plans: one per round.
        model: that answers in the first round.
        options: of the three commands.
        progress: show progress on stderr.
    """
    finished = [_from_row(folder, row) for row in repair_rows(folder / DONE, ROUND)]
    for number, plan in enumerate(plans, start=1):
        if number <= len(finished):
            outcome = finished[number - 1]
        else:
            outcome = _run_round(number, plan, model, options, progress)
            append_rows(folder / DONE, [_as_row(folder, outcome)])
        yield outcome
        model = outcome.model


def _run_round(number: int, plan: RoundPlan, model: str | Path, options: Options, progress: bool) -> Round:
    """Pairs, scores and training; a command that has finished in this folder does nothing again."""
    pairs, rewards = plan.folder / "pairs", plan.folder / "rewards"
    common: dict[str, Any] = {"model": model, "progress": progress}
    paired = make_pairs(data=plan.data, output=pairs, seed=plan.seed, **common, **options["pair"])
    score_pairs(pairs=pairs, output=rewards, **common, **options["score"])
    run = train_model(
        pairs=pairs, rewards=rewards, output=plan.run, resume=True, seed=plan.seed, **common, **options["train"]
    )  # fmt: skip
    whole = _merged(run.model, plan.folder / "model")
    return Round(number, plan.folder, whole, paired.asked, paired.kept, _accuracy(plan.run))


def _merged(trained: Path, target: Path) -> Path:
    """The trained model without an adapter: as it is, or with its adapter merged into the weights."""
    if not (trained / "adapter_config.json").exists():
        return trained
    if not target.exists():
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        family = loading.load(trained, device="cpu")
        with loading.quiet():
            family.model.merge_and_unload().save_pretrained(part)
        family.processor.save_pretrained(part)
        part.rename(target)
    return target


def _accuracy(run: Path) -> float | None:
    values = [row[ACCURACY] for row in read_rows(run / "metrics.jsonl") if ACCURACY in row]
    return values[-1] if values else None


class SomeSamples(Dataset):
    """Some samples of a data set, with its words and, unless another is given, its name."""

    def __init__(self, whole: Dataset, samples: Sequence[Sample], name: str | None = None) -> None:
        self.name, self.vocabulary, self._samples = name or whole.name, whole.vocabulary, samples

    def samples(self) -> Iterator[Sample]:
        return iter(self._samples)


def equal_parts(samples: Sequence[Sample], count: int) -> list[Sequence[Sample]]:
    """The samples in their order, split into parts whose sizes differ by one at most."""
    ends = [len(samples) * number // count for number in range(count + 1)]
    return [samples[start:end] for start, end in pairwise(ends)]


def _parts(data: str | Path | Dataset, rounds: int, fresh: bool, limit: int | None) -> list[SomeSamples]:
    """The samples of each round."""
    if rounds < 1 or (limit is not None and limit < 1):
        raise UserError(f"rounds={rounds}, limit={limit}: both must be 1 or more.")
    whole = open_data(data)
    wanted = None if limit is None else limit * (rounds if fresh else 1)
    samples = list(islice(whole.samples(), wanted))
    if not fresh:
        return [SomeSamples(whole, samples)] * rounds
    size = len(samples) // rounds
    if size < (limit or 1):
        raise UserError(
            f"{data} has {len(samples)} samples, too few for {rounds} rounds with fresh ones. Give more data, fewer rounds or "
            "a smaller limit, or use the same samples in all rounds."
        )
    return [SomeSamples(whole, part) for part in equal_parts(samples[: size * rounds], rounds)]


def _options(recipe: Options, given: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Each command's options, checked, from the recipe and from the text given for it, which takes precedence."""
    options = {}
    for name, engine in STEPS.items():
        spec = parse(f"{name}({given[name]})")
        refused = sorted(spec.options.keys() & SET_BY_LOOP[name])
        if refused:
            raise UserError(f"{name}: '{refused[0]}' is set by the rounds themselves. Leave it out of --{name}.")
        from_recipe = {key: value for key, value in recipe.get(name, {}).items() if key not in SET_BY_LOOP[name]}
        options[name] = from_recipe | check_options(engine, spec)
    return options


def _required(name: str, value: Any, section: Mapping[str, Any]) -> Any:
    value = section.get(name) if value is None else value
    if value is None:
        raise UserError(f"rounds need {name}: give --{name}, or a recipe with it under `pair`.")
    return value


def _as_row(folder: Path, outcome: Round) -> dict[str, Any]:
    model = outcome.model.relative_to(folder).as_posix()
    return {
        "round": outcome.number, "model": model, "asked": outcome.asked, "pairs": outcome.pairs, "accuracy": outcome.accuracy
    }  # fmt: skip


def _from_row(folder: Path, row: Mapping[str, Any]) -> Round:
    number = row["round"]
    return Round(number, folder / f"round-{number}", folder / row["model"], row["asked"], row["pairs"], row["accuracy"])
