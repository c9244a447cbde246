"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from catpo.models.memory import readable
from catpo.planning.dry_run import Plan


def plan_tables(plan: Plan) -> list[Table | str]:
    """A plan as the terminal shows it."""
    parts: list[Table | str] = [_what(plan), _work(plan), _lengths(plan), _sizes(_where(plan), plan.memory)]
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
    return f"{model}; {plan.pairs:,} pairs{validation}"


def _work(plan: Plan) -> str:
    unit = "batches" if plan.command == "score" else "optimiser steps"
    return f"{plan.steps:,} {unit}, {plan.token_passes:,.0f} token passes, {plan.work.flops / 1e15:,.3g} PFLOP"


def _where(plan: Plan) -> str:
    return "memory on the device" if plan.processes == 1 else f"memory on each of {plan.processes} devices, {plan.engine}"


def _lengths(plan: Plan) -> Table:
    table = Table("tokens per pair", "minimum", "median", "maximum")
    for name, lengths in plan.tokens.items():
        table.add_row(name, str(lengths.least), f"{lengths.median:g}", str(lengths.most))
    return table


def _sizes(title: str, parts: Mapping[str, int]) -> Table:
    table = Table(title, "")
    for name, size in parts.items():
        table.add_row(name, readable(size))
    table.add_section()
    table.add_row("total", readable(sum(parts.values())))
    return table
