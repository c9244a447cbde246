"""Scoring end to end on a tiny model: the numbers against a plain eager pass, resuming, and what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from catpo.core.errors import UserError
from catpo.core.spec import parse
from catpo.core.types import SIDES, Picture, Span
from catpo.files.lock import lock
from catpo.models.views import OtherPictures
from catpo.rewards.store import RewardStore
from catpo.rewards.writer import RewardWriter
from catpo.scoring.forward import token_labels
from catpo.scoring.score import score_pairs
from catpo.scoring.settings import PAPER_SIGNALS, ScoreSettings
from tiny import llava, pairs, picture

ONE_HEAD, ONE_LAYER = "head_attention(layer=1, head=1)", "head_attention(layer=0)"
LENS, OWN_LENS = "patch_lens(layer=0)", "patch_lens(layer=0, token='own')"
ALL = (
    *(*PAPER_SIGNALS, "image_contrast", "patch_logit", "semantic(embedding='hidden', layer=1)"),
    *("log_prob", "entropy", ONE_HEAD, ONE_LAYER, LENS, OWN_LENS),
)


def settings(signals=ALL, layers="all", heads="mean", query="token", patches="all"):
    return ScoreSettings(tuple(parse(signal) for signal in signals), layers, heads, query, patches)


@pytest.fixture(scope="module")
def family():
    return llava()


def whole_pass(family, encoded, side):
    """Eager attention, embeddings, hidden states and log-probs of prompt and one response, by a plain forward."""
    ids = torch.tensor([encoded.prompt_ids + encoded.response_ids[side]])
    model = family.unwrapped
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=ids, **encoded.pixels, output_attentions=True, output_hidden_states=True)
        features = model.get_image_features(encoded.pixels["pixel_values"]).pooler_output[0]
        embeddings = model.get_input_embeddings()(ids)[0]
    model.set_attn_implementation("sdpa")
    start = len(encoded.prompt_ids)
    logps = out.logits[0].log_softmax(-1)[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]
    hidden = [h[0] for h in out.hidden_states]
    return torch.stack(out.attentions)[:, 0], embeddings[start:], features, hidden, logps, start, out.logits[0]


def first_tokens(family, ids):
    """Of each token the first one of its word: here every token is a word, but for white space before one."""
    pieces = family.pieces(ids[:-1])
    return [*(token + (not piece.strip()) for token, piece in enumerate(pieces)), len(pieces)]


@pytest.mark.parametrize("query", ["token", "predictor"])
def test_every_stored_number_equals_the_plain_eager_pass(family, tmp_path, query):
    data = pairs(3)
    store = score_pairs(data, family, tmp_path / "store", settings(query=query), batch_size=2, progress=False)
    for pair in data:
        encoded = family.encode(pair)
        other = family.encode(replace(pair, images=OtherPictures(data).of(pair)))
        for side in SIDES:
            attentions, tokens, features, hidden, logps, start, logits = whole_pass(family, encoded, side)
            count = len(encoded.response_ids[side])
            rows = slice(start, start + count) if query == "token" else slice(start - 1, start + count - 1)
            attention = attentions.mean((0, 1))[rows][:, encoded.patches].double()
            share = attention / attention.sum(-1, keepdim=True)
            entropy = -(share * (share + 1e-12).log()).sum(-1)
            visual = share.float() @ features
            deep_visual = share.float() @ hidden[2][encoded.patches]
            head = family.unwrapped.lm_head.weight.detach()
            probabilities = logits[start - 1 : -1].softmax(-1)
            early = (family.decoder.norm(hidden[1][encoded.patches]) @ head.T).softmax(-1)
            lens = early[:, encoded.response_ids[side]].amax(0).detach()
            masses = attentions[:, :, rows][..., encoded.patches].sum(-1)
            patch_words = (hidden[-1][encoded.patches] @ head.T).softmax(-1)[:, encoded.response_ids[side]]
            expected = {
                "global_attention": attention.sum(-1),
                "patch_entropy": 1 - entropy / math.log(16),
                "semantic": torch.cosine_similarity(tokens, visual),
                "image_contrast": logps - whole_pass(family, other, side)[4],
                "log_prob": logps,
                "entropy": (probabilities * probabilities.log()).sum(-1),
                ONE_HEAD: masses[1, 1],
                ONE_LAYER: masses[0].mean(0),
                OWN_LENS: lens,
                LENS: lens[first_tokens(family, encoded.response_ids[side])],
                "patch_logit": patch_words.amax(0),
                "semantic(embedding='hidden', layer=1)": torch.cosine_similarity(hidden[2][start : start + count], deep_visual),
            }
            stored = store.get(pair.id, side)
            assert list(stored.token_ids) == encoded.response_ids[side]
            np.testing.assert_allclose(stored.logps, logps, atol=1e-5)
            for name, values in expected.items():
                np.testing.assert_allclose(stored.signals[name], values, atol=1e-4, err_msg=name)  # sharp attention
            np.testing.assert_allclose(store.maps(pair.id, side), attention, atol=1e-3)
            np.testing.assert_allclose(store.hidden(pair.id, side), hidden[-1][start - 1 : start + count - 1], atol=1e-4)


def test_the_store_does_not_depend_on_batch_size_beyond_float_error(family, tmp_path):
    data = pairs(4)
    one = score_pairs(data, family, tmp_path / "one", settings(), batch_size=1, progress=False)
    four = score_pairs(data, family, tmp_path / "four", settings(), batch_size=4, progress=False)
    by_tokens = score_pairs(data, family, tmp_path / "tokens", settings(), batch_tokens=120, progress=False)
    for pair, side, name in itertools.product(data, SIDES, ALL):
        expected = one.get(pair.id, side).signals[name]
        for other in (four, by_tokens):
            np.testing.assert_allclose(other.get(pair.id, side).signals[name], expected, atol=1e-5)


def test_a_killed_run_resumes_to_the_same_store(family, tmp_path, monkeypatch):
    data = pairs(6)
    undisturbed = score_pairs(data, family, tmp_path / "whole", settings(), shard_size=2, progress=False)
    write, calls = RewardWriter.write_shard, []

    def dies_at_the_second(self, *args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, *args, **options)

    monkeypatch.setattr(RewardWriter, "write_shard", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        score_pairs(data, family, tmp_path / "killed", settings(), shard_size=2, progress=False)
    with pytest.raises(UserError, match="1 of 3 shards"):
        RewardStore.open(tmp_path / "killed")
    monkeypatch.setattr(RewardWriter, "write_shard", write)
    resumed = score_pairs(data, family, tmp_path / "killed", settings(), shard_size=2, progress=False)
    assert resumed.fingerprint == undisturbed.fingerprint
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.is_file() and path.name != ".lock":
            assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes(), path.name


RELABELLED = [replace(pair, labels={"chosen": (Span(0, 1, "grounded"),)}) for pair in pairs(2)]


@pytest.mark.parametrize("seed, options, data, field", [
    (1, {}, pairs(2), "model_hash"), (0, {"layers": "last"}, pairs(2), "layers"), (0, {}, RELABELLED, "labels_hash"),
    (0, {"query": "predictor"}, pairs(2), "query"), (0, {"signals": ALL[:2]}, pairs(2), "signals"),
])  # fmt: skip
def test_a_store_of_another_model_data_or_options_is_not_continued(family, tmp_path, seed, options, data, field):
    score_pairs(pairs(2), family, tmp_path / "store", settings(), progress=False)
    with pytest.raises(UserError, match=field):
        score_pairs(data, llava(seed=seed), tmp_path / "store", settings(**options), progress=False)


def test_signals_can_be_of_one_picture_of_several(family, tmp_path):
    data = [replace(pair, images=(picture(10 + n), picture(20 + n))) for n, pair in enumerate(pairs(2))]
    both = score_pairs(data, family, tmp_path / "both", settings(ALL[:1]), progress=False)
    parts = [score_pairs(data, family, tmp_path / f"p{n}", settings(ALL[:1], patches=n), progress=False) for n in (0, 1)]
    for pair in data:
        whole = both.get(pair.id, "chosen").signals["global_attention"]
        halves = [part.get(pair.id, "chosen").signals["global_attention"] for part in parts]
        np.testing.assert_allclose(whole, halves[0] + halves[1], atol=1e-5)
        assert parts[1].maps(pair.id, "chosen").shape[1] == 16
        assert [grid.size for grid in both.get(pair.id, "chosen").grids] == [16, 16]
    with pytest.raises(UserError, match="patches=2 asks for a picture it does not have"):
        score_pairs(data, family, tmp_path / "p2", settings(ALL[:1], patches=2), progress=False)


@pytest.mark.parametrize("options, message", [
    ({"layers": [7]}, "decoder of 3 layers"), ({"heads": "median"}, "heads="),
    ({"signals": ("semantc",)}, "Did you mean 'semantic'"), ({"signals": ("semantic(layr=1)",)}, "Did you mean 'layer'"),
])  # fmt: skip
def test_unknown_options_are_refused_before_scoring(family, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        settings(**options).check(family.depth)


def test_image_contrast_of_a_single_picture_is_an_error(family, tmp_path):
    with pytest.raises(UserError, match="needs another picture"):
        score_pairs(pairs(1), family, tmp_path / "store", settings(("image_contrast",)), progress=False)


@pytest.fixture
def reads(monkeypatch):
    """The pictures whose digests were computed, in order."""
    asked = []
    digest = Picture.digest
    monkeypatch.setattr(Picture, "digest", lambda self: (asked.append(self.label), digest(self))[1])
    return asked


def test_other_pictures_are_read_only_if_a_signal_needs_them(family, tmp_path, reads):
    data = pairs(4)
    reads.clear()
    score_pairs(data, family, tmp_path / "plain", settings(ALL[:3]), progress=False)
    assert reads == []
    score_pairs(data, family, tmp_path / "contrast", settings(("image_contrast",)), progress=False)
    assert 0 < len(reads) <= 4


def test_no_picture_is_read_twice_to_find_another_one(reads):
    data = [replace(pair, images=pairs(1)[0].images) for pair in pairs(30)]
    data[7] = replace(data[7], images=(picture(99),))
    reads.clear()
    others = OtherPictures(data)
    chosen = [others.of(pair) for pair in data]
    assert len(reads) == 30
    assert all(images == data[7].images for index, images in enumerate(chosen) if index != 7)
    assert chosen[7] == data[0].images
    assert OtherPictures(data[:3]).of(data[0]) is None


def test_the_size_is_printed_only_if_something_will_be_written(family, tmp_path, capsys):
    tell = lambda **options: score_pairs(pairs(2), family, tmp_path / "store", settings(ALL[:1], **options))
    tell()
    assert "store will take about" in capsys.readouterr().err
    tell()
    assert "will take about" not in capsys.readouterr().err  # all is there
    with pytest.raises(UserError, match="layers"):
        tell(layers="last")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        score_pairs(pairs(2), family, tmp_path / "other", settings(ALL[:1]))
    with lock(tmp_path / "held"), pytest.raises(UserError, match="being written"):
        score_pairs(pairs(2), family, tmp_path / "held", settings(ALL[:1]))
    assert "will take about" not in capsys.readouterr().err


def test_labels_of_characters_become_labels_of_tokens():
    pieces = [" a", " red", " squ", "are", " and", ""]
    spans = (Span(6, 12, "grounded"), Span(0, 1, "hallucinated"))
    assert token_labels(pieces, "a red square and", spans).tolist() == [0, -1, 1, 1, -1, -1]
    assert token_labels(pieces, "  a red square and", (Span(8, 14, "grounded"),)).tolist() == [-1, -1, 1, 1, -1, -1]
