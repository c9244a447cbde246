"""Answers, grades and scores: metrics against slow loops, intervals, resuming, controls, and what is refused."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from PIL import Image

from catpo.cli.main import main
from catpo.core.errors import UserError
from catpo.core.intervals import bootstrap_indices
from catpo.data.read import open_data
from catpo.data.scenes.captions import true_caption
from catpo.evaluation import benchmarks
from catpo.evaluation.benchmarks import CAPTIONS, CaptionTruth, grade_caption, grade_question, read_yes_no
from catpo.evaluation.evaluate import evaluate
from catpo.evaluation.folder import EvaluationFolder
from catpo.evaluation.grade import grade, grade_answers
from catpo.files.json_files import read_json, read_rows, write_json
from catpo.text.object_words import mentions
from fake_family import FakeFamily

FEW = "scenes(count=24, questions=2)"


def run(output, *, family=None, benchmarks=(FEW,), **options):
    options = {"batch_size": 16, "progress": False, **options}
    return evaluate(model=family or FakeFamily(), benchmarks=list(benchmarks), output=output, **options)


def metrics(scores, name="scenes"):
    return {metric: each["value"] for metric, each in scores["benchmarks"][name]["metrics"].items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# ---- what an answer counts ------------------------------------------------------------------------------------------------

TRUTH = CaptionTruth(frozenset({"dog", "owl", "car"}), frozenset({"cat", "bus"}))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", {"objects": 0, "hallucinated_captions": 0, "covered": 0, "present": 3, "words": 0, "captions": 1}),
        ("A dog.", {"objects": 1, "hallucinated": 0, "covered": 1, "mentions": 1}),
        ("A dog and a cat. The cat sees a fox.", {"objects": 3, "hallucinated": 2, "tempted": 1, "mentions": 4, "covered": 1}),
        ("Puppies: a puppy and a dog", {"objects": 1, "mentions": 3, "covered": 1, "hallucinated_captions": 0}),
        ("a b c d a b c d", {"words": 8, "word_runs": 5, "repeated_runs": 1}),
        ("a b c", {"words": 3, "word_runs": 0, "repeated_runs": 0}),
        ("It's a well-lit room", {"words": 4, "word_runs": 1}),
    ],
)
def test_a_captions_objects_count_once_each(answer, expected):
    counts = grade_caption(answer, TRUTH).counts
    assert {name: counts[name] for name in expected} == expected


def test_a_captions_objects_are_listed_in_the_order_named():
    mentions = grade_caption("A cat, a dog, the cat, a fox.", TRUTH).mentions
    assert mentions == [("cat", "hallucinated"), ("dog", "grounded"), ("fox", "hallucinated")]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"), ("yes, there is.", "yes"), (" NO!", "no"), ("**No**", "no"), ('"Yes"', "yes"), ("no\n", "no"),
        ("None", ""), ("Not really", ""), ("yesterday", ""), ("There is no dog", ""), ("", ""), ("nope", ""),
    ],
)  # fmt: skip
def test_the_first_word_is_the_answer(answer, said):
    assert read_yes_no(answer) == said


def test_an_answer_that_is_neither_yes_nor_no_is_wrong_and_counted():
    counts = grade_question("Maybe.", "no").counts
    assert (counts["right"], counts["said_yes"], counts["unparsed"]) == (0, 0, 1)


# ---- metrics against slow loops -------------------------------------------------------------------------------------------


def ratio(part, whole):
    return 100 * part / whole if whole else math.nan


def slow_caption_metrics(answers, samples):
    """Each metric in its own words, item by item."""
    named = {sample.id: list(dict.fromkeys(m.object for m in mentions(answers[sample.id]))) for sample in samples}
    absent = {sample.id: [name for name in named[sample.id] if name not in sample.truth["present"]] for sample in samples}
    every_object = sum(len(objects) for objects in named.values())
    there = sum(len(sample.truth["present"]) for sample in samples)
    covered = sum(sum(name in named[sample.id] for name in sample.truth["present"]) for sample in samples)
    tempted = sum(sum(name in sample.truth["tempting"] for name in absent[sample.id]) for sample in samples)
    return {
        "chair_i": ratio(sum(len(objects) for objects in absent.values()), every_object),
        "chair_s": ratio(sum(bool(objects) for objects in absent.values()), len(samples)),
        "cover": ratio(covered, there),
        "cog": ratio(tempted, every_object),
        "objects": every_object / len(samples),
        "words": sum(len(answers[sample.id].split()) for sample in samples) / len(samples),
    }


def slow_question_metrics(pairs):
    """POPE's five numbers from (expected, said), "yes" the positive class."""
    true_yes = sum(e == s == "yes" for e, s in pairs)
    false_yes = sum(e == "no" and s != "no" for e, s in pairs)  # neither yes nor no is as wrong
    missed = sum(e == "yes" and s != "yes" for e, s in pairs)
    precision, recall = ratio(true_yes, true_yes + false_yes), ratio(true_yes, true_yes + missed)
    return {
        "accuracy": ratio(sum(e == s for e, s in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": ratio(sum(s == "yes" for _, s in pairs), len(pairs)),
        "unparsed": ratio(sum(s == "" for _, s in pairs), len(pairs)),
    }


def test_scores_equal_the_definitions_written_as_loops(tmp_path):
    found = metrics(run(tmp_path / "out"))
    samples = list(open_data("scenes(count=24, questions=2, split='test')").samples())
    answers = {row["id"]: row["answer"] for row in read_rows(tmp_path / "out" / "answers.jsonl")}
    expected = slow_caption_metrics(answers, samples)
    for split in ("random", "popular", "adversarial"):
        pairs = [
            (row["answer"], read_yes_no(answers[f"{sample.id}/{number}"]))
            for sample in samples
            for number, row in enumerate(sample.truth["questions"])
            if row["split"] == split
        ]
        expected |= {f"{split}/{name}": value for name, value in slow_question_metrics(pairs).items()}
    assert set(found) - set(expected) == {"repetition"}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_intervals_equal_a_loop_over_resampled_pictures(tmp_path):
    scores = run(tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "grades.jsonl")
    pictures = list(dict.fromkeys(row["picture"] for row in rows))
    of_picture = {name: [row for row in rows if row["picture"] == name] for name in pictures}
    values = {"chair_i": [], "random/f1": []}
    for draw in bootstrap_indices(len(pictures), resamples=1000):
        drawn = [row for place in draw for row in of_picture[pictures[place]]]
        said = [row["counts"] for row in drawn if row["group"] == CAPTIONS]
        values["chair_i"].append(ratio(sum(c["hallucinated"] for c in said), sum(c["objects"] for c in said)))
        asked = [row["counts"] for row in drawn if row["group"] == "random"]
        right, yes = sum(c["right_yes"] for c in asked), sum(c["expected_yes"] for c in asked)
        wrong_yes = len(asked) - yes - sum(c["right"] - c["right_yes"] for c in asked)
        values["random/f1"].append(ratio(2 * right, right + wrong_yes + yes))
    for name, draws in values.items():
        each = scores["benchmarks"]["scenes"]["metrics"][name]
        assert [each["low"], each["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]))


def test_what_cannot_be_divided_is_null_and_not_zero(tmp_path):
    scores = run(tmp_path / "out", family=FakeFamily(lambda *_: "Bright colours."))
    assert metrics(scores)["chair_i"] is None
    assert metrics(scores)["cover"] == 0
    assert metrics(scores)["random/precision"] == 0
    assert metrics(scores)["random/unparsed"] == 100
    scores = run(tmp_path / "no", family=FakeFamily(lambda *_: "No."))
    assert metrics(scores)["random/precision"] is None
    json.loads((tmp_path / "out" / "scores.json").read_text(), parse_constant=pytest.fail)


# ---- resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches_done", [0, 1, 2, 5])
def test_an_interrupted_evaluation_resumes_and_ends_with_the_same_files(tmp_path, batches_done):
    family = FakeFamily()
    run(tmp_path / "whole", family=family)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", family=FakeFamily(fail_after=batches_done))
    assert not (tmp_path / "broken" / "scores.json").exists()
    rest = FakeFamily()
    run(tmp_path / "broken", family=rest)
    assert len(rest.calls) == len(family.calls) - batches_done
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


@pytest.mark.parametrize("left", [0.1, 0.5, 0.95, 0.999])
def test_a_torn_answers_file_is_cut_back_to_whole_batches(tmp_path, left):
    run(tmp_path / "whole")
    run(tmp_path / "torn")
    path = tmp_path / "torn" / "answers.jsonl"
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    (tmp_path / "torn" / "scores.json").unlink()
    run(tmp_path / "torn")
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_a_finished_evaluation_asks_nothing_again(tmp_path):
    first = run(tmp_path / "out")
    family = FakeFamily()
    assert run(tmp_path / "out", family=family) == first
    assert family.calls == []


def test_questions_are_cut_shorter_than_captions(tmp_path):
    family = FakeFamily()
    run(tmp_path / "out", family=family, max_new_tokens=50)
    lengths = [options["max_new_tokens"] for options in family.options]
    assert lengths == sorted(lengths, reverse=True)
    assert set(lengths) == {50, benchmarks.QUESTION_TOKENS}
    assert {options["temperature"] for options in family.options} == {0.0}


def test_a_limit_above_the_benchmark_s_own_leaves_room_for_thoughts(tmp_path):
    family = FakeFamily(
        lambda sample, rng: f"<think>no, no</think>{'Yes' if sample.prompt.startswith('Is there') else 'A dog.'}"
    )
    scores = run(tmp_path / "out", family=family, max_new_tokens=500)
    assert {options["max_new_tokens"] for options in family.options} == {500}
    assert metrics(scores)["random/yes_ratio"] == 100
    assert scores["benchmarks"]["scenes"]["thoughts_removed"]["count"] == scores["benchmarks"]["scenes"]["items"]
    rows = read_rows(tmp_path / "out" / "answers.jsonl")
    assert all(row["answer"].startswith("<think>") for row in rows)


def test_the_built_in_model_says_that_it_knows_no_photographs(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (96, 96), "teal").save(tmp_path / "photos" / "a.png")
    row = {"id": "a", "image": "a.png", "prompt": "Describe the image.", "references": ["A dog."]}
    (tmp_path / "photos" / "data.jsonl").write_text(json.dumps(row) + "\n")
    options = ["--model", "builtin", "--max-new-tokens", "4", "--no-progress"]
    benchmark = f"captions(data='{tmp_path / 'photos'}')"
    main(["evaluate", "--benchmarks", benchmark, "--output", str(tmp_path / "out"), *options])
    assert "the built-in model knows nothing but the built-in scenes" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["unknown_pictures"] == ["captions"]
    main(["evaluate", "--benchmarks", "scenes(count=1, questions=0)", "--output", str(tmp_path / "scenes"), *options])
    assert "built-in" not in capsys.readouterr().err


def test_grading_can_be_repeated_without_the_model(tmp_path):
    first = run(tmp_path / "out")
    (tmp_path / "out" / "scores.json").unlink()
    (tmp_path / "out" / "grades.jsonl").unlink()
    assert grade(tmp_path / "out") == first
    answers = (tmp_path / "out" / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "answers.jsonl").write_text("".join(answers[:-1]))
    with pytest.raises(UserError, match="no answer to item 'scenes-test-0-000023/"):
        grade(tmp_path / "out")


@pytest.mark.parametrize("again", [run, lambda output: grade(output)])
@pytest.mark.parametrize(
    ("change", "field"),
    [({"benchmark": ...}, "benchmark"), ({"id": 3}, "id"), ({"answer": None}, "answer"), ({"answer": ["A dog."]}, "answer")],
)
def test_an_answer_without_a_field_is_refused_by_line(tmp_path, again, change, field):
    run(tmp_path / "out")
    path = tmp_path / "out" / "answers.jsonl"
    rows = read_rows(path)
    rows[1] = {key: value for key, value in {**rows[1], **change}.items() if value is not ...}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"answers\.jsonl:2 .*'{field}'.* Remove \S*out and start again"):
        again(tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("benchmarks", ["scenes"]), ("benchmarks", {"scenes": 3}), ("limit", "3"), ("shuffled", ...), ("decoding", "greedy"),
        ("data", 3), ("judge", 3), ("skipped", []), ("skipped", {"scenes/1": 3}),
    ],
)  # fmt: skip
def test_a_changed_evaluation_json_is_refused_by_field(tmp_path, field, value):
    run(tmp_path / "out")
    path = tmp_path / "out" / "evaluation.json"
    changed = {**read_json(path), field: value}
    write_json(path, {key: value for key, value in changed.items() if value is not ...})
    with pytest.raises(UserError, match=rf"evaluation\.json .*'{field}'.* Remove \S*out and start again"):
        grade(tmp_path / "out")


def test_skipped_items_are_listed_even_after_a_kill_right_after_the_start(photos, tmp_path, monkeypatch):
    (photos / "1.png").write_bytes(b"not a picture")

    write_manifest = EvaluationFolder.write_manifest

    def killed(*arguments, **options):
        write_manifest(*arguments, **options)
        raise KeyboardInterrupt

    options = {"benchmarks": [f"captions(data={str(photos)!r})"], "family": FakeFamily(lambda *_: "A dog."), "on_error": "skip"}
    monkeypatch.setattr(EvaluationFolder, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", **options)
    monkeypatch.undo()
    assert run(tmp_path / "out", **options)["skipped"]["count"] == 1
    assert len(read_rows(tmp_path / "out" / "skipped.jsonl")) == 1


def other_model():
    family = FakeFamily()
    family.model_hash = "5678"
    return family


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"benchmarks": ["scenes(count=24)"]}, "benchmarks"),
        ({"limit": 3}, "limit"),
        ({"shuffled": True}, "shuffled"),
        ({"max_new_tokens": 5}, "decoding"),
        ({"batch_size": 8}, "decoding"),
        ({"family": "other"}, "model_hash"),
    ],
)
def test_resuming_with_another_model_or_options_is_refused_by_name(tmp_path, changed, field):
    run(tmp_path / "out")
    if "family" in changed:
        changed = {"family": other_model()}
    with pytest.raises(UserError, match=f"begun with {field}="):
        run(tmp_path / "out", **changed)


