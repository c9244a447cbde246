"""What a text says of a picture, each as a yes/no question: that things are there, what they look like, how many, and where.

Knows nothing of models. One `Asker` finds words and phrases the questions for everything that asks a model about its own words.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from catpo.core.checks import check_word
from catpo.core.errors import UserError
from catpo.files.json_files import read_json
from catpo.text.object_words import check_vocabulary, classes, default_vocabulary
from catpo.text.things import TAGGERS, Finder, Thing, Token, finder

KINDS = ("objects", "attributes", "counts", "relations")
WORDINGS = {
    "objects": "Is there {} in the image?",
    "attributes": "{be} the {thing} {what}?",
    "counts": "Are there {} in the image?",
    "relations": "{be} the {thing} {what} the {other}?",
}
"""Kind -> how it is asked. {} is the thing with its article or number; {be} is Is or Are."""
PLACES = (
    "to the left of", "to the right of", "on the left of", "on the right of", "in front of", "on top of", "next to", "close to",
    "on", "in", "inside", "under", "below", "above", "over", "behind", "beside", "near",
)  # fmt: skip
"""What may stand between two things."""
LINKS = ("is", "are", "sitting", "sits", "standing", "stands", "lying", "lies", "placed", "located", "can be seen")
"""What may stand before such a place."""
AUTO, BUILTIN = "auto", "builtin"


@dataclass(frozen=True)
class Claim:
    """A part of a text, `text[start:end]`, and the question whether it is so."""

    start: int
    end: int
    kind: str
    question: str
    object: str
    """The thing it is about, as the vocabulary calls it."""


@dataclass(frozen=True)
class Asker:
    """Finds what texts claim and phrases it.

    Args:
        nouns: what finds things: `nltk` (its tagger), `textblob`, `builtin` (the built-in vocabulary), a JSON file of surface
            forms and objects, or `auto`, the first of the three that can be had here.
        kinds: which claims count, of `KINDS`.
        wordings: kind -> question, in place of `WORDINGS`.
        given: surface forms and objects of a data set, whose words `nouns` then names.
    """

    nouns: str = AUTO
    kinds: tuple[str, ...] = ("objects",)
    wordings: tuple[tuple[str, str], ...] = ()
    given: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, nouns: str, kinds: Sequence[str], wordings: Mapping[str, str], given: Mapping[str, str] | None = None) -> Asker:
        """The asker of these options.

        Raises:
            UserError: an option is unknown, a wording lacks its place for the thing, or a file or tagger cannot be read.
        """
        if isinstance(kinds, str) or not kinds:
            raise UserError(f"kinds={kinds!r}: give a list of {', '.join(KINDS)}.")
        for kind in (*kinds, *wordings):
            check_word("self_question", "kinds", kind, KINDS)
        for kind, wording in wordings.items():
            _check_wording(kind, wording)
            if kind not in kinds:
                raise UserError(
                    f"wordings={{{kind!r}: {wording!r}}}: {kind} are not asked about. Name them in kinds={[*kinds, kind]} too."
                )
        return _known(cls(nouns, tuple(kinds), tuple(sorted(wordings.items())), tuple((given or {}).items())))

    def claims(self, text: str) -> list[Claim]:
        """The claims of a text, in the order of its things."""
        tokens, things = self._find(text)
        return [claim for number, thing in enumerate(things) for claim in self._of_thing(text, tokens, things, number)]

    @property
    def found_by(self) -> str:
        """What finds the things: `nouns` itself, or what `auto` stands for here."""
        return self._chosen[0]

    @cached_property
    def forms(self) -> Mapping[str, str]:
        """Surface form -> object of the words that can be found; of a tagger, which finds any noun, the built-in ones."""
        if self.given:
            return dict(self.given)
        return default_vocabulary() if self.found_by in (*TAGGERS, BUILTIN) else read_forms(self.found_by)

    @cached_property
    def _chosen(self) -> tuple[str, Finder]:
        if self.given:
            return self.nouns, finder(self.nouns, self.forms)
        return _finder_here() if self.nouns == AUTO else (self.nouns, _finder(self.nouns))

    @property
    def _find(self) -> Finder:
        return self._chosen[1]

    def _of_thing(self, text: str, tokens: Sequence[Token], things: Sequence[Thing], number: int) -> Iterator[Claim]:
        thing = things[number]
        if "objects" in self.kinds:
            yield self._claim("objects", thing, thing.words, self.wording("objects").replace("{}", thing.phrase))
        if "counts" in self.kinds and thing.count is not None:
            counted = f"{thing.count.text} {thing.bare}"
            yield self._claim("counts", thing, [thing.count], self.wording("counts").replace("{}", counted))
        if "attributes" in self.kinds:
            for attribute in thing.attributes:
                yield self._claim("attributes", thing, [attribute], self._about("attributes", thing, attribute.text))
        if "relations" in self.kinds and number + 1 < len(things):
            other = things[number + 1]
            between = _between(tokens, thing, other)
            if between:
                what = " ".join(text[between[0].start : between[-1].end].lower().split())
                yield self._claim("relations", thing, between, self._about("relations", thing, what, other.bare))

    def _claim(self, kind: str, thing: Thing, words: Sequence[Token], question: str) -> Claim:
        return Claim(words[0].start, words[-1].end, kind, question, thing.object)

    def wording(self, kind: str) -> str:
        """How a kind is asked about."""
        return dict(self.wordings).get(kind, WORDINGS[kind])

    def _about(self, kind: str, thing: Thing, what: str, other: str = "") -> str:
        be = "Are" if thing.is_plural else "Is"
        return self.wording(kind).format(be=be, thing=thing.bare, what=what, other=other)


def _between(tokens: Sequence[Token], thing: Thing, other: Thing) -> list[Token]:
    """The words that say where a thing is, if they and nothing else stand between it and the other's phrase."""
    end = (other.before or other.words)[0].start
    between = [token for token in tokens if thing.words[-1].end <= token.start < end]
    text = " ".join(token.text for token in between)
    for link in LINKS:
        text = text.removeprefix(link + " ")
    return between[-len(text.split()) :] if text in PLACES else []


