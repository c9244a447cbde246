"""Each loss against its equation in slow float64 loops, and what must hold whatever the numbers."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.training import objectives
from catpo.training.objectives import FORMS as FORM
from catpo.training.objectives import catpo, dpo
from catpo.training.pair_stats import PairStats, kl_direction, requirements


class Figures(dict):
    """Random figures of a batch with responses of different lengths; what a method reads beyond the basic ones is made up too.

    NaN stands in the padding, which must never count. With `equal` the reference is the policy.
    """

    def __init__(self, pairs=3, tokens=5, seed=0, *, equal=False):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (pairs, 2, 1), generator=generator)
        super().__init__(mask=mask, token_ids=torch.randint(0, 4, mask.shape, generator=generator))
        self.seed, self.equal = seed, equal

    def __missing__(self, name):
        if name.startswith("meta "):
            return self.setdefault(name, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[: len(self["mask"])])
        quantity, _, rest = name.partition("@")
        mask = self["mask"][:, ("chosen", "rejected").index(rest.split("@")[0])] if rest else self["mask"]
        if quantity == "mask":
            return self.setdefault(name, mask)
        text = f"{self.seed} {name.replace('reference', 'policy') if self.equal else name}"
        draw = torch.randn(mask.shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())), dtype=torch.float64)
        if name == "weights":
            draw = draw.abs()
        elif name.startswith("kl "):
            draw = torch.zeros_like(draw) if self.equal else draw.abs()
        return self.setdefault(name, torch.where(mask, draw - 3 if "log" in name else draw, math.nan))

    def map(self, change, loss):
        """The same figures, all that `loss` reads, changed one by one."""
        loss(stats(self))
        changed = Figures.__new__(Figures)
        dict.__init__(changed, {name: change(value) for name, value in self.items()})
        changed.seed, changed.equal = self.seed, self.equal
        return changed


def table(pairs=3, tokens=5, seed=0):
    """The figures that `dpo` and `catpo` read, as a dictionary."""
    figures = Figures(pairs, tokens, seed)
    names = ("policy_logps", "reference_logps", "weights", "kl policy||reference", "kl reference||policy")
    return {"mask": figures["mask"], **{name: figures[name] for name in names}}


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


METHODS = registry.names("objectives")
FORMS = [
    f"{name}(form='{form}')" for name in ("ddpo", "vdpo", "tpo", "povid", "mdpo", "tdpo", "chip", "opa_dpo") for form in FORM
]
MIRRORED = ("catpo", "ddpo", "dpo", "tdpo", "vdpo")
"""Methods that treat both sides alike."""


def bound(spec):
    """An objective as a function of the figures alone."""
    objective = objectives.build(spec)
    return lambda figures: objective.loss(figures, **objective.options)


@pytest.mark.parametrize("spec", [*METHODS, *FORMS])
def test_equal_policy_and_reference_give_log_2(spec):
    found = bound(spec)(stats(Figures(equal=True)))
    assert found.metrics["loss/preference"].tolist() == pytest.approx([math.log(2)] * 3)
    if not spec.startswith("vdpo"):
        assert found.metrics["rewards/chosen"].tolist() == pytest.approx([0] * 3)


@pytest.mark.parametrize("spec", ["amp", "catpo", "chip", "ddpo", "dpo", "hsa_dpo", "povid", "rrpo", "tdpo", "tgdpo", "tpo"])
def test_the_first_loss_is_log_2_where_there_is_one_term(spec):
    found = bound(spec)(stats(Figures(equal=True)))
    rounds = Figures()["meta round 0.0"] if spec == "amp" else torch.zeros(3)
    assert found.losses.tolist() == pytest.approx((math.log(2) * (1 + 0.05 * rounds)).tolist())


def test_the_first_loss_of_vdpo_is_that_of_the_guidance_alone():
    figures = Figures(equal=True)
    gain = [
        (figures["policy_logps"][:, side] - figures[f"constant_policy_logps@{name}@blank"]).nan_to_num().sum(-1)
        for side, name in enumerate(("chosen", "rejected"))
    ]
    expected = -torch.nn.functional.logsigmoid(0.1 * 0.5 * (gain[0] - gain[1]))
    torch.testing.assert_close(bound("vdpo(guidance=1.5)")(stats(figures)).losses, expected)


@pytest.mark.parametrize("name", MIRRORED)
def test_swapping_the_sides_flips_the_margin(name):
    loss = registry.load("objectives", name)
    other = {"chosen": "rejected", "rejected": "chosen"}
    figures = Figures()
    swapped = figures.map(lambda value: value.flip(1), loss)
    for key in [key for key in swapped if "@" in key]:
        quantity, side, view = key.split("@")
        swapped[key] = figures[f"{quantity}@{other[side]}@{view}"]
    ours, theirs = loss(stats(figures)).metrics, loss(stats(swapped)).metrics
    torch.testing.assert_close(ours["rewards/chosen"], theirs["rewards/rejected"])


@pytest.mark.parametrize("spec", [*METHODS, *FORMS])
def test_permuting_the_batch_permutes_the_losses(spec):
    figures, order = Figures(), torch.tensor([2, 0, 1])
    loss = bound(spec)
    permuted = loss(stats(figures.map(lambda value: value[order], loss))).losses
    torch.testing.assert_close(permuted, loss(stats(figures)).losses[order])


@pytest.mark.parametrize("spec", [*METHODS, *FORMS])
def test_a_pair_alone_has_the_loss_it_has_in_a_batch(spec):
    figures, loss = Figures(tokens=7), bound(spec)
    together = loss(stats(figures)).losses
    assert torch.isfinite(together).all()
    for pair in range(3):
        longest = int(figures["mask"][pair].sum(-1).max())
        cut = lambda value, at=pair, end=longest: value[at : at + 1, ..., :end] if value.ndim > 1 else value[at : at + 1]
        torch.testing.assert_close(loss(stats(figures.map(cut, loss))).losses, together[pair : pair + 1])


@pytest.mark.parametrize("spec", [*METHODS, *FORMS, "dpo(loss_type='ipo')", "tdpo(version=1)", "tpo(weights='catpo')"])
def test_gradients_of_every_method_equal_finite_differences(spec):
    """But for terms whose gradient is stopped on purpose, which are held constant here."""
    figures, loss = Figures(pairs=2), bound(spec)
    loss(stats(figures))
    for name, value in figures.items():
        figures[name] = value.nan_to_num() if value.is_floating_point() else value
    trained = [name for name in figures if name.startswith("policy")]
    values = tuple(figures[name].clone().requires_grad_(True) for name in trained)
    changed = lambda *given: loss(stats({**figures, **dict(zip(trained, given, strict=True))})).losses
    assert trained and torch.autograd.gradcheck(changed, values)


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
    objective = objectives.build("catpo(preset='official-code', shared_prefix='neutral', beta=0.2)")
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
