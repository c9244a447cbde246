"""What must hold for every loss whatever the numbers; test_methods.py has the equations."""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import replace

import pytest
import torch

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.types import SIDES
from catpo.training import loss_checks, objectives
from catpo.training.objectives import FORMS, PairStats, catpo, dpo
from catpo.training.pair_stats import Quantity, kl_need, reads_reference, requirements

MASK, WEIGHTS = Quantity("mask"), Quantity("weights")
POLICY, REFERENCE = Quantity("policy_logps"), Quantity("reference_logps")


class Figures(dict):
    """Random values of whatever an objective reads of a batch with responses of different lengths.

    NaN stands in the padding, which must never count. With `equal` the reference is the policy.
    """

    def __init__(self, pairs=3, tokens=5, seed=0, *, equal=False):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (pairs, 2, 1), generator=generator)
        super().__init__()
        self[MASK], self[Quantity("token_ids")] = mask, torch.randint(0, 4, mask.shape, generator=generator)
        self.seed, self.equal = seed, equal

    def __missing__(self, quantity):
        name, mask = quantity.name, self[MASK]
        if name == "meta":
            return self.setdefault(quantity, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[: len(mask)])
        if quantity.side:
            mask = mask[:, SIDES.index(quantity.side)]
        if name == "mask":
            return self.setdefault(quantity, mask)
        text = f"{self.seed} {str(quantity).replace('reference', 'policy') if self.equal else quantity}"
        draw = torch.randn(mask.shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())), dtype=torch.float64)
        if name == "weights":
            draw = draw.abs()
        elif name == "kl":
            draw = torch.zeros_like(draw) if self.equal else draw.abs()
        elif "log" in name:
            draw = draw - 3
        return self.setdefault(quantity, torch.where(mask, draw, math.nan))

    def but(self, values):
        """The same figures, with other values for some."""
        other = copy.copy(self)
        other.update(values)
        return other

    def map(self, change, loss):
        """The same figures, all that `loss` reads, changed one by one."""
        loss(stats(self))
        return self.but({quantity: change(value) for quantity, value in self.items()})


def stats(figures):
    return PairStats(figures.__getitem__)


@pytest.mark.parametrize("kl_weight", [0.0, 0.03])
def test_unit_weights_turn_catpo_into_dpo_and_others_change_the_loss(kl_weight):
    figures = Figures()
    unit = figures.but({WEIGHTS: torch.ones(3, 2, 5, dtype=torch.float64)})
    expected = dpo.loss(stats(figures), kl_weight=kl_weight).losses
    torch.testing.assert_close(catpo.loss(stats(unit), kl_weight=kl_weight).losses, expected, rtol=1e-12, atol=0)
    assert (catpo.loss(stats(figures), kl_weight=kl_weight).losses != expected).all()


METHODS = registry.names("objectives")
WITH_FORMS = ("ddpo", "vdpo", "tpo", "povid", "mdpo", "tdpo", "chip", "opa_dpo")
REFERENCE_FREE = ("cpo", "orpo", "simpo")
OPTIONS = {"exo_pair": ", label_smoothing=0.1", "robust": ", label_smoothing=0.1"}
TYPES = {name: f"dpo(loss_type='{name}'{OPTIONS.get(name, '')})" for name in dpo.TYPES}
"""TRL's losses -> our objectives."""
SPECS = [*METHODS, *(f"{name}(form='{form}')" for name in WITH_FORMS for form in FORMS), *TYPES.values()]
AT_START = {
    "hinge": 1.0, "ipo": 25.0, "ipo_norm": 25.0, "sppo_hard": 50.0, "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2),
    "apo_zero": 1.0, "apo_down": 1.0, "discopop": 0.5 * math.log(2) + 0.5, "sft": 0.0,
    "exo_pair": math.log(0.5) - 0.5 * math.log(0.9) - 0.5 * math.log(0.1),
}  # fmt: skip
"""Preference term where policy and reference are the same, beta 0.1, if it is not log 2."""
MIRRORED = ("catpo", "ddpo", "dpo", "tdpo", "vdpo")
"""Methods that treat both sides alike."""


def bound(spec):
    """An objective as a function of the figures alone."""
    objective = objectives.build(spec)
    return lambda figures: objective.loss(figures, **objective.options)


ONE_TERM = ("amp", "catpo", "chip", "ddpo", "dpo", "hsa_dpo", "povid", "rrpo", "tdpo", "tgdpo", "tpo")
"""Methods whose whole loss is log 2 as long as policy and reference are the same."""


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in REFERENCE_FREE])
def test_equal_policy_and_reference_give_log_2_or_what_the_loss_makes_of_0(spec):
    output = bound(spec)(stats(Figures(equal=True)))
    (expected,) = [AT_START[name] for name in AT_START if TYPES[name] == spec] or [math.log(2)]
    assert output.metrics["loss/preference"].tolist() == pytest.approx([expected] * 3)
    if not spec.startswith("vdpo"):
        assert output.metrics["rewards/chosen"].tolist() == pytest.approx([0] * 3)
    if spec in ONE_TERM:
        rounds = Figures()[Quantity("meta", argument="round")] if spec == "amp" else torch.zeros(3)
        assert output.losses.tolist() == pytest.approx((math.log(2) * (1 + 0.05 * rounds)).tolist())


