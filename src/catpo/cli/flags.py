"""What is given on the command line: filled in from a recipe, and refused in our words. Knows no command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from shlex import quote
from typing import Any, get_args

from cyclopts import App, ArgumentCollection, CycloptsError, CycloptsPanel, Token, UnknownOptionError

from catpo.config.command import instead
from catpo.config.options import COMMANDS
from catpo.config.validation import problem
from catpo.core.errors import UserError


def from_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in what `--config` sets and the command line does not."""
    _check_whole(arguments)
    given = next((argument.tokens for argument in arguments if argument.name == "--config" and argument.tokens), None)
    if given is None:
        return
    from catpo.config import recipes

    recipe = recipes.read(given[0].value).get(commands[-1], {})
    for argument in arguments:
        name = argument.field_info.name
        if name in recipe and not argument.tokens:
            argument.append(Token(keyword=argument.name, implicit_value=recipe[name], source=given[0].value))


def _check_whole(arguments: ArgumentCollection) -> None:
    """Refuse 1.5 where a whole number is asked for: cyclopts would round it."""
    for argument in arguments:
        if {*(get_args(argument.hint) or [argument.hint])} - {type(None)} != {int}:
            continue
        for token in argument.tokens:
            if re.fullmatch(r"[-+]?\d*\.\d*[1-9]\d*", token.value):
                raise UserError(f"{argument.field_info.name} must be a whole number, not {token.value}.")


def explained(error: CycloptsError) -> Any:
    """A value outside its type in our words (cyclopts would quote pydantic); any other mistake as cyclopts shows it."""
    from pydantic import ValidationError

    if isinstance(error.__cause__, ValidationError) and error.argument is not None:
        raise UserError(f"{error.argument.field_info.name} {problem(error.__cause__)}")
    for word in getattr(error, "unused_tokens", None) or ():
        if word.endswith((".yaml", ".yml")):
            command = error.command_chain[-1] if error.command_chain else "train"
            raise UserError(f"A command takes a recipe with --config: `catpo {command} --config {quote(word)}`.")
    unknown = [error.token.keyword or error.token.value] if isinstance(error, UnknownOptionError) else []
    _check_elsewhere(error.command_chain or (), [*unknown, *(error.unused_tokens or ())])
    return CycloptsPanel(error)


def _check_elsewhere(commands: Sequence[str], unused: Sequence[str]) -> None:
    """Say what to write instead of an option of other trainers, even where cyclopts first misses a required one."""
    options = COMMANDS.get(commands[-1]) if commands else None
    for word in unused:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        if word.startswith("--") and name in getattr(options, "ELSEWHERE", ()):
            raise UserError(f"'{commands[-1]}' has no option '{name}'{instead(options, name, ())}")
