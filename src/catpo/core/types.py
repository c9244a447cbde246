"""Pictures, samples and preference pairs, which every room uses. Knows nothing of models or file layouts."""

from __future__ import annotations

import hashlib
import io
import os
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from PIL import Image, ImageOps

from catpo.core.checks import check_regular
from catpo.core.conversation import IMAGE, Turn, check_places, spoken
from catpo.core.errors import UserError, border

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
MAX_PIXELS = 100_000_000
"""A larger picture is refused as a decompression bomb."""
MAX_BYTES = 200_000_000
"""A larger file is refused before it is read."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
"""Formats that are opened. Pillow knows more, among them PostScript, for which it runs another program."""


@dataclass(frozen=True)
class Picture:
    """A picture that is opened only when it is needed.

    Give one of `path`, `data` (the encoded bytes) and `load` (a function that returns them when called with `at`); `name` is
    what messages call it.
    """

    path: Path | None = None
    data: bytes | None = None
    name: str = ""
    load: Callable[..., bytes] | None = None
    at: tuple[str | int, ...] = ()
    expected: str = ""
    """What `digest` must be, where that is known; the bytes are compared when they are read."""

    def open(self) -> Image.Image:
        """The picture as RGB on white, rotated as viewers show it (EXIF), first frame of an animation.

        Raises:
            UserError: it is missing, empty, broken, too large, or not a picture.
        """
        content = self.read()
        with border(f"{self} is not a picture that can be read", "Replace or remove it."), warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with opened(content) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(
                        f"{self}: {image.width}x{image.height} pixels are more than {MAX_PIXELS:,}. Make it smaller."
                    )
                return _on_white(_as_eight_bits(ImageOps.exif_transpose(image)))

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            UserError: the file is missing or empty, or is not the one expected.
        """
        if self.data is not None:
            return self.data
        with border(f"{self} cannot be read", "Check the path."):
            content = self.load(*self.at) if self.load is not None else self._read_file(cast(Path, self.path))
        if not content:
            raise UserError(f"{self} is an empty file. Replace or remove it.")
        if self.expected and _hash(content) != self.expected:
            raise UserError(
                f"{self} is not what catpo saved under this name, which is a hash of its bytes. Put it back, or make the pairs "
                "again. A picture of your own needs another name."
            )
        return content

    def _read_file(self, path: Path) -> bytes:
        check_regular(path)
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{self} has {size:,} bytes, more than {MAX_BYTES:,}. Make it smaller, or remove it.")
        return path.read_bytes()

    def digest(self) -> str:
        """Hash of the encoded bytes, which identifies the picture; computed again only where they may have changed."""
        known: dict[Any, str] = _digests
        key: Any = None
        if self.data is not None or self.load is not None:
            known, key = vars(self), "_digest"
        elif self.path is not None:
            key = _stamp(self.path)
        if key in known:
            return known[key]
        digest = _hash(self.read())
        if key is not None and len(known) < MAX_DIGESTS:
            known[key] = digest
        return digest

    def holding(self, content: bytes) -> Picture:
        """The same picture; its bytes are at hand now, so that they are not read once more for its hash."""
        vars(self)["_digest"] = _hash(content)
        return self

    @property
    def source(self) -> Hashable:
        """What it is read from: equal for pictures known to be the same without being read, whatever they are called."""
        path = self.path and os.fspath(self.path)  # compares faster than the path itself
        source = (path, self.data, self.load, self.at)
        return source if any(source) else id(self)  # a subclass may read in its own way

    def is_like(self, other: Picture) -> bool:
        """Whether both are known to be the same without being read."""
        return self.source == other.source

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name or str(self.path or "in memory")

    def __str__(self) -> str:
        return f"picture '{self.label}'"


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


MAX_DIGESTS = 50_000
RACY_NANOSECONDS = 2_000_000_000
"""File systems note times this coarsely, or finer."""
_digests: dict[tuple[Any, ...], str] = {}
"""What `_stamp` says of a file -> hash of its bytes."""


def _stamp(path: Path) -> tuple[Any, ...] | None:
    """What changes when a file is written; None if it was written so lately that another write could look the same."""
    name = os.fspath(path)
    try:
        found = os.stat(name)
    except OSError:  # reading it says why
        return None
    if max(found.st_mtime_ns, found.st_ctime_ns) > time.time_ns() - RACY_NANOSECONDS:
        return None
    return name, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def opened(content: bytes) -> Image.Image:
    """Encoded bytes as a picture whose pixels are not decoded yet; raises what Pillow raises."""
    Image.init()  # otherwise Pillow knows only its most frequent formats
    return Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])


