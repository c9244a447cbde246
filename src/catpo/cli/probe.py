"""`catpo probe`: a probe learned from a reward store, or the table of a model's signals."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from catpo.cli.streams import say
from catpo.core.errors import UserError


def probe(
    rewards: Annotated[Path | None, Parameter(help="Reward store with words (`catpo score --words words`).")] = None,
    /,
    *,
    output: Annotated[Path | None, Parameter(help="JSON file of the probe, or of the table of --search.")] = None,
    features: Annotated[
        tuple[str, ...], Parameter(help="What it reads of each word (default: all that the store holds).")
    ] = (),
    truth: Annotated[str | None, Parameter(help="Data set with the objects in the same pictures, to judge by.")] = None,
    search: Annotated[
        bool, Parameter(negative=(), help="Learn nothing; find out which signal of a model tells its words apart best.")
    ] = False,
    pairs: Annotated[str | None, Parameter(help="For --search: preference pairs.")] = None,
    model: Annotated[str | None, Parameter(help="For --search: reference model.")] = None,
    nouns: Annotated[str, Parameter(help="For --search: auto, nltk, textblob, builtin, or a JSON file of words.")] = "auto",
    limit: Annotated[int | None, Parameter(help="For --search: use only the first pairs.")] = None,
) -> None:
    """Learn which words of a model are in the picture, for the reward of `tilt`; or --search its signals."""
    if not search:
        if rewards is None or output is None or pairs or model:
            raise UserError("Give a reward store and --output, or --search with --pairs and --model.")
        if nouns != "auto" or limit is not None:
            raise UserError("--nouns and --limit are for --search: a probe learns from all words of the store. Leave them out.")
        _learn(rewards, output, features, truth)
        return
    if pairs is None or model is None or rewards is not None or features:
        raise UserError("--search takes --pairs and --model, and neither a reward store nor --features.")
    _search(pairs, model, truth, nouns, limit, output)


def _learn(rewards: Path, output: Path, features: tuple[str, ...], truth: str | None) -> None:
    from catpo.cli.tables import probe_table
    from catpo.scoring.probe import learn

    Console().print(probe_table(learn(rewards, output, features=features, truth=truth)))
    say(f"Probe: {output}")


def _search(pairs: str, model: str, truth: str | None, nouns: str, limit: int | None, output: Path | None) -> None:
    from catpo.cli.tables import search_table
    from catpo.scoring.search import search

    found = search(pairs, model, truth=truth, nouns=nouns, limit=limit, output=output)
    Console().print(search_table(found))
    best = found[0].signal
    given = ["--pairs", pairs, "--model", model, "--output", "rewards", "--signals", best]
    say(f"Best: {best}. Score with it: {shlex.join(['catpo', 'score', *given])}")
