"""One self-contained report.html from what the other commands wrote. Reads files; knows no model, needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from markupsafe import Markup

from catpo import __version__
from catpo.config.command import command
from catpo.config.options import ReportOptions
from catpo.data.pair_folder import ABOUT
from catpo.data.read import open_data
from catpo.data.spool import SpooledPairs, spread
from catpo.evaluation.folder import Evaluation, load_evaluation
from catpo.files.json_files import read_json
from catpo.reporting.changed_answers import Changes, changed_answers
from catpo.reporting.evaluations import BenchmarkTable, benchmark_tables
from catpo.reporting.page import embed, render, replace_report
from catpo.reporting.pairs import NO_PAIRS, plain_pairs, read_pairs, stored_pairs
from catpo.reporting.pictures import Album
from catpo.reporting.plots import SERIES_COUNT
from catpo.reporting.signals import SignalSection, signal_section
from catpo.reporting.training import Run, load_run, training_curves
from catpo.reporting.verdicts import evaluation_verdicts, signal_verdicts
from catpo.rewards.description import flat_fields
from catpo.rewards.fusion import Fusion
from catpo.rewards.quality import MEASURED_PAIRS
from catpo.rewards.store import RewardStore


@command(ReportOptions)
def report(options: ReportOptions) -> Path:
    """Write one HTML page about pairs, rewards, runs and evaluations; whatever is not given is left out.

    Returns:
        The file written.

    Raises:
        UserError: a folder given does not hold what it should, or the file cannot be written.
    """
    content = _Content(title=options.title)
    pairs = options.pairs
    if pairs is not None:
        _add_pair_provenance(content, pairs)
    if options.rewards is not None:
        store, fusion = RewardStore.open(options.rewards), options.fusion or Fusion()
        _add_scored_pairs(content, store, pairs, options.max_pairs, fusion)
    elif pairs is not None:
        content.data = plain_pairs(SpooledPairs.of(open_data(pairs).pairs()), content.album, max_pairs=options.max_pairs)
        content.notes.append("No signals and weights: no reward store was given (catpo score makes one).")
    else:
        content.notes.append("No pairs: neither a reward store nor pairs were given.")
    _add_evaluations(content, options.evaluations, options.base)
    _add_runs(content, options.runs)
    content.notes += [f"Not shown: {problem}" for problem in dict.fromkeys(content.album.problems)]
    return _write(content, options.output)


@dataclass
class _Content:
    """What the templates read."""

    title: str
    album: Album = field(default_factory=Album)
    data: Mapping[str, Any] = field(default_factory=lambda: NO_PAIRS)
    signals: SignalSection | None = None
    tables: list[BenchmarkTable] = field(default_factory=list)
    changes: Changes | None = None
    base: str = ""
    runs: list[Run] = field(default_factory=list)
    curves: list[tuple[str, Markup]] = field(default_factory=list)
    colours: dict[str, int] = field(default_factory=dict)
    """Name of a model or run -> number of its colour."""
    provenance: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    """(part, [(field, value)])."""
    verdicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is missing, and why."""

    @property
    def has_held_out(self) -> bool:
        """Whether a run has logged metrics of held-out pairs."""
        return any(run.last("eval_rewards/margins") is not None for run in self.runs)

    def add_provenance(self, part: str, fields: Mapping[str, Any]) -> None:
        """Nested fields as a table of dotted names and texts."""
        rows = []
        for name, value in flat_fields(fields).items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            if value is not None:
                rows.append((name, text if len(text) <= 300 else f"{text[:297]}…"))
        self.provenance.append((part, rows))


def _add_pair_provenance(content: _Content, pairs: str | Path) -> None:
    file = Path(str(pairs)) / ABOUT
    if file.is_file():
        content.add_provenance(f"Pairs: {pairs}", read_json(file, made_by="catpo pair"))


