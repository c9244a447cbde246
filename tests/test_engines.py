"""Training engines in two processes give the loss curve and the weights of one process: DDP, FSDP2, DeepSpeed ZeRO-2 and -3.

The environment of each is what `accelerate launch` with the file of `catpo init --recipe …` sets. The run folder says which
engine really ran: accelerate leaves FSDP out on CPUs without a word, unless told as `bench.launching` does.
"""

from __future__ import annotations

import json
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from bench.launching import environment_of, together
from safetensors.torch import load_file
from torch.testing import assert_close

from catpo.config.recipes import SHIPPED
from catpo.files.json_files import read_rows
from catpo.models import loading
from catpo.runtime.work_group import WorkGroup
from catpo.scoring.score import score_pairs
from catpo.training.callbacks import MetricsFile
from catpo.training.train import train
from tiny import pairs

RECIPES = SHIPPED / "accelerate"
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
LORA = "lora(r=4, alpha=8)"
CASES = {
    "full": {},
    "lora": {"lora": LORA},
    "online": {"reference": "online"},
    "online lora": {"reference": "online", "lora": LORA},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed lora": {"gradient_checkpointing": True, "lora": LORA},
    "views": {"objective": "mdpo"},
    "views lora": {"objective": "mdpo", "lora": LORA},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    # six pairs: accelerate would fill a last batch up with the first pairs
    "watched": {"eval_fraction": 0.25, "per_device_train_batch_size": 2},
    "learned": {"objective": "catpo(learned=True)"},
}
slow = pytest.mark.slow
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers refuses DeepSpeed in bfloat16 on a CPU")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def trained(folder, store, output, **options):
    """Four steps of four pairs; what was logged, and which engine ran."""
    settings = {
        "lora": None,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2,
        "eval_fraction": 0.0,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "rewards": store,
        "progress": False,
    }
    train(pairs=pairs(8), model=folder, output=output, **{**settings, **options})
    rows = read_rows(output / "metrics.jsonl")
    figures = [row[name] for row in rows for name in ("loss", "grad_norm", "eval_loss") if name in row]
    return figures, json.loads((output / "catpo.json").read_text())["processes"]


def weights(output):
    return load_file(next((output / "model").glob("*.safetensors")))


@pytest.mark.parametrize(
    ("engine", "case"),
    [
        ("fsdp2", "full"),
        ("ddp", "learned"),
        *[pytest.param("ddp", case, marks=slow) for case in CASES if case != "learned"],
        *[pytest.param("fsdp2", case, marks=slow) for case in CASES if case not in ("full", "learned")],
        *[
            pytest.param(engine, case, marks=[slow, needs_deepspeed])
            for engine in ("zero2", "zero3")
            for case in CASES
            if case != "learned"
        ],
    ],
)
def test_an_engine_trains_as_one_process_does(folder, store, tmp_path, engine, case):
    options = CASES[case]
    alone, _ = together(1, partial(trained, folder, store, tmp_path / "alone", **options))[0]
    halved = {**options, "per_device_train_batch_size": options.get("per_device_train_batch_size", 4) // 2}
    two = partial(trained, folder, store, tmp_path / "two", **halved)
    figures, processes = together(2, two, **environment_of(RECIPES / f"{engine}.yaml"))[0]
    assert processes == {"count": 2, "engine": ENGINES[engine]}
    assert len(alone) >= 8 and alone[0] != alone[2]
    assert figures == pytest.approx(alone, abs=1e-4)
    assert_close(weights(tmp_path / "two"), weights(tmp_path / "alone"), atol=1e-4, rtol=0)


@slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=[needs_deepspeed, needs_gpu])])
def test_an_engine_in_bfloat16_stays_near_one_process(folder, store, tmp_path, engine):
    alone, _ = together(1, partial(trained, folder, store, tmp_path / "alone", bf16=True))[0]
    two = partial(trained, folder, store, tmp_path / "two", bf16=True, per_device_train_batch_size=2)
    figures, _ = together(2, two, **environment_of(RECIPES / f"{engine}.yaml"))[0]
    assert figures[::2] == pytest.approx(alone[::2], abs=0.02)


