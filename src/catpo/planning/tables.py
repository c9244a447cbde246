"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from catpo.models.memory import readable
from catpo.planning.dry_run import Plan


def plan_tables(made: Plan) -> list[Table | str]:
    """A plan as the terminal shows it."""
    lengths = Table("tokens per pair", "least", "median", "most")
    for name, found in made.tokens.items():
        lengths.add_row(name, str(found.least), f"{found.median:g}", str(found.most))
    head = (
        f"{made.command} with {made.model}: {made.parameters:,} parameters, {made.trained_parameters:,} of them trained; "
        f"{made.pairs:,} pairs" + (f" and {made.eval_pairs:,} for validation" if made.eval_pairs else "")
    )
    work = (
        f"{made.steps:,} {'batches' if made.command == 'score' else 'optimiser steps'}, {made.token_passes:,.0f} token passes, "
        f"{made.work.flops / 1e15:,.3g} PFLOP"
    )
    where = "memory on the device" if made.processes == 1 else f"memory on each of {made.processes} devices, {made.engine}"
    shown: list[Table | str] = [head, work, lengths, _sizes(where, made.memory)]
    if made.checkpoint:
        shown.append(f"one checkpoint on disk: {readable(made.checkpoint)}")
    if made.awaited:
        shown.append(f"{made.awaited} does not exist yet: `catpo score` has to write it before this can run")
    return [*shown, _sizes("reward store on disk", made.store)] if made.store else shown


def _sizes(title: str, parts: Mapping[str, int]) -> Table:
    table = Table(title, "")
    for name, size in parts.items():
        table.add_row(name, readable(size))
    table.add_section()
    table.add_row("together", readable(sum(parts.values())))
    return table
