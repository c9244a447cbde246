"""Pairs come back from the temporary file as they were, and memory holds none of them."""

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
    assert list(SpooledPairs.of([])) == []
    odd, even = select(kept, [1, 3]), select(kept, [4, 0])
    assert list(joined(odd, even)) == [everything[place] for place in (1, 3, 4, 0)]
    assert isinstance(joined(odd, even), SpooledPairs)
    assert list(joined(odd, SpooledPairs.of(everything[:1]))) == [everything[1], everything[3], everything[0]]
    assert list(place.iterdir()) == []  # so that nothing is left of a killed process


def test_worker_processes_share_the_file(place, monkeypatch):
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
def test_an_error_of_the_data_is_not_reported_as_a_full_disk(error):
    def rows():
        yield from pairs(3)
        raise error

    with pytest.raises(type(error), match="^row 3"):
        SpooledPairs.of(rows())


@pytest.mark.parametrize("is_created", [True, False])
def test_a_full_disk_is_explained(monkeypatch, is_created):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", (lambda **_: SimpleNamespace(write=full)) if is_created else full)
    with pytest.raises(UserError, match=r"cannot be kept in .*No space left.*TMPDIR"):
        SpooledPairs.of(pairs(2))


def test_memory_holds_one_pair_at_a_time():
    made, most = [], 0
    everything = pairs(64)

    def rows():
        nonlocal most
        for pair in everything:
            copy = replace(pair)
            made.append(weakref.ref(copy))
            most = max(most, sum(reference() is not None for reference in made))
            yield copy
            del copy

    assert len(SpooledPairs.of(rows())) == 64 and most <= 2
    assert not any(reference() for reference in made)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_read_pairs_spools_and_its_splits_share_the_file(tmp_path, on_error):
    write_pairs(tmp_path / "pairs", pairs(10), {})
    read = data.read_pairs(tmp_path / "pairs", SkipLog(on_error), 7)
    assert isinstance(read, SpooledPairs) and [pair.id for pair in read] == [pair.id for pair in pairs(7)]
    train, dev = data.dev_split(read, 0.3, 1)
    assert isinstance(train, SpooledPairs) and isinstance(dev, SpooledPairs)
    assert sorted([*ids_of(train), *ids_of(dev)]) == sorted(pair.id for pair in pairs(7)) and len(dev) == 2


def test_folder_names_need_not_be_valid_unicode(tmp_path):
    write_pairs(tmp_path / "p\udcff", pairs(2), {})
    read = data.read_pairs(str(tmp_path / "p\udcff"), SkipLog())
    assert [pair.images[0].open().size for pair in read] == [pair.images[0].open().size for pair in pairs(2)]
