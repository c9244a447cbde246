"""`catpo probe --search`: the table of a model's signals."""

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest

import training_runs
from catpo.cli.main import main
from catpo.cli.tables import search_table
from catpo.core.errors import UserError
from catpo.core.types import Span
from catpo.data.pair_folder import write_pairs
from catpo.rewards.words import digest_of
from catpo.scoring import search
from catpo.scoring.claims import Asker
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
    (tmp_path / "forms.json").write_text(json.dumps({"a": "cat", "the": "cat", "two": "cat"}))  # and not "there"
    options = [
        "--pairs",
        str(tmp_path / "a b"),
        "--model",
        "tiny",
        "--nouns",
        str(tmp_path / "forms.json"),
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
    counts = {row["signal"].split("(")[0]: row["grounded"] + row["hallucinated"] for row in rows}
    assert 0 < counts["self_question"] < counts["log_prob"] == counts["head_attention"]


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


def test_a_signal_is_judged_by_the_words_of_which_it_says_something(capsys):
    rng = np.random.default_rng(2)
    grounded = rng.integers(0, 2, 200)
    asked = np.where(np.arange(200) % 4 == 0, grounded.astype(float), np.nan)
    values = np.stack([asked, np.full(200, np.nan), rng.normal(size=200)], 1).astype(np.float32)
    words = search._Words([f"{number:03}" for number in range(200)], [*map(bool, grounded)], [*values])
    best, other = search._judged(["self_question", "self_question(nouns='a.json')", "log_prob"], words)
    assert (best.signal, best.auroc) == ("self_question", 1.0) and 15 < best.grounded + best.hallucinated < 35
    assert (other.signal, other.grounded + other.hallucinated) == ("log_prob", 100)
    assert "self_question(nouns='a.json') asks about 0 of the 100 words" in capsys.readouterr().err
    shown = [*search_table([best, other]).columns[0].cells]
    assert shown == [f"self_question ({best.grounded + best.hallucinated} of 100 words)", "log_prob"]


def test_words_are_those_that_the_asker_finds_and_the_truth_knows(tmp_path):
    (tmp_path / "forms.json").write_text(json.dumps({"pup": "dog", "zebra": "zebra", "fence": "fence", "cat": "feline"}))
    text = "A pup and a zebra by a fence, a cat and a dog."
    pair = replace(pairs(1)[0], chosen=text)
    truth = search._Truth({digest_of(pair.images): {"hound", "feline"}}, {"pup": "hound", "zebra": "zebra", "dog": "hound"})
    labels = search._labels(pair, "chosen", Asker.of(str(tmp_path / "forms.json"), ("objects",), {}), truth)
    assert [(text[start:end], is_there) for start, end, is_there in labels] == [("pup", True), ("zebra", False), ("cat", True)]


def test_pairs_without_known_words_and_mixed_options_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(search.loading, "load", lambda model: llava())
    write_pairs(tmp_path / "pairs", [replace(pair, chosen="so it is", rejected="it is so") for pair in pairs(2)], {})
    with pytest.raises(UserError, match="No word of these pairs is known"):
        search.search(tmp_path / "pairs", "tiny", nouns="builtin", progress=False)
    from catpo.cli.probe import probe

    for options in ({"search": True}, {"pairs": "p"}, {"search": True, "pairs": "p", "model": "m", "features": ("a",)}):
        with pytest.raises(UserError, match="--search"):
            probe(None, **options)
    for options in ({"nouns": "textblob"}, {"limit": 2}):
        with pytest.raises(UserError, match="--nouns and --limit are for --search"):
            probe(tmp_path, output=tmp_path / "p.json", **options)


def test_training_without_a_store_scores_what_its_fusion_reads(tmp_path):
    objective = "catpo(signals={'log_prob': 1.0, 'patch_lens(layer=0)': 1.0}, normalise='zscore', activation='sigmoid')"
    made = training_runs.trainer(llava(), tmp_path, pairs(4), objective=objective, max_steps=1)
    assert {"log_prob", "patch_lens(layer=0)"} <= {*made.rewards.signals}
