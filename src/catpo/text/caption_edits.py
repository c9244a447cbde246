"""Edit English descriptions: replace one object by another, or remove an object from a sentence. Knows nothing of pictures.

Rules over words, no parser: what cannot be edited with confidence is refused, and the caller drops it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from catpo.text.object_words import NUMBERS, classes, default_vocabulary, mentions

ONE = ("a", "an", "one", "another", "1")
MANY = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "some", "several", "many")
DEFINITE = ("the", "this", "that", "these", "those", "its", "his", "her", "their", "each", "every")
MEASURES = "piece|slice|loaf|pair|group|herd|flock|couple|bunch|pile|stack|row|set|number"
PREPOSITIONS = (
    "to the left of", "to the right of", "on the left of", "on the right of", "on the left side of", "on the right side of",
    "on top of", "in front of", "in the middle of", "along with", "together with", "surrounded by", "next to", "close to",
    "across from", "beside", "behind", "near", "underneath", "under", "beneath", "below", "above", "over", "between", "without",
    "within", "with", "inside", "into", "onto", "on", "in", "at", "by", "of", "from", "around", "against", "among", "towards",
    "toward", "including", "for", "along", "across", "through", "outside", "like", "such as", "as",
)  # fmt: skip
VERBS = (
    "is|are|was|were|has|have|can|could|shows?|sees?|seen|contains?|includes?|features?|depicts?|displays?|appears?|"
    "sits?|stands?|lies|lays?|hangs?|looks?|holds?|rests?|floats?|flies|plays?|runs?|walks?"
)
TAKES_OBJECT = "shows?|sees?|contains?|includes?|features?|depicts?|displays?|has|have|holds?|showing|featuring"

_PREPOSITION = "(?:" + "|".join(re.escape(words) for words in PREPOSITIONS) + ")"
_DETERMINER = "(?:" + "|".join((*ONE, *MANY, *DEFINITE, r"\d+")) + ")"
_NOT_ADJECTIVE = re.compile(
    rf"^(?:{_DETERMINER}|{_PREPOSITION}|{VERBS}|be|been|there|and|or|but|while|which|who|to|we|it)$", re.I
)
_BEFORE_NOUN = re.compile(rf"\b(?P<determiner>{_DETERMINER})\s+(?P<between>(?:[\w'-]+\s+){{0,3}})$", re.I)
_MEASURE = re.compile(rf"\b(?P<determiner>{_DETERMINER})\s+(?:{MEASURES}|loaves)s?\s+of\s+$", re.I)
_SENTENCE = re.compile(r"[^.!?\n]*[.!?]+[\"')\]]*[^\S\n]*\n*|[^.!?\n]+\n*|\n+")


@dataclass(frozen=True)
class NounPhrase:
    """An object as a text names it, with determiner and adjectives: `text[start:end]`."""

    start: int
    end: int
    object: str
    determiner: str
    """In lower case; empty if there is none."""
    is_plural: bool

    @property
    def is_definite(self) -> bool:
        return self.determiner in DEFINITE


def noun_phrases(text: str, vocabulary: Mapping[str, str] | None = None) -> list[NounPhrase]:
    """Every object that the text names, with the words that belong to it.

    >>> [("A small dog and two cats."[p.start : p.end], p.is_plural) for p in noun_phrases("A small dog and two cats.")]
    [('A small dog', False), ('two cats', True)]
    """
    words = default_vocabulary() if vocabulary is None else vocabulary
    phrases, end = [], 0
    for mention in mentions(text, words):
        start, determiner = _start(text[end : mention.start])
        noun = text[mention.start : mention.end]
        plural = determiner in MANY or (determiner.isdigit() and determiner != "1")
        is_plural = plural or (determiner not in ONE and _is_plural_form(noun, mention.object, words))
        phrases.append(NounPhrase(end + start, mention.end, mention.object, determiner, is_plural))
        end = mention.end
    return phrases


def _start(before: str) -> tuple[int, str]:
    """Where a noun's phrase begins in the words before it, and its determiner."""
    for pattern in (_MEASURE, _BEFORE_NOUN):
        match = pattern.search(before)
        while match:
            between = match.groupdict().get("between") or ""
            if not any(_NOT_ADJECTIVE.match(word) for word in between.split()):
                return match.start(), match["determiner"].lower()
            match = pattern.search(before, match.start() + 1)
    return len(before), ""


