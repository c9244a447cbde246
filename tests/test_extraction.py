"""Objects that a judge names: the official prompt out of its file, replies, and the words made of them."""

from __future__ import annotations

import pytest

from catpo.core.errors import UserError
from catpo.evaluation.benchmarks import _extraction as extraction
from catpo.evaluation.benchmarks._coco import Vocabulary
from catpo.judges import Judge

SCRIPT = '''
import os
os.remove("never run")
prompt_template = """Find objects. \\"a\\"

Q: {question}
A: {answer}
"""
'''
TEMPLATE = 'Find objects. "a"\n\nQ: {question}\nA: {answer}\n'


class Scripted(Judge):
    """Says what it was told to, and remembers."""

    identity = {"name": "scripted", "version": "", "decoding": {}}

    def __init__(self, *replies: str) -> None:
        self.replies, self.asked = list(replies), []

    def ask(self, messages, *, key, attempt=1):
        self.asked.append((messages, key, attempt))
        return self.replies[attempt - 1]


def test_the_prompt_is_read_out_of_the_official_file_and_the_file_is_not_run():
    assert extraction.read_template(SCRIPT) == TEMPLATE


@pytest.mark.parametrize(
    "bad", ["", "prompt_template = 3", "prompt_template = 'no places'", "prompt_template = f'{question} {answer}'", "def", "\0"]
)
def test_a_file_without_a_prompt_is_refused(bad):
    with pytest.raises(UserError, match="eval_gpt_obj_halbench.py"):
        extraction.read_template(bad)


def test_question_and_answer_are_put_in_as_they_are():
    (message,) = extraction.messages(TEMPLATE, "What? {answer}", "A {question}.")
    assert message == {"role": "system", "content": 'Find objects. "a"\n\nQ: What? A {question}.\nA: A {question}.\n'}


@pytest.mark.parametrize(
    ("reply", "objects"),
    [
        ('["dog", "cat"]', ["dog", "cat"]),
        ("[]", []),
        ('Here:\n```json\n["dog"]\n```', ["dog"]),
        ('1. dog\n["dog"]\n', ["dog"]),
        ("Objects:\n[]", None),
        ('{"dog": 1}', None),
        ('["dog", 3]', None),
        ('["dog"', None),
        ("", None),
        ("[" * 100_000, None),
    ],
)
def test_a_reply_is_a_list_of_texts_or_nothing(reply, objects):
    assert extraction.read_objects(reply) == objects


def test_a_short_answer_is_not_shown_to_the_judge():
    judge = Scripted()
    assert extraction.extract(judge, TEMPLATE, "What?", " A red dog ", key="k") == ([], "") and not judge.asked


def test_a_reply_that_cannot_be_read_is_asked_for_again_and_then_given_up():
    judge = Scripted("what?", '["dog"]')
    assert extraction.extract(judge, TEMPLATE, "What?", "There is a dog.", key="k") == (["dog"], '["dog"]')
    assert [(key, attempt) for _, key, attempt in judge.asked] == [("k", 1), ("k", 2)]
    judge = Scripted("what?", "who?", "no.")
    assert extraction.extract(judge, TEMPLATE, "What?", "There is a dog.", key="k") == (None, "no.")


def test_objects_become_two_word_things_or_runs_of_nouns_once_each():
    tags = {"a": "DT", "red": "JJ", "of": "IN", "running": "VBG"}
    asked = []

    def tagged(text):
        asked.append(text)
        return [(word.removesuffix("s"), tags.get(word, "NNS" if word.endswith("s") else "NN")) for word in text.split()]

    pairs = {"fire hydrant": "fire hydrant", "baby dog": "dog"}
    objects = ["red fire hydrants", "park bench", "glass of water", "baby dog chair", "dog", "water", "running"]
    assert extraction.words(objects, tagged, Vocabulary({}, pairs)) == ["fire hydrant", "park bench", "glas", "water", "dog"]
    assert asked[0] == "a red fire hydrants"
