"""Damage and edits of every file that is read back are told by its name; neither names nor links lead out of a folder."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catpo.core.errors import UserError
from catpo.core.types import SIDES
from catpo.data.pair_folder import write_pairs
from catpo.data.read import open_data
from catpo.evaluation.folder import load_evaluation
from catpo.experiments.rounds import ROUND, run_rounds
from catpo.files.checksums import CHUNK, HASH, KEY, describe_file, problem_with, sealed, unsealed
from catpo.files.json_files import append_rows, read_json, read_rows, repair_rows, write_json, write_rows
from catpo.files.lock import lock
from catpo.judges._replies import Replies
from catpo.models import loading
from catpo.models.saved import CARD, LIST, check_files, list_files
from catpo.rewards.store import RewardStore
from catpo.training.checkpoints import MARK, damage, last_whole
from catpo.training.run_folder import read_manifest
from catpo.training.train import train
from report_fixtures import make_evaluation, make_pairs, make_store
from tiny import pairs


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and everything that is read of them."""

    files: str
    """Pattern in the folder."""
    read: Callable[[Path], Any]
    """From the folder; what it returns can be compared."""


def read_store(folder: Path) -> Any:
    store = RewardStore.open(folder)
    rows = [store.get(pair_id, side) for pair_id in store for side in SIDES]
    maps = [store.maps(pair_id, side).tolist() for pair_id in store for side in SIDES]
    tokens = [
        [np.asarray(value).tolist() for value in (row.token_ids, row.logps, row.labels, *row.signals.values())] for row in rows
    ]
    return store.provenance, store.fingerprint, tokens, [(list(row.pieces), row.grids) for row in rows], maps


def read_pairs(folder: Path) -> Any:
    found = [*open_data(str(folder)).pairs()]
    texts = [(pair.id, pair.prompt, pair.chosen, pair.rejected, pair.labels, pair.meta, pair.history) for pair in found]
    return texts, [picture.read() for pair in found for picture in pair.images]


def read_evaluation(folder: Path) -> Any:
    found = load_evaluation(folder)
    return found.scores, found.grades, found.answers


def read_model(folder: Path) -> Any:
    check_files(folder)
    files = [path for path in folder.iterdir() if path.name not in (LIST, CARD) and not path.name.startswith(".")]
    return {path.name: path.read_bytes() for path in files}


def read_checkpoint(folder: Path) -> Any:
    checkpoint = last_whole(folder / "checkpoints")
    assert checkpoint is not None
    if problem := damage(checkpoint):
        raise UserError(problem)
    return read_json(checkpoint / MARK), {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != MARK}


KINDS = {
    "store": Kind("store.json", read_store),
    "checksums of a shard": Kind("shards/*.json", read_store),
    "tokens": Kind("shards/*.parquet", read_store),
    "maps": Kind("shards/*.safetensors", read_store),
    "pairs": Kind("pairs.jsonl", read_pairs),
    "about pairs": Kind("pairs.json", lambda folder: (read_json(folder / "pairs.json"), read_pairs(folder))),
    "pictures": Kind("images/*", read_pairs),
    "scores": Kind("scores.json", read_evaluation),
    "grades": Kind("grades.jsonl", read_evaluation),
    "answers": Kind("answers.jsonl", read_evaluation),
    "run": Kind("catpo.json", read_manifest),
    "metrics": Kind("metrics.jsonl", lambda folder: read_rows(folder / "metrics.jsonl")),
    "model": Kind("model/*", lambda folder: read_model(folder / "model")),
    "checkpoint": Kind("checkpoints/checkpoint-*/*", read_checkpoint),
}


