"""Evaluations side by side: paired differences, and CHAIRi at equal coverage. Reads their files; knows no model.

An evaluation is the folder that `catpo evaluate` wrote: answers.jsonl, grades.jsonl, scores.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.intervals import bootstrap_indices, interval
from catpo.files.json_files import read_json, read_rows

Floats = NDArray[np.float64]
Summarise = Callable[[Mapping[str, Mapping[str, Floats]]], Mapping[str, Floats]]
"""A benchmark's metrics of summed counts: {group: {count: sums}} -> {metric: values}."""
GROUNDED, HALLUCINATED = "grounded", "hallucinated"


class Estimate(NamedTuple):
    """A number with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One metric of two models on the same items: `other` minus `base`, resampled together."""

    benchmark: str
    metric: str
    base: float
    other: float
    difference: Estimate
    item_count: int
    """Items that both models answered."""

    @property
    def is_clear(self) -> bool:
        """The interval of the difference leaves 0 out."""
        return self.difference.low > 0 or self.difference.high < 0


@dataclass(frozen=True)
class Coverage:
    """Captions of one model cut after so many objects that all models cover the same share of what is there."""

    model: str
    benchmark: str
    cover: float
    """Share of present objects that the cut captions name, in percent: the smallest Cover among the models."""
    objects: float
    """Objects kept per caption to get there; a fraction is a mixture of captions cut at the next lower and higher number."""
    chair_i: Estimate
    """Hallucinated share of the objects kept, in percent."""
    is_cut: bool
    """False for the model of smallest Cover, whose captions stay whole."""
    difference: Estimate | None
    """`chair_i` minus that of the first evaluation, resampled together; None for the first."""


