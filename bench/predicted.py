"""Terms of docs/how-to/gpu.md, as predicted by the dry run and as measured: operations, time, bytes sent, memory, disk.

    python -m bench.predicted [--group disk]

Prints a Markdown table per group. Times are CPU seconds of one process with one thread; the machine's speed is calibrated on
one case, and all others are predictions. Bytes sent are read from the counters of the loopback interface, which nothing else
may use meanwhile: `unshare -rn sh -c 'ip link set lo up; python -m bench.predicted --group sent'` has its own. ZeRO
is skipped if DeepSpeed is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, TrainerCallback

from bench.launching import environment_of, together
from bench.run import CATPO, Case, Side, prepared, worker
from bench.shapes import SHAPES, Shape, make_pairs, write_model
from bench.worker import LORA
from catpo.config import options as config
from catpo.config.recipes import SHIPPED
from catpo.core.types import PreferencePair
from catpo.data.pair_folder import write_pairs
from catpo.models import loading
from catpo.planning.costs import SHARDED
from catpo.planning.dry_run import Plan, plan
from catpo.scoring.score import score_pairs
from catpo.training.config import CatPOConfig
from catpo.training.lora import lora_config
from catpo.training.train import train
from catpo.training.trainer import CatPOTrainer

RECIPES = SHIPPED / "accelerate"
TIMED = ("llava-144", "llava-576", "qwen-300", "qwen-1200")
CALIBRATION = "full, llava-576"
"""The case that calibrates the machine's operations per second; its own time is not a prediction."""
STEPS = 3
"""Timed steps of one pair; the minimum counts, because other work can only add time."""
SMALL = Shape("llava", 4, 4, vocabulary=8000, width=256, layers=4, vision_width=128, vision_layers=2)
"""A model of 30 MB, so that message headers are negligible."""
FIRST, LAST = 2, 6
"""Bytes are counted from the end of one of these optimiser steps to the end of the other."""


