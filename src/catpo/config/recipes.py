"""YAML recipes: one file that sets the options of all commands. Strict: what is not understood is refused, by its place.

Knows the options' names and types from `options.py`, and nothing of what they do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from catpo.config import strict_yaml
from catpo.config.command import field_docs, fit, hints, instead
from catpo.config.options import COMMANDS, is_python_only
from catpo.core.errors import UserError, did_you_mean

OWN_KEYS = frozenset({"output", "limit"})
"""Options that mean another thing in each section, so that a recipe cannot set them for all."""
FOR_BUILTIN = {
    "lora": "null",
    "learning_rate": "5e-5",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
"""How the built-in model is trained, as in the demo."""
ADVICE = "`catpo init` writes a recipe to start from."
SHIPPED = Path(__file__).parent / "shipped"
"""Recipes that come with catpo; `accelerate` has configurations of its launcher, `studies` those of `catpo study`."""


def read(path: str | Path) -> dict[str, dict[str, Any]]:
    """A recipe as command -> the options that it sets; options at the top level go to every command that has them.

    Raises:
        UserError: no such file, not YAML, a key twice, an unknown option, a value of another type; names file and key.
    """
    path = Path(path)
    name = path.name.removesuffix(".yaml")
    advice = f"`catpo init --recipe {name}` writes it." if name in shipped() else ADVICE
    recipe = strict_yaml.mapping(strict_yaml.load(path, what="recipe", advice=advice), str(path))
    shared = {key: value for key, value in recipe.items() if key not in COMMANDS}
    known_shared = {name for command in COMMANDS for name in _known(command)} - OWN_KEYS
    for key in shared:
        if key in OWN_KEYS:
            raise UserError(f"{path}: '{key}' differs from command to command. Put it into the sections, e.g. 'train.{key}'.")
        if key not in known_shared:
            raise UserError(f"{path}: '{key}' is not an option. {did_you_mean(str(key), known_shared | set(COMMANDS))}")
    return {command: _section(path, command, recipe.get(command), shared) for command in COMMANDS}


def shipped() -> dict[str, Path]:
    """Name -> file of what `catpo init --recipe` can write."""
    folders = (SHIPPED, SHIPPED / "accelerate", SHIPPED / "studies")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def summary(file: Path) -> str:
    """What a shipped recipe is for: the first line of its comment."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def starter(folder: str | Path = "runs/first") -> str:
    """A recipe to start from: what must be set is set, the rest stands there as comments with its default.

    Training is set for the built-in model, since the defaults are those of the paper's 7B models.
    """
    folder = Path(folder)
    given: dict[str, dict[str, object]] = {
        "pair": {"data": "scenes(count=300)", "output": folder / "pairs"},
        "score": {"pairs": folder / "pairs", "output": folder / "rewards"},
        "train": {"pairs": folder / "pairs", "rewards": folder / "rewards", "output": folder / "train", **FOR_BUILTIN},
        "evaluate": {"model": folder / "train" / "model", "benchmarks": "[scenes]", "output": folder / "evaluation"},
        "report": {"pairs": folder / "pairs", "rewards": folder / "rewards", "runs": f"[{folder / 'train'}]",
                   "evaluations": f"[{folder / 'evaluation'}]", "output": folder / "report"},
    }  # fmt: skip
    lines = [
        "# Every command reads its section:  catpo pair --config recipe.yaml, then score, train, evaluate, report.",
        "# What is given on the command line wins. Paths count from where the command is run.",
        "# Planned as it stands, on built-in pictures: 3 GB of memory, minutes on two CPU cores, no GPU.",
        "# Recipes of larger models come with catpo: `catpo list recipes`, `catpo init --recipe llava-1.5-7b`.",
        "",
        "# For all sections: a hub id, a folder, or the small model that comes with catpo.",
        "model: builtin",
    ]
    for command, options in COMMANDS.items():
        lines += ["", f"{command}:"]
        documented, known = field_docs(options), _known(command)
        for field in dataclasses.fields(options):
            if field.name in given[command]:
                is_tuned = command == "train" and field.name in FOR_BUILTIN
                note = f" For the built-in model; the default is {_as_yaml(field.default)}." if is_tuned else ""
                lines += [f"  # {documented[field.name]}{note}", f"  {field.name}: {given[command][field.name]}"]
            elif field.default is not MISSING and field.name in known and field.name in documented:
                lines += [f"  # {documented[field.name]}", f"  # {field.name}: {_as_yaml(field.default)}"]
    return "\n".join(lines) + "\n"


def _section(path: Path, command: str, given: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    known = _known(command)
    section = strict_yaml.mapping(given, f"{path}: '{command}'")
    for key in section:
        if key not in known:
            told = instead(COMMANDS[command], str(key), known, prefix=f"{command}.")
            raise UserError(f"{path}: '{command}.{key}' is not an option{told}")
    merged = {key: (key, value) for key, value in shared.items() if key in known}
    merged |= {key: (f"{command}.{key}", value) for key, value in section.items()}
    return {key: fit(COMMANDS[command], key, value, f"{path}: '{name}'") for key, (name, value) in merged.items()}


def _known(command: str) -> list[str]:
    """The options that a recipe can set."""
    return [name for name, hint in hints(COMMANDS[command]).items() if not is_python_only(hint)]


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(str(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
