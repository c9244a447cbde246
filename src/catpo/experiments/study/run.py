"""The engine of `catpo study`: pairs and scores, tuning, the cells that are reported, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.experiments.study.cells import Cell, Shared, cell_of, shared_of
from catpo.experiments.study.figures import check_figure, draw
from catpo.experiments.study.file import Row, Study, Tuning, read
from catpo.experiments.study.page import write_page
from catpo.experiments.study.results import Results, results, write_tables
from catpo.experiments.study.running import run_all
from catpo.experiments.study.tuning import Choice, choose
from catpo.files.json_files import write_json
from catpo.files.lock import lock
from catpo.files.provenance import versions
from catpo.training import objectives


@dataclass(frozen=True)
class Outcome:
    """What a study came to."""

    folder: Path
    """Tables, figures and report."""
    found: Results
    failed: Mapping[str, str]
    """Row (with rate or seed) -> why it failed."""


def study(file: str | Path, *, output: str | Path = "runs/studies", jobs: int = 1) -> Outcome:
    """Run a grid of methods, options and seeds to the end and write its tables and figures into `output/NAME`.

    What is finished is not done again, so a study that was killed goes on. Studies with the same `output` share pairs, scores
    and cells. A cell that fails is named at the end; the others go on.

    Args:
        file: the study, see docs/studies.md.
        output: folder for all studies.
        jobs: cells at the same time, each in a process with its share of the cores.

    Raises:
        UserError: the file is not as it should be, another process runs this study, or nothing at all could be run.
    """
    if jobs < 1:
        raise UserError(f"jobs={jobs} must be 1 or more.")
    plan, output = read(file), Path(output).resolve()  # cells keep paths: the same ones from wherever it is started
    for name, row in plan.rows.items():
        _check_objective(file, name, row)
    for name, text in plan.figures.items():
        check_figure(f"{file}: 'figures.{name}'", name, text)
    with lock(output / plan.name) as folder:
        return _Work(plan, output, jobs).run(folder)


def _check_objective(file: str | Path, name: str, row: Row) -> None:
    """A mistake in the last row is told before the first is trained."""
    if row.objective is not None:
        try:
            objectives.build(row.objective)
        except UserError as error:
            raise UserError(f"{file}: 'rows.{name}': {error}") from error


@dataclass
class _Work:
    """One study under way."""

    study: Study
    output: Path
    jobs: int
    failed: dict[str, str] = field(default_factory=dict)
    """What a user calls it -> reason."""

    def run(self, folder: Path) -> Outcome:
        wanted: list[tuple[int, Tuning | None]] = [(seed, None) for seed in self.study.seeds]
        cannot = self._share(wanted + ([(self.tuning.seed, self.tuning)] if self.is_tuned else []))
        choices = self._tune(cannot) if self.is_tuned else {name: Choice(self.study.rates[0]) for name in self._trained}
        cells = self._report(choices, cannot)
        if not cells:
            raise UserError(
                f"Nothing of {self.study.name} could be run. {'; '.join(f'{n}: {r}' for n, r in self.failed.items())}"
            )
        rates = {name: choices[name].rate if name in choices else None for name in cells}
        found = results(self.study, self.output, cells, rates)
        found.notes.extend(self._notes(choices))
        write_json(folder / "study.json", self._about(choices, cells))
        drawn = draw(found, self.output, folder)
        write_tables(found, folder)
        write_page(found, drawn, {name: choice.values for name, choice in choices.items()}, folder / "report.html")
        return Outcome(folder, found, self.failed)

    @property
    def tuning(self) -> Tuning:
        assert self.study.tuning is not None
        return self.study.tuning

    @property
    def is_tuned(self) -> bool:
        return len(self.study.rates) > 1

    @property
    def _trained(self) -> dict[str, Row]:
        return {name: row for name, row in self.study.rows.items() if row.objective is not None}

    def _run(self, tasks: Mapping[str, Cell | Shared], what: str) -> set[str]:
        """Run tasks by what a user calls them; those that failed."""
        reasons = run_all(
            list(tasks.values()),
            self.output,
            what=what,
            jobs=self.jobs,
            alone=self.study.measure,
            keep_models=self.study.keep_models,
        )
        failed = {called: reasons[task.name] for called, task in tasks.items() if task.name in reasons}
        self.failed |= failed
        return set(failed)

    def _share(self, wanted: list[tuple[int, Tuning | None]]) -> set[str]:
        """Pairs and scores of every row, seed and tuning; names of rows that will have none."""
        tasks = {}
        rows_of: dict[str, set[str]] = {}
        for seed, tuning in wanted:
            for name, row in self._trained.items():
                if row.rounds > 1:  # makes its own, of its own answers
                    continue
                shared = shared_of(self.study, row, seed=seed, tuning=tuning)
                called = f"pairs of {shared.method or 'the data set'}, seed {seed}"
                tasks[called] = shared
                rows_of.setdefault(called, set()).add(name)
        failed = self._run(tasks, "Pairs and scores")
        return {row for called in failed for row in rows_of[called]}

    def _tune(self, cannot: set[str]) -> dict[str, Choice]:
        untrained = cell_of(self.study, Row(), 0.0, seed=0, tuning=self.tuning)
        tried: dict[str, dict[float, Cell]] = {
            name: {rate: cell_of(self.study, row, rate, seed=self.tuning.seed, tuning=self.tuning) for rate in self.study.rates}
            for name, row in self._trained.items()
            if name not in cannot and row.tuned_as is None
        }
        tasks = {f"{name} at {rate:g}, tuning": cell for name, of in tried.items() for rate, cell in of.items()}
        self._run({"the untrained model, tuning": untrained, **tasks}, "Tuning")
        choices = {}
        for name, of in tried.items():
            finished = {rate: cell for rate, cell in of.items() if cell.is_finished(self.output)}
            if finished and untrained.is_finished(self.output):
                choices[name] = choose(finished, untrained, self.tuning.metric, self.output)
        borrowed = {name: row.tuned_as for name, row in self._trained.items() if row.tuned_as is not None}
        return choices | {name: choices[of] for name, of in borrowed.items() if of in choices and name not in cannot}

    def _report(self, choices: Mapping[str, Choice], cannot: set[str]) -> dict[str, dict[int, Cell]]:
        """Row -> seed -> finished cell."""
        wanted: dict[str, dict[int, Cell]] = {}
        for name, row in self.study.rows.items():
            if row.objective is None or (name in choices and name not in cannot):
                rate = choices[name].rate if name in choices else 0.0
                wanted[name] = {seed: cell_of(self.study, row, rate, seed=seed) for seed in self.study.seeds}
        self._run({f"{name}, seed {seed}": cell for name, of in wanted.items() for seed, cell in of.items()}, "Cells")
        finished = {name: {s: cell for s, cell in of.items() if cell.is_finished(self.output)} for name, of in wanted.items()}
        return {name: of for name, of in finished.items() if of}

    def _notes(self, choices: Mapping[str, Choice]) -> list[str]:
        edge = [name for name, choice in choices.items() if choice.is_at_the_edge and self.study.rows[name].tuned_as is None]
        notes = [f"{called} failed: {reason}" for called, reason in self.failed.items()]
        if edge:
            notes.append(f"The best learning rate is the smallest or largest tried for {', '.join(edge)}.")
        return notes

    def _about(self, choices: Mapping[str, Choice], cells: Mapping[str, Mapping[int, Cell]]) -> dict[str, Any]:
        tuned = {
            name: {
                "rate": choice.rate,
                "values": {f"{rate:g}": None if math.isnan(value) else value for rate, value in choice.values.items()},
            }
            for name, choice in choices.items()
        }
        return {
            "format": 1,
            "study": self.study.name,
            "tuned": tuned,
            "cells": {name: {str(seed): cell.name for seed, cell in of.items()} for name, of in cells.items()},
            "failed": self.failed,
            "versions": versions(),
        }
