"""Memory with a million pairs, without a model: streaming loaders, pairs, reward store, report.

    python -m bench.million --pairs 1000000

Every stage runs in its own process, once over a tenth of the pairs and once over all of them. Prints the peak memory above that
of the imports; a stage with constant memory shows the same number twice.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from catpo.core.types import SIDES, PatchGrid
from catpo.data.read import dev_split, open_data, read_pairs
from catpo.reporting.build import report
from catpo.rewards import store as rewards
from catpo.rewards.shards import ResponseRow
from catpo.rewards.store import RewardStore
from catpo.rewards.writer import RewardWriter
from catpo.runtime.skip_log import SkipLog

SIGNALS = ["global_attention", "patch_entropy", "semantic"]
TOKENS = 6
SHARD = 1024
KEPT = 100 << 20
"""Bytes of token columns an open store may keep here; the default is ten times as much."""
SAMPLE = 2000
"""Pairs read at random."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for count in (options.pairs // 10, options.pairs):
            write_parquet(place / f"{count}.parquet", count)
            write_tar(place / f"{count}.tar", count)
            write_store(place / f"store-{count}", count)
        stages: dict[str, Callable[[int], None]] = {
            "loader, Parquet": lambda count: exhaust(f"trl(source='{place}/{count}.parquet', streaming=True)"),
            "loader, WebDataset": lambda count: exhaust(f"webdataset(source='{place}/{count}.tar')"),
            "pairs, as score and train keep them": lambda count: keep_pairs(f"webdataset(source='{place}/{count}.tar')"),
            "store, opened": lambda count: RewardStore.open(place / f"store-{count}") and None,
            "store, read": lambda count: read_store(place / f"store-{count}"),
            "report": lambda count: report(rewards=place / f"store-{count}", output=place / f"report-{count}.html") and None,
        }
        print(f"{'MiB above the imports':36} {options.pairs // 10:>12,} {options.pairs:>12,}   bytes per additional pair")
        for name, stage in stages.items():
            few, many = (peak(stage, count) for count in (options.pairs // 10, options.pairs))
            print(
                f"{name:36} {few / 2**20:12.1f} {many / 2**20:12.1f}   {(many - few) / (0.9 * options.pairs):10.1f}", flush=True
            )


def peak(stage: Callable[[int], None], count: int) -> float:
    """Peak memory that a stage adds, in bytes, measured in its own process."""
    context = multiprocessing.get_context("fork")
    read, write = context.Pipe(duplex=False)

    def work() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # reset the inherited peak
        rewards.KEPT_BYTES = KEPT
        before = resident("VmRSS")
        stage(count)
        write.send(resident("VmHWM") - before)

    process = context.Process(target=work)
    process.start()
    write.close()
    found = float(read.recv())
    process.join()
    return found


def resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def exhaust(source: str) -> None:
    for _ in open_data(source).pairs():
        pass


def keep_pairs(source: str) -> None:
    """Read everything, hold out a part, and reopen random pairs."""
    train, _ = dev_split(read_pairs(source, SkipLog()), 0.1, 0)
    for place in random.Random(0).sample(range(len(train)), min(SAMPLE, len(train))):
        train[place].images[0].open()


def read_store(path: Path) -> None:
    """Read the weights of random pairs, as training does."""
    store = RewardStore.open(path)
    for pair in random.Random(0).sample(store.pair_ids, min(SAMPLE, len(store))):
        store.weights(pair)


def texts(number: int) -> tuple[str, str, str]:
    return f"What is in picture {number}?", f"A red square, number {number}.", f"A blue dog, number {number}."


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path: Path, count: int) -> None:
    content = {"bytes": picture(), "path": None}
    cell = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": cell, "prompt": pa.string(), "chosen": pa.string(), "rejected": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, SHARD):
            columns = list(zip(*map(texts, range(start, min(start + SHARD, count))), strict=True))
            images = pa.array([content] * len(columns[0]), cell)
            writer.write_table(pa.table([images, *map(pa.array, columns)], schema=schema))


def write_tar(path: Path, count: int) -> None:
    content = picture()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(count):
            row = dict(zip(("prompt", "chosen", "rejected"), texts(number), strict=True))
            for suffix, data in (("png", content), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{number:07d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            archive.members = []


def write_store(path: Path, count: int) -> None:
    ids = [f"{number:032x}" for number in range(count)]
    made_of = {"signals": SIGNALS, "hidden": False, "maps": False, "model": "none", "attention": {"patches": "all"}}
    writer = RewardWriter.create_or_resume(path, made_of, ids, shard_size=SHARD)
    for shard in writer.missing_shards():
        writer.write_shard(shard, list(rows(ids[writer.pairs_of(shard)], shard)))
    writer.finish()


def rows(ids: list[str], seed: int) -> Iterator[ResponseRow]:
    draw = np.random.default_rng(seed)
    for pair in ids:
        for side in SIDES:
            yield ResponseRow(
                token_ids=draw.integers(0, 1000, TOKENS).astype(np.int32),
                is_special=np.array([False] * (TOKENS - 1) + [True]),
                signals={name: draw.random(TOKENS, dtype=np.float32) for name in SIGNALS},
                pair_id=pair,
                side=side,
                logps=-draw.random(TOKENS, dtype=np.float32),
                labels=np.full(TOKENS, -1, np.int8),
                pieces=["a ", "red ", "square ", "on ", "white", ""],
                grids=[PatchGrid(0, 2, 2)],
            )


if __name__ == "__main__":
    main()
