"""Benchmarks made of official files: their rules against slow loops, the usual answer formats, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
import random
import re

import numpy as np
import pytest

from catpo.cli.main import main
from catpo.core.errors import UserError
from catpo.evaluation.benchmarks import _coco, amber, grade_question, pope, question_metrics
from catpo.evaluation.benchmarks._answers import read_records
from catpo.evaluation.compare import compare, show
from catpo.evaluation.evaluate import evaluate
from catpo.evaluation.grade import grade, grade_answers
from catpo.files.json_files import read_rows
from catpo.judges.recorded import Judge as Recorded
from fake_family import FakeFamily

QUESTIONS = [("dog.jpg", "Is there a dog?", "yes"), ("dog.jpg", "Is there a cat?", "no"), ("sea.jpg", "Is there a dog?", "no")]


@pytest.fixture
def data(tmp_path):
    """A folder with POPE's label files, cut to three questions each, and SEED's letters."""
    for place in ("pope/coco_e3e39262", "pope/coco_HEAD"):
        (tmp_path / place).mkdir(parents=True)
        for subset in pope.SUBSETS:
            rows = [
                {"question_id": number, "image": image, "text": f"{text[:-1]} in the {subset} image?", "label": label}
                for number, (image, text, label) in enumerate(QUESTIONS, start=1)
            ]
            (tmp_path / place / f"coco_pope_{subset}.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "seed_bench").mkdir()
    letters = [{"question_id": str(number), "prediction": "A", "gt_answer": "ABCD"[number % 4]} for number in range(8)]
    letters += [{"question_id": "v1", "prediction": "A", "gt_answer": "A"}]
    (tmp_path / "seed_bench" / "GPT-4V_seed1.json").write_text(",\n".join(map(json.dumps, letters)))
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def graded(data, spec, rows, name="out", **options):
    answers = rows if not isinstance(rows, list) else write(data / "answers.jsonl", rows)
    scores = grade_answers(answers=answers, benchmarks=[spec], data=data, output=data / name, progress=False, **options)
    (found,) = scores["benchmarks"].values()
    return found


# ---- AMBER's rules --------------------------------------------------------------------------------------------------------

ASSOCIATION = {
    "person": ["people", "man"], "man": ["person"], "bike": [], "bicycle": ["cycle"], "dog": ["puppy"], "sky": [], "camera": [],
}  # fmt: skip
SAFE = {"camera", "sky"}


def slow_amber(nouns, truth, tempting, similar):
    """inference.py:97-161 over again, with its lists of flags."""
    safe_words = [word for own in truth for word in ASSOCIATION[own]] + truth
    safe_slots = [slot for slot, own in enumerate(truth) for _ in ASSOCIATION[own]] + list(range(len(truth)))
    ha_words = [word for own in tempting for word in ASSOCIATION[own]] + tempting
    ha_slots = [slot for slot, own in enumerate(tempting) for _ in ASSOCIATION[own]] + list(range(len(tempting)))
    covered, tempted, flags = [0] * len(truth), [0] * len(tempting), [0] * len(nouns)
    for place, noun in enumerate(nouns):
        if noun in SAFE:
            continue
        if noun in safe_words:
            covered[safe_slots[safe_words.index(noun)]] = 1
            continue
        if noun in ha_words:
            tempted[ha_slots[ha_words.index(noun)]] = 1
        for word, slot in zip(ha_words, ha_slots, strict=True):
            if similar(noun, word):
                tempted[slot] = 1
                break
        for word, slot in zip(safe_words, safe_slots, strict=True):
            if similar(noun, word):
                covered[slot] = 1
                break
        else:
            flags[place] = 1
    return {
        "flagged": sum(flags),
        "nouns": len(nouns),
        "covered": sum(covered),
        "tempted": sum(tempted),
        "clean": int(not sum(flags)),
    }


@pytest.mark.parametrize("similarity", ["identity", "table"])
def test_ambers_descriptions_are_counted_as_by_slow_loops(similarity):
    pair = {"bike", "bicycle"}
    similar = lambda a, b: a == b or (similarity == "table" and {a, b} == pair)
    benchmark = amber.Benchmark(similarity=similarity)
    benchmark.association, benchmark.safe_words = ASSOCIATION, SAFE
    vocabulary = sorted({word for key, words in ASSOCIATION.items() for word in (key, *words)})
    rng = random.Random(0)
    for _ in range(500):
        nouns = rng.choices(vocabulary, k=rng.randrange(6))
        truth, tempting = (rng.choices(sorted(ASSOCIATION), k=rng.randrange(1, 5)) for _ in range(2))
        found = benchmark._grade_description(nouns, {"truth": truth, "hallu": tempting})
        expected = slow_amber(nouns, truth, tempting, similar)
        assert {name: found.counts[name] for name in expected} == expected, (nouns, truth, tempting)
        assert found.is_right == bool(expected["clean"])


def test_similar_words_of_a_model_are_looked_up_once_per_pair():
    calls = []

    class Text(str):
        def similarity(self, other):
            calls.append((str(self), str(other)))
            return 0.9 if {str(self), str(other)} == {"dog", "puppy"} else 0.8

    alike = amber.by_spacy(Text)
    for _ in range(2):
        assert alike("dog", {"cat": 0, "puppy": 1, "dog": 2}) == 1
        assert alike("cat", {"dog": 0}) is None  # 0.8 is not over 0.8
    assert calls == [("dog", "cat"), ("dog", "puppy"), ("cat", "dog")]


@pytest.mark.parametrize(
    ("answer", "said"),
    [("Yes", "Yes"), ("no.", "No"), ("NO, it is not", "No"), ("There is no dog", "No"), ("Yes or no?", ""), ("Maybe", ""),
     ("", ""), ("The answer is yes", "Yes"), ("nope", "")],
)  # fmt: skip
def test_ambers_tolerant_parser(answer, said):
    assert amber.read_yes_no(answer) == said


# ---- COCO's words ---------------------------------------------------------------------------------------------------------


def test_words_that_belong_together_are_joined_before_they_are_looked_up():
    words = _coco.Vocabulary.of("chair, seat\ntoilet\ndining table, table\nperson, baby, passenger\ndog\nhot dog\ntrain\n")
    joined = words.join(re.findall(r"\w+", "a baby dog at the table eats a hot dog on the passenger train"))
    assert words.objects(joined) == ["dog", "dining table", "hot dog", "train"]
    assert words.objects(words.join(["the", "seat"])) == ["chair"]
    assert words.objects(words.join(["the", "seat", "of", "the", "toilet"])) == ["toilet"]
    assert words.objects(words.join(["toilet", "seat"])) == ["toilet"]


# ---- usual answer formats -------------------------------------------------------------------------------------------------


def in_order(subset, answers, field="answer"):
    return [
        {"question": f"{text[:-1]} in the {subset} image?", field: answer}
        for (_, text, _), answer in zip(QUESTIONS, answers, strict=True)
    ]


def test_popes_lines_are_read_in_the_order_of_its_questions(data):
    found = graded(data, "pope(subset='random')", in_order("random", ["Yes", "No", "Yes, a dog."]))
    assert found["official"]["random"] == {
        "TP": 1, "FP": 1, "TN": 1, "FN": 0, "Accuracy": 2 / 3, "Precision": 0.5, "Recall": 1.0, "F1 score": 2 / 3,
        "Yes ratio": 2 / 3,
    }  # fmt: skip
    assert found["complete"]
    assert found["tools"] == {"labels": "old", "parser": "official"}


def test_llavas_lines_with_all_three_subsets_are_told_apart(data):
    rows = [row for subset in ("adversarial", "random", "popular") for row in in_order(subset, ["Yes", "No", "No"], "text")]
    found = graded(data, "pope", rows)
    assert [found["metrics"][f"{subset}/accuracy"]["value"] for subset in pope.SUBSETS] == [100] * 3
    assert found["metrics"]["accuracy"]["value"] == 100


def test_the_name_of_a_file_says_which_subset_it_has(data):
    write(data / "my_popular.jsonl", [{"text": "Yes"}, {"text": "No"}, {"text": "No"}])
    found = graded(data, "pope", data / "my_popular.jsonl")
    assert found["parts"]["popular"] == {"asked": 3, "graded": 3}
    assert not found["complete"]
    assert found["missing"]["count"] == 6


def test_what_a_tolerant_parser_reads_differently_is_an_option(data):
    rows = in_order("random", ["YES", "NO", "I cannot tell"])
    official, tolerant = (
        graded(data, f"pope(subset='random', parser='{parser}')", rows, parser) for parser in ("official", "tolerant")
    )
    assert [each["metrics"]["yes_ratio"]["value"] for each in (official, tolerant)] == [100, pytest.approx(100 / 3)]
    assert tolerant["metrics"]["unparsed"]["value"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("answers", "figures"),
    [
        (["Yes", "It isn't there", "There isn't any"], {"precision": 100 / 3, "recall": 100, "f1": 50, "unparsed": 200 / 3}),
        (["I see one", "No", "No"], {"precision": None, "recall": 0, "f1": None, "unparsed": 100 / 3}),
        (["Yes", "No", "No"], {"precision": 100, "recall": 100, "f1": 100, "unparsed": 0}),
    ],
)
def test_an_answer_that_is_neither_yes_nor_no_is_wrong_in_every_figure(data, answers, figures):
    found = graded(data, "pope(subset='random', parser='tolerant')", in_order("random", answers))
    assert {name: found["metrics"][name]["value"] for name in figures} == {
        name: None if value is None else pytest.approx(value) for name, value in figures.items()
    }
    printed = found["official"]["random"]
    assert [printed["Precision"], printed["F1 score"]] == [
        None if figures[name] is None else pytest.approx(figures[name] / 100) for name in ("precision", "f1")
    ]
    grades = [grade_question(answer, expected) for answer, (_, _, expected) in zip(answers, QUESTIONS, strict=True)]
    sums = {name: np.array([float(sum(each.counts[name] for each in grades))]) for name in grades[0].counts}
    ours = question_metrics(sums)
    same = {"precision": "precision", "recall": "recall", "unparsed": "unparsed"} | ({"f1": "f1"} if figures["f1"] else {})
    assert {name: ours[name].tolist() for name in same} == {
        name: [pytest.approx(math.nan if figures[name] is None else figures[name], nan_ok=True)] for name in same
    }


def test_seeds_letters_may_be_losses_and_videos_are_left_out(data):
    rows = [{"question_id": str(number), "prediction": "ABCD"[number % 4]} for number in range(6)]
    rows += [
        {"q_id": 6, "losses": [3.0, 2.0, 1.0, 2.5]},
        {"q_id": 7, "losses": [0.1, 2.0, 1.0, 2.5]},
        {"question_id": "v1", "prediction": "B"},
    ]
    found = graded(data, "seed", rows)
    assert found["official"] == {"image accuracy": "87.50%", "right": 7, "questions": 8}


def test_grading_can_be_repeated_in_part_and_from_packed_answers(data):
    rows = in_order("random", ["Yes", "No", "Yes"])
    (data / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    found = graded(data, "pope(subset='random')", data / "a.jsonl.gz", limit=1)
    assert (found["items"], found["metrics"]["accuracy"]["value"], found["complete"]) == (2, 100, True)
    assert grade(data / "out", progress=False)["benchmarks"]["pope"] == found
    assert json.loads((data / "out" / "scores.json").read_text())["model"] == "a"


# ---- answers with thoughts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thinking",
    [
        "<think>No dog? no, not a cat.</think>\n\n{}",
        "<Thinking>There is no cat.</Thinking> {}",
        "[THINK]no[/THINK]{}",
        "no, wait.</think>{}",
        "<think>no</think><answer>{}</answer>",
        "◁think▷no◁/think▷ {}",
    ],
)
def test_thoughts_are_taken_out_before_grading_and_counted(data, thinking):
    for number, (spec, rows) in enumerate(
        [
            ("pope(subset='random')", in_order("random", [thinking.format(answer) for answer in ("Yes", "No", "No")])),
            ("seed", [{"question_id": str(number), "prediction": thinking.format("ABCD"[number % 4])} for number in range(8)]),
        ]
    ):
        found = graded(data, spec, rows, f"out{number}")
        assert found["metrics"]["accuracy"]["value"] == 100
        assert found["thoughts_removed"]["count"] == len(rows) and found["thoughts_unfinished"]["count"] == 0
        given = [row.get("answer", row.get("prediction")) for row in rows]
        assert [row["answer"] for row in read_rows(data / f"out{number}" / "answers.jsonl")] == given  # as they were


def test_an_answer_cut_off_in_a_thought_is_no_answer(data, capsys):
    rows = in_order("random", ["<think>Is it a dog? Yes", "<think>hm</think>No", "No"])
    write(data / "answers.jsonl", rows)
    files = ["--answers", str(data / "answers.jsonl"), "--data", str(data), "--output", str(data / "out")]
    main(["evaluate", "--benchmarks", "pope(subset='random', parser='tolerant')", *files])
    shown = capsys.readouterr().err
    assert "pope: thoughts were taken out of 1 answers before grading." in shown
    assert "pope: 1 answers were cut off in a thought and graded without it: random/1." in shown
    assert "pope: 33.3 % of the answers cannot be read. They count as wrong." in shown
    grades = read_rows(data / "out" / "grades.jsonl")
    assert [row.get("thought") for row in grades] == ["unfinished", "removed", None]
    assert [row["right"] for row in grades] == [False, True, True]


# ---- answers that say what they answer -----------------------------------------------------------------------------------


def of_random(changes=()):
    """POPE's own rows of one subset with the right answers, as its label file has them, in another order."""
    rows = []
    for number, (image, text, label) in enumerate(QUESTIONS, start=1):
        question = f"{text[:-1]} in the random image?"
        rows.append({"question_id": number, "image": image, "text": question, "label": label, "answer": label.capitalize()})
    for row, change in zip(rows, changes, strict=False):
        row.update(change)
    return rows[::-1]


