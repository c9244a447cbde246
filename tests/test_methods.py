"""Every method against its formula in slow loops, through `loss_from_logits`."""

from __future__ import annotations

import math

import numpy as np
import pytest

import method_oracles as oracles
from catpo.core.errors import UserError
from catpo.testing import loss_from_logits

VOCABULARY = 9
VIEW = "noised"
SIDES = ("chosen", "rejected")


def as_lists(logits):
    return {key: rows.tolist() for key, rows in logits.items()}


class Case:
    """A pair with random logits; part of the responses is the same."""

    def __init__(self, seed: int, views=(VIEW,)):
        random = np.random.default_rng(seed)
        shared = random.integers(0, VOCABULARY, 4).tolist()
        middle = [random.integers(0, VOCABULARY, count).tolist() for count in (3, 1 + seed % 3)]
        self.ids = {side: [*shared[:3], *part, *shared, *part[:seed]] for side, part in zip(SIDES, middle, strict=True)}
        keys = [*SIDES, *(f"{side}@{view}" for side in SIDES for view in views)]
        draw = lambda: {key: random.normal(size=(len(self.ids[key.split("@")[0]]), VOCABULARY)) * 2 for key in keys}
        self.policy, self.reference = draw(), draw()
        self.weights = {side: random.uniform(0.5, 1.5, len(self.ids[side])).tolist() for side in SIDES}

    def loss(self, spec, **options):
        given = {"policy": self.policy, "reference": self.reference, "tokens": self.ids, **options}
        return loss_from_logits(spec, **given)

    @property
    def slow(self):
        return (as_lists(self.policy), as_lists(self.reference), self.ids)


