"""`make gpu`: on one GPU, check that the numbers are right, then measure published models' shapes against TRL.

    python -m bench.gpu [--out FILE] [--minutes 10] [--part qwen] [--tiny]

Weights are random and made on the device; nothing is downloaded. Each part runs in a process of its own, so that one that
fails, e.g. for lack of memory, is reported and the rest goes on. Exit status 1: a check failed. Without a GPU, and with --tiny,
the same parts run on tiny shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import worker
from bench.predicted import planned
from bench.run import CATPO
from bench.shapes import LLAVA_7B, QWEN_3B, Shape, blueprint, build, make_pairs
from catpo.core.errors import first_line
from catpo.core.types import Sample
from catpo.data.pair_folder import write_pairs
from catpo.models.attention.recorder import choose_layers
from catpo.models.family import Family
from catpo.models.family_check import eager_outputs, recorded_outputs
from catpo.models.loading import family_of
from catpo.planning import sizes
from catpo.planning.dry_run import Plan
from catpo.scoring.score import score_pairs

PEAK = {
    "GB200": 2500, "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A10": 125, "A6000": 155,
}  # fmt: skip
"""TFLOP/s of dense bfloat16 products by the makers' data sheets, by words of the card's name; the first that fits counts."""
TINY = [
    Shape(
        family, 4, 4, 1000, width=128, layers=2, vision_width=64, vision_layers=2, response_words=12, published=f"tiny-{family}"
    )
    for family in ("llava", "qwen")
]
CHECKED_LAYERS = 4
"""Layers of decoder and tower where numbers are checked: the models' own widths and heads, in float32 and in little time."""
BOUND = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference of a log-prob; half of it of a loss. Attention may differ by 1 % of its largest probability.

On a CPU, at both models' widths, log-probs differ by 5e-6 in float32 and by 0.05 in bfloat16.
"""
STEPS, SCORED, NEW = 3, 8, 64
"""Measured training steps; pairs per batch of scoring, and answers at once; tokens of an answer."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A piece of the run, with the seconds set aside for it: a guess, since no card has run it yet."""

    run: Callable[[Path], list[Row]]
    seconds: float = 45


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--minutes", type=float, default=10, help="start no part that would not end in this time")
    parser.add_argument("--part", default="", help="run only the parts whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; always so without a GPU")
    options = parser.parse_args(arguments)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one card: transformers' Trainer would use all
    is_tiny = options.tiny or not torch.cuda.is_available()
    end = time.monotonic() + 60 * options.minutes
    rows: list[Row] = []
    for name, part in parts(is_tiny).items():
        if options.part not in name and name != "card":
            continue
        left, needed = end - time.monotonic(), 0 if is_tiny else part.seconds
        if left > needed:
            new = run(name, is_tiny, left)
        else:
            new = [{"note": f"left out: {max(left, 0):.0f} s are left, and {needed:.0f} s are set aside for it"}]
        rows += [{"part": name, **row} for row in new]
        print(*(sentence(name, row) for row in new), sep="\n", flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=140).print(*tables(rows))
    sys.exit(any(row.get("holds") is False for row in rows))


def parts(tiny: bool) -> dict[str, Part]:
    """All parts by name, in the order in which they run."""
    listed = {"card": Part(lambda folder: [card()], 20)}
    shapes = TINY if tiny else (LLAVA_7B, QWEN_3B)
    for shape in shapes:
        listed[f"{shape.name}, equality"] = Part(partial(equality, shape), 60)
    for shape in shapes:
        for is_lora in (True, False):
            for side, trainer in (("catpo", CATPO), ("TRL", "trl")):
                name = f"{shape.name}, {'LoRA' if is_lora else 'full'} step, {side}"
                listed[name] = Part(partial(training, shape, trainer, is_lora=is_lora))
        listed[f"{shape.name}, scoring, catpo"] = Part(partial(scoring, shape, worker.score))
        listed[f"{shape.name}, scoring, plain forward"] = Part(partial(scoring, shape, worker.forward))
        listed[f"{shape.name}, generation"] = Part(partial(generation, shape))
    return listed


# ---- one part in a process of its own -------------------------------------------------------------------------------------


def run(name: str, tiny: bool, seconds: float) -> list[Row]:
    """Rows of a part, or what became of it."""
    context: Any = multiprocessing.get_context(start_method())
    read, write = context.Pipe(duplex=False)
    process = context.Process(target=in_process, args=(name, tiny, write))
    process.start()
    write.close()
    try:
        rows: list[Row] = read.recv() if read.poll(seconds) else [{"note": f"stopped after {seconds:.0f} s: the time is up"}]
    except EOFError:
        process.join()
        rows = [failure(name, f"its process ended with status {process.exitcode}")]
    finally:
        process.kill()
        process.join()
    return rows


def start_method() -> str:
    """A forked process cannot use a GPU that this one has looked at; a spawned one imports everything again."""
    return "spawn" if torch.cuda.is_available() else "fork"