@pytest.mark.parametrize(
    "without",
    [(), ("image", "label"), ("text", "image", "label")],
    ids=["all fields", "no picture", "ids alone"],
)
@pytest.mark.parametrize("as_id", [int, float, str, "{:.1f}".format, "random/{}".format])
def test_popes_answers_in_any_order_are_matched_by_their_own_ids(data, without, as_id):
    rows = of_random()
    for row in rows:
        row["question_id"] = as_id(row["question_id"])
        for field in without:
            del row[field]
    found = graded(data, "pope(subset='random')", rows)
    assert found["metrics"]["accuracy"]["value"] == 100
    in_part = graded(data, "pope(subset='random')", rows[:2], "in part")
    assert (in_part["metrics"]["accuracy"]["value"], in_part["complete"]) == (100, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"image": "sea.jpg"}], r"answers\.jsonl:3: 'image' is 'sea\.jpg', where that of item random/1 is 'dog\.jpg'"),
        ([{"question": "Is there a dog?"}], r"answers\.jsonl:3: 'question' is 'Is there a dog\?', where that of item random/1"),
        ([{}, {"label": "yes"}], r"answers\.jsonl:2: 'label' is 'yes', where that of item random/2 is 'no'"),
        ([{"response": "No"}], r"answers\.jsonl:3 has two answers: 'answer' is 'Yes', 'response' is 'No'"),
        ([{"question_id": 1.5}], r"answers\.jsonl:3: 'question_id' must be a whole number or a text, not 1\.5"),
        ([{"question_id": 71}, {"question_id": 70}, {"question_id": 72}], r"answers\.jsonl:2: the id 70 comes after 72"),
    ],
)
def test_a_row_that_contradicts_its_id_is_refused_by_field(data, changes, message):
    with pytest.raises(UserError, match=message):
        graded(data, "pope(subset='random')", of_random(changes))


