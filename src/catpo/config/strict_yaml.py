"""Strict YAML: a key given twice is refused with its line. Knows no option by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from catpo.config.validation import shown
from catpo.core.errors import UserError

MAX_BYTES = 1_000_000
"""A larger file is none that somebody wrote."""
MAX_BITS = 256
"""Of the largest whole number; Python refuses to write out much larger ones, also in a message."""
MAX_BRACKETS = 1000
"""Reading takes time with the square of how deep they are nested."""


class Lines(dict[Any, Any]):
    """A mapping of the file that knows where its keys stand."""

    lines: Mapping[Any, int]
    """Key -> line, from 1."""


class _Loader(yaml.SafeLoader):
    """Plain YAML data; refuses a key that stands twice, and reads 1e-6 as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a list or mapping cannot be a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _with_lines(loader: _Loader, node: yaml.MappingNode) -> Iterator[Lines]:
    found = Lines()
    yield found
    found.update(loader.construct_mapping(node))
    found.lines = {loader.construct_object(key, deep=True): key.start_mark.line + 1 for key, _ in node.value}


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    value: int = loader.construct_yaml_int(node)
    if value.bit_length() > MAX_BITS:
        raise yaml.constructor.ConstructorError(None, None, "a number larger than any option takes", node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:map", _with_lines)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(path: Path, *, what: str, advice: str) -> Any:
    """What a file holds, as plain data with `Lines`.

    Args:
        path: the file.
        what: what messages call it: `recipe`.
        advice: where to get a good one, as a sentence.

    Raises:
        UserError: no such file, not YAML, a key twice.
    """
    try:
        if path.exists() and not path.is_file():  # a folder, a pipe, a device without end
            raise UserError(f"{path} cannot be read (it is not a file). {advice}")
        with open(path, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES:,} bytes, which no {what} needs. {advice}")
        text = content.decode("utf-8")
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise UserError(f"{path} has more than {MAX_BRACKETS:,} brackets, which no {what} needs. Write it flat.")
        return yaml.load(text, _Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). {advice}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8. {advice}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}. Correct the {what}.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not a YAML {what} ({str(error).splitlines()[0]}). {advice}") from error


def mapping(value: Any, where: str) -> Mapping[Any, Any]:
    """The value, if it is a mapping; an empty one if it is nothing."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where} must be lines of the form `option: value`, not {shown(value)}.")
    return value
