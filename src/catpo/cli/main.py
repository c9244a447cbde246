"""The command line: arguments in, one function call, result out. Engines are imported inside functions, so help is instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

from cyclopts import App, Group, Parameter
from rich.console import Console

from catpo import __version__
from catpo.cli import chat, detect, push, quiet, streams
from catpo.cli.flags import explained, from_recipe
from catpo.cli.init import init
from catpo.cli.interrupted import interrupted
from catpo.cli.messages import TRACEBACK, explain, taken
from catpo.cli.probe import probe
from catpo.cli.streams import say, warn
from catpo.config import options as config
from catpo.core import registry
from catpo.core.errors import Stopped, UserError, did_you_mean
from catpo.runtime.launcher import is_main_process, process_count

Options = Parameter(name="*")
Recipe = Annotated[Path | None, Parameter(name="--config", help="YAML recipe (see `catpo init`); flags override it.")]
DryRun = Annotated[bool, Parameter(negative=(), help="Load no weights; print tokens, steps, memory and disk.")]
SHARED = ("pair", "score", "train", "evaluate")
"""Commands that several processes can share."""
Engine = Annotated[
    Literal["ddp", "fsdp2", "zero2", "zero3"], Parameter(help="For --dry-run: engine; `catpo init --recipe fsdp2` sets it up.")
]
Processes = Annotated[int | None, Parameter(help="For --dry-run: number of GPUs (default: WORLD_SIZE).")]
STEPS = Group("Pipeline", sort_key=0)
LOOK = Group("Inspect", sort_key=1)
START = Group("Start", sort_key=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 2 with a message where the user can act, 130 when interrupted, 143 after SIGTERM."""
    streams.prepare()
    quiet.prepare()
    words, with_traceback = taken(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            with nullcontext() if is_main_process() else redirect_stdout(StringIO()):  # only the main process prints
                _check_shared(words)
                app(words)
        finally:
            sys.stdout.flush()  # now: when Python exits, a closed pipe can no longer be caught
    except UserError as error:
        explain(error, with_traceback=with_traceback)
        sys.exit(2)
    except Stopped as stopped:
        warn(stopped)
        sys.exit(stopped.exit_code)
    except BrokenPipeError:  # `catpo list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        from catpo.runtime.disk_errors import refusal

        if refusal(error) is None:
            raise
        advice = "What was finished is complete: free some space or choose another --output, then run the same command again."
        warn(f"{error.filename or 'a file'}: {refusal(error)}. {advice}")
        sys.exit(2)
    except KeyboardInterrupt:
        warn(interrupted(words))
        sys.exit(130)


def _check_shared(arguments: Sequence[str]) -> None:
    """Refuse a single-process command when a launcher has started several processes."""
    command = next(iter(arguments), "")
    if process_count() > 1 and not command.startswith("-") and command not in SHARED:
        raise UserError(
            f"`catpo {command}` runs in one process, and {process_count()} were started. Run it without a launcher; "
            f"torchrun and accelerate launch are for {', '.join(SHARED)}."
        )


app = App(
    name="catpo",
    help="Preference optimisation of vision-language models with token-level rewards (Cat-PO).",
    help_epilogue="New here? `catpo demo` runs everything on built-in pictures in minutes.\n"
    f"With {TRACEBACK}, an error also shows where in the code it came from.",
    version=__version__,
    config=from_recipe,
    default_parameter=Parameter(consume_multiple=True, negative_iterable=()),
    error_console=Console(stderr=True),
    error_formatter=explained,
    suppress_keyboard_interrupt=False,
    help_format="plaintext",
    result_action="return_value",
)
app["--help"].group = app["--version"].group = START


@app.command(group=STEPS, sort_key=1)
def pair(options: Annotated[config.PairOptions, Options], *, recipe: Recipe = None) -> None:
    """Make preference pairs from a model's answers."""
    from catpo.cli.tables import config_warnings
    from catpo.data.pair_folder import ABOUT
    from catpo.files.json_files import read_json
    from catpo.pairing.pair import pair

    say(pair(**vars(options)))
    about = options.output / ABOUT
    for warning in config_warnings(read_json(about).get("generation_config", {}) if about.is_file() else {}):
        warn(warning)


def _show_plan(options: config.ScoreOptions | config.TrainOptions, **launched: Any) -> None:
    from catpo.planning.dry_run import plan
    from catpo.planning.tables import plan_tables

    Console().print(*plan_tables(plan(options, **launched)), sep="\n")


@app.command(group=STEPS, sort_key=2)
def score(
    options: Annotated[config.ScoreOptions, Options],
    *,
    recipe: Recipe = None,
    dry_run: DryRun = False,
    processes: Processes = None,
) -> None:
    """Score every response token with the reference model and write a reward store."""
    if dry_run:
        _show_plan(options, processes=processes)
        return
    from catpo.cli.tables import quality_table
    from catpo.rewards.quality import signal_quality
    from catpo.scoring.score import score

    store = score(**vars(options))
    say(f"Reward store: {options.output} ({len(store)} pairs)")
    quality = signal_quality(store)
    if any(row.overall.grounded_count and row.overall.hallucinated_count for row in quality):  # pairs with labelled words
        Console().print(quality_table(quality, len(store)))


@app.command(group=STEPS, sort_key=3)
def train(
    options: Annotated[config.TrainOptions, Options],
    *,
    recipe: Recipe = None,
    dry_run: DryRun = False,
    engine: Engine = "ddp",
    processes: Processes = None,
) -> None:
    """Train a model on preference pairs with token weights.

    Fields of transformers' TrainingArguments are options too: --optim adamw_8bit and so on, see docs/how-to/train.md.
    """
    if dry_run:
        _show_plan(options, engine=engine, processes=processes)
        return
    from catpo.training.run_lines import closing_lines
    from catpo.training.train import train

    result = train(**vars(options))
    say(f"Trained model: {result.model}", *closing_lines(result.output))


@app.command(group=STEPS, sort_key=4)
def evaluate(options: Annotated[config.EvaluateOptions, Options], *, recipe: Recipe = None) -> None:
    """Answer benchmarks with a model and grade the answers."""
    from catpo.cli.tables import official_lines, scores_table, scores_warnings

    if options.answers:  # without torch
        from catpo.evaluation.grade import grade_answers

        scores = grade_answers(**vars(options))
    else:
        from catpo.evaluation.evaluate import evaluate

        scores = evaluate(**vars(options))
    Console().print(scores_table(scores))
    say(*official_lines(scores))
    for warning in scores_warnings(scores):
        warn(warning)
    say(f"Answers and scores: {options.output}")


@app.command(group=STEPS, sort_key=5)
def report(options: Annotated[config.ReportOptions, Options], *, recipe: Recipe = None) -> None:
    """Write an HTML report about pairs, rewards, runs and evaluations."""
    from catpo.reporting.build import report

    say(f"Report: {report(**vars(options))}")


@app.command(group=STEPS, sort_key=6)
def rounds(options: Annotated[config.RoundsOptions, Options], *, recipe: Recipe = None) -> None:
    """Pair, score and train in turn, on-policy: each round starts from the model of the round before."""
    from catpo.config import recipes
    from catpo.experiments.rounds import rounds

    rounds(**{**vars(options), "steps": None if recipe is None else recipes.read(recipe)})


@app.command(group=STEPS, sort_key=7)
def merge(
    model: Annotated[str, Parameter(help="Folder of a trained adapter, or a base model with --adapter.")],
    /,
    *,
    output: Annotated[Path, Parameter(help="Folder of the merged model.")],
    adapter: config.Adapter = None,
    dtype: config.Dtype = "auto",
) -> None:
    """Merge a LoRA adapter into its base model."""
    from catpo.models.merging import merge

    say(f"Merged model: {merge(model, output, adapter=adapter, dtype=dtype)}")


@app.command(group=LOOK, sort_key=1)
def inspect(
    store: Annotated[Path, Parameter(help="Folder of a reward store.")],
    *,
    pair: Annotated[str, Parameter(help="Pair id, or the start of one.")],
    signal: Annotated[str, Parameter(help="Colour by a signal, by relevance or by weight.")] = "weight",
) -> None:
    """Show the words of one pair, coloured by signal or weight."""
    from catpo.cli.inspect_pair import inspect_pair

    Console().print(inspect_pair(store, pair, signal=signal))


@app.command(group=LOOK, sort_key=2)
def compare(
    evaluations: Annotated[list[Path], Parameter(help="Two or more folders of `catpo evaluate`; the first is the baseline.")],
    /,
    *,
    format: Annotated[Literal["terminal", "markdown", "latex"], Parameter(help="Output format.")] = "terminal",
    limit: Annotated[int | None, Parameter(help="Compare only the first N pictures of each benchmark.")] = None,
) -> None:
    """Print paired differences between evaluations, with 95 % intervals."""
    from catpo.evaluation.compare import compare, show

    print(show(compare(evaluations, limit=limit), format))


detect.register(app, group=LOOK, sort_key=5)
push.register(app, group=STEPS, sort_key=9)
chat.register(app, group=LOOK, sort_key=6)

data = App(name="data", help="Check and convert data sets; find benchmarks' official files.", group=LOOK, sort_key=3)
app.command(data)
app.command(probe, group=STEPS, sort_key=8)


@data.command
def check(
    source: Annotated[str, Parameter(help="Folder, file, or a data set such as rlhf_v(source='openbmb/RLHF-V-Dataset').")],
    /,
    *,
    model: Annotated[str | None, Parameter(help="Count tokens of this model: hub id or folder.")] = None,
    max_length: Annotated[int | None, Parameter(help="Report pairs whose prompt and longer response have more tokens.")] = None,
    limit: Annotated[int | None, Parameter(help="Read only the first N rows.")] = None,
    json: Annotated[bool, Parameter(help="Print JSON.")] = False,
) -> None:
    """Count pairs, tokens and pictures, and report every bad row; exit with 1 if there are any."""
    from json import dumps

    from catpo.cli.tables import data_tables
    from catpo.data.check import check_data

    family = None
    if model is not None:
        from catpo.models.loading import load

        family = load(model)
    report = check_data(source, family=family, max_length=max_length, limit=limit)
    if json:
        print(dumps(report.as_json(), indent=1))
    else:
        Console().print(*data_tables(report), sep="\n")
    if report.problems:
        sys.exit(1)


@data.command
def convert(
    source: Annotated[str, Parameter(help="Any data set with pairs.")],
    /,
    *,
    output: Annotated[Path, Parameter(help="Folder for pairs.jsonl and the pictures.")],
) -> None:
    """Write a data set's pairs as a folder: pictures and one .jsonl file."""
    from catpo.data.convert import convert_data

    say(convert_data(source, output))


@data.command(name="lmms-eval")
def lmms_eval(
    *,
    benchmarks: Annotated[str, Parameter(help="Benchmarks with their options; see `catpo list benchmarks`.")],
    output: Annotated[Path, Parameter(help="Folder for the task files.")],
    data: Annotated[Path | None, Parameter(help="Folder with the benchmarks' official files.")] = None,
    judge: Annotated[str | None, Parameter(help="Judge, for what needs one.")] = None,
    limit: Annotated[int | None, Parameter(help="Only the first N pictures of each benchmark.")] = None,
    max_new_tokens: Annotated[
        int | None, Parameter(help="Maximum length of an answer, in tokens (default: the benchmark's own).")
    ] = None,
) -> None:
    """Export benchmarks as lmms-eval tasks that catpo grades."""
    from catpo.core.spec import parse_list
    from catpo.evaluation.lmms_eval.tasks import export_tasks

    tasks = export_tasks(parse_list(benchmarks), output, data=data, judge=judge, limit=limit, max_new_tokens=max_new_tokens)
    given = f"--include_path {quote(str(output))} --tasks {','.join(tasks)}"
    say(f"Run them: lmms-eval --model catpo --model_args model=MODEL {given}")


@data.command
def get(
    benchmark: Annotated[str, Parameter(help="Benchmark, with options that change its files: amber, pope(labels='head'), …")],
    /,
    *,
    data: Annotated[Path | None, Parameter(help="Check this folder.")] = None,
    all: Annotated[bool, Parameter(help="List every missing picture.", negative=())] = False,
) -> None:
    """Show which official files a benchmark needs, and check them; exit with 1 if it cannot be graded yet."""
    from catpo.evaluation.official_files import describe, look

    report = look(benchmark, data)
    say(*describe(report, data, is_complete=all))
    if report.problem:
        sys.exit(1)


@app.command(group=START, sort_key=1)
def demo(
    *,
    output: Annotated[Path, Parameter(help="Output folder.")] = Path("catpo-demo"),
    seeds: Annotated[int, Parameter(help="Number of seeds; with several, the table shows mean ± deviation.")] = 1,
    seed: Annotated[int, Parameter(help="First seed.")] = 0,
) -> None:
    """Run the whole pipeline on built-in pictures with the built-in model, and compare objectives."""
    from catpo.cli.demo import demo

    demo(output=output, seeds=seeds, seed=seed)


@app.command(group=START, sort_key=2)
def study(
    file: Annotated[Path, Parameter(help="Study file, YAML, or the name of one that comes with catpo, e.g. table1.")],
    /,
    *,
    output: Annotated[Path, Parameter(help="Folder of all studies, which share pairs, scores and cells.")] = Path(
        "runs/studies"
    ),
    jobs: Annotated[int, Parameter(help="Cells run in parallel, each in its own process.")] = 1,
) -> None:
    """Run a grid of methods, options and seeds, with tables and figures; exit with 1 if a cell failed."""
    from catpo.experiments.study.results import footnotes, results_table
    from catpo.experiments.study.run import study

    outcome = study(file, output=output, jobs=jobs)
    Console().print(results_table(outcome.results))
    say(*footnotes(outcome.results))
    say(f"Tables and figures: {outcome.folder}")
    for called, reason in outcome.failed.items():
        warn(f"{called} failed: {reason}")
    if outcome.failed:
        sys.exit(1)


app.command(init, group=START, sort_key=3)


@app.command(group=START, sort_key=4)
def doctor(
    model: Annotated[str | None, Parameter(help="Also check whether this model can be used.")] = None,
    /,
) -> None:
    """Tell what this machine can run, and why not."""
    from catpo.cli.doctor import examine, table

    findings = examine(model)
    Console().print(table(findings))
    if any(finding.verdict == "missing" for finding in findings):
        sys.exit(1)


@app.command(name="list", group=LOOK, sort_key=4)
def list_plugins(
    kind: Annotated[
        str | None,
        Parameter(help="families, signals, objectives, datasets, pairings, benchmarks, judges, decodings, scorers or recipes."),
    ] = None,
    /,
) -> None:
    """List what can be named in options: signals, objectives, data sets and so on."""
    from catpo.config import recipes

    kinds = [*registry.PLACES, "recipes"]
    if kind is not None and kind not in kinds:
        raise UserError(f"'{kind}' is not a kind of plugin. {did_you_mean(kind, kinds)}")
    for each in [kind] if kind else kinds:
        say(each)
        if each == "recipes":
            listed = {name: recipes.summary(file) for name, file in recipes.shipped().items()}
        else:
            listed = {plugin.name: plugin.summary for plugin in registry.plugins(each)}
        width = max(map(len, listed), default=0)
        for name, summary in listed.items():
            say(f"  {name:{width}}  {summary}")