def test_answers_that_do_not_belong_are_refused(tmp_path):
    run(tmp_path / "out")
    path = tmp_path / "out" / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[0], *lines[2:]]))
    with pytest.raises(UserError, match=r"answers\.jsonl:2 answers 'scenes-test-0-000000'"):
        run(tmp_path / "out")
    path.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(UserError, match="answers to"):
        run(tmp_path / "out")
    (tmp_path / "out" / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"without evaluation\.json"):
        run(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmarks": ["scense"]}, "Did you mean 'scenes'"),
        ({"benchmarks": ["scenes(cuont=3)"]}, "Did you mean 'count'"),
        ({"benchmarks": ["scenes(captions=False, questions=0)"]}, "asks nothing"),
        ({"benchmarks": ["scenes(split='dev')"]}, "not a split"),
        ({"benchmarks": ["scenes(count=2)", "scenes(count=3)"]}, "given twice"),
        ({"benchmarks": []}, "no benchmark"),
        ({"benchmarks": ["captions"]}, r"captions\(data='DIR'\)"),
        ({"benchmarks": ["captions(data='no/such/place')"]}, "does not exist"),
        ({"limit": 0}, "limit must be 1 or more"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"shuffled": True, "limit": 1}, "two pictures"),
    ],
)
def test_a_wrong_option_is_refused_before_any_answer(tmp_path, options, message):
    family = FakeFamily()
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", family=family, **options)
    assert family.calls == []


