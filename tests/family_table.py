"""Write the table of docs/reference/families.md: what every family's tests measure, on a tiny model of its real class.

    python tests/family_table.py            writes the table into docs/reference/families.md
    python tests/family_table.py --check    says whether it is up to date

Differences are shown as the power of ten they stay below, so that the table is the same on every machine.
"""

from __future__ import annotations

import math
import sys
from itertools import groupby
from pathlib import Path

from catpo.models.family import Family
from catpo.models.family_check import check_family
from family_checks import difference_from_plain, greedy_surprise, sized_pair
from tiny_families import BUILDERS, build

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "families.md"
BEGIN, END = "<!-- table: python tests/family_table.py -->", "<!-- end of table -->"
GENERIC = ("vipllava", "aya_vision", "glm4v")
MEASURES = ["Attention", "Sharp", "Log-probs", "Generation"]
HEADER = ["Model class", "Tower, decoder", "Family", "Grids of a 160 x 60 picture", "Prefix", *MEASURES]


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    fresh = f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"
    if "--check" in sys.argv:
        sys.exit(None if fresh == page else f"{PAGE.name} is out of date: python tests/family_table.py")
    PAGE.write_text(fresh, encoding="utf-8")


def table() -> str:
    """One line per tiny model, in Markdown."""
    of_families = [name for name in BUILDERS if name not in GENERIC]
    rows = [HEADER, ["---"] * len(HEADER), *map(line, [*of_families, *GENERIC])]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def line(name: str) -> list[str]:
    """Measurements of one model: the same that tests/test_families.py bounds."""
    plain, sharp = build(name, sharp=1.0), build(name, sharp=200.0)
    for family in (plain, sharp):
        check_family(family, sized_pair(0), range(family.depth))
    prefix = "shared" if plain.shares_prefix else "separate"
    logps, attention = difference_from_plain(plain, [sized_pair(number) for number in range(3)], prefix)
    _, sharpest = difference_from_plain(sharp, [sized_pair(0), sized_pair(1)], prefix)
    surprise = greedy_surprise(plain, sized_pair(0))
    return [
        f"`{type(plain.unwrapped).__name__}`",
        f"{plain.unwrapped.config.vision_config.model_type}, {plain.unwrapped.config.get_text_config().model_type}",
        f"`{type(plain).__module__.rsplit('.', 1)[-1]}`",
        grids(plain),
        prefix,
        *map(below, (attention, sharpest, logps, surprise)),
    ]


def grids(family: Family) -> str:
    """Rows x columns, equal grids counted."""
    runs = []
    for size, run in groupby(f"{grid.rows}x{grid.columns}" for grid in family.encode(sized_pair(0)).grids):
        count = len(list(run))
        runs.append(size if count == 1 else f"{count} of {size}")
    return " + ".join(runs)


def below(difference: float) -> str:
    """The power of ten above a difference, and above the noise of float32.

    >>> below(3e-7), below(2e-5)
    ('< 1e-05', '< 1e-04')
    """
    return f"< {10 ** max(-5, math.floor(math.log10(difference or 1e-9)) + 1):.0e}"


if __name__ == "__main__":
    main()
