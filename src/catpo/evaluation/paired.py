"""Paired differences between evaluations of the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from catpo.core import registry
from catpo.evaluation.bootstrap import Estimate, estimate, resample
from catpo.evaluation.folder import Evaluation, mentions


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
    for benchmark in common_benchmarks([base, other]):
        keys = _first_pictures(base.grades[benchmark], common_items([base, other], benchmark), limit)
        if not keys:
            continue
        summarise = registry.load("benchmarks", benchmark).summarise
        before, after = (
            resample(summarise, [each.grades[benchmark][key] for key in keys], resamples=resamples, seed=seed)
            for each in (base, other)
        )
        for metric in before:
            if metric in after:
                change = estimate(after[metric] - before[metric])
                rows.append(Difference(benchmark, metric, float(before[metric][0]), float(after[metric][0]), change, len(keys)))
    return rows


def common_benchmarks(evaluations: Sequence[Evaluation]) -> list[str]:
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


def common_items(evaluations: Sequence[Evaluation], benchmark: str, *, is_caption: bool = False) -> list[tuple[str, str]]:
    """(group, id) of the items that all evaluations have graded, in the order of the first."""
    first, *others = (evaluation.grades.get(benchmark, {}) for evaluation in evaluations)
    return [
        key for key, row in first.items() if all(key in grades for grades in others) and (not is_caption or _can_be_cut(row))
    ]


def _can_be_cut(row: Mapping[str, Any]) -> bool:
    """Whether a caption's objects are listed, and how many there are to name."""
    return mentions(row) is not None and "present" in row["counts"]
