"""`make bench`: a training step of ours against TRL's `DPOTrainer`, in turn, on the same weights, data, batch and threads.

python -m bench.run [--case train-llava-full] [--repeat 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.shapes import LLAVA, make_pairs, write_model
from catpo.families import _base as families
from catpo.scoring import score_pairs

PAPER = "catpo(preset='paper')"


@dataclass(frozen=True)
class Case:
    """Two trainers on one batch size."""

    name: str
    pairs: int
    lora: bool


CASES = [
    Case("train-llava-full-1", 1, lora=False),
    Case("train-llava-full-4", 4, lora=False),
    Case("train-llava-lora-1", 1, lora=True),
    Case("train-llava-lora-4", 4, lora=True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--case", action="append", help="one of " + ", ".join(case.name for case in CASES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chosen = [case for case in CASES if not options.case or case.name in options.case]
    if not chosen:
        parser.error(f"no such case; known: {', '.join(case.name for case in CASES)}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model, rewards = Path(folder) / "model", Path(folder) / "rewards"
        write_model(LLAVA, model)
        score_pairs(make_pairs(LLAVA, 4 * (options.steps + 1)), families.load(model), rewards)
        for case in chosen:
            results += run_case(case, model, rewards, options)
    Console().print(as_table(results))
    if options.out:
        options.out.write_text(json.dumps({"cases": results}, indent=1) + "\n")


def run_case(case: Case, model: Path, rewards: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both sides in turn, after checking that plain DPO has the same losses on both."""
    call = lambda trainer: _worker(trainer, case, model, rewards, options.steps)
    ours, theirs = call("dpo"), call("trl")
    gap = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    if gap > 1e-3 and not case.lora:  # adapters draw other first values
        raise SystemExit(f"{case.name}: our dpo and TRL's differ by {gap:.2g} in the loss; nothing is measured.")
    mine, peer = [], []
    for _ in range(options.repeat):
        mine.append(call(PAPER))
        peer.append(call("trl"))
    rows = []
    for measure, value in (("time", lambda run: statistics.median(run["seconds"])), ("memory", lambda run: run["memory"])):
        a, b = [value(run) for run in mine], [value(run) for run in peer]
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        rows.append(
            {
                "case": case.name,
                "measure": measure,
                "ours": statistics.median(a),
                "peer": statistics.median(b),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "loss_gap": gap,
            }
        )
    return rows


def _worker(trainer: str, case: Case, model: Path, rewards: Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.worker", "--model", str(model), "--rewards", str(rewards), "--trainer", trainer]
    command += ["--pairs", str(case.pairs), "--steps", str(steps), *(["--lora"] if case.lora else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name}, {trainer}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def as_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Cat-PO with KL and cached reference against TRL's DPO without KL (seconds per step, MiB above the model)"
    )
    for heading in ("case", "measure", "ours", "TRL", "ratio", "lowest", "highest"):
        table.add_column(heading, justify="left" if heading in ("case", "measure") else "right")
    for row in rows:
        figures = (row[name] for name in ("ours", "peer", "ratio", "lowest", "highest"))
        table.add_row(row["case"], row["measure"], *(f"{figure:.2f}" for figure in figures))
    return table


if __name__ == "__main__":
    main()
