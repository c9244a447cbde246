"""Words from tokens: nothing is lost, sub-words join, terminals are safe."""

import random

import pytest

from catpo.text.words import merge, plain, words


def texts(pieces, is_special=None):
    return [word.text for word in words(pieces, is_special or [False] * len(pieces))]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([" um", "brella"], ["umbrella"]),
        (["a", " cat", "."], ["a", "cat", "."]),
        ([" sky", "-", "blue"], ["sky", "-", "blue"]),
        (["A", "\n", "\n", " dog"], ["A", "dog"]),
        (["", "", "é", "t", "é"], ["été"]),
        (["ca", "f", "e", "\u0301", " x"], ["cafe\u0301", "x"]),
        (["我", "看到", "狗"], ["我", "看到", "狗"]),
        (["3", ".", "5"], ["3", ".", "5"]),
        ([], []),
    ],
)
def test_words_begin_at_spaces_and_where_letters_meet_other_signs(pieces, expected):
    assert texts(pieces) == expected


def test_each_token_is_in_one_word_and_no_text_is_lost():
    rng = random.Random(0)
    for _ in range(200):
        pieces = ["".join(rng.choices("ab é\n.,狗\u200d", k=rng.randrange(4))) for _ in range(rng.randrange(12))]
        is_special = [rng.random() < 0.1 for _ in pieces]
        merged = words(pieces, is_special)
        assert [token for word in merged for token in range(word.first, word.end)] == list(range(len(pieces)))
        assert "".join(word.space + word.text for word in merged) == "".join(pieces)


def test_a_special_token_is_a_word_of_its_own():
    merged = words(["a", "</s>", "b"], [False, True, False])
    assert [(word.text, word.is_special) for word in merged] == [("a", False), ("</s>", True), ("b", False)]


def test_a_word_with_one_hallucinated_token_is_hallucinated():
    merged = words([" tea", "pot", " cup", " and"], [False] * 4, [1, 0, 1, -1])
    assert [word.label for word in merged] == ["hallucinated", "grounded", ""]


def test_word_values_are_the_mean_or_the_largest_of_the_tokens():
    merged = words([" tea", "pot", "."], [False] * 3)
    assert merge([1, 3, 7], merged).tolist() == [2, 7]
    assert merge([1, 3, 7], merged, "max").tolist() == [3, 7]


def test_plain_text_has_nothing_a_terminal_acts_on():
    assert plain("a\x1b]0;title\x07b\x9bc\u202ed\u2066e\r\u2028f\ng") == "a]0;titlebcdef\ng"
    assert plain("👩\u200d🍳 ❤\ufe0f") == "👩\u200d🍳 ❤\ufe0f"
