"""Each loss against its equation in slow float64 loops, and what must hold whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch

from catpo import registry
from catpo.errors import UserError
from catpo.objectives import _base as objectives
from catpo.objectives import catpo, dpo
from catpo.stats import PairStats, kl_direction, requirements


def table(pairs=3, tokens=5, seed=0):
    """Random figures of a batch with responses of different lengths; NaN in the padding, which must never count."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (pairs, 2, 1), generator=generator)
    draw = lambda: torch.where(mask, torch.randn(pairs, 2, tokens, generator=generator, dtype=torch.float64), math.nan)
    return {
        "mask": mask,
        "policy_logps": draw().sub(3),
        "reference_logps": draw().sub(3),
        "weights": draw().abs(),
        "kl policy||reference": draw().abs(),
        "kl reference||policy": draw().abs(),
    }


def stats(values):
    return PairStats(values.__getitem__)


def log_sigmoid(value):
    return -math.log1p(math.exp(-value)) if value > -30 else value


def slow_catpo(values, beta, kl_weight, direction="policy||reference"):
    """Eq. 8-10, token by token."""
    losses = []
    for pair in range(len(values["mask"])):
        policy = reference = kl = 0.0
        for side, sign in ((0, 1), (1, -1)):
            for token in range(values["mask"].shape[2]):
                if values["mask"][pair, side, token]:
                    weight = float(values["weights"][pair, side, token])
                    policy += sign * weight * float(values["policy_logps"][pair, side, token])
                    reference += sign * weight * float(values["reference_logps"][pair, side, token])
                    kl += weight * float(values[f"kl {direction}"][pair, side, token])
        losses.append(-log_sigmoid(beta * (policy - reference)) + kl_weight * kl)
    return losses


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta, kl_weight", [(0.1, 0.03), (0.5, 0.0), (0.1, 1.0)])
@pytest.mark.parametrize("direction", ["policy||reference", "reference||policy"])
def test_catpo_is_equations_8_to_10(seed, beta, kl_weight, direction):
    values = table(seed=seed)
    found = catpo.loss(stats(values), beta=beta, kl_weight=kl_weight, kl_direction=direction).losses
    assert found.tolist() == pytest.approx(slow_catpo(values, beta, kl_weight, direction), rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_dpo_is_equation_1(seed):
    values = table(seed=seed)
    values["weights"] = torch.full_like(values["weights"], 1.0)
    assert dpo.loss(stats(values)).losses.tolist() == pytest.approx(slow_catpo(values, 0.1, 0.0), rel=1e-10)


def test_unit_weights_turn_catpo_into_dpo():
    values = table()
    unit = {**values, "weights": torch.ones_like(values["weights"])}
    torch.testing.assert_close(
        catpo.loss(stats(unit), kl_weight=0.0).losses, dpo.loss(stats(values)).losses, rtol=1e-12, atol=0
    )
    with_kl = dpo.loss(stats(values), kl_weight=0.03).losses
    torch.testing.assert_close(catpo.loss(stats(unit), kl_weight=0.03).losses, with_kl, rtol=1e-12, atol=0)


def test_other_weights_change_the_loss():
    values = table()
    doubled = {**values, "weights": 2 * values["weights"]}
    assert (catpo.loss(stats(values)).losses != catpo.loss(stats(doubled)).losses).all()


@pytest.mark.parametrize("name", registry.names("objectives"))
def test_equal_policy_and_reference_give_log_2(name):
    values = table()
    values["reference_logps"] = values["policy_logps"]
    values["kl policy||reference"] = values["kl reference||policy"] = torch.zeros_like(values["weights"])
    assert registry.load("objectives", name)(stats(values)).losses.tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("name", registry.names("objectives"))
def test_swapping_the_sides_flips_the_margin(name):
    values = table()
    swapped = {key: value.flip(1) for key, value in values.items()}
    loss = registry.load("objectives", name)
    ours, theirs = loss(stats(values)).metrics, loss(stats(swapped)).metrics
    torch.testing.assert_close(ours["rewards/chosen"], theirs["rewards/rejected"])


@pytest.mark.parametrize("name", registry.names("objectives"))
def test_permuting_the_batch_permutes_the_losses(name):
    values = table()
    order = torch.tensor([2, 0, 1])
    loss = registry.load("objectives", name)
    permuted = loss(stats({key: value[order] for key, value in values.items()})).losses
    torch.testing.assert_close(permuted, loss(stats(values)).losses[order])


def test_gradients_equal_finite_differences():
    values = {name: value.nan_to_num() if value.is_floating_point() else value for name, value in table().items()}
    policy = values["policy_logps"].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda policy: catpo.loss(stats({**values, "policy_logps": policy})).losses, (policy,))


