"""Answers that share a picture: the same as one by one, drawn from the same distribution, and the picture is read once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from catpo.core.types import Sample
from catpo.data.read import open_data
from catpo.models import loading, reading
from catpo.models.branches import Writing
from catpo.models.kept import Kept
from tiny import llava, picture
from tiny_families import BUILDERS, OTHERS, build

QUESTIONS = ("what is this", "is there a cat in the picture", "describe the image in detail", "is there a dog")
ALONE = ("paligemma", "paligemma2")
"""Families whose prompts see themselves in both directions, so that what comes before a question depends on it."""


def samples_of(pictures: int = 2) -> list[Sample]:
    """Four questions about a picture, three about the next, …; the first is asked twice. One picture has a single question."""
    samples = []
    for number in range(pictures):
        seen = picture(number, 160 - 80 * number, 60)
        samples += [Sample(f"{number}/{index}", (seen,), text) for index, text in enumerate(QUESTIONS[: 4 - number])]
    return [*samples, replace(samples[0], id="again"), Sample("alone", (picture(9),), "a cat")]


def one_by_one(monkeypatch, run):
    """What `run` gives where nothing is shared."""
    with monkeypatch.context() as patched:
        patched.setattr(reading, "can_share", lambda family: False)
        return run()


def expected_logps(family, sample: Sample, before: list[int], ids: list[int]) -> torch.Tensor:
    """Log-probs of tokens in a plain forward of the prompt with all of them behind it; `before` ends where they begin."""
    inputs = family.process([sample.images], [family.prompt_text(sample.prompt, len(sample.images))])
    more = torch.tensor([[*before[inputs["input_ids"].shape[1] :], *ids]])
    longer = {name: torch.zeros_like(more) for name in ("mm_token_type_ids", "token_type_ids") if name in inputs}
    longer |= {"input_ids": more, "attention_mask": torch.ones_like(more)}
    whole = inputs | {name: torch.cat([inputs[name], values], dim=1) for name, values in longer.items()}
    with torch.no_grad():
        logits = family.unwrapped(**whole).logits[0]
    logits[:, family.image_token_id] = -torch.inf  # which is not drawn: a plain forward would look for its picture
    logps = logits.log_softmax(-1)
    return logps[len(before) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("name", [*BUILDERS, *OTHERS])
def test_greedy_answers_are_those_of_plain_generate(name, monkeypatch):
    family, samples = build(name), samples_of()
    ask = lambda: family.generate(samples, max_new_tokens=8, batch_size=5)
    assert ask() == one_by_one(monkeypatch, ask)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in (*ALONE, "vipllava")])
def test_log_probs_of_branches_and_of_what_follows_them_are_those_of_a_plain_forward(name):
    family, samples = build(name), samples_of()
    texts = family.prompt_texts(samples)
    family.unwrapped.generation_config.suppress_tokens = [family.image_token_id]
    writing = Writing(5, [family.eos_token_id], 1.0, 1.0, 0, 32)
    kept = Kept()
    with torch.inference_mode():
        first = kept.write(family, samples, texts, [""] * len(samples), writing)
        for sample, branch in zip(samples, first, strict=True):
            kept.remember(sample, "", branch, "on")
        going = [samples[5], samples[5], samples[1], samples[2]]  # of another order, and not of every picture
        second = kept.write(family, going, [], ["on"] * 4, writing)
    for sample, branch in [*zip(samples, first, strict=True), *zip(going, second, strict=True)]:
        expected = expected_logps(family, sample, [*branch.before], branch.ids)
        assert torch.allclose(torch.tensor(branch.logps), expected, atol=1e-5)
    assert second[0].ids != second[1].ids  # each is drawn by itself


def test_families_whose_prompts_see_themselves_answer_one_by_one():
    for name in ALONE:
        family, samples = build(name), samples_of()
        (groups,) = reading.batches(samples, 32)
        assert [reading.read(family, samples, family.prompt_texts(samples), group) for group in groups] == [None] * 3


def test_forbidden_tokens_stay_forbidden(monkeypatch):
    family, samples = llava(), samples_of()
    plain = family.generate(samples, max_new_tokens=8)
    config = family.unwrapped.generation_config
    written = [family.token_ids(answer) for answer in plain]
    config.bad_words_ids = [written[0][:2], [written[1][2]]]
    config.suppress_tokens, config.begin_suppress_tokens = [written[2][1]], [written[3][0]]
    ask = lambda: family.generate(samples, max_new_tokens=8)
    assert ask() == one_by_one(monkeypatch, ask) != plain


def test_draws_have_the_models_distribution_and_do_not_depend_on_who_has_finished(monkeypatch):
    family, (sample, *_) = llava(), samples_of()
    count, options = 1500, {"max_new_tokens": 1, "temperature": 0.7, "top_p": 0.8}
    samples = [replace(sample, id=str(number)) for number in range(count)]
    drawn = Counter(family.generate(samples, batch_size=count, **options))
    inputs = family.process([sample.images], [family.prompt_text(sample.prompt, 1)])
    with torch.no_grad():
        scores = family.unwrapped(**inputs).logits[0, -1] / 0.7
    order = scores.softmax(-1).sort(descending=True)
    kept = order.indices[order.values.cumsum(0) - order.values < 0.8]
    expected: Counter[str] = Counter()
    for token, share in zip(kept.tolist(), scores[kept].softmax(-1).tolist(), strict=True):
        expected[family._answer_text([token]).strip()] += share
    assert len(expected) > 5 and set(drawn) <= set(expected)
    for text, share in expected.items():
        spread = (share * (1 - share) / count) ** 0.5
        assert abs(drawn[text] / count - share) < 5 * spread
    few = samples[:6]
    ask = lambda: family.generate(few, temperature=1.0, max_new_tokens=30, seed=3)
    assert ask() == ask() == one_by_one(monkeypatch, ask)  # the same draws as transformers', which end at different lengths


def test_pictures_and_common_beginnings_are_read_once():
    family, samples = llava(), samples_of(pictures=1)[:4]
    seen, read = [], []
    family.backbone.vision_tower.register_forward_hook(lambda module, given, output: seen.append(len(output[0])))
    family.decoder.register_forward_pre_hook(
        lambda module, given, options: read.append(options["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    family.generate(samples, max_new_tokens=3)
    lengths = [len(ids) for ids in (family.encode_prompt(text, [samples[0].images[0].open()], name="x").prompt_ids
                                    for text in family.prompt_texts(samples))]  # fmt: skip
    common = 20  # `<s>`, `user: `, 16 patches
    assert seen == [1] and read[0] == common + sum(length - 1 - common for length in lengths)
    assert read[1:] == [4, 4, 4]  # a token of each answer


def test_a_group_is_kept_in_one_batch_and_cut_evenly_where_it_is_too_large():
    first, second = (picture(0),), (picture(1),)
    samples = [Sample(str(number), (first, second)[number % 2], "?") for number in range(10)]
    assert [*reading.batches(samples, 6)] == [[[0, 2, 4, 6, 8]], [[1, 3, 5, 7, 9]]]
    assert [*reading.batches(samples, 6, per_place=2)] == [[[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]]
    assert [*reading.batches(samples, 4)] == [[[0, 2, 4]], [[6, 8]], [[1, 3, 5]], [[7, 9]]]


def test_the_next_sentence_follows_from_what_was_kept(builtin):
    family = loading.load(builtin)
    samples = [*open_data("scenes(count=2)").samples()]
    kept = family.keeping()
    first = family.next_sentences(samples, ["", ""], temperature=0.0, kept=kept)
    assert first == family.next_sentences(samples, ["", ""], temperature=0.0)
    starts = [each.text for each in first]
    calls = []
    family.backbone.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    second = family.next_sentences(samples, starts, temperature=0.0, kept=kept)
    assert not calls
    for mine, plain in zip(second, family.next_sentences(samples, starts, temperature=0.0), strict=True):
        assert (mine.text, mine.ending) == (plain.text, plain.ending)
        assert mine.logps == pytest.approx(plain.logps, abs=1e-4)
    elsewhere = family.next_sentences(samples, ["A dog.", "A cat."], temperature=0.0, kept=kept)  # never written: read as text
    assert elsewhere == family.next_sentences(samples, ["A dog.", "A cat."], temperature=0.0)
