"""catpo's benchmarks as tasks of lmms-eval: it asks and logs, catpo grades and sums up.

`export_tasks` writes `catpo_NAME.yaml` and the questions beside it; such a file names the other public functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from catpo.core.checks import check_positive
from catpo.core.errors import UserError
from catpo.core.spec import Spec
from catpo.core.types import Picture
from catpo.evaluation.benchmarks import Item
from catpo.evaluation.bootstrap import resample
from catpo.evaluation.grade import grade_row, open_judges
from catpo.evaluation.tasks import Task, open_tasks
from catpo.files.atomic import write_atomic
from catpo.judges import Judge

YAML = """\
# Written by `catpo data lmms-eval`. Run it: lmms-eval --include_path FOLDER --tasks {task}
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function catpo.evaluation.lmms_eval.tasks.pictures
doc_to_text: !function catpo.evaluation.lmms_eval.tasks.prompt
doc_to_target: ""
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
  until: []   # lmms-eval's default cuts an answer at its first empty line
process_results: !function catpo.evaluation.lmms_eval.tasks.grade
metric_list:
{metrics}
"""
METRIC = """\
- metric: {name}
  aggregation: !function catpo.evaluation.lmms_eval.tasks.sum_up
  higher_is_better: null
"""


def export_tasks(
    benchmarks: Sequence[str | Spec],
    output: str | Path,
    *,
    data: str | Path | None = None,
    judge: str | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> list[str]:
    """Write each benchmark as a task of lmms-eval, and return the tasks' names.

    Args:
        benchmarks: with their options.
        output: folder for the tasks, for lmms-eval's `--include_path`.
        data: folder with the benchmarks' official files.
        judge: who grades what needs a judge.
        limit: only the first N pictures of each benchmark.
        max_new_tokens: where an answer is cut; each benchmark's own if None.

    Raises:
        UserError: a benchmark or its files are not there, or it ranks given answers.
    """
    check_positive(limit=limit, max_new_tokens=max_new_tokens)
    folder = Path(output)
    names = []
    for task in open_tasks(benchmarks, data=data, limit=limit, is_answered_here=True):
        if any(item.options is not None for item in task.items):
            raise UserError(
                f"{task.spec} ranks given answers, which tasks do not. Choose a protocol in which the model writes."
            )
        name = f"catpo_{task.name}"
        folder.mkdir(parents=True, exist_ok=True)
        origin = {"benchmark": str(task.spec), "data": str(Path(data).resolve()) if data else None, "judge": judge}
        rows = [_question(item, folder, origin) for item in task.items]
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        metrics = "".join(METRIC.format(name=metric) for metric in _metric_names(task))
        longest = max_new_tokens or task.benchmark.max_new_tokens
        text = YAML.format(task=name, questions=f"{name}.jsonl", max_new_tokens=longest, metrics=metrics.rstrip())
        write_atomic(folder / f"{name}.yaml", text)
        names.append(name)
    return names


def prompt(doc: Mapping[str, Any], **_: Any) -> str:
    """What the model is asked."""
    return str(doc["prompt"])


def pictures(doc: Mapping[str, Any]) -> list[Image.Image]:
    """What it is shown."""
    return [Picture(path=Path(path)).open() for path in doc["pictures"]]


def grade(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """An answer's grade, once for every metric: metrics are made of the sums of all."""
    origin = {name: doc[name] for name in ("benchmark", "data", "judge")}
    opened = _opened(**origin)
    row = grade_row(opened.task, opened.items[doc["id"]], results[0], opened.judge)
    return {metric: {"metric": metric, "origin": origin, **row} for metric in opened.metrics}


def sum_up(rows: Sequence[Mapping[str, Any]]) -> float:
    """A metric of all answers' grades."""
    task = _opened(**rows[0]["origin"]).task
    return float(resample(task.benchmark.summarise, rows, resamples=0)[rows[0]["metric"]][0])


class _Opened:
    """A benchmark, ready to grade."""

    def __init__(self, benchmark: str, data: str | None, judge: str | None) -> None:
        (self.task,) = open_tasks([benchmark], data=data, is_answered_here=True)
        self.items = {item.id: item for item in self.task.items}
        self.metrics = _metric_names(self.task)
        self.judge = open_judges([self.task], judge).get(self.task.name)


_opened = cache(_Opened)


def _metric_names(task: Task) -> list[str]:
    """Names of the metrics, from summing up one empty answer of each group."""
    first = {item.group: item for item in reversed(task.items)}
    rows = [grade_row(task, item, "", _Silent()) for item in first.values()]
    return list(resample(task.benchmark.summarise, rows, resamples=0))


class _Silent(Judge):
    """Replies nothing."""

    identity: ClassVar[dict[str, Any]] = {}

    def ask(self, messages: list[dict[str, Any]], *, key: str, attempt: int = 1) -> str:
        return ""


def _question(item: Item, folder: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
    paths = [str(_kept(picture, folder).resolve()) for picture in item.sample.images]
    return {"id": item.id, "prompt": item.sample.prompt, "pictures": paths, **origin}


def _kept(picture: Picture, folder: Path) -> Path:
    """Where the picture's file is; one that has none is written beside the tasks."""
    if picture.path is not None:
        return picture.path
    path = folder / "pictures" / picture.digest()
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        write_atomic(path, picture.read(), is_durable=False)
    return path
