"""Studies: strict files, cells that run once and are shared, tuning apart from what is reported, tables and figures to read."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from catpo.cli import main
from catpo.config.options import COMMANDS
from catpo.config.recipes import SHIPPED as SHIPPED_FILES
from catpo.core.errors import UserError
from catpo.core.intervals import mean_interval
from catpo.evaluation.coverage import at_equal_coverage
from catpo.evaluation.folder import load_evaluation
from catpo.experiments.study import cells, figures, file, probe
from catpo.experiments.study.results import as_markdown
from catpo.experiments.study.run import Outcome, study
from catpo.experiments.study.running import run_all
from catpo.files.json_files import read_json, write_json
from catpo.training import objectives
from report_fixtures import make_evaluation, make_run

SHIPPED = sorted((SHIPPED_FILES / "studies").glob("*.yaml"))
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
FIGURES = {
    "tradeoff": "tradeoff",
    "bars": "bars(metrics=['chair_i', 'equal_coverage'])",
    "training": "curves",
    "sweep": "sweep(metric='cover', baseline='dpo')",
    "tokens": "token_logps",
}
HOSTILE = "<script>alert(1)</script> $x_1$ & _row"


def written(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.yaml"
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
        figures.check_figure(path.name, name, text)
    for named in re.findall(r"(?:rows=\[|baseline=|row=|against=)[^\])]*", " ".join(plan.figures.values())):
        assert set(re.findall(r"'([^']+)'", named)) <= set(plan.rows)
    assert f"catpo study {path.name}" in path.read_text()


def test_the_studies_of_the_paper_share_their_cells() -> None:
    plans = {path.stem: file.read(path) for path in SHIPPED if not path.stem.startswith("tilt")}
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
    assert (training.lora, training.num_train_epochs) == ("lora", 6)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 32
    assert min(plan.rates) < training.learning_rate < max(plan.rates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"titel": "x"}, r"line \d+: 'titel' is not an option. Did you mean 'title'\?"),
        ({"rows": {"dpo": {"objectiv": "dpo"}}}, r"line \d+: 'rows.dpo.objectiv' is not .* Did you mean 'rows.dpo.objective'"),
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
def test_mistakes_are_refused_by_key_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    text = yaml.safe_dump({**yaml.safe_load(BASIC), **change}, sort_keys=False, allow_unicode=True)
    with pytest.raises(UserError, match=message) as caught:
        file.read(written(tmp_path, text))
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: a\nmodel: b\nmodel: c\n", r"mine.yaml, line 3: 'model' stands twice"),
        ("title: a\nmodel: b\nrows: {dpo: dpo}\n", "'data' is missing"),
        (BASIC.replace("dpo: dpo", "dpo: dpo(bet=1)"), r"'rows.dpo': 'dpo' has no option 'bet'"),
        (BASIC + "figures: {tradeoff: pie}", r"'figures.tradeoff': 'pie' is not a figure"),
        (BASIC + "figures: {../up: tradeoff}", "the name becomes a file's"),
    ],
)
def test_a_mistake_is_reported_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        study(written(tmp_path, text), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the grid, with engines that only write what engines write ------------------------------------------------------------


class Engines:
    """Stands in for the real engines and records what they are asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.trained: list[tuple[str, float, int]] = []
        self.evaluated: list[str] = []
        self.before: Callable[[str, float, int], None] = lambda *_: None
        self.wrong: Callable[[str, float], float] = lambda *_: 0.3
        """Share of hallucinated objects that a model trained with this objective and rate names."""
        self.said: Callable[[str, float], int] = lambda *_: 4
        for name in ("pair", "score", "train", "evaluate"):
            monkeypatch.setattr(cells, name, getattr(self, name))

    def study(self, text: str = BASIC, output: str = "out", name: str = "mine") -> Outcome:
        return study(written(self.folder, text, name), output=self.folder / output)

    def pair(self, *, output: Path, method: str, **_: Any) -> None:
        if method == "unheard_of":
            raise UserError("there is no pairing 'unheard_of'.")
        output.mkdir(parents=True)
        write_json(output / "pairs.json", {"complete": True})

    def score(self, *, output: Path, **_: Any) -> None:
        output.mkdir(parents=True)
        write_json(output / "store.json", {"complete": True})

    def train(self, *, output: Path, objective: str, learning_rate: float, seed: int, **_: Any) -> Any:
        self.before(objective, learning_rate, seed)
        self.trained.append((objective, learning_rate, seed))
        make_run(output, objective=objective, seed=seed)
        (output / "model").mkdir()
        write_json(output / "model" / "what.json", {"objective": objective, "rate": learning_rate, "seed": seed})
        return SimpleNamespace(model=output / "model")

    def evaluate(self, *, model: str, benchmarks: tuple[str, ...], output: Path, **_: Any) -> None:
        self.evaluated.append(benchmarks[0])
        what = {"objective": "", "rate": 0.0, "seed": 0}
        if (Path(model) / "what.json").exists():
            what = read_json(Path(model) / "what.json")
        wrong, said = (choose(what["objective"], what["rate"]) for choose in (self.wrong, self.said))
        make_evaluation(output, wrong=wrong, said=said, count=16, seed=what["seed"], options=benchmarks[0])


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engines:
    return Engines(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A study with hostile texts and every figure that needs no log-probs."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        engines = Engines(folder, monkeypatch)
        engines.wrong = lambda objective, rate: {"": 0.4, "dpo": 0.2}.get(objective, 0.1)
        engines.said = lambda objective, rate: {"": 5, "dpo": 4}.get(objective, 3)
        text = yaml.safe_load(BASIC.replace("[1e-5, 5e-5]", "[5e-5]"))
        text["title"] = text["note"] = HOSTILE
        text["rows"][HOSTILE] = {"objective": "dpo(beta=0.2)", "panel": "β", "at": 0.2}
        text["figures"], text["at_cover"] = FIGURES, [20, 99]
        return engines.study(yaml.safe_dump(text, sort_keys=False))


def test_every_method_and_seed_is_a_row_with_an_interval(finished: Outcome) -> None:
    assert not finished.failed
    assert [row.name for row in finished.results.rows] == ["base", "dpo", "catpo", HOSTILE]
    row = finished.results.row("dpo")
    assert row is not None
    values = list(row.values["scenes/chair_i"].values())
    assert len(values) == 2 and values[0] != values[1]
    assert row.mean("scenes/chair_i")[1:] == pytest.approx(mean_interval(values))
    lines = list(csv.DictReader(io.StringIO((finished.folder / "table.csv").read_text())))
    assert [float(line["scenes/chair_i"] or "nan") for line in lines][1] == pytest.approx(sum(values) / 2, rel=1e-5)
    table = pq.read_table(finished.folder / "values.parquet").to_pylist()
    names = [row.name for row in finished.results.rows]
    assert {(line["row"], line["seed"]) for line in table} == {(name, seed) for name in names for seed in (0, 1)}
    assert not list(finished.folder.parent.glob("cells/*/run/model"))


def test_the_column_of_equal_cover_is_what_the_comparison_says(finished: Outcome) -> None:
    results = finished.results
    for seed in (0, 1):
        folders = {row.name: row.cells[seed].folder(finished.folder.parent) / "evaluation" for row in results.rows}
        direct = at_equal_coverage([load_evaluation(path, name=name) for name, path in folders.items()])
        assert {row.model: row.chair_i.value for row in direct} == pytest.approx(
            {row.name: row.values["equal_coverage"][seed] for row in results.rows}
        )
    last = results.row("catpo")
    assert last is not None and last.difference is not None
    means = [results.rows[index].mean("equal_coverage").value for index in (2, 0)]
    assert last.difference.value == pytest.approx(means[0] - means[1])
    assert last.difference.low < last.difference.value < last.difference.high


def test_rows_are_compared_at_each_cover_that_they_reach(finished: Outcome) -> None:
    row = finished.results.row("catpo")
    assert row is not None and row.ratios.keys() == {20.0}
    assert row.ratios[20].value == pytest.approx(
        row.mean("chair_i_at_20").value / finished.results.rows[0].mean("chair_i_at_20").value
    )
    assert any("catpo does not reach Cover 99 with seed 0, 1" in note for note in finished.results.notes)
    assert "÷ base at Cover 20" in (finished.folder / "table.md").read_text()
    assert "ratio_at_20_low" in (finished.folder / "table.csv").read_text()


def test_figures_are_drawings_and_the_page_escapes_all_text(finished: Outcome) -> None:
    for name in ("tradeoff", "bars", "training", "sweep"):
        drawing = ElementTree.parse(finished.folder / f"{name}.svg").getroot()
        assert drawing.tag.endswith("svg")
        assert ("β" if name == "sweep" else HOSTILE) in "".join(drawing.itertext())
        pdf = (finished.folder / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")
    page = (finished.folder / "report.html").read_text()
    assert "alert(1)" in page and "<script>alert" not in page
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "\\$x\\_1\\$ \\& \\_row" in (finished.folder / "table.tex").read_text()
    assert "\\<script\\>" in (finished.folder / "table.md").read_text()
    assert not (finished.folder / "tokens.svg").exists()
    assert any("tokens is not drawn: row 'catpo' has kept no log-probs" in note for note in finished.results.notes)


def test_the_same_numbers_give_the_same_files(finished: Outcome) -> None:
    before = {path: path.read_bytes() for path in finished.folder.iterdir() if path.name != ".lock"}
    study(finished.folder.parent.parent / "mine.yaml", output=finished.folder.parent)
    assert before == {path: path.read_bytes() for path in before}


def test_a_row_that_says_next_to_nothing_is_left_out_at_equal_cover(engines: Engines) -> None:
    engines.said = lambda objective, rate: 1 if objective == "catpo" else 5
    results = engines.study().results
    assert results.rows[2].name == "catpo" and "equal_coverage" not in results.rows[2].values
    assert "equal_coverage" in results.rows[1].values
    assert any("catpo covers less than 50%" in note for note in results.notes)


def test_tuning_takes_the_better_rate_and_other_pictures(engines: Engines) -> None:
    engines.wrong = lambda objective, rate: 0.1 if (objective == "dpo") == (rate > 2e-5) else 0.5
    assert [row.rate for row in engines.study().results.rows] == [None, 5e-5, 1e-5]
    tried = {(objective, rate) for objective, rate, seed in engines.trained if seed == 7}
    assert tried == {(objective, rate) for objective in ("dpo", "catpo") for rate in (1e-5, 5e-5)}
    assert {(o, r) for o, r, seed in engines.trained if seed in (0, 1)} == {("dpo", 5e-5), ("catpo", 1e-5)}
    assert set(engines.evaluated) == {"scenes(count=16, questions=1)", "scenes(count=16, seed=1, questions=1)"}


@pytest.mark.parametrize(
    ("change", "wrong", "said", "rate"),
    [
        (("", ""), (0.2, 0.0), (4, 1), 1e-5),  # a model that falls silent names nothing wrong
        (("{seed: 7,", "{seed: 7, metric: cover,"), (0.3, 0.3), (5, 2), 1e-5),
        (("{seed: 7,", "{seed: 7, metric: chair_i,"), (0.4, 0.0), (5, 2), 5e-5),
        (("{objective: catpo,", "{objective: catpo, tuned_as: dpo,"), (0.5, 0.1), (4, 4), 5e-5),
    ],
)
def test_tuning_chooses_by_coverage_by_a_metric_or_as_another_row(
    engines: Engines, change: tuple[str, str], wrong: tuple[float, float], said: tuple[int, int], rate: float
) -> None:
    engines.wrong = lambda objective, rate: wrong[rate > 2e-5]
    engines.said = lambda objective, rate: said[rate > 2e-5]
    assert [row.rate for row in engines.study(BASIC.replace(*change)).results.rows] == [None, rate, rate]
    assert ("tuned_as" in change[1]) != any(o == "catpo" and seed == 7 for o, _, seed in engines.trained)


def test_a_killed_study_goes_on_and_ends_with_the_same_table(engines: Engines) -> None:
    whole = engines.study(output="whole")
    count = len(engines.trained)

    def killed(objective: str, rate: float, seed: int) -> None:
        if len(engines.trained) == count + 3:
            raise KeyboardInterrupt

    engines.before = killed
    with pytest.raises(KeyboardInterrupt):
        engines.study()
    engines.before = lambda *_: None
    again = engines.study()
    assert len(engines.trained) == 2 * count
    assert as_markdown(again.results) == as_markdown(whole.results)
    engines.study(BASIC.replace("dpo: dpo", "plain: dpo\n  ipo: dpo(loss_type='ipo')"), name="other")  # shares the cells
    assert {objective for objective, _, _ in engines.trained[2 * count :]} == {"dpo(loss_type='ipo')"}


def test_a_failing_cell_is_named_and_the_others_go_on(engines: Engines, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(objective: str, rate: float, seed: int) -> None:
        if objective == "catpo" and seed == 1:
            raise RuntimeError("out of luck")

    engines.before = breaks
    output = engines.folder / "out"
    with pytest.raises(SystemExit) as ended:
        main.main(["study", str(written(engines.folder, BASIC)), "--output", str(output)])
    assert ended.value.code == 1
    assert "catpo, seed 1 failed: RuntimeError: out of luck" in capsys.readouterr().err
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO((output / "mine" / "table.csv").read_text()))}
    assert (lines["dpo"]["seeds"], lines["catpo"]["seeds"]) == ("2", "1")
    assert "out of luck" in (output / "mine" / "table.md").read_text()


def test_a_row_may_be_a_decoding_of_the_untrained_or_of_a_trained_model(engines: Engines) -> None:
    added = "  vcd: {evaluate: {decoding: vcd}}\n"
    added += "  both: {objective: dpo, tuned_as: dpo, evaluate: {decoding: vcd}}\n"
    rows = engines.study(BASIC.replace("  dpo: dpo\n", f"  dpo: dpo\n{added}")).results.rows
    assert [row.name for row in rows] == ["base", "dpo", "vcd", "both", "catpo"]
    cells = {row.name: row.cells[0] for row in rows}
    assert (
        cells["vcd"].evaluate["decoding"] == cells["both"].evaluate["decoding"] == "vcd"
        and "decoding" not in cells["dpo"].evaluate
    )
    assert cells["vcd"].objective is None and cells["both"].name != cells["dpo"].name


def test_rows_that_differ_in_their_evaluation_train_once(engines: Engines) -> None:
    both = "  both: {objective: dpo, tuned_as: dpo, evaluate: {decoding: vcd}}\n"
    text = BASIC.replace("  dpo: dpo\n", f"  dpo: dpo\n{both}")
    models = lambda output: sorted((engines.folder / output).glob("cells/*/run/model"))
    results = engines.study(text).results
    dpo, of_both = results.row("dpo"), results.row("both")
    assert len(engines.trained) == len({*engines.trained}) == 8  # two methods, at two rates in tuning, with two seeds
    assert dpo is not None and of_both is not None and not models("out")
    assert of_both.mean("scenes/chair_i") == dpo.mean("scenes/chair_i")
    engines.study(text + "keep_models: true\n", output="kept")
    kept = models("kept")
    engines.study(text, output="kept", name="other")
    assert len(kept) == 8 and models("kept") == kept


def test_rows_whose_pairs_cannot_be_made_are_left_out_by_name(engines: Engines) -> None:
    outcome = engines.study(BASIC.replace("catpo: {objective: catpo,", "catpo: {objective: catpo, method: unheard_of,"))
    assert [row.name for row in outcome.results.rows] == ["base", "dpo"]
    assert any("unheard_of" in label for label in outcome.failed)


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
  on-policy: {objective: dpo, rounds: 2, train: {lora: 'lora(r=2, alpha=4)'}}
score: {batch_size: 8, attention_maps: false}
pair: {max_new_tokens: 48}
train: {max_steps: 2, logging_steps: 1, eval_fraction: 0}
evaluate: {max_new_tokens: 16}
probe: 4
columns: {CHAIRi: chair_i, risen: probe/risen_tokens, γ: learned/global_attention}
figures: {curves: curves, figure8: "token_logps(row='learned')", figure11: "rises(rows=['dpo', 'learned'])",
  none: 'bars(metrics=[])'}
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
    assert "none is not drawn: it has nothing to show. Give at least one metric, row or pair." in real.results.notes


def test_figures_compare_pairs_of_the_seeds_that_both_rows_have(real: Outcome, tmp_path: Path) -> None:
    kept = {}
    for name in ("dpo", "learned"):
        row = real.results.row(name)
        assert row is not None
        for seed, cell in row.cells.items():
            kept[name, seed] = cell.folder(tmp_path) / "logps.parquet"
            kept[name, seed].parent.mkdir(parents=True)
            shutil.copy(cell.folder(real.folder.parent) / "logps.parquet", kept[name, seed])
    kept["dpo", 0].unlink()
    figure = figures.token_logps(real.results, tmp_path, row="learned", pairs=1)
    for line, name in zip(figure.axes[0].lines, ("learned", "dpo"), strict=True):
        response = next(iter(probe.read(kept[name, 1], "chosen").values()))
        assert line.get_ydata().tolist() == response.policy.tolist()
    lines = pq.read_table(kept["dpo", 1]).to_pylist()
    pq.write_table(pa.Table.from_pylist([{**line, "pair": "another"} for line in lines]), kept["dpo", 1])
    for draw in (lambda: figures.token_logps(real.results, tmp_path, row="learned"),
                 lambda: figures.rises(real.results, tmp_path, rows=["learned"])):  # fmt: skip
        with pytest.raises(UserError, match="'learned' and 'dpo' have no probed pair in common"):
            draw()


def test_an_on_policy_row_answers_disjoint_pictures_with_the_merged_model_of_the_round_before(real: Outcome) -> None:
    row = real.results.row("on-policy")
    assert row is not None
    folder = row.cells[0].folder(real.folder.parent)
    first, second = (read_json(folder / f"round-{number}" / "pairs" / "pairs.json") for number in (1, 2))
    assert first["counts"]["asked"] + second["counts"]["asked"] == 14
    assert first["data_hash"] != second["data_hash"] and first["model_hash"] != second["model_hash"]
    assert second["model"].endswith("round-1/model")
    assert not list(folder.glob("**/model"))


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

    def run(self, output: Path, *, keep: cells.Keep = "nothing") -> None:
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
    outcome = study(written(tmp_path, re.sub("  on-policy: .*\n", "", text)), output=tmp_path / "out")
    row = outcome.results.row("dpo")
    assert not outcome.failed and row is not None
    assert row.mean("cost/seconds_per_pair").value > 0
    assert 200 < row.mean("cost/memory").value < 8000


def test_a_cell_whose_training_was_killed_after_its_last_step_goes_without_a_cost(tmp_path):
    """The resumed training has no step left, so that its log names no speed."""
    cell = cells.Cell(shared=None, model="builtin", objective="dpo", learning_rate=1e-5, seed=0, measure=True)
    make_run(cell.folder(tmp_path) / "run", objective="dpo")
    assert cell._figures("builtin", cell.folder(tmp_path) / "run", tmp_path, cell.folder(tmp_path)) == {}


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
