"""The folder of an evaluation: its four files, read and written here only.

evaluation.json says what was asked and of whom, answers.jsonl grows batch by batch, grades.jsonl is made of the answers,
scores.json of the grades, last: it marks a finished evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

from catpo.core.errors import UserError
from catpo.evaluation.benchmarks import GROUNDED as GROUNDED
from catpo.evaluation.benchmarks import HALLUCINATED as HALLUCINATED
from catpo.evaluation.bootstrap import Estimate
from catpo.files.json_files import append_rows, read_json, read_rows, repair_rows, write_json, write_rows
from catpo.files.provenance import check_same, versions
from catpo.files.strict_json import check_fields, fits

MANIFEST = {
    "benchmarks": dict[str, str], "data": str | None, "judge": str | None, "limit": int | None, "shuffled": bool,
    "decoding": dict, "skipped": dict[str, str] | None,
}  # fmt: skip
"""What grading reads in evaluation.json."""
SERVER = {"server": {"answered_by": list[str]}}
"""What evaluation.json keeps of a server."""
ANSWER = {"benchmark": str, "id": str, "answer": str}
"""What every row of answers.jsonl has."""


class EvaluationFolder:
    """Reads and writes the four files of an evaluation."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = self.path / "evaluation.json"
        self.answers = self.path / "answers.jsonl"
        self.grades = self.path / "grades.jsonl"
        self.scores = self.path / "scores.json"

    # ---- evaluation.json ----------------------------------------------------------------------------------------------

    def read_manifest(self) -> dict[str, Any]:
        return read_json(self.manifest, made_by="catpo evaluate", fields=MANIFEST)

    def check_same(self, manifest: Mapping[str, Any]) -> None:
        """Raise UserError if the folder was created with a different model or options."""
        if self.manifest.exists():
            old = read_json(self.manifest, made_by="catpo evaluate")
            check_same({key: old.get(key) for key in manifest}, manifest, where=self.path)
        elif self.answers.exists():
            raise UserError(
                f"{self.path} holds answers without {self.manifest.name}, so their model is unknown. Choose another --output."
            )

    def write_manifest(self, manifest: Mapping[str, Any], **more: Any) -> None:
        write_json(self.manifest, {**manifest, "versions": versions(), **more})

    def note_server(self, url: str, answered_by: Iterable[str]) -> None:
        """Where the answers came from, and what the server called its model."""
        manifest = {"server": {"answered_by": []}, **read_json(self.manifest, made_by="catpo evaluate")}
        check_fields(manifest, SERVER, place=str(self.manifest), remedy=f"Remove {self.path} and start again.")
        names = sorted({*answered_by, *manifest["server"]["answered_by"]})
        write_json(self.manifest, {**manifest, "server": {"url": url, "answered_by": names}})

    # ---- answers.jsonl ------------------------------------------------------------------------------------------------

    def read_answers(self) -> list[dict[str, Any]]:
        return read_rows(self.answers, ANSWER)

    def append_answers(self, rows: Iterable[Mapping[str, Any]]) -> None:
        append_rows(self.answers, rows)

    def write_answers(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_rows(self.answers, rows)

    def resume_answers(self, batches: Sequence[Sequence[tuple[str, str]]]) -> int:
        """How many batches of (benchmark, item id) are answered; a part of one, of a killed process, is dropped.

        Raises:
            UserError: an answer is not that of the item whose turn it is.
        """
        rows = repair_rows(self.answers, ANSWER)
        wanted = [key for batch in batches for key in batch]
        remedy = "Remove the folder and start again."
        for number, (row, key) in enumerate(zip(rows, wanted, strict=False), start=1):
            if (row["benchmark"], row["id"]) != key:
                raise UserError(f"{self.answers}:{number} answers '{row['id']}' where '{key[1]}' belongs. {remedy}")
        if len(rows) > len(wanted):
            raise UserError(f"{self.answers} has {len(rows)} answers to {len(wanted)} items. {remedy}")
        done = answered = 0
        while done < len(batches) and answered + len(batches[done]) <= len(rows):
            answered += len(batches[done])
            done += 1
        if answered < len(rows):
            self.write_answers(rows[:answered])
        return done

    # ---- grades.jsonl, scores.json ------------------------------------------------------------------------------------

    def write_grades(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_rows(self.grades, rows)

    def write_scores(self, scores: Mapping[str, Any]) -> None:
        write_json(self.scores, scores)


def answers_items(rows: Sequence[Mapping[str, Any]], items: Sequence[tuple[str, str]]) -> bool:
    """Whether the rows are answers to exactly these items, in this order."""
    return all(fits(row, ANSWER) for row in rows) and [(row["benchmark"], row["id"]) for row in rows] == list(items)


# ---- a finished evaluation ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What the folder of a finished evaluation holds."""

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
        """Metric -> value and interval, as in scores.json."""
        metrics = self._of(benchmark).get("metrics", {})
        return {name: Estimate(*(_number(row.get(key)) for key in ("value", "low", "high"))) for name, row in metrics.items()}

    def judge(self, benchmark: str) -> str:
        """Who graded, with version and decoding; empty where no judge did. Scores of different judges are not comparable."""
        identity = self._of(benchmark).get("judge")
        return judge_name(identity) if identity else ""

    def _of(self, benchmark: str) -> Mapping[str, Any]:
        return self.scores.get("benchmarks", {}).get(benchmark, {})

    @cached_property
    def data(self) -> str | None:
        """The folder of official files that the evaluation read, if any."""
        return read_json(EvaluationFolder(self.path).manifest).get("data")

    @cached_property
    def precision(self) -> str | None:
        """That of the weights which answered, where it is known."""
        return read_json(EvaluationFolder(self.path).manifest).get("precision")

    @cached_property
    def answers(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """(benchmark, item id) -> row of answers.jsonl."""
        return {(row["benchmark"], row["id"]): row for row in EvaluationFolder(self.path).read_answers()}

    def labels(self, benchmark: str) -> dict[str, list[tuple[str, str]]]:
        """Item id -> its caption's objects in the order named, with `grounded` or `hallucinated`."""
        labels = {}
        for (_, item), row in self.grades.get(benchmark, {}).items():
            named = mentions(row)
            if named is not None:
                labels[item] = named
        return labels


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
        UserError: the folder has no finished evaluation, or a row is not as it was written.
    """
    files = EvaluationFolder(folder)
    if not files.scores.is_file():
        raise UserError(
            f"{folder} holds no finished evaluation (no {files.scores.name} in it). Run `catpo evaluate "
            f"--output {quote(str(folder))}`."
        )
    scores = read_json(files.scores, made_by="catpo evaluate")
    if not _is_scores(scores.get("benchmarks", {})):
        raise UserError(f"{files.scores} does not hold scores of benchmarks. Run `catpo evaluate` again.")
    grades: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for number, row in enumerate(read_rows(files.grades), start=1):
        if not _is_grade(row):
            raise UserError(f"{files.grades}:{number} is not a graded answer. Run `catpo evaluate` again.")
        grades.setdefault(row["benchmark"], {})[row["group"], row["id"]] = row
    return Evaluation(files.path, name or files.path.resolve().name, scores, grades)


def _is_scores(benchmarks: Any) -> bool:
    if not isinstance(benchmarks, dict):
        return False
    for scores in benchmarks.values():
        metrics = scores.get("metrics", {}) if isinstance(scores, dict) else None
        if not isinstance(metrics, dict):
            return False
        for estimate in metrics.values():
            if not isinstance(estimate, dict) or not all(map(_is_number_or_none, estimate.values())):
                return False
    return True


def _is_grade(row: Mapping[str, Any]) -> bool:
    counts, named = row.get("counts"), row.get("mentions")
    return (
        all(isinstance(row.get(name), str) for name in ("benchmark", "id", "group", "picture"))
        and isinstance(counts, dict)
        and all(value is not None and _is_number_or_none(value) for value in counts.values())
        and (named is None or (isinstance(named, list) and all(map(_is_mention, named))))
    )


def _is_mention(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[1] in (GROUNDED, HALLUCINATED)


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def mentions(row: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """Objects of a graded caption in the order named, each once, with `grounded` or `hallucinated`; None for other items."""
    listed = row.get("mentions")
    return None if listed is None else [(str(name), str(label)) for name, label in listed]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
