"""`bench.predicted` on the tiny model: what it prints of memory and disk. Times and bytes sent are measured by running it."""

from __future__ import annotations

import pytest
from bench import predicted

from tiny import pairs


@pytest.fixture
def place(folder, store, tmp_path):
    return predicted.Place(model=folder, pairs=pairs(8), pairs_file=tmp_path / "pairs", rewards=store).prepared()


def test_each_of_two_processes_holds_what_the_plan_says(place, tmp_path):
    rows = predicted.memory(tmp_path, place)
    assert [row.case.split(",")[0] for row in rows] == ["weights", "gradients", "optimiser"]
    assert all(row.predicted == pytest.approx(row.measured, rel=0.02) for row in rows)


def test_files_are_as_large_as_the_plan_says(place, tmp_path):
    """But for names and shapes, which the tiny model's few numbers stand beside."""
    rows = {(row.term, row.case): row for row in predicted.disk(tmp_path, place)}
    for cache in ("hidden", "topk(k=8)"):
        row = rows["store, reference and maps", cache]
        assert 0 < row.measured - row.predicted < 0.01
    assert 0 < rows["checkpoint", "full"].measured - rows["checkpoint", "full"].predicted < 0.1


def test_a_table_tells_the_error_of_each_prediction():
    row = predicted.Row("time per pair", "score", predicted=1.1, measured=1.0, unit="s")
    assert predicted.table([row]).splitlines()[-1] == "| time per pair | score | 1.1 s | 1 s | +10.0 % |"
