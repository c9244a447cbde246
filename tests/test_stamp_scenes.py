"""Scenes of cut-outs hold what their captions are made from."""

import json
import random
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import make_stamp_scenes as made

from catpo.data.read import open_data

NAMES = {"birds": ["crow", "owl", "duck", "lark", "rhea"], "food": ["yam", "onion", "mango", "pecan", "walnut"]}


def test_a_companion_is_likelier_and_what_is_there_is_not_drawn_again():
    weights = made.weighted(NAMES["birds"], ["duck"])
    assert weights == {"crow": 1.0, "owl": 2**-0.5, "lark": 4 * 4**-0.5, "rhea": 5**-0.5}
    assert made.weighted(NAMES["birds"], ["rhea"])["lark"] == 0.5


def test_captions_name_things_in_reading_order_and_at_most_one_that_is_absent():
    planned, rng = made.Scene(("owl", "crow", "duck"), "lark"), random.Random(0)
    texts = [made.caption(planned, rng) for _ in range(300)]
    named = [
        [word for word in text.lower().replace(",", "").replace(".", "").split() if word in NAMES["birds"]] for text in texts
    ]
    assert all(
        [name for name in names if name != "lark"] == sorted({*names} - {"lark"}, key=planned.things.index) for names in named
    )
    assert 0.6 < sum("lark" in names for names in named) / 300 < 0.8
    assert "An owl, a crow and a duck." in texts


def test_only_folders_of_the_stamps_say_of_which_kind_a_thing_is(tmp_path):
    root = tmp_path / "symbols" / "food"
    for name in ("clothes/sock", "food/yam", "symbols/clef"):
        file = root / f"{name}.png"
        file.parent.mkdir(parents=True)
        file.touch()
        file.with_suffix(".txt").write_text(f"A {file.stem}.\n")
    files = made.stamps(root)
    assert {*files} == {"sock", "yam"}
    assert [made.named_in(root / kind, files, 0) for kind in ("clothes", "food")] == [["sock"], ["yam"]]


def test_the_folder_is_read_by_catpo(tmp_path):
    files = {}
    for names in NAMES.values():
        for name in names:
            files[name] = tmp_path / f"{name}.png"
            Image.new("RGBA", (30, 20), "red").save(files[name])
            files[name].with_suffix(".txt").write_text(f"A {name}.\n")
    assert made.stamps(tmp_path) == files
    made.write(tmp_path / "out", 5, NAMES, files, random.Random(1))
    samples = list(open_data(tmp_path / "out").samples())
    rows = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    assert [list(sample.truth["present"]) for sample in samples] == [row["truth"]["present"] for row in rows]
    assert all(1 <= len(row["truth"]["present"]) < 5 for row in rows)
