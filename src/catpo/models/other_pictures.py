"""Another picture for a pair, for what compares a picture with another one. Knows no model and no signal."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from catpo.core.types import Picture, PreferencePair
from catpo.data.spool import ids_of


class OtherPictures:
    """Gives each pair the pictures of another one, chosen by its id: whichever pairs are asked for, and in whatever order.

    No file is read before it is asked for, and none twice.
    """

    def __init__(self, pairs: Sequence[PreferencePair]) -> None:
        self._pairs, self._ids = pairs, ids_of(pairs)
        self._digests: dict[str, list[str]] = {}
        """Pair's id -> the identities of its pictures."""

    def of(self, pair: PreferencePair) -> tuple[Picture, ...] | None:
        """As many pictures as the pair has, not the same ones; None if no pair has others."""
        own = self._known(pair)
        start = int(hashlib.blake2b(pair.id.encode(), digest_size=4).hexdigest(), 16)
        for step in range(len(self._ids)):
            place = (start + step) % len(self._ids)
            theirs = self._digests.get(self._ids[place]) or self._known(self._pairs[place])
            if len(theirs) == len(own) and theirs != own:
                return self._pairs[place].images
        return None

    def _known(self, pair: PreferencePair) -> list[str]:
        if pair.id not in self._digests:
            self._digests[pair.id] = [image.digest() for image in pair.images]
        return self._digests[pair.id]
