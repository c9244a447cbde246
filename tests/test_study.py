"""Studies: strict files, cells that run once and are shared, tuning apart from what is reported, tables and figures to read."""

from __future__ import annotations

import csv
import io
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from catpo.cli import main
from catpo.config.options import COMMANDS
from catpo.core.errors import UserError
from catpo.core.intervals import mean_interval
from catpo.evaluation.coverage import at_equal_coverage
from catpo.evaluation.folder import load_evaluation
from catpo.experiments.study import cells, file
from catpo.experiments.study.figures import check_figure
from catpo.experiments.study.results import as_latex, as_markdown
from catpo.experiments.study.run import Outcome, study
from catpo.experiments.study.running import run_all
from catpo.files.json_files import read_json, write_json
from catpo.training import objectives
from report_fixtures import make_evaluation, make_run

SHIPPED = sorted((Path(__file__).parent.parent / "recipes" / "studies").glob("*.yaml"))
SAME_CELLS = ("model", "data", "benchmarks", "seeds", "rate_factors", "tuning", "score", "train", "probe")
BASIC = """
title: Two methods
model: builtin
data: scenes(count=12)
seeds: [0, 1]
benchmarks: scenes(count=16, questions=1)
learning_rates: [1e-5, 5e-5]
tuning: {seed: 7, benchmarks: "scenes(count=16, seed=1, questions=1)"}
rows:
  base:
  dpo: dpo
  catpo: {objective: catpo, train: {num_train_epochs: 2}}
"""
FIGURES = """
figures: {tradeoff: tradeoff, bars: "bars(metrics=['chair_i', 'equal_coverage'])", training: curves}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_study_can_be_read_and_all_it_names_exists(path: Path) -> None:
    plan = file.read(path)
    for row in plan.rows.values():
        if row.objective is not None:
            objectives.build(row.objective)
    for name, text in plan.figures.items():
        check_figure(path.name, name, text)
    for named in re.findall(r"(?:rows=\[|baseline=|row=|against=)[^\])]*", " ".join(plan.figures.values())):
        assert set(re.findall(r"'([^']+)'", named)) <= set(plan.rows)
    assert f"catpo study recipes/studies/{path.name}" in path.read_text()


def test_shipped_studies_share_their_cells() -> None:
    plans = {path.stem: file.read(path) for path in SHIPPED}
    assert {"table1", "table2", "figure4", "table4", "table5", "figure6", "figure8-11"} <= set(plans)
    evaluated = [plan for plan in plans.values() if plan.benchmarks]
    assert len(evaluated) == len(plans) - 1
    for plan in evaluated:
        assert {name: getattr(plan, name) for name in SAME_CELLS} == {n: getattr(plans["table1"], n) for n in SAME_CELLS}


def test_another_model_and_data_line_is_all_that_a_large_model_takes(tmp_path: Path) -> None:
    text = SHIPPED[[path.stem for path in SHIPPED].index("table1")].read_text()
    text = re.sub(r"^model: .*$", "model: llava-hf/llava-1.5-7b-hf", text, flags=re.MULTILINE)
    text = re.sub(r"^data: .*$", "data: rlhf_v(source='openbmb/RLHF-V-Dataset')", text, flags=re.MULTILINE)
    plan = file.read(written(tmp_path, text))
    training = COMMANDS["train"](pairs="p", model="m", output=Path("o"), **plan.training(plan.rows["catpo"]))
    assert (
        training.lora,
        training.num_train_epochs,
        training.per_device_train_batch_size * training.gradient_accumulation_steps,
    ) == (
        "lora",
        6,
        32,
    )
    assert min(plan.rates) < training.learning_rate < max(plan.rates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"titel": "x"}, r"line \d+: 'titel' is not an option. Did you mean 'title'\?"),
        (
            {"rows": {"dpo": {"objectiv": "dpo"}}},
            r"line \d+: 'rows.dpo.objectiv' is not an option. Did you mean 'rows.dpo.objective'",
        ),
        ({"rows": {"dpo": {"objective": 3}}}, r"line \d+: 'rows.dpo.objective' must be text or null, not 3"),
        ({"rows": {"dpo": [1]}}, r"line \d+: 'rows.dpo' must be lines of the form"),
        ({"rows": {}}, "'rows' is missing"),
        ({"rows": {"dpo": {"objective": "dpo", "train": {"epoch": 1}}}}, r"'rows.dpo.train.epoch' is not an option"),
        ({"rows": {"dpo": {"objective": "dpo", "tuned_as": "x"}}}, "tuned_as='x' is not a row that is tuned itself"),
        ({"rows": {"dpo": {"objective": "dpo", "rounds": 0}}}, "rounds=0 must be 1 or more"),
        ({"train": {"seed": 1}}, r"line \d+: 'train.seed' is set by the study itself"),
        ({"train": {"num_train_epochs": "many"}}, r"line \d+: 'train.num_train_epochs' must be a number, not 'many'"),
        ({"seeds": [0, 0]}, r"line \d+: 'seeds' must be one or more different whole numbers"),
        ({"seeds": ["a"]}, r"line \d+: 'seeds' must be a list, each a whole number"),
        ({"learning_rates": []}, "must be one or more positive numbers"),
        ({"tuning": None}, "2 learning rates need 'tuning.benchmarks' to choose by"),
        ({"tuning": {"seed": 1, "benchmarks": "captions"}}, "'tuning.seed' 1 is one of the seeds reported"),
        ({"tuning": {"benchmarks": ["scenes(count=16, questions=1)"]}}, "'tuning.benchmarks' has scenes.*, which is reported"),
        ({"reference": "nobody"}, r"line \d+: 'reference' is not one of the rows"),
        ({"columns": {"a": 1}}, r"line \d+: 'columns', 'a' must be text"),
        ({"model": None}, "'model' must be text"),
    ],
)
def test_what_is_not_understood_is_refused_by_key_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    text = yaml.safe_dump({**yaml.safe_load(BASIC), **change}, sort_keys=False, allow_unicode=True)
    with pytest.raises(UserError, match=message) as caught:
        file.read(written(tmp_path, text))
    assert "mine.yaml" in str(caught.value)


def test_a_key_that_stands_twice_or_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine.yaml, line 3: 'model' stands twice"):
        file.read(written(tmp_path, "title: a\nmodel: b\nmodel: c\n"))
    with pytest.raises(UserError, match="'data' is missing"):
        file.read(written(tmp_path, "title: a\nmodel: b\nrows: {dpo: dpo}\n"))


def test_a_mistake_in_an_objective_or_figure_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'rows.dpo': 'dpo' has no option 'bet'"):
        study(written(tmp_path, BASIC.replace("dpo: dpo", "dpo: dpo(bet=1)")), output=tmp_path / "out")
    with pytest.raises(UserError, match=r"'figures.tradeoff': 'pie' is not a figure"):
        study(written(tmp_path, BASIC + "figures: {tradeoff: pie}"), output=tmp_path / "out")
    with pytest.raises(UserError, match="the name becomes a file's"):
        study(written(tmp_path, BASIC + "figures: {../up: tradeoff}"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the grid, with engines that only write what engines write ------------------------------------------------------------


@dataclass
class Engines:
    """Engines in place of the real ones, and what they were asked."""

    trained: list[tuple[str, float, int]]
    evaluated: list[str]
    before: Callable[[str, float, int], None] = lambda *_: None
    wrong: Callable[[str, float], float] = lambda *_: 0.3
    """Share of hallucinated objects that a model trained with this objective and rate names."""
    said: Callable[[str, float], int] = lambda *_: 4


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    record = Engines([], [])

    def pair(*, output: Path, **_: Any) -> None:
        output.mkdir(parents=True)
        write_json(output / "pairs.json", {"complete": True})

    def score(*, output: Path, **_: Any) -> None:
        output.mkdir(parents=True)
        write_json(output / "store.json", {"complete": True})

    def train(*, output: Path, objective: str, learning_rate: float, seed: int, **_: Any) -> Any:
        record.before(objective, learning_rate, seed)
        record.trained.append((objective, learning_rate, seed))
        make_run(output, objective=objective, seed=seed)
        (output / "model").mkdir()
        write_json(output / "model" / "what.json", {"objective": objective, "rate": learning_rate, "seed": seed})
        return SimpleNamespace(model=output / "model")

    def evaluate(*, model: str, benchmarks: tuple[str, ...], output: Path, **_: Any) -> None:
        record.evaluated.append(benchmarks[0])
        what = {"objective": "", "rate": 0.0, "seed": 0}
        if (Path(model) / "what.json").exists():
            what = read_json(Path(model) / "what.json")
        wrong, said = (choose(what["objective"], what["rate"]) for choose in (record.wrong, record.said))
        make_evaluation(output, wrong=wrong, said=said, count=16, seed=what["seed"], options=benchmarks[0])

    for name, engine in {"pair": pair, "score": score, "train": train, "evaluate": evaluate}.items():
        monkeypatch.setattr(cells, name, engine)
    return record


def test_every_method_and_seed_is_a_row_with_an_interval(tmp_path: Path, engines: Engines) -> None:
    outcome = study(written(tmp_path, BASIC), output=tmp_path / "out")
    assert not outcome.failed
    assert [row.name for row in outcome.results.rows] == ["base", "dpo", "catpo"]
    row = outcome.results.row("dpo")
    assert row is not None
    values = list(row.values["scenes/chair_i"].values())
    assert len(values) == 2 and values[0] != values[1]
    assert row.mean("scenes/chair_i")[1:] == pytest.approx(mean_interval(values))
    lines = list(csv.DictReader(io.StringIO((outcome.folder / "table.csv").read_text())))
    assert [float(line["scenes/chair_i"] or "nan") for line in lines][1] == pytest.approx(sum(values) / 2, rel=1e-5)
    table = pq.read_table(outcome.folder / "values.parquet").to_pylist()
    assert {(line["row"], line["seed"]) for line in table} == {(n, s) for n in ("base", "dpo", "catpo") for s in (0, 1)}
    assert not list((tmp_path / "out").glob("cells/*/run/model"))


def test_the_column_of_equal_cover_is_what_the_comparison_says(tmp_path: Path, engines: Engines) -> None:
    engines.wrong = lambda objective, rate: {"": 0.4, "dpo": 0.2}.get(objective, 0.1)
    engines.said = lambda objective, rate: {"": 5, "dpo": 4}.get(objective, 3)
    results = study(written(tmp_path, BASIC), output=tmp_path / "out").results
    for seed in (0, 1):
        folders = {row.name: row.cells[seed].folder(tmp_path / "out") / "evaluation" for row in results.rows}
        direct = at_equal_coverage([load_evaluation(path, name=name) for name, path in folders.items()])
        assert {row.model: row.chair_i.value for row in direct} == pytest.approx(
            {row.name: row.values["equal_coverage"][seed] for row in results.rows}
        )
    last = results.row("catpo")
    assert last is not None and last.difference is not None
    means = [results.rows[place].mean("equal_coverage").value for place in (2, 0)]
    assert last.difference.value == pytest.approx(means[0] - means[1])
    assert last.difference.low < last.difference.value < last.difference.high


def test_a_row_that_says_next_to_nothing_does_not_drag_the_others_down(tmp_path: Path, engines: Engines) -> None:
    engines.said = lambda objective, rate: 1 if objective == "catpo" else 5
    results = study(written(tmp_path, BASIC), output=tmp_path / "out").results
    assert results.rows[2].name == "catpo" and "equal_coverage" not in results.rows[2].values
    assert "equal_coverage" in results.rows[1].values
    assert any("catpo covers less than 50%" in note for note in results.notes)


def test_tuning_takes_the_better_rate_and_other_pictures(tmp_path: Path, engines: Engines) -> None:
    engines.wrong = lambda objective, rate: 0.1 if (objective == "dpo") == (rate > 2e-5) else 0.5
    results = study(written(tmp_path, BASIC), output=tmp_path / "out").results
    assert [row.rate for row in results.rows] == [None, 5e-5, 1e-5]
    tried = {(objective, rate) for objective, rate, seed in engines.trained if seed == 7}
    assert tried == {(objective, rate) for objective in ("dpo", "catpo") for rate in (1e-5, 5e-5)}
    assert {(o, r) for o, r, seed in engines.trained if seed in (0, 1)} == {("dpo", 5e-5), ("catpo", 1e-5)}
    assert set(engines.evaluated) == {"scenes(count=16, questions=1)", "scenes(count=16, seed=1, questions=1)"}


def test_tuning_does_not_fall_for_a_model_that_falls_silent(tmp_path: Path, engines: Engines) -> None:
    engines.wrong = lambda objective, rate: 0.0 if rate > 2e-5 else 0.2
    engines.said = lambda objective, rate: 1 if rate > 2e-5 else 4
    assert [row.rate for row in study(written(tmp_path, BASIC), output=tmp_path / "out").results.rows] == [None, 1e-5, 1e-5]


def test_tuning_by_another_metric_knows_its_good_side(tmp_path: Path, engines: Engines) -> None:
    engines.said = lambda objective, rate: 2 if rate > 2e-5 else 5
    text = BASIC.replace("{seed: 7,", "{seed: 7, metric: cover,")
    assert study(written(tmp_path, text), output=tmp_path / "out").results.rows[1].rate == 1e-5
    engines.wrong = lambda objective, rate: 0.0 if rate > 2e-5 else 0.4
    text = BASIC.replace("{seed: 7,", "{seed: 7, metric: chair_i,")
    assert study(written(tmp_path, text), output=tmp_path / "other").results.rows[1].rate == 5e-5


def test_a_row_can_take_the_rate_of_another(tmp_path: Path, engines: Engines) -> None:
    engines.wrong = lambda objective, rate: 0.1 if rate > 2e-5 else 0.5
    text = BASIC.replace("catpo: {objective: catpo,", "catpo: {objective: catpo, tuned_as: dpo,")
    assert [row.rate for row in study(written(tmp_path, text), output=tmp_path / "out").results.rows] == [None, 5e-5, 5e-5]
    assert not any(objective == "catpo" and seed == 7 for objective, _, seed in engines.trained)


def test_a_killed_study_goes_on_and_ends_with_the_same_table(tmp_path: Path, engines: Engines) -> None:
    whole = study(written(tmp_path, BASIC), output=tmp_path / "whole")
    count = len(engines.trained)

    def killed(objective: str, rate: float, seed: int) -> None:
        if len(engines.trained) == count + 3:
            raise KeyboardInterrupt

    engines.before = killed
    with pytest.raises(KeyboardInterrupt):
        study(written(tmp_path, BASIC), output=tmp_path / "out")
    engines.before = lambda *_: None
    again = study(written(tmp_path, BASIC), output=tmp_path / "out")
    assert len(engines.trained) == 2 * count
    assert as_markdown(again.results) == as_markdown(whole.results)
    study(written(tmp_path, BASIC), output=tmp_path / "out")
    assert len(engines.trained) == 2 * count


def test_another_study_with_the_same_output_shares_cells(tmp_path: Path, engines: Engines) -> None:
    study(written(tmp_path, BASIC), output=tmp_path / "out")
    count = len(engines.trained)
    other = tmp_path / "other.yaml"
    other.write_text(BASIC.replace("dpo: dpo", "plain: dpo\n  ipo: dpo(loss_type='ipo')"))
    study(other, output=tmp_path / "out")
    assert {objective for objective, _, _ in engines.trained[count:]} == {"dpo(loss_type='ipo')"}


def test_a_failing_cell_is_named_and_the_others_go_on(
    tmp_path: Path, engines: Engines, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(objective: str, rate: float, seed: int) -> None:
        if objective == "catpo" and seed == 1:
            raise RuntimeError("out of luck")

    engines.before = breaks
    with pytest.raises(SystemExit) as ended:
        main.main(["study", str(written(tmp_path, BASIC)), "--output", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert "catpo, seed 1 failed: RuntimeError: out of luck" in capsys.readouterr().err
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO((tmp_path / "out" / "mine" / "table.csv").read_text()))}
    assert (lines["dpo"]["seeds"], lines["catpo"]["seeds"]) == ("2", "1")
    assert "out of luck" in (tmp_path / "out" / "mine" / "table.md").read_text()


def test_rows_whose_pairs_cannot_be_made_are_left_out_by_name(
    tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = cells.pair

    def pair(*, method: str, **options: Any) -> None:
        if method == "unheard_of":
            raise UserError("there is no pairing 'unheard_of'.")
        make(method=method, **options)  # type: ignore[call-arg]

    monkeypatch.setattr(cells, "pair", pair)
    text = BASIC.replace("catpo: {objective: catpo,", "catpo: {objective: catpo, method: unheard_of,")
    outcome = study(written(tmp_path, text), output=tmp_path / "out")
    assert [row.name for row in outcome.results.rows] == ["base", "dpo"]
    assert any("unheard_of" in called for called in outcome.failed)


def test_figures_are_drawings_and_the_page_escapes_all_text(tmp_path: Path, engines: Engines) -> None:
    hostile = "<script>alert(1)</script> $x_1$ & _row"
    text = yaml.safe_load(BASIC + FIGURES)
    text["title"] = text["note"] = hostile
    text["rows"][hostile] = "dpo(beta=0.2)"
    outcome = study(written(tmp_path, yaml.safe_dump(text, sort_keys=False)), output=tmp_path / "out")
    for name in ("tradeoff", "bars", "training"):
        drawing = ElementTree.parse(outcome.folder / f"{name}.svg").getroot()
        assert drawing.tag.endswith("svg")
        words = "".join(drawing.itertext())
        assert hostile in words
        pdf = (outcome.folder / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")
    page = (outcome.folder / "report.html").read_text()
    assert "alert(1)" in page and "<script>alert" not in page
    assert page.count("data:image/svg+xml;base64,") == 3
    assert "\\$x\\_1\\$ \\& \\_row" in as_latex(outcome.results)
    assert "\\<script\\>" in as_markdown(outcome.results)


def test_the_same_numbers_give_the_same_drawings(tmp_path: Path, engines: Engines) -> None:
    text = BASIC + "figures: {training: curves}\n"
    outcome = study(written(tmp_path, text), output=tmp_path / "out")
    before = {path.name: path.read_bytes() for path in outcome.folder.glob("training.*")}
    study(written(tmp_path, text), output=tmp_path / "out")
    assert before == {name: (outcome.folder / name).read_bytes() for name in before} and len(before) == 2


def test_a_sweep_draws_a_panel_with_its_points(tmp_path: Path, engines: Engines) -> None:
    rows = "  a: {objective: dpo(beta=0.1), panel: β, at: 0.1}\n  b: {objective: dpo(beta=0.3), panel: β, at: 0.3}\n"
    text = f"{BASIC}{rows}figures: {{sweep: \"sweep(metric='cover', baseline='dpo')\"}}\n"
    outcome = study(written(tmp_path, text), output=tmp_path / "out")
    assert "β" in (outcome.folder / "sweep.svg").read_text()


def test_a_figure_that_cannot_be_drawn_is_a_note(tmp_path: Path, engines: Engines) -> None:
    outcome = study(written(tmp_path, BASIC + "figures: {tokens: token_logps}\n"), output=tmp_path / "out")
    assert not (outcome.folder / "tokens.svg").exists()
    assert "tokens is not drawn: row 'catpo' has kept no log-probs" in outcome.results.notes[0]


# ---- the real engines -----------------------------------------------------------------------------------------------------

REAL = """
title: Real
model: builtin
data: scenes(count=14)
seeds: [0, 1]
benchmarks: scenes(count=6, questions=0)
rows:
  base:
  dpo: dpo
  learned: catpo(learned=True)
  on-policy: {objective: dpo, rounds: 2}
