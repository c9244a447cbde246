"""Views of a picture: what they do, when their randomness changes, and that a packed row under a view equals it alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from catpo.core.errors import UserError
from catpo.core.types import SIDES
from catpo.models.packing import hidden_and_logps, unflatten
from catpo.models.views import VIEWS, View, kept_signal
from catpo.training.pair_stats import Quantity
from catpo.training.view_passes import ViewPasses
from family_checks import plain_outputs, sized_pair
from tiny import llava, pairs
from tiny_families import BUILDERS, build


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def image(value=None, size=(40, 30)):
    return torch.rand(3, *size, generator=generator()) if value is None else torch.full((3, *size), value)


# ---- the pictures ---------------------------------------------------------------------------------------------------------


def test_noise_follows_the_diffusion_schedule():
    kept = 1.0
    for step in range(1000):
        x = -6 + 12 * step / 999
        kept *= 1 - (1 / (1 + math.exp(-x)) * (0.005 - 1e-5) + 1e-5)
        if step in (100, 300, 500, 600, 700, 800, 999):
            assert kept_signal(step) == pytest.approx(kept, abs=1e-9)
    assert [round(kept_signal(step), 6) for step in (100, 500, 800, 999)] == [0.996589, 0.744799, 0.218102, 0.081249]


def test_noise_mixes_the_picture_with_gaussian_noise():
    grey = torch.full((3, 200, 200), 0.5, dtype=torch.float64)
    shown = View.of("noised(step=500, space='pixels')")(grey, generator())
    assert shown.mean().item() == pytest.approx(0.5 * 0.8630, abs=0.005)
    assert shown.std().item() == pytest.approx(0.5052, abs=0.005)


def test_noise_does_not_wrap_around_unless_asked_to():
    shown = View.of("noised(step=500)")(image(), generator())
    wrapped = View.of("noised(step=500, wrap=True)")(image(), generator())
    free = View.of("noised(step=500, space='pixels')")(image(), generator())
    outside = (free < 0) | (free > 1)
    assert 0.3 < outside.float().mean() < 0.45  # about 38 % of a uniform picture's values
    assert set(shown[outside].tolist()) == {0.0, 1.0}
    for value, found in zip(free.flatten().tolist(), wrapped.flatten().tolist(), strict=True):
        assert found == pytest.approx(math.trunc(value * 255) % 256 / 255, abs=1 / 255)
    assert wrapped.min() >= 0 and wrapped.max() <= 1


@pytest.mark.parametrize("seed", range(3))
def test_a_crop_is_a_small_part_at_full_size(seed):
    height, width = 60, 80
    rows = torch.arange(height, dtype=torch.float32)[:, None].expand(height, width) / height
    columns = torch.arange(width, dtype=torch.float32)[None].expand(height, width) / width
    shown = View.of("cropped")(torch.stack([rows, columns, rows]), generator(seed))
    assert shown.shape == (3, height, width)
    area = float((shown[0].max() - shown[0].min()) * (shown[1].max() - shown[1].min()))
    assert area < 0.21
    whole = View.of("cropped(smallest=1.0, largest=1.0)")(torch.stack([rows, columns, rows]), generator(seed))
    assert float(whole[0].max() - whole[0].min()) > 0.8


@pytest.mark.parametrize("share, patch", [(0.3, 1), (0.5, 14), (1.0, 7)])
def test_a_mask_hides_its_share_of_squares(share, patch):
    shown = View.of(f"masked(share={share}, patch={patch})")(image(1.0, (70, 56)), generator())
    assert (shown == 0).float().mean().item() == pytest.approx(share, abs=0.02)
    squares = shown[0].unfold(0, patch, patch).unfold(1, patch, patch).flatten(2)
    assert ((squares == squares[..., :1]).all(-1)).all()


def test_a_mask_of_squares_larger_than_the_picture_hides_all_or_nothing():
    assert (View.of("masked(share=1.0, patch=1000000)")(image(1.0), generator()) == 0).all()
    assert (View.of("masked(share=0.4, patch=1000000)")(image(1.0), generator()) == 1).all()


def test_black_is_black_and_blank_is_zero_after_normalisation():
    shown = View.of("black").of_picture(Image.new("RGB", (8, 6), "red"), generator())
    assert shown.size == (8, 6) and np.array(shown).max() == 0
    pixels = View.of("blank").of_pixels({"pixel_values": image()[None], "image_grid_thw": torch.ones(1, 3).long()}, generator())
    assert pixels["pixel_values"].abs().max() <= 1e-6 and pixels["image_grid_thw"].sum() == 3


def test_a_draw_depends_on_seed_epoch_pair_and_number_and_on_nothing_else():
    noised, other = View.of("noised(step=500)"), View.of("noised(step=500, draw=1)")
    draw = lambda view, *seed: view(image(), view.generator(*seed)).sum().item()
    assert draw(noised, 0, 0, "a") == draw(View.of("noised(step=500)"), 0, 0, "a")
    assert len({draw(noised, 0, 0, "a"), draw(noised, 0, 1, "a"), draw(noised, 1, 0, "a"), draw(noised, 0, 0, "b"),
                draw(other, 0, 0, "a")}) == 5  # fmt: skip


@pytest.mark.parametrize("text, message", [
    ("nosed", "Did you mean 'noised'"), ("noised(steps=3)", "Did you mean 'step'"), ("noised(step=0.5)", "whole number"),
    ("noised(space='latent')", "space must be"),
])  # fmt: skip
def test_an_unknown_view_or_option_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        View.of(text)


@pytest.mark.parametrize("text, message", [
    ("noised(step=1000)", "from 0 to 999"), ("masked(share=0.0)", "share must lie"),
    ("cropped(smallest=0.5, largest=0.1)", "shares"), ("perturbed(share=5.0)", "share of the tokens"),
    ("perturbed(picture='noised(step=1000)')", "from 0 to 999"),
])  # fmt: skip
def test_an_impossible_value_is_refused_before_any_picture_is_shown(text, message):
    with pytest.raises(UserError, match=message):
        View.of(text)


# ---- rows of a batch ------------------------------------------------------------------------------------------------------


def passes_of(family, views, sides=SIDES, others=()):
    needs = frozenset(Quantity("policy_logps", side, view) for view in views for side in sides)
    return ViewPasses(family, needs, others=others)


@torch.no_grad()
def rows_logps(family, rows):
    return unflatten(hidden_and_logps(family.unwrapped, rows)[1], rows)


ROW_VIEWS = ["noised(step=500)", "noised(step=500, space='pixels')", "blank", "cropped", "another", "none"]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("llava", "qwen2_5_vl") else pytest.mark.slow) for name in BUILDERS
])  # fmt: skip
def test_a_row_under_a_view_equals_that_view_alone(name):
    """For every family: log-probs of the packed rows against plain eager rows of the corrupted pair."""
    family = build(name)
    given = [sized_pair(number) for number in range(3)]
    encoded = [family.encode(each) for each in given]
    passes = passes_of(family, ROW_VIEWS, others=given)
    batch = passes(given, encoded)["views"]
    last = None
    for text in ROW_VIEWS:
        logps = rows_logps(family, batch[text])
        for row, (pair, clean) in enumerate(zip(given, encoded, strict=True)):
            alone, _ = passes.show(View.of(text), pair, clean)
            for number, side in enumerate(SIDES):
                expected, _ = plain_outputs(family, alone, side)
                torch.testing.assert_close(logps[row, number, : len(expected)], expected, atol=2e-4, rtol=0)
        assert last is None or not torch.allclose(logps, last, atol=1e-3), text
        last = logps


@pytest.fixture(scope="module")
def family():
    return llava()


@pytest.fixture(scope="module")
def given(family):
    """Pairs and their encodings."""
    return pairs(3), [family.encode(pair) for pair in pairs(3)]


def test_a_row_holds_only_the_sides_that_are_read(family, given):
    both = passes_of(family, ["blank"])(*given)["views"]["blank"]
    chosen = passes_of(family, ["blank"], sides=("chosen",))(*given)["views"]["blank"]
    assert chosen["mask"].shape == both["mask"].shape and not chosen["mask"][:, 1].any()
    assert chosen["model_inputs"]["input_ids"].shape[1] < both["model_inputs"]["input_ids"].shape[1]
    torch.testing.assert_close(rows_logps(family, chosen)[:, 0], rows_logps(family, both)[:, 0], atol=1e-5, rtol=0)


def test_a_draw_does_not_depend_on_the_batch_and_changes_every_epoch(family, given):
    passes = passes_of(family, ["noised"])

    def pixels(part):
        return passes(given[0][part], given[1][part])["views"]["noised"]["model_inputs"]["pixel_values"]

    before = pixels(slice(3))
    assert torch.equal(before[1], pixels(slice(1, 2))[0])
    passes.epoch = 1
    assert not torch.equal(before[0], pixels(slice(1))[0])


def test_another_picture_has_to_exist(family, given):
    alone, encoded = given[0][:1], given[1][:1]
    with pytest.raises(UserError, match=f"pair {alone[0].id}: no other pair has another picture"):
        passes_of(family, ["another"], others=alone)(alone, encoded)


def test_a_perturbed_text_keeps_special_tokens_and_masks_replaced_ones(family, given):
    text, both = "perturbed(share=0.5)", "perturbed(share=0.5, picture='noised(step=500)')"
    needs = frozenset(Quantity(name, "chosen", view) for view in (text, both) for name in ("policy_logps", "mask"))
    views = ViewPasses(family, needs)(*given)["views"]
    plain = passes_of(family, ["blank"], sides=("chosen",))(*given)["views"]["blank"]
    before, after = plain["model_inputs"]["input_ids"], views[text]["model_inputs"]["input_ids"]
    is_image = before == family.image_token_id
    assert torch.equal(is_image, after == family.image_token_id)
    assert 0.2 < (before != after)[~is_image].float().mean() < 0.7
    for pair in range(3):
        end = int(plain["mask"][pair, 0].sum()) - 1
        for token in range(end + 1):
            is_same = views[text]["token_ids"][pair, 0, token] == plain["token_ids"][pair, 0, token]
            assert is_same or not views[text]["mask"][pair, 0, token]
        assert views[text]["mask"][pair, 0, end] and views[text]["token_ids"][pair, 0, end] == family.eos_token_id
    assert torch.equal(after, views[both]["model_inputs"]["input_ids"])
    assert not torch.equal(views[text]["model_inputs"]["pixel_values"], views[both]["model_inputs"]["pixel_values"])


def test_every_view_is_listed_with_a_description():
    assert set(VIEWS) >= {"noised", "blank", "black", "cropped", "masked", "another", "none"}
    assert all(view.__doc__ for view in VIEWS.values())
