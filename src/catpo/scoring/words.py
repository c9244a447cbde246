"""Words that the reference might name in answers about a pair's pictures, and what it says of each when it is asked.

A word is a candidate if the reference gives one of its first tokens enough probability anywhere in the pair's responses, or if
a response names it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from catpo.core.errors import UserError, did_you_mean
from catpo.core.spec import Spec, check_options, parse
from catpo.core.types import SIDES, UNRANKED, Picture, PreferencePair, Sample
from catpo.files.checksums import checksum
from catpo.judges import Judge, as_verdicts, ask, open_judge
from catpo.models.family import Family
from catpo.models.loading import is_builtin
from catpo.models.output_head import OutputHead, token_probabilities
from catpo.models.questions import yes_less_no
from catpo.models.tensors import common_length
from catpo.rewards.word_rewards import FEATURES
from catpo.rewards.words import KEPT, REMOVED, UNKNOWN, WordRow, digest_of
from catpo.runtime.launcher import is_main_process
from catpo.scoring.claims import read_forms
from catpo.text.caption_edits import name_object
from catpo.text.object_words import default_vocabulary, mentions
from catpo.text.things import TAGGERS, finder

_logger = logging.getLogger(__name__)
SHORTEST = 3
"""Letters of the shortest token that stands for a word by itself: shorter beginnings are those of many words."""
SURE = 4.0
"""Logit of a judge's yes: it is right in 98 of 100 cases."""
LEAD = "There is the"
"""Words are tokenised behind this, as inside an answer."""
BUILTIN_ONLY = (
    "catpo: only words for the built-in objects are asked about. Name others in a JSON file, words(vocabulary='FILE'); for "
    "pairs, words(vocabulary='nltk') takes the nouns of their responses."
)


@dataclass(frozen=True)
class WordSettings:
    """Which words are looked for, and what is kept of them."""

    features: tuple[str, ...]
    floor: float
    question: str
    vocabulary: str | None
    """A JSON file of surface forms and their objects, `nltk` or `textblob` for the nouns that the pairs' responses name, or
    None for the built-in one."""
    nouns: tuple[tuple[str, str], ...] = ()
    """Surface forms and objects of the pairs, once they are known."""
    judge: str | None = None
    """Who is asked about words for the feature `judge`."""

    @classmethod
    def of(cls, text: str | Spec, judge: str | None = None) -> WordSettings:
        """The settings that `words(option=value, …)` stands for; the options are those of `_options`.

        Raises:
            UserError: an option is unknown or out of its range; a judge is named but not asked, or asked but not named.
        """
        spec = parse(text)
        if spec.name != "words":
            raise UserError(f"words='{spec}' is not of the form words(features=['self_question'], floor=0.02).")
        settings = cls(**_options(**check_options(_options, spec)), judge=judge)
        if ("judge" in settings.features) != (judge is not None):
            raise UserError(
                f"words='{spec}' with judge={judge}: a judge is asked for the feature 'judge', and needs a --judge. Give both, "
                "e.g. --words \"words(features=['judge'])\" --judge \"local(model='FOLDER')\"."
            )
        return settings

    def of_pairs(self, pairs: Iterable[PreferencePair]) -> WordSettings:
        """With the nouns of these pairs' responses, if they are the vocabulary.

        Raises:
            UserError: the tagger is not there, or finds nothing.
        """
        if self.vocabulary not in TAGGERS:
            return self
        find, forms = finder(self.vocabulary), dict[str, str]()
        for text in (text for pair in pairs for text in (pair.chosen, pair.rejected)):
            for thing in find(text)[1]:
                forms |= {thing.bare: thing.name, thing.name: thing.name}
        if not forms:
            raise UserError(
                f"words(vocabulary='{self.vocabulary}') finds no noun in the pairs' responses. Give a file of words."
            )
        return replace(self, nouns=tuple(sorted(forms.items())))

    def provenance(self, judge: Judge | None = None) -> dict[str, Any]:
        """As it stands in a store's `store.json`, with who `judge` is: another model may answer to the same name."""
        forms = sorted(self.forms.items())
        digest = checksum(repr(forms).encode())
        own = {"features": list(self.features), "floor": self.floor, "question": self.question, "vocabulary": digest}
        return own | ({"judge": self.judge} if self.judge else {}) | ({"judged_by": judge.identity} if judge else {})

    def asked(self, word: str) -> str:
        """What is asked about a word."""
        return self.question.replace("{}", name_object(word, 1, self.forms))

    @cached_property
    def forms(self) -> Mapping[str, str]:
        """Surface form -> object.

        Raises:
            UserError: they are the nouns of pairs, which are not known; or the file cannot be read.
        """
        if self.vocabulary in TAGGERS:
            if not self.nouns:
                raise UserError(
                    f"words(vocabulary='{self.vocabulary}') looks for the nouns of pairs, and there are none here. Give a JSON "
                    "file of words."
                )
            return dict(self.nouns)
        if self.vocabulary is None:
            return default_vocabulary()
        return read_forms(self.vocabulary)


