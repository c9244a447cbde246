"""Worker processes that prepare batches: they change no result, get no weights, and leave errors and signals as they are."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import time
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from catpo.core.errors import Stopped, UserError
from catpo.core.spec import parse
from catpo.core.types import Picture
from catpo.data.pair_folder import write_pairs
from catpo.data.spool import SpooledPairs
from catpo.files.lock import lock
from catpo.models.family import Family, without_weights
from catpo.models.packing import pack
from catpo.rewards.store import RewardStore
from catpo.runtime import workers
from catpo.scoring.forward import PairScorer
from catpo.scoring.score import score, score_pairs
from catpo.scoring.settings import PAPER_SETTINGS
from catpo.training.collator import PairCollator
from catpo.training.config import CatPOConfig
from catpo.training.pair_stats import Quantity
from catpo.training.view_passes import ViewPasses
from tiny import llava, pair, pairs, picture
from tiny_families import build
from training_runs import curve, trainer


@pytest.fixture(scope="module")
def family():
    return llava()


def files(folder: Path) -> dict[str, bytes]:
    """All files of a store but its lock."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name != ".lock"}


def scored(family, output, data=None, **options):
    """A store of ten pairs in shards of four, two pairs to a batch."""
    given = dict(shard_size=4, batch_size=2, progress=False, dataloader_num_workers=2)
    score_pairs(data or pairs(10), family, output, **{**given, **options})
    return files(output)


# ---- what a worker needs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "idefics3", "internvl", "llava_next"])
def test_a_reader_packs_as_the_family_does_and_travels_without_weights(name):
    family = build(name)
    reader = family.reader()
    sent = ForkingPickler.dumps(reader)
    size = sum(parameter.numel() * parameter.element_size() for parameter in family.unwrapped.parameters())
    assert not [parameter for parameter in reader.model.parameters() if parameter.numel()]
    assert len(sent) < size / 2
    arrived = ForkingPickler.loads(sent)
    encoded = [family.encode(one) for one in pairs(2)]
    again = [arrived.encode(one) for one in pairs(2)]
    prefix = "shared" if family.shares_prefix else "separate"
    assert_equal(pack(arrived, again, prefix=prefix), pack(family, encoded, prefix=prefix))


def test_a_model_without_weights_is_none_in_half_precision_either():
    family = llava(dtype=torch.bfloat16)
    empty = without_weights(family.unwrapped)
    assert type(empty) is type(family.unwrapped) and empty.dtype == torch.bfloat16 and empty.config is family.unwrapped.config


