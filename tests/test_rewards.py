"""The reward store: it reads back what was written, resumes after a kill, and names damage and mix-ups."""

import os
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from catpo.core.errors import UserError
from catpo.core.types import SIDES, PatchGrid
from catpo.files.json_files import read_json
from catpo.files.lock import lock
from catpo.rewards.fusion import Fusion, fuse
from catpo.rewards.store import ResponseRow, RewardStore
from catpo.rewards.writer import RewardWriter

SIGNALS = ["global_attention", "patch_entropy", "semantic(embedding='hidden')"]
PROVENANCE = {
    "model": "models/tiny",
    "precision": "bfloat16",
    "model_hash": "m1",
    "processor_hash": "p1",
    "template_hash": "t1",
    "attention": {"layers": (2, 3), "heads": "mean", "query": "token", "patches": "all"},
    "signals": SIGNALS,
    "hidden": True,
    "maps": True,
    "versions": {"torch": "2.6"},
}
PAIRS = [f"pair{number}" for number in range(7)]
WIDTH, PATCHES = 4, 6
TILE = PatchGrid(0, 1, 2, (1 / 3, 0.0, 2 / 3, 0.5))


def row(pair_id, side):
    """A response drawn from its id, so that every run writes the same."""
    rng = np.random.default_rng([*pair_id.encode(), len(side)])
    count = int(rng.integers(2, 9))
    return ResponseRow(
        pair_id=pair_id,
        side=side,
        token_ids=np.append(rng.integers(3, 99, count), 2),
        logps=-rng.random(count + 1).astype(np.float32),
        signals={name: rng.random(count + 1).astype(np.float32) for name in SIGNALS},
        labels=rng.integers(-1, 2, count + 1).astype(np.int8),
        pieces=[*(f" wörd{number}" for number in range(count)), ""],
        is_special=np.arange(count + 1) == count,
        grids=[PatchGrid(0, 2, 3)] if pair_id != "pair3" else [TILE, PatchGrid(1, 1, 1)],
    )


def rows_of(pair_ids):
    return [row(pair_id, side) for pair_id in pair_ids for side in SIDES]


def arrays_of(rows):
    """Hidden states and maps whose first column is the token id."""
    ids = np.concatenate([row.token_ids for row in rows])
    hidden, maps = np.zeros((len(ids), WIDTH), np.int16), np.zeros((len(ids), PATCHES), np.float16)
    hidden[:, 0], maps[:, 0] = ids, ids
    return {"hidden": hidden, "maps": maps}


def writer_of(path, pair_ids=PAIRS, shard_size=2, **changes):
    return RewardWriter.create_or_resume(path, {**PROVENANCE, **changes}, pair_ids, shard_size=shard_size)


def write(writer, shards=None):
    for shard in writer.missing_shards() if shards is None else shards:
        rows = rows_of(writer.pair_ids[writer.pairs_of(shard)])
        writer.write_shard(shard, rows, **arrays_of(rows))


def whole_store(path, **changes):
    writer = writer_of(path, **changes)
    write(writer)
    writer.finish()
    return RewardStore.open(path)


def without_arrays(path, pair_ids, rows, **changes):
    """A store of token columns only."""
    writer = writer_of(path, pair_ids=pair_ids, hidden=False, maps=False, **changes)
    for shard in writer.missing_shards():
        pairs = writer.pairs_of(shard)
        writer.write_shard(shard, rows[2 * pairs.start : 2 * pairs.stop])
    writer.finish()
    return RewardStore.open(path)


