"""Every command that writes, on small data with the built-in model: what `bench.kills` kills and gives again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from catpo.core.types import PreferencePair, pair_id
from catpo.data import convert
from catpo.data.pair_folder import write_pairs
from catpo.data.read import open_data
from catpo.evaluation.evaluate import evaluate
from catpo.experiments.rounds import rounds
from catpo.experiments.study.run import study
from catpo.models.merging import merge
from catpo.pairing.pair import pair
from catpo.reporting.build import report
from catpo.scoring.score import score
from catpo.training.train import train

STUDY = """
title: Small
model: builtin
data: folder(source='{pairs}')
seeds: [0]
learning_rates: [1e-4]
rows: {{dpo: dpo, catpo: catpo}}
train: {{max_steps: 2, per_device_train_batch_size: 1, gradient_accumulation_steps: 1, eval_fraction: 0.0}}
"""
LORA = "lora(r=2, alpha=4, dropout=0.1)"
ROUND = "max_steps=1, learning_rate=1e-3, per_device_train_batch_size=2, gradient_accumulation_steps=1, eval_fraction=0.0"


@dataclass(frozen=True)
class Work:
    """A command on small data; called again on the same folder, it resumes."""

    command: str
    run: Callable[[Path, Path], object]
    """(inputs, output)"""
    processes: int = 1

    @property
    def name(self) -> str:
        return f"{self.command}, {self.processes} processes" if self.processes > 1 else self.command


def _pair(inputs: Path, output: Path, method: str = "corrected", **options: Any) -> object:
    given = dict(data="scenes(count=6)", batch_size=2, block_size=2, progress=False, method=method, **options)
    return pair(model="builtin", output=output, **given)


def _score(inputs: Path, output: Path, **options: Any) -> object:
    given = dict(batch_size=2, shard_size=2, progress=False, **options)
    return score(pairs=inputs / "pairs", model="builtin", output=output, **given)


def _train(inputs: Path, output: Path, **options: Any) -> object:
    given: dict[str, Any] = dict(
        rewards=inputs / "rewards",
        objective="catpo",
        lora=None,
        num_train_epochs=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        eval_fraction=0.25,
        save_steps=2,
        logging_steps=3,
        learning_rate=1e-4,
        progress=False,
    )
    return train(pairs=inputs / "pairs", model="builtin", output=output, **{**given, **options})


def _evaluate(inputs: Path, output: Path) -> object:
    given = dict(benchmarks=["scenes(count=3)"], batch_size=3, max_new_tokens=6, progress=False)
    return evaluate(model="builtin", output=output, **given)


def _report(inputs: Path, output: Path) -> object:
    made = dict(runs=[inputs / "run"], evaluations=[inputs / "evaluation"])
    return report(output=output, pairs=inputs / "pairs", rewards=inputs / "rewards", **made)


def _convert(inputs: Path, output: Path) -> object:
    convert.BLOCK = 2  # several blocks
    return convert.convert_data(inputs / "pairs", output)


def _merge(inputs: Path, output: Path) -> object:
    return merge("builtin", output / "model", adapter=inputs / "run" / "model")


def _rounds(inputs: Path, output: Path) -> object:
    return rounds(
        model="builtin", data="scenes(count=4)", output=output, rounds=2, method="seva", objective="dpo",
        pair="max_new_tokens=6, block_size=2", score="attention_maps=False", train=f"{ROUND}, lora='lora(r=2, alpha=4)'",
        progress=False,
    )  # fmt: skip


def _study(inputs: Path, output: Path, jobs: int = 1) -> object:
    file = inputs / "small.yaml"
    file.write_text(STUDY.format(pairs=inputs / "pairs"))
    return study(file, output=output, jobs=jobs)


WORKS = [
    Work("pair", _pair),
    Work("pair csr", partial(_pair, method="csr(branches=2, best=1, worst=1, sentences=2, sentence_tokens=40)")),
    Work("pair seva", partial(_pair, method="seva", max_new_tokens=8)),
    Work("pair povid", partial(_pair, method="povid", max_new_tokens=8)),
    Work("pair rlaif", partial(_pair, method="rlaif(candidates=2)", judge="truth", max_new_tokens=16)),
    Work("score", _score),
    Work("score workers", partial(_score, dataloader_num_workers=2)),
    Work("train full", _train),
    Work("train lora", partial(_train, lora=LORA)),
    Work("train adaptive", partial(_train, rescore_every=2)),
    Work("train learned fusion", partial(_train, objective="catpo(learned=True, learned_rate=0.05)")),
    Work("train views", partial(_train, objective="mdpo")),
    Work("train workers", partial(_train, dataloader_num_workers=2)),
    Work("train without rewards", partial(_train, rewards=None, lora=LORA)),
    Work("evaluate", _evaluate),
    Work("report", _report),
    Work("data convert", _convert),
    Work("merge", _merge),
    Work("rounds", _rounds),
    Work("study", _study),
    Work("study jobs 2", partial(_study, jobs=2)),
    Work("pair", _pair, processes=2),
    Work("score", _score, processes=2),
    Work("evaluate", _evaluate, processes=2),
    Work("train full", _train, processes=2),
    Work("train lora", partial(_train, lora=LORA), processes=2),
]


def make_inputs(output: Path, *, with_run: bool = False) -> None:
    """Pairs of short captions and their rewards; and a run, an adapter and an evaluation."""
    samples = list(open_data("scenes(count=8)").samples())
    texts = [f"There is a picture with the number {number}." for number in range(len(samples) + 1)]
    rows = [(sample.images, sample.prompt, texts[number], texts[number + 1]) for number, sample in enumerate(samples)]
    write_pairs(output / "pairs", [PreferencePair(pair_id(*row), *row) for row in rows], {})
    score(pairs=output / "pairs", model="builtin", output=output / "rewards", progress=False)
    if with_run:
        _train(output, output / "run", lora=LORA, max_steps=2)
        _evaluate(output, output / "evaluation")
