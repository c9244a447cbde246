"""Fusion: Eq. 6, 7 and 11 as slow loops written from the paper, and what must hold for every option."""

import itertools
import math

import jaxtyping
import numpy as np
import pytest

from catpo.core.errors import UserError
from catpo.core.types import SIDES
from catpo.rewards.fusion import Fusion, ResponseSignals, find_signal, fuse, select_tokens, shared_prefix, weigh
from catpo.rewards.fusion_options import NORMALISATIONS

EOS = 2
NAMES = ("global_attention", "patch_entropy", "semantic")
RAW = Fusion(normalise="none")


# The paper, token by token, in float64


def score_by_paper(rows, alpha=0.5, gamma=None, delta=None):
    """s of each row (S_global, S_local, S_semantic): Eq. 6, or Eq. 11 where gamma and delta are given."""
    scores = []
    for s_global, s_local, s_semantic in rows:
        if gamma is not None:
            scores.append(gamma * s_global + delta * s_local + (1 - gamma - delta) * s_semantic)
        else:
            scores.append(alpha * (0.5 * s_global + 0.5 * s_local) + (1 - alpha) * s_semantic)
    return scores


def weights_by_paper(scores, side, base_weight):
    """Eq. 7 with T = tanh(s), s below 0 taken as 0."""
    weights = []
    for score in scores:
        squashed = math.tanh(max(score, 0.0))
        weights.append(base_weight + squashed if side == "chosen" else base_weight + (1 - squashed))
    return weights


def minmax_by_loop(column):
    low, high = min(column), max(column)
    return [0.5 if high == low else (value - low) / (high - low) for value in column]


def columns_by_loop(response, how=lambda column: column):
    """Rows (S_global, S_local, S_semantic) of the tokens that are not special, each column through `how`."""
    text = [token for token in range(len(response.token_ids)) if not response.is_special[token]]
    columns = [how([float(response.signals[name][token]) for token in text]) for name in NAMES]
    return list(zip(*columns, strict=True))


# Cases


def response(ids, *, seed=0, low=0.0, **signals):
    ids = np.asarray(ids)
    rng = np.random.default_rng([seed, *ids])
    drawn = {name: rng.uniform(low, 1.0, len(ids)).astype(np.float32) for name in NAMES}
    given = {name: np.asarray(values, dtype=np.float32) for name, values in signals.items()}
    return ResponseSignals(token_ids=ids, is_special=ids == EOS, signals={**drawn, **given})


def random_pair(seed, low=0.0):
    """A pair with a shared prefix on which the raw signals agree, as the causal model makes them."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, 9, rng.integers(0, 5))
    chosen = response([*prefix, 10, *rng.integers(3, 9, rng.integers(0, 8)), EOS], seed=seed, low=low)
    rejected = response([*prefix, 11, *rng.integers(3, 9, rng.integers(0, 8)), EOS], seed=seed + 1000, low=low)
    for name in NAMES:
        rejected.signals[name][: len(prefix)] = chosen.signals[name][: len(prefix)]
    return chosen, rejected


def table_of(*responses):
    return {name: np.sort(np.concatenate([r.signals[name] for r in responses])) for name in NAMES}


def some_fusions():
    """Every normalisation, scope and activation crossed, with the other options drawn anew for each."""
    rng = np.random.default_rng(0)
    for normalise, scope, activation in itertools.product(NORMALISATIONS, ("response", "pair"), ("tanh", "sigmoid")):
        if (normalise, activation) != ("mean_calibrated", "sigmoid"):
            yield Fusion(
                normalise=normalise,
                scope=scope,
                activation=activation,
                eos=str(rng.choice(["neutral", "zero", "scored"])),
                token_fraction=float(rng.choice([1.0, 0.3])),
                shared_prefix=str(rng.choice(["own", "neutral"])),
                alpha=float(rng.random()),
            )


def assert_weights(pair, fusion, *, how=lambda column: column, **coefficients):
    """Both sides' weights are those of the loops above; the last token is EOS."""
    weights = fuse(*pair, fusion)
    for side, response in zip(SIDES, pair, strict=True):
        scores = score_by_paper(columns_by_loop(response, how), **coefficients)
        expected = [*weights_by_paper(scores, side, fusion.base_weight), 1.0]
        np.testing.assert_allclose(getattr(weights, side), expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_raw_weights_equal_the_paper(seed, alpha):
    fusion = Fusion(normalise="none", alpha=alpha, base_weight=0.1 + seed / 10)
    assert_weights(random_pair(seed, low=-0.5), fusion, alpha=alpha)


@pytest.mark.parametrize("seed", range(10))
def test_default_weights_equal_the_paper_after_minmax_of_each_signal(seed):
    assert_weights(random_pair(seed), Fusion(), how=minmax_by_loop)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "delta"), [(0.25, 0.25), (0.6, 0.4), (0.0, 0.1), (1.0, 0.0)])