def test_foreign_ids_are_no_order_unless_they_ascend(data):
    numbered = [{"question_id": 70 + number, "answer": label} for number, (_, _, label) in enumerate(QUESTIONS)]
    assert graded(data, "pope(subset='random')", numbered)["metrics"]["accuracy"]["value"] == 100
    with pytest.raises(UserError, match=r"answers\.jsonl:2: the id 71 comes after 72, and not all ids are POPE's own"):
        graded(data, "pope(subset='random')", numbered[::-1])
    with pytest.raises(UserError, match=r"answers\.jsonl:1 does not say which subset it is of"):
        graded(data, "pope", [{"answer": "Yes"}] * 9)


def test_whole_floats_are_ids_everywhere(data):
    rows = [{"question_id": number, "prediction": "ABCD"[int(float(number))]} for number in (0.0, "1.0", 2)]
    assert graded(data, "seed", rows)["official"]["right"] == 3
    ours = [{"benchmark": "seed", "id": number, "answer": "ABCD"[int(number)]} for number in (0.0, 1)]
    assert graded(data, "seed", ours, "ours")["official"]["right"] == 2
    replies = write(data / "replies.jsonl", [{"question_id": 4.0, "content": "8 7"}])
    assert Recorded(file=str(replies)).ask([], key="llava_bench/4") == "8 7"


