"""Paired differences between evaluations of the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from catpo.core import registry
from catpo.evaluation.bootstrap import Estimate, estimate, resample
from catpo.evaluation.folder import Evaluation, mentions
from catpo.evaluation.tasks import first_pictures


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
        """The interval of the difference excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0


def incomparable(base: Evaluation, other: Evaluation, benchmark: str) -> str:
    """Why two evaluations' figures of a benchmark cannot be compared; empty if they can.

    Options, versions of what grades, the judge with its version and decoding, and the official files must be the same.
    """
    for evaluation in (base, other):
        if benchmark not in evaluation.benchmarks:
            return f"{evaluation.name} does not have it"
    for what, told_by in (("options", _options), ("grading tools", _tools), ("judges", Evaluation.judge)):
        before, after = told_by(base, benchmark), told_by(other, benchmark)
        if before != after:
            return f"their {what} differ ({before or 'none'}; {after or 'none'})"
    before, after = (evaluation.scores.get("data_hashes", {}).get(benchmark, {}) for evaluation in (base, other))
    differing = [name for name in before if name in after and before[name] != after[name]]
    return f"their official files differ ({', '.join(differing)})" if differing else ""


def _options(evaluation: Evaluation, benchmark: str) -> str:
    return str(evaluation.scores["benchmarks"][benchmark].get("options"))


def _tools(evaluation: Evaluation, benchmark: str) -> str:
    """What decides the figures beside options; versions and paths in `read_with` make no difference."""
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
        limit: only the first N pictures.

    Returns:
        One row per benchmark and metric; none for a benchmark that is `incomparable` or has no item in common.
    """
    rows = []
    for benchmark in common_benchmarks([base, other]):
        keys = common_items([base, other], benchmark)
        keys = first_pictures(keys, [base.grades[benchmark][key]["picture"] for key in keys], limit)
        if not keys:
            continue
        summarise = registry.load("benchmarks", benchmark).summarise
        figures = []
        for evaluation in (base, other):
            graded = [evaluation.grades[benchmark][key] for key in keys]
            figures.append(resample(summarise, graded, resamples=resamples, seed=seed))
        before, after = figures
        for metric in before:
            if metric in after:
                change = estimate(after[metric] - before[metric])
                rows.append(Difference(benchmark, metric, float(before[metric][0]), float(after[metric][0]), change, len(keys)))
    return rows


def common_benchmarks(evaluations: Sequence[Evaluation]) -> list[str]:
    """Benchmarks that all evaluations can be compared by."""
    first, *others = evaluations
    return [name for name in first.benchmarks if not any(incomparable(first, other, name) for other in others)]


def common_items(evaluations: Sequence[Evaluation], benchmark: str, *, is_caption: bool = False) -> list[tuple[str, str]]:
    """(group, id) of the items that all evaluations have graded, in the order of the first.

    With `is_caption`, only captions whose objects are listed, and which say how many there are to name: they can be cut.
    """
    first, *others = (evaluation.grades.get(benchmark, {}) for evaluation in evaluations)
    keys = [key for key in first if all(key in grades for grades in others)]
    if is_caption:
        keys = [key for key in keys if mentions(first[key]) is not None and "present" in first[key]["counts"]]
    return keys
