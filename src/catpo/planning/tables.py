"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from catpo.models.memory import readable
from catpo.planning.costs import CUDA_CONTEXT, CUDA_CONTEXT_NAME
from catpo.planning.dry_run import Plan
from catpo.text.tables import table_of

CARDS = {"A100": 312e12, "H100": 989e12}
"""Operations per second of dense bfloat16 products, by the maker's data sheets."""
SHARE = 0.4
"""Of that, what training usually reaches: an assumption, which no run of catpo has confirmed."""
FEW = 1e16
"""Operations below which a GPU has so little to do that its speed says nothing."""
UNITS = {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9}


def plan_tables(plan: Plan) -> list[Table | str]:
    """A plan as the terminal shows it."""
    parts: list[Table | str] = [_what(plan), _work(plan), _lengths(plan), _sizes(_where(plan), plan.memory)]
    if CUDA_CONTEXT_NAME not in plan.memory:
        parts.append(f"on an NVIDIA GPU, add about {CUDA_CONTEXT / 1e9:.1f} GB for CUDA itself")
    if plan.checkpoint:
        parts.append(f"one checkpoint on disk: {readable(plan.checkpoint)}")
    if plan.awaited:
        parts.append(f"{plan.awaited} does not exist yet: `catpo score` has to write it before this can run")
    if plan.store:
        parts.append(_sizes("reward store on disk", plan.store))
    return parts


def _what(plan: Plan) -> str:
    model = f"{plan.command} with {plan.model}: {plan.parameters:,} parameters, {plan.trained_parameters:,} trained"
    validation = f" and {plan.eval_pairs:,} for validation" if plan.eval_pairs else ""
    precision = f" ({plan.precision})" if plan.precision else ""
    return f"{model}{precision}; {plan.pairs:,} pairs{validation}"


def _work(plan: Plan) -> str:
    unit = "batches" if plan.command == "score" else "optimiser steps"
    work = f"{plan.steps:,} {unit}, {plan.token_passes:,.0f} token passes, {operations(plan.work.flops)}"
    if plan.work.flops < FEW:
        return work
    many = "an" if plan.processes == 1 else str(plan.processes)
    times = [f"{duration(plan.work.flops / (SHARE * peak * plan.processes))} on {many} {name}" for name, peak in CARDS.items()]
    return f"{work}: about {' or '.join(times)}, if {SHARE:.0%} of the card's peak is reached (not measured)"


def operations(count: float) -> str:
    """So many floating-point operations, as people read them.

    >>> operations(1.0377e18), operations(81.2e12)
    ('1.04 EFLOP', '81.2 TFLOP')
    """
    unit, factor = next((pair for pair in UNITS.items() if count >= pair[1]), ("GFLOP", 1e9))
    return f"{count / factor:.3g} {unit}"


def duration(seconds: float) -> str:
    """A length of time, to two figures or so.

    >>> duration(8300), duration(500), duration(20), duration(100_000)
    ('2 h 20 min', '8 min', '1 min', '28 h')
    """
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    if minutes >= 600:
        return f"{round(minutes / 60)} h"
    hours, rest = divmod(10 * round(minutes / 10), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def _where(plan: Plan) -> str:
    return "memory on the device" if plan.processes == 1 else f"memory on each of {plan.processes} devices, {plan.engine}"


def _lengths(plan: Plan) -> Table:
    table = table_of("tokens per pair", "minimum", "median", "maximum")
    for name, lengths in plan.tokens.items():
        table.add_row(name, str(lengths.least), f"{lengths.median:g}", str(lengths.most))
    return table


def _sizes(title: str, parts: Mapping[str, int]) -> Table:
    table = table_of(title, "")
    for name, size in parts.items():
        table.add_row(name, readable(size))
    table.add_section()
    table.add_row("total", readable(sum(parts.values())))
    return table