def assert_equal(found, expected):
    """Nested batches with equal tensors."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal(found[name], value)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    else:  # sizes that stay on the host are NumPy arrays
        np.testing.assert_equal(found, expected)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_batches_are_equal_however_workers_start(method, family, store, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", None)  # the sockets that processes meet at have short names only
    needs = frozenset({Quantity("weights"), Quantity("policy_logps", "chosen", "noised(step=300)")})
    data = SpooledPairs.of(pairs(8))
    views = ViewPasses(family.reader(), needs, data, seed=3)
    collator = PairCollator(family.reader(), RewardStore.open(store), needs=needs, extra=views)
    given = dict(batch_size=3, collate_fn=workers.Guarded(collator))
    expected = list(DataLoader(data, **given))
    found = list(DataLoader(data, **given, num_workers=2, multiprocessing_context=method))
    assert len(found) == 3
    for batch, plain in zip(found, expected, strict=True):
        assert_equal(batch, plain)


# ---- scoring --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"signals": ("image_contrast", "patch_entropy"), "cache": "topk(k=5)"}], ids=str)
def test_scoring_gives_the_same_bytes_with_workers_and_leaves_them_all_encoding(options, tmp_path, monkeypatch):
    family, main, encode = llava(), os.getpid(), Family.encode
    settings = replace(PAPER_SETTINGS, signals=tuple(map(parse, options["signals"]))) if options else None
    given = dict(settings=settings, cache=options.get("cache", "hidden"), attention_maps=not options)
    alone = scored(family, tmp_path / "alone", dataloader_num_workers=0, **given)
    encoded_here = []

    def watched(self, *args, **kwargs):
        if os.getpid() == main:
            encoded_here.append(1)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(Family, "encode", watched)
    assert scored(family, tmp_path / "workers", **given) == alone
    # that a signal reads another picture is known after the first batch; the windows drawn before are its two and the workers'
    assert len(encoded_here) <= (10 if options else 0)


def test_workers_are_a_window_ahead_each(family, monkeypatch):
    monkeypatch.setattr(workers, "explained", lambda count: contextlib.nullcontext())
    drawn = []

    def items():
        for item in range(20):
            drawn.append(item)
            yield item

    made = workers.in_workers(abs, items(), 2)
    assert [next(made) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(drawn) <= 5 + 2
    made.close()


def test_a_pair_that_cannot_be_encoded_is_named_at_its_turn(family, tmp_path):
    data = pairs(10)
    data[6] = replace(data[6], chosen="an <image> here")
    messages = []
    for count in (0, 2):
        with pytest.raises(UserError) as refused:
            scored(family, tmp_path / str(count), data, dataloader_num_workers=count)
        messages.append(str(refused.value))
        assert len(list((tmp_path / str(count) / "shards").glob("*.json"))) == 1
    assert messages[0] == messages[1] and messages[0].startswith(f"pair {data[6].id}, chosen response")


def test_skipped_pairs_are_the_same_with_workers(folder, tmp_path):
    data = pairs(6)
    for index in (1, 4):
        data[index] = replace(data[index], chosen=f"an <image> {index}")
    write_pairs(tmp_path / "pairs", data, {})
    stores = []
    for count in (0, 2):
        output = tmp_path / str(count)
        given = dict(pairs=str(tmp_path / "pairs"), model=str(folder), on_error="skip", progress=False)
        score(output=output, dataloader_num_workers=count, **given)
        stores.append(files(output))
    assert stores[0]["skipped.jsonl"].count(b"\n") == 2
    assert stores[0] == stores[1]


def test_a_run_killed_with_its_workers_resumes_at_once(family, tmp_path, monkeypatch):
    score_batch, calls = PairScorer.score_batch, []

    def dies(self, *args):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return score_batch(self, *args)

    monkeypatch.setattr(PairScorer, "score_batch", dies)
    child = os.fork()
    if not child:
        scored(family, tmp_path / "killed")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.undo()
    assert scored(family, tmp_path / "killed") == scored(family, tmp_path / "whole")


def test_sigterm_of_the_whole_group_lets_scoring_finish_its_shard(family, tmp_path, monkeypatch):
    """A scheduler sends it to every process of the job, the workers too."""
    score_batch, calls = PairScorer.score_batch, []

    def told(self, *args):
        calls.append(1)
        if len(calls) == 1:
            everybody = [str(worker.pid) for worker in multiprocessing.active_children()]
            subprocess.run(["kill", "-INT", *everybody], check=True)
            subprocess.run(["kill", "-TERM", *everybody, str(os.getpid())], check=True)
            time.sleep(0.3)
        return score_batch(self, *args)

    monkeypatch.setattr(PairScorer, "score_batch", told)
    with pytest.raises(Stopped, match="4 of 10 pairs are scored in"):
        scored(family, tmp_path / "store")
    assert len(list((tmp_path / "store" / "shards").glob("*.json"))) == 1
    monkeypatch.undo()
    assert scored(family, tmp_path / "store") == scored(family, tmp_path / "whole")


def test_a_worker_that_is_killed_is_explained(family, tmp_path, monkeypatch):
    score_batch = PairScorer.score_batch

    def kills(self, *args):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.3)
        return score_batch(self, *args)

    monkeypatch.setattr(PairScorer, "score_batch", kills)
    with pytest.raises(UserError, match="A process that prepares batches ended .* dataloader_num_workers, 2 now"):
        scored(family, tmp_path / "store")


def test_pairs_that_cannot_be_sent_are_explained(monkeypatch, family, tmp_path):
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("spawn"))
    bytes_of = picture(0).data
    data = [replace(one, images=(Picture(load=lambda: bytes_of),)) for one in pairs(2)]
    with pytest.raises(UserError, match="cannot be sent .* dataloader_num_workers=0"):
        scored(family, tmp_path / "store", data)


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    reads, writes = os.pipe()
    with lock(tmp_path):
        child = os.fork()
        if not child:
            os.write(writes, b"begun")
            time.sleep(20)
            os._exit(0)
        assert os.read(reads, 5) == b"begun"
    try:
        with lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---- how many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "cpus", "processes", "free", "count"), [
    ("cpu", 64, 1, 1 << 40, 0), ("cuda", 64, 1, 1 << 40, 4), ("cuda", 3, 1, 1 << 40, 2), ("cuda", 1, 1, 1 << 40, 0),
    ("cuda", 32, 8, 1 << 40, 3), ("cuda", 64, 1, 64 << 20, 0),
])  # fmt: skip
def test_workers_by_default_are_as_many_as_cpus_and_shared_memory_allow(device, cpus, processes, free, count, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert workers.default_count(device) == count


def test_training_asks_the_same_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("catpo.training.config.default_count", {"cuda": 3, "cpu": 0}.__getitem__)
    count = lambda **options: CatPOConfig(output_dir=str(tmp_path), use_cpu=True, **options).dataloader_num_workers
    assert count() == 0 and count(dataloader_num_workers=2) == 2


# ---- training -------------------------------------------------------------------------------------------------------------


def test_training_is_the_same_with_workers(folder, store, tmp_path):
    curves = []
    for count in (0, 2):
        run = trainer(folder, tmp_path, rewards=str(store), objective="mdpo", num_train_epochs=2, dataloader_num_workers=count)
        run.train()
        curves.append(curve(run))
    assert len(curves[0]) == 8 and curves[0] == curves[1]


def test_the_workers_of_a_training_get_no_weights(tmp_path):
    made = trainer(llava(), tmp_path, pairs(4), None, per_device_train_batch_size=4, max_steps=1)
    arrived = ForkingPickler.loads(ForkingPickler.dumps(made.data_collator)).make
    for reader in (arrived.reader, arrived.extra.reader):
        assert not [parameter for parameter in reader.model.parameters() if parameter.numel()]


def test_a_pair_that_a_worker_refuses_is_named_without_a_traceback(folder, store, tmp_path):
    data = [*pairs(7), pair(8, chosen="an <image> here")]
    run = trainer(folder, tmp_path, data, objective="dpo", reference="online", dataloader_num_workers=2)
    with pytest.raises(UserError, match=f"^pair {data[-1].id}, chosen response holds the special token"):
        run.train()


def test_persistent_workers_are_refused_where_views_are_drawn_anew(folder, store, tmp_path):
    options = dict(objective="mdpo", dataloader_num_workers=1, dataloader_persistent_workers=True)
    with pytest.raises(UserError, match="dataloader_persistent_workers"):
        trainer(folder, tmp_path, rewards=str(store), **options)
