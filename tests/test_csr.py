"""A tree of sentences: log-probs as a plain forward has them, rewards as slow loops have them, scorers as their models."""

from __future__ import annotations

import math
import random
import re
from itertools import product

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

import tiny
from catpo.core.errors import UserError
from catpo.core.types import Picture, Sample
from catpo.data.read import open_data
from catpo.models import loading
from catpo.models.generation import Sentence
from catpo.pairing.methods import Decoding, Dropped, csr
from catpo.pairing.pair import pair
from catpo.pairing.scorers import Scorer, scorer
from fake_family import FakeFamily

# ---- the model goes on with an answer -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(builtin):
    return loading.load(builtin)


def test_log_probs_of_a_next_sentence_are_those_of_a_plain_forward(family):
    samples = list(open_data("scenes(count=3)").samples())
    begun = ["", "A dog sits here.", ""]
    found = family.next_sentences(samples, begun, temperature=0.7, top_p=0.8, max_new_tokens=20, batch_size=2)
    for sample, start, sentence in zip(samples, begun, found, strict=True):
        prompt = family.prompt_text(sample.prompt, 1)
        lead = family.answer_lead(prompt)
        whole = family.process([sample.images], [prompt + lead + start + sentence.text])
        logps = family.unwrapped(**whole).logits[0].double().log_softmax(-1)
        ids = whole["input_ids"][0]
        count = len(sentence.logps) - (sentence.ending == "answer")
        expected = [float(logps[place - 1, ids[place]]) for place in range(len(ids) - count, len(ids))]
        assert sentence.logps[:count] == pytest.approx(expected, abs=2e-4)


def test_a_sentence_ends_at_its_stop_and_an_answer_where_nothing_follows(family):
    (sample,) = open_data("scenes(count=1)").samples()
    drawn = family.next_sentences([sample] * 6, [""] * 6, seed=1)
    assert len({each.text for each in drawn}) > 1  # rows of one batch are drawn apart
    for each in drawn:
        assert each.ending == "sentence" and each.text.endswith(".") and each.text.count(".") == 1
    (cut,) = family.next_sentences([sample], [""], max_new_tokens=2)
    assert cut.ending == "cut" and len(cut.logps) == 2
    full = "The image shows a dog in a park. The colours are bright and clear."
    endings = {each.ending for each in family.next_sentences([sample] * 8, [full] * 8)}
    assert "answer" in endings


def test_the_same_call_gives_the_same_sentences_and_answers_stay_as_they_were(family):
    samples = list(open_data("scenes(count=4)").samples())
    assert family.next_sentences(samples, [""] * 4, seed="3/1") == family.next_sentences(samples, [""] * 4, seed="3/1")
    greedy = family.generate(samples[:2])
    first = family.next_sentences(samples[:2], ["", ""], temperature=0.0)
    assert [answer.startswith(each.text) for answer, each in zip(greedy, first, strict=True)] == [True, True]


# ---- the tree -------------------------------------------------------------------------------------------------------------

SAID = {1: ["A cat.", "A dog.", "A fox."], 2: [" It sits.", " It runs.", " It flies."]}
LOGP = {"A cat.": [-1.0, -3.0], "A dog.": [-0.5], "A fox.": [-4.0]}
LOGP |= {" It sits.": [-2.0], " It runs.": [-1.0], " It flies.": [-9.0]}
FIT = {"A cat.": 0.3, "A dog.": 0.1, "A fox.": 0.2, "It sits.": -0.1, "It runs.": 0.4, "It flies.": 0.2}


class Scripted(FakeFamily):
    """Draws the sentences of SAID in turn, twice the first, and ends after two."""

    def next_sentences(self, samples, begun, **options):
        self.calls.append(len(samples))
        drawn, seen = [], {}
        for sample, start in zip(samples, begun, strict=True):
            depth, turn = start.count(".") + 1, seen.get((sample.id, start), 0)
            seen[sample.id, start] = turn + 1
            text = SAID[depth][max(0, turn - 1)] if depth in SAID else ""
            drawn.append(Sentence(text, tuple(LOGP.get(text, [-0.1])), "sentence" if text else "answer"))
        return drawn


