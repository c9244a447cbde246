"""Evaluations side by side: paired differences, and CHAIRi at equal coverage. Reads their files; knows no model.

An evaluation is the folder that `catpo evaluate` wrote: answers.jsonl, grades.jsonl, scores.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from catpo.evaluation.bootstrap import Draws, Estimate, Floats, estimate
from catpo.evaluation.folder import GROUNDED, HALLUCINATED, Evaluation, mentions
from catpo.evaluation.paired import common_benchmarks, common_items


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
    for benchmark in common_benchmarks(everything):
        keys = common_items(everything, benchmark, is_caption=True)
        if not keys or len(runs[0]) < 2:
            continue
        draws = Draws.of([runs[0][0].grades[benchmark][key] for key in keys], resamples, seed)
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
                    chair_i=estimate(chair_i[number]),
                    is_cut=any(each.is_cut[number] for each in cuts),
                    difference=estimate(chair_i[number] - chair_i[0]) if number else None,
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


def _cut_alike(draws: Draws, graded: Sequence[Sequence[Mapping[str, Any]]]) -> _CutAlike:
    curves = [_Curve.of(rows) for rows in graded]
    sums = [(draws.sum(curve.grounded), draws.sum(curve.hallucinated)) for curve in curves]
    target = np.min([grounded[:, -1] for grounded, _ in sums], axis=0)  # (draw)
    cut = [_cut(grounded, hallucinated, target) for grounded, hallucinated in sums]
    objects, chair_i = (np.stack(each) for each in zip(*cut, strict=True))
    is_cut = [float(each[0]) < curve.grounded.shape[1] - 1 for each, curve in zip(objects, curves, strict=True)]
    return _CutAlike(_percent(target, draws.sum(curves[0].present)), objects, chair_i, is_cut)


def coverage_curves(evaluations: Sequence[Evaluation], benchmark: str) -> dict[str, tuple[Floats, Floats]]:
    """Model -> (Cover, CHAIRi) in percent with captions cut after 1, 2, … objects, [cuts] each; empty without captions."""
    keys = common_items(evaluations, benchmark, is_caption=True)
    curves = {}
    for evaluation in evaluations if keys else ():
        curve = _Curve.of([evaluation.grades[benchmark][key] for key in keys])
        grounded, hallucinated = curve.grounded.sum(0)[1:], curve.hallucinated.sum(0)[1:]
        curves[evaluation.name] = (_percent(grounded, curve.present.sum()), _percent(hallucinated, grounded + hallucinated))
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


def _percent(part: Floats, whole: Floats | float) -> Floats:
    return 100 * np.divide(part, whole, out=np.full(part.shape, np.nan), where=np.asarray(whole) > 0)
