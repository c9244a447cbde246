"""Chosen is the model's answer with its hallucinated objects corrected from the truth, as annotators do in RLHF-V."""

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

    An absent object is replaced by a present one that was not named or, when all are named, cut out (list item, phrase, clause
    or sentence). `sample.truth["present"]` lists the objects, `sample.truth["counts"]` their numbers, if known. What the answer
    says about positions is left unchanged.

    Args:
        rng: chooses among the objects that could replace an absent one.
        replace: replace absent objects by present ones; False only cuts.
        counts: correct wrong numbers too ("two dogs" for one).

    Raises:
        UserError: `sample.truth` does not list the present objects.
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
        """The corrected text and its edits: [["replaced", "cat", "owl"], ["removed", "fox"], …]."""
        edits: list[list[str]] = []
        for absent in self.absent(text) if replace else []:
            substitute = self._substitute(text, absent)
            if substitute is None:
                continue
            edited = self._replaced(text, absent, substitute)
            named = self._named(edited)
            if substitute in named and absent not in named:
                text = edited
                edits.append(["replaced", absent, substitute])
        left = self.absent(text)
        if left:
            text = remove_objects(text, left, self.vocabulary)
            edits += [["removed", absent] for absent in left]
        if counts:
            for name, count in self.counts.items():
                edited = self._counted(text, name, count)
                if edited != text:
                    text = edited
                    edits.append(["counted", name, str(count)])
        return text, edits

    def absent(self, text: str) -> list[str]:
        """Objects that the text names and the picture does not show, in order."""
        return [name for name in self._named(text) if name not in self.present]

    def _named(self, text: str) -> list[str]:
        return list(dict.fromkeys(mention.object for mention in mentions(text, self.vocabulary)))

    def _substitute(self, text: str, absent: str) -> str | None:
        """A present object that is not named yet, of the same number (one or many) if there is one."""
        named = self._named(text)
        candidates = [name for name in self.present if name not in named and name in self.nameable]
        if not candidates:
            return None
        is_many = next(phrase.is_plural for phrase in noun_phrases(text, self.vocabulary) if phrase.object == absent)
        same_number = []
        for name in candidates:
            count = self.counts.get(name)
            if count is None or (count > 1) == is_many:  # an unknown number fits
                same_number.append(name)
        return self.rng.choice(same_number or candidates)

    def _replaced(self, text: str, absent: str, substitute: str) -> str:
        """With the substitute in its true number where the sentence allows it, else in the number of the text."""
        count = self.counts.get(substitute)
        edited = replace_object(text, absent, substitute, count=count, vocabulary=self.vocabulary) if count else None
        return edited or replace_object(text, absent, substitute, vocabulary=self.vocabulary) or text

    def _counted(self, text: str, name: str, count: int) -> str:
        """With the number of a present object corrected, if the text gives a wrong one."""
        for phrase in noun_phrases(text, self.vocabulary):
            word = phrase.determiner
            if phrase.object != name or not (word in ONE or word in MANY or word.isdigit()):
                continue
            right = name_object(name, count, self.vocabulary).split(" ", 1)[0]
            is_right = word == right or (count == 1 and word in ONE) or word in ("some", "several", "many")
            edited = None if is_right else replace_object(text, name, name, count=count, vocabulary=self.vocabulary)
            return edited or text  # the first number decides
        return text