class Fits(Scorer):
    def look(self, samples):
        return [sample.id for sample in samples]

    def relevance(self, seen, texts):
        assert all(name.startswith("scenes") for name in seen)
        return [FIT[text] for text in texts]


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(csr, "open_scorer", lambda text, family: Fits(family))
    return Scripted()


def leaves(family, **options):
    samples = list(open_data("scenes(count=2)").samples())
    found = csr.search(family, Decoding(), branches=4, **options)(samples)
    return [{each.text: each.reward for each in group} for group in found]


def oracle(form, relevance):
    """Every path of two sentences, by loops."""

    def reward(text, siblings):
        fit, logps = FIT[text.strip()], LOGP[text]
        if form == "paper":
            return relevance * max(100 * fit, 0) + (1 - relevance) * math.exp(sum(logps))
        mean = lambda each: sum(LOGP[each]) / len(LOGP[each])
        by_fit = sum(FIT[other.strip()] < fit for other in siblings) + 0.5
        by_likelihood = sum(mean(other) < mean(text) for other in siblings) + 0.5
        return (relevance * by_fit + (1 - relevance) * by_likelihood) / len(siblings)

    return {
        first + second: (reward(first, SAID[1]) + reward(second, SAID[2])) / 2 for first, second in product(SAID[1], SAID[2])
    }


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("relevance", [0.9, 0.2])
def test_rewards_of_a_whole_tree_are_those_of_slow_loops(scripted, form, relevance):
    for group in leaves(scripted, form=form, relevance=relevance, best=50, worst=50):
        assert group == pytest.approx(oracle(form, relevance))
    assert scripted.calls == [8, 24, 72]  # both samples in one call: 1, 3 and 9 begun answers with 4 draws each


@pytest.mark.parametrize("form, kept", [("code", {"A dog.", "A fox."}), ("paper", {"A cat.", "A dog."})])
def test_a_pruned_tree_grows_from_the_best_and_the_worst(scripted, form, kept):
    """By log-prob the dog is best and the fox worst; by fit to the picture the cat and the dog."""
    for group in leaves(scripted, form=form, best=1, worst=1, sentences=2):
        assert {re.match(r".*?\.", text)[0] for text in group} == kept
    assert scripted.calls == [8, 16]


def test_chosen_has_the_highest_reward_and_rejected_the_lowest(scripted, tmp_path):
    pair(model=scripted, data="scenes(count=3)", output=tmp_path / "out", method="csr(branches=4, best=9)", progress=False)
    expected = oracle("code", 0.9)
    for made in open_data(tmp_path / "out").pairs():
        assert made.chosen == max(expected, key=expected.get) and made.rejected == min(expected, key=expected.get)
        assert made.meta["rewards"] == pytest.approx([max(expected.values()), min(expected.values())], abs=1e-6)


def test_without_a_whole_sentence_there_is_no_pair(scripted):
    sample = Sample("1", (), "Describe the image.")
    assert csr.make(sample, "", random.Random(0)) == Dropped("no whole sentence")
    cut = [Sentence("A very long", (-1.0,), "cut"), Sentence("A.", (-1.0,), "sentence"), Sentence("", (-1.0,), "answer")]
    assert csr._usable(cut) == []