def _add_scored_pairs(content: _Content, store: RewardStore, pairs: str | Path | None, max_pairs: int, fusion: Fusion) -> None:
    source = read_pairs(pairs, spread(store.pair_ids, max_pairs)) if pairs is not None else {}
    content.data = stored_pairs(store, source, content.album, max_pairs=max_pairs, fusion=fusion)
    can_fuse = content.data["can_fuse"]
    content.signals = signal_section(store, fusion if can_fuse else None)
    content.verdicts += signal_verdicts(content.signals)
    content.add_provenance(f"Rewards: {store.path}", store.provenance)
    if len(store) > MEASURED_PAIRS:
        content.notes.append(
            f"Signals are measured on {MEASURED_PAIRS:,} pairs, spread evenly over the {len(store):,} of the store."
        )
    if pairs is None:
        content.notes.append("No pictures and prompts: the pairs that were scored were not given.")
    elif not all(pair["images"] for pair in content.data["pairs"]):
        content.notes.append(f"Some pairs of the store are not in {pairs}; they are shown without picture and prompt.")
    if not can_fuse:
        content.notes.append(f"No weights: {', '.join(fusion.needs)} are needed, the store holds {', '.join(store.signals)}.")
    if not store.has_maps:
        content.notes.append("No attention maps: the store was made without them (catpo score --attention-maps).")


def _add_evaluations(content: _Content, folders: Sequence[str | Path], base: str | Path | None) -> None:
    evaluations = _base_first(folders, base)
    if not evaluations:
        content.notes.append("No evaluations were given (catpo evaluate makes them).")
        return
    content.base = evaluations[0].name
    content.colours |= {evaluation.name: number for number, evaluation in enumerate(evaluations)}
    content.tables = benchmark_tables(evaluations, content.colours)
    content.verdicts = evaluation_verdicts(content.tables) + content.verdicts
    if len(evaluations) > 1:
        content.changes = changed_answers(evaluations, content.album)
    else:
        content.notes.append("One evaluation only: with a second one the page shows differences and changed answers.")
    for evaluation in evaluations:
        general = {key: value for key, value in evaluation.scores.items() if key != "benchmarks"}
        content.add_provenance(f"Evaluation: {evaluation.name}", {"folder": str(evaluation.path), **general})


def _base_first(folders: Sequence[str | Path], base: str | Path | None) -> list[Evaluation]:
    paths = [Path(folder) for folder in folders]
    if base is not None:
        named = dict(zip(names_of(paths), paths, strict=True))
        first = named.get(str(base), Path(base))
        paths = [first, *(path for path in paths if path.resolve() != first.resolve())]
    return [load_evaluation(path, name=name) for path, name in zip(paths, names_of(paths), strict=True)]


def _add_runs(content: _Content, folders: Sequence[str | Path]) -> None:
    paths = [Path(folder) for folder in folders]
    if not paths:
        content.notes.append("No training runs were given (catpo train makes them).")
        return
    content.runs = [load_run(path, name) for path, name in zip(paths, names_of(paths), strict=True)]
    for run in content.runs:
        content.colours.setdefault(run.name, len(content.colours))
        content.add_provenance(f"Run: {run.name}", {"folder": str(run.path), **run.settings})
    content.curves = training_curves(content.runs, content.colours)


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each folder: the part of its path that the others do not share.

    >>> names_of([Path("demo/dpo/evaluation"), Path("demo/catpo/evaluation")])
    ['dpo', 'catpo']
    >>> names_of([Path("runs/first")])
    ['first']
    """
    resolved = [path.resolve().parts for path in paths]
    start, end = _common_count(resolved), _common_count([parts[::-1] for parts in resolved])
    names = []
    for parts in resolved:
        own = parts[start : len(parts) - end] or parts[start:] or parts[-1:]
        names.append("/".join(own))
    return names


def _common_count(paths: Sequence[tuple[str, ...]]) -> int:
    """Number of leading entries that are the same in all."""
    return len(list(takewhile(lambda entries: len(set(entries)) == 1, zip(*paths, strict=False))))


def _write(content: _Content, output: Path) -> Path:
    path = output if output.suffix.lower() in (".html", ".htm") else output / "report.html"
    data = content.data
    page = render(
        "page.html.j2",
        content=content,
        data=embed({**data, "images": content.album.uris}),
        version=__version__,
        series_count=SERIES_COUNT,
        pair_count=len(data["pairs"]),
        signals=data["signals"],
        has_weights=data["can_fuse"],
        fusion=data["fusion"],
    )
    replace_report(path, page.encode("utf-8", "replace"))
    return path
