"""Evaluations side by side: differences and equal coverage against slow loops written from their definitions."""

import json
import shutil

import numpy as np
import pytest

from catpo.core.errors import UserError
from catpo.core.intervals import bootstrap_indices, interval
from catpo.evaluation.bootstrap import resample
from catpo.evaluation.coverage import at_cover_over_runs, at_equal_coverage, at_equal_coverage_over_runs, coverage_curves
from catpo.evaluation.folder import load_evaluation
from catpo.evaluation.paired import paired_differences
from catpo.files.json_files import append_rows, read_rows
from report_fixtures import make_evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluations")


@pytest.fixture(scope="module")
def base(folder):
    return load_evaluation(make_evaluation(folder / "base", wrong=0.4, said=5))


@pytest.fixture(scope="module")
def better(folder):
    return load_evaluation(make_evaluation(folder / "better", wrong=0.1, said=3, seed=1))


def captions(evaluation):
    return [row for row in evaluation.grades["scenes"].values() if "mentions" in row]


def chair_by_loops(rows):
    named = [label for row in rows for _, label in row["mentions"]]
    return 100 * named.count("hallucinated") / len(named)


def test_a_difference_is_that_of_the_scores(base, better):
    found = {row.metric: row for row in paired_differences(base, better)}
    for metric, row in found.items():
        before, after = base.metrics("scenes")[metric], better.metrics("scenes")[metric]
        assert row.base == pytest.approx(before.value) and row.other == pytest.approx(after.value)
        assert row.difference.value == pytest.approx(after.value - before.value)
    assert set(found) == set(base.metrics("scenes"))
    assert found["chair_i"].is_clear and found["chair_i"].difference.high < 0


def test_the_interval_of_a_difference_draws_the_same_pictures_for_both(base, better):
    found = next(row for row in paired_differences(base, better, resamples=200, seed=3) if row.metric == "chair_i")
    before, after = captions(base), captions(better)
    draws = bootstrap_indices(len(before), resamples=200, seed=3)
    expected = [chair_by_loops([after[i] for i in draw]) - chair_by_loops([before[i] for i in draw]) for draw in draws]
    assert (found.difference.low, found.difference.high) == pytest.approx(interval(expected))


def test_the_same_model_twice_differs_by_nothing(base):
    assert all(row.difference == (0, 0, 0) and not row.is_clear for row in paired_differences(base, base))


def test_swapping_the_models_turns_the_signs(base, better):
    there = {row.metric: row.difference for row in paired_differences(base, better)}
    for row in paired_differences(better, base):
        low, high = -there[row.metric].high, -there[row.metric].low
        assert row.difference == pytest.approx((-there[row.metric].value, low, high))


def test_questions_of_one_picture_are_drawn_together():
    row = {"group": "g", "picture": "p", "counts": {"right": 1}}
    rows = [row, row, {**row, "picture": "q", "counts": {"right": 5}}]
    values = resample(lambda sums: sums["g"], rows, resamples=50)["right"]
    assert values[0] == 7
    assert set(values[1:]) == {4.0, 7.0, 10.0}  # p p, p q, q q


def test_benchmarks_with_other_options_are_not_compared(base, folder):
    other = load_evaluation(make_evaluation(folder / "others", options="scenes(count=41)"))
    assert paired_differences(base, other) == []
    assert at_equal_coverage([base, other]) == []


def test_items_that_one_model_lacks_are_left_out(base, folder, better):
    part = folder / "part"
    shutil.copytree(better.path, part)
    rows = read_rows(part / "grades.jsonl")
    (part / "grades.jsonl").unlink()
    append_rows(part / "grades.jsonl", rows[::2])
    found = paired_differences(base, load_evaluation(part))
    assert found[0].item_count == len(rows[::2])


# ---- equal coverage --------------------------------------------------------------------------------------------------


def coverage_by_loops(evaluations, target=None):
    """Captions cut at a common number of grounded objects, by counting; counts between two cuts are mixed."""
    if target is None:
        target = min(sum(label == "grounded" for row in captions(e) for _, label in row["mentions"]) for e in evaluations)
    found = []
    for evaluation in evaluations:
        cuts = []
        for k in range(max(len(row["mentions"]) for row in captions(evaluation)) + 1):
            kept = [label for row in captions(evaluation) for _, label in row["mentions"][:k]]
            cuts.append((kept.count("grounded"), kept.count("hallucinated")))
        k = max(k for k, (grounded, _) in enumerate(cuts) if grounded <= target)
        grounded, wrong = cuts[k]
        if grounded < target:
            share = (target - grounded) / (cuts[k + 1][0] - grounded)
            wrong += share * (cuts[k + 1][1] - wrong)
        found.append(100 * wrong / (wrong + target))
    return found