def test_a_killed_run_ends_with_the_same_pairs(family, tmp_path, monkeypatch):
    options = dict(data="scenes(count=4)", method="csr(branches=2, best=1, worst=1, sentences=2)", block_size=2, progress=False)
    pair(model=family, output=tmp_path / "whole", **options)
    calls, next_sentences = [], family.next_sentences

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:  # the second block's first sentences
            raise KeyboardInterrupt
        return next_sentences(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(family, "next_sentences", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair(model=family, output=tmp_path / "broken", **options)
    assert len((tmp_path / "broken" / "blocks.jsonl").read_text().splitlines()) == 1
    pair(model=family, output=tmp_path / "broken", **options)
    for name in ("pairs.jsonl", "pairs.json"):
        assert (tmp_path / "broken" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize(
    "method, message",
    [
        ("csr(form='codes')", "Did you mean 'code'"),
        ("csr(relevance=1.5)", "from 0 to 1"),
        ("csr(branches=1)", "2 or more"),
        ("csr(scorer='clipp')", "Did you mean 'clip'"),
        ("csr(scorer='own(feature=1)')", "Did you mean 'features'"),
        ("csr", "temperature above 0"),
    ],
)
def test_a_wrong_option_is_refused_before_any_sentence(scripted, tmp_path, method, message):
    options = dict(data="scenes(count=2)", temperature=0.0 if method == "csr" else 1.0, progress=False)
    with pytest.raises(UserError, match=message):
        pair(model=scripted, output=tmp_path / "out", method=method, **options)
    assert scripted.calls == []


# ---- scorers --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights, as a user has one on disk."""
    words = tiny.tokenizer()
    torch.manual_seed(0)
    common = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = CLIPConfig(
        text_config=dict(
            common, vocab_size=len(words), max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
        vision_config=dict(common, image_size=32, patch_size=8),
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    words.model_max_length = 32
    image = tiny.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=image, tokenizer=words).save_pretrained(folder)
    return folder


def test_clip_gives_the_cosines_that_its_model_gives(clip_folder, family):
    samples = list(open_data("scenes(count=3)").samples())
    texts = ["A cat on a mat.", "Two people riding a horse.", "A cup."]
    measured = scorer(f"clip(source='{clip_folder}', batch_size=2)", family)
    found = measured.relevance(measured.look(samples), texts)
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    for sample, text, cosine in zip(samples, texts, found, strict=True):
        inputs = processor(images=[sample.images[0].open()], text=[text], return_tensors="pt")
        with torch.inference_mode():
            logit = model(**inputs).logits_per_image.item()
        assert cosine == pytest.approx(logit / model.logit_scale.exp().item(), abs=1e-5)
    assert measured.relevance([], []) == []


@pytest.mark.parametrize("features", ["hidden", "input"])
def test_own_gives_the_mean_over_tokens_of_the_best_patch(family, features):
    samples = list(open_data("scenes(count=2)").samples())
    texts = ["There is a dog.", "Two owls sit above a cup."]
    measured = scorer(f"own(features='{features}', batch_size=1)", family)
    found = measured.relevance(measured.look(samples), texts)
    for sample, text, value in zip(samples, texts, found, strict=True):
        inputs = family.process([sample.images], [family.prompt_text(sample.prompt, 1)])
        places = [place for place, token in enumerate(inputs["input_ids"][0].tolist()) if token == family.image_token_id]
        with torch.inference_mode():
            if features == "hidden":
                patches = family.backbone(**inputs).last_hidden_state[0][places]
            else:
                patches = family.backbone.get_image_features(inputs["pixel_values"]).pooler_output[0]
        words = family.unwrapped.lm_head.weight[family.tokenizer(" " + text, add_special_tokens=False)["input_ids"]]
        cosines = [max(float(torch.cosine_similarity(word, patch, dim=0)) for patch in patches) for word in words]
        assert value == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("clip(source='no/such')", "scorer='own'"),
        ("own(features='x')", "hidden, input"),
        ("clip(source='{folder}')", "does not compare pictures with texts|cannot be loaded"),
    ],
)
def test_a_scorer_that_cannot_be_used_is_refused_with_the_next_step(family, folder, text, message):
    with pytest.raises(UserError, match=message):
        scorer(text.format(folder=folder), family)


def test_an_empty_text_has_a_relevance(family):
    picture = Picture(data=next(open_data("scenes(count=1)").samples()).images[0].read())
    measured = scorer("own", family)
    assert measured.relevance(measured.look([Sample("1", (picture,), "What is it?")]), [""]) != []
