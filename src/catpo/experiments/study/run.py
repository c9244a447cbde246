"""The engine of `catpo study`: pairs and scores, tuning, the cells that are reported, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from catpo.core.errors import UserError
from catpo.experiments.study.cells import Cell, Keep, Shared, cell_of, lenders, shared_of
from catpo.experiments.study.figures import check_figure, draw
from catpo.experiments.study.file import Row, Study, Tuning, read
from catpo.experiments.study.page import write_page
from catpo.experiments.study.results import Results, collect, write_tables
from catpo.experiments.study.running import run_all
from catpo.experiments.study.tuning import Choice, choose
from catpo.files.json_files import write_json
from catpo.files.lock import lock
from catpo.files.provenance import versions
from catpo.runtime.progress import tell_complete
from catpo.training import objectives

Key = TypeVar("Key")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a study."""

    folder: Path
    """Tables, figures and report."""
    results: Results
    failed: Mapping[str, str]
    """Row with its rate or seed -> why it failed."""


def study(file: str | Path, *, output: str | Path = "runs/studies", jobs: int = 1) -> Outcome:
    """Run a grid of methods, options and seeds, and write its tables and figures into `output/NAME`.

    Finished work is not repeated, so an interrupted study resumes. Studies with the same `output` share pairs, scores and
    cells. A cell that fails is named at the end; the others run on.

    Args:
        file: the study, see docs/how-to/studies.md.
        output: folder for all studies.
        jobs: cells run at the same time, each in a process with its share of the cores.

    Raises:
        UserError: the file has a mistake, another process runs this study, or nothing at all could be run.
    """
    if jobs < 1:
        raise UserError(f"jobs={jobs} must be 1 or more.")
    plan, output = read(file), Path(output).resolve()  # absolute, since names of cells depend on paths that are in them
    for name, row in plan.rows.items():  # a mistake in the last row shows before the first is trained
        if row.objective is not None:
            try:
                objectives.build(row.objective)
            except UserError as error:
                raise UserError(f"{file}: 'rows.{name}': {error}") from error
    for name, text in plan.figures.items():
        check_figure(f"{file}: 'figures.{name}'", name, text)
    with lock(output / plan.name) as folder:
        return _Work(plan, output, jobs).run(folder)


