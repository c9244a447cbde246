"""One self-contained report.html from what the other commands wrote. Reads files; knows no model, needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from catpo import __version__
from catpo.core.errors import UserError
from catpo.data.read import open_data
from catpo.data.spool import SpooledPairs, spread
from catpo.evaluation.folder import Evaluation, load_evaluation
from catpo.files.atomic import make_folder, write_atomic
from catpo.files.json_files import read_json
from catpo.reporting.evaluations import BenchmarkTable, Changes, benchmark_tables, changed_answers
from catpo.reporting.page import embed, render
from catpo.reporting.pairs import plain_pairs, read_pairs, signal_names, stored_pairs
from catpo.reporting.pictures import Album
from catpo.reporting.plots import SERIES_COUNT
from catpo.reporting.signals import SignalSection, signal_section
from catpo.reporting.training import Run, load_run, training_curves
from catpo.reporting.verdicts import evaluation_verdicts, signal_verdicts
from catpo.rewards.fusion import Fusion
from catpo.rewards.quality import MEASURED_PAIRS
from catpo.rewards.store import RewardStore

NO_PAIRS: dict[str, Any] = {"pairs": [], "signals": [], "named": {}, "can_fuse": False, "fusion": {}}


def report(
    *,
    output: str | Path,
    rewards: str | Path | None = None,
    pairs: str | Path | None = None,
    runs: Sequence[str | Path] = (),
    evaluations: Sequence[str | Path] = (),
    base: str | Path | None = None,
    max_pairs: int = 60,
    fusion: Fusion | None = None,
    title: str = "catpo report",
) -> Path:
    """Write one HTML page about pairs, rewards, runs and evaluations; whatever is not given is left out.

    Args:
        output: folder, for `report.html` in it, or an .html file.
        rewards: reward store, for coloured words, signals and AUROC.
        pairs: the pairs that were scored, as folder or data set, for pictures and prompts.
        runs: folders of `catpo train`, for curves.
        evaluations: folders of `catpo evaluate`, for tables.
        base: the evaluation that the others are compared with, a folder or the name of one given; the first if None.
        max_pairs: pairs shown at most, spread evenly over the store.
        fusion: how weights are made at first; the page's controls change it. The paper's if None.
        title: of the page.

    Returns:
        The file written.

    Raises:
        UserError: a folder given does not hold what it should, or the file cannot be written.

    Example:
        report(output="runs/first", pairs="runs/first/pairs", rewards="runs/first/rewards", evaluations=["base", "catpo"])
    """
    if max_pairs < 0:
        raise UserError(f"max_pairs={max_pairs} must be 0 or more.")
    content = _Content(title=title)
    _add_pairs(content, rewards, pairs, max_pairs, fusion or Fusion())
    _add_evaluations(content, evaluations, base)
    _add_runs(content, runs)
    content.notes += [f"Not shown: {problem}" for problem in dict.fromkeys(content.album.problems)]
    return _write(content, Path(output))


@dataclass
class _Content:
    """What the templates read."""

    title: str
    album: Album = field(default_factory=Album)
    data: dict[str, Any] = field(default_factory=lambda: dict(NO_PAIRS))
    signals: SignalSection | None = None
    tables: list[BenchmarkTable] = field(default_factory=list)
    changes: Changes | None = None
    base: str = ""
    runs: list[Run] = field(default_factory=list)
    curves: list[tuple[str, Any]] = field(default_factory=list)
    colours: dict[str, int] = field(default_factory=dict)
    """Name of a model or run -> number of its colour."""
    provenance: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    """(part, [(field, value)])."""
    verdicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is missing, and why."""

    @property
    def has_held_out(self) -> bool:
        """Some run has logged pairs kept out of training."""
        return any(run.last("eval_rewards/margins") is not None for run in self.runs)


