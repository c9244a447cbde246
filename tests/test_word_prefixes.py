"""Rewards of words of several tokens against the plain way: slow loops over the words, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from catpo.core.errors import UserError
from catpo.models.output_head import token_stats
from catpo.models.tensors import pad_indices
from catpo.models.tilt import Tilt, TiltedHead
from catpo.rewards.word_prefixes import WordPrefixes
from catpo.rewards.word_rewards import WordReward
from catpo.rewards.words import WordRow, by_pictures, from_bytes, to_bytes
from catpo.testing import loss_from_logits
from test_head import DIRECTIONS, problem

VOCABULARY = 7
"""Of the cases; most of a larger one has no reward."""
WORDS = {(1,): -6.0, (1, 2): -0.5, (1, 2, 3, 4): -2.0, (1, 4): -3.0, (5, 6, 1): -1.0, (5, 2): -8.0}
TEXT = [1, 2, 3, 4, 5, 6, 1, 1, 2, 3, 0, 1, 5, 6, 5, 2, 1, 2]
"""Has words that are finished, left half-way behind a shorter one and behind none, and one right behind another."""


def best(words, prefix):
    return max((reward for word, reward in words.items() if word[: len(prefix)] == prefix), default=0.0) if prefix else 0.0


def begins(words, prefix):
    return any(word[: len(prefix)] == prefix for word in words)


def read(words, text):
    """Of a text, the rewards of the longest words, read from left to right, and the tokens of the word that is open."""
    rewards, open_word = [], ()
    for token in text:
        if open_word and not begins(words, (*open_word, token)):
            rewards.append(finished(words, open_word))
            open_word = ()
        open_word = (*open_word, token) if begins(words, (*open_word, token)) else ()
    return rewards, open_word


def finished(words, prefix):
    return max(((len(word), reward) for word, reward in words.items() if prefix[: len(word)] == word), default=(0, 0.0))[1]


def granted(words, text):
    """What a text has been granted so far: of its words, and the best of those that the open one may become."""
    rewards, open_word = read(words, text)
    return sum(rewards) + best(words, open_word)


def slow_rewards(words, before, vocabulary=VOCABULARY):
    """Of each next token: what is granted with it less what was granted before it, which telescopes."""
    before_it = granted(words, before)
    return [granted(words, [*before, token]) - before_it for token in range(vocabulary)]


def drawn(seed):
    """Words of up to four tokens of four, so that many begin alike, and a text."""
    random = np.random.default_rng(seed)
    words = [tuple(random.integers(0, 4, random.integers(1, 5)).tolist()) for _ in range(8)]
    return dict(zip(words, random.uniform(-8, 0, 8).tolist(), strict=True)), random.integers(0, 5, 60).tolist()


CASES = [(WORDS, TEXT), *map(drawn, range(20))]


@pytest.mark.parametrize("words, text", CASES, ids=str)
def test_every_next_token_has_the_reward_of_the_plain_way_but_for_what_all_tokens_share(words, text):
    prefixes = WordPrefixes(words.items())
    for at, prefix in enumerate(prefixes.open_before(text)):
        rewards = prefixes.rewards(prefix)
        shared = prefixes.finished(prefix) - prefixes.best[prefix]
        ours = [rewards.get(token, 0.0) + shared for token in range(VOCABULARY)]
        assert ours == pytest.approx(slow_rewards(words, text[:at]), abs=1e-12)


@pytest.mark.parametrize("words, text", CASES, ids=str)
def test_the_rewards_of_a_words_tokens_sum_to_its_own(words, text):
    prefixes, end = WordPrefixes(words.items()), VOCABULARY - 1

    def total(tokens):
        pairs = zip(tokens, prefixes.open_before(tokens), strict=True)
        of_tokens = [prefixes.rewards(p).get(token, 0.0) + prefixes.finished(p) - prefixes.best[p] for token, p in pairs]
        return sum(of_tokens)

    words_alone = {word: reward for word, reward in words.items() if end not in word}
    for word, reward in words_alone.items():
        assert total([*word, end]) == pytest.approx(reward, abs=1e-12)
        is_longest = not any(other[: len(word)] == word for other in words if other != word)
        assert total([*word]) == pytest.approx(reward if is_longest else best(words, word), abs=1e-12)
    if end not in {token for word in words for token in word}:
        assert total([*text, end]) == pytest.approx(sum(read(words, [*text, end])[0]), abs=1e-9)


def slow_tilt(policy, reference, tokens, words, direction):
    """KL between the policy and the tilted reference, summed over tokens, in loops over plain numbers."""
    total = 0.0
    for row, _ in enumerate(tokens):
        rewards = slow_rewards(words, tokens[:row], len(policy[row]))
        tilted = [math.exp(value + reward) for value, reward in zip(reference[row], rewards, strict=True)]
        own = [math.exp(value) for value in policy[row]]
        q, p = [value / sum(tilted) for value in tilted], [value / sum(own) for value in own]
        first, second = (p, q) if direction == DIRECTIONS[0] else (q, p)
        total += sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))
    return total


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_objective_is_the_divergence_from_the_reference_tilted_by_whole_words(direction):
    random, tokens = np.random.default_rng(4), {"chosen": TEXT, "rejected": [5, 2, 0, 1]}
    policy, reference = ({side: random.normal(size=(len(ids), VOCABULARY)) for side, ids in tokens.items()} for _ in range(2))
    given = {"policy": policy, "reference": reference, "tokens": tokens, "token_rewards": WORDS}
    expected = sum(slow_tilt(policy[side], reference[side], tokens[side], WORDS, direction) for side in tokens)
    options = f"answers='both', kl_direction='{direction}'"
    assert loss_from_logits(f"tilt(tokens='word', {options})", **given) == pytest.approx(expected, rel=1e-10)
    assert loss_from_logits(f"tilt({options})", **given) != pytest.approx(expected, rel=1e-3)
    single = {(1,): -6.0, (5,): -0.5}
    first, word = (
        loss_from_logits(f"tilt(tokens='{which}', {options})", **{**given, "token_rewards": single})
        for which in ("first", "word")
    )
    assert first == word


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_gradient_through_the_tables_is_that_of_dense_rewards(direction):
    hidden, head, tokens, reference_hidden, reference_head = problem(tokens=len(TEXT), vocabulary=VOCABULARY)
    hidden.requires_grad_(True)
    prefixes = WordPrefixes(WORDS.items())
    number: dict = {}
    table = [number.setdefault(prefix, len(number)) for prefix in prefixes.open_before(TEXT)]
    rewards = [prefixes.rewards(prefix) for prefix in number]
    ids = pad_indices([[*each] for each in rewards])
    padded = [[*each.values(), *[0.0] * (ids.shape[1] - len(each))] for each in rewards]
    tilt = Tilt(ids, torch.tensor(padded, dtype=torch.float64), torch.tensor(table))
    assert len(number) == 6 < len(TEXT)  # (), 1, 12, 123, 5, 56
    options = {"reference_head": TiltedHead.over(reference_head, tilt), "direction": direction, "tile_width": 3}
    ours = token_stats(hidden, head, tokens, reference_hidden=reference_hidden, **options).kl
    dense = torch.tensor([slow_rewards(WORDS, TEXT[:at]) for at in range(len(TEXT))], dtype=torch.float64)
    q = (reference_head.logits(reference_hidden) + dense).log_softmax(-1)
    p = head.logits(hidden).log_softmax(-1)
    first, second = (p, q) if direction == DIRECTIONS[0] else (q, p)
    plainly = (first.exp() * (first - second)).sum(-1)
    torch.testing.assert_close(ours, plainly, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(kl.square().sum(), hidden)[0] for kl in (ours, plainly)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


# ---- words of a store -----------------------------------------------------------------------------------------------------


def rows():
    row = lambda word, forms, label: WordRow(
        "a", "P", word, tuple(sorted({form[0] for form in forms})), label, {"self_question": 0.0}, forms
    )
    return [row("traffic light", ((7, 8), (9,)), 0), row("traffic jam", ((7, 3),), 1), row("lamp", ((7, 8),), 1)]


def test_forms_are_kept_and_forms_of_the_same_tokens_take_the_best_reward():
    table = by_pictures(list(from_bytes(to_bytes(rows(), ["self_question"]), ["self_question"])), ["self_question"])["P"]
    assert table.forms == [((7, 8), (9,)), ((7, 3),), ((7, 8),)]
    prefixes = WordReward.of("self_question").of_tokens(table, "word")
    assert prefixes.words == {(7, 8): 0.0, (9,): -6.0, (7, 3): 0.0}
    first = WordReward.of("self_question").of_tokens(table)
    assert first.rewards() == prefixes.rewards() == {7: 0.0, 9: -6.0}
    assert not any(first.open_before([7, 8, 7, 3, 9]))


@pytest.mark.parametrize("forms", [((7, -1), (9,)), ((), (7,), (9,)), ((7, 8),), ((7, 8), (8,), (9,))])
def test_forms_that_were_never_written_are_refused(forms):
    bad = WordRow("a", "P", "lamp", (7, 9), 1, {"self_question": 0.0}, forms)
    with pytest.raises(UserError, match="the word 'lamp' has token ids"):
        list(from_bytes(to_bytes([bad], ["self_question"]), ["self_question"]))


def test_an_option_that_is_none_is_refused_by_name():
    with pytest.raises(UserError, match="tokens='words'.*Did you mean 'word'"):
        loss_from_logits("tilt(tokens='words')", policy={}, reference={}, tokens={"chosen": [], "rejected": []})