def _check_wording(kind: str, wording: str) -> None:
    """Raises UserError for a wording that cannot be filled in."""
    places = ("{}",) if kind in ("objects", "counts") else ("{thing}", "{what}")
    if any(wording.count(place) != 1 for place in places):
        raise UserError(f"wordings={{{kind!r}: {wording!r}}}: write {' and '.join(places)} once, where the words go.")
    try:
        wording.replace("{}", "").format(be="", thing="", what="", other="")
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"wordings={{{kind!r}: {wording!r}}}: only {{be}}, {{thing}}, {{what}}, {{other}} are filled in."
        ) from error


@lru_cache(maxsize=32)
def _known(asker: Asker) -> Asker:
    """One of all askers that are equal: what it finds with is loaded once."""
    if asker.found_by not in TAGGERS and "attributes" in asker.kinds:
        raise UserError(
            f"nouns='{asker.found_by}' knows no adjectives, so it cannot ask about attributes. Leave them out "
            "of kinds, or use nouns='nltk' or 'textblob'."
        )
    return asker


def _finder(nouns: str) -> Finder:
    if nouns in (*TAGGERS, BUILTIN):
        return finder(nouns)
    if not nouns.endswith(".json"):
        raise UserError(
            f"nouns='{nouns}' is not known. Give auto, nltk, textblob, builtin, or a JSON file of words and objects."
        )
    return finder(nouns, read_forms(nouns))


@lru_cache(maxsize=1)
def _finder_here() -> tuple[str, Finder]:
    """The first tagger that can be had, or the built-in vocabulary; says so if it is not NLTK's."""
    missing = []
    for nouns in TAGGERS:
        try:
            found = finder(nouns)
        except UserError as error:
            missing.append(str(error))
            continue
        if missing:
            _tell(f"nouns are found with {nouns}. {missing[0]}")
        return nouns, found
    _tell(f"only the {len(classes())} built-in objects are asked about, no other nouns. {' '.join(missing)}")
    return BUILTIN, finder(BUILTIN)


def _tell(what: str) -> None:
    print(f"catpo: {what}", file=sys.stderr)


def read_forms(file: str) -> Mapping[str, str]:
    """Surface form -> object, of a JSON file.

    Raises:
        UserError: it cannot be read, or maps no words to objects.
    """
    forms = read_json(file, made_by="")
    check_vocabulary(forms, file, may_be_empty=False)
    return forms
