"""Pictures and pairs at the border: what is opened how, and what is refused with its name."""

from __future__ import annotations

import io
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catpo.core import types
from catpo.core.errors import UserError
from catpo.core.types import Picture, check_pair, pair_id
from tiny import pair


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode="RGB", size=(6, 4)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize(
    "mode, kind", [("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG"), ("CMYK", "JPEG")]
)
def test_every_colour_mode_opens_as_rgb(mode, kind):
    assert Picture(data=encoded(noise(mode), kind)).open().mode == "RGB"


def test_a_picture_is_turned_as_viewers_show_it():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert Picture(data=encoded(noise(size=(6, 4)), "JPEG", exif=exif)).open().size == (4, 6)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Picture(data=data).open().getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "content", [b"", b"not a picture", encoded(noise(size=(64, 64)))[:60]], ids=["empty", "text", "cut off"]
)
def test_a_broken_picture_is_named(tmp_path, content):
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cat\.png"):
        Picture(path=path).open()


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(UserError, match=r"picture '.*nowhere\.png' cannot be read"):
        Picture(path=tmp_path / "nowhere.png").open()


def test_a_picture_with_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(types, "MAX_PIXELS", 20)
    with pytest.raises(UserError, match="6x4 pixels are more than 20"):
        Picture(data=encoded(noise()), name="bomb").open()


@pytest.mark.parametrize("change, message", [
    ({"chosen": " \n"}, "chosen response is empty"), ({"rejected": ""}, "rejected response is empty"),
    ({"chosen": "a cat", "rejected": " a cat\n"}, "the same text"), ({"images": ()}, "has no picture"),
])  # fmt: skip
def test_a_pair_that_teaches_nothing_is_named(change, message):
    bad = replace(pair(0), **change)
    with pytest.raises(UserError, match=f"pair {bad.id}.*{message}"):
        check_pair(bad)


def test_a_pairs_id_is_its_content():
    first = pair(0)
    assert first.id == pair_id(first.images, first.prompt, first.chosen, first.rejected)
    others = [
        pair_id(pair(2).images, first.prompt, first.chosen, first.rejected),
        pair_id(first.images, "another prompt", first.chosen, first.rejected),
        pair_id(first.images, first.prompt, first.rejected, first.chosen),
    ]
    assert len({first.id, *others}) == 4


def test_a_hash_is_kept_only_while_the_file_stays_as_it_is(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"first")
    reads: list[Path] = []
    read = Picture.read
    monkeypatch.setattr(Picture, "read", lambda self: (reads.append(path), read(self))[1])
    fresh = [Picture(path=path).digest() for _ in range(2)]
    assert len(reads) == 2  # written so lately that another write could have the same time
    monkeypatch.setattr(types, "RACY_NANOSECONDS", 0)
    assert [Picture(path=path).digest() for _ in range(3)] == [*fresh, fresh[0]] and len(reads) == 3
    time.sleep(0.02)
    path.write_bytes(b"other")
    os.utime(path, ns=(0, 0))
    other = Picture(path=path).digest()
    assert other == Picture(data=b"other").digest() != fresh[0]
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Picture(path=path).digest()
