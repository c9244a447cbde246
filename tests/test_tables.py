"""What the terminal shows of results."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from catpo.cli import doctor
from catpo.cli.demo import COLUMNS, DemoSettings, results_table
from catpo.cli.tables import data_tables, official_lines, quality_table, scores_table
from catpo.data.check import Problem
from catpo.evaluation.bootstrap import Estimate
from catpo.evaluation.compare import SideBySide, show
from catpo.evaluation.paired import Difference
from catpo.rewards.quality import Separation, SignalQuality
from catpo.text.tables import fitting, for_csv, for_latex, for_markdown, for_terminal, latex_table, markdown_table
from catpo.text.words import plain


def test_scores_are_shown_with_their_intervals_and_unknown_ones_as_a_dash() -> None:
    figures = {
        "chair_i": {"value": 31.24, "low": 28.0, "high": 34.96},
        "cog": {"value": math.nan, "low": math.nan, "high": math.nan},
        "cover": {"value": None, "low": None, "high": None},
    }
    console = Console(width=80, record=True, file=None)
    with console.capture() as capture:
        console.print(scores_table({"benchmarks": {"scenes": {"metrics": figures}}}))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capture.get().splitlines() if "scenes" in line]
    assert rows == [
        ["scenes", "chair_i", "31.2", "28.0 to 35.0"],
        ["scenes", "cog", "-", "-"],
        ["scenes", "cover", "-", "-"],
    ]


def test_the_table_of_signals_says_on_how_many_pairs_they_are_measured() -> None:
    separation = Separation(0.7, 0.6, 0.8, 12, 3)
    rows = [SignalQuality("semantic", separation, separation, separation)]
    assert "12 grounded, 3 hallucinated in 8 pairs" in str(quality_table(rows, 8).title)
    assert "3 hallucinated in 10,000 of 12,345 pairs" in str(quality_table(rows, 12_345).title)


@pytest.mark.parametrize("write", [latex_table, markdown_table])
def test_a_name_in_a_table_is_one_line_of_text(write) -> None:
    table = write(["model"], [["a\x1b[31m\nb\u202e"]])
    assert "a[31m b" in table.replace("\\", "")
    assert not set("\x1b\u202e") & set(table)


def test_a_cell_of_a_csv_file_is_no_formula() -> None:
    assert [for_csv(name) for name in ("=SUM(A1)", "@x", "+1", "-1", "a=b", "")] == [
        "'=SUM(A1)",
        "'@x",
        "'+1",
        "'-1",
        "a=b",
        "",
    ]


ACTIVE = "\n\r\t\x1b\x9b\x00\x7f\u202e\u2066\u200f\u2028\u2029\ue000\udcff"
NAMES = st.text(st.sampled_from([*"ab=[]*\\:ä|&%$#_{}~^<>`'@+-", *ACTIVE]) | st.characters(), max_size=12)


def printed(*what: object) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(*what, sep="\n")
    return captured.get()


@pytest.mark.nightly
@given(name=NAMES)
def test_no_name_breaks_a_line_or_acts_on_what_shows_it(name: str) -> None:
    figures = {"metrics": {name: {"value": 1.0, "low": 0.0, "high": 2.0}}, "official": {name: name}}
    scores = {"benchmarks": {name: figures}}
    sides = SideBySide([name, name], [(name, name, [Difference(name, name, 1.0, 2.0, Estimate(1.0, 0.5, 1.5), 9)])], [name])
    problem = Problem("kind", name, name)
    checked = SimpleNamespace(
        name=name, rows=1, pairs=0, samples=0, pictures=0, lengths={}, problems=[problem], grouped=lambda: [(problem, 1)]
    )
    cells = [for_csv(name), for_markdown(name), for_latex(name), str(for_terminal(name)), *official_lines(scores)]
    for cell in cells:
        assert plain(cell) == cell and "\n" not in cell and not cell.lstrip().startswith("=")
    tables = [printed(scores_table(scores)), printed(*data_tables(checked)), printed(doctor.table([finding(name)]))]
    for form in ("terminal", "markdown", "latex"):
        tables.append(show(sides, form))
        harmless = show(replace(sides, names=["a", "a"], rows=[("a", "a", sides.rows[0][2])], notes=["a"]), form)
        assert form == "terminal" or tables[-1].count("\n") == harmless.count("\n")
    for table in tables:
        assert plain(table) == table


FILE_NAMES = st.text(st.sampled_from("abcxyz019-_./"), min_size=1, max_size=34)


@settings(max_examples=20, deadline=None)
@given(names=st.lists(FILE_NAMES, min_size=2, max_size=5), long=st.text(st.sampled_from("ab /"), max_size=200))
def test_nothing_is_cut_on_80_columns(names: list[str], long: str) -> None:
    difference = Difference("adversarial", names[0], -33.5, 2.0, Estimate(-33.5, -40.5, -26.5), 9)
    sides = SideBySide(names, [("object_halbench", "adversarial/precision", [difference] * (len(names) - 1))], [])
    figures = {name: {"value": 100.0, "low": 100.0, "high": 100.0} for name in names}
    problems = [(Problem("a kind of problem", name, long), 1) for name in names]
    checked = SimpleNamespace(
        name="n", rows=1, pairs=0, samples=0, pictures=0, lengths={}, problems=problems, grouped=lambda: problems
    )
    seeds = {name: {column: [31.86, 26.27, 22.63] for column in COLUMNS} for name in names}
    console = Console(width=80, color_system=None)
    with console.capture() as captured, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        console.print(show(sides, "terminal"))
        console.print(fitting([names[0], *names], [[name] * (len(names) + 1) for name in names], title=long[:70]))
        console.print(scores_table({"benchmarks": {name: {"metrics": figures} for name in names}}))
        console.print(doctor.table([doctor.Finding(name, "note", long) for name in names]))
        console.print(results_table(seeds, DemoSettings()), *data_tables(checked), sep="\n")
        compared = show(sides, "terminal")
    text = captured.get()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert all(any(name in line for line in compared.splitlines()) for name in names)
    assert "-33.50 [-40.50, -26.50]*" in compared


def test_the_lightest_table_that_fits_is_not_chosen_before_the_others() -> None:
    rows = [["name", "-33.50 [-40.50, -26.50]*"]]
    shown = {}
    for width in (60, 33, 20):
        console = Console(width=width, color_system=None)
        with console.capture() as captured:
            console.print(fitting(["a", "b"], rows))
        shown[width] = captured.get()
    assert shown[60].startswith("┏") and "┏" not in shown[33] and "─" in shown[33]
    assert shown[20].splitlines()[0].strip() == "name"


def finding(text: str) -> doctor.Finding:
    return doctor.Finding("part", "note", text)


@pytest.mark.parametrize("sign", ["[1ex] model", "*", "=1+1"])
def test_a_latex_cell_is_no_option_of_the_row_before(sign: str) -> None:
    rows = latex_table(["model"], [["a"], [sign]]).splitlines()
    assert rows[-3].startswith("{" + sign[0] + "}")


def catpo(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a shell, with redirections."""
    line = f'"$0" -c "from catpo.cli.main import main; main()" "$@" {shell}'
    given = ["bash", "-c", line, sys.executable, *arguments]
    return subprocess.run(given, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def test_a_closed_stdout_or_stderr_is_no_fault() -> None:
    for arguments, shell, code in ((("list", "judges"), ">&-", 0), (("list", "nonsense"), ">&- 2>&-", 2)):
        done = catpo(*arguments, shell=shell)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_terminal_that_knows_ascii_only_is_told_the_same(tmp_path: Path) -> None:
    name = os.fsdecode(b"b\xffd") + "ä"
    done = catpo("init", str(tmp_path / name), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "b\\udcffd\\xe4" in done.stdout, done.stderr
    assert (tmp_path / name / "recipe.yaml").is_file()


@pytest.mark.parametrize("streaming", [False, True])
def test_glob_characters_in_a_name_are_that_name(streaming: bool, tmp_path: Path) -> None:
    from catpo.data.datasets.trl import Dataset

    for name in ("a*", "ab", "a[b]", "a?"):
        rows = datasets.Dataset.from_dict({"prompt": [name], "chosen": ["x"], "rejected": ["y"]})
        rows.to_parquet(tmp_path / f"{name}.parquet")
        rows.to_json(tmp_path / f"{name}.jsonl")
    for name in ("a*", "a[b]", "a?"):
        for kind in ("parquet", "jsonl"):
            found = Dataset(str(tmp_path / f"{name}.{kind}"), streaming=streaming).rows()
            assert [row.values["prompt"] for row in found] == [name]
