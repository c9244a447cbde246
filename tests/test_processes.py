"""Training in two processes, as `torchrun` starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from catpo.errors import UserError
from catpo.pairs_file import write_pairs
from catpo.scoring import score
from catpo.training import train
from tiny import llava, pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    write_pairs(path / "pairs", pairs(8), {})
    family = llava()
    family.model.save_pretrained(path / "model")
    family.processor.save_pretrained(path / "model")
    score(pairs=str(path / "pairs"), model=path / "model", output=path / "rewards", progress=False)
    return path


def run(folder, name, processes, *flags):
    """A training with two pairs per step, and its losses."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, "-m", "catpo", "train", "--pairs", str(folder / "pairs"), "--model", str(folder / "model"),
               "--output", str(folder / name), "--batch-size", str(2 // processes), "--accumulation", "1", "--epochs", "1",
               "--dev-share", "0", "--logging-steps", "1", "--learning-rate", "1e-3", *flags]  # fmt: skip
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)


def losses(folder, name):
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("lora", ["none", pytest.param("lora(r=4, alpha=8)", marks=pytest.mark.slow)], ids=["full", "lora"])
def test_two_processes_train_as_one_does(folder, lora):
    curves = []
    for processes in (1, 2):
        done = run(folder, f"{lora[:4]}-{processes}", processes, "--rewards", str(folder / "rewards"), "--lora", lora)
        assert done.returncode == 0, done.stderr[-3000:]
        curves.append(losses(folder, f"{lora[:4]}-{processes}"))
    assert len(curves[0]) == 4 and curves[0][-1] != curves[0][0]
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert json.loads((folder / f"{lora[:4]}-2" / "catpo.json").read_text())["complete"]


def test_several_processes_do_not_score_on_the_side(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run `catpo score` first"):
        train(pairs=str(folder / "pairs"), model=folder / "model", output=tmp_path / "unscored")
