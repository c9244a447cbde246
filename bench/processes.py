"""Speed-up of `catpo score` with two processes over one, on the same pairs with one thread each.

    python -m bench.processes --pairs 64 --repeat 3

Each process is pinned to its own core. Times cover scoring only, from the first process's first shard to the finished store,
not starting Python and loading the model. The stores are compared byte for byte.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.shapes import SHAPES, make_pairs, write_model
from catpo.models import loading
from catpo.runtime.launcher import process_number
from catpo.scoring.score import score_pairs

AT_LEAST = 1.7
SHARD = 4
"""Pairs per shard. Small, because at the end one process waits for the other's last shard."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", default="llava-144", choices=SHAPES)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # set for child processes only
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.output:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(SHAPES[options.shape], model)
        ratios = []
        for number in range(options.repeat):
            one, two = (run(options, model, Path(folder) / f"store-{count}-{number}", count) for count in (1, 2))
            same = contents(Path(folder) / f"store-1-{number}") == contents(Path(folder) / f"store-2-{number}")
            ratios.append(one / two)
            print(
                f"one {one:.1f} s, two {two:.1f} s: {one / two:.2f} times; stores {'equal' if same else 'DIFFER'}", flush=True
            )
        middle = statistics.median(ratios)
        print(f"{options.pairs} pairs, {options.shape}: {middle:.2f} times, target {AT_LEAST}")
        sys.exit(middle < AT_LEAST)


def run(options: argparse.Namespace, model: Path, output: Path, count: int) -> float:
    """Scoring time with `count` processes, in seconds."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "bench.processes"]
    given = ["--shape", options.shape, "--pairs", str(options.pairs), "--model", str(model), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, *launch, *given],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(done.stdout.split()[-1])


def measure(options: argparse.Namespace) -> None:
    """Score as one of the processes; the first prints the time."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[process_number() % len(cores)]})
    family, pairs = loading.load(options.model), make_pairs(SHAPES[options.shape], options.pairs)
    warm = options.output.with_name(f"warm-{process_number()}-{options.output.name}")
    family.model_hash  # noqa: B018 (computed before the clock starts)
    alone = {name: os.environ.pop(name) for name in ("WORLD_SIZE", "RANK") if name in os.environ}
    score_pairs(pairs[:1], family, warm, progress=False)
    os.environ.update(alone)
    started = time.perf_counter()
    score_pairs(pairs, family, options.output, batch_size=2, shard_size=SHARD, progress=False)
    if process_number() == 0:
        print(time.perf_counter() - started)


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file() and path.name != ".lock"}


if __name__ == "__main__":
    main()