def test_the_first_loss_of_vdpo_is_that_of_the_guidance_alone():
    figures = Figures(equal=True)
    gain = []
    for index, side in enumerate(SIDES):
        blank = figures[Quantity("constant_policy_logps", side, "blank")]
        gain.append((figures[POLICY][:, index] - blank).nan_to_num().sum(-1))
    expected = -torch.nn.functional.logsigmoid(0.1 * 0.5 * (gain[0] - gain[1]))
    torch.testing.assert_close(bound("vdpo(guidance=1.5)")(stats(figures)).losses, expected)


@pytest.mark.parametrize("name", MIRRORED)
def test_swapping_the_sides_flips_the_margin(name):
    loss = registry.load("objectives", name)
    other = {"chosen": "rejected", "rejected": "chosen"}
    figures = Figures()
    swapped = figures.map(lambda value: value.flip(1), loss)
    for quantity in list(swapped):
        if quantity.side:
            swapped[quantity] = figures[replace(quantity, side=other[quantity.side])]
    ours, theirs = loss(stats(figures)).metrics, loss(stats(swapped)).metrics
    torch.testing.assert_close(ours["rewards/chosen"], theirs["rewards/rejected"])


@pytest.mark.parametrize("spec", SPECS)
def test_permuting_the_batch_permutes_the_losses(spec):
    figures, order = Figures(), torch.tensor([2, 0, 1])
    loss = bound(spec)
    permuted = loss(stats(figures.map(lambda value: value[order], loss))).losses
    torch.testing.assert_close(permuted, loss(stats(figures)).losses[order])


@pytest.mark.parametrize("spec", SPECS)
def test_a_pair_alone_has_the_loss_it_has_in_a_batch(spec):
    figures, loss = Figures(tokens=7), bound(spec)
    together = loss(stats(figures)).losses
    assert torch.isfinite(together).all()
    for pair in range(3):
        longest = int(figures[MASK][pair].sum(-1).max())
        cut = lambda value, at=pair, end=longest: value[at : at + 1, ..., :end] if value.ndim > 1 else value[at : at + 1]
        torch.testing.assert_close(loss(stats(figures.map(cut, loss))).losses, together[pair : pair + 1])


@pytest.mark.parametrize("spec", [
    *SPECS, "tdpo(version=1)", "tpo(weights='catpo')", "simpo(alpha=0.25, weights='catpo')", "cpo(loss_type='ipo')",
    "dpo(loss_type=['hinge', 'sft'], loss_weights=[0.5, 2.0], weights='catpo')",
])  # fmt: skip
def test_gradients_of_every_method_equal_finite_differences(spec):
    """But for terms whose gradient is stopped on purpose, which are held constant here."""
    figures, loss = Figures(pairs=2), bound(spec)
    loss(stats(figures))
    for quantity, value in figures.items():
        figures[quantity] = value.nan_to_num() if value.is_floating_point() else value
    trained = [quantity for quantity in figures if quantity.name.startswith("policy")]
    values = tuple(figures[quantity].clone().requires_grad_(True) for quantity in trained)
    changed = lambda *given: loss(stats(figures.but(dict(zip(trained, given, strict=True))))).losses
    assert trained and torch.autograd.gradcheck(changed, values)


def test_label_smoothing_mixes_both_orders():
    figures = Figures()
    swapped = figures.map(lambda value: value.flip(1), dpo.loss)
    expected = 0.8 * dpo.loss(stats(figures)).losses + 0.2 * dpo.loss(stats(swapped)).losses
    torch.testing.assert_close(dpo.loss(stats(figures), label_smoothing=0.2).losses, expected)
    with pytest.raises(UserError, match="label_smoothing"):
        dpo.loss(stats(figures), label_smoothing=0.5)


def test_mean_reductions_divide_by_tokens_or_weights():
    figures = Figures()
    count = figures[MASK].sum(-1, keepdim=True)
    mass = figures[WEIGHTS].nan_to_num().sum(-1, keepdim=True)
    for reduction, divisor in (("mean", count), ("weighted_mean", mass)):
        divided = figures.but({WEIGHTS: figures[WEIGHTS] / divisor})
        torch.testing.assert_close(catpo.loss(stats(figures), reduction=reduction).losses, catpo.loss(stats(divided)).losses)


def test_weights_on_one_side_leave_the_other_at_one():
    figures = Figures()
    weights = figures[WEIGHTS].clone()
    weights[:, 1] = 1.0
    one_sided = catpo.loss(stats(figures), weights_on="chosen").losses
    torch.testing.assert_close(one_sided, catpo.loss(stats(figures.but({WEIGHTS: weights}))).losses)


