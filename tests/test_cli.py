"""The command line: instant help without torch, messages without tracebacks, recipes that flags win over."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import catpo
from catpo.cli import main
from catpo.cli.init import init
from catpo.cli.interrupted import interrupted
from catpo.config import options, recipes
from catpo.config.command import hints
from catpo.core import registry
from catpo.core.errors import UserError
from commands import run

SNAPSHOTS = Path(__file__).parent / "snapshots"
COMMANDS = ["", *sorted(command for command in main.app if not command.startswith("-"))]
ENGINES = {"pair": "pairing.pair", "score": "scoring.score", "train": "training.train", "evaluate": "evaluation.evaluate"}
REQUIRED = {
    "pair": ["--model", "builtin", "--data", "scenes(count=3)", "--output", "out"],
    "score": ["--pairs", "pairs", "--model", "builtin", "--output", "out"],
    "train": ["--pairs", "pairs", "--model", "builtin", "--output", "out"],
    "evaluate": ["--model", "builtin", "--benchmarks", "scenes", "--output", "out"],
}

Engine = Callable[..., dict[str, Any]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an engine was called with; the engines themselves are not imported."""
    received: dict[str, Any] = {}
    results = {
        "pair": "12 pairs",
        "score": [],
        "train": types.SimpleNamespace(output=Path("out"), model="out/model"),
        "evaluate": {"benchmarks": {}},
    }
    for name, module in ENGINES.items():

        def engine(*, _result: Any = results[name], **options: Any) -> Any:
            received.update(options)
            return _result

        fake = types.ModuleType(f"catpo.{module}")
        setattr(fake, name, engine)
        monkeypatch.setitem(sys.modules, f"catpo.{module}", fake)
    monkeypatch.setattr("catpo.rewards.quality.signal_quality", lambda store: [])
    return received


