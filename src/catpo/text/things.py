"""Where an English text names things, with the words that describe them. Knows nothing of models or questions.

The nouns come from NLTK's tagger, from TextBlob's, which needs no data of its own, or from a vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile

from catpo.core.errors import UserError
from catpo.text.caption_edits import name_object
from catpo.text.english import English
from catpo.text.object_words import NUMBERS, Mention, default_vocabulary, mentions

TAGGERS = ("nltk", "textblob")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NOT_THINGS = _words("""
    image picture photo photograph view scene shot background foreground left right top bottom middle center centre side front
    back end edge corner area part kind type sort lot number variety couple group pair set bunch row line way time day color
    colour size shape style addition distance atmosphere moment detail something nothing anything everything nobody total
""")
"""Nouns that speak of the picture, of places in it or of amounts."""
NOT_ATTRIBUTES = _words("""
    other another several many few more most some same different various own such overall main additional numerous multiple
    certain next last first second visible possible likely
""")
"""Adjectives that say nothing of how a thing looks."""
MASS = _words("""
    water grass snow sand ice mud dirt food bread rice pasta meat beef pork fish fruit cheese butter milk coffee tea wine beer
    juice furniture luggage clothing jewelry equipment wood metal glass paper smoke fire traffic hair sky vegetation foliage
""")
"""Nouns without an article: "any grass"."""
PLURALS = ("NNS", "NNPS")
ONE, ANY = ("a", "an"), ("some", "any")
DEFINITE = ("the", "his", "her", "its", "their", "this", "that", "these", "those", "each", "every")
COUNTED = {word: count for count, word in enumerate(NUMBERS) if count > 1}
WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
PHYSICAL = frozenset({3, 5, 6, 8, 13, 14, 15, 17, 18, 20})
"""WordNet's lexicographer files of nouns: the most general, animals, artefacts, body parts, food, groups, places, natural
objects, persons, plants."""
SENSES = 2
"""How many of a noun's most frequent senses may be those of a thing."""


@dataclass(frozen=True)
class Token:
    """A word or other sign of a text: `text[start:end]`, in lower case."""

    start: int
    end: int
    text: str
    tag: str = ""
    """Penn tag; empty where nothing tags."""


@dataclass(frozen=True)
class Thing:
    """A thing that a text names, with what stands before it."""

    words: tuple[Token, ...]
    """The words that name it."""
    before: tuple[Token, ...]
    """Its article, number and adjectives."""
    phrase: str
    """One of it, to be asked for: "a dog", "any grass"."""
    bare: str
    """Without an article, in the number of the text: "dogs"."""
    is_plural: bool
    object: str
    """What a vocabulary calls it; by a tagger its name."""

    @property
    def name(self) -> str:
        """The thing itself, one of it: "dog"."""
        return self.phrase.split(" ", 1)[1]

    @property
    def count(self) -> Token | None:
        """The number word above one before it."""
        return next((token for token in self.before if token.text in COUNTED), None)

    @property
    def attributes(self) -> list[Token]:
        """The adjectives before it."""
        return [token for token in self.before if token.tag.startswith("JJ") and token.text not in NOT_ATTRIBUTES]


Finder = Callable[[str], tuple[list[Token], list[Thing]]]
"""Text -> its tokens, and the things it names in their order."""


def finder(nouns: str, forms: Mapping[str, str] | None = None) -> Finder:
    """Finds things by the nouns of `nltk` or `textblob`, or as a vocabulary of surface forms and objects names them.

    Raises:
        UserError: the tagger is not installed, or its data is not there.
    """
    if nouns in TAGGERS:
        return _by_tags(nouns)
    vocabulary = default_vocabulary() if forms is None else forms
    return lambda text: _by_vocabulary(text, vocabulary)


# ---- by a vocabulary --------------------------------------------------------------------------------------------------------


def _by_vocabulary(text: str, forms: Mapping[str, str]) -> tuple[list[Token], list[Thing]]:
    tokens = tokens_of(text)
    return tokens, [_mentioned(text, tokens, mention, forms) for mention in mentions(text, forms)]


def _mentioned(text: str, tokens: Sequence[Token], mention: Mention, forms: Mapping[str, str]) -> Thing:
    """What a word of a vocabulary names."""
    words = tuple(token for token in tokens if token.start < mention.end and token.end > mention.start)
    before = _before(tokens, tokens.index(words[0]), _describes)
    named = tuple(_inside(token, mention) for token in words)
    surface = text[mention.start : mention.end].lower()
    plural = name_object(mention.object, None, forms, bare=True)
    is_plural = surface == plural or any(token.text in COUNTED for token in before)
    bare = plural if is_plural else surface
    return Thing(named, before, name_object(mention.object, 1, forms), bare, is_plural, mention.object)


def _inside(token: Token, mention: Mention) -> Token:
    """The part of a token that is named: "dog" of "dog's"."""
    start, end = max(token.start, mention.start), min(token.end, mention.end)
    return Token(start, end, token.text[start - token.start : end - token.start], token.tag)