def _is_plural_form(noun: str, name: str, vocabulary: Mapping[str, str]) -> bool:
    noun = " ".join(noun.lower().split())
    item = classes().get(name)
    if item is not None and noun == item.plural:
        return noun != item.name
    if item is not None and noun == item.name:
        return noun.endswith("s") and item.one != f"{article(noun)} {noun}"  # scissors, but not bus
    singulars = {noun.removesuffix(ending) for ending in ("s", "es") if noun.endswith(ending)} | {re.sub("ies$", "y", noun)}
    return any(form in vocabulary and form != noun for form in singulars)


def name_object(name: str, count: int | None, vocabulary: Mapping[str, str] | None = None, *, bare: bool = False) -> str:
    """An object with its article or number, or `bare`; count None is any number above one.

    >>> name_object("knife", 2), name_object("bread", 1), name_object("knife", 1, bare=True)
    ('two knives', 'a loaf of bread', 'knife')
    """
    words = default_vocabulary() if vocabulary is None else vocabulary
    one, plural = _forms(name, words)
    if count == 1:
        return one.split(" ", 1)[1] if bare else one
    if bare:
        return plural
    if count is None:
        return f"some {plural}"
    return f"{NUMBERS[count] if count < len(NUMBERS) else count} {plural}"


def _forms(name: str, vocabulary: Mapping[str, str]) -> tuple[str, str]:
    """Singular with its article, and plural."""
    item = classes().get(name)
    if item is not None and vocabulary.get(item.name) == name:
        return item.one, item.plural
    known = sorted((form for form, what in vocabulary.items() if what == name), key=lambda form: (len(form), form))
    singular = name if name in known or not known else known[0]
    guesses = [singular + "s", singular + "es", re.sub("y$", "ies", singular)]
    plural = next((form for form in guesses if form in known and form != singular), guesses[0])
    return f"{article(singular)} {singular}", plural


def article(noun: str) -> str:
    """The indefinite article of a noun.

    >>> article("apple"), article("unicycle"), article("hourglass")
    ('an', 'a', 'an')
    """
    is_vowel = re.match(r"(?!uni|use|eu|one)[aeiou]|hour|honest|heir", noun, re.I)
    return "an" if is_vowel else "a"


# ---- replacing an object ------------------------------------------------------------------------------------------------


def replace_object(
    text: str, old: str, new: str, *, count: int | None = None, vocabulary: Mapping[str, str] | None = None
) -> str | None:
    """The text with `new` wherever `old` was named: `count` of them, or as many as the text has if None.

    Returns None where that is too risky: a verb would have to change whose other form is not known here, the name is part of
    a longer one ("ski lift"), or the text says "the dog" before it introduced a dog.

    >>> replace_object("There is a dog. A cat is below the dog.", "dog", "owl", count=2)
    'There are two owls. A cat is below the owls.'
    """
    phrases = [phrase for phrase in noun_phrases(text, vocabulary) if phrase.object == old]
    if phrases and (phrases[0].is_definite or any(is_attached(text, phrase) for phrase in phrases)):
        return None
    for phrase in reversed(phrases):
        edited = _replace_phrase(text, phrase, _is_many(phrase, phrases), new, count, vocabulary)
        if edited is None:
            return None
        text = edited
    return text


def _is_many(phrase: NounPhrase, phrases: Sequence[NounPhrase]) -> bool:
    """Whether a phrase is plural; for "the deer", the phrase that introduced them decides."""
    item = classes().get(phrase.object)
    if phrase.is_definite and item is not None and item.plural == item.name:
        return next((other for other in phrases if other.determiner and not other.is_definite), phrase).is_plural
    return phrase.is_plural


