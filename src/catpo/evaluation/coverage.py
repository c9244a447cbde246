"""CHAIRi at equal coverage: short captions hallucinate less, so all models are cut to the same share of what is there.

Reads finished evaluations; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from catpo.evaluation.benchmarks import GROUNDED, HALLUCINATED, Floats, percent
from catpo.evaluation.bootstrap import Draws, Estimate, estimate
from catpo.evaluation.folder import Evaluation, mentions
from catpo.evaluation.paired import common_benchmarks, common_items


@dataclass(frozen=True)
class Coverage:
    """Captions of one model, cut at the number of objects where all models cover the same share of what is there."""

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


def at_equal_coverage(evaluations: Sequence[Evaluation], *, resamples: int = 1000, seed: int = 0) -> list[Coverage]:
    """CHAIRi of each model when all of them name an equal share of what is there.

    A model that names fewer objects hallucinates less for that reason alone. So every caption is cut after its first k objects,
    with k as large as each model needs to reach the smallest Cover among them. The whole procedure is repeated on resampled
    pictures for the intervals.

    Args:
        evaluations: of the same benchmark items; the others are compared with the first.
        resamples: bootstrap draws of pictures.
        seed: of the draws.

    Returns:
        One row per benchmark with captions and evaluation; none where the items differ.
    """
    return at_equal_coverage_over_runs([evaluations], resamples=resamples, seed=seed)


def at_equal_coverage_over_runs(
    runs: Sequence[Sequence[Evaluation]], *, resamples: int = 1000, seed: int = 0
) -> list[Coverage]:
    """`at_equal_coverage` of several runs (training seeds) of the same models, averaged over the runs.

    Within a run all models are cut to the smallest Cover among them. A draw of pictures is the same for all models and runs, so
    the intervals are over pictures, with the runs as they are.

    Args:
        runs: evaluations of each run, the same models in the same order.
        resamples: bootstrap draws of pictures.
        seed: of the draws.
    """
    evaluations = [evaluation for run in runs for evaluation in run]
    rows = []
    for benchmark in common_benchmarks(evaluations):
        keys = common_items(evaluations, benchmark, is_caption=True)
        if not keys or len(runs[0]) < 2:
            continue
        draws = Draws.of([runs[0][0].grades[benchmark][key] for key in keys], resamples, seed)
        cuts = [_cut_alike(draws, [_Curve.of(evaluation, benchmark, keys) for evaluation in run]) for run in runs]
        cover = np.mean([run_cover for run_cover, _, _ in cuts], axis=0)
        figures = np.mean([run_figures for _, run_figures, _ in cuts], axis=0)
        for index, evaluation in enumerate(runs[0]):
            objects, chair_i = figures[index]
            row = Coverage(
                model=evaluation.name,
                benchmark=benchmark,
                cover=float(cover[0]),
                objects=float(objects[0]),
                chair_i=estimate(chair_i),
                is_cut=any(is_cut[index] for _, _, is_cut in cuts),
                difference=estimate(chair_i - figures[0, 1]) if index else None,
            )
            rows.append(row)
    return rows


@dataclass(frozen=True)
class AtCover:
    """Captions of one model, cut where they name a given share of what is there."""

    model: str
    chair_i: list[float]
    """Hallucinated share of the objects kept, in percent, of each run; NaN where whole captions cover less."""
    ratio: Estimate | None
    """Mean over runs divided by the first model's, resampled together; None for the first and where a run covers less."""


def at_cover_over_runs(
    runs: Sequence[Sequence[Evaluation]], cover: float, *, resamples: int = 1000, seed: int = 0
) -> list[AtCover]:
    """CHAIRi of each model with captions cut at a Cover of `cover` percent, on the first benchmark with captions.

    As `at_equal_coverage_over_runs`, at a Cover that does not depend on who else is compared. In draws of pictures on which a
    model covers a little less than `cover`, its captions stay whole.

    Args:
        runs: evaluations of each run (training seed), the same models in the same order.
        cover: share of present objects, in percent.
        resamples: bootstrap draws of pictures.
        seed: of the draws.
    """
    evaluations = [evaluation for run in runs for evaluation in run]
    keys_of = {name: common_items(evaluations, name, is_caption=True) for name in common_benchmarks(evaluations)}
    benchmark = next((name for name, keys in keys_of.items() if keys), None)
    if benchmark is None:
        return []
    keys = keys_of[benchmark]
    draws = Draws.of([runs[0][0].grades[benchmark][key] for key in keys], resamples, seed)
    rows: list[AtCover] = []
    first: Floats | None = None
    for models in zip(*runs, strict=True):
        cuts = [_cut_at(draws, _Curve.of(model, benchmark, keys), cover) for model in models]
        mean = np.mean(cuts, axis=0)
        rows.append(AtCover(models[0].name, [float(cut[0]) for cut in cuts], None if first is None else _ratio(mean, first)))
        first = mean if first is None else first
    return rows


