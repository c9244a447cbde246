"""The report as a file: self-contained, safe, complete, and its numbers those of the engines."""

import base64
import dataclasses
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import product
from typing import get_args

import numpy as np
import pytest

from catpo.core.errors import UserError
from catpo.core.types import PatchGrid
from catpo.evaluation.bootstrap import Estimate
from catpo.evaluation.compare import Format, compare, show
from catpo.evaluation.coverage import Coverage, at_equal_coverage
from catpo.evaluation.folder import load_evaluation
from catpo.evaluation.paired import Difference
from catpo.files.json_files import append_rows, read_json, read_rows, write_json
from catpo.reporting.build import report
from catpo.reporting.evaluations import BenchmarkTable, Cell, benchmark_tables
from catpo.reporting.heatmap import canvas, compose, heatmap
from catpo.reporting.page import embed, policy
from catpo.reporting.plots import Series, curves, histogram
from catpo.reporting.verdicts import evaluation_verdicts
from catpo.rewards.fusion import Fusion
from catpo.rewards.quality import signal_quality
from catpo.rewards.store import RewardStore
from report_fixtures import GRID, HOSTILE, SIGNALS, make_evaluation, make_pairs, make_run, make_store

HOSTILE_NAME = "<img src=x onerror=alert(1)> {{7*7}} & 'run'"


class Page(HTMLParser):
    """Tags with attributes, the text of the page, and its scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open, self.scripts = [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.open.remove(tag)
        if tag in ("th", "td", "p", "li"):
            self.text += " "

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data

    @property
    def data(self):
        return json.loads(self.scripts[0])

    @property
    def flat(self):
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything a report can be made of, hostile texts among it."""
    folder = tmp_path_factory.mktemp("report")
    pairs = make_pairs(folder / "pairs", 4, hostile=True)
    make_store(folder / "rewards", pairs)
    make_run(folder / "runs" / "dpo", objective="dpo", net=0)
    make_run(folder / "runs" / HOSTILE_NAME, objective=HOSTILE, seed=1)
    for name, wrong in (("base", 0.4), ("dpo", 0.15), (HOSTILE_NAME, 0.3)):
        make_evaluation(folder / "evaluations" / name, wrong=wrong, seed=len(name))
    return folder


@pytest.fixture(scope="module")
def path(folder):
    return report(
        output=folder,
        rewards=folder / "rewards",
        pairs=folder / "pairs",
        runs=[folder / "runs" / "dpo", folder / "runs" / HOSTILE_NAME],
        evaluations=[folder / "evaluations" / name for name in ("base", "dpo", HOSTILE_NAME)],
        title=f"Report {HOSTILE_NAME}",
    )


@pytest.fixture(scope="module")
def page(path):
    return Page(path)


# ---- metrics without a value ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_any_metric_may_be_without_a_value(folder, tmp_path, seed):
    """0 of 0 is stored as null: of a model that names nothing, or never says yes."""
    rng = random.Random(seed)
    names = ("base", "dpo", HOSTILE_NAME)
    paths = [_with_nulls(shutil.copytree(folder / "evaluations" / name, tmp_path / name), rng) for name in names]
    tables = benchmark_tables([load_evaluation(path) for path in paths], dict.fromkeys(names, 0), resamples=20)
    sentences = evaluation_verdicts(tables)
    assert not [text for text in sentences if re.search(r"\bnan\b|–", text)]
    for form in get_args(Format):
        assert not re.search(r"\bnan\b", show(compare(paths, limit=9), form))
    assert report(output=tmp_path, evaluations=paths).is_file()


