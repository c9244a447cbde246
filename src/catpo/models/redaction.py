"""A key taken out of a text, in whatever way the text writes it. Knows no server."""

from __future__ import annotations

import re
from base64 import b64encode

SHORTEST = 12
"""A shorter key, such as the EMPTY that local servers accept, is no secret and may be a word of an answer."""
IGNORED = r"[\x00-\x20\x7f-\xa0\xad\u061c\u200b-\u200f\u2028-\u202f\u2060-\u2069\ufeff]{0,8}"
"""Between two signs of a key: line breaks, and what a terminal does not show."""

URL_SAFE = {"+": "[+-]", "/": "[/_]"}
"""Signs of base64 that addresses replace."""


def without_key(text: str, key: str) -> str:
    r"""The text with `[key]` in place of the key: as it is, escaped (JSON, percent, HTML), broken into lines, in base64 or hex.

    >>> without_key(r"no sk-0123456789 and no sk\u002d0123456789", "sk-0123456789")
    'no [key] and no [key]'
    """
    return text if len(key) < SHORTEST else re.sub("|".join(_patterns(key)), "[key]", text)


def _patterns(key: str) -> list[str]:
    spelt = [IGNORED.join(map(_sign, key)), IGNORED.join(f"(?i:{digit})" for digit in key.encode().hex())]
    # base64 writes three bytes as four signs, so the key's own signs depend on where it begins in what was encoded
    for before in range(3):
        signs = b64encode(bytes(before) + key.encode()).decode("ascii")
        own = signs[(before * 8 + 5) // 6 : (before + len(key)) * 8 // 6]
        spelt.append(IGNORED.join(URL_SAFE.get(sign, sign) for sign in own))
    return spelt


def _sign(sign: str) -> str:
    r"""A pattern for one sign of a key: as it is, or as in \u002d, \x2d, %2d, &#45; and &#x2d;, also when escaped twice."""
    code = ord(sign)
    hexadecimal = f"(?i:{code:02x})"
    return (
        rf"(?:\\{{0,16}}(?:{re.escape(sign)}|u00{hexadecimal}|x{hexadecimal})|%(?:25){{0,4}}{hexadecimal}"
        rf"|&(?:amp;){{0,4}}#(?:0{{0,4}}{code}|[xX]0{{0,4}}{hexadecimal});)"
    )
