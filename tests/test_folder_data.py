"""Data sets opened by name or path, and folders of pictures and texts: what is read, and what is refused and how."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from catpo.core.errors import UserError
from catpo.core.types import Picture, PreferencePair, Span, pair_id
from catpo.data.datasets.folder import Dataset
from catpo.data.pair_folder import write_pairs
from catpo.data.read import open_data

PAIR = {"image": "a.png", "prompt": "What is it?", "chosen": "A dog.", "rejected": "A cat."}
SAMPLE = {"image": "a.png", "references": ["A dog on a beach."], "truth": {"present": ["dog"]}}


def paint(path, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A function that writes rows (objects or raw lines) into a folder with two pictures."""
    root = tmp_path / "data"
    paint(root / "a.png")
    paint(root / "sub" / "b.jpg", (0, 90, 0))

    def write(*rows, name="data.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (root / name).write_bytes(b"\n".join(lines) + b"\n")
        return root

    return write


def test_rows_with_chosen_and_rejected_are_pairs_and_the_others_samples(folder):
    root = folder({**PAIR, "source": "web", "meta": {"k": 1}}, SAMPLE, b"", {"images": ["a.png", "sub/b.jpg"], "id": 7})
    data = open_data(root)
    (pair,) = data.pairs()
    assert (pair.prompt, pair.chosen, pair.rejected) == ("What is it?", "A dog.", "A cat.")
    assert pair.meta == {"k": 1, "source": "web"}
    assert pair.id == pair_id(pair.images, pair.prompt, pair.chosen, pair.rejected)
    first, second = data.samples()
    assert (first.id, first.prompt, first.references) == ("2", "Describe the image.", ("A dog on a beach.",))
    assert first.truth == {"present": ["dog"]}
    assert (second.id, [image.open().size for image in second.images]) == ("7", [(8, 6), (8, 6)])


def test_options_limit_rows_and_give_a_prompt(folder):
    root = folder(SAMPLE, {**SAMPLE, "prompt": "Own."}, SAMPLE)
    samples = list(open_data(f"folder(source={str(root)!r}, limit=2, prompt='Say it.')").samples())
    assert [sample.prompt for sample in samples] == ["Say it.", "Own."]


def test_a_file_can_be_given_directly_and_may_have_a_byte_order_mark(folder):
    root = folder(b"\xef\xbb\xbf" + json.dumps(SAMPLE).encode(), name="mine.jsonl")
    assert len(list(open_data(root).samples())) == 1
    folder(SAMPLE, SAMPLE, name="other.jsonl")
    assert len(list(open_data(root / "other.jsonl").samples())) == 2
    with pytest.raises(UserError, match=r"2 \.jsonl files"):
        open_data(root)


def test_a_picture_is_opened_late_and_a_broken_one_is_named_with_its_line(folder):
    root = folder(SAMPLE, {**SAMPLE, "image": "broken.png"})
    (root / "broken.png").write_bytes(b"not a picture")
    broken = list(open_data(root).samples())[1]
    with pytest.raises(UserError, match=r"broken\.png .*data\.jsonl:2"):
        broken.images[0].open()


def test_a_vocabulary_file_replaces_the_built_in_words(folder):
    root = folder(SAMPLE)
    assert open_data(root).vocabulary is None
    (root / "vocabulary.json").write_text('{"puppies": "dog"}')
    assert open_data(root).vocabulary == {"puppies": "dog"}
    (root / "vocabulary.json").write_text('{"puppies": 3}')
    with pytest.raises(UserError, match="must map words to objects"):
        open_data(root)


def test_a_folder_without_pairs_or_samples_says_what_to_do(folder):
    with pytest.raises(UserError, match="catpo pair"):
        list(open_data(folder(SAMPLE)).pairs())
    with pytest.raises(UserError, match="catpo score"):
        list(open_data(folder(PAIR)).samples())


BAD_ROWS = [
    (b'{"image": "a.png", ', "", "not valid JSON"),
    (b"[" * 100_000, "", "not valid JSON"),
    (b"[1]", "", "must be a JSON object, not a list"),
    (b'{"image": "\xff"}', "", "not UTF-8"),
    ({"prompt": "p"}, "image", "must be given"),
    ({**PAIR, "images": ["a.png"]}, "image", "not both"),
    ({"images": []}, "images", "at least one"),
    ({"images": "a.png"}, "images", "must be a list"),
    ({"images": ["a.png", 3]}, "images", "not int"),
    ({"image": "none.png"}, "image", "is not a file"),
    ({"image": "../secret.png"}, "image", "leaves the folder"),
    ({"image": "sub/../../secret.png"}, "image", "leaves the folder"),
    ({"image": "/etc/passwd"}, "image", "leaves the folder"),
    ({"image": "C:\\x.png"}, "image", "leaves the folder"),
    ({"image": "..\\x.png"}, "image", "leaves the folder"),
    ({"image": "a\x00.png"}, "image", "not a usable path"),
    ({"image": "a" * 5000}, "image", "not a usable path"),
    ({**PAIR, "prompt": 3}, "prompt", "must be a text, not int"),
    ({**PAIR, "prompt": "  "}, "prompt", "is empty"),
    ({**PAIR, "chosen": " \n"}, "chosen", "is empty"),
    ({**PAIR, "chosen": None}, "chosen", "is missing"),
    ({**PAIR, "chosen": "\ud800"}, "chosen", "lone surrogate"),
    ({"image": "a.png", "chosen": "x"}, "chosen", "stands without 'rejected'"),
    ({**PAIR, "rejected": "A dog. "}, "", "same text"),
    ({**PAIR, "id": True}, "id", "must be a text"),
    ({**PAIR, "meta": []}, "meta", "must be an object"),
    ({**PAIR, "labels": {"chosen": [[2, 5]]}}, "labels.chosen", "not \\[start, end, label\\]"),
    ({**PAIR, "labels": {"chosen": [[2, 99, "grounded"]]}}, "labels.chosen", "does not lie inside"),
    ({**PAIR, "labels": {"rejected": [[2, 5, "good"]]}}, "labels.rejected", "a label is"),
    ({**PAIR, "labels": {"rejected": 3}}, "labels.rejected", "must be a list"),
    ({**SAMPLE, "references": "A dog."}, "references", "must be a list"),
    ({**SAMPLE, "truth": {"present": "dog"}}, "truth.present", "list of object names"),
    ({"image": "a.png", "refrences": ["A dog."]}, "refrences", "Did you mean 'references'"),
]


@pytest.mark.parametrize(("row", "field", "message"), BAD_ROWS)
def test_a_bad_row_is_refused_with_file_line_and_field(folder, row, field, message):
    with pytest.raises(UserError, match=message) as raised:
        open_data(folder(SAMPLE, row))
    assert "data.jsonl:2" in str(raised.value)
    assert f"'{field}'" in str(raised.value) or not field


def test_the_same_id_twice_is_refused(folder):
    with pytest.raises(UserError, match=r"data\.jsonl:3.*that of line 1"):
        open_data(folder({**SAMPLE, "id": "x"}, SAMPLE, {**SAMPLE, "id": "x"}))


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_followed(folder, tmp_path):
    root = folder({"image": "inner.png"})
    os.symlink(root / "sub" / "b.jpg", root / "inner.png")
    assert len(list(open_data(root).samples())) == 1
    os.symlink(paint(tmp_path / "secret.png"), root / "outer.png")
    with pytest.raises(UserError, match="leads out of the folder"):
        open_data(folder({"image": "outer.png"}))
    os.symlink(tmp_path, root / "up")
    with pytest.raises(UserError, match="leads out of the folder"):
        open_data(folder({"image": "up/secret.png"}))
    os.symlink(root / "loop.png", root / "loop.png")
    with pytest.raises(UserError, match=r"data\.jsonl:1"):
        open_data(folder({"image": "loop.png"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scene(count=2)", "Did you mean 'scenes'"),
        ("scenes(cuont=2)", "Did you mean 'count'"),
        ("scenes(count=2", "not of the form"),
        ("scenes(source='x')", "drawn, not read"),
        ("folder(source=3)", "path in quotes"),
        ("folder", "needs a place"),
        ("folder(source='.', limit=0)", "1 or more"),
        ("no/such/place", "does not exist"),
    ],
)
def test_a_wrong_name_or_option_says_what_to_do(text, message):
    with pytest.raises(UserError, match=message):
        open_data(text)


def test_an_empty_file_and_an_empty_folder_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="holds no rows"):
        open_data(folder(b""))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no \.jsonl file"):
        open_data(tmp_path / "none")


def test_written_pairs_are_read_back_the_same_and_each_picture_is_stored_once(tmp_path):
    picture = Picture(path=paint(tmp_path / "in" / "a.jpg"))
    labels = {"chosen": (Span(2, 5, "grounded"),), "rejected": (Span(2, 5, "hallucinated"),)}
    pairs = [
        PreferencePair(pair_id((picture,), p, "A dog.", "A cat."), (picture,), p, "A dog.", "A cat.", labels, {"n": p})
        for p in "xy"
    ]
    write_pairs(tmp_path / "out", pairs, {"method": "by hand"})
    read = list(open_data(tmp_path / "out").pairs())
    assert [(p.id, p.prompt, p.chosen, p.rejected, p.labels, p.meta) for p in read] == [
        (p.id, p.prompt, p.chosen, p.rejected, p.labels, p.meta) for p in pairs
    ]
    assert {p.images[0].digest() for p in read} == {picture.digest()}
    assert [path.suffix for path in (tmp_path / "out" / "images").iterdir()] == [".jpg"]
    with pytest.raises(UserError, match="holds pairs already"):
        write_pairs(tmp_path / "out", pairs, {})


def test_an_unfinished_pairs_folder_is_refused(tmp_path):
    picture = Picture(path=paint(tmp_path / "in" / "a.png"))
    write_pairs(tmp_path / "out", [PreferencePair("1", (picture,), "p", "A dog.", "A cat.")], {})
    (tmp_path / "out" / "pairs.json").write_text('{"complete": false}')
    with pytest.raises(UserError, match="not finished"):
        Dataset(tmp_path / "out")