def _replace_phrase(
    text: str, phrase: NounPhrase, was_many: bool, new: str, count: int | None, vocabulary: Mapping[str, str] | None
) -> str | None:
    is_many = was_many if count is None else count > 1
    before, old, after = text[: phrase.start], text[phrase.start : phrase.end], text[phrase.end :]
    if is_many != was_many:
        agreed = _agree(before, after, is_many)
        if agreed is None:
            return None
        before, after = agreed
    noun = name_object(new, None if is_many else 1, vocabulary, bare=True)
    if phrase.is_definite:
        fresh = f"{_definite(phrase.determiner, is_many)} {noun}"
    elif not phrase.determiner:
        fresh = noun
    elif count is None and is_many:
        fresh = f"{phrase.determiner} {noun}"
    else:
        fresh = name_object(new, count or 1, vocabulary)
    if old[:1].isupper() and not before.strip().endswith(","):
        fresh = fresh[:1].upper() + fresh[1:]
    return before + fresh + after


def _definite(determiner: str, is_many: bool) -> str:
    forms = {"this": "these", "that": "those"} if is_many else {"these": "this", "those": "that"}
    return forms.get(determiner, determiner)


_FORMS = {"is": "are", "was": "were", "has": "have"}


def _agree(before: str, after: str, is_many: bool) -> tuple[str, str] | None:
    """The words around a phrase after a change of its number; None if its verb is not a known one."""
    forms = _FORMS if is_many else {many: one for one, many in _FORMS.items()}
    there = re.search(r"\b(there )(is|are|was|were)((?: also| still)? )$", before, re.I)
    if there:
        before = before[: there.start(2)] + forms.get(there[2].lower(), there[2]) + before[there.end(2) :]
    is_inside = re.search(rf"(?:\band|,|\b{_PREPOSITION})\s+$", before, re.I)  # then it is not the next verb's subject
    verb = re.match(r"(\s+)(is|are|was|were|has|have)\b", after)
    if is_inside or re.match(
        rf"\s*(?:$|[^\w\s])|\s+(?:{_PREPOSITION}|and|or|can|could|there|we|I|you|while|that)\b", after, re.I
    ):
        return before, after
    if verb:
        return before, verb[1] + forms.get(verb[2], verb[2]) + after[verb.end() :]
    return None


# ---- removing objects ---------------------------------------------------------------------------------------------------

ITEM, PHRASE, CLAUSE, SENTENCE, REWRITE = range(5)
"""What may be cut, preferred first."""


def remove_objects(text: str, unwanted: Sequence[str], vocabulary: Mapping[str, str] | None = None) -> str:
    """The text without the unwanted objects: the smallest cut per sentence that leaves a sentence and loses no other object.

    In this order of preference: a list item, a phrase with its preposition, a clause, the sentence. If each of these would
    lose a wanted object, the sentence becomes "There is ..." with the wanted ones. The result may be empty.

    >>> remove_objects("There is a dog, a cat and an owl. A fox is next to the cat.", ["cat"])
    'There is a dog and an owl. There is a fox.'
    """
    sentences = _SENTENCE.findall(text)
    kept: list[str] = []
    was_dropped = False
    for index, sentence in enumerate(sentences):
        names = {phrase.object for phrase in noun_phrases(sentence, vocabulary)}
        if was_dropped and not names and re.match(r"\s*(?:It|They|This|These|He|She)\b", sentence):
            continue  # it was about what was dropped
        if names & set(unwanted):
            needed = names - set(unwanted) - _introduced("".join(kept), "".join(sentences[index + 1 :]), vocabulary)
            sentence = _without(sentence, set(unwanted), needed, vocabulary)
            was_dropped = not sentence.strip()
        elif names:
            was_dropped = False
        kept.append(sentence)
    return "".join(kept).strip()


def _introduced(before: str, after: str, vocabulary: Mapping[str, str] | None) -> set[str]:
    """Objects that a sentence between these need not name: introduced before, or later ("the dog" introduces none)."""
    known = {phrase.object for phrase in noun_phrases(before, vocabulary)}
    return known | {phrase.object for phrase in noun_phrases(after, vocabulary) if not phrase.is_definite}