def content(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# Reading back


def test_every_response_is_read_back_as_it_was_written(tmp_path):
    store = whole_store(tmp_path / "store")
    assert len(store) == 7
    assert list(store) == store.pair_ids == PAIRS
    for expected in rows_of(PAIRS):
        stored = store.get(expected.pair_id, expected.side)
        assert list(stored.signals) == SIGNALS
        for name, value in vars(expected).items():
            np.testing.assert_equal(getattr(stored, name), value)
        hidden, maps = (read(expected.pair_id, expected.side) for read in (store.hidden, store.maps))
        assert hidden.dtype == np.int16 and hidden.shape == (len(expected.token_ids), WIDTH)
        patches = 3 if expected.pair_id == "pair3" else 6  # without the padding
        assert maps.dtype == np.float16 and maps.shape == (len(expected.token_ids), patches)
        np.testing.assert_array_equal(hidden[:, 0], expected.token_ids)
        np.testing.assert_array_equal(maps[:, 0], expected.token_ids)


def test_a_store_larger_than_memory_keeps_the_shard_read_last(tmp_path, monkeypatch):
    whole = whole_store(tmp_path / "store")
    assert len(list(whole._all_columns())) == len(whole._kept) == 4
    monkeypatch.setattr("catpo.rewards.store.KEPT_BYTES", 1)
    small = RewardStore.open(tmp_path / "store")
    assert not small._kept  # opening keeps ids only
    for pair in [*PAIRS, *reversed(PAIRS)]:
        for side in SIDES:
            np.testing.assert_array_equal(small.get(pair, side).logps, whole.get(pair, side).logps)
            np.testing.assert_array_equal(small.hidden(pair, side), whole.hidden(pair, side))
            assert len(small._kept) == 1
    for name, values in small.quantiles().items():
        np.testing.assert_array_equal(values, whole.quantiles()[name])


def test_maps_of_one_picture_are_as_wide_as_its_grid(tmp_path):
    store = whole_store(tmp_path / "store", attention={"patches": 1}, pair_ids=["pair3"])
    assert store.maps("pair3", "chosen").shape[1] == 1


def test_float_hidden_states_keep_their_type_and_maps_may_be_absent(tmp_path):
    writer = writer_of(tmp_path, maps=False, pair_ids=["pair0"])
    rows = rows_of(["pair0"])
    hidden = np.random.default_rng(0).random((sum(len(row.token_ids) for row in rows), 3)).astype(np.float32)
    writer.write_shard(0, rows, hidden=hidden)
    writer.finish()
    store = RewardStore.open(tmp_path)
    np.testing.assert_array_equal(np.concatenate([store.hidden("pair0", side) for side in SIDES]), hidden)
    assert not store.has_maps
    with pytest.raises(UserError, match="holds no attention maps"):
        store.maps("pair0", "chosen")


def test_a_store_without_arrays_has_no_safetensors_files_and_says_so(tmp_path):
    store = without_arrays(tmp_path, PAIRS, rows_of(PAIRS))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not store.has_hidden
    with pytest.raises(UserError, match=r"holds no hidden states.*reference='online'"):
        store.hidden("pair0", "chosen")


def test_weights_are_the_fusion_of_the_stored_signals(tmp_path):
    store = whole_store(tmp_path / "store")
    for fusion in (Fusion(), Fusion(normalise="none", shared_prefix="neutral"), Fusion(normalise="quantile", eos="scored")):
        expected = fuse(row("pair1", "chosen"), row("pair1", "rejected"), fusion, store.quantiles(with_special=True))
        weights = store.weights("pair1", fusion)
        np.testing.assert_array_equal(weights.chosen, expected.chosen)
        np.testing.assert_array_equal(weights.rejected, expected.rejected)


def test_quantiles_are_all_values_sorted_and_without_special_tokens(tmp_path):
    store = whole_store(tmp_path / "store")
    for name in SIGNALS:
        text = np.concatenate([row.signals[name][:-1] for row in rows_of(PAIRS)])
        everything = np.concatenate([row.signals[name] for row in rows_of(PAIRS)])
        np.testing.assert_array_equal(store.quantiles()[name], np.sort(text))
        np.testing.assert_array_equal(store.quantiles(with_special=True)[name], np.sort(everything))


def test_pairs_and_signals_that_were_not_scored_are_named(tmp_path):
    store = whole_store(tmp_path / "store")
    assert "pair0" in store and "other" not in store
    with pytest.raises(UserError, match=r"pair other \(chosen\) is not in .*store, which holds 7 pairs"):
        store.get("other", "chosen")
    with pytest.raises(UserError, match="pair pair2: signal 'patch_logit' was not scored"):
        store.weights("pair2", Fusion(signals={"patch_logit": 1.0}))


def test_a_store_travels_to_a_worker_process(tmp_path):
    store = whole_store(tmp_path / "store")
    store.hidden("pair0", "chosen")
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.hidden("pair4", "rejected"), store.hidden("pair4", "rejected"))


def test_other_tools_can_read_the_shards(tmp_path):
    whole_store(tmp_path / "store")
    table = pq.read_table(tmp_path / "store" / "shards" / "00001.parquet").to_pylist()
    assert [(response["pair_id"], response["side"]) for response in table] == [
        (p, s) for p in ("pair2", "pair3") for s in SIDES
    ]
    assert "".join(table[0]["pieces"]) == "".join(row("pair2", "chosen").pieces)