def _as_eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits or of fractions as viewers show it; Pillow would clip the values at 255."""
    if image.mode == "F":
        low, high = cast("tuple[float, float]", image.getextrema())
        if not 0 <= low <= high <= 255:  # not a number is neither
            raise ValueError(f"its values go from {low:g} to {high:g}, not from 0 to 1 or to 255")
        return image.point(lambda value: value * 255 + 0.5).convert("L") if high <= 1 else image.convert("L")
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")


def _on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB; what is transparent shows white, as on a page."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@dataclass(frozen=True)
class PatchGrid:
    """Patches of a picture, or of one tile of it: their order in the prompt, and where they are on the picture."""

    picture: int
    """Number of the picture in its pair, from 0."""
    rows: int
    columns: int
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Left, top, right and bottom of what the patches show, as fractions of the picture's width and height."""
    row_end: int = 0
    """Separator tokens after each row (LLaVA-NeXT's newline); they are no patches."""
    end: int = 0
    """Separator tokens after the last row."""

    @property
    def size(self) -> int:
        """Number of patches."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Span:
    """A labelled stretch of a response, in characters: `response[start:end]`."""

    start: int
    end: int
    label: Literal["grounded", "hallucinated"]


UNRANKED = "unranked"
"""In a pair's `meta`, true if neither response is known to be the better one: both are answers of the model."""


@dataclass(frozen=True)
class Sample:
    """Picture(s) with a prompt, for a model to answer, and what is known of them."""

    id: str
    images: tuple[Picture, ...]
    prompt: str
    references: tuple[str, ...] = ()
    """Human (or ground-truth) answers, if any."""
    truth: Mapping[str, Any] = field(default_factory=dict)
    """What is known of the picture, e.g. {"present": [...], "tempting": [...]}; the keys depend on the data set."""
    history: tuple[Turn, ...] = ()
    """Earlier turns of a conversation, which come before the prompt; `catpo chat` has them."""

    @property
    def asked(self) -> str:
        """Everything that is said before the answer."""
        return spoken(self.history, self.prompt)


@dataclass(frozen=True)
class PreferencePair:
    """One preference: picture(s), prompt, the better and the worse response."""

    id: str
    """Content hash, see `pair_id`."""
    images: tuple[Picture, ...]
    prompt: str
    chosen: str
    rejected: str
    labels: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    """Per side, object words known to be grounded or hallucinated."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the row; kept, never used in training, but for `UNRANKED` and what an objective reads by name."""
    history: tuple[Turn, ...] = ()
    """System message and earlier turns, which come before the prompt; the loss is on the response to the prompt alone."""

    def response(self, side: Side) -> str:
        return self.chosen if side == "chosen" else self.rejected


def pair_id(images: tuple[Picture, ...], prompt: str, chosen: str, rejected: str, history: Sequence[Turn] = ()) -> str:
    """A pair's identity: hash of its pictures' bytes and its texts."""
    earlier = [part for turn in history for part in (turn.role, turn.text)]
    parts = [*(image.digest() for image in images), *earlier, prompt, chosen, rejected, ""]
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def same_prompt(first: PreferencePair, second: PreferencePair) -> bool:
    """Whether two pairs ask the same about the same pictures, so that both are one prompt with several responses."""
    if (first.prompt, first.history, len(first.images)) != (second.prompt, second.history, len(second.images)):
        return False
    return all(one.is_like(other) for one, other in zip(first.images, second.images, strict=True))


def check_pair(pair: PreferencePair) -> PreferencePair:
    """Check what every later step relies on; returns the pair.

    Raises:
        UserError: a response is empty or holds a place for a picture, both are the same, there is no picture, or the prompt has
            places for another number of them; names the pair.
    """
    for side in SIDES:
        if not pair.response(side).strip():
            raise UserError(f"pair {pair.id}: the {side} response is empty. Remove the pair or give it a text.")
        if IMAGE in pair.response(side):
            raise UserError(f"pair {pair.id}: the {side} response holds '{IMAGE}'; only a prompt has pictures. Remove it.")
    if pair.chosen.strip() == pair.rejected.strip():
        raise UserError(
            f"pair {pair.id}: chosen and rejected are the same text, so nothing can be learned from it. Remove the pair."
        )
    if not pair.images:
        raise UserError(f"pair {pair.id} has no picture. Give it at least one.")
    if pair.history or IMAGE in pair.prompt:
        try:
            check_places([*pair.history, Turn("user", pair.prompt)], len(pair.images))
        except UserError as error:
            raise UserError(f"pair {pair.id}: {error}") from error
    return pair
