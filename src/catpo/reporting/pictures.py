"""Pictures of the page as data URIs: each once, encoded anew, so that nothing but pixels gets in. Knows no data set."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from catpo.core.errors import UserError
from catpo.core.types import Picture

QUALITY = 82


class Album:
    """Collects pictures and gives each a number."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        """Data URIs, by number."""
        self.problems: list[str] = []
        """Why pictures could not be shown."""
        self._numbers: dict[str, int] = {}

    def add(self, picture: Picture, *, side: int = 448) -> int | None:
        """The picture's number, its longer side reduced to at most `side` pixels; None if it cannot be read."""
        try:
            key = f"{picture.digest()} {side}"
            if key not in self._numbers:
                self.uris.append(_data_uri(picture.open(), side))
                self._numbers[key] = len(self.uris) - 1
        except UserError as error:
            self.problems.append(str(error))
            return None
        return self._numbers[key]

    def add_all(self, pictures: Sequence[Picture]) -> list[int]:
        """Numbers of those that can be read."""
        return [number for picture in pictures if (number := self.add(picture)) is not None]


def _data_uri(image: Image.Image, side: int) -> str:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
