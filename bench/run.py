"""`make bench`: run catpo and its peers in turn, with the same weights, data, batch, precision and threads.

python -m bench.run [--case train-llava-full-1] [--repeat 3] [--steps 3] [--out FILE] [--notes]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.answering import PLAIN
from bench.leaves import ALONE, RANKED_PAIRS, pairs_for
from bench.shapes import SHAPES, WORDS, write_model
from catpo.models import loading
from catpo.scoring.score import score_pairs
from catpo.scoring.settings import PAPER_SETTINGS
from catpo.scoring.words import WordSettings

NOTES = Path(__file__).parent.parent / "docs" / "explanation" / "lab-notes.md"
CATPO, DPO = "catpo(preset='paper')", "dpo"
TILT = "tilt(answers='both')"
"""On both answers, which are those of DPO: a step of either learns from the same tokens."""
UNPREPARED = {"signals": "none", "decoded": "builtin"}
"""Kind of work -> the model it takes in place of one of its shape."""
Run = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One side of a comparison, as arguments of a worker."""

    work: str = "train"
    trainer: str = ""
    lora: bool = False
    workers: int = 0
    checkpointing: bool = False
    branches: int = 1

    def arguments(self) -> list[str]:
        flags = [f"--{name}" for name in ("lora", "checkpointing") if getattr(self, name)]
        return [
            f"--work={self.work}",
            f"--trainer={self.trainer}",
            f"--workers={self.workers}",
            f"--branches={self.branches}",
            *flags,
        ]


@dataclass(frozen=True)
class Case:
    """Ours against the fastest of its peers. `limits` are target ratios ours / peer, by measure."""

    name: str
    shape: str
    pairs: int
    ours: Side
    peers: tuple[Side, ...]
    limits: dict[str, float] = field(default_factory=dict)
    check: tuple[Side, Side] | None = None
    """Two sides whose losses must agree before anything is timed."""


def training(shape: str, pairs: int, *, lora: bool = False, limits: dict[str, float]) -> Case:
    """A step of Cat-PO with KL and cached reference against a step of TRL's DPO."""
    peers = tuple(Side(trainer=name, lora=lora) for name in ("trl", "trl-responses"))
    check = None if lora else (Side(trainer=DPO), peers[0])  # adapters are initialised differently
    kind = "lora" if lora else "full"
    return Case(f"train-{shape}-{kind}-{pairs}", shape, pairs, Side(trainer=CATPO, lora=lora), peers, limits, check)


def answering(name: str, shape: str, pictures: int, work: str, branches: int, limits: dict[str, float]) -> Case:
    """Answers that share a picture against today's `generate`; their texts must be the same."""
    sides = Side(work, branches=branches), Side(work, PLAIN, branches=branches)
    return Case(name, shape, pictures, sides[0], sides[1:], limits, sides)


