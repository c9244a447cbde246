"""MMHal-Bench and LLaVA-Bench: prompts byte for byte, parsers, and what the official programs print."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from catpo.cli.main import main
from catpo.core.errors import UserError
from catpo.core.spec import Spec
from catpo.evaluation.benchmarks import llava_bench, mmhal, object_halbench
from catpo.evaluation.benchmarks._files import Folder
from catpo.evaluation.evaluate import evaluate
from catpo.evaluation.folder import load_evaluation
from catpo.evaluation.grade import grade_answers
from catpo.evaluation.paired import incomparable, paired_differences
from fake_chat import Answer, completion, serve

CANARY = "sk-canary-0123456789abcdef"
RATINGS = [
    # reply, official, strict
    ("Explanation.\n\nRating: 3, not informative, no hallucination", 3, 3),
    ("Rating: 6, very informative with good analysis or reasoning, no hallucination", 6, 6),
    ("Rating: 3. Again: rating: 3", 3, 3),
    ("**Rating**: 4", 0, 4),
    ("Rating:6, very informative", 0, 6),
    ("Rating: 4.0", 4, 4),
    ("Rating: 4.5", 4, None),
    ("Rating: 61, odd", 6, None),
    ("Rating: 2, with hallucination\nOn reflection, Rating: 4", 0, None),
    ("Explanation only, no rating given.", 0, None),
    ("", 0, None),
    ("Operating: 5", 5, None),
]


@pytest.fixture(scope="module")
def official(shared) -> Path:
    folder = shared / "benchmarks"
    if not (folder / "golden").is_dir():
        pytest.skip(f"{folder} has no golden results")
    return folder


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users-cache"))


def opened(benchmark, folder: Path, name: str):
    return benchmark.open(Folder(folder, name, benchmark.sources, benchmark.pictures))


@pytest.mark.parametrize(("reply", "by_official", "by_strict"), RATINGS)
def test_a_rating_is_read_by_the_official_and_by_the_strict_parser(reply, by_official, by_strict):
    assert (mmhal.official_rating(reply), mmhal.strict_rating(reply)) == (by_official, by_strict)


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 9\nBecause", (8.0, 9.0)),
        ("8.5, 9", None),  # the comma becomes a blank, so there are two
        ("7.5 6\r\nx", (7.5, 6.0)),
        ("8 9 ", None),
        ("Assistant 1: 8", None),
        ("", None),
        ("\n8 9", None),
        ("nan 9", None),
        ("-1 -1", (-1.0, -1.0)),
    ],
)
def test_the_first_line_must_be_two_numbers(reply, scores):
    assert llava_bench.read_scores(reply) == scores


# ---- made-up data ---------------------------------------------------------------------------------------------------------


def mmhal_row(number: int, **changed) -> dict:
    row = {
        "question_type": mmhal.TYPES[number % 8],
        "image_id": f"{number:04x}",
        "image_src": f"https://example.org/{number}_o.jpg",
        "image_content": ["Lamp", "{Table}"],
        "question": f"What is lit, number {number}?",
        "gt_answer": "The lamp.",
        "model_answer": f"A {{lamp}} {number}.",
    }
    return {**row, **changed}


@pytest.fixture
def small_mmhal(tmp_path) -> Path:
    (tmp_path / "data/mmhal").mkdir(parents=True)
    (tmp_path / "data/mmhal/mmhal-bench_answer_template.json").write_text(json.dumps([mmhal_row(n) for n in range(16)]))
    return tmp_path / "data"


@pytest.fixture
def small_llava(tmp_path) -> Path:
    folder = tmp_path / "data/llava_bench"
    folder.mkdir(parents=True)
    questions = [
        {"question_id": n, "image": f"{n // 2}.jpg", "category": llava_bench.CATEGORIES[n % 3], "text": f"What {n}?"}
        for n in range(6)
    ]
    rules = {f"llava_bench_{name}": {"role": "Assistant", "prompt": f"Rate {name}."} for name in llava_bench.CATEGORIES}
    files = {
        "questions.jsonl": questions,
        "context.jsonl": [{"id": str(n), "image": f"{n}.jpg", "caption": ["A lamp.", "Lit."]} for n in range(3)],
        "answers_gpt4.jsonl": [{"question_id": n, "text": f"Reference {n}."} for n in range(6)],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rule.json").write_text(json.dumps(rules))
    return tmp_path / "data"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def mmhal_answers(tmp_path) -> Path:
    return write_rows(tmp_path / "a.jsonl", [mmhal_row(n) for n in range(16)])


def grade(answers: Path, benchmark: str, data: Path, tmp_path: Path, judge: str | Spec, name: str = "out") -> dict:
    options = {"benchmarks": [benchmark], "output": tmp_path / name, "data": data, "judge": judge, "progress": False}
    (scores,) = grade_answers(answers=answers, **options)["benchmarks"].values()
    return scores


def test_mmhal_asks_with_contents_question_truth_and_answer_as_they_are(small_mmhal):
    item = opened(mmhal.Benchmark(), small_mmhal, "mmhal")[1]
    (message,) = mmhal.judge_messages(item, "A {lamp}.")
    assert message["role"] == "user" and message["content"].endswith(
        "\n\n### Image Contents\nLamp, {Table}\n\n### Question\nWhat is lit, number 1?\n\n### Standard Human-Generated Answer\n"
        "The lamp.\n\n### LMM Response to Evaluate\nA {lamp}.\n"
    )


def test_mmhal_pictures_are_found_by_either_name(small_mmhal):
    (small_mmhal / "mmhal/images").mkdir()
    (small_mmhal / "mmhal/images/0001.jpg").touch()
    first, second = opened(mmhal.Benchmark(), small_mmhal, "mmhal")[:2]
    assert first.sample.images[0].path.name == "0_o.jpg" and second.sample.images[0].path.name == "0001.jpg"


def test_llava_bench_asks_with_context_reference_and_rule(small_llava):
    item = opened(llava_bench.Benchmark(), small_llava, "llava_bench")[1]
    system, user = llava_bench.judge_messages(item, "Mine.")
    assert system == {"role": "system", "content": llava_bench.SYSTEM}
    assert user["content"] == (
        "[Context]\nA lamp.\nLit.\n\n[Question]\nWhat 1?\n\n[Assistant 1]\nReference 1.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nMine.\n\n[End of Assistant 2]\n\n[System]\nRate conv.\n\n"
    )


def test_llava_bench_scores_failed_reviews_as_officially_and_also_without_them(small_llava, tmp_path):
    answers = write_rows(tmp_path / "a.jsonl", [{"question_id": n, "text": "Mine."} for n in range(6)])
    replies = ["10 5", "8 4", "no score", "10 5", "8 4", "8 8"]
    recorded = write_rows(tmp_path / "r.jsonl", [{"question_id": n, "content": reply} for n, reply in enumerate(replies)])
    scores = grade(answers, "llava_bench", small_llava, tmp_path, f"recorded(file='{recorded}', name='gpt-4-0314')")
    metrics = {name: figure["value"] for name, figure in scores["metrics"].items()}
    assert metrics["score"] == pytest.approx(100 * round(25 / 6, 3) / round(43 / 6, 3))
    assert metrics["read_score"] == pytest.approx(100 * 26 / 44)
    assert metrics["score_detail"] == pytest.approx(100 * 3.5 / 3.5)
    assert not scores["complete"] and scores["without_verdict"] == {
        "count": 1, "first": ["2"], "reply": "no score", "form": "two numbers and nothing else in the first line",
    }  # fmt: skip
    assert scores["judge"]["name"] == "gpt-4-0314"


@pytest.mark.parametrize("form", ["official", "by id"])
def test_mmhal_is_graded_by_a_server_in_threads_and_paid_for_once(small_mmhal, tmp_path, form):
    rows = [mmhal_row(n) if form == "official" else {"question_id": n, "text": f"A lamp {n}."} for n in range(16)]
    answers = write_rows(tmp_path / "a.jsonl", rows if form == "official" else rows[::-1])

    def reply(request):
        number = int(request["messages"][0]["content"].rstrip().rstrip(".").rpartition(" ")[2])
        return completion(f"Rating: {number % 7}")

    with serve(reply=reply) as chat:
        judge = f"openai(model='gpt-4', base_url='{chat.url}')"
        scores = grade(answers, "mmhal", small_mmhal, tmp_path, judge)
        again = grade(answers, "mmhal", small_mmhal, tmp_path, judge)
    assert len(chat.asked) == 16 and again == scores
    assert {request["temperature"] for request in chat.asked} == {0.0}
    expected = [n % 7 for n in range(16)]
    assert scores["metrics"]["score"]["value"] == pytest.approx(sum(expected) / 16)
    assert scores["metrics"]["hallucination_rate"]["value"] == pytest.approx(100 * sum(s < 3 for s in expected) / 16)
    assert scores["metrics"]["score_attribute"]["value"] == (0 + 8 % 7) / 2
    assert scores["complete"] and scores["judge"]["version"] == "judge-0613"
    assert scores["tools"]["judge_prompt_md5"] == "e4ab56b9f748d4b3ca07d07497d16889"  # of the official program's template
    assert scores["judge"]["decoding"] == {"temperature": 0.0}


def test_the_command_line_judges_and_leaves_the_key_nowhere(small_mmhal, mmhal_answers, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    command = ["evaluate", "--answers", str(mmhal_answers), "--benchmarks", "mmhal", "--data", str(small_mmhal)]
    with serve(reply=lambda _: completion(f"Rating: 4. {CANARY}", model=CANARY)) as chat:
        monkeypatch.setenv("OPENAI_BASE_URL", chat.url)
        main([*command, "--output", str(tmp_path / "good"), "--judge", "openai(model='gpt-4-0314')"])
        chat.script[:] = [Answer(400, f"bad key {CANARY}".encode())]
        with pytest.raises(SystemExit):
            main([*command, "--output", str(tmp_path / "bad"), "--judge", "openai(model='other', workers=1)"])
    assert {headers["Authorization"] for headers in chat.headers} == {f"Bearer {CANARY}"}
    shown = capfd.readouterr()
    assert "mmhal/0: " in shown.err and "bad key [key]" in shown.err and "4.0" in shown.out
    files = {path: path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in files} >= {"scores.json", "grades.jsonl", "judge-replies.jsonl", "evaluation.json"}
    assert [path for path, text in files.items() if CANARY in text] == [] and CANARY not in shown.err + shown.out


def test_two_judged_benchmarks_ask_one_judge_each_in_its_own_way(small_mmhal, small_llava, tmp_path):
    rows = [{"benchmark": "mmhal", "id": str(n), "answer": "A."} for n in range(16)]
    rows += [{"benchmark": "llava_bench", "id": str(n), "answer": "A."} for n in range(6)]
    answers = write_rows(tmp_path / "a.jsonl", rows)
    with serve(reply=lambda request: completion("9 8" if "max_tokens" in request else "Rating: 4")) as chat:
        scores = grade_answers(
            answers=answers,
            benchmarks=["mmhal", "llava_bench"],
            output=tmp_path / "out",
            data=small_mmhal,
            judge=f"openai(model='gpt', base_url='{chat.url}')",
            progress=False,
        )["benchmarks"]
    assert scores["mmhal"]["judge"]["decoding"] == {"temperature": 0.0}
    assert scores["llava_bench"]["judge"]["decoding"] == {"temperature": 0.2, "max_tokens": 1024}
    assert scores["mmhal"]["complete"] and scores["llava_bench"]["complete"]


def test_scores_of_different_judges_are_not_compared(small_mmhal, mmhal_answers, tmp_path):

    def judged(name: str, version: str, rating: int, **options):
        with serve(reply=lambda _: completion(f"Rating: {rating}", model=version)) as chat:
            spec = Spec("openai", {"model": "gpt-4", "base_url": chat.url, "cache": "none", **options})
            grade(mmhal_answers, "mmhal", small_mmhal, tmp_path, spec, name)
        return load_evaluation(tmp_path / name)

    base = judged("base", "gpt-4-0314", 4)
    (score, *_) = paired_differences(base, judged("same", "gpt-4-0314", 5), resamples=10)
    assert (score.metric, score.difference.value) == ("score", 1.0)
    assert base.judge("mmhal") == "gpt-4 (gpt-4-0314), temperature=0.0"
    for other in (judged("newer", "gpt-4-0613", 5), judged("warmer", "gpt-4-0314", 5, temperature=0.7)):
        assert paired_differences(base, other, resamples=10) == []
        reason = incomparable(base, other, "mmhal")
        assert reason.startswith("their judges differ (gpt-4 (gpt-4-0314), temperature=0.0; gpt-4 (")


def test_a_wrong_judge_is_reported_before_the_model_answers(small_mmhal, tmp_path):
    (small_mmhal / "mmhal/images").mkdir()
    for number in range(16):
        (small_mmhal / f"mmhal/images/{number}_o.jpg").touch()
    for judge, words in (("openai", "needs the name of a model"), ("opnai(model='m')", "Did you mean 'openai'")):
        with pytest.raises(UserError, match=words):
            evaluate(model="gone", benchmarks=["mmhal"], data=small_mmhal, judge=judge, output=tmp_path / "out", progress=False)


def test_a_judge_that_talks_nonsense_leaves_nothing_complete(small_mmhal, mmhal_answers, tmp_path):
    with serve(reply=lambda _: completion("Bananas.")) as chat:
        scores = grade(mmhal_answers, "mmhal", small_mmhal, tmp_path, f"openai(model='gpt', base_url='{chat.url}')")
    assert not scores["complete"] and scores["without_verdict"]["count"] == 16
    assert scores["metrics"]["score"]["value"] == 0 and scores["metrics"]["strict_score"]["value"] is None
    grades = [json.loads(line) for line in (tmp_path / "out/grades.jsonl").read_text().splitlines()]
    assert grades[0]["notes"] == {"reply": "Bananas.", "rating": 0, "strict_rating": None} and grades[0]["verdict"] is False


def test_a_judge_that_fails_halfway_leaves_no_scores_and_grading_resumes(small_mmhal, mmhal_answers, tmp_path):
    good = [completion("Rating: 4") for _ in range(5)]
    with serve(*good) as chat:  # then 418
        judge = f"openai(model='gpt', base_url='{chat.url}', workers=1)"
        with pytest.raises(UserError, match=r"mmhal/5: .*refuses the request"):
            grade(mmhal_answers, "mmhal", small_mmhal, tmp_path, judge)
        assert not (tmp_path / "out/scores.json").exists()
        chat.script[:] = [completion("Rating: 4") for _ in range(11)]
        assert grade(mmhal_answers, "mmhal", small_mmhal, tmp_path, judge)["complete"]


def test_a_bad_data_file_is_named(small_mmhal, small_llava):
    (small_mmhal / "mmhal/mmhal-bench_answer_template.json").write_text(json.dumps([mmhal_row(0), mmhal_row(1, gt_answer=3)]))
    with pytest.raises(UserError, match="row 2 needs the texts"):
        opened(mmhal.Benchmark(), small_mmhal, "mmhal")
    (small_llava / "llava_bench/answers_gpt4.jsonl").write_text('{"question_id": 0, "text": "Reference 0."}\n')
    with pytest.raises(UserError, match="row 2 has no reference"):
        opened(llava_bench.Benchmark(), small_llava, "llava_bench")


# ---- official results -----------------------------------------------------------------------------------------------------


def test_the_mmhal_prompt_is_the_official_one_byte_for_byte(official):
    items = opened(mmhal.Benchmark(), official / "data", "mmhal")
    for case in json.loads((official / "golden/mmhal/outputs/judge_prompts.json").read_text("utf-8")):
        assert mmhal.judge_messages(items[case["index"]], case["model_answer"]) == [{"role": "user", "content": case["prompt"]}]


def test_the_llava_bench_prompt_is_the_official_one_byte_for_byte(official):
    items = {item.id: item for item in opened(llava_bench.Benchmark(), official / "data", "llava_bench")}
    rows = (official / "data/llava_bench/answers/llava-v1.5-7b.jsonl").read_text("utf-8").splitlines()
    answers = {row["question_id"]: row["text"] for row in map(json.loads, rows)}
    for case in json.loads((official / "golden/llava_bench/outputs/judge_prompts_llava15_7b.json").read_text("utf-8")):
        number = case["question_id"]
        messages = llava_bench.judge_messages(items[str(number)], answers[number])
        assert [message["content"] for message in messages] == [case["system"], case["content"]]


def test_mmhal_prints_what_the_official_programs_print(official, tmp_path):
    golden = official / "golden/mmhal/outputs"
    rows = json.loads((official / "data/mmhal/mmhal-bench_answer_template.json").read_text("utf-8"))
    answers = write_rows(tmp_path / "a.jsonl", rows)  # the answers are empty: the recorded judge has its replies
    judge = f"recorded(file='{golden}/handmade_judge.mmhal_test_eval.json')"
    scores = grade(answers, "mmhal", official / "data", tmp_path, judge)
    printed = [f"{name}: {value}" for name, value in scores["official"].items()]
    assert len(printed) == 4
    assert set(printed[:3]) <= set((golden / "official_summarize_output.txt").read_text().splitlines())
    assert set(printed) <= set((golden / "rlhfv_summarize_output.txt").read_text().splitlines())
    assert scores["judge"]["name"] == "gpt-4-0314"
    assert scores["without_verdict"]["first"] == [str(n) for n in (3, 10)] + scores["without_verdict"]["first"][2:]


@pytest.mark.parametrize(
    ("answers", "review"),
    [
        ("llava-v1.5-7b", "llava-v1.5-7b-eval1"),
        ("llava-v1.5-7b", "llava-v1.5-7b-eval2"),
        ("llava-v1.5-7b", "llava-v1.5-7b-eval3"),
        ("Qwen2.5-VL-7B-Instruct-normal", "Qwen2.5-VL-7B-gpt4judge"),
    ],
)
def test_llava_bench_prints_what_the_official_program_prints(official, tmp_path, answers, review):
    data = official / "data"
    judge = f"recorded(file='{data}/llava_bench/reviews/{review}.jsonl', name='gpt-4-0314')"
    scores = grade(data / f"llava_bench/answers/{answers}.jsonl", "llava_bench", data, tmp_path, judge)
    summaries = (official / "golden/llava_bench/outputs/official_summaries.txt").read_text()
    expected = next(part for part in summaries.split(f"{'=' * 33}\n") if part.startswith(review + "\n"))
    assert [f"{name} {line}" for name, line in scores["official"].items()] == expected.splitlines()[1:]
    for name, line in scores["official"].items():
        metric = {"all": "score"}.get(name, name.replace("llava_bench", "score"))
        assert f"{scores['metrics'][metric]['value']:.1f}" == line.split()[0]


# ---- Object HalBench ------------------------------------------------------------------------------------------------------

SCRIPT = 'prompt_template = """Q: {question}\nA: {answer}\n"""\n'


@pytest.fixture
def small_halbench(tmp_path) -> Path:
    """Two photographs, of which a dog and a fire hydrant are known."""
    pytest.importorskip("nltk", reason="needs the extra 'eval'")
    pytest.importorskip("punkt", reason="needs the extra 'eval'")
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(
        folder / "object_halbench_300_prompts.jsonl",
        [{"id": str(n), "image_id": n, "question": f"Describe {n}."} for n in (1, 2, 3)],
    )
    (folder / "synonyms_refine.txt").write_text("dog, puppy\ncat, kitten\nfire hydrant, hydrant\nchair, seat\ntoilet\n")
    table = {"nodes": ["dog", "fire hydrant"], "images": {"1": [0, 1], "2": [0], "3": []}}
    with gzip.open(folder / "coco2014_gt_objects.wn.json.gz", "wt") as stream:
        json.dump(table, stream)
    (folder / "eval_gpt_obj_halbench.py").write_text(SCRIPT)
    return folder


class OneByOne:
    """Stands in for spaCy: lemmas by removing an s, tags by heart."""

    TAGS = {"a": "DT", "red": "JJ", "nice": "JJ"}

    def __init__(self, *_) -> None: ...

    def __call__(self, text):
        return [(word.removesuffix("s"), self.TAGS.get(word, "NN")) for word in text.split()]


def test_object_halbench_counts_each_object_that_the_judge_names_once(small_halbench, tmp_path, monkeypatch):
    monkeypatch.setattr("catpo.evaluation.benchmarks._extraction.tagger", lambda name, english: (OneByOne(), name))
    answers = write_rows(
        tmp_path / "a.jsonl",
        [
            {"image_id": 1, "text": "Assistant: A dog, dogs and a red fire hydrant."},
            {"image_id": 2, "text": "One kitten sits there."},
            {"image_id": 3, "text": "There is a nice cat."},
        ],
    )
    named = {"1": '["dogs", "puppy", "dog", "red fire hydrants"]', "2": '["kitten", "nice toilet", "seat"]', "3": "A cat."}
    asked = []

    def reply(request):
        (message,) = request["messages"]
        asked.append(message)
        return completion(named[message["content"].split(".")[0][-1]])

    with serve(reply=reply) as chat:
        judge = f"openai(model='gpt-3.5-turbo-0613', base_url='{chat.url}')"
        scores = grade(answers, "object_halbench(extraction='judge')", small_halbench, tmp_path, judge)
    assert {"role": "system", "content": "Q: Describe 1.\nA: A dog, dogs and a red fire hydrant.\n"} in asked
    assert len(asked) == 2 + 3  # the third reply cannot be read
    assert scores["judge"]["decoding"] == {"temperature": 0.2, "max_tokens": 512}
    values = {name: figure["value"] for name, figure in scores["metrics"].items()}
    # photograph 1: dog, puppy and hydrant, all there (unique words, not classes); 2: kitten and toilet absent; 3: no verdict
    assert values["object_hallucination"] == pytest.approx(100 * 2 / 5)
    assert values["response_hallucination"] == pytest.approx(100 * 1 / 2)
    assert not scores["complete"] and scores["without_verdict"] == {
        "count": 1, "first": ["3"], "reply": "A cat.", "form": object_halbench.Benchmark.judge_form,
    }  # fmt: skip
    assert scores["tools"]["nouns"] == "spacy"


def test_object_halbench_reports_what_the_judge_mode_lacks(small_halbench):
    benchmark = object_halbench.Benchmark(extraction="judge")
    if importlib.util.find_spec("spacy") is None:
        with pytest.raises(UserError, match=r"en_core_web_trf.*nouns='nltk'"):
            opened(benchmark, small_halbench, "object_halbench")
    (small_halbench / "eval_gpt_obj_halbench.py").unlink()
    with pytest.raises(UserError, match=r"eval_gpt_obj_halbench\.py is not in"):
        opened(benchmark, small_halbench, "object_halbench")
