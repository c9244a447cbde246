"""`catpo probe --search`: the table of a model's signals."""

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest

import training_runs
from catpo.cli.main import main
from catpo.core.errors import UserError
from catpo.core.types import Span
from catpo.data.pair_folder import write_pairs
from catpo.scoring import search
from tiny import llava, pairs


def labelled(count):
    """Pairs whose first words are labelled at random."""
    rng = np.random.default_rng(0)
    spans = lambda text: (Span(0, len(text.split()[0]), ("grounded", "hallucinated")[rng.integers(2)]),)
    made = pairs(count)
    return [replace(each, labels={side: spans(each.response(side)) for side in ("chosen", "rejected")}) for each in made]


def test_the_table_has_every_kind_of_signal_and_its_choice_is_made_on_other_pictures(tmp_path, monkeypatch, capsys):
    family = llava()
    monkeypatch.setattr(search.loading, "load", lambda model: family)
    write_pairs(tmp_path / "a b", labelled(12), {})
    options = [
        "--pairs",
        str(tmp_path / "a b"),
        "--model",
        "tiny",
        "--nouns",
        "builtin",
        "--output",
        str(tmp_path / "t.json"),
    ]
    main(["probe", "--search", *options])
    best, _, command = capsys.readouterr().out.partition("Best: ")[2].partition(". Score with it: ")
    given = ["--pairs", str(tmp_path / "a b"), "--model", "tiny", "--output", "rewards", "--signals", best]
    assert shlex.split(command) == ["catpo", "score", *given]
    rows = json.loads((tmp_path / "t.json").read_text())["signals"]
    assert [row["auroc"] for row in rows] == sorted((row["auroc"] for row in rows), reverse=True)
    groups = {row["chosen_from"] for row in rows}
    assert groups == {"", search.LENS, search.LAYERS, search.HEADS} and len(rows) == 7 + 3


def test_the_best_of_a_group_is_chosen_on_one_half_and_judged_on_the_other():
    rng = np.random.default_rng(1)
    count = 400
    is_judged = np.random.default_rng(0).permutation(count) % 2 == 1
    grounded = rng.integers(0, 2, count)
    honest, lucky = grounded + rng.normal(0, 1, count), np.where(is_judged, -grounded, grounded).astype(float)
    words = search._Words(
        [f"{number:04}" for number in range(count)],
        [*map(bool, grounded)],
        [*np.stack([honest, lucky, honest], 1).astype(np.float32)],
    )
    signals = ["head_attention(layer=0, head=0)", "head_attention(layer=0, head=1)", "log_prob"]
    by_group = {row.chosen_from: row for row in search._judged(signals, words)}
    assert by_group[search.HEADS].signal == signals[1] and by_group[search.HEADS].auroc == 0.0
    assert 0.6 < by_group[""].auroc < 0.95


def test_pairs_without_known_words_and_mixed_options_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(search.loading, "load", lambda model: llava())
    write_pairs(tmp_path / "pairs", [replace(pair, chosen="so it is", rejected="it is so") for pair in pairs(2)], {})
    with pytest.raises(UserError, match="No word of these pairs is known"):
        search.search(tmp_path / "pairs", "tiny", nouns="builtin", progress=False)
    from catpo.cli.probe import probe

    for options in ({"search": True}, {"pairs": "p"}, {"search": True, "pairs": "p", "model": "m", "features": ("a",)}):
        with pytest.raises(UserError, match="--search"):
            probe(None, **options)


def test_training_without_a_store_scores_what_its_fusion_reads(tmp_path):
    objective = "catpo(signals={'log_prob': 1.0, 'patch_lens(layer=0)': 1.0}, normalise='zscore', activation='sigmoid')"
    made = training_runs.trainer(llava(), tmp_path, pairs(4), objective=objective, max_steps=1)
    assert {"log_prob", "patch_lens(layer=0)"} <= {*made.rewards.signals}
