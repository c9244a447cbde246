"""One row per pair against separate rows, padding, batch order; and what the collator refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from catpo.core.errors import UserError
from catpo.core.types import SIDES
from catpo.models.output_head import token_stats
from catpo.models.packing import pack, response_hidden, run_backbone, unflatten
from catpo.training.pair_forward import add_pair_forward
from tiny import llava, pair, pairs, picture, tokenizer


@pytest.fixture(scope="module")
def family():
    return llava()


def logps(family, encoded, **options):
    """log p of every response token, [pairs, 2, tokens]."""
    batch = pack(family, encoded, **options)
    with torch.no_grad():
        hidden = response_hidden(run_backbone(family.unwrapped, batch).last_hidden_state, batch)
        return unflatten(token_stats(hidden, family.head, batch["flat_ids"]).logps, batch)


def plain_logps(family, encoded, side):
    """The same from a plain forward of prompt and one response, with whole logits."""
    ids = torch.tensor([encoded.prompt_ids + encoded.response_ids[side]])
    with torch.no_grad():
        logits = family.unwrapped(input_ids=ids, **encoded.pixels).logits[0]
    start = len(encoded.prompt_ids)
    return logits.log_softmax(-1)[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]


@pytest.mark.parametrize("prefix", ["shared", "separate"])
def test_every_layout_gives_the_plain_forwards_logps(family, prefix):
    encoded = [family.encode(item) for item in pairs(4)]
    values = logps(family, encoded, prefix=prefix)
    for index, item in enumerate(encoded):
        for side_index, side in enumerate(SIDES):
            expected = plain_logps(family, item, side)
            torch.testing.assert_close(values[index, side_index, : len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_a_copy_that_takes_pairs_runs_its_own_weights():
    model = llava().unwrapped
    add_pair_forward(model)
    other = copy.deepcopy(model)
    ids = torch.tensor([[1, 9, 10]])
    before = other(input_ids=ids).logits
    with torch.no_grad():
        model.lm_head.weight += 1
    assert torch.equal(other(input_ids=ids).logits, before) and not torch.equal(model(input_ids=ids).logits, before)


def test_the_gradient_through_the_shared_prefix_equals_that_of_separate_rows(family):
    encoded = [family.encode(item) for item in pairs(2)]
    gradients = []
    for prefix in ("shared", "separate"):
        batch = pack(family, encoded, prefix=prefix)
        hidden = response_hidden(run_backbone(family.unwrapped, batch).last_hidden_state, batch)
        stats = token_stats(hidden, family.head, batch["token_ids"][batch["mask"]])
        loss = (unflatten(stats.logps, batch) * torch.tensor([1.0, -0.5])[:, None]).sum()
        parameters = [p for name, p in family.unwrapped.named_parameters() if "language_model" in name or "projector" in name]
        gradients.append(torch.autograd.grad(loss, parameters))
    for shared, separate in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, separate, rtol=1e-4, atol=1e-5 * float(separate.abs().max() + 1))


def test_batch_of_pairs_equals_one_by_one_in_any_order(family):
    encoded = [family.encode(item) for item in pairs(4)]
    together = logps(family, encoded)
    for number in (2, 0, 3, 1):
        alone = logps(family, [encoded[number]])[0]
        torch.testing.assert_close(together[number, :, : alone.shape[1]], alone, rtol=1e-5, atol=1e-5)


def test_the_rejected_response_does_not_see_the_chosen_one(family):
    first = family.encode(pair(0, "a cat", "a red square and a dog"))
    other = family.encode(pair(0, "two people riding a horse on a beach", "a red square and a dog"))
    torch.testing.assert_close(logps(family, [first])[0, 1, :5], logps(family, [other])[0, 1, :5], rtol=1e-5, atol=1e-5)


def test_response_ids_are_those_the_model_would_generate(family):
    encoded = family.encode(pair(0, "a red square", "a cat"))
    assert family.tokenizer.decode(encoded.response_ids["chosen"]) == " a red square</s>"  # the template's own space
    assert encoded.response_ids["chosen"][-1] == family.eos_token_id
    full = family.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe the image"}]},
         {"role": "assistant", "content": "a red square"}], tokenize=False,
    )  # fmt: skip
    whole = family.process([pair(0).images], [full])["input_ids"][0].tolist()
    assert whole == encoded.prompt_ids + encoded.response_ids["chosen"]


def test_pieces_join_to_the_response(family):
    text = "a café with 猫 cats"
    ids = family.response_ids("assistant:", text)
    assert "".join(family.pieces(ids[:-1])) == " " + text


def sentencepiece(decoder) -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's: a space is part of the word after it, and unknown characters are spelled in bytes."""
    unigrams = [("<unk>", 0.0), ("▁", -3.0), ("▁a", -2.0), ("▁cat", -2.0), ("a", -3.0), ("s", -3.0), (".", -3.0)]
    unigrams += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokens = Tokenizer(models.Unigram(unigrams, unk_id=0, byte_fallback=True))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


LLAMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
TOKENIZERS = {"byte-level": tokenizer, "llama": lambda: sentencepiece(LLAMA), "gemma": lambda: sentencepiece(GEMMA)}


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.sampled_from(["a", "cat", "cats.", "", " ", "café", "猫が", "🙂👍🏽", "\n", "e\u0301", "\ufffd", "\x00"]))
)
def test_pieces_are_what_each_token_adds_to_the_whole_text(family, make, words):
    reader = copy.copy(family)
    reader.processor = copy.copy(family.processor)
    reader.processor.tokenizer = tokens = make()
    ids = tokens(" ".join(words), add_special_tokens=False)["input_ids"]
    expected, done = [], ""
    for end in range(1, len(ids) + 1):
        so_far = tokens.decode(ids[:end])
        is_split = so_far.endswith("\ufffd")
        expected.append("" if is_split else so_far[len(done) :])
        done = done if is_split else so_far
    assert reader.pieces(ids) == expected


def test_pieces_of_twice_as_many_tokens_decode_twice_as_many(family, monkeypatch):
    decoded, decode = [], family.tokenizer.decode
    monkeypatch.setattr(family.tokenizer, "decode", lambda ids, **options: decoded.append(len(ids)) or decode(ids, **options))
    ids = family.token_ids("a cat on a café table " * 40)
    family.pieces(ids)
    once = sum(decoded)
    decoded.clear()
    family.pieces(ids * 2)
    assert sum(decoded) <= 2 * once + 4


def test_patches_stand_where_the_placeholders_are(family):
    encoded = family.encode(pair(0))
    assert [(grid.rows, grid.columns) for grid in encoded.grids] == [(4, 4)] and len(encoded.patches) == 16
    assert {encoded.prompt_ids[position] for position in encoded.patches} == {family.image_token_id}


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_response_with_the_image_placeholder_is_refused(family, field):
    bad = replace(pair(0), **{field: "a <image> cat"})
    with pytest.raises(UserError, match=f"pair {bad.id}.*{field} response holds the special token '<image>'"):
        family.encode(bad)


def test_a_pair_that_would_be_truncated_is_refused(family):
    length = family.encode(pair(0)).length
    with pytest.raises(UserError, match=r"16 of them image tokens.*max_length=20"):
        family.encode(pair(0), max_length=20)
    assert family.encode(pair(0), max_length=length).length == length


def test_several_pictures_stand_in_one_prompt(family):
    two = replace(pair(0), images=(picture(1), picture(2)))
    encoded = family.encode(two)
    assert [grid.picture for grid in encoded.grids] == [0, 1] and len(encoded.patches) == 32
    values, expected = logps(family, [encoded, encoded])[1, 1], plain_logps(family, encoded, "rejected")
    torch.testing.assert_close(values[: len(expected)], expected, rtol=1e-5, atol=1e-5)