@pytest.mark.parametrize("option", [{"reduction": "median"}, {"weights_on": "none"}, {"kl_direction": "forward"}])
def test_unknown_words_are_refused(option):
    with pytest.raises(UserError, match=next(iter(option))):
        catpo.loss(stats(Figures()), **option)


def test_an_objective_asks_only_for_what_it_reads():
    assert requirements(dpo.loss, {}) == {POLICY, REFERENCE, MASK}
    assert requirements(catpo.loss, {"kl_weight": 0.0}) == {POLICY, REFERENCE, MASK, WEIGHTS}
    assert kl_need(requirements(catpo.loss, {})) == Quantity("kl", argument="policy||reference")
    assert kl_need(requirements(dpo.loss, {})) is None


@pytest.mark.parametrize("name", METHODS)
def test_an_objective_without_a_reference_reads_none(name):
    options = {"judge": "folder"} if name == "tgdpo" else {}
    assert reads_reference(requirements(registry.load("objectives", name), options)) == (name not in REFERENCE_FREE)


# ---- the first step -------------------------------------------------------------------------------------------------------


def first_step(spec, figures, dtype=torch.float32):
    """The check of a first step whose figures are these; returns its complaint."""
    objective = objectives.build(spec)
    needs, given = requirements(objective.loss, objective.options), stats(figures)
    try:
        loss_checks.check_first_losses(objective.preference(given), objective.preference, given, needs, dtype)
    except UserError as error:
        return str(error)
    return ""


def drifted(figures, spec, nats):
    """The reference's log-probs of the chosen tokens raised, those of the rejected lowered."""
    bound(spec)(stats(figures))
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None]
    changed = {}
    for quantity, value in figures.items():
        if quantity.model == "reference":
            sign = signs if quantity.side is None else signs[SIDES.index(quantity.side)]
            changed[quantity] = value + nats * sign
    return figures.but(changed)


@pytest.mark.parametrize("spec", [*SPECS, "dpo(label_smoothing=0.3)", "dpo(loss_type=['hinge', 'sft'], beta=3.0)"])
def test_the_first_loss_is_what_equal_models_give_and_a_drift_is_refused(spec):
    figures = Figures(equal=True)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert first_step(spec, figures, dtype) == ""
    complaint = first_step(spec, drifted(figures, spec, 0.5))
    if spec in REFERENCE_FREE or "'sft')" in spec:
        assert complaint == ""
    else:
        assert "policy and reference are the same, so they must be" in complaint


def test_rounding_passes_the_first_step_however_steep_the_loss():
    """IPO's slope at the start is 1 / beta, a hundred times DPO's."""
    figures = Figures(equal=True, tokens=64)
    for spec in ("dpo(loss_type='ipo')", "dpo(loss_type='sppo_hard')", "dpo(loss_type='hinge', beta=5.0)"):
        noise = 1.5 * loss_checks.rounding(torch.bfloat16) / 8
        assert first_step(spec, drifted(figures, spec, noise), torch.bfloat16) == ""
        assert "must be" in first_step(spec, drifted(figures, spec, 40 * noise), torch.bfloat16)


def test_a_kl_at_the_first_step_is_refused():
    figures = Figures(equal=True)
    bound("catpo")(stats(figures))
    kl = Quantity("kl", argument="policy||reference")
    assert "the KL 1, but" in first_step(
        "catpo", figures.but({kl: 1.0 / figures[MASK].sum((1, 2), keepdim=True) + figures[kl]})
    )


def test_options_go_to_the_loss_or_to_its_token_weights():
    objective = objectives.build("catpo(preset='official-code', shared_prefix='neutral', beta=0.2)")
    assert objective.options == {"kl_weight": 0.015, "beta": 0.2}
    assert (objective.fusion.eos, objective.fusion.shared_prefix) == ("zero", "neutral")
    assert objectives.build("catpo(preset='paper')").fusion == objectives.build("catpo").fusion


@pytest.mark.parametrize("preset", catpo.PRESETS)
def test_every_preset_can_be_built(preset):
    assert objectives.build(f"catpo(preset='{preset}')").options.items() <= {**catpo.PRESETS[preset]}.items()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_objective_can_be_built_where_gradients_are_off(mode):
    with mode():
        assert objectives.build("dpo(beta=0.3)").options == {"beta": 0.3}
        with pytest.raises(UserError, match="its gradient is zero"):
            objectives.build("dpo(beta=0.0)")


@pytest.mark.parametrize("text, message", [
    ("catpo(alfa=0.3)", "Did you mean 'alpha'"), ("catpo(preset='papr')", "Did you mean 'paper'"),
    ("dpp", "Did you mean 'dpo'"),
    ("dpo(beta='high')", "must be a number"), ("catpo(kl_weight=True)", "must be a number"),
    ("catpo(preset=3)", "has no preset"),
])  # fmt: skip
def test_unknown_options_presets_and_objectives_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        objectives.build(text)
