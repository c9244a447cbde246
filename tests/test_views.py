"""Views of a picture: what they do to it, when they are drawn anew, and that a packed row of one equals that view alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from catpo.core.errors import UserError
from catpo.core.types import SIDES
from catpo.models.output_head import token_stats
from catpo.models.packing import response_hidden, run_backbone, unflatten
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


@pytest.mark.parametrize("seed", range(5))
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
def test_unknown_views_are_answered(text, message):
    with pytest.raises(UserError, match=message):
        View.of(text)


@pytest.mark.parametrize("text, message", [
    ("noised(step=1000)", "from 0 to 999"), ("masked(share=0.0)", "share must lie"),
    ("cropped(smallest=0.5, largest=0.1)", "shares"),
])  # fmt: skip
def test_impossible_options_are_answered(text, message):
    with pytest.raises(UserError, match=message):
        View.of(text)(image(), generator())


# ---- rows of a batch ------------------------------------------------------------------------------------------------------


def readings_of(family, views, sides=SIDES, others=()):
    needs = frozenset(Quantity("policy_logps", side, view) for view in views for side in sides)
    return ViewPasses(family, needs, others=others)


@torch.no_grad()
def rows_logps(family, rows):
    hidden = response_hidden(run_backbone(family.unwrapped, rows).last_hidden_state, rows)
    return unflatten(token_stats(hidden, family.head, rows["token_ids"][rows["mask"]]).logps, rows["mask"])


ROW_VIEWS = ["noised(step=500)", "noised(step=500, space='pixels')", "blank", "cropped", "another", "none"]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("llava", "qwen2_5_vl") else pytest.mark.slow) for name in BUILDERS
])  # fmt: skip
def test_a_row_under_a_view_equals_that_view_alone(name):
    """For every family: log-probs of the packed rows against plain eager rows of the corrupted pair."""
    family = build(name)
    given = [sized_pair(number) for number in range(3)]
    encoded = [family.encode(each) for each in given]
    views = ROW_VIEWS if name != "mllama" else ROW_VIEWS[:-1]
    readings = readings_of(family, views, others=given)
    batch = readings(given, encoded)["views"]
    clean = None
    for text in views:
        view = View.of(text)
        found = rows_logps(family, batch[text])
        for number, (pair, each) in enumerate(zip(given, encoded, strict=True)):
            alone, _ = readings.show(view, pair, each)
            for place, side in enumerate(SIDES):
                expected, _ = plain_outputs(family, alone, side)
                torch.testing.assert_close(found[number, place, : len(expected)], expected, atol=2e-4, rtol=0)
        assert clean is None or not torch.allclose(found, clean, atol=1e-3), text
        clean = found


def test_a_row_holds_only_the_sides_that_are_read():
    family, given = llava(), pairs(3)
    encoded = [family.encode(each) for each in given]
    both = readings_of(family, ["blank"])(given, encoded)["views"]["blank"]
    chosen = readings_of(family, ["blank"], sides=("chosen",))(given, encoded)["views"]["blank"]
    assert chosen["mask"].shape == both["mask"].shape and not chosen["mask"][:, 1].any()
    assert chosen["model_inputs"]["input_ids"].shape[1] < both["model_inputs"]["input_ids"].shape[1]
    torch.testing.assert_close(rows_logps(family, chosen)[:, 0], rows_logps(family, both)[:, 0], atol=1e-5, rtol=0)


def test_a_draw_does_not_depend_on_the_batch_and_is_new_in_every_epoch():
    family, given = llava(), pairs(3)
    encoded = [family.encode(each) for each in given]
    readings = readings_of(family, ["noised"])
    pixels = lambda chosen: readings([given[at] for at in chosen], [encoded[at] for at in chosen])["views"]["noised"][
        "model_inputs"
    ]["pixel_values"]
    assert torch.equal(pixels([0, 1, 2])[1], pixels([1])[0])
    before = pixels([0])
    readings.epoch = 1
    assert not torch.equal(before, pixels([0]))


def test_another_picture_needs_one():
    family, given = llava(), pairs(1)
    with pytest.raises(UserError, match=f"pair {given[0].id}: no other pair has another picture"):
        readings_of(family, ["another"], others=given)(given, [family.encode(given[0])])


def test_a_perturbed_text_keeps_special_tokens_and_leaves_replaced_ones_out():
    family, given = llava(), pairs(3)
    encoded = [family.encode(each) for each in given]
    text, both = "perturbed(share=0.5)", "perturbed(share=0.5, picture='noised(step=500)')"
    needs = frozenset(Quantity(name, "chosen", view) for view in (text, both) for name in ("policy_logps", "mask"))
    readings = ViewPasses(family, needs)
    views = readings(given, encoded)["views"]
    plain = readings_of(family, ["blank"], sides=("chosen",))(given, encoded)["views"]["blank"]
    before, after = plain["model_inputs"]["input_ids"], views[text]["model_inputs"]["input_ids"]
    is_image = before == family.image_token_id
    assert torch.equal(is_image, after == family.image_token_id)
    assert 0.2 < (before != after)[~is_image].float().mean() < 0.7
    for pair in range(3):
        for at in range(int(plain["mask"][pair, 0].sum())):
            same = views[text]["token_ids"][pair, 0, at] == plain["token_ids"][pair, 0, at]
            assert same or not views[text]["mask"][pair, 0, at]
        end = int(plain["mask"][pair, 0].sum()) - 1
        assert views[text]["mask"][pair, 0, end] and views[text]["token_ids"][pair, 0, end] == family.eos_token_id
    assert torch.equal(after, views[both]["model_inputs"]["input_ids"])
    assert not torch.equal(views[text]["model_inputs"]["pixel_values"], views[both]["model_inputs"]["pixel_values"])


def test_every_view_has_a_name_and_a_line():
    for name, view in VIEWS.items():
        assert view.__name__ == name and view.__doc__
    assert set(VIEWS) >= {"noised", "blank", "black", "cropped", "masked", "another", "none"}
