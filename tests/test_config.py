"""Options have one place, and recipes are strict about them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import catpo
from catpo.config import options as config
from catpo.config import recipes
from catpo.config.arguments import is_passed_on
from catpo.config.command import field_docs, hints
from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.spec import Spec, check_options, parse
from catpo.training import objectives

ENGINES = {
    "pair": ("catpo.pairing.pair", "pair"),
    "score": ("catpo.scoring.score", "score"),
    "train": ("catpo.training.train", "train"),
    "evaluate": ("catpo.evaluation.evaluate", "evaluate"),
    "report": ("catpo.reporting.build", "report"),
}
RECIPES = sorted(recipes.SHIPPED.glob("*.yaml"))


@pytest.mark.parametrize("command", ENGINES)
def test_an_engine_has_the_signature_and_the_help_of_its_options(command: str) -> None:
    module, name = ENGINES[command]
    engine = getattr(importlib.import_module(module), name)
    options = config.COMMANDS[command]
    empty = inspect.Parameter.empty
    fields = {f.name: empty if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(options)}
    assert {p.name: p.default for p in inspect.signature(engine).parameters.values()} == fields
    for option, text in field_docs(options).items():
        assert f"    {option}: {text}" in engine.__doc__


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "'score' needs 'pairs': Preference pairs"),
        (
            {"model": "m", "pairs": "p", "output": "o", "batch_sise": 1},
            "'score' has no option 'batch_sise'. Did you mean 'batch_size'",
        ),
        ({"model": "m", "pairs": "p", "output": "o", "batch_size": 0}, "batch_size must be 1 or more, not 0."),
        ({"model": "m", "pairs": "p", "output": "o", "limit": 1 << 31}, "limit must be at most 2,147,483,647, not"),
        ({"model": "m", "pairs": "p", "output": "o", "query": "next"}, "query must be token or predictor, not 'next'."),
        ({"model": None, "pairs": "p", "output": "o"}, "model must be text, not None."),
    ],
)
def test_python_options_are_checked_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        catpo.score(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize("options", config.COMMANDS.values())
def test_every_option_is_explained_in_one_line(options: type) -> None:
    documented = field_docs(options)
    for name in (name for name, hint in hints(options).items() if not is_passed_on(hint)):
        assert documented[name].endswith(".") or documented[name].endswith("none."), (options, name)
        assert len(documented[name]) < 120


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    sections = set(yaml.safe_load(path.read_text())) & set(config.COMMANDS)
    assert {"score", "train", "evaluate", "report"} <= sections
    for command in sections:
        options = config.COMMANDS[command](**recipes.read(path)[command])  # complete: nothing required is missing
        for name, value in vars(options).items():
            for spec in _specs(name, value):
                _check_spec(name, spec)


def _specs(name: str, value: Any) -> list[Spec]:
    if name in ("signals", "benchmarks"):
        return [parse(item) for item in value]
    return [parse(value)] if name in ("objective", "method") else []


def _check_spec(name: str, spec: Spec) -> None:
    if name == "objective":
        objectives.build(spec)
    else:
        kind = {"signals": "signals", "benchmarks": "benchmarks", "method": "pairings"}[name]
        check_options(registry.load(kind, spec.name), spec)


def test_the_starter_recipe_is_complete_and_its_comments_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.starter())
    plain = {command: config.COMMANDS[command](**given) for command, given in recipes.read(path).items()}
    assert plain["score"].model == "builtin"
    uncommented = re.sub(r"^  # ([a-z_]+: )", r"  \1", recipes.starter(), flags=re.MULTILINE)
    assert uncommented != recipes.starter()
    path.write_text(uncommented)
    assert {command: config.COMMANDS[command](**given) for command, given in recipes.read(path).items()} == plain


def read(tmp_path: Path, text: str | bytes) -> dict[str, dict[str, Any]]:
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return recipes.read(path)


def test_sections_win_over_what_is_set_for_all(tmp_path: Path) -> None:
    recipe = read(tmp_path, "model: a\nseed: 3\npair: {seed: 4}\nevaluate: {model: b}\n")
    assert recipe["pair"] == {"model": "a", "seed": 4}
    assert recipe["score"] == {"model": "a"}
    assert recipe["evaluate"] == {"model": "b"}
    assert recipe["report"] == {}


def test_values_get_the_type_of_the_option(tmp_path: Path) -> None:
    train = read(tmp_path, "train: {learning_rate: 1e-6, num_train_epochs: 2, output: a/b, lora: null, resume: true}")["train"]
    assert train == {"learning_rate": 1e-6, "num_train_epochs": 2.0, "output": Path("a/b"), "lora": None, "resume": True}
    assert isinstance(train["num_train_epochs"], float)
    score = read(tmp_path, "score: {layers: [1, 2], signals: semantic, patches: 0}")["score"]
    assert score == {"layers": [1, 2], "signals": ("semantic",), "patches": 0}
    assert read(tmp_path, "report:\n  runs:\n  - a\n  - b\n")["report"] == {"runs": (Path("a"), Path("b"))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {objectve: dpo}", "'train.objectve' is not an option. Did you mean 'train.objective'?"),
        ("train: {zzz: 1}", "'train.zzz' is not an option. Known: adam_beta1, "),
        ("train: {lr: 1}", "'train.lr' is not an option: write learning_rate."),
        ("train: {adam_beta1: high}", "'train.adam_beta1' must be a number, not 'high'."),
        ("train: {optim_target_modules: [1]}", "'train.optim_target_modules' must be text or a list, each text, not [1]."),
        ("trian: {objective: dpo}", "'trian' is not an option. Did you mean 'train'?"),
        ("modell: builtin", "'modell' is not an option. Did you mean 'model'?"),
        ("1: 2", "'1' is not an option."),
        ("null: 2", "'None' is not an option."),
        ("output: here", "'output' differs from command to command. Put it into the sections, e.g. 'train.output'."),
        ("train: {num_train_epochs: six}", "'train.num_train_epochs' must be a number, not 'six'."),
        ("train: {num_train_epochs: true}", "'train.num_train_epochs' must be a number, not True."),
        ("train: {seed: 1.5}", "'train.seed' must be a whole number, not 1.5."),
        ("seed: x", "'seed' must be a whole number, not 'x'."),
        ("train: {resume: 1}", "'train.resume' must be true or false, not 1."),
        ("train: {objective: 3}", "'train.objective' must be text, not 3."),
        ("train: {output: ''}", "'train.output' must be a path, not ''."),
        ("train: {reference: stored}", "'train.reference' must be cached or online, not 'stored'."),
        ("train: {lora: [1]}", "'train.lora' must be text or null, not [1]."),
        (
            "score: {layers: {a: 1}}",
            "'score.layers' must be text, a whole number or a list, each a whole number, not {'a': 1}.",
        ),
        ("score: {signals: [1]}", "'score.signals' must be a list, each text, not [1]."),
        ("score: [1]", "'score' must be lines of the form `option: value`, not [1]."),
        ("just text", "must be lines of the form `option: value`, not 'just text'."),
        ("train: {seed: 1, seed: 2}", "r.yaml, line 1: 'seed' stands twice."),
        ("model: a\nmodel: b", "r.yaml, line 2: 'model' stands twice."),
        ("? [a]\n: b", "line 1: a list or mapping cannot be a key."),
        ("train: {", "r.yaml, line 1: "),
        ("train: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: &a [*a]", "'a' is not an option"),
        ("- " * 5000 + "a", "r.yaml"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
        (b"a: \x00", "r.yaml"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "r.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml cannot be read \(No such file or directory\). `catpo init` writes"):
        recipes.read(tmp_path / "nowhere.yaml")


def test_an_empty_recipe_sets_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing\n") == {command: {} for command in config.COMMANDS}
