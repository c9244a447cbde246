"""Every family against the plain way: eager attention, whole logits, a row per response, one pair at a time."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.types import PatchGrid, Picture
from catpo.models.family_check import check_family
from family_checks import SIZES, difference_from_plain, greedy_surprise, plain_outputs, sized_pair
from tiny_families import BUILDERS, build

EVERY = list(BUILDERS)
MANY_PICTURES = [name for name in EVERY if not name.startswith("paligemma")]


@pytest.fixture(scope="module")
def family():
    """Families by name, built once."""
    made = {}

    def get(name, sharp=12.0):
        if (name, sharp) not in made:
            made[name, sharp] = build(name, sharp=sharp)
            check_family(made[name, sharp], sized_pair(0), range(3))
        return made[name, sharp]

    return get


def test_every_family_is_tested():
    assert set(registry.names("families")) - {"generic"} - {"fast_vlm"} <= set(EVERY)


@pytest.mark.parametrize("prefix", ["shared", "separate"])
@pytest.mark.parametrize("name", EVERY)
def test_a_batch_equals_plain_eager_rows(family, name, prefix):
    """Pictures of other sizes and responses of other lengths in one batch; attention and log-probs."""
    logps, attention = difference_from_plain(family(name, sharp=1.0), [sized_pair(number) for number in range(3)], prefix)
    assert logps < 2e-5 and attention < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_sharp_attention_is_recorded_as_eager_computes_it(family, name):
    logps, attention = difference_from_plain(family(name, sharp=200.0), [sized_pair(0), sized_pair(1)], "shared")
    assert attention < 1e-4 and logps < 1e-3


@pytest.mark.parametrize("name", MANY_PICTURES)
def test_several_pictures_stand_in_one_prompt(family, name):
    """In one batch with a pair of one picture."""
    ours = family(name)
    logps, attention = difference_from_plain(ours, [sized_pair(0, pictures=2), sized_pair(1)], "shared")
    assert logps < 1e-4 and attention < 1e-4
    assert {grid.picture for grid in ours.encode(sized_pair(0, pictures=2)).grids} == {0, 1}


@pytest.mark.parametrize("name", EVERY)
def test_teacher_forcing_sees_what_generation_saw(family, name):
    """Prompt, picture, masks and positions are those of `generate`: its greedy tokens are the likeliest."""
    assert greedy_surprise(family(name), sized_pair(0)) < 1e-4


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("paligemma")])
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
        with pytest.raises(UserError, match=f"pair {one.id}.*special token"):
            ours.encode(replace(one, **{field: f"a {special} cat"}))


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


def test_layers_without_attention_are_named_and_others_can_be_chosen():
    ours = build("lfm2_vl")  # its first layer is a convolution
    with pytest.raises(UserError, match=r"layers \[0\] return no attention maps.*layers=\[1, 2\]"):
        check_family(ours, sized_pair(0), range(3))
    check_family(ours, sized_pair(0), [1, 2])
    assert not ours.shares_prefix  # the convolution would see the other response


def test_a_model_that_looks_at_the_picture_elsewhere_is_refused():
    with pytest.raises(UserError, match="type 'mllama'.*no family of its own"):
        check_family(build("mllama"), sized_pair(0), range(3))


def test_image_tokens_that_carry_no_picture_are_refused():
    ours = build("vipllava")
    ours.backbone.multi_modal_projector.linear_2.weight.data.zero_()
    with pytest.raises(UserError, match="do not carry the picture"):
        check_family(ours, sized_pair(0), range(3))


def test_an_unknown_model_whose_attention_is_not_what_it_seems_is_refused():
    """A layer that scales its scores in eager attention only, as soft caps are: fused attention does not know."""
    ours = build("vipllava")
    attention = ours.decoder.layers[1].self_attn
    plain = attention.forward

    def forward(*arguments, **options):
        attention.scaling = 0.5 if attention.config._attn_implementation == "eager" else 0.25
        return plain(*arguments, **options)

    attention.forward = forward
    with pytest.raises(UserError, match="attention to the picture cannot be read: .* off the plain forward|log-probs cannot"):
        check_family(ours, sized_pair(0), range(3))


def test_an_unknown_model_with_a_head_of_its_own_making_is_refused():
    ours = build("vipllava")
    plain = ours.unwrapped.forward

    def forward(*arguments, **options):
        output = plain(*arguments, **options)
        output.logits = output.logits * 0.5
        return output

    ours.unwrapped.forward = forward
    with pytest.raises(UserError, match="log-probs cannot be read"):
        check_family(ours, sized_pair(0), range(3))


# ---- where the patches are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_patches_lie_where_the_picture_changes(name):
    """Noise in one corner of the picture changes the features of that corner's patches only, in every grid that shows it.

    Vision layers are kept from mixing patches, so that a feature shows its own place.
    """
    ours = build(name)
    for part in ours.frozen_parts():
        for each, parameter in part.named_parameters():
            if re.search(r"attn|attention", each) and re.search(r"out_proj|o_proj|\.proj\.|projection_layer", each):
                parameter.data.zero_()
    for size in SIZES:
        for corner in [(0.0, 0.0), (0.6, 0.6)]:
            plain, changed = (as_pair(image) for image in pictures(size, corner))
            encoded = ours.encode(plain)
            change = (features(ours, ours.encode(changed)) - features(ours, encoded)).norm(dim=1).numpy()
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


def as_pair(pixels):
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return replace(sized_pair(0), images=(Picture(data=buffer.getvalue(), name="drawn"),))


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
