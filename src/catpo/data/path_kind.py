"""Which data set reads a path that is given alone: told by what is there, not only by its name."""

from __future__ import annotations

from pathlib import Path

from catpo.core.errors import UserError
from catpo.data.datasets._files import CSV, is_lines, line_object, numbered_lines
from catpo.data.datasets.folder import row_file
from catpo.data.pair_folder import ABOUT

TABLES = (".parquet", ".arrow", ".json", *CSV)
OURS = (ABOUT, "vocabulary.json")
"""JSON files that hold no rows."""
SAVED = ("dataset_dict.json", "state.json")
OTHERS = {
    "completions", "conversations", "img_path", "instruction", "messages", "query", "question", "reject",
    "rejected_conversations", "rejected_messages", "rejected_response", "text",
}  # fmt: skip
"""Fields of other projects' rows."""


def data_set_of(path: Path) -> str:
    """Name of the data set that reads the file or folder.

    Files with one row per line are `folder`'s if they are in its form; it reads samples, too. Other files and folders of them
    are `rows`'.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".tar":
        return "webdataset"
    return "rows" if path.suffix in TABLES or not _is_ours(path) else "folder"


def _of_folder(path: Path) -> str:
    if any((path / name).is_file() for name in SAVED):
        return "rows"
    try:
        return "folder" if _is_ours(row_file(path)) else "rows"
    except UserError:  # there is not one .jsonl
        pass
    suffixes = {file.suffix for file in path.rglob("*") if file.name not in OURS and file.is_file()}
    if (path / ABOUT).is_file() or len(list(path.glob("*.jsonl"))) > 1 or not suffixes & {*TABLES, ".jsonl", ".tar"}:
        return "folder"  # which says what is missing
    return "webdataset" if ".tar" in suffixes else "rows"


def _is_ours(file: Path) -> bool:
    """Whether a file's first row is in the form of `folder`; a file that cannot be read is, which then says what is wrong."""
    if not file.is_file():  # a pipe would block
        return True
    try:
        if not is_lines(file):
            return next(numbered_lines(file), None) is None
        row = line_object("", next(iter(numbered_lines(file)))[1])
    except (UserError, OSError, StopIteration):
        return True
    is_conversation = any(isinstance(row.get(name), list | dict) for name in ("prompt", "chosen", "rejected"))
    return not is_conversation and not OTHERS & row.keys()
