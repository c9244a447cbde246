"""Decodings against the naive way in float64; where they change nothing, plain answers; what cannot be decoded is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from catpo.core.errors import UserError
from catpo.evaluation.evaluate import evaluate
from catpo.models import reading
from catpo.models.branches import Writing
from catpo.models.questions import yes_less_no
from catpo.models.steering import open_decoding
from catpo.pairing.pair import pair
from catpo.rewards.word_rewards import Probe, WordReward
from catpo.scoring.decodings.vcd import contrasted
from fake_family import FakeFamily
from test_branches import one_by_one, samples_of
from test_tilt import WORDS
from tiny import llava
from tiny_families import build

FLOOR = 0.0028
"""A little more than the mean probability of the tiny model's tokens."""
GREEDY = {"max_new_tokens": 6}
DRAWN = {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.9, "seed": 2}


@torch.no_grad()
def next_logits(family, sample, written, pixels=None):
    """Logits behind a prompt and the tokens written so far, from a plain forward."""
    encoded = family.encode_prompt(family.prompt_text(sample.prompt, 1), [sample.images[0].open()], name="x")
    ids = torch.tensor([[*encoded.prompt_ids, *written]])
    pixels = encoded.pixels if pixels is None else pixels(encoded)
    return family.unwrapped(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits[0, -1]


def recorded(monkeypatch, decoding):
    """Lists that the decoding's steering fills: numbers, scores given, scores made."""
    seen, make = [], decoding.steering

    def steering(family, samples):
        steer = make(family, samples)

        def recording(numbers, scores, beside):
            made = steer(numbers, scores, beside)
            seen.append((list(numbers), scores, made))
            return made

        return recording

    monkeypatch.setattr(decoding, "steering", steering)
    return seen


def steps_of(seen, count):
    """Of each sample, the scores at its steps and the greedy tokens they lead to."""
    steps = [[] for _ in range(count)]
    for numbers, _, made in seen:
        for number, scores in zip(numbers, made, strict=True):
            steps[number].append(scores)
    return steps


def contrasted_plainly(family, decoding, sample, written):
    """What VCD makes of two plain forwards."""

    def distorted(encoded):
        generator = decoding.view.generator(sample.images[0].digest())
        if decoding.view.acts_on == "pixels":
            return decoding.view.of_pixels(encoded.pixels, generator)
        shown = decoding.view.of_picture(sample.images[0].open(), generator)
        return family.encode_prompt(family.prompt_text(sample.prompt, 1), [shown], name="x").pixels

    plain, beside = next_logits(family, sample, written), next_logits(family, sample, written, distorted)
    return contrasted(plain[None], beside[None], alpha=1.5, beta=0.05)[0]


# ---- vcd ------------------------------------------------------------------------------------------------------------------


def test_the_contrast_is_that_of_the_paper_in_slow_loops():
    torch.manual_seed(0)
    scores, distorted = torch.randn(2, 3, 7, dtype=torch.float64) * 2
    made = contrasted(scores, distorted, alpha=0.7, beta=0.3)
    for row in range(3):
        share = scores[row].softmax(-1)
        for token in range(7):
            expected = 1.7 * float(scores[row, token]) - 0.7 * float(distorted[row, token])
            is_plausible = float(share[token]) >= 0.3 * max(share.tolist())
            assert float(made[row, token]) == pytest.approx(expected if is_plausible else -math.inf)
    assert torch.isfinite(contrasted(scores, distorted, alpha=1.0, beta=0.0)).all()


@pytest.mark.parametrize("view", ["noised(step=900, space='pixels')", "noised(step=900)", "blank"])
def test_scores_of_trees_are_those_of_two_plain_forwards(monkeypatch, view):
    family, samples = llava(dtype=torch.float64), samples_of(1)
    decoding = open_decoding(f'vcd(alpha=1.5, beta=0.05, view="{view}")')
    seen = recorded(monkeypatch, decoding)
    family.generate(samples, batch_size=5, decoding=decoding, **GREEDY)

    changed = 0
    for sample, steps in zip(samples, steps_of(seen, len(samples)), strict=True):
        written = []
        for scores in steps[:3]:
            expected = contrasted_plainly(family, decoding, sample, written)
            assert torch.allclose(scores.double(), expected, atol=2e-4)  # chosen in float32
            changed += int(next_logits(family, sample, written).argmax() != expected.argmax())
            written.append(int(scores.argmax()))
    assert changed


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_decodings_that_change_nothing_give_the_plain_answers(tmp_path, options):
    (tmp_path / "words.json").write_text(json.dumps(WORDS))
    words = f"words(floor=0.002, vocabulary='{tmp_path}/words.json')"
    family, samples = llava(), samples_of(1)
    plain = family.generate(samples, batch_size=5, **options)
    for text in ("vcd(alpha=0.0, beta=0.0)", f'tilt(reward="self_question(floor=0.0)", words="{words}")'):
        assert family.generate(samples, batch_size=5, decoding=open_decoding(text), **options) == plain
    assert family.generate(samples, batch_size=5, decoding=open_decoding("vcd(alpha=2.0)"), **options) != plain


def test_what_follows_kept_sentences_is_contrasted_with_the_same_sentences(monkeypatch):
    family, samples = llava(dtype=torch.float64), samples_of(1)[:3]
    decoding, texts, kept = open_decoding("vcd(alpha=1.5, beta=0.05)"), family.prompt_texts(samples), family.keeping()
    seen = recorded(monkeypatch, decoding)
    writing = lambda some: family._steered(Writing(3, [family.eos_token_id], 0.0, 1.0, 0, 32), some, decoding)
    with torch.inference_mode():
        first = kept.write(family, samples, texts, [""] * 3, writing(samples))
        steps = len(seen)
        for sample, branch in zip(samples, first, strict=True):
            kept.remember(sample, "", branch, "on")
        going = [samples[2], samples[0], samples[2]]
        kept.write(family, going, [], ["on"] * 3, writing(going))
    numbers, _, made = seen[steps]
    for number, scores in zip(numbers, made, strict=True):
        written = first[samples.index(going[number])].ids
        assert torch.allclose(scores.double(), contrasted_plainly(family, decoding, going[number], written), atol=2e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vdc", "Did you mean 'vcd'"),
        ("vcd(alpha=-1.0)", "alpha must be 0 or more"),
        ("vcd(beta=1.5)", "beta lie between 0 and 1"),
        ("vcd(view='another')", "give a view that distorts the picture"),
        ("vcd(view='noise')", "There is no view 'noise'"),
        ("tilt(reward='probe')", "no pairs are at hand to learn from"),
        ("tilt(words=\"words(features=['log_prob'])\")", "Leave features out"),
        ("tilt(reward='log_prob')", r"'log_prob' rewards words only inside a probe. Write tilt\(reward='self_question'\)"),
        ("tilt(reward='patch_lens(scale=1.0)')", "'patch_lens' rewards words only inside a probe"),
        ("tilt(words=\"words(vocabulary='textblob')\")", "textblob names the nouns of pairs, and none are at hand"),
    ],
)
def test_a_decoding_that_cannot_be_made_is_refused_by_name(text, message):
    with pytest.raises(UserError, match=message):
        open_decoding(text)


