"""CPU time and memory of `catpo data check` and of a dry run over many pairs.

    python -m bench.sizes --rows 200000

The pairs have 60 words per response and 100 different pictures of 64x48 pixels, in a folder and again in a Parquet file. Every
command runs in a process of its own; its time includes that of starting Python.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import Process
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PICTURES = 100
WORDS = 60
BLOCK = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--keep", type=Path, help="folder for the data, which are made if they are not there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (options.keep or Path(temporary)).resolve()
        folder, table = place / f"pairs-{options.rows}", place / f"{options.rows}.parquet"
        if not table.exists():
            making = Process(target=write, args=(folder, table, options.rows))  # no command's peak is below its parent's size
            making.start()
            making.join()
            assert not making.exitcode
        for data in (folder, table):
            measure(f"data check {data.name}", ["data", "check", str(data)])
            given = ["--pairs", str(data), "--model", "builtin", "--lora", "none", "--output", str(place / "run")]
            measure(f"train --dry-run --pairs {data.name}", ["train", "--dry-run", *given])


def measure(name: str, command: list[str]) -> None:
    """Run a command and print its CPU time and its own peak memory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "catpo", *command], stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    assert not status, command
    print(f"{name}: {used.ru_utime + used.ru_stime:.1f} s CPU, {used.ru_maxrss / 1024:.0f} MiB", flush=True)


def write(folder: Path, table: Path, count: int) -> None:
    """The same pairs as a folder and as a Parquet file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    contents = []
    for number in range(PICTURES):
        path = folder / "images" / f"{number}.png"
        Image.fromarray(noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(path)
        contents.append(path.read_bytes())
    rows = list(texts(count))
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as stream:
        for number, row in enumerate(rows):
            stream.write(json.dumps({"image": f"images/{number % PICTURES}.png", **row}) + "\n")
    pictures = [{"bytes": contents[number % PICTURES]} for number in range(BLOCK)]
    schema = pa.schema(
        {"image": pa.struct({"bytes": pa.binary()}), "prompt": pa.string(), "chosen": pa.string(), "rejected": pa.string()}
    )
    with pq.ParquetWriter(table, schema) as writer:
        for start in range(0, count, BLOCK):
            block = rows[start : start + BLOCK]
            joined = [{"image": picture, **row} for picture, row in zip(pictures, block, strict=False)]
            writer.write_table(pa.Table.from_pylist(joined, schema))


def texts(count: int) -> Iterator[dict[str, str]]:
    rng, words = random.Random(0), [f"word{number}" for number in range(2000)]
    for number in range(count):
        answers = [" ".join([str(number), *rng.choices(words, k=WORDS)]) for _ in range(2)]
        yield {"prompt": "Describe the image.", "chosen": answers[0], "rejected": answers[1]}


if __name__ == "__main__":
    main()