@pytest.mark.parametrize(
    ("engine", "lora"),
    [
        ("fsdp2", None),
        *[pytest.param(*case, marks=slow) for case in (("fsdp2", LORA), ("ddp", None), ("ddp", LORA))],
        pytest.param("zero3", None, marks=[slow, needs_deepspeed, needs_gpu]),
    ],
)
def test_an_engine_trains_a_bfloat16_checkpoint_as_one_process_does(folder, tmp_path, engine, lora):
    """Every trained tensor moves: float32 shards, which FSDP2 gathers in bfloat16."""
    family = loading.load(folder)
    family.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    family.processor.save_pretrained(tmp_path / "half")
    half, rewards = tmp_path / "half", tmp_path / "rewards"
    score_pairs(pairs(8), loading.load(half), rewards, progress=False)
    alone, _ = together(1, partial(trained, half, rewards, tmp_path / "alone", lora=lora, max_steps=3))[0]
    two = partial(trained, half, rewards, tmp_path / "two", lora=lora, max_steps=3, per_device_train_batch_size=2)
    figures, _ = together(2, two, **environment_of(RECIPES / f"{engine}.yaml"))[0]
    assert figures[::2] == pytest.approx(alone[::2], abs=0.02)
    tuned = weights(tmp_path / "two")
    assert {each.dtype for each in tuned.values()} == {torch.float32 if lora else torch.bfloat16}
    checkpoint = load_file(next((tmp_path / "two" / "checkpoints").glob("checkpoint-*/*model.safetensors")))
    assert torch.float32 in {each.dtype for each in checkpoint.values()}
    if lora is None:
        base = load_file(half / "model.safetensors")
        still = {name for name in base if torch.equal(base[name], tuned[name])}
        assert still == {name for name in base if "vision" in name or "projector" in name}


@slow
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_sharded_run_is_resumed_where_it_stopped(folder, store, tmp_path, engine, lora):
    environment = environment_of(RECIPES / f"{engine}.yaml")
    run = partial(trained, folder, store, per_device_train_batch_size=2, lora=lora, save_steps=2, lr_scheduler_type="constant")
    straight, _ = together(2, partial(run, tmp_path / "straight"), **environment)[0]
    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        together(2, partial(interrupted, partial(run, tmp_path / "again")), **environment)
    resumed, _ = together(2, partial(run, tmp_path / "again", resume=True), **environment)[0]
    assert resumed == pytest.approx(straight, abs=1e-4)
    assert_close(weights(tmp_path / "again"), weights(tmp_path / "straight"), atol=1e-4, rtol=0)


def test_fsdp2_keeps_no_whole_gradients_between_the_batches_of_a_step(folder, store, tmp_path):
    run = partial(
        trained, folder, store, tmp_path / "run", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1
    )
    both = together(2, partial(gradients_after_a_batch, run), **environment_of(RECIPES / "fsdp2.yaml"))
    family = loading.load(folder)
    trains = sum(each.numel() for each in [*family.decoder.parameters(), family.head.weight])
    assert sum(both) == trains and max(both) < 0.6 * trains


def gradients_after_a_batch(run):
    """How many numbers of the gradients this process holds."""
    held = []

    def count(self, args, state, control, model, **options):
        held.append(sum(each.grad.to_local().numel() for each in model.parameters() if each.grad is not None))

    MetricsFile.on_substep_end = count
    run()
    return held[0]


def interrupted(run):
    on_log = MetricsFile.on_log

    def stop(self, args, state, *rest, **options):
        if state.global_step == 3:
            raise KeyboardInterrupt
        on_log(self, args, state, *rest, **options)

    MetricsFile.on_log = stop
    run()


def test_a_finished_run_lets_go_of_processes_that_come_late(folder, store, tmp_path):
    run = partial(trained, folder, store, tmp_path / "run", per_device_train_batch_size=2, max_steps=1)
    first = together(2, run)
    assert together(2, partial(late, partial(run, resume=True))) == first


def late(run):
    """The second process is a second later once they have found one another."""
    meet = WorkGroup.__init__

    def slowly(group):
        meet(group)
        time.sleep(group.number)

    WorkGroup.__init__ = slowly
    return run()


def test_learned_coefficients_are_refused_where_no_optimiser_takes_them(folder, store, tmp_path):
    run = partial(trained, folder, store, tmp_path / "run", objective="catpo(learned=True)", per_device_train_batch_size=2)
    with pytest.raises(AssertionError, match=r"learned=True is not offered under FSDP[^\n]*--recipe ddp"):
        together(2, run, **environment_of(RECIPES / "fsdp2.yaml"))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_has_a_file_that_accelerate_takes(engine):
    loaded = load_config_from_file(str(RECIPES / f"{engine}.yaml"))
    written = yaml.safe_load((RECIPES / f"{engine}.yaml").read_text())
    assert loaded.num_processes == written["num_processes"] == 8
    assert loaded.mixed_precision == "no"  # catpo's bf16 decides, once
    environment = environment_of(RECIPES / f"{engine}.yaml")
    asked = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}.get(ENGINES[engine])
    assert asked is None or environment[asked] == "true"
    if engine.startswith("zero"):
        settings = json.loads(Path(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text())
        assert settings["zero_optimization"]["stage"] == int(engine[-1])
    assert {file.stem for file in RECIPES.glob("*.yaml")} == set(ENGINES)
