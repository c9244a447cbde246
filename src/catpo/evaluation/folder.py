"""The folder of an evaluation: its four files, read and written here only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from catpo.core.errors import UserError
from catpo.core.spec import Spec
from catpo.evaluation.benchmarks import Item
from catpo.evaluation.bootstrap import Estimate
from catpo.evaluation.tasks import Task, hash_items
from catpo.files.json_files import read_json, read_rows
from catpo.files.provenance import check_same


@dataclass(frozen=True)
class Evaluation:
    """What one folder of `catpo evaluate` holds."""

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
        """Metric -> value and interval, as scores.json says."""
        metrics = self.scores.get("benchmarks", {}).get(benchmark, {}).get("metrics", {})
        return {name: Estimate(*(_number(each.get(key)) for key in ("value", "low", "high"))) for name, each in metrics.items()}

    def judge(self, benchmark: str) -> str:
        """Who graded, with version and decoding; empty where no judge did. Figures of different judges share no column."""
        identity = self.scores.get("benchmarks", {}).get(benchmark, {}).get("judge")
        return judge_name(identity) if identity else ""

    @cached_property
    def answers(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """(benchmark, item id) -> row of answers.jsonl."""
        answers: dict[tuple[str, str], Mapping[str, Any]] = {}
        for number, row in enumerate(read_rows(self.path / "answers.jsonl"), start=1):
            if not all(isinstance(row.get(name), str) for name in ("benchmark", "id", "answer")):
                raise UserError(f"{self.path / 'answers.jsonl'}:{number} is not an answer. Run `catpo evaluate` again.")
            answers[row["benchmark"], row["id"]] = row
        return answers

    def labels(self, benchmark: str) -> dict[str, list[tuple[str, str]]]:
        """Item id -> its caption's objects in the order named, with `grounded` or `hallucinated`."""
        rows = self.grades.get(benchmark, {})
        return {item: named for (_, item), row in rows.items() if (named := mentions(row)) is not None}


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
        UserError: the folder has no finished evaluation, or a row is not as it should be.
    """
    folder = Path(folder)
    if not (folder / "scores.json").is_file():
        raise UserError(
            f"{folder} holds no finished evaluation (no scores.json in it). Run `catpo evaluate --output {folder}`."
        )
    scores = _checked_scores(read_json(folder / "scores.json", made_by="catpo evaluate"), folder)
    grades: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for number, row in enumerate(read_rows(folder / "grades.jsonl"), start=1):
        if not _is_grade(row):
            raise UserError(f"{folder / 'grades.jsonl'}:{number} is not a graded answer. Run `catpo evaluate` again.")
        grades.setdefault(str(row["benchmark"]), {})[str(row["group"]), str(row["id"])] = row
    return Evaluation(folder, name or folder.resolve().name, scores, grades)


def _checked_scores(scores: dict[str, Any], folder: Path) -> dict[str, Any]:
    benchmarks = scores.get("benchmarks", {})
    is_scores = isinstance(benchmarks, dict) and all(isinstance(each, dict) for each in benchmarks.values())
    metrics = [each.get("metrics", {}) for each in benchmarks.values()] if is_scores else [None]
    for each in metrics:
        values = each.values() if isinstance(each, dict) else [None]
        if not all(isinstance(value, dict) and all(map(_is_number_or_none, value.values())) for value in values):
            raise UserError(f"{folder / 'scores.json'} does not hold scores of benchmarks. Run `catpo evaluate` again.")
    return scores


def _is_grade(row: Mapping[str, Any]) -> bool:
    counts, named = row.get("counts"), row.get("mentions")
    return (
        all(isinstance(row.get(name), str) for name in ("benchmark", "id", "group", "picture"))
        and isinstance(counts, dict)
        and all(value is not None and _is_number_or_none(value) for value in counts.values())
        and (named is None or (isinstance(named, list) and all(_is_mention(each) for each in named)))
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


BEGUN = {
    "benchmarks": dict[str, str], "data": str | None, "judge": str | None, "limit": int | None, "shuffled": bool,
    "decoding": dict, "skipped": dict[str, str] | None,
}  # fmt: skip
"""What grading reads in evaluation.json."""


ANSWER = {"benchmark": str, "id": str, "answer": str}
"""And in a row of answers.jsonl."""


def about(
    tasks: Sequence[Task],
    *,
    data: str | Path | None,
    judge: str | Spec | None,
    limit: int | None,
    shuffled: bool,
    decoding: Mapping[str, Any],
) -> dict[str, Any]:
    """What must stay the same when an evaluation is gone on with."""
    return {
        "format": 1,
        "benchmarks": {task.name: str(task.spec) for task in tasks},
        "data": str(data) if data is not None else None,
        "judge": str(judge) if judge is not None else None,
        "limit": limit,
        "shuffled": shuffled,
        "decoding": dict(decoding),
        "items_hash": hash_items(tasks),
        "data_hashes": {task.name: dict(task.hashes) for task in tasks if task.hashes},
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / ABOUT, made_by="catpo evaluate", fields=BEGUN)


def check_begun(folder: Path, begun: Mapping[str, Any]) -> None:
    """Refuse to go on with another model or other options than those the folder was begun with."""
    if (folder / ABOUT).exists():
        old = read_json(folder / ABOUT, made_by="catpo evaluate")
        check_same({key: old.get(key) for key in begun}, begun, where=folder)
    elif (folder / ANSWERS).exists():
        raise UserError(f"{folder} holds answers without {ABOUT}, so nobody knows whose they are. Choose another --output.")


def without_skipped(tasks: Sequence[Task], folder: Path) -> list[Task]:
    """The tasks without the items that the evaluation in `folder` leaves out."""
    left_out = read_manifest(folder).get("skipped") or {}
    return [replace(task, items=[item for item in task.items if f"{task.name}/{item.id}" not in left_out]) for task in tasks]


# ---- answers made elsewhere -----------------------------------------------------------------------------------------------


def answer_row(task: Task, item: Item, answer: str) -> dict[str, str]:
    """A row of answers.jsonl."""
    return {"benchmark": task.name, "id": item.id, "prompt": item.sample.prompt, "answer": answer}


GROUNDED, HALLUCINATED = "grounded", "hallucinated"


ABOUT, ANSWERS, GRADES, SCORES = "evaluation.json", "answers.jsonl", "grades.jsonl", "scores.json"