def _ratio(values: Floats, others: Floats) -> Estimate | None:
    """None where a model covers less, or the others hallucinate nothing; draws in which they do not are left out."""
    if np.isnan(values).any() or np.isnan(others).any() or others[0] == 0:
        return None
    return estimate(values[others > 0] / others[others > 0])


def _cut_at(draws: Draws, curve: _Curve, cover: float) -> Floats:
    """CHAIRi of one model cut at `cover` percent, [1 + resamples]; NaN if its whole captions cover less."""
    grounded, hallucinated = draws.sum(curve.grounded), draws.sum(curve.hallucinated)
    target = draws.sum(curve.present) * cover / 100
    if grounded[0, -1] < target[0]:
        return np.full(len(target), np.nan)
    return _cut(grounded, hallucinated, np.minimum(target, grounded[:, -1]))[1]


def coverage_curves(evaluations: Sequence[Evaluation], benchmark: str) -> dict[str, tuple[Floats, Floats]]:
    """Model -> (Cover, CHAIRi) in percent with captions cut after 1, 2, … objects, [cuts] each; empty without captions."""
    keys = common_items(evaluations, benchmark, is_caption=True)
    curves = {}
    for evaluation in evaluations if keys else ():
        curve = _Curve.of(evaluation, benchmark, keys)
        grounded, hallucinated = curve.grounded.sum(0)[1:], curve.hallucinated.sum(0)[1:]
        cover = percent(grounded, curve.present.sum(keepdims=True))
        curves[evaluation.name] = (cover, percent(hallucinated, grounded + hallucinated))
    return curves


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
    def of(cls, evaluation: Evaluation, benchmark: str, keys: Sequence[tuple[str, str]]) -> _Curve:
        rows: list[Mapping[str, Any]] = [evaluation.grades[benchmark][key] for key in keys]
        captions = [mentions(row) or [] for row in rows]
        longest = max(map(len, captions), default=0)
        counts = {label: np.zeros((len(rows), longest + 1)) for label in (GROUNDED, HALLUCINATED)}
        for item, caption in enumerate(captions):
            for cut, (_, label) in enumerate(caption, start=1):
                counts[label][item, cut] = 1
        present = np.array([float(row["counts"]["present"]) for row in rows])
        return cls(counts[GROUNDED].cumsum(1), counts[HALLUCINATED].cumsum(1), present)


def _cut_alike(draws: Draws, curves: Sequence[_Curve]) -> tuple[Floats, Floats, list[bool]]:
    """Models cut to the smallest Cover among them.

    Returns:
        That Cover, [1 + resamples]; objects per caption and CHAIRi, [models, 2, 1 + resamples]; whether each model is cut.
    """
    sums = [(draws.sum(curve.grounded), draws.sum(curve.hallucinated)) for curve in curves]  # (draw, cut)
    target = np.min([grounded[:, -1] for grounded, _ in sums], axis=0)  # (draw)
    cuts = [_cut(grounded, hallucinated, target) for grounded, hallucinated in sums]
    # the first draw takes every picture once
    is_cut = [bool(objects[0] < grounded.shape[1] - 1) for (objects, _), (grounded, _) in zip(cuts, sums, strict=True)]
    return percent(target, draws.sum(curves[0].present)), np.array(cuts), is_cut


def _cut(grounded: Floats, hallucinated: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Where each draw's captions are cut to hold `target` grounded objects, and CHAIRi there.

    The longest such cut is taken; between two whole numbers of objects, counts are mixed linearly.

    Args:
        grounded: [draws, cuts], not falling along the cuts.
        hallucinated: [draws, cuts].
        target: [draws], between the first and the last of `grounded`.
    """
    draws = np.arange(len(target))
    low = (grounded <= target[:, None]).sum(1) - 1
    high = np.minimum(low + 1, grounded.shape[1] - 1)
    step = grounded[draws, high] - grounded[draws, low]
    share = np.divide(target - grounded[draws, low], step, out=np.zeros_like(target), where=step > 0)
    wrong = hallucinated[draws, low] + share * (hallucinated[draws, high] - hallucinated[draws, low])
    return low + share, percent(wrong, wrong + target)
