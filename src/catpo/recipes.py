"""YAML recipes: one file that sets the options of all commands. Strict: what is not understood is refused, by its place.

Knows the options' names and types from `config.py`, and nothing of what they do.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

import yaml

from catpo.config import COMMANDS, arms, field_docs, hints
from catpo.errors import UserError, did_you_mean

MAX_BYTES = 1_000_000
"""A larger file is no recipe."""
MAX_BRACKETS = 1000
"""Reading takes time with the square of how deep they are nested."""
OWN_KEYS = frozenset({"output", "limit"})
"""Options that mean another thing in each section, so that a recipe cannot set them for all."""
FOR_BUILTIN = {"lora": "null", "learning_rate": "5e-5", "epochs": 1, "batch_size": 8, "accumulation": 1}
"""How the built-in model is trained, as in the demo."""


def read(path: str | Path) -> dict[str, dict[str, Any]]:
    """A recipe as command -> the options that it sets; options at the top level go to every command that has them.

    Raises:
        UserError: no such file, not YAML, a key twice, an unknown option, a value of another type; names file and key.
    """
    path = Path(path)
    recipe = _mapping(_load(path), str(path))
    shared = {key: value for key, value in recipe.items() if key not in COMMANDS}
    known_shared = {name for options in COMMANDS.values() for name in hints(options)} - OWN_KEYS
    for key in shared:
        if key in OWN_KEYS:
            raise UserError(f"{path}: '{key}' differs from command to command. Put it into the sections, e.g. 'train.{key}'.")
        if key not in known_shared:
            raise UserError(f"{path}: '{key}' is not an option. {did_you_mean(str(key), known_shared | set(COMMANDS))}")
    return {command: _section(path, command, recipe.get(command), shared) for command in COMMANDS}


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
        "",
        "# For all sections: a hub id, a folder, or the small model that comes with catpo.",
        "model: builtin",
    ]
    for command, options in COMMANDS.items():
        lines += ["", f"{command}:"]
        documented = field_docs(options)
        for field in dataclasses.fields(options):
            if field.name in given[command]:
                is_tuned = command == "train" and field.name in FOR_BUILTIN
                note = f" For the built-in model; the default is {_as_yaml(field.default)}." if is_tuned else ""
                lines += [f"  # {documented[field.name]}{note}", f"  {field.name}: {given[command][field.name]}"]
            elif field.default is not MISSING:
                lines += [f"  # {documented[field.name]}", f"  # {field.name}: {_as_yaml(field.default)}"]
    return "\n".join(lines) + "\n"


class _Loader(yaml.SafeLoader):
    """Plain YAML data; refuses a key that stands twice, and reads 1e-6 as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a list or mapping cannot be a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _load(path: Path) -> Any:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path} has {size:,} bytes, which no recipe needs. `catpo init` writes a recipe to start from.")
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise UserError(f"{path} has more than {MAX_BRACKETS:,} brackets, which no recipe needs. Write it flat.")
        return yaml.load(text, _Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). `catpo init` writes a recipe to start from.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8. `catpo init` writes a recipe to start from.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}. Correct the recipe.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not a YAML recipe ({str(error).splitlines()[0]}). `catpo init` writes one.") from error


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where} must be lines of the form `option: value`, not {_shown(value)}.")
    return value


def _section(path: Path, command: str, given: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    known = hints(COMMANDS[command])
    section = _mapping(given, f"{path}: '{command}'")
    for key in section:
        if key not in known:
            raise UserError(
                f"{path}: '{command}.{key}' is not an option. {did_you_mean(str(key), known, prefix=f'{command}.')}"
            )
    merged = {**{key: (key, value) for key, value in shared.items() if key in known}}
    merged |= {key: (f"{command}.{key}", value) for key, value in section.items()}
    return {key: _fitted(value, known[key], f"{path}: '{name}'") for key, (name, value) in merged.items()}


def _fitted(value: Any, hint: Any, where: str) -> Any:
    for arm in arms(hint):
        fitted = _fit(value, arm)
        if fitted is not MISSING:
            return fitted
    raise UserError(f"{where} must be {' or '.join(_word(arm) for arm in arms(hint))}, not {_shown(value)}.")


def _fit(value: Any, hint: Any) -> Any:
    """The value as the type, or MISSING where it is of another."""
    origin = typing.get_origin(hint)
    if hint is type(None):
        return None if value is None else MISSING
    if origin is Literal:
        return value if value in typing.get_args(hint) else MISSING
    if origin in (list, tuple):
        if isinstance(value, str) and origin is tuple:  # a single item needs no brackets
            value = [value]
        items = [_fit(item, typing.get_args(hint)[0]) for item in value] if isinstance(value, list) else [MISSING]
        return MISSING if MISSING in items else origin(items)
    if hint is Path:
        return Path(value) if isinstance(value, str) and value else MISSING
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is hint else MISSING


def _word(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        return f"a list, each {_word(typing.get_args(hint)[0])}"
    words = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return words[hint]


def _shown(value: Any) -> str:
    text = reprlib.repr(value)  # never the whole of it: aliases of YAML make a little text very much
    return text if len(text) <= 60 else text[:57] + "..."


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(str(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