@dataclass(frozen=True)
class Row:
    """One figure, predicted and measured."""

    term: str
    case: str
    predicted: float
    measured: float
    unit: str

    @property
    def error(self) -> float:
        """Error of the prediction, in percent of the measurement."""
        return 100 * (self.predicted / self.measured - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--group", action="append", choices=GROUPS, help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.group or GROUPS:
            print(table(GROUPS[name](Path(folder))), flush=True)
            if name == "sent" and not HAS_DEEPSPEED:
                print("ZeRO is skipped: DeepSpeed is not installed.\n")


def table(rows: Sequence[Row]) -> str:
    lines = ["| term | case | predicted | measured | error |", "|---|---|---:|---:|---:|"]
    for each in rows:
        figures = (f"{value:,.4g} {each.unit}" for value in (each.predicted, each.measured))
        lines.append(f"| {each.term} | {each.case} | {' | '.join(figures)} | {each.error:+.1f} % |")
    return "\n".join(lines) + "\n"


def planned(command: str, *, engine: str = "ddp", processes: int = 1, **given: Any) -> Plan:
    """What `catpo COMMAND --dry-run` computes with these options."""
    options = config.COMMANDS[command](output=Path("nowhere"), **given)
    return plan(options, engine=engine, processes=processes)


# ---- operations and time --------------------------------------------------------------------------------------------------


SIDES_TIMED = {
    "score": Side("score"),
    "full": Side(trainer=CATPO),
    "LoRA": Side(trainer=CATPO, lora=True),
    "full, checkpointing": Side(trainer=CATPO, checkpointing=True),
}


def times(folder: Path, shapes: Sequence[str] = TIMED) -> list[Row]:
    """Seconds per pair, preceded by the operations of a step as counted by torch."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # inherited by the workers, which use one thread per core
    try:
        runs = {f"{name}, {shape}": timed(folder, shape, side) for shape in shapes for name, side in SIDES_TIMED.items()}
    finally:
        os.sched_setaffinity(0, allowed)
    counted = [
        Row("operations per pair", case, flops / 1e9, run["flops"] / 1e9, "GFLOP")
        for case, (flops, run) in runs.items()
        if "flops" in run
    ]
    seconds = {case: min(run["seconds"]) / run["pairs"] for case, (_, run) in runs.items()}
    speed = runs[CALIBRATION][0] / seconds[CALIBRATION]
    return counted + [Row("time per pair", case, flops / speed, seconds[case], "s") for case, (flops, _) in runs.items()]


def timed(folder: Path, shape: str, side: Side) -> tuple[float, dict[str, Any]]:
    """Predicted operations of a pair, and a worker's measurements."""
    case = Case(f"{side.work}-{shape}", shape, 1, side, ())
    place = prepared(case, folder, STEPS)
    pairs = folder / shape / "pairs"
    if not pairs.exists():
        write_pairs(pairs, make_pairs(SHAPES[shape], 1 + STEPS), {})
    given: dict[str, Any] = {"pairs": str(pairs), "model": str(folder / shape / "model")}
    if side.work == "train":
        given |= {"objective": side.trainer, "lora": LORA if side.lora else None, "num_train_epochs": 1, "eval_fraction": 0.0}
        given |= {"gradient_checkpointing": side.checkpointing}
    made = planned(side.work, **given)
    run = worker(case, side, [*place, "--steps", str(STEPS), "--clock", "cpu"])
    return made.work.flops / made.pairs, {**run, "pairs": 1 if side.work == "train" else STEPS}


# ---- two processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A model, pairs for it, and their rewards, on disk."""

    model: Path
    pairs: Sequence[PreferencePair]
    pairs_file: Path
    rewards: Path

    @classmethod
    def at(cls, folder: Path, shape: Shape = SMALL, count: int = 2 * LAST) -> Place:
        pairs = make_pairs(shape, count)
        made = cls(folder / "small", pairs, folder / "small-pairs", folder / "small-rewards")
        if not made.model.exists():
            write_model(shape, made.model)
        return made.prepared()

    def prepared(self) -> Place:
        """Create pairs and rewards that are missing."""
        if not self.pairs_file.exists():
            write_pairs(self.pairs_file, self.pairs, {})
        if not self.rewards.exists():
            score_pairs(self.pairs, loading.load(self.model), self.rewards, attention_maps=False, progress=False)
        return self

    def given(self, **options: Any) -> dict[str, Any]:
        return {"pairs": str(self.pairs_file), "model": str(self.model), **options}


class Ledger(TrainerCallback):
    """Records the loopback traffic between two steps and the bytes this process holds."""

    def __init__(self) -> None:
        self.counters: dict[int, int] = {}
        self.held: dict[str, int] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.held["gradients"] = sum(held(each.grad) for each in model.parameters() if each.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **_: Any) -> None:
        distributed.barrier()
        if state.global_step in (FIRST, LAST):
            self.counters[state.global_step] = loopback_bytes()
        distributed.barrier()
        self.held["weights"] = sum(held(each) for each in model.parameters())
        moments = [each[name] for each in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq") if name in each]
        self.held["optimiser"] = sum(held(each) for each in moments)


def held(tensor: Tensor) -> int:
    """Bytes of a tensor's local shard."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def loopback_bytes() -> int:
    """Bytes the loopback interface has sent since it came up."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def watched(
    place: Place, output: Path, *, steps: int = LAST, lora: str | None = None, gradient_accumulation_steps: int = 1
) -> dict[str, Any]:
    """Train in this process, as one of several."""
    ledger, family = Ledger(), loading.load(place.model)  # whole; ZeRO-3 shards it afterwards
    settings = CatPOConfig(
        output_dir=str(output), objective=CATPO, rewards=str(place.rewards), max_steps=steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=gradient_accumulation_steps, save_strategy="no", disable_tqdm=True, logging_steps=1000,
        use_cpu="ACCELERATE_USE_DEEPSPEED" not in os.environ,
    )  # fmt: skip
    trainer = CatPOTrainer(
        family, settings, place.pairs, callbacks=[ledger], peft_config=lora_config(lora, family) if lora else None
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {"sent": (ledger.counters.get(LAST, 0) - ledger.counters.get(FIRST, 0)) / (LAST - FIRST), "held": ledger.held}


def sent(folder: Path) -> list[Row]:
    """Bytes per optimiser step of both processes together; the interface counts each byte once."""
    place, rows = Place.at(folder), []
    for engine in ENGINES:
        launch = environment(engine, folder)
        for case, options in SENT.items():
            given = place.given(per_device_train_batch_size=1, eval_fraction=0.0, objective=CATPO, **options)
            made = planned("train", engine=engine, processes=2, **given)
            found = together(2, partial(watched, place, folder / "run", **options), **launch)[0]["sent"]
            rows.append(
                Row(
                    "bytes sent per step",
                    f"{engine}, {case}",
                    by_gloo(made, options["gradient_accumulation_steps"]) / 1e6,
                    found / 1e6,
                    "MB",
                )
            )
    return rows


HAS_DEEPSPEED = find_spec("deepspeed") is not None
ENGINES = ("ddp", "fsdp2", *(("zero2", "zero3") if HAS_DEEPSPEED else ()))
SENT: dict[str, dict[str, Any]] = {
    "full": {"lora": None, "gradient_accumulation_steps": 1},
    "full, 2 batches a step": {"lora": None, "gradient_accumulation_steps": 2},
    "LoRA": {"lora": LORA, "gradient_accumulation_steps": 1},
}


def by_gloo(made: Plan, batches: int) -> float:
    """Bytes two processes send according to a plan. Gloo all-reduces where a reduce-scatter would do, with twice the bytes."""
    scattered = made.memory["gradients"] * batches if "weights" in SHARDED[made.engine] else 0
    return 2 * (made.work.sent_per_step + scattered)


def environment(engine: str, folder: Path) -> dict[str, str]:
    """Environment of `accelerate launch`; ZeRO-3 as for a large model, because it keeps up to a billion fetched weights."""
    made = {**environment_of(RECIPES / f"{engine}.yaml"), "GLOO_SOCKET_IFNAME": "lo"}
    if engine == "zero3":
        file = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
        settings = json.loads(Path(made[file]).read_text())
        settings["zero_optimization"] |= dict.fromkeys(KEPT_BY_ZERO_3, 0)
        made[file] = str(folder / "zero3.json")
        Path(made[file]).write_text(json.dumps(settings))
    return made


KEPT_BY_ZERO_3 = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_param_persistence_threshold")


def memory(folder: Path, place: Place | None = None) -> list[Row]:
    """Memory under FSDP2, of the larger of two processes."""
    place = place or Place.at(folder)
    made = planned("train", engine="fsdp2", processes=2, **place.given(lora=None, eval_fraction=0.0, objective=CATPO))
    both = together(2, partial(watched, place, folder / "held", steps=1), **environment("fsdp2", folder))
    return [
        Row(
            "memory of a process",
            f"{part}, fsdp2 x 2",
            made.memory[part] / 1e6,
            max(each["held"][part] for each in both) / 1e6,
            "MB",
        )
        for part in ("weights", "gradients", "optimiser")
    ]


# ---- disk -----------------------------------------------------------------------------------------------------------------


def disk(folder: Path, place: Place | None = None) -> list[Row]:
    """File sizes of reward stores and a checkpoint."""
    place = place or Place.at(folder)
    rows = [row for cache in ("hidden", "topk(k=8)") for row in stored(place, folder / cache, cache)]
    made = planned("train", **place.given(lora=None, eval_fraction=0.0, objective=CATPO))
    together(1, partial(checkpointed, place, folder / "run"))
    checkpoint = next((folder / "run" / "checkpoints").glob("checkpoint-*"))
    return [
        *rows,
        Row("checkpoint", "full", made.checkpoint / 1e6, size(checkpoint, "*.safetensors", "optimizer.pt") / 1e6, "MB"),
    ]


def stored(place: Place, output: Path, cache: str) -> list[Row]:
    made = planned("score", **place.given(cache=cache))
    score_pairs(place.pairs, loading.load(place.model), output, cache=cache, progress=False)
    numbers = made.store["signals"]
    arrays = sum(made.store.values()) - numbers
    return [
        Row("store, per token", cache, numbers / 1e6, size(output / "shards", "*.parquet") / 1e6, "MB"),
        Row("store, reference and maps", cache, arrays / 1e6, size(output / "shards", "*.safetensors") / 1e6, "MB"),
    ]


def checkpointed(place: Place, output: Path) -> None:
    train(
        pairs=place.pairs, model=place.model, output=output, rewards=place.rewards, objective=CATPO, lora=None, max_steps=1,
        gradient_accumulation_steps=1, eval_fraction=0.0, progress=False,
    )  # fmt: skip


def size(folder: Path, *patterns: str) -> int:
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))


GROUPS: dict[str, Callable[..., list[Row]]] = {each.__name__: each for each in (times, sent, memory, disk)}

if __name__ == "__main__":
    main()
