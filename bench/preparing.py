"""What preparing batches (pictures, tokens, packing) costs the process that runs the model, without and with workers.

    python -m bench.preparing --pairs 64

Seconds of its CPU, of which the preparation's are counted apart. The stores are compared byte for byte.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.processes import contents
from bench.shapes import SHAPES, make_pairs, write_model
from catpo.core.types import PreferencePair
from catpo.models import loading
from catpo.models.family import Family
from catpo.scoring.batches import Preparation, Window
from catpo.scoring.score import score_pairs


class Clock:
    """CPU seconds of this process inside the preparation of batches."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.prepare = Preparation.__call__

    def __call__(self, preparation: Preparation, window: Window) -> Any:
        begin = time.process_time()
        try:
            return self.prepare(preparation, window)
        finally:
            self.seconds += time.process_time() - begin


def measured(family: Family, data: list[PreferencePair], output: Path, count: int) -> dict[str, bytes]:
    """The store scored with `count` workers; prints what it cost this process."""
    clock, begin = Clock(), time.process_time()
    Preparation.__call__ = lambda *given: clock(*given)  # type: ignore[method-assign]
    score_pairs(data, family, output, progress=False, dataloader_num_workers=count)
    Preparation.__call__ = clock.prepare  # type: ignore[method-assign]
    total = time.process_time() - begin
    print(f"{count} workers: {total:.1f} s, {clock.seconds:.2f} of them ({clock.seconds / total:.1%}) preparing", flush=True)
    return contents(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", default="llava-144", choices=SHAPES)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape, stores = SHAPES[options.shape], list[dict[str, bytes]]()
    with tempfile.TemporaryDirectory() as folder:
        write_model(shape, Path(folder) / "model")
        family, data = loading.load(Path(folder) / "model", device="cpu"), make_pairs(shape, options.pairs)
        for count in (0, options.workers):
            stores.append(measured(family, data, Path(folder) / str(count), count))
        for tokens in (500, 2000, 8000):
            ids = [token for pair in data for token in family.token_ids(pair.chosen)] * (tokens // 100)
            begin = time.process_time()
            family.pieces(ids[:tokens])
            print(f"the text of each of {tokens:,} tokens: {time.process_time() - begin:.3f} s")
    print(f"{options.pairs} pairs, {options.shape}: stores {'equal' if stores[0] == stores[1] else 'DIFFER'}")


if __name__ == "__main__":
    main()
