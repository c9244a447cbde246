"""`catpo detect`: every object word is judged as if it were asked alone, whatever the batch; what cannot be read is refused."""

from __future__ import annotations

import json
import math
import random
import re

import pytest

import tiny
from catpo.cli.detect import marked
from catpo.config.options import DetectOptions
from catpo.core.errors import UserError
from catpo.data.read import open_data
from catpo.models import loading
from catpo.models.questions import yes_less_no
from catpo.models.steering import open_decoding
from catpo.reporting.detections import doubted_words, doubtful_first, parts
from catpo.rewards.word_rewards import Probe
from catpo.scoring.answer_words import WordJudge
from catpo.scoring.claims import Asker
from catpo.scoring.detect import chosen_asker, detect, judged_by_truth
from catpo.text.object_words import classes, default_vocabulary
from commands import run

SCENES = "scenes(count=3, seed=5, split='test')"


@pytest.fixture(scope="module")
def family(builtin):
    return loading.load(builtin, device="cpu")


@pytest.fixture
def pictures(tmp_path):
    """Three pictures with captions beside them, and a file that is no picture."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.PNG", "more/c.png")):
        (folder / name).write_bytes(tiny.picture(number).read())
    (folder / "notes.txt").write_text("hello")
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "words.jsonl").read_text().splitlines()]


def found(family, output, **options):
    return detect(**{"model": family, "output": output, "progress": False, "max_new_tokens": 16, "batch_size": 2} | options)


@pytest.fixture(scope="module")
def whole(family, tmp_path_factory):
    return found(family, tmp_path_factory.mktemp("detect") / "whole", data=SCENES, truth=True)


def test_each_word_is_judged_as_if_it_were_asked_alone(family, whole):
    samples = list(open_data(SCENES).samples())
    for sample, answer, row in zip(samples, family.generate(samples, max_new_tokens=16), whole.rows, strict=True):
        assert (row["text"], row["picture"]) == (answer, sample.images[0].name)
        questions = []
        for word in row["words"]:
            assert word["in_picture"] == (word["object"] in sample.truth["present"])
            assert default_vocabulary()[answer[word["start"] : word["end"]].lower()] == word["object"]
            assert word["grounded"] == pytest.approx(1 / (1 + math.exp(-word["logit"])), abs=1e-5)
            questions.append(f"Is there {classes()[word['object']].one} in the image?")
        [alone] = yes_less_no(family, [(sample.images, questions)])
        assert questions and [word["logit"] for word in row["words"]] == pytest.approx(alone, abs=1e-3)


def test_a_killed_run_goes_on_and_other_options_are_refused(family, whole, tmp_path, capsys):
    part, text = tmp_path / "part", (whole.path / "words.jsonl").read_bytes()
    part.mkdir()
    lines = text.splitlines(keepends=True)
    about = json.loads((whole.path / "detect.json").read_text())
    (part / "words.jsonl").write_bytes(lines[0] + lines[1] + lines[2][:20])
    (part / "detect.json").write_text(json.dumps({"format": 1, "settings": about["settings"], "complete": False}))
    again = found(family, part, data=SCENES, truth=True)
    assert (part / "words.jsonl").read_bytes() == text and again.about["auroc"] == about["auroc"]
    found(family, part, data=SCENES, truth=True)
    assert "is complete already" in capsys.readouterr().err
    with pytest.raises(UserError, match="was begun with question='Is there {} in the image.', now it is 'Can you see"):
        found(family, part, data=SCENES, truth=True, question="Can you see {}?")
    with pytest.raises(UserError, match="was begun with items="):
        found(family, part, data="scenes(count=2, seed=5, split='test')", truth=True)


def test_captions_of_a_file_are_judged_and_shown_with_marks_and_a_page(family, pictures, tmp_path, capsys):
    captions = pictures / "captions.jsonl"
    evil = "A dog\x1b[31m and <script>alert(1)</script> two CATS."
    captions.write_text("".join(json.dumps(row) + "\n" for row in [
        {"image": "b.png", "caption": "A kite near a dog."}, {"image": "more/c.png", "caption": evil},
    ]))  # fmt: skip
    out = tmp_path / "out"
    given = ["detect", "--model", "builtin", "--images", pictures, "--captions", captions, "--output", out, "--no-progress"]
    assert run(*given) == 0
    told = capsys.readouterr().out
    assert told.startswith(("more/c.png\n", "b.png\n"))
    assert re.search(r"kite[✓✗]\(\d\.\d\d\) near a dog[✓✗]\(\d\.\d\d\)\.", told) and "\x1b" not in told
    assert [[word["object"] for word in row["words"]] for row in rows(out)] == [["kite", "dog"], ["dog", "cat"]]
    page = (out / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and page.count("data:image/webp") == 2
    assert "http" not in re.sub(r'http-equiv="', "", page)
    (out / "report.html").write_text("mine")
    assert run(*given) == 2 and (out / "report.html").read_text() == "mine"
    captions.write_text(json.dumps({"image": "b.png"}) + "\n")
    assert run(*given[:-2], tmp_path / "none") == 2
    assert "captions.jsonl:1: field 'caption' is missing" in capsys.readouterr().err


def test_what_cannot_be_judged_is_refused_by_name(family, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is empty\. Give the folder"):
        found(family, out, images=tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"empty holds no picture .*, but 1 other file\."):
        found(family, out, images=tmp_path / "empty")
    with pytest.raises(UserError, match="is neither a folder nor a picture"):
        found(family, out, images=tmp_path / "missing")
    with pytest.raises(UserError, match="Give pictures, either as --images"):
        found(family, out)
    with pytest.raises(UserError, match="give --data, e.g. scenes.count=300., or --captions whose rows have a truth"):
        found(family, out, images=pictures, truth=True)
    with pytest.raises(UserError, match="a server does not tell"):
        detect(model="openai:gpt", output=out, images=pictures)
    with pytest.raises(UserError, match=r"question='Is {} there\?' is for objects, of which kinds=counts asks nothing"):
        found(family, out, images=pictures, question="Is {} there?", kinds="counts")
    with pytest.raises(UserError, match="write {} where the word goes"):
        found(family, out, images=pictures, question="Is it?")
    (pictures / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="picture 'bad.jpg' is not a picture"):
        found(family, out, images=pictures)
    assert not out.exists()
    detection = found(family, out, images=pictures, on_error="skip")
    assert [row["picture"] for row in detection.rows] == ["a.PNG", "b.png", "more/c.png"]
    assert "1 of 4 skipped" in capsys.readouterr().err
    (pictures / "out.png").symlink_to(tmp_path / "empty")
    with pytest.raises(UserError, match=r"out\.png leads out of"):
        found(family, tmp_path / "other", images=pictures)


def test_rows_that_cannot_be_read_are_skipped_where_that_is_said(family, pictures, tmp_path):
    good, missing = {"image": "b.png", "caption": "A kite."}, {"image": "nowhere.png", "caption": "A dog."}
    captions, data = pictures / "captions.jsonl", pictures / "data.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in (["no row"], missing, good)))
    data.write_text(captions.read_text().replace("caption", "prompt"))
    for name, given in (("captions", {"images": pictures, "captions": captions}), ("data", {"data": str(data)})):
        with pytest.raises(UserError, match=f"{name}.jsonl:1"):
            found(family, tmp_path / name, **given)
        out = found(family, tmp_path / name, on_error="skip", max_new_tokens=1, **given)
        assert [row["picture"].split()[0] for row in out.rows] == ["b.png"]
        assert len((tmp_path / name / "skipped.jsonl").read_text().splitlines()) == 2


def test_a_probe_judges_by_what_it_reads(family, whole, tmp_path):
    samples, texts = list(open_data(SCENES).samples()), [row["text"] for row in whole.rows]
    of_question = Probe(("self_question",), (0.0,), (2.0,), (3.0,), 1.0)
    judged = WordJudge(family, Asker.of("builtin", ("objects",), {}), of_question, 2).words(samples, texts)
    asked = [word["logit"] for row in whole.rows for word in row["words"]]
    assert [word.logit for words in judged for word in words] == pytest.approx([1.5 * each + 1 for each in asked], abs=1e-3)
    of_writing = Probe(("self_question", "log_prob"), (0.0, 0.0), (1.0, 1.0), (0.0, 1.0), 0.0)
    judged = WordJudge(family, Asker.of("textblob", ("objects",), {}), of_writing, 2).words(samples, texts)
    known = [word.logit for words in judged for word in words if word.logit is not None]
    assert known and all(logit <= 0 for logit in known)  # log-probs


def test_things_outside_the_vocabulary_are_found_by_a_tagger_with_what_is_said_of_them(family, pictures, tmp_path, capsys):
    captions = pictures / "captions.jsonl"
    captions.write_text(json.dumps({"image": "b.png", "caption": "A brown zebra by the fence near a dog."}) + "\n")
    given = {"images": pictures, "captions": captions, "kinds": "objects, attributes"}
    out = found(family, tmp_path / "out", nouns="textblob", **given)
    assert "words are found with textblob." in capsys.readouterr().err
    text, words = out.rows[0]["text"], out.rows[0]["words"]
    said = [(text[word["start"] : word["end"]], word["object"], word["question"]) for word in words]
    assert said == [
        ("brown", "zebra", "Is the zebra brown?"),
        ("zebra", "zebra", "Is there a zebra in the image?"),
        ("fence", "fence", "Is there a fence in the image?"),
        ("dog", "dog", "Is there a dog in the image?"),
    ]
    [alone] = yes_less_no(family, [([tiny.picture(0)], [question for *_, question in said])])
    assert [word["logit"] for word in words] == pytest.approx(alone, abs=1e-3)
    assert {word for word, *_ in doubted_words(out.rows, 0.5)} == {"Is the zebra brown?", "zebra", "fence", "dog"}
    with pytest.raises(UserError, match="was begun with nouns='textblob', now it is 'builtin'"):
        found(family, tmp_path / "out", nouns="builtin", images=pictures, captions=captions)
    with pytest.raises(UserError, match="knows no adjectives"):
        found(family, tmp_path / "none", nouns="builtin", **given)
    with pytest.raises(UserError, match="a probe judges objects only"):
        found(family, tmp_path / "none", probe=tmp_path / "probe.json", **given)
    with pytest.raises(UserError, match="the captions are given, nothing is decoded"):
        found(family, tmp_path / "none", decoding="vcd", images=pictures, captions=captions)


def test_the_finder_is_what_knows_the_words_of_the_model_and_the_data(family, whole, tmp_path):
    asked_of = lambda family, **options: chosen_asker(
        DetectOptions(**{"model": "m", "output": tmp_path} | options), family, None
    )
    assert whole.about["settings"]["nouns"] == "data"  # scenes(…) has words of its own
    assert asked_of(family).nouns == "builtin" and asked_of(tiny.llava(), truth=True).nouns == "builtin"
    assert asked_of(tiny.llava()).nouns == "auto" and asked_of(family, nouns="textblob").nouns == "textblob"


def test_answers_are_decoded_as_is_said_and_the_folder_says_how(family, tmp_path):
    decoding = "tilt(reward='self_question')"
    out = found(family, tmp_path / "out", data=SCENES, limit=1, decoding=decoding)
    sample = next(iter(open_data(SCENES).samples()))
    assert [out.rows[0]["text"]] == family.generate([sample], max_new_tokens=16, decoding=open_decoding(decoding))
    assert out.about["settings"]["decoding"]["steered"]["name"] == "tilt"
    with pytest.raises(UserError, match="was begun with"):
        found(family, tmp_path / "out", data=SCENES, limit=1)


def test_marks_parts_and_counts_agree():
    words = [
        {"start": 2, "end": 5, "object": "dog", "logit": -1.0, "grounded": 0.27},
        {"start": 12, "end": 15, "object": "cat", "logit": 2.0, "grounded": 0.88},
        {"start": 22, "end": 25, "object": "emu", "logit": None, "grounded": None},
    ]
    row = {"picture": "p", "text": "A dog and a cat and a emu.", "words": words}
    assert marked(row, 0.5).plain == "p\nA dog✗(0.27) and a cat✓(0.88) and a emu.\n"
    assert "".join(part.text for part in parts(row, 0.5)) == row["text"]
    assert [part.text for part in parts(row, 0.9) if part.is_doubtful] == ["dog", "cat"]
    assert doubted_words([row, row], 0.5) == [("dog", 2, 2), ("cat", 2, 0)]
    assert doubtful_first([{**row, "words": []}, row], 0.5) == [1, 0]
    for word, is_there in zip(words, (False, True, False), strict=True):
        word["in_picture"] = is_there
    assert judged_by_truth([row]) == {"value": 1.0, "low": 1.0, "high": 1.0, "in_picture": 1, "not_in_picture": 1}
    assert judged_by_truth([])["value"] is None


def test_auroc_is_over_each_object_of_a_text_once():
    chance = random.Random(0)
    made = []
    for _ in range(6):
        names = chance.choices("abcd", k=5)
        logits = {name: chance.choice((-1.0, 0.5, 2.0)) for name in names}
        present = {name: chance.random() < 0.6 for name in names}
        made.append({"words": [{"object": n, "logit": logits[n], "in_picture": present[n]} for n in names]})
    once = [(w["logit"], w["in_picture"]) for row in made for w in {w["object"]: w for w in row["words"]}.values()]
    yes, no = ([logit for logit, is_there in once if is_there == side] for side in (True, False))
    wins = sum((good > bad) + (good == bad) / 2 for good in yes for bad in no)  # the definition of AUROC
    found = judged_by_truth(made)
    assert found["value"] == pytest.approx(wins / (len(yes) * len(no))) and found["low"] <= found["value"] <= found["high"]
    assert (found["in_picture"], found["not_in_picture"]) == (len(yes), len(no))
