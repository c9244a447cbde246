"""The demo's recipe runs from the first command to the last, on fewer pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from catpo.cli import main
from catpo.cli.demo import OBJECTIVES, DemoSettings
from catpo.config import recipes
from catpo.rewards.store import RewardStore

RECIPE = recipes.SHIPPED / "demo.yaml"
FEWER = {
    "pair": ["--limit", "24"],
    "score": ["--limit", "6"],
    "train": ["--max-steps", "2", "--eval-fraction", "0", "--limit", "6"],
}
FEWER |= {
    "train": [*FEWER["train"], "--per-device-train-batch-size", "2", "--logging-steps", "1"],
    "evaluate": ["--limit", "6"],
    "report": [],
}


def test_the_demo_recipe_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], builtin: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for command, flags in FEWER.items():
        main.main([command, "--config", str(RECIPE), *flags])
    folder = tmp_path / "runs" / "demo"
    store = RewardStore.open(folder / "rewards")
    assert len(store) == 6
    assert set(store.signals) == {"global_attention", "patch_entropy", "semantic", "image_contrast", "patch_logit"}
    scores = json.loads((folder / "evaluation" / "scores.json").read_text())
    assert 0 <= scores["benchmarks"]["scenes"]["metrics"]["chair_i"]["value"] <= 100
    assert (folder / "report.html").stat().st_size > 10_000
    shown = capsys.readouterr().out
    for words in ("pairs of 24 answers", "Reward store: ", "image_contrast", "Trained model: ", "chair_i", "Report: "):
        assert words in shown

    main.main(["inspect", str(folder / "rewards"), "--pair", store.pair_ids[0]])
    words = json.loads((folder / "pairs" / "pairs.jsonl").read_text().splitlines()[0])["chosen"]
    assert re.findall(r"\w+", words)[0] in capsys.readouterr().out


def test_the_recipe_does_what_the_demo_does() -> None:
    recipe, settings = recipes.read(RECIPE), DemoSettings()
    assert recipe["pair"]["data"] == f"scenes(count={settings.pictures})"
    train = {name: recipe["train"][name] for name in ("learning_rate", "num_train_epochs", "per_device_train_batch_size")}
    assert train == {name: getattr(settings, name) for name in train}
    assert train == {name: float(recipes.FOR_BUILTIN[name]) for name in train}
    assert recipe["train"]["objective"] in OBJECTIVES.values()


def test_the_commands_in_the_recipes_comment_are_its_sections() -> None:
    named = re.findall(r"^#\s+catpo (\w+) +--config", RECIPE.read_text(), flags=re.MULTILINE)
    assert named == list(recipes.read(RECIPE))
