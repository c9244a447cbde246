"""`catpo inspect`: coloured words, values under labels, and nothing a terminal or rich would act on."""

import dataclasses
import io

import pytest
from rich.console import Console

from catpo.cli.inspect_pair import inspect_pair
from catpo.core.errors import UserError
from catpo.core.types import pair_id
from catpo.rewards.fusion import Fusion
from catpo.rewards.store import RewardStore
from report_fixtures import make_pairs, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspection")
    return RewardStore.open(make_store(folder / "rewards", make_pairs(folder / "pairs", 3)))


def printed(renderable, *, colour=False):
    console = Console(file=io.StringIO(), width=200, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(renderable)
    return console.file.getvalue()


def test_both_responses_are_shown_with_labels_and_values(store):
    name = store.pair_ids[0]
    text = printed(inspect_pair(store, name))
    row = store.get(name, "rejected")
    for token in (row.labels == 0).nonzero()[0]:
        assert row.pieces[token].strip() in text
    assert "✗(" in text and "✓(" in text
    weights = store.weights(name)
    assert f"{weights.net_shared_coefficient:+.3f}" in text
    assert "chosen" in text and "rejected" in text


@pytest.mark.parametrize("signal", ["weight", "relevance", "logps", "semantic", "image_contrast"])
def test_words_can_be_coloured_by_anything_stored(store, signal):
    text = printed(inspect_pair(store, store.pair_ids[0], signal=signal), colour=True)
    assert "\x1b[" in text and signal in text


def test_the_colour_follows_the_value(store):
    name = store.pair_ids[0]
    plain = printed(inspect_pair(store, name, fusion=Fusion(alpha=0.0)), colour=True)
    assert plain != printed(inspect_pair(store, name, fusion=Fusion(alpha=1.0)), colour=True)
    assert plain == printed(inspect_pair(store, name, fusion=Fusion(alpha=0.0)), colour=True)


def test_the_beginning_of_an_id_is_enough(store):
    assert printed(inspect_pair(store.path, store.pair_ids[1][:8])) == printed(inspect_pair(store, store.pair_ids[1]))


def test_unknown_pairs_and_signals_are_answered_with_the_known(store):
    with pytest.raises(UserError, match=f"no pair 'zzz'.*{store.pair_ids[0]}"):
        inspect_pair(store, "zzz")
    with pytest.raises(UserError, match=r"3 pairs begin with|no pair ''"):
        inspect_pair(store, "")
    with pytest.raises(UserError, match="Did you mean 'semantic'"):
        inspect_pair(store, store.pair_ids[0], signal="semntic")


def test_escape_sequences_and_markup_of_a_text_do_nothing(tmp_path):
    pair = make_pairs(tmp_path / "pairs", 1)[0]
    hostile = pair.chosen + " [bold red]\x1b]0;owned\x07\x1b[2J[/nothing] :smile:"
    pair = dataclasses.replace(pair, chosen=hostile, id=pair_id(pair.images, pair.prompt, hostile, pair.rejected))
    text = printed(inspect_pair(make_store(tmp_path / "rewards", [pair]), pair.id))
    assert "\x1b" not in text and "\x07" not in text
    assert "[bold red]]0;owned[2J[/nothing] :smile:" in text
