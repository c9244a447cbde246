"""Pairs that a judge helps to make: what it is asked, how its replies are read, and that nothing is asked in vain."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

import fake_chat
from catpo import judges
from catpo.core.conversation import Turn
from catpo.core.errors import UserError
from catpo.core.types import Picture, Sample, pair_id
from catpo.data.read import open_data
from catpo.files.json_files import read_rows
from catpo.judges import Judge, open_judge
from catpo.judges._requests import FORMS, TASKS
from catpo.judges.truth import Judge as Truth
from catpo.pairing.methods import Dropped, hadpo, povid, rlaif
from catpo.pairing.pair import pair
from catpo.text.object_words import mentions
from fake_family import FakeFamily

DATA = "scenes(count=6)"


class Scripted(Judge):
    """Replies in turn, and keeps what it was asked."""

    identity = {"name": "scripted"}

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def ask(self, messages, *, key, attempt=1):
        self.messages = len(messages)
        self.asked.append((key, attempt, messages[-1]["content"][-1]["text"]))
        return self.replies.pop(0)


@pytest.fixture
def sample():
    picture = Picture(data=next(open_data("scenes(count=1)").samples()).images[0].read())
    return Sample("s", (picture,), "Describe the image.", ("There is a dog.",), {"present": ["dog"], "counts": {"dog": 2}})


def run(output, method, *, judge="truth", family=None, **options):
    given = dict(data=DATA, temperature=1.0, block_size=2, progress=False)
    return pair(model=family or FakeFamily(), output=output, method=method, judge=judge, **{**given, **options})


def made(output):
    return list(open_data(output).pairs())


def absent(each, side, samples):
    present = samples[each.meta["sample"]].truth["present"]
    return [mention.object for mention in mentions(each.response(side)) if mention.object not in present]


# ---- rlaif ----------------------------------------------------------------------------------------------------------------


def test_rlaif_divides_answers_into_claims_and_counts_the_wrong_ones(sample):
    first, second = "Is there a dog?\nIs there a cat?", "1. Is there a fox?\n2. Is there a cat?"
    judge = Scripted(first, "yes\nno", second, "1. No\n2. No", "Is it?", "Yes.")
    found = rlaif.make(sample, "A dog and a cat.", random.Random(0), None, ["A fox and a cat.", "A dog."], judge)
    assert (found.chosen, found.rejected) == ("A dog.", "A fox and a cat.")
    assert found.meta["rewards"] == [0.0, -2.0]
    assert [key for key, *_ in judge.asked] == [f"s/{task}-{number}" for number in range(3) for task in ("claims", "verify")]
    assert "Is there a dog?\nIs there a cat?" in judge.asked[1][2] and "Objects: dog (2)." in judge.asked[1][2]
    assert "## Answer\nA fox and a cat." in judge.asked[2][2]


def test_rlaif_by_rating_asks_once_per_answer(sample):
    judge = Scripted("Rating: 3", "**Rating**: 8.5", "Rating: 5")
    found = rlaif.make(sample, "A.", random.Random(0), None, ["B.", "C.", "B."], judge, by="rating")
    assert (found.chosen, found.rejected, len(judge.asked)) == ("B.", "A.", 3)


def test_earlier_turns_stay_in_the_pair_and_the_judge_reads_them_in_one_message(sample):
    sample = replace(sample, history=(Turn("user", "A cat?"), Turn("assistant", "No.")))
    judge = Scripted("Rating: 3", "Rating: 8")
    found = rlaif.make(sample, "A.", random.Random(0), None, ["B."], judge, by="rating")
    assert found.history == sample.history
    assert found.id == pair_id(sample.images, sample.prompt, "B.", "A.", sample.history)
    assert "## Question\nuser: A cat?\nassistant: No.\nDescribe the image.\n" in judge.asked[0][2]
    assert judge.messages == 1


def test_a_reply_that_cannot_be_read_is_asked_for_again_and_then_left_out(sample):
    judge = Scripted("what?", "Rating: 3", *["I cannot"] * 3, "Rating: 4")
    found = rlaif.make(sample, "A.", random.Random(0), None, ["B.", "C."], judge, by="rating")
    assert (found.chosen, found.rejected) == ("C.", "A.")
    assert [attempt for _, attempt, _ in judge.asked] == [1, 2, 1, 2, 3, 1]
    assert rlaif.make(sample, "A.", random.Random(0), None, ["B."], Scripted(*["?"] * 6), by="rating") == Dropped(
        "unreadable reply"
    )


def test_a_reply_that_cannot_be_read_is_counted_and_quoted_once_with_the_form_expected(tmp_path, monkeypatch, capsys):
    keys = []

    def mumble(judge, messages, *, key, attempt=1):
        keys.append(key)
        return "I would say 7" if key.endswith("-0") else f"Rating: {len(keys) % 7}"

    monkeypatch.setattr(Truth, "ask", mumble)
    result = run(tmp_path / "out", "rlaif(candidates=3, by='rating')", limit=4, block_size=1)
    about = json.loads((tmp_path / "out" / "pairs.json").read_text())
    unread = sum(key.endswith("-0") for key in keys) // 3  # three attempts each
    assert about["counts"]["noted"] == {"replies of the judge could not be read": unread}
    sentence = f"the judge's reply to {keys[0]} is 'I would say 7', expected: `Rating: ` and a number from 0 to 10"
    assert about["counts"]["unreadable"] == result.unreadable == sentence
    assert str(result).count("I would say 7") == 1
    assert not any({"noted", "unreadable"} & row.keys() for row in read_rows(tmp_path / "out" / "pairs.jsonl"))
    monkeypatch.setattr(Truth, "ask", lambda *_, **__: "Bananas")
    with pytest.raises(
        UserError, match=r"the first: the judge's reply to .*/rate-0 is 'Bananas', expected: `Rating: ` and a num"
    ):
        run(tmp_path / "none", "rlaif(candidates=3, by='rating')", limit=2)


@pytest.mark.parametrize(("task", "form"), FORMS.items())
def test_the_form_of_every_request_is_documented(task, form):
    page = (Path(__file__).parent.parent / "docs" / "how-to" / "judge.md").read_text(encoding="utf-8")
    assert set(FORMS) == set(TASKS)
    assert f"| `{task}` |" in page and form in page


@pytest.mark.parametrize(
    "answers, reason", [(["A.", "A."], "same text"), (["", " "], "empty answer"), (["A.", "B."], "all equally good")]
)
def test_rlaif_says_why_there_is_no_pair(sample, answers, reason):
    judge = Scripted("Rating: 3", "Rating: 3")
    assert rlaif.make(sample, answers[0], random.Random(0), None, answers[1:], judge, by="rating") == Dropped(reason)


def test_rlaif_on_built_in_pictures_chooses_fewer_absent_objects(tmp_path):
    run(tmp_path / "out", "rlaif(candidates=4)")
    samples = {sample.id: sample for sample in open_data(DATA).samples()}
    pairs = made(tmp_path / "out")
    assert len(pairs) >= 4
    for each in pairs:
        chosen, rejected = (set(absent(each, side, samples)) for side in ("chosen", "rejected"))
        assert len(chosen) < len(rejected)
        assert each.meta["rewards"] == [-len(chosen), -len(rejected)] and each.meta["answers"] <= 4


# ---- hadpo ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "restyle, texts",
    [("both", ("R one", "R two")), ("rejected", ("A dog.", "R one")), ("none", ("A dog.", "A dog and a cat."))],
)
def test_hadpo_sets_the_corrected_answer_against_the_original_in_one_style(sample, restyle, texts):
    judge = Scripted("A dog.", "R one", "R two")
    found = hadpo.make(sample, "A dog and a cat.", random.Random(0), None, judge, restyle=restyle)
    assert (found.chosen, found.rejected) == texts
    styled = [text for key, _, text in judge.asked if "restyle" in key]
    assert len(styled) == {"both": 2, "rejected": 1, "none": 0}[restyle]
    if styled:
        assert "## Answer\nA dog and a cat." in styled[-1]


def test_hadpo_drops_what_needs_no_correction_and_asks_nothing_of_an_empty_answer(sample):
    assert hadpo.make(sample, "A dog.", random.Random(0), None, Scripted("A dog.")) == Dropped("nothing to correct")
    assert hadpo.make(sample, " ", random.Random(0), None, Scripted()) == Dropped("empty answer")


def test_hadpo_on_built_in_pictures_chooses_only_what_is_there(tmp_path):
    run(tmp_path / "out", "hadpo")
    samples = {sample.id: sample for sample in open_data(DATA).samples()}
    assert made(tmp_path / "out")
    for each in made(tmp_path / "out"):
        assert not absent(each, "chosen", samples) and absent(each, "rejected", samples)


# ---- povid ----------------------------------------------------------------------------------------------------------------


def test_povid_sets_the_reference_against_the_answer_to_a_noised_picture(tmp_path):
    shown = []

    def say(sample, rng):
        shown.append(sample)
        return "A dog." if sample.id.endswith("/povid") else "A cat."

    for chosen in ("reference", "answer"):
        run(tmp_path / chosen, f"povid(chosen='{chosen}', view='noised(step=800)')", judge=None, family=FakeFamily(say))
        references = {sample.id: sample.references[0] for sample in open_data(DATA).samples()}
        for each in made(tmp_path / chosen):
            assert each.rejected == "A dog."
            assert each.chosen == (references[each.meta["sample"]] if chosen == "reference" else "A cat.")
    clean, noised = shown[0], next(each for each in shown if each.id == f"{shown[0].id}/povid")
    assert clean.images[0].digest() != noised.images[0].digest()


def test_povid_has_mistakes_written_into_the_chosen_answer(sample, tmp_path):
    judge = Scripted("There is a cat.")
    found = povid.make(sample, "An answer.", random.Random(0), None, (), judge, part="text")
    assert (found.chosen, found.rejected) == ("There is a dog.", "There is a cat.")
    assert "## Answer\nThere is a dog." in judge.asked[0][2]
    run(tmp_path / "out", "povid(part='text')")
    samples = {each.id: each for each in open_data(DATA).samples()}
    assert len(made(tmp_path / "out")) == 6
    assert all(absent(each, "rejected", samples) and not absent(each, "chosen", samples) for each in made(tmp_path / "out"))


# ---- all of them ----------------------------------------------------------------------------------------------------------

METHODS = ["rlaif(candidates=3)", "hadpo", "povid(part='text')", "povid", "seva"]


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_with_the_same_pairs(tmp_path, method):
    run(tmp_path / "whole", method)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", method, family=FakeFamily(fail_after=1))
    run(tmp_path / "broken", method)
    for name in ("pairs.jsonl", "pairs.json"):
        assert (tmp_path / "broken" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize("method", ["rlaif", "hadpo", "povid(part='text')"])
def test_without_a_judge_the_next_step_is_said_before_any_answer(tmp_path, method):
    family = FakeFamily()
    with pytest.raises(UserError, match="--judge"):
        run(tmp_path / "out", method, judge=None, family=family)
    assert family.calls == []


@pytest.mark.parametrize(
    "method, judge, message",
    [
        ("rlaif(by='claim')", "truth", "Did you mean 'claims'"),
        ("rlaif(candidates=1)", "truth", "2 or more"),
        ("hadpo(restyle='all')", "truth", "both, none, rejected"),
        ("povid(part='noises')", None, "Did you mean 'noise'"),
        ("povid(view='blank')", None, "a view of the picture itself"),
        ("hadpo", "thruth", "Did you mean 'truth'"),
    ],
)
def test_a_wrong_option_is_refused_before_any_answer(tmp_path, method, judge, message):
    family = FakeFamily()
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", method, judge=judge, family=family)
    assert family.calls == []


def test_another_judge_cannot_go_on_with_the_pairs(tmp_path):
    run(tmp_path / "out", "hadpo")
    (tmp_path / "replies.jsonl").write_text('{"key": "0", "reply": "yes"}\n')
    with pytest.raises(UserError, match="begun with judge='truth'"):
        run(tmp_path / "out", "hadpo", judge=f"recorded(file='{tmp_path / 'replies.jsonl'}')")


def test_recorded_replies_make_the_pairs_that_the_judge_made(tmp_path):
    asked = []

    class Noting(type(open_judge("truth"))):
        def ask(self, messages, *, key, attempt=1):
            asked.append({"key": key, "reply": super().ask(messages, key=key, attempt=attempt)})
            return asked[-1]["reply"]

    judge, family = Noting(), FakeFamily()
    samples = list(open_data(DATA).samples())
    answers = family.generate(samples, seed=0, temperature=1.0)
    direct = [hadpo.make(each, text, random.Random(0), None, judge) for each, text in zip(samples, answers, strict=True)]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    recorded = f"recorded(file='{tmp_path / 'replies.jsonl'}', name='gpt-4')"
    run(tmp_path / "out", "hadpo", judge=recorded, block_size=6)
    assert [each.id for each in made(tmp_path / "out")] == [each.id for each in direct if not isinstance(each, Dropped)]


def test_a_server_sees_the_picture_and_is_paid_once(tmp_path):
    with fake_chat.serve(reply=lambda request: fake_chat.completion(f"Rating: {len(json.dumps(request)) % 10}")) as chat:
        judge = f"openai(model='m', base_url='{chat.url}', cache='{tmp_path / 'replies.jsonl'}', workers=3)"
        options = dict(judge=judge, limit=3, block_size=3)
        run(tmp_path / "a", "rlaif(candidates=3, by='rating')", **options)
        count = len(chat.asked)
        run(tmp_path / "b", "rlaif(candidates=3, by='rating')", **options)
    assert count == len(chat.asked) >= 6
    parts = chat.asked[0]["messages"][0]["content"]
    assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,") and "Rating: " in parts[1]["text"]
    assert (tmp_path / "a" / "pairs.jsonl").read_text() == (tmp_path / "b" / "pairs.jsonl").read_text()


# ---- the truth judge ------------------------------------------------------------------------------------------------------


def test_the_truth_judge_needs_a_truth_and_answers_only_such_requests(sample):
    judge = open_judge("truth")
    with pytest.raises(UserError, match='"present"'):
        judges.ask(judge, "rate", Sample("s", sample.images, "What?"), judges.as_rating, answer="A dog.")
    with pytest.raises(UserError, match="Name another judge"):
        judge.ask([{"role": "user", "content": "Is the cap yellow?"}], key="mmhal/0")


def test_the_truth_judge_reads_objects_of_several_words_and_none_at_all(sample):
    truth = {"present": ["teddy bear", "dog"], "counts": {"teddy bear": 3}}
    ask = lambda task, read, truth, **said: judges.ask(
        open_judge("truth"), task, Sample("s", sample.images, "What?", truth=truth), read, **said
    )
    assert ask("rate", judges.as_rating, truth, answer="Three teddy bears and a cat.") == 5.0
    assert ask("rate", judges.as_rating, {"present": []}, answer="A cat.") == 0.0
    assert ask("rate", judges.as_rating, {"present": ["dog", "cannoneer's hat"]}, answer="A dog.") == 10.0  # not "none"
    assert ask("verify", judges.as_verdicts(2), truth, questions="Is there a dog?\nIs there a cat?") == [True, False]
    assert ask("correct", judges.as_text, truth, answer="A dog and a cat.") == "A dog."
