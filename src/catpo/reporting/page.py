"""One HTML file that loads nothing and runs only its own script: escaping, content policy, templates. Knows no numbers."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from catpo.reporting.verdicts import number, signed

STYLES, SCRIPTS = ("style.css.j2",), ("fuse.js.j2", "view.js.j2")
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def render(template: str, **values: Any) -> str:
    """The page: a template with everything inlined; whatever is not `Markup` is escaped."""
    style, script = (Markup(_text(names)) for names in (STYLES, SCRIPTS))
    return _environment().get_template(template).render(style=style, script=script, policy=policy(style, script), **values)


def policy(style: str, script: str) -> str:
    """A content security policy that lets this style and this script in, and pictures that are in the page.

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
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    folder = resources.files("catpo.reporting").joinpath("templates")
    texts = {each.name: each.read_text(encoding="utf-8") for each in folder.iterdir() if each.name.endswith(".html.j2")}
    environment = Environment(
        loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, signed=signed)
    return environment


@lru_cache(maxsize=2)
def _text(names: tuple[str, ...]) -> str:
    """Static files as they are: they are no templates of anything, only inlined."""
    folder = resources.files("catpo.reporting").joinpath("templates")
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)