CASES = {
    "dpo": oracles.dpo,
    "dpo(label_smoothing=0.1)": lambda *c: oracles.dpo(*c, smoothing=0.1),
    "dpo(loss_type='ipo')": oracles.ipo,
    "dpo(loss_type='ipo', reduction='mean')": lambda *c: oracles.ipo(*c, mean=True),
    "dpo(loss_type='ipo_norm')": lambda *c: oracles.ipo(*c, mean=True),
    "dpo(loss_type='sigmoid_norm')": oracles.of_ratios(lambda c, r: -oracles.log_sigmoid(0.1 * (c - r)), per_token=True),
    "dpo(loss_type='hinge')": oracles.of_ratios(oracles.hinge),
    "dpo(loss_type='hinge', reduction='mean')": oracles.of_ratios(oracles.hinge, per_token=True),
    "dpo(loss_type='exo_pair', label_smoothing=0.001)": oracles.of_ratios(lambda c, r: oracles.exo(c, r, 0.001)),
    "dpo(loss_type='nca_pair')": oracles.of_ratios(oracles.nca),
    "dpo(loss_type='robust', label_smoothing=0.1)": oracles.of_ratios(lambda c, r: oracles.robust(c, r, 0.1)),
    "dpo(loss_type='bco_pair')": oracles.of_ratios(oracles.bco),
    "dpo(loss_type='sppo_hard')": oracles.of_ratios(oracles.sppo),
    "dpo(loss_type='apo_zero')": oracles.of_ratios(oracles.apo_zero),
    "dpo(loss_type='apo_down')": oracles.of_ratios(oracles.apo_down),
    "dpo(loss_type='discopop')": oracles.of_ratios(oracles.discopop),
    "dpo(loss_type='discopop', discopop_tau=0.5)": oracles.of_ratios(lambda c, r: oracles.discopop(c, r, 0.5)),
    "dpo(loss_type='sft')": lambda p, r, ids: oracles.likelihood(p, ids),
    "dpo(loss_type=['sigmoid', 'bco_pair', 'sft'], loss_weights=[0.8, 0.2, 1.0])": oracles.mpo,
    "cpo": lambda p, r, ids: oracles.cpo(p, ids),
    "cpo(nll_weight=0.5, label_smoothing=0.1)": lambda p, r, ids: oracles.cpo(p, ids, 0.5, 0.1),
    "cpo(loss_type='hinge')": lambda p, r, ids: oracles.cpo_hinge(p, ids),
    "cpo(loss_type='ipo')": lambda p, r, ids: oracles.cpo_ipo(p, ids),
    "simpo": lambda p, r, ids: oracles.simpo(p, ids),
    "simpo(beta=2.5, gamma=0.5, alpha=0.25)": lambda p, r, ids: oracles.simpo(p, ids, 2.5, 0.5, alpha=0.25),
    "simpo(nll_weight=1.0, label_smoothing=0.1)": lambda p, r, ids: oracles.simpo(p, ids, nll=1.0, smoothing=0.1),
    "orpo": lambda p, r, ids: oracles.orpo(p, ids),
    "ddpo(form='code')": lambda *c: oracles.ddpo(*c, weight=1.1, mean=False),
    "ddpo(form='paper')": lambda *c: oracles.ddpo(*c, weight=5.0, mean=True),
    "ddpo(segment_weight=3.0)": lambda *c: oracles.ddpo(*c, weight=3.0, mean=False),
    "vdpo(guidance=1.5)": lambda *c: oracles.vdpo(*c, 1.5, "policy", VIEW),
    "vdpo(guidance=2.0, form='code')": lambda *c: oracles.vdpo(*c, 2.0, "policy", VIEW),
    "vdpo(guidance=1.5, unconditional='reference')": lambda *c: oracles.vdpo(*c, 1.5, "reference", VIEW),
    "vdpo(guidance=1.0, form='code')": lambda *c: oracles.vdpo(*c, 1.0, "policy", VIEW, suffix=True),
    "vdpo(guidance=1.0, form='paper')": oracles.dpo,
    "tpo(form='code')": lambda *c: oracles.tpo(*c, VIEW),
    "tpo(form='paper')": lambda *c: oracles.tpo(*c, VIEW, multiply=True),
    "povid(form='code')": lambda *c: oracles.povid(*c, VIEW),
    "povid(form='paper')": lambda *c: oracles.povid(*c, VIEW, one_sigmoid=True),
    "mdpo(form='code')": lambda *c: oracles.mdpo(*c, VIEW),
    "mdpo(form='paper')": lambda *c: oracles.mdpo(*c, VIEW),
    "tdpo(version=1)": lambda *c: oracles.tdpo(*c, 1),
    "tdpo(version=2, alpha=0.3)": lambda *c: oracles.tdpo(*c, 2, 0.3),
    "tdpo": lambda *c: oracles.tdpo(*c, 2),
    "tdpo(form='code')": lambda *c: oracles.tdpo(*c, 1),
    "chip(form='code')": lambda *c: oracles.chip(*c, VIEW),
    "chip(form='code', segment_weight=1.0)": lambda *c: oracles.chip(*c, VIEW, omega=1.0),
    "chip(segment_weight=1.1, released_sum=True)": lambda *c: oracles.chip(*c, VIEW, omega=1.1, released=True),
    "chip(form='paper')": lambda *c: oracles.chip_levels(*c, VIEW),
    "hsa_dpo(severity=1.7)": lambda *c: oracles.hsa_dpo(*c, 1.7),
    "amp": lambda *c: oracles.amp(*c, 1.0),
    "amp(is_best=0.0)": lambda *c: oracles.amp(*c, 0.0),
    "rrpo(alpha=0.05)": lambda *c: oracles.rrpo(*c, 0.05),
    "opa_dpo(form='code')": lambda *c: oracles.opa_dpo(*c, VIEW),
    "opa_dpo(form='paper')": lambda *c: oracles.mdpo(*c, VIEW, image_weight=0.2),
    "tars": lambda *c: oracles.mdpo(*c, VIEW, anchor_weight=0.0),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spec", CASES)
def test_every_method_is_its_formula(spec, seed):
    case = Case(seed)
    assert case.loss(spec) == pytest.approx(CASES[spec](*case.slow), abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta, kl_weight", [(0.1, 0.03), (0.5, 0.0), (0.1, 1.0)])
@pytest.mark.parametrize("direction", ["policy||reference", "reference||policy"])
def test_catpo_is_equations_8_to_10(seed, beta, kl_weight, direction):
    case = Case(seed)
    spec = f"catpo(beta={beta}, kl_weight={kl_weight}, kl_direction='{direction}')"
    unit = {side: [1.0] * len(case.ids[side]) for side in SIDES}
    for weights, given in ((case.weights, case.weights), (unit, None)):
        expected = oracles.catpo(*case.slow, weights, kl_weight, beta, reverse=direction == "reference||policy")
        assert case.loss(spec, weights=given) == pytest.approx(expected, abs=1e-10)


def test_tgdpo_takes_the_token_rewards_of_a_judge():
    case, random = Case(0, views=()), np.random.default_rng(7)
    judge = {f"{side}@judge": random.normal(size=(len(case.ids[side]), VOCABULARY)) for side in SIDES}
    expected = oracles.tgdpo(*case.slow, {key: value.tolist() for key, value in judge.items()})
    assert case.loss("tgdpo", reference={**case.reference, **judge}) == pytest.approx(expected, abs=1e-10)
    assert case.loss("tgdpo", policy={**case.policy, **judge}) == pytest.approx(expected, abs=1e-10)
    assert case.loss("tgdpo(alpha=0.0)") == pytest.approx(oracles.dpo(*case.slow), abs=1e-10)
    with pytest.raises(UserError, match="reads the reference's logits of 'chosen@judge'"):
        case.loss("tgdpo")


# ---- token weights in any method ------------------------------------------------------------------------------------------


def test_token_weights_scale_the_log_ratios_of_other_methods():
    case = Case(1)
    given = {"weights": case.weights}
    assert case.loss("dpo", **given) == pytest.approx(oracles.dpo(*case.slow), abs=1e-10)
    expected = oracles.catpo(*case.slow, case.weights, 0.0)
    assert case.loss("dpo(weights='catpo')", **given) == pytest.approx(expected, abs=1e-10)
    expected = oracles.opa_dpo(*case.slow, VIEW, case.weights)
    assert case.loss("opa_dpo(weights='catpo')", **given) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("spec", [
    "dpo", "ddpo", "vdpo", "tpo", "povid", "mdpo", "tdpo", "chip", "hsa_dpo", "amp", "rrpo", "opa_dpo", "tars",
    "tgdpo(alpha=0.0)", "cpo", "orpo", "simpo", "dpo(loss_type=['hinge', 'sft'])", "dpo(loss_type='apo_down')",
])  # fmt: skip
def test_unit_token_weights_change_nothing_and_others_do(spec):
    case = Case(3)
    weighted = spec[:-1] + ", weights='catpo')" if spec.endswith(")") else spec + "(weights='catpo')"
    unit = {side: [1.0] * len(case.ids[side]) for side in SIDES}
    assert case.loss(weighted, weights=unit) == pytest.approx(case.loss(spec), abs=1e-12)
    assert case.loss(weighted, weights=case.weights) != pytest.approx(case.loss(spec), abs=1e-6)


# ---- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec, message", [
    ("dpo(weights='tpo')", "only 'catpo'"),
    ("dpo(weights='catpo(kl_weight=0.1)')", "the weights have no option 'kl_weight'"),
    ("dpo(token_fraction=0.5)", r'Give dpo\(weights="catpo\(token_fraction=0.5\)"\)'),
    ("tdpo(alpha=0.3, token_fraction=0.5)", "does not weight tokens itself"),
    ("catpo(weights='catpo')", "weights tokens itself"),
    ("dpo(betta=0.5)", "Did you mean 'beta'"),
    ("tpo(view='nosed')", "There is no view 'nosed'"), ("tpo(view='noised(steps=3)')", "Did you mean 'step'"),
    ("tdpo(version=3)", "versions 1 and 2"), ("vdpo(unconditional='base')", "vdpo has no unconditional='base'"),
    ("dpo(loss_type='hinges')", "dpo has no loss_type='hinges'. Did you mean 'hinge'"),
    ("dpo(loss_type=3)", "no loss_type='3'"),
    ("dpo(loss_type='ipo', beta=0.0)", "positive beta"), ("dpo(loss_type='sppo_hard', beta=0.0)", "positive beta"),
    ("dpo(loss_type='aot')", "it sorts log-ratios across the batch"), ("cpo(loss_type='aot')", "it sorts log-ratios"),
    ("dpo(loss_type='exo_pair')", "Give a label_smoothing above 0, such as 0.001"),
    ("dpo(loss_type='hinge', label_smoothing=0.1)", "only sigmoid, sigmoid_norm, robust, exo_pair read it"),
    ("dpo(loss_type='discopop', discopop_tau=0.0)", "must be above 0"), ("dpo(discopop_tau=0.1)", "loss_type='discopop' only"),
    ("dpo(loss_type=['sigmoid', 'sft'], loss_weights=[1.0])", "as many weights as losses"),
    ("dpo(loss_type=['sigmoid', 'sft'], loss_weights=[1.0, 'a'])", "as many weights as losses"),
    ("dpo(loss_type=['sft', 'sft'])", "each loss once"), ("dpo(loss_type=[])", "each loss once"),
    ("dpo(loss_weights=0.5, loss_type=['sigmoid', 'sft'])", "as many weights as losses"),
    ("dpo(loss_type=['sigmoid', 'sft'], loss_weights=[0.0, 0.0])", "its gradient is zero"),
    ("cpo(loss_type='simpo', nll_weight=0.5)", r"give simpo\(nll_weight=0.5\)"),
    ("cpo(loss_type='alphapo')", r"give simpo\(alpha=0.25\)"), ("cpo(loss_type='nca_pair')", "cpo has no loss_type='nca_pair'"),
    ("cpo(loss_type='hinge', label_smoothing=0.1)", "is of loss_type='sigmoid' only"),
    ("simpo(label_smoothing=0.5)", "must lie in"), ("simpo(loss_type='hinge')", "'simpo' has no option 'loss_type'"),
    ("hinge", r"Give dpo\(loss_type='hinge'\)"), ("apo", r"dpo\(loss_type='apo_zero'\) or"),
    ("cpo_simpo", r"Give simpo\(nll_weight=1.0\)"), ("orpo(token_fraction=0.5)", "does not weight tokens itself"),
    ("simpo(beta=0.0)", "its gradient is zero"),
    *((f"{name}(form='other')", f"{name} has no form='other'")
      for name in ("ddpo", "vdpo", "tpo", "povid", "mdpo", "tdpo", "chip", "opa_dpo")),
    ("vdpo(guidance=0.0)", "multiplies the policy's log-probs by 0"),
    ("dpo(beta=0.0)", "its gradient is zero"),
    ("catpo(beta=0.0, kl_weight=0.0)", "its gradient is zero"),
    ("tpo(beta=0.0)", "its gradient is zero"),
    ("povid(text_weight=0.0, noise_weight=0.0)", "its gradient is zero"),
])  # fmt: skip
def test_options_that_cannot_be_or_learn_nothing_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        Case(0).loss(spec)