def _without(sentence: str, unwanted: set[str], needed: set[str], vocabulary: Mapping[str, str] | None) -> str:
    """One sentence without the unwanted objects."""
    original = sentence
    for _ in range(len(noun_phrases(original, vocabulary))):
        phrases = noun_phrases(sentence, vocabulary)
        bad = next((phrase for phrase in phrases if phrase.object in unwanted), None)
        if bad is None:
            break
        choices = [(SENTENCE, ""), (REWRITE, _there_is(original, unwanted, needed, vocabulary))]
        for rank, cut in _cuts(sentence, bad, phrases):
            tidied = _tidy(cut, original)
            if _is_sentence(tidied, original):
                choices.append((rank, tidied))
        by_cost: dict[tuple[int, int, int], str] = {}
        for rank, choice in choices:
            kept = {phrase.object for phrase in noun_phrases(choice, vocabulary)}
            by_cost.setdefault((len(needed - kept), rank, -len(choice)), choice)
        sentence = by_cost[min(by_cost)]
    return sentence


def _cuts(sentence: str, bad: NounPhrase, phrases: Sequence[NounPhrase]) -> Iterator[tuple[int, str]]:
    """The sentence after each possible cut, with the cut's rank."""
    before, after = sentence[: bad.start], sentence[bad.end :]
    if is_attached(sentence, bad):
        yield from ((CLAUSE, sentence[:start] + sentence[end:]) for start, end in _clauses(sentence, bad))
        return
    item_before = re.search(r"(?:,?\s+(?:and|or|as well as)|,)\s+$", before)
    ends_list = re.match(r"\s*(?:[,.;!?]|$|(?:and|or)\b)", after)
    is_subject = re.match(rf"\s+(?:{VERBS})\b", after) and _VERB.search(before)  # "..., and a CAT is sleeping"
    if item_before and (ends_list or (item_before.group().strip() != "," and not is_subject)):
        yield ITEM, before[: item_before.start()] + after
    item_after = re.match(r",?\s+(?:and|or|as well as)\s+|,\s+", after)
    follower = next((other for other in phrases if item_after and other.start == bad.end + item_after.end()), None)
    if item_after and follower:
        lost_article = bad.determiner in ONE and not follower.determiner and not follower.is_plural
        noun = after[item_after.end() :]
        yield ITEM, before + (f"{article(noun)} " if lost_article else "") + noun
    phrase_before = re.search(
        rf"(?:^|,?\s+)(?:(?:which|that)\s+(?:is|are)\s+)?(?:(?:located|placed|parked|situated|just|right|directly)\s+)*"
        rf"(?:{_PREPOSITION}|\w+ing)\s+$",
        before,
        re.I,
    )
    if phrase_before:
        is_main = not before[: phrase_before.start()].strip()
        yield PHRASE, before[: phrase_before.start()] + (re.sub(r"^,?\s+", "", after) if is_main else after)
    phrase_after = re.match(rf",?\s+(?:(?:is|are|sits?|stands?|\w+ing)\s+)?{_PREPOSITION}\s+", after, re.I)
    if phrase_after and any(other.start == bad.end + phrase_after.end() and not other.is_definite for other in phrases):
        yield CLAUSE, before + after[phrase_after.end() :]  # "a CAT next to a dog" -> "a dog"
    yield from ((CLAUSE, sentence[:start] + sentence[end:]) for start, end in _clauses(sentence, bad))


def is_attached(text: str, phrase: NounPhrase) -> bool:
    """Whether the object's name goes on in the next word, as far as rules can tell: "the SKI lift"."""
    return not re.match(
        rf"\s*(?:$|[^\w\s])|\s+(?:{_PREPOSITION}|{VERBS}|and|or|but|while|where|which|that|who|there|we|I|you|to|also|nearby|visible|"
        rf"\w+ing|\w+ed)\b",
        text[phrase.end :],
        re.I,
    )


def _clauses(sentence: str, bad: NounPhrase) -> Iterator[tuple[int, int]]:
    """From one clause border to the next around the phrase; a verb must be left before, or after a clause that comes first."""
    borders = list(re.finditer(r"[,;]\s*(?:and|while|but|with)?\s*|\s+(?:and|while|but|with|where)\s+", sentence))
    last = len(sentence.rstrip()) - (1 if sentence.rstrip()[-1:] in ".!?" else 0)
    ends = [border for border in borders if border.start() >= bad.end]
    for start in (border for border in borders if border.end() <= bad.start):
        if _VERB.search(sentence[: start.start()]):
            yield start.start(), last
            yield from ((start.start(), end.start()) for end in ends if end.group().startswith((",", ";")))
    for end in ends:
        main = re.match(r"(?!\w+ing\b)[^,;]*", sentence[end.end() :])
        if main and _VERB.search(main.group()):
            yield 0, end.end()