def test_families_and_samples_without_a_second_view_are_refused_by_name(monkeypatch):
    family, samples = build("paligemma"), samples_of()
    with pytest.raises(UserError, match="PaliGemmaForConditionalGeneration. cannot be decoded beside noised"):
        family.generate(samples, decoding=open_decoding("vcd"), **GREEDY)
    with pytest.raises(UserError, match="Llava.* cannot be decoded beside noised"):
        one_by_one(monkeypatch, lambda: llava().generate(samples, decoding=open_decoding("vcd"), **GREEDY))
    with pytest.raises(UserError, match="sample 0/0 has no picture"):
        llava().generate([replace(samples[0], images=())], decoding=open_decoding("vcd"), **GREEDY)


# ---- tilt -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tilt(tmp_path):
    """A tilt with a probe of every feature, and its reward."""
    (tmp_path / "words.json").write_text(json.dumps(WORDS))
    probe = Probe(("self_question", "log_prob", "patch_lens"), (0.0, -3.0, -4.0), (1.0, 1.0, 1.0), (1.0, 0.5, 0.5), -4.0)
    probe.write(tmp_path / "probe.json")
    reward = f"probe(file='{tmp_path}/probe.json', scale=3.0)"
    words = f"words(floor={FLOOR}, vocabulary='{tmp_path}/words.json')"
    return open_decoding(f'tilt(reward="{reward}", words="{words}")'), WordReward.of(reward).probe