@dataclass
class _Work:
    """A study in progress."""

    study: Study
    output: Path
    jobs: int
    failed: dict[str, str] = field(default_factory=dict)
    """A task as users know it -> why it failed."""
    is_given_again: bool = True
    """Whether everything so far had been finished before."""

    def run(self, folder: Path) -> Outcome:
        study = self.study
        without_pairs = self._make_pairs()
        tuning = study.tuning if len(study.rates) > 1 else None
        if tuning is None:
            choices = {name: Choice(study.rates[0]) for name in self._trained}
        else:
            choices = self._tune(tuning, without_pairs)
        cells = self._run_cells(choices, without_pairs)
        if not cells:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in self.failed.items())
            raise UserError(f"Nothing of {study.name} could be run. {reasons}")
        if self.is_given_again:
            tell_complete(folder, "Its tables and figures are made again.")
        rates = {name: choices[name].rate if name in choices else None for name in cells}
        results = collect(study, self.output, cells, rates)
        results.notes.extend(self._notes(choices))
        write_json(folder / "study.json", self._manifest(choices, cells))
        drawn = draw(results, self.output, folder)
        write_tables(results, folder)
        write_page(results, drawn, {name: choice.values for name, choice in choices.items()}, folder / "report.html")
        return Outcome(folder, results, self.failed)

    @property
    def _trained(self) -> dict[str, Row]:
        return {name: row for name, row in self.study.rows.items() if row.objective is not None}

    def _run(self, tasks: Mapping[str, Cell | Shared], what: str) -> set[str]:
        """Run tasks by their label for users; returns the labels of those that failed."""
        self.is_given_again &= all(task.is_finished(self.output) for task in tasks.values())
        cells = [task for task in tasks.values() if isinstance(task, Cell)]
        lending = lenders(cells)
        keep: dict[str, Keep] = {cell.name: "lent" for cell in lending}
        if self.study.keep_models:
            keep = {cell.name: "model" for cell in cells}
        alone = self.study.measure
        reasons = run_all([*tasks.values()], self.output, what=what, jobs=self.jobs, alone=alone, keep=keep)
        for cell in lending:
            cell.take_back(self.output)
        failed = {label: reasons[task.name] for label, task in tasks.items() if task.name in reasons}
        self.failed |= failed
        return set(failed)

    def _make_pairs(self) -> set[str]:
        """Make pairs and scores for every row, seed and the tuning; returns the rows for which that failed."""
        wanted: list[tuple[int, Tuning | None]] = [(seed, None) for seed in self.study.seeds]
        if self.study.tuning is not None and len(self.study.rates) > 1:
            wanted.append((self.study.tuning.seed, self.study.tuning))
        tasks: dict[str, Cell | Shared] = {}
        rows_of: dict[str, set[str]] = {}
        for seed, tuning in wanted:
            for name, row in self._trained.items():
                if row.rounds > 1:  # makes its own, of its own answers
                    continue
                shared = shared_of(self.study, row, seed=seed, tuning=tuning)
                label = f"pairs of {shared.method or 'the data set'}, seed {seed}"
                tasks[label] = shared
                rows_of.setdefault(label, set()).add(name)
        failed = self._run(tasks, "Pairs and scores")
        return {row for label in failed for row in rows_of[label]}

    def _tune(self, tuning: Tuning, without_pairs: set[str]) -> dict[str, Choice]:
        """Row -> its learning rate: the best of its own, or that of the row it names in `tuned_as`."""
        untrained = cell_of(self.study, Row(), 0.0, seed=0, tuning=tuning)
        tasks: dict[str, Cell | Shared] = {"the untrained model, tuning": untrained}
        candidates: dict[str, dict[float, Cell]] = {}
        for name, row in self._trained.items():
            if name in without_pairs or row.tuned_as is not None:
                continue
            candidates[name] = {}
            for rate in self.study.rates:
                cell = cell_of(self.study, row, rate, seed=tuning.seed, tuning=tuning)
                candidates[name][rate] = tasks[f"{name} at {rate:g}, tuning"] = cell
        self._run(tasks, "Tuning")
        choices = {}
        for name, by_rate in candidates.items():
            finished = _finished(by_rate, self.output)
            if finished and untrained.is_finished(self.output):
                choices[name] = choose(finished, untrained, tuning.metric, self.output)
        for name, row in self._trained.items():
            if row.tuned_as in choices and name not in without_pairs:
                choices[name] = choices[row.tuned_as]
        return choices

    def _run_cells(self, choices: Mapping[str, Choice], without_pairs: set[str]) -> dict[str, dict[int, Cell]]:
        """Run what is reported; row -> seed -> finished cell."""
        cells: dict[str, dict[int, Cell]] = {}
        tasks: dict[str, Cell | Shared] = {}
        for name, row in self.study.rows.items():
            if row.objective is not None and (name not in choices or name in without_pairs):
                continue
            rate = choices[name].rate if name in choices else 0.0
            cells[name] = {seed: cell_of(self.study, row, rate, seed=seed) for seed in self.study.seeds}
            tasks |= {f"{name}, seed {seed}": cell for seed, cell in cells[name].items()}
        self._run(tasks, "Cells")
        finished = {name: _finished(by_seed, self.output) for name, by_seed in cells.items()}
        return {name: by_seed for name, by_seed in finished.items() if by_seed}

    def _notes(self, choices: Mapping[str, Choice]) -> list[str]:
        edge = [name for name, choice in choices.items() if choice.is_at_the_edge and self.study.rows[name].tuned_as is None]
        notes = [f"{label} failed: {reason}" for label, reason in self.failed.items()]
        if edge:
            notes.append(f"The best learning rate is the smallest or largest tried for {', '.join(edge)}.")
        return notes

    def _manifest(self, choices: Mapping[str, Choice], cells: Mapping[str, Mapping[int, Cell]]) -> dict[str, Any]:
        """The content of `study.json`."""
        tuned = {}
        for name, choice in choices.items():
            values = {f"{rate:g}": None if math.isnan(value) else value for rate, value in choice.values.items()}
            tuned[name] = {"rate": choice.rate, "values": values}
        return {
            "format": 1,
            "study": self.study.name,
            "tuned": tuned,
            "cells": {name: {str(seed): cell.name for seed, cell in by_seed.items()} for name, by_seed in cells.items()},
            "failed": self.failed,
            "versions": versions(),
        }


def _finished(cells: Mapping[Key, Cell], output: Path) -> dict[Key, Cell]:
    return {key: cell for key, cell in cells.items() if cell.is_finished(output)}
