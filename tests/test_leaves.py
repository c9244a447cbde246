"""Rows that are trees: ranked answers in one row against separate pairs, questions beside a response against asking alone."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from catpo.core.conversation import Turn
from catpo.core.errors import UserError
from catpo.core.types import SIDES, PreferencePair, Sample, pair_id
from catpo.data.spool import PairsAt, SpooledPairs, prompt_numbers
from catpo.models import loading, questions
from catpo.models.attention import packed
from catpo.models.attention.last_layer import read_at_responses
from catpo.models.family_check import check_family
from catpo.models.packing import pack, response_hidden, run_backbone
from catpo.models.questions import YesNo, ask, asked_hidden, with_questions
from catpo.runtime.workers import opened
from catpo.scoring import forward as scoring
from catpo.scoring.score import score_pairs
from catpo.training.length_sampler import PromptsTogether
from test_batching import plain_logps
from test_scoring import settings
from tiny import llava, pairs, picture
from tiny_families import BUILDERS, build
from training_runs import trainer

ANSWERS = (
    "a red square and a blue circle", "a red square and a dog on the table", "a cat", "two people riding a horse on a beach",
)  # fmt: skip


def ranked(seed=0, answers=ANSWERS, prompt="describe the image"):
    """All pairs of ranked answers to one prompt, the better first, each with a picture object of its own."""
    made = []
    for better, worse in combinations(answers, 2):
        images = (replace(picture(seed), name=f"row {len(made)}"),)
        meta = {"is_best": float(better == answers[0])}
        made.append(PreferencePair(pair_id(images, prompt, better, worse), images, prompt, better, worse, meta=meta))
    return made


@pytest.fixture(scope="module")
def data():
    """Six pairs of one prompt, one of another, and three of a third."""
    return [*ranked(), *pairs(2)[1:], *ranked(2, ANSWERS[1:])]


@pytest.fixture(scope="module")
def scored(folder, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranked") / "store"
    score_pairs(data, loading.load(folder), path, progress=False)
    return path


def test_each_response_of_a_prompt_stands_once_in_one_row(data):
    family = llava()
    batch = pack(family, family.encode_all(data))
    assert len(batch["parts"]) == 3 and [len(parts) - 1 for parts in batch["parts"]] == [4, 2, 3]
    assert len(batch["responses"]) == 9 and batch["mask"].shape[0] == 10
    ids = batch["model_inputs"]["input_ids"]
    for row, places, tokens, mask in zip(batch["row"], batch["tokens_at"], batch["token_ids"], batch["mask"], strict=True):
        for side in range(2):
            assert torch.equal(ids[row[side], places[side][mask[side]]], tokens[side][mask[side]])
    alone = pack(family, [family.encode(pair) for pair in data])
    assert len(alone["parts"]) == 10 and "token_of" not in alone
    assert batch["model_inputs"]["input_ids"].numel() < 0.5 * alone["model_inputs"]["input_ids"].numel()


def test_a_long_row_among_short_ones_is_no_longer_than_the_pairs(data):
    """Where padding would cost more than sharing saves, each pair has its own row."""
    family = llava()
    answers = [" ".join(["a cat sitting on a mat"] * (9 + number)) for number in range(6)]
    mixed = [*ranked(1, answers), *[pair for seed in range(12) for pair in pairs(seed + 1)[-1:]]]
    batch = pack(family, family.encode_all(mixed))
    assert len(batch["parts"]) == len(mixed) and "token_of" not in batch


OBJECTIVES = [
    "dpo", "catpo", "catpo(kl_weight=0.5, shared_prefix='neutral')", "amp", "tdpo", "dpo(weights=\"catpo(alpha=0.3)\")",
    "povid", "mdpo", "vdpo",
]  # fmt: skip


def loss_and_gradients(folder, scored, output, data, objective, *, together, **options):
    """A step's losses and gradients on a batch of pairs, in rows by prompt or each pair in its own."""
    settings = dict(
        objective=objective, rewards=str(scored), per_device_train_batch_size=len(data), self_check=False, **options
    )
    run = trainer(folder, output, data, **settings)
    model = run.model.double()  # differences in exact arithmetic would be errors, not rounding
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():  # as if it had learned: at first every loss is that of equal models
            weight += 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * weight.requires_grad
    collator = run._collator(run.args)
    if not together:
        reader = collator.reader
        reader.encode_all = lambda some, max_length=None: [reader.encode(pair, max_length=max_length) for pair in some]
    batch = collator(data)
    assert ("token_of" in batch) == together
    for inputs in [batch, batch["model_inputs"], *[view["model_inputs"] for view in batch["views"].values()]]:
        for name, values in inputs.items():
            inputs[name] = values.double() if isinstance(values, torch.Tensor) and values.is_floating_point() else values
    if run.reference_head is not None:
        run.reference_head = run.reference_head.map(lambda values: values.double())
    _, found = run.compute_loss(model.train(), batch, return_outputs=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(found.losses.mean(), weights, allow_unused=True)
    return found.losses, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_of_ranked_answers_are_those_of_separate_pairs(folder, scored, data, tmp_path, objective):
    losses, gradients = loss_and_gradients(folder, scored, tmp_path, data, objective, together=True)
    expected, expected_gradients = loss_and_gradients(folder, scored, tmp_path, data, objective, together=False)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    for mine, plain in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_batches_hold_pairs_of_one_prompt_in_an_order_of_seed_and_epoch(data):
    prompts = prompt_numbers(data)
    assert prompts == [0] * 6 + [1] + [2] * 3 == prompt_numbers(SpooledPairs.of(data))
    assert prompt_numbers(PairsAt([data, SpooledPairs.of(data)]).select([0, 3, 9, 10])) == [0, 0, 2, 3]
    sampler = PromptsTogether([number // 6 for number in range(600)], 6, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == list(range(600))
    assert all(len({pair // 6 for pair in orders[0][at : at + 6]}) == 1 for at in range(0, 600, 6))


def test_every_pair_comes_once_and_no_prompt_is_cut_without_need():
    rng = random.Random(0)
    for seed in range(100):
        sizes, batch_size = [rng.randint(1, 12) for _ in range(rng.randint(1, 30))], rng.randint(2, 9)
        prompts = [number for number, size in enumerate(sizes) for _ in range(size)]
        order = list(PromptsTogether(prompts, batch_size, seed))
        assert sorted(order) == list(range(len(prompts)))
        batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        pieces = sum(len({prompts[pair] for pair in batch}) for batch in batches)
        assert pieces < sum(-(-size // batch_size) for size in sizes) + len(batches)


def test_training_on_ranked_answers_shares_rows_and_other_data_keeps_its_order(folder, scored, data, tmp_path):
    passes = {}
    for name, some in (("ranked", data), ("other", pairs(8))):
        rewards = {"rewards": str(scored)} if name == "ranked" else {}
        run = trainer(folder, tmp_path / name, some, objective="dpo", per_device_train_batch_size=6, **rewards)
        passes[name] = [batch["model_inputs"]["input_ids"].shape[0] for batch in map(opened, run.get_train_dataloader())]
        assert isinstance(run._get_train_sampler(), PromptsTogether) == (name == "ranked")
    assert passes["ranked"] in ([1, 2], [2, 1]) and passes["other"] == [6, 2]


def test_scoring_reads_a_response_of_several_pairs_once(folder, data, scored, tmp_path, monkeypatch):
    """And stores for each pair what it stores of the pair alone."""
    family, read = loading.load(folder), []
    run = scoring.run_backbone
    monkeypatch.setattr(scoring, "run_backbone", lambda model, batch: read.append(len(batch["flat_ids"])) or run(model, batch))
    together = score_pairs(data, family, tmp_path / "together", progress=False)
    responses = {(pair.prompt, image.digest(), pair.response(side)) for pair in data for side in SIDES for image in pair.images}
    assert sum(read) == sum(len(family.response_ids("assistant:", text)) for _, _, text in responses)
    for pair in data:
        alone = score_pairs([pair], family, tmp_path / pair.id, progress=False)
        for side in SIDES:
            mine, plain = together.get(pair.id, side), alone.get(pair.id, side)
            np.testing.assert_allclose(mine.logps, plain.logps, atol=1e-5)
            for name, values in plain.signals.items():
                np.testing.assert_allclose(mine.signals[name], values, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(together.hidden(pair.id, side), alone.hidden(pair.id, side), atol=1e-4)


QUESTIONS = ["is there a cat", "is there a dog on the table", "is the square red", "describe the image", "is there a laptop"]


def asked_alone(family, item, question):
    """The last token's logits of a plain forward on the question's own prompt."""
    text = family.prompt_text(question, len(item.images))
    inputs = family.process([[image.open() for image in item.images]], [text])
    with torch.no_grad():
        return family.unwrapped(**inputs).logits[0, -1]


def some_words(family):
    """Any tokens will do for comparing."""
    return YesNo((5, 9, 17), (6, 30))


def margin(logits, words):
    return logits[list(words.yes)].amax(-1) - logits[list(words.no)].amax(-1)


SHARING = {*BUILDERS} - {"paligemma", "paligemma2"}  # the others stand alone: what is asked sees itself in both directions


@pytest.mark.parametrize("name", [*BUILDERS, "glm4v"])
def test_questions_beside_a_pair_are_answered_as_alone(name):
    family = build(name)
    items = pairs(2)
    check_family(family, items[0])
    words = some_words(family)
    encoded = [with_questions(family, item, family.encode(item), QUESTIONS[: 3 + index]) for index, item in enumerate(items)]
    shares = {question.is_beside for item in encoded for question in item.questions}
    assert shares == {name in SHARING}
    batch = pack(family, encoded, prefix="shared" if family.shares_prefix else "separate")
    with family.recordable_attention(), torch.no_grad(), read_at_responses(family.decoder):
        hidden = run_backbone(family.unwrapped, batch).last_hidden_state
    found = words.margins(asked_hidden(hidden, batch), family.head)
    asked = [(item, text) for index, item in enumerate(items) for text in QUESTIONS[: 3 + index]]
    expected = torch.stack([margin(asked_alone(family, item, text), words) for item, text in asked])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    alone = pack(family, [family.encode(item) for item in items], prefix="shared" if family.shares_prefix else "separate")
    with torch.no_grad():
        plain, mine = (response_hidden(run_backbone(family.unwrapped, each).last_hidden_state, each) for each in (alone, batch))
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("item", [pairs(1)[0], Sample("a picture", (picture(3),), "describe the image")])
def test_asking_about_a_picture_reads_it_once(item, monkeypatch):
    family = llava()
    words, rows = some_words(family), []
    run = questions.run_backbone
    monkeypatch.setattr(questions, "run_backbone", lambda model, batch: rows.append(len(batch["parts"])) or run(model, batch))
    found = ask(family, [item, item], [QUESTIONS, QUESTIONS[:1]], words=words)
    expected = [margin(asked_alone(family, item, question), words) for question in QUESTIONS]
    assert rows == [2]
    torch.testing.assert_close(torch.cat(found), torch.stack([*expected, expected[0]]), rtol=1e-5, atol=1e-5)


def test_a_question_follows_the_system_message_but_no_other_turn():
    family = llava()
    turns = (Turn("system", "a red square"), Turn("user", "a dog"), Turn("assistant", "a cup"))
    pair = replace(pairs(1)[0], history=turns)
    text = family.prompt_text(QUESTIONS[0], 1, history=turns[:1])
    inputs = family.process([[image.open() for image in pair.images]], [text])
    (question,) = with_questions(family, pair, family.encode(pair), QUESTIONS[:1]).questions
    assert family.encode(pair).prompt_ids[: question.hangs_at] + question.ids == inputs["input_ids"][0].tolist()


def test_tokens_of_yes_and_no_are_first_tokens_that_tell_them_apart():
    family = llava()
    tokens = YesNo.of(family, yes=["a cat", "no cat"], no=["the dog", "no dog"])
    pieces = [[family.tokenizer.decode([token]).strip() for token in side] for side in (tokens.yes, tokens.no)]
    assert set(pieces[0]) == {"a"} and all(piece and "the".startswith(piece) for piece in pieces[1])
    with pytest.raises(UserError, match=r"no token tells yes=\['a cat'\] from no=\['a dog'\]"):
        YesNo.of(family, yes=["a cat"], no=["a dog"])


def asked_of(pair):
    """A question that all pairs share, and one of their own."""
    return [QUESTIONS[0], f"is there {pair.chosen}"]


def test_signals_read_the_answers_to_questions_beside_the_pairs(data, tmp_path, monkeypatch):
    family = llava()
    words = some_words(family)
    signal = lambda evidence: torch.stack(list(evidence.answers(words).values())).sum().expand(len(evidence.token_ids))
    monkeypatch.setattr(scoring.registry, "load", lambda kind, name: signal)
    options = settings(["patch_logit"])
    store = score_pairs(data, family, tmp_path / "asked", options, ask=asked_of, progress=False, dataloader_num_workers=0)
    for pair in data:
        expected = sum(float(margin(asked_alone(family, pair, text), words)) for text in {*asked_of(pair)})
        for side in SIDES:
            found = store.get(pair.id, side)
            assert found.signals["patch_logit"] == pytest.approx(expected, abs=1e-5)
            logps = plain_logps(family, family.encode(pair), side)
            np.testing.assert_allclose(found.logps, logps, atol=1e-5)


def test_a_leaf_sees_the_prompt_up_to_where_it_hangs_and_itself():
    rows = [[(0, 4, 4), (4, 6, 4), (6, 8, 2)], [(0, 3, 3), (3, 5, 3)]]
    layout = packed.layout_of(rows)
    expected = torch.eye(9, dtype=torch.bool).repeat(2, 1, 1)  # padding sees itself
    for number, ((_, prompt, _), *leaves) in enumerate(rows):
        expected[number, :prompt, :prompt] = torch.ones(prompt, prompt).tril().bool()
        for begin, end, hang in leaves:
            expected[number, begin:end, :hang] = True
            expected[number, begin:end, begin:end] = torch.ones(end - begin, end - begin).tril().bool()
    assert torch.equal(packed.visible(layout, 9), expected)
    row, place = torch.arange(2), torch.arange(9)
    flex = packed.block_mask(layout, 9).mask_mod(row[:, None, None], row[0], place[:, None], place)
    assert torch.equal(flex, expected)