score: {batch_size: 8, attention_maps: false}
pair: {max_new_tokens: 48}
train: {max_steps: 2, logging_steps: 1, eval_fraction: 0}
evaluate: {max_new_tokens: 16}
probe: 4
columns: {CHAIRi: chair_i, risen: probe/risen_tokens, γ: learned/global_attention}
figures: {curves: curves, figure8: "token_logps(row='learned')", figure11: "rises(rows=['dpo', 'learned'])"}
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, builtin: Path) -> Outcome:
    folder = tmp_path_factory.mktemp("real")
    return study(written(folder, REAL), output=folder / "out")


def test_a_study_runs_with_the_builtin_model(real: Outcome) -> None:
    assert not real.failed
    assert [row.name for row in real.results.rows] == ["base", "dpo", "learned", "on-policy"]
    for row in real.results.rows[1:]:
        assert len(row.cells) == 2 and row.rate == 5e-5
    learned = real.results.row("learned")
    assert learned is not None
    assert learned.mean("learned/global_attention").value == pytest.approx(0.25, abs=0.05)


def test_log_probs_are_kept_token_by_token_and_drawn(real: Outcome) -> None:
    row = real.results.row("dpo")
    assert row is not None
    folder = row.cells[0].folder(real.folder.parent)
    kept = pq.read_table(folder / "logps.parquet").to_pylist()
    assert len({line["pair"] for line in kept}) == 4
    assert any(abs(line["policy"] - line["reference"]) > 1e-6 for line in kept)
    assert all(abs(line["policy"] - line["reference"]) < 1 for line in kept)
    assert 0 <= row.values["probe/risen_tokens"][0] <= 100
    for name in ("curves", "figure8", "figure11"):
        assert (real.folder / f"{name}.svg").exists(), real.results.notes


