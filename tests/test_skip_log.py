"""`--on-error skip` leaves out rows that cannot be used, counts and lists them; `stop` is the default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from catpo.core.errors import UserError
from catpo.data import read
from catpo.files.json_files import read_json, read_rows
from catpo.rewards.store import RewardStore
from catpo.runtime.skip_log import SkipLog
from commands import run
from hostile_place import PAIR, SAMPLE, encoded


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def write(*rows: dict[str, Any]) -> None:
    Path("data").mkdir()
    Path("data/a.png").write_bytes(encoded())
    Path("data/broken.png").write_bytes(encoded()[:-30])
    Path("data/data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def good(number: int) -> dict[str, Any]:
    return {**PAIR, "id": f"good-{number}", "rejected": f"{number} cats."}


BAD = [
    {**PAIR, "chosen": ""},
    {**PAIR, "image": "../a.png"},
    {**PAIR, "id": "good-0"},
    {**PAIR, "id": "broken", "image": "broken.png"},
    {**PAIR, "id": "token", "rejected": "A cat.</s>"},
    {**PAIR, "id": "long", "chosen": "A dog sits. " * 500},
]
REASONS = [
    ("data.jsonl:2", "'chosen' is empty"),
    ("data.jsonl:3", "leaves the folder"),
    ("data.jsonl:4", "id 'good-0'"),
    ("pair broken", "is not a picture"),
    ("pair token", "special token"),
    ("pair long", "tokens"),
]


def check(summary: dict[str, Any], folder: str, *, of: int) -> None:
    assert (summary["count"], summary["of"]) == (len(BAD), of)
    assert summary["rows"] == read_rows(Path(folder) / "skipped.jsonl")
    for row, (what, why) in zip(summary["rows"], REASONS, strict=True):
        assert row["what"].endswith(what) and why in row["why"]


def test_scoring_and_training_skip_bad_pairs_and_list_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(good(0), *BAD, good(1), good(2), good(3))
    score = ["score", "--pairs", "data", "--model", folder, "--output", "store"]
    assert run(*score) == 2
    assert "data.jsonl:2" in capsys.readouterr().err and not Path("store").exists()
    assert run(*score, "--on-error", "skip") == 0
    assert "catpo: 6 of 10 skipped, see store/skipped.jsonl" in capsys.readouterr().err
    store = RewardStore.open("store")
    assert store.pair_ids == ["good-0", "good-1", "good-2", "good-3"]
    check(read_json("store/store.json")["skipped"], "store", of=10)
    assert run(*score, "--on-error", "skip") == 0  # resuming a complete store does nothing

    train = ["train", "--pairs", "data", "--model", folder, "--rewards", "store", "--output", "run", "--max-steps", "1",
             "--gradient-accumulation-steps", "1", "--eval-fraction", "0"]  # fmt: skip
    assert run(*train) == 2
    assert run(*train, "--on-error", "skip") == 0
    about = read_json("run/catpo.json")
    assert about["complete"] and about["pairs"] == {"train": 4, "dev": 0}
    assert about["skipped"]["count"] == 6 and len(read_rows("run/skipped.jsonl")) == 6


def test_a_store_with_bad_pairs_skipped_equals_that_of_the_good_ones(folder: Path) -> None:
    write(good(0), *BAD, good(1))
    assert run("score", "--pairs", "data", "--model", folder, "--output", "all", "--on-error", "skip") == 0
    Path("data/data.jsonl").write_text("".join(json.dumps(good(number)) + "\n" for number in (0, 1)))
    assert run("score", "--pairs", "data", "--model", folder, "--output", "good") == 0
    stores = [RewardStore.open(name) for name in ("all", "good")]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert "skipped" not in stores[1].provenance


def test_pairing_skips_bad_samples_and_lists_them(folder: Path) -> None:
    truth = {"truth": {"present": ["dog"]}}
    write({**SAMPLE, **truth}, {**SAMPLE, "prompt": ""}, {**SAMPLE, "image": "broken.png"}, {**SAMPLE, "prompt": "And now?"})
    Path("data/vocabulary.json").write_text('{"dog": "dog"}')
    pair = ["pair", "--data", "data", "--model", folder, "--output", "pairs", "--method", "reference"]
    assert run(*pair) == 2
    assert run(*pair, "--on-error", "skip") == 0
    about = read_json("pairs/pairs.json")
    assert about["complete"] and about["counts"]["asked"] == 2
    assert [row["what"].rpartition("/")[2] for row in about["skipped"]["rows"]] == ["data.jsonl:2", "3"]
    assert about["skipped"]["of"] == 4


def test_an_evaluation_with_skipped_pictures_is_marked_incomplete(builtin: Path) -> None:
    write(*({**SAMPLE, "image": image, "id": image} for image in ("a.png", "broken.png")), {**SAMPLE, "prompt": 3})
    evaluate = ["evaluate", "--benchmarks", "captions(data='data')", "--model", "builtin", "--max-new-tokens", "4"]
    assert run(*evaluate, "--output", "out") == 2
    assert not Path("out/scores.json").exists()
    assert run(*evaluate, "--output", "again", "--on-error", "skip") == 0
    scores = read_json("again/scores.json")
    assert scores["skipped"]["count"] == 2 and scores["skipped"]["of"] == 3
    row, item = scores["skipped"]["rows"]
    assert row["what"].endswith("data.jsonl:3") and "'prompt'" in row["why"]
    assert item["what"].startswith("captions/broken.png") and "is not a picture" in item["why"]
    graded = scores["benchmarks"]["captions"]
    assert graded["items"] == 1 and not graded["complete"] and graded["missing"]["count"] == 1


def test_skipping_every_row_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(*(row for row in BAD if row.get("id") != "good-0"))
    assert run("score", "--pairs", "data", "--model", folder, "--output", "store", "--on-error", "skip") == 2
    assert "can be used" in capsys.readouterr().err
    assert not Path("store/store.json").exists()


def test_rows_of_tables_can_be_skipped(tmp_path: Path) -> None:
    Path("a.png").write_bytes(encoded())
    rows = [
        {"image": "a.png", "question": "What?", "chosen": each, "reject": "A cat."}
        for each in ("A dog.", "", "A bird.", "A dog.")
    ]
    Path("rows.json").write_text(json.dumps(rows))
    skipped = SkipLog("skip")
    assert [pair.chosen for pair in read.read_pairs("llava(source='rows.json')", skipped)] == ["A dog.", "A bird."]
    assert [row["what"] for row in skipped.rows] == ["rows.json, row 1", "rows.json, row 3"]
    skipped = SkipLog("skip")
    assert [pair.chosen for pair in read.read_pairs("llava(source='rows.json', limit=1)", skipped)] == ["A dog."]


def test_an_unknown_on_error_is_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'skip'"):
        SkipLog("skipp")