def test_coefficients_per_signal_equal_the_papers_learnable_fusion(seed, gamma, delta):
    fusion = Fusion(normalise="none", gamma=gamma, delta=delta)
    assert_weights(random_pair(seed), fusion, gamma=gamma, delta=delta)


@pytest.mark.parametrize(
    "options", [{"gamma": 0.25, "delta": 0.25}, {"signals": dict(zip(NAMES, (0.25, 0.25, 0.5), strict=True))}]
)
def test_a_quarter_a_quarter_and_a_half_are_the_default_coefficients(options):
    pair = random_pair(3)
    np.testing.assert_allclose(fuse(*pair, Fusion(**options)).chosen, fuse(*pair).chosen, atol=1e-12)


def test_named_coefficients_replace_the_three_signals():
    chosen, rejected = response([5, 6, EOS], patch_logit=[0.1, 0.9, 0]), response([7, 6, EOS], patch_logit=[0.3, 0.2, 0])
    alone = fuse(chosen, rejected, Fusion(normalise="none", signals={"patch_logit": 2.0}))
    np.testing.assert_allclose(alone.chosen[:2], weights_by_paper([0.2, 1.8], "chosen", 0.5), atol=1e-6)


# What holds for every option


@pytest.mark.parametrize("seed", range(3))
def test_every_weight_is_in_the_range_that_the_paper_promises(seed):
    chosen, rejected = random_pair(seed, low=-0.5)
    table = table_of(chosen, rejected)
    for fusion in some_fusions():
        weights = fuse(chosen, rejected, fusion, table)
        for mine, r in ((weights.chosen, chosen), (weights.rejected, rejected)):
            assert mine.shape == r.token_ids.shape
            inside = (mine >= fusion.base_weight - 1e-12) & (mine <= fusion.base_weight + 1 + 1e-12)
            if fusion.eos == "zero":
                assert (mine[r.is_special] == 0).all()
                inside |= r.is_special
            assert inside.all(), fusion
        for squashed in (weights.chosen_relevance, weights.rejected_relevance):
            assert ((squashed >= 0) & (squashed <= 1)).all(), fusion


def test_chosen_and_rejected_weights_of_one_token_add_up_to_twice_the_base_weight_and_one():
    squashed = np.linspace(0, 1, 11)
    np.testing.assert_allclose(weigh(squashed, "chosen", 0.7) + weigh(squashed, "rejected", 0.7), 2 * 0.7 + 1)


def test_swapping_the_sides_reverses_the_order_of_the_weights():
    chosen, rejected = random_pair(7)
    weights, swapped = fuse(chosen, rejected, RAW), fuse(rejected, chosen, RAW)
    np.testing.assert_allclose(weights.chosen_relevance, swapped.rejected_relevance)
    np.testing.assert_allclose(weights.chosen[:-1] - 0.5, 1 - (swapped.rejected[:-1] - 0.5))
    assert (np.argsort(weights.chosen[:-1]) == np.argsort(-swapped.rejected[:-1])).all()


@pytest.mark.parametrize("normalise", ["minmax", "zscore"])
def test_scaling_and_shifting_a_signal_changes_nothing_after_normalisation(normalise):
    chosen, rejected = random_pair(5)
    moved = [
        ResponseSignals(token_ids=r.token_ids, is_special=r.is_special, signals={n: 4 * v + 1 for n, v in r.signals.items()})
        for r in (chosen, rejected)
    ]
    for scope in ("response", "pair"):
        fusion = Fusion(normalise=normalise, scope=scope)
        np.testing.assert_allclose(fuse(*moved, fusion).chosen, fuse(chosen, rejected, fusion).chosen, atol=1e-5)


