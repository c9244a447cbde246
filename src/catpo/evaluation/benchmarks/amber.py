"""AMBER: objects of 1,004 descriptions (CHAIR, Cover, Hal, Cog) and 14,216 yes/no questions, as its inference.py counts them.

    amber    amber(part='generative', similarity='identity')

Its F1 has "No" as the positive class, and "No" is the right answer to two thirds of the questions: a model that always says
"No" has an F1 of 79.7. Read `no_ratio`, `yes_accuracy` and `always_no` beside it.

Source: github.com/junyangwang0410/AMBER at 534babf6, whose quirks are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from catpo.core.checks import check_word
from catpo.core.types import Sample
from catpo.evaluation.benchmarks import (
    Floats,
    Folder,
    FolderBenchmark,
    Grade,
    Item,
    Pictures,
    Source,
    Sums,
    label_objects,
    only_yes_no,
    percent,
    total,
)
from catpo.text.english import English, load_spacy

GENERATIVE = "generative"
DIMENSIONS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
"""Type of a question in annotations.json -> group."""
QUESTIONS = tuple(dict.fromkeys(DIMENSIONS.values()))
ATTRIBUTES = ("state", "number", "action")
PARTS = {
    "all": (GENERATIVE, *QUESTIONS),
    "generative": (GENERATIVE,),
    "discriminative": QUESTIONS,
    "existence": ("existence",),
    "attribute": ATTRIBUTES,
    "relation": ("relation",),
}
SIMILAR = frozenset({"bicycle", "bike"})
"""Different words of AMBER's vocabulary that en_core_web_lg finds more than 0.8 alike: all published figures that could be
checked come out with this pair, and not without."""
SPACY_MODEL, THRESHOLD = "en_core_web_lg", 0.8
ANSWER_TOKENS = 32
"""Longest answer to a question: none asks for a single word."""
START = 0.001
"""What inference.py's denominators begin with (metrics.txt)."""
RAW = "https://raw.githubusercontent.com/junyangwang0410/AMBER/master/data/"

Slots = Mapping[str, int]
"""Every word that stands for a slot -> the slot, in the order looked through."""
Alike = Callable[[str, Slots], "int | None"]
"""The slot of the first word that means the same as a noun."""


