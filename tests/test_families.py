"""Every family against the plain way: eager attention, whole logits, a row per response, one pair at a time."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_checks import SIZES, difference_from_plain, greedy_surprise, plain_outputs, sized_pair
from PIL import Image
from tiny_families import BUILDERS, build

from catpo import registry
from catpo.errors import UserError
from catpo.families._base import load
from catpo.selfcheck import check_family
from catpo.types import Picture, Sample

EVERY = list(BUILDERS)
MANY_PICTURES = [name for name in EVERY if name != "paligemma"]


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


@pytest.mark.parametrize("name", EVERY)
def test_padding_on_the_left_changes_nothing(family, name):
    logps, attention = difference_from_plain(family(name), [sized_pair(0), sized_pair(1)], "shared", side="left")
    assert logps < 1e-4 and attention < 1e-4


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
    taken = {}
    handle = family.decoder.register_forward_pre_hook(
        lambda module, arguments, options: taken.update(options), with_kwargs=True
    )
    with torch.no_grad():
        plain_outputs(family, encoded, "chosen")
    handle.remove()
    return taken["inputs_embeds"][0, encoded.patches]


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
