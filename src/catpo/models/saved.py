"""The files of a model folder that catpo saved: listed with their checksums beside them, and compared when it is loaded."""

from __future__ import annotations

from pathlib import Path

from catpo.core.errors import UserError, shown
from catpo.files.checksums import describe_file, problem_with
from catpo.files.json_files import read_json, write_json

LIST = "catpo-files.json"
WEIGHTS = ".safetensors"
CARD = "README.md"


def list_files(folder: Path) -> None:
    """Write the list, when every file is saved; other tools need not know it. The card is left out: people edit it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    files = [file for file in files if file != folder / CARD]
    named = {file.relative_to(folder).as_posix(): describe_file(file) for file in files}
    write_json(folder / LIST, {"format": 1, "files": named})


def check_files(folder: Path, *, with_weights: bool = True) -> None:
    """Compare a folder's files with its list; without one (another tool's, an older version's) nothing is compared.

    Raises:
        UserError: a file is missing, or is not what was saved.
    """
    path = folder / LIST
    if not path.is_file():
        return
    files = read_json(path, fields={"files": dict}, may_link=True)["files"]
    for name, written in files.items():
        if name == CARD:  # listed by older versions
            continue
        problem = problem_with(folder, name, written) if with_weights or not name.endswith(WEIGHTS) else ""
        if problem:
            raise UserError(
                f"model '{folder}': {shown(name)} {problem}. Put back the file that catpo saved, or make the model again. If "
                f"you changed it on purpose, remove {path}."
            )