FULL, LORA = {"time": 0.45, "memory": 0.80}, {"time": 0.42}
CASES = [
    training("llava-576", 1, limits=FULL),
    training("llava-576", 4, limits=FULL),
    training("llava-576", 1, lora=True, limits=LORA),
    training("llava-576", 4, lora=True, limits=LORA),
    training("qwen-1200", 1, limits=FULL),
    training("qwen-1200", 1, lora=True, limits=LORA),
    training("qwen-300", 1, limits={}),
    training("qwen-2400", 1, limits={}),
    training("llava-144", 1, limits={}),
    training("llava-1156", 1, limits={}),
    training("llava-2916", 1, limits={}),
    Case(
        "naive-llava-576", "llava-576", 1, Side(trainer=CATPO), (Side(trainer="naive"),), {"time": 0.25},
        (Side(trainer=CATPO), Side(trainer="naive")),
    ),
    Case("kl-llava-576", "llava-576", 1, Side(trainer=CATPO), (Side(trainer=DPO),), {"time": 1.10}),
    Case("kl-qwen-1200", "qwen-1200", 1, Side(trainer=CATPO), (Side(trainer=DPO),), {"time": 1.10}),
    Case("tilt-llava-576", "llava-576", 1, Side(trainer=TILT), (Side(trainer=DPO),), {"time": 1.10}),
    Case("tilt-llava-576-4", "llava-576", 4, Side(trainer=TILT), (Side(trainer=DPO),), {"time": 1.10}),
    Case("score-llava-576", "llava-576", 2, Side("score"), (Side("forward"),), {"time": 1.15, "memory": 1.10}),
    *(Case(f"score-llava-{size}", f"llava-{size}", 1, Side("score"), (Side("forward"),)) for size in (144, 1156, 2916)),
    Case("eager-llava-576", "llava-576", 2, Side("score"), (Side("eager"),), {"time": 0.35}),
    Case("eager-llava-1156", "llava-1156", 1, Side("score"), (Side("eager"),), {"time": 0.35}),
    Case(
        "epoch-llava-576", "llava-576", 1, Side("epoch", CATPO), (Side("epoch", "trl"), Side("epoch", "trl-responses")),
        {"time": 1.0},
    ),
    Case(
        "ranked-llava-576", "llava-576", RANKED_PAIRS, Side("ranked", CATPO), (Side("ranked", f"{ALONE} {CATPO}"),),
        {"time": 0.30}, (Side("ranked", CATPO), Side("ranked", f"{ALONE} {CATPO}")),
    ),
    Case(
        "questions-llava-576", "llava-576", 1, Side("asked"), (Side("score"),), {"time": 1.45},
        (Side("asked"), Side("asked", ALONE)),
    ),
    Case("self-question-llava-576", "llava-576", 1, Side("self_asked"), (Side("score"),), {"time": 1.5}),
    answering("answer-amber", "llava-576", 2, "answers", 14, {"time": 0.22, "memory": 1.2}),
    answering("answer-pope", "llava-576", 1, "answers", 18, {"time": 0.18}),
    answering("answer-qwen", "qwen-1200", 1, "answers", 14, {"time": 0.15}),
    answering("draws", "llava-576", 1, "draws", 10, {"time": 0.50}),
    Case("csr", "llava-576", 1, Side("csr"), (Side("csr", PLAIN),), {"time": 0.35}),  # their trees differ: see the worker
    Case("decode-vcd", "llava-144", 32, Side("decoded", "vcd"), (Side("decoded", PLAIN),)),
    Case("decode-tilt", "llava-144", 32, Side("decoded", "tilt"), (Side("decoded", PLAIN),)),
    Case("loading-llava-576", "llava-576", 4, Side(trainer=CATPO, workers=2), (), {"waiting": 0.10}),
    Case("signals-of-11000-responses", "llava-576", 5500, Side("signals"), (), {"seconds": 1.0}),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    known = ", ".join(case.name for case in CASES)
    parser.add_argument("--case", action="append", help=f"case name or prefix: {known}")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--clock", default="wall", help="cpu: CPU time, unaffected by other work on the machine")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--notes", action="store_true", help=f"add the table to {NOTES.name}")
    options = parser.parse_args()
    chosen = [case for case in CASES if not options.case or any(case.name.startswith(name) for name in options.case)]
    if not chosen:
        parser.error(f"no such case; known: {known}")
    speed = matmul_flops()
    rows: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            rows += run_case(case, prepared(case, Path(folder), options.steps), options, speed)
            Console(width=140).print(as_table(rows))
            if options.out:
                options.out.write_text(json.dumps({"machine": machine(speed), "cases": rows}, indent=1) + "\n")
    if options.notes:
        add_to_notes(rows, speed, options)


def prepared(case: Case, folder: Path, steps: int) -> list[str]:
    """Write model and reward store of a case's shape once; return them as worker arguments."""
    if case.ours.work in UNPREPARED:
        return ["--shape", case.shape, "--model", UNPREPARED[case.ours.work], "--pairs", str(case.pairs)]
    words = with_words(folder) if case.ours.trainer == TILT else None
    kind = "words" if words else case.ours.work
    model, rewards = folder / case.shape / "model", folder / case.shape / f"rewards-{kind}-{case.pairs}"
    if not model.exists():
        write_model(SHAPES[case.shape], model)
    reads_store = case.ours.work not in ("answers", "draws", "csr")
    reads_store &= any(side.trainer not in ("trl", "trl-responses") for side in (case.ours, *case.peers))
    if reads_store and not rewards.exists():
        pairs = pairs_for(case.ours.work, SHAPES[case.shape], case.pairs * (steps + 1))
        score_pairs(pairs, loading.load(model), rewards, replace(PAPER_SETTINGS, words=words), progress=False)
    return ["--shape", case.shape, "--model", str(model), "--rewards", str(rewards), "--pairs", str(case.pairs)]


def with_words(folder: Path) -> WordSettings:
    """Every word of the benchmark's texts is a candidate for its pictures."""
    vocabulary = folder / "words.json"
    vocabulary.write_text(json.dumps({word: word for word in WORDS}))
    return WordSettings.of(f"words(floor=1e-9, vocabulary='{vocabulary}')")


