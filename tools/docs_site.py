"""What the documentation site shows beside docs/: the repository's own pages. mkdocs calls these functions as hooks."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PROJECT = {"CHANGELOG.md": "", "CONTRIBUTING.md": ""}
"""Pages of the repository's root that are pages of the site too."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in PROJECT:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site's pages: in the repository, docs/ is a folder, on the site it is the root."""
    here = page.file.src_uri
    place = posixpath.dirname(here if here in PROJECT else f"docs/{here}")
    return re.sub(r"\]\(([^)\s#:]+)((?:#[^)\s]*)?)\)", lambda link: f"]({_on_site(link[1], place, here)}{link[2]})", markdown)


def _on_site(target: str, place: str, here: str) -> str:
    path = posixpath.normpath(posixpath.join(place, target))
    inside = path.removeprefix("docs/")
    return posixpath.relpath(inside, posixpath.dirname(here) or ".")
