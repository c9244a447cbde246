"""`catpo rounds`: pair, score, train, again and again, each round with the model of the round before: on-policy training.

Only calls the other commands; each can be stopped and goes on, so the loop can too. A round is a folder: pairs/, rewards/,
run/, and model/, the whole model that answers in the next round.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.core.spec import Spec, check_options, parse
from catpo.core.types import Sample
from catpo.data.datasets import Dataset
from catpo.data.read import open_data
from catpo.files.json_files import append_rows, read_json, read_rows, repair_rows, write_json
from catpo.files.lock import lock
from catpo.files.provenance import check_same, versions
from catpo.models import loading
from catpo.pairing.pair import PairingResult
from catpo.pairing.pair import pair as make_pairs
from catpo.scoring.score import score as score_pairs
from catpo.training.train import train as train_model

ABOUT, DONE = "rounds.json", "rounds.jsonl"
ROUND = {"round": int, "model": str, "asked": int, "pairs": int, "accuracy": float | None}
"""A row of `DONE`."""
ACCURACY = "rewards/accuracies"
STEPS: dict[str, Callable[..., Any]] = {"pair": make_pairs, "score": score_pairs, "train": train_model}
OURS = {
    "pair": frozenset({"model", "data", "output", "adapter", "seed", "limit", "progress"}),
    "score": frozenset({"pairs", "model", "output", "adapter", "limit", "progress"}),
    "train": frozenset({"pairs", "model", "output", "rewards", "resume", "seed", "limit", "progress"}),
}
"""Options of the steps that the loop sets itself."""


@dataclass(frozen=True)
class Round:
    """What a round made."""

    number: int
    """From 1."""
    folder: Path
    model: Path
    """The model as the round left it."""
    asked: int
    pairs: int
    accuracy: float | None
    """Share of pairs whose chosen response the model came to prefer, at the end of training."""

    def __str__(self) -> str:
        learned = "" if self.accuracy is None else f", prefers the chosen of {self.accuracy:.0%}"
        return f"Round {self.number}: {self.pairs} pairs of {self.asked} answers{learned}. Model: {self.model}"


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
    steps: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
) -> list[Round]:
    """Let a model answer, train it on pairs of its answers, and let the trained model answer; prints a line per round.

    The reference of each round is the model that answered. A killed run goes on where it stopped.

    Args:
        output: folder for round-1/, round-2/, …
        model: the first round's: hub id, folder or `builtin`; the recipe's if left out, as all that follows.
        data: pictures with prompts, e.g. `scenes(count=400)`.
        rounds: how many.
        fresh: every round gets an equal part of the data of its own, instead of all of it.
        method: how pairs are made, e.g. `csr`.
        judge: who is asked by methods that need a judge.
        objective: the loss, e.g. `dpo`.
        pair: further options of `catpo pair`, e.g. `temperature=0.7, block_size=16`.
        score: further options of `catpo score`.
        train: further options of `catpo train`, e.g. `num_train_epochs=1, learning_rate=5e-5, lora=None`.
        limit: samples in a round.
        seed: of the first round's sampling and training; the next has the next number.
        steps: command -> options, as a recipe's sections give them; what is said otherwise wins.
        progress: show it on stderr.

    Raises:
        UserError: an option is missing or wrong; the output was begun with others; a step has something to say.
    """
    options = _options(steps or {}, {"pair": pair, "score": score, "train": train})
    options["pair"] |= {name: value for name, value in {"method": method, "judge": judge}.items() if value is not None}
    options["train"] |= {} if objective is None else {"objective": objective}
    section = (steps or {}).get("pair", {})
    model, data = _given("model", model, section), _given("data", data, section)
    limit = section.get("limit") if limit is None else limit
    parts = _parts(data, rounds, fresh, limit)
    settings = {
        "model": str(model), "data": str(data), "rounds": rounds, "fresh": fresh, "limit": limit, "seed": seed,
        "options": {name: {key: _plain(value) for key, value in each.items()} for name, each in options.items()},
    }  # fmt: skip
    with lock(output) as folder:
        if (folder / ABOUT).exists():
            old = read_json(folder / ABOUT, made_by="catpo rounds", fields={"settings": dict})
            check_same(old["settings"], settings, where=folder, ignore=["rounds"])
        write_json(folder / ABOUT, {"format": 1, "settings": settings, "versions": versions()})
        done = [_round(folder, row) for row in repair_rows(folder / DONE, ROUND)][:rounds]
        for number in range(1, rounds + 1):
            if number > len(done):
                answering = done[-1].model if done else model
                made = _do(folder / f"round-{number}", number, answering, parts[number - 1], options, seed, progress)
                append_rows(folder / DONE, [_row(folder, made)])
                done.append(made)
            print(done[number - 1], flush=True)
        return done


def _do(
    folder: Path,
    number: int,
    model: str | Path,
    data: Dataset,
    options: Mapping[str, Mapping[str, Any]],
    seed: int,
    progress: bool,
) -> Round:
    """One round; what it has already is not made again."""
    common: dict[str, Any] = {"model": model, "progress": progress}
    seeds: dict[str, Any] = {"seed": seed + number - 1}
    made: PairingResult = make_pairs(data=data, output=folder / "pairs", **common, **seeds, **options["pair"])
    score_pairs(pairs=folder / "pairs", output=folder / "rewards", **common, **options["score"])
    run = train_model(
        pairs=folder / "pairs", rewards=folder / "rewards", output=folder / "run", resume=True, **common, **seeds,
        **options["train"],
    )  # fmt: skip
    whole = _merged(run.model, folder / "model")
    return Round(number, folder, whole, made.asked, made.kept, _accuracy(folder / "run"))


def _merged(trained: Path, target: Path) -> Path:
    """The trained model as a whole: as it is, or with its adapter merged into what it stands on."""
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


class _Part(Dataset):
    """Some samples of a data set."""

    def __init__(self, whole: Dataset, samples: Sequence[Sample]) -> None:
        self.name, self.vocabulary, self._samples = whole.name, whole.vocabulary, samples

    def samples(self) -> Any:
        return iter(self._samples)


def _parts(data: str | Path | Dataset, rounds: int, fresh: bool, limit: int | None) -> list[Dataset]:
    """The samples of each round."""
    if rounds < 1 or (limit is not None and limit < 1):
        raise UserError(f"rounds={rounds}, limit={limit}: both must be 1 or more.")
    whole = open_data(data)
    wanted = None if limit is None else limit * (rounds if fresh else 1)
    samples = list(islice(whole.samples(), wanted))
    if not fresh:
        return [_Part(whole, samples)] * rounds
    count = len(samples) // rounds
    if not count or (limit is not None and count < limit):
        raise UserError(
            f"{data} has {len(samples)} samples, too few for {rounds} rounds with fresh ones. Give more, fewer rounds, a "
            "smaller limit, or the same samples to all rounds."
        )
    return [_Part(whole, samples[start * count : (start + 1) * count]) for start in range(rounds)]


def _options(steps: Mapping[str, Mapping[str, Any]], given: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Step -> its options without those that the loop sets."""
    options = {}
    for name, engine in STEPS.items():
        said = dict(parse(f"{name}({given[name]})").options)
        ours = sorted(said.keys() & OURS[name])
        if ours:
            raise UserError(f"{name}: '{ours[0]}' is set by the rounds themselves. Leave it out of --{name}.")
        own = {key: value for key, value in steps.get(name, {}).items() if key not in OURS[name]}
        options[name] = own | check_options(engine, Spec(name, said))
    return options


def _given(name: str, value: Any, section: Mapping[str, Any]) -> Any:
    found = section.get(name) if value is None else value
    if found is None:
        raise UserError(f"rounds need {name}: give --{name}, or a recipe with it under `pair`.")
    return found


def _plain(value: Any) -> Any:
    """As JSON reads it back."""
    return str(value) if isinstance(value, Path | Spec) else list(value) if isinstance(value, tuple) else value


def _row(folder: Path, made: Round) -> dict[str, Any]:
    model = made.model.relative_to(folder).as_posix()
    return {"round": made.number, "model": model, "asked": made.asked, "pairs": made.pairs, "accuracy": made.accuracy}


def _round(folder: Path, row: Mapping[str, Any]) -> Round:
    number = row["round"]
    return Round(number, folder / f"round-{number}", folder / row["model"], row["asked"], row["pairs"], row["accuracy"])
