"""Views: what a model is shown in place of a pair's picture, by name: noise, grey, black, a crop, a mask, another, nothing.

Pure functions of pictures and pixel tensors with a generator, and the choice of another pair's pictures. Knows nothing of
models, batches or losses.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL.Image import Image, fromarray
from torch import Generator, Tensor

from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import Spec, check_options, parse
from catpo.core.types import Picture, PreferencePair, Sample
from catpo.data.spool import ids_of

Channels = Float[Tensor, "3 height width"]
"""A picture in [0, 1], before the processor resizes, pads or normalises it."""
NOISE_STEPS = 1000
ACTS_ON = {"blank": "pixels", "another": "pair", "none": "pair", "perturbed": "text"}
"""What a view changes; other views have the option `space`."""


@dataclass(frozen=True)
class View:
    """A view with its options; `draw` numbers independent random draws of one view."""

    spec: Spec
    draw: int = 0

    @classmethod
    def of(cls, text: str) -> View:
        """Parse `name(option=value)`.

        Raises:
            UserError: no such view or option, or a value out of its range.
        """
        spec = parse(text)
        if spec.name not in VIEWS:
            raise UserError(f"There is no view '{spec.name}' of a picture. {did_you_mean(spec.name, VIEWS)}")
        options = dict(spec.options)
        draw = options.pop("draw", 0)
        view = cls(Spec(spec.name, options), draw)
        check_options(VIEWS[spec.name], view.spec)
        if view.acts_on not in ("picture", "pixels", "pair", "text"):
            raise UserError(f"{text}: space must be 'picture' (before normalisation) or 'pixels' (after it).")
        if view.inner is not None and view.inner.spec.name == "perturbed":
            raise UserError(f"'{text}': the picture beside a perturbed text cannot be a perturbed text itself.")
        if view.acts_on != "pair":
            view(torch.zeros(3, 1, 1), torch.Generator())  # refuses values out of their range
        return view

    @property
    def acts_on(self) -> str:
        """`picture`: before the processor; `pixels`: after it; `pair`: another picture or none; `text`: the words."""
        return ACTS_ON.get(self.spec.name, self.spec.options.get("space", "picture"))

    @property
    def inner(self) -> View | None:
        """The view of the picture that goes with a perturbed text, if any."""
        picture = self.spec.options.get("picture")
        return View.of(picture) if picture else None

    def __call__(self, values: Tensor, generator: Generator) -> Tensor:
        """Apply the view to pixels; of the tokens of a text, which to replace."""
        return VIEWS[self.spec.name](values, generator, **self.spec.options)

    def of_picture(self, image: Image, generator: Generator) -> Image:
        """Apply the view to a picture; the size stays the same."""
        values = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 255
        shown = (self(values, generator) * 255).round().clamp(0, 255).to(torch.uint8)
        return fromarray(shown.permute(1, 2, 0).contiguous().numpy(), "RGB")

    def of_file(self, picture: Picture, generator: Generator) -> Picture:
        """Apply the view to a picture file; the result is in memory and uncompressed."""
        buffer = io.BytesIO()
        self.of_picture(picture.open(), generator).save(buffer, "PPM")
        return Picture(data=buffer.getvalue(), name=f"{picture.label} as {self.spec}")

    def of_pixels(self, pixels: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        """Apply the view to the processor's output; sizes and grids stay the same."""
        return {name: self(values, generator) if values.is_floating_point() else values for name, values in pixels.items()}

    def generator(self, *seed: object) -> Generator:
        """A generator for one pair: the same for policy and reference, and independent for each `draw`."""
        digest = hashlib.blake2b(repr((self.spec.name, self.draw, *seed)).encode(), digest_size=7).hexdigest()
        return torch.Generator().manual_seed(int(digest, 16))


def asked_on(view: str, sample: Sample, rng: random.Random, method: str) -> Sample:
    """The sample with its pictures under a view, for the pairing method of this name.

    Raises:
        UserError: no such view, or one that does not change the picture itself.
    """
    parsed = View.of(view)
    if parsed.acts_on != "picture":
        raise UserError(f"{method}(view={view!r}): give a view of the picture itself, such as 'noised(step=500)' or 'cropped'.")
    generator = parsed.generator(rng.random())
    images = tuple(parsed.of_file(picture, generator) for picture in sample.images)
    return replace(sample, id=f"{sample.id}/{method}", images=images)


def noised(values: Tensor, generator: Generator, *, step: int = 500, space: str = "picture", wrap: bool = False) -> Tensor:
    """Diffusion noise (VCD's schedule, as POVID, TPO, SeVa, CHiP and TARS use it): sqrt(a_t) v + sqrt(1 - a_t) noise.

    Args:
        step: t, from 0 to 999; 500 leaves 86 % of the picture's amplitude.
        space: the `picture` in [0, 1] before it is resized and normalised, or the `pixels` after it.
        wrap: values outside [0, 1] wrap around, as in POVID's and TPO's code, instead of being clamped.
    """
    if not 0 <= step < NOISE_STEPS:
        raise UserError(f"noised(step={step}): it must be from 0 to {NOISE_STEPS - 1}.")
    kept = kept_signal(step)
    noise = torch.randn(values.shape, generator=generator, dtype=values.dtype)
    shown = math.sqrt(kept) * values + math.sqrt(1 - kept) * noise
    if space == "pixels":
        return shown
    return torch.trunc(shown * 255) % 256 / 255 if wrap else shown.clamp(0, 1)


