"""The tilted reference and the rewards of words, against the plain way in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from catpo.core.errors import UserError
from catpo.models.output_head import token_stats
from catpo.models.tilt import Tilt, TiltedHead
from catpo.rewards.word_rewards import Probe, WordReward
from catpo.rewards.words import WordRow, by_pictures, from_bytes, to_bytes
from catpo.testing import loss_from_logits
from test_head import DIRECTIONS, LargestTensor, plain, problem

TILT = Tilt(
    ids=torch.tensor([[0, 10, 4], [3, -1, -1]]),
    rewards=torch.tensor([[-6.0, 2.5, -0.5], [-8.0, 0.0, 0.0]]),
    table=torch.tensor([0, 0, 1, 1, 0, 1, 0]),
)


def tilted_plainly(head, hidden):
    """The reference with its rewards added token by token: a head of its own for each position."""
    logits = head.logits(hidden)
    for position, table in enumerate(TILT.table.tolist()):
        for token, reward in zip(TILT.ids[table].tolist(), TILT.rewards[table].tolist(), strict=True):
            if token >= 0:
                logits[position, token] += reward
    return logits


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("softcap, is_frozen", [(None, True), (None, False), (3.0, True), (3.0, False)])
def test_the_kl_to_the_tilted_reference_and_its_gradients_equal_the_plain_way(direction, softcap, is_frozen):
    hidden, head, tokens, reference_hidden, reference_head = problem(softcap=softcap)
    trained = [hidden] if is_frozen else [hidden, head.weight, head.bias]
    for tensor in trained:
        tensor.requires_grad_(True)
    q = tilted_plainly(reference_head, reference_hidden).log_softmax(-1)
    p = head.logits(hidden).log_softmax(-1)
    first, second = (p, q) if direction == DIRECTIONS[0] else (q, p)
    expected = (first.exp() * (first - second)).sum(-1)
    options = {"reference_head": TiltedHead.over(reference_head, TILT), "direction": direction, "tile_width": 3}
    stats = token_stats(hidden, head, tokens, reference_hidden=reference_hidden, **options)
    torch.testing.assert_close(stats.kl, expected, rtol=1e-10, atol=1e-10)
    logps, _ = plain(hidden, head, tokens, reference_hidden, reference_head, direction)
    torch.testing.assert_close(stats.logps, logps, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(kl.square().sum(), trained) for kl in (stats.kl, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-10)


def test_rewards_of_zero_tilt_nothing_and_no_tokens_by_vocabulary_tensor_exists():
    hidden, head, tokens, reference_hidden, reference_head = problem(tokens=128, width=8, vocabulary=1000, dtype=torch.float32)
    tilt = Tilt(torch.tensor([[1, 999]]), torch.zeros(1, 2), torch.zeros(128, dtype=torch.long))
    known = {"reference_hidden": reference_hidden, "tile_width": 125}
    plainly = token_stats(hidden, head, tokens, reference_head=reference_head, **known)
    with LargestTensor() as largest:
        tilted = token_stats(hidden, head, tokens, reference_head=TiltedHead.over(reference_head, tilt), **known)
    assert torch.equal(plainly.kl, tilted.kl) and largest.size == 128 * 125


# ---- the objective --------------------------------------------------------------------------------------------------------


def slow_tilt(policy, reference, tokens, rewards, *, sides, reverse=False):
    """KL(q || pi) or KL(pi || q) summed over tokens, in loops over plain numbers; q ~ pi_ref exp(r)."""
    total = 0.0
    for side in sides:
        for row in range(len(tokens[side])):
            tilted = [math.exp(value + rewards.get(token, 0.0)) for token, value in enumerate(reference[side][row])]
            own = [math.exp(value) for value in policy[side][row]]
            q, p = [value / sum(tilted) for value in tilted], [value / sum(own) for value in own]
            first, second = (p, q) if reverse else (q, p)
            total += sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))
    return total


@pytest.mark.parametrize(
    "answers, sides", [("rejected", ["rejected"]), ("chosen", ["chosen"]), ("both", ["chosen", "rejected"])]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_objective_is_the_divergence_summed_over_the_models_own_answers(answers, sides, direction):
    random = np.random.default_rng(3)
    tokens = {"chosen": [1, 2, 3], "rejected": [4, 5]}
    policy, reference = ({side: random.normal(size=(len(ids), 7)) for side, ids in tokens.items()} for _ in range(2))
    rewards = {2: -6.0, 5: -0.5}
    given = {"policy": policy, "reference": reference, "tokens": tokens, "token_rewards": rewards}
    expected = slow_tilt(policy, reference, tokens, rewards, sides=sides, reverse=direction == DIRECTIONS[0])
    assert loss_from_logits(f"tilt(answers='{answers}', kl_direction='{direction}')", **given) == pytest.approx(
        expected, rel=1e-10
    )
    mixed = loss_from_logits(f"tilt(answers='{answers}', kl_direction='{direction}', tilt_weight=0.5, dpo_weight=2.0)", **given)
    assert mixed == pytest.approx(0.5 * expected + 2 * loss_from_logits("dpo", **{**given, "token_rewards": None}), rel=1e-10)


# ---- rewards of words -----------------------------------------------------------------------------------------------------


def rows():
    row = lambda pair, pictures, word, ids, label, x: WordRow(pair, pictures, word, ids, label, {"self_question": x})
    return [
        row("a", "P", "dog", (7, 9), 1, 3.0),
        row("a", "P", "dolphin", (7,), 0, -2.0),
        row("b", "P", "cat", (5,), -1, -1.5),
        row("b", "P", "dog", (7, 9), -1, 2.0),
        row("c", "Q", "cat", (5,), 1, 0.5),
        row("d", "Q", "cat", (5,), 0, 0.25),
    ]


def test_words_of_all_pairs_about_a_picture_are_one_table():
    tables = by_pictures(list(from_bytes(to_bytes(rows(), ["self_question"]), ["self_question"])), ["self_question"])
    assert tables["P"].words == ["dog", "dolphin", "cat"] and tables["P"].labels.tolist() == [1, 0, -1]
    assert tables["P"].features["self_question"].tolist() == [3.0, -2.0, -1.5]
    assert tables["Q"].labels.tolist() == [-1] and tables["Q"].features["self_question"].tolist() == [0.5]  # the pairs disagree


def test_a_word_is_rewarded_by_its_label_else_by_the_log_sigmoid_and_a_shared_token_by_the_best():
    table = by_pictures(rows(), ["self_question"])["P"]
    log_sigmoid = -math.log1p(math.exp(1.5))
    assert WordReward.of("self_question").of_words(table).tolist() == pytest.approx([0.0, -6.0, 2 * log_sigmoid])
    ids, rewards = WordReward.of("self_question").of_tokens(table)
    assert dict(zip(ids.tolist(), rewards.tolist(), strict=True)) == pytest.approx({7: 0.0, 9: 0.0, 5: 2 * log_sigmoid})
    unlabelled = WordReward.of("self_question(labels=False, scale=3.0, slope=2.0, offset=1.0, floor=-4.0)").of_words(table)
    assert unlabelled.tolist() == pytest.approx([-3 * math.log1p(math.exp(-4)), -4.0, -4.0])


def test_a_probe_is_read_back_and_rewards_by_its_log_odds(tmp_path):
    probe = Probe(("self_question",), (1.0,), (2.0,), (4.0,), 0.5)
    probe.write(tmp_path / "probe.json", auroc=0.9)
    assert Probe.read(tmp_path / "probe.json") == probe
    table = by_pictures(rows(), ["self_question"])["P"]
    logits = [4 * (x - 1) / 2 + 0.5 for x in (3.0, -2.0, -1.5)]
    expected = [max(-8.0, -2 * math.log1p(math.exp(-x))) for x in logits]
    reward = WordReward.of(f"probe(file='{tmp_path}/probe.json', labels=False)")
    assert reward.of_words(table).tolist() == pytest.approx(expected) and reward.reads == ("self_question",)


@pytest.mark.parametrize(
    "reward, message",
    [
        ("self_qestion", "Did you mean 'self_question'"),
        ("self_question(flour=-3.0)", "no option 'flour'"),
        ("self_question(scale=0.0)", "larger than 0"),
        ("probe(file='nowhere.json')", "nowhere.json cannot be read"),
        ("self_question(file='p.json')", "only probe"),
    ],
)
def test_a_reward_that_cannot_be_made_is_refused_by_name(reward, message):
    with pytest.raises(UserError, match=message):
        loss_from_logits(f'tilt(reward="{reward}")', policy={}, reference={}, tokens={"chosen": [], "rejected": []})


def test_a_feature_that_was_not_scored_is_named():
    with pytest.raises(UserError, match="holds no 'patch_lens' of words .it holds: self_question"):
        WordReward.of("patch_lens").of_words(by_pictures(rows(), ["self_question"])["P"])