def _options(
    *,
    features: Sequence[str] = ("self_question", "log_prob"),
    floor: float = 0.02,
    question: str = "Is there {} in the image?",
    vocabulary: str | None = None,
) -> dict[str, Any]:
    """Options of `words(…)`.

    Args:
        features: what is kept of each word, see `catpo.rewards.word_rewards.FEATURES`; judge asks the one that --judge names.
        floor: least probability of a word's first token, anywhere in a response, that makes it a candidate.
        question: asked about each candidate; {} stands for the word with its article.
        vocabulary: JSON file of surface forms and their objects, or `nltk` or `textblob`, whose tagger finds the pairs' nouns.
    """
    if isinstance(features, str) or not features:
        raise UserError(f"words(features={features!r}): give a list of {', '.join(FEATURES)}.")
    for name in features:
        if name not in FEATURES:
            raise UserError(f"words has no feature '{name}'. {did_you_mean(str(name), FEATURES)}")
    if not 0 < floor < 1:
        raise UserError(f"words(floor={floor}) must be a probability between 0 and 1.")
    if question.count("{}") != 1:
        raise UserError(f"words(question={question!r}): write {{}} where the word goes, once.")
    return {"features": tuple(features), "floor": floor, "question": question, "vocabulary": vocabulary}


@dataclass(frozen=True)
class Read:
    """What the scoring pass knows of one pair."""

    pair: PreferencePair
    predicting: Float[Tensor, "tokens width"]
    """Final hidden states that predict the tokens of both responses."""
    patches: Float[Tensor, "patches width"] | None
    """Final hidden states of the patches; None where no feature reads them."""


