"""`catpo init`: a recipe to start from, or one that comes with catpo."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from catpo.cli.streams import say
from catpo.core.errors import UserError, did_you_mean


def init(
    folder: Annotated[Path, Parameter(help="Where to write it.")] = Path(),
    /,
    *,
    recipe: Annotated[
        str | None,
        Parameter(
            help="One that comes with catpo, e.g. llava-1.5-7b; see `catpo list recipes` (default: recipe.yaml, with every "
            "option as a comment, for the built-in model)."
        ),
    ] = None,
) -> None:
    """Write a commented recipe to start from."""
    from catpo.config.recipes import shipped, starter
    from catpo.files.atomic import make_folder, remove_unfinished, write_atomic

    if recipe is None and str(folder) in shipped():
        raise UserError(f"'{folder}' is a recipe, and would be a folder: `catpo init --recipe {folder}`.")
    path = folder / f"{recipe or 'recipe'}.yaml"
    files = {path: starter()} if recipe is None else _shipped(recipe, folder)
    missing = [each for each in files if not each.exists()]
    for each, text in files.items():
        if each not in missing and not (each.is_file() and each.read_bytes() == text.encode()):
            raise UserError(f"{each} exists already, and is another. Give another folder: `catpo init FOLDER`.")
    make_folder(folder)
    for each in missing:
        remove_unfinished(each)
        write_atomic(each, files[each])
    say(f"{'Wrote' if missing else 'There already'}: {path}. Next: {_next_command(files[path], path)}")


def _shipped(name: str, folder: Path) -> dict[Path, str]:
    """Path -> text of the recipe, and of the file that it names, if it does."""
    from catpo.config.recipes import shipped

    known = shipped()
    if name not in known:
        raise UserError(f"'{name}' is not a recipe that comes with catpo. {did_you_mean(name, known)}")
    text = known[name].read_text(encoding="utf-8")
    beside = known[name].with_suffix(".json")
    if not beside.is_file():
        return {folder / known[name].name: text}
    text = text.replace(f": {beside.name}", f": {folder / beside.name}")
    return {folder / known[name].name: text, folder / beside.name: beside.read_text(encoding="utf-8")}


def _next_command(text: str, path: Path) -> str:
    """The first command of the recipe's comment."""
    found = re.search(r"^#   (.+)$", text, flags=re.MULTILINE)
    command = re.sub(r" {2,}", " ", found[1]) if found else f"catpo pair --config {path.name}"
    return command.replace(path.name, shlex.quote(str(path)))
