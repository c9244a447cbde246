"""Text and tables for Markdown, LaTeX, CSV and terminals, the only writers of these: a name or an answer is only text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from catpo.text.words import plain


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    r"""Lines of a Markdown table; the first `left` columns are aligned left, the others right. Cells are escaped.

    >>> print(markdown_table(["model", "CHAIRi"], [["dpo|lora", "25.7"]]))
    | model | CHAIRi |
    |---|---:|
    | dpo\|lora | 25.7 |
    """
    rule = "|" + "---|" * left + "---:|" * (len(headings) - left)
    return "\n".join([_markdown_row(headings), rule, *(_markdown_row(row) for row in rows)])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(for_markdown(cell) for cell in cells) + " |"


def latex_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, notes: Sequence[str] = ()) -> str:
    r"""A booktabs `tabular`; the first `left` columns are aligned left, the others right. Notes become comments.

    >>> print(latex_table(["model", "CHAIRi"], [["dpo_kl", "+2.5"]]))
    % needs \usepackage{booktabs}
    \begin{tabular}{lr}
    \toprule
    model & CHAIRi \\
    \midrule
    dpo\_kl & $+2.5$ \\
    \bottomrule
    \end{tabular}
    """
    columns = "l" * left + "r" * (len(headings) - left)
    comments = [f"% {one_line(note)}" for note in (r"needs \usepackage{booktabs}", *notes)]
    begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_row(headings), r"\midrule"]
    return "\n".join([*comments, *begin, *(_latex_row(row) for row in rows), r"\bottomrule", r"\end{tabular}"])


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(for_latex(cell) for cell in cells) + r" \\"


def for_markdown(text: str) -> str:
    r"""One line of text in which nothing is markup, and no formula for a spreadsheet that it is copied to.

    >>> for_markdown("dpo_kl"), for_markdown("=1+1")
    ('dpo\\_kl', "'=1+1")
    """
    return _no_formula(re.sub(r"([\\|*_<>\[\]`])", r"\\\1", one_line(text)), "=")


LATEX_NAMES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def for_latex(text: str) -> str:
    r"""The same for LaTeX; signed numbers and ± become formulas. In braces, `[` and `*` are no options of the `\\\\` before."""
    escaped = re.sub(r"[\\~^&%$#_{}]", lambda match: LATEX_NAMES.get(match[0], f"\\{match[0]}"), one_line(text))
    signed = re.sub(r"(?<![\w])[+-]\d+(?:\.\d+)?", lambda match: f"${match[0]}$", escaped)
    return re.sub(r"^([=*\[])", r"{\1}", signed.replace("±", r"$\pm$"))


def for_csv(text: str) -> str:
    """One line of text that a spreadsheet does not take for a formula.

    >>> for_csv("=1+1"), for_csv("dpo")
    ("'=1+1", 'dpo')
    """
    return _no_formula(one_line(text), "=+-@")


WIDEST = 10_000
"""Columns of a screen on which every table fits."""


def table_of(*headings: str, texts: int = 1, title: str | None = None, is_plain: bool = False) -> Table:
    """An empty table for the terminal whose first `texts` columns are texts, the others numbers; no cell is ever cut.

    A plain one has no lines.
    """
    table = Table(title=title)
    if is_plain:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(headings))
    for number, heading in enumerate(headings):
        table.add_column(for_terminal(heading), justify="left" if number < texts else "right", overflow="fold")
    return table


class Fitting:
    """A table that is shown as it is where the screen is wide enough, and otherwise in a narrower way."""

    def __init__(self, wide: Table, narrow: Table) -> None:
        self.wide, self.narrow = wide, narrow
        self.light = copy(wide)
        """The same with fewer lines."""
        self.light.box, self.light.show_edge, self.light.pad_edge = box.SIMPLE_HEAD, False, False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in (self.wide, self.light):
            if Measurement.get(console, options.update(max_width=WIDEST), table).maximum <= options.max_width:
                yield table
                return
        yield self.narrow


def fitting(headings: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1, title: str | None = None) -> Fitting:
    """A table of numbers; on a narrow screen each row is a block, with a line for each of its numbers."""
    wide = table_of(*headings, texts=texts, title=title)
    narrow = table_of("", "", is_plain=True)
    if title:
        narrow.add_row(for_terminal(title))
    for row in rows:
        wide.add_row(*map(for_terminal, row))
        narrow.add_row(for_terminal(" ".join(row[:texts])), style="bold")
        for heading, cell in zip(headings[texts:], row[texts:], strict=True):
            narrow.add_row(for_terminal(f"  {heading}"), for_terminal(cell))
    return Fitting(wide, narrow)


def for_terminal(text: str) -> Text:
    """The same for a cell or line that rich prints: not its markup either."""
    return Text(_no_formula(one_line(text), "="))


def _no_formula(line: str, signs: str) -> str:
    return f"'{line}" if line.lstrip().startswith(tuple(signs)) else line


def one_line(text: str) -> str:
    r"""The text without line breaks, control characters and marks that change the writing direction.

    Bytes of a path that are no UTF-8 are shown as `\udcff` and the like.

    >>> one_line("a\x1b[31m\nb")
    'a[31m b'
    """
    return plain(text.encode("utf-8", "backslashreplace").decode("utf-8")).replace("\n", " ")
