"""Training with every method: what the trainer computes is the method on plain logits, and twenty steps lower the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig

import training_runs
from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.types import SIDES
from catpo.models import loading
from catpo.models.views import View
from catpo.scoring.score import score_pairs
from catpo.testing import loss_from_logits
from catpo.training.config import CatPOConfig
from catpo.training.pair_stats import Quantity
from catpo.training.train import train
from catpo.training.trainer import CatPOTrainer
from catpo.training.view_passes import ViewPasses
from test_objectives import REFERENCE_FREE, TYPES
from tiny import llava, pairs
from training_runs import curve, interrupted_and_resumed, logged, training

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")
METHODS = [name for name in registry.names("objectives") if name != "tilt"]  # which reads words of a store: test_tilt.py


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "store"
    score_pairs(pairs(8), llava(seed=4), path, progress=False)
    return path


def trainer(folder, tmp_path, objective, peft_config=None, data=None, **options):
    given = {"objective": objective, "max_steps": 20, **options}
    return training_runs.trainer(folder, tmp_path / "run", data, peft_config, **given)


def with_judge(name, judge):
    return f"tgdpo(judge={str(judge)!r})" if name == "tgdpo" else name


# ---- the same as on plain logits ------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_logits(family, encoded, side):
    """The logits that predict one response, from a row of its own through the whole model."""
    ids = [*encoded.prompt_ids, *encoded.response_ids[side]]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long(), **encoded.pixels}
    logits = family.unwrapped(**inputs).logits
    return logits[0, len(encoded.prompt_ids) - 1 : -1].double().numpy()


def logits_of(family, view_passes, pair):
    """Logits of both sides, clean and under every view that the objective reads."""
    encoded = family.encode(pair)
    logits = {side: plain_logits(family, encoded, side) for side in SIDES}
    for name in view_passes.views:
        shown = replace(view_passes, reader=family).show(View.of(name), pair, encoded)[0]
        logits |= {f"{side}@{name}": plain_logits(family, shown, side) for side in SIDES}
    return logits


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", [
    pytest.param(method, marks=() if method in ("tpo(weights='catpo')", "povid", "vdpo") else pytest.mark.slow)
    for method in [
        *[method for method in METHODS if method != "tars"], "vdpo(unconditional='reference')", "vdpo(view='none')",
        "mdpo(view='another')", "mdpo(form='code')", "povid(form='paper')", "tpo(weights='catpo')",
        "chip(weights='catpo(alpha=0.3)')",
    ]
])  # fmt: skip
def test_the_trainer_computes_the_method_on_plain_logits(folder, store, judge, tmp_path, method, peft_config):
    """Packed rows, chunked head, cached or online reference against whole logits of separate rows, per pair."""
    run = trainer(folder, tmp_path, with_judge(method, judge), peft_config, rewards=str(store))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in run.family.unwrapped.named_parameters():
            if parameter.requires_grad and (peft_config is None or "lora_B" in name):
                parameter += 0.05 * torch.randn_like(parameter)
    given = pairs(8)[:3]
    batch = run.data_collator(given)
    losses = run.objective.loss(run.pair_stats(run.model, batch), **run.objective.options).losses
    reference = loading.load(folder)
    for index, pair in enumerate(given):
        policy_logits, reference_logits = (logits_of(family, run.view_passes, pair) for family in (run.family, reference))
        if method == "tgdpo":
            other = llava(seed=4)
            policy_logits |= {f"{side}@judge": plain_logits(other, other.encode(pair), side) for side in SIDES}
        weights = {}
        for side_index, side in enumerate(SIDES):
            weights[side] = batch["weights"][index, side_index][batch["mask"][index, side_index]].tolist()
        expected = loss_from_logits(
            run.objective.spec,
            policy=policy_logits,
            reference=reference_logits,
            tokens=run.family.encode(pair).response_ids,
            weights=weights,
        )
        assert losses[index].item() == pytest.approx(expected, abs=2e-4, rel=2e-4)


# ---- twenty steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", [
    pytest.param(method, marks=() if method == "chip" else pytest.mark.slow)
    for method in [*METHODS, "tpo(weights='catpo')", "vdpo(unconditional='reference')", "vdpo(view='none')"]
])  # fmt: skip
def test_twenty_steps_lower_the_loss(folder, store, judge, tmp_path, method, peft_config):
    run = trainer(folder, tmp_path, with_judge(method, judge), peft_config, rewards=str(store))
    run.train()
    losses = curve(run)
    assert len(losses) == 20 and all(math.isfinite(loss) for loss in losses)
    if method not in REFERENCE_FREE:
        assert curve(run, "loss/preference")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert curve(run, "grad_norm")[0] > 0
    assert sum(losses[-4:]) / 4 < losses[0]


MIX = "dpo(loss_type=['hinge', 'bco_pair', 'sft'], loss_weights=[0.8, 0.2, 1.0], kl_weight=0.01)"


TRAINED = {**TYPES, "discopop": "dpo(loss_type='discopop', discopop_tau=0.5)"}
"""TRL's losses; at DiscoPOP's own temperature the loss has a minimum at a negative margin, see docs/reference/methods.md."""


@pytest.mark.parametrize("method", [
    *TRAINED.values(), *REFERENCE_FREE, MIX, "dpo(loss_type='apo_zero', weights='catpo')", "simpo(weights='catpo(alpha=0.3)')",
    "orpo(weights='catpo')",
])  # fmt: skip
def test_four_steps_of_every_other_loss_lower_it_and_move_every_tensor(folder, store, tmp_path, method):
    """On one batch, whose loss has to fall at every step."""
    rewards = None if method in REFERENCE_FREE else str(store)
    sizes = dict(per_device_train_batch_size=4, max_steps=4, learning_rate=2e-4)
    run = trainer(folder, tmp_path, method, data=pairs(4), rewards=rewards, **sizes)
    before = {name: value.clone() for name, value in run.model.named_parameters() if value.requires_grad}
    run.train()
    losses = curve(run)
    assert len(losses) == 4 and sorted(losses, reverse=True) == losses and losses[-1] < losses[0]
    moved = dict(run.model.named_parameters())
    assert len(before) > 20 and not [name for name in before if torch.equal(moved[name], before[name])]
    if method != TYPES["sft"]:
        margins = curve(run, "rewards/margins")
        assert margins[-1] > margins[0]


# ---- without a reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_an_objective_without_a_reference_runs_and_scores_none(folder, tmp_path, monkeypatch, peft_config):
    monkeypatch.setattr("catpo.training.inputs.score_pairs", None)  # it would be called
    run = trainer(folder, tmp_path, "simpo", peft_config, max_steps=1)
    run.train()
    assert run.rewards is None and run.reference_model is None and run.reference_head is None
    assert "reference_logps" not in run.data_collator(pairs(2))
    assert curve(run, "loss/preference") == curve(run)


def test_a_reference_that_the_objective_does_not_read_is_refused(folder, tmp_path):
    message = "would not be used: simpo compares the policy with no reference"
    with pytest.raises(UserError, match=f"reference='online' {message}"):
        trainer(folder, tmp_path, "simpo", reference="online")
    with pytest.raises(UserError, match=f"ref_model {message}"):
        CatPOTrainer(str(folder), CatPOConfig(output_dir=str(tmp_path), objective="simpo"), pairs(2), ref_model=llava().model)
    with pytest.raises(UserError, match=f"reference='online' {message}"):
        train(pairs=pairs(2), model="no-such-model", output=tmp_path / "run", objective="simpo", reference="online")


def test_a_store_that_the_objective_does_not_read_is_told(folder, store, tmp_path, capsys):
    trainer(folder, tmp_path, "cpo", rewards=str(store))
    assert f"cpo reads nothing of the reward store {store}" in capsys.readouterr().err
    trainer(folder, tmp_path, "cpo(weights='catpo')", rewards=str(store))
    assert "reads nothing" not in capsys.readouterr().err


def test_policy_and_reference_see_one_draw_unless_the_code_form_is_asked_for(folder, tmp_path):
    same = trainer(folder, tmp_path, "mdpo", reference="online", max_steps=1)
    same.train()
    assert curve(same)[0] == pytest.approx(3 * math.log(2), abs=1e-5)
    apart = trainer(folder, tmp_path, "mdpo(form='code')", reference="online", max_steps=1)
    apart.train()
    assert curve(apart)[0] != pytest.approx(3 * math.log(2), abs=1e-5)
    assert len(apart.view_passes.views) == 2


@pytest.mark.parametrize("method", ["tpo", *(pytest.param(method, marks=pytest.mark.slow) for method in ("chip", "tars"))])
def test_online_and_cached_reference_and_separate_rows_give_one_curve(folder, store, tmp_path, method):
    cached = trainer(folder, tmp_path, method, rewards=str(store), max_steps=3)
    online = trainer(folder, tmp_path, method, reference="online", max_steps=3)
    separate = trainer(folder, tmp_path, method, rewards=str(store), prefix="separate", max_steps=3)
    for run in (cached, online, separate):
        run.train()
    assert curve(cached) == pytest.approx(curve(online), abs=3e-5)
    assert curve(cached) == pytest.approx(curve(separate), abs=3e-5)


@pytest.mark.slow
def test_a_batch_of_eight_equals_eight_of_one(folder, store, tmp_path):
    curves = []
    for size in (8, 1):
        sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=2)
        run = trainer(folder, tmp_path, "chip", rewards=str(store), **sizes)
        run.train()
        curves.append(curve(run))
    assert curves[0] == pytest.approx(curves[1], abs=3e-5)


@pytest.mark.slow
def test_a_resumed_run_draws_the_noise_of_an_undisturbed_one(folder, store, tmp_path):
    whole = training(folder, store, tmp_path / "whole", objective="tpo")
    # in the second epoch, after the checkpoint of step 6
    resumed = interrupted_and_resumed(folder, store, tmp_path / "killed", 7, objective="tpo")
    assert len(logged(whole, "loss")) == 8
    assert np.array(logged(resumed, "loss")) == pytest.approx(np.array(logged(whole, "loss")), abs=1e-5)


def test_every_epoch_draws_anew(folder, store, tmp_path):
    run = trainer(folder, tmp_path, "tpo", rewards=str(store), data=pairs(2), max_steps=3)
    totals, plain = [], run.view_passes.of_policy

    def record(model, hidden, batch):
        pixels = batch["views"]["noised(step=500)"]["model_inputs"]["pixel_values"]
        totals.append(pixels.sum(dim=(1, 2, 3)).sort().values)
        return plain(model, hidden, batch)

    run.view_passes.of_policy = record
    run.train()
    assert len(totals) == 3 and run.view_passes.epoch == 2
    assert not torch.allclose(totals[0], totals[1]) and not torch.allclose(totals[1], totals[2])


# ---- what comes with the pairs --------------------------------------------------------------------------------------------


def test_numbers_of_a_row_reach_the_loss(folder, tmp_path):
    plain = trainer(folder, tmp_path, "hsa_dpo", reference="online")
    severe = [replace(pair, meta={"severity": 2.5}) for pair in pairs(2)]
    batch = plain.data_collator(severe)
    stats = plain.pair_stats(plain.model, batch)
    assert stats.meta("severity", 1.0).tolist() == [2.5, 2.5]
    assert plain.data_collator(pairs(2))["given"][Quantity("meta", argument="severity", default=1.0)].tolist() == [1.0, 1.0]
    with pytest.raises(UserError, match=r"pair .*: 'severity' is 'high', not a number"):
        plain.data_collator([replace(severe[0], meta={"severity": "high"})])


def test_tgdpo_without_a_judge_says_what_to_do(folder, store, tmp_path):
    with pytest.raises(UserError, match="judge='folder'"):
        trainer(folder, tmp_path, "tgdpo", rewards=str(store))


def test_an_objective_that_reads_no_view_adds_no_row(folder, store, tmp_path):
    run = trainer(folder, tmp_path, "catpo", rewards=str(store))
    assert not run.data_collator(pairs(2))["views"]
    assert not ViewPasses(run.family, frozenset({Quantity("policy_logps")})).reads_reference
