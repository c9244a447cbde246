"""What decides the numbers in a reward store, kept in it as its provenance."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from catpo.config.options import ScoreOptions
from catpo.core import registry
from catpo.core.errors import UserError
from catpo.core.spec import Spec, check_options, parse
from catpo.core.types import SIDES, PreferencePair
from catpo.files.provenance import versions
from catpo.judges import Judge
from catpo.models.attention.recorder import choose_heads, choose_layers
from catpo.models.family import Encoded, Family
from catpo.scoring.reference_cache import Cache
from catpo.scoring.words import WordSettings

PAPER_SIGNALS = ("global_attention", "patch_entropy", "semantic")


@dataclass(frozen=True)
class ScoreSettings:
    """What decides the numbers in a store; kept in it as its provenance."""

    signals: tuple[Spec, ...]
    layers: str | int | list[int]
    heads: str
    query: str
    patches: str | int
    """`all`, or the number of one picture (0-based) where a pair has several."""
    words: WordSettings | None = None
    """Which words are asked about, if any."""

    @classmethod
    def of(cls, options: ScoreOptions) -> ScoreSettings:
        """The settings among the options of `catpo score`."""
        signals = tuple(parse(signal) for signal in options.signals)
        if options.judge is not None and options.words is None:
            raise UserError(f"judge={options.judge} is asked about words. Give --words \"words(features=['judge'])\" too.")
        words = None if options.words is None else WordSettings.of(options.words, options.judge)
        return cls(signals, options.layers, options.heads, options.query, options.patches, words)

    def check(self, depth: int) -> None:
        """Raises UserError for layers, heads or signals that a decoder of this depth does not have."""
        choose_layers(self.layers, depth)
        choose_heads(self.heads)
        for signal in self.signals:
            check_options(registry.load("signals", signal.name), signal)
        self.head_layers(depth)
        self.facts()

    def of_pairs(self, pairs: Sequence[PreferencePair]) -> ScoreSettings:
        """What the settings are for these pairs: words may be those that they name."""
        return self if self.words is None else replace(self, words=self.words.of_pairs(pairs))

    def head_layers(self, depth: int) -> tuple[int, ...]:
        """The layers whose heads `head_attention` reads one by one."""
        layers = {signal.options.get("layer", -1) for signal in self.signals if signal.name == "head_attention"}
        return choose_layers(sorted(layers), depth) if layers else ()

    def facts(self) -> dict[str, Any]:
        """What signals say of themselves for the provenance, by their module's `found_with`."""
        said: dict[str, Any] = {}
        for signal in self.signals:
            facts = _beside_score(signal, "found_with")
            said |= {str(signal): facts(**signal.options)} if facts else {}
        return said

    def questions(self, pair: PreferencePair) -> list[str]:
        """What signals ask about a pair's pictures, by their module's `asked_beside`; each question once."""
        asking = [(signal, _beside_score(signal, "asked_beside")) for signal in self.signals]
        return [*dict.fromkeys(text for signal, ask in asking if ask for text in ask(pair, **signal.options))]

    @property
    def asks(self) -> bool:
        """Whether a signal asks anything."""
        return any(_beside_score(signal, "asked_beside") for signal in self.signals)

    def check_patches(self, encoded: Encoded) -> None:
        """Raises UserError if the pair has no picture of the number asked for."""
        count = len(patches_by_picture(encoded))
        if self.patches != "all" and not (isinstance(self.patches, int) and 0 <= self.patches < count):
            raise UserError(
                f"pair {encoded.pair_id}: patches={self.patches!r} asks for a picture it does not have ({count} here). "
                "Give a lower number, or all."
            )


def _beside_score(signal: Spec, name: str) -> Callable[..., Any] | None:
    """A function of the module that defines a signal's `score`; None if it has none."""
    module = inspect.getmodule(registry.load("signals", signal.name))
    return getattr(module, name, None)


PAPER_SETTINGS = ScoreSettings(tuple(Spec(name) for name in PAPER_SIGNALS), "paper", "mean", "token", "all")


def provenance(
    family: Family, settings: ScoreSettings, cache: Cache, *, maps: bool, judge: Judge | None = None
) -> dict[str, Any]:
    """Everything that changes the numbers of a store, as it stands in its `store.json`; `judge` is asked about words."""
    return {
        "model": family.model_id,
        "precision": family.precision,
        "model_hash": family.model_hash,
        "processor_hash": family.processor_hash,
        "template_hash": family.template_hash,
        "signals": [str(signal) for signal in settings.signals],
        "attention": {
            "layers": list(choose_layers(settings.layers, family.depth)),
            "heads": settings.heads,
            "query": settings.query,
            "patches": settings.patches,
        },
        "hidden": cache.hidden,
        **({"topk": cache.k} if cache.k else {}),
        **({"words": settings.words.provenance(judge)} if settings.words else {}),
        **({"found": facts} if (facts := settings.facts()) else {}),
        "maps": maps,
        "versions": versions(),
    }


def hash_labels(pairs: Sequence[PreferencePair]) -> str:
    """Identity of the token labels, which a pair's id does not cover."""
    digest = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        digest.update(repr([(side, [astuple(span) for span in pair.labels.get(side, ())]) for side in SIDES]).encode())
    return digest.hexdigest()


def patches_by_picture(encoded: Encoded) -> list[int]:
    """How many patches each of a pair's pictures has, in all of its parts."""
    sizes = [0] * (1 + max(grid.picture for grid in encoded.grids))
    for grid in encoded.grids:
        sizes[grid.picture] += grid.size
    return sizes