@pytest.mark.skipif(int(version("cyclopts").split(".")[0]) < 5, reason="cyclopts 4 draws its help in another way")
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_it_was(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setenv("TERM", "dumb")
    assert run(*command.split(), "--help") == 0
    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"
    snapshot = SNAPSHOTS / f"help-{command or 'catpo'}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOTS.mkdir(exist_ok=True)
        snapshot.write_text(shown, encoding="utf-8")
    assert snapshot.exists(), f"no {snapshot}; UPDATE_SNAPSHOTS=1 pytest tests/test_cli.py writes it"
    assert shown == snapshot.read_text(encoding="utf-8"), "UPDATE_SNAPSHOTS=1 pytest tests/test_cli.py accepts the new text"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_less_than_half_a_second_and_no_torch(command: str) -> None:
    code = (
        "import os, sys\n"
        "from catpo.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "spent = os.times()\n"
        "heavy = sorted({'torch', 'transformers', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules))\n"
        "print(spent.user + spent.system, *heavy, file=sys.stderr)"
    )
    seconds = []
    for _ in range(6):  # processor time, and the best of six: another process on the machine is not our slowness
        arguments = [sys.executable, "-c", code, *command.split(), "--help"]
        spent, *heavy = subprocess.run(arguments, capture_output=True, text=True, check=True).stderr.split()
        assert heavy == []
        seconds.append(float(spent))
        if min(seconds) < 0.5:
            return
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", ENGINES)
def test_an_engine_gets_the_flags_under_their_own_names(command: str, called: dict[str, Any]) -> None:
    assert run(command, *REQUIRED[command]) == 0
    assert set(called) == set(hints(options.COMMANDS[command]))
    assert str(called["output"]) == "out"


@pytest.mark.parametrize("command", ENGINES)
def test_a_recipe_sets_what_the_command_line_does_not(command: str, called: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    name = "per_device_train_batch_size" if command == "train" else "batch_size"
    recipe.write_text(f"dtype: float32\n{command}: {{limit: 5, {name}: 2}}\n")
    assert run(command, *REQUIRED[command], "--config", str(recipe), f"--{name.replace('_', '-')}", "3") == 0
    assert (called["limit"], called[name], called["dtype"]) == (5, 3, "float32")


def test_arguments_of_transformers_are_flags_and_lines_of_a_recipe(called: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {adam_beta2: 0.9, optim: sgd, lr_scheduler_kwargs: {min_lr_rate: 0.1}, tf32: true}\n")
    flags = ["--adam-beta2", "0.95", "--no-tf32", "--optim-args", "momentum=0.5", "--full_determinism"]
    more = ["--gradient-checkpointing-kwargs", "use_reentrant=False", "--save-total-limit=3"]
    assert run("train", *REQUIRED["train"], "--config", str(recipe), *flags, *more) == 0
    wanted = {
        "adam_beta2": 0.95, "optim": "sgd", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "tf32": False,
        "optim_args": "momentum=0.5", "full_determinism": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_total_limit": 3, "data_seed": None,
    }  # fmt: skip
    assert {name: called[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lr", "1"], "'train' has no option 'lr': write learning_rate."),
        (["--loss-type=ipo"], "'train' has no option 'loss_type': the loss is the objective"),
        (["--neftune-noise-alpha", "5"], "noise in the embeddings would make the policy another one"),
        (["--gradient-checkpointing-kwargs", "no"], "gradient_checkpointing_kwargs must be of the form option=value"),
        (["--seed", "1.5"], "seed must be a whole number, not 1.5."),
        (["--save-total-limit=.5"], "save_total_limit must be a whole number, not .5."),
        (["--adam-beta1", "nan"], "adam_beta1 must be a finite number, not nan."),
    ],
)
def test_flags_of_other_trainers_are_told_what_to_write(flags: list[str], told: str, capsys: Any) -> None:
    assert run("train", *REQUIRED["train"], *flags) == 2
    assert told in capsys.readouterr().err


def test_a_recipe_can_set_everything_that_is_required(called: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: builtin\npairs: here\ntrain: {output: run, lora: null, learning_rate: 1e-6, resume: true, objective: dpo}\n"
    )
    assert run("train", "--config", str(recipe), "--no-resume") == 0
    assert called["lora"] is None
    assert called["learning_rate"] == 1e-6
    assert called["resume"] is False
    assert (called["pairs"], called["output"], called["objective"]) == ("here", Path("run"), "dpo")


def test_lists_of_specs_can_be_written_in_several_ways(called: dict[str, Any], tmp_path: Path) -> None:
    want = ("patch_entropy", "semantic(embedding='hidden')")
    assert run("score", *REQUIRED["score"], "--signals", "patch_entropy, semantic(embedding='hidden')") == 0
    assert called["signals"] == want
    assert run("score", *REQUIRED["score"], "--signals", "patch_entropy", "semantic(embedding='hidden')") == 0
    assert called["signals"] == want
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("score:\n  signals: patch_entropy, semantic(embedding='hidden')\n")
    assert run("score", *REQUIRED["score"], "--config", str(recipe)) == 0
    assert called["signals"] == want


def test_one_process_s_work_is_refused_to_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], called: dict[str, Any]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("study", "some.yaml", "--output=out") == 2
    assert "`catpo study` runs in one process, and 2 were started" in capsys.readouterr().err
    assert run("score", *REQUIRED["score"]) == 0


@pytest.mark.parametrize(
    ("text", "value"), [("all", "all"), ("14", 14), ("19,20", [19, 20]), ("[1, 2]", [1, 2]), ("-1", -1), ("paper", "paper")]
)
def test_layers_are_a_word_or_numbers(text: str, value: object, called: dict[str, Any]) -> None:
    assert run("score", *REQUIRED["score"], f"--layers={text}") == 0
    assert called["layers"] == value


def test_none_means_no_adapter(called: dict[str, Any]) -> None:
    assert run("train", *REQUIRED["train"], "--lora", "none") == 0
    assert called["lora"] is None


def test_a_user_error_is_a_message_and_exit_code_2(
    called: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def engine(**_: Any) -> None:
        raise UserError("pair 7: the picture [red] is missing. Replace it.")

    monkeypatch.setattr(sys.modules["catpo.scoring.score"], "score", engine)
    assert run("score", *REQUIRED["score"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "catpo: pair 7: the picture [red] is missing. Replace it.\n"
    assert shown.out == ""


def test_an_interruption_is_exit_code_130(
    called: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def engine(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["catpo.scoring.score"], "score", engine)
    assert run("score", *REQUIRED["score"]) == 130
    assert capsys.readouterr().err == "catpo: interrupted. Give the same command again to go on.\n"
    monkeypatch.setattr(registry, "plugins", engine)
    assert run("list", "signals") == 130
    assert capsys.readouterr().err.endswith("catpo: interrupted.\n")  # there is nothing to go on with


def test_only_a_command_that_goes_on_says_so(tmp_path: Path) -> None:
    (tmp_path / "once.yaml").write_text("train: {resume: false}\n")
    (tmp_path / "again.yaml").write_text("model: builtin\n")
    once, again = (f"--config={tmp_path / name}.yaml" for name in ("once", "again"))
    for words in (
        ["train"],
        ["train", again],
        ["train", "--resume", once],
        ["score", once],
        ["data", "convert", "x"],
        ["demo"],
    ):
        assert interrupted(words).endswith("Give the same command again to go on."), words
    for words in (
        ["train", once],
        ["train", "--no-resume"],
        ["train", "--config", once[9:]],
        ["train", "--dry-run"],
        ["probe"],
    ):
        assert interrupted(words) == "interrupted.", words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tain"], 'Did you mean "train"'),
        (["recipe.yaml"], "`catpo train --config recipe.yaml`"),
        (["train", "recipe.yaml"], "`catpo train --config recipe.yaml`"),
        (["train", *REQUIRED["train"], "recipe.yml"], "`catpo train --config recipe.yml`"),
        (["score", "--recipe", "recipe.yaml"], "`catpo score --config recipe.yaml`"),
        (["init", "llava-1.5-7b"], "`catpo init --recipe llava-1.5-7b`"),
        (["train", *REQUIRED["train"], "--lr", "1"], "write learning_rate"),
        (["train", *REQUIRED["train"], "--per-device-batch-size", "1"], "write per_device_train_batch_size"),
        (["train", *REQUIRED["train"], "--train_micro_batch_size_per_gpu", "1"], "write per_device_train_batch_size"),
        (["train", *REQUIRED["train"], "--loss_type", "ipo"], "the loss is the objective"),
        (["train", "--loss_type", "ipo"], "the loss is the objective"),
        (["train", "--model_name_or_path=x", "--lr", "1"], "write model."),
        (["train", *REQUIRED["train"], "--pref-loss", "orpo"], "the loss is the objective"),
        (["train", *REQUIRED["train"], "--pref-beta", "0.1"], "give it in the objective"),
        (["train", *REQUIRED["train"], "--lora-rank", "8"], "write lora="),
        (["train", *REQUIRED["train"], "--cutoff-len", "100"], "nothing is cut off"),
        (["train", *REQUIRED["train"], "--torch-dtype", "bfloat16"], "write dtype"),
        (["train", *REQUIRED["train"], "--dataset", "x"], "write pairs"),
        (["train", *REQUIRED["train"], "--learning-rat", "1"], "Did you mean --learning-rate"),
        (["train", *REQUIRED["train"], "--num-train-epochs", "six"], "six"),
        (["train", *REQUIRED["train"], "--reference", "stored"], "stored"),
        (["train", "--model", "builtin"], "--pairs"),
        (["list", "signal"], "Did you mean 'signals'?"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_a_wrong_command_line_names_what_is_wrong(
    arguments: list[str], message: str, called: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) != 0
    shown = capsys.readouterr()
    assert message in " ".join(shown.err.split())
    assert "Traceback" not in shown.err
    assert called == {}


def test_init_writes_a_recipe_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init") == 0
    assert "catpo pair --config recipe.yaml" in capsys.readouterr().out
    assert run("init", "deep/folder") == 0
    assert (tmp_path / "deep/folder/recipe.yaml").read_text() == (tmp_path / "recipe.yaml").read_text()
    assert run("init") == 0
    assert "There already: recipe.yaml" in capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text("mine")
    assert run("init") == 2
    assert "exists already" in capsys.readouterr().err


def test_init_goes_on_after_a_kill_between_two_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init", "a b", "--recipe", "zero2") == 0
    command = capsys.readouterr().out.partition("Next: ")[2]
    assert "a b/zero2.yaml" in shlex.split(command)
    kept = Path("a b/zero2.json").read_bytes()
    for name in ("json", "yaml"):
        Path(f"a b/zero2.{name}").unlink()
        assert run("init", "a b", "--recipe", "zero2") == 0
        assert "Wrote: " in capsys.readouterr().out and Path("a b/zero2.json").read_bytes() == kept
    Path("a b/zero2.yaml").unlink()
    Path("a b/zero2.json").write_text("{}")
    assert run("init", "a b", "--recipe", "zero2") == 2
    assert "a b/zero2.json exists already, and is another" in capsys.readouterr().err
    assert not Path("a b/zero2.yaml").exists()


@pytest.mark.parametrize("name", recipes.shipped())
def test_init_writes_each_recipe_that_comes_with_catpo(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init", "deep", "--recipe", name) == 0
    path = Path("deep") / f"{name}.yaml"
    assert f"Wrote: {path}. Next: " in (shown := capsys.readouterr().out) and str(path) in shown + str(path)
    if name.startswith("zero"):  # accelerate looks for it from where it runs
        assert yaml.safe_load(path.read_text())["deepspeed_config"]["deepspeed_config_file"] == f"deep/{name}.json"
        assert Path(f"deep/{name}.json").is_file()
    else:
        assert path.read_bytes() == recipes.shipped()[name].read_bytes()
    assert run("init", "deep", "--recipe", name) == 0
    assert f"There already: {path}" in capsys.readouterr().out


@pytest.mark.parametrize("path", [*recipes.SHIPPED.glob("*.yaml"), None], ids=lambda path: path.stem if path else "starter")
def test_a_recipe_says_what_it_was_planned_for(path: Path | None) -> None:
    comment = re.sub(r"\n# ?", " ", (path.read_text() if path else recipes.starter()).split("\n\n")[0])
    assert re.search(r"Planned.*\d GB (on (each|the) GPU|of memory).*(about \d+ h|min on 8|minutes on)", comment)


def test_a_wrong_name_of_a_recipe_leads_to_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'llava-1\.5' is not a recipe that comes with catpo\. Did you mean 'llava-1\.5-7b"):
        init(recipe="llava-1.5")
    with pytest.raises(UserError, match=r"`catpo init --recipe llava-1\.5-7b` writes it"):
        recipes.read("llava-1.5-7b.yaml")


def test_list_shows_plugins_with_their_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "objectives") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("objectives\n")
    assert "  dpo " in shown
    assert run("list") == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if not line.startswith(" ")] == [*registry.PLACES, "recipes"]
    assert "  llava-1.5-7b        LLaVA-1.5-7B on RLHF-V, on one GPU with 40 GB or more." in shown


def test_catpo_runs_as_a_module_and_ends_quietly_in_a_pipe() -> None:
    version = subprocess.run([sys.executable, "-m", "catpo", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == catpo.__version__
    piped = subprocess.run(
        f"set -o pipefail; {sys.executable} -m catpo list | true",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in piped.stderr
    assert "BrokenPipe" not in piped.stderr


def test_a_missing_recipe_section_still_gets_what_is_set_for_all(called: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 7\n")
    assert run("train", *REQUIRED["train"], "--config", str(recipe)) == 0
    assert called["seed"] == 7
