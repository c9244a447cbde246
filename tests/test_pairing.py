"""Preference pairs from a model's own answers: what is corrected, what is dropped, and that a killed run ends the same."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from dataclasses import replace

import pytest

from catpo.core.conversation import Turn
from catpo.core.errors import UserError
from catpo.core.types import Picture, PreferencePair, Sample
from catpo.data.datasets import Dataset
from catpo.data.read import open_data
from catpo.files.json_files import read_json, read_rows, write_json
from catpo.pairing.methods import Dropped, corrected, label, reference, seva
from catpo.pairing.pair import pair
from catpo.text.object_words import mentions
from fake_family import FakeFamily

PICTURE = Picture(data=b"a picture", name="picture")


def ask(truth=None, references=()):
    return Sample("1", (PICTURE,), "Describe the image.", tuple(references), truth or {})


def correct(answer, present, *, counts=None, seed=0, vocabulary=None, **options):
    truth = {"present": present, **({"counts": counts} if counts else {})}
    return corrected.make(ask(truth), answer, random.Random(seed), vocabulary, **options)


CORRECTIONS = [
    # a present, not yet named object takes the place: article, number, later references
    ("There is a cat in a park.", ["owl"], "There is an owl in a park."),
    ("A dog and a cat.", ["dog", "owl"], "A dog and an owl."),
    ("A cat is here. A dog is below the cat.", ["dog", "owl"], "An owl is here. A dog is below the owl."),
    ("There are two cats. A dog is below the cats.", ["dog", "knife"], "There are two knives. A dog is below the knives."),
    ("A kitten and a dog. The cat sleeps.", ["dog"], "A dog."),
    # all present objects are named: cut out
    ("There is a dog and a cat.", ["dog"], "There is a dog."),
    ("There is a dog, a cat and an owl.", ["dog", "owl"], "There is a dog and an owl."),
    ("A dog is here. A cat is below the dog.", ["dog"], "A dog is here."),
    ("A cat is here. A dog is below the cat.", ["dog"], "There is a dog."),
    ("A dog sits next to a cat.", ["dog"], "A dog sits."),
    ("The image shows a park with a cat. There is a dog below the cat.", ["dog"], "The image shows a park. There is a dog."),
    # several at once: the first takes the only place, the second goes
    ("A cat, a fox and a dog.", ["dog", "owl"], "An owl and a dog."),
    ("A cat is above a fox. A dog is here.", ["dog"], "A dog is here."),
]


@pytest.mark.parametrize(("answer", "present", "chosen"), CORRECTIONS)
def test_the_smallest_edit_corrects_an_answer(answer, present, chosen):
    made = correct(answer, present)
    assert isinstance(made, PreferencePair), made
    assert (made.chosen, made.rejected) == (chosen, answer)


@pytest.mark.parametrize(
    ("answer", "present", "reason"),
    [
        ("A dog.", ["dog"], "nothing to correct"),
        ("Bright colours.", ["dog"], "nothing to correct"),
        ("A cat.", ["cat statue"], "nothing left"),
        ("A cat and a fox.", [], "nothing left"),
        (" \n", ["dog"], "empty answer"),
        ("A dog. There is a cat to the", ["dog"], "unfinished answer"),
    ],
)
def test_an_answer_without_a_lesson_is_dropped_with_a_reason(answer, present, reason):
    assert correct(answer, present) == Dropped(reason)


def test_counts_decide_the_number_of_what_takes_the_place():
    assert correct("There is a cat.", ["owl"], counts={"owl": 3}).chosen == "There are three owls."
    assert correct("Two cats are here.", ["owl"], counts={"owl": 1}).chosen == "An owl is here."
    assert correct("Two cats sit here.", ["owl"], counts={"owl": 1}).chosen == "Two owls sit here."  # "sits" would be a guess
    fitting = correct("Two cats are here.", ["owl", "fox"], counts={"owl": 1, "fox": 2})
    assert fitting.chosen == "Two foxes are here."


def test_wrong_numbers_are_corrected_when_asked_for():
    answer, counts = "There are two dogs. A cat is below the dogs.", {"dog": 1, "cat": 1}
    assert correct(answer, ["dog", "cat"], counts=counts) == Dropped("nothing to correct")
    sample = ask({"present": ["dog", "cat"], "counts": counts})
    pair = corrected.make(sample, answer, random.Random(0), counts=True)
    assert pair.chosen == "There is a dog. A cat is below the dog."
    assert pair.meta["edits"] == [["counted", "dog", "1"]]


def test_cutting_only_is_an_option():
    assert correct("A dog and a cat.", ["dog", "owl"], replace=False).chosen == "A dog."


def test_labels_mark_every_object_word_on_both_sides():
    made = correct("A dog and a cat. The cat sleeps.", ["dog", "owl"])
    words = {
        side: [(made.response(side)[s.start : s.end], s.label) for s in made.labels[side]] for side in ("chosen", "rejected")
    }
    assert words["rejected"] == [("dog", "grounded"), ("cat", "hallucinated"), ("cat", "hallucinated")]
    assert words["chosen"] == [("dog", "grounded")] or [label for _, label in words["chosen"]] == ["grounded"] * 3


def test_the_choice_among_objects_is_the_generators():
    present = ["owl", "fox", "bear", "egg", "car"]
    chosen = {correct("There is a cat.", present, seed=seed).chosen for seed in range(30)}
    assert len(chosen) == 5
    assert correct("There is a cat.", present, seed=3) == correct("There is a cat.", present, seed=3)


def test_own_words_are_used_where_given():
    words = {"zebra": "zebra", "okapi": "okapi"}
    assert correct("There is a zebra.", ["okapi"], vocabulary=words).chosen == "There is an okapi."
    assert correct("There is a dog.", ["okapi"], vocabulary=words) == Dropped("nothing to correct")


def test_without_truth_the_next_step_is_said():
    with pytest.raises(UserError, match="--method reference"):
        corrected.make(ask(), "A dog.", random.Random(0))


def test_corrected_answers_name_what_is_there_and_nothing_else():
    data = open_data("scenes(count=80, seed=3)")
    family = FakeFamily()
    for sample in data.samples():
        (answer,) = family.generate([sample])
        made = corrected.make(sample, answer, random.Random(0))
        present, said = set(sample.truth["present"]), {mention.object for mention in mentions(answer)}
        if isinstance(made, Dropped):
            assert made.reason == "nothing to correct"
            assert said <= present
            continue
        now = {mention.object for mention in mentions(made.chosen)}
        assert now <= present
        assert said & present <= now
        assert all(span.label == "grounded" for span in made.labels["chosen"])
        assert any(span.label == "hallucinated" for span in made.labels["rejected"])


def test_a_reference_is_chosen_against_the_answer():
    sample = ask(references=["A dog on a beach.", "The dog is near a palm tree by the sea.", "A puppy."])
    made = reference.make(sample, "A dog and a cat.", random.Random(0))
    assert (made.chosen, made.rejected) == ("A dog on a beach.", "A dog and a cat.")
    assert [span.label for span in made.labels["rejected"]] == ["grounded", "hallucinated"]
    assert reference.make(sample, "A dog.", random.Random(0), pick="longest").chosen.startswith("The dog")
    picks = {reference.make(sample, "A dog.", random.Random(seed), pick="random").chosen for seed in range(20)}
    assert picks == set(sample.references)
    assert reference.make(sample, " ", random.Random(0)) == Dropped("empty answer")
    assert reference.make(sample, "A puppy. ", random.Random(1), pick="longest").rejected == "A puppy."


def test_a_reference_method_without_references_or_with_a_wrong_pick_says_what_to_do():
    with pytest.raises(UserError, match="--method corrected"):
        reference.make(ask(), "A dog.", random.Random(0))
    with pytest.raises(UserError, match="first, longest, random"):
        reference.make(ask(references=["A dog."]), "A dog.", random.Random(0), pick="last")


def test_listed_truth_overrides_what_references_mention():
    sample = ask({"present": ["cat"]}, ["A dog."])
    assert [span.label for span in reference.make(sample, "A cat.", random.Random(0)).labels["rejected"]] == ["grounded"]


# ---- the engine -----------------------------------------------------------------------------------------------------------


def run(output, *, family=None, data="scenes(count=20)", **options):
    options = {"block_size": 4, "progress": False, **options}
    return pair(model=family or FakeFamily(), data=data, output=output, **options)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_pairs_can_be_opened_by_their_folder_and_provenance_stands_beside_them(tmp_path):
    result = run(tmp_path / "out", method="corrected(replace=False)", seed=5, temperature=0.7)
    pairs = list(open_data(tmp_path / "out").pairs())
    about = json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert result.asked == 20
    assert result.kept == len(pairs) == about["counts"]["kept"] == 20 - sum(result.dropped.values())
    assert about["complete"] is True
    assert (about["method"], about["model"], about["model_hash"]) == ("corrected(replace=False)", "fake", "1234")
    assert (about["seed"], about["decoding"]["temperature"]) == (5, 0.7)
    assert not (tmp_path / "out" / "blocks.jsonl").exists()
    assert "20 answers" in str(result)
    for made in pairs:
        assert made.images[0].open().size == (96, 96)
        assert made.labels["chosen"] == label(made.chosen, {mention.object for mention in mentions(made.chosen)})


@pytest.mark.parametrize("blocks_done", [0, 1, 3, 4])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_files(tmp_path, blocks_done):
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", family=FakeFamily(fail_after=blocks_done))
    with pytest.raises(UserError, match="not finished|no .jsonl"):
        open_data(tmp_path / "broken")
    family = FakeFamily()
    run(tmp_path / "broken", family=family)
    assert len(family.calls) == 5 - blocks_done
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_rows_of_a_block_that_was_not_finished_are_cut_off(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", family=FakeFamily(fail_after=2))
    with open(tmp_path / "broken" / "pairs.jsonl", "a") as stream:
        stream.write('{"id": "half a block"}\n{"id": "to')
    with open(tmp_path / "broken" / "blocks.jsonl", "a") as stream:
        stream.write('{"block": 2, "as')
    run(tmp_path / "broken")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


class Slow(FakeFamily):
    def generate(self, *arguments, **options):
        time.sleep(0.05)
        return super().generate(*arguments, **options)


def test_a_killed_process_leaves_a_run_that_can_be_finished(tmp_path):
    run(tmp_path / "whole")
    child = multiprocessing.get_context("fork").Process(target=run, args=(tmp_path / "out",), kwargs={"family": Slow()})
    child.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "blocks.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    with pytest.raises(UserError, match=f"pid {child.pid}"):
        run(tmp_path / "out")
    child.kill()
    child.join()
    run(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_run_is_not_done_again(tmp_path):
    first = run(tmp_path / "out")
    before = contents(tmp_path / "out")
    family = FakeFamily()
    assert run(tmp_path / "out", family=family) == first
    assert family.calls == []
    assert contents(tmp_path / "out") == before


def test_the_seed_decides_the_answers(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["pairs.jsonl"] != contents(tmp_path / "c")["pairs.jsonl"]


def other_model():
    family = FakeFamily()
    family.model_hash = "5678"
    return family


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"method": "corrected(replace=False)"}, "method"),
        ({"temperature": 0.5}, "decoding"),
        ({"data": "scenes(count=20, seed=1)"}, "data"),
        ({"limit": 19}, "data_hash"),
        ({"family": "other"}, "model_hash"),
    ],
)
def test_going_on_with_other_options_is_refused_by_name(tmp_path, changed, field):
    run(tmp_path / "out")
    if "family" in changed:
        changed = {"family": other_model()}
    with pytest.raises(UserError, match=f"begun with {field}="):
        run(tmp_path / "out", **changed)


class Conversations(Dataset):
    """Scenes with an earlier turn."""

    name = "conversations"

    def __init__(self, said):
        self.said = said

    def samples(self):
        for sample in open_data("scenes(count=4)").samples():
            yield replace(sample, history=(Turn("user", "Is there a cat?"), Turn("assistant", self.said)))


def test_earlier_turns_are_in_the_pairs_and_others_are_other_data(tmp_path):
    run(tmp_path / "out", data=Conversations("No."))
    assert {each.history[1].text for each in open_data(tmp_path / "out").pairs()} == {"No."}
    with pytest.raises(UserError, match="begun with data_hash="):
        run(tmp_path / "out", data=Conversations("Yes."))


def test_answers_that_say_the_same_of_the_same_picture_make_one_pair(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(next(open_data("scenes(count=1)").samples()).images[0].read())
    row = {"image": "a.png", "truth": {"present": ["dog"]}}
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for _ in range(3)))
    result = run(tmp_path / "out", data=folder, family=FakeFamily(lambda *_: "A dog and a cat."))
    assert (result.kept, result.dropped) == (1, {"same as another pair": 2})


def test_no_pair_at_all_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(UserError, match="20 nothing to correct"):
        run(tmp_path / "out", family=FakeFamily(lambda *_: "Bright colours."))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "korrected"}, "Did you mean 'corrected'"),
        ({"method": "corrected(cuonts=True)"}, "Did you mean 'counts'"),
        ({"method": "reference(pick='last')"}, "first, longest, random"),
        ({"data": "scenes(cont=3)"}, "Did you mean 'count'"),
        ({"limit": 0}, "limit must be 1 or more|no samples"),
        ({"block_size": 0}, "block_size must be 1 or more"),
    ],
)
def test_a_wrong_option_is_refused_before_any_answer(tmp_path, options, message):
    family = FakeFamily()
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", family=family, **options)
    assert family.calls == []


def test_a_folder_with_other_pairs_is_left_alone_and_a_shortened_file_is_noticed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="did not write"):
        run(tmp_path / "other")
    killed(tmp_path / "out")
    (tmp_path / "out" / "pairs.jsonl").write_text("")
    with pytest.raises(UserError, match="shorter than"):
        run(tmp_path / "out")


# ---- files of a killed run that somebody changed, or an older version wrote -----------------------------------------------


def killed(output):
    """A run of which two of five blocks are done; gives their rows, and those of the pairs."""
    with pytest.raises(KeyboardInterrupt):
        run(output, family=FakeFamily(fail_after=2))
    return (read_rows(output / name) for name in ("blocks.jsonl", "pairs.jsonl"))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"block": None}, "block"),
        ({"dropped": {"same text": "two"}}, "dropped"),
        ({"kept": True}, "kept"),
        ({"bytes": -10}, "bytes"),
        ({"bytes": float("nan")}, "bytes"),
    ],
)
def test_notes_on_blocks_that_are_not_as_written_are_refused_by_line_and_field(tmp_path, change, field):
    (first, second), _ = killed(tmp_path / "out")
    changed = {key: value for key, value in {**second, **change}.items() if value is not None}
    write_lines(tmp_path / "out" / "blocks.jsonl", [first, changed])
    with pytest.raises(UserError, match=rf"blocks\.jsonl:2 .*'{field}'.* Remove \S*out and start again"):
        run(tmp_path / "out")


@pytest.mark.parametrize("numbers", [[1], [0, 0], [1, 0], list(range(9))])
def test_rows_of_blocks_that_the_run_does_not_have_are_refused(tmp_path, numbers):
    (first, _), _ = killed(tmp_path / "out")
    nothing = {**first, "kept": 0, "bytes": 0}
    write_lines(tmp_path / "out" / "blocks.jsonl", [{**nothing, "block": number} for number in numbers])
    with pytest.raises(UserError, match=r"blocks\.jsonl:\d is not about block \d of 5"):
        run(tmp_path / "out")


def test_fewer_pairs_than_the_blocks_tell_of_are_noticed(tmp_path):
    rows, _ = killed(tmp_path / "out")
    write_lines(tmp_path / "out" / "blocks.jsonl", [{**row, "kept": row["kept"] + 1} for row in rows])
    with pytest.raises(UserError, match=r"pairs\.jsonl holds \d+ pairs, blocks\.jsonl says \d+"):
        run(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pairs.json").read_text())["complete"] is False


@pytest.mark.parametrize("field", ["id", "labels"])
def test_a_pair_without_a_field_is_refused_by_line(tmp_path, field):
    rows, (pair_row, *others) = killed(tmp_path / "out")
    path = tmp_path / "out" / "pairs.jsonl"
    write_lines(path, [{**others[0], "id": "other"}, {key: value for key, value in pair_row.items() if key != field}])
    write_lines(tmp_path / "out" / "blocks.jsonl", [{**row, "bytes": path.stat().st_size} for row in rows])
    with pytest.raises(UserError, match=rf"pairs\.jsonl:2 lacks '{field}'"):
        run(tmp_path / "out")


EVIL = {"id": "x", "evil": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "lacks 'block'"),
        ({"block": -1, "rows": []}, "'block'"),
        ({"block": 2, "rows": [1, 2, 3, 4]}, "'rows'"),
        ({"block": 2, "rows": [EVIL] * 4}, "belongs to block 2"),
        ({"block": 2, "rows": [{"dropped": "same text"}] * 3}, "belongs to block 2"),
        ({"block": 5, "rows": []}, "belongs to block 5"),
    ],
)
def test_what_a_process_made_is_refused_where_it_is_not_as_written(tmp_path, row, message):
    killed(tmp_path / "out")
    part = tmp_path / "out" / ".pairs-1.jsonl"
    write_lines(part, [{"block": 3, "rows": [{"dropped": "same text"}] * 4}, row])
    with pytest.raises(UserError, match=rf"\.pairs-1\.jsonl:2 .*{message}.* Remove \S*\.pairs-1\.jsonl and start again"):
        run(tmp_path / "out")
    part.unlink()
    run(tmp_path / "out")  # as the message says


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"complete": "yes"}, "complete"),
        ({"counts": None}, "counts"),
        ({"counts": {"asked": 20, "kept": 3, "dropped": []}}, "counts"),
    ],
)
def test_a_finished_run_whose_account_is_not_as_written_is_refused(tmp_path, change, field):
    run(tmp_path / "out")
    path = tmp_path / "out" / "pairs.json"
    changed = {key: value for key, value in {**read_json(path), **change}.items() if value is not None}
    write_json(path, changed)
    with pytest.raises(UserError, match=rf"pairs\.json .*'{field}'.* Remove \S*out and start again"):
        run(tmp_path / "out")


def test_a_file_in_the_place_of_the_pictures_is_told(tmp_path):
    killed(tmp_path / "out")
    (tmp_path / "out" / "images").rename(tmp_path / "away")
    (tmp_path / "out" / "images").write_text("")
    with pytest.raises(UserError, match="images cannot be used as a folder"):
        run(tmp_path / "out")


def test_the_built_in_model_makes_pairs_and_a_second_run_makes_the_same(builtin, tmp_path):
    for name in ("a", "b"):
        pair(model="builtin", data="scenes(count=12)", output=tmp_path / name, block_size=8, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for made in open_data(tmp_path / "a").pairs():
        assert all(span.label == "grounded" for span in made.labels["chosen"])
        assert any(span.label == "hallucinated" for span in made.labels["rejected"])


# ---- seva: the picture against a noised one -------------------------------------------------------------------------------


def say_what_is_seen(sample, rng):
    """Noise is seen as dogs."""
    return f"A dog at number {sample.id.split('/')[0]}." if sample.id.endswith("/seva") else "A cat."


def test_seva_sets_the_answer_against_that_to_a_noised_picture(tmp_path):
    asked = []

    class Watching(FakeFamily):
        def generate(self, samples, **options):
            asked.extend(samples)
            return super().generate(samples, **options)

    run(tmp_path / "out", family=Watching(say_what_is_seen), method="seva(view='noised(step=800)')", limit=5, block_size=3)
    made = list(open_data(tmp_path / "out").pairs())
    assert [(each.chosen, each.rejected[:6]) for each in made] == [("A cat.", "A dog ")] * 5
    assert all(each.meta["view"] == "noised(step=800)" and each.labels["chosen"] for each in made)
    clean, noised = ([each for each in asked if each.id.endswith("/seva") == is_noised] for is_noised in (False, True))
    assert len(clean) == len(noised) == 5
    for one, other in zip(clean, noised, strict=True):
        assert other.id == f"{one.id}/seva" and other.prompt == one.prompt
        assert other.images[0].open().size == one.images[0].open().size
        assert other.images[0].digest() != one.images[0].digest()


def test_seva_drops_equal_answers_and_needs_no_truth():
    bare = ask()
    assert seva.make(bare, "A dog.", random.Random(0), None, ["A dog."]) == Dropped("same text")
    made = seva.make(bare, "A dog.", random.Random(0), None, ["A cat."])
    assert (made.chosen, made.rejected, made.labels) == ("A dog.", "A cat.", {})


@pytest.mark.parametrize("view, message", [("blank", "a view of the picture itself"), ("nosed", "Did you mean 'noised'")])
def test_seva_refuses_views_that_are_no_corrupted_picture(tmp_path, view, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", method=f"seva(view='{view}')")


# ---- thoughts -------------------------------------------------------------------------------------------------------------


def test_thoughts_are_taken_out_of_answers_before_pairs_are_made_and_counted(tmp_path):
    plain = FakeFamily()

    def think(sample, rng):
        answer = plain.answer(sample, rng)
        return f"<think>A dog? {answer}" if sample.id.endswith("3") else f"<think>A dog?</think>\n\n{answer}"

    made = {}
    for name, family in (("plain", plain), ("thinking", FakeFamily(think))):
        pair(model=family, data="scenes(count=8)", block_size=2, output=tmp_path / name, progress=False)
        made[name] = {row["meta"]["sample"]: row for row in read_rows(tmp_path / name / "pairs.jsonl")}
    assert made["thinking"] == {sample: row for sample, row in made["plain"].items() if not sample.endswith("3")}
    counts = json.loads((tmp_path / "thinking" / "pairs.json").read_text())["counts"]
    assert counts["noted"] == {
        "answers had thoughts in them, which were taken out": 7,
        "answers were cut off in a thought": 1,
    }
    assert "noted" not in json.loads((tmp_path / "plain" / "pairs.json").read_text())["counts"]


def test_a_model_that_never_ends_its_thoughts_is_given_more_tokens_not_more_data(tmp_path):
    with pytest.raises(UserError, match="2 answers were cut off in a thought. Give more --max-new-tokens"):
        pair(model=FakeFamily(lambda *_: "<think>so"), data="scenes(count=2)", output=tmp_path / "out", progress=False)
