"""Reward quality: AUROC of signals and of T on labelled tokens, with intervals over pairs."""

import math

import numpy as np
import pytest

from catpo.core.errors import UserError
from catpo.core.intervals import auroc
from catpo.core.types import SIDES, PatchGrid
from catpo.rewards.fusion import Fusion
from catpo.rewards.quality import FINAL, signal_quality
from catpo.rewards.store import ResponseRow, RewardStore
from catpo.rewards.writer import RewardWriter

SIGNALS = ["global_attention", "patch_entropy", "semantic", "good", "noise"]


def store_of(path, pair_count=40, *, labelled=True, signals=SIGNALS):
    """Pairs whose signal `good` is high on grounded tokens; only rejected responses hallucinate."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(pair_count):
        for side in SIDES:
            labels = rng.choice([-1, 1] if side == "chosen" else [-1, 0, 1], 9).astype(np.int8)
            drawn = {name: rng.random(10).astype(np.float32) for name in SIGNALS}
            drawn["good"][:9] += labels == 1
            rows.append(
                ResponseRow(
                    pair_id=f"p{number}",
                    side=side,
                    token_ids=np.append(rng.integers(3, 9, 9), 2),
                    logps=np.zeros(10, np.float32),
                    signals={name: drawn[name] for name in signals},
                    labels=np.append(labels, -1).astype(np.int8) if labelled else np.full(10, -1, np.int8),
                    pieces=["x"] * 10,
                    is_special=np.arange(10) == 9,
                    grids=[PatchGrid(0, 1, 2)],
                )
            )
    writer = RewardWriter.create_or_resume(path, {"signals": signals}, [f"p{n}" for n in range(pair_count)], shard_size=100)
    writer.write_shard(0, rows)
    writer.finish()
    return RewardStore.open(path), rows


def test_each_signal_has_the_auroc_of_its_labelled_tokens(tmp_path):
    store, rows = store_of(tmp_path)
    table = {quality.signal: quality for quality in signal_quality(store, resamples=50)}
    assert list(table) == [*SIGNALS, FINAL]
    for name in SIGNALS:
        for part, sides in (("overall", SIDES), ("rejected", ("rejected",))):
            chosen_rows = [row for row in rows if row.side in sides]
            labels = np.concatenate([row.labels for row in chosen_rows])
            scores = np.concatenate([row.signals[name] for row in chosen_rows])
            separation = getattr(table[name], part)
            assert separation.value == pytest.approx(auroc(scores[labels >= 0], labels[labels >= 0]))
            assert separation.grounded_count == (labels == 1).sum()
            assert separation.hallucinated_count == (labels == 0).sum()
            assert separation.low <= separation.value <= separation.high
    assert table["good"].overall.value == 1.0
    assert abs(table["noise"].overall.value - 0.5) < 0.1


def test_a_large_store_is_measured_on_some_of_its_pairs(tmp_path, monkeypatch):
    store, rows = store_of(tmp_path)
    monkeypatch.setattr("catpo.rewards.quality.MEASURED_PAIRS", 4)
    some = {"p0", "p13", "p26", "p39"}
    labels = np.concatenate([row.labels for row in rows if row.pair_id in some])
    separation = signal_quality(store, resamples=5)[0].overall
    assert (separation.grounded_count, separation.hallucinated_count) == ((labels == 1).sum(), (labels == 0).sum())


def test_the_last_row_is_t_of_the_fusion(tmp_path):
    store, rows = store_of(tmp_path)
    fusion = Fusion(signals={"good": 1.0, "noise": 0.3}, scope="pair")
    final = signal_quality(store, fusion, resamples=20)[-1]
    scores = np.concatenate([getattr(store.weights(row.pair_id, fusion), f"{row.side}_relevance") for row in rows])
    labels = np.concatenate([row.labels for row in rows])
    assert final.signal == FINAL
    assert final.overall.value == pytest.approx(auroc(scores[labels >= 0], labels[labels >= 0]))


def test_without_tokens_of_both_kinds_there_is_no_auroc(tmp_path):
    for quality in signal_quality(store_of(tmp_path / "labelled")[0], resamples=10):
        assert quality.chosen.hallucinated_count == 0  # only rejected responses hallucinate
        assert math.isnan(quality.chosen.value)
    for quality in signal_quality(store_of(tmp_path / "plain", labelled=False, pair_count=3)[0]):
        assert math.isnan(quality.overall.value)
        assert quality.overall.grounded_count == quality.overall.hallucinated_count == 0


def test_without_the_papers_signals_there_is_no_row_of_t(tmp_path):
    store, _ = store_of(tmp_path, signals=["good"], pair_count=3)
    assert [quality.signal for quality in signal_quality(store, resamples=5)] == ["good"]
    with pytest.raises(UserError, match="'global_attention' was not scored"):
        signal_quality(store, Fusion(), resamples=5)


def test_the_same_seed_gives_the_same_intervals(tmp_path):
    store, _ = store_of(tmp_path)
    first, again, other = (signal_quality(store, resamples=50, seed=seed)[4].overall for seed in (1, 1, 2))
    assert first == again
    assert first != other
