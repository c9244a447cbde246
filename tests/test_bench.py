"""What `make bench` makes of measurements; the measurements themselves are not tests."""

from __future__ import annotations

import argparse
import json

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'catpo[bench]'")

from bench import run as bench
from bench.shapes import SHAPES, llava, make_pairs, write_model

from catpo.models import loading

OPTIONS = argparse.Namespace(repeat=3, steps=2, clock="wall")


def result(seconds, memory=100.0, losses=(0.6931, 0.68)):
    times = {"seconds": [seconds] * 2, "waits": [seconds / 20]}
    return times | {"memory": memory, "losses": list(losses), "flops": 1e9, "token_passes": 9}


def test_cases_have_names_of_their_own_and_known_shapes():
    names = [case.name for case in bench.CASES]
    assert len(set(names)) == len(names)
    assert {case.shape for case in bench.CASES} <= set(SHAPES)


def test_a_ratio_is_of_medians_to_the_fastest_peer(monkeypatch):
    times = {bench.CATPO: iter([9.0, 2.0, 3.0]), "trl": iter([10.0] * 3), "trl-responses": iter([6.0] * 3)}
    monkeypatch.setattr(bench, "agreement", lambda case, call: 1e-7)
    monkeypatch.setattr(bench, "worker", lambda case, side, place: result(next(times[side.trainer])))
    time, memory = bench.run_case(bench.CASES[0], [], OPTIONS, speed=1e9)
    assert (time["ratio"], time["peer_is"], time["at_most"]) == (0.5, "trl-responses", 0.45)
    assert (time["lowest"], time["highest"]) == pytest.approx((1 / 3, 1.5))
    assert memory["measure"] == "memory" and memory["ratio"] == 1.0
    assert time["share_of_matmul_ours"] == pytest.approx(1 / 3)


def test_nothing_is_measured_when_the_losses_differ(monkeypatch):
    losses = {"dpo": (0.69, 0.68), "trl": (0.69, 0.60)}
    monkeypatch.setattr(bench, "worker", lambda case, side, place: result(1.0, losses=losses[side.trainer]))
    with pytest.raises(SystemExit, match=r"differ by 0\.08"):
        bench.run_case(bench.CASES[0], [], OPTIONS, speed=1e9)


def test_a_missed_limit_says_so():
    row = bench.row(bench.CASES[0], "time", [5.0], [10.0])
    assert "0.45 missed" in bench.cells(row)
    assert json.dumps(row)


def test_shapes_have_as_many_patches_as_their_names_say(tmp_path):
    shape = llava(4)
    write_model(shape, tmp_path)
    encoded = loading.load(tmp_path).encode(make_pairs(shape, 1)[0])
    assert len(encoded.patches) == shape.patches == 16
    assert 78 <= len(encoded.response_ids["chosen"]) <= 84