def test_scores_are_tilted_by_what_is_asked_of_each_word_that_comes_up(monkeypatch, tilt):
    family, samples = llava(dtype=torch.float64), samples_of(1)
    decoding, probe = tilt
    seen = recorded(monkeypatch, decoding)
    family.generate(samples, batch_size=5, decoding=decoding, **GREEDY)
    assert any((scores - made).abs().max() > 1 for _, scores, made in seen)
    first_tokens = decoding._reader.first_tokens
    largest, known = {}, {}
    for numbers, scores, made in seen:
        for number, plain, found in zip(numbers, scores, made, strict=True):
            expected, logps = plain.double().clone(), plain.double().log_softmax(-1).tolist()
            now = {word: max(logps[token] for token in tokens) for word, tokens in first_tokens.items()}
            words = known.setdefault(number, set())
            if any(value >= math.log(FLOOR) and word not in words for word, value in now.items()):
                words |= {word for word, value in now.items() if value >= math.log(FLOOR / 10)}
            best: dict[int, float] = {}
            for word, tokens in first_tokens.items():
                largest[number, word] = max(now[word], largest.get((number, word), -math.inf))
                if word in words:
                    said, lens = asked(family, samples[number], word, tokens)
                    logit = probe.intercept
                    for value, mean, weight in zip(
                        (said, largest[number, word], lens), probe.means, probe.weights, strict=True
                    ):
                        logit += weight * (value - mean)
                    reward = max(-8.0, -3 * math.log1p(math.exp(-logit)))
                    for token in tokens:
                        best[token] = max(reward, best.get(token, -math.inf))
            for token, reward in best.items():
                expected[token] += reward
            assert torch.allclose(found.double(), expected, atol=1e-3)


@torch.no_grad()
def asked(family, sample, word, tokens):
    """Logit of yes less that of no, and the log-prob of a word at a patch, from plain forwards."""
    ((said,),) = yes_less_no(family, [(sample.images, [f"Is there a {word} in the image?"])])
    encoded = family.encode_prompt(family.prompt_text(sample.prompt, 1), [sample.images[0].open()], name="x")
    ids = torch.tensor([encoded.prompt_ids])
    hidden = family.unwrapped(input_ids=ids, **encoded.pixels, output_hidden_states=True).hidden_states[-1][0, encoded.patches]
    return said, float((hidden @ family.head.weight.T).log_softmax(-1)[:, list(tokens)].max())


def test_tilted_answers_are_the_same_in_trees_one_by_one_and_in_other_batches(monkeypatch, tilt):
    family, samples = llava(), samples_of()
    write = lambda **options: family.generate(samples, decoding=tilt[0], **options)
    shared = write(batch_size=5, **GREEDY)
    assert shared == write(batch_size=32, **GREEDY) == one_by_one(monkeypatch, lambda: write(batch_size=3, **GREEDY))


def test_families_whose_prompts_see_themselves_are_tilted(tmp_path):
    (tmp_path / "words.json").write_text(json.dumps(WORDS))
    family, samples = build("paligemma"), samples_of()[:2]
    assert not reading.can_share(family) or reading.read(family, samples, family.prompt_texts(samples), [0]) is None
    words = f"words(floor=0.002, vocabulary='{tmp_path}/words.json')"
    strong = open_decoding(f'tilt(reward="self_question(scale=8.0)", words="{words}")')
    assert len(family.generate(samples, decoding=strong, **GREEDY)) == 2


# ---- in commands ----------------------------------------------------------------------------------------------------------


def test_an_evaluation_keeps_its_decoding_and_is_not_resumed_with_another(tmp_path):
    options = {"model": FakeFamily(), "benchmarks": ["scenes(count=2, questions=1)"], "output": tmp_path / "out"}
    evaluate(**options, decoding="vcd(alpha=1)", progress=False)
    about = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert about["decoding"]["steered"]["name"] == "vcd" and about["decoding"]["steered"]["alpha"] == 1.0
    assert options["model"].options[0]["decoding"].alpha == 1.0
    evaluate(**options, decoding="vcd(beta=0.1)", progress=False)  # the defaults, otherwise written
    for other in ("vcd(alpha=0.5)", "tilt", None):
        with pytest.raises(UserError, match="begun with decoding="):
            evaluate(**options, decoding=other, progress=False)
    with pytest.raises(UserError, match="is decoded by its server"):
        evaluate(**options | {"model": "openai:m", "output": tmp_path / "b"}, decoding="vcd", progress=False)


def test_pairs_are_made_of_answers_by_a_decoding(tmp_path):
    options = {"model": FakeFamily(), "data": "scenes(count=6)", "output": tmp_path / "out", "progress": False}
    pair(**options, decoding="tilt")
    about = json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert about["decoding"]["steered"]["reward"]["source"] == "self_question"
    assert options["model"].options[0]["decoding"].reward.source == "self_question"
    with pytest.raises(UserError, match="begun with decoding="):
        pair(**options, decoding="tilt(reward='self_question(scale=3.0)')")
    with pytest.raises(UserError, match="'tilt' has no option 'alpha'"):
        pair(**options, decoding="tilt(alpha=1.0)")