def test_a_view_that_is_not_given_is_named():
    case = Case(0, views=())
    with pytest.raises(UserError, match="reads the policy's logits of 'chosen@noised', which are not given"):
        case.loss("povid")
    with pytest.raises(UserError, match="has 2 rows"):
        case.loss("dpo", policy={**case.policy, "chosen": case.policy["chosen"][:2]})


def test_of_several_views_the_one_that_is_asked_for_is_read():
    case = Case(0, views=("noised", "cropped"))
    assert case.loss("mdpo") == pytest.approx(oracles.mdpo(*case.slow, "cropped"), abs=1e-10)
    assert case.loss("mdpo(view='noised(step=800)')") == pytest.approx(oracles.mdpo(*case.slow, "noised"), abs=1e-10)
    only = {key: value for key, value in case.policy.items() if "noised" not in key}
    reference = {key: value for key, value in case.reference.items() if "noised" not in key}
    expected = oracles.mdpo(*case.slow, "cropped", anchor_weight=0.0)
    assert case.loss("tars", policy=only, reference=reference) == pytest.approx(expected, abs=1e-10)


def test_the_released_v_dpo_setting_would_leave_a_constant():
    """gamma = 0: whatever the policy says with the picture, the loss stays."""
    case = Case(0)
    other = {**case.policy, "chosen": case.policy["chosen"] + 1.0, "rejected": -case.policy["rejected"]}
    changed = (as_lists(other), as_lists(case.reference), case.ids)
    assert oracles.vdpo(*case.slow, 0.0, "policy", VIEW) == pytest.approx(oracles.vdpo(*changed, 0.0, "policy", VIEW))
    assert math.isfinite(case.loss("vdpo"))
