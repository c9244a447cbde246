"""What a store keeps of the reference, and how training uses it: exact, approximate, not at all, or run beside the policy."""

from __future__ import annotations

import numpy as np
import pytest

from catpo.core.errors import UserError
from catpo.core.types import SIDES, PatchGrid
from catpo.models import loading
from catpo.rewards.shards import ResponseRow, to_parquet
from catpo.rewards.store import RewardStore
from catpo.scoring import score
from catpo.scoring.reference_cache import token_bytes
from catpo.scoring.score import score_pairs
from tiny import pairs
from training_runs import curve, trainer

PAIRS = pairs(4)


@pytest.fixture(scope="module")
def stores(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("caches")
    family = loading.load(folder)
    words = len(family.head.weight)
    caches = {"hidden": "hidden", "few": "topk(k=4)", "many": "topk(k=64)", "all": f"topk(k={words - 1})", "logps": "logps"}
    for name, cache in caches.items():
        score_pairs(PAIRS, family, path / name, cache=cache, attention_maps=False, progress=False)
    return path


def curves(folder, store, output, **options):
    given = dict(objective="catpo(kl_weight=0.5)", rewards=str(store), max_steps=4, per_device_train_batch_size=4, **options)
    run = trainer(folder, output, PAIRS, **given)
    run.train()
    return {name: curve(run, name) for name in ("loss", "kl/chosen")}


def test_training_with_top_k_tokens_approaches_the_exact_kl(folder, stores, tmp_path):
    exact = curves(folder, stores / "hidden", tmp_path / "run")
    everything = curves(folder, stores / "all", tmp_path / "run")
    assert everything["loss"] == pytest.approx(exact["loss"], abs=1e-4)
    assert everything["kl/chosen"] == pytest.approx(exact["kl/chosen"], abs=1e-3)
    missed = {}
    for name in ("few", "many"):
        kl = curves(folder, stores / name, tmp_path / "run")["kl/chosen"]
        assert kl[0] == pytest.approx(0, abs=1e-5)
        missed[name] = 1 - kl[1] / exact["kl/chosen"][1]  # after one step, where the policies are still the same
    assert missed["few"] > missed["many"] > 0


def test_a_store_of_top_k_tokens_is_as_large_as_documented(stores):
    store = RewardStore.open(stores / "many")
    assert store.has_top and not store.has_hidden and store.provenance["topk"] == 64
    tokens = sum(len(store.get(pair, side).token_ids) for pair in store for side in ("chosen", "rejected"))
    written = sum(file.stat().st_size for file in (stores / "many" / "shards").glob("*.safetensors"))
    assert written == pytest.approx(tokens * (64 * 4 + 65 * 4), rel=0.05)
    ids, logps = store.top(PAIRS[0].id, "chosen")
    row = store.get(PAIRS[0].id, "chosen")
    assert ids.shape == (len(row.token_ids), 64) and logps.shape == (len(row.token_ids), 65)
    for token, own, kept, values in zip(row.token_ids, row.logps, ids, logps, strict=True):
        at = np.flatnonzero(kept == token)
        assert not len(at) or values[at[0]] == pytest.approx(own, abs=1e-5)


def test_a_token_takes_as_many_bytes_as_documented(tmp_path):
    """Numbers that do not compress, in shards of the usual size."""
    rng = np.random.default_rng(0)
    words = [f" word{number}" for number in range(2000)]

    def response(number, side):
        ids = rng.integers(0, len(words), 80)
        signals = {name: rng.random(80, np.float32) for name in ("one", "two", "three")}
        return ResponseRow(
            pair_id=f"pair-{number}", side=side, token_ids=ids, logps=-rng.random(80, np.float32), signals=signals,
            labels=np.full(80, -1, np.int8), pieces=[words[token] for token in ids], is_special=np.arange(80) == 79,
            grids=[PatchGrid(0, 24, 24, (0.0, 0.0, 1.0, 1.0))],
        )  # fmt: skip

    rows = [response(number, side) for number in range(64) for side in SIDES]
    written = len(to_parquet(rows, ["one", "two", "three"]))
    assert written / (len(rows) * 80) == pytest.approx(token_bytes(3), rel=0.1)


@pytest.mark.parametrize("cache, part", [("hidden", "hidden states"), ("topk(k=64)", "top tokens"), ("logps", "signals")])
def test_the_size_is_printed_before_anything_is_written(folder, tmp_path, capsys, monkeypatch, cache, part):
    def written(*_, **__):
        printed = capsys.readouterr().err
        assert f"catpo: {tmp_path / 'store'} will take about" in printed and part in printed and "attention maps" in printed
        assert not (tmp_path / "store" / "store.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(score.RewardWriter, "create_or_resume", written)
    with pytest.raises(KeyboardInterrupt):
        score_pairs(PAIRS, loading.load(folder), tmp_path / "store", cache=cache)


def test_a_store_of_log_probs_serves_an_online_kl_but_no_cached_one(folder, stores, tmp_path):
    with pytest.raises(UserError, match="holds no hidden states"):
        curves(folder, stores / "logps", tmp_path / "run")
    online = curves(folder, stores / "logps", tmp_path / "run", reference="online")
    assert online["loss"] == pytest.approx(curves(folder, stores / "hidden", tmp_path / "run")["loss"], abs=1e-4)
    with pytest.raises(UserError, match="holds no most likely tokens"):
        RewardStore.open(stores / "logps").top(PAIRS[0].id, "chosen")


@pytest.mark.parametrize("cache, message", [
    ("logits", "cache='logits' is not known"), ("topk(k=0)", "k must be 1 or more"), ("topk(n=4)", "'n'"),
    ("hidden(k=4)", "'k'"), ("topk(k=1000000)", "the model has"),
])  # fmt: skip
def test_an_unknown_cache_is_refused(folder, tmp_path, cache, message):
    with pytest.raises(UserError, match=message):
        score_pairs(PAIRS[:1], loading.load(folder), tmp_path / "store", cache=cache, progress=False)


def test_a_store_is_not_continued_with_another_cache(folder, stores):
    with pytest.raises(UserError, match="hidden is True, now False"):
        score_pairs(PAIRS, loading.load(folder), stores / "hidden", cache="topk(k=4)", attention_maps=False, progress=False)