# ---- what is refused, and what is told ------------------------------------------------------------------------------------

ROTATED = [*in_order("random", ["Yes", "No", "No"])[1:], in_order("random", ["Yes", "No", "No"])[0]]


@pytest.mark.parametrize(
    ("spec", "rows", "message"),
    [
        ("pope(subset='random')", [{"answer": "Yes"}] * 2, "2 answers to 3 questions"),
        ("pope(subset='random')", ROTATED, r"answers\.jsonl:1: 'question' is 'Is there a cat in .* that of item random/1"),
        ("pope(subset='random')", [{"answer": 1}] * 3, r"answers\.jsonl:1: 'answer' must be a text, not 1"),
        ("pope(subset='random')", [{"said": "Yes"}] * 3, r"answers\.jsonl:1 has no answer"),
        ("seed", [{"question_id": "99", "prediction": "A"}], r"99 \(.*answers\.jsonl:1\): no such item"),
        ("seed", [{"question_id": 1, "prediction": letter} for letter in "AB"], r"1 \(.*:2\): answered again"),
        ("seed", [{"prediction": "A"}], "does not say what it answers"),
        ("seed", [{"question_id": 1, "losses": [1, 2]}], "must be four numbers"),
        ("seed", [], "has no answers in it"),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_are_refused_by_place(data, spec, rows, message):
    with pytest.raises(UserError, match=message):
        graded(data, spec, rows)
    assert not (data / "out" / "scores.json").exists()


def test_all_wrong_ids_are_named_at_once(data):
    with pytest.raises(UserError, match=r"90 \(.*91 \(.*99 \(.* and 5 more: no such item, one is called '0'"):
        graded(data, "seed", [{"question_id": str(number), "prediction": "A"} for number in range(90, 105)])


def test_text_that_is_not_utf_8_is_refused_by_line(data):
    (data / "answers.jsonl").write_bytes(b'{"answer": "Yes"}\n{"answer": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl:2 is not UTF-8 \(byte 0xe9 at 33\)"):
        read_records(data / "answers.jsonl")
    (data / "answers.jsonl").write_text("Yes\nNo\n")
    with pytest.raises(UserError, match=r"answers\.jsonl:1 is not valid JSON"):
        read_records(data / "answers.jsonl")


def test_partial_answers_are_graded_and_never_called_complete(data, capsys):
    rows = [{"question_id": str(number), "prediction": letter} for number, letter in ((0, "A"), (1, ""), (2, "C"))]
    write(data / "answers.jsonl", rows)
    files = ["--answers", str(data / "answers.jsonl"), "--data", str(data), "--output", str(data / "out")]
    main(["evaluate", "--benchmarks", "seed", *files])
    shown = capsys.readouterr()
    assert "seed (in part)" in shown.out
    assert "seed is graded in part, 5 answers are missing: 3, 4, 5, 6, 7. Graded: image 3 of 8." in shown.err
    assert "seed: 1 answers are empty: 1." in shown.err
    scores = json.loads((data / "out" / "scores.json").read_text())["benchmarks"]["seed"]
    assert scores["complete"] is False
    assert scores["items"] == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pope(subset='easy')", r"pope has no subset='easy'. Known: adversarial, popular, random"),
        ("pope(labels='haed')", "Did you mean 'head'"),
        ("amber(similarity='tabel')", "Did you mean 'table'"),
        ("chair(variant='wordnte')", "Did you mean 'wordnet'"),
        ("seed(protocol='letters')", "Did you mean 'letter'"),
        ("amber(similarity='spacy')", "needs spaCy with en_core_web_lg, and no smaller model will do"),
        ("amber", "annotations.json|relation.json"),
    ],
)
def test_wrong_options_and_missing_files_are_reported(data, spec, message):
    with pytest.raises(UserError, match=message):
        graded(data, spec, [{"id": 1, "response": "A dog."}])


def test_official_files_must_be_named(data):
    with pytest.raises(UserError, match=r"say where they are with --data DIR. `catpo data get seed` shows"):
        grade_answers(answers=data / "x", benchmarks=["seed"], output=data / "out")
    with pytest.raises(UserError, match="name a model with --model, or answers made elsewhere with --answers"):
        evaluate(benchmarks=["scenes"], output=data / "out")


def test_a_model_is_not_asked_about_pictures_that_are_not_there(data):
    (data / "val2014").mkdir()
    (data / "val2014" / "dog.jpg").write_bytes(b"x")
    family = FakeFamily(lambda *_: "Yes")
    with pytest.raises(UserError, match=r"pope: 1 of 2 pictures are missing: .*sea\.jpg\. `catpo data get pope` shows"):
        evaluate(model=family, benchmarks=["pope(subset='random')"], data=data, output=data / "out", progress=False)
    assert family.calls == []
    (data / "val2014" / "sea.jpg").write_bytes(b"x")
    scores = evaluate(model=family, benchmarks=["pope(subset='random')"], data=data, output=data / "out", progress=False)
    assert scores["benchmarks"]["pope"]["metrics"]["yes_ratio"]["value"] == 100
    prompts = {row["prompt"] for row in read_rows(data / "out" / "answers.jsonl")}
    assert all(prompt.endswith("\nAnswer the question using a single word or phrase.") for prompt in prompts)


def test_an_evaluation_is_not_resumed_after_its_files_changed(data):
    graded(data, "pope(subset='random')", in_order("random", ["Yes", "No", "No"]))
    path = data / "pope" / "coco_e3e39262" / "coco_pope_random.json"
    path.write_text(path.read_text().replace('"yes"', '"no"'))
    with pytest.raises(UserError, match="begun with data_hashes="):
        graded(data, "pope(subset='random')", in_order("random", ["Yes", "No", "No"]))


def test_labels_of_another_version_are_not_taken_for_those_asked_for(data, monkeypatch):
    rows = in_order("random", ["Yes", "No", "No"])
    graded(data, "pope(subset='random')", rows)
    about = json.loads((data / "out" / "evaluation.json").read_text())
    (digest,) = about["data_hashes"]["pope"].values()
    monkeypatch.setitem(pope.HASHES, "head/random", digest)
    with pytest.raises(UserError, match=r"has the labels called 'head', not 'old'. Choose pope\(labels='head'\)"):
        graded(data, "pope(subset='random')", rows, "again")


# ---- where files go -------------------------------------------------------------------------------------------------------


def test_data_get_says_what_goes_where(capsys):
    main(["data", "get", "amber"])
    shown = capsys.readouterr().out
    assert "needed: DIR/amber/annotations.json" in shown
    assert "https://raw.githubusercontent.com/junyangwang0410/AMBER/master/data/annotations.json" in shown
    assert "1,004 pictures (AMBER_1.jpg to AMBER_1004.jpg)" in shown


def test_data_get_checks_files_by_hash_and_lists_missing_pictures(data, capsys):
    main(["data", "get", "pope", "--data", str(data), "--all"])
    shown = capsys.readouterr().out
    assert shown.count("another version: ") == 6
    assert "0 of 2 pictures are there" in shown
    assert f"missing: {data / 'coco' / 'val2014' / 'sea.jpg'}" in shown
    assert "Not the versions that official figures were checked with: old/coco_pope_random.json" in shown
    with pytest.raises(SystemExit) as end:
        main(["data", "get", "amber", "--data", str(data)])
    assert end.value.code == 1
    assert re.search(r"missing: .*relation\.json", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["data", "get", "scenes"])
    assert "made of a data set, not of official files" in capsys.readouterr().err


# ---- side by side ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(data):
    for name, answers in (("base_1", ["Yes", "Yes", "Yes"]), ("better", ["Yes", "No", "No"])):
        graded(data, "pope(subset='random')", in_order("random", answers), name)
    return [data / "base_1", data / "better"]


def test_evaluations_are_compared_in_three_forms(two, capsys):
    sides = compare(two)
    accuracy = next(differences[0] for _, metric, differences in sides.rows if metric == "accuracy")
    assert (accuracy.base, accuracy.other, accuracy.difference.value) == pytest.approx((100 / 3, 100, 200 / 3))
    assert "| pope | accuracy | 33.33 | 100.00 | +66.67 \\[" in show(sides, "markdown")
    latex = show(sides, "latex")
    assert r"benchmark & metric & base\_1 & better & better - base\_1 \\" in latex
    assert r"pope & random/yes\_ratio & 100.00 & 33.33 & $-66.67$ [" in latex
    main(["compare", *map(str, two), "--limit", "1"])
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "* the interval excludes 0" in shown
    assert next(row[2][0].item_count for row in compare(two, limit=1).rows) == 2


def test_what_cannot_be_compared_is_reported_with_the_reason(data, two):
    graded(data, "pope(subset='random', parser='tolerant')", in_order("random", ["Yes", "No", "No"]), "tolerant")
    with pytest.raises(
        UserError, match="nothing can be compared. pope: tolerant cannot be compared with base_1: their options differ"
    ):
        compare([two[0], data / "tolerant"])
    sides = compare([*two, data / "tolerant"])
    assert [each is None for each in sides.rows[0][2]] == [False, True]
    assert "their options differ" in sides.notes[0]
    with pytest.raises(UserError, match="Give two or more folders"):
        compare(two[:1])
