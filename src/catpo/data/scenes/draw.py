"""Draw a planned scene: its context's background, then the objects."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

from PIL import Image, ImageDraw

from catpo.data.scenes.plan import CANVAS, Scene
from catpo.text.object_words import classes, sprite_layout

Colour = tuple[int, int, int]

BACKGROUNDS: dict[str, tuple[Colour, Colour]] = {
    # upper part (sky, wall), lower part (ground, floor)
    "kitchen": ((244, 232, 210), (205, 170, 125)),
    "street": ((185, 205, 225), (120, 120, 125)),
    "farm": ((190, 220, 245), (190, 175, 95)),
    "beach": ((150, 210, 245), (240, 220, 165)),
    "park": ((200, 230, 250), (140, 200, 110)),
    "office": ((225, 228, 235), (165, 170, 190)),
    "living room": ((235, 215, 205), (165, 110, 85)),
    "forest": ((150, 185, 150), (85, 110, 65)),
    "airport": ((175, 195, 215), (190, 190, 185)),
    "party": ((225, 195, 235), (150, 100, 160)),
}


def draw(scene: Scene, *, size: int = CANVAS) -> Image.Image:
    """The scene as an RGB picture of size x size pixels."""
    canvas = _background(scene)
    for placed in scene.objects:
        x0, y0, x1, _ = placed.box
        art = _sprite(placed.name, x1 - x0, placed.is_mirrored)
        canvas.paste(art, (x0, y0), art)
    return canvas if size == CANVAS else canvas.resize((size, size), Image.Resampling.BICUBIC)


def encode(image: Image.Image) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _background(scene: Scene) -> Image.Image:
    """Two slightly varied colours with a horizon, darker towards the bottom, and a few soft spots."""
    rng = scene.generator("background")
    upper, lower = (_vary(colour, rng) for colour in BACKGROUNDS[scene.context])
    horizon = rng.randint(CANVAS // 3, 2 * CANVAS // 3)
    canvas = Image.new("RGB", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(canvas)
    for y in range(CANVAS):
        pen.line([(0, y), (CANVAS, y)], fill=_shade(upper if y < horizon else lower, -y // 6))
    for _ in range(rng.randint(2, 6)):
        x, y = rng.randint(0, CANVAS), rng.randint(0, CANVAS)
        width, height = rng.randint(6, 30), rng.randint(3, 9)
        colour = _shade(upper if y < horizon else lower, rng.randint(-18, 18) - y // 6)
        pen.ellipse([x - width, y - height, x + width, y + height], fill=colour)
    return canvas


def _vary(colour: Colour, rng: random.Random) -> Colour:
    return _clip([part + rng.randint(-14, 14) for part in colour])


def _shade(colour: Colour, amount: int) -> Colour:
    return _clip([part + amount for part in colour])


def _clip(parts: Sequence[int]) -> Colour:
    red, green, blue = (min(max(part, 0), 255) for part in parts)
    return red, green, blue


@lru_cache(maxsize=1024)
def _sprite(name: str, size: int, is_mirrored: bool) -> Image.Image:
    side, columns = sprite_layout()
    row, column = divmod(classes()[name].sprite, columns)
    art = _sheet().crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
    art = art.resize((size, size), Image.Resampling.LANCZOS)
    return art.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else art


@lru_cache(maxsize=1)
def _sheet() -> Image.Image:
    content = resources.files("catpo.data.scenes").joinpath("sprites.png").read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGBA")
