"""`catpo push`: shows what goes to the hub, and sends it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console

from catpo.cli.streams import say


def register(app: App, **place: Any) -> None:
    """Add the command to the command line."""
    app.command(push, **place)


def push(
    model: Annotated[Path, Parameter(help="Folder of a finished run, of its model, or of `catpo merge`.")],
    /,
    *,
    to: Annotated[str, Parameter(help="Name on the Hugging Face hub: USER/NAME.")],
    evaluations: Annotated[
        list[Path] | None, Parameter(help="Folders of `catpo evaluate`, of this model and of others to compare it with.")
    ] = None,
    base: Annotated[str | None, Parameter(help="Hub id of an adapter's base model, if it was trained on a local copy.")] = None,
    license: Annotated[str | None, Parameter(help="Licence identifier (default: the base model's, if it is known).")] = None,
    public: Annotated[bool, Parameter(help="Let everybody see it (default: private).", negative=())] = False,
    dry_run: Annotated[bool, Parameter(help="Show files, sizes and card; push nothing.", negative=())] = False,
) -> None:
    """Push a trained model with its card to the Hugging Face hub; private unless --public."""
    from catpo.cli.tables import table_of
    from catpo.experiments import sharing
    from catpo.models.memory import readable
    from catpo.text.tables import for_terminal

    with sharing.prepared(model, to, evaluations=evaluations or (), base=base, licence=license, is_public=public) as upload:
        if not dry_run:
            say(f"Pushed: {sharing.push(upload)} ({'public' if public else 'private'})")
            return
        table = table_of("file", "size")
        for name, file in upload.files.items():
            table.add_row(for_terminal(name), readable(file.stat().st_size))
        Console().print(table)
        say(f"Would go to {to}, {'public' if public else 'private'}. Nothing was pushed.")
        if upload.left_out:
            say(f"Not pushed: {', '.join(upload.left_out)}.")
        say("", f"{sharing.CARD}:", "", upload.card)
