"""What is given on the command line: filled in from a recipe, and refused in our words. Knows no command."""

from __future__ import annotations

import re
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
    if isinstance(error, UnknownOptionError) and error.command_chain:
        command = error.command_chain[-1]
        name = (error.token.keyword or error.token.value).lstrip("-").partition("=")[0].replace("-", "_")
        if name in getattr(COMMANDS.get(command), "ELSEWHERE", ()):
            raise UserError(f"'{command}' has no option '{name}'{instead(COMMANDS[command], name, ())}")
    return CycloptsPanel(error)