def _tidy(sentence: str, original: str) -> str:
    """Repair white space, verb and capital letter after a cut."""
    tail = original[len(original.rstrip()) :]
    words = re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"[^\S\n]+", " ", sentence)).strip()
    words = re.sub(r",(?=[.!?]|$)", "", words)
    if re.search(r",[^,]*,\s+(?:and|or)\b", original) and words.count(",") == 1:  # of "a, b, and c" two are left
        words = re.sub(r",(?=\s+(?:and|or)\b)", "", words)
    match = re.match(rf"(?P<head>(?:.*\b)?there )(?P<verb>are|were)(?P<rest> (?:{'|'.join(ONE)}) .*)", words, re.I | re.S)
    if match and not re.search(r"\band\b|,", match["rest"]):
        words = match["head"] + {"are": "is", "were": "was"}[match["verb"].lower()] + match["rest"]
    subject = re.match(rf"(?P<head>(?:{'|'.join(ONE)}) [\w' -]+? )(?P<verb>are|were)\b", words, re.I)
    if subject and not re.search(r"\band\b", subject["head"]):
        words = subject["head"] + {"are": "is", "were": "was"}[subject["verb"].lower()] + words[subject.end() :]
    if original.lstrip()[:1].isupper():
        words = words[:1].upper() + words[1:]
    return words + tail if words else ""


_DANGLING = re.compile(
    rf"\b(?:{_PREPOSITION}|{_DETERMINER}|and|or|but|while|{TAKES_OBJECT}|is|are|was|were|be|there)\s*(?:[,.;:!?]|$)", re.I
)
_BROKEN = re.compile(
    rf"\b(?:{TAKES_OBJECT})\s+(?:{_PREPOSITION}|and|or)\b|\bthere (?:is|are|was|were) (?:{_PREPOSITION}|and|or)\b|"
    rf"\b(?:and|or|,)\s*(?:and|or|,)(?!\w)|\b(?:{_PREPOSITION}|a|an|the)\s+(?:and|or|there|is|are|can)\b|"
    rf"\bbetween\b(?!.*\band\b)",
    re.I | re.S,
)
_BAD_START = re.compile(rf"^\W*(?:{VERBS}|be|and|or|but|while|which|that|of)\b|^\s*[,.;:!?]", re.I)
_VERB = re.compile(rf"\b(?:{VERBS})\b", re.I)


def _is_sentence(choice: str, original: str) -> bool:
    """Whether a cut left a sentence: no dangling words, and a verb if there was one."""
    if not re.search(r"\w", choice):
        return False
    join = re.search(r",?\s*\b(?:while|but|where)\b", choice)
    if join and _VERB.search(original) and not _VERB.search(choice[: join.start()]):
        return False  # "In the picture, while a cat is sleeping."
    has_new_fault = any(
        pattern.search(choice) and not pattern.search(original.strip()) for pattern in (_DANGLING, _BROKEN, _BAD_START)
    )
    return not has_new_fault and (bool(_VERB.search(choice)) or not _VERB.search(original))


def _there_is(original: str, unwanted: set[str], needed: set[str], vocabulary: Mapping[str, str] | None) -> str:
    """The needed objects, in a sentence of their own; empty if there are none."""
    items, are_many = [], []
    for phrase in noun_phrases(original, vocabulary):
        if phrase.object in needed and phrase.object not in unwanted:
            if phrase.determiner and not phrase.is_definite:
                words = original[phrase.start : phrase.end]
                items.append(words[:1].lower() + words[1:])
            else:
                items.append(name_object(phrase.object, None if phrase.is_plural else 1, vocabulary))
            are_many.append(phrase.is_plural)
            needed = needed - {phrase.object}
    if not items:
        return ""
    listed = items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
    return f"There {'are' if are_many[0] else 'is'} {listed}.{original[len(original.rstrip()) :]}"
