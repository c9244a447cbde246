"""What texts claim of pictures, how it is asked, and what the model's answers are as a signal."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from catpo.core.errors import UserError
from catpo.core.spec import parse
from catpo.core.types import SIDES, Sample
from catpo.models import loading
from catpo.models.questions import YesNo, ask
from catpo.rewards.fusion import Fusion
from catpo.scoring import claims
from catpo.scoring.claims import Asker, read_forms
from catpo.scoring.score import score_pairs
from catpo.scoring.settings import PAPER_SETTINGS
from catpo.scoring.words import WordSettings
from catpo.text import things
from tiny import llava, pairs

ALL = ("objects", "attributes", "counts", "relations")
TEXT = "A small brown dog sits next to two cats, and there is a loaf of bread on the wooden table in the background."


def asked(text, nouns, kinds=ALL, **wordings):
    found = Asker.of(nouns, kinds, wordings).claims(text)
    assert all(text[claim.start : claim.end].strip() == text[claim.start : claim.end] for claim in found)
    return [(text[claim.start : claim.end], claim.question) for claim in found]


def test_a_tagger_finds_things_attributes_counts_and_places():
    assert asked(TEXT, "textblob") == [
        ("dog", "Is there a dog in the image?"),
        ("small", "Is the dog small?"),
        ("brown", "Is the dog brown?"),
        ("next to", "Is the dog next to the cats?"),
        ("cats", "Is there a cat in the image?"),
        ("two", "Are there two cats in the image?"),
        ("loaf of bread", "Is there a loaf of bread in the image?"),
        ("on", "Is the loaf of bread on the table?"),
        ("table", "Is there a table in the image?"),
        ("wooden", "Is the table wooden?"),
    ]


def test_nltks_tagger_finds_them_too_where_its_data_is(shared, monkeypatch):
    nltk = pytest.importorskip("nltk", reason="needs the extra 'eval'")
    monkeypatch.setattr(nltk.data, "path", [*nltk.data.path, str(shared / "benchmarks/data/nltk")])
    found = asked("The image shows a black bear near a wooden bench, and three people are behind the traffic light.", "nltk")
    assert found == [
        ("bear", "Is there a bear in the image?"),
        ("black", "Is the bear black?"),
        ("near", "Is the bear near the bench?"),
        ("bench", "Is there a bench in the image?"),
        ("wooden", "Is the bench wooden?"),
        ("people", found[5][1]),  # its singular depends on whether WordNet is there
        ("three", "Are there three people in the image?"),
        ("behind", "Are the people behind the traffic light?"),
        ("traffic light", "Is there a traffic light in the image?"),
    ]


def test_a_vocabulary_finds_its_own_words_only_and_no_adjectives():
    kinds = ("objects", "counts", "relations")
    assert asked("Two cups are on the sofa near an ox.", "builtin", kinds, objects="Can you see {}?") == [
        ("cups", "Can you see a cup?"),
        ("Two", "Are there two cups in the image?"),
        ("on", "Are the cups on the sofa?"),
        ("sofa", "Can you see a couch?"),
    ]
    assert [word for word, _ in asked("The dog's kite.", "builtin", ("objects",))] == ["dog", "kite"]
    with pytest.raises(UserError, match="knows no adjectives"):
        Asker.of("builtin", ALL, {})


def test_words_can_be_the_nouns_of_the_pairs():
    settings = WordSettings.of("words(vocabulary='textblob')")
    with pytest.raises(UserError, match="looks for the nouns of pairs, and there are none here"):
        settings.provenance()
    texts = [replace(pair, chosen="Two zebras stand by a fence.", rejected="A giraffe drinks water.") for pair in pairs(1)]
    forms = settings.of_pairs(texts).forms
    assert [forms.get(name) for name in ("zebras", "zebra", "fence", "water")] == ["zebra", "zebra", "fence", "water"]
    assert any(name.startswith("giraffe") for name in forms)  # without WordNet it is "giraffe drinks"
    with pytest.raises(UserError, match="finds no noun"):
        settings.of_pairs([replace(pair, chosen="So.", rejected="No.") for pair in texts])


@pytest.mark.parametrize(
    ("nouns", "kinds", "wordings", "message"),
    [
        ("builtin", (), {}, "give a list of objects"),
        ("builtin", ("colours",), {}, "has no kinds='colours'"),
        ("builtin", ("objects",), {"objects": "Is it there?"}, "write {} once"),
        ("builtin", ("objects",), {"relations": "Is the {thing} {what} it, {who}?"}, "are filled in"),
        (
            "builtin",
            ("objects",),
            {"counts": "How about {}?"},
            r"counts are not asked about. Name them in kinds=\['objects', 'counts'\]",
        ),
        ("spacy", ("objects",), {}, "nouns='spacy' is not known"),
        ("nowhere.json", ("objects",), {}, "nowhere.json cannot be read"),
    ],
)
def test_options_that_cannot_be_used_are_refused(nouns, kinds, wordings, message):
    with pytest.raises(UserError, match=message):
        Asker.of(nouns, kinds, wordings)


def test_without_a_tagger_the_built_in_words_are_asked_about_and_that_is_said(monkeypatch, capsys):
    def missing(nouns, forms=None):
        if nouns in things.TAGGERS:
            raise UserError(f"{nouns} is not here.")
        return things.finder(nouns, forms)

    monkeypatch.setattr(claims, "finder", missing)
    claims._finder_here.cache_clear()
    try:
        assert claims._finder_here()[0] == "builtin"
        assert "only the" in (said := capsys.readouterr().err) and "nltk is not here. textblob is not here." in said
    finally:
        claims._finder_here.cache_clear()


def test_a_space_says_neither_yes_nor_no(builtin):
    family = loading.load(builtin, device="cpu")
    told = YesNo.of(family)
    assert family.token_ids(" yes")[0] not in told.yes  # it is the space alone
    assert {family.tokenizer.decode([token]).strip().lower() for token in (*told.yes, *told.no)} <= {"yes", "y", "no", "n"}


def test_a_model_that_answers_with_neither_yes_nor_no_is_named_once(builtin, capsys):
    sample = Sample("a picture", pairs(1)[0].images, "")
    understood, misunderstood = (loading.load(builtin, device="cpu") for _ in range(2))
    ask(understood, [sample], [["Is there a dog in the image?"]])
    assert not capsys.readouterr().err
    for _ in range(2):
        ask(misunderstood, [sample], [["Describe the image."]])
    assert capsys.readouterr().err.count("catpo: asked 'Describe the image.'") == 1


def test_a_file_of_words_that_cannot_be_read_names_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read \(No such file or directory\)\. Check the path\.$"):
        read_forms(str(tmp_path / "none.json"))
    (tmp_path / "words.json").write_text("{")
    with pytest.raises(UserError, match=r"Correct it\.$"):
        read_forms(str(tmp_path / "words.json"))


WORDS = {"cat": "cat", "mat": "mat", "circle": "circle", "square": "square", "table": "table", "laptop": "laptop", "dog": "dog"}


def test_the_signal_is_the_answer_at_a_words_tokens_and_0_elsewhere(tmp_path):
    (tmp_path / "words.json").write_text(json.dumps(WORDS))
    family, data = llava(), pairs(4)
    spec = f"self_question(nouns='{tmp_path / 'words.json'}', yes=['a cat'], no=['the dog'])"
    settings = replace(PAPER_SETTINGS, signals=(parse(spec),))
    store = score_pairs(data, family, tmp_path / "store", settings, progress=False, dataloader_num_workers=0)
    plain = score_pairs(data, family, tmp_path / "plain", progress=False)
    words = YesNo.of(family, yes=["a cat"], no=["the dog"])
    named = 0
    for pair in data:
        for side in SIDES:
            row = store.get(pair.id, side)
            np.testing.assert_allclose(row.logps, plain.get(pair.id, side).logps, atol=1e-5)
            expected = np.zeros(len(row.pieces))
            for token, piece in enumerate(row.pieces):
                if piece.strip() in WORDS:
                    question = replace(pair, prompt=f"Is there a {piece.strip()} in the image?", chosen="x", rejected="y")
                    expected[token] = asked_alone(family, question, words)
            named += np.count_nonzero(expected)
            np.testing.assert_allclose(row.signals[spec], expected, atol=1e-4)
            weights = store.weights(pair.id, Fusion(signals={"self_question": 1.0}, normalise="none", activation="sigmoid"))
            ours = getattr(weights, side)
            assert (ours[expected == 0] == 1).all() and (ours[expected != 0] != 1).all()
    assert named > 4
    assert store.provenance["found"] == {spec: {"nouns": str(tmp_path / "words.json")}}


@torch.no_grad()
def asked_alone(family, pair, words):
    """The margin in a plain forward pass on the question's own prompt."""
    encoded = family.encode(pair)
    ids = torch.tensor([encoded.prompt_ids])
    logits = family.unwrapped(input_ids=ids, attention_mask=torch.ones_like(ids), **encoded.pixels).logits[0, -1]
    return float(logits[list(words.yes)].max() - logits[list(words.no)].max())