def _add_pairs(content: _Content, rewards: str | Path | None, pairs: str | Path | None, max_pairs: int, fusion: Fusion) -> None:
    if pairs is not None:
        _add_pair_provenance(content, pairs)
    if rewards is None:
        if pairs is None:
            content.notes.append("No pairs: neither a reward store nor pairs were given.")
            return
        content.data = plain_pairs(SpooledPairs.of(open_data(pairs).pairs()), content.album, max_pairs=max_pairs)
        content.notes.append("No signals and weights: no reward store was given (catpo score makes one).")
        return
    store = RewardStore.open(rewards)
    source = read_pairs(pairs, spread(store.pair_ids, max_pairs)) if pairs is not None else {}
    content.data = stored_pairs(store, source, content.album, max_pairs=max_pairs, fusion=fusion)
    can_fuse = all(name in signal_names(store, fusion) for name in fusion.needs)
    content.signals = signal_section(store, fusion if can_fuse else None)
    content.verdicts += signal_verdicts(content.signals)
    if len(store) > MEASURED_PAIRS:
        content.notes.append(
            f"Signals are measured on {MEASURED_PAIRS:,} pairs, spread evenly over the {len(store):,} of the store."
        )
    content.provenance.append((f"Rewards: {store.path}", list(_flat(store.provenance))))
    if pairs is None:
        content.notes.append("No pictures and prompts: the pairs that were scored were not given.")
    elif not all(pair["images"] for pair in content.data["pairs"]):
        content.notes.append(f"Some pairs of the store are not in {pairs}; they are shown without picture and prompt.")
    if not can_fuse:
        content.notes.append(f"No weights: {', '.join(fusion.needs)} are needed, the store holds {', '.join(store.signals)}.")
    if not store.has_maps:
        content.notes.append("No attention maps: the store was made without them (catpo score --attention-maps).")


def _add_pair_provenance(content: _Content, pairs: str | Path) -> None:
    about = Path(str(pairs)) / "pairs.json"
    if about.is_file():
        content.provenance.append((f"Pairs: {pairs}", list(_flat(read_json(about, made_by="catpo pair")))))


def _add_evaluations(content: _Content, folders: Sequence[str | Path], base: str | Path | None) -> None:
    loaded = _in_order(folders, base)
    if not loaded:
        content.notes.append("No evaluations were given (catpo evaluate makes them).")
        return
    content.base = loaded[0].name
    content.colours |= {evaluation.name: number for number, evaluation in enumerate(loaded)}
    content.tables = benchmark_tables(loaded, content.colours)
    content.changes = changed_answers(loaded, content.album) if len(loaded) > 1 else None
    content.verdicts = evaluation_verdicts(content.tables) + content.verdicts
    if len(loaded) == 1:
        content.notes.append("One evaluation only: with a second one the page shows differences and changed answers.")
    for evaluation in loaded:
        about = {key: value for key, value in evaluation.scores.items() if key != "benchmarks"}
        content.provenance.append((f"Evaluation: {evaluation.name}", list(_flat({"folder": str(evaluation.path), **about}))))


def _in_order(folders: Sequence[str | Path], base: str | Path | None) -> list[Evaluation]:
    """Evaluations by name, the base first."""
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
        content.provenance.append((f"Run: {run.name}", list(_flat({"folder": str(run.path), **run.about}))))
    content.curves = training_curves(content.runs, content.colours)


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each folder: what tells it from the others.

    >>> names_of([Path("demo/dpo/evaluation"), Path("demo/catpo/evaluation")])
    ['dpo', 'catpo']
    >>> names_of([Path("runs/first")])
    ['first']
    """
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < 2:  # nothing to tell apart
        return [each[-1] if each else str(path) for each, path in zip(parts, paths, strict=True)]
    start, end = _common_count(parts), _common_count([each[::-1] for each in parts])
    names = []
    for each in parts:
        own = each[start : len(each) - end] if len(each) - end > start else each[start:]
        names.append("/".join(own or each[-1:]))
    return names


def _common_count(parts: Sequence[tuple[str, ...]]) -> int:
    """How many first entries are the same in all."""
    return len(list(takewhile(lambda entries: len(set(entries)) == 1, zip(*parts, strict=False))))


def _flat(about: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested fields as (dotted name, text)."""
    for name, value in about.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None and value != {}:
            text = ", ".join(str(each) for each in value) if isinstance(value, list) else str(value)
            yield f"{prefix}{name}", text if len(text) <= 300 else f"{text[:297]}…"


def _write(content: _Content, output: Path) -> Path:
    path = output if output.suffix.lower() in (".html", ".htm") else output / "report.html"
    fusion = content.data["fusion"]
    page = render(
        "page.html.j2",
        content=content,
        data=embed({**content.data, "images": content.album.uris}),
        version=__version__,
        series_count=SERIES_COUNT,
        pair_count=len(content.data["pairs"]),
        signals=content.data["signals"],
        has_weights=content.data["can_fuse"],
        uses_alpha=not fusion.get("signals") and fusion.get("gamma") is None,
        has_ranks=fusion.get("normalise") == "quantile",
        temperature=fusion.get("temperature", 1.0),
    )
    make_folder(path.parent)
    write_atomic(path, page.encode("utf-8", "replace"))
    return path