def tokens_of(text: str) -> list[Token]:
    """Words and other signs, without tags.

    >>> [token.text for token in tokens_of("A T-shirt, two dogs.")]
    ['a', 't-shirt', ',', 'two', 'dogs', '.']
    """
    return [Token(match.start(), match.end(), match.group().lower()) for match in WORD.finditer(text)]


def _before(tokens: Sequence[Token], first: int, belongs: Callable[[Token], bool]) -> tuple[Token, ...]:
    """The tokens before number `first` that belong to its phrase."""
    found = takewhile(belongs, (tokens[number] for number in range(first - 1, -1, -1)))
    return tuple(reversed([*found]))


# ---- by tags ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Nouns:
    """What is known of nouns."""

    english: English
    has_wordnet: bool

    def singular(self, noun: str) -> str:
        return self.english.lemma(noun) if self.has_wordnet else _singular(noun)

    def is_thing(self, noun: str) -> bool:
        lemma = self.singular(noun)
        if lemma in NOT_THINGS:
            return False
        return not self.has_wordnet or not PHYSICAL.isdisjoint(self.english.kinds_of_noun(lemma, SENSES))


@lru_cache(maxsize=len(TAGGERS))
def _by_tags(nouns: str) -> Finder:
    tag, english = (_nltk if nouns == "nltk" else _textblob)()
    tag(["a", "dog"])  # what is missing is said now
    known = _Nouns(english, english.has_wordnet())

    @lru_cache(maxsize=1024)  # what is asked beside a pair is asked for again when its signals are read
    def found(text: str) -> tuple[list[Token], list[Thing]]:
        plain = tokens_of(text)
        tags = tag([token.text for token in plain]) if plain else []  # TextBlob tags an empty text
        tokens = [replace(token, tag=tagged) for token, tagged in zip(plain, tags, strict=True)]
        things = [thing for run in _noun_runs(tokens) if (thing := _thing(tokens, run, known))]
        return tokens, _with_mentions(text, tokens, things)

    return found


def _with_mentions(text: str, tokens: Sequence[Token], things: Sequence[Thing]) -> list[Thing]:
    """Words of the built-in vocabulary stand for the nouns in them, "a loaf of bread" for loaf and bread."""
    forms = default_vocabulary()
    heads = {thing.words[-1].start for thing in things}
    named = [_mentioned(text, tokens, mention, forms) for mention in mentions(text, forms)]
    named = [thing for thing in named if len(thing.words) > 1 or thing.words[-1].start in heads]
    inside = {token.start for thing in named for token in thing.words}
    others = [thing for thing in things if thing.words[-1].start not in inside]
    return sorted([*named, *others], key=lambda thing: thing.words[0].start)


def _singular(noun: str) -> str:
    """By TextBlob's rules, where there is no WordNet."""
    from textblob.en.inflect import singularize

    singular: str = singularize(noun)
    return singular


def _noun_runs(tokens: Sequence[Token]) -> Iterator[list[int]]:
    """Numbers of nouns that stand together; a plural ends a run, as in "a giraffe drinks water" with its verb taken for one."""
    run: list[int] = []
    for number, token in enumerate(tokens):
        is_noun = token.tag.startswith("NN") and token.text not in COUNTED and token.text[0].isalpha()
        if is_noun:
            run.append(number)
        if run and (not is_noun or token.tag in PLURALS):
            yield run
            run = []
    if run:
        yield run


def _thing(tokens: Sequence[Token], run: Sequence[int], nouns: _Nouns) -> Thing | None:
    """What a run of nouns names, up to the last that is a thing: "dog" of "dog leaps"; None of "view"."""
    named = len(run)
    while named and not nouns.is_thing(tokens[run[named - 1]].text):
        named -= 1
    if not named:
        return None
    words = tuple(tokens[number] for number in run[:named])
    head = words[-1].text
    lemma = nouns.singular(head)
    before = _before(tokens, run[0], _describes)
    is_plural = words[-1].tag in PLURALS or lemma != head or any(token.text in COUNTED for token in before)
    first = [token.text for token in words[:-1]]
    one = " ".join([*first, lemma])
    is_mass = lemma in MASS or not (is_plural or any(token.text in (*ONE, *DEFINITE, "one") for token in before))
    phrase = f"any {one}" if is_mass else f"{'an' if one[0] in 'aeiou' else 'a'} {one}"
    return Thing(words, before, phrase, " ".join([*first, head]), is_plural, one)


def _describes(token: Token) -> bool:
    return token.tag.startswith(("JJ", "DT", "PRP$", "CD")) or token.text in (*ONE, *ANY, *DEFINITE, *COUNTED, "one")


Tag = Callable[[list[str]], list[str]]


def _nltk() -> tuple[Tag, English]:
    english = English()
    return lambda words: [tag for _, tag in english.tagged(words)], english


def _textblob() -> tuple[Tag, English]:
    try:
        from textblob.en.taggers import PatternTagger
    except ImportError as error:
        raise UserError("TextBlob is not installed: pip install 'catpo[eval]'.") from error
    tagger = PatternTagger()
    return lambda words: [tag for _, tag in tagger.tag(" ".join(words), tokenize=False)], English()
