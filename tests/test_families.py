"""Every family against eager attention and whole logits, with one row per response and one pair at a time."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.types import PatchGrid
from catpo.models.family_check import check_family
from family_checks import SIZES, difference_from_plain, greedy_surprise, plain_outputs, sized_pair
from tiny import as_picture
from tiny_families import BUILDERS, build

EVERY = list(BUILDERS)
MANY_PICTURES = [name for name in EVERY if not name.startswith("paligemma")]


@pytest.fixture(scope="module")
def family():
    """Families by name, built once."""

    @functools.cache
    def get(name, sharp=12.0):
        family = build(name, sharp=sharp)
        check_family(family, sized_pair(0), range(3))
        return family

    return get


def test_every_family_is_tested():
    assert set(registry.names("families")) - {"generic"} - {"fast_vlm"} <= set(EVERY)


@pytest.mark.parametrize("prefix", ["shared", "separate"])
@pytest.mark.parametrize("name", EVERY)
def test_a_batch_equals_plain_eager_rows(family, name, prefix):
    """Pictures of different sizes and responses of different lengths in one batch; attention and log-probs."""
    logps, attention = difference_from_plain(family(name, sharp=1.0), [sized_pair(number) for number in range(3)], prefix)
    assert logps < 2e-5 and attention < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_sharp_attention_is_recorded_as_eager_computes_it(family, name):
    logps, attention = difference_from_plain(family(name, sharp=200.0), [sized_pair(0), sized_pair(1)], "shared")
    assert attention < 1e-4 and logps < 1e-3


@pytest.mark.parametrize("name", MANY_PICTURES)
def test_a_prompt_may_have_several_pictures(family, name):
    ours = family(name)
    logps, attention = difference_from_plain(ours, [sized_pair(0, pictures=2), sized_pair(1)], "shared")
    assert logps < 1e-4 and attention < 1e-4
    assert {grid.picture for grid in ours.encode(sized_pair(0, pictures=2)).grids} == {0, 1}


@pytest.mark.parametrize("name", EVERY)
def test_greedy_tokens_are_the_likeliest_when_teacher_forced(family, name):
    """So prompt, picture, masks and positions are those of `generate`."""
    assert greedy_surprise(family(name), sized_pair(0)) < 1e-4


@pytest.mark.parametrize("name", MANY_PICTURES)
def test_response_tokens_are_those_of_the_whole_conversation(family, name):
    """The chat template around question and answer, tokenised at once, has the prompt's and the response's tokens."""
    ours, one = family(name), sized_pair(0)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": one.chosen}]},
    ]
    encoded = ours.encode(one)
    whole = ours.process([one.images], [ours.processor.apply_chat_template(turns, tokenize=False)])["input_ids"][0].tolist()
    together = [*encoded.prompt_ids, *encoded.response_ids["chosen"]]
    assert whole[: len(together)] == together
    assert together[-1] == ours.eos_token_id and ours.eos_token_id not in together[len(encoded.prompt_ids) : -1]
    assert "".join(ours.pieces(encoded.response_ids["chosen"][:-1])).strip() == one.chosen


@pytest.mark.parametrize("name", EVERY)
def test_a_prompt_begins_with_one_bos_token(family, name):
    ours = family(name)
    ids = ours.encode(sized_pair(0)).prompt_ids
    assert ids.count(ours.tokenizer.bos_token_id) == (0 if ours.tokenizer.bos_token is None else 1)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("name", EVERY)
def test_a_text_with_an_image_or_end_token_is_refused(family, name, field):
    ours, one = family(name), sized_pair(0)
    for special in (ours.tokenizer.convert_ids_to_tokens(ours.image_token_id), ours.tokenizer.eos_token):
        with pytest.raises(UserError, match=f"pair {one.id}.*(special token|stands in the prompt twice)"):
            ours.encode(replace(one, **{field: f"a {special} or {special} cat"}))  # one <image> is the picture's place


@pytest.mark.parametrize("name", EVERY)
def test_lora_targets_are_all_linear_layers_of_the_decoder_and_no_other(family, name):
    ours = family(name)
    modules = dict(ours.unwrapped.named_modules())
    matched = {name for name in modules if re.fullmatch(ours.lora_targets, name)}
    inside = {id(module) for module in ours.decoder.modules()}
    linear = {name for name, module in modules.items() if id(module) in inside and isinstance(module, torch.nn.Linear)}
    assert matched == linear and len(matched) >= 21  # 7 in each of 3 layers


def test_a_pair_longer_than_the_window_of_paligemma_2_is_refused(family):
    long = replace(sized_pair(0), chosen="a cat and a dog " * 30)
    with pytest.raises(UserError, match="sliding window"):
        difference_from_plain(family("paligemma2"), [long], "shared")


def test_idefics3_without_tiles_has_one_grid():
    ours = build("idefics3")
    ours.processor.image_processor.do_image_splitting = False
    assert ours.encode(sized_pair(0)).grids == [PatchGrid(0, 2, 2)]
    logps, attention = difference_from_plain(ours, [sized_pair(0), sized_pair(1, pictures=2)], "shared")
    assert logps < 1e-4 and attention < 1e-4


# ---- models without a family of their own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name, shares_prefix", [("vipllava", True), ("aya_vision", True), ("glm4v", False)])
def test_an_unknown_model_is_compared_with_eager_attention_and_then_used(name, shares_prefix):
    """GLM-4V has positions in three axes that only the model itself knows: it gets two rows."""
    ours = build(name)
    assert ours.needs_check
    check_family(ours, sized_pair(0), range(3))
    assert not ours.needs_check and ours.shares_prefix == shares_prefix
    prefix = "shared" if shares_prefix else "separate"
    logps, attention = difference_from_plain(ours, [sized_pair(number) for number in range(3)], prefix)
    assert logps < 1e-4 and attention < 1e-4
    assert greedy_surprise(ours, sized_pair(0)) < 1e-4


def test_layers_without_attention_are_named_and_others_can_be_scored():
    ours = build("lfm2_vl")  # its first layer is a convolution
    with pytest.raises(UserError, match=r"layers \[0\] return no attention maps.*layers=\[1, 2\]"):
        check_family(ours, sized_pair(0), range(3))
    check_family(ours, sized_pair(0), [1, 2])
    assert not ours.shares_prefix  # the convolution would see the other response


def blind(family):
    """Image tokens carry no picture."""
    family.backbone.multi_modal_projector.linear_2.weight.data.zero_()


def scale_in_eager_only(family):
    """As some models apply soft caps: fused attention does not do it."""
    attention = family.decoder.layers[1].self_attn
    plain = attention.forward

    def forward(*arguments, **options):
        attention.scaling = 0.5 if attention.config._attn_implementation == "eager" else 0.25
        return plain(*arguments, **options)

    attention.forward = forward


def halve_logits(family):
    plain = family.unwrapped.forward

    def forward(*arguments, **options):
        output = plain(*arguments, **options)
        output.logits = output.logits * 0.5
        return output

    family.unwrapped.forward = forward


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("mllama", lambda family: None, "type 'mllama'.*no family of its own"),  # sees the picture in cross-attention
        ("vipllava", blind, "do not carry the picture"),
        ("vipllava", scale_in_eager_only, "attention to the picture cannot be read: .* off the plain forward|log-probs cannot"),
        ("vipllava", halve_logits, "log-probs cannot be read"),
    ],
)
def test_an_unknown_model_that_cannot_be_read_is_refused(name, change, message):
    ours = build(name)
    change(ours)
    with pytest.raises(UserError, match=message):
        check_family(ours, sized_pair(0), range(3))


# ---- where the patches are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_patches_lie_where_the_picture_changes(name):
    """Noise in one corner of the picture changes the features of that corner's patches only, in every grid that shows it."""
    ours = build(name)
    for part in ours.frozen_parts():  # without attention in the vision tower, a feature shows its own patch only
        for parameter_name, parameter in part.named_parameters():
            if re.search(r"(attn|attention).*(out_proj|o_proj|\.proj\.|projection_layer)", parameter_name):
                parameter.data.zero_()
    for size in SIZES:
        for corner in [(0.0, 0.0), (0.6, 0.6)]:
            drawn = [as_picture(pixels, "drawn") for pixels in pictures(size, corner)]
            encoded, noisy = (ours.encode(replace(sized_pair(0), images=(image,))) for image in drawn)
            change = (features(ours, noisy) - features(ours, encoded)).norm(dim=1).numpy()
            start = 0
            for grid in encoded.grids:
                part = change[start : start + grid.size]
                start += grid.size
                shown = np.array([covered(grid, *divmod(patch, grid.columns), corner) for patch in range(grid.size)])
                if shown.max() > 0.5:
                    assert shown[part.argmax()] > 0, f"{size}: {grid} changed most at {part.argmax()}"
                    assert part[shown == 0].max(initial=0) < 0.5 * part.max(), f"{size}: {grid} changed elsewhere: {part}"
    assert start == len(change)


def pictures(size, corner, share=0.4):
    """A grey picture, and the same with noise in a corner."""
    grey = np.full((size[1], size[0], 3), 128, dtype=np.uint8)
    noisy = grey.copy()
    left, top = (int(at * side) for at, side in zip(corner, size, strict=True))
    part = noisy[top : top + int(share * size[1]), left : left + int(share * size[0])]
    part[:] = np.random.default_rng(0).choice([0, 255], part.shape)
    return grey, noisy


def features(family, encoded):
    """Patch features as they enter the language model, [patches, width]."""
    with family.decoder_inputs() as taken:
        plain_outputs(family, encoded, "chosen")
    return taken["embeddings"][0, encoded.patches]


def covered(grid, row, column, corner, share=0.4):
    """Share of a patch's area that lies in the corner."""
    left, top, right, bottom = grid.box
    spans = [(left, right, column, grid.columns, corner[0]), (top, bottom, row, grid.rows, corner[1])]
    area = 1.0
    for low, high, place, count, begin in spans:
        step = (high - low) / count
        first = low + place * step
        area *= max(0.0, min(first + step, begin + share) - max(first, begin)) / step
    return area
