"""catpo inside lmms-eval: exported tasks, the model plugin, and a real run where lmms-eval is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from catpo.core.errors import UserError
from catpo.data.read import open_data
from catpo.evaluation.benchmarks import scenes
from catpo.evaluation.evaluate import evaluate
from catpo.evaluation.lmms_eval import tasks
from catpo.evaluation.lmms_eval.model import Model, cut_at, decoding_of
from catpo.models.likelihood import option_losses

SCENES = "scenes(count=4)"


class Loader(yaml.SafeLoader):
    """Reads `!function module.name` as that function."""


def function(loader, node):
    module, _, name = loader.construct_scalar(node).rpartition(".")
    return getattr(importlib.import_module(module), name)


Loader.add_constructor("!function", function)


@pytest.fixture
def exported(tmp_path) -> tuple[dict, list[dict]]:
    """A task file and its questions."""
    assert tasks.export_tasks([SCENES], tmp_path / "tasks") == ["catpo_scenes"]
    task = yaml.load((tmp_path / "tasks/catpo_scenes.yaml").read_text(), Loader)
    questions = tmp_path / "tasks" / task["dataset_kwargs"]["data_files"]["test"]
    return task, [json.loads(line) for line in questions.read_text().splitlines()]


def test_an_exported_task_asks_and_scores_as_catpo_evaluate(exported, tmp_path):
    task, docs = exported
    loaded = evaluate(model="builtin", benchmarks=[SCENES], output=tmp_path / "evaluation", device="cpu", progress=False)
    answers = {row["id"]: row["answer"] for row in map(json.loads, (tmp_path / "evaluation/answers.jsonl").open())}
    assert [doc["id"] for doc in docs] == sorted(answers, key=[doc["id"] for doc in docs].index)
    graded = [task["process_results"](doc, [answers[doc["id"]]]) for doc in docs]
    metrics = {each["metric"]: each["aggregation"] for each in task["metric_list"]}
    assert set(metrics) == set(loaded["benchmarks"]["scenes"]["metrics"])
    for name, sum_up in metrics.items():
        value = loaded["benchmarks"]["scenes"]["metrics"][name]["value"]
        assert sum_up([row[name] for row in graded]) == pytest.approx(value, nan_ok=True)
    assert json.loads(json.dumps(graded)) == graded  # lmms-eval logs them


def test_a_task_shows_the_pictures_and_prompts_of_the_benchmark(exported):
    task, docs = exported
    sample = next(iter(open_data("scenes(count=4, split='test')").samples()))
    (shown,) = task["doc_to_visual"](docs[0])
    assert shown.tobytes() == sample.images[0].open().tobytes()
    assert task["doc_to_text"](docs[0], lmms_eval_specific_kwargs=None) == sample.prompt
    assert task["generation_kwargs"]["until"] == [] and task["generation_kwargs"]["max_new_tokens"] == 96


def test_a_judged_benchmark_is_exported_without_asking_and_graded_by_its_judge(tmp_path):
    row = {"question_type": "attribute", "image_id": "a", "image_src": "https://example.org/a.jpg", "image_content": ["Lamp"]}
    row |= {"question": "Lit?", "gt_answer": "Yes."}
    (tmp_path / "mmhal-bench_answer_template.json").write_text(json.dumps([row]))
    (tmp_path / "replies.jsonl").write_text('{"key": "0", "reply": "Rating: 5"}\n')
    judge = f"recorded(file='{tmp_path / 'replies.jsonl'}')"
    tasks.export_tasks(["mmhal"], tmp_path / "tasks", data=tmp_path, judge=judge)
    (doc,) = map(json.loads, (tmp_path / "tasks/catpo_mmhal.jsonl").open())
    assert doc["pictures"] == [str((tmp_path / "mmhal/images/a.jpg").resolve())]
    graded = tasks.grade(doc, ["It is."])
    assert tasks.sum_up([graded["score"]]) == 5.0


def test_a_benchmark_that_ranks_given_answers_is_not_exported(tmp_path, monkeypatch):
    items = scenes.Benchmark.items
    ranked = lambda *given: [replace(item, options={"A": "a", "B": "b"}) for item in items(*given)]
    monkeypatch.setattr(scenes.Benchmark, "items", ranked)
    with pytest.raises(UserError, match="ranks given answers"):
        tasks.export_tasks([SCENES], tmp_path / "tasks")


@pytest.mark.parametrize(
    ("options", "decoding"),
    [
        ({}, (1024, 0.0)),
        ({"max_new_tokens": 16, "temperature": 0}, (16, 0.0)),
        ({"temperature": 0.7, "do_sample": False}, (1024, 0.0)),
        ({"temperature": 0.7, "do_sample": True}, (1024, 0.7)),
    ],
)
def test_a_tasks_decoding_is_followed(options, decoding):
    assert decoding_of(options) == decoding


def test_an_answer_ends_where_the_task_says():
    text = "a\n\nb</s>"
    assert [cut_at(text, until) for until in ([], "\n\n", ["x", "</s>", "b"], [""])] == [text, "a", "a\n\n", text]


def test_the_model_answers_requests_in_order_as_the_family_does():
    samples = list(open_data("scenes(count=3, split='test')").samples())
    model = Model("builtin", batch_size=2, device="cpu")
    model.task_dict = {"t": {"test": [sample.images[0].open() for sample in samples]}}
    options = [{"max_new_tokens": 12, "temperature": 0, "until": []}, {"max_new_tokens": 5, "do_sample": False}]
    requests = [
        SimpleNamespace(args=(sample.prompt, options[number % 2], lambda image: [image], number, "t", "test"))
        for number, sample in enumerate(samples)
    ]
    expected = [
        model.family.generate([sample], max_new_tokens=12 if number % 2 == 0 else 5)[0] for number, sample in enumerate(samples)
    ]
    assert model.generate_until(requests) == expected
    requests[0].args = ("?", {}, lambda _: ["video.mp4"], 0, "t", "test")
    with pytest.raises(UserError, match="t/0 shows str instead of a picture"):
        model.generate_until(requests[:1])
    with pytest.raises(UserError, match="generate_until"):
        model.generate_until_multi_round([])


def test_the_model_says_how_likely_it_finds_given_answers():
    samples = list(open_data("scenes(count=2, split='test')").samples())
    model = Model("builtin", batch_size=4, device="cpu")
    model.task_dict = {"t": {"test": [sample.images[0].open() for sample in samples]}}
    answers = ["There is a dog.", "There is a bus in the street.", "Nothing."]
    requests = [
        SimpleNamespace(args=(sample.prompt, f" {answer}", lambda image: [image], number, "t", "test"))
        for answer in answers
        for number, sample in enumerate(samples)
    ]
    expected = option_losses(model.family, samples, [dict(zip("abc", answers, strict=True))] * 2)
    found = model.loglikelihood(requests)
    assert [loss for loss, _ in found] == pytest.approx([expected[number][key] for key in "abc" for number in (0, 1)], rel=1e-4)
    requests[0].args = ("?", str.upper, None, 0, "t", "test")
    with pytest.raises(UserError, match="its answers are not given"):
        model.loglikelihood(requests[:1])


@pytest.mark.slow
def test_lmms_eval_runs_the_model_and_a_task_of_catpo(tmp_path, monkeypatch):
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed: pip install 'catpo[lmms]'")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    from lmms_eval import evaluator
    from lmms_eval.models import registry_v2
    from lmms_eval.tasks import TaskManager

    from catpo.evaluation import lmms_eval

    assert lmms_eval.manifest() == registry_v2.ModelManifest("catpo", "catpo.evaluation.lmms_eval.model.Model")
    if sys.modules["catpo.evaluation.lmms_eval.model"].lmms is object:
        pytest.fail("catpo.evaluation.lmms_eval.model does not find lmms_eval")
    names = tasks.export_tasks([SCENES], tmp_path / "tasks", max_new_tokens=96)
    results = evaluator.simple_evaluate(
        model="catpo",
        model_args="model=builtin",
        tasks=names,
        batch_size=8,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager("WARNING", include_path=str(tmp_path / "tasks"), model_name="catpo"),
    )["results"]["catpo_scenes"]
    loaded = evaluate(model="builtin", benchmarks=[SCENES], output=tmp_path / "evaluation", device="cpu", progress=False)
    for name, figure in loaded["benchmarks"]["scenes"]["metrics"].items():
        assert results[f"{name},none"] == pytest.approx(figure["value"], nan_ok=True), name
