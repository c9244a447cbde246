"""What the documentation site has beside docs/: pages of the repository, of the commands and of all names, and the notebook.

mkdocs calls `on_files` and `on_page_markdown` as hooks.
"""

from __future__ import annotations

import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))  # the checkout that the pages are of
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md")
"""Pages of the repository's root that are pages of the site too."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {name: (ROOT / name).read_text(encoding="utf-8") for name in PROJECT}
    made["reference/commands.md"] = commands()
    made["reference/plugins.md"] = plugins()
    made["tutorial.ipynb"] = json.dumps(notebook((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")), indent=1)
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site's pages: in the repository, docs/ is a folder; on the site it is the root."""
    here = page.file.src_uri
    place = posixpath.dirname(here if here in PROJECT else f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(place, link[1])).removeprefix("docs/")
        return f"]({posixpath.relpath(path, posixpath.dirname(here) or '.')}{link[2]})"

    return re.sub(r"\]\(([^)\s#:]+)((?:#[^)\s]*)?)\)", moved, markdown)


def commands() -> str:
    """All commands with their options, as `--help` has them."""
    from catpo.cli.main import app

    text = app.generate_docs(output_format="markdown")
    text = re.sub(r"## Table of Contents\n.*?(?=\n\*\*)", "", text, count=1, flags=re.DOTALL)
    about = (
        "Made from the commands themselves: `catpo COMMAND --help` says the same. In Python and in recipes, options have "
        "underscores: `--batch-size 8` is `batch_size=8`. `catpo train` also takes "
        "[options of transformers and PEFT](../how-to/train.md#options-of-transformers-and-peft)."
    )
    return text.replace("# catpo\n", f"# Commands and options\n\n{about}\n", 1)


def plugins() -> str:
    """All names that options take, as `catpo list` has them."""
    from catpo.core import registry

    parts = ["# Names that options take\n\nSignals, objectives, data sets and so on, as `catpo list` shows them."]
    for kind in registry.PLACES:
        rows = [f"| `{plugin.name}` | {plugin.summary.replace('|', chr(92) + '|')} |" for plugin in registry.plugins(kind)]
        parts.append("\n".join([f"## {kind.capitalize()}\n", "| Name | What it is |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def notebook(page: str) -> dict[str, Any]:
    """A page as a Jupyter notebook: its Python blocks are cells of code, without outputs; all else is text."""
    cells = []
    for part in re.split(r"^(```python\n.*?^```\n)", page, flags=re.MULTILINE | re.DOTALL):
        if part.startswith("```python\n"):
            source = part.removeprefix("```python\n").removesuffix("\n```\n")
            cells.append({"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source})
        elif part.strip():
            cells.append({"cell_type": "markdown", "metadata": {}, "source": part.strip()})
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
