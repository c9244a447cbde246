"""`catpo demo`: the five steps on built-in pictures with the built-in model. Only calls the other commands."""

from __future__ import annotations

import math
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from catpo.cli.tables import quality_table
from catpo.evaluation.coverage import at_equal_coverage
from catpo.evaluation.evaluate import evaluate
from catpo.evaluation.folder import load_evaluation
from catpo.files.atomic import write_atomic
from catpo.pairing.pair import pair
from catpo.reporting.build import report
from catpo.rewards.quality import signal_quality
from catpo.rewards.store import RewardStore
from catpo.runtime.progress import clock
from catpo.scoring.score import score
from catpo.scoring.settings import PAPER_SIGNALS
from catpo.text.tables import Fitting, fitting, for_terminal, markdown_table
from catpo.text.words import plain
from catpo.training.train import train

OBJECTIVES = {
    "dpo": "dpo",
    "dpo-kl": "dpo(kl_weight=0.03)",
    "catpo": "catpo(preset='paper')",
    "tilt": "tilt",
}
"""Name of the run -> objective. Every objective gets the same pairs and steps."""
RATES = {"tilt": 1e-3}
"""Learning rates other than that of the settings: a divergence summed over few rewarded words has small gradients."""
WORDS = "words(features=['self_question'])"
SIGNALS = (*PAPER_SIGNALS, "image_contrast", "patch_logit")
METRICS = {
    "CHAIRi": "chair_i",
    "CHAIRs": "chair_s",
    "Cover": "cover",
    "Cog": "cog",
    "words": "words",
    "yes/no": "random/accuracy",
}
"""Column of the table -> metric of the `scenes` benchmark; percent, but for words."""
EQUAL = "CHAIRi at equal Cover"
COLUMNS = (*METRICS, EQUAL)


@dataclass(frozen=True)
class DemoSettings:
    """Size of the demo; the defaults take under five minutes on two cores."""

    pictures: int = 300
    held_out: int = 500
    question_scenes: int = 100
    num_train_epochs: float = 1
    learning_rate: float = 5e-5
    per_device_train_batch_size: int = 8


def demo(
    *, output: str | Path = "catpo-demo", seeds: int = 1, seed: int = 0, settings: DemoSettings | None = None
) -> dict[str, dict[str, list[float]]]:
    """Run all five steps once per seed; prints the table and where the report is.

    Returns:
        Model -> column of the table -> one value per seed.
    """
    start = time.monotonic()
    settings = settings or DemoSettings()
    console = Console()
    output = Path(output)
    rows: dict[str, dict[str, list[float]]] = {}
    for number in range(seed, seed + seeds):
        folder = output / f"seed-{number}"
        console.print(f"[bold]Seed {number}[/] in", for_terminal(str(folder)), highlight=False)
        for model, values in run_once(folder, number, settings, console).items():
            of_model = rows.setdefault(model, {column: [] for column in COLUMNS})
            for column, value in values.items():
                of_model[column].append(value)
    console.print(results_table(rows, settings))
    write_atomic(output / "table.md", as_markdown(rows))
    first = output / f"seed-{seed}"
    lines = [f"\nReport: {(first / 'report.html').resolve()}", f"Took {clock(time.monotonic() - start)}. Next:"]
    lines += [f"  {command}" for command in next_commands(first)]
    console.print(plain("\n".join(lines)), highlight=False, markup=False, soft_wrap=True)
    return rows


def run_once(folder: Path, seed: int, settings: DemoSettings, console: Console) -> dict[str, dict[str, float]]:
    """One seed: pairs, rewards, a run and an evaluation per objective, a report. Finished parts are not repeated."""
    pair(model="builtin", data=f"scenes(count={settings.pictures}, seed={seed})", output=folder / "pairs", seed=seed)
    score(pairs=folder / "pairs", model="builtin", output=folder / "rewards", signals=SIGNALS, words=WORDS, batch_size=16)
    store = RewardStore.open(folder / "rewards")
    console.print(quality_table(signal_quality(store), len(store)))
    models = {"base": "builtin"}
    for name, objective in OBJECTIVES.items():
        console.print(f"[bold]{name}[/]: {objective}", highlight=False)
        run = train(
            pairs=str(folder / "pairs"),
            model="builtin",
            output=folder / "runs" / name,
            rewards=folder / "rewards",
            objective=objective,
            learning_rate=RATES.get(name, settings.learning_rate),
            num_train_epochs=settings.num_train_epochs,
            per_device_train_batch_size=settings.per_device_train_batch_size,
            gradient_accumulation_steps=1,
            lora=None,
            logging_steps=5,
            seed=seed,
            resume=True,
        )
        models[name] = str(run.model)
    benchmark = f"scenes(count={settings.held_out}, questions=1, question_scenes={settings.question_scenes})"
    for name, model in models.items():
        console.print(f"[bold]{name}[/] on {settings.held_out} held-out scenes", highlight=False)
        evaluate(model=model, benchmarks=[benchmark], output=folder / "evaluations" / name)
    evaluations = [folder / "evaluations" / name for name in models]
    report(
        output=folder / "report.html",
        rewards=folder / "rewards",
        pairs=str(folder / "pairs"),
        runs=[folder / "runs" / name for name in OBJECTIVES],
        evaluations=evaluations,
        base=evaluations[0],
    )
    return scores_of(evaluations)


def scores_of(evaluations: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Model -> column -> value, for evaluations of the same scenes."""
    loaded = [load_evaluation(folder) for folder in evaluations]
    equal = {coverage.model: coverage.chair_i.value for coverage in at_equal_coverage(loaded)}
    scores = {}
    for evaluation in loaded:
        metrics = evaluation.metrics("scenes")
        scores[evaluation.name] = {column: metrics[metric].value for column, metric in METRICS.items()}
        scores[evaluation.name][EQUAL] = equal[evaluation.name]
    return scores


def results_table(rows: dict[str, dict[str, list[float]]], settings: DemoSettings) -> Fitting:
    """The comparison; with several seeds, mean ± standard deviation over seeds."""
    title = f"{settings.held_out} held-out scenes, greedy answers (percent; Cover and yes/no: higher is better)"
    return fitting(["model", *COLUMNS], _cells(rows), title=title)


def as_markdown(rows: dict[str, dict[str, list[float]]]) -> str:
    """The same table for notes."""
    return markdown_table(["model", *COLUMNS], _cells(rows)) + "\n"


def _cells(rows: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """Rows of the comparison as texts."""
    return [[model, *(_cell(values[column]) for column in COLUMNS)] for model, values in rows.items()]


def _cell(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.1f}{spread}"


def next_commands(folder: Path) -> list[str]:
    """Three things to try with what the demo made."""
    store = RewardStore.open(folder / "rewards")
    pairs, rewards = (shlex.quote(str(folder / name)) for name in ("pairs", "rewards"))
    return [
        f"catpo inspect {rewards} --pair {store.pair_ids[0]}",
        f"catpo train --pairs {pairs} --rewards {rewards} --model builtin --output my-run --lora none "
        "--objective \"catpo(alpha=0.2, shared_prefix='neutral')\" --learning-rate 5e-5 --num-train-epochs 1 "
        "--per-device-train-batch-size 8 --gradient-accumulation-steps 1",
        "catpo evaluate --model my-run/model --benchmarks 'scenes(count=500)' --output my-evaluation",
    ]