def test_label_smoothing_mixes_both_orders():
    values = table()
    swapped = {key: value.flip(1) for key, value in values.items()}
    expected = 0.8 * dpo.loss(stats(values)).losses + 0.2 * dpo.loss(stats(swapped)).losses
    torch.testing.assert_close(dpo.loss(stats(values), label_smoothing=0.2).losses, expected)
    with pytest.raises(UserError, match="label_smoothing"):
        dpo.loss(stats(values), label_smoothing=0.5)


def test_mean_reductions_divide_by_tokens_or_weights():
    values = table()
    count = values["mask"].sum(-1, keepdim=True)
    mass = values["weights"].nan_to_num().sum(-1, keepdim=True)
    for reduction, divisor in (("mean", count), ("weighted_mean", mass)):
        divided = {**values, "weights": values["weights"] / divisor}
        torch.testing.assert_close(catpo.loss(stats(values), reduction=reduction).losses, catpo.loss(stats(divided)).losses)


def test_weights_on_one_side_leave_the_other_at_one():
    values = table()
    weights = values["weights"].clone()
    weights[:, 1] = 1.0
    torch.testing.assert_close(
        catpo.loss(stats(values), weights_on="chosen").losses, catpo.loss(stats({**values, "weights": weights})).losses
    )


@pytest.mark.parametrize("option", [{"reduction": "median"}, {"weights_on": "none"}, {"kl_direction": "forward"}])
def test_unknown_words_are_refused(option):
    with pytest.raises(UserError, match=next(iter(option))):
        catpo.loss(stats(table()), **option)


def test_an_objective_asks_only_for_what_it_reads():
    assert requirements(dpo.loss, {}) == {"policy_logps", "reference_logps", "mask"}
    assert requirements(catpo.loss, {"kl_weight": 0.0}) == {"policy_logps", "reference_logps", "mask", "weights"}
    assert kl_direction(requirements(catpo.loss, {})) == "policy||reference"
    assert kl_direction(requirements(dpo.loss, {})) is None


def test_options_of_loss_and_weights_are_told_apart():
    objective = objectives.build("catpo(preset='official-code', shared='neutral', beta=0.2)")
    assert objective.options == {"kl_weight": 0.015, "beta": 0.2}
    assert (objective.fusion.eos, objective.fusion.shared) == ("zero", "neutral")
    assert objectives.build("catpo(preset='paper')").fusion == objectives.build("catpo").fusion


@pytest.mark.parametrize("preset", catpo.PRESETS)
def test_every_preset_can_be_built(preset):
    assert objectives.build(f"catpo(preset='{preset}')").options.items() <= {**catpo.PRESETS[preset]}.items()


@pytest.mark.parametrize("text, message", [
    ("catpo(alfa=0.3)", "Did you mean 'alpha'"), ("catpo(preset='papr')", "Did you mean 'paper'"),
    ("dpp", "Did you mean 'dpo'"),
    ("dpo(beta='high')", "must be a number"), ("catpo(kl_weight=True)", "must be a number"),
    ("catpo(preset=3)", "has no preset"),
])  # fmt: skip
def test_unknown_options_presets_and_objectives_are_answered(text, message):
    with pytest.raises(UserError, match=message):
        objectives.build(text)