def test_equal_coverage_is_what_counting_says(base, better, folder):
    third = load_evaluation(make_evaluation(folder / "third", wrong=0.25, said=4, seed=2))
    rows = at_equal_coverage([base, better, third])
    assert [row.chair_i.value for row in rows] == pytest.approx(coverage_by_loops([base, better, third]))
    assert [row.model for row in rows] == ["base", "better", "third"]
    assert rows[0].difference is None
    assert rows[1].difference.value == pytest.approx(rows[1].chair_i.value - rows[0].chair_i.value)
    assert all(row.chair_i.low <= row.chair_i.value <= row.chair_i.high for row in rows)
    covers = [each.metrics("scenes")["cover"].value for each in (base, better, third)]
    assert rows[0].cover == pytest.approx(min(covers))


def test_a_model_that_only_says_less_gains_nothing_at_equal_coverage(base, folder):
    """Every caption of the base cut after two objects: lower CHAIRi may come of it, but no difference at equal coverage."""
    short = folder / "short"
    shutil.copytree(base.path, short)
    rows = [{**row, "mentions": row["mentions"][:2]} if "mentions" in row else row for row in read_rows(short / "grades.jsonl")]
    (short / "grades.jsonl").unlink()
    append_rows(short / "grades.jsonl", rows)
    row = at_equal_coverage([base, load_evaluation(short)])[1]
    assert row.difference == pytest.approx((0, 0, 0), abs=1e-9)
    assert row.objects == pytest.approx(2)


def test_equal_coverage_over_runs_is_the_mean_of_the_runs(base, better, folder):
    again = [
        load_evaluation(make_evaluation(folder / "again" / name, wrong=wrong, said=4, seed=seed))
        for name, wrong, seed in (("base", 0.45, 7), ("better", 0.2, 8))
    ]
    runs = [[base, better], again]
    rows, single = at_equal_coverage_over_runs(runs), [at_equal_coverage(run) for run in runs]
    for index, row in enumerate(rows):
        assert row.chair_i.value == pytest.approx(np.mean([run[index].chair_i.value for run in single]))
        assert row.cover == pytest.approx(np.mean([run[index].cover for run in single]))
    both = rows[1].difference
    assert both.value == pytest.approx(np.mean([run[1].difference.value for run in single]))
    assert both.high - both.low < max(run[1].difference.high - run[1].difference.low for run in single)


def test_the_interval_over_runs_draws_the_same_pictures_in_each(base, better):
    """The same run twice says as much as once."""
    twice, once = at_equal_coverage_over_runs([[base, better]] * 2), at_equal_coverage([base, better])
    assert [row.chair_i for row in twice] == [pytest.approx(row.chair_i) for row in once]
    assert twice[1].difference == pytest.approx(once[1].difference)


def test_chair_at_a_given_cover_is_what_counting_says(base, better):
    present = sum(row["counts"]["present"] for row in captions(base))
    cover = better.metrics("scenes")["cover"].value / 2
    rows = at_cover_over_runs([[base, better]] * 2, cover)
    expected = coverage_by_loops([base, better], target=present * cover / 100)
    assert [row.chair_i for row in rows] == [pytest.approx([value] * 2) for value in expected]
    assert rows[0].ratio is None and rows[1].ratio.value == pytest.approx(expected[1] / expected[0])
    assert rows[1].ratio.low < rows[1].ratio.value < rows[1].ratio.high
    smallest = min(each.metrics("scenes")["cover"].value for each in (base, better))
    at_smallest = at_cover_over_runs([[base, better]], smallest - 1e-9)
    equal = at_equal_coverage([base, better])
    assert [row.chair_i[0] for row in at_smallest] == pytest.approx([row.chair_i.value for row in equal])


def test_a_model_that_covers_less_has_no_chair_at_that_cover(base, better):
    cover = (base.metrics("scenes")["cover"].value + better.metrics("scenes")["cover"].value) / 2
    rows = {row.model: row for row in at_cover_over_runs([[base, better]], cover)}
    less = min((base, better), key=lambda each: each.metrics("scenes")["cover"].value)
    assert np.isnan(rows[less.name].chair_i[0]) and rows["better"].ratio is None


def test_coverage_curves_end_at_the_scores(base, better):
    for evaluation in (base, better):
        cover, chair_i = coverage_curves([base, better], "scenes")[evaluation.name]
        assert cover[-1] == pytest.approx(evaluation.metrics("scenes")["cover"].value)
        assert chair_i[-1] == pytest.approx(evaluation.metrics("scenes")["chair_i"].value)
        assert (np.diff(cover) >= 0).all()


# ---- files -----------------------------------------------------------------------------------------------------------


def test_an_unfinished_evaluation_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no scores\.json.*catpo evaluate"):
        load_evaluation(tmp_path)


def test_a_row_that_is_no_grade_is_named(tmp_path, base):
    shutil.copytree(base.path, tmp_path / "e")
    rows = read_rows(tmp_path / "e" / "grades.jsonl")
    del rows[2]["counts"]
    (tmp_path / "e" / "grades.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"grades\.jsonl:3"):
        load_evaluation(tmp_path / "e")
