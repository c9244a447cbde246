"""`catpo rounds`: pair, score, train, then again with the trained model: on-policy training.

Only calls the other commands. Each of them can be interrupted and resumed, so the loop can be as well. A round is a folder:
pairs/, rewards/, run/, and model/ where an adapter was merged into the model that answers in the next round.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from catpo.config.command import command, fit, hints, instead
from catpo.config.options import COMMANDS, RoundsOptions
from catpo.core.errors import UserError
from catpo.core.spec import parse
from catpo.core.types import Sample
from catpo.data.datasets import Dataset
from catpo.data.read import Subset, open_data
from catpo.files.inside import stay_inside
from catpo.files.json_files import append_rows, read_json, read_rows, repair_rows, write_json
from catpo.files.lock import lock
from catpo.files.provenance import check_same, versions
from catpo.models.merging import merge
from catpo.pairing.pair import pair as make_pairs
from catpo.runtime.progress import tell_complete
from catpo.scoring.score import score as score_pairs
from catpo.training.train import train as train_model

ABOUT, DONE = "rounds.json", "rounds.jsonl"
ROUND = {"round": int, "model": str, "asked": int, "pairs": int, "accuracy": float | None}
"""A row of `DONE`."""
ACCURACY = "rewards/accuracies"
SET_BY_LOOP = {
    "pair": frozenset({"model", "data", "output", "adapter", "seed", "limit", "progress"}),
    "score": frozenset({"pairs", "model", "output", "adapter", "limit", "progress"}),
    "train": frozenset({"pairs", "model", "output", "adapter", "rewards", "resume", "seed", "limit", "progress"}),
}
"""Command -> its options that the loop sets itself."""
ByCommand = Mapping[str, Mapping[str, Any]]
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


@command(RoundsOptions)
def rounds(options: RoundsOptions) -> list[Round]:
    """Train on-policy: a model answers, is trained on pairs of its answers, and answers again; prints a line per round.

    The reference of each round is the model that answered. An interrupted run resumes where it stopped.

    Raises:
        UserError: an option is missing or wrong, the output was created with other options, or a step fails.
    """
    recipe = options.steps or {}
    model = _required("model", options.model, recipe)
    data = _required("data", options.data, recipe)
    limit = recipe.get("pair", {}).get("limit") if options.limit is None else options.limit
    by_command = _options(recipe, options)
    parts = _parts(data, options.rounds, options.fresh, limit)
    settings: dict[str, Any] = {
        "model": model, "data": data, "rounds": options.rounds, "fresh": options.fresh, "limit": limit, "seed": options.seed,
        "options": by_command,
    }  # fmt: skip
    settings = json.loads(json.dumps(settings, default=str))  # as they are read back in a later run
    with lock(options.output) as folder:
        if (folder / ABOUT).exists():
            old = read_json(folder / ABOUT, made_by="catpo rounds", fields={"settings": dict})
            check_same(old["settings"], settings, where=folder, ignore=["rounds"])
        write_json(folder / ABOUT, {"format": 1, "settings": settings, "versions": versions()})
        plans = []
        for number, part in enumerate(parts):
            round_folder = folder / f"round-{number + 1}"
            plans.append(RoundPlan(folder=round_folder, data=part, seed=options.seed + number, run=round_folder / "run"))
        if len(read_rows(folder / DONE, ROUND)) >= len(plans):
            tell_complete(folder)
        outcomes = []
        for outcome in run_rounds(folder, plans, model, by_command, progress=options.progress):
            print(outcome, flush=True)
            outcomes.append(outcome)
        return outcomes


def run_rounds(
    folder: Path, plans: Sequence[RoundPlan], model: str | Path, options: ByCommand, *, progress: bool
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
            outcome = _run_round(number, plan, model, options if number == 1 else _later(options), progress)
            append_rows(folder / DONE, [_as_row(folder, outcome)])
        yield outcome
        model = outcome.model


def _run_round(number: int, plan: RoundPlan, model: str | Path, options: ByCommand, progress: bool) -> Round:
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


def _later(options: ByCommand) -> ByCommand:
    """Options of the rounds after the first, whose models are folders without revisions."""
    return {name: {key: value for key, value in given.items() if key != "revision"} for name, given in options.items()}


def _merged(trained: Path, target: Path) -> Path:
    """The trained model without an adapter: as it is, or with its adapter merged into the weights."""
    if not (trained / "adapter_config.json").exists():
        return trained
    return target if target.exists() else merge(trained, target)


def _accuracy(run: Path) -> float | None:
    values = [row[ACCURACY] for row in read_rows(run / "metrics.jsonl") if ACCURACY in row]
    return values[-1] if values else None


def some_samples(whole: Dataset, samples: Sequence[Sample], name: str | None = None) -> Subset:
    """Some samples of a data set, with its words and, unless another is given, its name."""
    return Subset(whole, samples=lambda _: samples, name=name)


def equal_parts(samples: Sequence[Sample], count: int) -> list[Sequence[Sample]]:
    """The samples in their order, split into parts whose sizes differ by one at most."""
    ends = [len(samples) * number // count for number in range(count + 1)]
    return [samples[start:end] for start, end in pairwise(ends)]


def _parts(data: str | Path | Dataset, rounds: int, fresh: bool, limit: int | None) -> list[Subset]:
    """The samples of each round."""
    whole = open_data(data)
    wanted = None if limit is None else limit * (rounds if fresh else 1)
    samples = list(islice(whole.samples(), wanted))
    if not fresh:
        return [some_samples(whole, samples)] * rounds
    size = len(samples) // rounds
    if size < (limit or 1):
        raise UserError(
            f"{data} has {len(samples)} samples, too few for {rounds} rounds with fresh ones. Give more data, fewer rounds or "
            "a smaller limit, or use the same samples in all rounds."
        )
    return [some_samples(whole, part) for part in equal_parts(samples[: size * rounds], rounds)]


def _options(recipe: ByCommand, given: RoundsOptions) -> dict[str, dict[str, Any]]:
    """Each command's options, checked, from the recipe and from what is given for it, which takes precedence."""
    by_command = {}
    for name, of_loop in SET_BY_LOOP.items():
        options = {key: value for key, value in recipe.get(name, {}).items() if key not in of_loop}
        known = hints(COMMANDS[name])
        for key, value in parse(f"{name}({getattr(given, name)})").options.items():
            if key in of_loop:
                raise UserError(f"{name}: '{key}' is set by the rounds themselves. Leave it out of --{name}.")
            if key not in known:
                raise UserError(f"'{name}' has no option '{key}'{instead(COMMANDS[name], key, known)}")
            options[key] = fit(COMMANDS[name], key, value)
        by_command[name] = options
    more = {"pair": {"method": given.method, "judge": given.judge}, "train": {"objective": given.objective}}
    for name, options in more.items():
        by_command[name] |= {key: value for key, value in options.items() if value is not None}
    return by_command


def _required(name: str, value: Any, recipe: ByCommand) -> Any:
    value = recipe.get("pair", {}).get(name) if value is None else value
    if value is None:
        raise UserError(f"rounds need {name}: give --{name}, or a recipe with it under `pair`.")
    return value


def _as_row(folder: Path, outcome: Round) -> dict[str, Any]:
    model = outcome.model.relative_to(folder).as_posix()
    return {
        "round": outcome.number, "model": model, "asked": outcome.asked, "pairs": outcome.pairs, "accuracy": outcome.accuracy
    }  # fmt: skip


def _from_row(folder: Path, row: Mapping[str, Any]) -> Round:
    number, model = row["round"], stay_inside(folder / row["model"], folder)
    return Round(number, folder / f"round-{number}", model, row["asked"], row["pairs"], row["accuracy"])
