"""One measured process: runs one kind of work on pairs of a shape and prints times, peak memory and losses as JSON."""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from bench import answering, leaves
from bench.counting import counter
from bench.shapes import SHAPES
from catpo.core.types import SIDES, PatchGrid, PreferencePair, Side
from catpo.files.lock import lock
from catpo.models import family as families
from catpo.models import loading
from catpo.models.output_head import token_stats
from catpo.models.packing import Batch, pack, response_hidden, run_backbone
from catpo.models.transfer import to_device
from catpo.rewards.store import ResponseRow, RewardStore
from catpo.rewards.writer import RewardWriter
from catpo.scoring.score import score_pairs
from catpo.scoring.settings import PAPER_SIGNALS
from catpo.training.config import CatPOConfig
from catpo.training.lora import lora_config
from catpo.training.pair_stats import PairStats, Quantity
from catpo.training.trainer import CatPOTrainer

LORA = "lora(r=16, alpha=32)"
TRL = ("trl", "trl-responses")
"""TRL as shipped, and with its head on response positions only, as on CUDA."""


def wall_time() -> float:
    """Seconds; what a GPU has been asked for is waited for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS: dict[str, Callable[[], float]] = {"wall": wall_time, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, help=", ".join(WORK))
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rewards", type=Path)
    parser.add_argument("--trainer", default="", help="trl, trl-responses, naive, an objective of ours, or plain")
    parser.add_argument("--pairs", type=int, default=1, help="pairs per batch")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one warm-up step")
    parser.add_argument("--branches", type=int, default=1, help="answers to each picture")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, on both sides")
    parser.set_defaults(counts=True)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, on both sides")
    parser.add_argument(
        "--clock", default="wall", choices=CLOCKS, help="cpu: CPU time of this process, unaffected by other work"
    )
    options = parser.parse_args()
    options.shape = SHAPES[options.shape]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as output:
        print(json.dumps(WORK[options.work](options, Path(output))))


def opened(options: argparse.Namespace, count: int) -> tuple[families.Family, list[PreferencePair]]:
    """The model, by its folder or in memory, and so many pairs of its shape."""
    family = options.model if isinstance(options.model, families.Family) else loading.load(options.model)
    return family, leaves.pairs_for(getattr(options, "work", ""), options.shape, count)


# ---- training -------------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Records the time of each step and between steps (fetching data), and operations and token passes of the first step."""

    def __init__(
        self, decoder: type[torch.nn.Module], clock: Callable[[], float], *, backward: int, counts: bool = True
    ) -> None:
        self.counts = counts
        self.steps: list[float] = []
        self.between: list[float] = []
        self.flops = counter()
        self.decoder, self.clock, self.backward, self.token_passes = decoder, clock, backward, 0
        register_module_forward_hook(self.count)

    def count(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        """Count token passes through a decoder: one forward, plus `backward` if a graph is kept."""
        if isinstance(module, self.decoder) and not self.steps:
            hidden = output.last_hidden_state
            self.token_passes += hidden.shape[0] * hidden.shape[1] * (1 + self.backward * hidden.requires_grad)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.clock()
        if self.steps:
            self.between.append(self.began - self.ended)
        elif self.counts:
            self.flops.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.steps and self.counts:
            self.flops.__exit__(None, None, None)
        self.ended = self.clock()
        self.steps.append(self.ended - self.began)

    def seconds(self) -> list[float]:
        """Time of each step including its wait for data, without the first."""
        return [step + wait for step, wait in zip(self.steps[1:], self.between, strict=True)]


def train(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    family, pairs = opened(options, options.pairs * (options.steps + 1))
    before = resident_mebibytes()
    trainer, watch = make_trainer(options, family, pairs, output, options.steps + 1)
    with response_only_head(options.trainer):
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {
        "seconds": watch.seconds(),
        "waits": watch.between,
        "memory": peak_mebibytes() - before,
        "losses": losses,
        "flops": watch.flops.get_total_flops(),
        "token_passes": watch.token_passes,
    }


def ranked(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Training on the pairs of ranked answers, which share rows unless they are to stand alone."""
    with leaves.sharing(options.trainer):
        options.trainer = options.trainer.removeprefix(leaves.ALONE).strip()
        return train(options, output)


def make_trainer(
    options: argparse.Namespace, family: families.Family, pairs: list[PreferencePair], output: Path, steps: int
) -> tuple[Any, Watch]:
    common = {
        "output_dir": str(output),
        "per_device_train_batch_size": options.pairs,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",  # the defaults differ
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": family.device.type == "cpu",
        "bf16": options.bf16,  # TRL's default is on
        "disable_tqdm": True,
        "dataloader_num_workers": options.workers,
        "seed": 0,
        "beta": 0.1,
    }
    backward = 1 if options.lora else 2  # frozen weights need no gradient
    watch = Watch(type(family.decoder), CLOCKS[options.clock], backward=backward, counts=options.counts)
    trainer = (_trl if options.trainer in TRL else _ours)(options, family, pairs, common)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(watch)
    return trainer, watch


def _ours(options: argparse.Namespace, family: families.Family, pairs: list[PreferencePair], common: dict[str, Any]) -> Any:
    peft_config = lora_config(LORA, family) if options.lora else None
    is_naive = options.trainer == "naive"
    arguments = CatPOConfig(
        **common,
        objective="catpo" if is_naive else options.trainer,
        rewards=str(options.rewards),
        self_check=False,
        gradient_checkpointing=options.checkpointing,
        reference="online" if is_naive else "cached",
        prefix="separate" if is_naive else "shared",
    )
    return (NaiveTrainer if is_naive else CatPOTrainer)(family, arguments, pairs, peft_config=peft_config)


class NaiveTrainer(CatPOTrainer):
    """Cat-PO as in its official release: one row per response, two forwards of each model, full logits."""

    def pair_stats(self, model: Any, batch: Batch) -> PairStats:
        mask = batch["mask"]
        with torch.no_grad():
            for _ in range(2):
                reference_log_probs = self._in_reference(batch, lambda model: self._log_probs(model, batch))
        for _ in range(2):
            log_probs = self._log_probs(model, batch)
        kl = (log_probs.exp() * (log_probs - reference_log_probs)).sum(-1)
        place = batch["row"][:, :, None], batch["predictors"].clamp(min=0)
        at_token = lambda values: values[place].gather(-1, batch["token_ids"][..., None])[..., 0]
        values = {
            Quantity("mask"): mask,
            Quantity("weights"): batch["weights"],
            Quantity("policy_logps"): at_token(log_probs),
            Quantity("reference_logps"): at_token(reference_log_probs),
            self.divergence or Quantity("kl"): kl[place],
        }
        return PairStats(values.__getitem__)

    def _log_probs(self, model: Any, batch: Batch) -> Tensor:
        return model(**batch["model_inputs"], use_cache=False).logits.log_softmax(-1)


def _trl(options: argparse.Namespace, family: families.Family, pairs: list[PreferencePair], common: dict[str, Any]) -> Any:
    from trl import DPOConfig, DPOTrainer

    family.freeze_vision()
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"images": List(ImageFeature()), "prompt": message, "chosen": message, "rejected": message})
    rows = Dataset.from_list([_row(pair) for pair in pairs], features=features)
    return DPOTrainer(
        model=family.model,
        ref_model=None if options.lora else _frozen_copy(family.model, options),
        args=DPOConfig(**common, max_length=None, gradient_checkpointing=options.checkpointing),
        train_dataset=rows,
        processing_class=family.processor,
        peft_config=lora_config(LORA, family) if options.lora else None,
    )


def _frozen_copy(model: torch.nn.Module, options: argparse.Namespace) -> torch.nn.Module:
    """In the precision that it computes in, since it is not trained."""
    return copy.deepcopy(model).to(torch.bfloat16 if options.bf16 else next(model.parameters()).dtype)


def _row(pair: PreferencePair) -> dict[str, Any]:
    return {
        "images": [pair.images[0].open()],
        "prompt": [{"role": "user", "content": pair.prompt}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


def response_only_head(trainer: str) -> Any:
    """TRL restricts its head to responses only where Triton runs; make it do so here, with its torch kernels."""
    if trainer != "trl-responses":
        return nullcontext()
    return mock.patch("trl.trainer.utils._use_triton", return_value=True)


# ---- scoring --------------------------------------------------------------------------------------------------------------


def score(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """All of `catpo score`: encoding, forward pass, signals, store with hidden states."""
    family, pairs = opened(options, options.pairs * options.steps)
    score_pairs(pairs[:1], family, output / "warm", progress=False)
    return measured(lambda: score_pairs(pairs, family, output / "rewards", progress=False), CLOCKS[options.clock])


def asked(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """The same with questions beside each pair; their answers are compared as losses."""
    family, pairs = opened(options, options.pairs * options.steps)
    with leaves.sharing(options.trainer), leaves.answers_kept(family) as answers:
        score_pairs(pairs[:1], family, output / "warm", progress=False, ask=leaves.questions_of)
        answers.clear()
        run = lambda: score_pairs(pairs, family, output / "rewards", progress=False, ask=leaves.questions_of)
        result = measured(run, CLOCKS[options.clock])
    return result | {"losses": answers}


def self_asked(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """All of `catpo score` with the signal self_question."""
    family, pairs = opened(options, options.pairs * options.steps)
    settings = leaves.self_question(output)
    score_pairs(pairs[:1], family, output / "warm", settings, progress=False)
    return measured(lambda: score_pairs(pairs, family, output / "rewards", settings, progress=False), CLOCKS[options.clock])


def forward(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """The same packed rows in the same batches through the plain model, and the log-probs of their response tokens."""
    family, pairs = opened(options, options.pairs * options.steps)

    def run(some: Sequence[PreferencePair]) -> None:
        batch = to_device(pack(family, [family.encode(pair) for pair in some]), family.device)
        hidden = response_hidden(run_backbone(family.unwrapped, batch).last_hidden_state, batch)
        token_stats(hidden, family.head, batch["flat_ids"])

    with torch.inference_mode():
        run(pairs[:1])
        return measured(lambda: [run(pairs[at : at + options.pairs]) for at in range(0, len(pairs), options.pairs)])


def eager(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Chosen and rejected separately, with full attention maps of every layer and full logits."""
    family, pairs = opened(options, options.pairs * options.steps)
    layer = int(0.6 * family.depth)

    def run(pair: PreferencePair) -> None:
        batch = pack(family, [family.encode(pair)], prefix="separate")
        for row in range(2):
            inputs = {name: values[row : row + 1] for name, values in batch["model_inputs"].items() if name != "pixel_values"}
            out = family.unwrapped(**_one_picture(batch, inputs), use_cache=False, output_attentions=True)
            out.logits.log_softmax(-1)
            patches = batch["patches"][row]
            out.attentions[layer].mean(1)[:, :, patches].sum(-1)

    with torch.inference_mode(), family.eager_attention():
        run(pairs[0])
        return measured(lambda: [run(pair) for pair in pairs])


def _one_picture(batch: Batch, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    pixels = batch["model_inputs"]["pixel_values"]
    position_ids = batch["model_inputs"].get("position_ids")
    more = {} if position_ids is None else {"position_ids": position_ids[..., :1, :]}
    return {**inputs, **more, "pixel_values": pixels[: len(pixels) // len(SIDES)]}


def epoch(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """One epoch from scratch; ours scores first."""
    family, pairs = opened(options, options.pairs * options.steps)

    def run() -> None:
        if options.trainer not in TRL:
            score_pairs(pairs, family, output / "rewards", progress=False)
            options.rewards = output / "rewards"
        trainer, _ = make_trainer(options, family, pairs, output, options.steps)
        with response_only_head(options.trainer):
            trainer.train()

    return measured(run)


def signals(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Open a reward store of many pairs and read every response's signals."""
    rng = np.random.default_rng(0)
    names, tokens, shard = (*PAPER_SIGNALS, "image_contrast"), 80, 64
    ids = [f"pair-{number}" for number in range(options.pairs)]

    def response(pair: str, side: Side) -> ResponseRow:
        values = {name: rng.random(tokens, np.float32) for name in names}
        special, labels = np.arange(tokens) == tokens - 1, np.full(tokens, -1, np.int8)
        grids = [PatchGrid(0, 24, 24, (0.0, 0.0, 1.0, 1.0))]
        words = rng.integers(0, 32_000, tokens, np.int32)
        return ResponseRow(
            pair_id=pair, side=side, token_ids=words, logps=-values["semantic"], signals=values, labels=labels,
            pieces=[f" word{word}" for word in words], is_special=special, grids=grids,
        )  # fmt: skip

    with lock(output / "store") as folder:
        about = {"model": "none", "signals": list(names), "hidden": False, "maps": False}
        writer = RewardWriter.create_or_resume(folder, about, ids, shard_size=shard)
        for number in writer.missing_shards():
            here = ids[writer.pairs_of(number)]
            writer.write_shard(number, [response(pair, side) for pair in here for side in SIDES])
        writer.finish()

    def run() -> None:
        store = RewardStore.open(folder)
        assert sum(len(store.get(pair, side).signals) for pair in ids for side in SIDES) == 2 * len(ids) * len(names)

    return measured(run)


def measured(run: Callable[[], object], clock: Callable[[], float] = wall_time) -> dict[str, Any]:
    before = resident_mebibytes()
    began = clock()
    run()
    return {"seconds": [clock() - began], "memory": peak_mebibytes() - before, "losses": []}


# ---- memory ---------------------------------------------------------------------------------------------------------------


def resident_mebibytes() -> float:
    """What the process holds now, on the GPU if it uses one; the peak is counted from here."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_mebibytes() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else _status("VmHWM")


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def answers(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Questions about a picture; see `bench.answering`."""
    return answering.answers(options, lambda run: measured(run, CLOCKS[options.clock]))


def draws(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Several answers to one prompt."""
    return answering.draws(options, lambda run: measured(run, CLOCKS[options.clock]))


def csr(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """A tree of sentences."""
    return answering.csr_tree(options, lambda run: measured(run, CLOCKS[options.clock]))


def decoded(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Captions by a decoding."""
    return answering.decoded(options, lambda run: measured(run, CLOCKS[options.clock]))


KINDS = (train, ranked, score, asked, self_asked, forward, eager, epoch, signals, answers, draws, csr, decoded)
WORK = {each.__name__: each for each in KINDS}

if __name__ == "__main__":
    main()
