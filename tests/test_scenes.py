"""Built-in pictures: exact truth, the same everywhere, and drawn as the truth says."""

import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from catpo.core.errors import UserError
from catpo.data.datasets.scenes import PROMPTS, Dataset, truth
from catpo.data.scenes.captions import true_caption, web_caption
from catpo.data.scenes.draw import draw, encode
from catpo.data.scenes.plan import CANVAS, MAX_OBJECTS, scene
from catpo.data.scenes.questions import SPLITS
from catpo.text.object_words import classes, contexts, mentions


@pytest.fixture(scope="module")
def samples():
    return list(Dataset(count=100, split="test").samples())


def named(text):
    return {mention.object for mention in mentions(text)}


def test_references_name_exactly_what_is_present(samples):
    for sample in samples:
        assert named(sample.references[0]) == set(sample.truth["present"]), sample.id


def test_captions_have_15_to_65_words_and_vary(samples):
    lengths = [len(sample.references[0].split()) for sample in samples]
    assert min(lengths) >= 15 and max(lengths) <= 65
    assert len({sample.references[0] for sample in samples}) == len(samples)


def test_numbers_and_relations_in_true_captions_are_true():
    sides = {"left": "to the left of", "right": "to the right of"}
    for index in range(200):
        planned = scene(split="test", seed=3, index=index)
        caption = true_caption(planned, random.Random(index))
        for name, count in planned.counts.items():
            if count > 1:
                assert classes()[name].phrase(count) in caption.lower()
        if len(planned.present) == 2 and any(word in caption for word in sides.values()):
            first, second = (mentions(caption)[i].object for i in (0, 1))
            centre = {n: sum(b[0] + b[2] for b in boxes) / len(boxes) for n, boxes in planned.boxes.items()}
            is_left = sides["left"] in caption.lower()
            other = caption.split(". ", 1)[1]
            subject = _subject(other, {first, second})
            anchor = ({*planned.present} - {subject}).pop()
            assert (centre[subject] < centre[anchor]) == is_left


def _subject(sentence, names):
    """The object that a sentence introduces: the one without "the" before it."""
    for mention in mentions(sentence):
        if not sentence[: mention.start].lower().endswith("the "):
            definite = classes()[mention.object].one.split(" ", 1)[1]
            if f"the {definite}" not in sentence.lower():
                return mention.object
    raise AssertionError(sentence)


def test_web_captions_name_tempting_absent_objects_like_present_ones():
    rng = random.Random(0)
    tempted_captions = named_count = first_count = before_last_count = 0
    for index in range(200):
        planned = scene(split="test", seed=0, index=index)
        introduced = list(dict.fromkeys(mention.object for mention in mentions(web_caption(planned, rng))))
        absent = [name for name in introduced if name not in planned.boxes]
        assert set(absent) <= set(planned.tempting)
        tempted_captions += bool(absent)
        named_count += len(absent)
        first_count += planned.tempting[0] in absent
        before_last_count += any(name in absent for name in introduced[:-1])
    assert 120 < tempted_captions < 190
    assert first_count > 0.7 * named_count  # a peaked prior, so that greedy decoding is tempted too
    assert before_last_count > 60


def test_truth_is_consistent(samples):
    for sample in samples:
        facts = sample.truth
        assert set(facts["present"]) == set(facts["counts"]) == set(facts["boxes"])
        assert 2 <= sum(facts["counts"].values()) <= MAX_OBJECTS
        assert facts["counts"] == {name: len(boxes) for name, boxes in facts["boxes"].items()}
        assert not set(facts["tempting"]) & set(facts["present"])
        assert set(facts["tempting"]) <= set(contexts()[facts["context"]])
        for box in (box for boxes in facts["boxes"].values() for box in boxes):
            assert 0 <= box[0] < box[2] <= CANVAS and 0 <= box[1] < box[3] <= CANVAS
        json.dumps(facts)


def test_questions_are_true_and_balanced_in_each_split(samples):
    for sample in samples:
        for split in SPLITS:
            rows = [row for row in sample.truth["questions"] if row["split"] == split]
            assert sum(row["answer"] == "yes" for row in rows) * 2 == len(rows) > 0
            for row in rows:
                asked = mentions(row["question"])[0].object
                assert (asked in sample.truth["present"]) == (row["answer"] == "yes")
                if split == "adversarial" and row["answer"] == "no":
                    assert asked in sample.truth["tempting"][:3]


def test_a_scene_is_the_same_on_every_machine():
    facts = truth(scene(split="test", seed=0, index=12))
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    assert digest == "f208dfc285df3b1f"


def test_a_scene_does_not_depend_on_how_many_are_asked_for():
    few, many = Dataset(count=3, seed=5), Dataset(count=30, seed=5)
    for one, other in zip(few.samples(), many.samples(), strict=False):
        assert (one.id, one.truth, one.references) == (other.id, other.truth, other.references)
        assert one.images[0].read() == other.images[0].read()
    assert next(Dataset(start=2, seed=5).samples()).id == [*few.samples()][2].id


def test_splits_and_seeds_share_no_scene():
    streams = [Dataset(count=60, split=split, seed=seed) for split in ("train", "test") for seed in (0, 1)]
    boxes = [json.dumps(sample.truth["boxes"], sort_keys=True) for stream in streams for sample in stream.samples()]
    assert len(set(boxes)) == len(boxes)


def test_the_picture_shows_the_objects_where_the_truth_says(samples):
    for sample in samples[:20]:
        planned = sample.images[0].scene
        empty = type(planned)(planned.key, planned.context, ())
        differs = (np.asarray(draw(planned)) != np.asarray(draw(empty))).any(-1)
        outside = differs.copy()
        for x0, y0, x1, y1 in (box for boxes in sample.truth["boxes"].values() for box in boxes):
            assert differs[y0:y1, x0:x1].mean() > 0.15
            outside[y0:y1, x0:x1] = False
        assert not outside.any()


def test_pictures_come_in_the_size_asked_for():
    sample = next(Dataset(size=50).samples())
    assert sample.images[0].open().size == (50, 50)
    assert sample.images[0].open().mode == "RGB"


def test_prompts_take_turns():
    prompts = [sample.prompt for sample in Dataset(count=6, prompts=3).samples()]
    assert prompts == [*PROMPTS, *PROMPTS]
    assert {sample.prompt for sample in Dataset(count=6).samples()} == {"Describe the image."}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"count": 0}, "count=0"),
        ({"count": True}, "count=True"),
        ({"split": "tset"}, "Did you mean 'test'?"),
        ({"size": 4}, "16 to 1024"),
        ({"source": "photos"}, "photos"),
        ({"prompts": 9}, "1 to 3"),
    ],
)
def test_impossible_options_are_refused_by_name(options, part):
    with pytest.raises(UserError) as error:
        Dataset(**options)
    assert part in str(error.value)


def test_scenes_need_no_torch():
    code = "import sys, catpo.data.datasets.scenes as s; next(s.Dataset().samples()).images[0].open(); "
    code += "exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size", [48, CANVAS, 2 * CANVAS])
def test_a_picture_that_several_models_look_at_is_drawn_once_if_it_is_small(size: int) -> None:
    first, second = (next(Dataset(count=1, size=size).samples()).images[0] for _ in range(2))
    plainly = encode(draw(scene(split="train", seed=0, index=0), size=size))
    assert first.read() == second.read() == plainly
    assert (first.read() is second.read()) == (size <= CANVAS)