@pytest.fixture(scope="module")
def written(folder: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair folder, a store, an evaluation and a run, all in one folder: no file of one has the name of another's."""
    place, apart = tmp_path_factory.mktemp("written"), tmp_path_factory.mktemp("apart")
    make_store(place, make_pairs(apart / "pairs", 3))
    make_evaluation(apart / "evaluation", count=4)
    for name in ("pairs", "evaluation"):
        shutil.copytree(apart / name, place, dirs_exist_ok=True)
    train(
        pairs=pairs(8), model=str(folder), rewards=store, output=place, max_steps=1, per_device_train_batch_size=1,
        gradient_accumulation_steps=1, lora="lora(r=2, alpha=4)", eval_fraction=0.0, logging_steps=1, progress=False,
    )  # fmt: skip
    return place


def told(kind: Kind, place: Path, whole: Any) -> str:
    """The message of a refusal, or whether something else was read."""
    try:
        return "nothing changed" if kind.read(place) == whole else "something else was read"
    except UserError as error:
        return str(error)


def flip_some(kind: Kind, place: Path, count: int, rng: random.Random) -> None:
    """Flips bits of each file: refused by name, or nothing that is read has changed."""
    whole = kind.read(place)
    files = [path for path in sorted(place.glob(kind.files)) if path.is_file() and not path.name.startswith(".")]
    assert files
    for path in files:
        content = path.read_bytes()
        places = {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(count))}
        for at in sorted(places):
            changed = bytearray(content)
            changed[at] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            said = told(kind, place, whole)
            names = ("nothing changed", path.name, path.parent.name, f"shard {path.stem}", "shards hold other pairs")
            assert any(name in said for name in names), f"{path.name}: byte {at} is {changed[at]:#x}: {said}"
        path.write_bytes(content)
    assert kind.read(place) == whole


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_refused_by_name_or_changes_nothing(name, written):
    flip_some(KINDS[name], written, 12 if len(list(written.glob(KINDS[name].files))) < 5 else 3, random.Random(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_thousands_of_flipped_bits_are_refused_or_change_nothing(name, written):
    count = len(list(written.glob(KINDS[name].files)))
    flip_some(KINDS[name], written, 2000 // count, random.Random(f"slow {name}"))


def test_every_file_that_a_run_a_store_an_evaluation_and_pairs_leave_is_flipped_above(written):
    covered = {path for kind in KINDS.values() for path in written.glob(kind.files)}
    left = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file() and path not in covered}
    assert {name for name in left if not Path(name).name.startswith(".")} == set()


# ---- edits, older files ---------------------------------------------------------------------------------------------------


def edited(path: Path, old: str, new: str) -> str:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return str(path)


def test_an_edit_by_hand_is_told_as_one_with_what_to_do(tmp_path):
    path = tmp_path / "scores.json"
    write_json(path, {"model": "tiny", "pope": 81.5})
    edited(path, "81.5", "91.5")
    with pytest.raises(UserError, match=rf"{path} is not what catpo wrote\. If you edited it, remove its '{KEY}', too"):
        read_json(path)
    path.write_text(json.dumps({"model": "tiny", "pope": 91.5}))
    assert read_json(path) == {"model": "tiny", "pope": 91.5}


def test_rows_may_be_removed_and_written_anew_by_other_tools_but_not_changed_unnoticed(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "ein Hündchen \u2028", "value": 0.1, "none": float("nan"), "list": [1, {"a": True}]}, {}, {"text": "2"}]
    write_rows(path, rows[:2])
    append_rows(path, rows[2:])
    lines = path.read_text().split("\n")
    assert str(read_rows(path)) == str(rows)
    path.write_text("\n".join(json.dumps(json.loads(line)) for line in lines[1:] if line) + "\n")
    assert read_rows(path) == rows[1:]
    edited(path, '"2"', '"3"')
    with pytest.raises(UserError, match=rf"{path}:2 is not what catpo wrote"):
        read_rows(path)


def test_rows_of_an_older_version_are_read_and_continued(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert repair_rows(path) == [{"step": 1}, {"step": 2}]
    append_rows(path, [{"step": 3}])
    assert read_rows(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_row_without_its_line_break_is_torn_and_one_with_another_byte_is_damaged(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"step": 1}, {"step": 2}])
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert read_rows(path) == [{"step": 1}]
    for byte in (b"\t", b"*", b"\x8a"):
        path.write_bytes(content[:-1] + byte)
        with pytest.raises(UserError, match=rf"{path}:2 does not end with a line break"):
            repair_rows(path)


def test_a_checksum_is_that_of_the_fields_as_they_are_written():
    assert unsealed(sealed({"a": 1, "b": "é"}), place="", remedy="") == {"a": 1, "b": "é"}
    assert sealed(sealed({"a": 1})) == sealed({"a": 1})
    line = json.dumps(sealed({"a": "é"}), ensure_ascii=False).encode()
    for changed in (line.replace(b'"a"', b'"c"'), line[:-3] + b'g"}', line.replace(b"catpo_", b"katpo_")):
        with pytest.raises(UserError, match="place is not what catpo wrote"):
            unsealed(json.loads(changed), place="place", remedy="", line=changed)


def test_a_large_file_is_hashed_in_parts_and_a_change_in_any_part_is_seen(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(2 * CHUNK + 5))
    written = describe_file(path)
    assert written["bytes"] == 2 * CHUNK + 5 and problem_with(tmp_path, "weights", written) == ""
    for at in (0, CHUNK, 2 * CHUNK + 4):
        with open(path, "r+b") as stream:
            stream.seek(at)
            byte = stream.read(1)[0]
            stream.seek(at)
            stream.write(bytes([byte ^ 1]))
        assert problem_with(tmp_path, "weights", written) == "is damaged"
        assert problem_with(tmp_path, "weights", {"bytes": written["bytes"], "blake2b": "of an older version"}) == ""
        written = describe_file(path)
    assert problem_with(tmp_path, "../weights", written) == "leads out of the folder"
    assert problem_with(tmp_path, "weights", {HASH: "0"}) == "is damaged"


def test_a_paid_reply_that_is_damaged_is_asked_again(tmp_path):
    path = tmp_path / "replies.jsonl"
    replies = Replies(path)
    for asked in ("a", "b"):
        replies.add(asked, reply="4", model="judge")
    edited(path, '"reply": "4"', '"reply": "5"')
    again = Replies(path)
    assert again.get("a") is None
    assert again.get("b") == {"asked": "b", "reply": "4", "model": "judge"}


def test_a_changed_picture_of_a_pair_folder_is_named_and_your_own_folder_may_use_such_names(tmp_path):
    make_pairs(tmp_path / "pairs", 2)
    [first, second] = open_data(str(tmp_path / "pairs")).pairs()
    name = Path(str(first.images[0].path)).name
    shutil.copy(str(second.images[0].path), str(first.images[0].path))
    with pytest.raises(UserError, match=f"{name}.*is not what catpo saved under this name"):
        first.images[0].open()
    (tmp_path / "pairs" / "pairs.json").unlink()
    rows = read_rows(tmp_path / "pairs" / "pairs.jsonl")
    (tmp_path / "pairs" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    next(iter(open_data(str(tmp_path / "pairs")).pairs())).images[0].open()


# ---- models ---------------------------------------------------------------------------------------------------------------


def test_a_model_with_a_flipped_bit_is_not_loaded(folder, tmp_path):
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    list_files(model)
    assert loading.load(model).model_hash == loading.load(folder).model_hash
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=f"model.safetensors is damaged.*remove {model / LIST}"):
        loading.load(model)
    loading.blueprint(model)  # of which the weights are no part
    (model / LIST).unlink()
    loading.load(model)  # the user's own
    list_files(model)
    (model / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json is damaged"):
        loading.blueprint(model)


def test_a_trained_adapter_with_a_flipped_bit_is_not_loaded(folder, written, tmp_path):
    adapter = Path(shutil.copytree(written / "model", tmp_path / "adapter"))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    for given in ({"model": adapter}, {"model": folder, "adapter": adapter}):
        with pytest.raises(UserError, match="adapter_model.safetensors is damaged"):
            loading.load(**given)


def test_a_snapshot_of_the_hubs_cache_which_consists_of_links_is_loaded(folder, tmp_path):
    snapshot, blobs = tmp_path / "snapshots/0", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, blobs)
    list_files(blobs)
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert loading.load(snapshot).model_hash == loading.load(folder).model_hash


# ---- paths and links ------------------------------------------------------------------------------------------------------


def moved(path: Path, to: Path) -> Path:
    """Leaves a link where the file or folder was."""
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
    path.symlink_to(to)
    return path


LINKS = {
    "store.json": read_store, "shards": read_store, "shards/00000.parquet": read_store, "shards/00000.json": read_store,
    "pairs.jsonl": read_pairs, "pairs.json": read_pairs, "images": read_pairs, "vocabulary.json": read_pairs,
    "scores.json": read_evaluation, "grades.jsonl": read_evaluation, "answers.jsonl": read_evaluation,
    "catpo.json": read_manifest, "metrics.jsonl": KINDS["metrics"].read,
}  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_fine(name, written, tmp_path):
    place = Path(shutil.copytree(written, tmp_path / "place", ignore=shutil.ignore_patterns("checkpoints", "model")))
    (place / "vocabulary.json").write_text('{"dog": "dog"}')
    whole = LINKS[name](place)
    link = moved(place / name, place / "elsewhere" / Path(name).name)
    assert LINKS[name](place) == whole
    moved(place / "elsewhere" / Path(name).name, tmp_path / "outside")
    with pytest.raises(UserError, match=f"(?s){link.name}.*leads? out of"):
        LINKS[name](place)


def test_the_users_own_path_may_be_a_link(written, tmp_path):
    (tmp_path / "link").symlink_to(written)
    for kind in KINDS.values():
        assert kind.read(tmp_path / "link") == kind.read(written)
    (tmp_path / "rows.jsonl").symlink_to(written / "pairs.jsonl")
    assert [*open_data(f"folder(source='{tmp_path}/rows.jsonl', images='{written}')").pairs()]


def test_a_lock_that_is_a_link_spoils_nothing(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match=r"\.lock leads out of"), lock(tmp_path / "out"):
        pass
    assert precious.read_text() == "data"


def test_pictures_and_shards_are_not_written_through_a_link(tmp_path):
    made = make_pairs(tmp_path / "pairs", 2)
    for name in ("images", "shards"):
        (tmp_path / name).mkdir()
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="images leads out of"):
        write_pairs(tmp_path / "out", made, {})
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "shards").symlink_to(tmp_path / "shards")
    write_json(tmp_path / "store" / "store.json", read_json(make_store(tmp_path / "other", made) / "store.json"))
    with pytest.raises(UserError, match="shards leads out of"):
        make_store(tmp_path / "store", made)
    assert [*(tmp_path / "images").iterdir(), *(tmp_path / "shards").iterdir()] == []


@pytest.mark.parametrize("model", ["../../model", "/tmp/model", "link"])
def test_a_recorded_model_outside_of_the_rounds_is_not_loaded(model, tmp_path):
    output = tmp_path / "a" / "rounds"
    output.mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (output / "link").symlink_to(tmp_path / "model")
    append_rows(output / "rounds.jsonl", [{"round": 1, "model": model, "asked": 4, "pairs": 4, "accuracy": None}])
    assert read_rows(output / "rounds.jsonl", ROUND)
    with pytest.raises(UserError, match="leads out of"):
        next(run_rounds(output, [], "tiny", {}, progress=False))