@functools.cache
def kept_signal(step: int) -> float:
    """a_t, the share of the picture's variance that is left at a noise step.

    >>> round(kept_signal(500), 6), round(kept_signal(999), 6)
    (0.744799, 0.081249)
    """
    rates = torch.sigmoid(torch.linspace(-6, 6, NOISE_STEPS, dtype=torch.float64)) * (0.005 - 1e-5) + 1e-5
    return float((1 - rates)[: step + 1].prod())


def blank(values: Tensor, generator: Generator) -> Tensor:
    """Zeros after normalisation: a picture of the mean grey (V-DPO)."""
    return torch.full_like(values, 1e-6)  # Idefics3 takes a picture of exact zeros for padding


def black(values: Channels, generator: Generator) -> Channels:
    """A black picture."""
    return torch.zeros_like(values)


def cropped(values: Channels, generator: Generator, *, smallest: float = 0.01, largest: float = 0.2) -> Channels:
    """A random part of the picture, resized to the whole (mDPO: 1 to 20 % of the area, sides in a ratio of 3:4 to 4:3)."""
    if not 0 < smallest <= largest <= 1:
        raise UserError(f"cropped(smallest={smallest}, largest={largest}): they must be shares of the area, the larger last.")
    height, width = values.shape[1:]
    area, ratio, top, left = torch.rand(4, generator=generator).tolist()
    area = height * width * (smallest + (largest - smallest) * area)
    ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
    rows = min(height, max(1, round(math.sqrt(area / ratio))))
    columns = min(width, max(1, round(math.sqrt(area * ratio))))
    top, left = int(top * (height - rows + 1)), int(left * (width - columns + 1))
    part = values[None, :, top : top + rows, left : left + columns]
    return F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)[0]


def masked(values: Channels, generator: Generator, *, share: float = 0.3, patch: int = 14) -> Channels:
    """Black squares of `patch` pixels over a `share` of the picture (OPA-DPO masks 30 % of the pixels: patch=1)."""
    if not 0 < share <= 1 or patch < 1:
        raise UserError(f"masked(share={share}, patch={patch}): share must lie in (0, 1], patch must be 1 or more.")
    height, width = values.shape[1:]
    patch = min(patch, max(height, width))
    rows, columns = -(-height // patch), -(-width // patch)
    order = torch.rand(rows * columns, generator=generator).argsort()
    is_kept = torch.ones(rows * columns)
    is_kept[order[: round(share * rows * columns)]] = 0
    squares = is_kept.view(rows, columns).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    return values * squares[:height, :width]


def another(values: Channels, generator: Generator) -> Channels:
    """The picture of another pair."""
    raise NotImplementedError("changes the pair, see `acts_on`")


def none(values: Channels, generator: Generator) -> Channels:
    """No picture: the prompt alone."""
    raise NotImplementedError("changes the pair, see `acts_on`")


def perturbed(ids: Tensor, generator: Generator, *, share: float = 0.05, picture: str = "") -> Tensor:
    """Random tokens in place of a share of the prompt's and the response's; the loss leaves them out (TARS).

    Args:
        share: of the tokens.
        picture: the view of the picture that goes with the text, e.g. 'noised(step=500)'; '' is the clean picture.
    """
    if not 0 <= share <= 1:
        raise UserError(f"perturbed(share={share}): it must be a share of the tokens, from 0 to 1.")
    return torch.rand(len(ids), generator=generator) < share


VIEWS: dict[str, Callable[..., Any]] = {
    view.__name__: view for view in (noised, blank, black, cropped, masked, another, none, perturbed)
}
"""All views by name."""


class OtherPictures:
    """Gives each pair the pictures of another one, chosen by the pair's id alone. A file is read when needed, and once."""

    def __init__(self, pairs: Sequence[PreferencePair]) -> None:
        self._pairs, self._ids = pairs, ids_of(pairs)
        self._digests: dict[str, list[str]] = {}
        """Pair's id -> the digests of its pictures."""

    def of(self, pair: PreferencePair) -> tuple[Picture, ...] | None:
        """As many pictures as the pair has, but others; None if no pair has such."""
        own = self._digests_of(pair)
        start = int(hashlib.blake2b(pair.id.encode(), digest_size=4).hexdigest(), 16)
        for step in range(len(self._ids)):
            index = (start + step) % len(self._ids)
            theirs = self._digests.get(self._ids[index]) or self._digests_of(self._pairs[index])
            if len(theirs) == len(own) and theirs != own:
                return self._pairs[index].images
        return None

    def _digests_of(self, pair: PreferencePair) -> list[str]:
        if pair.id not in self._digests:
            self._digests[pair.id] = [image.digest() for image in pair.images]
        return self._digests[pair.id]