def test_fusing_changes_none_of_its_inputs():
    chosen, rejected = random_pair(2)
    before = [{name: values.copy() for name, values in r.signals.items()} for r in (chosen, rejected)]
    for fusion in some_fusions():
        fuse(chosen, rejected, fusion, table_of(chosen, rejected))
    for r, copies in zip((chosen, rejected), before, strict=True):
        assert all((r.signals[name] == copies[name]).all() for name in NAMES)


# Normalisations


def test_pair_scope_takes_the_extremes_of_both_responses():
    chosen = response([5, 6, EOS], patch_logit=[0.0, 1.0, 9])
    rejected = response([5, 7, EOS], patch_logit=[0.0, 4.0, 9])
    fusion = Fusion(scope="pair", signals={"patch_logit": 1.0})
    weights = fuse(chosen, rejected, fusion)
    np.testing.assert_allclose(weights.chosen_relevance[:2], np.tanh([0.0, 0.25]))
    np.testing.assert_allclose(weights.rejected_relevance[:2], np.tanh([0.0, 1.0]))


def test_a_signal_that_is_the_same_everywhere_counts_as_one_half():
    chosen, rejected = response([5, 6, EOS], semantic=[0.3] * 3), response([7, 6, EOS], semantic=[0.1] * 3)
    weights = fuse(chosen, rejected, Fusion(alpha=0.0))
    np.testing.assert_allclose(weights.chosen_relevance[:2], np.tanh(0.5))
    as_zscore = fuse(chosen, rejected, Fusion(alpha=0.0, normalise="zscore", activation="sigmoid"))
    np.testing.assert_allclose(as_zscore.chosen_relevance[:2], 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_mean_calibrated_relevance_has_the_mean_at_which_t_is_one_half(seed):
    chosen, rejected = random_pair(seed)
    fusion = Fusion(normalise="mean_calibrated")
    relevance = np.arctanh(fuse(chosen, rejected, fusion).chosen_relevance[:-1])
    assert relevance.mean() == pytest.approx(math.atanh(0.5))
    raw = np.asarray(score_by_paper(columns_by_loop(chosen)))
    np.testing.assert_allclose(relevance / relevance.mean(), raw / raw.mean(), atol=1e-9)


def test_mean_calibrated_gives_one_half_when_every_relevance_is_negative():
    chosen, rejected = response([5, 6, EOS], semantic=[-0.1, -0.2, 0]), response([7, EOS], semantic=[0.4, 0])
    weights = fuse(chosen, rejected, Fusion(normalise="mean_calibrated", alpha=0.0))
    np.testing.assert_allclose(weights.chosen_relevance, 0.5)


def test_zscore_with_a_sigmoid_puts_the_mean_token_at_one_half():
    chosen, rejected = response([5, 6, 7, EOS], semantic=[0, 1, 2, 50]), response([8, EOS])
    squashed = fuse(chosen, rejected, Fusion(normalise="zscore", activation="sigmoid", alpha=0.0)).chosen_relevance
    assert squashed[1] == pytest.approx(0.5)
    assert squashed[0] + squashed[2] == pytest.approx(1.0)


def test_quantile_is_the_share_of_stored_values_below_with_ties_counted_half():
    chosen, rejected = response([5, 6, 7, EOS], semantic=[0.0, 0.5, 9.0, 0]), response([8, EOS])
    table = {**table_of(chosen, rejected), "semantic": np.array([0.0, 0.5, 0.5, 1.0], dtype=np.float32)}
    squashed = fuse(chosen, rejected, Fusion(normalise="quantile", alpha=0.0), table).chosen_relevance
    np.testing.assert_allclose(squashed[:3], np.tanh([0.125, 0.5, 1.0]))


def test_a_higher_temperature_brings_weights_closer_together():
    chosen, rejected = random_pair(6)
    spreads = [np.ptp(fuse(chosen, rejected, Fusion(temperature=t)).chosen[:-1]) for t in (0.5, 1.0, 4.0)]
    assert spreads[0] > spreads[1] > spreads[2] > 0


# EOS and special tokens


def test_eos_is_neutral_zero_or_scored():
    chosen, rejected = response([5, 6, EOS], patch_logit=[0, 1, 2]), response([7, EOS], patch_logit=[0, 1])
    by_option = {
        eos: fuse(chosen, rejected, Fusion(signals={"patch_logit": 1.0}, eos=eos)).chosen
        for eos in ("neutral", "zero", "scored")
    }
    np.testing.assert_allclose(by_option["neutral"], 0.5 + np.array([0, math.tanh(1), 0.5]))  # EOS is no part of the maximum
    np.testing.assert_allclose(by_option["zero"], [0.5, 0.5 + math.tanh(1), 0.0])
    np.testing.assert_allclose(by_option["scored"], 0.5 + np.tanh([0, 0.5, 1]))


def test_a_response_of_special_tokens_only_is_neutral():
    chosen, rejected = response([EOS, EOS]), response([5, EOS])
    for normalise, scope in itertools.product(NORMALISATIONS, ("response", "pair")):
        weights = fuse(chosen, rejected, Fusion(normalise=normalise, scope=scope, token_fraction=0.5), table_of(rejected))
        np.testing.assert_array_equal(weights.chosen, 1.0)


# A share of the chosen tokens


@pytest.mark.parametrize("count", [1, 7, 10, 100])
@pytest.mark.parametrize("share", [0.0, 0.07, 0.3, 0.7, 1.0])
def test_a_share_of_the_tokens_is_rounded_up(count, share):
    squashed = np.random.default_rng(0).random(count)
    exact = -(-round(share * 100) * count // 100)  # ⌈share · count⌉ in whole numbers
    assert select_tokens(squashed, share, "top").sum() == select_tokens(squashed, share, "bottom").sum() == exact


@pytest.mark.parametrize("select", ["top", "bottom"])
@pytest.mark.parametrize("unselected", [1.0, 0.0, "base"])
def test_only_the_selected_chosen_tokens_get_weights_of_equation_7(select, unselected):
    chosen, rejected = random_pair(9)
    everything = fuse(chosen, rejected, Fusion(base_weight=0.4))
    some = fuse(chosen, rejected, Fusion(base_weight=0.4, token_fraction=0.3, select=select, unselected=unselected))
    squashed = everything.chosen_relevance[:-1]
    ranked = sorted(range(len(squashed)), key=lambda token: squashed[token], reverse=select == "top")
    kept = ranked[: math.ceil(0.3 * len(squashed))]
    for token in range(len(squashed)):
        other = 0.4 if unselected == "base" else unselected
        assert some.chosen[token] == (everything.chosen[token] if token in kept else other)
    assert some.chosen[-1] == 1.0  # EOS is not ranked
    np.testing.assert_array_equal(some.rejected, everything.rejected)


def test_tokens_of_equal_relevance_are_selected_by_position():
    for select in ("top", "bottom"):
        assert select_tokens(np.full(5, 0.4), 0.4, select).tolist() == [True, True, False, False, False]


def test_selecting_no_token_makes_the_chosen_side_plain_dpo():
    weights = fuse(*random_pair(1), Fusion(token_fraction=0.0))
    np.testing.assert_array_equal(weights.chosen, 1.0)


# The shared prefix


@pytest.mark.parametrize("base_weight", [0.0, 0.5, 3.0])
def test_equal_raw_relevance_leaves_shared_tokens_a_net_coefficient_of_2t_minus_1(base_weight):
    chosen, rejected = random_pair(4)
    weights = fuse(chosen, rejected, Fusion(normalise="none", base_weight=base_weight))
    shared = weights.shared_count
    assert shared > 0
    expected = (2 * weights.chosen_relevance[:shared] - 1).mean()
    assert weights.net_shared_coefficient == pytest.approx(expected)
    pair_scope = fuse(chosen, rejected, Fusion(scope="pair", base_weight=base_weight))
    assert pair_scope.net_shared_coefficient == pytest.approx((2 * pair_scope.chosen_relevance[:shared] - 1).mean())


def test_small_raw_relevance_pushes_the_shared_prefix_down():
    small = {name: [0.1, 0.1, 0.1, 0.1] for name in NAMES}
    weights = fuse(response([5, 6, 7, EOS], **small), response([5, 6, 8, EOS], **small), RAW)
    assert weights.shared_count == 2
    assert weights.net_shared_coefficient == pytest.approx(2 * math.tanh(0.1) - 1)


@pytest.mark.parametrize("seed", range(8))
def test_neutral_shared_tokens_cancel_and_the_others_stay(seed):
    chosen, rejected = random_pair(seed)
    own, neutral = fuse(chosen, rejected), fuse(chosen, rejected, Fusion(shared_prefix="neutral"))
    shared = own.shared_count
    np.testing.assert_array_equal(neutral.chosen[:shared], neutral.rejected[:shared])
    np.testing.assert_allclose(neutral.chosen[:shared], (own.chosen[:shared] + own.rejected[:shared]) / 2)
    np.testing.assert_array_equal(neutral.chosen[shared:], own.chosen[shared:])
    np.testing.assert_array_equal(neutral.rejected[shared:], own.rejected[shared:])
    if shared:
        assert neutral.net_shared_coefficient == 0


def test_without_a_shared_token_the_net_coefficient_is_not_a_number():
    weights = fuse(response([5, 6, EOS]), response([7, 6, EOS]))
    assert weights.shared_count == 0
    assert math.isnan(weights.net_shared_coefficient)


def test_shared_prefix_ends_with_the_shorter_response():
    assert shared_prefix([1, 2, 3], [1, 2]) == 2
    assert shared_prefix([1, 2, 3, 4], [1, 9, 3, 4]) == 1
    assert shared_prefix([], [1]) == 0


# Bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"normalise": "min_max"}, "fusion has no normalise='min_max'. Did you mean 'minmax'"),
        ({"scope": "token"}, "scope='token'. Known: pair, response"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"eos": 0}, "eos='0'. Known: neutral, scored, zero"),
        ({"select": "tops"}, "Did you mean 'top'"),
        ({"shared_prefix": "neutrl"}, "Did you mean 'neutral'"),
        ({"alpha": 1.2}, "alpha=1.2 is not a number from 0 to 1"),
        ({"alpha": "0.5"}, "alpha='0.5' is not a number"),
        ({"alpha": True}, "alpha=True is not a number"),
        ({"base_weight": -0.1}, "base_weight=-0.1 is not a number of 0 or more"),
        ({"base_weight": math.nan}, "base_weight=nan"),
        ({"token_fraction": 30}, "token_fraction=30 is not a number from 0 to 1"),
        ({"temperature": 0}, "temperature=0 would divide by zero"),
        ({"unselected": "basis"}, "unselected='basis' is not a number of 0 or more or 'base'"),
        ({"signals": {}}, r"signals=\{\} is not of the form"),
        ({"signals": "patch_logit"}, "signals='patch_logit' is not of the form"),
        ({"signals": {"patch_logit": "1"}}, r"signals\['patch_logit'\]='1' is not a finite number"),
        ({"gamma": 0.5}, "gamma and delta .* go together"),
        ({"gamma": 0.7, "delta": 0.6}, "gamma . delta = 1.3 is more than 1"),
        ({"gamma": 0.5, "delta": 0.5, "signals": {"semantic": 1.0}}, "Give one of them"),
        ({"normalise": "mean_calibrated", "activation": "sigmoid"}, "needs activation='tanh'"),
    ],
)
def test_an_option_outside_its_range_is_named(options, says, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside tests: a recipe can hold any type
    with pytest.raises(UserError, match=says):
        Fusion(**options)


@pytest.mark.parametrize(
    ("signals", "options", "says"),
    [
        ({"semantic": [0.1, math.nan, 0.2]}, {}, "signal 'semantic' of the chosen response is nan at token 1"),
        ({"semantic": [0.1, 0.2, -math.inf]}, {"eos": "scored"}, "signal 'semantic' of the chosen response is -inf at token 2"),
        ({"semantic": [0.1, 0.2]}, {}, "signal 'semantic' of the chosen response has 2 values for 3 tokens"),
        ({}, {"signals": {"semantics": 1.0}}, r"signal 'semantics' was not scored\. Did you mean 'semantic'"),
        ({}, {"normalise": "quantile"}, "ranks tokens among all of a reward store"),
    ],
)
def test_signals_that_cannot_be_fused_are_named(signals, options, says):
    with pytest.raises(UserError, match=says):
        fuse(response([7, 6, EOS], **signals), response([5, EOS]), Fusion(**options))


def test_a_signal_is_found_by_its_name_without_options_unless_that_is_ambiguous():
    assert find_signal({"semantic(embedding='hidden')": 0, "patch_entropy": 0}, "semantic") == "semantic(embedding='hidden')"
    with pytest.raises(UserError, match="scored with several options"):
        find_signal({"semantic(a=1)": 0, "semantic(a=2)": 0}, "semantic")
    assert find_signal({"semantic(a=1)": 0, "semantic(a=2)": 0}, "semantic(a=2)") == "semantic(a=2)"
