"""Real answers are graded as the official programs graded them, digit for digit; files and figures are read from ../shared."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from catpo.cli.main import main
from catpo.evaluation.benchmarks import amber
from catpo.evaluation.grade import grade_answers
from catpo.files.json_files import read_rows
from catpo.text.english import English


@pytest.fixture(scope="module")
def official(shared):
    return shared / "benchmarks"


@pytest.fixture
def graded(official, tmp_path):
    """Grades a golden input; gives what scores.json says of the one benchmark."""
    pytest.importorskip("nltk", reason="needs the extra 'eval'")

    def grade(spec, *files, data=official / "data"):
        answers = [official / file for file in files]
        scores = grade_answers(answers=answers, benchmarks=[spec], output=tmp_path, data=data, progress=False)
        (found,) = scores["benchmarks"].values()
        return found

    return grade


@pytest.fixture
def wordnet(official):
    pytest.importorskip("nltk", reason="needs the extra 'eval'")
    if not English(official / "data").has_wordnet():
        pytest.skip("WordNet is not on this machine: apt-get install wordnet-base")


# ---- AMBER ----------------------------------------------------------------------------------------------------------------

AMBER = {
    "handmade_edge": "golden/amber/inputs/handmade_edge.json",
    "pra_llava15_base_7b.gen": "golden/amber/inputs/pra_llava15_base_7b.gen.json.gz",
    "pra_direct_normal_dpo_b32_e1.gen": "golden/amber/inputs/pra_direct_normal_dpo_b32_e1.gen.json.gz",
}
COUNTERS = {
    "chair_score": "flagged", "chair_num": "nouns", "cover_score": "covered", "cover_num": "slots", "cog_score": "tempted",
    "cog_num": "tempting", "responses": "responses", "clean_responses": "clean",
}  # fmt: skip
QUESTION_COUNTERS = {"ok": "right", "n": "questions", "no": "expected_no", "sayno": "said_no", "tn": "right_no"}


def printed(path):
    """Section -> label -> figure, of what inference.py printed."""
    sections, title = {}, ""
    for line in path.read_text().splitlines():
        if line.endswith(":") and "\t" not in line:
            title = line[:-1]
        elif line.strip():
            label, figure = line.split(":")
            sections.setdefault(title, {})[label] = float(figure)
    return sections


@pytest.mark.parametrize(
    ("run", "similarity"),
    [
        ("handmade_edge", "identity"),
        ("handmade_edge", "table"),
        ("pra_llava15_base_7b.gen", "table"),
        pytest.param("pra_llava15_base_7b.gen", "identity", marks=pytest.mark.slow),
        ("pra_direct_normal_dpo_b32_e1.gen", "identity"),
        pytest.param("pra_direct_normal_dpo_b32_e1.gen", "table", marks=pytest.mark.slow),
    ],
)
def test_amber_is_graded_as_inference_py_does(graded, official, tmp_path, run, similarity):
    scores = graded(f"amber(similarity='{similarity}')", AMBER[run])
    kind = {"identity": "exact", "table": "pairs"}[similarity]
    expected = printed(official / "golden" / "amber" / "outputs" / f"{run}.{kind}.txt")
    titles = {"Descriminative Task": "All", "Exsitence": "Existence"}
    blocks = {"Generative Task": scores["official"]["generative"]}
    blocks |= {
        title: scores["official"]["discriminative"][titles.get(title, title)] for title in expected if title not in blocks
    }
    assert blocks == expected
    counters = json.loads((official / "golden" / "amber" / "counters.json").read_text())[f"{run}.{kind}"]
    rows = read_rows(tmp_path / "grades.jsonl")
    sums = {ours: sum(row["counts"].get(ours, 0) for row in rows) for ours in {*COUNTERS.values(), *QUESTION_COUNTERS.values()}}
    assert {theirs: sums[ours] for theirs, ours in COUNTERS.items()} == counters["counters"]
    if counters["disc_counters"]:
        assert {theirs: sums[ours] for theirs, ours in QUESTION_COUNTERS.items()} == counters["disc_counters"]["All"]
        assert scores["official"]["AMBER_score"] == counters["AMBER_score"]


def test_values_with_intervals_round_to_the_figures_printed(graded):
    scores = graded("amber", AMBER["handmade_edge"])
    figures = scores["official"]
    assert {f"{scores['metrics'][name]['value']:.1f}" for name in ("chair", "cover", "hal", "cog")} == {
        str(figure) for figure in figures["generative"].values()
    }
    for name in ("accuracy", "precision", "recall", "f1"):
        label = "F1" if name == "f1" else name.capitalize()
        assert round(scores["metrics"][name]["value"], 1) == figures["discriminative"]["All"][label]
        assert round(scores["metrics"][f"relation/{name}"]["value"], 1) == figures["discriminative"]["Relation"][label]


def test_a_model_that_always_says_no_beats_llava_at_ambers_f1(graded, official, tmp_path):
    annotations = json.loads((official / "data" / "amber" / "annotations.json").read_text())
    questions = [row["id"] for row in annotations if row["type"] != "generative"]
    path = tmp_path / "no.json"
    path.write_text(json.dumps([{"id": name, "response": "No"} for name in questions]))
    scores = graded("amber(part='discriminative')", path)
    assert scores["official"]["discriminative"]["All"] == {"Accuracy": 66.3, "Precision": 66.3, "Recall": 100.0, "F1": 79.7}
    for name in ("accuracy", "f1"):
        assert scores["metrics"][f"always_no/{name}"] == scores["metrics"][name]
    values = {name: scores["metrics"][name]["value"] for name in ("no_ratio", "yes_accuracy", "unparsed")}
    assert values == {"no_ratio": 100, "yes_accuracy": 0, "unparsed": 0}
    assert scores["complete"]


def test_without_wordnet_every_word_of_amber_has_the_same_noun(official, wordnet, monkeypatch):
    """All 418 words, their plurals and other forms, in small letters, with a capital and in capitals."""
    vocabulary = json.loads((official / "data" / "amber" / "relation.json").read_text())
    words = {word for key, others in vocabulary.items() for word in (key, *others)}
    table = json.loads((official / "data" / "amber" / "derived_noun_forms.json").read_text())
    forms = {word + ending for word in {*words, *table} for ending in ("", "s", "es", "'s", "ed", "er", "ing")}
    forms |= {word.removesuffix("s") for word in words} | {re.sub("y$", "ies", word) for word in words}
    forms |= {re.sub("fe?$", "ves", word) for word in words} | {re.sub("man$", "men", word) for word in words}
    benchmark = amber.Benchmark()
    monkeypatch.setattr(English, "words", lambda self, text: text.split())
    monkeypatch.setattr(English, "tagged", lambda self, words: [(word, "NN") for word in words])
    benchmark.english, benchmark.vocabulary = English(official / "data"), words
    for form in sorted(forms | {form.capitalize() for form in forms} | {form.upper() for form in forms}):
        benchmark.noun_forms = None
        with_wordnet = benchmark.nouns(form)
        benchmark.noun_forms = table
        assert benchmark.nouns(form) == with_wordnet, form
    assert benchmark.nouns("sunglasses earrings slippers chopsticks") == []


@pytest.mark.parametrize("run", ["handmade_edge", pytest.param("pra_llava15_base_7b.gen", marks=pytest.mark.slow)])
def test_amber_s_official_figures_need_no_wordnet(graded, official, monkeypatch, run):
    monkeypatch.setattr(English, "has_wordnet", lambda self: False)
    scores = graded("amber", AMBER[run])
    expected = printed(official / "golden" / "amber" / "outputs" / f"{run}.pairs.txt")
    assert scores["official"]["generative"] == expected["Generative Task"]
    assert scores["tools"]["read_with"]["lemmas"] == "derived_noun_forms.json"


# ---- POPE -----------------------------------------------------------------------------------------------------------------

POPE = {
    "llava15_7b_short.random": "old",
    "llava15_7b_short.popular": "old",
    "llava15_7b_short.adversarial": "old",
    "llava15_7b_vdpo_long.random": "head",
    "llava15_7b_vdpo_long.popular": "old",
    "llava15_7b_vdpo_long.adversarial": "mixed",
}


def printed_by_pope(official, run):
    summary = json.loads((official / "golden" / "pope" / "outputs" / "summary.json").read_text())
    return {name: figure for name, figure in summary[run].items() if name != "label_file"}


@pytest.mark.parametrize("run", POPE)
def test_pope_is_graded_as_evaluate_py_does(graded, official, run):
    subset = run.rpartition(".")[2]
    scores = graded(f"pope(subset='{subset}', labels='{POPE[run]}')", f"golden/pope/inputs/{run}.jsonl.gz")
    assert scores["official"][subset] == printed_by_pope(official, run)


def test_pope_s_average_over_its_three_files_is_the_papers(graded):
    files = [f"golden/pope/inputs/llava15_7b_vdpo_long.{subset}.jsonl.gz" for subset in ("popular", "adversarial", "random")]
    metrics = graded("pope(labels='mixed')", *files)["metrics"]
    assert (round(metrics["accuracy"]["value"], 2), round(metrics["f1"]["value"], 2)) == (85.20, 86.11)


def test_pope_s_three_files_in_one_are_told_apart_by_their_questions(graded, official, tmp_path):
    names = [f"llava15_7b_short.{subset}" for subset in ("adversarial", "popular", "random")]
    folder = official / "golden" / "pope" / "inputs"
    together = b"".join(gzip.decompress((folder / f"{name}.jsonl.gz").read_bytes()) for name in names)
    (tmp_path / "all.jsonl").write_bytes(together)
    scores = graded("pope", tmp_path / "all.jsonl")
    assert [scores["official"][subset]["FP"] for subset in ("random", "popular", "adversarial")] == [40, 73, 140]


def test_answers_that_say_no_in_many_ways_are_read_as_evaluate_py_reads_them(official, graded, tmp_path):
    (tmp_path / "data/coco_HEAD").mkdir(parents=True)
    labels = (official / "golden/pope/inputs/edge_label.json").read_bytes()
    (tmp_path / "data/coco_HEAD/coco_pope_random.json").write_bytes(labels)
    answers = "golden/pope/inputs/handmade_edge.edge.jsonl.gz"
    scores = graded("pope(subset='random', labels='head')", answers, data=tmp_path / "data")
    assert scores["official"]["random"] == printed_by_pope(official, "handmade_edge.edge")


# ---- CHAIR, Object HalBench, SEED -----------------------------------------------------------------------------------------

SLOW = ("llava-1.5_beam5", "llava-1.5_ours", "minigpt4_greedy", "minigpt4_beam5")
CAPTIONS = ["llava-1.5_greedy", "minigpt4_ours", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize(
    ("variant", "golden"),
    [("wordnet", "overall_wordnet_variant.json"), ("pattern", "overall_pattern_singularize_variant.json")],
)
@pytest.mark.parametrize("run", CAPTIONS)
def test_chair_is_graded_as_the_original_and_its_forks_do(request, graded, official, run, variant, golden):
    if variant == "wordnet":
        request.getfixturevalue("wordnet")
    else:
        pytest.importorskip("textblob", reason="needs the extra 'eval'")
    overall = graded(f"chair(variant='{variant}')", f"golden/chair/inputs/opera_{run}.jsonl.gz")["official"]["overall"]
    expected = json.loads((official / "golden" / "chair" / "outputs" / golden).read_text())[f"{run}.jsonl"]
    assert {name: overall[name] for name in expected} == expected


def test_chair_finds_the_same_objects_in_every_caption(wordnet, graded, official, tmp_path):
    graded("chair", "golden/chair/inputs/opera_llava-1.5_greedy.jsonl.gz")
    path = official / "golden" / "chair" / "outputs" / "opera_llava-1.5_greedy.wordnet.sentences.json.gz"
    expected = {str(each["image_id"]): each for each in json.loads(gzip.decompress(path.read_bytes()))["sentences"]}
    for row in read_rows(tmp_path / "grades.jsonl"):
        sentence = expected[row["id"]]
        assert [name for name, _ in row["mentions"]] == list(dict.fromkeys(sentence["mscoco_generated_words"]))
        absent = [name for name, label in row["mentions"] if label == "hallucinated"]
        assert absent == list(dict.fromkeys(name for _, name in sentence["mscoco_hallucinated_words"]))
        assert row["counts"]["words"] == len(sentence["words"])


def test_object_halbench_by_rules_is_graded_as_the_official_program_does_without_gpt(wordnet, graded, official):
    scores = graded("object_halbench", "golden/object_halbench/inputs/llava15_base_7b.caps.jsonl.gz")
    golden = official / "golden" / "object_halbench" / "outputs" / "official_rule_based_no_gpt.json"
    assert scores["official"] == json.loads(golden.read_text())["llava15_base_7b"]
    assert scores["tools"]["figures"] == "not comparable with published figures"


def test_seed_s_image_part_of_llava_13b_is_what_its_paper_prints(graded):
    scores = graded("seed", "data/seed_bench/llava-v1.5-13b_answers_upload.jsonl")
    assert scores["official"] == {"image accuracy": "68.21%", "right": 9707, "questions": 14232}
    assert scores["complete"]


# ---- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_official_figures_and_what_is_missing(official, tmp_path, capsys):
    pytest.importorskip("nltk", reason="needs the extra 'eval'")
    main(["evaluate", "--answers", str(official / AMBER["handmade_edge"]), "--benchmarks", "amber",
          "--data", str(official / "data"), "--output", str(tmp_path / "out")])  # fmt: skip
    shown = capsys.readouterr()
    assert "amber as the official program prints it, generative: CHAIR 25.0, Cover 45.3, Hal 66.7, Cog 11.4" in shown.out
    assert "amber (in part)" in shown.out
    assert re.search(r"amber is graded in part, 15,121 answers are missing: 4, 6, 7, .* and 15,111 more", shown.err)
    assert "10 answers are empty" in shown.err
    scores = json.loads(Path(tmp_path / "out" / "scores.json").read_text())
    assert not scores["benchmarks"]["amber"]["complete"]
    assert scores["data_hashes"]["amber"]["annotations.json"].startswith("db22a436")