def test_the_code_in_the_documentation_runs(tmp_path, root, monkeypatch, capsys):
    names = ["global_attention", "patch_entropy", "semantic"]
    rows = [replace(row, signals=dict(zip(names, row.signals.values(), strict=True))) for row in rows_of(PAIRS)]
    without_arrays(tmp_path / "store", PAIRS, rows, signals=names)
    monkeypatch.chdir(tmp_path)
    text = (root / "docs" / "reference" / "rewards-format.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    assert "patch_entropy" in capsys.readouterr().out


def test_reading_never_loops_over_tokens_in_python(tmp_path):
    count, pair_ids = 2500, [f"p{number}" for number in range(20)]
    long = replace(
        row("p", "chosen"),
        token_ids=np.arange(count),
        logps=np.zeros(count, np.float32),
        signals=dict.fromkeys(SIGNALS, np.linspace(0, 1, count, dtype=np.float32)),
        labels=np.full(count, -1, np.int8),
        pieces=["a"] * count,
        is_special=np.zeros(count, bool),
    )
    rows = [replace(long, pair_id=pair_id, side=side) for pair_id in pair_ids for side in SIDES]
    without_arrays(tmp_path, pair_ids, rows, shard_size=5)
    calls = 0

    def count_calls(*_):
        nonlocal calls
        calls += 1

    sys.setprofile(count_calls)
    try:
        store = RewardStore.open(tmp_path)
        store.get("p3", "chosen")
        store.weights("p7")
    finally:
        sys.setprofile(None)
    assert calls < count * len(pair_ids)  # half of the tokens; most calls are those of the type checks


# Resuming


def test_a_resumed_run_writes_the_same_bytes_as_an_undisturbed_one(tmp_path):
    whole_store(tmp_path / "one")
    write(writer_of(tmp_path / "two"), shards=[0, 2])
    resumed = writer_of(tmp_path / "two")
    assert resumed.missing_shards() == [1, 3]
    write(resumed)
    resumed.finish()
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert RewardStore.open(tmp_path / "one").fingerprint == RewardStore.open(tmp_path / "two").fingerprint


def kill_while_writing(path, file, *, after):
    """Score in another process that is killed right before (or after) it renames `file` into place."""
    script = f"""
import os, signal, sys
sys.path[:0] = {[os.path.dirname(__file__), os.path.join(os.path.dirname(__file__), "..", "src")]!r}
from pathlib import Path
import test_rewards as t
from catpo.files.lock import lock
rename = os.replace
def replace(source, target):
    if not {after} and Path(target).name == {file!r}: os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
    if {after} and Path(target).name == {file!r}: os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
with lock({str(path)!r}):
    writer = t.writer_of(Path({str(path)!r}))
    t.write(writer)
    writer.finish()
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -signal.SIGKILL


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("file", ["00001.safetensors", "00001.parquet", "00001.json", "store.json"])
def test_a_run_killed_at_any_file_resumes_to_the_same_store(tmp_path, file, after):
    whole_store(tmp_path / "undisturbed")
    kill_while_writing(tmp_path / "killed", file, after=after)
    with pytest.raises(UserError, match="incomplete|not a reward store"):
        RewardStore.open(tmp_path / "killed")
    with lock(tmp_path / "killed"):  # the dead process holds it no more
        writer = writer_of(tmp_path / "killed")
        assert (0 in writer.missing_shards()) == (file == "store.json")
        write(writer)
        writer.finish()
    (tmp_path / "killed" / ".lock").unlink()
    assert content(tmp_path / "undisturbed") == content(tmp_path / "killed")


def test_a_second_process_is_refused_while_the_first_writes(tmp_path):
    with lock(tmp_path / "store"):
        script = f"from catpo.files.lock import lock\nwith lock({str(tmp_path / 'store')!r}): pass"
        second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "is being written by another catpo process" in second.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_hash": "m2"}, "another model .model_hash is 'm1', now 'm2'"),
        ({"precision": "float32", "model_hash": "m2"}, "weights in bfloat16, now loaded in float32: load them as before"),
        ({"processor_hash": "p2"}, "another processor "),
        ({"template_hash": "t2"}, "another chat template "),
        ({"signals": SIGNALS[:2]}, "another signals "),
        ({"attention": {**PROVENANCE["attention"], "layers": [1]}}, r"another attention.layers .*is \[2, 3\], now \[1\]"),
        ({"hidden": False}, "another hidden "),
        ({"versions": {"torch": "2.7"}}, "another versions.torch "),
        ({"extra": 1}, "another extra .extra is None, now 1"),
        ({"shard_size": 3}, "another shard_size "),
        ({"pair_ids": [*PAIRS[:-1], "new"]}, "another set of pairs "),
        ({"pair_ids": PAIRS[:-1]}, "another pair_count .pair_count is 7, now 6"),
        ({"pair_ids": PAIRS[::-1]}, "another set of pairs "),
    ],
)
def test_a_store_is_not_continued_with_anything_else(tmp_path, changes, says):
    write(writer_of(tmp_path), shards=[0])
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"was begun with {says}.*choose another --output"):
        writer_of(tmp_path, **changes)
    assert content(tmp_path) == before


def test_a_model_that_has_moved_is_the_same_model(tmp_path):
    whole_store(tmp_path / "one")
    write(writer_of(tmp_path / "two"), shards=[0])
    moved = writer_of(tmp_path / "two", model="elsewhere/tiny")
    write(moved)
    moved.finish()
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds other files and no reward store"):
        writer_of(tmp_path)
    assert content(tmp_path) == {"thesis.tex": b"precious"}


def test_only_a_whole_store_can_be_finished(tmp_path):
    writer = writer_of(tmp_path)
    write(writer, shards=[1])
    with pytest.raises(UserError, match="3 of 4 shards are missing"):
        writer.finish()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pair_ids": [*PAIRS, "pair1"]}, "pair pair1 is in the data twice"),
        ({"pair_ids": []}, "no pair to score"),
        ({"signals": ["labels"]}, "cannot be called 'labels'"),
    ],
)
def test_a_store_that_could_not_be_read_is_not_begun(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        writer_of(tmp_path, **changes)


# What a shard may hold


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"logps": np.zeros(50, np.float32)}, "pair pair0, chosen: logps has 50 values for"),
        ({"pieces": ["a"]}, "pieces has 1 values for"),
        ({"signals": {SIGNALS[0]: np.zeros(2, np.float32)}}, "but the store holds"),
        ({"signals": {name: np.zeros(2, np.float32) for name in SIGNALS}}, "global_attention has 2 values for"),
        ({"token_ids": np.array([], dtype=np.int64)}, "the response has no tokens"),
        ({"pair_id": "pair9"}, "must hold chosen and rejected of its 2 pairs"),
        ({"side": "rejected"}, "must hold chosen and rejected of its 2 pairs"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, changes, says):
    rows = rows_of(PAIRS[:2])
    with pytest.raises(UserError, match=says):
        writer_of(tmp_path).write_shard(0, [replace(rows[0], **changes), *rows[1:]], **arrays_of(rows))
    assert not list((tmp_path / "shards").iterdir())


def test_a_number_that_is_not_finite_is_named_with_its_token(tmp_path):
    rows = rows_of(PAIRS[:2])
    rows[1].signals["patch_entropy"][1] = np.nan
    with pytest.raises(UserError, match="pair pair0, rejected: patch_entropy is nan at token 1"):
        writer_of(tmp_path).write_shard(0, rows, **arrays_of(rows))


def test_arrays_must_be_those_of_the_provenance(tmp_path):
    rows = rows_of(PAIRS[:2])
    arrays = arrays_of(rows)
    with pytest.raises(UserError, match="begun with hidden=True"):
        writer_of(tmp_path / "a").write_shard(0, rows, maps=arrays["maps"])
    with pytest.raises(UserError, match="begun with maps=False"):
        writer_of(tmp_path / "b", maps=False).write_shard(0, rows, **arrays)
    with pytest.raises(UserError, match="hidden has shape"):
        writer_of(tmp_path / "a").write_shard(0, rows, hidden=arrays["hidden"][1:], maps=arrays["maps"])


# Damage


def flip(path, position):
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 1
    path.write_bytes(bytes(damaged))


@pytest.mark.parametrize("position", [0, 200, -1])
@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_flipped_bit_in_the_columns_is_noticed_when_the_store_is_opened(tmp_path, kind, position):
    whole_store(tmp_path)
    file = tmp_path / "shards" / f"00002.{kind}"
    flip(file, min(position, file.stat().st_size // 2))
    with pytest.raises(UserError, match=r"shard 00002 is damaged.*Delete .*00002\.\* and run the same `catpo score` again"):
        RewardStore.open(tmp_path)


@pytest.mark.parametrize("position", [0, 40, -1])
def test_a_flipped_bit_in_the_arrays_is_noticed_when_they_are_read(tmp_path, position):
    store = whole_store(tmp_path)
    flip(tmp_path / "shards" / "00001.safetensors", position)
    store.hidden("pair0", "chosen")
    with pytest.raises(UserError, match="shard 00001 is damaged"):
        store.hidden("pair2", "chosen")
    with pytest.raises(UserError, match="shard 00001 is damaged"):
        store.maps("pair2", "chosen")


@pytest.mark.parametrize("suffix", ["parquet", "safetensors", "json"])
def test_a_damaged_or_truncated_or_deleted_shard_is_scored_again(tmp_path, suffix):
    whole_store(tmp_path)
    expected = content(tmp_path)
    file = tmp_path / "shards" / f"00001.{suffix}"
    harms = [lambda: flip(file, -1), lambda: file.write_bytes(file.read_bytes()[:-9]), file.unlink]
    for harm in harms:
        harm()
        writer = writer_of(tmp_path)
        assert writer.missing_shards() == [1]
        write(writer)
        writer.finish()
        assert content(tmp_path) == expected


def test_a_shard_of_another_store_is_noticed(tmp_path):
    whole_store(tmp_path / "a")
    whole_store(tmp_path / "b", pair_ids=PAIRS[::-1])
    for suffix in ("parquet", "safetensors", "json"):
        (tmp_path / "b" / "shards" / f"00000.{suffix}").replace(tmp_path / "a" / "shards" / f"00000.{suffix}")
    with pytest.raises(UserError, match="hold other pairs than store.json says"):
        RewardStore.open(tmp_path / "a")


def test_an_incomplete_store_says_how_much_is_there(tmp_path):
    write(writer_of(tmp_path), shards=[0, 1])
    with pytest.raises(UserError, match="incomplete: 2 of 4 shards are there. Run the same `catpo score` again"):
        RewardStore.open(tmp_path)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (None, "is not a reward store"),
        ("{}", "has format None, this catpo reads 3"),
        ('{"format": 1, "signals": []}', "has format 1, this catpo reads 3. Score again"),
        ('{"format": 2, "signals": []}', "has format 2, .* hash that depended on the device. Score the pairs again"),
        ('{"format": 3, "signals": []}', "lacks 'pair_count'"),
    ],
)
def test_a_folder_that_is_no_store_is_named(tmp_path, written, says):
    if written is not None:
        (tmp_path / "store.json").write_text(written)
    with pytest.raises(UserError, match=says):
        RewardStore.open(tmp_path)


# Provenance


def test_verify_names_what_differs_among_the_fields_given(tmp_path):
    store = whole_store(tmp_path)
    store.verify({"model_hash": "m1", "model": "moved/elsewhere", "attention": {"layers": (2, 3)}})
    with pytest.raises(UserError, match=r"was scored with another model \(model_hash is 'm1', now 'm9'\).*models/tiny"):
        store.verify({"model_hash": "m9"})
    with pytest.raises(UserError, match=r"scored with weights in bfloat16, now loaded in float32.*models/tiny"):
        store.verify({"precision": "float32", "model_hash": "m9"})
    with pytest.raises(UserError, match=r"another attention.query .*is 'token', now 'predictor'"):
        store.verify({"attention": {"query": "predictor"}})


def test_the_fingerprint_changes_with_the_numbers_but_not_with_the_path_of_the_model(tmp_path):
    first = whole_store(tmp_path / "a").fingerprint
    assert whole_store(tmp_path / "b", model="elsewhere").fingerprint == first
    assert whole_store(tmp_path / "c", template_hash="t2").fingerprint != first
    writer = writer_of(tmp_path / "d")
    write(writer, shards=[1, 2, 3])
    rows = rows_of(PAIRS[:2])
    rows[0].signals["patch_entropy"][0] += 0.5
    writer.write_shard(0, rows, **arrays_of(rows))
    writer.finish()
    assert RewardStore.open(tmp_path / "d").fingerprint != first


def test_provenance_is_readable_in_store_json(tmp_path):
    whole_store(tmp_path)
    provenance = read_json(tmp_path / "store.json")
    assert provenance["model"] == "models/tiny"
    assert provenance["attention"]["layers"] == [2, 3]
    assert provenance["complete"] is True
