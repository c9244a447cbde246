"""`catpo detect` in the terminal: each answer with its object words marked, which can be read without colours too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.style import Style
from rich.text import Text

from catpo.cli.streams import say
from catpo.config.options import DetectOptions

SHOWN = 20
"""Texts printed; words.jsonl and the report have more."""
STYLES = (Style(color="blue"), Style(color="dark_orange", bold=True, underline=True))
"""Of words that are as likely as the threshold, and of others."""
MARKS, ASCII_MARKS = "✓✗", "+!"
"""Behind such words; where the terminal cannot show the former, the latter."""


def register(app: App, **place: Any) -> None:
    """Add the command to the command line."""
    app.command(detect, **place)


def detect(options: Annotated[DetectOptions, Parameter(name="*")]) -> None:
    """Show which words of a model's answers, or of given captions, are likely not in the picture; trains nothing."""
    from catpo.reporting.detections import doubtful_first, write_page
    from catpo.scoring.detect import detect

    found = detect(**vars(options))
    console = Console(highlight=False)
    marks = MARKS if console.encoding.lower().startswith("utf") else ASCII_MARKS
    shown = [found.rows[number] for number in doubtful_first(found.rows, options.threshold)[:SHOWN]]
    for row in shown:
        console.print(marked(row, options.threshold, marks), soft_wrap=True)
    if len(found.rows) > len(shown):
        say(f"… and {len(found.rows) - len(shown):,} more: see {found.path / 'words.jsonl'}.")
    say(_counts(found.rows, options.threshold, marks))
    if auroc := found.about.get("auroc"):
        say(*_truth_lines(auroc))
    page = write_page(found, options.output, threshold=options.threshold, max_pictures=options.max_pictures)
    say(f"Words: {found.path / 'words.jsonl'}", f"Report: {page}")


def marked(row: Mapping[str, Any], threshold: float, marks: str = MARKS) -> Text:
    """A text with a mark and the probability behind each of its object words."""
    from catpo.text.words import plain  # imports NumPy, which help needs not

    text, shown, end = row["text"], Text(), 0
    shown.append(plain(row["picture"]).replace("\n", " "), Style(bold=True)).append("\n")
    for word in row["words"]:
        shown.append(plain(text[end : word["start"]]))
        end = word["end"]
        name = plain(text[word["start"] : end])
        if word["grounded"] is None:
            shown.append(name)
            continue
        is_doubtful = word["grounded"] < threshold
        shown.append(name, STYLES[is_doubtful]).append(f"{marks[is_doubtful]}({word['grounded']:.2f})", Style(dim=True))
    return shown.append(plain(text[end:]) + "\n")


def _counts(rows: Any, threshold: float, marks: str) -> str:
    judged = [word for row in rows for word in row["words"] if word["grounded"] is not None]
    marked_count = sum(word["grounded"] < threshold for word in judged)
    return (
        f"Texts: {len(rows):,}. Object words: {len(judged):,}, of which likely not in the picture "
        f"({marks[1]}, less than {threshold:g}): {marked_count:,}."
    )


def _truth_lines(auroc: Mapping[str, Any]) -> list[str]:
    total = auroc["in_picture"] + auroc["not_in_picture"]
    if auroc["value"] is None:
        return [f"AUROC: not defined: of {total:,} named objects, {auroc['in_picture']:,} are in their pictures."]
    share = 100 * auroc["not_in_picture"] / total
    return [
        f"AUROC {auroc['value']:.3f} [{auroc['low']:.3f}, {auroc['high']:.3f}] for being in the picture, over {total:,} named "
        f"objects, of which {share:.1f} % are not in it."
    ]