def test_limit_is_a_number_of_pictures(tmp_path):
    scores = run(tmp_path / "out", limit=5)
    assert scores["benchmarks"]["scenes"]["pictures"] == 5
    few = run(tmp_path / "few", benchmarks=["scenes(count=5, questions=2)"])
    assert metrics(scores) == metrics(few)


# ---- controls -------------------------------------------------------------------------------------------------------------


class Looker(FakeFamily):
    """Describes the picture it is given, whatever it is called."""

    def __init__(self):
        super().__init__(lambda sample, rng: true_caption(sample.images[0].scene, rng))
        self.seen = []

    def generate(self, samples, **options):
        self.seen += [(sample.id, sample.images[0].name) for sample in samples]
        return super().generate(samples, **options)


def test_shuffling_gives_each_item_another_picture_and_a_model_that_looks_fails(tmp_path):
    benchmarks = ["scenes(count=40, questions=1)"]
    looker = Looker()
    right = metrics(run(tmp_path / "right", family=looker, benchmarks=benchmarks))
    assert all(item.split("/")[0] == picture for item, picture in looker.seen)
    looker = Looker()
    wrong = metrics(run(tmp_path / "wrong", family=looker, benchmarks=benchmarks, shuffled=True))
    assert all(item.split("/")[0] != picture for item, picture in looker.seen)
    shown = {item: picture for item, picture in looker.seen if "/" not in item}
    assert sorted(shown.values()) == sorted(shown)  # every picture is used once
    assert all(shown[item.split("/")[0]] == picture for item, picture in looker.seen)  # a scene's questions move together
    assert (right["cover"], right["chair_i"]) == (100, 0)
    assert wrong["cover"] < 50
    assert wrong["chair_i"] > 50