def in_process(name: str, tiny: bool, write: Any) -> None:
    gc.freeze()  # else every collection looks at all that was imported
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = parts(tiny)[name].run(Path(folder))
        except Exception as error:
            traceback.print_exc()
            rows = [failure(name, f"{type(error).__name__}: {first_line(error)[:200]}")]
        write.send(rows)


def failure(name: str, reason: str) -> Row:
    """A check that could not be made has not held."""
    row: Row = {"note": f"FAILED: {reason}"}
    return {**row, "holds": False} if "equality" in name else row


# ---- the card and the model -----------------------------------------------------------------------------------------------


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def card() -> Row:
    name, total = platform.processor() or platform.machine(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device() == "cuda":
        found = torch.cuda.get_device_properties(0)
        name, total = found.name, found.total_memory
    return {"card": name, "memory_gb": total / 1e9, "peak_tflops": peak_of(name), "torch": torch.__version__}


def peak_of(card: str) -> int | None:
    """TFLOP/s of a whole card; None for one that is not in the table."""
    words = set(re.split("[ -]", card))
    if "MIG" in words:  # a share of a card
        return None
    return next((peak for name, peak in PEAK.items() if set(name.split()) <= words), None)


def random_family(shape: Shape, dtype: torch.dtype) -> Family:
    model, processor = build(shape, device(), dtype)
    return family_of(model.eval(), processor, model_id=shape.name)


def plan_of(shape: Shape, folder: Path, command: str, **given: Any) -> Plan:
    """What the dry run says; it needs the model's configuration only."""
    for each in blueprint(shape):
        each.save_pretrained(folder / "model")
    write_pairs(folder / "pairs", make_pairs(shape, 4), {})
    return planned(command, pairs=str(folder / "pairs"), model=str(folder / "model"), **given)


# ---- equality -------------------------------------------------------------------------------------------------------------


def equality(shape: Shape, folder: Path) -> list[Row]:
    """The same numbers by different ways, on the model's own widths with few layers."""
    few = replace(
        shape,
        layers=min(shape.layers, CHECKED_LAYERS),
        vision_layers=min(shape.vision_layers, CHECKED_LAYERS),
        whole_layers=(),
    )
    (plain, separate, packed), (_, half_separate, half_packed) = outputs(few)
    logps, attention = "log-probs", "attention to the picture"
    exact, rough = BOUND["float32"], BOUND["bfloat16"]
    rows = [
        compared("packed = separate rows, log-probs", packed[logps], separate[logps], exact),
        compared("packed = plain eager forward, log-probs", packed[logps], plain[logps], exact),
        compared("recorded = eager attention", packed[attention], plain[attention], 0.01 * float(plain[attention].max())),
        compared("packed = separate rows in bfloat16, log-probs", half_packed[logps], half_separate[logps], rough),
        compared("bfloat16 near float32, log-probs", half_packed[logps].float(), packed[logps], rough),
    ]
    for dtype, bound in BOUND.items():
        cached, online = (losses(few, getattr(torch, dtype), trainer, folder / dtype) for trainer in (CATPO, "naive"))
        name = f"cached reference = online with separate rows and whole logits, {dtype}, losses"
        rows.append(compared(name, cached, online, bound / 2))
    return rows


def outputs(shape: Shape) -> list[list[dict[str, Tensor]]]:
    """Log-probs and attention to the picture: from plain eager attention, separate rows and packed ones; in both precisions."""
    family, half = random_family(shape, torch.float32), random_family(shape, torch.bfloat16)
    half.unwrapped.load_state_dict(family.unwrapped.state_dict())
    encoded, layers = family.encode(make_pairs(shape, 1)[0]), choose_layers("paper", family.depth)
    found = []
    with torch.inference_mode():
        for each in (family, half):
            each.shares_prefix = False
            plain, separate = eager_outputs(each, encoded, layers), recorded_outputs(each, encoded, layers)
            each.shares_prefix = True
            found.append([plain, separate, recorded_outputs(each, encoded, layers)])
    return found


def losses(shape: Shape, dtype: torch.dtype, trainer: str, folder: Path) -> Tensor:
    """Of LoRA steps from the same beginning."""
    done = trained(random_family(shape, dtype), shape, trainer, folder, is_lora=True, pairs=1, bf16=dtype == torch.bfloat16)
    return torch.tensor(done["losses"])


def compared(name: str, found: Tensor, expected: Tensor, bound: float) -> Row:
    difference = float((found - expected).abs().max())
    return {"check": name, "difference": difference, "bound": bound, "holds": difference <= bound}  # NaN does not hold


# ---- speed ----------------------------------------------------------------------------------------------------------------


def training(shape: Shape, trainer: str, folder: Path, *, is_lora: bool) -> list[Row]:
    """A step, both sides with the same batch, precision, attention, adapter and checkpointing.

    Full training has float32 weights under bfloat16 autocast. TRL holds a frozen bfloat16 copy of the model beside them.
    """
    pairs, dtype = (2, "bfloat16") if is_lora else (1, "float32")
    made = plan_of(
        shape, folder, "train", lora=worker.LORA if is_lora else None, objective=CATPO, dtype=dtype, bf16=True,
        per_device_train_batch_size=pairs, gradient_checkpointing=not is_lora, eval_fraction=0.0, num_train_epochs=1,
    )  # fmt: skip
    copy = 2 * made.parameters if trainer == "trl" and not is_lora else 0
    needed, total = (sum(made.memory.values()) + copy) / 1e9, card()["memory_gb"]
    if needed > total:
        return [{"note": f"does not fit: needs {needed:.0f} GB by the dry run, and there are {total:.0f} GB"}]
    family = random_family(shape, getattr(torch, dtype))
    done = trained(family, shape, trainer, folder, is_lora=is_lora, pairs=pairs, bf16=True)
    return [speed(statistics.median(done["seconds"]), pairs, made)]


def trained(
    family: Family, shape: Shape, trainer: str, folder: Path, *, is_lora: bool, pairs: int, bf16: bool
) -> dict[str, Any]:
    """What `bench.worker` measures of some steps; ours reads a store that is scored before."""
    options = Namespace(
        shape=shape, model=family, trainer=trainer, rewards=folder / "rewards", pairs=pairs, steps=STEPS, workers=0,
        lora=is_lora, checkpointing=not is_lora, bf16=bf16, clock="wall", counts=False,
    )  # fmt: skip
    if trainer == CATPO:
        score_pairs(make_pairs(shape, pairs * (STEPS + 1)), family, options.rewards, progress=False)
    return worker.train(options, folder / trainer[:5])


def scoring(shape: Shape, work: Callable[[Namespace, Path], dict[str, Any]], folder: Path) -> list[Row]:
    """All of `catpo score` on pairs in memory; or, as a floor, the model on the same packed rows and the log-probs."""
    family, pairs = random_family(shape, torch.bfloat16), 2 * SCORED
    done = work(Namespace(shape=shape, model=family, pairs=SCORED, steps=2, clock="wall"), folder)
    return [speed(done["seconds"][0], pairs, plan_of(shape, folder, "score"))]


def generation(shape: Shape, folder: Path) -> list[Row]:
    """Greedy answers, all of the same length."""
    family, pairs = random_family(shape, torch.bfloat16), make_pairs(shape, SCORED)
    family.unwrapped.generation_config.min_new_tokens = NEW
    samples = [Sample(pair.id, pair.images, pair.prompt) for pair in pairs]
    answer = partial(family.generate, samples, max_new_tokens=NEW)
    answer()
    seconds = worker.measured(answer)["seconds"][0]
    encoded = replace(family.encode(pairs[0]), response_ids={"chosen": [0] * NEW})
    flops = sizes.operations(family, [encoded], [sizes.Share(encoded.length, encoded.length**2)]).forward
    return [figures(seconds, SCORED * NEW, SCORED * flops)]


def speed(seconds: float, pairs: int, made: Plan) -> Row:
    """Tokens count once per pair, the prompt too, and operations as the dry run says, whatever a side makes of them."""
    return figures(seconds, pairs * made.token_passes / made.pairs, pairs * made.work.flops / made.pairs)


def figures(seconds: float, tokens: float, flops: float) -> Row:
    peak = card()["peak_tflops"]
    return {
        "seconds": seconds,
        "memory_gb": worker.peak_mebibytes() * 2**20 / 1e9,
        "tokens_per_second": tokens / seconds,
        "share_of_peak": flops / seconds / (peak * 1e12) if peak else None,
    }


# ---- report ---------------------------------------------------------------------------------------------------------------


def sentence(name: str, row: Row) -> str:
    """A row as it appears while the rest is still running."""
    if "check" in row:
        verdict = "holds" if row["holds"] else "DOES NOT HOLD"
        return f"{name}: {row['check']}: {row['difference']:.2g}, at most {row['bound']:.2g}: {verdict}"
    return f"{name}: " + (row.get("note") or ", ".join(f"{key} {shown(value)}" for key, value in row.items()))


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


CHECK, SPEED = ("check", "difference", "bound", "holds"), ("seconds", "memory_gb", "tokens_per_second", "share_of_peak")


def tables(rows: Sequence[Row]) -> list[Table]:
    """Checks, speeds, and what is missing and why; each with the part that it belongs to."""
    made = []
    for titles in (CHECK, SPEED, ("note",)):
        table = Table("part", *titles)
        for row in rows:
            if titles[0] in row:
                table.add_row(row["part"], *(shown(row[title]) for title in titles))
        made.append(table)
    return [table for table in made if table.row_count]


if __name__ == "__main__":
    main()
