"""Score, train, evaluate and report with a checkpoint of every family on disk."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from catpo.data.read import open_data
from catpo.evaluation.evaluate import evaluate
from catpo.files.json_files import read_rows
from catpo.models.loading import load
from catpo.reporting.build import report
from catpo.rewards.store import RewardStore
from catpo.scoring.score import score
from catpo.training.train import train
from family_checks import packed_outputs, sized_pair
from tiny_families import BUILDERS, build

EVERY = list(BUILDERS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs, and photographs with captions, as folders; one with two pictures would not suit PaliGemma."""
    folder = tmp_path_factory.mktemp("data")
    with open(folder / "pairs.jsonl", "w") as pairs, open(folder / "photos.jsonl", "w") as photos:
        for number in range(4):
            pair, image = sized_pair(number), f"{number}.png"
            (folder / image).write_bytes(pair.images[0].read())
            row = {"image": image, "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            pairs.write(json.dumps(row) + "\n")
            photos.write(json.dumps({"image": image, "references": ["A cat on a table."]}) + "\n")
    return folder


@pytest.fixture(scope="module", params=EVERY)
def made(request, tmp_path_factory, data):
    """A checkpoint with its reward store and a LoRA and a full run, as the commands make them."""
    folder = tmp_path_factory.mktemp(request.param)
    family = build(request.param)
    family.model.save_pretrained(folder / "model")
    family.processor.save_pretrained(folder / "model")
    common = dict(pairs=str(data / "pairs.jsonl"), model=folder / "model", progress=False)
    score(**common, output=folder / "rewards")
    settings = dict(
        rewards=folder / "rewards", per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=2,
        eval_fraction=0.25, logging_steps=1,
    )  # fmt: skip
    train(**common, **settings, output=folder / "lora", lora="lora(r=4, alpha=8)", learning_rate=1e-2)
    train(**common, **settings, output=folder / "full", lora=None, learning_rate=1e-3)
    return folder


def test_every_token_has_signals_and_the_map_fits_the_grids(made, data):
    store = RewardStore.open(made / "rewards")
    assert len(store) == 4
    family = load(made / "model")
    for pair in open_data(data / "pairs.jsonl").pairs():
        encoded = family.encode(pair)
        for side in ("chosen", "rejected"):
            row = store.get(pair.id, side)
            assert list(row.token_ids) == encoded.response_ids[side]
            assert sum(grid.size for grid in row.grids) == len(encoded.patches)
            assert all(np.isfinite(values).all() and np.ptp(values) > 0 for values in row.signals.values())
            attention = store.maps(pair.id, side).astype(np.float32)
            assert attention.sum(1) == pytest.approx(row.signals["global_attention"], rel=0.01, abs=2e-3)


def first_line(run):
    return read_rows(run / "metrics.jsonl")[0]


@pytest.mark.parametrize("run", ["lora", "full"])
def test_the_first_loss_is_log_2(made, run):
    """The stored reference is what the packed training row gives, and 0 KL from it."""
    first = first_line(made / run)
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["kl/chosen"] == pytest.approx(0, abs=1e-4)


def test_lora_changes_lora_weights_of_the_decoder_only(made):
    saved = load_file(made / "lora" / "model" / "adapter_model.safetensors")
    assert saved and all(".lora_" in name for name in saved)
    assert any(float(values.abs().max()) > 0 for name, values in saved.items() if "lora_B" in name)
    base, tuned = load(made / "model"), load(made / "lora" / "model")
    before = dict(base.unwrapped.named_parameters())
    inside = {id(parameter) for parameter in tuned.decoder.parameters()}
    for name, parameter in tuned.unwrapped.named_parameters():
        if "lora_" in name:
            assert id(parameter) in inside, name
        else:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name


def test_full_training_changes_the_decoder_only_and_reloads(made):
    base, tuned = load(made / "model"), load(made / "full" / "model")
    before = dict(base.unwrapped.named_parameters())
    decoder = {id(parameter) for parameter in [*tuned.decoder.parameters(), tuned.head.weight]}
    changed = {name for name, each in tuned.unwrapped.named_parameters() if not torch.equal(each, before[name])}
    assert any("q_proj" in name or "qkv" in name for name in changed)
    assert changed <= {name for name, each in tuned.unwrapped.named_parameters() if id(each) in decoder}


@pytest.mark.parametrize("run", ["lora", "full"])
def test_a_saved_model_gives_other_log_probs_than_its_base_and_the_same_at_each_load(made, data, run):
    pair = next(open_data(data / "pairs.jsonl").pairs())
    logps = []
    for folder in (made / "model", made / run / "model", made / run / "model"):
        family = load(folder)
        family.shares_prefix = True
        logps.append(packed_outputs(family, [family.encode(pair)], "separate")[0])
    assert not torch.allclose(logps[0], logps[1], atol=1e-4)
    assert torch.equal(logps[1], logps[2])


def test_a_trained_adapter_answers_and_is_reported(made, data):
    scores = evaluate(
        model=made / "lora" / "model", benchmarks=[f"captions(data={str(data / 'photos.jsonl')!r})"],
        output=made / "evaluation", max_new_tokens=4, progress=False,
    )  # fmt: skip
    answers = [json.loads(line) for line in (made / "evaluation" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and scores
    page = report(
        output=made / "report.html", rewards=made / "rewards", pairs=str(data / "pairs.jsonl"),
        runs=[made / "lora", made / "full"], evaluations=[made / "evaluation"],
    )  # fmt: skip
    assert all(pair_id in page.read_text() for pair_id in RewardStore.open(made / "rewards").pair_ids)
    assert json.loads((made / "lora" / "catpo.json").read_text())["complete"]


def test_training_keeps_the_tokens_that_end_a_response(made):
    assert load(made / "full" / "model").stop_ids == load(made / "model").stop_ids