# ---- answers from elsewhere, photographs, the real model ------------------------------------------------------------------


def test_answers_made_elsewhere_get_the_same_scores(tmp_path):
    scores = run(tmp_path / "out")
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    given = tmp_path / "given.jsonl"
    given.write_text("".join(lines))
    again = grade_answers(answers=given, benchmarks=[FEW], output=tmp_path / "again", model="elsewhere")
    assert again["model"] == "elsewhere"
    assert again["benchmarks"] == scores["benchmarks"]
    for content, message in (
        ("".join(lines[1:]), "has no answer to item"),
        ("".join([*lines, lines[0]]), "a second time"),
        ('{"id": "1"}\n', r"given\.jsonl:1 needs"),
    ):
        given.write_text(content)
        with pytest.raises(UserError, match=message):
            grade_answers(answers=given, benchmarks=[FEW], output=tmp_path / "bad", model="elsewhere")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, sample in enumerate(open_data("scenes(count=3)").samples()):
        (folder / f"{number}.png").write_bytes(sample.images[0].read())
    rows = [
        {"image": "0.png", "references": ["A dog runs.", "A puppy with a ball."]},
        {"image": "1.png", "references": ["A ball."], "truth": {"present": ["cat"]}},
        {"image": "2.png", "references": ["Grass."]},
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_references_are_the_truth_where_no_objects_are_listed(photos, tmp_path):
    scores = run(
        tmp_path / "out", benchmarks=[f"captions(data={str(photos)!r})"], family=FakeFamily(lambda *_: "A dog and a cat.")
    )
    found = metrics(scores, "captions")
    # objects named 6; absent: cat on 0, dog on 1, both on 2; present 2 + 1 + 0
    assert (found["chair_i"], found["chair_s"], found["cover"]) == pytest.approx((100 * 4 / 6, 100, 100 * 2 / 3))
    assert "cog" not in found


def test_a_picture_without_any_truth_is_named(photos, tmp_path):
    (photos / "data.jsonl").write_text('{"image": "0.png"}')
    with pytest.raises(UserError, match="sample 1 .* neither references nor truth.present"):
        run(tmp_path / "out", benchmarks=[f"captions(data={str(photos)!r})"])


def test_the_built_in_model_sees_and_hallucinates(builtin, tmp_path):
    benchmarks = ["scenes(count=24, questions=1)"]
    scores = evaluate(model="builtin", benchmarks=benchmarks, output=tmp_path / "out", progress=False)
    blind = evaluate(
        model="builtin", benchmarks=["scenes(count=24, questions=0)"], output=tmp_path / "blind", shuffled=True, progress=False
    )
    found, control = metrics(scores), metrics(blind)
    assert found["cover"] > 60
    assert 5 < found["chair_i"] < 50
    assert control["cover"] < found["cover"] / 2 + 10
    assert found["random/unparsed"] == 0
    assert found["random/accuracy"] > 60
    again = evaluate(model="builtin", benchmarks=benchmarks, output=tmp_path / "out", progress=False)
    assert again == scores