def run_case(case: Case, place: list[str], options: argparse.Namespace, speed: float) -> list[Run]:
    """Run all sides in turn, after checking that the losses agree where they must."""
    call = lambda side: worker(case, side, [*place, "--steps", str(options.steps), "--clock", options.clock])
    gap = agreement(case, call)
    mine: list[Run] = []
    theirs: dict[Side, list[Run]] = {peer: [] for peer in case.peers}
    for _ in range(options.repeat):
        mine.append(call(case.ours))
        for peer in case.peers:
            theirs[peer].append(call(peer))
    if case.ours.work == "signals":
        return [row(case, "seconds", list(map(seconds, mine)), [1.0] * len(mine))]
    if not case.peers:
        shares = [sum(run["waits"]) / sum(run["seconds"]) for run in mine]
        return [row(case, "waiting", shares, [1.0] * len(shares), loss_gap=gap)]
    fastest = min(case.peers, key=lambda peer: statistics.median(map(seconds, theirs[peer])))
    rows = []
    for measure, value in (("time", seconds), ("memory", lambda run: run["memory"])):
        more = {"peer_is": fastest.trainer or fastest.work, "loss_gap": gap}
        if measure == "time" and "flops" in mine[0] and "flops" in theirs[fastest][0]:
            sides = {"ours": mine, "peer": theirs[fastest]}
            more |= {f"gflop_{name}": runs[0]["flops"] / 1e9 for name, runs in sides.items()}
            more |= {f"token_passes_{name}": runs[0]["token_passes"] for name, runs in sides.items()}
            more |= {
                f"share_of_matmul_{name}": runs[0]["flops"] / speed / statistics.median(map(seconds, runs))
                for name, runs in sides.items()
            }
        rows.append(row(case, measure, list(map(value, mine)), list(map(value, theirs[fastest])), **more))
    return rows


def seconds(run: Run) -> float:
    return statistics.median(run["seconds"])


def agreement(case: Case, call: Callable[[Side], Run]) -> float | None:
    """Largest loss difference between two sides that must compute the same; exits if they do not."""
    if case.check is None:
        return None
    first, second = (call(side)["losses"] for side in case.check)
    gap = max(abs(a - b) for a, b in zip(first, second, strict=True))
    if not gap <= 2e-3:
        raise SystemExit(
            f"{case.name}: {case.check[0]} and {case.check[1]} differ by {gap:.2g} in the loss. Nothing is measured."
        )
    return gap


def row(case: Case, measure: str, ours: list[float], peer: list[float], **more: Any) -> Run:
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "case": case.name,
        "measure": measure,
        "ratio": statistics.median(ours) / statistics.median(peer),
        "at_most": case.limits.get(measure),
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "lowest": min(ratios),
        "highest": max(ratios),
        "repetitions": len(ours),
        **more,
    }


def worker(case: Case, side: Side, place: list[str]) -> Run:
    command = [sys.executable, "-m", "bench.worker", *side.arguments(), *place]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name}, {side}: {done.stderr[-3000:]}")
    result: Run = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def matmul_flops() -> float:
    """FLOP/s of a float32 matrix product at decoder size, best of 30."""
    a, b = torch.randn(800, 512), torch.randn(512, 1376)
    best = float("inf")
    for _ in range(30):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * 800 * 512 * 1376 / best


def machine(speed: float) -> Run:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matmul_gflops": speed / 1e9,
    }


HEADINGS = ("case", "measure", "ours", "peer", "peer name", "ratio", "target", "spread")


def cells(each: Run) -> list[str]:
    limit = (
        "" if each["at_most"] is None else f"{each['at_most']:.2f}" + ("" if each["ratio"] <= each["at_most"] else " missed")
    )
    return [
        each["case"], each["measure"], f"{each['ours']:.2f}", f"{each['peer']:.2f}", str(each.get("peer_is", "")),
        f"{each['ratio']:.3f}", limit, f"{each['lowest']:.3f} to {each['highest']:.3f}",
    ]  # fmt: skip


def as_table(rows: list[Run]) -> Table:
    table = Table(title="time in seconds, memory in MiB above the loaded model; ratios ours / fastest peer")
    for heading in HEADINGS:
        table.add_column(heading)
    for each in rows:
        table.add_row(*cells(each))
    return table


def add_to_notes(rows: list[Run], speed: float, options: argparse.Namespace) -> None:
    """Insert the dated table at the top of the notes."""
    about = machine(speed)
    lines = [
        f"## {datetime.date.today()}: `make bench`",
        "",
        f"{about['cores']} cores, {about['threads']} threads, {about['matmul_gflops']:.0f} GFLOP/s in a float32 "
        f"matrix product, torch {about['torch']}; {options.repeat} repetitions of {options.steps} steps.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(cells(each)) + " |" for each in rows),
    ]
    head, separator, rest = NOTES.read_text(encoding="utf-8").partition("\n## ")
    NOTES.write_text(head + "\n" + "\n".join(lines) + "\n" + separator + rest, encoding="utf-8")


if __name__ == "__main__":
    main()
