"""Ranking given answers by their loss: against one forward pass per option, and through SEED-Bench."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from catpo.core.conversation import Turn
from catpo.data.read import open_data
from catpo.evaluation.evaluate import evaluate
from catpo.models import loading
from catpo.models.likelihood import most_likely, option_losses


@pytest.fixture(scope="module")
def family(builtin):
    return loading.load("builtin")


@pytest.fixture(scope="module")
def samples():
    first, *others = open_data("scenes(count=3)").samples()
    return [replace(first, history=(Turn("user", "Is there a dog?"), Turn("assistant", "No."))), *others]


def loss_alone(family, sample, text):
    """One row, no padding, no neighbour: the mean negative log-probability of the answer's tokens."""
    prompt = family.prompt_text(sample.prompt, 1, history=sample.history)
    inputs = family.process([sample.images], [prompt])
    answer = torch.tensor([family.response_ids(prompt, text)])
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    extra = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        logits = family.model(input_ids=ids, **extra).logits[0, -answer.shape[1] - 1 : -1].double()
    return -logits.log_softmax(-1)[range(answer.shape[1]), answer[0]].mean().item()


def test_each_option_s_loss_is_that_of_a_row_of_its_own(family, samples):
    options = [
        {"A": "a dog", "B": "a red car and a tree", "C": "nothing", "D": "two cats"},
        {"A": "yes", "B": "no", "C": "a dog"},
        {"only": "a bird"},
    ]
    found = option_losses(family, samples, options, batch_size=2)
    assert [list(each) for each in found] == [list(each) for each in options]
    for sample, each, losses in zip(samples, options, found, strict=True):
        for name, text in each.items():
            assert losses[name] == pytest.approx(loss_alone(family, sample, text), abs=1e-4)
    chosen = most_likely(family, samples, options)
    assert chosen == [min(losses, key=losses.get) for losses in found]


def test_separate_rows_rank_as_shared_ones(family, samples, monkeypatch):
    options = [{"A": "a dog", "B": "a car", "C": "a tree and a bird"}]
    shared = option_losses(family, samples[:1], options)[0]
    monkeypatch.setattr(type(family), "shares_prefix", False)
    assert option_losses(family, samples[:1], options)[0] == pytest.approx(shared, abs=1e-4)


def test_seed_s_official_protocol_chooses_among_the_options(samples, tmp_path):
    folder = tmp_path / "seed_bench" / "SEED-Bench-image"
    folder.mkdir(parents=True)
    questions = []
    for number, sample in enumerate(samples):
        (folder / f"{number}.png").write_bytes(sample.images[0].read())
        choices = {f"choice_{letter}": f"a {word}" for letter, word in zip("abcd", ("dog", "car", "tree", "cat"), strict=True)}
        questions.append({"question_id": str(number), "question": "What is there?", "answer": "A", "data_id": f"{number}.png",
                          "data_type": "image", "question_type_id": 1, **choices})  # fmt: skip
    content = {"questions": questions, "question_type": {"Scene Understanding": 1}}
    (tmp_path / "seed_bench" / "SEED-Bench.json").write_text(json.dumps(content))
    scores = evaluate(
        model="builtin", benchmarks=["seed(protocol='likelihood')"], data=tmp_path, output=tmp_path / "out", progress=False
    )["benchmarks"]["seed"]
    assert scores["metrics"]["unparsed"]["value"] == 0
    assert scores["tools"]["protocol"] == "likelihood"
    assert set(scores["metrics"]) == {"accuracy", "unparsed", "scene_understanding/accuracy"}