def test_rounds_answer_disjoint_pictures_with_the_model_of_the_round_before(real: Outcome) -> None:
    row = real.results.row("on-policy")
    assert row is not None
    folder = row.cells[0].folder(real.folder.parent)
    first, second = (read_json(folder / f"round-{number}" / "pairs" / "pairs.json") for number in (1, 2))
    assert first["counts"]["asked"] + second["counts"]["asked"] == 14
    assert first["data_hash"] != second["data_hash"] and first["model_hash"] != second["model_hash"]
    assert second["model"].endswith("round-1/run/model")
    assert not (folder / "round-1" / "run" / "model").exists()


# ---- processes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """A task that leaves its name, or takes its process down with it."""

    name: str
    dies: bool = False

    def folder(self, output: Path) -> Path:
        return output / self.name

    def is_finished(self, output: Path) -> bool:
        return self.folder(output).exists()

    def run(self, output: Path, *, keep_model: bool = False) -> None:
        if self.dies:
            os._exit(1)
        self.folder(output).write_text(str(os.getpid()))


@pytest.mark.slow
def test_a_process_that_dies_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    tasks = [Note("one"), Note("two"), Note("fatal", dies=True), Note("three")]
    failed = run_all(tasks, tmp_path, what="Notes", jobs=2)
    assert set(failed) == {"fatal"} and "was killed" in failed["fatal"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three", "two"]
    assert str(os.getpid()) not in {path.read_text() for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_measured_cells_have_processes_of_their_own(tmp_path: Path, builtin: Path) -> None:
    text = REAL.split("columns:")[0].replace("benchmarks: scenes(count=6, questions=0)\n", "measure: true\n")
    outcome = study(written(tmp_path, text.replace("  on-policy: {objective: dpo, rounds: 2}\n", "")), output=tmp_path / "out")
    row = outcome.results.row("dpo")
    assert not outcome.failed and row is not None
    assert row.mean("cost/seconds_per_pair").value > 0
    assert 200 < row.mean("cost/memory").value < 8000


def test_a_cell_killed_before_it_was_tidied_is_tidied_and_not_measured_again(tmp_path, monkeypatch):
    cell = cells.Cell(shared=None, model="builtin", objective="dpo", learning_rate=1e-4, seed=0)
    model, measured, tidy = cell.folder(tmp_path) / "run" / "model", [], cells._tidy

    def measure(self, output, folder):
        model.mkdir(parents=True)
        measured.append(folder)
        return {"figures": {"kl": 0.5}}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells.Cell, "_measured", measure)
    monkeypatch.setattr(cells, "_tidy", killed)
    with pytest.raises(KeyboardInterrupt):
        cell.run(tmp_path)
    assert model.is_dir() and not cell.is_finished(tmp_path)
    monkeypatch.setattr(cells, "_tidy", tidy)
    cell.run(tmp_path)
    cell.run(tmp_path)
    assert cell.is_finished(tmp_path) and not model.exists() and len(measured) == 1
    assert read_json(cell.folder(tmp_path) / cells.DONE)["figures"] == {"kl": 0.5}