def _with_nulls(evaluation, rng):
    """Some counts of some groups are 0, and some captions name nothing; some stored metrics are null."""
    rows, scores = read_rows(evaluation / "grades.jsonl"), read_json(evaluation / "scores.json")
    names = sorted({(row["group"], count) for row in rows for count in row["counts"]})
    zeroed = set(rng.sample(names, rng.choice([0, 3, len(names) // 2, len(names)])))
    says_nothing = rng.random() < 0.5
    for row in rows:
        row["counts"] = {name: 0 if (row["group"], name) in zeroed else value for name, value in row["counts"].items()}
        if "mentions" in row and says_nothing:
            row["mentions"] = []
    metrics = scores["benchmarks"]["scenes"]["metrics"]
    metrics |= dict.fromkeys(rng.sample(sorted(metrics), 3), dict.fromkeys(("value", "low", "high")))
    (evaluation / "grades.jsonl").unlink()
    append_rows(evaluation / "grades.jsonl", rows)
    write_json(evaluation / "scores.json", scores)
    return evaluation


# ---- one safe file ---------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing(path, page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "meta-refresh")
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
    text = path.read_text(encoding="utf-8")
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "fetch(" not in text and "XMLHttpRequest" not in text and "innerHTML" not in text and "eval(" not in text


def test_the_content_policy_allows_only_this_script_and_style(path, page):
    content = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    text = path.read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert content == policy(style, page.scripts[1])
    assert "default-src 'none'" in content and "unsafe" not in content
    assert len(page.scripts) == 2
    assert not [a for _, a in page.tags if "style" in a or any(name.startswith("on") for name in a)]


def test_hostile_texts_are_text(page):
    for name in ("hacked=1", HOSTILE_NAME):
        assert not any(name in str(value) for tag, a in page.tags if tag in ("script", "img") for value in a.values())
    assert f"Report {' '.join(HOSTILE_NAME.split())}" in page.flat
    assert HOSTILE in page.data["pairs"][0]["prompt"] or any(HOSTILE in pair["prompt"] for pair in page.data["pairs"])
    assert [tag for tag, a in page.tags if tag == "img" and "onerror" in a] == []


def test_embedded_json_cannot_end_its_element():
    value = {"</script>": ["<!--", "\u2028\u2029&", float("nan"), np.float64(2.5), "\ud800"]}
    text = embed(value)
    assert not re.search(r"[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"</script>": ["<!--", "\u2028\u2029&", None, 2.5, "?"]}


def test_the_same_input_gives_the_same_page(folder, path, tmp_path):
    options = {"rewards": folder / "rewards", "pairs": folder / "pairs", "evaluations": [folder / "evaluations" / "base"]}
    pages = [report(output=tmp_path / name, **options).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_a_report_given_again_says_so_and_replaces_reports_alone(folder, tmp_path, capsys):
    options = {"output": tmp_path, "evaluations": [folder / "evaluations" / "base"]}
    (tmp_path / ".report.html.4194305.part").write_text("of a killed process: no pid is as high")
    path = report(**options)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"] and capsys.readouterr().err == ""
    before = path.stat().st_mtime_ns
    assert report(**options).stat().st_mtime_ns == before
    assert "report.html is complete already" in capsys.readouterr().err
    assert "Another" in report(**options, title="Another").read_text() and "it is replaced" in capsys.readouterr().err
    path.write_text("<p>My notes.</p>")
    with pytest.raises(UserError, match=r"report.html is there already and is no report of catpo"):
        report(**options)
    assert path.read_text() == "<p>My notes.</p>"


def test_the_report_reaches_no_torch():
    check = (
        "import sys, catpo.reporting.build, catpo.cli.inspect_pair as i; print({'torch', 'peft'} & set(sys.modules) or '[]')"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_sixty_pairs_stay_small(tmp_path):
    pairs = make_pairs(tmp_path / "pairs", 60)
    path = report(output=tmp_path / "r.html", rewards=make_store(tmp_path / "rewards", pairs), pairs=tmp_path / "pairs")
    assert path.stat().st_size < 2_000_000
    assert len(Page(path).data["pairs"]) == 60


# ---- what it shows ---------------------------------------------------------------------------------------------------


def test_the_page_holds_what_the_store_holds(folder, page):
    store = RewardStore.open(folder / "rewards")
    data = page.data
    assert [pair["id"] for pair in data["pairs"]] == store.pair_ids
    assert data["signals"] == SIGNALS and data["can_fuse"]
    for pair in data["pairs"]:
        weights = store.weights(pair["id"])
        assert pair["shared"] == weights.shared_count
        for side in ("chosen", "rejected"):
            row, shown = store.get(pair["id"], side), pair["sides"][side]
            assert shown["pieces"] == list(row.pieces) and shown["token_labels"] == row.labels.tolist()
            for name in SIGNALS:
                np.testing.assert_allclose(shown["signals"][name], row.signals[name], rtol=1e-6)
            assert shown["maps"]["grids"] == [list(GRID)]
        assert len(pair["images"]) == 1 and data["images"][pair["images"][0]].startswith("data:image/webp;base64,")


def test_auroc_and_net_coefficient_are_those_of_the_engines(folder, page):
    store = RewardStore.open(folder / "rewards")
    for row in signal_quality(store, Fusion()):
        assert f"{row.signal} {row.overall.value:.3f}" in page.flat
    net = np.mean([store.weights(pair_id).net_shared_coefficient for pair_id in store])
    assert f"net coefficient of shared-prefix tokens is {net:+.2f}" in page.flat.replace("−", "-")


def test_the_tables_hold_the_scores_and_their_differences(folder, page):
    scores = json.loads((folder / "evaluations" / "base" / "scores.json").read_text())
    for metric in ("chair_i", "cover"):
        value = scores["benchmarks"]["scenes"]["metrics"][metric]
        assert f"{value['value']:.1f} [{value['low']:.1f}, {value['high']:.1f}]" in page.flat
    assert "CHAIRi at equal coverage" in page.flat and "better" in page.flat


def test_changed_answers_are_shown_both_ways_with_their_pictures(folder, page):
    rows = {
        name: {row["id"]: row for row in read_rows(folder / "evaluations" / name / "grades.jsonl") if "mentions" in row}
        for name in ("base", "dpo")
    }
    is_wrong = {name: {key: row["counts"]["hallucinated"] > 0 for key, row in some.items()} for name, some in rows.items()}
    fixed = [key for key in is_wrong["base"] if is_wrong["base"][key] and not is_wrong["dpo"][key]]
    broken = [key for key in is_wrong["base"] if not is_wrong["base"][key] and is_wrong["dpo"][key]]
    assert fixed and f"dpo scenes captions {len(fixed)} {len(broken)}" in page.flat
    assert fixed[0] in page.flat
    items = [a for tag, a in page.tags if tag == "article" and a["data-model"] == "dpo"]
    assert len([a for a in items if a["data-way"] == "fixed"]) == min(12, len(fixed))
    assert any(tag == "img" and "data-image" in a for tag, a in page.tags)


def test_drawings_are_named_for_screen_readers(page):
    drawings = [a for tag, a in page.tags if tag == "svg"]
    assert len(drawings) > 8
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_nothing_given_is_a_page_of_notes(tmp_path):
    page = Page(report(output=tmp_path))
    for note in ("No pairs", "No evaluations", "No training runs"):
        assert note in page.flat


@pytest.mark.parametrize("part", ["pairs", "rewards", "runs", "evaluations"])
def test_each_part_alone_makes_a_page(folder, tmp_path, part):
    options = {
        "pairs": folder / "pairs",
        "rewards": folder / "rewards",
        "runs": [folder / "runs" / "dpo"],
        "evaluations": [folder / "evaluations" / "base"],
    }
    page = Page(report(output=tmp_path / "one.html", **{part: options[part]}))
    sections = {a["id"] for tag, a in page.tags if tag == "section"}
    expected = {"pairs": {"pairs"}, "rewards": {"pairs", "signals"}, "runs": {"training"}, "evaluations": {"evaluation"}}
    assert sections == {"overview"} | expected[part]


def test_a_store_without_maps_labels_or_the_papers_signals_makes_a_page(tmp_path):
    pairs = make_pairs(tmp_path / "pairs", 3)
    store = make_store(tmp_path / "rewards", pairs, signals=["patch_logit"], maps=False, labels=False)
    page = Page(report(output=tmp_path, rewards=store, pairs=tmp_path / "pairs"))
    for note in ("No weights", "No attention maps", "No AUROC"):
        assert note in page.flat
    fused = Page(report(output=tmp_path, rewards=store, fusion=Fusion(signals={"patch_logit": 1.0})))
    assert "No weights" not in fused.flat and fused.data["can_fuse"]


def test_absent_pairs_and_broken_pictures_are_noted(tmp_path):
    store = make_store(tmp_path / "rewards", make_pairs(tmp_path / "pairs", 3))
    make_pairs(tmp_path / "others", 2, hostile=True)
    assert "without picture" in Page(report(output=tmp_path, rewards=store, pairs=tmp_path / "others")).flat
    picture = sorted((tmp_path / "pairs" / "images").iterdir())[0]
    picture.write_bytes(b"not a picture")
    assert picture.name in Page(report(output=tmp_path, rewards=store, pairs=tmp_path / "pairs")).flat


def test_evaluations_on_other_items_are_shown_without_differences(folder, tmp_path):
    other = make_evaluation(tmp_path / "other", options="scenes(count=41)")
    page = Page(report(output=tmp_path, evaluations=[folder / "evaluations" / "base", other]))
    assert "equal coverage" not in page.flat


def test_max_pairs_takes_them_from_the_whole_store(folder, tmp_path):
    page = Page(report(output=tmp_path, rewards=folder / "rewards", max_pairs=2))
    ids = RewardStore.open(folder / "rewards").pair_ids
    assert [pair["id"] for pair in page.data["pairs"]] == [ids[0], ids[-1]]


def test_the_base_comes_first_by_folder_or_by_name(folder, tmp_path):
    folders = [folder / "evaluations" / name for name in ("base", "dpo")]
    for base in (folders[1], "dpo"):
        page = Page(report(output=tmp_path, evaluations=folders, base=base))
        assert "the difference to dpo" in page.flat


def test_a_folder_that_holds_nothing_is_named(tmp_path):
    for option in ("runs", "evaluations"):
        with pytest.raises(UserError, match=re.escape(str(tmp_path))):
            report(output=tmp_path, **{option: [tmp_path]})
    with pytest.raises(UserError, match="not a reward store"):
        report(output=tmp_path, rewards=tmp_path)


# ---- verdicts --------------------------------------------------------------------------------------------------------


def table(chair, cover, cut):
    """A table of base and one model; each argument is a difference with its interval."""

    def cells(metric, start, change):
        difference = Difference("b", metric, start, start + change[0], Estimate(*change), 100)
        return [Cell(Estimate(start, 0, 0), None), Cell(Estimate(start + change[0], 0, 0), difference)]

    coverage = [
        Coverage("base", "b", 60.0, 3.0, Estimate(20.0, 18, 22), True, None),
        Coverage("catpo", "b", 60.0, 3.0, Estimate(20.0 + cut[0], 0, 0), False, Estimate(*cut)),
    ]
    rows = [("CHAIRi", cells("chair_i", 24.1, chair)), ("Cover", cells("cover", 73.0, cover))]
    return BenchmarkTable("b", "b", 100, ["base", "catpo"], rows, [], coverage, None, None)


def test_a_clear_gain_that_lasts_at_equal_coverage_is_called_one():
    (sentence,) = evaluation_verdicts([table((-8.8, -10.9, -6.7), (-2.1, -3, -1), (-5, -7, -3))])
    assert sentence == (
        "catpo cut CHAIRi from 24.1 to 15.3 (difference −8.8, 95 % interval −10.9 to −6.7); lowered Cover from 73.0 to 70.9 "
        "(difference −2.1, 95 % interval −3.0 to −1.0). At equal coverage (60.0 %) its CHAIRi "
        "is 15.0 against 20.0 (difference −5.0, 95 % interval −7.0 to −3.0): the gain is not from saying less."
    )


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ([(-8.8, -10.9, -6.7), (-40, -45, -35), (-1, -3, 1)], "saying less may explain the gain."),
        ([(-0.8, -2.9, 1.3), (0.1, -1, 1), (-1, -3, 1)], "left CHAIRi about where it was, 24.1 and 23.3"),
    ],
)
def test_a_gain_that_is_unclear_or_gone_at_equal_coverage_is_not_called_one(differences, says):
    (sentence,) = evaluation_verdicts([table(*differences)])
    assert says in sentence
    assert "the gain is not from saying less" not in sentence


def test_the_lowest_model_at_equal_coverage_is_named_with_its_lead():
    compared = table((-8, -10, -6), (0, -1, 1), (-5, -7, -3))
    third = Coverage("dpo", "b", 60.0, 3.0, Estimate(14.0, 0, 0), True, Estimate(-6, -8, -4))
    tie, clear = (
        "dpo and catpo tie for the lowest CHAIRi of 3 models, 14.0 and 15.0 (difference −1.0",
        "dpo has the lowest CHAIRi",
    )
    for lead, said in ((Estimate(-1, -3, 1), tie), (Estimate(-1, -3, 0), tie), (Estimate(-1, -1.5, -0.5), clear)):
        best = dataclasses.replace(third, difference=lead)
        sentence = evaluation_verdicts(
            [dataclasses.replace(compared, coverage=[*compared.coverage, third], lead_of_best=best)]
        )[0]
        assert said in sentence
        assert ("comes next with 15.0 (difference −1.0" in sentence) == (said == clear)


def test_the_lead_of_the_best_is_its_difference_to_the_next(folder, page):
    loaded = [load_evaluation(folder / "evaluations" / name) for name in ("base", "dpo", HOSTILE_NAME)]
    values = {row.model: row.chair_i.value for row in at_equal_coverage(loaded)}
    best, following = sorted(values, key=values.__getitem__)[:2]
    assert f"{best} has the lowest CHAIRi of 3 models, {values[best]:.1f}; {following} comes next" in page.flat
    assert f"(difference −{values[following] - values[best]:.1f}, 95 % interval" in page.flat


# ---- maps and drawings -----------------------------------------------------------------------------------------------


def values_of(drawn, tokens):
    """[tokens, places] of a heatmap, as the page reads them."""
    levels = np.frombuffer(base64.b64decode(drawn.data), np.uint8).reshape(tokens, -1)
    return levels / 255 * np.array(drawn.peaks)[:, None]


def test_a_heatmap_keeps_each_tokens_map_to_one_part_in_255():
    maps = np.random.default_rng(0).random((3, 10)) * [[1], [0.01], [0]]
    drawn = heatmap(maps, [PatchGrid(0, 2, 3), PatchGrid(1, 2, 2)])
    assert (np.abs(values_of(drawn, 3) - maps) <= maps.max(1, keepdims=True) / 250).all()
    assert drawn.grids == [(2, 3), (2, 2)] and drawn.peaks[2] == 0


def test_pooled_maps_are_means_of_blocks_that_may_be_cut_off_at_the_edge():
    grid = np.arange(15, dtype=float).reshape(3, 5)
    drawn = heatmap(grid.reshape(1, 15), [PatchGrid(0, 3, 5)], pool=2)
    expected = [grid[row : row + 2, column : column + 2].mean() for row in (0, 2) for column in (0, 2, 4)]
    assert drawn.grids == [(2, 3)]
    np.testing.assert_allclose(values_of(drawn, 1)[0], expected, atol=0.05)


def test_a_map_of_another_size_than_its_grid_is_refused():
    with pytest.raises(ValueError, match="7 patches, the grids 6"):
        heatmap(np.zeros((1, 7)), [PatchGrid(0, 2, 3)])


TILINGS = {
    "an overview and three tiles": [PatchGrid(0, 2, 2), *(PatchGrid(0, 2, 2, (n / 3, 0, (n + 1) / 3, 1)) for n in range(3))],
    "the middle": [PatchGrid(0, 3, 3, (0.25, 0.1, 0.75, 0.9))],
    "one grid": [PatchGrid(0, 3, 5)],
    "sizes that do not divide": [PatchGrid(0, 3, 4), PatchGrid(0, 5, 7)],
}


@pytest.mark.parametrize("grids", TILINGS.values(), ids=TILINGS)
def test_the_map_of_a_picture_has_each_patchs_attention_where_the_patch_lies(grids):
    rng = np.random.default_rng(0)
    parts = [rng.random((2, grid.size)) for grid in grids]
    whole, (rows, columns) = compose(parts, grids), canvas(grids)
    expected = np.zeros((2, rows, columns))
    for part, grid in zip(parts, grids, strict=True):
        left, top, right, bottom = grid.box
        tall, wide = (bottom - top) / grid.rows, (right - left) / grid.columns
        for patch, (row, column) in product(range(grid.size), product(range(rows), range(columns))):
            y, x = top + patch // grid.columns * tall, left + patch % grid.columns * wide
            high = max(0.0, min(y + tall, (row + 1) / rows) - max(y, row / rows))
            broad = max(0.0, min(x + wide, (column + 1) / columns) - max(x, column / columns))
            expected[:, row, column] += part[:, patch] * (high * broad) / (tall * wide)
    np.testing.assert_allclose(whole, expected, atol=1e-12)
    np.testing.assert_allclose(whole.sum((1, 2)), sum(part.sum(1) for part in parts))  # no attention is lost


def test_drawings_need_no_style_and_repeat_exactly():
    def draw():
        lines = [Series([1, 2, 3], [0.5, float("nan"), 0.1], 0), Series([1, 2], [2, 3], 9), Series([1], [1], 3)]
        return curves(lines, x="step", y="loss", description='a "quoted" <name>', zero=True)

    drawing = draw()
    assert drawing == draw()
    assert "style" not in drawing and "<metadata" not in drawing and "#0" not in drawing
    assert 'aria-label="a &quot;quoted&quot; &lt;name&gt;"' in drawing
    assert "var(--series-0)" in drawing and "currentColor" in drawing
    assert histogram([[], [1.0, 1.0]], label="x", description="d") and histogram([], label="x", description="d")