@dataclass(frozen=True)
class Evaluation:
    """What one folder of `catpo evaluate` holds."""

    path: Path
    name: str
    """What tables call it: the folder's name."""
    scores: Mapping[str, Any] = field(repr=False)
    """scores.json."""
    grades: Mapping[str, Mapping[tuple[str, str], Mapping[str, Any]]] = field(repr=False)
    """Benchmark -> (group, item id) -> row of grades.jsonl, in the order graded."""

    @property
    def benchmarks(self) -> list[str]:
        """Names of the benchmarks with scores."""
        return list(self.scores.get("benchmarks", {}))

    def metrics(self, benchmark: str) -> dict[str, Estimate]:
        """Metric -> value and interval, as scores.json says."""
        metrics = self.scores.get("benchmarks", {}).get(benchmark, {}).get("metrics", {})
        return {name: Estimate(*(_number(each.get(key)) for key in ("value", "low", "high"))) for name, each in metrics.items()}

    def judge(self, benchmark: str) -> str:
        """Who graded, with version and decoding; empty where no judge did. Figures of different judges share no column."""
        identity = self.scores.get("benchmarks", {}).get(benchmark, {}).get("judge")
        return judge_name(identity) if identity else ""

    @cached_property
    def answers(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """(benchmark, item id) -> row of answers.jsonl."""
        answers: dict[tuple[str, str], Mapping[str, Any]] = {}
        for number, row in enumerate(read_rows(self.path / "answers.jsonl"), start=1):
            if not all(isinstance(row.get(name), str) for name in ("benchmark", "id", "answer")):
                raise UserError(f"{self.path / 'answers.jsonl'}:{number} is not an answer. Run `catpo evaluate` again.")
            answers[row["benchmark"], row["id"]] = row
        return answers

    def labels(self, benchmark: str) -> dict[str, list[tuple[str, str]]]:
        """Item id -> its caption's objects in the order named, with `grounded` or `hallucinated`."""
        rows = self.grades.get(benchmark, {})
        return {item: named for (_, item), row in rows.items() if (named := mentions(row)) is not None}


def judge_name(identity: Mapping[str, Any]) -> str:
    """A judge as tables name it: everything that must be the same for scores to be comparable.

    >>> judge_name({"name": "gpt-4", "version": "gpt-4-0314", "decoding": {"temperature": 0.0}, "server": "http://host/v1"})
    'gpt-4 (gpt-4-0314), temperature=0.0'
    """
    name, version = str(identity.get("name", "unknown")), str(identity.get("version", ""))
    decoding = [f"{option}={value}" for option, value in sorted(dict(identity.get("decoding", {})).items())]
    return ", ".join([f"{name} ({version})" if version and version != name else name, *decoding])


def load_evaluation(folder: str | Path, *, name: str | None = None) -> Evaluation:
    """Read scores and grades of one evaluation.

    Args:
        folder: written by `catpo evaluate`.
        name: what tables call it; the folder's name if None.

    Raises:
        UserError: the folder has no finished evaluation, or a row is not as it should be.
    """
    folder = Path(folder)
    if not (folder / "scores.json").is_file():
        raise UserError(
            f"{folder} holds no finished evaluation (no scores.json in it). Run `catpo evaluate --output {folder}`."
        )
    scores = _checked_scores(read_json(folder / "scores.json", made_by="catpo evaluate"), folder)
    grades: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for number, row in enumerate(read_rows(folder / "grades.jsonl"), start=1):
        if not _is_grade(row):
            raise UserError(f"{folder / 'grades.jsonl'}:{number} is not a graded answer. Run `catpo evaluate` again.")
        grades.setdefault(str(row["benchmark"]), {})[str(row["group"]), str(row["id"])] = row
    return Evaluation(folder, name or folder.resolve().name, scores, grades)


def _checked_scores(scores: dict[str, Any], folder: Path) -> dict[str, Any]:
    benchmarks = scores.get("benchmarks", {})
    is_scores = isinstance(benchmarks, dict) and all(isinstance(each, dict) for each in benchmarks.values())
    metrics = [each.get("metrics", {}) for each in benchmarks.values()] if is_scores else [None]
    for each in metrics:
        values = each.values() if isinstance(each, dict) else [None]
        if not all(isinstance(value, dict) and all(map(_is_number_or_none, value.values())) for value in values):
            raise UserError(f"{folder / 'scores.json'} does not hold scores of benchmarks. Run `catpo evaluate` again.")
    return scores


def _is_grade(row: Mapping[str, Any]) -> bool:
    counts, named = row.get("counts"), row.get("mentions")
    return (
        all(isinstance(row.get(name), str) for name in ("benchmark", "id", "group", "picture"))
        and isinstance(counts, dict)
        and all(value is not None and _is_number_or_none(value) for value in counts.values())
        and (named is None or (isinstance(named, list) and all(_is_mention(each) for each in named)))
    )


def _is_mention(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[1] in (GROUNDED, HALLUCINATED)


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def incomparable(base: Evaluation, other: Evaluation, benchmark: str) -> str:
    """Why two evaluations' figures of a benchmark do not belong side by side; empty if they do.

    Options, versions of what grades, the judge with its version and decoding, and the official files must be the same.
    """
    for evaluation in (base, other):
        if benchmark not in evaluation.benchmarks:
            return f"{evaluation.name} does not have it"
    for what, said in (("options", _options), ("grading tools", _tools), ("judges", Evaluation.judge)):
        before, after = said(base, benchmark), said(other, benchmark)
        if before != after:
            return f"their {what} differ ({before or 'none'}; {after or 'none'})"
    files = [each.scores.get("data_hashes", {}).get(benchmark, {}) for each in (base, other)]
    differing = [name for name in files[0] if name in files[1] and files[0][name] != files[1][name]]
    return f"their official files differ ({', '.join(differing)})" if differing else ""


def _options(evaluation: Evaluation, benchmark: str) -> str:
    return str(evaluation.scores["benchmarks"][benchmark].get("options"))


def _tools(evaluation: Evaluation, benchmark: str) -> str:
    """What decides the figures beside options; `read_with` has versions and places that make no difference."""
    tools = evaluation.scores["benchmarks"][benchmark].get("tools", {})
    return ", ".join(f"{name} {value}" for name, value in sorted(tools.items()) if name != "read_with")


def paired_differences(
    base: Evaluation, other: Evaluation, *, resamples: int = 1000, seed: int = 0, limit: int | None = None
) -> list[Difference]:
    """Every metric of `other` minus that of `base`, on the items that both answered.

    Both models are resampled with the same pictures, so what makes a picture hard for both cancels.

    Args:
        base: what is compared with.
        other: what is compared.
        resamples: bootstrap draws of pictures.
        seed: of the draws.
        limit: only the first so many pictures.

    Returns:
        One row per benchmark and metric; none for a benchmark that is `incomparable` or has no item in common.
    """
    rows = []
    for benchmark in _common([base, other]):
        keys = _first_pictures(base.grades[benchmark], _common_items([base, other], benchmark), limit)
        if not keys:
            continue
        summarise = registry.load("benchmarks", benchmark).summarise
        before, after = (
            resample(summarise, [each.grades[benchmark][key] for key in keys], resamples=resamples, seed=seed)
            for each in (base, other)
        )
        for metric in before:
            if metric in after:
                change = _estimate(after[metric] - before[metric])
                rows.append(Difference(benchmark, metric, float(before[metric][0]), float(after[metric][0]), change, len(keys)))
    return rows


def at_equal_coverage(evaluations: Sequence[Evaluation], *, resamples: int = 1000, seed: int = 0) -> list[Coverage]:
    """CHAIRi of each model when all of them say equally much of what is there.

    A model that names fewer objects hallucinates less for that reason alone. So every caption is cut after its first k objects,
    with k as large as each model needs to reach the smallest Cover among them. The whole procedure is repeated on resampled
    pictures for the intervals.

    Args:
        evaluations: of the same benchmark items; the first is what the others are compared with.
        resamples: bootstrap draws of pictures.
        seed: of the draws.

    Returns:
        One row per benchmark with captions and evaluation; none where the items are not the same.
    """
    return at_equal_coverage_over_runs([evaluations], resamples=resamples, seed=seed)


def at_equal_coverage_over_runs(
    runs: Sequence[Sequence[Evaluation]], *, resamples: int = 1000, seed: int = 0
) -> list[Coverage]:
    """`at_equal_coverage` of several runs (training seeds) of the same models, on average over the runs.

    Within a run all models are cut to the smallest Cover among them. A draw of pictures is the same for all models and runs, so
    the intervals are over pictures, with the runs as they are.

    Args:
        runs: evaluations of each run, the same models in the same order.
        resamples: bootstrap draws of pictures.
        seed: of the draws.
    """
    everything = [evaluation for run in runs for evaluation in run]
    found = []
    for benchmark in _common(everything):
        keys = _common_items(everything, benchmark, is_caption=True)
        if not keys or len(runs[0]) < 2:
            continue
        draws = _Draws.of([runs[0][0].grades[benchmark][key] for key in keys], resamples, seed)
        cuts = [_cut_alike(draws, [[each.grades[benchmark][key] for key in keys] for each in run]) for run in runs]
        cover, objects, chair_i = (
            np.mean(figures, axis=0) for figures in zip(*((c.cover, c.objects, c.chair_i) for c in cuts), strict=True)
        )
        for number, evaluation in enumerate(runs[0]):
            found.append(
                Coverage(
                    model=evaluation.name,
                    benchmark=benchmark,
                    cover=float(cover[0]),
                    objects=float(objects[number, 0]),
                    chair_i=_estimate(chair_i[number]),
                    is_cut=any(each.is_cut[number] for each in cuts),
                    difference=_estimate(chair_i[number] - chair_i[0]) if number else None,
                )
            )
    return found


@dataclass(frozen=True)
class _CutAlike:
    """Models cut to the smallest Cover among them; the first draw takes every picture once."""

    cover: Floats
    """[1 + resamples]"""
    objects: Floats
    """[models, 1 + resamples]"""
    chair_i: Floats
    """[models, 1 + resamples]"""
    is_cut: list[bool]


def _cut_alike(draws: _Draws, graded: Sequence[Sequence[Mapping[str, Any]]]) -> _CutAlike:
    curves = [_Curve.of(rows) for rows in graded]
    sums = [(draws.sum(curve.grounded), draws.sum(curve.hallucinated)) for curve in curves]
    target = np.min([grounded[:, -1] for grounded, _ in sums], axis=0)  # (draw)
    cut = [_cut(grounded, hallucinated, target) for grounded, hallucinated in sums]
    objects, chair_i = (np.stack(each) for each in zip(*cut, strict=True))
    is_cut = [float(each[0]) < curve.grounded.shape[1] - 1 for each, curve in zip(objects, curves, strict=True)]
    return _CutAlike(_percent(target, draws.sum(curves[0].present)), objects, chair_i, is_cut)


def coverage_curves(evaluations: Sequence[Evaluation], benchmark: str) -> dict[str, tuple[Floats, Floats]]:
    """Model -> (Cover, CHAIRi) in percent with captions cut after 1, 2, … objects, [cuts] each; empty without captions."""
    keys = _common_items(evaluations, benchmark, is_caption=True)
    curves = {}
    for evaluation in evaluations if keys else ():
        curve = _Curve.of([evaluation.grades[benchmark][key] for key in keys])
        grounded, hallucinated = curve.grounded.sum(0)[1:], curve.hallucinated.sum(0)[1:]
        curves[evaluation.name] = (_percent(grounded, curve.present.sum()), _percent(hallucinated, grounded + hallucinated))
    return curves


def mentions(row: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """Objects of a graded caption in the order named, each once, with `grounded` or `hallucinated`; None for other items."""
    listed = row.get("mentions")
    return None if listed is None else [(str(name), str(label)) for name, label in listed]


@dataclass(frozen=True)
class _Curve:
    """What captions of one model contain when cut after k objects."""

    grounded: Floats
    """[items, cuts]: grounded objects among the first k, k = 0, 1, …"""
    hallucinated: Floats
    """[items, cuts]"""
    present: Floats
    """[items]: objects on the picture."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> _Curve:
        labels = [[label for _, label in mentions(row) or ()] for row in rows]
        longest = max((len(each) for each in labels), default=0)
        counts = {name: np.zeros((len(rows), longest + 1)) for name in (GROUNDED, HALLUCINATED)}
        for item, each in enumerate(labels):
            for place, label in enumerate(each, start=1):
                counts[label][item, place] = 1
        present = np.array([float(row["counts"]["present"]) for row in rows])
        return cls(counts[GROUNDED].cumsum(1), counts[HALLUCINATED].cumsum(1), present)


def _cut(grounded: Floats, hallucinated: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Where each row's captions are cut to hold `target` grounded objects, and CHAIRi there.

    The longest such cut is taken; between two whole numbers of objects, counts are mixed linearly.

    Args:
        grounded: [resamples, cuts], not falling along the cuts.
        hallucinated: [resamples, cuts].
        target: [resamples], between the first and the last of `grounded`.
    """
    rows = np.arange(len(target))
    low = (grounded <= target[:, None]).sum(1) - 1
    high = np.minimum(low + 1, grounded.shape[1] - 1)
    step = grounded[rows, high] - grounded[rows, low]
    share = np.divide(target - grounded[rows, low], step, out=np.zeros_like(target), where=step > 0)
    wrong = hallucinated[rows, low] + share * (hallucinated[rows, high] - hallucinated[rows, low])
    return low + share, _percent(wrong, wrong + target)


def resample(
    summarise: Summarise, rows: Sequence[Mapping[str, Any]], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Floats]:
    """Metric -> [1 + resamples]: its value on all rows, then on each bootstrap draw.

    Pictures are drawn, not items: answers about one picture are not independent. The same pictures give the same draws, so
    two models' values can be subtracted draw by draw.

    Args:
        summarise: of the benchmark.
        rows: of grades.jsonl.
        resamples: how many draws.
        seed: of the draws.
    """
    draws = _Draws.of(rows, resamples, seed)
    sums: dict[str, dict[str, Floats]] = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        places = [place for place, row in enumerate(rows) if row["group"] == group]
        for name in rows[places[0]]["counts"]:
            counts = np.zeros(len(rows))
            counts[places] = [rows[place]["counts"][name] for place in places]
            sums.setdefault(group, {})[name] = draws.sum(counts)
    return dict(summarise(sums))


@dataclass(frozen=True)
class _Draws:
    """Bootstrap draws of whole pictures; the first takes every picture once."""

    picture: NDArray[np.int64]
    """[rows]: number of each row's picture."""
    times: Floats
    """[1 + resamples, pictures]: how often each is drawn."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], resamples: int, seed: int) -> _Draws:
        numbers = {name: number for number, name in enumerate(dict.fromkeys(row["picture"] for row in rows))}
        drawn = bootstrap_indices(len(numbers), resamples=resamples, seed=seed)
        times = np.ones((1 + resamples, len(numbers)))
        for number, pictures in enumerate(drawn, start=1):
            times[number] = np.bincount(pictures, minlength=len(numbers))
        return cls(np.array([numbers[row["picture"]] for row in rows], dtype=np.int64), times)

    def sum(self, values: Floats) -> Floats:
        """[rows] or [rows, columns] -> [1 + resamples] or [1 + resamples, columns]."""
        by_picture = np.zeros((self.times.shape[1], *values.shape[1:]))
        np.add.at(by_picture, self.picture, values)
        return self.times @ by_picture


def _common(evaluations: Sequence[Evaluation]) -> list[str]:
    """Benchmarks that all evaluations can be compared by."""
    first, *others = evaluations
    return [name for name in first.benchmarks if not any(incomparable(first, other, name) for other in others)]


def _first_pictures(
    rows: Mapping[tuple[str, str], Mapping[str, Any]], keys: list[tuple[str, str]], limit: int | None
) -> list[tuple[str, str]]:
    if limit is None:
        return keys
    pictures = set(list(dict.fromkeys(rows[key]["picture"] for key in keys))[:limit])
    return [key for key in keys if rows[key]["picture"] in pictures]


def _common_items(evaluations: Sequence[Evaluation], benchmark: str, *, is_caption: bool = False) -> list[tuple[str, str]]:
    """(group, id) of the items that all evaluations have graded, in the order of the first."""
    first, *others = (evaluation.grades.get(benchmark, {}) for evaluation in evaluations)
    return [
        key for key, row in first.items() if all(key in grades for grades in others) and (not is_caption or _can_be_cut(row))
    ]


def _can_be_cut(row: Mapping[str, Any]) -> bool:
    """Whether a caption's objects are listed, and how many there are to name."""
    return mentions(row) is not None and "present" in row["counts"]


def _estimate(values: Floats) -> Estimate:
    """From [1 + resamples], the first of which is no resample."""
    low, high = interval(values[1:])
    return Estimate(float(values[0]), low, high)


def _percent(part: Floats, whole: Floats | float) -> Floats:
    return 100 * np.divide(part, whole, out=np.full(part.shape, np.nan), where=np.asarray(whole) > 0)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
