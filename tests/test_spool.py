"""Pairs in a temporary file are the pairs that were put there, and memory holds none of them."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from catpo.core.errors import UserError
from catpo.core.types import Picture, Span
from catpo.data import read as data
from catpo.data import spool
from catpo.data.pair_folder import write_pairs
from catpo.data.spool import SpooledPairs, ids_of, joined, select
from catpo.runtime.skip_log import SkipLog
from tiny import pairs


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def _seven(number: int) -> bytes:
    return b"seven" * number


def test_every_field_comes_back(tmp_path):
    first = pairs(1)[0]
    pictures = (
        *first.images,
        Picture(path=Path("/pictures/\udcff.png"), name="not UTF-8 (\udcff.png, \ud800)"),
        Picture(load=_seven, at=(7,), name="read when needed"),
    )
    labels = {"chosen": (Span(0, 3, "grounded"), Span(4, 6, "hallucinated")), "rejected": ()}
    full = replace(first, images=pictures, labels=labels, meta={"score": 0.1, "tags": ["ä", None], "deep": {"x": 1}})
    kept = SpooledPairs.of([full, *pairs(3)])
    assert list(kept) == [full, *pairs(3)]
    assert kept[0].images[-1].read() == b"seven" * 7
    assert ids_of(kept) == [pair.id for pair in kept]


def test_parts_share_one_file_which_has_no_name(place):
    everything = pairs(9)
    kept = SpooledPairs.of(everything)
    assert list(kept[2:7:2]) == everything[2:7:2] and kept[-1] == everything[-1]
    with pytest.raises(IndexError):
        kept[9]
    odd, even = select(kept, [1, 3]), select(kept, [4, 0])
    assert list(joined(odd, even)) == [everything[place] for place in (1, 3, 4, 0)]
    assert isinstance(joined(odd, even), SpooledPairs)
    assert list(joined(odd, SpooledPairs.of(everything[:1]))) == [everything[1], everything[3], everything[0]]
    assert list(place.iterdir()) == []  # so that nothing is left of a killed process


def test_blocks_end_anywhere(monkeypatch):
    monkeypatch.setattr(spool, "BLOCK", 4)
    assert list(SpooledPairs.of(pairs(10))) == pairs(10)
    monkeypatch.setattr(spool, "BLOCK_BYTES", 1)  # a block after every picture that is in memory
    kept = SpooledPairs.of(pairs(10))
    assert kept._sources[0].reader.num_record_batches == 10 and list(kept) == pairs(10)
    assert len(SpooledPairs.of([])) == 0


def test_worker_processes_read_it_and_leave_it(place, monkeypatch):
    kept = SpooledPairs.of(pairs(5))
    monkeypatch.setattr(tempfile, "tempdir", None)  # the sockets that processes meet at have short names only
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map(_id_of, [(kept, 3)]) == [kept[3].id]
    assert pickle.loads(pickle.dumps(kept[1:]))[0] == kept[1]
    assert not list(place.glob("catpo*"))


def _id_of(asked: tuple[SpooledPairs, int]) -> str:
    whole, number = asked
    return whole[number].id


@pytest.mark.parametrize("error", [UserError("row 3: broken"), OSError("row 3: the share is gone")])
def test_what_goes_wrong_with_the_data_is_not_blamed_on_the_file(error):
    def rows():
        yield from pairs(3)
        raise error

    with pytest.raises(type(error), match="^row 3"):
        SpooledPairs.of(rows())


@pytest.mark.parametrize("where", ["TemporaryFile", "write_batch"])
def test_a_full_disk_says_where(monkeypatch, where):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if where == "TemporaryFile":
        monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    else:
        monkeypatch.setattr(spool.pa.ipc, "new_file", lambda *_: SimpleNamespace(write_batch=full))
    with pytest.raises(UserError, match=r"cannot be kept in .*No space left.*TMPDIR"):
        SpooledPairs.of(pairs(2))


def test_memory_holds_two_blocks_of_pairs_at_most(monkeypatch):
    monkeypatch.setattr(spool, "BLOCK", 8)
    made, most = [], 0
    everything = pairs(64)

    def rows():
        nonlocal most
        for pair in everything:
            copy = replace(pair)
            made.append(weakref.ref(copy))
            most = max(most, sum(each() is not None for each in made))
            yield copy
            del copy

    kept = SpooledPairs.of(rows())
    assert len(kept) == 64 and most <= 17
    assert not any(each() for each in made)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_data_sets_are_read_into_it(tmp_path, on_error):
    write_pairs(tmp_path / "pairs", pairs(10), {})
    read = data.read_pairs(tmp_path / "pairs", SkipLog(on_error), 7)
    assert isinstance(read, SpooledPairs) and [pair.id for pair in read] == [pair.id for pair in pairs(7)]
    train, dev = data.dev_split(read, 0.3, 1)
    assert isinstance(train, SpooledPairs) and isinstance(dev, SpooledPairs)
    assert sorted([*ids_of(train), *ids_of(dev)]) == sorted(pair.id for pair in pairs(7)) and len(dev) == 2


def test_folders_may_have_names_that_are_no_text(tmp_path):
    write_pairs(tmp_path / "p\udcff", pairs(2), {})
    read = data.read_pairs(str(tmp_path / "p\udcff"), SkipLog())
    assert [pair.images[0].open().size for pair in read] == [pair.images[0].open().size for pair in pairs(2)]
