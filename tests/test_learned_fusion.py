"""Learned coefficients of Eq. 11: at first the weights of fixed ones; right gradients; a run learns and resumes them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from catpo.core.errors import UserError
from catpo.models import loading
from catpo.rewards.fusion import Fusion
from catpo.rewards.store import RewardStore
from catpo.training.collator import PairCollator
from catpo.training.learned_fusion import LearnedFusion
from catpo.training.pair_stats import Quantity
from tiny import pairs
from training_runs import interrupted_and_resumed, logged, training

OPTIONS = [
    {}, {"gamma": 0.5, "delta": 0.1}, {"normalise": "none"}, {"normalise": "zscore", "activation": "sigmoid"},
    {"normalise": "quantile"}, {"scope": "pair"}, {"eos": "zero"}, {"eos": "scored"}, {"shared_prefix": "neutral"},
    {"base_weight": 0.2, "temperature": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_before_training_weights_are_those_of_fixed_coefficients(folder, store, options):
    fusion = Fusion(learned=True, **options)
    needs = frozenset({Quantity("weights")})
    rewards = RewardStore.open(store)
    batch = PairCollator(loading.load(folder), rewards, fusion, needs)(pairs(8)[:4])
    learned = LearnedFusion(fusion)(batch)
    for index, pair in enumerate(pairs(8)[:4]):
        fixed = rewards.weights(pair.id, Fusion(**{"gamma": 0.25, "delta": 0.25, **options}))
        for side, expected in enumerate((fixed.chosen, fixed.rejected)):
            assert learned[index, side, : len(expected)].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
            assert not learned[index, side, len(expected) :].any()


def slow_weights(signals, logits, base_weight=0.5):
    """Eq. 11 and 7, token by token; signals are [side][token][3]."""
    total = sum(math.exp(logit) for logit in logits)
    weights = []
    for side, tokens in enumerate(signals):
        for token in tokens:
            score = sum(math.exp(logit) / total * value for logit, value in zip(logits, token, strict=True))
            squashed = math.tanh(max(score, 0.0))
            weights.append(base_weight + (squashed if side == 0 else 1 - squashed))
    return weights


def test_learned_weights_are_equation_11_at_any_coefficients():
    random = np.random.default_rng(0)
    signals = random.uniform(0, 1, (2, 4, 3))
    fusion = LearnedFusion(Fusion(learned=True)).double()
    with torch.no_grad():
        fusion.logits.copy_(torch.tensor([0.3, -1.0, 0.7]))
    batch = {
        "signals": torch.tensor(signals)[None],
        "is_scored": torch.ones(1, 2, 4).bool(),
        "mask": torch.ones(1, 2, 4).bool(),
    }
    expected = slow_weights(signals.tolist(), fusion.logits.tolist())
    assert fusion(batch).flatten().tolist() == pytest.approx(expected, abs=1e-12)

    def of(logits):
        return torch.func.functional_call(fusion, {"logits": logits}, (batch,))

    assert torch.autograd.gradcheck(of, (torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True),))


OBJECTIVE = "catpo(learned=True, learned_rate=0.05)"
COEFFICIENTS = [f"fusion/{name}" for name in Fusion().needs]


def test_a_run_learns_the_coefficients_and_resumes_them(folder, store, tmp_path):
    whole = training(folder, store, tmp_path / "whole", objective=OBJECTIVE)
    coefficients = logged(whole, *COEFFICIENTS)
    assert coefficients[0] == pytest.approx([0.25, 0.25, 0.5], abs=1e-6)
    assert coefficients[-1] != pytest.approx(coefficients[0], abs=1e-3) and sum(coefficients[-1]) == pytest.approx(1)
    final = json.loads((whole.output / "catpo.json").read_text())["learned_fusion"]
    assert set(final) == set(Fusion().needs) and list(final.values()) != pytest.approx(coefficients[0], abs=1e-3)
    resumed = interrupted_and_resumed(folder, store, tmp_path / "killed", 6, objective=OBJECTIVE)
    assert np.array(logged(resumed, *COEFFICIENTS)) == pytest.approx(np.array(coefficients), abs=1e-5)


def test_any_method_can_learn_its_token_weights(folder, store, tmp_path):
    result = training(folder, store, tmp_path / "run", objective="dpo(weights='catpo(learned=True)')", max_steps=2)
    assert len(logged(result, "fusion/semantic")) == 2


@pytest.mark.parametrize("options, message", [
    ({"token_fraction": 0.5}, "token_fraction has no place"), ({"signals": {"semantic": 1.0}}, "signals has no place"),
    ({"alpha": 0.3}, "alpha has no place"), ({"normalise": "mean_calibrated"}, "one by one"),
    ({"learned_rate": -1.0}, "learned_rate"),
])  # fmt: skip
def test_options_that_exclude_learning_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Fusion(learned=True, **options)
