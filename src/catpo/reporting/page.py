"""One HTML file that loads nothing and runs only its own script: escaping, content policy, templates. Knows no numbers."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import sys
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from catpo.core.errors import UserError
from catpo.files.atomic import make_folder, remove_unfinished, write_atomic
from catpo.reporting.verdicts import number, signed
from catpo.runtime.progress import tell_complete

MADE_BY = '<p class="note">Written by catpo '
"""Stands in every report (page.html.j2, detections.html.j2)."""
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def render(template: str, **values: Any) -> str:
    """The page: a template with style and script inlined; whatever is not `Markup` is escaped."""
    style, script = _static("style.css.j2"), _static("fuse.js.j2", "view.js.j2")
    return _environment().get_template(template).render(style=style, script=script, policy=policy(style, script), **values)


def policy(style: str, script: str) -> str:
    """A content security policy that allows only this style, this script, and pictures that are in the page.

    >>> policy("a", "b").split("; ")[0]
    "default-src 'none'"
    """
    rules = ["default-src 'none'", "img-src data:", f"style-src {_source(style)}", f"script-src {_source(script)}"]
    return "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])


def embed(value: Any) -> Markup:
    r"""A value as JSON inside `<script type="application/json">`: nothing in it can end the element. NaN becomes null.

    >>> embed({"a": "</script>"})
    Markup('{"a":"\\u003c/script\\u003e"}')
    """
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign, escaped in ESCAPES.items():
        text = text.replace(sign, escaped)
    return Markup(text.encode("utf-8", "replace").decode("utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("catpo.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, signed=signed)
    return environment


@lru_cache(maxsize=2)
def _static(*names: str) -> Markup:
    """Files that are inlined as they are, not rendered."""
    folder = resources.files("catpo.reporting").joinpath("templates")
    return Markup("\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names))


def replace_report(path: Path, page: bytes) -> None:
    """Write the page; an earlier report is replaced, and anything else is not.

    Raises:
        UserError: the file is there and is no report.
    """
    make_folder(path.parent)
    remove_unfinished(path)
    if os.path.exists(path):  # which is False for a name too long
        before = path.read_bytes() if path.is_file() else b""
        if before == page:
            tell_complete(path)
            return
        if MADE_BY.encode() not in before:
            raise UserError(f"{path} is there already and is no report of catpo. Choose another --output, or remove it.")
        print(f"catpo: the report in {path} was another; it is replaced.", file=sys.stderr)
    write_atomic(path, page)