class WordReader:
    """Finds the candidates of pairs and asks the reference about them; a word is asked once about the same pictures."""

    def __init__(self, family: Family, settings: WordSettings, batch_tokens: int | None = None) -> None:
        self.family, self.settings, self.batch_tokens = family, settings, batch_tokens
        if settings.vocabulary is None and is_main_process() and not is_builtin(family):
            print(BUILTIN_ONLY, file=sys.stderr)
        self.token_forms = _token_forms(family, settings.forms)
        self.first_tokens = {word: tuple(sorted({form[0] for form in forms})) for word, forms in self.token_forms.items()}
        self._every = torch.tensor(sorted({token for tokens in self.first_tokens.values() for token in tokens}))
        self._column = {token: column for column, token in enumerate(self._every.tolist())}
        self.answers: dict[tuple[str, str], float] = {}
        """(digest of pictures, word) -> logit of yes less that of no."""
        self.judge = None if settings.judge is None else open_judge(settings.judge)

    def forget(self, *, but: Collection[str] = ()) -> None:
        """Ask anew from here on, but about pictures with these digests: what a shard holds must not depend on those before."""
        self.answers = {key: answer for key, answer in self.answers.items() if key[0] in but}

    @property
    def reads_patches(self) -> bool:
        return "patch_lens" in self.settings.features

    def rows(self, reads: Sequence[Read], head: OutputHead) -> list[list[WordRow]]:
        """The candidates of each pair with their features."""
        found = [self._found(read, head) for read in reads]
        pairs = [read.pair for read in reads]
        if "self_question" in self.settings.features:
            self.ask(pairs, found)
        if self.judge is not None:
            self._judged(self.judge, pairs, found)
        return [self._rows_of(pair, words) for pair, words in zip(pairs, found, strict=True)]

    def _judged(self, judge: Judge, pairs: Sequence[PreferencePair], found: Sequence[dict[str, dict[str, float]]]) -> None:
        """What the judge says of each pair's words; words of which it cannot be read are no candidates."""

        def verdicts(pair: PreferencePair, words: Sequence[str]) -> Sequence[float] | None:
            sample = Sample(pair.id, pair.images, pair.prompt)
            questions = [self.question(word) for word in words]
            margins = judge.margins(sample, questions) if words else ()
            if margins is not None:
                return margins
            said = ask(judge, "verify", sample, as_verdicts(len(words)), questions="\n".join(questions))
            return said and [SURE if is_there else -SURE for is_there in said]

        with ThreadPoolExecutor(judge.workers) as pool:
            answers = list(pool.map(verdicts, pairs, map(list, found)))
        for pair, words, logits in zip(pairs, found, answers, strict=True):
            if logits is None:
                _logger.warning("pair %s: the judge's reply cannot be read; its words get no reward.", pair.id)
                words.clear()
            else:
                for features, logit in zip(words.values(), logits, strict=True):
                    features["judge"] = float(logit)

    def _found(self, read: Read, head: OutputHead) -> dict[str, dict[str, float]]:
        """Candidate -> the features that need no question."""
        every = self._every.to(read.predicting.device)
        largest = token_probabilities(read.predicting, head, every).amax(0).log().tolist()
        lens = None
        if read.patches is not None:
            lens = token_probabilities(read.patches, head, every).amax(0).log().tolist()
        named = {name for text in (read.pair.chosen, read.pair.rejected) for name in self._named(text)}
        found = {}
        for word, tokens in self.first_tokens.items():
            log_prob = max(largest[self._column[token]] for token in tokens)
            if word in named or log_prob >= _log(self.settings.floor):
                found[word] = {"log_prob": log_prob}
                if lens is not None:
                    found[word]["patch_lens"] = max(lens[self._column[token]] for token in tokens)
        return found

    def ask(self, items: Sequence[PreferencePair | Sample], candidates: Sequence[Iterable[str]]) -> None:
        """Ask about each item's words that were not asked about the same pictures before."""
        new: dict[str, tuple[Sequence[Picture], dict[str, None]]] = {}
        for item, words in zip(items, candidates, strict=True):
            digest = digest_of(item.images)
            of_pictures = new.setdefault(digest, (item.images, {}))[1]
            of_pictures |= {word: None for word in words if (digest, word) not in self.answers}
        asked = [(images, [self.question(word) for word in words]) for images, words in new.values()]
        said = yes_less_no(self.family, asked, batch_tokens=self.batch_tokens)
        for (digest, (_, words)), answers in zip(new.items(), said, strict=True):
            self.answers |= {(digest, word): answer for word, answer in zip(words, answers, strict=True)}

    def question(self, word: str) -> str:
        """What is asked about a word."""
        return self.settings.asked(word)

    def _rows_of(self, pair: PreferencePair, words: Mapping[str, dict[str, float]]) -> list[WordRow]:
        labels, digest, rows = self._labels(pair), digest_of(pair.images), []
        for word, features in words.items():
            if (digest, word) in self.answers:
                features["self_question"] = self.answers[digest, word]
            kept = {name: features[name] for name in self.settings.features}
            label, forms = labels.get(word, UNKNOWN), self.token_forms[word]
            rows.append(WordRow(pair.id, digest, word, self.first_tokens[word], label, kept, forms))
        return rows

    def _labels(self, pair: PreferencePair) -> dict[str, int]:
        """What the pair says of words: by its labels if it has any, else by which of its responses names them."""
        if pair.meta.get(UNRANKED):
            return {}
        if not pair.labels:
            return dict.fromkeys(self._named(pair.rejected), REMOVED) | dict.fromkeys(self._named(pair.chosen), KEPT)
        labels: dict[str, int] = {}
        for side in SIDES:
            for span in pair.labels.get(side, ()):
                label = KEPT if span.label == "grounded" else REMOVED
                labels |= dict.fromkeys(self._named(pair.response(side)[span.start : span.end]), label)
        return labels

    def _named(self, text: str) -> list[str]:
        return [mention.object for mention in mentions(text, self.settings.forms)]


def _log(probability: float) -> float:
    return float(torch.tensor(probability).log())


def _token_forms(family: Family, forms: Mapping[str, str]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Object -> the tokens of its forms inside an answer, of those whose first token stands for a word by itself; objects
    without such a form are left out.
    """
    before = family.token_ids(LEAD)
    tokens: dict[str, set[tuple[int, ...]]] = {}
    for form, name in forms.items():
        inside = family.token_ids(f"{LEAD} {form}")
        common = common_length(before, inside)
        text = family.tokenizer.decode(inside[common : common + 1]).strip()
        if common < len(inside) and (len(text) >= SHORTEST or text == form):
            tokens.setdefault(name, set()).add(tuple(inside[common:]))
    if not tokens:
        raise UserError(
            f"{family.model_id}: no word of the vocabulary begins with a token of its own. Give another vocabulary."
        )
    return {name: tuple(sorted(of_word)) for name, of_word in tokens.items()}
