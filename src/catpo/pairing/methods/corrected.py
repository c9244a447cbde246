"""Chosen is the model's own answer with its hallucinated objects corrected from the truth (the part people play in RLHF-V)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from catpo.core.types import PreferencePair, Sample
from catpo.pairing.methods import Dropped, finish, present_objects
from catpo.text.caption_edits import MANY, ONE, name_object, noun_phrases, remove_objects, replace_object
from catpo.text.object_words import default_vocabulary, mentions


def make(
    sample: Sample,
    answer: str,
    rng: random.Random,
    vocabulary: Mapping[str, str] | None = None,
    *,
    replace: bool = True,
    counts: bool = False,
) -> PreferencePair | Dropped:
    """The smallest edit of the answer that leaves no hallucinated object; the answer itself is rejected.

    An object that is not there gives its place in the sentence to one that is there and was not named, or, when all are named,
    is cut out (list item, phrase, clause or sentence). Which objects are there is read from `sample.truth["present"]`, how
    many of each from `sample.truth["counts"]` if given. What the answer says of places stays as it is.

    Args:
        sample: the picture with its truth.
        answer: the model's answer.
        rng: chooses among the objects that could take a place.
        vocabulary: surface form -> object; the built-in words if None.
        replace: let present objects take the place of absent ones; False only cuts.
        counts: correct wrong numbers too ("two dogs" for one).

    Raises:
        UserError: `sample.truth` does not say what is present.
    """
    present = present_objects(sample)
    answer = answer.strip()
    if not answer:
        return Dropped("empty answer")
    if re.search(r"[.!?]\s", answer) and not re.search(r"[.!?][\"')\]]*$", answer):
        return Dropped("unfinished answer")
    editor = _Editor(present, dict(sample.truth.get("counts", {})), rng, vocabulary)
    chosen, edits = editor.correct(answer, replace=replace, counts=counts)
    if not edits:
        return Dropped("nothing to correct")
    if not mentions(chosen, vocabulary):
        return Dropped("nothing left")
    if editor.absent(chosen):
        return Dropped("not correctable")
    return finish(sample, chosen, answer, present, vocabulary, {"edits": edits})


class _Editor:
    """Corrects answers about one picture."""

    def __init__(
        self, present: Sequence[str], counts: Mapping[str, Any], rng: random.Random, vocabulary: Mapping[str, str] | None
    ) -> None:
        self.present, self.counts, self.rng, self.vocabulary = present, counts, rng, vocabulary
        self.nameable = set((default_vocabulary() if vocabulary is None else vocabulary).values())

    def correct(self, text: str, *, replace: bool, counts: bool) -> tuple[str, list[list[str]]]:
        """The corrected text, and what was done: [["replaced", "cat", "owl"], ["removed", "fox"], …]."""
        edits: list[list[str]] = []
        for name in self.absent(text) if replace else []:
            replaced = self._replaced(text, name)
            if replaced is not None:
                text, taker = replaced
                edits.append(["replaced", name, taker])
        left = self.absent(text)
        if left:
            text = remove_objects(text, left, self.vocabulary)
            edits += [["removed", name] for name in left]
        return self._counted(text, edits) if counts else (text, edits)

    def absent(self, text: str) -> list[str]:
        """Objects that the text names and the picture does not show, in order."""
        names = dict.fromkeys(mention.object for mention in mentions(text, self.vocabulary))
        return [name for name in names if name not in self.present]

    def _replaced(self, text: str, name: str) -> tuple[str, str] | None:
        """The text with a present, not yet named object in the place of `name`, and which; best one of the same number."""
        named = {mention.object for mention in mentions(text, self.vocabulary)}
        takers = [other for other in self.present if other not in named and other in self.nameable]
        if not takers:
            return None
        is_many = next(phrase.is_plural for phrase in noun_phrases(text, self.vocabulary) if phrase.object == name)
        fitting = [other for other in takers if (self.counts.get(other, 2 if is_many else 1) > 1) == is_many]
        taker = self.rng.choice(fitting or takers)
        edited = self._put(text, name, taker)
        found = {mention.object for mention in mentions(edited, self.vocabulary)}
        return (edited, taker) if taker in found and name not in found else None

    def _put(self, text: str, name: str, taker: str) -> str:
        """In its true number where the sentence allows it, else in the number of the text."""
        count = self.counts.get(taker)
        edited = replace_object(text, name, taker, count=count, vocabulary=self.vocabulary) if count else None
        return edited or replace_object(text, name, taker, vocabulary=self.vocabulary) or text

    def _counted(self, text: str, edits: list[list[str]]) -> tuple[str, list[list[str]]]:
        """Wrong numbers of present objects corrected."""
        for name, count in self.counts.items():
            told = [phrase for phrase in noun_phrases(text, self.vocabulary) if phrase.object == name]
            told = [
                phrase
                for phrase in told
                if phrase.determiner in ONE or phrase.determiner in MANY or phrase.determiner.isdigit()
            ]
            right = name_object(name, count, self.vocabulary).split(" ", 1)[0]
            is_right = not told or told[0].determiner == right or (count == 1 and told[0].determiner in ONE)
            if not is_right and told[0].determiner not in ("some", "several", "many"):
                edited = replace_object(text, name, name, count=count, vocabulary=self.vocabulary)
                if edited and edited != text:
                    text, edits = edited, [*edits, ["counted", name, str(count)]]
        return text, edits