class Benchmark(FolderBenchmark):
    """Descriptions and questions about AMBER's 1,004 pictures.

    Args:
        part: `all`, `generative`, `discriminative`, `existence`, `attribute` or `relation`.
        similarity: when two different words mean the same object: `table` (the pair bicycle and bike), `identity` (never), or
            `spacy` (similarity in en_core_web_lg over 0.8, as the official program asks).
        parser: how a yes/no answer is read. `official`: it must be exactly Yes or No. `tolerant`: first clause in any case,
            else the only yes or no in it. `auto`: official for answers made elsewhere, which their maker has converted, and
            tolerant for a model's own. What is neither is wrong: as in inference.py, accuracy and recall count it, and
            precision, which is that of the answers No, does not; yes_accuracy and unparsed show it.
    """

    max_new_tokens = 512
    sources = (
        Source("annotations.json", ("amber/annotations.json", "data/annotations.json", "annotations.json"),
               RAW + "annotations.json", "db22a436c4836fbb295e60b4e80d519573077579fb7032f01b193c1bd022b797"),
        Source("query_all.json", ("amber/query/query_all.json", "data/query/query_all.json", "query/query_all.json"),
               RAW + "query/query_all.json", "127680ae61f7d4a92d2f7f07a8deaec07f0689b194d2c7c0f41ead7bd2c5bcf5"),
        Source("relation.json", ("amber/relation.json", "data/relation.json", "relation.json"), RAW + "relation.json",
               "c4c1491e9bbc3209abc1888c12a1bf8413bdbab8a0d8be04b990a2e7680cf23e"),
        Source("safe_words.txt", ("amber/safe_words.txt", "data/safe_words.txt", "safe_words.txt"), RAW + "safe_words.txt",
               "f92cf1123f4578a2630832fac3e6ac4de36212ea55859d3bed4fd233723f4043"),
        Source("derived_noun_forms.json", ("amber/derived_noun_forms.json", "data/derived_noun_forms.json"), "",
               "b29558eb11fea3f425ab377bb1bf114b70e2d97b1c704d9266129092ee671fd3",
               is_needed=False, note="surface noun -> word of relation.json; only where WordNet is not to be had"),
    )  # fmt: skip
    pictures = Pictures(
        ("amber/image", "amber/images", "data/image", "image", "images"),
        1004,
        "https://drive.google.com/file/d/1MaCHgtupcZUjf007anNl4_MV0o4DjXvl/view",
        "AMBER_1.jpg to AMBER_1004.jpg",
    )

    def __init__(self, *, part: str = "all", similarity: str = "table", parser: str = "auto") -> None:
        check_word("amber", "part", part, tuple(PARTS))
        check_word("amber", "similarity", similarity, ("table", "identity", "spacy"))
        check_word("amber", "parser", parser, ("auto", "official", "tolerant"))
        self.part, self.parser = part, parser
        self.alike, self.tools = _similarity(similarity)

    def open(self, folder: Folder) -> list[Item]:
        """Descriptions and questions by id."""
        association: Mapping[str, list[str]] = folder.json("relation.json")
        self.association = association
        self.vocabulary = {word for key, words in association.items() for word in (key, *words)}
        self.safe_words = set(folder.read("safe_words.txt").splitlines())
        if GENERATIVE in PARTS[self.part]:
            self.english = English(folder.path)
            self.noun_forms = self._noun_forms(folder)
        annotations = {row["id"]: row for row in folder.json("annotations.json")}
        items = (_item(row, annotations[row["id"]], folder) for row in folder.json("query_all.json"))
        return [item for item in items if item.group in PARTS[self.part]]

    def _noun_forms(self, folder: Folder) -> Mapping[str, str] | None:
        """Lemmas from the derived table, where there is no WordNet; what it lacks, such as "earrings", has none in AMBER."""
        name = "derived_noun_forms.json"
        if self.english.has_wordnet() or folder.find(name) is None:
            return None
        self.english.tools["lemmas"] = name
        forms: Mapping[str, str] = folder.json(name)
        return forms

    def provenance(self) -> dict[str, Any]:
        """Similarity, parser, and what read the nouns."""
        nouns = {"read_with": self.english.tools} if GENERATIVE in PARTS[self.part] else {}
        return {**self.tools, "parser": self._parser(), **nouns}

    def _parser(self) -> str:
        if self.parser != "auto":
            return self.parser
        return "tolerant" if self.is_answered_here else "official"

    def grade(self, item: Item, answer: str) -> Grade:
        """Objects of a description, or a yes/no answer."""
        if item.group == GENERATIVE:
            return self._grade_description(self.nouns(answer), item.sample.truth)
        return _grade_answer(answer if self._parser() == "official" else read_yes_no(answer), item.expected)

    def nouns(self, text: str) -> list[str]:
        """Nouns of a text that AMBER knows, in their base form; not lower-cased; repeats stay."""
        nouns = []
        for word, tag in self.english.tagged(self.english.words(text)):
            if tag.startswith("NN"):
                noun = self.english.lemma(word) if self.noun_forms is None else self.noun_forms.get(word, "")
                if noun in self.vocabulary:
                    nouns.append(noun)
        return nouns

    def _grade_description(self, nouns: Sequence[str], truth: Mapping[str, Any]) -> Grade:
        """inference.py:97-161: nouns against the slots of what is there (`truth`) and of what is tempting (`hallu`)."""
        present, tempting = self._slots(truth["truth"]), self._slots(truth["hallu"])
        covered, tempted, flagged = set(), set(), []
        for noun in nouns:
            if noun in self.safe_words:
                continue
            slot = present.get(noun)
            if slot is None:
                tempted |= {tempting.get(noun), self.alike(noun, tempting)} - {None}
                slot = self.alike(noun, present)
            if slot is None:
                flagged.append(noun)
            else:
                covered.add(slot)
        counts = {
            "responses": 1,
            "clean": int(not flagged),
            "nouns": len(nouns),
            "flagged": len(flagged),
            "slots": len(truth["truth"]),
            "covered": len(covered),
            "tempting": len(truth["hallu"]),
            "tempted": len(tempted),
        }
        return Grade(counts, label_objects(nouns, set(nouns).difference(flagged)), is_right=not flagged)

    def _slots(self, words: Sequence[str]) -> Slots:
        """The slots of associated words, then of the slots' own; where a word stands for several, the first counts."""
        associated = [(word, slot) for slot, own in enumerate(words) for word in self.association[own]]
        own_words = [(own, slot) for slot, own in enumerate(words)]
        slots: dict[str, int] = {}
        for word, slot in associated + own_words:
            slots.setdefault(word, slot)
        return slots

    @staticmethod
    def summarise(sums: Sums) -> dict[str, Floats]:
        """CHAIR, Cover, Hal, Cog; accuracy, precision, recall, F1 of all questions and of each dimension; the AMBER score.

        no_ratio: answers No / questions; yes_accuracy: right / questions whose truth is yes; unparsed: neither Yes nor No.
        """
        metrics: dict[str, Floats] = {}
        if GENERATIVE in sums:
            metrics |= _description_metrics(sums[GENERATIVE])
        asked = [group for group in QUESTIONS if group in sums]
        if asked:
            metrics |= _overall_metrics(total(sums, asked))
        if "chair" in metrics and "f1" in metrics:
            metrics["amber_score"] = (100 - metrics["chair"] + metrics["f1"]) / 2
        for name, groups in _dimensions(asked).items():
            of_dimension = _question_metrics(total(sums, groups), len(groups), name)
            metrics |= {f"{name}/{metric}": values for metric, values in of_dimension.items()}
        return metrics

    @staticmethod
    def official(sums: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """The figures that inference.py prints, rounded to one decimal, and the score of AMBER's README."""
        figures: dict[str, Any] = {}
        if GENERATIVE in sums:
            metrics = _description_metrics(sums[GENERATIVE])
            labels = {"CHAIR": "chair", "Cover": "cover", "Hal": "hal", "Cog": "cog"}
            figures["generative"] = {label: round(metrics[name], 1) for label, name in labels.items()}
        asked = [group for group in QUESTIONS if group in sums]
        if asked:
            parts = {"all": tuple(asked), **_dimensions(asked)}
            figures["discriminative"] = {name.capitalize(): _printed(name, groups, sums) for name, groups in parts.items()}
        if "generative" in figures and asked:
            f1 = figures["discriminative"]["All"]["F1"]
            figures["AMBER_score"] = round((100 - figures["generative"]["CHAIR"] + f1) / 2, 1)
        return figures


def _item(query: Mapping[str, Any], annotation: Mapping[str, Any], folder: Folder) -> Item:
    name, image = str(query["id"]), query["image"]
    is_description = annotation["type"] == GENERATIVE
    truth = {"truth": annotation["truth"], "hallu": annotation["hallu"]} if is_description else {}
    sample = Sample(name, (folder.picture(image),), query["query"], truth=truth)
    if is_description:
        return Item(name, sample, GENERATIVE, image)
    group = DIMENSIONS[annotation["type"]]
    return Item(name, sample, group, image, expected=annotation["truth"], max_new_tokens=ANSWER_TOKENS)


# ---- descriptions ---------------------------------------------------------------------------------------------------------


def _similarity(name: str) -> tuple[Alike, dict[str, str]]:
    """How a word of the same meaning is found, and which tools decided."""
    if name != "spacy":
        return partial(_by_table, SIMILAR if name == "table" else frozenset()), {"similarity": name}
    model, version = load_spacy(
        SPACY_MODEL,
        f"amber(similarity='spacy') needs spaCy with {SPACY_MODEL}, and no smaller model will do: python -m spacy download "
        f"{SPACY_MODEL}. Or leave it out: the table has the same verdicts on all published figures that could be checked.",
    )
    return by_spacy(model), {"similarity": name, "spacy": version, SPACY_MODEL: str(model.meta["version"])}


def _by_table(similar: frozenset[str], noun: str, slots: Slots) -> int | None:
    if noun not in similar:
        return slots.get(noun)
    return next((slot for word, slot in slots.items() if word in similar), None)


def by_spacy(model: Callable[[str], Any]) -> Alike:
    """Similarity of two one-word texts; each word is read once, and each pair compared once."""
    read = cache(model)

    @cache
    def is_similar(noun: str, word: str) -> bool:
        return bool(read(noun).similarity(read(word)) > THRESHOLD)

    return lambda noun, slots: next((slot for word, slot in slots.items() if is_similar(noun, word)), None)


def _description_metrics(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "chair": counts["flagged"] / (counts["nouns"] + START) * 100,
        "cover": counts["covered"] / (counts["slots"] + START) * 100,
        "hal": 100 - counts["clean"] / (counts["responses"] + START) * 100,
        "cog": counts["tempted"] / (counts["tempting"] + START) * 100,
    }


# ---- questions ------------------------------------------------------------------------------------------------------------


def read_yes_no(answer: str) -> str:
    """`Yes` or `No` if the first clause is that, or if it is the only one of the two words in the answer; else nothing.

    >>> read_yes_no("yes, it is."), read_yes_no("There is no dog."), read_yes_no("Yes or no?")
    ('Yes', 'No', '')
    """
    first = re.split(r"[.,]", answer, maxsplit=1)[0].strip().lower()
    return (first if first in ("yes", "no") else only_yes_no(answer)).capitalize()


def _grade_answer(said: str, expected: str) -> Grade:
    is_right = said == expected.capitalize()
    counts = {
        "questions": 1,
        "right": int(is_right),
        "expected_no": int(expected == "no"),
        "said_no": int(said == "No"),
        "right_no": int(said == "No" and expected == "no"),
        "unparsed": int(said not in ("Yes", "No")),
    }
    return Grade(counts, is_right=is_right)


def _dimensions(asked: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Dimension -> the groups that make it up, in the order printed."""
    attributes = tuple(name for name in ATTRIBUTES if name in asked)
    dimensions = {"existence": ("existence",), "attribute": attributes}
    dimensions |= {name: (name,) for name in (*ATTRIBUTES, "relation")}
    return {name: groups for name, groups in dimensions.items() if set(groups) & set(asked)}


def _overall_metrics(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of all questions, with those of a model that says No to everything."""
    metrics = _question_metrics(counts, 1)
    metrics["no_ratio"] = percent(counts["said_no"], counts["questions"])
    true_yes = counts["questions"] - counts["expected_no"]
    metrics["yes_accuracy"] = percent(counts["right"] - counts["right_no"], true_yes)
    metrics["unparsed"] = percent(counts["unparsed"], counts["questions"])
    no = counts["expected_no"]
    always_no = _question_metrics({**counts, "right": no, "said_no": counts["questions"], "right_no": no}, 1)
    return metrics | {f"always_no/{name}": always_no[name] for name in ("accuracy", "f1")}


def _question_metrics(
    counts: Mapping[str, Any], parts: int, name: str = "", *, rounded: Callable[[Any], Any] = lambda x: np.round(x, 1)
) -> dict[str, Any]:
    """inference.py:269-308: "No" is the positive class, F1 is computed from the rounded precision and recall.

    Args:
        counts: sums.
        parts: how many of the program's counters are added up, each of which begins with 0.001.
        name: of the dimension; existence has another term in its F1.
        rounded: to one decimal; NumPy's and Python's differ in the last bit.
    """
    start = START * parts
    precision = counts["right_no"] / (counts["said_no"] + start) * 100
    recall = counts["right_no"] / (counts["expected_no"] + start) * 100
    p, r = rounded(precision) / 100, rounded(recall) / 100
    return {
        "accuracy": counts["right"] / (counts["questions"] + start) * 100,
        "precision": precision,
        "recall": recall,
        "f1": 2 * p * r / (p + r + (0.001 if name == "existence" else 0.0001)) * 100,
    }


def _printed(name: str, groups: Sequence[str], sums: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One block of the program's output."""
    parts = 1 if name == "all" else len(groups)
    metrics = _question_metrics(total(sums, groups), parts, name, rounded=lambda x: round(x, 1))
    return {metric.capitalize(): round(value, 1) for metric, value in metrics.items()}
